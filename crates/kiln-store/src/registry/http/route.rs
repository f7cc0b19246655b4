//! From method and path to what is asked. Names contain slashes, so the path is read from its end.
//!
//! Endpoints: OCI distribution-spec v1.1, table "Endpoints", plus `_catalog` as docker has it.

use kiln_core::Digest;

use crate::registry::name::{ParseReferenceError, Reference, RepoName};

/// Longest path looked at, bytes.
const PATH_BYTES_MAX: usize = 1024;

/// What a path names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Route {
    /// `/v2/`
    Base,
    /// `/v2/_catalog`
    Catalog,
    /// `/v2/<name>/blobs/<digest>`
    Blob(RepoName, Digest),
    /// `/v2/<name>/blobs/uploads/`
    Uploads(RepoName),
    /// `/v2/<name>/blobs/uploads/<id>`
    Upload(RepoName, String),
    /// `/v2/<name>/manifests/<reference>`
    Manifest(RepoName, Reference),
    /// `/v2/<name>/tags/list`
    Tags(RepoName),
    /// `/v2/<name>/referrers/<digest>`
    Referrers(RepoName, Digest),
}

/// Why a path names nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RouteError {
    /// No such endpoint.
    NotFound,
    /// The repository name is not legal.
    Name,
    /// The digest is not one, or not sha256.
    Digest,
    /// The tag is not legal.
    Tag,
}

impl Route {
    /// What a path names.
    ///
    /// # Errors
    /// Why it names nothing.
    pub fn parse(path: &str) -> Result<Self, RouteError> {
        if path.len() > PATH_BYTES_MAX {
            return Err(RouteError::NotFound);
        }
        let path = percent_decoded(path).ok_or(RouteError::NotFound)?;
        let rest = match path.as_str() {
            "/v2" => "",
            path => path.strip_prefix("/v2/").ok_or(RouteError::NotFound)?,
        };
        match rest {
            "" => return Ok(Self::Base),
            "_catalog" => return Ok(Self::Catalog),
            _ => {}
        }
        if let Some(name) = rest.strip_suffix("/tags/list") {
            return Ok(Self::Tags(repo(name)?));
        }
        if let Some(name) = rest
            .strip_suffix("/blobs/uploads/")
            .or_else(|| rest.strip_suffix("/blobs/uploads"))
        {
            return Ok(Self::Uploads(repo(name)?));
        }
        let (head, last) = rest.rsplit_once('/').ok_or(RouteError::NotFound)?;
        let digest = || last.parse().map_err(|_| RouteError::Digest);
        if let Some(name) = head.strip_suffix("/blobs/uploads") {
            return Ok(Self::Upload(repo(name)?, session_id(last)?));
        }
        if let Some(name) = head.strip_suffix("/blobs") {
            return Ok(Self::Blob(repo(name)?, digest()?));
        }
        if let Some(name) = head.strip_suffix("/referrers") {
            return Ok(Self::Referrers(repo(name)?, digest()?));
        }
        if let Some(name) = head.strip_suffix("/manifests") {
            let reference = last.parse().map_err(|error| match error {
                ParseReferenceError::Digest(_) => RouteError::Digest,
                ParseReferenceError::Tag(_) => RouteError::Tag,
            })?;
            return Ok(Self::Manifest(repo(name)?, reference));
        }
        Err(RouteError::NotFound)
    }

    /// The repository it is about.
    #[must_use]
    pub fn repo(&self) -> Option<&RepoName> {
        match self {
            Self::Base | Self::Catalog => None,
            Self::Blob(repo, _)
            | Self::Uploads(repo)
            | Self::Upload(repo, _)
            | Self::Manifest(repo, _)
            | Self::Tags(repo)
            | Self::Referrers(repo, _) => Some(repo),
        }
    }
}

fn repo(text: &str) -> Result<RepoName, RouteError> {
    text.parse().map_err(|_| RouteError::Name)
}

/// Ids are ours: 32 lower-case hex digits.
fn session_id(text: &str) -> Result<String, RouteError> {
    let legal = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    legal.then(|| text.to_owned()).ok_or(RouteError::NotFound)
}

/// Decodes `%XX` once. `None` for broken escapes, bytes that are not UTF-8, and control characters.
pub(crate) fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first != b'%' {
            bytes.push(*first);
            rest = tail;
            continue;
        }
        let mut byte = [0];
        hex::decode_to_slice(tail.get(..2)?, &mut byte).ok()?;
        bytes.push(byte[0]);
        rest = &tail[2..];
    }
    let text = String::from_utf8(bytes).ok()?;
    (!text.chars().any(char::is_control)).then_some(text)
}

/// A text as a value of a query.
#[must_use]
pub fn percent_encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes()
        .map(|byte| match plain(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}

/// Every value of `key` in a query string, decoded (`+` is a space). Broken pairs are left out.
pub(crate) fn query_values(query: Option<&str>, key: &str) -> Vec<String> {
    let value = |text: &str| percent_decoded(&text.replace('+', " "));
    query
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(name, _)| value(name).as_deref() == Some(key))
        .filter_map(|(_, text)| value(text))
        .collect()
}

/// The first value of `key` in a query string.
#[must_use]
pub fn query_value(query: Option<&str>, key: &str) -> Option<String> {
    query_values(query, key).into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_look_like_endpoints_are_still_names() {
        let digest = Digest::of(b"x");
        let blob = Route::parse(&format!("/v2/a/blobs/b/blobs/{digest}")).expect("legal");
        assert_eq!(
            blob,
            Route::Blob("a/blobs/b".parse().expect("name"), digest)
        );
        let tags = Route::parse("/v2/tags/list/tags/list").expect("legal");
        assert_eq!(tags, Route::Tags("tags/list".parse().expect("name")));
        assert_eq!(Route::parse("/v2"), Ok(Route::Base));
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        for (path, error) in [
            ("/", RouteError::NotFound),
            ("/v1/x", RouteError::NotFound),
            ("/v2/a", RouteError::NotFound),
            ("/v2/A/tags/list", RouteError::Name),
            ("/v2/../tags/list", RouteError::Name),
            ("/v2/%2e%2e/tags/list", RouteError::Name),
            ("/v2/a/blobs/sha512:00", RouteError::Digest),
            ("/v2/a/manifests/sha256:00", RouteError::Digest),
            ("/v2/a/manifests/-x", RouteError::Tag),
            ("/v2/a/manifests/%00", RouteError::NotFound),
            ("/v2/a/blobs/uploads/../x", RouteError::NotFound),
        ] {
            assert_eq!(Route::parse(path), Err(error), "{path}");
        }
    }

    #[test]
    fn queries_are_decoded_once() {
        let query = Some("scope=repository%3Aa%2Fb%3Apull&scope=x+y&n=5&bad=%zz");
        assert_eq!(query_values(query, "scope"), ["repository:a/b:pull", "x y"]);
        assert_eq!(query_value(query, "n").as_deref(), Some("5"));
        assert_eq!(query_value(query, "bad"), None);
    }

    proptest! {
        #[test]
        fn any_path_is_parsed_or_refused(path in "[/a-z0-9.%:_-]{0,80}|\\PC{0,60}") {
            let _ = Route::parse(&path);
        }

        #[test]
        fn a_parsed_name_never_escapes(path in "/v2/[a-z./%0-9_-]{1,40}/tags/list") {
            if let Ok(Route::Tags(repo)) = Route::parse(&path) {
                prop_assert!(repo.as_str().split('/').all(|c| !c.is_empty() && !c.starts_with(['.', '_'])));
            }
        }
    }
}
