//! Who schedules a pool: a row with an epoch, which every claim asserts.

use kiln_core::PoolName;

use crate::database::{Database, write_tx};
use crate::engine::{Tx, args};
use crate::error::DbError;
use crate::wake::Wake;

/// The right to schedule one pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leadership {
    /// Which pool.
    pub pool: PoolName,
    /// Who has it: a name of this controller's process, never used again.
    pub holder: String,
    /// Which holding this is; a claim with an older one is refused.
    pub epoch: u64,
    /// Until when, by the database's clock.
    pub until_unix_ms: u64,
}

impl Database {
    /// Takes or renews the right to schedule a pool for `ttl_ms`. None while another controller has it.
    ///
    /// # Errors
    /// When the database does not answer: then the caller must stop scheduling when its last right ends.
    pub async fn lead(
        &self,
        pool: &PoolName,
        holder: &str,
        ttl_ms: u64,
    ) -> Result<Option<Leadership>, DbError> {
        let (pool, holder) = (pool.clone(), holder.to_owned());
        write_tx!(self, "take the lead", [pool, holder], |tx| {
            take(tx, &pool, &holder, ttl_ms).await
        })
    }

    /// Gives the right back, so that another controller need not wait for its end.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn resign(&self, leadership: &Leadership) -> Result<(), DbError> {
        let own = leadership.clone();
        write_tx!(self, "resign", [own], |tx| {
            let sql =
                "update leaders set until_ms = 0 where pool = $1 and holder = $2 and epoch = $3";
            let values = args![own.pool.as_str(), own.holder.as_str(), own.epoch];
            if tx.exec(sql, values).await? > 0 {
                tx.wake(Wake::Lead(own.pool.clone()));
            }
            Ok(())
        })
    }
}

async fn take(
    tx: &mut Tx,
    pool: &PoolName,
    holder: &str,
    ttl_ms: u64,
) -> Result<Option<Leadership>, DbError> {
    // Whoever cannot have it does not stand in the way of the claims of whoever has.
    let sql = "select holder, until_ms from leaders where pool = $1";
    if let Some(row) = tx.row(sql, args![pool.as_str()]).await?
        && row.text("holder")? != holder
        && tx.now().await? < row.u64("until_ms")?
    {
        return Ok(None);
    }
    let sql = "insert into leaders (pool, holder, epoch, until_ms) values ($1, '', 0, 0) on conflict (pool) do nothing";
    tx.exec(sql, args![pool.as_str()]).await?;
    let sql = "select holder, epoch, until_ms from leaders where pool = $1 /*lock leaders*/";
    let row = tx.row(sql, args![pool.as_str()]).await?;
    let row = row.ok_or(DbError::missing("pool"))?;
    let now = tx.now().await?;
    let (owner, epoch, until) = (row.text("holder")?, row.u64("epoch")?, row.u64("until_ms")?);
    let own = owner == holder && now < until;
    if !own && now < until {
        return Ok(None);
    }
    // A holder whose right ended gets a new epoch too: another may have scheduled between.
    let epoch = if own { epoch } else { epoch + 1 };
    let until_unix_ms = now + ttl_ms;
    let sql = "update leaders set holder = $2, epoch = $3, until_ms = $4 where pool = $1";
    tx.exec(sql, args![pool.as_str(), holder, epoch, until_unix_ms])
        .await?;
    Ok(Some(Leadership {
        pool: pool.clone(),
        holder: holder.to_owned(),
        epoch,
        until_unix_ms,
    }))
}

/// Whether the right is still the live one. Locks it until the transaction ends, so that claims of a pool are one after another.
pub(crate) async fn leads(tx: &mut Tx, own: &Leadership) -> Result<bool, DbError> {
    let sql = "select holder, epoch, until_ms from leaders where pool = $1 /*lock leaders*/";
    let Some(row) = tx.row(sql, args![own.pool.as_str()]).await? else {
        return Ok(false);
    };
    let now = tx.now().await?;
    Ok(row.text("holder")? == own.holder
        && row.u64("epoch")? == own.epoch
        && now < row.u64("until_ms")?)
}
