//! The directory of templates, shared by all kiln processes of a home.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::key::{TEMPLATE_FORMAT, TemplateKey};
use super::verify::{self, FILES_MAX, FileRecord, Seen};
use crate::driver::TemplateRef;
use crate::{own_file, proc};

/// Version of `meta.json`.
const SCHEMA: u32 = 1;
/// Longest wait for another process that makes the same template.
pub(crate) const MAKE_WAIT_MAX: Duration = Duration::from_secs(900);
/// How often the maker's lock is tried.
const LOCK_POLL: Duration = Duration::from_millis(50);
const META_FILE: &str = "meta.json";
const SEEN_FILE: &str = "seen.json";
const LOCK_FILE: &str = "lock";
const MAKE_DIR: &str = ".make";

/// What can go wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file operation failed.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is being removed.
    #[error("template {0} is being removed")]
    BeingRemoved(String),
    /// Another process makes it and did not finish.
    #[error("another kiln process has been making template {id} for {waited:?}")]
    MakerTooSlow {
        /// Which.
        id: String,
        /// How long was waited.
        waited: Duration,
    },
}

/// Why a template could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MakeError<E> {
    /// The store failed.
    #[error("the template store failed")]
    Store(#[from] TemplateError),
    /// Making it failed.
    #[error("the template could not be made")]
    Make(#[source] E),
}

/// What happens while a template is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Another process makes it; this one waits and will share it.
    WaitingForMaker,
    /// The one that was there is damaged, for this reason, and was removed.
    RemovedDamaged(String),
    /// The one that was there is whole but does not fit this host any more, for this reason, and was removed.
    RemovedStale(String),
    /// It is being made here.
    Making,
    /// Its files are being digested.
    Sealing,
}

/// A template in use: it is not pruned while this lives.
#[derive(Debug)]
pub struct Held {
    /// The template.
    pub template: TemplateRef,
    lock: File,
}

/// A template as `kiln template list` shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// What it depends on; `None` when its record cannot be read.
    pub key: Option<TemplateKey>,
    /// Bytes on disk.
    pub bytes: u64,
    /// Last use.
    pub used: SystemTime,
    /// Whether a machine uses it now.
    pub in_use: bool,
}

/// Which templates may go. Those in use always stay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PrunePolicy {
    /// The least recently used go until all take at most this many bytes.
    pub bytes_max: u64,
    /// Those not used for this long go.
    pub unused_max: Duration,
}

