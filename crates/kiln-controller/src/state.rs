//! What a controller is made of: the database, keys, stores, and what it remembers only while it runs.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use kiln_core::PoolName;
use kiln_core::access::Ceiling;
use kiln_db::Database;
use kiln_store::HostRegistry;
use kiln_store::artifacts::ArtifactStore;
use kiln_store::logs::LogStore;
use kiln_telemetry::metrics::Metrics;
use kiln_telemetry::otlp::Tracer;
use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::api::limits::KeptBounds;
use crate::api::limits::Rates;
use crate::fleet::machines::Ways;
use crate::fleet::neighbours::Neighbours;
use crate::fleet::secrets::Secrets;
use crate::fleet::source::SourceStore;
use crate::images::Images;
use crate::peers::Peers;
use crate::secret_stores::SecretStores;

/// One controller. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Controller {
    inner: Arc<Parts>,
    closing: CancellationToken,
    gives_way: Arc<OnceLock<CancellationToken>>,
    strangers: Arc<Rates>,
}

/// The parts of a controller, each usable on its own.
#[derive(Debug)]
pub struct Parts {
    /// Every durable row.
    pub db: Database,
    /// Keys, tokens, certificates.
    pub access: Access,
    /// Uploaded sources.
    pub sources: SourceStore,
    /// Logs of attempts.
    pub logs: LogStore,
    /// Files that jobs left.
    pub artifacts: ArtifactStore,
    /// The registry of this installation.
    pub registry: HostRegistry,
    /// Images in the bucket that controllers share; none: they are in the registry alone.
    pub images: Option<Images>,
    /// Secrets that came with a request: in memory alone.
    pub secrets: Secrets,
    /// Stores of other makers that hold secrets.
    pub secret_stores: SecretStores,
    /// Who waits to reach machines that workers keep.
    pub ways: Ways,
    /// Other controllers of the same database.
    pub peers: Peers,
    /// Where the installation is.
    pub neighbours: Neighbours,
    /// What is counted.
    pub metrics: Metrics,
    /// Where spans go.
    pub tracer: Tracer,
    /// The operator's settings.
    pub settings: Settings,
    /// A name of this process, never used again.
    pub holder: String,
}

/// What the operator set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pool of workers beside it.
    pub pool: PoolName,
    /// Where others reach the registry, `host:port`; none when worker and controller share one.
    pub registry_address: Option<String>,
    /// Generation of the worker protocol; the one before is served too.
    pub generation: u32,
    /// Machines that stay when their jobs are over.
    pub kept: KeptBounds,
    /// The operator's grants, `policy.toml`; none: kiln's defaults.
    pub grants: Option<PathBuf>,
    /// What the operator allows any job.
    pub ceiling: Ceiling,
}

impl Controller {
    /// Of its parts.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            inner: Arc::new(parts),
            closing: CancellationToken::new(),
            gives_way: Arc::default(),
            strangers: Arc::new(crate::strangers::rows()),
        }
    }

    /// Room in the audit trail for those who prove nothing.
    pub(crate) fn strangers(&self) -> &Rates {
        &self.strangers
    }

    /// Says that this controller makes room for one that stays, when one comes: what is given is cancelled then. Without this it does not.
    #[must_use]
    pub fn give_way(&self) -> CancellationToken {
        self.gives_way.get_or_init(CancellationToken::new).clone()
    }

    /// Asks it to make room; false when it is here to stay.
    #[must_use]
    pub fn ask_for_room(&self) -> bool {
        let gives_way = self.gives_way.get();
        if let Some(asked) = gives_way {
            asked.cancel();
        }
        gives_way.is_some()
    }

    /// Cancelled when the controller is about to stop: whatever is held open answers at once.
    #[must_use]
    pub fn closing(&self) -> &CancellationToken {
        &self.closing
    }
}

impl std::ops::Deref for Controller {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.inner
    }
}
