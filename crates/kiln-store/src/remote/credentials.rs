//! The user's own login for a registry, where docker and podman keep it.
//!
//! Looked for in this order; the first file that has one wins: `$REGISTRY_AUTH_FILE`, `$DOCKER_CONFIG/config.json`,
//! `~/.docker/config.json`, `$XDG_RUNTIME_DIR/containers/auth.json`, `~/.config/containers/auth.json`.
//! Formats: docker's `config.json` (`auths`, `credHelpers`, `credsStore`) and containers-auth.json(5).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::helper;
use super::target::{Target, canonical_host};

/// Most bytes of a file of logins.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A login.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// User and password.
    Basic {
        /// User.
        user: String,
        /// Password, or an access token.
        password: String,
    },
    /// A token that the registry's token server exchanges for others (OAuth 2 refresh token).
    IdentityToken(String),
    /// A token to be sent to the registry as it is.
    RegistryToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(..)",
            Self::IdentityToken(_) => "IdentityToken(..)",
            Self::RegistryToken(_) => "RegistryToken(..)",
        })
    }
}

/// Why a login could not be read. Never says what is in a file.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file is there and cannot be read.
    #[error("{path:?} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path:?} is not a file of logins: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A credential helper failed.
    #[error("docker-credential-{name}: {why}")]
    Helper {
        /// The helper.
        name: String,
        /// How it failed.
        why: String,
    },
}

/// The files that may hold logins, and the environment of credential helpers.
#[derive(Clone)]
pub struct CredentialSources {
    files: Vec<PathBuf>,
    env: BTreeMap<String, String>,
}

