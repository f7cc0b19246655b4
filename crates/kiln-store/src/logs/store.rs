//! [`LogStore`]: append, follow, read, end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::unfold;
use kiln_core::{JobId, TenantName};
use object_store::ObjectStore;
use tokio::sync::watch;

use super::archive::{self, About, Opened, Packer};
use super::live::{self, Found, Live, Terms};
use super::objects::{self, ConditionalPut, ObjectTarget};
use super::retention::RetentionClass;
use super::{Appended, LogConfig, LogError, LogName, LogStatus, READ_MAX};

/// A log nobody writes or follows is forgotten after this long; its files stay and are read again when somebody comes.
const IDLE: Duration = Duration::from_secs(600);
/// Idle logs are looked for when this many more are in memory.
const SWEEP_EVERY: usize = 256;
/// Most ended logs that are moved at once: each holds a pack in memory.
const MOVES_MAX: usize = 8;
/// Indexes of ended logs that are remembered.
const INDEXES_MAX: usize = 128;

/// All logs of one controller. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LogStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    terms: Terms,
    objects: Arc<dyn ObjectStore>,
    conditional: ConditionalPut,
    live: Mutex<LiveLogs>,
    indexes: Mutex<HashMap<LogName, Arc<Opened>>>,
    moves: tokio::sync::Semaphore,
}

#[derive(Debug, Default)]
struct LiveLogs {
    by_name: HashMap<LogName, Arc<Live>>,
    swept_at: usize,
}

impl LiveLogs {
    fn insert(&mut self, name: &LogName, dir: PathBuf) -> Arc<Live> {
        if self.by_name.len() >= self.swept_at + SWEEP_EVERY {
            self.by_name
                .retain(|_, live| Arc::strong_count(live) > 1 || live.idle() < IDLE);
            self.swept_at = self.by_name.len();
        }
        let entry = self.by_name.entry(name.clone());
        let live = entry.or_insert_with(|| Arc::new(Live::new(name.clone(), dir)));
        Arc::clone(live)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| LogError::Stopping)?
}

impl LogStore {
    /// Opens the store and asks the bucket of ended logs, if it is one, what it can do. Reads no log.
    ///
    /// # Errors
    /// When the folder cannot be made or the bucket cannot be reached.
    pub async fn open(config: LogConfig) -> Result<Self, LogError> {
        let target = config.ended;
        let folder = matches!(target, ObjectTarget::Folder(_));
        let (objects, dir) = blocking(move || {
            let dir = config.live;
            std::fs::create_dir_all(&dir).map_err(LogError::io("create", &dir))?;
            Ok((objects::open(&target)?, dir))
        })
        .await?;
        let conditional = match folder {
            // A file that must not be there is made by a link, which the kernel refuses when it is.
            true => ConditionalPut::Honest,
            false => objects::probe(&*objects).await?,
        };
        if conditional != ConditionalPut::Honest {
            tracing::warn!(
                ?conditional,
                "the object store does not keep the condition \"only if it is not there\": only one controller may end logs in it"
            );
        }
        Ok(Self {
            inner: Arc::new(Inner {
                dir,
                terms: Terms {
                    keys: config.keys,
                    bytes_max: config.bytes_max,
                    durability: config.durability,
                },
                objects,
                conditional,
                live: Mutex::default(),
                indexes: Mutex::default(),
                moves: tokio::sync::Semaphore::new(MOVES_MAX),
            }),
        })
    }

    /// What "write only if nobody has" is worth at the place of ended logs.
    #[must_use]
    pub fn conditional_put(&self) -> ConditionalPut {
        self.inner.conditional
    }

    /// Takes bytes that start at `offset`. What is there already is ignored, so that a writer may say everything twice.
    /// When this returns, the bytes survive what [`super::Durability`] says. Dropping the future does not undo it.
    ///
    /// # Errors
    /// [`LogError::Gap`] with the offset that is wanted, [`LogError::Ended`], [`LogError::PieceTooLong`], or a failing disk.
    pub async fn append(
        &self,
        name: &LogName,
        offset: u64,
        bytes: Bytes,
    ) -> Result<Appended, LogError> {
        let live = match self.find_live(name) {
            Some(live) => live,
            None => match self.opened(name).await? {
                Some(opened) if offset.saturating_add(bytes.len() as u64) <= opened.index.next => {
                    return Ok(Appended {
                        next: opened.index.next,
                        full: opened.index.truncated,
                    });
                }
                Some(opened) => {
                    return Err(LogError::Ended {
                        name: name.clone(),
                        end: opened.index.next,
                    });
                }
                None => self.make_live(name),
            },
        };
        live.touch();
        let terms = self.inner.terms.clone();
        blocking(move || live.append(offset, &bytes, &terms)).await
    }

