//! SQLite connections: one writer, a few readers, WAL, every commit on disk before it is told.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Pool, Sqlite, SqliteConnection};

/// Readers beside the writer.
const READERS: u32 = 4;
/// Another process (a backup, a person with the command-line tool) may hold the file this long.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Rows that SQLite's thread reads before their reader takes them: long lists without a change of threads for every few rows.
const ROWS_AHEAD: usize = 2_000;
/// Longest wait for a reader.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        .pragma("trusted_schema", "off")
        .pragma("cell_size_check", "on")
        .statement_cache_capacity(super::STATEMENTS_MAX)
        .row_buffer_size(ROWS_AHEAD)
        .disable_statement_logging()
}

/// The writing connection.
pub(crate) async fn writer(path: &Path, create: bool) -> Result<SqliteConnection, sqlx::Error> {
    options(path)
        .create_if_missing(create)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("wal_autocheckpoint", "2000")
        .pragma("journal_size_limit", "67108864")
        .connect()
        .await
}

/// A writing connection to a file that nobody else uses: no log beside it.
pub(crate) async fn plain_writer(path: &Path) -> Result<SqliteConnection, sqlx::Error> {
    options(path)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Delete)
        .synchronous(SqliteSynchronous::Full)
        .connect()
        .await
}

/// A connection that only looks at a file: it makes none and changes none.
pub(crate) async fn reader(path: &Path) -> Result<SqliteConnection, sqlx::Error> {
    options(path)
        .create_if_missing(false)
        .read_only(true)
        .connect()
        .await
}

/// The readers.
pub(crate) fn readers(path: &Path) -> Pool<Sqlite> {
    SqlitePoolOptions::new()
        .max_connections(READERS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_lazy_with(
            options(path)
                .create_if_missing(false)
                .pragma("query_only", "on"),
        )
}
