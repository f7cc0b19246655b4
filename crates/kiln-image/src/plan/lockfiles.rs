//! Lockfiles: their digests, and the hosts that they and other manifests name.
//!
//! Which hosts a build may reach is not decided here: the caller compares [`HostMention`]s with `registries.toml`.

use kiln_core::Digest;
use serde::Serialize;

use super::PlanError;
use super::folder::{Folder, LOCKFILE_BYTES_MAX};

/// Most hosts kept per file.
const HOSTS_MAX: usize = 100;

/// A lockfile of the source.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Lockfile {
    /// Path inside the source root.
    pub path: String,
    /// Digest of its bytes.
    pub digest: Digest,
}

/// A host that a file tells a package manager to contact.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct HostMention {
    /// Host, lower case, with its port where one is written.
    pub host: String,
    /// Which file.
    pub file: String,
    /// Line of the first mention, from 1.
    pub line: u32,
}

/// Names of lockfiles, by any package manager of the supported runtimes.
const LOCKFILES: [&str; 8] = [
    "package-lock.json",
    "npm-shrinkwrap.json",
    "pnpm-lock.yaml",
    "yarn.lock",
    "uv.lock",
    "poetry.lock",
    "pdm.lock",
    "Pipfile.lock",
];

/// Files, and the words of a line behind which an address counts; no word means every line.
const NAMING: [(&str, &[&str]); 16] = [
    ("package-lock.json", &["\"resolved\":", "\"version\":"]),
    ("npm-shrinkwrap.json", &["\"resolved\":", "\"version\":"]),
    ("pnpm-lock.yaml", &["tarball:", "repo:", "registry:"]),
    ("yarn.lock", &["resolved ", "resolution:"]),
    (".npmrc", &[]),
    (".yarnrc", &[]),
    (
        ".yarnrc.yml",
        &["npmRegistryServer:", "httpProxy:", "httpsProxy:"],
    ),
    ("uv.lock", &["registry =", "url =", "git ="]),
    ("poetry.lock", &["url ="]),
    ("pdm.lock", &["url ="]),
    ("Pipfile.lock", &["\"url\":", "\"git\":", "\"file\":"]),
    ("Pipfile", &["url =", "git =", "file ="]),
    ("pyproject.toml", &["url =", "git =", "index-url =", " @ "]),
    ("uv.toml", &["url =", "index-url =", "default-index ="]),
    ("requirements.txt", &[]),
    ("constraints.txt", &[]),
];

/// Digests of the lockfiles in `names` that exist.
pub(super) fn digests(folder: &Folder, more: &[String]) -> Result<Vec<Lockfile>, PlanError> {
    let mut found = Vec::new();
    let names = LOCKFILES.iter().map(|&name| name.to_owned());
    for path in names.chain(more.iter().cloned()) {
        if let Some(bytes) = folder.bytes(&path, LOCKFILE_BYTES_MAX)? {
            let digest = Digest::of(&bytes);
            found.push(Lockfile { path, digest });
        }
    }
    Ok(found)
}

/// Hosts that the folder's manifests and lockfiles name. `more` are further requirements files.
pub(super) fn hosts(folder: &Folder, more: &[String]) -> Result<Vec<HostMention>, PlanError> {
    let mut found = Vec::new();
    let files = NAMING
        .iter()
        .map(|(file, words)| ((*file).to_owned(), *words));
    let more = more.iter().filter(|name| *name != "requirements.txt");
    for (file, words) in files.chain(more.map(|file| (file.clone(), &[][..]))) {
        if let Some(bytes) = folder.bytes(&file, LOCKFILE_BYTES_MAX)? {
            hosts_of(&String::from_utf8_lossy(&bytes), &file, words, &mut found);
        }
    }
    Ok(found)
}

fn hosts_of(text: &str, file: &str, words: &[&str], found: &mut Vec<HostMention>) {
    let before = found.len();
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with('#') {
            continue;
        }
        if !words.is_empty() && !words.iter().any(|word| line.contains(word)) {
            continue;
        }
        for host in hosts_of_line(line) {
            let seen = found[before..].iter().any(|mention| mention.host == host);
            if !seen && found.len() - before < HOSTS_MAX {
                found.push(HostMention {
                    host,
                    file: file.to_owned(),
                    line: index as u32 + 1,
                });
            }
        }
    }
}

/// Hosts behind `scheme://` for the schemes that go to the network.
fn hosts_of_line(line: &str) -> Vec<String> {
    let mut hosts = Vec::new();
    for (at, _) in line.match_indices("://") {
        let before = &line[..at];
        let start = before
            .rfind(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c))
            .map_or(0, |i| i + 1);
        let scheme = before[start..].to_ascii_lowercase();
        let scheme = scheme.strip_prefix("git+").unwrap_or(&scheme);
        if !matches!(scheme, "http" | "https" | "git" | "ssh" | "ftp") {
            continue;
        }
        let rest = &line[at + 3..];
        let end = rest
            .find(|c: char| "/?#\"'),;>]}".contains(c) || c.is_whitespace())
            .unwrap_or(rest.len());
        let host = rest[..end].rsplit('@').next().unwrap_or_default();
        if !host.is_empty() && host.len() <= 255 {
            hosts.push(host.to_ascii_lowercase());
        }
    }
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_those_a_package_manager_would_contact() {
        let lock = "{\n\"resolved\": \"https://Reg.Example:8443/x/-/x.tgz\",\n\"funding\": {\"url\": \"https://no.example\"},\n\"resolved\": \"git+ssh://git@git.example/a.git#1\",\n\"resolved\": \"file:../x\"\n}";
        let mut found = Vec::new();
        hosts_of(lock, "package-lock.json", NAMING[0].1, &mut found);
        let found: Vec<_> = found.iter().map(|m| (m.host.as_str(), m.line)).collect();
        assert_eq!(found, [("reg.example:8443", 2), ("git.example", 4)]);
        let mut found = Vec::new();
        let text = "# https://no.example\n--index-url https://u:p@pip.example/simple\nflask @ https://files.example/f.whl\n-e ./x\n";
        hosts_of(text, "requirements.txt", &[], &mut found);
        let found: Vec<_> = found.iter().map(|m| (m.host.as_str(), m.line)).collect();
        assert_eq!(found, [("pip.example", 2), ("files.example", 3)]);
    }
}