    /// What is known of a log, or nothing when there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn status(&self, name: &LogName) -> Result<Option<LogStatus>, LogError> {
        if let Some(live) = self.find_live(name) {
            self.load(&live).await?;
            return Ok(Some(live.status()));
        }
        Ok(self.opened(name).await?.map(|opened| LogStatus {
            next: opened.index.next,
            bytes: opened.index.bytes,
            dropped: opened.index.dropped,
            truncated: opened.index.truncated,
            ended: true,
            archived: true,
        }))
    }

    /// Bytes from `offset`: at most `max` and at most [`READ_MAX`], perhaps fewer, none at the end of what there is.
    ///
    /// # Errors
    /// [`LogError::NotFound`], or when it cannot be read.
    pub async fn read(&self, name: &LogName, offset: u64, max: usize) -> Result<Bytes, LogError> {
        if let Some(live) = self.find_live(name) {
            match self.read_live(&live, name, offset, max).await {
                Ok(Found::Bytes(bytes)) => return Ok(bytes),
                Ok(Found::Moved) => {}
                Ok(_) => return Ok(Bytes::new()),
                // It moved while it was read.
                Err(error) if error.is_absent() => {}
                Err(error) => return Err(error),
            }
        }
        let opened = self
            .opened(name)
            .await?
            .ok_or_else(|| LogError::NotFound { name: name.clone() })?;
        let max = max.min(READ_MAX);
        archive::read(&*self.inner.objects, &opened, name, offset, max).await
    }

    /// The log from `offset` on, as it grows, until it ends. A log that nobody has written to yet is waited for. The follower holds one
    /// piece at a time: a slow one costs nobody else. The stream ends after an error.
    pub fn follow(
        &self,
        name: &LogName,
        offset: u64,
    ) -> impl Stream<Item = Result<Bytes, LogError>> + Send + use<> {
        let follower = Follower {
            store: self.clone(),
            name: name.clone(),
            offset,
            heard: None,
            over: false,
        };
        unfold(follower, |mut follower| async move {
            if follower.over {
                return None;
            }
            match follower.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), follower)),
                Ok(None) => None,
                Err(error) => {
                    follower.over = true;
                    Some((Err(error), follower))
                }
            }
        })
    }

    /// Ends a log: its followers get the rest, it is packed, and its files here go. Ending it again is fine, and so is ending one
    /// nobody wrote to. After an error the log is ended but still here; call again ([`Self::unarchived`] names such logs).
    ///
    /// # Errors
    /// When the place of ended logs refuses or the disk fails.
    pub async fn end(
        &self,
        name: &LogName,
        class: RetentionClass,
        now_unix_ms: u64,
    ) -> Result<LogStatus, LogError> {
        let live = match self.find_live(name) {
            Some(live) => live,
            None if self.opened(name).await?.is_some() => {
                return self
                    .status(name)
                    .await?
                    .ok_or_else(|| LogError::NotFound { name: name.clone() });
            }
            None => self.make_live(name),
        };
        let (at_work, terms) = (Arc::clone(&live), self.inner.terms.clone());
        blocking(move || at_work.end(&terms)).await?;
        let _once = live.moving.lock().await;
        if !live.has_moved() {
            let _few = self
                .inner
                .moves
                .acquire()
                .await
                .map_err(|_| LogError::Stopping)?;
            self.archive(&live, name, class, now_unix_ms).await?;
            let dir = live.dir().to_owned();
            blocking(move || live::remove_files(&dir)).await?;
            live.leave();
            // Only now: whoever finds neither this nor files looks where ended logs are.
            lock(&self.inner.live).by_name.remove(name);
        }
        self.status(name)
            .await?
            .ok_or_else(|| LogError::NotFound { name: name.clone() })
    }

    async fn archive(
        &self,
        live: &Arc<Live>,
        name: &LogName,
        class: RetentionClass,
        now_unix_ms: u64,
    ) -> Result<(), LogError> {
        let objects = &self.inner.objects;
        if self.opened(name).await?.is_some() {
            return Ok(());
        }
        let status = live.status();
        let about = About {
            next: status.next,
            truncated: status.truncated,
            dropped: status.dropped,
            class,
            now_unix_ms,
        };
        let mut packer = Packer::new(&**objects, name, &self.inner.terms.keys, about)?;
        let mut offset = 0;
        while offset < status.bytes {
            let Found::Bytes(bytes) = self.read_live(live, name, offset, READ_MAX).await? else {
                return Err(LogError::Damaged {
                    name: name.clone(),
                    what: "it is shorter than it was",
                });
            };
            packer.push(&bytes).await?;
            offset += bytes.len() as u64;
        }
        let conditional = self.inner.conditional == ConditionalPut::Honest;
        let (index, first) = packer.finish(conditional).await?;
        if first {
            archive::tidy(objects, name, &index).await?;
        }
        Ok(())
    }

    /// Logs whose files are still here: those that are being written, and those an earlier process did not finish moving. After a start the
    /// caller ends those whose attempts are over.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub async fn unarchived(&self) -> Result<Vec<LogName>, LogError> {
        let root = self.inner.dir.clone();
        blocking(move || {
            let mut names = Vec::new();
            for tenant in folders(&root)? {
                for job in folders(&root.join(&tenant))? {
                    for attempt in folders(&root.join(&tenant).join(&job))? {
                        if let (Ok(tenant), Ok(job), Ok(attempt)) =
                            (tenant.parse(), job.parse(), attempt.parse())
                        {
                            names.push(LogName::new(tenant, job, attempt));
                        }
                    }
                }
            }
            names.sort();
            Ok(names)
        })
        .await
    }

    /// Whether an ended log is where ended logs are, whatever is here.
    ///
    /// # Errors
    /// When the object store refuses.
    pub async fn is_archived(&self, name: &LogName) -> Result<bool, LogError> {
        Ok(self.opened(name).await?.is_some())
    }

    /// Whether files of the log are here: it is being written, or has not moved away yet.
    #[must_use]
    pub fn is_here(&self, name: &LogName) -> bool {
        self.find_live(name).is_some()
    }

    /// Forgets what is here of a log that another controller keeps. What is where ended logs are stays.
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn discard(&self, name: &LogName) -> Result<(), LogError> {
        let Some(live) = self.find_live(name) else {
            return Ok(());
        };
        let _once = live.moving.lock().await;
        let dir = live.dir().to_owned();
        blocking(move || live::remove_files(&dir)).await?;
        live.leave();
        lock(&self.inner.live).by_name.remove(name);
        Ok(())
    }

    /// Removes an ended log for good. Its absence is fine.
    ///
    /// # Errors
    /// When the object store refuses.
    pub async fn remove(&self, name: &LogName) -> Result<(), LogError> {
        let marker = match self.opened(name).await {
            Ok(opened) => opened.map(|opened| {
                archive::expiry_key(name, opened.index.class, opened.index.ended_unix_ms)
            }),
            // What cannot be opened can be removed.
            Err(LogError::Key { .. } | LogError::Damaged { .. }) => None,
            Err(error) => return Err(error),
        };
        lock(&self.inner.indexes).remove(name);
        archive::remove(&self.inner.objects, name, marker).await
    }

    /// Removes the ended logs of all attempts of a job, and says how many there were.
    ///
    /// # Errors
    /// When the object store refuses; what went before is gone.
    pub async fn remove_job(&self, tenant: &TenantName, job: &JobId) -> Result<u64, LogError> {
        let attempts = archive::attempts(&self.inner.objects, tenant, job).await?;
        let mut removed = 0;
        for number in attempts {
            let name = LogName::new(tenant.clone(), job.clone(), number);
            self.remove(&name).await?;
            removed += 1;
        }
        Ok(removed)
    }

    /// The log's place in memory, if it is being written or its files are here.
    fn find_live(&self, name: &LogName) -> Option<Arc<Live>> {
        // Under one lock, so that a log that moves away meanwhile is not taken for an empty one.
        let mut logs = lock(&self.inner.live);
        let dir = self.dir_of(name);
        match logs.by_name.get(name) {
            // Left by followers that went while somebody looked: nobody wrote here, and it must not hide what another controller put away.
            Some(live) if Arc::strong_count(live) == 1 && !dir.is_dir() => {
                logs.by_name.remove(name);
                return None;
            }
            Some(live) => return Some(Arc::clone(live)),
            None => {}
        }
        dir.is_dir().then(|| logs.insert(name, dir))
    }

    fn make_live(&self, name: &LogName) -> Arc<Live> {
        lock(&self.inner.live).insert(name, self.dir_of(name))
    }

    /// Forgets a log that was made for a follower, that nobody else holds and nobody wrote to here. Left behind it would stand for the
    /// log for ever, also when another controller wrote it and put it away.
    fn forget_empty(&self, name: &LogName) {
        let mut logs = lock(&self.inner.live);
        let unused = logs
            .by_name
            .get(name)
            .is_some_and(|live| Arc::strong_count(live) == 1);
        if unused && !self.dir_of(name).is_dir() {
            logs.by_name.remove(name);
        }
    }

    fn dir_of(&self, name: &LogName) -> PathBuf {
        self.inner
            .dir
            .join(name.tenant.as_str())
            .join(name.attempt.job.as_str())
            .join(name.attempt.number.to_string())
    }

    async fn load(&self, live: &Arc<Live>) -> Result<(), LogError> {
        if live.is_loaded() {
            return Ok(());
        }
        let (live, terms) = (Arc::clone(live), self.inner.terms.clone());
        blocking(move || live.load(&terms)).await
    }

    /// Never gives [`Found::InFiles`].
    async fn read_live(
        &self,
        live: &Arc<Live>,
        name: &LogName,
        offset: u64,
        max: usize,
    ) -> Result<Found, LogError> {
        self.load(live).await?;
        let max = max.min(READ_MAX);
        match live.find(offset, max) {
            Found::InFiles { segments, end } => {
                let name = name.clone();
                let read = blocking(move || live::read_files(&segments, &name, offset, end, max));
                Ok(Found::Bytes(read.await?))
            }
            found => Ok(found),
        }
    }

    /// The index of an ended log.
    async fn opened(&self, name: &LogName) -> Result<Option<Arc<Opened>>, LogError> {
        if let Some(opened) = lock(&self.inner.indexes).get(name) {
            return Ok(Some(Arc::clone(opened)));
        }
        let opened = archive::open(&*self.inner.objects, &self.inner.terms.keys, name).await?;
        let Some(opened) = opened.map(Arc::new) else {
            return Ok(None);
        };
        let mut indexes = lock(&self.inner.indexes);
        if indexes.len() >= INDEXES_MAX {
            indexes.clear();
        }
        indexes.insert(name.clone(), Arc::clone(&opened));
        Ok(Some(opened))
    }
}

