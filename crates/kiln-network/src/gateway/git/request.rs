//! What a machine's git asks of the gateway: one of two requests for one repository, or something that is refused. Pure.
//!
//! A path is taken as it is written or not at all: escapes, dots as parts, empty parts and bytes beyond a small set could mean one thing
//! here and another at the server, so none of them is passed on.
//! The protocol: <https://git-scm.com/docs/http-protocol>.

use kiln_core::git_gateway::{GIT_HOST, GitRefused};
use kiln_core::secret::{REPOSITORY_MAX, Repository};

/// Longest path and query of a request, bytes.
pub const TARGET_BYTES_MAX: usize = REPOSITORY_MAX + 64;
/// Longest path that a refusal repeats, characters.
const SHOWN_CHARS_MAX: usize = 200;
/// Type of a request's body.
const UPLOAD_REQUEST: &str = "application/x-git-upload-pack-request";

/// Which of the two requests of a fetch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// What the server has and speaks: `GET .../info/refs?service=git-upload-pack`.
    Refs,
    /// Negotiation and pack: `POST .../git-upload-pack`.
    Pack,
}

impl Step {
    /// Type of a right answer's body.
    #[must_use]
    pub fn answer_type(self) -> &'static str {
        match self {
            Self::Refs => "application/x-git-upload-pack-advertisement",
            Self::Pack => "application/x-git-upload-pack-result",
        }
    }
}

/// A request that may go on to a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GitRequest {
    /// Of which repository.
    pub repository: Repository,
    /// Which one.
    pub step: Step,
    /// Path and query for the server.
    pub target: String,
}

/// A request that may not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Why.
    pub why: GitRefused,
    /// The host and port it was for, as far as one was named.
    pub to: Option<(String, u16)>,
    /// What was asked for there, shortened.
    pub path: String,
}

/// Reads a request line of the guest: the method, and path and query.
///
/// # Errors
/// When it is none of the two requests that read a repository.
pub fn read(method: &str, target: &str) -> Result<GitRequest, Refused> {
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    let refuse = |why| Err(refused(why, path));
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"/.-_+~:".contains(&b);
    let whole = path.strip_prefix('/').unwrap_or_default();
    if target.len() > TARGET_BYTES_MAX || whole.is_empty() || !whole.bytes().all(legal) {
        return refuse(GitRefused::Request);
    }
    let pushes = query.is_some_and(|query| query.contains("receive-pack"));
    let (named, step) = if let Some(named) = whole.strip_suffix("/info/refs") {
        match query {
            Some("service=git-upload-pack") => (named, Step::Refs),
            _ if pushes => return refuse(GitRefused::Push),
            // Without a service, it is the dumb protocol.
            _ => return refuse(GitRefused::Protocol),
        }
    } else if let Some(named) = whole.strip_suffix("/git-upload-pack") {
        (named, Step::Pack)
    } else if whole.ends_with("/git-receive-pack") {
        return refuse(GitRefused::Push);
    } else {
        return refuse(GitRefused::Protocol);
    };
    let right = match step {
        Step::Refs => method == "GET",
        Step::Pack => method == "POST" && query.is_none(),
    };
    // A repository has one more way to be written here than in a policy: none of these.
    let plain = !named.ends_with('/') && !named.contains("//");
    let repository = named.parse::<Repository>().ok().filter(|_| plain);
    let (Some(repository), Some((_, below)), true) = (repository, named.split_once('/'), right)
    else {
        return refuse(GitRefused::Request);
    };
    let target = match step {
        Step::Refs => format!("/{below}/info/refs?service=git-upload-pack"),
        Step::Pack => format!("/{below}/git-upload-pack"),
    };
    Ok(GitRequest {
        repository,
        step,
        target,
    })
}

fn refused(why: GitRefused, path: &str) -> Refused {
    let named = path.strip_prefix('/').unwrap_or(path);
    let (authority, below) = named.split_once('/').unwrap_or((named, ""));
    // A repository is the only thing whose host is known to be one.
    let host = format!("{authority}/x").parse::<Repository>().ok();
    let (to, below) = match host {
        Some(host) => (Some((host.host().to_owned(), host.port())), below),
        None => (None, named),
    };
    let clean = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    Refused {
        why,
        to,
        path: below.chars().take(SHOWN_CHARS_MAX).map(clean).collect(),
    }
}

/// A redirect of a server's answer about its references, as the guest may follow it: a new request, and a new decision. Nothing for one
/// that leads to anything else.
#[must_use]
pub fn redirected(from: &GitRequest, location: &str) -> Option<GitRequest> {
    if from.step != Step::Refs || location.len() > TARGET_BYTES_MAX {
        return None;
    }
    let named = match location.strip_prefix("https://") {
        Some(rest) => format!("/{rest}"),
        None if location.starts_with('/') && !location.starts_with("//") => {
            format!("/{}{location}", from.repository.authority())
        }
        None => return None,
    };
    read("GET", &named).ok()
}

