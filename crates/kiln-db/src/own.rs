//! Workers that are one command's own, and the jobs that wait for nobody else: both go with their process.

use std::collections::BTreeMap;

use kiln_core::dispatch::{Requirements, own_labels};
use kiln_core::job::JobEvent;
use kiln_core::{FailureClass, Label, Outcome, Verdict, WorkerId};

use crate::close::{self, Ending};
use crate::database::{Database, write_tx};
use crate::engine::{Tx, args};
use crate::error::DbError;
use crate::expire::give_up;
use crate::job::Live;

/// Workers forgotten in one transaction.
const FORGET_MAX: u32 = 100;
/// How long a lease of a command's own worker lives: for ever, as leases go. Nobody else may have its job, so time takes nothing away: a computer
/// may sleep, a command may be suspended. It ends with its process ([`Database::bury_own_worker`]).
pub(crate) const OWN_LEASE_MS: u64 = 10 * 365 * 86_400_000;
/// Silence after which an own worker without a lease is forgotten, whose process said nothing at its end.
const FORGET_AFTER_MS: u64 = 86_400_000;

impl Database {
    /// Forgets a command's own worker: jobs that wait for it are lost, and its row goes, since its name never comes back. One that still
    /// holds a lease stays until that is over. False when there is none of this name, or it is no command's own.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn forget_own_worker(&self, worker: &WorkerId) -> Result<bool, DbError> {
        let worker = worker.clone();
        write_tx!(self, "forget a command's worker", [worker], |tx| {
            let sql = "select labels from workers where id = $1 /*lock workers*/";
            let Some(row) = tx.row(sql, args![worker.as_str()]).await? else {
                return Ok(false);
            };
            let labels: BTreeMap<Label, Label> = row.json("labels")?;
            let own = own_labels(&worker);
            if !own
                .iter()
                .all(|(name, value)| labels.get(name) == Some(value))
            {
                return Ok(false);
            }
            forget(tx, &worker).await
        })
    }

    /// Forgets the own workers of commands that ended without a word a day ago, and hold nothing. Gives how many.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn forget_lost_own_workers(&self) -> Result<u32, DbError> {
        write_tx!(self, "forget workers of dead commands", [], |tx| {
            let before = tx.now().await?.saturating_sub(FORGET_AFTER_MS);
            let sql = "select id from workers where lost = 1 and seen_ms < $2 and labels like '%\"kiln/own\":%'
                order by id limit $1";
            let mut forgotten = 0;
            for row in tx.rows(sql, args![FORGET_MAX, before]).await? {
                let worker: WorkerId = row.parse("id")?;
                forgotten += u32::from(forget(tx, &worker).await?);
            }
            Ok(forgotten)
        })
    }
}

impl Database {
    /// Buries the own worker of a command whose process is known to be dead, and with it its machines: what it held is lost now, what
    /// waited for it too. False when there is none of this name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn bury_own_worker(&self, worker: &WorkerId) -> Result<bool, DbError> {
        let worker = worker.clone();
        write_tx!(self, "bury a command's worker", [worker], |tx| {
            let sql = "select j.* from jobs j where j.worker = $1 order by j.id /*lock j*/";
            for row in tx.rows(sql, args![worker.as_str()]).await? {
                let live = Live::from_row(&row)?;
                let own: Requirements = row.json("requires")?;
                if let (Some(_), Some(lease)) = (own.own(), live.lease()) {
                    give_up(tx, &live, &lease, 0).await?;
                }
            }
            forget(tx, &worker).await
        })
    }
}

async fn forget(tx: &mut Tx, worker: &WorkerId) -> Result<bool, DbError> {
    let outcome = Outcome {
        verdict: Verdict::Failed {
            class: FailureClass::Lost,
            message: "the kiln process that asked for it ended before it could run it".to_owned(),
            hint: None,
            command_code: None,
            reason: None,
        },
        phases_ms: Vec::new(),
    };
    let sql = "select j.* from jobs j where j.state = 'queued' and j.requires like '%\"kiln/own\":%' order by j.id /*lock j*/";
    for row in tx.rows(sql, args![]).await? {
        let requires: Requirements = row.json("requires")?;
        if requires
            .own()
            .is_none_or(|own| own.as_str() != worker.as_str())
        {
            continue;
        }
        let live = Live::from_row(&row)?;
        let event = match &live.cancel {
            Some(mark) => JobEvent::Ended {
                outcome: close::cancelled(mark, Vec::new()),
            },
            None => JobEvent::Ended {
                outcome: outcome.clone(),
            },
        };
        close::end(tx, &live, event, &Ending::default()).await?;
    }
    let sql =
        "delete from workers where id = $1 and not exists (select 1 from jobs where worker = $1)";
    Ok(tx.exec(sql, args![worker.as_str()]).await? == 1)
}
