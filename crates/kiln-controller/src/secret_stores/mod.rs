//! Stores of other makers that hold secrets: the environment of this process, HashiCorp Vault (KV version 2), AWS Secrets Manager.
//!
//! A secret of ours then has a source instead of a value, `STORE:PATH#FIELD`. The operator names the stores and grants each tenant what
//! it may name in them; a value is fetched each time a job that may have it asks under its live lease, and is kept nowhere.
//!
//! Calls block: [`SecretStores::fetch`] is for a thread that may. Read next: `vault`, `aws`.

mod aws;
mod vault;

pub use aws::AwsConfig;
pub use vault::{VaultAuth, VaultConfig};

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::TenantName;
use kiln_core::secret::SECRET_VALUE_MAX;
use serde::Deserialize;
use ureq::tls::TlsConfig;

use crate::access::{is_safe_url, roots};

/// Longest time one request to a store may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of a store's answer: a value in base 64, and what is around it.
const ANSWER_MAX: u64 = 256 << 10;
/// Most bytes of a file that holds a login.
const LOGIN_MAX: u64 = 16 << 10;
/// Most characters of each part of a source.
const STORE_MAX: usize = 32;
const PATH_MAX: usize = 512;
const FIELD_MAX: usize = 128;

/// Where a value is: `STORE:PATH` or `STORE:PATH#FIELD`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SecretSource {
    store: String,
    path: String,
    field: Option<String>,
}

/// Why a text is no source.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SourceError {
    /// Its form.
    #[error("a source is written STORE:PATH or STORE:PATH#FIELD")]
    Form,
    /// A path of other characters, or one that leads elsewhere.
    #[error(
        "a path in a store has letters, digits and / _ + = . @ -, at most {PATH_MAX}, without empty parts, `.` and `..`"
    )]
    Path,
    /// A field of other characters.
    #[error("a field has letters, digits and _ . -, at most {FIELD_MAX}")]
    Field,
}

impl FromStr for SecretSource {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let (store, rest) = text.split_once(':').ok_or(SourceError::Form)?;
        let (path, field) = match rest.split_once('#') {
            Some((path, field)) => (path, Some(field)),
            None => (rest, None),
        };
        if !is_store_name(store) {
            return Err(SourceError::Form);
        }
        if !is_path(path) {
            return Err(SourceError::Path);
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        if field.is_some_and(|f| f.is_empty() || f.len() > FIELD_MAX || !f.bytes().all(plain)) {
            return Err(SourceError::Field);
        }
        Ok(Self {
            store: store.to_owned(),
            path: path.to_owned(),
            field: field.map(str::to_owned),
        })
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.store, self.path)?;
        match &self.field {
            Some(field) => write!(f, "#{field}"),
            None => Ok(()),
        }
    }
}

fn is_store_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.len() <= STORE_MAX && text.bytes().all(plain)
}

fn is_path(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/_+=.@-".contains(&b);
    let leads_on = |part: &str| !matches!(part, "" | "." | "..");
    !text.is_empty()
        && text.len() <= PATH_MAX
        && text.bytes().all(plain)
        && text.split('/').all(leads_on)
}

/// A store, as the operator's `kiln.toml` has it (`[[controller.secret_stores]]`).
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// What sources call it.
    pub name: String,
    /// What each tenant may name in it: paths, or with `/*` at the end whatever lies below; `*` alone is all.
    pub grants: BTreeMap<TenantName, Vec<String>>,
    /// Variables of the controller's own environment; a path is a variable's name. Of this, `vault` and `aws` there is exactly one.
    #[serde(default)]
    pub env: bool,
    /// HashiCorp Vault, secrets engine KV version 2.
    #[serde(default)]
    pub vault: Option<VaultConfig>,
    /// AWS Secrets Manager.
    #[serde(default)]
    pub aws: Option<AwsConfig>,
}

