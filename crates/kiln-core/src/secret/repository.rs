//! Repositories by name, and patterns of them: what a secret's scope is made of.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ParseSecretError, wrong};
use crate::AllowRule;

/// Longest repository or pattern, bytes.
pub const REPOSITORY_MAX: usize = 512;

/// A repository that is read over https: `host[:port]/path`, the host in lower case, without `.git`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Repository(String);

impl Repository {
    /// Of an https URL that names it in one way only. Nothing when the server could understand it in another: with escapes, dots as parts,
    /// a query, a login; and nothing for http, which proves no host.
    #[must_use]
    pub fn of_url(url: &str) -> Option<Self> {
        let rest = url.strip_prefix("https://")?;
        let (host, path) = rest.split_once('/')?;
        let host = host.strip_suffix(":443").unwrap_or(host);
        let path = path.strip_suffix('/').unwrap_or(path);
        let path = path.strip_suffix(".git").unwrap_or(path);
        let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let host_legal = |b: u8| name(b) || b == b':';
        let path_legal = |b: u8| name(b) || matches!(b, b'/' | b'+' | b'~');
        if host.is_empty() || !host.bytes().all(host_legal) || !path.bytes().all(path_legal) {
            return None;
        }
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return None;
        }
        let text = format!("{}/{path}", host.to_ascii_lowercase());
        (text.len() <= REPOSITORY_MAX).then_some(Self(text))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its server: `host`, or `host:port` where that is not 443.
    #[must_use]
    pub fn authority(&self) -> &str {
        self.0
            .split_once('/')
            .map_or(&self.0, |(authority, _)| authority)
    }

    /// The name of its server.
    #[must_use]
    pub fn host(&self) -> &str {
        let authority = self.authority();
        authority
            .split_once(':')
            .map_or(authority, |(host, _)| host)
    }

    /// The port of its server.
    #[must_use]
    pub fn port(&self) -> u16 {
        let port = self.authority().split_once(':');
        port.and_then(|(_, port)| port.parse().ok()).unwrap_or(443)
    }
}

impl FromStr for Repository {
    type Err = ParseSecretError;

    /// `host[:port]/path` or an https URL of it. The host is a name that a rule could say, never an address.
    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        let what = "a repository";
        let url = match text.starts_with("https://") {
            true => text.to_owned(),
            false => format!("https://{text}"),
        };
        let rule =
            "write host/path, for example git.example.org/team/app: letters, digits and . _ - + ~";
        let found = Self::of_url(&url).ok_or_else(|| wrong(text, what, rule))?;
        let (host, port) = match found.authority().split_once(':') {
            None => (found.authority(), Some(443)),
            Some((host, port)) => (host, port.parse().ok()),
        };
        let port = port.ok_or_else(|| wrong(text, what, "its port is a number"))?;
        let host = AllowRule::new(host, &[port]);
        host.map_err(|_| {
            wrong(
                text,
                what,
                "its host is written as a name, no address, and none of kiln's own",
            )
        })?;
        Ok(found)
    }
}

impl TryFrom<String> for Repository {
    type Error = ParseSecretError;

    fn try_from(text: String) -> Result<Self, ParseSecretError> {
        text.parse()
    }
}

impl From<Repository> for String {
    fn from(repository: Repository) -> Self {
        repository.0
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Repositories: `host/team/app` is one, `*` stands for any text within one part, `**` as a part of its own for one or more parts.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RepositoryPattern(String);

impl RepositoryPattern {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The server of all of them, as it is written: `host` or `host:port`.
    #[must_use]
    pub fn authority(&self) -> &str {
        self.0
            .split_once('/')
            .map_or(&self.0, |(authority, _)| authority)
    }

    /// Whether a repository is one of them.
    #[must_use]
    pub fn matches(&self, repository: &Repository) -> bool {
        let pattern: Vec<&str> = self.0.split('/').collect();
        let parts: Vec<&str> = repository.0.split('/').collect();
        parts_match(&pattern, &parts)
    }
}

/// Whether all parts fit, each star of parts tried once per place: reachable places are kept instead of trying every way.
fn parts_match(pattern: &[&str], parts: &[&str]) -> bool {
    let mut at = vec![false; parts.len() + 1];
    at[0] = true;
    for word in pattern {
        let mut next = vec![false; parts.len() + 1];
        for (place, part) in parts.iter().enumerate() {
            if *word == "**" {
                next[place + 1] = at[place] || next[place];
            } else if at[place] && text_matches(word.as_bytes(), part.as_bytes()) {
                next[place + 1] = true;
            }
        }
        at = next;
    }
    at[parts.len()]
}

fn text_matches(pattern: &[u8], text: &[u8]) -> bool {
    let mut at = vec![false; text.len() + 1];
    at[0] = true;
    for wanted in pattern {
        let mut next = vec![false; text.len() + 1];
        if *wanted == b'*' {
            next[0] = at[0];
        }
        for (place, byte) in text.iter().enumerate() {
            next[place + 1] = match *wanted {
                b'*' => at[place + 1] || next[place],
                wanted => at[place] && wanted == *byte,
            };
        }
        at = next;
    }
    at[text.len()]
}

impl FromStr for RepositoryPattern {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        let what = "a pattern of repositories";
        let text_of = text.strip_prefix("https://").unwrap_or(text);
        let plain = text_of.strip_suffix(".git").unwrap_or(text_of);
        let Some((host, path)) = plain.split_once('/') else {
            let rule = "write host/team/app, with * for any name and ** for any names";
            return Err(wrong(text, what, rule));
        };
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_.+~*/".contains(&b);
        let host_legal = |b: u8| b.is_ascii_alphanumeric() || b"-.:".contains(&b);
        if host.is_empty() || !host.bytes().all(host_legal) {
            let rule = "it begins with one host, written out";
            return Err(wrong(text, what, rule));
        }
        let parts_legal = path.split('/').all(|part| {
            let stars_alone = part == "**" || !part.contains("**");
            !matches!(part, "" | "." | "..") && stars_alone
        });
        if text.len() > REPOSITORY_MAX || !path.bytes().all(legal) || !parts_legal {
            let rule = "parts are letters, digits, - _ . + ~ and *, or ** alone";
            return Err(wrong(text, what, rule));
        }
        Ok(Self(format!("{}/{path}", host.to_ascii_lowercase())))
    }
}

impl TryFrom<String> for RepositoryPattern {
    type Error = ParseSecretError;