/// What pruning did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PruneReport {
    /// Ids that went.
    pub removed: Vec<String>,
    /// Bytes they took.
    pub bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Meta {
    schema: u32,
    id: String,
    key: TemplateKey,
    files: Vec<FileRecord>,
    created_unix_ms: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct SeenInBoot {
    boot_id: String,
    files: Vec<Seen>,
}

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> TemplateError + 'a {
    move |source| TemplateError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Marks a template as used, for as long as the file lives.
///
/// # Errors
/// [`TemplateError::BeingRemoved`], or what the file system says.
pub fn lock_for_use(template: &TemplateRef) -> Result<File, TemplateError> {
    let path = template.dir.join(LOCK_FILE);
    let file = own_file::open_to_read(&path).map_err(io_error("open", &path))?;
    let removed = || TemplateError::BeingRemoved(template.key.clone());
    // Held exclusively only for moments: while it is listed or moved out of sight.
    file.lock_shared().map_err(io_error("lock", &path))?;
    if !is_same(&template.dir, &file) {
        return Err(removed());
    }
    // The time of the last use; a store that cannot be written still serves.
    let _ = file.set_modified(SystemTime::now());
    Ok(file)
}

/// Whether the lock that is held belongs to the template that is there now.
fn is_same(dir: &Path, held: &File) -> bool {
    fs::metadata(dir.join(LOCK_FILE)).is_ok_and(|now| {
        held.metadata()
            .is_ok_and(|held| (now.dev(), now.ino()) == (held.dev(), held.ino()))
    })
}

/// All templates of one home.
#[derive(Clone, Debug)]
pub struct TemplateStore {
    root: PathBuf,
}

impl TemplateStore {
    /// The store in this directory, which is made when missing, for its owner alone.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(root: &Path) -> Result<Self, TemplateError> {
        let make = root.join(MAKE_DIR);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&make);
        made.map_err(io_error("make", &make))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The directory whose partial files a reaper sweeps.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A sound template of this key, if there is one. A damaged one is removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn find(
        &self,
        key: &TemplateKey,
        progress: &dyn Fn(Progress),
    ) -> Result<Option<Held>, TemplateError> {
        let id = key.id();
        let dir = self.root.join(&id);
        if !dir.exists() {
            return Ok(None);
        }
        let template = TemplateRef { key: id, dir };
        let lock = match lock_for_use(&template) {
            Ok(lock) => lock,
            Err(TemplateError::BeingRemoved(_)) => return Ok(None),
            Err(error) => {
                self.remove(&template.dir)?;
                progress(Progress::RemovedDamaged(error.to_string()));
                return Ok(None);
            }
        };
        match check(&template.dir, Some(key), false) {
            Ok(()) => Ok(Some(Held { template, lock })),
            Err(why) => {
                if is_same(&template.dir, &lock) {
                    self.remove(&template.dir)?;
                    progress(Progress::RemovedDamaged(why));
                }
                Ok(None)
            }
        }
    }

    /// Removes a template that its driver refuses although its files are whole. One that another process has made in its place
    /// meanwhile stays.
    ///
    /// # Errors
    /// What the file system says.
    pub fn discard(&self, held: &Held) -> Result<(), TemplateError> {
        match is_same(&held.template.dir, &held.lock) {
            true => self.remove(&held.template.dir),
            false => Ok(()),
        }
    }

    /// A sound template of this key; `make` fills an empty directory when there is none. Of several processes one makes it, the others
    /// wait and share it. Nothing stays when making fails or is dropped.
    ///
    /// # Errors
    /// [`MakeError`].
    pub async fn get_or_make<E, F>(
        &self,
        key: &TemplateKey,
        progress: &(dyn Fn(Progress) + Send + Sync),
        make: impl FnOnce(TemplateRef) -> F + Send,
    ) -> Result<Held, MakeError<E>>
    where
        F: Future<Output = Result<(), E>> + Send,
    {
        let _maker = match self.lock_or_find(key, progress).await? {
            Turn::Found(held) => return Ok(held),
            Turn::Make(lock) => lock,
        };
        progress(Progress::Making);
        let id = key.id();
        let partial = Partial::make(&self.root, &id)?;
        make(TemplateRef {
            key: id.clone(),
            dir: partial.dir.clone(),
        })
        .await
        .map_err(MakeError::Make)?;
        progress(Progress::Sealing);
        let (key, root) = (key.clone(), self.root.clone());
        let sealed = tokio::task::spawn_blocking(move || seal(&root, &key, partial)).await;
        let held = sealed
            .unwrap_or_else(|error| Err(io_error("seal", &self.root)(io::Error::other(error))))?;
        Ok(held)
    }

    async fn lock_or_find(
        &self,
        key: &TemplateKey,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Turn, TemplateError> {
        let id = key.id();
        let path = self.root.join(MAKE_DIR).join(&id);
        let began = Instant::now();
        let mut told = false;
        loop {
            if let Some(held) = self.find(key, progress)? {
                return Ok(Turn::Found(held));
            }
            let mut options = OpenOptions::new();
            let options = options.create(true).append(true).mode(0o600);
            let lock = own_file::open(&path, options);
            let lock = lock.map_err(io_error("open", &path))?;
            if lock.try_lock().is_ok() {
                // It may have been finished in between.
                return Ok(match self.find(key, progress)? {
                    Some(held) => Turn::Found(held),
                    None => Turn::Make(lock),
                });
            }
            if began.elapsed() > MAKE_WAIT_MAX {
                return Err(TemplateError::MakerTooSlow {
                    id,
                    waited: began.elapsed(),
                });
            }
            if !told {
                progress(Progress::WaitingForMaker);
                told = true;
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
    }

    /// All templates, least recently used first.
    ///
    /// # Errors
    /// What the file system says.
    pub fn list(&self) -> Result<Vec<Listed>, TemplateError> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io_error("list", &self.root))? {
            let entry = entry.map_err(io_error("list", &self.root))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !is_id(&name) {
                continue;
            }
            let dir = entry.path();
            let lock = own_file::open_to_read(&dir.join(LOCK_FILE));
            let in_use = lock.as_ref().is_ok_and(|lock| lock.try_lock().is_err());
            let used = lock
                .and_then(|lock| lock.metadata()?.modified())
                .unwrap_or(UNIX_EPOCH);
            let key = read_meta(&dir).ok().map(|meta| meta.key);
            all.push(Listed {
                id: name,
                key,
                bytes: bytes_of(&dir),
                used,
                in_use,
            });
        }
        all.sort_by_key(|listed| listed.used);
        Ok(all)
    }

    /// Removes templates that nobody uses: those of another format or with an unreadable record, those not used for long, then the least
    /// recently used until the rest fits.
    ///
    /// # Errors
    /// What the file system says.
    pub fn prune(&self, policy: PrunePolicy) -> Result<PruneReport, TemplateError> {
        let all = self.list()?;
        let mut left: u64 = all.iter().map(|listed| listed.bytes).sum();
        let mut report = PruneReport::default();
        for listed in all {
            let stale = listed
                .key
                .as_ref()
                .is_none_or(|key| key.format != TEMPLATE_FORMAT);
            let idle = listed.used.elapsed().unwrap_or_default() > policy.unused_max;
            if listed.in_use || !(stale || idle || left > policy.bytes_max) {
                continue;
            }
            if self.remove_idle(&listed.id)? {
                left = left.saturating_sub(listed.bytes);
                report.bytes += listed.bytes;
                report.removed.push(listed.id);
            }
        }
        Ok(report)
    }

    /// Removes these templates where nobody uses them.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove_unused(&self, ids: &[String]) -> Result<PruneReport, TemplateError> {
        let mut report = PruneReport::default();
        for listed in self.list()? {
            if ids.contains(&listed.id) && !listed.in_use && self.remove_idle(&listed.id)? {
                report.bytes += listed.bytes;
                report.removed.push(listed.id);
            }
        }
        Ok(report)
    }

    /// Removes a template unless somebody has just begun to use it.
    fn remove_idle(&self, id: &str) -> Result<bool, TemplateError> {
        let dir = self.root.join(id);
        // Taken exclusively, so that nobody begins to use it meanwhile.
        let lock = own_file::open_to_read(&dir.join(LOCK_FILE)).ok();
        if lock.as_ref().is_some_and(|lock| lock.try_lock().is_err()) {
            return Ok(false);
        }
        self.remove(&dir).map(|()| true)
    }

    /// Reads every file of every template again; gives those that are damaged, with the reason. Removes nothing.
    ///
    /// # Errors
    /// What the file system says.
    pub fn scrub(&self) -> Result<Vec<(String, String)>, TemplateError> {
        let all = self.list()?.into_iter();
        let damaged = all.filter_map(|listed| {
            let why = check(&self.root.join(&listed.id), None, true).err()?;
            Some((listed.id, why))
        });
        Ok(damaged.collect())
    }

    /// Out of sight first, in one step; machines that run on it keep their open files.
    fn remove(&self, dir: &Path) -> Result<(), TemplateError> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let away = self
            .root
            .join(proc::partial_name(&format!("{name}.removed")));
        let _ = fs::remove_dir_all(&away);
        match fs::rename(dir, &away) {
            Ok(()) => fs::remove_dir_all(&away).map_err(io_error("remove", &away)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", dir)(error)),
        }
    }
}

