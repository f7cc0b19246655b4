//! Other controllers of the same database: who they are, where each is reached, and which of them keeps a log.
//!
//! Everything durable is in the database and the object store, so any controller answers any request. Two things live in one process
//! alone: the log of an attempt while it is written (at the controller its worker sends it to), and secrets that came with a
//! request (at the controller that took it). The others ask that one, by [`client`]; it answers by [`routes`].
//!
//! With SQLite there is one controller, and nothing here does anything.

pub mod client;
mod mirror;
pub mod routes;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kiln_core::{AttemptId, JobId, Lease};
use kiln_db::{DbError, Kept};
use kiln_store::logs::LogName;
use tokio_util::sync::CancellationToken;

pub use client::PeerError;
pub(crate) use client::Relayed;
use client::{Asked, Client};
use mirror::Mirrors;

use crate::api::LogPiece;
use crate::fleet::machines::Way;
use crate::fleet::who::now_unix_ms;
use crate::state::Controller;

/// Time between two signs of life of a controller.
const LIVES_EVERY: Duration = Duration::from_secs(3);
/// A controller that was silent this long, by the database's clock, is not asked any more.
pub const DEAD_AFTER_MS: u64 = 15_000;
/// How long the home of a log is believed without being asked for again.
const HOME_FRESH: Duration = Duration::from_secs(1);
/// Homes that are remembered.
const HOMES_MAX: usize = 4_096;
/// Longest time the last words of a controller may take.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a log is while it is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Home {
    /// Here, or nobody has written to it.
    Here,
    /// At the controller with this URL.
    At(String),
    /// At a controller that is away: what is stored is all there is.
    Away,
}

#[derive(Clone, Debug)]
struct Seen {
    url: Option<String>,
    silent_ms: u64,
}

/// The other controllers, as this one sees them.
#[derive(Debug)]
pub struct Peers {
    id: String,
    process: String,
    shared: bool,
    url: OnceLock<String>,
    seen: RwLock<HashMap<String, Seen>>,
    homes: Mutex<HashMap<AttemptId, (Instant, String)>>,
    client: Client,
    mirrors: Mirrors,
}

impl Peers {
    /// Of a controller; nobody is known yet. `process` is a name of this process that no other ever has.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(
        id: String,
        process: String,
        shared: bool,
        authority: &crate::access::Authority,
    ) -> Result<Self, rustls::Error> {
        Ok(Self {
            id,
            process,
            shared,
            url: OnceLock::new(),
            seen: RwLock::default(),
            homes: Mutex::default(),
            client: Client::new(authority)?,
            mirrors: Mirrors::default(),
        })
    }

    /// This controller's name: that of its folder.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Says where the others reach this controller, once its sockets are open.
    pub fn reached_at(&self, url: String) {
        let _once = self.url.set(url);
    }

    fn homes(&self) -> MutexGuard<'_, HashMap<AttemptId, (Instant, String)>> {
        self.homes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the controller of this name is.
    pub(crate) fn judge(&self, home: &str) -> Home {
        if home.is_empty() || home == self.id {
            return Home::Here;
        }
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        let alive = seen
            .get(home)
            .filter(|seen| seen.silent_ms < DEAD_AFTER_MS)
            .and_then(|seen| seen.url.clone());
        alive.map_or(Home::Away, Home::At)
    }

    /// How long a controller has been silent, milliseconds; none: nobody knows it.
    fn silent_ms(&self, id: &str) -> Option<u64> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.get(id).map(|seen| seen.silent_ms)
    }

    /// URLs of all others that are alive.
    pub(crate) fn others(&self) -> Vec<String> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.iter()
            .filter(|(id, seen)| **id != self.id && seen.silent_ms < DEAD_AFTER_MS)
            .filter_map(|(_, seen)| seen.url.clone())
            .collect()
    }
}