impl fmt::Debug for CredentialSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialSources")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl CredentialSources {
    /// As docker and podman find them in this environment. Reads nothing yet.
    #[must_use]
    pub fn from_env(env: &BTreeMap<String, String>) -> Self {
        let get = |name: &str| {
            env.get(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let home = get("HOME");
        let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
        let config = get("XDG_CONFIG_HOME").or_else(|| below_home(".config"));
        let docker = get("DOCKER_CONFIG").or_else(|| below_home(".docker"));
        let files = [
            get("REGISTRY_AUTH_FILE"),
            docker.map(|dir| dir.join("config.json")),
            get("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
            config.map(|dir| dir.join("containers/auth.json")),
        ];
        Self {
            files: files.into_iter().flatten().collect(),
            env: env.clone(),
        }
    }

    /// The login for a target, if one is kept.
    ///
    /// # Errors
    /// When a file or a helper that should have it fails.
    pub async fn find(&self, target: &Target) -> Result<Option<Credential>, CredentialsError> {
        for path in &self.files {
            let Some(file) = LoginFile::read(path)? else {
                continue;
            };
            if let Some(found) = file.find(path, target, &self.env).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

#[derive(Default, Deserialize)]
struct LoginFile {
    #[serde(default)]
    auths: BTreeMap<String, Login>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
struct Login {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl LoginFile {
    fn read(path: &Path) -> Result<Option<Self>, CredentialsError> {
        let failed = |source| CredentialsError::Read {
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        let mut text = Vec::new();
        file.take(FILE_BYTES_MAX + 1)
            .read_to_end(&mut text)
            .map_err(failed)?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &[u8]) -> Result<Option<Self>, CredentialsError> {
        let malformed = |why: String| CredentialsError::Malformed {
            path: path.to_owned(),
            why,
        };
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(malformed(format!(
                "it is larger than {FILE_BYTES_MAX} bytes"
            )));
        }
        if text.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        // serde_json's own words may quote the file: only the place is told.
        let parsed = serde_json::from_slice(text);
        let parsed =
            parsed.map_err(|e| malformed(format!("line {}, column {}", e.line(), e.column())))?;
        Ok(Some(parsed))
    }

    async fn find(
        self,
        path: &Path,
        target: &Target,
        env: &BTreeMap<String, String>,
    ) -> Result<Option<Credential>, CredentialsError> {
        let named = best(self.helpers.iter(), target);
        if let Some(helper) = named
            .or(self.store.as_ref())
            .filter(|name| !name.is_empty())
            && let Some(found) = helper::ask(helper, target.helper_key(), env).await?
        {
            return Ok(Some(found));
        }
        match best(self.auths.iter(), target) {
            Some(login) => login.credential(path),
            None => Ok(None),
        }
    }
}

/// The entry whose key names the target most exactly.
fn best<'a, T>(
    entries: impl Iterator<Item = (&'a String, &'a T)>,
    target: &Target,
) -> Option<&'a T> {
    entries
        .filter_map(|(key, value)| Some((names(key, target)?, value)))
        .max_by_key(|(exactness, _)| *exactness)
        .map(|(_, value)| value)
}

/// How exactly a key names the target: `registry`, `registry/namespace`, `registry/repository` (containers), or a URL
/// of the registry (docker).
fn names(key: &str, target: &Target) -> Option<usize> {
    let (url, rest) = match key.split_once("://") {
        Some((_, rest)) => (true, rest),
        None => (false, key),
    };
    let rest = rest.trim_end_matches('/');
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if canonical_host(host) != target.registry() {
        return None;
    }
    if url || matches!(path, "" | "v1" | "v2") {
        return Some(0);
    }
    let repository = target.repository().strip_prefix(path)?;
    (repository.is_empty() || repository.starts_with('/')).then_some(path.len())
}

/// For the fuzz targets: any file is read or refused, and what is found has no NUL at its end.
pub(super) fn fuzz_logins(bytes: &[u8], target: &Target) {
    let path = Path::new("config.json");
    if let Ok(Some(file)) = LoginFile::parse(path, bytes)
        && let Some(login) = best(file.auths.iter(), target)
        && let Ok(Some(Credential::Basic { password, .. })) = login.credential(path)
    {
        assert!(login.auth.is_none() || !password.ends_with('\0'));
    }
}

impl Login {
    fn credential(&self, path: &Path) -> Result<Option<Credential>, CredentialsError> {
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = set(&self.registrytoken) {
            return Ok(Some(Credential::RegistryToken(token)));
        }
        if let Some(token) = set(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(token)));
        }
        if let Some(encoded) = set(&self.auth) {
            let decoded = STANDARD
                .decode(encoded.trim())
                .ok()
                .and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
            let Some((user, password)) = pair else {
                let why = "an \"auth\" is not base64 of user:password".to_owned();
                return Err(CredentialsError::Malformed {
                    path: path.to_owned(),
                    why,
                });
            };
            // docker pads with zero bytes.
            let password = password.trim_end_matches('\0').to_owned();
            return Ok(Some(Credential::Basic {
                user: user.to_owned(),
                password,
            }));
        }
        let pair = set(&self.username).zip(set(&self.password));
        Ok(pair.map(|(user, password)| Credential::Basic { user, password }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn target(text: &str) -> Target {
        Target::new(&text.parse().expect("a reference")).expect("a target")
    }

    fn basic(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Basic {
            user: user.to_owned(),
            password: password.to_owned(),
        })
    }

    fn env(pairs: &[(&str, &Path)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.display().to_string()))
            .collect()
    }

    #[tokio::test]
    async fn logins_are_found_where_the_tools_keep_them() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (docker, containers) = (dir.path().join("docker"), dir.path().join("auth.json"));
        std::fs::create_dir(&docker).expect("dir");
        let auth = STANDARD.encode("ann:pa:ss");
        let text = format!(
            r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{auth}"}},"r.example.org":{{"identitytoken":"t"}}}}}}"#
        );
        std::fs::write(docker.join("config.json"), text).expect("write");
        let text = r#"{"auths":{"r.example.org:5000/team":{"username":"team","password":"1"},"r.example.org:5000":{"username":"all","password":"2"}}}"#;
        std::fs::write(&containers, text).expect("write");
        let sources = CredentialSources::from_env(&env(&[
            ("DOCKER_CONFIG", &docker),
            ("REGISTRY_AUTH_FILE", &containers),
        ]));
        let find = async |text: &str| sources.find(&target(text)).await.expect("readable");
        assert_eq!(find("docker.io/app").await, basic("ann", "pa:ss"));
        assert_eq!(
            find("r.example.org/app").await,
            Some(Credential::IdentityToken("t".to_owned()))
        );
        assert_eq!(
            find("r.example.org:5000/team/app").await,
            basic("team", "1")
        );
        assert_eq!(
            find("r.example.org:5000/teams/app").await,
            basic("all", "2")
        );
        assert_eq!(find("other.example.org/app").await, None);
        assert_eq!(
            format!("{:?}", find("docker.io/app").await),
            "Some(Basic(..))"
        );
    }

    #[tokio::test]
    async fn helpers_are_asked_by_the_registrys_name() {
        let dir = tempfile::tempdir().expect("temp dir");
        let script = "#!/bin/sh\nread server\ncase $server in\n\
            r.example.org) echo '{\"ServerURL\":\"x\",\"Username\":\"bob\",\"Secret\":\"s\"}';;\n\
            t.example.org) echo '{\"ServerURL\":\"x\",\"Username\":\"<token>\",\"Secret\":\"s\"}';;\n\
            broken.example.org) echo 'the keychain is locked'; exit 1;;\n\
            *) echo 'credentials not found in native keychain'; exit 1;;\nesac\n";
        let program = dir.path().join("docker-credential-test");
        std::fs::write(&program, script).expect("write");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("mode");
        let config = r#"{"credsStore":"test","auths":{"kept.example.org":{"username":"u","password":"p"}},"credHelpers":{"bad.example.org":"../x"}}"#;
        std::fs::write(dir.path().join("config.json"), config).expect("write");
        let mut env = env(&[("DOCKER_CONFIG", dir.path())]);
        env.insert(
            "PATH".to_owned(),
            format!("{}:/usr/bin:/bin", dir.path().display()),
        );
        let sources = CredentialSources::from_env(&env);
        let find = async |text: &str| sources.find(&target(text)).await;
        assert_eq!(
            find("r.example.org/a").await.expect("kept"),
            basic("bob", "s")
        );
        assert_eq!(
            find("t.example.org/a").await.expect("kept"),
            Some(Credential::IdentityToken("s".to_owned()))
        );
        assert_eq!(
            find("kept.example.org/a").await.expect("kept"),
            basic("u", "p")
        );
        let broken = find("broken.example.org/a")
            .await
            .expect_err("locked")
            .to_string();
        assert!(broken.contains("the keychain is locked"), "{broken}");
        assert!(find("bad.example.org/a").await.is_err());
    }

    #[tokio::test]
    async fn a_broken_file_is_told_without_its_content() {
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("config.json");
        let sources = CredentialSources::from_env(&env(&[("DOCKER_CONFIG", dir.path())]));
        for text in [
            r#"{"auths":"sEcReT"}"#,
            "sEcReT",
            r#"{"auths":{"r.example.org":{"auth":"sEcReT"}}}"#,
        ] {
            std::fs::write(&file, text).expect("write");
            let error = sources
                .find(&target("r.example.org/a"))
                .await
                .expect_err("broken");
            assert!(
                !error.to_string().contains("sEcReT") && error.to_string().contains("config.json"),
                "{error}"
            );
        }
        std::fs::write(&file, " \n").expect("write");
        assert_eq!(
            sources
                .find(&target("r.example.org/a"))
                .await
                .expect("empty"),
            None
        );
    }
}
