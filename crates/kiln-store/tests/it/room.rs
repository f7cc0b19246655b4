//! A store in a temporary directory, and connections to it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use kiln_core::lease::Epoch;
use kiln_core::{AttemptId, Lease, TenantName};
use kiln_store::registry::serve::serve_connection;
use kiln_store::registry::{
    AttemptAuthority, Authority, LeaseTable, OpenError, Store, StoreConfig,
};
use tempfile::TempDir;

use crate::client::Client;

pub(crate) struct Room {
    pub(crate) store: Arc<Store>,
    pub(crate) dir: TempDir,
    pub(crate) leases: Arc<LeaseTable>,
}

impl Room {
    pub(crate) fn new() -> Result<Self> {
        Self::with(StoreConfig::default())
    }

    pub(crate) fn with(config: StoreConfig) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Ok(Self {
            store: Arc::new(Store::open(&dir.path().join("registry"), config)?),
            dir,
            leases: Arc::new(LeaseTable::new(|| 0)),
        })
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("registry")
    }

    /// A connection as host code.
    pub(crate) async fn operator(&self) -> Result<Client> {
        self.connect(Authority::Operator).await
    }

    pub(crate) async fn connect(&self, authority: Authority) -> Result<Client> {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        tokio::spawn(serve_connection(self.store.clone(), theirs, authority));
        Client::over(ours).await
    }

    /// The authority of a guest whose lease is live.
    pub(crate) fn guest(&self, job: &str) -> AttemptAuthority {
        let lease = lease(job, 1);
        self.leases.grant(lease.clone());
        AttemptAuthority::new(lease, self.leases.clone())
    }
}

/// Longest wait for the lock of a store that was let go of.
const LET_GO_MAX: Duration = Duration::from_secs(20);

/// Opens a store that this process had before. A child that another test starts just now holds copies of all files until it is the program it
/// shall be, the store's lock among them.
pub(crate) fn opened_again(dir: &Path, config: &StoreConfig) -> Result<Arc<Store>> {
    let end = Instant::now() + LET_GO_MAX;
    loop {
        match Store::open(dir, config.clone()) {
            Err(OpenError::Owned { .. }) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            opened => return Ok(Arc::new(opened?)),
        }
    }
}

pub(crate) fn lease(job: &str, count: u64) -> Lease {
    Lease {
        attempt: AttemptId {
            job: job.parse().unwrap(),
            number: 1,
        },
        tenant: TenantName::local(),
        worker: "w1".parse().unwrap(),
        epoch: Epoch {
            incarnation: 1,
            count,
        },
        deadline_unix_ms: 1000,
    }
}

/// Number of files in a directory that should hold none.
pub(crate) fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}
