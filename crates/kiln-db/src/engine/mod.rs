//! One way to speak to two engines: SQL text with `$1`, values that are numbers or texts, rows by column name.
//!
//! Nothing here knows a table. Every statement of this crate is one text for both engines; three marks in it are read:
//! `json_each(` (rows of a JSON array), `/*lock t*/` and `/*lock t skip*/` (row locks, which SQLite's single writer does not need).
//! Next: [`writer`] (SQLite's group commit), [`postgres`].

pub(crate) mod postgres;
pub(crate) mod sqlite;
pub(crate) mod writer;

use std::borrow::Cow;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::pool::PoolConnection;
use sqlx::{Arguments as _, AssertSqlSafe, Postgres, Row as _, Sqlite, SqliteConnection};

use crate::clock::Clock;
use crate::error::{Cause, DbError};
use crate::wake::Wake;

/// Prepared statements kept by one connection: more than this crate has.
const STATEMENTS_MAX: usize = 256;

/// A value of a statement.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Int(Option<i64>),
    Text(Option<String>),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(Some(value))
    }
}

impl From<Option<i64>> for Value {
    fn from(value: Option<i64>) -> Self {
        Self::Int(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Int(Some(signed(value)))
    }
}

impl From<Option<u64>> for Value {
    fn from(value: Option<u64>) -> Self {
        Self::Int(value.map(signed))
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Int(Some(i64::from(value)))
    }
}

impl From<Option<u32>> for Value {
    fn from(value: Option<u32>) -> Self {
        Self::Int(value.map(i64::from))
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Int(Some(i64::from(value)))
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::from(value.to_owned())
    }
}

impl From<String> for Value {
    /// PostgreSQL keeps no NUL in a text, so nobody does.
    fn from(value: String) -> Self {
        Self::Text(Some(if value.contains('\0') {
            value.replace('\0', "\u{fffd}")
        } else {
            value
        }))
    }
}

impl From<Option<String>> for Value {
    fn from(value: Option<String>) -> Self {
        value.map_or(Self::Text(None), Self::from)
    }
}

impl From<Option<&str>> for Value {
    fn from(value: Option<&str>) -> Self {
        value.map_or(Self::Text(None), Self::from)
    }
}

/// Values of a statement, in the order of `$1`, `$2`, ...
macro_rules! args {
    ($($value:expr),* $(,)?) => { vec![$($crate::engine::Value::from($value)),*] };
}
pub(crate) use args;

/// The largest number a column holds is the bound of anything larger.
pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The JSON text of a value of ours.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> String {
    // Only maps with keys that are no text fail, and kiln has none.
    serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}

/// A row of either engine.
pub(crate) enum Row {
    Sqlite(sqlx::sqlite::SqliteRow),
    Postgres(sqlx::postgres::PgRow),
}

impl Row {
    pub(crate) fn opt_int(&self, name: &'static str) -> Result<Option<i64>, DbError> {
        match self {
            Self::Sqlite(row) => row.try_get_unchecked(name),
            Self::Postgres(row) => row.try_get_unchecked(name),
        }
        .map_err(|error| DbError::row(name, error))
    }

    pub(crate) fn int(&self, name: &'static str) -> Result<i64, DbError> {
        self.opt_int(name)?.ok_or(DbError::missing(name))
    }

    pub(crate) fn opt_u64(&self, name: &'static str) -> Result<Option<u64>, DbError> {
        self.opt_int(name)?
            .map(|value| u64::try_from(value).map_err(|_| DbError::unreadable(name, value)))
            .transpose()
    }

    pub(crate) fn u64(&self, name: &'static str) -> Result<u64, DbError> {
        self.opt_u64(name)?.ok_or(DbError::missing(name))
    }

    pub(crate) fn opt_u32(&self, name: &'static str) -> Result<Option<u32>, DbError> {
        self.opt_int(name)?
            .map(|value| u32::try_from(value).map_err(|_| DbError::unreadable(name, value)))
            .transpose()
    }

    pub(crate) fn u32(&self, name: &'static str) -> Result<u32, DbError> {
        self.opt_u32(name)?.ok_or(DbError::missing(name))
    }