/// Where the guest finds this request here.
#[must_use]
pub fn address(request: &GitRequest) -> String {
    format!(
        "http://{GIT_HOST}/{}{}",
        request.repository.authority(),
        request.target
    )
}

/// Headers of a guest's request, as far as they mean anything to a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// Version of git's protocol that it asks for.
    pub version: Option<&'static str>,
    /// It reads gzip.
    pub gzip: bool,
    /// Its body is gzip.
    pub gzip_body: bool,
}

/// Reads the headers that are passed on; every other one, a login above all, stays here.
///
/// # Errors
/// When the body is not what git sends.
pub fn headers<'a>(
    step: Step,
    get: impl Fn(&'static str) -> Option<&'a [u8]>,
) -> Result<Wanted, GitRefused> {
    let version = match get("git-protocol") {
        Some(b"version=1") => Some("version=1"),
        Some(b"version=2") => Some("version=2"),
        // A server that is not asked speaks the oldest, which every git understands.
        _ => None,
    };
    let gzip_body = match get("content-encoding") {
        None | Some(b"identity") => false,
        Some(b"gzip" | b"x-gzip") => true,
        Some(_) => return Err(GitRefused::Request),
    };
    let typed = get("content-type") == Some(UPLOAD_REQUEST.as_bytes());
    if step == Step::Pack && !typed {
        return Err(GitRefused::Request);
    }
    let gzip = get("accept-encoding").is_some_and(|value| {
        let mut words = value.split(|b| *b == b',');
        words.any(|word| word.trim_ascii().eq_ignore_ascii_case(b"gzip"))
    });
    Ok(Wanted {
        version,
        gzip,
        gzip_body: gzip_body && step == Step::Pack,
    })
}

