//! Reads an image configuration, bounded, from bytes nobody trusts.
//!
//! Format: OCI image-spec v1.1.1, config.md; Docker's own is the same in all that is read here.

use std::collections::BTreeMap;

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

/// Largest configuration accepted, bytes.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Most entries in any list or map of a configuration that is read.
const ENTRIES_MAX: usize = 4096;
/// Longest single text (a variable, an argument, a path), bytes: Linux takes no longer argument.
const TEXT_BYTES_MAX: usize = 128 << 10;

/// What an image says about how to run it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// CPU architecture in Go's words.
    pub architecture: String,
    /// Operating system in Go's words.
    pub os: String,
    /// Digests of the layers as unpacked tar streams, lowest first.
    pub diff_ids: Vec<Digest>,
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// Command line before the arguments.
    pub entrypoint: Vec<String>,
    /// Default arguments, or the whole command line when there is no entrypoint.
    pub cmd: Vec<String>,
    /// User (`name`, `uid`, `name:group`, `uid:gid`); empty means root.
    pub user: String,
    /// Working directory; empty means `/`.
    pub workdir: String,
    /// Ports the image says it listens on, such as `3000/tcp`.
    pub exposed_ports: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Signal that asks it to stop; empty means SIGTERM.
    pub stop_signal: String,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON of the right shape.
    #[error("the image configuration is malformed")]
    Malformed(#[source] serde_json::Error),
    /// Larger than a bound.
    #[error("the image configuration has {what}: at most {max} are accepted")]
    TooMuch {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        max: u64,
    },
    /// A text that no system call could take.
    #[error("the image configuration's {what} is not legal")]
    Illegal {
        /// Which field.
        what: &'static str,
    },
}

#[derive(Deserialize)]
struct Raw {
    architecture: String,
    os: String,
    rootfs: RootFs,
    #[serde(default)]
    config: Option<RawConfig>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
}

impl ImageConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() as u64 > CONFIG_BYTES_MAX {
            return Err(ConfigError::TooMuch {
                what: "too many bytes",
                max: CONFIG_BYTES_MAX,
            });
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(ConfigError::Malformed)?;
        if raw.rootfs.kind != "layers" {
            return Err(ConfigError::Illegal {
                what: "rootfs type",
            });
        }
        let config = raw.config.unwrap_or_default();
        let read = Self {
            architecture: raw.architecture,
            os: raw.os,
            diff_ids: raw.rootfs.diff_ids.unwrap_or_default(),
            env: config.env.unwrap_or_default(),
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
            workdir: config.working_dir.unwrap_or_default(),
            exposed_ports: config
                .exposed_ports
                .map(|ports| ports.into_keys().collect())
                .unwrap_or_default(),
            labels: config.labels.unwrap_or_default(),
            stop_signal: config.stop_signal.unwrap_or_default(),
        };
        read.check()?;
        Ok(read)
    }

    fn check(&self) -> Result<(), ConfigError> {
        for (what, count) in [
            ("too many layers", self.diff_ids.len()),
            ("too many variables", self.env.len()),
            ("too many words in its entrypoint", self.entrypoint.len()),
            ("too many words in its command", self.cmd.len()),
            ("too many ports", self.exposed_ports.len()),
            ("too many labels", self.labels.len()),
        ] {
            if count > ENTRIES_MAX {
                let max = ENTRIES_MAX as u64;
                return Err(ConfigError::TooMuch { what, max });
            }
        }
        let one = std::slice::from_ref;
        for (what, texts) in [
            ("environment", self.env.as_slice()),
            ("entrypoint", &self.entrypoint),
            ("command", &self.cmd),
            ("user", one(&self.user)),
            ("working directory", one(&self.workdir)),
            ("ports", &self.exposed_ports),
            ("stop signal", one(&self.stop_signal)),
        ] {
            let bad = |text: &String| text.contains('\0') || text.len() > TEXT_BYTES_MAX;
            if texts.iter().any(bad) {
                return Err(ConfigError::Illegal { what });
            }
        }
        if !self.workdir.is_empty() && !self.workdir.starts_with('/') {
            return Err(ConfigError::Illegal {
                what: "working directory",
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_builders_write_is_read() {
        let digest = Digest::of(b"layer");
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","created":"x","history":[{{}}],
            "config":{{"Env":["A=b"],"Entrypoint":null,"Cmd":["node"],"User":"1000","WorkingDir":"/app",
            "ExposedPorts":{{"3000/tcp":{{}}}},"Labels":null}},
            "rootfs":{{"type":"layers","diff_ids":["{digest}"]}}}}"#
        );
        let config = ImageConfig::parse(text.as_bytes()).expect("legal");
        assert_eq!(config.diff_ids, [digest]);
        assert_eq!(config.exposed_ports, ["3000/tcp"]);
        assert!(config.entrypoint.is_empty() && config.labels.is_empty());
        for (from, to) in [
            ("\"/app\"", "\"app\""),
            ("A=b", "A=\\u0000b"),
            ("\"layers\"", "\"other\""),
            ("sha256:", "sha512:"),
            ("\"os\":\"linux\",", ""),
        ] {
            assert!(
                ImageConfig::parse(text.replace(from, to).as_bytes()).is_err(),
                "{to}"
            );
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1000)) {
            let _ = ImageConfig::parse(&bytes);
        }
    }
}
