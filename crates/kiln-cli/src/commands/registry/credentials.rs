//! The files in which docker, podman and skopeo look for credentials: `config.json` of Docker (docker-cli's configuration
//! reference) and `containers-auth.json(5)`. One entry is added or taken away; the rest of a file stays as it is.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::super::replace::replace;
use crate::error::{CliError, Result};
use crate::show::ShownPath as _;

/// Largest file that is read, bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Permission bits of a file with credentials.
const MODE: u32 = 0o600;

/// Where credentials lie on this host.
#[derive(Debug)]
pub(crate) struct AuthFiles {
    docker: PathBuf,
    /// The file that is written for podman and skopeo.
    containers: PathBuf,
    /// Looked at by them before `containers`: an entry there would win.
    before: Vec<PathBuf>,
}

/// What a login did.
#[derive(Debug)]
pub(crate) struct Written {
    /// Files with the token.
    pub(crate) files: Vec<PathBuf>,
    /// What the user should know.
    pub(crate) warnings: Vec<String>,
}

impl AuthFiles {
    /// By the variables that these tools obey. `None` without a home.
    pub(crate) fn find(var: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let set = |name: &str| {
            var(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let home = set("HOME");
        let below = |dir: &str| home.as_ref().map(|home| home.join(dir));
        let docker = set("DOCKER_CONFIG")
            .or_else(|| below(".docker"))?
            .join("config.json");
        if let Some(containers) = set("REGISTRY_AUTH_FILE") {
            return Some(Self {
                docker,
                containers,
                before: Vec::new(),
            });
        }
        let containers = set("XDG_CONFIG_HOME")
            .or_else(|| below(".config"))?
            .join("containers/auth.json");
        let runtime = set("XDG_RUNTIME_DIR").map_or_else(
            || {
                PathBuf::from(format!(
                    "/run/containers/{}/auth.json",
                    rustix::process::geteuid().as_raw()
                ))
            },
            |dir| dir.join("containers/auth.json"),
        );
        Some(Self {
            docker,
            containers,
            before: vec![runtime],
        })
    }

    /// Writes the entry for a registry, under every name that tools may use for it.
    ///
    /// # Errors
    /// When a file is not what it should be, or cannot be written; files before it are written then.
    pub(crate) fn login(&self, address: SocketAddr, user: &str, secret: &str) -> Result<Written> {
        let auth = encoded(user, secret);
        let names = [address.to_string(), format!("localhost:{}", address.port())];
        let mut written = Written {
            files: Vec::new(),
            warnings: Vec::new(),
        };
        for path in [&self.docker, &self.containers] {
            let mut file = read(path)?.unwrap_or_default();
            if let Some(store) = file
                .get("credsStore")
                .and_then(Value::as_str)
                .filter(|store| !store.is_empty())
            {
                let why = format!(
                    "{} makes docker use the credential store {store:?}, which hides this token from docker: \
                     use podman or skopeo, or add an empty entry for {address} to its credHelpers",
                    path.shown()
                );
                written.warnings.push(why);
            }
            put(&mut file, &names, &auth).map_err(|why| malformed(path, &why))?;
            write(path, &file)?;
            written.files.push(path.clone());
        }
        for path in &self.before {
            let Some(mut file) = read(path)? else {
                continue;
            };
            if names.iter().any(|name| {
                file.get("auths")
                    .is_some_and(|auths| auths.get(name).is_some())
            }) {
                put(&mut file, &names, &auth).map_err(|why| malformed(path, &why))?;
                write(path, &file)?;
                written.files.push(path.clone());
            }
        }
        Ok(written)
    }

    /// Takes away every entry with this secret; gives the files that had one.
    ///
    /// # Errors
    /// As [`Self::login`].
    pub(crate) fn logout(&self, user: &str, secret: &str) -> Result<Vec<PathBuf>> {
        let auth = encoded(user, secret);
        let mut changed = Vec::new();
        for path in [&self.docker, &self.containers]
            .into_iter()
            .chain(&self.before)
        {
            let Some(mut file) = read(path)? else {
                continue;
            };
            if take(&mut file, &auth) {
                write(path, &file)?;
                changed.push(path.clone());
            }
        }
        Ok(changed)
    }
}

fn encoded(user: &str, secret: &str) -> String {
    STANDARD.encode(format!("{user}:{secret}"))
}

fn put(
    file: &mut Map<String, Value>,
    names: &[String],
    auth: &str,
) -> std::result::Result<(), String> {
    let auths = file.entry("auths").or_insert_with(|| json!({}));
    let Some(auths) = auths.as_object_mut() else {
        return Err("\"auths\" is not an object".to_owned());
    };
    for name in names {
        auths.insert(name.clone(), json!({ "auth": auth }));
    }
    Ok(())
}

fn take(file: &mut Map<String, Value>, auth: &str) -> bool {
    let Some(auths) = file.get_mut("auths").and_then(Value::as_object_mut) else {
        return false;
    };
    let before = auths.len();
    auths.retain(|_, entry| entry["auth"] != auth);
    auths.len() != before
}

fn malformed(path: &Path, why: &str) -> CliError {
    CliError::usage(format!(
        "{} is not a file of credentials: {why}",
        path.shown()
    ))
    .hint("correct it or move it away")
}

fn read(path: &Path) -> Result<Option<Map<String, Value>>> {
    let cannot =
        |error: io::Error| CliError::usage(format!("could not read {}: {error}", path.shown()));
    let text = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(error)),
        Ok(meta) if meta.len() > FILE_BYTES_MAX => return Err(malformed(path, "it is too large")),
        Ok(_) => fs::read_to_string(path).map_err(cannot)?,
    };
    // podman makes empty files.
    if text.trim().is_empty() {
        return Ok(Some(Map::new()));
    }
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| malformed(path, &error.to_string()))
}

