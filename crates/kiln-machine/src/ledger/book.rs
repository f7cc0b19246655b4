//! The ledger's files: reading them, judging who may start, and changing them, all under the ledger's lock.
//!
//! Not async, and no waiting in here but for the ledger's own lock, which is held for moments.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{adopt, own_file, pins};

use super::{ENTRIES_MAX, Holder, LedgerError, Need, PASSES_MAX, Resource, WaitReason};

/// Bytes of an entry that are read.
const ENTRY_BYTES_MAX: u64 = 4096;
/// Characters of `who` that are kept.
const WHO_CHARS_MAX: usize = 200;

const WAIT: &str = "wait-";
const LEASE: &str = "lease-";
/// There while somebody has CPUs of his own: without it nobody has to look for them.
const PINNED: &str = "pinned";

/// An own entry: its file is removed when it is dropped.
#[derive(Debug)]
pub(super) struct Entry {
    path: PathBuf,
    order: u64,
    need: Need,
    who: String,
    /// Of the host, its alone.
    cpus: Vec<u32>,
    /// Holds the lock.
    file: File,
}

impl Entry {
    pub(super) fn cpus(&self) -> &[u32] {
        &self.cpus
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Removed before the lock falls: nobody can see it as free and still there.
        let _ = fs::remove_file(&self.path);
    }
}

/// What is in an entry's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Page {
    who: String,
    need: Need,
    /// How often later ones passed it.
    passes: u32,
    /// CPUs of the host that are its alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    cpus: Vec<u32>,
}

/// Somebody else's live entry.
#[derive(Debug)]
struct Other {
    path: PathBuf,
    order: u64,
    holds: bool,
    page: Page,
}

/// What was found.
pub(super) enum Verdict {
    Admitted(Entry),
    Wait(Entry, WaitReason),
}

/// One ledger directory.
#[derive(Clone, Debug)]
pub(super) struct Book {
    dir: PathBuf,
    capacity: Need,
    /// The host's.
    cpus: BTreeSet<u32>,
}

impl Book {
    pub(super) fn new(dir: PathBuf, capacity: Need, cpus: BTreeSet<u32>) -> Self {
        Self {
            dir,
            capacity,
            cpus,
        }
    }

    /// Puts every machine of the home on the CPUs where it belongs now.
    pub(super) fn settle(&self) {
        let settled = self.lock().and_then(|_lock| {
            let others = self.others(None)?;
            self.settle_as(&pinned(&others))
        });
        if let Err(error) = settled {
            tracing::warn!(%error, "machines stay on the CPUs they are on");
        }
    }

