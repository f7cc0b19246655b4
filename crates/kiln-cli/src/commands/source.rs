//! What `kiln build` was pointed at: a folder, or a git URL with a ref; and the KEY=VALUE words of the command line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_core::SecretName;
use kiln_core::secret::ParseSecretError;
use kiln_worker::ssh_agent::SshAgents;

use crate::environment;
use crate::error::{CliError, Result};
use crate::show::ShownPath as _;

/// Largest secret, bytes (as Docker's).
pub(crate) const SECRET_BYTES_MAX: u64 = 500 * 1024;

/// What a word about a secret may say.
const SECRET_PARTS: [&str; 5] = ["id", "src", "source", "env", "type"];

/// Where the source is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A folder of this host.
    Folder(PathBuf),
    /// A repository to fetch in a checkout machine.
    Git {
        /// https URL.
        url: String,
        /// Branch, tag or commit; the default branch without.
        reference: Option<String>,
    },
}

/// Tells a folder from a git URL.
///
/// # Errors
/// For URLs that are not https git URLs, and folders that do not exist.
pub(crate) fn parse(text: &str) -> Result<Source> {
    if let Some((scheme, _)) = text.split_once("://") {
        if scheme != "https" {
            return Err(
                CliError::usage(format!("{scheme} URLs are not supported: {text:?}")).hint(
                    "use an https git URL, for example https://git.example.org/team/app.git#main",
                ),
            );
        }
        let (url, reference) = match text.split_once('#') {
            Some((url, reference)) => (url, Some(reference.to_owned()).filter(|r| !r.is_empty())),
            None => (text, None),
        };
        return Ok(Source::Git {
            url: url.to_owned(),
            reference,
        });
    }
    let path = PathBuf::from(text);
    folder(&path).map_err(|error| error.hint("`kiln build` also takes an https git URL"))?;
    Ok(Source::Folder(path))
}

/// The repository's own name: the last part of its URL.
pub(crate) fn repository_name(url: &str) -> String {
    let last = url
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or_default();
    last.strip_suffix(".git").unwrap_or(last).to_owned()
}

/// Whether there is a folder, in the same words for every verb.
///
/// # Errors
/// When there is none that can be looked into.
pub(crate) fn folder(path: &Path) -> Result<()> {
    let why = match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => return Ok(()),
        Ok(_) => "is not a folder".to_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "does not exist".to_owned(),
        Err(error) => format!("cannot be read: {error}"),
    };
    Err(CliError::usage(format!("{path:?} {why}")).hint("give the folder with your app"))
}

fn is_name(key: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    let starts = |b: &u8| b.is_ascii_alphabetic() || *b == b'_';
    key.as_bytes().first().is_some_and(starts) && key.bytes().all(legal)
}

/// `KEY=VALUE` words; `KEY` alone takes the value from the environment and is left out when it is not set there.
///
/// # Errors
/// For a name that no shell and no Dockerfile could use.
pub(crate) fn pairs(words: &[String], flag: &str) -> Result<BTreeMap<String, String>> {
    let mut map = BTreeMap::new();
    for word in words {
        let (key, value) = match word.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (word.as_str(), environment::var(word)),
        };
        if !is_name(key) {
            return Err(CliError::usage(format!(
                "{flag} {word:?}: {key:?} is no name of a variable"
            ))
            .hint(format!(
                "write {flag} KEY=VALUE, or {flag} KEY to take it from the environment; names are letters, digits, '_', '-' and '.'"
            )));
        }
        if value.as_ref().is_some_and(|value| value.contains('\0')) {
            return Err(CliError::usage(format!(
                "{flag} {key}: the value has a zero byte"
            )));
        }
        if let Some(value) = value {
            map.insert(key.to_owned(), value);
        }
    }
    Ok(map)
}

/// Largest file of variables, bytes.
const ENV_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The variables of a file: a line each, as for `--env`; empty lines and those that begin with `#` say nothing.
///
/// # Errors
/// When it cannot be read, is too large, or a line is malformed: that is named.
pub(crate) fn env_file(path: &Path) -> Result<BTreeMap<String, String>> {
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let usage = |why: String| CliError::usage(format!("--env-file {}: {why}", path.shown()));
    let unread = |error: std::io::Error| usage(format!("cannot be read: {error}"));
    let mut options = std::fs::OpenOptions::new();
    options.read(true);
    // A pipe that nobody writes to would hold us for ever.
    let opened = options
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    let file = opened.map_err(unread)?;
    if !file.metadata().map_err(unread)?.is_file() {
        return Err(usage("it is not a file".to_owned()));
    }
    let mut text = String::new();
    let read = file.take(ENV_FILE_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(unread)?;
    if text.len() as u64 > ENV_FILE_BYTES_MAX {
        return Err(usage(format!("larger than {ENV_FILE_BYTES_MAX} bytes")));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let mut all = BTreeMap::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // Told by its place alone: any of it may be what nobody should see.
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        if !is_name(key) {
            let why = "it does not begin with the name of a variable and '='";
            return Err(usage(format!("line {}: {why}", at + 1))
                .hint("names are letters, digits, '_', '-' and '.'; a value is one line"));
        }
        if value.contains('\0') {
            let why = format!("line {}: the value has a zero byte", at + 1);
            return Err(usage(why));
        }
        all.extend(pairs(&[line.to_owned()], "--env-file")?);
    }
    Ok(all)
}

/// The secrets of a build.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Secrets {
    /// Names and values that this command has itself.
    pub(crate) given: Vec<(String, Vec<u8>)>,
    /// Names of those that the store has.
    pub(crate) stored: Vec<SecretName>,
}

