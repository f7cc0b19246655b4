//! Certificates of private authorities, where docker and podman keep them: `DIR/HOST[:PORT]/*.crt`, with DIR one of
//! `~/.config/containers/certs.d`, `/etc/containers/certs.d`, `/etc/docker/certs.d` (containers-certs.d(5)).
//! Client certificates (`*.cert` with `*.key`) are not used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::error::RemoteError;
use super::target::Target;

/// Most bytes of one file of certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most files of one registry.
const FILES_MAX: usize = 64;

/// The directories that may hold certificates of registries.
#[derive(Clone, Debug)]
pub struct CertificateSources {
    dirs: Vec<PathBuf>,
}

impl CertificateSources {
    /// As podman and docker find them in this environment. Reads nothing yet.
    #[must_use]
    pub fn from_env(env: &BTreeMap<String, String>) -> Self {
        let get = |name: &str| {
            env.get(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let config = get("XDG_CONFIG_HOME").or_else(|| get("HOME").map(|dir| dir.join(".config")));
        let mut dirs: Vec<PathBuf> = config
            .map(|dir| dir.join("containers/certs.d"))
            .into_iter()
            .collect();
        dirs.extend(["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from));
        Self { dirs }
    }

    /// Just these directories.
    #[must_use]
    pub fn in_dirs(dirs: Vec<PathBuf>) -> Self {
        Self { dirs }
    }

    /// Certificates (PEM) to trust for this target's registry, besides `others`.
    ///
    /// # Errors
    /// A file that is there and cannot be read.
    pub fn bundle_for(
        &self,
        target: &Target,
        others: Option<Vec<u8>>,
    ) -> Result<Option<Vec<u8>>, RemoteError> {
        let mut bundle = others.unwrap_or_default();
        for dir in &self.dirs {
            let dir = dir.join(target.registry());
            for path in certificates(&dir).map_err(at(&dir))? {
                bundle.push(b'\n');
                let read = File::open(&path)
                    .and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bundle));
                read.map_err(at(&path))?;
            }
        }
        Ok(Some(bundle).filter(|bundle| !bundle.is_empty()))
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RemoteError {
    let path = path.to_owned();
    move |source| RemoteError::Certificates { path, source }
}

/// The `*.crt` files of a directory, in order of their names.
fn certificates(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "crt") && found.len() < FILES_MAX {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_of_this_registry_alone_are_taken() {
        let dir = tempfile::tempdir().expect("temp dir");
        let file = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("parent")).expect("dir");
            fs::write(path, text).expect("write");
        };
        file("user/r.example.org:5000/ca.crt", "one");
        file("user/r.example.org:5000/client.cert", "not this");
        file("system/r.example.org:5000/b.crt", "two");
        file("system/r.example.org/ca.crt", "another port's");
        let sources = CertificateSources::in_dirs(vec![
            dir.path().join("user"),
            dir.path().join("missing"),
            dir.path().join("system"),
        ]);
        let bundle = |to: &str, others: Option<&str>| {
            let target = Target::source(&to.parse().expect("legal"));
            let others = others.map(|text| text.as_bytes().to_vec());
            sources
                .bundle_for(&target, others)
                .expect("readable")
                .map(|bytes| String::from_utf8(bytes).expect("text"))
        };
        assert_eq!(
            bundle("r.example.org:5000/a", Some("zero")).as_deref(),
            Some("zero\none\ntwo")
        );
        assert_eq!(bundle("other.example.org/a", None), None);
    }

    #[test]
    fn the_users_directory_comes_first() {
        let env = BTreeMap::from([("HOME".to_owned(), "/home/ann".to_owned())]);
        let sources = CertificateSources::from_env(&env);
        assert_eq!(
            sources.dirs[0],
            Path::new("/home/ann/.config/containers/certs.d")
        );
        assert_eq!(sources.dirs.len(), 3);
    }
}