fn write(path: &Path, file: &Map<String, Value>) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let dir = path.parent().unwrap_or(Path::new("."));
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir);
    let text = serde_json::to_string_pretty(file).map_err(io::Error::other);
    made.and(text)
        .and_then(|text| replace(path, (text + "\n").as_bytes(), MODE))
        .map_err(|error| CliError::usage(format!("could not write {}: {error}", path.shown())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn files(dir: &Path) -> AuthFiles {
        let dir = dir.to_str().expect("utf-8").to_owned();
        AuthFiles::find(&|name| match name {
            "HOME" => Some(dir.clone()),
            "XDG_RUNTIME_DIR" => Some(format!("{dir}/run")),
            _ => None,
        })
        .expect("a home")
    }

    fn address() -> SocketAddr {
        "127.0.0.1:5080".parse().expect("address")
    }

    #[test]
    fn what_others_wrote_stays_and_modes_are_private() {
        let dir = tempfile::tempdir().expect("temp dir");
        let files = files(dir.path());
        let docker = dir.path().join(".docker/config.json");
        fs::create_dir_all(dir.path().join(".docker")).expect("make");
        fs::write(&docker, r#"{"auths":{"other.example":{"auth":"eA=="}},"currentContext":"x","credsStore":"pass"}"#).expect("write");
        let written = files.login(address(), "kiln", "s3").expect("logs in");
        assert_eq!(
            written.files,
            [
                docker.clone(),
                dir.path().join(".config/containers/auth.json")
            ]
        );
        assert_eq!(written.warnings.len(), 1);
        let text = fs::read_to_string(&docker).expect("read");
        let value: Value = serde_json::from_str(&text).expect("json");
        assert_eq!(
            value["auths"]["127.0.0.1:5080"]["auth"],
            STANDARD.encode("kiln:s3")
        );
        assert_eq!(
            value["auths"]["localhost:5080"]["auth"],
            STANDARD.encode("kiln:s3")
        );
        assert_eq!(
            (
                &value["auths"]["other.example"]["auth"],
                &value["currentContext"]
            ),
            (&json!("eA=="), &json!("x"))
        );
        for path in &written.files {
            assert_eq!(
                fs::metadata(path).expect("there").permissions().mode() & 0o777,
                MODE
            );
        }
        assert_eq!(
            files.logout("kiln", "other secret").expect("nothing"),
            Vec::<PathBuf>::new()
        );
        assert_eq!(files.logout("kiln", "s3").expect("logs out").len(), 2);
        let value: Value = serde_json::from_slice(&fs::read(&docker).expect("read")).expect("json");
        assert_eq!(value["auths"], json!({"other.example": {"auth": "eA=="}}));
    }

    #[test]
    fn an_older_entry_that_would_win_is_refreshed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let runtime = dir.path().join("run/containers/auth.json");
        fs::create_dir_all(runtime.parent().expect("parent")).expect("make");
        fs::write(&runtime, r#"{"auths":{"127.0.0.1:5080":{"auth":"b2xk"}}}"#).expect("write");
        let written = files(dir.path())
            .login(address(), "kiln", "s3")
            .expect("logs in");
        assert!(written.files.contains(&runtime));
        assert!(!fs::read_to_string(&runtime).expect("read").contains("b2xk"));
    }

    #[test]
    fn broken_files_are_never_overwritten() {
        let dir = tempfile::tempdir().expect("temp dir");
        let named = dir.path().join("auth.json");
        for broken in ["{", "[]", r#"{"auths": 1}"#] {
            fs::write(&named, broken).expect("write");
            let files = AuthFiles {
                docker: dir.path().join("d/config.json"),
                containers: named.clone(),
                before: Vec::new(),
            };
            assert_eq!(
                files
                    .login(address(), "kiln", "s")
                    .expect_err("broken")
                    .exit_code(),
                2
            );
            assert_eq!(fs::read_to_string(&named).expect("read"), broken);
        }
        fs::write(&named, "\n").expect("write");
        let files = AuthFiles {
            docker: dir.path().join("d/config.json"),
            containers: named.clone(),
            before: Vec::new(),
        };
        files
            .login(address(), "kiln", "s")
            .expect("an empty file is fine");
    }
}