impl Secrets {
    /// Names of all of them.
    pub(crate) fn names(&self) -> Vec<String> {
        let given = self.given.iter().map(|(name, _)| name.clone());
        given
            .chain(self.stored.iter().map(ToString::to_string))
            .collect()
    }
}

/// `id=NAME` of the store, `id=NAME,src=FILE` or `id=NAME,env=VARIABLE`.
///
/// # Errors
/// When a word is malformed, or what it names is missing or too large.
pub(crate) fn secrets(words: &[String]) -> Result<Secrets> {
    let mut secrets = Secrets::default();
    for word in words {
        let usage = |why: &str| {
            CliError::usage(format!("--secret {word:?}: {why}"))
                .hint("write --secret id=NAME for one of `kiln secret`, or --secret id=NAME,src=FILE, or --secret id=NAME,env=VARIABLE")
        };
        let mut parts = BTreeMap::new();
        for part in word.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| usage("every part is key=value"))?;
            parts.insert(key, value);
        }
        let id = *parts.get("id").ok_or_else(|| usage("it has no id"))?;
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if id.is_empty() || id.len() > 128 || !id.bytes().all(legal) || id.starts_with('.') {
            return Err(usage("ids are letters, digits, '-', '_' and '.'"));
        }
        if secrets.names().iter().any(|seen| seen == id) {
            return Err(usage("this id is given twice"));
        }
        if let Some(unknown) = parts.keys().find(|key| !SECRET_PARTS.contains(key)) {
            return Err(usage(&format!("there is no part {unknown}")));
        }
        let value = match (
            parts.get("src").or_else(|| parts.get("source")),
            parts.get("env"),
        ) {
            (Some(path), None) => read_secret(path).map_err(|why| usage(&why))?,
            (None, Some(name)) => environment::var(name)
                .ok_or_else(|| usage(&format!("the environment has no {name}")))?
                .into_bytes(),
            (None, None) => {
                let name = id.parse();
                let name = name.map_err(|error: ParseSecretError| usage(&error.to_string()))?;
                secrets.stored.push(name);
                continue;
            }
            (Some(_), Some(_)) => return Err(usage("name either src or env")),
        };
        secrets.given.push((id.to_owned(), value));
    }
    Ok(secrets)
}

/// `ID` or `ID=SOCKET`.
///
/// # Errors
/// When a word is malformed, or there is no agent where it says.
pub(crate) fn ssh_agents(words: &[String]) -> Result<Vec<(String, PathBuf)>> {
    let mut agents: Vec<(String, PathBuf)> = Vec::new();
    for word in words {
        let usage = |why: &str| {
            CliError::usage(format!("--ssh {word:?}: {why}"))
                .hint("write --ssh default (with ssh-agent running) or --ssh ID=SOCKET")
        };
        let (id, socket) = match word.split_once('=') {
            Some((id, socket)) => (id, socket.to_owned()),
            None => {
                let socket = environment::var("SSH_AUTH_SOCK");
                (
                    word.as_str(),
                    socket.ok_or_else(|| usage("SSH_AUTH_SOCK is not set"))?,
                )
            }
        };
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if id.is_empty() || id.len() > 128 || !id.bytes().all(legal) {
            return Err(usage("ids are letters, digits, '-', '_' and '.'"));
        }
        if agents.iter().any(|(seen, _)| seen == id) {
            return Err(usage("this id is given twice"));
        }
        if agents.len() == SshAgents::MAX {
            return Err(usage(&format!(
                "a build has at most {} agents",
                SshAgents::MAX
            )));
        }
        // Said now and not by a step: nobody listens there, or it is a key file.
        std::os::unix::net::UnixStream::connect(&socket)
            .map_err(|error| usage(&format!("no agent answers at {socket:?}: {error}")))?;
        agents.push((id.to_owned(), PathBuf::from(socket)));
    }
    Ok(agents)
}

