//! Legal holds: what no sweep takes, however old it is, until somebody lets it go.

use std::fmt;

use kiln_core::{JobId, TenantName};

use crate::database::{Database, write_tx};
use crate::engine::{Tx, args};
use crate::error::DbError;

/// Most things on hold.
pub const HOLDS_MAX: u32 = 10_000;

/// What is kept for ever until somebody says otherwise.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Hold {
    /// Everything of a tenant.
    Tenant(TenantName),
    /// One job: its record, log and artifacts, from when it is over.
    Job(JobId),
}

impl Hold {
    /// `tenant` or `job`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Tenant(_) => "tenant",
            Self::Job(_) => "job",
        }
    }

    /// Name of the tenant, or id of the job.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Tenant(name) => name.as_str(),
            Self::Job(id) => id.as_str(),
        }
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.name())
    }
}

/// A hold, and who put it there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holding {
    /// What is held.
    pub what: Hold,
    /// Whose it is.
    pub tenant: TenantName,
    /// Why.
    pub reason: String,
    /// Who said so.
    pub by: String,
    /// When, milliseconds since the Unix epoch.
    pub since_unix_ms: u64,
}

/// Why something is not on hold.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// No such tenant or job.
    #[error("there is no {0}")]
    Unknown(Hold),
    /// There is no room for one more.
    #[error("{HOLDS_MAX} things are on hold already")]
    TooMany,
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

impl Database {
    /// Puts something on hold. What is there already stays as it was put there.
    ///
    /// # Errors
    /// When there is no such thing, or too much is on hold.
    pub async fn hold(&self, what: Hold, by: &str, reason: &str) -> Result<Holding, HoldError> {
        let (asked, by, reason) = (what.clone(), by.to_owned(), reason.to_owned());
        write_tx!(self, "put on hold", [asked, by, reason], |tx| {
            hold(tx, &asked, &by, &reason).await
        })?
    }

    /// Lets something go: from the next sweep on, age takes it. False when it was not on hold.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn release(&self, what: Hold) -> Result<bool, DbError> {
        write_tx!(self, "end a hold", [what], |tx| {
            let sql = "delete from holds where kind = $1 and name = $2";
            let ended = tx.exec(sql, args![what.kind(), what.name()]).await? == 1;
            mark(tx, &what, false).await?;
            Ok(ended)
        })
    }

    /// Everything that is on hold, tenants last, by name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn holds(&self) -> Result<Vec<Holding>, DbError> {
        self.read("list holds", |tx| {
            Box::pin(async move {
                let sql = "select * from holds order by kind, name";
                tx.rows(sql, args![]).await?.iter().map(holding).collect()
            })
        })
        .await
    }
}

/// Puts something on hold in a transaction of its caller's.
pub(crate) async fn hold(
    tx: &mut Tx,
    asked: &Hold,
    by: &str,
    reason: &str,
) -> Result<Result<Holding, HoldError>, DbError> {
    if let Some(held) = one(tx, asked).await? {
        return Ok(Ok(held));
    }
    let Some(tenant) = owner(tx, asked).await? else {
        return Ok(Err(HoldError::Unknown(asked.clone())));
    };
    let row = tx.row("select count(*) as n from holds", args![]).await?;
    if row.ok_or(DbError::missing("n"))?.u32("n")? >= HOLDS_MAX {
        return Ok(Err(HoldError::TooMany));
    }
    let now = tx.now().await?;
    let sql = "insert into holds (kind, name, tenant, reason, set_by, since_ms)
        values ($1, $2, $3, $4, $5, $6)";
    let values = args![asked.kind(), asked.name(), tenant.as_str(), reason, by, now,];
    tx.exec(sql, values).await?;
    mark(tx, asked, true).await?;
    let held = one(tx, asked).await?;
    Ok(Ok(held.ok_or(DbError::missing("hold"))?))
}

async fn one(tx: &mut Tx, what: &Hold) -> Result<Option<Holding>, DbError> {
    let sql = "select * from holds where kind = $1 and name = $2";
    let row = tx.row(sql, args![what.kind(), what.name()]).await?;
    row.as_ref().map(holding).transpose()
}

fn holding(row: &crate::engine::Row) -> Result<Holding, DbError> {
    Ok(Holding {
        what: match row.text("kind")?.as_str() {
            "tenant" => Hold::Tenant(row.parse("name")?),
            _ => Hold::Job(row.parse("name")?),
        },
        tenant: row.parse("tenant")?,
        reason: row.text("reason")?,
        by: row.text("set_by")?,
        since_unix_ms: row.u64("since_ms")?,
    })
}

/// Whose it is; locked, so that a job that ends at the same time is marked by one of the two.
async fn owner(tx: &mut Tx, what: &Hold) -> Result<Option<TenantName>, DbError> {
    let row = match what {
        Hold::Tenant(name) => {
            let sql = "select name as tenant from tenants where name = $1";
            tx.row(sql, args![name.as_str()]).await?
        }
        Hold::Job(id) => {
            let sql = "select tenant from jobs where id = $1 /*lock jobs*/";
            match tx.row(sql, args![id.as_str()]).await? {
                Some(row) => Some(row),
                None => {
                    let sql = "select tenant from history where id = $1";
                    tx.row(sql, args![id.as_str()]).await?
                }
            }
        }
    };
    row.map(|row| row.parse("tenant")).transpose()
}

/// Notes it where sweeps look. A job that is not over is marked when it ends.
async fn mark(tx: &mut Tx, what: &Hold, on: bool) -> Result<(), DbError> {
    let sql = match what {
        Hold::Tenant(_) => "update tenants set hold = $2 where name = $1",
        Hold::Job(_) => "update history set hold = $2 where id = $1",
    };
    tx.exec(sql, args![what.name(), on]).await.map(drop)
}
