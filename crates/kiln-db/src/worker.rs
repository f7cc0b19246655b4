//! Workers: how they join, what they are, what an operator made of them.

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::dispatch::{WorkerFacts, WorkerState};
use kiln_core::{Digest, Label, PoolName, TenantName, TokenId, WorkerId};

use crate::database::{Database, write_tx};
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::wake::Wake;

/// What a join token fixes for the worker that uses it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// Its pool.
    pub pool: PoolName,
    /// Its labels.
    pub labels: BTreeMap<Label, Label>,
    /// Tenants whose jobs it may run; none means all.
    pub tenants: Option<BTreeSet<TenantName>>,
}

/// A join token on its way in. The secret itself is never here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewJoinToken {
    /// Its public name.
    pub id: TokenId,
    /// Digest of the secret.
    pub hash: Digest,
    /// What it fixes.
    pub placement: Placement,
    /// Not good from then on, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
    /// Who made it.
    pub created_by: String,
}

/// A join token as it is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JoinToken {
    /// Its public name.
    pub id: TokenId,
    /// What it fixes.
    pub placement: Placement,
    /// When it was made.
    pub created_unix_ms: u64,
    /// Who made it.
    pub created_by: String,
    /// Not good from then on.
    pub expires_unix_ms: u64,
    /// The worker that used it.
    pub used_by: Option<WorkerId>,
    /// When it was called back.
    pub revoked_unix_ms: Option<u64>,
}

/// The certificate a worker shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Certificate {
    /// Digest of its public key: the same over renewals.
    pub fingerprint: Digest,
    /// Its end, milliseconds since the Unix epoch.
    pub until_unix_ms: u64,
}

/// A worker on its way in.
#[derive(Clone, PartialEq, Debug)]
pub struct NewWorker {
    /// Its name.
    pub id: WorkerId,
    /// What it says it is.
    pub facts: WorkerFacts,
    /// The certificate it gets; none on the private socket.
    pub certificate: Option<Certificate>,
}

/// Why a worker did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No such token.
    #[error("this is not a join token of this controller")]
    UnknownToken,
    /// It was used before.
    #[error("this join token was used by worker {0}: make another")]
    Used(WorkerId),
    /// It is too old.
    #[error("this join token has expired: make another")]
    Expired,
    /// It was called back.
    #[error("this join token was revoked")]
    Revoked,
    /// Another host has this name.
    #[error(
        "there is a worker {0} already, with another key: choose another name or remove it first"
    )]
    NameTaken(WorkerId),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

/// A worker as it is kept.
#[derive(Clone, PartialEq, Debug)]
pub struct Worker {
    /// Its name.
    pub id: WorkerId,
    /// What its token fixed.
    pub placement: Placement,
    /// What it said last.
    pub facts: WorkerFacts,
    /// Whether it gets jobs.
    pub state: WorkerState,
    /// Who changed its state last, and why.
    pub state_by: Option<(String, Option<String>)>,
    /// Its last heartbeat.
    pub seen_unix_ms: u64,
    /// When it joined.
    pub joined_unix_ms: u64,
    /// Failures of its own in a row.
    pub infra_failures: u32,
    /// The certificate it shows.
    pub certificate: Option<Certificate>,
    /// When it was removed: it may not come back with that key.
    pub removed_unix_ms: Option<u64>,
}

/// A worker has this name, or none has.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No such worker.
    #[error("there is no worker {0}")]
    Unknown(WorkerId),
    /// A state only kiln itself gives.
    #[error("a worker becomes lost by its silence, not by an order")]
    NotAnOrder,
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

impl Database {
    /// Keeps a join token.
    ///
    /// # Errors
    /// When the database does not answer, or there is one of this name.
    pub async fn create_join_token(&self, token: NewJoinToken) -> Result<(), DbError> {
        write_tx!(self, "keep a join token", [token], |tx| {
            let now = tx.now().await?;
            let sql = "insert into join_tokens (id, hash, pool, labels, tenants, created_ms, created_by, expires_ms)
                values ($1, $2, $3, $4, $5, $6, $7, $8)";
            let values = args![
                token.id.as_str(),
                token.hash.to_string(),
                token.placement.pool.as_str(),
                json(&token.placement.labels),
                token.placement.tenants.as_ref().map(json),
                now,
                token.created_by.as_str(),
                token.expires_unix_ms,
            ];
            tx.exec(sql, values).await.map(drop)
        })
    }