fn read_secret(path: &str) -> std::result::Result<Vec<u8>, String> {
    use std::io::Read as _;
    let file =
        std::fs::File::open(path).map_err(|error| format!("could not read {path:?}: {error}"))?;
    let mut bytes = Vec::new();
    file.take(SECRET_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("could not read {path:?}: {error}"))?;
    if bytes.len() as u64 > SECRET_BYTES_MAX {
        return Err(format!("{path:?} is larger than {SECRET_BYTES_MAX} bytes"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        let git = parse("https://git.example.org/a.git#v1").expect("git");
        assert_eq!(
            git,
            Source::Git {
                url: "https://git.example.org/a.git".to_owned(),
                reference: Some("v1".to_owned())
            }
        );
        assert!(parse("ssh://git.example.org/a").is_err());
        let missing = parse("/nowhere/at/all").expect_err("no folder");
        assert_eq!(missing.message, "\"/nowhere/at/all\" does not exist");
        let planned = folder(Path::new("/nowhere/at/all")).expect_err("no folder");
        assert_eq!(planned.message, missing.message);
        assert_eq!(
            parse("/").expect("folder"),
            Source::Folder(PathBuf::from("/"))
        );
    }

    #[test]
    fn secrets_name_one_place() {
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("s");
        std::fs::write(&file, "top").expect("write");
        let word = format!("id=a,src={}", file.display());
        assert_eq!(
            secrets(std::slice::from_ref(&word)).expect("valid").given,
            [("a".to_owned(), b"top".to_vec())]
        );
        let stored = secrets(&["id=a".to_owned(), "id=b".to_owned()]).expect("valid");
        assert_eq!(
            (stored.given.len(), stored.names()),
            (0, vec!["a".to_owned(), "b".to_owned()])
        );
        assert!(secrets(&["id=a".to_owned(), word.clone()]).is_err());
        for bad in [
            "src=x",
            "id=a,form=x",
            "id=../x,src=/dev/null",
            "id=a,src=/dev/null,env=B",
            "id=a,env=KILN_NOT_SET",
            "junk",
        ] {
            assert!(secrets(&[bad.to_owned()]).is_err(), "{bad}");
        }
        assert!(secrets(&[word.clone(), word]).is_err());
    }

    #[test]
    fn ssh_agents_answer() {
        let dir = tempfile::tempdir().expect("temp dir");
        let socket = dir.path().join("agent");
        let _listens = std::os::unix::net::UnixListener::bind(&socket).expect("binds");
        let word = format!("default={}", socket.display());
        let found = ssh_agents(std::slice::from_ref(&word)).expect("valid");
        assert_eq!(found, [("default".to_owned(), socket)]);
        for bad in ["default=/dev/null", "default=/nowhere", "=x", "a b=x"] {
            assert!(ssh_agents(&[bad.to_owned()]).is_err(), "{bad}");
        }
        assert!(ssh_agents(&[word.clone(), word]).is_err());
    }

    #[test]
    fn pairs_come_from_words_or_the_environment() {
        let map = pairs(&["A=1=2".to_owned(), "KILN_NOT_SET".to_owned()], "--env").expect("valid");
        assert_eq!(
            map.into_iter().collect::<Vec<_>>(),
            [("A".to_owned(), "1=2".to_owned())]
        );
        for bad in ["=x", "A B=c", "", "1A=x", "A\nB=x", "A\u{1b}=x", "É=x"] {
            let error = pairs(&[bad.to_owned()], "--build-arg").expect_err(bad);
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
        assert!(pairs(&["a.b-C_1=x y".to_owned()], "--env").is_ok());
    }

    #[test]
    fn a_file_of_variables_has_one_on_a_line() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("env");
        std::fs::write(&path, "# of the tests\n\nA=1\n  B=x = y\nKILN_NOT_SET\n").expect("write");
        let found: Vec<_> = env_file(&path).expect("legal").into_iter().collect();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(found, [pair("A", "1"), pair("B", "x = y")]);
        std::fs::write(&path, "\u{feff}A=1\r\n").expect("write");
        let found: Vec<_> = env_file(&path).expect("legal").into_iter().collect();
        assert_eq!(found, [pair("A", "1")]);
        for (text, why) in [
            ("A=1\n1hush=hush\n", "name of a variable"),
            ("A=1\nhush hush\n", "name of a variable"),
            ("A=1\nB=hush\0hush\n", "zero byte"),
        ] {
            std::fs::write(&path, text).expect("write");
            let error = env_file(&path).expect_err("malformed");
            let said = format!("{error:?}");
            assert!(said.contains("line 2") && said.contains(why), "{said}");
            assert!(!said.contains("hush"), "{said}");
        }
        assert!(env_file(Path::new("/nowhere")).is_err());
        let pipe = dir.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).expect("pipe");
        for other in [&pipe, dir.path()] {
            let error = env_file(other).expect_err("no file");
            assert!(error.message.ends_with("it is not a file"), "{error:?}");
        }
    }

    #[test]
    fn repositories_have_names() {
        for url in [
            "https://git.example.org/team/shop.git",
            "https://git.example.org/team/shop/",
        ] {
            assert_eq!(repository_name(url), "shop");
        }
    }
}