    pub(crate) fn flag(&self, name: &'static str) -> Result<bool, DbError> {
        Ok(self.int(name)? != 0)
    }

    pub(crate) fn opt_text(&self, name: &'static str) -> Result<Option<String>, DbError> {
        match self {
            Self::Sqlite(row) => row.try_get_unchecked(name),
            Self::Postgres(row) => row.try_get_unchecked(name),
        }
        .map_err(|error| DbError::row(name, error))
    }

    pub(crate) fn text(&self, name: &'static str) -> Result<String, DbError> {
        self.opt_text(name)?.ok_or(DbError::missing(name))
    }

    pub(crate) fn opt_parse<T: FromStr>(&self, name: &'static str) -> Result<Option<T>, DbError> {
        self.opt_text(name)?
            .map(|text| text.parse().map_err(|_| DbError::unreadable(name, &text)))
            .transpose()
    }

    pub(crate) fn parse<T: FromStr>(&self, name: &'static str) -> Result<T, DbError> {
        self.opt_parse(name)?.ok_or(DbError::missing(name))
    }

    pub(crate) fn opt_json<T: DeserializeOwned>(
        &self,
        name: &'static str,
    ) -> Result<Option<T>, DbError> {
        self.opt_text(name)?
            .map(|text| {
                serde_json::from_str(&text).map_err(|error| DbError::unreadable(name, error))
            })
            .transpose()
    }