impl Controller {
    /// Where a log is while it is written. The answer may be a second old.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn home_of(&self, attempt: &AttemptId) -> Result<Home, DbError> {
        if !self.peers.shared {
            return Ok(Home::Here);
        }
        let known = self.peers.homes().get(attempt).cloned();
        if let Some((since, home)) = known
            && since.elapsed() < HOME_FRESH
        {
            return Ok(self.peers.judge(&home));
        }
        self.home_now(attempt).await
    }

    /// Where a log is while it is written, asked now.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn home_now(&self, attempt: &AttemptId) -> Result<Home, DbError> {
        if !self.peers.shared {
            return Ok(Home::Here);
        }
        let home = self.db.log_home(attempt).await?.unwrap_or_default();
        let judged = self.peers.judge(&home);
        let mut homes = self.peers.homes();
        if homes.len() >= HOMES_MAX {
            homes.clear();
        }
        homes.insert(attempt.clone(), (Instant::now(), home));
        Ok(judged)
    }

    /// Whether what is here of another controller's log is all that will ever be found: that one has been silent for `since`.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn home_is_lost(
        &self,
        attempt: &AttemptId,
        since: Duration,
    ) -> Result<bool, DbError> {
        let home = self.db.log_home(attempt).await?.unwrap_or_default();
        let silent = self.peers.silent_ms(&home).map(Duration::from_millis);
        Ok(silent.is_none_or(|silent| silent >= since))
    }

    /// A piece of a log that another controller keeps.
    ///
    /// # Errors
    /// When that one does not answer, or has no such log.
    pub(crate) async fn far_log(
        &self,
        url: &str,
        name: &LogName,
        offset: u64,
        max: usize,
    ) -> Result<LogPiece, PeerError> {
        if let Some(piece) = self.peers.mirrors.read(name, offset, max) {
            return Ok(piece);
        }
        let asked = Asked::log(name, offset, max, Duration::ZERO);
        let far = self.peers.client.log(self, url, &asked).await?;
        Ok(far.piece)
    }

    /// Waits until a log that another controller keeps is longer than `offset`, or something is wrong with it.
    pub(crate) async fn far_log_longer(&self, url: &str, name: &LogName, offset: u64) {
        self.peers.mirrors.longer(self, url, name, offset).await;
    }

    /// Asks the controller that keeps a log to put it away; its own sweep does when this fails.
    pub(crate) async fn far_log_end(&self, url: &str, name: &LogName) {
        if let Err(error) = self.peers.client.end(self, url, name).await {
            tracing::debug!(log = %name, error = &error as &dyn std::error::Error, "its keeper ends it later");
        }
    }

    /// Where workers reach the registry of this very controller: a name of several would lead to another one's.
    pub(crate) fn registry_address(&self) -> Option<String> {
        let own = self.peers.url.get().filter(|_| self.peers.shared);
        let own = own.and_then(|url| Some(url.split_once("://")?.1.to_owned()));
        own.or_else(|| self.settings.registry_address.clone())
    }

    /// What another controller says to a request for something that is not here; none when nobody has it.
    pub(crate) async fn relayed(
        &self,
        asked: &Relayed,
    ) -> Option<http::Response<axum::body::Body>> {
        for url in self.peers.others() {
            match self.peers.client.relay(&url, asked).await {
                Ok(answer) if answer.status() != http::StatusCode::NOT_FOUND => {
                    return Some(answer);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "a controller was not asked for an image"
                    );
                }
            }
        }
        None
    }

    /// A way to a machine whose worker speaks to another controller.
    pub(crate) async fn far_way(&self, url: &str, kept: &Kept) -> Result<Way, PeerError> {
        let job = &kept.attempt.job;
        let path = format!("/peer/v1/machines/{job}/way");
        self.peers.client.way(self, url, &path).await
    }

    /// A way to a command that is attended, whose worker has a request held open at another controller.
    pub(crate) async fn far_way_to_attempt(&self, lease: &Lease) -> Option<Way> {
        let path = format!("/peer/v1/jobs/{}/way", lease.attempt.job);
        for url in self.peers.others() {
            match self.peers.client.way(self, &url, &path).await {
                Ok(way) => return Some(way),
                Err(error) => {
                    tracing::debug!(
                        url,
                        error = &error as &dyn std::error::Error,
                        "no way there"
                    );
                }
            }
        }
        None
    }

    /// A secret that came with a job, from whichever controller took the job.
    pub async fn secret_of(&self, job: &JobId, name: &str) -> Option<Vec<u8>> {
        if let Some(value) = self.secrets.get(job, name) {
            return Some(value);
        }
        for url in self.peers.others() {
            match self.peers.client.secret(self, &url, job, name).await {
                Ok(value) => return Some(value),
                Err(PeerError::NotFound) => {}
                Err(error) => {
                    tracing::warn!(%job, error = &error as &dyn std::error::Error, "a controller was not asked for a secret");
                }
            }
        }
        None
    }

    /// Says that this controller lives, and looks for the others.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn meet(&self) -> Result<(), DbError> {
        let keys = self.access.fingerprint_now().to_string();
        let own = kiln_db::Controller {
            id: self.peers.id.clone(),
            process: self.peers.process.clone(),
            url: self.peers.url.get().cloned(),
            keys: keys.clone(),
            seen_unix_ms: 0,
        };
        self.db.controller_lives(&own).await?;
        let (all, now) = self.db.controllers().await?;
        let mut seen = HashMap::new();
        for other in all {
            let silent_ms = now.saturating_sub(other.seen_unix_ms);
            if other.keys != keys && silent_ms < DEAD_AFTER_MS {
                // Keys may have been replaced by the other one, in a folder that both have.
                let _tried = self.access.reload(now_unix_ms());
                if other.keys != self.access.fingerprint_now().to_string() {
                    tracing::error!(
                        controller = other.id,
                        "another controller of this database has other keys: tokens of one are refused by the other until both have the same folder keys/"
                    );
                }
            }
            let url = other.url;
            seen.insert(other.id, Seen { url, silent_ms });
        }
        *self
            .peers
            .seen
            .write()
            .unwrap_or_else(PoisonError::into_inner) = seen;
        Ok(())
    }
}

