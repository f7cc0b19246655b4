//! `registries.toml`: typed, unknown keys refused, errors with line and column.
//!
//! Every section that discovery wrote carries a `seal` over its own values. As long as the seal fits, a later
//! discovery may refresh the section; once an operator changed a value (or wrote the section without a seal) it is
//! left alone for good.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use kiln_core::network::{Cidr, RangeException};
use kiln_core::{AllowRule, Digest};
use serde::{Deserialize, Serialize};

use crate::ca::{self, CaBundle, CaError, CaSetting};
use crate::gateway::proxy::{ProxyConfig, ProxyError};
use crate::origin::{Origin, split};

/// Most bytes of the file.
pub const FILE_BYTES_MAX: usize = 1 << 20;
/// Version this kiln writes and reads.
pub const VERSION: u32 = 1;
/// Hex digits of a seal.
const SEAL_DIGITS: usize = 16;

/// First lines of a new file.
pub const HEADER: &str = "\
# Package registries that builds may reach, written by `kiln registries discover`; yours to edit.
# A section whose `seal` still fits its values is refreshed by the next discovery.
# Change a value, or remove the seal, and the section stays as you wrote it.

";

/// What a build is made with, as far as registries are concerned.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    /// npm, pnpm and yarn.
    Node,
    /// pip, uv, poetry, pdm and pipenv.
    Python,
    /// apt, for base images and system packages.
    Debian,
}

impl Runtime {
    /// All of them, in the order of the file.
    pub const ALL: [Self; 3] = [Self::Node, Self::Python, Self::Debian];

    /// Its key in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Python => "python",
            Self::Debian => "debian",
        }
    }
}

/// The whole file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registries {
    /// Format, [`VERSION`].
    pub version: u32,
    /// The operator's CA bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<CaSection>,
    /// The operator's proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxySection>,
    /// One section per runtime.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub runtime: BTreeMap<Runtime, RuntimeSection>,
    /// Special-purpose ranges that single names may resolve into.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exception: Vec<ExceptionSection>,
}

impl Default for Registries {
    fn default() -> Self {
        Self {
            version: VERSION,
            ca: None,
            proxy: None,
            runtime: BTreeMap::new(),
            exception: Vec::new(),
        }
    }
}

/// Files of certificates that machines and build steps shall trust.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaSection {
    /// PEM files on the host, joined in this order. Empty: none, even if the host's settings name one.
    pub files: Vec<PathBuf>,
    /// Which settings named them.
    #[serde(default)]
    pub source: String,
    /// See the module's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<String>,
}

/// The proxy that the host itself uses. Absent: the environment of the kiln process decides.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxySection {
    /// `http://[user:password@]host[:port]` for plain HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// The same for everything else, by `CONNECT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub https: Option<String>,
    /// Names that are dialled directly, separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_proxy: Option<String>,
    /// Who said so.
    #[serde(default)]
    pub source: String,
    /// See the module's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<String>,
}

/// What builds of one runtime may reach.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeSection {
    /// URL to hand to the tool: npm's registry, pip's index, apt's mirror. Never with credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<IndexUrl>,
    /// Further URLs: pip's extra indexes, npm's registries of scopes, apt's other archives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<IndexUrl>,
    /// What a build may reach: the hosts of the indexes and of the files they list.
    #[serde(default)]
    pub hosts: Vec<AllowRule>,
    /// Neither the host's settings nor its tools could tell: the tool in the base image must be asked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub needs_base: bool,
    /// Who said so.
    #[serde(default)]
    pub source: String,
    /// See the module's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<String>,
}

impl RuntimeSection {
    /// A host that does not say what a port speaks has what an index at that very place says, else the port's default.
    fn rules(&self) -> Vec<AllowRule> {
        let urls = self.index.iter().chain(&self.more);
        let origins: Vec<Origin> = urls.filter_map(|url| Origin::parse(&url.0)).collect();
        let singles = self.hosts.iter().flat_map(AllowRule::single_ports);
        let spoken = singles.map(|rule| {
            let here = |url: &&Origin| url.host == rule.host() && rule.ports() == [url.port];
            match (rule.protocol(), origins.iter().find(here)) {
                (None, Some(url)) => rule.with_protocol(url.protocol()),
                _ => rule,
            }
        });
        spoken
            .flat_map(|rule| rule.spelled_out().collect::<Vec<_>>())
            .collect()
    }
}

