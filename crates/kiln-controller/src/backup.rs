//! A copy of the database while it is in use, and putting one back while nothing is.
//!
//! `GET /private/backup` exists on the private socket alone: what it gives holds every tenant's requests and the digests of every token.
//! The copy is made beside the database, without a name once it is whole, and streamed from there. Files that the database names (sources, logs,
//! images) are written before the rows that name them: copied after the database, they are all there. See `docs/design/state.md`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use futures_util::stream;
use http::{HeaderValue, header};
use kiln_db::{BackupError, Database, NewAudit, RestoreError, Restored};
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tokio::sync::Semaphore;

use crate::access::Peer;
use crate::api::Problem;
use crate::server::{self, StartError};
use crate::state::Controller;

/// The database's file in a controller's folder.
pub(crate) const DATABASE_FILE: &str = "kiln.db";
/// Beginning of the names of copies that are being made.
const COPY_PREFIX: &str = "backup-";
/// Digits behind it.
const COPY_DIGITS: usize = 16;
/// With less room than this a disk is full, bytes.
const ROOM_MIN: u64 = 64 * 1024;
/// Bytes of one piece of the stream.
const PIECE: usize = 256 * 1024;

/// Why no backup was put back.
#[derive(Debug, thiserror::Error)]
pub enum PutBackError {
    /// The folder is in use, or cannot be used.
    #[error(transparent)]
    Folder(#[from] StartError),
    /// A database is there, and was not to be replaced.
    #[error("there is a database already: {}", .0.display())]
    Exists(PathBuf),
    /// The backup is not good.
    #[error(transparent)]
    Backup(#[from] RestoreError),
    /// The database that was there could not be moved away.
    #[error("could not move {} away", path.display())]
    Move {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What came of putting a backup back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PutBack {
    /// The new life.
    pub restored: Restored,
    /// Where the database that was there is now.
    pub replaced: Option<PathBuf>,
}

#[derive(Clone)]
struct Copies {
    controller: Controller,
    folder: Arc<PathBuf>,
    one: Arc<Semaphore>,
}

/// The route, for the private socket and nothing else. Removes what a killed controller left half copied.
pub(crate) fn router(controller: Controller, folder: &Path) -> Router {
    for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if is_copy(&file.file_name().to_string_lossy()) {
            let _next_time = std::fs::remove_file(file.path());
        }
    }
    let copies = Copies {
        controller,
        folder: Arc::new(folder.to_owned()),
        one: Arc::new(Semaphore::new(1)),
    };
    Router::new()
        .route("/private/backup", get(take))
        .with_state(copies)
}

/// Whether a file is a copy that was being made: people keep backups under names that are like it.
fn is_copy(name: &str) -> bool {
    let random = name
        .strip_prefix(COPY_PREFIX)
        .and_then(|rest| rest.get(..COPY_DIGITS))
        .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
    let ending = name.get(COPY_PREFIX.len() + COPY_DIGITS..);
    random.is_some() && ending.is_some_and(|ending| ending.starts_with(".db"))
}

async fn take(
    State(copies): State<Copies>,
    peer: Option<Extension<Peer>>,
) -> Result<Response, Problem> {
    if !peer.is_some_and(|peer| peer.is_owner()) {
        return Err(Problem::forbidden(
            "a backup is taken by the owner of this installation, over its private socket",
        ));
    }
    let Ok(permit) = Arc::clone(&copies.one).try_acquire_owned() else {
        let busy = Problem::conflict("backup_busy", "another backup is being made");
        return Err(busy.retry_after(10));
    };
    let (file, size) = copy(&copies).await?;
    let pieces = stream::try_unfold((file, permit), |(mut file, permit)| async move {
        let mut piece = vec![0; PIECE];
        let read = file.read(&mut piece).await?;
        piece.truncate(read);
        let more = (read > 0).then(|| (Bytes::from(piece), (file, permit)));
        Ok::<_, io::Error>(more)
    });
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("application/vnd.sqlite3");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    Ok(response)
}

/// A whole copy that has no name any more.
async fn copy(copies: &Copies) -> Result<(File, u64), Problem> {
    let db = &copies.controller.db;
    let entry = NewAudit {
        actor: "user:owner".to_owned(),
        tenant: None,
        action: "backup:create".to_owned(),
        target: "database".to_owned(),
        allowed: true,
        reason: None,
        detail: None,
    };
    db.audit(entry).await?;
    let name = format!("{COPY_PREFIX}{:016x}.db", crate::fleet::sweep::random());
    let path = copies.folder.join(name);
    let made = db.backup(&path).await;
    let opened = match made {
        Ok(()) => open(&path).await.map_err(|error| Problem::of_io(&error)),
        // A copy that could not even be begun is no matter of the database.
        Err(BackupError::Database(error)) if is_full(&copies.folder) => {
            Err(Problem::disk_full(&error))
        }
        Err(BackupError::Database(error)) => Err(error.into()),
        Err(BackupError::Write { source, .. }) => Err(Problem::of_io(&source)),
        Err(error @ BackupError::OwnTools) => {
            Err(Problem::conflict("own_tools", error.to_string()))
        }
        Err(error @ BackupError::Exists(_)) => Err(Problem::unavailable(&error)),
    };
    let _without_a_name = tokio::fs::remove_file(&path).await;
    opened
}

fn is_full(folder: &Path) -> bool {
    rustix::fs::statvfs(folder)
        .is_ok_and(|found| found.f_bavail.saturating_mul(found.f_frsize) < ROOM_MIN)
}

async fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = File::open(path).await?;
    let size = file.metadata().await?.len();
    Ok((file, size))
}

/// Puts a backup into a controller's folder while no controller runs there; what was there is kept under another name when `replace`.
/// Killed in between it leaves either database in place; running it again finishes it.
///
/// # Errors
/// See [`PutBackError`]; the database that was there is still there then.
pub async fn put_back(folder: &Path, from: &Path, replace: bool) -> Result<PutBack, PutBackError> {
    let _lock = server::lock(folder)?;
    let to = folder.join(DATABASE_FILE);
    if !to.exists() {
        let restored = Database::restore(from, &to).await?;
        return Ok(PutBack {
            restored,
            replaced: None,
        });
    }
    if !replace {
        return Err(PutBackError::Exists(to));
    }
    let new = folder.join(format!("{DATABASE_FILE}.new"));
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PutBackError::Move { path, source }
    };
    remove(&new).map_err(failed(&new))?;
    let restored = Database::restore(from, &new).await?;
    let now = crate::fleet::who::now_unix_ms();
    let replaced = folder.join(format!("{DATABASE_FILE}.replaced-{now}"));
    // Its log goes first: beside another database it would be read into that one.
    let log = beside(&to, "-wal");
    if log.exists() {
        std::fs::rename(&log, beside(&replaced, "-wal")).map_err(failed(&log))?;
    }
    let index = beside(&to, "-shm");
    remove(&index).map_err(failed(&index))?;
    std::fs::hard_link(&to, &replaced).map_err(failed(&to))?;
    std::fs::rename(&new, &to).map_err(failed(&new))?;
    Ok(PutBack {
        restored,
        replaced: Some(replaced),
    })
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_call_a_backup_is_theirs() {
        assert!(is_copy("backup-00ff00ff00ff00ff.db"));
        assert!(is_copy("backup-00ff00ff00ff00ff.db-journal"));
        for theirs in [
            "backup-2026-11-21.db",
            "backup-.db",
            "backup-before-the-update.db",
            "backup-00ff00ff00ff00ff",
            "kiln.db",
            "backup-\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}.db",
        ] {
            assert!(!is_copy(theirs), "{theirs}");
        }
    }
}
