//! Where kiln keeps things on this host: the XDG directories, or everything below `KILN_HOME`.
//!
//! The only module of this room that reads the environment. Nothing is written outside these directories.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Version of the on-disk layout. A newer one is refused, an older one upgraded where this build knows how.
pub const LAYOUT: u32 = 1;

/// kiln's directories on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// State that must survive: images, heads, registry, the queue.
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
    /// A relative path would be another home in each directory.
    #[error("KILN_HOME is not an absolute path: {0:?}")]
    Relative(PathBuf),
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
    /// The layout is of an older kiln, and this build knows no way from it.
    #[error(
        "{path:?} was written by an older kiln (layout {found}) that this one cannot upgrade from"
    )]
    Older {
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
    /// When none of them is an absolute path, or `KILN_HOME` is a relative one.
    pub fn from_env() -> Result<Self, HomeError> {
        Self::from_variables(|name| {
            #[expect(
                clippy::disallowed_methods,
                reason = "the one place that reads these variables"
            )]
            std::env::var_os(name)
        })
    }

    fn from_variables(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, HomeError> {
        let set = |name: &str| {
            var(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        if let Some(root) = set("KILN_HOME") {
            return match root.is_absolute() {
                true => Ok(Self::below(&root)),
                false => Err(HomeError::Relative(root)),
            };
        }
        // The XDG base directory specification has relative paths ignored.
        let absolute = |name: &str| set(name).filter(|path| path.is_absolute());
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
        if self.check_layout()? {
            return Ok(());
        }
        let path = self.version_file();
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

    fn version_file(&self) -> PathBuf {
        self.data.join("version.json")
    }

    /// Whether there is a layout of this build's version; `false` when there is none yet. Makes nothing.
    ///
    /// # Errors
    /// When the home is of another kiln, or its version cannot be read.
    pub fn check_layout(&self) -> Result<bool, HomeError> {
        let path = self.version_file();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => {
                return Err(HomeError::Io {
                    action: "read",
                    path,
                    source,
                });
            }
        };
        let version: Version =
            serde_json::from_slice(&bytes).map_err(|error| HomeError::Damaged {
                path: path.clone(),
                why: format!("it should say which layout the home has ({error})"),
            })?;
        let found = version.layout;
        match found.cmp(&LAYOUT) {
            Ordering::Equal => Ok(true),
            Ordering::Greater => Err(HomeError::Newer { path, found }),
            // Layout 1 is the first; the way from an older one belongs here.
            Ordering::Less => Err(HomeError::Older { path, found }),
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

    /// Database, keys, logs and uploads of this home's controller.
    #[must_use]
    pub fn controller(&self) -> PathBuf {
        self.data.join("controller")
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
        fs::write(&version, "{\"layout\":0}").expect("write");
        assert!(matches!(
            home.check_layout(),
            Err(HomeError::Older { found: 0, .. })
        ));
        fs::write(&version, "x").expect("write");
        assert!(matches!(home.prepare(), Err(HomeError::Damaged { .. })));
    }

    #[test]
    fn directories_follow_the_variables_and_kiln_home_wins() {
        let of = |set: &[(&str, &str)]| {
            Home::from_variables(|name| {
                let found = set.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        let home = of(&[("HOME", "/u"), ("XDG_CACHE_HOME", "/c"), ("KILN_HOME", "")]);
        let home = home.expect("a home");
        assert_eq!(home.data, Path::new("/u/.local/share/kiln"));
        assert_eq!(home.cache, Path::new("/c/kiln"));
        assert_eq!(home.config, Path::new("/u/.config/kiln"));
        let relative = of(&[("HOME", "/u"), ("XDG_CACHE_HOME", "c")]).expect("a home");
        assert_eq!(relative.cache, Path::new("/u/.cache/kiln"));
        let home = of(&[("HOME", "/u"), ("KILN_HOME", "/k")]).expect("a home");
        assert_eq!(home, Home::below(Path::new("/k")));
        assert!(matches!(
            of(&[("HOME", "/u"), ("KILN_HOME", "k")]),
            Err(HomeError::Relative(_))
        ));
        assert!(matches!(of(&[("HOME", "u")]), Err(HomeError::NoHome)));
    }
}
