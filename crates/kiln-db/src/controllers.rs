//! Controllers of one database: what they must agree on, where each is reached, and which of them keeps the log of an attempt.

use kiln_core::AttemptId;

use crate::database::{Database, write_tx};
use crate::engine::args;
use crate::error::DbError;

/// A controller that was silent this long is forgotten, milliseconds.
const FORGET_MS: u64 = 30 * 24 * 3600 * 1000;
/// Most controllers that are told.
const CONTROLLERS_MAX: u32 = 64;

/// A controller, as it tells the others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Controller {
    /// Its name for as long as its folder lives.
    pub id: String,
    /// Its process, a name that is never used again.
    pub process: String,
    /// Where the others reach it; none when they cannot.
    pub url: Option<String>,
    /// Digest of all keys it signs and verifies with.
    pub keys: String,
    /// When it was last heard of, by the database's clock.
    pub seen_unix_ms: u64,
}

/// What is recorded of something that all controllers must agree on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Settled {
    /// It is as asked: it was before, or nothing was recorded.
    Same,
    /// This is recorded, and stays.
    Other(String),
}

impl Database {
    /// Whether several controllers can share this database.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.inner.engine, crate::database::Engine::Postgres { .. })
    }

    /// Records a fact that all controllers of this database share, unless another value is recorded; with `replace` in any case.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn settle(
        &self,
        fact: &'static str,
        value: &str,
        replace: bool,
    ) -> Result<Settled, DbError> {
        let (key, value) = (format!("shared.{fact}"), value.to_owned());
        write_tx!(self, "agree with other controllers", [key, value], |tx| {
            let sql = "insert into meta (key, value) values ($1, $2) on conflict (key) do nothing";
            tx.exec(sql, args![key.as_str(), value.as_str()]).await?;
            if replace {
                let sql = "update meta set value = $2 where key = $1";
                tx.exec(sql, args![key.as_str(), value.as_str()]).await?;
            }
            let sql = "select value from meta where key = $1";
            let row = tx.row(sql, args![key.as_str()]).await?;
            let known = row.ok_or(DbError::missing("value"))?.text("value")?;
            Ok(match known == *value {
                true => Settled::Same,
                false => Settled::Other(known),
            })
        })
    }

    /// A fact that was recorded by [`Database::settle`].
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn settled(&self, fact: &'static str) -> Result<Option<String>, DbError> {
        let key = format!("shared.{fact}");
        self.read("read what is agreed on", |tx| {
            Box::pin(async move {
                let sql = "select value from meta where key = $1";
                let row = tx.row(sql, args![key]).await?;
                row.map(|row| row.text("value")).transpose()
            })
        })
        .await
    }

    /// Says that a controller lives; its `seen_unix_ms` is the database's own.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn controller_lives(&self, own: &Controller) -> Result<(), DbError> {
        let own = own.clone();
        write_tx!(self, "say that it lives", [own], |tx| {
            let now = tx.now().await?;
            let sql = "insert into controllers (id, process, url, keys, seen_ms) values ($1, $2, $3, $4, $5)
                on conflict (id) do update set process = excluded.process, url = excluded.url, keys = excluded.keys,
                    seen_ms = excluded.seen_ms";
            let values = args![
                own.id.as_str(),
                own.process.as_str(),
                own.url.as_deref(),
                own.keys.as_str(),
                now,
            ];
            tx.exec(sql, values).await?;
            let sql = "delete from controllers where seen_ms < $1";
            tx.exec(sql, args![now.saturating_sub(FORGET_MS)])
                .await
                .map(drop)
        })
    }

    /// Says that a controller stops. Its row stays: logs it keeps are found when it comes back.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn controller_leaves(&self, id: &str, process: &str) -> Result<(), DbError> {
        let (id, process) = (id.to_owned(), process.to_owned());
        write_tx!(self, "say that it stops", [id, process], |tx| {
            let sql = "update controllers set url = null where id = $1 and process = $2";
            tx.exec(sql, args![id.as_str(), process.as_str()])
                .await
                .map(drop)
        })
    }

    /// All controllers, the one that was heard of last first, and the database's time.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn controllers(&self) -> Result<(Vec<Controller>, u64), DbError> {
        self.read("list controllers", |tx| {
            Box::pin(async move {
                let sql = "select id, process, url, keys, seen_ms from controllers order by seen_ms desc limit $1";
                let rows = tx.rows(sql, args![CONTROLLERS_MAX]).await?;
                let read = |row: &crate::engine::Row| {
                    Ok(Controller {
                        id: row.text("id")?,
                        process: row.text("process")?,
                        url: row.opt_text("url")?,
                        keys: row.text("keys")?,
                        seen_unix_ms: row.u64("seen_ms")?,
                    })
                };
                let all = rows.iter().map(read).collect::<Result<_, DbError>>()?;
                Ok((all, tx.now().await?))
            })
        })
        .await
    }

    /// The controller that keeps the log of an attempt; none before the first piece.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn log_home(&self, attempt: &AttemptId) -> Result<Option<String>, DbError> {
        let attempt = attempt.clone();
        self.read("find the home of a log", |tx| {
            Box::pin(async move {
                let sql = "select log_home from attempts where job = $1 and number = $2";
                let row = tx.row(sql, args![attempt.job.as_str(), attempt.number]);
                let home = row.await?.map(|row| row.text("log_home")).transpose()?;
                Ok(home.filter(|home| !home.is_empty()))
            })
        })
        .await
    }
}
