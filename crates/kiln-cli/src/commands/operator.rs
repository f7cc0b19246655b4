//! What the operator decided for this host: `kiln.toml`, `registries.toml`, bases, proxy, CA bundle; and the host opened with it.

use std::collections::BTreeMap;

use kiln_image::bases::Bases;
use kiln_network::OwnPlaces;
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_network::registries::Registries;
use kiln_store::host::{HostConfig, HostRegistry};
use kiln_worker::home::Home;
use kiln_worker::host::Host;
use kiln_worker::registry::RegistryAccess;
use kiln_worker::setup;
use kiln_worker::site::Site;

use crate::config::Config;
use crate::environment;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::ShownPath as _;

/// Everything the operator's files say.
#[derive(Debug)]
pub(crate) struct Operator {
    /// Directories.
    pub home: Home,
    /// `kiln.toml`.
    pub config: Config,
    /// `registries.toml`, if discovery has run.
    pub registries: Option<Registries>,
}

/// Where `registries.toml` is.
pub(crate) fn registries_path(home: &Home) -> std::path::PathBuf {
    home.config.join("registries.toml")
}

impl Operator {
    /// Reads the files; makes nothing.
    ///
    /// # Errors
    /// When one is not legal; the message names the line.
    pub(crate) fn load() -> Result<Self> {
        let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
        let config = Config::load(&home.config.join("kiln.toml"))?;
        let own = config.network.own.iter().map(String::as_str);
        OwnPlaces::of_process().set("kiln.toml", own);
        let path = registries_path(&home);
        let registries = Registries::load(&path).map_err(|error| {
            CliError::usage(format!(
                "{} cannot be used: {}",
                path.shown(),
                crate::error::chain(&error)
            ))
            .hint("correct it, or move it away and run `kiln registries discover`")
        })?;
        Ok(Self {
            home,
            config,
            registries,
        })
    }

    /// Base images.
    pub(crate) fn bases(&self) -> Result<Bases> {
        setup::load_bases(&self.home).map_err(CliError::from_failure)
    }

    /// The host's HTTP proxy: the file's, else the environment's.
    ///
    /// # Errors
    /// When it cannot be used as written.
    pub(crate) fn proxy(&self) -> Result<ProxyConfig> {
        if let Some(registries) = &self.registries
            && let Some(proxy) = registries
                .proxy_config()
                .map_err(|error| CliError::usage(crate::error::chain(&error)))?
        {
            return Ok(proxy);
        }
        let env: BTreeMap<String, String> = environment::all().into_iter().collect();
        ProxyConfig::from_env(&env).map_err(|error| CliError::usage(crate::error::chain(&error)))
    }

    /// The CA bundle builds get: the one the host's settings name, unless `network.ca_bundle = false`.
    ///
    /// # Errors
    /// When a named file is missing or is not a bundle.
    pub(crate) fn ca_bundle(&self) -> Result<Option<Vec<u8>>> {
        if self.config.network.ca_bundle == Some(false) {
            return Ok(None);
        }
        let Some(registries) = &self.registries else {
            return Ok(None);
        };
        let bundle = registries
            .ca_bundle()
            .map_err(|error| CliError::usage(crate::error::chain(&error)))?;
        Ok(bundle.map(|bundle| bundle.pem))
    }

    /// The operator's decisions, as the worker's room applies them.
    ///
    /// # Errors
    /// When a file cannot be used.
    pub(crate) fn site(&self) -> Result<Site> {
        Ok(Site {
            bases: self.bases()?,
            registries: self.registries.clone(),
            proxy: self.proxy()?,
            ca_bundle: self.ca_bundle()?,
        })
    }

    /// As [`registry`], of this home.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn registry(&self) -> Result<RegistryAccess> {
        registry(&self.home).await
    }

    /// Opens what this host has ready.
    ///
    /// # Errors
    /// When something is missing.
    pub(crate) async fn host(&self) -> Result<Host> {
        Host::open(&self.home).await.map_err(CliError::from_failure)
    }
}

/// Opens the registry of a home: owned, or attached to the kiln process that owns it.
///
/// # Errors
/// When neither works.
pub(crate) async fn registry(home: &Home) -> Result<RegistryAccess> {
    home.prepare().or_infrastructure()?;
    let host = HostRegistry::open_or_attach(&home.registry(), HostConfig::default())
        .await
        .or_infrastructure()?;
    Ok(RegistryAccess { host })
}