    pub(crate) fn json<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, DbError> {
        self.opt_json(name)?.ok_or(DbError::missing(name))
    }
}

/// What a transaction speaks through.
pub(crate) enum Conn {
    /// SQLite's only writer; its transaction is the group's.
    Writer(SqliteConnection),
    Sqlite(PoolConnection<Sqlite>),
    SqliteSnapshot(sqlx::Transaction<'static, Sqlite>),
    Postgres(PoolConnection<Postgres>),
    PostgresTx(sqlx::Transaction<'static, Postgres>),
}

/// One transaction, or one connection for reading.
pub(crate) struct Tx {
    pub(crate) conn: Conn,
    pub(crate) doing: &'static str,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) now: Option<u64>,
    /// Sent when the transaction is committed, and only then.
    pub(crate) wakes: Vec<Wake>,
}

macro_rules! on_connection {
    ($tx:expr, $sql:expr, $args:expr, $method:ident, $sqlite:expr, $postgres:expr) => {
        match &mut $tx.conn {
            Conn::Writer(conn) => {
                let query = sqlx::query_with($sql, sqlite_args($args)?);
                query.$method(&mut *conn).await.map($sqlite)
            }
            Conn::Sqlite(conn) => {
                let query = sqlx::query_with($sql, sqlite_args($args)?);
                query.$method(&mut **conn).await.map($sqlite)
            }
            Conn::SqliteSnapshot(conn) => {
                let query = sqlx::query_with($sql, sqlite_args($args)?);
                query.$method(&mut **conn).await.map($sqlite)
            }
            Conn::Postgres(conn) => {
                let query = sqlx::query_with(for_postgres($sql), postgres_args($args)?);
                query.$method(&mut **conn).await.map($postgres)
            }
            Conn::PostgresTx(conn) => {
                let query = sqlx::query_with(for_postgres($sql), postgres_args($args)?);
                query.$method(&mut **conn).await.map($postgres)
            }
        }
        .map_err(|error| DbError::query($tx.doing, error))
    };
}

impl Tx {
    pub(crate) fn new(conn: Conn, doing: &'static str, clock: &Arc<dyn Clock>) -> Self {
        Self {
            conn,
            doing,
            clock: Arc::clone(clock),
            now: None,
            wakes: Vec::new(),
        }
    }

    /// Runs a statement; gives how many rows it changed.
    pub(crate) async fn exec(
        &mut self,
        sql: &'static str,
        args: Vec<Value>,
    ) -> Result<u64, DbError> {
        on_connection!(
            self,
            sql,
            args,
            execute,
            |done| done.rows_affected(),
            |done| done.rows_affected()
        )
    }

    /// All rows of a query.
    pub(crate) async fn rows(
        &mut self,
        sql: &'static str,
        args: Vec<Value>,
    ) -> Result<Vec<Row>, DbError> {
        on_connection!(
            self,
            sql,
            args,
            fetch_all,
            |rows| rows.into_iter().map(Row::Sqlite).collect(),
            |rows| rows.into_iter().map(Row::Postgres).collect()
        )
    }

    /// The first row of a query.
    pub(crate) async fn row(
        &mut self,
        sql: &'static str,
        args: Vec<Value>,
    ) -> Result<Option<Row>, DbError> {
        on_connection!(
            self,
            sql,
            args,
            fetch_optional,
            |row| row.map(Row::Sqlite),
            |row| row.map(Row::Postgres)
        )
    }

    /// Runs several statements of ours at once, without values.
    pub(crate) async fn script(&mut self, script: String) -> Result<(), DbError> {
        let script = sqlx::raw_sql(AssertSqlSafe(script));
        match &mut self.conn {
            Conn::Writer(conn) => script.execute(&mut *conn).await.map(drop),
            Conn::Sqlite(conn) => script.execute(&mut **conn).await.map(drop),
            Conn::SqliteSnapshot(conn) => script.execute(&mut **conn).await.map(drop),
            Conn::Postgres(conn) => script.execute(&mut **conn).await.map(drop),
            Conn::PostgresTx(conn) => script.execute(&mut **conn).await.map(drop),
        }
        .map_err(|error| DbError::query(self.doing, error))
    }

    /// Now by the database's clock, milliseconds since the Unix epoch; read once per transaction.
    pub(crate) async fn now(&mut self) -> Result<u64, DbError> {
        if let Some(now) = self.now {
            return Ok(now);
        }
        let now = if self.is_postgres() {
            let row = self.row("select kiln_now() as now", args![]).await?;
            row.ok_or(DbError::missing("now"))?.u64("now")?
        } else {
            self.clock.now_unix_ms()
        };
        self.now = Some(now);
        Ok(now)
    }

    pub(crate) fn is_postgres(&self) -> bool {
        matches!(self.conn, Conn::Postgres(_) | Conn::PostgresTx(_))
    }

    /// Tells listeners after the commit.
    pub(crate) fn wake(&mut self, wake: Wake) {
        self.wakes.push(wake);
    }
}

fn sqlite_args(args: Vec<Value>) -> Result<sqlx::sqlite::SqliteArguments, DbError> {
    let mut all = sqlx::sqlite::SqliteArguments::default();
    for value in args {
        match value {
            Value::Int(value) => all.add(value),
            Value::Text(value) => all.add(value),
        }
        .map_err(|error| DbError::arguments(Cause::other(error)))?;
    }
    Ok(all)
}

fn postgres_args(args: Vec<Value>) -> Result<sqlx::postgres::PgArguments, DbError> {
    let mut all = sqlx::postgres::PgArguments::default();
    for value in args {
        match value {
            Value::Int(value) => all.add(value),
            Value::Text(value) => all.add(value),
        }
        .map_err(|error| DbError::arguments(Cause::other(error)))?;
    }
    Ok(all)
}

/// The same statement in PostgreSQL's words.
fn for_postgres(sql: &'static str) -> AssertSqlSafe<String> {
    // Safe: the text is one of this crate's constants, and the marks are replaced by constants.
    AssertSqlSafe(rewrite(sql).into_owned())
}

fn rewrite(sql: &'static str) -> Cow<'static, str> {
    if !sql.contains("/*lock ") && !sql.contains("json_each(") {
        return Cow::Borrowed(sql);
    }
    Cow::Owned(
        sql.replace("json_each(", "kiln_each(")
            .replace("/*lock ", "for update of ")
            .replace(" skip*/", " skip locked")
            .replace("*/", ""),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_become_postgres_words() {
        assert_eq!(
            rewrite("select 1 from a /*lock a skip*/"),
            "select 1 from a for update of a skip locked"
        );
        assert_eq!(
            rewrite("select e.value from json_each($1) e, b /*lock b*/"),
            "select e.value from kiln_each($1) e, b for update of b"
        );
    }
}
