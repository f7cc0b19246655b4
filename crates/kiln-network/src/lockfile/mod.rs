//! Which hosts a lockfile names, so that a build that may not reach them fails before it starts.
//!
//! Pure: bytes in, lines and hosts out. It looks only at the fields a package manager downloads from, never at
//! descriptions or funding links. Whether a host is allowed is for the caller to say.
//! A lockfile comes from a tenant: everything is bounded, and nothing but the host is kept of a URL, since URLs
//! carry tokens.

mod text;

use std::fmt;

use kiln_core::network::{NameVerdict, NetworkPolicy, normal_host};

/// Most bytes of a lockfile.
pub const LOCKFILE_BYTES_MAX: usize = 64 << 20;
/// Most distinct hosts that are listed; a lockfile with more is refused as a whole.
pub const HOSTS_MAX: usize = 256;
/// Deepest nesting that is walked.
const DEPTH_MAX: usize = 64;

/// The lockfile formats.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LockfileKind {
    /// `package-lock.json` and `npm-shrinkwrap.json`.
    Npm,
    /// `pnpm-lock.yaml`.
    Pnpm,
    /// `yarn.lock` of yarn 1.
    Yarn,
    /// `yarn.lock` of yarn 2 and later.
    Berry,
    /// `requirements*.txt`.
    Requirements,
    /// `uv.lock`.
    Uv,
    /// `poetry.lock`.
    Poetry,
    /// `pdm.lock`.
    Pdm,
    /// `Pipfile.lock`.
    Pipenv,
}

impl LockfileKind {
    /// The format of a file by its name, and by its content for the two formats of `yarn.lock`.
    #[must_use]
    pub fn of(name: &str, bytes: &[u8]) -> Option<Self> {
        let berry = || {
            let mark = b"__metadata:";
            let head = &bytes[..bytes.len().min(4096)];
            head.windows(mark.len()).any(|part| part == mark)
        };
        Some(match name {
            "package-lock.json" | "npm-shrinkwrap.json" => Self::Npm,
            "pnpm-lock.yaml" => Self::Pnpm,
            "yarn.lock" if berry() => Self::Berry,
            "yarn.lock" => Self::Yarn,
            "uv.lock" => Self::Uv,
            "poetry.lock" => Self::Poetry,
            "pdm.lock" => Self::Pdm,
            "Pipfile.lock" => Self::Pipenv,
            _ if name.starts_with("requirements") && name.ends_with(".txt") => Self::Requirements,
            _ => return None,
        })
    }
}

impl fmt::Display for LockfileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Npm => "npm lockfile",
            Self::Pnpm => "pnpm lockfile",
            Self::Yarn => "yarn 1 lockfile",
            Self::Berry => "yarn lockfile",
            Self::Requirements => "requirements file",
            Self::Uv => "uv lockfile",
            Self::Poetry => "poetry lockfile",
            Self::Pdm => "pdm lockfile",
            Self::Pipenv => "pipenv lockfile",
        })
    }
}

/// A host a lockfile names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LockedHost {
    /// Line of its first mention, counted from 1.
    pub line: usize,
    /// Lower-case host name, or an address as written.
    pub host: String,
    /// Port the download would use.
    pub port: u16,
}

/// Why a lockfile cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LockfileError {
    /// Larger than [`LOCKFILE_BYTES_MAX`].
    #[error("the {0} is larger than {LOCKFILE_BYTES_MAX} bytes")]
    TooLong(LockfileKind),
    /// More than [`HOSTS_MAX`] hosts.
    #[error("the {0} names more than {HOSTS_MAX} hosts")]
    TooManyHosts(LockfileKind),
    /// Not text.
    #[error("the {0} is not UTF-8 text")]
    NotText(LockfileKind),
    /// Not JSON.
    #[error("the {kind} is not JSON")]
    Json {
        /// Which format.
        kind: LockfileKind,
        /// Where it is broken.
        #[source]
        source: serde_json::Error,
    },
    /// Not TOML.
    #[error("the {kind} is not TOML")]
    Toml {
        /// Which format.
        kind: LockfileKind,
        /// Where it is broken.
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// The distinct hosts and ports a lockfile downloads from, in order of their first line.
///
/// # Errors
/// When the file is too large or broken.
pub fn lockfile_hosts(kind: LockfileKind, bytes: &[u8]) -> Result<Vec<LockedHost>, LockfileError> {
    if bytes.len() > LOCKFILE_BYTES_MAX {
        return Err(LockfileError::TooLong(kind));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| LockfileError::NotText(kind))?;
    let mut found = Found {
        kind,
        text,
        hosts: Vec::new(),
    };
    match kind {
        LockfileKind::Npm | LockfileKind::Pipenv => {
            let json = serde_json::from_str(text)
                .map_err(|source| LockfileError::Json { kind, source })?;
            walk_json(&json, "", 0, &mut found)?;
        }
        LockfileKind::Uv | LockfileKind::Poetry | LockfileKind::Pdm => {
            let toml = toml::from_str(text).map_err(|source| LockfileError::Toml {
                kind,
                source: Box::new(source),
            })?;
            walk_toml(&toml, "", 0, &mut found)?;
        }
        LockfileKind::Pnpm => text::pnpm(text, &mut found)?,
        LockfileKind::Yarn => text::yarn(text, &mut found)?,
        LockfileKind::Berry => text::berry(text, &mut found)?,
        LockfileKind::Requirements => text::requirements(text, &mut found)?,
    }
    found.hosts.sort_by_key(|host| host.line);
    Ok(found.hosts)
}

/// The hosts among these that a build under this policy could not reach.
#[must_use]
pub fn not_allowed<'a>(found: &'a [LockedHost], policy: &NetworkPolicy) -> Vec<&'a LockedHost> {
    let refused = |locked: &&LockedHost| {
        !matches!(
            policy.decide(&locked.host, locked.port),
            NameVerdict::Allowed(_)
        )
    };
    found.iter().filter(refused).collect()
}