    /// All join tokens, newest first.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn join_tokens(&self) -> Result<Vec<JoinToken>, DbError> {
        self.read("list join tokens", |tx| {
            Box::pin(async move {
                let sql = "select * from join_tokens order by created_ms desc, id";
                let rows = tx.rows(sql, args![]).await?;
                rows.iter().map(join_token).collect()
            })
        })
        .await
    }

    /// Calls a join token back. False when there is none, or it was used or revoked before.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn revoke_join_token(&self, id: &TokenId) -> Result<bool, DbError> {
        let id = id.clone();
        write_tx!(self, "revoke a join token", [id], |tx| {
            let now = tx.now().await?;
            let sql = "update join_tokens set revoked_ms = $2 where id = $1 and used_ms is null and revoked_ms is null";
            Ok(tx.exec(sql, args![id.as_str(), now]).await? == 1)
        })
    }

    /// Uses a join token, once: the worker is one of ours from then on.
    ///
    /// # Errors
    /// When the token is not good, or the name belongs to another host.
    pub async fn join(&self, secret: &Digest, worker: NewWorker) -> Result<Worker, JoinError> {
        let secret = *secret;
        write_tx!(self, "let a worker join", [worker], |tx| {
            join(tx, &secret, &worker).await
        })?
    }

    /// Takes in a worker of this controller's own host, which needs no token. Again is no error: its facts are taken.
    ///
    /// # Errors
    /// When a remote worker has this name.
    pub async fn admit_worker(
        &self,
        worker: NewWorker,
        placement: Placement,
    ) -> Result<Worker, JoinError> {
        write_tx!(self, "take in a worker", [worker, placement], |tx| {
            place(tx, &worker, &placement).await
        })?
    }

    /// Workers of a pool or all, by name, without removed ones.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn workers(&self, pool: Option<&PoolName>) -> Result<Vec<Worker>, DbError> {
        let pool = pool.cloned();
        self.read("list workers", |tx| {
            Box::pin(async move { list(tx, pool.as_ref()).await })
        })
        .await
    }

    /// One worker, removed or not.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn worker(&self, id: &WorkerId) -> Result<Option<Worker>, DbError> {
        let id = id.clone();
        self.read("read a worker", |tx| {
            Box::pin(async move { find(tx, &id).await })
        })
        .await
    }

    /// The worker that has this key, removed or not.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn worker_of_key(&self, fingerprint: &Digest) -> Result<Option<Worker>, DbError> {
        let fingerprint = fingerprint.to_string();
        self.read("find a worker by its key", |tx| {
            Box::pin(async move {
                let sql = "select * from workers where fingerprint = $1";
                let row = tx.row(sql, args![fingerprint]).await?;
                row.as_ref().map(worker_row).transpose()
            })
        })
        .await
    }

    /// Notes the certificate a worker got.
    ///
    /// # Errors
    /// When there is no such worker.
    pub async fn renew_certificate(
        &self,
        id: &WorkerId,
        certificate: Certificate,
    ) -> Result<(), WorkerError> {
        let worker = id.clone();
        let changed = write_tx!(self, "renew a certificate", [worker, certificate], |tx| {
            let sql = "update workers set fingerprint = $2, fingerprint_until_ms = $3
                where id = $1 and removed_ms is null";
            let fingerprint = certificate.fingerprint.to_string();
            let values = args![worker.as_str(), fingerprint, certificate.until_unix_ms];
            tx.exec(sql, values).await
        })?;
        known(changed, id)
    }

    /// Gives a worker another state: active (resume), draining, cordoned, quarantined. Resuming forgets its failures.
    ///
    /// # Errors
    /// When there is no such worker, or the state is not one to order.
    pub async fn set_worker_state(
        &self,
        id: &WorkerId,
        state: WorkerState,
        by: &str,
        reason: Option<&str>,
    ) -> Result<(), WorkerError> {
        if state == WorkerState::Lost {
            return Err(WorkerError::NotAnOrder);
        }
        let (worker, by, reason) = (id.clone(), by.to_owned(), reason.map(str::to_owned));
        let changed = write_tx!(
            self,
            "change a worker's state",
            [worker, by, reason],
            |tx| {
                let sql = "update workers set state = $2, state_by = $3, state_reason = $4,
                    infra_failures = case when $2 = 'active' then 0 else infra_failures end
                where id = $1 and removed_ms is null";
                let values = args![
                    worker.as_str(),
                    state.name(),
                    by.as_str(),
                    reason.as_deref()
                ];
                let changed = tx.exec(sql, values).await?;
                woken(tx, &worker).await?;
                Ok(changed)
            }
        )?;
        known(changed, id)
    }

    /// Removes a worker: it gets no jobs, its leases are refused from now on and expire, its key opens nothing.
    ///
    /// # Errors
    /// When there is no such worker.
    pub async fn remove_worker(&self, id: &WorkerId) -> Result<(), WorkerError> {
        let worker = id.clone();
        let changed = write_tx!(self, "remove a worker", [worker], |tx| {
            let now = tx.now().await?;
            // Its machines may run on until the worker notices: the grace of expiry covers that.
            let sql = "update jobs set until_ms = $2 where worker = $1 and until_ms > $2";
            tx.exec(sql, args![worker.as_str(), now]).await?;
            let sql = "update kept set live_ms = $2 where worker = $1 and live_ms > $2";
            tx.exec(sql, args![worker.as_str(), now]).await?;
            let sql = "update workers set removed_ms = $2, state = 'cordoned' where id = $1 and removed_ms is null";
            let changed = tx.exec(sql, args![worker.as_str(), now]).await?;
            woken(tx, &worker).await?;
            Ok(changed)
        })?;
        known(changed, id)
    }
}

