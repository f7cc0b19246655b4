//! Backups of a database that is in use, and the new life that begins with one.
//!
//! SQLite: `VACUUM INTO`. PostgreSQL: the operator's `pg_dump` or base backup; kiln notices by the server's own identity that it looks
//! at another copy. Either way the incarnation goes up, so that no lease from before the restore is mistaken for a live one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_core::Lease;
use sqlx::Connection as _;

use crate::clock::{Clock, SystemClock};
use crate::database::{Database, Engine, write_tx};
use crate::engine::{Conn, Tx, args, sqlite};
use crate::error::DbError;
use crate::job::Live;
use crate::open::{self, FileMark, OpenError};
use crate::schema;

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// PostgreSQL has its own tools.
    #[error(
        "a PostgreSQL database is backed up by its own tools: pg_dump --format=custom, or a base backup"
    )]
    OwnTools,
    /// Something is there already.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// It cannot be written.
    #[error("the backup could not be written to {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Something is there already: move it away first.
    #[error("{} exists already: move it away before a restore", .0.display())]
    Exists(PathBuf),
    /// The backup is not good.
    #[error("the backup is not good")]
    NotGood(#[source] OpenError),
    /// A file cannot be read or written.
    #[error("{} cannot be read or written", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What was restored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Restored {
    /// The new life of the database.
    pub incarnation: u64,
    /// Leases of the former life that are dead now.
    pub leases_ended: u64,
}

impl Database {
    /// Writes a whole and checked copy of a SQLite database while it is in use.
    ///
    /// # Errors
    /// When something is there already, cannot be written, or the database is PostgreSQL.
    pub async fn backup(&self, to: &Path) -> Result<(), BackupError> {
        let Engine::Sqlite { path, .. } = &self.inner.engine else {
            return Err(BackupError::OwnTools);
        };
        if to.exists() {
            return Err(BackupError::Exists(to.to_owned()));
        }
        let part = beside(to, "part");
        let write = |path: &Path| {
            let path = path.to_owned();
            move |source| BackupError::Write { path, source }
        };
        // What an interrupted backup left.
        remove_if_there(&part).map_err(write(&part))?;
        let copied = vacuum_into(path, &part, &self.inner.clock).await;
        if let Err(error) = copied {
            let _left = remove_if_there(&part);
            return Err(error.into());
        }
        std::fs::File::open(&part)
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::hard_link(&part, to))
            .and_then(|()| std::fs::remove_file(&part))
            .and_then(|()| sync_folder(to))
            .map_err(write(to))
    }

    /// Makes a SQLite database from a backup: checks every page, begins a new life, gives leases of the former one up.
    ///
    /// # Errors
    /// When the backup is damaged, newer, or a raw copy of a file in use; or something is at `to`.
    pub async fn restore(from: &Path, to: &Path) -> Result<Restored, RestoreError> {
        if to.exists() || wal_of(to).exists() {
            return Err(RestoreError::Exists(to.to_owned()));
        }
        let part = beside(to, "part");
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| RestoreError::File { path, source }
        };
        remove_if_there(&part).map_err(file(&part))?;
        remove_if_there(&wal_of(&part)).map_err(file(&part))?;
        check_backup(from).await.map_err(RestoreError::NotGood)?;
        std::fs::copy(from, &part).map_err(file(&part))?;
        let restored = renew(&part).await.map_err(RestoreError::NotGood)?;
        std::fs::File::open(&part)
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::rename(&part, to))
            .and_then(|()| sync_folder(to))
            .map_err(file(to))?;
        Ok(restored)
    }

    /// Begins a new life of the database by hand: every lease is dead. For a PostgreSQL database that was put back from a backup in
    /// a way kiln cannot notice (a dump read into the same server under the same name). Open it again afterwards.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn begin_new_life(&self) -> Result<Restored, DbError> {
        write_tx!(self, "begin a new life", [], |tx| {
            let next = open::incarnation(tx).await? + 1;
            let leases_ended = end_leases(tx).await?;
            set_incarnation(tx, next).await?;
            Ok(Restored {
                incarnation: next,
                leases_ended,
            })
        })
    }
}

/// `name.db` to `name.db.part`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

fn wal_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    PathBuf::from(name)
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> std::io::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

async fn vacuum_into(path: &Path, to: &Path, clock: &Arc<dyn Clock>) -> Result<(), DbError> {
    let doing = "write a backup";
    let conn = sqlite::reader(path).await;
    let conn = conn.map_err(|error| DbError::query(doing, error))?;
    let mut tx = Tx::new(Conn::Writer(conn), doing, clock);
    let target = to.to_string_lossy().into_owned();
    tx.exec("vacuum into $1", args![target]).await?;
    if let Conn::Writer(conn) = tx.conn {
        let _closed = conn.close().await;
    }
    // A backup is nobody's file and not in use.
    let conn = sqlite::plain_writer(to).await;
    let conn = conn.map_err(|error| DbError::query(doing, error))?;
    let mut tx = Tx::new(Conn::Writer(conn), doing, clock);
    let mark = FileMark {
        inode: 0,
        in_use: false,
    };
    let sql = "update meta set value = $1 where key = 'file'";
    tx.exec(sql, args![crate::engine::json(&mark)]).await?;
    if let Conn::Writer(conn) = tx.conn {
        conn.close()
            .await
            .map_err(|error| DbError::query(doing, error))?;
    }
    Ok(())
}

