//! What is checked out: an https URL and a ref, as far as they can be judged before anything is asked.

use kiln_core::network::Protocol;
use kiln_core::{AllowRule, FailureClass};
use kiln_image::git_tree::ObjectId;

use crate::failure::Failure;

/// Longest URL, bytes.
const URL_BYTES_MAX: usize = 2048;
/// Longest ref, bytes.
const REF_BYTES_MAX: usize = 255;
/// Port of https.
const HTTPS_PORT: u16 = 443;

/// A repository to fetch from, and what of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// The URL, without login.
    pub url: String,
    /// Its host and port, and nothing else.
    pub rule: AllowRule,
    /// What to fetch.
    pub reference: Reference,
}

/// What to fetch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reference {
    /// The remote's default branch.
    Head,
    /// A branch or tag by name.
    Name(String),
    /// Exactly this commit.
    Commit(ObjectId),
}

impl Reference {
    /// As `git fetch` takes it.
    #[must_use]
    pub fn refspec(&self) -> String {
        match self {
            Self::Head => "HEAD".to_owned(),
            Self::Name(name) => name.clone(),
            Self::Commit(id) => id.to_string(),
        }
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.refspec())
    }
}

fn usage(message: String) -> Failure {
    Failure::new(FailureClass::Usage, message)
}

impl Address {
    /// From a URL and a ref as people write them.
    ///
    /// # Errors
    /// Usage: not https, a login in the URL, an address instead of a name, a ref git would not have.
    pub fn new(url: &str, reference: Option<&str>) -> Result<Self, Failure> {
        let shown: String = url.chars().take(200).collect();
        let rest = url.strip_prefix("https://").ok_or_else(|| {
            usage(format!("{shown:?} is not an https URL"))
                .hint("git sources are fetched by https only")
        })?;
        if url.len() > URL_BYTES_MAX
            || !url.bytes().all(|byte| byte.is_ascii_graphic())
            || url.contains(['#', '\\', '"'])
        {
            return Err(usage(format!(
                "{shown:?} is not a URL: percent-encode what is not plain ASCII"
            )));
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.contains('@') {
            // The URL is not shown: what stands before the '@' may be a password.
            return Err(usage("the git URL holds a login".to_owned())
                .hint("no login enters a checkout machine; clone a private repository and give the folder"));
        }
        if path.trim_matches('/').is_empty() {
            return Err(usage(format!("{shown:?} names a host and no repository")));
        }
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|port| *port != 0)),
            None => (authority, Some(HTTPS_PORT)),
        };
        let port = port.ok_or_else(|| usage(format!("{shown:?} has a port that is none")))?;
        let rule = AllowRule::new(host, &[port]).map_err(|error| usage(error.to_string()))?;
        let rule = rule.with_protocol(Protocol::Tls);
        let reference = match reference {
            None => Reference::Head,
            Some(text) => parse_reference(text)?,
        };
        Ok(Self {
            url: url.to_owned(),
            rule,
            reference,
        })
    }
}

fn parse_reference(text: &str) -> Result<Reference, Failure> {
    if let Ok(id) = text.parse() {
        return Ok(Reference::Commit(id));
    }
    let refuse = |why: &str| {
        let shown: String = text.chars().take(100).collect();
        Err(usage(format!(
            "{shown:?} is not a branch, tag or commit: {why}"
        )))
    };
    if text.is_empty() || text.len() > REF_BYTES_MAX {
        return refuse("it is empty or too long");
    }
    if text.contains(':') {
        return refuse(
            "a subfolder is set with `subfolder` under [build] in kiln.toml, not in the URL",
        );
    }
    // git-check-ref-format(1), and no option or refspec.
    let odd = |c: char| c.is_control() || c.is_whitespace() || "~^?*[\\+".contains(c);
    let parts_ok = text
        .split('/')
        .all(|part| !part.is_empty() && !part.starts_with(['.', '-']) && !part.ends_with(".lock"));
    if text.contains(odd)
        || text.contains("..")
        || text.contains("@{")
        || text.ends_with('.')
        || text == "@"
        || !parts_ok
    {
        return refuse("git has no such names");
    }
    Ok(Reference::Name(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_and_port() {
        let plain =
            Address::new("https://Git.example.org/team/app.git", Some("main")).expect("legal");
        assert_eq!(plain.rule.to_string(), "git.example.org:443/tls");
        assert_eq!(plain.reference, Reference::Name("main".to_owned()));
        let port = Address::new("https://git.example.org:8443/app", None).expect("legal");
        assert_eq!(
            (
                port.rule.to_string().as_str(),
                port.reference.refspec().as_str()
            ),
            ("git.example.org:8443/tls", "HEAD")
        );
        let commit = "85c3f8a9a2b04bd8e6e2d7e61a3b9fd2c35c7b1e";
        let exact = Address::new("https://git.example.org/app", Some(commit)).expect("legal");
        assert!(matches!(exact.reference, Reference::Commit(id) if id.to_string() == commit));
    }

    #[test]
    fn urls_that_are_refused() {
        for bad in [
            "http://git.example.org/a",
            "ssh://git.example.org/a",
            "ext::sh -c x",
            "https://127.0.0.1/a",
            "https://[::1]/a",
            "https://git.example.org",
            "https://git.example.org//",
            "https://git.example.org:0/a",
            "https://git.example.org:x/a",
            "https://git.example.org/a b",
            "https://-git.example.org/a",
            "https:///a",
        ] {
            assert!(Address::new(bad, None).is_err(), "{bad}");
        }
        let error = Address::new("https://ann:pa55@git.example.org/a", None).expect_err("a login");
        assert!(!error.message.contains("pa55"));
    }

    #[test]
    fn refs_that_are_refused() {
        for bad in [
            "", "-u", "a..b", "a b", "a:b", "+a", "a^", "refs//a", "/a", "a/", "a.lock", "a@{1}",
            "@", "a/.b", "a\n",
        ] {
            assert!(
                Address::new("https://git.example.org/a", Some(bad)).is_err(),
                "{bad:?}"
            );
        }
        for good in [
            "v1.2.3",
            "refs/heads/main",
            "feature/x-1",
            "release_2",
            "\u{e4}",
        ] {
            assert!(
                Address::new("https://git.example.org/a", Some(good)).is_ok(),
                "{good}"
            );
        }
    }
}