    fn try_from(text: String) -> Result<Self, ParseSecretError> {
        text.parse()
    }
}

impl From<RepositoryPattern> for String {
    fn from(pattern: RepositoryPattern) -> Self {
        pattern.0
    }
}

impl fmt::Display for RepositoryPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> RepositoryPattern {
        text.parse().expect(text)
    }

    fn repository(url: &str) -> Repository {
        Repository::of_url(url).expect(url)
    }

    #[test]
    fn a_repository_is_named_in_one_way_or_not_at_all() {
        let plain = repository("https://git.example.org/team/app");
        for same in [
            "https://GIT.example.org/team/app.git",
            "https://git.example.org:443/team/app/",
        ] {
            assert_eq!(repository(same), plain, "{same}");
        }
        assert_ne!(repository("https://git.example.org:8443/team/app"), plain);
        for none in [
            "http://git.example.org/team/app",
            "https://git.example.org",
            "https://git.example.org/",
            "https://git.example.org/team/../app",
            "https://git.example.org/team/%2e%2e/app",
            "https://git.example.org//app",
            "https://me@git.example.org/app",
            "https://git.example.org/app?x=1",
            "ssh://git.example.org/app",
        ] {
            assert_eq!(Repository::of_url(none), None, "{none}");
        }
    }

    #[test]
    fn a_repository_reads_back_and_its_host_is_a_name() {
        for (text, host, port) in [
            ("git.example.org/team/app", "git.example.org", 443),
            ("git.example.org:8443/~me/a+b", "git.example.org", 8443),
        ] {
            let one: Repository = text.parse().expect(text);
            assert_eq!(
                (one.to_string().as_str(), one.host(), one.port()),
                (text, host, port)
            );
            let json = serde_json::to_string(&one).expect("json");
            assert_eq!(
                serde_json::from_str::<Repository>(&json).expect("json"),
                one
            );
        }
        let same: Repository = "https://Git.example.org/team/app.git".parse().expect("url");
        assert_eq!(same.as_str(), "git.example.org/team/app");
        for bad in [
            "git.example.org",
            "git.example.org/",
            "git.example.org:/a",
            "git.example.org:x/a",
            "git.example.org:0/a",
            "git.example.org:70000/a",
            "a:b:1/c",
            "10.0.0.1/a",
            "registry.kiln.internal/a",
            "-x.example.org/a",
            "git@git.example.org/a",
            "git.example.org/.git",
            "git.example.org/a/.git",
            "git.example.org/a//b",
            "git.example.org/a/../b",
            "git.example.org/a%2fb",
            "http://git.example.org/a",
            "",
        ] {
            assert!(bad.parse::<Repository>().is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_stay_within_their_parts() {
        let app = repository("https://git.example.org/team/app");
        for yes in [
            "git.example.org/team/app",
            "https://Git.example.org/team/app.git",
            "git.example.org/team/*",
            "git.example.org/*/a*p",
            "git.example.org/**",
            "git.example.org/**/app",
        ] {
            assert!(pattern(yes).matches(&app), "{yes}");
        }
        for no in [
            "git.example.org/*",
            "git.example.org/team/ap",
            "git.example.org/team/app/**",
            "git.example.org/team/a*x",
            "git.example.com/team/app",
            "git.example.org/TEAM/app",
        ] {
            assert!(!pattern(no).matches(&app), "{no}");
        }
        for bad in [
            "",
            "app",
            "*/team/app",
            "git.example.org/",
            "git.example.org/a**",
            "git.example.org/../x",
            "git.example.org/a b",
        ] {
            assert!(bad.parse::<RepositoryPattern>().is_err(), "{bad}");
        }
    }

    /// The meaning of a pattern as a regular expression would have it, tried every way.
    fn plainly(pattern: &[&str], parts: &[&str]) -> bool {
        fn word(p: &[u8], t: &[u8]) -> bool {
            match (p.first(), t.first()) {
                (None, None) => true,
                (Some(b'*'), _) => word(&p[1..], t) || (!t.is_empty() && word(p, &t[1..])),
                (Some(a), Some(b)) if a == b => word(&p[1..], &t[1..]),
                _ => false,
            }
        }
        match (pattern.split_first(), parts.split_first()) {
            (None, None) => true,
            (Some((&"**", rest)), Some((_, more))) => plainly(rest, more) || plainly(pattern, more),
            (Some((p, rest)), Some((part, more))) => {
                word(p.as_bytes(), part.as_bytes()) && plainly(rest, more)
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_mean_what_they_say(
            pattern in "h.example(/([a-b*]{1,3}|\\*\\*)){1,4}", path in "[ab]{1,2}(/[ab]{1,2}){0,3}",
        ) {
            let Ok(read) = pattern.parse::<RepositoryPattern>() else { return Ok(()) };
            let from = repository(&format!("https://h.example/{path}"));
            let (words, parts): (Vec<_>, Vec<_>) =
                (read.as_str().split('/').collect(), from.as_str().split('/').collect());
            prop_assert_eq!(read.matches(&from), plainly(&words, &parts));
        }
    }
}