/// One name that may resolve into one special-purpose range.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExceptionSection {
    /// Exact host name.
    pub host: String,
    /// The range. Loopback and metadata addresses stay refused whatever is written here.
    pub range: Cidr,
    /// `false` keeps it from being used, and from being proposed again.
    #[serde(default = "yes")]
    pub allow: bool,
    /// Who proposed it.
    #[serde(default)]
    pub source: String,
}

fn yes() -> bool {
    true
}

/// An index URL without credentials.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IndexUrl(String);

/// Why a text is not an index URL.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IndexUrlError {
    /// Not `http(s)://host/...`.
    #[error("not an http:// or https:// URL of a host name")]
    Url,
    /// Credentials would travel into machines and images.
    #[error(
        "the URL carries credentials: kiln hands index URLs to builds, so they must be without"
    )]
    Credentials,
}

impl IndexUrl {
    /// The URL as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for IndexUrl {
    type Error = IndexUrlError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let url = split(&text).ok_or(IndexUrlError::Url)?;
        if url.userinfo.is_some() {
            return Err(IndexUrlError::Credentials);
        }
        Ok(Self(text))
    }
}

impl From<IndexUrl> for String {
    fn from(url: IndexUrl) -> Self {
        url.0
    }
}

/// Why `registries.toml` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistriesError {
    /// It cannot be read or written.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Larger than [`FILE_BYTES_MAX`].
    #[error("registries.toml is larger than {FILE_BYTES_MAX} bytes")]
    TooLong,
    /// Wrong syntax, key or value.
    #[error("registries.toml is wrong")]
    Parse(#[source] Box<toml::de::Error>),
    /// A format this kiln does not know.
    #[error("registries.toml has version {found}; this kiln reads version {VERSION}")]
    Version {
        /// What it says.
        found: u32,
    },
    /// The proxy section cannot be used.
    #[error("the [proxy] section of registries.toml cannot be used")]
    Proxy(#[source] ProxyError),
}

impl Registries {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// With line and column, when the text is not a legal file.
    pub fn parse(text: &str) -> Result<Self, RegistriesError> {
        if text.len() > FILE_BYTES_MAX {
            return Err(RegistriesError::TooLong);
        }
        let found: Self =
            toml::from_str(text).map_err(|source| RegistriesError::Parse(Box::new(source)))?;
        if found.version != VERSION {
            return Err(RegistriesError::Version {
                found: found.version,
            });
        }
        found.proxy_config()?;
        Ok(found)
    }

    /// Reads a file; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read or is not legal.
    pub fn load(path: &Path) -> Result<Option<Self>, RegistriesError> {
        read_text(path)?.map(|text| Self::parse(&text)).transpose()
    }

    /// Rules for builds of one runtime, each of one port with what it speaks.
    #[must_use]
    pub fn rules(&self, runtime: Runtime) -> Vec<AllowRule> {
        let section = self.runtime.get(&runtime);
        section.map_or_else(Vec::new, RuntimeSection::rules)
    }

    /// The URL to hand to the runtime's tool.
    #[must_use]
    pub fn index(&self, runtime: Runtime) -> Option<&str> {
        self.runtime
            .get(&runtime)?
            .index
            .as_ref()
            .map(IndexUrl::as_str)
    }

    /// The exceptions in force.
    #[must_use]
    pub fn exceptions(&self) -> Vec<RangeException> {
        let in_force = self.exception.iter().filter(|exception| exception.allow);
        in_force
            .map(|exception| RangeException {
                host: exception.host.clone(),
                range: exception.range,
            })
            .collect()
    }

    /// The proxy the file names; `None` when it has no such section and the environment decides.
    ///
    /// # Errors
    /// When the section cannot be used as written.
    pub fn proxy_config(&self) -> Result<Option<ProxyConfig>, RegistriesError> {
        let config = self.proxy.as_ref().map(|proxy| {
            ProxyConfig::new(
                proxy.http.as_deref(),
                proxy.https.as_deref(),
                proxy.no_proxy.as_deref(),
            )
        });
        config.transpose().map_err(RegistriesError::Proxy)
    }

    /// The certificates that machines and build steps shall trust; `None` when the file names none.
    ///
    /// # Errors
    /// When a named file is missing or is not a file of certificates.
    pub fn ca_bundle(&self) -> Result<Option<CaBundle>, CaError> {
        let files = self.ca.iter().flat_map(|ca| &ca.files);
        let named = files.map(|path| CaSetting {
            setting: "registries.toml".to_owned(),
            path: path.clone(),
        });
        ca::load(&named.collect::<Vec<_>>())
    }

    /// Runtimes whose tool in the base image must still be asked.
    #[must_use]
    pub fn needing_base(&self) -> BTreeSet<Runtime> {
        let needing = self
            .runtime
            .iter()
            .filter(|(_, section)| section.needs_base);
        needing.map(|(runtime, _)| *runtime).collect()
    }

    /// The whole file as discovery writes it, without the operator's comments.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = format!("{HEADER}version = {VERSION}\n");
        for block in self.blocks() {
            text.push('\n');
            text.push_str(&block.text);
        }
        text
    }

    /// The sections of the file, each as text with its header line.
    pub(super) fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        if let Some(ca) = &self.ca {
            blocks.push(Block::new("[ca]", ca));
        }
        if let Some(proxy) = &self.proxy {
            blocks.push(Block::new("[proxy]", proxy));
        }
        for (runtime, section) in &self.runtime {
            blocks.push(Block::new(
                &format!("[runtime.{}]", runtime.name()),
                section,
            ));
        }
        for exception in &self.exception {
            blocks.push(Block::new("[[exception]]", exception));
        }
        blocks
    }

    /// Seals every section that discovery may refresh.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        if let Some(ca) = &mut self.ca {
            ca.seal = Some(ca.fitting_seal());
        }
        if let Some(proxy) = &mut self.proxy {
            proxy.seal = Some(proxy.fitting_seal());
        }
        for section in self.runtime.values_mut() {
            section.seal = Some(section.fitting_seal());
        }
        self
    }
}

