//! Fetches build tools from the npm registry of the host's choice and puts them into a tree.
//!
//! Each is one tarball with its dependencies inside, pinned by the registry's `integrity` (SHA-512). Which registry:
//! what the caller found in the host's settings, else what the host's npm says, else the default inside Debian's own
//! npm package. Nothing is executed from a tarball. Source: npm registry API, `GET /<package>/<version>`.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::apt::{self, AptError};
use super::process::{Program, RunContext, RunError};
use super::recipe::NpmRecipe;
use super::tree::{Content, Node, Tree};

/// How long npm itself may take for one answer or tarball.
const NPM_DEADLINE: Duration = Duration::from_secs(120);
/// Largest file of a tool.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Most bytes a tool unpacks to.
const TOOL_BYTES_MAX: u64 = 256 << 20;
/// Most files of a tool.
const TOOL_FILES_MAX: usize = 20_000;
/// Largest metadata document.
const METADATA_BYTES_MAX: u64 = 4 << 20;
/// Where tools go in the tree: beside what packages own.
const MODULES: &str = "usr/local/lib/node_modules";
/// Where their commands go.
const COMMANDS: &str = "usr/local/bin";

/// Why a tool cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NpmError {
    /// No registry is known.
    #[error("no npm registry is known: set `registry` in npm's settings on this host")]
    NoRegistry,
    /// The integrity of the recipe is not a SHA-512.
    #[error("the integrity of {0} in the recipe is not `sha512-<base64>`")]
    BadIntegrity(String),
    /// Fetching failed.
    #[error("cannot fetch {what}")]
    Fetch {
        /// What was fetched.
        what: String,
        /// Why.
        #[source]
        source: AptError,
    },
    /// npm failed.
    #[error("cannot ask npm")]
    Npm(#[source] RunError),
    /// The registry's answer is not what the API says.
    #[error("the registry's answer about {0} makes no sense")]
    Metadata(String),
    /// What came is not what the recipe pins.
    #[error("{what} is not the one the recipe pins: SHA-512 is {found}, expected {expected}")]
    Integrity {
        /// Which tool.
        what: String,
        /// Digest of what came, in hex.
        found: String,
        /// Digest of the recipe, in hex.
        expected: String,
    },
    /// The tarball is not one of a package.
    #[error("the tarball of {0} is broken: {1}")]
    Tarball(String, String),
    /// A file operation failed.
    #[error("cannot use {}", .path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Finds the registry: the caller's, else the host's npm, else the default in Debian's npm package.
///
/// # Errors
/// When none of them says.
pub fn registry(
    given: Option<&str>,
    scratch: &Path,
    context: &RunContext<'_>,
) -> Result<String, NpmError> {
    if let Some(given) = given {
        return Ok(given.trim_end_matches('/').to_owned());
    }
    let asked = Program::new("npm", NPM_DEADLINE)
        .args(["config", "get", "registry"])
        .capture(context);
    match asked {
        Ok(answer) => {
            let answer = String::from_utf8_lossy(&answer)
                .trim()
                .trim_end_matches('/')
                .to_owned();
            if answer.starts_with("http") {
                Ok(answer)
            } else {
                Err(NpmError::NoRegistry)
            }
        }
        Err(RunError::Start { .. }) => debian_default(scratch, context),
        Err(error) => Err(NpmError::Npm(error)),
    }
}

/// The default that npm itself has, read from its package without installing it.
fn debian_default(scratch: &Path, context: &RunContext<'_>) -> Result<String, NpmError> {
    let work = scratch.join("npm-package");
    let io_error = |source| NpmError::Io {
        path: work.clone(),
        source,
    };
    fs::create_dir_all(&work).map_err(io_error)?;
    let apt = Program::new("apt-get", NPM_DEADLINE)
        .args(["-q", "-oAPT::Sandbox::User=root", "download", "npm"])
        .directory(&work);
    apt.run(context).map_err(NpmError::Npm)?;
    let deb = fs::read_dir(&work)
        .map_err(io_error)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .next();
    let deb = deb.ok_or(NpmError::NoRegistry)?;
    let tar = work.join("npm.tar");
    let out = fs::File::create(&tar).map_err(io_error)?;
    let unpack = Program::new("dpkg-deb", NPM_DEADLINE)
        .arg("--fsys-tarfile")
        .arg(&deb)
        .stdout_to(out);
    unpack.run(context).map_err(NpmError::Npm)?;
    let tree = Tree::from_tar(&tar).map_err(|_| NpmError::NoRegistry)?;
    let definitions = tree
        .iter()
        .find(|(path, _)| path.ends_with("config/lib/definitions/definitions.js"));
    let old = || {
        tree.iter()
            .find(|(path, _)| path.ends_with("utils/config/definitions.js"))
    };
    let path = definitions.or_else(old).map(|(path, _)| path);
    let text = path
        .and_then(|path| tree.content(path)?.bytes().ok())
        .unwrap_or_default();
    let found = default_of(&String::from_utf8_lossy(&text)).ok_or(NpmError::NoRegistry);
    fs::remove_dir_all(&work).map_err(io_error)?;
    found
}

/// The default of the setting `registry` in npm's definitions of its settings.
fn default_of(definitions: &str) -> Option<String> {
    let after = definitions
        .split_once("define('registry'")
        .or_else(|| definitions.split_once("registry: new Definition("))?
        .1;
    let value = after.split_once("default:")?.1.trim_start();
    let quote = value.chars().next().filter(|c| "'\"`".contains(*c))?;
    let value = value[1..].split(quote).next()?;
    value
        .starts_with("http")
        .then(|| value.trim_end_matches('/').to_owned())
}

/// Fetches the tarball of a tool to `<work>/<name>.tgz` and checks it against the recipe.
///
/// # Errors
/// See [`NpmError`].
pub fn fetch(
    tool: &NpmRecipe,
    registry: &str,
    work: &Path,
    context: &RunContext<'_>,
) -> Result<PathBuf, NpmError> {
    let expected =
        sha512_hex(&tool.integrity).ok_or_else(|| NpmError::BadIntegrity(tool.name.clone()))?;
    let what = format!("{} {}", tool.name, tool.version);
    let fail = |source| NpmError::Fetch {
        what: what.clone(),
        source,
    };
    let metadata = work.join(format!("{}.json", tool.name));
    let uri = format!("{registry}/{}/{}", tool.name, tool.version);
    apt::download(&uri, &metadata, None, context).map_err(fail)?;
    let io_error = |source| NpmError::Io {
        path: metadata.clone(),
        source,
    };
    if fs::metadata(&metadata).map_err(io_error)?.len() > METADATA_BYTES_MAX {
        return Err(NpmError::Metadata(what));
    }
    let document: Value = serde_json::from_slice(&fs::read(&metadata).map_err(io_error)?)
        .map_err(|_| NpmError::Metadata(what.clone()))?;
    let tarball = document["dist"]["tarball"]
        .as_str()
        .filter(|uri| uri.starts_with("http"));
    let tarball = tarball.ok_or_else(|| NpmError::Metadata(what.clone()))?;
    let to = work.join(format!("{}.tgz", tool.name));
    apt::download(tarball, &to, Some(&expected), context).map_err(fail)?;
    fs::remove_file(&metadata).map_err(io_error)?;
    let bytes = fs::read(&to).map_err(|source| NpmError::Io {
        path: to.clone(),
        source,
    })?;
    let found = hex::encode(<sha2::Sha512 as sha2::Digest>::digest(&bytes));
    match found == expected {
        true => Ok(to),
        false => Err(NpmError::Integrity {
            what,
            found,
            expected,
        }),
    }
}

/// `sha512-<base64>` as 128 hex digits.
fn sha512_hex(integrity: &str) -> Option<String> {
    let text = integrity.strip_prefix("sha512-")?.trim_end_matches('=');
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0_u32, 0_u32);
    for b in text.bytes() {
        let digit = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(digit);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from((bits >> held) & 0xff).ok()?);
        }
    }
    (bytes.len() == 64).then(|| hex::encode(bytes))
}

