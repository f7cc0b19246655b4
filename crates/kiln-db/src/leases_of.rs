//! What a worker holds: asked by its poll.

use kiln_core::{Lease, WorkerId};

use crate::database::Database;
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
}
