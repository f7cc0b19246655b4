//! The parsers of this room that read bytes others wrote, in one place for the fuzz targets. Not for other rooms: each
//! function says nothing and stops the process where a promise is broken.

use crate::image::ImageConfig;
use crate::registry::http::range::{Wanted, chunk, wanted};
use crate::registry::http::route::{Route, percent_decoded, query_value};
use crate::registry::loopback::fuzz_credential;
use crate::registry::manifest::{DESCRIPTORS_MAX, Manifest};
use crate::registry::{Reference, RepoName, token};
use crate::remote::fuzz_remote;

/// Manifests, indexes and configurations.
pub fn manifest(bytes: &[u8]) {
    for content_type in [
        None,
        Some("application/json"),
        Some(crate::registry::manifest::OCI_INDEX),
    ] {
        if let Ok(manifest) = Manifest::parse(bytes, content_type) {
            let count = manifest.blobs().count() + manifest.manifests().len();
            assert!(count <= DESCRIPTORS_MAX + 1, "{count} descriptors");
            let again = Manifest::parse(bytes, Some(&manifest.media_type));
            assert_eq!(again.ok().as_ref(), Some(&manifest));
        }
    }
    if let Ok(config) = ImageConfig::parse(bytes) {
        assert!(config.env.iter().all(|text| !text.contains('\0')));
    }
}

/// Paths, queries and the two range headers.
pub fn http(text: &str) {
    if let Ok(route) = Route::parse(text)
        && let Some(repo) = route.repo()
    {
        name(repo.as_str());
    }
    let (path, query) = text.split_once('?').unwrap_or((text, text));
    if let Some(decoded) = percent_decoded(path) {
        assert!(decoded.len() <= path.len());
    }
    for key in ["digest", "mount", "from", "n", "last"] {
        let _any = query_value(Some(query), key);
    }
    for size in [0, 1, 10, u64::MAX] {
        if let Wanted::Part { start, len } = wanted(Some(text), size) {
            assert!(len > 0 && start < size && len <= size - start);
        }
    }
    if let Some((start, end)) = chunk(text) {
        assert!(start <= end);
    }
}

/// Repository names and references: what is legal is a safe relative path.
pub fn name(text: &str) {
    if let Ok(repo) = text.parse::<RepoName>() {
        assert_eq!(repo.as_str(), text);
        let safe = |part: &str| !part.is_empty() && !part.starts_with(['.', '_']);
        assert!(text.split('/').all(safe) && text.len() <= 255, "{text:?}");
    }
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(
            reference.to_string().parse::<Reference>().ok(),
            Some(reference)
        );
        assert!(!text.contains('/') && text != "." && text != "..");
    }
    if let Ok(image) = text.parse::<kiln_core::ImageRef>() {
        let again = image.to_string().parse::<kiln_core::ImageRef>();
        assert_eq!(again.ok(), Some(image));
    }
}

/// Logins and tokens of our own door, challenges and files of logins of others.
pub fn login(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        token::fuzz_token(text);
        fuzz_credential(text);
        fuzz_remote(text, bytes);
    } else {
        fuzz_remote("", bytes);
    }
}