/// Puts a tool into a tree, with links for its commands.
///
/// # Errors
/// When the tarball is broken or larger than any tool.
pub fn install(tool: &NpmRecipe, tarball: &Path, tree: &mut Tree) -> Result<(), NpmError> {
    let broken = |what: String| NpmError::Tarball(tool.name.clone(), what);
    let file = fs::File::open(tarball).map_err(|source| NpmError::Io {
        path: tarball.to_owned(),
        source,
    })?;
    let unpacked = flate2::read::GzDecoder::new(io::BufReader::new(file)).take(TOOL_BYTES_MAX);
    let mut archive = tar::Archive::new(unpacked);
    let mut description = None;
    let (mut files, mut scripts) = (0, Vec::new());
    for entry in archive
        .entries()
        .map_err(|error| broken(error.to_string()))?
    {
        let mut entry = entry.map_err(|error| broken(error.to_string()))?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        files += 1;
        if files > TOOL_FILES_MAX || entry.size() > FILE_BYTES_MAX {
            return Err(broken("it is larger than any tool".to_owned()));
        }
        let path = String::from_utf8(entry.path_bytes().into_owned());
        let path = path.map_err(|_| broken("a name is not UTF-8".to_owned()))?;
        // The first directory is `package` in most tarballs and the tool's name in others.
        let inner = path.split_once('/').map(|(_, inner)| inner.to_owned());
        let inner = inner.filter(|inner| {
            inner
                .split('/')
                .all(|part| !matches!(part, "" | "." | ".."))
        });
        let inner = inner.ok_or_else(|| broken(format!("the name {path:?}")))?;
        let mut bytes = Vec::new();
        entry
            .read_to_end(&mut bytes)
            .map_err(|error| broken(error.to_string()))?;
        if inner == "package.json" {
            description = serde_json::from_slice::<Value>(&bytes).ok();
        }
        if bytes.starts_with(b"#!") {
            scripts.push(inner.clone());
        }
        let mode = if bytes.starts_with(b"#!") {
            0o755
        } else {
            0o644
        };
        let node = Node::file(mode, Content::Bytes(bytes.into()));
        tree.insert(&format!("{MODULES}/{}/{inner}", tool.name), node);
    }
    let description = description.ok_or_else(|| broken("it has no package.json".to_owned()))?;
    let commands = commands_of(&description, &tool.name);
    for (command, script) in commands {
        if !scripts.contains(&script) {
            return Err(broken(format!(
                "its command {command} is not a script of it"
            )));
        }
        let target = format!("../lib/node_modules/{}/{script}", tool.name);
        tree.insert(&format!("{COMMANDS}/{command}"), Node::symlink(&target));
    }
    Ok(())
}