/// The type that a request with a body says it has.
#[must_use]
pub fn body_type(step: Step) -> Option<&'static str> {
    (step == Step::Pack).then_some(UPLOAD_REQUEST)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const REFS: &str = "/info/refs?service=git-upload-pack";

    #[test]
    fn the_two_requests_of_a_fetch_are_read() {
        for (path, repository, target) in [
            ("/h.example.org/a/b.git", "h.example.org/a/b", "/a/b.git"),
            ("/h.example.org/a", "h.example.org/a", "/a"),
            ("/H.example.org:8443/a", "h.example.org:8443/a", "/a"),
        ] {
            let refs = read("GET", &format!("{path}{REFS}")).expect(path);
            assert_eq!(refs.repository.as_str(), repository);
            assert_eq!(
                (refs.step, refs.target.as_str()),
                (Step::Refs, &*format!("{target}{REFS}"))
            );
            let pack = read("POST", &format!("{path}/git-upload-pack")).expect(path);
            assert_eq!(pack.repository.as_str(), repository);
            assert_eq!(
                (pack.step, pack.target.as_str()),
                (Step::Pack, &*format!("{target}/git-upload-pack"))
            );
        }
    }

    #[test]
    fn everything_else_is_refused_for_its_reason() {
        for (method, target, why) in [
            ("GET", "/h.example.org/a/info/refs", GitRefused::Protocol),
            ("GET", "/h.example.org/a/HEAD", GitRefused::Protocol),
            (
                "GET",
                "/h.example.org/a/objects/info/packs",
                GitRefused::Protocol,
            ),
            (
                "GET",
                "/h.example.org/a/info/refs?service=git-upload-pack&x=1",
                GitRefused::Protocol,
            ),
            (
                "GET",
                "/h.example.org/a/info/refs?service=git-upload-archive",
                GitRefused::Protocol,
            ),
            (
                "GET",
                "/h.example.org/a/info/refs?service=git-receive-pack",
                GitRefused::Push,
            ),
            (
                "POST",
                "/h.example.org/a/git-receive-pack",
                GitRefused::Push,
            ),
            (
                "POST",
                "/h.example.org/a/info/refs?service=git-upload-pack",
                GitRefused::Request,
            ),
            (
                "GET",
                "/h.example.org/a/git-upload-pack",
                GitRefused::Request,
            ),
            (
                "POST",
                "/h.example.org/a/git-upload-pack?x=1",
                GitRefused::Request,
            ),
            (
                "PUT",
                "/h.example.org/a/git-upload-pack",
                GitRefused::Request,
            ),
            ("GET", "/", GitRefused::Request),
            ("GET", "", GitRefused::Request),
            ("GET", "*", GitRefused::Request),
            ("CONNECT", "h.example.org:443", GitRefused::Request),
            (
                "GET",
                "http://git.kiln.internal/h.example.org/a/info/refs?service=git-upload-pack",
                GitRefused::Request,
            ),
        ] {
            let error = read(method, target).expect_err(target);
            assert_eq!(error.why, why, "{method} {target}");
        }
    }

    #[test]
    fn a_repository_is_written_in_one_way() {
        for path in [
            "/h.example.org/a/../b",
            "/h.example.org/./a",
            "/h.example.org/a%2fb",
            "/h.example.org/%2e%2e/a",
            "/h.example.org//a",
            "//h.example.org/a",
            "/h.example.org/a/",
            "/h.example.org/a\\b",
            "/h.example.org/a;b",
            "/h.example.org/a\u{0}",
            "/h.example.org/\u{e9}",
            "/h.example.org/.git",
            "/h.example.org/a/.git",
            "/h.example.org",
            "/user@h.example.org/a",
            "/10.0.0.1/a",
            "/[::1]/a",
            "/git.kiln.internal/a",
            "/h.example.org:0/a",
        ] {
            let error = read("GET", &format!("{path}{REFS}")).expect_err(path);
            assert_eq!(error.why, GitRefused::Request, "{path}");
            assert!(error.path.bytes().all(|b| b.is_ascii_graphic()), "{path}");
        }
        let long = format!("/h.example.org/{}{REFS}", "a".repeat(REPOSITORY_MAX));
        assert!(read("GET", &long).is_err());
    }

    #[test]
    fn a_redirect_is_a_request_like_any_other() {
        let from = read("GET", &format!("/h.example.org/a{REFS}")).expect("request");
        let to = |location: &str| redirected(&from, location).map(|to| address(&to));
        let whole = format!("http://git.kiln.internal/h.example.org/a.git{REFS}");
        assert_eq!(
            to(&format!("https://h.example.org/a.git{REFS}")),
            Some(whole.clone())
        );
        assert_eq!(to(&format!("/a.git{REFS}")), Some(whole));
        let other = format!("http://git.kiln.internal/o.example.org:1/b{REFS}");
        assert_eq!(to(&format!("https://o.example.org:1/b{REFS}")), Some(other));
        for none in [
            format!("http://h.example.org/a{REFS}"),
            format!("//o.example.org/a{REFS}"),
            format!("https://me:pw@h.example.org/a{REFS}"),
            "https://h.example.org/login".to_owned(),
            "a.git".to_owned(),
            String::new(),
        ] {
            assert_eq!(to(&none), None, "{none}");
        }
        let pack = read("POST", "/h.example.org/a/git-upload-pack").expect("request");
        assert_eq!(redirected(&pack, &format!("/a.git{REFS}")), None);
    }

    #[test]
    fn headers_that_mean_nothing_stay_here() {
        let read = |step, pairs: &[(&'static str, &'static str)]| {
            let map: HashMap<_, _> = pairs.iter().copied().collect();
            headers(step, |name| map.get(name).map(|value| value.as_bytes()))
        };
        let typed = ("content-type", UPLOAD_REQUEST);
        let all = read(
            Step::Pack,
            &[
                typed,
                ("git-protocol", "version=2"),
                ("content-encoding", "gzip"),
                ("accept-encoding", "deflate, gzip"),
            ],
        );
        let want = Wanted {
            version: Some("version=2"),
            gzip: true,
            gzip_body: true,
        };
        assert_eq!(all, Ok(want));
        assert_eq!(
            read(Step::Refs, &[("git-protocol", "version=2:x")]),
            Ok(Wanted::default())
        );
        assert_eq!(read(Step::Pack, &[]), Err(GitRefused::Request));
        assert_eq!(
            read(Step::Pack, &[typed, ("content-encoding", "br")]),
            Err(GitRefused::Request)
        );
    }

    proptest! {
        #[test]
        fn what_goes_on_names_its_repository_and_nothing_else(
            method in "GET|POST",
            target in "(/[a-z.%:/~]{0,12}){0,4}(/info/refs|/git-upload-pack|/git-receive-pack)?(\\?service=git-(upload|receive)-pack)?",
        ) {
            if let Ok(request) = read(&method, &target) {
                let path = request.target.split('?').next().unwrap_or_default();
                let ended = path.strip_suffix("/info/refs").or(path.strip_suffix("/git-upload-pack"));
                let url = format!("{}{}", request.repository.authority(), ended.expect("an end"));
                prop_assert_eq!(url.parse::<Repository>().expect("a repository"), request.repository.clone());
                prop_assert!(!path.contains("..") || path.split('/').all(|part| part != ".."), "{}", path);
                prop_assert!(!path.contains('%') && !path.contains("//"));
            }
        }

        #[test]
        fn nothing_panics(method in ".{0,8}", target in ".{0,80}") {
            let _read = read(&method, &target);
        }
    }
}
