//! A controller from its settings to its open sockets, and back.
//!
//! One controller per folder, by a file lock: a second one is refused, an attached command talks to the first by its private socket.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_core::PoolName;
use kiln_db::{Database, DatabaseUrl, OpenError, OpenOptions, Retention};
use kiln_store::HostRegistry;
use kiln_store::artifacts::{ArtifactError, ArtifactStore};
use kiln_store::logs::{LogConfig, LogError, LogStore, ObjectTarget};
use kiln_telemetry::metrics::{Metrics, Prefix};
use kiln_telemetry::otlp::{Tracer, TracerError};
use rustix::fs::{FlockOperation, OFlags, flock};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::shown::{self, IdentityFiles, Shown};
use crate::access::{Access, SealedError, TrustedIssuer, tls};
use crate::api::{self, ApiConfig, ListenConfig, ListenError, Sockets};
use crate::backup;
use crate::fleet::neighbours::Neighbours;
use crate::fleet::secrets::Secrets;
use crate::fleet::source::{SourceError, SourceStore};
use crate::fleet::{doors, schedule, sweep};
use crate::images::{self, Images};
use crate::metrics;
use crate::peers::{self, Peers};
use crate::shared;
pub use crate::shared::{SharedError, Sharing};
use crate::state::{Controller, Parts, Settings};
use crate::webhooks::{Courier, CourierOptions, ReceiverPolicy, Signer};

/// How long requests may take to end when a controller stops.
pub const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// How a controller is started.
#[derive(Debug)]
pub struct ServeConfig {
    /// Its folder: keys, sources, logs, the private socket, and the database unless it is elsewhere.
    pub folder: PathBuf,
    /// The database; none: a file of the folder.
    pub database: Option<DatabaseUrl>,
    /// What it shares with other controllers of that database.
    pub sharing: Sharing,
    /// Addresses to listen on besides the private socket.
    pub listen: Vec<SocketAddr>,
    /// Whether those speak TLS.
    pub tls: Tls,
    /// Bounds of the sockets.
    pub sockets: ListenConfig,
    /// Bounds of the public API.
    pub api: ApiConfig,
    /// This installation's name in its tokens.
    pub issuer: String,
    /// Issuers of identity tokens that are exchanged for ours.
    pub trusted: Vec<TrustedIssuer>,
    /// The registry of this installation.
    pub registry: HostRegistry,
    /// Where workers of other hosts reach it.
    pub registry_address: Option<String>,
    /// The pool of workers beside it; those of queues are scheduled, too.
    pub pool: PoolName,
    /// Where `/metrics` is shown, to whoever reaches it; none: nowhere.
    pub metrics: Option<SocketAddr>,
    /// First word of the metrics' names.
    pub prefix: Prefix,
    /// Collector of spans, `http://HOST:4318`; none: they go nowhere.
    pub otlp: Option<String>,
    /// Whether logs and artifacts are encrypted where they lie; what was is read either way.
    pub encrypt_logs: bool,
    /// Where webhooks may go.
    pub receivers: ReceiverPolicy,
    /// How long finished jobs are kept.
    pub retention: Retention,
    /// Generation of the worker protocol that it speaks, with the one before: [`kiln_proto::fleet::GENERATION`], but in tests of an update.
    pub generation: u32,
}

/// How TCP listeners are protected.
#[derive(Clone, Debug)]
pub enum Tls {
    /// Not at all: loopback, or where the operator says so.
    Plain,
    /// By a certificate of the controller's own authority, for these DNS names and addresses.
    Own(Vec<String>),
    /// By the operator's certificate and key, looked at again while the server runs.
    Given {
        /// Shown to everybody but workers, who trust the controller's own authority alone.
        files: IdentityFiles,
        /// The DNS names and addresses by which workers come, besides those of the certificate.
        names: Vec<String>,
    },
}

