//! Cache heads: the sealed BuildKit state disks that builds fork.
//!
//! A scope (`shared`, or one of a tenant: [`own_scope`], [`plain_scope`]) has at most one *head*: a disk file, and the chain of files below it.
//! A build forks the head copy-on-write; on success from a trusted ref its overlay may become the next head by
//! compare-and-set on the head it forked from. The loser of a race simply does not commit.
//! This module knows files, names and lineage. It does not know disk formats: callers merge and flatten overlays
//! with the machine room's tools before they commit. DESIGN "Rules", 5.
//!
//! On disk: `<root>/<scope>/HEAD` (JSON [`Head`] id), `<root>/<scope>/lock`,
//! `<root>/<scope>/<id>/{meta.json, disk, pin, seen.json}`.
//!
//! Read next: `heads::sound` (what a build may fork).

mod sound;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kiln_core::{Digest, TenantName};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

pub use sound::Fork;

use crate::sealed;

/// Overlays above the shared disk before a commit has to flatten.
pub const OVERLAYS_MAX: u32 = 4;
/// Version of `meta.json`.
pub const SCHEMA: u32 = 1;
/// Scope every tenant may read and only the operator writes.
pub const SHARED: &str = "shared";
/// Ends the name of a tenant's scope that untrusted refs may fork. No tenant's name has a dot.
const PLAIN: &str = ".plain";
/// Ends the name of the own scope of a tenant that is called as [`SHARED`] is.
const OWN: &str = ".own";

/// A tenant's scope for trusted builds that may have received a secret: what BuildKit keeps of those, no untrusted ref reads. Heads that are
/// older than [`plain_scope`] lie here, since nobody knows what was received for them.
#[must_use]
pub fn own_scope(tenant: &TenantName) -> String {
    match tenant.as_str() {
        SHARED => format!("{SHARED}{OWN}"),
        name => name.to_owned(),
    }
}

/// A tenant's scope whose heads descend from builds without a secret alone, from the shared head on: untrusted refs may fork it.
#[must_use]
pub fn plain_scope(tenant: &TenantName) -> String {
    format!("{tenant}{PLAIN}")
}

/// Whose a scope is; nobody's when it is the shared one.
#[must_use]
pub fn tenant_of(scope: &str) -> Option<TenantName> {
    let name = scope
        .strip_suffix(PLAIN)
        .or_else(|| scope.strip_suffix(OWN));
    match name {
        None if scope == SHARED => None,
        name => name.unwrap_or(scope).parse().ok(),
    }
}

/// One sealed disk and its lineage.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Version of this record.
    pub schema: u32,
    /// `H(id of the head it follows, digest of this file)`, 32 hex digits.
    pub id: String,
    /// The scope it belongs to.
    pub scope: String,
    /// Id of the head whose disk lies directly below this one's, if any.
    pub parent: Option<String>,
    /// Id of the head that was forked, and that this one followed: its lineage. Another than `parent` after flattening.
    pub follows: Option<String>,
    /// Id of the shared head at the bottom of the chain (its own id for a shared head).
    pub root: String,
    /// Overlays above the shared disk: 0 for a shared head.
    pub depth: u32,
    /// Digest of the disk file of this head alone.
    pub disk: Digest,
    /// Bytes of that file.
    pub bytes: u64,
    /// What wrote it: an attempt, or `bake`.
    pub written_by: String,
    /// BuildKit that wrote it; another version starts from the shared head again.
    pub buildkit: String,
    /// Milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
}

/// What a caller knows of an overlay it wants to commit.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// The disk file; moved into the store. Must lie on the store's filesystem.
    pub file: &'a Path,
    /// The head whose disk is the file's backing file; `None` for a disk without one.
    pub stands_on: Option<&'a Head>,
    /// See [`Head::written_by`].
    pub written_by: String,
    /// See [`Head::buildkit`].
    pub buildkit: String,
    /// Milliseconds since the Unix epoch.
    pub now_unix_ms: u64,
}

/// Answer to a commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Commit {
    /// The overlay is the scope's head now.
    Committed(Head),
    /// Another build committed first; nothing was changed and the candidate file is still where it was.
    LostRace {
        /// The head that is there.
        current: Option<String>,
    },
}

