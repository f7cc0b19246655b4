//! The plan and what is asked for.

use std::collections::BTreeMap;

use kiln_core::ImageRef;
use serde::Serialize;

use super::lockfiles::{HostMention, Lockfile};

/// What the caller says besides the folder.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A Dockerfile named by the caller; without one, the folder's own `Dockerfile` is used if there is one.
    pub dockerfile: Option<DockerfileChoice>,
    /// Stage to build.
    pub target: Option<String>,
    /// Build arguments.
    pub build_args: BTreeMap<String, String>,
}

/// A Dockerfile named by the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DockerfileChoice {
    /// A file inside the source folder.
    InFolder(String),
    /// A text from elsewhere, and the name to call it in messages.
    Text {
        /// Name for messages.
        name: String,
        /// The Dockerfile.
        text: String,
    },
}

/// Which way a folder is built.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RuntimeKind {
    /// A generated Dockerfile for Node.js.
    Node,
    /// A generated Dockerfile for Python.
    Python,
    /// A generated Dockerfile for a folder of files with an `index.html`.
    Static,
    /// The user's own Dockerfile.
    Dockerfile,
}

impl RuntimeKind {
    /// The word for it: also the name of its bases and of its entry in `registries.toml`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Python => "python",
            Self::Static => "static",
            Self::Dockerfile => "dockerfile",
        }
    }
}

/// What was seen, and where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Evidence {
    /// What it says or means.
    pub what: String,
    /// File inside the folder; empty when nothing in the folder says it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    /// Line, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

impl Evidence {
    pub(super) fn at(what: impl Into<String>, file: &str, line: Option<u32>) -> Self {
        Self {
            what: what.into(),
            file: file.to_owned(),
            line,
        }
    }

    pub(super) fn kiln(what: impl Into<String>) -> Self {
        Self::at(what, "", None)
    }

    /// `file:line`, or `file`, or `kiln's default`.
    #[must_use]
    pub fn place(&self) -> String {
        match (self.file.as_str(), self.line) {
            ("", _) => "kiln's default".to_owned(),
            (file, Some(line)) => format!("{file}:{line}"),
            (file, None) => file.to_owned(),
        }
    }
}

/// The version that was taken.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VersionChoice {
    /// Version line of the base: `20`, `3.13`.
    pub version: String,
    /// Exact version inside the base, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact: Option<String>,
    /// What the folder asks for; `None` when it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wanted: Option<String>,
    /// Who asks.
    pub why: Evidence,
}

/// A command and who says so.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Command {
    /// The command line.
    pub line: String,
    /// Who says so.
    pub why: Evidence,
}

/// A folder of files served as they are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StaticSite {
    /// Folder that the build writes.
    pub folder: String,
    /// Unknown paths give `index.html`.
    pub single_page: bool,
}

/// An image the build starts from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PlannedBase {
    /// As the Dockerfile that was read writes it.
    pub written: String,
    /// What it means. Without a digest the base is not baked yet and the plan cannot be built.
    pub reference: ImageRef,
}

/// How a folder becomes an image.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Plan {
    /// Schema of this record.
    pub schema: u32,
    /// Runtime.
    pub runtime: RuntimeKind,
    /// Source root inside the folder that was planned; empty for the folder itself.
    pub root: String,
    /// Version of the runtime.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<VersionChoice>,
    /// Framework (`express`, `flask`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub framework: Option<String>,
    /// Package manager (`npm`, `uv`), with its version where that matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package_manager: Option<String>,
    /// Commands that install dependencies.
    pub install: Vec<Command>,
    /// Commands that build.
    pub build: Vec<Command>,
    /// Command that starts the app.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<Command>,
    /// Debian packages.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub system_packages: Vec<String>,
    /// Port the app listens on when PORT is not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Set when the image only serves files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub static_site: Option<StaticSite>,
    /// Why all this.
    pub evidence: Vec<Evidence>,
    /// What the owner should know; nothing that stops the build.
    pub notes: Vec<Evidence>,
    /// The user's own Dockerfile: its path inside the source root, or the name the caller gave it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dockerfile_path: Option<String>,
    /// The exact Dockerfile.
    pub dockerfile: String,
    /// The images it starts from.
    pub bases: Vec<PlannedBase>,
    /// Lockfiles with their digests.
    pub lockfiles: Vec<Lockfile>,
    /// Hosts that lockfiles and manifests name.
    pub hosts_named: Vec<HostMention>,
    /// Which sets of registry hosts the build needs, by their names in `registries.toml`: `node`, `python`, `debian`.
    pub registries: Vec<String>,
    /// Patterns that stay behind besides the folder's own ignore file: pass them to [`crate::context::Tree::open`].
    pub extra_ignores: Vec<String>,
}

impl Plan {
    /// The schema this version writes.
    pub const SCHEMA: u32 = 1;

    /// Bases that have no digest yet: the plan can be shown and not built.
    #[must_use]
    pub fn unbaked(&self) -> Vec<&PlannedBase> {
        let bases = self.bases.iter();
        bases.filter(|b| b.reference.digest.is_none()).collect()
    }
}