fn known(changed: u64, id: &WorkerId) -> Result<(), WorkerError> {
    if changed == 0 {
        return Err(WorkerError::Unknown(id.clone()));
    }
    Ok(())
}

async fn woken(tx: &mut Tx, worker: &WorkerId) -> Result<(), DbError> {
    let row = tx.row(
        "select pool from workers where id = $1",
        args![worker.as_str()],
    );
    if let Some(row) = row.await? {
        tx.wake(Wake::Queue(row.parse("pool")?));
        tx.wake(Wake::Worker(worker.clone()));
    }
    Ok(())
}

async fn join(
    tx: &mut Tx,
    secret: &Digest,
    worker: &NewWorker,
) -> Result<Result<Worker, JoinError>, DbError> {
    let sql = "select * from join_tokens where hash = $1 /*lock join_tokens*/";
    let Some(row) = tx.row(sql, args![secret.to_string()]).await? else {
        return Ok(Err(JoinError::UnknownToken));
    };
    let token = join_token(&row)?;
    let now = tx.now().await?;
    if token.revoked_unix_ms.is_some() {
        return Ok(Err(JoinError::Revoked));
    }
    if let Some(used) = token.used_by {
        return Ok(Err(JoinError::Used(used)));
    }
    if now >= token.expires_unix_ms {
        return Ok(Err(JoinError::Expired));
    }
    let joined = place(tx, worker, &token.placement).await?;
    if joined.is_ok() {
        let sql = "update join_tokens set used_ms = $2, used_by = $3 where id = $1";
        tx.exec(sql, args![token.id.as_str(), now, worker.id.as_str()])
            .await?;
    }
    Ok(joined)
}