/// What can go wrong in the store of heads.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The filesystem failed.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A record cannot be read.
    #[error("the record {path:?} of a cache head is damaged or newer than this kiln: {why}")]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A disk file is not what its record says.
    #[error("the disk of cache head {id} does not match its record: {why}")]
    Corrupt {
        /// Which head.
        id: String,
        /// What differs.
        why: String,
    },
}

impl HeadError {
    /// Whether what is stored is damaged, rather than the filesystem failing.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Corrupt { .. })
    }
}

/// Keeps a head and everything below it from being pruned while it is in use.
#[derive(Debug)]
pub struct Pin {
    _files: Vec<File>,
}

/// All heads of one kiln home.
#[derive(Clone, Debug)]
pub struct HeadStore {
    root: PathBuf,
}

impl HeadStore {
    /// A store in this directory, made when it is missing.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(root: &Path) -> Result<Self, HeadError> {
        fs::create_dir_all(root).map_err(io_error("make", root))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The current head of a scope. A head whose disk file is missing or has another size counts as none.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn current(&self, scope: &str) -> Result<Option<Head>, HeadError> {
        let path = self.root.join(scope).join("HEAD");
        let id = match fs::read_to_string(&path) {
            Ok(id) => id.trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        if !is_id(&id) {
            return Err(HeadError::Damaged {
                path,
                why: "it names no head".to_owned(),
            });
        }
        match self.load(scope, &id) {
            Ok(head) => Ok(Some(head)),
            Err(HeadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The head a build of a tenant's scope should fork: that scope's own, when it still stands on the current shared head and was
    /// written by the same BuildKit; else the shared one.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn to_fork(&self, scope: &str, buildkit: &str) -> Result<Option<Head>, HeadError> {
        let shared = self.current(SHARED)?;
        let own = self.current(scope).unwrap_or_default();
        let usable = |own: &Head| {
            shared.as_ref().is_some_and(|shared| own.root == shared.id) && own.buildkit == buildkit
        };
        Ok(own.filter(usable).or(shared))
    }

    /// The disk file of a head.
    #[must_use]
    pub fn disk(&self, head: &Head) -> PathBuf {
        self.dir(&head.scope, &head.id).join("disk")
    }

    /// The disk of a head as a head's own overlay names it: relative, so that a home can be moved.
    #[must_use]
    pub fn name_below(&self, head: &Head) -> PathBuf {
        Path::new("../..")
            .join(&head.scope)
            .join(&head.id)
            .join("disk")
    }

    /// Makes an overlay the scope's head, if `parent` still is what builds fork there.
    ///
    /// The order survives a crash at any point: the new directory is complete and synced before `HEAD` is
    /// replaced by a rename, and a directory that no `HEAD` chain reaches is removed by [`HeadStore::prune`].
    ///
    /// # Errors
    /// When the filesystem fails; the old head stays.
    pub fn commit(
        &self,
        scope: &str,
        parent: Option<&Head>,
        candidate: &Candidate<'_>,
    ) -> Result<Commit, HeadError> {
        let scope_dir = self.root.join(scope);
        fs::create_dir_all(&scope_dir).map_err(io_error("make", &scope_dir))?;
        let file = File::open(candidate.file).map_err(io_error("open", candidate.file))?;
        file.sync_all().map_err(io_error("flush", candidate.file))?;
        let (disk, bytes) = Digest::of_reader(file).map_err(io_error("read", candidate.file))?;
        let _lock = self.lock(scope)?;
        if let Some(current) = self.moved_on(scope, parent)? {
            return Ok(Commit::LostRace { current });
        }
        let id = head_id(parent.map(|head| head.id.as_str()), disk);
        let head = Head {
            schema: SCHEMA,
            root: candidate
                .stands_on
                .map_or_else(|| id.clone(), |below| below.root.clone()),
            id,
            scope: scope.to_owned(),
            parent: candidate.stands_on.map(|below| below.id.clone()),
            follows: parent.map(|head| head.id.clone()),
            depth: candidate.stands_on.map_or(0, |below| below.depth + 1),
            disk,
            bytes,
            written_by: candidate.written_by.clone(),
            buildkit: candidate.buildkit.clone(),
            created_unix_ms: candidate.now_unix_ms,
        };
        let dir = self.dir(scope, &head.id);
        fs::create_dir_all(&dir).map_err(io_error("make", &dir))?;
        let to = dir.join("disk");
        fs::rename(candidate.file, &to).map_err(io_error("move a disk to", &to))?;
        make_read_only(&to)?;
        sealed::remember(&to, disk, &dir.join(sound::NOTE));
        write_synced(&dir.join("pin"), b"")?;
        write_json(&dir.join("meta.json"), &head)?;
        write_synced(&scope_dir.join("HEAD"), head.id.as_bytes())?;
        Ok(Commit::Committed(head))
    }

    /// The current head's id when the scope has moved on since `parent` was forked.
    fn moved_on(
        &self,
        scope: &str,
        parent: Option<&Head>,
    ) -> Result<Option<Option<String>>, HeadError> {
        let current = self.current(scope)?.map(|head| head.id);
        let expected = match parent {
            // The first own head of a tenant, or one that starts over, grows from the shared head.
            Some(parent) if parent.scope != scope => {
                let shared = self.current(SHARED)?.map(|head| head.id);
                if shared.as_deref() != Some(parent.id.as_str()) {
                    return Ok(Some(current));
                }
                match self.current(scope)? {
                    Some(own) if own.root == parent.id => return Ok(Some(Some(own.id))),
                    _ => return Ok(None),
                }
            }
            Some(parent) => Some(parent.id.clone()),
            None => current.clone().filter(|_| scope != SHARED),
        };
        Ok((current != expected).then_some(current))
    }

    /// Replaces the shared head by a freshly baked disk, whatever was there.
    ///
    /// # Errors
    /// When the filesystem fails; the old head stays.
    pub fn seal_shared(&self, candidate: &Candidate<'_>) -> Result<Head, HeadError> {
        match self.commit(SHARED, None, candidate) {
            Ok(Commit::Committed(head)) => Ok(head),
            Err(error) if !error.is_damage() => Err(error),
            Ok(Commit::LostRace { .. }) | Err(_) => {
                let path = self.root.join(SHARED).join("HEAD");
                self.forget(SHARED)?;
                match self.commit(SHARED, None, candidate)? {
                    Commit::Committed(head) => Ok(head),
                    Commit::LostRace { .. } => Err(HeadError::Damaged {
                        path,
                        why: "another process seals the shared head at the same time".to_owned(),
                    }),
                }
            }
        }
    }

    /// Keeps a head and all below it from being pruned until the pin is dropped.
    ///
    /// # Errors
    /// When a file of the chain is missing.
    pub fn pin(&self, head: &Head) -> Result<Pin, HeadError> {
        let mut files = Vec::new();
        for member in self.chain(head)? {
            let path = self.dir(&member.scope, &member.id).join("pin");
            let file = File::open(&path).map_err(io_error("open", &path))?;
            flock(&file, FlockOperation::LockShared)
                .map_err(|e| io_error("lock", &path)(e.into()))?;
            files.push(file);
        }
        Ok(Pin { _files: files })
    }

    /// The head and everything below it, top first.
    ///
    /// # Errors
    /// When a record is missing or damaged.
    pub fn chain(&self, head: &Head) -> Result<Vec<Head>, HeadError> {
        let mut chain = vec![head.clone()];
        let mut next = head.parent.clone();
        while let Some(id) = next {
            let scope = if id == head.root {
                SHARED
            } else {
                head.scope.as_str()
            };
            let below = self.load(scope, &id)?;
            next = below.parent.clone();
            chain.push(below);
            if chain.len() > OVERLAYS_MAX as usize + 2 {
                let path = self.dir(scope, &id);
                return Err(HeadError::Damaged {
                    path,
                    why: "the chain is too long".to_owned(),
                });
            }
        }
        Ok(chain)
    }

    /// Reads every byte of a head's own file again.
    ///
    /// # Errors
    /// [`HeadError::Corrupt`] when the digest differs.
    pub fn verify(&self, head: &Head) -> Result<(), HeadError> {
        let path = self.disk(head);
        let file = File::open(&path).map_err(io_error("open", &path))?;
        let (digest, _) = Digest::of_reader(file).map_err(io_error("read", &path))?;
        if digest == head.disk {
            return Ok(());
        }
        Err(HeadError::Corrupt {
            id: head.id.clone(),
            why: format!("digest is {digest}, not {}", head.disk),
        })
    }

    /// Forgets a scope's head, for example because it is corrupt. Its files go with the next prune.
    ///
    /// # Errors
    /// When the pointer cannot be removed.
    pub fn forget(&self, scope: &str) -> Result<(), HeadError> {
        let path = self.root.join(scope).join("HEAD");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// All heads that some scope's `HEAD` reaches, with the bytes of each.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn list(&self) -> Result<Vec<Head>, HeadError> {
        let mut heads: Vec<Head> = Vec::new();
        for scope in self.scopes()? {
            if let Some(head) = self.current(&scope)? {
                for member in self.chain(&head)? {
                    if !heads.iter().any(|seen| seen.id == member.id) {
                        heads.push(member);
                    }
                }
            }
        }
        Ok(heads)
    }

    /// Removes every head that no scope reaches and nobody has pinned; gives the bytes freed.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn prune(&self) -> Result<u64, HeadError> {
        let keep: Vec<String> = self.list()?.into_iter().map(|head| head.id).collect();
        let mut freed = 0;
        for scope in self.scopes()? {
            let _lock = self.lock(&scope)?;
            let dir = self.root.join(&scope);
            for id in sub_directories(&dir)? {
                if keep.contains(&id) || !is_id(&id) {
                    continue;
                }
                let dir = dir.join(&id);
                let pinned = File::open(dir.join("pin")).is_ok_and(|pin| {
                    flock(&pin, FlockOperation::NonBlockingLockExclusive).is_err()
                });
                if !pinned {
                    freed += fs::metadata(dir.join("disk")).map_or(0, |meta| meta.len());
                    fs::remove_dir_all(&dir).map_err(io_error("remove", &dir))?;
                }
            }
        }
        Ok(freed)
    }

    fn scopes(&self) -> Result<Vec<String>, HeadError> {
        sub_directories(&self.root)
    }

    fn dir(&self, scope: &str, id: &str) -> PathBuf {
        self.root.join(scope).join(id)
    }

    fn lock(&self, scope: &str) -> Result<File, HeadError> {
        let path = self.root.join(scope).join("lock");
        let file = File::create(&path).map_err(io_error("make", &path))?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|e| io_error("lock", &path)(e.into()))?;
        Ok(file)
    }

    fn load(&self, scope: &str, id: &str) -> Result<Head, HeadError> {
        let path = self.dir(scope, id).join("meta.json");
        let text = fs::read(&path).map_err(io_error("read", &path))?;
        let head: Head = serde_json::from_slice(&text).map_err(|error| HeadError::Damaged {
            path: path.clone(),
            why: error.to_string(),
        })?;
        if head.schema != SCHEMA || head.id != id || head.scope != scope {
            return Err(HeadError::Damaged {
                path,
                why: "it describes another head".to_owned(),
            });
        }
        let disk = self.disk(&head);
        let bytes = fs::metadata(&disk).map_err(io_error("read", &disk))?.len();
        if bytes != head.bytes {
            return Err(HeadError::Corrupt {
                id: head.id,
                why: format!("it has {bytes} bytes, not {}", head.bytes),
            });
        }
        Ok(head)
    }
}

/// `H(parent id, digest of the overlay)`, 32 hex digits.
fn head_id(parent: Option<&str>, disk: Digest) -> String {
    Digest::of(format!("kiln head v1\n{}\n{disk}\n", parent.unwrap_or("-")).as_bytes()).short(32)
}

fn is_id(text: &str) -> bool {
    text.len() == 32
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HeadError {
    let path = path.to_owned();
    move |source| HeadError::Io {
        action,
        path,
        source,
    }
}

fn sub_directories(dir: &Path) -> Result<Vec<String>, HeadError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let entry = entry.map_err(io_error("list", dir))?;
        if entry.path().is_dir() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    Ok(names)
}

fn make_read_only(path: &Path) -> Result<(), HeadError> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o444)).map_err(io_error("seal", path))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), HeadError> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| HeadError::Damaged {
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    write_synced(path, &text)
}

/// Replaces a file so that after a crash it holds either the old or the new bytes.
fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), HeadError> {
    let temp = path.with_extension(format!("tmp-{}", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file = File::create(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)?;
        File::open(path.parent().unwrap_or(path))?.sync_all()
    };
    write().map_err(io_error("write", path))
}

#[cfg(test)]
mod tests;
