//! `kiln.toml` in the configuration directory: what the operator sets for every job on this host.
//!
//! Raw here, resolved by [`Config::limits`]. Unknown keys are refused with their line. A project's own `kiln.toml` (`[build]`) is
//! the image room's business.

mod controller;

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use kiln_core::ByteSize;
use kiln_core::access::{MEMORY_MIN, TIMEOUT_MIN_MS};
use kiln_core::job::Limits;
use rustix::fs::OFlags;
use serde::Deserialize;

pub(crate) use self::controller::ControllerConfig;
use crate::args::LimitArgs;
use crate::error::{CliError, Result};
use crate::show::ShownPath as _;

/// Largest configuration file, bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Time a build may take when nobody says otherwise.
pub(crate) const BUILD_TIMEOUT: Duration = Duration::from_secs(600);
/// Shortest time that a command may be given.
const TIMEOUT_MIN: Duration = Duration::from_millis(TIMEOUT_MIN_MS);
/// Time that stands for "no limit": thirty days.
pub(crate) const NO_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

/// The file.
#[derive(Deserialize, Debug, Default)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Defaults and maxima of machines.
    pub limits: LimitConfig,
    /// The registry's door on loopback.
    pub registry: RegistryConfig,
    /// Disk budgets.
    pub cache: CacheConfig,
    /// Network of builds.
    pub network: NetworkConfig,
    /// The server that builds and runs are sent to.
    pub server: ServerConfig,
    /// The controller of this home.
    pub controller: ControllerConfig,
}

/// `[server]`
#[derive(Deserialize, Debug, Default)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ServerConfig {
    /// Its address, `https://HOST:PORT`; without it jobs run on this host.
    pub url: Option<String>,
    /// The authority that signed its certificate, PEM, when the host does not trust it already.
    pub ca: Option<std::path::PathBuf>,
}

/// `[limits]`
#[derive(Deserialize, Debug)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LimitConfig {
    /// Most virtual CPUs of one machine.
    pub cpus_max: u32,
    /// Most memory of one machine.
    pub memory_max: ByteText,
    /// Memory of a build.
    pub build_memory: ByteText,
    /// Memory of a run.
    pub run_memory: ByteText,
    /// Most disk of one machine.
    pub disk_max: ByteText,
}

/// `[registry]`
#[derive(Deserialize, Debug, Default)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RegistryConfig {
    /// Anybody on this host may pull.
    pub anonymous_pull: bool,
}

/// `[cache]`
#[derive(Deserialize, Debug)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CacheConfig {
    /// Most bytes of templates, heads, unpacked images and registry together.
    pub budget: ByteText,
}

/// `[network]`
#[derive(Deserialize, Debug, Default)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NetworkConfig {
    /// Pass the host's CA bundle into builds: yes when the host's settings name one, unless set here.
    pub ca_bundle: Option<bool>,
    /// Addresses, ranges and names of this host and its installation that nothing here can know, such as the public address of a host behind a
    /// translator: no machine reaches them.
    pub own: Vec<String>,
}

/// A size written as text (`2G`).
#[derive(Deserialize, Debug, Clone, Copy)]
#[serde(try_from = "String")]
pub(crate) struct ByteText(pub ByteSize);

impl TryFrom<String> for ByteText {
    type Error = kiln_core::size::ParseSizeError;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl Default for LimitConfig {
    fn default() -> Self {
        Self {
            cpus_max: 4,
            memory_max: ByteText(ByteSize::gib(8)),
            build_memory: ByteText(ByteSize::gib(2)),
            run_memory: ByteText(ByteSize::mib(512)),
            disk_max: ByteText(ByteSize::gib(50)),
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            budget: ByteText(ByteSize::gib(60)),
        }
    }
}

/// One byte more than a file of settings may have, at most. What is no file says nothing, or never ends.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::new(
            ErrorKind::InvalidInput,
            "it is no file",
        ));
    }
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text)?;
    Ok(text)
}