    /// With the ledger's lock held.
    fn settle_as(&self, pinned: &BTreeSet<u32>) -> Result<(), LedgerError> {
        if let Some(home) = self.dir.parent() {
            for problem in pins::settle(home, &self.cpus, pinned) {
                tracing::warn!(problem, "a machine stays on the CPUs it is on");
            }
        }
        let marker = self.dir.join(PINNED);
        match (pinned.is_empty(), fs::remove_file(&marker)) {
            (false, Ok(())) => self.mark(),
            (true, Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &marker)(error))
            }
            _ => Ok(()),
        }
    }

    fn mark(&self) -> Result<(), LedgerError> {
        open_private(&self.dir.join(PINNED)).map(drop)
    }

    /// Puts a need at the end of the queue.
    pub(super) fn enqueue(&self, need: Need, who: &str) -> Result<Entry, LedgerError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(io_error("make", &self.dir))?;
        let _lock = self.lock()?;
        let order = self.next_order()?;
        let mut random = [0_u8; 4];
        getrandom::fill(&mut random)
            .map_err(|error| io_error("name", &self.dir)(io::Error::other(error.to_string())))?;
        let path = self
            .dir
            .join(format!("{WAIT}{order:020}-{}.json", hex::encode(random)));
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("make", &path))?;
        let page = Page {
            who: who.chars().take(WHO_CHARS_MAX).collect(),
            need,
            passes: 0,
            cpus: Vec::new(),
        };
        let written = file
            .try_lock()
            .map_err(io::Error::from)
            .and_then(|()| file.write_all(&page_bytes(&page)));
        let entry = Entry {
            path,
            order,
            need,
            who: page.who,
            cpus: Vec::new(),
            file,
        };
        // On an error the entry is dropped, and its file with it.
        written.map_err(io_error("write", &entry.path))?;
        Ok(entry)
    }

    /// Admits an entry if there is room and it is its turn.
    pub(super) fn look(&self, mut entry: Entry) -> Result<Verdict, LedgerError> {
        let _lock = self.lock()?;
        let others = self.others(Some(&entry.path))?;
        let pinned = pinned(&others);
        let free: Vec<u32> = self.cpus.difference(&pinned).copied().collect();
        if let Some(reason) = judge(&entry, &others, self.capacity, free.len()) {
            return Ok(Verdict::Wait(entry, reason));
        }
        for passed in others
            .iter()
            .filter(|other| !other.holds && other.order < entry.order)
        {
            count_pass(passed)?;
        }
        let name = entry.path.file_name().unwrap_or_default().to_string_lossy();
        let lease = self.dir.join(name.replacen(WAIT, LEASE, 1));
        fs::rename(&entry.path, &lease).map_err(io_error("rename", &entry.path))?;
        entry.path = lease;
        self.pin(&mut entry, &free, pinned)?;
        Ok(Verdict::Admitted(entry))
    }

    /// Gives an entry the CPUs it needs, and moves everybody else off them.
    fn pin(
        &self,
        entry: &mut Entry,
        free: &[u32],
        mut pinned: BTreeSet<u32>,
    ) -> Result<(), LedgerError> {
        if entry.need.whole_cpus == 0 {
            // Somebody may have been killed who had some.
            return match somebody_pins(&self.dir) {
                true => self.settle_as(&pinned),
                false => Ok(()),
            };
        }
        self.mark()?;
        // From the end: the first CPUs serve the host's own devices.
        let wanted = usize::try_from(entry.need.whole_cpus).unwrap_or(usize::MAX);
        entry.cpus = free.iter().rev().take(wanted).copied().collect();
        let page = Page {
            who: entry.who.clone(),
            need: entry.need,
            passes: 0,
            cpus: entry.cpus.clone(),
        };
        let bytes = page_bytes(&page);
        entry
            .file
            .rewind()
            .and_then(|()| entry.file.write_all(&bytes))
            .and_then(|()| entry.file.set_len(bytes.len() as u64))
            .map_err(io_error("write", &entry.path))?;
        pinned.extend(&entry.cpus);
        self.settle_as(&pinned)
    }

    /// All live entries in order.
    pub(super) fn list(&self) -> Result<Vec<Holder>, LedgerError> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let _lock = self.lock()?;
        let others = self.others(None)?;
        Ok(others
            .into_iter()
            .map(|other| Holder {
                who: other.page.who,
                need: other.page.need,
                holds: other.holds,
            })
            .collect())
    }

    fn lock(&self) -> Result<File, LedgerError> {
        let path = self.dir.join("lock");
        let file = open_private(&path)?;
        file.lock().map_err(io_error("lock", &path))?;
        Ok(file)
    }

    /// The next order number. A lost or damaged counter continues after the largest entry.
    fn next_order(&self) -> Result<u64, LedgerError> {
        let path = self.dir.join("next");
        let mut file = open_private(&path)?;
        let mut text = String::new();
        let _ = (&mut file).take(32).read_to_string(&mut text);
        let counted: u64 = text.trim().parse().unwrap_or(0);
        let largest = self
            .names()?
            .iter()
            .filter_map(|name| parse_name(name))
            .map(|(_, order)| order)
            .max()
            .unwrap_or(0);
        let order = counted.max(largest).saturating_add(1);
        file.rewind()
            .and_then(|()| file.write_all(format!("{order:020}\n").as_bytes()))
            .map_err(io_error("write", &path))?;
        Ok(order)
    }

    fn names(&self) -> Result<Vec<String>, LedgerError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io_error("list", &self.dir))? {
            let entry = entry.map_err(io_error("list", &self.dir))?;
            names.extend(entry.file_name().into_string());
            if names.len() > ENTRIES_MAX {
                return Err(LedgerError::Full(self.dir.clone()));
            }
        }
        Ok(names)
    }

    /// Live entries of others in order; files of the dead are removed.
    fn others(&self, own: Option<&Path>) -> Result<Vec<Other>, LedgerError> {
        let mut others = Vec::new();
        for name in self.names()? {
            let Some((holds, order)) = parse_name(&name) else {
                continue;
            };
            let path = self.dir.join(&name);
            if own == Some(path.as_path()) {
                continue;
            }
            let Some(mut file) = opened(&path)? else {
                continue;
            };
            if file.try_lock().is_ok() {
                // Nobody holds it: its process is gone.
                let _ = fs::remove_file(&path);
                continue;
            }
            let mut bytes = Vec::new();
            let read = (&mut file).take(ENTRY_BYTES_MAX).read_to_end(&mut bytes);
            let page = read
                .ok()
                .and_then(|_| serde_json::from_slice(&bytes).ok())
                // A live entry that cannot be read counts as all there is: too careful, never too bold.
                .unwrap_or_else(|| Page {
                    who: name.clone(),
                    need: self.capacity,
                    passes: PASSES_MAX,
                    cpus: Vec::new(),
                });
            others.push(Other {
                path,
                order,
                holds,
                page,
            });
        }
        // Machines between two owners hold no file here, but the host's memory.
        let orphans = self.dir.parent().map(adopt::adoptable).unwrap_or_default();
        others.extend(orphans.into_iter().filter_map(|record| {
            let spec = record.kept?.spec;
            Some(Other {
                path: PathBuf::new(),
                order: 0,
                holds: true,
                page: Page {
                    who: record.name.to_string(),
                    need: match spec.host_cpus.is_empty() {
                        true => Need::of(spec.cpus, spec.memory),
                        false => Need::pinned(spec.cpus, spec.memory)
                            .charged(self.capacity, self.cpus.len()),
                    },
                    passes: 0,
                    cpus: spec.host_cpus,
                },
            })
        }));
        others.sort_by_key(|other| other.order);
        Ok(others)
    }
}