async fn place(
    tx: &mut Tx,
    worker: &NewWorker,
    placement: &Placement,
) -> Result<Result<Worker, JoinError>, DbError> {
    let now = tx.now().await?;
    let key = worker.certificate.as_ref().map(|c| c.fingerprint);
    if let Some(known) = find(tx, &worker.id).await? {
        let same = known.certificate.as_ref().map(|c| c.fingerprint) == key;
        if known.removed_unix_ms.is_none() && !same {
            return Ok(Err(JoinError::NameTaken(worker.id.clone())));
        }
    }
    if let Some(key) = key {
        // One key is one worker.
        let sql = "select id from workers where fingerprint = $1 and id <> $2";
        let row = tx
            .row(sql, args![key.to_string(), worker.id.as_str()])
            .await?;
        if let Some(row) = row {
            return Ok(Err(JoinError::NameTaken(row.parse("id")?)));
        }
    }
    let sql = "insert into workers (id, pool, labels, tenants, facts, state, lost, seen_ms, joined_ms, infra_failures,
            fingerprint, fingerprint_until_ms)
        values ($1, $2, $3, $4, $5, 'active', 0, $6, $6, 0, $7, $8)
        on conflict (id) do update set pool = excluded.pool, labels = excluded.labels, tenants = excluded.tenants,
            facts = excluded.facts, lost = 0, seen_ms = excluded.seen_ms, fingerprint = excluded.fingerprint,
            fingerprint_until_ms = excluded.fingerprint_until_ms,
            state = case when workers.removed_ms is null then workers.state else 'active' end,
            joined_ms = case when workers.removed_ms is null then workers.joined_ms else excluded.joined_ms end,
            infra_failures = case when workers.removed_ms is null then workers.infra_failures else 0 end,
            removed_ms = null";
    let values = args![
        worker.id.as_str(),
        placement.pool.as_str(),
        json(&placement.labels),
        placement.tenants.as_ref().map(json),
        json(&worker.facts),
        now,
        key.map(|key| key.to_string()),
        worker.certificate.as_ref().map(|c| c.until_unix_ms),
    ];
    tx.exec(sql, values).await?;
    tx.wake(Wake::Queue(placement.pool.clone()));
    let found = find(tx, &worker.id).await?;
    Ok(Ok(found.ok_or(DbError::missing("worker"))?))
}

async fn find(tx: &mut Tx, id: &WorkerId) -> Result<Option<Worker>, DbError> {
    let row = tx.row("select * from workers where id = $1", args![id.as_str()]);
    row.await?.as_ref().map(worker_row).transpose()
}

/// Workers that were not removed.
pub(crate) async fn list(tx: &mut Tx, pool: Option<&PoolName>) -> Result<Vec<Worker>, DbError> {
    let sql =
        "select * from workers where removed_ms is null and ($1 = '' or pool = $1) order by id";
    let rows = tx
        .rows(sql, args![pool.map_or("", PoolName::as_str)])
        .await?;
    rows.iter().map(worker_row).collect()
}

fn join_token(row: &Row) -> Result<JoinToken, DbError> {
    Ok(JoinToken {
        id: row.parse("id")?,
        placement: placement(row)?,
        created_unix_ms: row.u64("created_ms")?,
        created_by: row.text("created_by")?,
        expires_unix_ms: row.u64("expires_ms")?,
        used_by: row.opt_parse("used_by")?,
        revoked_unix_ms: row.opt_u64("revoked_ms")?,
    })
}

fn placement(row: &Row) -> Result<Placement, DbError> {
    Ok(Placement {
        pool: row.parse("pool")?,
        labels: row.json("labels")?,
        tenants: row.opt_json("tenants")?,
    })
}

fn worker_row(row: &Row) -> Result<Worker, DbError> {
    let certificate = match row.opt_parse("fingerprint")? {
        Some(fingerprint) => Some(Certificate {
            fingerprint,
            until_unix_ms: row.opt_u64("fingerprint_until_ms")?.unwrap_or_default(),
        }),
        None => None,
    };
    let reason = row.opt_text("state_reason")?;
    Ok(Worker {
        id: row.parse("id")?,
        placement: placement(row)?,
        facts: row.json("facts")?,
        state: state_of(row)?,
        state_by: row.opt_text("state_by")?.map(|by| (by, reason)),
        seen_unix_ms: row.u64("seen_ms")?,
        joined_unix_ms: row.u64("joined_ms")?,
        infra_failures: row.u32("infra_failures")?,
        certificate,
        removed_unix_ms: row.opt_u64("removed_ms")?,
    })
}

/// What operator and kiln made of a worker, its silence aside.
pub(crate) fn admin_state(row: &Row) -> Result<WorkerState, DbError> {
    match row.text("state")?.as_str() {
        "active" => Ok(WorkerState::Active),
        "draining" => Ok(WorkerState::Draining),
        "cordoned" => Ok(WorkerState::Cordoned),
        "quarantined" => Ok(WorkerState::Quarantined),
        other => Err(DbError::unreadable("state", other)),
    }
}

/// The state of a worker: lost hides the others until it speaks again.
pub(crate) fn state_of(row: &Row) -> Result<WorkerState, DbError> {
    if row.flag("lost")? {
        return Ok(WorkerState::Lost);
    }
    admin_state(row)
}
