//! Where kiln keeps things on this host: the XDG directories, or everything below `KILN_HOME`.
//!
//! The only module of this room that reads the environment. Nothing is written outside these directories.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Version of the on-disk layout. A newer one is refused, an older one upgraded where this build knows how.
pub const LAYOUT: u32 = 1;

/// kiln's directories on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// State that must survive: images, heads, registry, jobs.
    pub data: PathBuf,
    /// What can be made again: downloads, bake stages.
    pub cache: PathBuf,
    /// What the operator writes: `kiln.toml`, `bases.toml`, `registries.toml`.
    pub config: PathBuf,
}

/// Why the home cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// No variable says where it is.
    #[error("neither KILN_HOME nor HOME is set to an absolute path")]
    NoHome,
    /// The filesystem failed.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The layout is of a newer kiln.
    #[error("{path:?} was written by a newer kiln (layout {found}, this one knows {LAYOUT})")]
    Newer {
        /// Where.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
    /// The version file is not readable as one.
    #[error("{path:?} is damaged: {why}")]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Version {
    layout: u32,
}

impl Home {
    /// From the environment: `KILN_HOME`, else `XDG_DATA_HOME`, `XDG_CACHE_HOME`, `XDG_CONFIG_HOME`, else below `HOME`.
    ///
    /// # Errors
    /// When none of them is an absolute path.
    pub fn from_env() -> Result<Self, HomeError> {
        let absolute = |name: &str| -> Option<PathBuf> {
            #[expect(
                clippy::disallowed_methods,
                reason = "the one place that reads these variables"
            )]
            let value = std::env::var_os(name)?;
            Some(PathBuf::from(value)).filter(|path| path.is_absolute())
        };
        if let Some(root) = absolute("KILN_HOME") {
            return Ok(Self::below(&root));
        }
        let user = absolute("HOME");
        let dir = |name: &str, fallback: &str| {
            absolute(name)
                .or_else(|| user.as_ref().map(|home| home.join(fallback)))
                .map(|d| d.join("kiln"))
        };
        match (
            dir("XDG_DATA_HOME", ".local/share"),
            dir("XDG_CACHE_HOME", ".cache"),
            dir("XDG_CONFIG_HOME", ".config"),
        ) {
            (Some(data), Some(cache), Some(config)) => Ok(Self {
                data,
                cache,
                config,
            }),
            _ => Err(HomeError::NoHome),
        }
    }

    /// Everything below one directory.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self {
            data: root.to_owned(),
            cache: root.join("cache"),
            config: root.join("config"),
        }
    }

    /// Makes the directories (private to the user) and checks the layout's version.
    ///
    /// # Errors
    /// When they cannot be made, or belong to a newer kiln.
    pub fn prepare(&self) -> Result<(), HomeError> {
        for dir in [&self.data, &self.cache, &self.config] {
            fs::create_dir_all(dir).map_err(|source| HomeError::Io {
                action: "make",
                path: dir.clone(),
                source,
            })?;
        }
        use std::os::unix::fs::PermissionsExt;
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(&self.data, private).map_err(|source| HomeError::Io {
            action: "restrict",
            path: self.data.clone(),
            source,
        })?;
        let path = self.data.join("version.json");
        match fs::read(&path) {
            Ok(bytes) => {
                let version: Version =
                    serde_json::from_slice(&bytes).map_err(|error| HomeError::Damaged {
                        path: path.clone(),
                        why: error.to_string(),
                    })?;
                if version.layout > LAYOUT {
                    return Err(HomeError::Newer {
                        path,
                        found: version.layout,
                    });
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = format!("{{\"layout\":{LAYOUT}}}\n");
                let temp = path.with_extension(format!("tmp-{}", std::process::id()));
                fs::write(&temp, text)
                    .and_then(|()| fs::rename(&temp, &path))
                    .map_err(|source| HomeError::Io {
                        action: "write",
                        path,
                        source,
                    })
            }
            Err(source) => Err(HomeError::Io {
                action: "read",
                path,
                source,
            }),
        }
    }

    /// Machine images.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// Cache heads.
    #[must_use]
    pub fn heads(&self) -> PathBuf {
        self.data.join("heads")
    }

    /// Registry store.
    #[must_use]
    pub fn registry(&self) -> PathBuf {
        self.data.join("registry")
    }

    /// Job records.
    #[must_use]
    pub fn jobs(&self) -> PathBuf {
        self.data.join("jobs")
    }

    /// Unpacked container images, as sealed disks.
    #[must_use]
    pub fn unpacked(&self) -> PathBuf {
        self.data.join("unpacked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_layout_is_refused_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        home.prepare().expect("new");
        home.prepare().expect("again");
        let version = dir.path().join("version.json");
        fs::write(&version, "{\"layout\":99}").expect("write");
        assert!(matches!(
            home.prepare(),
            Err(HomeError::Newer { found: 99, .. })
        ));
        fs::write(&version, "x").expect("write");
        assert!(matches!(home.prepare(), Err(HomeError::Damaged { .. })));
    }
}
