//! Reads an index to see where its files live: npm's packument, pip's simple page (PEP 503 and 691).
//!
//! Pure parsers of what a registry answered; only the first file's address is wanted.

use serde::Deserialize;

use crate::origin::Origin;

/// What npm's client asks for.
pub(super) const NPM_ACCEPT: &str = "application/vnd.npm.install-v1+json, application/json;q=0.8";
/// What pip's client asks for.
pub(super) const SIMPLE_ACCEPT: &str = "application/vnd.pypi.simple.v1+json, text/html;q=0.2, application/vnd.pypi.simple.v1+html;q=0.1";

#[derive(Deserialize)]
struct Packument {
    versions: std::collections::BTreeMap<String, PackumentVersion>,
}

#[derive(Deserialize)]
struct PackumentVersion {
    dist: Dist,
}

#[derive(Deserialize)]
struct Dist {
    tarball: String,
}

#[derive(Deserialize)]
struct SimplePage {
    files: Vec<SimpleFile>,
}

#[derive(Deserialize)]
struct SimpleFile {
    url: String,
}

/// Address of some file in an npm packument.
pub(super) fn npm_file(page: &Origin, body: &[u8]) -> Option<Origin> {
    let packument: Packument = serde_json::from_slice(body).ok()?;
    let mut versions = packument.versions.into_values();
    versions.find_map(|version| page.join(&version.dist.tarball))
}

/// Address of some file on a page of a simple index, JSON or HTML.
pub(super) fn simple_file(page: &Origin, body: &[u8]) -> Option<Origin> {
    if let Ok(simple) = serde_json::from_slice::<SimplePage>(body) {
        return simple.files.iter().find_map(|file| page.join(&file.url));
    }
    let text = String::from_utf8_lossy(body);
    hrefs(&text).find_map(|href| page.join(&href))
}

/// The targets of links that look like files.
fn hrefs(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split("href=").skip(1).filter_map(|rest| {
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let target = rest[1..].split(quote).next()?;
        let path = target.split(['#', '?']).next().unwrap_or_default();
        let file = [".whl", ".tar.gz", ".zip", ".tar.bz2", ".tgz"];
        file.iter()
            .any(|end| path.ends_with(end))
            .then(|| target.replace("&amp;", "&"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn files_of_both_kinds_of_index() {
        let page = Origin::parse("https://mirror.example.org/simple/x/").expect("url");
        let npm =
            br#"{"versions": {"1.0.0": {"dist": {"tarball": "https://files.example.org/x.tgz"}}}}"#;
        assert_eq!(
            npm_file(&page, npm).expect("file").host,
            "files.example.org"
        );
        let json = br#"{"files": [{"url": "../../packages/x.whl"}]}"#;
        assert_eq!(
            simple_file(&page, json).expect("file").host,
            "mirror.example.org"
        );
        let html =
            b"<a href=\"/about\">x</a><a href='https://files.example.org/x.whl#sha256=1'>x</a>";
        assert_eq!(
            simple_file(&page, html).expect("file").host,
            "files.example.org"
        );
        assert_eq!(simple_file(&page, b"<html>sign in</html>"), None);
        assert_eq!(npm_file(&page, b"[]"), None);
    }

    proptest! {
        #[test]
        fn arbitrary_pages_never_panic(body in "(href=|[ -~é]){0,40}") {
            let page = Origin::parse("https://mirror.example.org/simple/x/").expect("url");
            let _ = simple_file(&page, body.as_bytes());
            let _ = npm_file(&page, body.as_bytes());
        }
    }
}