/// Signs of life, until `stop`.
pub async fn run(controller: Controller, stop: CancellationToken) {
    if !controller.peers.shared {
        return;
    }
    loop {
        if let Err(error) = controller.meet().await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the other controllers were not met"
            );
            // They grow old while nobody can be asked.
            let passed = u64::try_from(LIVES_EVERY.as_millis()).unwrap_or(u64::MAX);
            let mut seen = controller
                .peers
                .seen
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            for one in seen.values_mut() {
                one.silent_ms = one.silent_ms.saturating_add(passed);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LIVES_EVERY) => {}
            () = stop.cancelled() => break,
        }
    }
    let leaves = controller
        .db
        .controller_leaves(&controller.peers.id, &controller.peers.process);
    let _told = tokio::time::timeout(LEAVE_TIMEOUT, leaves).await;
}

/// The name of a controller: made once, kept in its folder.
///
/// # Errors
/// When the folder cannot be read or written.
pub fn own_id(folder: &Path) -> std::io::Result<String> {
    use std::io::Write as _;
    let path = folder.join("controller.id");
    loop {
        match std::fs::read_to_string(&path) {
            Ok(text) if !text.trim().is_empty() => {
                return Ok(text.trim().chars().take(64).collect());
            }
            Ok(_) => std::fs::remove_file(&path)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // The folder is locked: nobody else writes here.
        let part = folder.join("controller.id.part");
        let mut file = std::fs::File::create(&part)?;
        let name = crate::fleet::sweep::random();
        file.write_all(format!("c-{name:016x}\n").as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&part, &path)?;
    }
}
