//! `kiln.toml` in a source folder: what its owner says about the image build, above everything kiln detects.
//!
//! ```toml
//! [build]
//! runtime = "node"              # which runtime, where the folder has several
//! subfolder = "apps/web"        # the app's folder; it becomes the source root
//! install = "npm ci"            # replaces the install command
//! build = "npm run build:prod"  # replaces the build command; "" means none
//! start = "node server.js"      # replaces the start command; a list is run without a shell
//! system_packages = ["libpq5"]  # Debian packages, for building and in the image
//! environment = { TZ = "UTC" }  # set while building and in the image; no place for secrets
//! port = 8080                   # the port the app listens on when PORT is unset
//! ```

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::bases::line_of;

/// Name of the file.
pub const BUILD_CONFIG_FILE: &str = "kiln.toml";
/// Longest command, bytes.
const COMMAND_BYTES_MAX: usize = 8192;

/// The `[build]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildConfig {
    /// Runtime, where the folder could be several.
    pub runtime: Option<String>,
    /// Folder of the app, relative.
    pub subfolder: Option<String>,
    /// Install command.
    pub install: Option<String>,
    /// Build command; empty means none.
    pub build: Option<String>,
    /// Start command.
    pub start: Option<Start>,
    /// Debian packages.
    #[serde(default)]
    pub system_packages: Vec<String>,
    /// Environment of build and image.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Default of PORT.
    pub port: Option<u16>,
}

/// A start command.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Start {
    /// Run by `/bin/sh`.
    Shell(String),
    /// Run as it is.
    Exec(Vec<String>),
}

/// Why a `kiln.toml` is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{BUILD_CONFIG_FILE}, line {line}: {what}")]
pub struct BuildConfigError {
    /// Line, from 1.
    pub line: u32,
    /// What is wrong.
    pub what: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    build: BuildConfig,
}

impl BuildConfig {
    /// Reads a `kiln.toml`.
    ///
    /// # Errors
    /// [`BuildConfigError`] with the line, also for keys that mean nothing.
    pub fn parse(text: &str) -> Result<Self, BuildConfigError> {
        let file: File = toml::from_str(text).map_err(|e| BuildConfigError {
            line: line_of(text, e.span().map_or(0, |span| span.start)) as u32,
            what: e.message().to_owned(),
        })?;
        file.build.check(text)?;
        Ok(file.build)
    }

    /// The line of a key of the table, if it stands there.
    #[must_use]
    pub fn line_of_key(text: &str, key: &str) -> Option<u32> {
        crate::plan::toml_line(text, &["build", key])
    }

    fn check(&self, text: &str) -> Result<(), BuildConfigError> {
        let error = |key: &str, what: String| BuildConfigError {
            line: Self::line_of_key(text, key).unwrap_or(1),
            what,
        };
        if let Some(folder) = &self.subfolder {
            let legal = !folder.is_empty()
                && folder.len() <= 1024
                && !folder.starts_with('/')
                && folder.split('/').all(|name| !matches!(name, ".." | ""));
            if !legal {
                let what = format!("subfolder {folder:?} must be a folder below this one");
                return Err(error("subfolder", what));
            }
        }
        let commands = [("install", &self.install), ("build", &self.build)];
        for (key, command) in commands {
            check_command(command.as_deref().unwrap_or("x")).map_err(|what| error(key, what))?;
            if key == "install" && command.as_deref() == Some("") {
                return Err(error(key, "install must not be empty".to_owned()));
            }
        }
        match &self.start {
            Some(Start::Shell(line)) if line.trim().is_empty() => {
                return Err(error("start", "start must not be empty".to_owned()));
            }
            Some(Start::Exec(words)) if words.first().is_none_or(String::is_empty) => {
                return Err(error("start", "start must not be empty".to_owned()));
            }
            Some(Start::Shell(line)) => check_command(line).map_err(|w| error("start", w))?,
            _ => {}
        }
        for package in &self.system_packages {
            if !is_debian_package(package) {
                let what = format!("{package:?} is no name of a Debian package");
                return Err(error("system_packages", what));
            }
        }
        for (name, value) in &self.environment {
            if !is_variable(name) || value.contains(['\n', '\r', '\0']) {
                let what = format!("{name:?} is no variable, or its value has more than one line");
                return Err(error("environment", what));
            }
        }
        if self.port == Some(0) {
            return Err(error("port", "port must not be 0".to_owned()));
        }
        Ok(())
    }
}

fn check_command(command: &str) -> Result<(), String> {
    if command.len() > COMMAND_BYTES_MAX {
        return Err(format!("a command has at most {COMMAND_BYTES_MAX} bytes"));
    }
    match command.contains(['\n', '\r', '\0']) {
        true => Err("a command is one line; put more into a script file".to_owned()),
        false => Ok(()),
    }
}

/// Debian policy 5.6.1, plus an optional `=version`.
fn is_debian_package(text: &str) -> bool {
    let (name, version) = match text.split_once('=') {
        Some((name, version)) => (name, Some(version)),
        None => (text, None),
    };
    let name_ok = (2..=100).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    let version_ok = |v: &str| {
        !v.is_empty()
            && v.len() <= 100
            && v.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"+-.:~".contains(&b))
    };
    name_ok && version.is_none_or(version_ok)
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_may_be_said() {
        let text = "[build]\nruntime = \"node\"\nstart = [\"node\", \"x y.js\"]\nbuild = \"\"\nsystem_packages = [\"libpq5\", \"g++\", \"jq=1.7~a\"]\nport = 80\n[build.environment]\nTZ = \"UTC\"\n";
        let config = BuildConfig::parse(text).expect("legal");
        let start = ["node", "x y.js"].map(str::to_owned).to_vec();
        assert_eq!(config.start, Some(Start::Exec(start)));
        assert_eq!(config.build.as_deref(), Some(""));
        assert_eq!(BuildConfig::parse(""), Ok(BuildConfig::default()));
    }

    #[test]
    fn wrong_things_name_their_line() {
        for (text, line) in [
            ("[build]\nstrat = \"x\"\n", 2),
            ("\n[biuld]\n", 2),
            ("[build]\nport = \"x\"\n", 2),
            ("[build]\n\nsubfolder = \"../x\"\n", 3),
            ("[build]\nsystem_packages = [\"Foo; rm\"]\n", 2),
            ("[build]\nenvironment = { \"A B\" = \"x\" }\n", 2),
            ("[build]\nstart = \"\"\n", 2),
            ("[build]\ninstall = \"a\\nb\"\n", 2),
            ("[build\n", 1),
        ] {
            let error = BuildConfig::parse(text).expect_err(text);
            assert_eq!(error.line, line, "{text}: {error}");
        }
    }
}