struct Found<'a> {
    kind: LockfileKind,
    text: &'a str,
    hosts: Vec<LockedHost>,
}

impl Found<'_> {
    /// A download address on a known line.
    fn at(&mut self, line: usize, url: &str) -> Result<(), LockfileError> {
        self.add(url, || line)
    }

    /// A download address somewhere in the file; its line is searched once per host.
    fn somewhere(&mut self, url: &str) -> Result<(), LockfileError> {
        let text = self.text;
        // JSON may write "/" as "\/": then the host alone is searched.
        let find = |needle: &str| text.find(needle).map(|at| line_of(text, at));
        self.add(url, || {
            let host = host_of(url).map(|(host, _)| host).unwrap_or_default();
            find(url).or_else(|| find(&host)).unwrap_or(1)
        })
    }

    fn add(&mut self, url: &str, line: impl FnOnce() -> usize) -> Result<(), LockfileError> {
        let Some((host, port)) = host_of(url) else {
            return Ok(());
        };
        if self
            .hosts
            .iter()
            .any(|known| known.host == host && known.port == port)
        {
            return Ok(());
        }
        if self.hosts.len() == HOSTS_MAX {
            return Err(LockfileError::TooManyHosts(self.kind));
        }
        let line = line();
        self.hosts.push(LockedHost { line, host, port });
        Ok(())
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at]
        .iter()
        .filter(|b| **b == b'\n')
        .count()
        + 1
}

/// Host and port of a download address: `http(s)`, `git+…`, `ssh`, `git`, or `git@host:path`.
fn host_of(url: &str) -> Option<(String, u16)> {
    let url = url.trim();
    let Some((scheme, rest)) = url.split_once("://") else {
        let (user, rest) = url.split_once('@')?;
        let (host, path) = rest.split_once(':')?;
        let legal =
            !path.is_empty() && user.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        return (legal && host.contains('.')).then(|| Some((normal_host(host)?, 22)))?;
    };
    let scheme = scheme
        .rsplit('+')
        .next()
        .unwrap_or(scheme)
        .to_ascii_lowercase();
    let default = match scheme.as_str() {
        "https" => 443,
        "http" => 80,
        "ssh" => 22,
        "git" => 9418,
        _ => return None,
    };
    let authority = rest.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    let place = authority
        .rsplit_once('@')
        .map_or(authority, |(_, place)| place);
    match crate::origin::host_and_port(place) {
        Some((host, port)) => Some((host, port.unwrap_or(default))),
        // ssh://git@host:user/repo, and whatever else is no port; never dropped silently.
        None => {
            let host = place.split(':').next().unwrap_or_default();
            let shown = normal_host(host).unwrap_or_else(|| format!("{:?}", shortened(place)));
            Some((shown, default))
        }
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Whether the value of this key is an address that is downloaded from.
fn is_download(kind: LockfileKind, key: &str, value: &str) -> bool {
    match kind {
        LockfileKind::Npm => key == "resolved" || (key == "version" && value.contains("://")),
        LockfileKind::Uv => matches!(key, "registry" | "url" | "git"),
        LockfileKind::Poetry | LockfileKind::Pdm => matches!(key, "url" | "git"),
        LockfileKind::Pipenv => matches!(key, "url" | "git" | "file"),
        _ => false,
    }
}

fn walk_json(
    value: &serde_json::Value,
    key: &str,
    depth: usize,
    found: &mut Found<'_>,
) -> Result<(), LockfileError> {
    use serde_json::Value;
    match value {
        Value::String(text) if is_download(found.kind, key, text) => found.somewhere(text),
        Value::Array(items) if depth < DEPTH_MAX => items
            .iter()
            .try_for_each(|item| walk_json(item, key, depth + 1, found)),
        Value::Object(fields) if depth < DEPTH_MAX => fields
            .iter()
            // Funding links are for people.
            .filter(|(key, _)| key.as_str() != "funding")
            .try_for_each(|(key, item)| walk_json(item, key, depth + 1, found)),
        _ => Ok(()),
    }
}

fn walk_toml(
    value: &toml::Value,
    key: &str,
    depth: usize,
    found: &mut Found<'_>,
) -> Result<(), LockfileError> {
    use toml::Value;
    match value {
        Value::String(text) if is_download(found.kind, key, text) => found.somewhere(text),
        Value::Array(items) if depth < DEPTH_MAX => items
            .iter()
            .try_for_each(|item| walk_toml(item, key, depth + 1, found)),
        Value::Table(fields) if depth < DEPTH_MAX => fields
            .iter()
            .try_for_each(|(key, item)| walk_toml(item, key, depth + 1, found)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