/// One section as text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Block {
    /// Its header line.
    pub(super) header: String,
    /// Header line and values.
    pub(super) text: String,
}

impl Block {
    fn new(header: &str, section: &impl Serialize) -> Self {
        let mut text = format!("{header}\n");
        // Every section is a table of plain values: serialising it cannot fail.
        if let Ok(toml::Value::Table(table)) = toml::Value::try_from(section) {
            for (key, value) in table {
                let _ = writeln!(text, "{key} = {value}");
            }
        }
        Self {
            header: header.to_owned(),
            text,
        }
    }
}

/// A section with a seal.
pub(super) trait Sealed: Serialize + Clone {
    /// The seal it carries.
    fn seal(&mut self) -> &mut Option<String>;

    /// The seal that fits its values.
    fn fitting_seal(&self) -> String {
        let mut bare = self.clone();
        *bare.seal() = None;
        let values = serde_json::to_vec(&bare).unwrap_or_default();
        Digest::of(&values).short(SEAL_DIGITS)
    }

    /// Whether nobody changed it since discovery wrote it.
    fn is_untouched(&self) -> bool {
        let mut section = self.clone();
        section.seal().take() == Some(self.fitting_seal())
    }
}

impl Sealed for CaSection {
    fn seal(&mut self) -> &mut Option<String> {
        &mut self.seal
    }
}

impl Sealed for ProxySection {
    fn seal(&mut self) -> &mut Option<String> {
        &mut self.seal
    }
}

impl Sealed for RuntimeSection {
    fn seal(&mut self) -> &mut Option<String> {
        &mut self.seal
    }
}

/// The text of a file, bounded; `None` when there is none.
///
/// # Errors
/// When it cannot be read or is too long.
pub fn read_text(path: &Path) -> Result<Option<String>, RegistriesError> {
    let io = |source| RegistriesError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)
        .map_err(io)?;
    if text.len() > FILE_BYTES_MAX {
        return Err(RegistriesError::TooLong);
    }
    Ok(Some(text))
}

/// Replaces a file so that it is always whole: either the old or the new text.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_text(path: &Path, text: &str) -> Result<(), RegistriesError> {
    let io = |action| {
        move |source| RegistriesError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(io("make the folder of"))?;
    // A fixed name: what a killed process left is overwritten by the next one.
    let part = path.with_extension("toml.part");
    let write = || -> io::Result<()> {
        let mut file = File::create(&part)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(io("write"))
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