/// Why the operator's stores cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoresError {
    /// A name that no source could say.
    #[error("{0:?} is no name of a store: lower-case letters, digits and -, at most {STORE_MAX}")]
    Name(String),
    /// Two of one name.
    #[error("two stores are called {0}")]
    Twice(String),
    /// What is granted of it.
    #[error("store {store}: {grant:?} is no path, and no path with /* at its end")]
    Grant {
        /// Which.
        store: String,
        /// What it grants.
        grant: String,
    },
    /// How it is reached.
    #[error("store {store}: {why}")]
    Settings {
        /// Which.
        store: String,
        /// What is wrong.
        why: String,
    },
}

/// Why there is no value. Never holds one.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum FetchError {
    /// The operator has no store of this name, or grants the tenant nothing of it: to a tenant that is the same.
    #[error("the operator grants this tenant no {0}")]
    NotGranted(String),
    /// The store has no such secret, or the field is not in it.
    #[error("{0} is not there")]
    Missing(String),
    /// The store does not let kiln in, or does not answer.
    #[error("the store {store} gives nothing now: {why}")]
    Unavailable {
        /// Which.
        store: String,
        /// Why, without what it answered.
        why: String,
    },
    /// A value that no secret may have.
    #[error("{0} has no value of 1 to {SECRET_VALUE_MAX} bytes")]
    Size(String),
}

impl FetchError {
    /// As audit rows have it.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotGranted(_) => "source_not_granted",
            Self::Missing(_) => "source_missing",
            Self::Unavailable { .. } => "source_unavailable",
            Self::Size(_) => "source_size",
        }
    }
}

/// What a store said instead of a value.
#[derive(Debug)]
enum Failed {
    Missing,
    Unavailable(String),
}

/// Every store that the operator named.
#[derive(Clone, Debug, Default)]
pub struct SecretStores {
    all: Arc<BTreeMap<String, Store>>,
}

#[derive(Debug)]
struct Store {
    config: StoreConfig,
    client: Client,
}

#[derive(Debug)]
enum Client {
    Env,
    Vault(vault::Vault),
    Aws(aws::Aws),
}

impl SecretStores {
    /// Of the operator's settings. Files of logins are read when they are needed, so that they may change.
    ///
    /// # Errors
    /// When something of it can never work.
    pub fn new(configs: &[StoreConfig]) -> Result<Self, StoresError> {
        let mut all = BTreeMap::new();
        for config in configs {
            let store = config.name.clone();
            if !is_store_name(&store) {
                return Err(StoresError::Name(store));
            }
            for grant in config.grants.values().flatten() {
                let path = grant.strip_suffix("/*").unwrap_or(grant);
                if grant != "*" && !is_path(path) {
                    let grant = grant.clone();
                    return Err(StoresError::Grant { store, grant });
                }
            }
            let wrong = |why: String| StoresError::Settings {
                store: store.clone(),
                why,
            };
            let client = match (config.env, &config.vault, &config.aws) {
                (true, None, None) => Client::Env,
                (false, Some(it), None) => Client::Vault(vault::Vault::new(it).map_err(wrong)?),
                (false, None, Some(it)) => Client::Aws(aws::Aws::new(it).map_err(wrong)?),
                _ => return Err(wrong("name one of env, vault and aws".to_owned())),
            };
            let config = config.clone();
            if all
                .insert(store.clone(), Store { config, client })
                .is_some()
            {
                return Err(StoresError::Twice(store));
            }
        }
        Ok(Self { all: Arc::new(all) })
    }

    /// Whether the operator lets a tenant name this.
    ///
    /// # Errors
    /// When not.
    pub fn granted(&self, tenant: &TenantName, source: &SecretSource) -> Result<(), FetchError> {
        self.store(tenant, source).map(|_| ())
    }

    fn store(&self, tenant: &TenantName, source: &SecretSource) -> Result<&Store, FetchError> {
        let covers = |grant: &String| match grant.strip_suffix('*') {
            // Of `a/*` the slash stays: `ab` is not below `a`.
            Some(begin) => source.path.starts_with(begin) && source.path.len() > begin.len(),
            None => *grant == source.path,
        };
        let store = self.all.get(&source.store);
        let granted = store.filter(|store| {
            let grants = store.config.grants.get(tenant);
            grants.is_some_and(|grants| grants.iter().any(covers))
        });
        granted.ok_or_else(|| FetchError::NotGranted(source.to_string()))
    }

