//! The outside world of a discovery, behind a trait: environment, files, tools, one index page, the resolver.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read as _;
use std::net::{IpAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::ca::{CaBundle, certificates};
use crate::gateway::proxy::ProxyConfig;
use crate::origin::Origin;

/// Most bytes of a settings file or of a tool's answer.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Most bytes of an index page.
pub const PAGE_BYTES_MAX: u64 = 8 << 20;
/// How long a tool may take to answer.
pub const TOOL_WAIT: Duration = Duration::from_secs(20);
/// How long one page may take, from name to last byte.
pub const PAGE_WAIT: Duration = Duration::from_secs(20);
/// Most entries of a folder that are looked at.
const FOLDER_ENTRIES_MAX: usize = 256;

/// What an index answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// HTTP status.
    pub status: u16,
    /// `Location` of a redirect.
    pub location: Option<String>,
    /// The body, bounded by [`PAGE_BYTES_MAX`].
    pub body: Vec<u8>,
}

/// How the host reaches registries.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// The host's own roots, if its settings name some.
    pub ca: Option<CaBundle>,
    /// The host's proxy.
    pub proxy: ProxyConfig,
}

/// Everything a discovery asks. All answers are bounded and in time.
pub trait Probe {
    /// The environment that tools see.
    fn env(&self) -> &BTreeMap<String, String>;
    /// Standard output of a tool that ended well.
    fn run(&self, argv: &[&str]) -> Option<String>;
    /// Text of a file.
    fn read(&self, path: &Path) -> Option<String>;
    /// Paths in a folder, sorted.
    fn list(&self, folder: &Path) -> Vec<PathBuf>;
    /// One request, redirects not followed. `accept: None` asks for the head only.
    ///
    /// # Errors
    /// A sentence.
    fn fetch(&self, url: &Origin, accept: Option<&str>, trust: &Trust) -> Result<Page, String>;
    /// Addresses of a name, as the host resolves it.
    fn resolve(&self, host: &str) -> Vec<IpAddr>;
}

/// This host. Blocking: call it outside of an async task.
pub struct HostProbe {
    env: BTreeMap<String, String>,
}

impl fmt::Debug for HostProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HostProbe")
    }
}

impl HostProbe {
    /// A probe whose tools see exactly this environment.
    #[must_use]
    pub fn new(env: BTreeMap<String, String>) -> Self {
        Self { env }
    }

    fn agent(url: &Origin, trust: &Trust) -> Result<ureq::Agent, String> {
        let roots = match &trust.ca {
            None => RootCerts::PlatformVerifier,
            Some(bundle) => certificates(&bundle.pem)
                .map_err(|error| error.to_string())?
                .iter()
                .map(|der| Certificate::from_der(der).to_owned())
                .collect::<Vec<_>>()
                .into(),
        };
        let proxy = trust
            .proxy
            .hop(&url.host, url.port)
            .map(|hop| ureq::Proxy::new(hop.url.as_written()))
            .transpose()
            .map_err(|error| error.to_string())?;
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(PAGE_WAIT))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .proxy(proxy)
            .user_agent("kiln")
            .tls_config(TlsConfig::builder().root_certs(roots).build());
        Ok(config.build().new_agent())
    }
}

impl Probe for HostProbe {
    fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    fn run(&self, argv: &[&str]) -> Option<String> {
        let (program, args) = argv.split_first()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .ok()?;
        let mut command = tokio::process::Command::new(program);
        command
            .args(args)
            // Not the caller's folder: a project's own settings do not speak for the host.
            .current_dir("/")
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        runtime.block_on(async {
            let mut child = command.spawn().ok()?;
            let stdout = child.stdout.take()?;
            let answer = async {
                let mut text = String::new();
                let read = stdout.take(TEXT_BYTES_MAX).read_to_string(&mut text).await;
                let status = child.wait().await.ok()?;
                (read.is_ok() && status.success()).then_some(text)
            };
            tokio::time::timeout(TOOL_WAIT, answer).await.ok()?
        })
    }

    fn read(&self, path: &Path) -> Option<String> {
        let file = File::open(path).ok()?;
        file.metadata().ok().filter(fs::Metadata::is_file)?;
        let mut text = String::new();
        file.take(TEXT_BYTES_MAX).read_to_string(&mut text).ok()?;
        Some(text)
    }

    fn list(&self, folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten();
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .take(FOLDER_ENTRIES_MAX)
            .collect();
        paths.sort();
        paths
    }

    fn fetch(&self, url: &Origin, accept: Option<&str>, trust: &Trust) -> Result<Page, String> {
        let agent = Self::agent(url, trust)?;
        let url = url.to_string();
        let answer = match accept {
            Some(accept) => agent.get(&url).header("Accept", accept).call(),
            None => agent.head(&url).call(),
        };
        let mut answer = answer.map_err(|error| error.to_string())?;
        let location = answer.headers().get("location");
        let location = location
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let status = answer.status().as_u16();
        let body = match accept {
            Some(_) => answer
                .body_mut()
                .with_config()
                .limit(PAGE_BYTES_MAX)
                .read_to_vec()
                .map_err(|error| error.to_string())?,
            None => Vec::new(),
        };
        Ok(Page {
            status,
            location,
            body,
        })
    }

    fn resolve(&self, host: &str) -> Vec<IpAddr> {
        let addrs = (host, 0_u16).to_socket_addrs().into_iter().flatten();
        addrs.map(|addr| addr.ip()).collect()
    }
}
