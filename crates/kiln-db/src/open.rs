//! Opening: waits for a database that is not there yet, refuses a newer schema, a damaged file and a raw copy, and brings an older
//! schema up to date.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::database::{Database, Engine, Inner, OpenOptions};
use crate::engine::writer::Writer;
use crate::engine::{Conn, Tx, args, json, postgres, sqlite};
use crate::error::{Cause, DbError};
use crate::schema;
use crate::tenant::{PENDING_MAX_USUAL, STORED_MAX_USUAL};
use crate::url::{DatabaseUrl, PostgresUrl};
use crate::wake::Wakes;

/// First wait before an unreachable server is tried again; doubled up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Longest wait between two tries.
const RETRY_MAX: Duration = Duration::from_secs(2);
/// A larger file is not read through at every start; [`Database::check`] reads it.
const CHECK_BYTES_MAX: u64 = 256 << 20;
/// The oldest PostgreSQL that kiln is tested with.
const POSTGRES_MIN: u32 = 150_000;

/// Why a database was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It did not answer for as long as it was waited for.
    #[error("the database {url} could not be reached for {waited_ms} ms")]
    Unreachable {
        /// Where.
        url: String,
        /// How long it was tried.
        waited_ms: u64,
        /// The last try.
        #[source]
        cause: DbError,
    },
    /// A newer kiln wrote it.
    #[error(
        "the database {url} has schema {found}, this kiln knows schemas up to {known}: use the newer kiln that wrote it"
    )]
    Newer {
        /// Where.
        url: String,
        /// Its schema.
        found: u32,
        /// The newest known one.
        known: u32,
    },
    /// The file is damaged.
    #[error("the database {url} is damaged ({detail}): restore a backup")]
    Damaged {
        /// Where.
        url: String,
        /// What the check found first.
        detail: String,
    },
    /// The file is a copy that was made while it was in use.
    #[error(
        "the database {url} is a raw copy of one that was in use, so parts of it may be missing: restore a backup made by kiln, or copy the file after its controller has stopped"
    )]
    RawCopy {
        /// Where.
        url: String,
    },
    /// PostgreSQL is too old.
    #[error("the PostgreSQL server of {url} has version {found}, kiln needs 15 or newer")]
    ServerTooOld {
        /// Where.
        url: String,
        /// Its version.
        found: String,
    },
    /// It answered with an error.
    #[error("the database {url} could not be opened")]
    Failed {
        /// Where.
        url: String,
        /// Why.
        #[source]
        cause: DbError,
    },
}

/// Which file this is and whether it is in use: what tells a raw copy from the file itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct FileMark {
    pub(crate) inode: u64,
    pub(crate) in_use: bool,
}