impl Config {
    /// Reads the file; a missing one means defaults.
    ///
    /// # Errors
    /// When it cannot be read or has unknown keys or values; the message names the line.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let failed = |why: &dyn std::fmt::Display| {
            CliError::usage(format!("could not read {}: {why}", path.shown()))
        };
        let text = match read(path) {
            Ok(text) if text.len() as u64 > CONFIG_BYTES_MAX => {
                return Err(CliError::usage(format!(
                    "{} is larger than 1 MiB",
                    path.shown()
                )));
            }
            Ok(text) => String::from_utf8(text).map_err(|_| failed(&"it is not UTF-8"))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(&error)),
        };
        toml::from_str(&text).map_err(|error| {
            CliError::usage(format!(
                "{} is not valid: {}",
                path.shown(),
                error.to_string().trim()
            ))
            .hint("correct it; docs/guides/operate.md and server.md name its keys")
        })
    }

    /// The limits of one job: what was asked, never more than the maxima.
    ///
    /// # Errors
    /// When more is asked than the operator allows.
    pub(crate) fn limits(&self, asked: &LimitArgs, build: bool, host_cpus: u32) -> Result<Limits> {
        let cpus_max = self.limits.cpus_max.max(1);
        let cpus = asked.cpus.unwrap_or_else(|| {
            if build {
                host_cpus.clamp(1, cpus_max.min(2))
            } else {
                1
            }
        });
        if cpus == 0 || cpus > cpus_max {
            return Err(CliError::usage(format!(
                "--cpus {cpus}: at least 1 and at most {cpus_max}"
            ))
            .hint("the operator's maximum is limits.cpus_max in kiln.toml"));
        }
        let default = if build {
            self.limits.build_memory.0
        } else {
            self.limits.run_memory.0
        };
        let memory = asked.memory.unwrap_or(default);
        within("memory", memory, (MEMORY_MIN, self.limits.memory_max.0))?;
        let timeout = asked
            .timeout
            .unwrap_or(if build { BUILD_TIMEOUT } else { NO_TIMEOUT });
        if timeout < TIMEOUT_MIN {
            return Err(CliError::usage(format!(
                "--timeout {timeout:?}: at least {TIMEOUT_MIN:?}"
            )));
        }
        let timeout_ms = u64::try_from(timeout.min(NO_TIMEOUT).as_millis()).unwrap_or(u64::MAX);
        Ok(Limits {
            cpus,
            memory,
            disk: self.limits.disk_max.0,
            timeout_ms,
        })
    }
}

/// An amount of memory or disk, by the name that its flag and `limits.NAME_max` in kiln.toml have.
///
/// # Errors
/// When it is less than a machine works with, or more than the operator's maximum.
pub(crate) fn within(
    name: &str,
    asked: ByteSize,
    (least, most): (ByteSize, ByteSize),
) -> Result<()> {
    let wrong = || {
        CliError::usage(format!(
            "--{name} {asked}: at least {least} and at most {most}"
        ))
    };
    match asked {
        asked if asked > most => Err(wrong().hint(format!(
            "the operator's maximum is limits.{name}_max in kiln.toml"
        ))),
        asked if asked < least => Err(wrong().hint(format!("a machine needs {least} at least"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_of_settings_is_told_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let path = |name: &str| dir.path().join(name);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), mode).expect("pipe");
        std::os::unix::fs::symlink("/dev/zero", path("zero")).expect("link");
        std::fs::create_dir(path("folder")).expect("folder");
        std::fs::write(path("large"), vec![b' '; (1 << 20) + 1]).expect("written");
        std::fs::write(path("bytes"), [0xff, 0xfe]).expect("written");
        for name in ["pipe", "zero", "folder", "large", "bytes"] {
            let error = Config::load(&path(name)).expect_err(name);
            assert_eq!(error.exit_code(), 2, "{name}: {}", error.message);
        }
        std::fs::write(path("plain"), "").expect("written");
        std::os::unix::fs::symlink(path("plain"), path("link")).expect("link");
        for name in ["none", "plain", "link"] {
            assert!(Config::load(&path(name)).is_ok(), "{name}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let error = toml::from_str::<Config>("[limits]\ncpus = 3\n")
            .expect_err("unknown key")
            .to_string();
        assert!(
            error.contains("line 2") && error.contains("cpus"),
            "{error}"
        );
        let config: Config = toml::from_str("[limits]\nmemory_max = \"1G\"\n").expect("valid");
        let asked = LimitArgs {
            cpus: None,
            memory: Some(ByteSize::gib(2)),
            timeout: None,
        };
        assert!(config.limits(&asked, true, 2).is_err());
    }

    #[test]
    fn a_controllers_settings_are_checked_where_they_stand() {
        let text = "[controller]\nencrypt_logs = true\notlp = \"http://127.0.0.1:4318\"\n";
        let config: Config = toml::from_str(text).expect("valid");
        assert!(config.controller.encrypt_logs);
        assert_eq!(config.controller.otlp(), Some("http://127.0.0.1:4318"));
        for (bad, line) in [
            ("[controller]\notlp = \"collector:4318\"\n", "line 2"),
            ("\n[controller]\nencrypt_logs = \"yes\"\n", "line 3"),
            ("[controller]\nencrypt = true\n", "line 2"),
        ] {
            let error = toml::from_str::<Config>(bad).expect_err(bad).to_string();
            assert!(error.contains(line), "{bad}: {error}");
        }
    }

    #[test]
    fn defaults_fit_their_own_maxima() {
        let none = LimitArgs {
            cpus: None,
            memory: None,
            timeout: None,
        };
        let limits = Config::default().limits(&none, true, 64).expect("defaults");
        assert_eq!(
            (limits.cpus, limits.memory, limits.timeout_ms),
            (2, ByteSize::gib(2), 600_000)
        );
    }
}
