//! PostgreSQL connections: a bounded pool, timeouts on the server's side, and transactions that are tried again when another was
//! in the way.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _, Pool, Postgres};

use super::{Conn, Tx};
use crate::clock::Clock;
use crate::error::{Cause, DbError};
use crate::wake::Wakes;

/// Tries of one transaction that others were in the way of.
const TRIES_MAX: u32 = 8;
/// Wait before the second try; doubled for each further one.
const TRY_AGAIN: Duration = Duration::from_millis(5);
/// Connections tried for one transaction.
const BEGIN_MAX: u32 = 32;
/// Longest wait for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for a row lock, shorter than a lease's grace: a time read before the wait stays true enough.
const LOCK_TIMEOUT: &str = "3s";

/// The pool; connects when first used.
pub(crate) fn pool(
    options: PgConnectOptions,
    connections: u32,
    statement_timeout: Duration,
) -> Pool<Postgres> {
    let options = options
        .application_name("kiln")
        .options([
            (
                "statement_timeout",
                statement_timeout.as_millis().to_string(),
            ),
            ("lock_timeout", LOCK_TIMEOUT.to_owned()),
            (
                "idle_in_transaction_session_timeout",
                statement_timeout.as_millis().to_string(),
            ),
            ("synchronous_commit", "on".to_owned()),
            ("client_min_messages", "warning".to_owned()),
        ])
        .statement_cache_capacity(super::STATEMENTS_MAX)
        .disable_statement_logging();
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // Whoever takes one looks by itself whether it lives.
        .test_before_acquire(false)
        .connect_lazy_with(options)
}

/// A connection that lives: one that died while it was idle (the server was restarted) is replaced.
pub(crate) async fn alive(pool: &Pool<Postgres>) -> Result<PoolConnection<Postgres>, sqlx::Error> {
    let mut tries = 1;
    loop {
        let mut conn = pool.acquire().await?;
        match conn.ping().await {
            Ok(()) => return Ok(conn),
            Err(error) if tries >= BEGIN_MAX => return Err(error),
            // Else the pool would hand it out again.
            Err(_) => drop(conn.detach()),
        }
        tries += 1;
    }
}

/// Begins a transaction. A connection that died while it was idle (the server was restarted) is replaced: nothing was done on it.
pub(crate) async fn begin(
    pool: &Pool<Postgres>,
    doing: &'static str,
    sql: &'static str,
) -> Result<sqlx::Transaction<'static, Postgres>, DbError> {
    let mut tries = 1;
    loop {
        match pool.begin_with(sql).await {
            Ok(begun) => return Ok(begun),
            Err(error) => {
                let waited = matches!(error, sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed);
                let error = DbError::query(doing, error);
                if waited || tries >= BEGIN_MAX || !matches!(error, DbError::Unavailable { .. }) {
                    return Err(error);
                }
                tries += 1;
            }
        }
    }
}

/// Runs a transaction to its end, also when its caller goes away.
pub(crate) async fn write<F, T>(
    pool: &Pool<Postgres>,
    clock: &Arc<dyn Clock>,
    wakes: &Wakes,
    doing: &'static str,
    body: F,
) -> Result<T, DbError>
where
    F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Result<T, DbError>> + Send + Sync + 'static,
    T: Send + 'static,
{
    let (pool, clock, wakes) = (pool.clone(), Arc::clone(clock), wakes.clone());
    let carried = tokio::spawn(async move {
        let mut wait = TRY_AGAIN;
        let mut tries = 1;
        loop {
            match once(&pool, &clock, &wakes, doing, &body).await {
                Err(error) if error.is_contention() && tries < TRIES_MAX => {
                    tokio::time::sleep(wait).await;
                    wait *= 2;
                    tries += 1;
                }
                other => return other,
            }
        }
    });
    carried.await.unwrap_or_else(|error| {
        Err(DbError::Failed {
            doing,
            cause: Cause::other(error),
        })
    })
}

async fn once<F, T>(
    pool: &Pool<Postgres>,
    clock: &Arc<dyn Clock>,
    wakes: &Wakes,
    doing: &'static str,
    body: &F,
) -> Result<T, DbError>
where
    F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Result<T, DbError>> + Send + Sync + 'static,
{
    let begun = begin(pool, doing, "begin").await?;
    let mut tx = Tx::new(Conn::PostgresTx(begun), doing, clock);
    let value = body(&mut tx).await?;
    let Tx {
        conn, wakes: woken, ..
    } = tx;
    if let Conn::PostgresTx(transaction) = conn {
        let committed = transaction.commit().await;
        committed.map_err(|error| DbError::query(doing, error))?;
    }
    wakes.send(woken);
    Ok(value)
}