impl Database {
    /// Opens a database, makes it when there is none, and brings its schema up to date. For the controller: opening a SQLite file
    /// lets its leases live for one TTL more and ends every lead, so exactly one process may have it open.
    ///
    /// # Errors
    /// When it cannot be reached for as long as the options say, is damaged, was copied while in use, or is newer than this kiln.
    pub async fn open(url: &DatabaseUrl, options: OpenOptions) -> Result<Self, OpenError> {
        let wakes = Wakes::new();
        let place = url.to_string();
        let (engine, incarnation) = match url {
            DatabaseUrl::Sqlite(path) => open_file(path, &place, &options, &wakes).await?,
            DatabaseUrl::Postgres(server) => {
                let opened = open_server(server, &place, &options).await?;
                if let Engine::Postgres { pool } = &opened.0 {
                    crate::notify::start(pool, &wakes);
                }
                opened
            }
        };
        let inner = Inner {
            engine,
            clock: options.clock,
            lease: options.lease,
            wakes,
            incarnation,
            history: crate::view::HistoryCache::default(),
            delay: options.delay,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Reads a SQLite file through and checks every page and index, while it is in use. PostgreSQL has its own checks (`amcheck`).
    ///
    /// # Errors
    /// When something is damaged, or the file cannot be read.
    pub async fn check(&self) -> Result<(), OpenError> {
        let Engine::Sqlite { path, .. } = &self.inner.engine else {
            return Ok(());
        };
        let place = format!("sqlite:{}", path.display());
        let conn = sqlite::reader(path).await;
        let conn = conn.map_err(|error| failed(&place, DbError::query("open its file", error)))?;
        let mut tx = Tx::new(Conn::Writer(conn), "check its file", &self.inner.clock);
        check_file(&mut tx, "pragma integrity_check(1)", &place).await
    }

    /// Waits for changes that were asked for, says in the file that it is no longer in use, and closes it.
    pub async fn close(&self) {
        match &self.inner.engine {
            Engine::Sqlite {
                path,
                writer,
                readers,
            } => {
                readers.close().await;
                let path = path.clone();
                let marked = writer.write("mark the file as closed", move |tx| {
                    let path = path.clone();
                    Box::pin(async move { mark(tx, &path, false).await })
                });
                if let Err(error) = marked.await {
                    tracing::warn!(%error, "the database file could not be marked as closed");
                }
                writer.close().await;
            }
            Engine::Postgres { pool } => pool.close().await,
        }
    }
}

fn failed(place: &str, cause: DbError) -> OpenError {
    match cause {
        DbError::Damaged { cause, .. } => OpenError::Damaged {
            url: place.to_owned(),
            detail: cause.to_string(),
        },
        cause => OpenError::Failed {
            url: place.to_owned(),
            cause,
        },
    }
}

async fn open_file(
    path: &Path,
    place: &str,
    options: &OpenOptions,
    wakes: &Wakes,
) -> Result<(Engine, u64), OpenError> {
    let wrap = |cause| failed(place, cause);
    let conn = sqlite::writer(path, true).await;
    let conn = conn.map_err(|error| wrap(DbError::query("open its file", error)))?;
    let mut tx = Tx::new(Conn::Writer(conn), "open its file", &options.clock);
    let incarnation = prepare_file(&mut tx, path, place, options).await?;
    let Conn::Writer(conn) = tx.conn else {
        return Err(wrap(DbError::Closed));
    };
    let engine = Engine::Sqlite {
        path: PathBuf::from(path),
        writer: Writer::start(conn, &options.clock, wakes.clone(), options.delay),
        readers: sqlite::readers(path),
    };
    Ok((engine, incarnation))
}

/// Checks and migrates a file; gives its incarnation.
async fn prepare_file(
    tx: &mut Tx,
    path: &Path,
    place: &str,
    options: &OpenOptions,
) -> Result<u64, OpenError> {
    let wrap = |cause| failed(place, cause);
    let size = std::fs::metadata(path).map_or(0, |found| found.len());
    if size <= CHECK_BYTES_MAX {
        check_file(tx, "pragma quick_check(1)", place).await?;
    }
    let found = schema::version(tx).await.map_err(wrap)?;
    refuse_newer(found, options.later, place)?;
    let inode = inode_of(path).map_err(wrap)?;
    let known = if found == 0 {
        None
    } else {
        file_mark(tx).await.map_err(wrap)?
    };
    let copied = known.as_ref().is_some_and(|mark| mark.inode != inode);
    if copied && known.is_some_and(|mark| mark.in_use) {
        return Err(OpenError::RawCopy {
            url: place.to_owned(),
        });
    }
    if copied {
        check_file(tx, "pragma integrity_check(1)", place).await?;
    }
    tx.exec("begin immediate", args![]).await.map_err(wrap)?;
    schema::migrate(tx, options.later).await.map_err(wrap)?;
    let incarnation = first_rows(tx).await.map_err(wrap)?;
    let incarnation = if copied {
        // Leases of the file that this was copied from may be alive elsewhere.
        crate::restore::begin_life(tx, incarnation + 1)
            .await
            .map_err(wrap)?
    } else {
        incarnation
    };
    crate::expire::settle(tx, options.lease)
        .await
        .map_err(wrap)?;
    // A file has one controller at a time: whoever scheduled from it is gone.
    let sql = "update leaders set until_ms = 0";
    tx.exec(sql, args![]).await.map_err(wrap)?;
    mark(tx, path, true).await.map_err(wrap)?;
    tx.exec("commit", args![]).await.map_err(wrap)?;
    // The mark must be in the file itself, not in its log: a copy of the file alone shows it then.
    let truncated = tx.row("pragma wal_checkpoint(truncate)", args![]).await;
    truncated.map_err(wrap)?;
    tx.wakes.clear();
    Ok(incarnation)
}

/// Runs one of SQLite's own checks.
pub(crate) async fn check_file(
    tx: &mut Tx,
    check: &'static str,
    place: &str,
) -> Result<(), OpenError> {
    let rows = tx.rows(check, args![]).await;
    let rows = rows.map_err(|cause| failed(place, cause))?;
    let word = rows.first().map(|row| match row {
        crate::engine::Row::Sqlite(row) => sqlx::Row::try_get::<String, _>(row, 0).ok(),
        crate::engine::Row::Postgres(_) => None,
    });
    match word.flatten().as_deref() {
        Some("ok") => Ok(()),
        other => Err(OpenError::Damaged {
            url: place.to_owned(),
            detail: other.unwrap_or("the check gave no answer").to_owned(),
        }),
    }
}

pub(crate) fn refuse_newer(
    found: u32,
    later: Option<&'static str>,
    place: &str,
) -> Result<(), OpenError> {
    let known = schema::known(later);
    if found > known {
        return Err(OpenError::Newer {
            url: place.to_owned(),
            found,
            known,
        });
    }
    Ok(())
}

fn inode_of(path: &Path) -> Result<u64, DbError> {
    let found = std::fs::metadata(path);
    let found = found.map_err(|error| DbError::Unavailable {
        doing: "look at its file",
        cause: Cause::other(error),
    })?;
    Ok(found.ino())
}

pub(crate) async fn file_mark(tx: &mut Tx) -> Result<Option<FileMark>, DbError> {
    let row = tx.row("select value from meta where key = 'file'", args![]);
    row.await?.map(|row| row.json("value")).transpose()
}

/// Says in the file which file it is and whether it is in use.
pub(crate) async fn mark(tx: &mut Tx, path: &Path, in_use: bool) -> Result<(), DbError> {
    let mark = FileMark {
        inode: inode_of(path)?,
        in_use,
    };
    let sql = "insert into meta (key, value) values ('file', $1)
        on conflict (key) do update set value = excluded.value";
    tx.exec(sql, args![json(&mark)]).await.map(drop)
}

/// What every database has; gives its incarnation.
async fn first_rows(tx: &mut Tx) -> Result<u64, DbError> {
    let now = tx.now().await?;
    let sql = "insert into meta (key, value) values ('incarnation', '1'), ('limits', '{}')
        on conflict (key) do nothing";
    tx.exec(sql, args![]).await?;
    let sql = "insert into tenants (name, weight, pending_max, stored_max, hold, created_ms)
        values ('local', 100, $2, $3, 0, $1)
        on conflict (name) do nothing";
    tx.exec(sql, args![now, PENDING_MAX_USUAL, STORED_MAX_USUAL])
        .await?;
    let sql =
        "insert into queues (name, pool, weight, created_ms) values ('default', 'default', 100, $1)
        on conflict (name) do nothing";
    tx.exec(sql, args![now]).await?;
    incarnation(tx).await
}

/// The live incarnation.
pub(crate) async fn incarnation(tx: &mut Tx) -> Result<u64, DbError> {
    let row = tx.row("select value from meta where key = 'incarnation'", args![]);
    row.await?
        .ok_or(DbError::missing("incarnation"))?
        .parse("value")
}

async fn open_server(
    server: &PostgresUrl,
    place: &str,
    options: &OpenOptions,
) -> Result<(Engine, u64), OpenError> {
    let pool = postgres::pool(
        (*server.0).clone(),
        options.connections.max(2),
        options.statement_timeout,
    );
    let began = Instant::now();
    let mut wait = RETRY_FIRST;
    loop {
        match prepare_server(&pool, place, &options.clock).await {
            Ok(incarnation) => return Ok((Engine::Postgres { pool }, incarnation)),
            Err(OpenError::Failed {
                cause: cause @ (DbError::Unavailable { .. } | DbError::Busy { .. }),
                ..
            }) => {
                if began.elapsed() + wait > options.patience {
                    return Err(OpenError::Unreachable {
                        url: place.to_owned(),
                        waited_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
                        cause,
                    });
                }
                tracing::warn!(database = place, error = %cause, "the database cannot be reached, trying again");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_MAX);
            }
            Err(other) => return Err(other),
        }
    }
}

async fn prepare_server(
    pool: &sqlx::Pool<sqlx::Postgres>,
    place: &str,
    clock: &Arc<dyn Clock>,
) -> Result<u64, OpenError> {
    let wrap = |cause| failed(place, cause);
    let begun = pool.begin().await;
    let begun = begun.map_err(|error| wrap(DbError::query("connect", error)))?;
    let mut tx = Tx::new(Conn::PostgresTx(begun), "set up the database", clock);
    let sql = "select cast(current_setting('server_version_num') as bigint) as number,
        current_setting('server_version') as version";
    let row = tx.row(sql, args![]).await.map_err(wrap)?;
    let row = row.ok_or(wrap(DbError::missing("version")))?;
    if row.u32("number").map_err(wrap)? < POSTGRES_MIN {
        return Err(OpenError::ServerTooOld {
            url: place.to_owned(),
            found: row.text("version").map_err(wrap)?,
        });
    }
    let found = schema::version(&mut tx).await.map_err(wrap)?;
    refuse_newer(found, None, place)?;
    let after = schema::migrate(&mut tx, None).await.map_err(wrap)?;
    refuse_newer(after, None, place)?;
    let incarnation = first_rows(&mut tx).await.map_err(wrap)?;
    let incarnation = crate::restore::notice_other_server(&mut tx, incarnation)
        .await
        .map_err(wrap)?;
    if let Conn::PostgresTx(transaction) = tx.conn {
        let committed = transaction.commit().await;
        committed.map_err(|error| wrap(DbError::query("set up the database", error)))?;
    }
    Ok(incarnation)
}