enum Turn {
    Found(Held),
    Make(File),
}

/// A directory that is being filled; removed unless it became a template.
struct Partial {
    dir: PathBuf,
    done: bool,
}

impl Partial {
    fn make(root: &Path, id: &str) -> Result<Self, TemplateError> {
        let dir = root.join(proc::partial_name(id));
        let _ = fs::remove_dir_all(&dir);
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(io_error("make", &dir))?;
        Ok(Self { dir, done: false })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn seal(root: &Path, key: &TemplateKey, mut partial: Partial) -> Result<Held, TemplateError> {
    let dir = &partial.dir;
    let list = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    };
    let names = list().map_err(io_error("list", dir))?;
    let files = verify::record_files(dir, &names).map_err(io_error("digest", dir))?;
    let id = key.id();
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let created_unix_ms = u64::try_from(created.as_millis()).unwrap_or(u64::MAX);
    let meta = Meta {
        schema: SCHEMA,
        id: id.clone(),
        key: key.clone(),
        files,
        created_unix_ms,
    };
    write_json(&dir.join(META_FILE), &meta)?;
    remember(dir, &meta.files);
    let path = dir.join(LOCK_FILE);
    File::create_new(&path).map_err(io_error("make", &path))?;
    let target = root.join(&id);
    fs::rename(dir, &target).map_err(io_error("rename into", &target))?;
    partial.done = true;
    let template = TemplateRef {
        key: id,
        dir: target,
    };
    let lock = lock_for_use(&template)?;
    Ok(Held { template, lock })
}

fn read_meta(dir: &Path) -> Result<Meta, String> {
    let text =
        own_file::read(&dir.join(META_FILE)).map_err(|error| format!("{META_FILE}: {error}"))?;
    let meta: Meta =
        serde_json::from_slice(&text).map_err(|error| format!("{META_FILE}: {error}"))?;
    let plain = |file: &FileRecord| !file.name.contains('/') && !file.name.starts_with('.');
    if meta.schema != SCHEMA || meta.id != meta.key.id() || meta.files.len() > FILES_MAX {
        return Err(format!(
            "{META_FILE} is of another version or does not fit itself"
        ));
    }
    match meta.files.iter().all(plain) {
        true => Ok(meta),
        false => Err(format!("{META_FILE} names a file outside")),
    }
}

/// Whether the files are what the record says; digests are computed unless they were in this boot and nothing changed.
fn check(dir: &Path, key: Option<&TemplateKey>, in_full: bool) -> Result<(), String> {
    let meta = read_meta(dir)?;
    if key.is_some_and(|key| *key != meta.key) {
        return Err("its record has another key".to_owned());
    }
    let now = verify::look(dir, &meta.files).map_err(|error| error.to_string())?;
    let seen: Option<SeenInBoot> = own_file::read(&dir.join(SEEN_FILE))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let known = seen.is_some_and(|seen| {
        !seen.boot_id.is_empty() && seen.boot_id == proc::boot_id() && seen.files == now
    });
    if known && !in_full {
        return Ok(());
    }
    verify::compare(dir, &meta.files)?;
    remember(dir, &meta.files);
    Ok(())
}

/// A failure only costs time: the digests are computed again.
fn remember(dir: &Path, files: &[FileRecord]) {
    if let Ok(files) = verify::look(dir, files) {
        let seen = SeenInBoot {
            boot_id: proc::boot_id(),
            files,
        };
        let _ = write_json(&dir.join(SEEN_FILE), &seen);
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TemplateError> {
    let temp = path.with_extension(format!("new-{}", std::process::id()));
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::from);
    text.and_then(|text| {
        fs::write(&temp, text)?;
        fs::rename(&temp, path)
    })
    .map_err(io_error("write", path))
}

fn is_id(name: &str) -> bool {
    name.len() == 32
        && name
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn bytes_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .map(|meta| meta.blocks() * 512)
        .sum()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
