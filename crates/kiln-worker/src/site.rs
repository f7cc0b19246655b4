//! What the operator of this host decided for every job on it: bases, package registries, exceptions, proxy, CA bundle.
//!
//! Read from the operator's files by whoever starts the worker; here it is only applied.

use kiln_core::AllowRule;
use kiln_core::network::RangeException;
use kiln_image::bases::Bases;
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_network::registries::{Registries, Runtime};

/// The operator's decisions.
#[derive(Clone, Debug)]
pub struct Site {
    /// Base images that FROM may name.
    pub bases: Bases,
    /// Package registries, if discovery has run.
    pub registries: Option<Registries>,
    /// The host's HTTP proxy.
    pub proxy: ProxyConfig,
    /// The CA bundle that machines get.
    pub ca_bundle: Option<Vec<u8>>,
}

impl Site {
    /// What a build of these runtimes may reach.
    #[must_use]
    pub fn rules(&self, runtimes: &[Runtime]) -> Vec<AllowRule> {
        let Some(registries) = &self.registries else {
            return Vec::new();
        };
        runtimes
            .iter()
            .flat_map(|runtime| registries.rules(*runtime))
            .collect()
    }

    /// Names that may resolve into special ranges.
    #[must_use]
    pub fn exceptions(&self) -> Vec<RangeException> {
        self.registries
            .as_ref()
            .map(Registries::exceptions)
            .unwrap_or_default()
    }

    /// Environment of RUN steps: where the tools of these runtimes find their packages.
    #[must_use]
    pub fn step_env(&self, runtimes: &[Runtime]) -> Vec<(String, String)> {
        let Some(registries) = &self.registries else {
            return Vec::new();
        };
        runtimes
            .iter()
            .filter_map(|runtime| Some((*runtime, registries.index(*runtime)?)))
            .flat_map(|(runtime, index)| {
                let named = |name: &&str| ((*name).to_owned(), index.to_owned());
                variables(runtime).iter().map(named).collect::<Vec<_>>()
            })
            .collect()
    }
}

/// Environment variables by which the tools of a runtime are told their registry.
fn variables(runtime: Runtime) -> &'static [&'static str] {
    match runtime {
        Runtime::Node => &[
            "NPM_CONFIG_REGISTRY",
            "YARN_REGISTRY",
            "YARN_NPM_REGISTRY_SERVER",
        ],
        Runtime::Python => &[
            "PIP_INDEX_URL",
            "UV_DEFAULT_INDEX",
            "PIPENV_PYPI_MIRROR",
            "PDM_PYPI_URL",
        ],
        Runtime::Debian => &[],
    }
}