/// Whether a file is a whole backup that this kiln can read.
async fn check_backup(from: &Path) -> Result<(), OpenError> {
    let place = format!("sqlite:{}", from.display());
    let wrap = |cause| OpenError::Failed {
        url: place.clone(),
        cause,
    };
    let conn = sqlite::reader(from).await;
    let conn = conn.map_err(|error| wrap(DbError::query("open the backup", error)))?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
    let mut tx = Tx::new(Conn::Writer(conn), "check the backup", &clock);
    open::check_file(&mut tx, "pragma integrity_check(1)", &place).await?;
    let found = schema::version(&mut tx).await.map_err(wrap)?;
    open::refuse_newer(found, None, &place)?;
    if found == 0 {
        return Err(OpenError::Damaged {
            url: place,
            detail: "it is no database of kiln".to_owned(),
        });
    }
    let mark = open::file_mark(&mut tx).await.map_err(wrap)?;
    if mark.is_some_and(|mark| mark.in_use) {
        return Err(OpenError::RawCopy { url: place });
    }
    if let Conn::Writer(conn) = tx.conn {
        let _closed = conn.close().await;
    }
    Ok(())
}

/// Begins the new life in a copied file.
async fn renew(file: &Path) -> Result<Restored, OpenError> {
    let place = format!("sqlite:{}", file.display());
    let wrap = |cause| OpenError::Failed {
        url: place.clone(),
        cause,
    };
    let conn = sqlite::plain_writer(file).await;
    let conn = conn.map_err(|error| wrap(DbError::query("open the copy", error)))?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
    let mut tx = Tx::new(Conn::Writer(conn), "begin a new life", &clock);
    tx.exec("begin immediate", args![]).await.map_err(wrap)?;
    schema::migrate(&mut tx, None).await.map_err(wrap)?;
    let incarnation = open::incarnation(&mut tx).await.map_err(wrap)? + 1;
    let leases_ended = end_leases(&mut tx).await.map_err(wrap)?;
    set_incarnation(&mut tx, incarnation).await.map_err(wrap)?;
    open::mark(&mut tx, file, false).await.map_err(wrap)?;
    tx.exec("commit", args![]).await.map_err(wrap)?;
    if let Conn::Writer(conn) = tx.conn {
        let closed = conn.close().await;
        closed.map_err(|error| wrap(DbError::query("close the copy", error)))?;
    }
    Ok(Restored {
        incarnation,
        leases_ended,
    })
}

/// Begins a life; gives its number.
pub(crate) async fn begin_life(tx: &mut Tx, incarnation: u64) -> Result<u64, DbError> {
    end_leases(tx).await?;
    set_incarnation(tx, incarnation).await?;
    Ok(incarnation)
}

async fn set_incarnation(tx: &mut Tx, incarnation: u64) -> Result<(), DbError> {
    let sql = "update meta set value = $1 where key = 'incarnation'";
    tx.exec(sql, args![incarnation.to_string()]).await?;
    tx.exec(
        "update leaders set until_ms = 0, epoch = epoch + 1",
        args![],
    )
    .await
    .map(drop)
}

/// Gives up every lease, as lost.
async fn end_leases(tx: &mut Tx) -> Result<u64, DbError> {
    let sql = "select j.* from jobs j where j.worker is not null order by j.id /*lock j*/";
    let mut ended = 0;
    for row in tx.rows(sql, args![]).await? {
        let live = Live::from_row(&row)?;
        let Some(lease) = live.lease() else { continue };
        let now = tx.now().await?;
        let lease = Lease {
            deadline_unix_ms: lease.deadline_unix_ms.min(now),
            ..lease
        };
        crate::expire::give_up(tx, &live, &lease, 0).await?;
        ended += 1;
    }
    Ok(ended)
}

/// PostgreSQL: begins a new life when the database is on another server, or another database of it, than before.
pub(crate) async fn notice_other_server(tx: &mut Tx, incarnation: u64) -> Result<u64, DbError> {
    let sql = "select cast(c.system_identifier as text) || '/' || cast(d.oid as text) as name
        from pg_control_system() c, pg_database d where d.datname = current_database()";
    let row = tx.row(sql, args![]).await?;
    let name = row.ok_or(DbError::missing("name"))?.text("name")?;
    let row = tx.row(
        "select value from meta where key = 'server' /*lock meta*/",
        args![],
    );
    let known = row.await?.map(|row| row.text("value")).transpose()?;
    if known.as_deref() == Some(name.as_str()) {
        return Ok(incarnation);
    }
    let sql = "insert into meta (key, value) values ('server', $1)
        on conflict (key) do update set value = excluded.value";
    tx.exec(sql, args![name]).await?;
    if known.is_none() {
        return Ok(incarnation);
    }
    tracing::warn!("the database was moved or restored: leases of its former life are dead");
    begin_life(tx, incarnation + 1).await
}
