//! A change of state is told twice in the transaction that makes it: as the job's next event, and as a webhook for everybody who asked.

use kiln_core::{JobId, TenantName};
use serde_json::{Value, json as object};

use crate::engine::{Tx, args, json};
use crate::error::DbError;
use crate::wake::Wake;

/// Something that happened to a job.
pub(crate) struct Change {
    pub(crate) job: JobId,
    pub(crate) tenant: TenantName,
    /// The event's number; the job's row must hold it too.
    pub(crate) seq: u64,
    /// The state the job is in now.
    pub(crate) kind: &'static str,
    pub(crate) data: Value,
    pub(crate) notify_url: Option<String>,
}

/// Writes events and outbox rows for changes of state.
pub(crate) async fn announce(tx: &mut Tx, changes: &[Change]) -> Result<(), DbError> {
    if changes.is_empty() {
        return Ok(());
    }
    let now = tx.now().await?;
    let events: Vec<_> = changes
        .iter()
        .map(|change| object!([change.job, change.seq, change.kind, json(&change.data)]))
        .collect();
    let sql = "insert into events (job, seq, at_ms, kind, data)
        select e.value ->> 0, cast(e.value ->> 1 as bigint), $2, e.value ->> 2, e.value ->> 3 from json_each($1) e";
    tx.exec(sql, args![json(&events), now]).await?;
    webhooks(tx, changes, now).await?;
    for change in changes {
        tx.wake(Wake::Job(change.job.clone()));
    }
    Ok(())
}

async fn webhooks(tx: &mut Tx, changes: &[Change], now: u64) -> Result<(), DbError> {
    let own = changes.iter().any(|change| change.notify_url.is_some());
    let sql = "select 1 as one from webhooks where enabled = 1 limit 1";
    let others = tx.row(sql, args![]).await?.is_some();
    if !own && !others {
        return Ok(());
    }
    let told: Vec<_> = changes
        .iter()
        .map(|change| {
            let body = object!({
                "type": format!("job.{}", change.kind),
                "job": change.job,
                "tenant": change.tenant,
                "seq": change.seq,
                "at_unix_ms": now,
                "data": change.data,
            });
            object!([
                change.job,
                change.seq,
                change.tenant,
                change.kind,
                json(&body),
                change.notify_url,
            ])
        })
        .collect();
    let told_json = json(&told);
    let sql = "insert into outbox (id, job, tenant, webhook, url, seq, kind, body, created_ms, due_ms, tries)
        select (e.value ->> 0) || '.' || (e.value ->> 1) || '.' || w.id, e.value ->> 0, e.value ->> 2, w.id, w.url,
            cast(e.value ->> 1 as bigint), e.value ->> 3, e.value ->> 4, $2, $2, 0
        from json_each($1) e, webhooks w
        where w.enabled = 1 and (w.tenant is null or w.tenant = (e.value ->> 2))
            and (w.kinds = '[]' or replace(w.kinds, '\"' || (e.value ->> 3) || '\"', '') <> w.kinds)";
    let mut written = tx.exec(sql, args![told_json.as_str(), now]).await?;
    if own {
        let sql = "insert into outbox (id, job, tenant, url, seq, kind, body, created_ms, due_ms, tries)
            select (e.value ->> 0) || '.' || (e.value ->> 1) || '.notify', e.value ->> 0, e.value ->> 2, e.value ->> 5,
                cast(e.value ->> 1 as bigint), e.value ->> 3, e.value ->> 4, $2, $2, 0
            from json_each($1) e where (e.value ->> 5) is not null";
        written += tx.exec(sql, args![told_json, now]).await?;
    }
    if written > 0 {
        tx.wake(Wake::Outbox);
    }
    Ok(())
}