/// Why a controller did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another one has this folder.
    #[error("another kiln controller runs in {0}")]
    Taken(PathBuf),
    /// The folder cannot be used.
    #[error("use {path}")]
    Folder {
        /// Which file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The database.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// Other controllers of the database.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// The keys.
    #[error(transparent)]
    Keys(#[from] SealedError),
    /// The source store.
    #[error(transparent)]
    Sources(#[from] SourceError),
    /// The log store.
    #[error(transparent)]
    Logs(#[from] LogError),
    /// The store of artifacts.
    #[error(transparent)]
    Artifacts(#[from] ArtifactError),
    /// Certificates of webhooks.
    #[error("trust the certificates of webhooks")]
    Webhooks(#[source] rustls::Error),
    /// Certificates of other controllers.
    #[error("trust the certificates of other controllers")]
    Peers(#[source] rustls::Error),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// A certificate of our own.
    #[error(transparent)]
    Certificate(#[from] crate::access::CertificateError),
    /// A listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The collector of spans.
    #[error(transparent)]
    Tracer(#[from] TracerError),
    /// Too many names for one certificate.
    #[error("a certificate names at most {} hosts", shown::NAMES_MAX)]
    Names,
}

/// The private socket of a folder.
#[must_use]
pub fn socket_path(folder: &Path) -> PathBuf {
    folder.join("controller.sock")
}

/// A controller that runs.
#[derive(Debug)]
pub struct Running {
    /// The controller.
    pub controller: Controller,
    /// Its private socket.
    pub socket: PathBuf,
    /// The addresses it listens on.
    pub addresses: Vec<SocketAddr>,
    sockets: Sockets,
    metrics: Sockets,
    stop: CancellationToken,
    tasks: TaskTracker,
    _lock: FolderLock,
}

/// Starts a controller.
///
/// # Errors
/// See [`StartError`]; nothing listens then.
pub async fn start(config: ServeConfig) -> Result<Running, StartError> {
    start_with(config, OpenOptions::default()).await
}

/// Starts a controller whose database is opened in another way: with other times of leases, or by another clock.
///
/// # Errors
/// See [`StartError`]; nothing listens then.
pub async fn start_with(config: ServeConfig, options: OpenOptions) -> Result<Running, StartError> {
    let lock = lock(&config.folder)?;
    start_locked(config, options, lock).await
}

/// Starts a controller in a folder that was taken before by [`lock`].
///
/// # Errors
/// See [`StartError`]; nothing listens then.
pub async fn start_locked(
    mut config: ServeConfig,
    options: OpenOptions,
    lock: FolderLock,
) -> Result<Running, StartError> {
    let (parts, tls) = parts(&mut config, options).await?;
    let db = parts.db.clone();
    match serve(config, parts, tls, lock).await {
        Ok(running) => Ok(running),
        Err(error) => {
            db.close().await;
            Err(error)
        }
    }
}

type TlsConfig = Option<(Arc<rustls::ServerConfig>, Arc<Shown>)>;

/// Everything that is opened before anybody is answered.
async fn parts(
    config: &mut ServeConfig,
    options: OpenOptions,
) -> Result<(Parts, TlsConfig), StartError> {
    let unusable = |source| StartError::Folder {
        path: config.folder.clone(),
        source,
    };
    let id = peers::own_id(&config.folder).map_err(unusable)?;
    let database = config
        .database
        .take()
        .unwrap_or_else(|| DatabaseUrl::Sqlite(config.folder.join(backup::DATABASE_FILE)));
    let db = Database::open(&database, options).await?;
    match opened(config, db.clone(), id).await {
        Ok(parts) => Ok(parts),
        Err(error) => {
            db.close().await;
            Err(error)
        }
    }
}

async fn opened(
    config: &mut ServeConfig,
    db: Database,
    id: String,
) -> Result<(Parts, TlsConfig), StartError> {
    let now_ms = crate::fleet::who::now_unix_ms();
    let keys = config.folder.join("keys");
    let sharing = &config.sharing;
    let adopt = shared::may_adopt(&db, &id, sharing.adopt).await?;
    shared::keys_expected(&db, &keys, adopt).await?;
    let issuer = shared::issuer(&db, config.issuer.clone(), adopt).await?;
    let trusted = std::mem::take(&mut config.trusted);
    let access = Access::open(&keys, &issuer, trusted, now_ms)?;
    shared::keys(&db, &access, &keys, adopt).await?;
    if adopt {
        images::move_up::forget(&config.folder);
    }
    let bucket = shared::store(&db, sharing.store.as_ref(), &id, adopt).await?;
    let tls = tls_config(config, &access, now_ms)?;
    let mut logs = LogConfig::in_folder(config.folder.join("logs"));
    if let Some(store) = &config.sharing.store {
        logs.ended = ObjectTarget::S3(store.clone());
    }
    let kept = match &config.sharing.store {
        Some(store) => ObjectTarget::S3(store.clone()),
        None => ObjectTarget::Folder(config.folder.clone()),
    };
    let arriving = config.folder.join("arriving");
    let sources = config.folder.join("sources");
    let process = holder();
    let peers = Peers::new(id, process.clone(), db.is_shared(), access.authority());
    let counters = Metrics::new(config.prefix, env!("CARGO_PKG_VERSION"));
    let tracer = match &config.otlp {
        None => Tracer::off(),
        Some(url) => {
            let metrics = counters.clone();
            let dropped = Arc::new(move |count| metrics.spans_dropped(count));
            Tracer::start(url, "kiln-controller", dropped)?
        }
    };
    let neighbours = Neighbours::new(own_places(config));
    let log_keys = access.log_keys(config.encrypt_logs);
    logs.keys = log_keys.clone();
    let parts = Parts {
        metrics: counters,
        tracer,
        db,
        access,
        images: bucket.clone().map(Images::new),
        sources: SourceStore::open(&sources, config.api.source_max, bucket)?,
        logs: LogStore::open(logs).await?,
        artifacts: ArtifactStore::open(arriving, &kept, log_keys)?,
        registry: config.registry.clone(),
        secrets: Secrets::default(),
        secret_stores: config.api.secret_stores.clone(),
        peers: peers.map_err(StartError::Peers)?,
        neighbours,
        settings: Settings {
            pool: config.pool.clone(),
            registry_address: config.registry_address.clone(),
            generation: config.generation,
            kept: config.api.kept,
            grants: config.api.grants.clone(),
            ceiling: config.api.ceiling.clone(),
        },
        ways: crate::fleet::machines::Ways::default(),
        holder: process,
    };
    Ok((parts, tls))
}

fn tls_config(config: &ServeConfig, access: &Access, now_ms: u64) -> Result<TlsConfig, StartError> {
    let (names, files) = match &config.tls {
        Tls::Plain => return Ok(None),
        Tls::Own(names) => (names, None),
        Tls::Given { files, names } => (names, Some(files.clone())),
    };
    let mut names = names.clone();
    // The others verify the name they reach it by.
    names.extend(config.sharing.advertise.as_deref().map(host_of));
    if names.len() > shown::NAMES_MAX {
        return Err(StartError::Names);
    }
    let shown = Arc::new(Shown::new(access.authority(), names, files, now_ms)?);
    let config = tls::server_config(Arc::clone(&shown) as _, access.authority())?;
    Ok(Some((config, shown)))
}

/// What workers keep their machines away from, beside each other.
fn own_places(config: &ServeConfig) -> Vec<String> {
    let sharing = &config.sharing;
    let database = config.database.as_ref().and_then(DatabaseUrl::host);
    let advertised = sharing.advertise.as_deref().map(host_of);
    let listened = config.listen.iter().map(SocketAddr::ip);
    let listened = listened.filter(|addr| !addr.is_unspecified());
    let mut places: Vec<String> = listened.map(|addr| addr.to_string()).collect();
    places.extend(database.map(str::to_owned));
    places.extend(advertised);
    places
}

/// The host of `HOST:PORT`.
fn host_of(address: &str) -> String {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_matches(['[', ']']).to_owned()
}

/// Where other controllers reach this one.
fn own_url(advertise: Option<&str>, addresses: &[SocketAddr], secure: bool) -> Option<String> {
    let scheme = if secure { "https" } else { "http" };
    if let Some(advertise) = advertise {
        return Some(format!("{scheme}://{advertise}"));
    }
    let first = addresses
        .first()
        .filter(|first| !first.ip().is_unspecified())?;
    Some(format!("{scheme}://{first}"))
}

async fn serve(
    config: ServeConfig,
    parts: Parts,
    tls: TlsConfig,
    lock: FolderLock,
) -> Result<Running, StartError> {
    let counters = parts.metrics.clone();
    let controller = Controller::new(parts);
    let api = ApiConfig {
        receivers: config.receivers.clone(),
        retention: config.retention,
        ..config.api
    };
    let doors = doors::router(controller.clone(), api.body_stall);
    let router = api::router(Arc::new(controller.clone()), api)
        .merge(doors)
        .merge(peers::routes::router(controller.clone()));
    let sockets = Sockets::new(config.sockets);
    let mut addresses = Vec::new();
    for address in config.listen {
        let tls = tls.as_ref().map(|(config, _)| Arc::clone(config));
        addresses.push(sockets.tcp(address, tls, router.clone()).await?);
    }
    let socket = socket_path(&config.folder);
    let private = router.merge(backup::router(controller.clone(), &config.folder));
    sockets.unix(socket.clone(), private)?;
    sockets.close_removed(controller.db.clone());
    // Numbers, no names: plain HTTP, as Prometheus asks.
    let door = Sockets::new(ListenConfig {
        plain_is_fine: true,
        ..ListenConfig::default()
    });
    if let Some(address) = config.metrics {
        let shown = metrics::router(counters.clone());
        let shown = shown.merge(api::health::router(controller.db.clone()));
        door.tcp(address, None, shown).await?;
    }
    if controller.db.is_shared() {
        let advertise = config.sharing.advertise.as_deref();
        match own_url(advertise, &addresses, tls.is_some()) {
            Some(url) => controller.peers.reached_at(url),
            None => tracing::warn!(
                "other controllers cannot reach this one: logs of jobs that run are followed here alone"
            ),
        }
        // Before the first request: a log that this controller keeps is looked for here.
        controller.meet().await.map_err(SharedError::Database)?;
    }
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let options = CourierOptions {
        policy: config.receivers,
        extra_roots: Vec::new(),
    };
    let signer = Signer::new(controller.access.webhook_master());
    let db = controller.db.clone();
    let (_courier, sending) = Courier::start(db, signer, options, counters, stop.clone())
        .map_err(StartError::Webhooks)?;
    tasks.spawn(async move {
        let _ended = sending.await;
    });
    if let Some((_, shown)) = tls {
        tasks.spawn(shown::keep_fresh(shown, controller.clone(), stop.clone()));
    }
    tasks.spawn(sweep::retain(
        controller.clone(),
        config.retention,
        stop.clone(),
    ));
    tasks.spawn(images::move_up::run(
        controller.clone(),
        config.folder,
        stop.clone(),
    ));
    tasks.spawn(images::collect_now_and_then(
        controller.clone(),
        stop.clone(),
    ));
    tasks.spawn(peers::run(controller.clone(), stop.clone()));
    tasks.spawn(schedule::run(controller.clone(), stop.clone()));
    tasks.spawn(sweep::run(controller.clone(), stop.clone()));
    Ok(Running {
        controller,
        socket,
        addresses,
        sockets,
        metrics: door,
        stop,
        tasks,
        _lock: lock,
    })
}

impl Running {
    /// Takes no more requests, ends the loops, and closes the database.
    pub async fn stop(self) {
        self.stop_within(STOP_PATIENCE).await;
    }

    /// As [`Running::stop`], with another patience for requests that are open.
    pub async fn stop_within(self, patience: Duration) {
        // First, so that another controller schedules while the last requests are answered here.
        self.stop.cancel();
        self.controller.closing().cancel();
        self.sockets.close(patience).await;
        self.metrics.close(STOP_PATIENCE).await;
        self.tasks.close();
        let _cut = tokio::time::timeout(STOP_PATIENCE, self.tasks.wait()).await;
        let _gone = std::fs::remove_file(&self.socket);
        self.controller.db.close().await;
    }
}

/// The right to run a controller in a folder; it ends with this value.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

/// Takes a folder, which is made if need be.
///
/// # Errors
/// When another controller has it, or it cannot be used.
pub fn lock(folder: &Path) -> Result<FolderLock, StartError> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StartError::Folder { path, source }
    };
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder);
    made.map_err(failed(folder))?;
    let path = folder.join("controller.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        // A pipe of this name would hold up the start for ever, a link could be anybody's file.
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(&path)
        .map_err(failed(&path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(FolderLock { _file: file }),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::Taken(folder.to_owned())),
        Err(error) => Err(failed(&path)(error.into())),
    }
}

/// A name of this process that no other ever has.
fn holder() -> String {
    let random = crate::fleet::sweep::random();
    format!("controller-{}-{random:016x}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_lock_in_the_locks_place_is_told_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let path = |name: &str| dir.path().join(name).join("controller.lock");
        for name in ["pipe", "folder", "link"] {
            std::fs::create_dir(dir.path().join(name)).expect("folder");
        }
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), mode).expect("pipe");
        std::fs::create_dir(path("folder")).expect("folder");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), path("link")).expect("link");
        for name in ["pipe", "folder", "link"] {
            let taken = lock(&dir.path().join(name));
            assert!(
                matches!(taken, Err(StartError::Folder { .. })),
                "{name}: {taken:?}"
            );
        }
        assert!(
            !dir.path().join("elsewhere").exists(),
            "a link was followed"
        );
        let held = lock(&dir.path().join("plain")).expect("taken");
        let second = lock(&dir.path().join("plain"));
        assert!(matches!(second, Err(StartError::Taken(_))));
        drop(held);
    }
}
