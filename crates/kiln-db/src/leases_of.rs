//! What a worker holds: asked by its poll; and its leave.

use kiln_core::{Lease, WorkerId};

use crate::database::{Database, write_tx};
use crate::engine::args;
use crate::error::DbError;
use crate::job::Live;

impl Database {
    /// The leases of a worker, oldest job first. Whether one is still live is for the doors to say.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn leases_of(&self, worker: &WorkerId) -> Result<Vec<Lease>, DbError> {
        let worker = worker.clone();
        self.read("list a worker's leases", |tx| {
            Box::pin(async move {
                let sql = "select j.* from jobs j where j.worker = $1 order by j.id";
                let rows = tx.rows(sql, args![worker.as_str()]).await?;
                let leases = rows.iter().map(|row| Ok(Live::from_row(row)?.lease()));
                leases.filter_map(Result::transpose).collect()
            })
        })
        .await
    }

    /// A worker says that it ends: it gets no more jobs, until it comes back.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn worker_left(&self, worker: &WorkerId) -> Result<(), DbError> {
        let worker = worker.clone();
        write_tx!(self, "let a worker leave", [worker], |tx| {
            let sql = "update workers set lost = 1 where id = $1";
            tx.exec(sql, args![worker.as_str()]).await.map(drop)
        })
    }
}