fn folders(dir: &std::path::Path) -> Result<Vec<String>, LogError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(LogError::io("list", dir)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(LogError::io("list", dir))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// One reader's place in a log.
struct Follower {
    store: LogStore,
    name: LogName,
    offset: u64,
    heard: Option<(Arc<Live>, watch::Receiver<()>)>,
    over: bool,
}

impl Follower {
    async fn next(&mut self) -> Result<Option<Bytes>, LogError> {
        loop {
            let Some(live) = self.listen().await? else {
                return self.read_ended().await;
            };
            let found = self
                .store
                .read_live(&live, &self.name, self.offset, READ_MAX)
                .await;
            match found {
                Ok(Found::Bytes(bytes)) => {
                    self.offset += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Ok(Found::Ended) => return Ok(None),
                Ok(Found::Nothing | Found::InFiles { .. }) => self.wait().await,
                Ok(Found::Moved) => return self.read_ended().await,
                // It moved while it was read.
                Err(error) if error.is_absent() => return self.read_ended().await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Listens to the log where it is being written; nothing when it has ended and moved.
    async fn listen(&mut self) -> Result<Option<Arc<Live>>, LogError> {
        if let Some((live, _)) = &self.heard {
            return Ok(Some(Arc::clone(live)));
        }
        let live = match self.store.find_live(&self.name) {
            Some(live) => live,
            None if self.store.opened(&self.name).await?.is_some() => return Ok(None),
            None => {
                let live = self.store.make_live(&self.name);
                // Kept from here on, so that dropping the follower forgets it.
                self.heard = Some((Arc::clone(&live), live.listen()));
                if self.store.opened(&self.name).await?.is_some() {
                    drop(live);
                    self.let_go();
                    return Ok(None);
                }
                return Ok(Some(live));
            }
        };
        // What was written before this is found by reading, what comes after is heard.
        let bell = live.listen();
        self.heard = Some((Arc::clone(&live), bell));
        Ok(Some(live))
    }

    fn let_go(&mut self) {
        if self.heard.take().is_some() {
            self.store.forget_empty(&self.name);
        }
    }

    async fn wait(&mut self) {
        if let Some((_, bell)) = &mut self.heard
            && bell.changed().await.is_err()
        {
            self.heard = None;
        }
    }

    async fn read_ended(&mut self) -> Result<Option<Bytes>, LogError> {
        let read = self.store.read(&self.name, self.offset, READ_MAX).await?;
        self.offset += read.len() as u64;
        Ok((!read.is_empty()).then_some(read))
    }
}