    /// The value, as it is now. Blocks, for a few requests of at most 5 seconds each.
    ///
    /// # Errors
    /// When it is not granted, not there, or cannot be had now.
    pub fn fetch(&self, tenant: &TenantName, source: &SecretSource) -> Result<Vec<u8>, FetchError> {
        let store = self.store(tenant, source)?;
        let field = source.field.as_deref();
        let value = match &store.client {
            Client::Env => variable(&source.path, field),
            Client::Vault(vault) => vault.read(&source.path, field),
            Client::Aws(aws) => aws.read(&source.path, field),
        };
        let value = value.map_err(|failed| match failed {
            Failed::Missing => FetchError::Missing(source.to_string()),
            Failed::Unavailable(why) => FetchError::Unavailable {
                store: source.store.clone(),
                why,
            },
        })?;
        if value.is_empty() || value.len() > SECRET_VALUE_MAX {
            return Err(FetchError::Size(source.to_string()));
        }
        Ok(value)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the operator named the environment as a store"
)]
fn variable(name: &str, field: Option<&str>) -> Result<Vec<u8>, Failed> {
    use std::os::unix::ffi::OsStringExt as _;
    let value = std::env::var_os(name).ok_or(Failed::Missing)?.into_vec();
    match field {
        Some(field) => of_json(&value, Some(field)),
        None => Ok(value),
    }
}

/// A field of a JSON object, or the only one; a text as it is, anything else as JSON.
fn of_json(document: &[u8], field: Option<&str>) -> Result<Vec<u8>, Failed> {
    let read = serde_json::from_slice(document).map_err(|_| Failed::Missing)?;
    let serde_json::Value::Object(fields) = read else {
        return Err(Failed::Missing);
    };
    let value = match field {
        Some(field) => fields.get(field),
        None if fields.len() == 1 => fields.values().next(),
        None => None,
    };
    match value {
        Some(serde_json::Value::String(text)) => Ok(text.clone().into_bytes()),
        Some(serde_json::Value::Null) | None => Err(Failed::Missing),
        Some(other) => Ok(other.to_string().into_bytes()),
    }
}

/// A client that follows no redirect, trusts this system's authorities and the operator's own, and passes on every status.
fn agent(ca: Option<&Path>) -> Result<ureq::Agent, String> {
    let tls = TlsConfig::builder().root_certs(roots(ca)?).build();
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(REQUEST_TIMEOUT))
        .max_redirects(0)
        .http_status_as_error(false)
        .tls_config(tls);
    Ok(config.build().into())
}

/// An address that a login may go to: HTTPS, or HTTP to this very host.
fn safe_url(url: &str) -> Result<String, String> {
    if !is_safe_url(url) {
        return Err(format!("{url} is not https://, and not this host"));
    }
    Ok(url.trim_end_matches('/').to_owned())
}

/// What a file holds that only its owner may read, without the newline at its end.
fn login(path: &Path) -> Result<String, String> {
    use std::io::Read as _;
    use std::os::unix::fs::MetadataExt as _;
    let shown = path.display();
    let fail = |error: std::io::Error| format!("{shown}: {error}");
    let file = std::fs::File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() || meta.mode() & 0o077 != 0 {
        return Err(format!("{shown} is no file that its owner alone may read"));
    }
    let mut text = String::new();
    file.take(LOGIN_MAX)
        .read_to_string(&mut text)
        .map_err(fail)?;
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err(format!("{shown} is empty"));
    }
    Ok(text.to_owned())
}

/// A login's file, for the start.
fn is_absolute(path: &Path) -> Result<(), String> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(format!("{} is not an absolute path", path.display())),
    }
}

#[cfg(test)]
mod tests;