/// Why this entry has to wait; `None` when it may start.
fn judge(entry: &Entry, others: &[Other], capacity: Need, free_cpus: usize) -> Option<WaitReason> {
    let held = others
        .iter()
        .filter(|other| other.holds)
        .fold(Need::default(), |sum, other| sum.plus(other.page.need));
    let ahead: Vec<_> = others
        .iter()
        .filter(|other| !other.holds && other.order < entry.order)
        .collect();
    let reason = |resource| WaitReason {
        resource,
        need: entry.need,
        held,
        holders: others.iter().filter(|other| other.holds).count(),
        ahead: ahead.len(),
        capacity,
    };
    let short = |need: Need| {
        let whole = usize::try_from(need.whole_cpus).unwrap_or(usize::MAX);
        let cpus = (whole > free_cpus).then_some(Resource::WholeCpus);
        held.plus(need).exceeds(capacity).or(cpus)
    };
    if let Some(short) = short(entry.need) {
        return Some(reason(short));
    }
    // It fits. It may pass those who wait longer only if none of them fits now, and none was passed too often.
    let must_yield = ahead
        .iter()
        .any(|other| short(other.page.need).is_none() || other.page.passes >= PASSES_MAX);
    must_yield.then(|| reason(Resource::Turn))
}

/// Somebody's entry as a file; `None` when it is gone, or is no file: no kiln made that, so nobody lives by it, and it is removed.
fn opened(path: &Path) -> Result<Option<File>, LedgerError> {
    match own_file::open_to_read(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            let _ = fs::remove_file(path);
            Ok(None)
        }
        Err(error) => Err(io_error("open", path)(error)),
    }
}

/// CPUs that somebody holds alone.
fn pinned(others: &[Other]) -> BTreeSet<u32> {
    let holders = others.iter().filter(|other| other.holds);
    holders
        .flat_map(|other| other.page.cpus.iter().copied())
        .collect()
}

/// Whether anybody has CPUs of his own, or had and nobody looked since.
pub(super) fn somebody_pins(dir: &Path) -> bool {
    dir.join(PINNED).exists()
}

fn count_pass(passed: &Other) -> Result<(), LedgerError> {
    let page = Page {
        passes: passed.page.passes + 1,
        ..passed.page.clone()
    };
    // In place: the file's lock is its owner's life. Both lengths are the same, see `page_bytes`.
    own_file::open(&passed.path, OpenOptions::new().write(true))
        .and_then(|mut file| file.write_all(&page_bytes(&page)))
        .map_err(io_error("write", &passed.path))
}

/// A page of a length that does not depend on the number of passes, so that rewriting it in place leaves no tail.
fn page_bytes(page: &Page) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(page).unwrap_or_default();
    let digits = page.passes.checked_ilog10().unwrap_or(0) as usize + 1;
    bytes.extend(std::iter::repeat_n(b' ', 11 - digits));
    bytes
}

fn parse_name(name: &str) -> Option<(bool, u64)> {
    let stem = name.strip_suffix(".json")?;
    let (holds, rest) = match stem.strip_prefix(LEASE) {
        Some(rest) => (true, rest),
        None => (false, stem.strip_prefix(WAIT)?),
    };
    let (order, _random) = rest.split_once('-')?;
    Some((holds, order.parse().ok()?))
}

/// Opens or makes a file of ours; never through a symlink of somebody else's.
fn open_private(path: &Path) -> Result<File, LedgerError> {
    let mut options = OpenOptions::new();
    let options = options.create(true).truncate(false).read(true).write(true);
    let file = own_file::open(path, options.mode(0o600)).map_err(io_error("open", path))?;
    let meta = file.metadata().map_err(io_error("look at", path))?;
    if meta.nlink() > 1 {
        return Err(io_error("open", path)(io::Error::other(
            "it has other links",
        )));
    }
    Ok(file)
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> LedgerError + 'a {
    move |source| LedgerError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
