//! The handle: opens, migrates and closes a database, and runs transactions on either engine.
//!
//! Operations are in the modules named after what they change.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::{Pool, Postgres, Sqlite};
use tokio::sync::broadcast;

use crate::clock::{Clock, SystemClock};
use crate::engine::writer::Writer;
use crate::engine::{Conn, Tx, postgres};
use crate::error::DbError;
use crate::wake::{Wake, Wakes};

/// How a database is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Counts deadlines on SQLite; PostgreSQL has its own clock.
    pub clock: Arc<dyn Clock>,
    /// Life of a lease and the time until a lost one is given away.
    pub lease: LeaseTimes,
    /// How long a database that cannot be reached is waited for.
    pub patience: Duration,
    /// Most connections to PostgreSQL.
    pub connections: u32,
    /// Longest time one statement may take on PostgreSQL.
    pub statement_timeout: Duration,
    /// Every commit and every read takes this much longer: for tests of what a slow database does to everybody else.
    pub delay: Duration,
    /// One more step of the schema, as a newer kiln would take it: for tests of updates.
    pub later: Option<&'static str>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            clock: Arc::new(SystemClock::default()),
            lease: LeaseTimes::default(),
            patience: Duration::from_secs(30),
            connections: 16,
            statement_timeout: Duration::from_secs(10),
            delay: Duration::ZERO,
            later: None,
        }
    }
}

/// Times of the lease protocol, milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseTimes {
    /// A lease lives this long after its last heartbeat.
    pub ttl_ms: u64,
    /// And is given away this much later.
    pub grace_ms: u64,
}

impl Default for LeaseTimes {
    fn default() -> Self {
        Self {
            ttl_ms: 15_000,
            grace_ms: 5_000,
        }
    }
}

/// A controller's durable state. Clones share it.
#[derive(Clone)]
pub struct Database {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) engine: Engine,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) lease: LeaseTimes,
    pub(crate) wakes: Wakes,
    pub(crate) incarnation: u64,
    pub(crate) history: crate::view::HistoryCache,
    pub(crate) delay: Duration,
}

pub(crate) enum Engine {
    Sqlite {
        path: PathBuf,
        writer: Writer,
        readers: Pool<Sqlite>,
    },
    Postgres {
        pool: Pool<Postgres>,
    },
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let engine = match &self.inner.engine {
            Engine::Sqlite { path, .. } => format!("sqlite:{}", path.display()),
            Engine::Postgres { .. } => "postgres".to_owned(),
        };
        f.debug_struct("Database")
            .field("engine", &engine)
            .field("incarnation", &self.inner.incarnation)
            .finish_non_exhaustive()
    }
}

impl Database {
    /// Which life of the database this is; a restore begins another.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.inner.incarnation
    }

    /// Times of the lease protocol.
    #[must_use]
    pub fn lease_times(&self) -> LeaseTimes {
        self.inner.lease
    }

    /// Wake-ups after commits. A listener that is too slow gets `Lagged`, and looks at everything.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Wake> {
        self.inner.wakes.here.subscribe()
    }

    /// Now by the database's clock, milliseconds since the Unix epoch.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn now(&self) -> Result<u64, DbError> {
        self.read("tell the time", |tx| Box::pin(tx.now())).await
    }

    /// Runs a transaction that changes something. The body may run more than once; only the run that commits counts.
    pub(crate) async fn write<F, T>(&self, doing: &'static str, body: F) -> Result<T, DbError>
    where
        F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Result<T, DbError>> + Send + Sync + 'static,
        T: Send + 'static,
    {
        let inner = &self.inner;
        match &inner.engine {
            Engine::Sqlite { writer, .. } => writer.write(doing, body).await,
            Engine::Postgres { pool } => {
                slowly(inner.delay).await;
                postgres::write(pool, &inner.clock, &inner.wakes, doing, body).await
            }
        }
    }

    /// Reads with single statements.
    pub(crate) async fn read<F, T>(&self, doing: &'static str, body: F) -> Result<T, DbError>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T, DbError>>,
    {
        slowly(self.inner.delay).await;
        let conn = match &self.inner.engine {
            Engine::Sqlite { readers, .. } => readers.acquire().await.map(Conn::Sqlite),
            Engine::Postgres { pool } => postgres::alive(pool).await.map(Conn::Postgres),
        };
        let conn = conn.map_err(|error| DbError::query(doing, error))?;
        body(&mut Tx::new(conn, doing, &self.inner.clock)).await
    }

    /// Reads with several statements that see one state.
    pub(crate) async fn snapshot<F, T>(&self, doing: &'static str, body: F) -> Result<T, DbError>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T, DbError>>,
    {
        slowly(self.inner.delay).await;
        let conn = match &self.inner.engine {
            Engine::Sqlite { readers, .. } => {
                let begun = readers.begin().await;
                Conn::SqliteSnapshot(begun.map_err(|error| DbError::query(doing, error))?)
            }
            Engine::Postgres { pool } => {
                let sql = "begin isolation level repeatable read read only";
                Conn::PostgresTx(postgres::begin(pool, doing, sql).await?)
            }
        };
        body(&mut Tx::new(conn, doing, &self.inner.clock)).await
    }
}

/// Waits for as long as a test wants everything to take.
pub(crate) async fn slowly(delay: Duration) {
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
}

/// Runs a transaction with arguments that it may need more than once.
macro_rules! write_tx {
    ($db:expr, $doing:literal, [$($arg:ident),* $(,)?], |$tx:ident| $body:expr) => {{
        $(let $arg = std::sync::Arc::new($arg);)*
        $db.write($doing, move |$tx| {
            $(let $arg = std::sync::Arc::clone(&$arg);)*
            Box::pin(async move { $body })
        })
        .await
    }};
}
pub(crate) use write_tx;