/// `bin` of a package.json: commands and their scripts. Names with anything but plain letters are left out.
fn commands_of(description: &Value, tool: &str) -> Vec<(String, String)> {
    let script = |value: &Value| Some(value.as_str()?.trim_start_matches("./").to_owned());
    let plain = |name: &str| {
        name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') && !name.is_empty()
    };
    match &description["bin"] {
        Value::String(path) => vec![(tool.to_owned(), path.trim_start_matches("./").to_owned())],
        Value::Object(map) => map
            .iter()
            .filter(|(name, _)| plain(name))
            .filter_map(|(name, value)| Some((name.clone(), script(value)?)))
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integrity_becomes_hex() {
        let hex = sha512_hex(
            "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg==",
        );
        assert!(
            hex.expect("a digest").starts_with("cf83e1357eefb8bd"),
            "SHA-512 of nothing"
        );
        for bad in [
            "sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk=",
            "sha512-AAAA",
            "sha512-!",
            "",
        ] {
            assert_eq!(sha512_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_default_registry_is_read_from_npms_own_definitions() {
        let old = "define('proxy', {\n default: null,\n})\ndefine('registry', {\n  default: 'https://r.test/',\n  type: url,";
        assert_eq!(default_of(old).as_deref(), Some("https://r.test"));
        let new = "  registry: new Definition('registry', {\n    default: `https://r.test/`,";
        assert_eq!(default_of(new).as_deref(), Some("https://r.test"));
        assert_eq!(default_of("define('registry', { default: null,"), None);
    }

    fn tarball(files: &[(&str, &str)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let gzip = flate2::write::GzEncoder::new(
            file.reopen().expect("it opens"),
            flate2::Compression::fast(),
        );
        let mut builder = tar::Builder::new(gzip);
        for (name, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.as_gnu_mut().expect("gnu").name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(0o600);
            header.set_cksum();
            builder.append(&header, text.as_bytes()).expect("writable");
        }
        builder
            .into_inner()
            .and_then(|gzip| gzip.finish())
            .expect("writable");
        file
    }

    fn tool() -> NpmRecipe {
        NpmRecipe {
            name: "npm".to_owned(),
            version: "1.0.0".to_owned(),
            integrity: String::new(),
        }
    }

    #[test]
    fn commands_become_links_and_scripts_become_executable() {
        let json = r#"{"bin":{"npm":"./bin/npm.js","../evil":"bin/npm.js"}}"#;
        let file = tarball(&[
            ("package/package.json", json),
            ("package/bin/npm.js", "#!/usr/bin/env node\n"),
        ]);
        let mut tree = Tree::default();
        install(&tool(), file.path(), &mut tree).expect("it installs");
        assert_eq!(
            tree.get("usr/local/lib/node_modules/npm/bin/npm.js")
                .expect("there")
                .mode,
            0o755
        );
        assert!(tree.get("usr/local/bin/npm").is_some());
        assert_eq!(
            tree.iter()
                .filter(|(path, _)| path.starts_with("usr/local/bin/"))
                .count(),
            1
        );
    }

    #[test]
    fn names_that_leave_the_package_are_refused() {
        let file = tarball(&[("package/../../etc/x", "x"), ("package/package.json", "{}")]);
        let result = install(&tool(), file.path(), &mut Tree::default());
        assert!(matches!(result, Err(NpmError::Tarball(..))), "{result:?}");
    }
}
