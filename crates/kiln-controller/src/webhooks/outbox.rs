//! What the courier needs of the database: messages that are due, and what became of them.

use std::future::Future;
use std::time::Duration;

use kiln_db::{Database, DbError, Message};

/// Where messages wait.
pub trait Outbox: Send + Sync + 'static {
    /// Takes messages that are due; they are due again after `lease_ms` unless something else is said of them.
    fn take(
        &self,
        limit: u32,
        lease_ms: u64,
    ) -> impl Future<Output = Result<Vec<Message>, DbError>> + Send;
    /// How long until a message is due, zero when one is; none when nothing waits.
    fn due_in(&self) -> impl Future<Output = Result<Option<Duration>, DbError>> + Send;
    /// It was delivered.
    fn sent(&self, id: &str) -> impl Future<Output = Result<(), DbError>> + Send;
    /// A try failed: again after `wait_ms`, or never.
    fn failed(
        &self,
        id: &str,
        error: &str,
        wait_ms: Option<u64>,
    ) -> impl Future<Output = Result<(), DbError>> + Send;
    /// It was not tried: again after `wait_ms`.
    fn put_back(&self, id: &str, wait_ms: u64) -> impl Future<Output = Result<(), DbError>> + Send;
}

impl Outbox for Database {
    async fn take(&self, limit: u32, lease_ms: u64) -> Result<Vec<Message>, DbError> {
        self.outbox_take(limit, lease_ms).await
    }

    async fn due_in(&self) -> Result<Option<Duration>, DbError> {
        let Some(due) = self.outbox_next().await? else {
            return Ok(None);
        };
        let now = self.now().await?;
        Ok(Some(Duration::from_millis(due.saturating_sub(now))))
    }

    async fn sent(&self, id: &str) -> Result<(), DbError> {
        self.outbox_sent(id).await
    }

    async fn failed(&self, id: &str, error: &str, wait_ms: Option<u64>) -> Result<(), DbError> {
        self.outbox_failed(id, error, wait_ms).await
    }

    async fn put_back(&self, id: &str, wait_ms: u64) -> Result<(), DbError> {
        self.outbox_put_back(id, wait_ms).await
    }
}
