//! Webhooks: who is told, and what waits to be sent. Rows of the outbox are written with the change they tell of.

use std::collections::BTreeSet;

use kiln_core::{JobId, TenantName, TokenId};

use crate::database::{Database, write_tx};
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::list::PAGE_MAX;
use crate::wake::Wake;

/// Longest kept text of a failure.
const ERROR_MAX: usize = 500;

/// Most webhooks of one tenant, and of the installation beside them.
pub const WEBHOOKS_MAX: u32 = 50;

/// Which messages a list holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MessageFilter {
    /// Of this tenant's jobs alone.
    pub tenant: Option<TenantName>,
    /// Of this webhook alone.
    pub webhook: Option<TokenId>,
    /// Given up, or waiting; none means both.
    pub dead: Option<bool>,
}

/// Somebody who is told of changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Webhook {
    /// Its name.
    pub id: TokenId,
    /// Told of this tenant's jobs; none means of all.
    pub tenant: Option<TenantName>,
    /// Where to.
    pub url: String,
    /// Name of the sealed key that signs; the key is not in the database.
    pub secret: String,
    /// The key before it, which signs too while receivers change over.
    pub old: Option<OldSecret>,
    /// Told of these states; empty means of all.
    pub kinds: BTreeSet<String>,
    /// Whether it is told at all.
    pub enabled: bool,
    /// Who made it.
    pub created_by: String,
}

/// A key that was replaced and signs beside the new one for a while.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OldSecret {
    /// Name of the sealed key.
    pub secret: String,
    /// Until when.
    pub until_unix_ms: u64,
}

/// What came of giving a webhook another key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rotated {
    /// It has it.
    Done(Webhook),
    /// Nothing was changed: the key before the present one signs until then.
    Overlaps {
        /// Until when.
        until_unix_ms: u64,
    },
    /// There is no such webhook.
    Absent,
}

/// A message that waits to be sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// Its name, the same over all tries: receivers drop what they have.
    pub id: String,
    /// Which job.
    pub job: JobId,
    /// Whose.
    pub tenant: TenantName,
    /// The webhook it belongs to; none for a job's own `notify_url`.
    pub webhook: Option<TokenId>,
    /// Name of the sealed key of that webhook.
    pub secret: Option<String>,
    /// Name of the key before it, while that one signs too.
    pub old_secret: Option<String>,
    /// Where to.
    pub url: String,
    /// Number of the event it tells of.
    pub seq: u64,
    /// The state it tells of.
    pub kind: String,
    /// The body, as it is signed and sent.
    pub body: String,
    /// When the change happened.
    pub created_unix_ms: u64,
    /// Tries before this one.
    pub tries: u32,
    /// When it was given up.
    pub dead_unix_ms: Option<u64>,
    /// How the last try failed.
    pub last_error: Option<String>,
}

impl Database {
    /// Makes a webhook. False when there are [`WEBHOOKS_MAX`] already.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn create_webhook(&self, webhook: Webhook) -> Result<bool, DbError> {
        write_tx!(self, "make a webhook", [webhook], |tx| {
            let tenant = webhook.tenant.as_ref().map_or("", TenantName::as_str);
            let sql = "select count(*) as n from webhooks where coalesce(tenant, '') = $1";
            let row = tx.row(sql, args![tenant]).await?;
            if row.ok_or(DbError::missing("n"))?.u32("n")? >= WEBHOOKS_MAX {
                return Ok(false);
            }
            put(tx, &webhook).await.map(|()| true)
        })
    }

    /// One webhook.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn webhook(&self, id: &TokenId) -> Result<Option<Webhook>, DbError> {
        let id = id.clone();
        self.read("read a webhook", |tx| {
            Box::pin(async move {
                let sql = "select * from webhooks where id = $1";
                let row = tx.row(sql, args![id.as_str()]).await?;
                let now = tx.now().await?;
                row.as_ref().map(|row| webhook(row, now)).transpose()
            })
        })
        .await
    }

    /// Messages that wait or were given up, by name, after the one named `after`.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn messages(
        &self,
        filter: &MessageFilter,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Message>, DbError> {
        let tenant = filter
            .tenant
            .as_ref()
            .map_or(String::new(), ToString::to_string);
        let webhook = filter
            .webhook
            .as_ref()
            .map_or(String::new(), ToString::to_string);
        let dead = filter.dead.map_or(-1, i64::from);
        let after = after.unwrap_or_default().to_owned();
        self.read("list webhook messages", |tx| {
            Box::pin(async move {
                let sql = "select o.*, w.secret, w.old_secret, w.old_until_ms from outbox o left join webhooks w on w.id = o.webhook
                    where ($1 = '' or o.tenant = $1) and ($2 = '' or o.webhook = $2) and o.id > $4
                        and ($3 < 0 or ($3 = 1 and o.dead_ms is not null) or ($3 = 0 and o.dead_ms is null))
                    order by o.id limit $5";
                let values = args![tenant, webhook, dead, after, limit.min(PAGE_MAX)];
                let rows = tx.rows(sql, values).await?;
                let now = tx.now().await?;
                rows.iter().map(|row| message(row, now)).collect()
            })
        })
        .await
    }

    /// Keeps a webhook, in place of one of the same name, whose keys stay: see [`Database::rotate_webhook`].
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn put_webhook(&self, webhook: Webhook) -> Result<(), DbError> {
        write_tx!(self, "keep a webhook", [webhook], |tx| {
            put(tx, &webhook).await
        })
    }

    /// Gives a webhook another key. The present one signs too for `overlap_ms`; one before it that still does is ended with `end_overlap`
    /// alone.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn rotate_webhook(
        &self,
        id: &TokenId,
        secret: &str,
        overlap_ms: u64,
        end_overlap: bool,
    ) -> Result<Rotated, DbError> {
        let (id, secret) = (id.clone(), secret.to_owned());
        write_tx!(self, "give a webhook another key", [id, secret], |tx| {
            let sql = "select * from webhooks where id = $1 /*lock webhooks*/";
            let Some(row) = tx.row(sql, args![id.as_str()]).await? else {
                return Ok(Rotated::Absent);
            };
            let now = tx.now().await?;
            let mut known = webhook(&row, now)?;
            if let Some(old) = known.old.as_ref().filter(|_| !end_overlap) {
                let until_unix_ms = old.until_unix_ms;
                return Ok(Rotated::Overlaps { until_unix_ms });
            }
            let until_unix_ms = now.saturating_add(overlap_ms);
            let before = std::mem::replace(&mut known.secret, String::clone(&secret));
            known.old = (overlap_ms > 0).then_some(OldSecret {
                secret: before,
                until_unix_ms,
            });
            let sql =
                "update webhooks set secret = $2, old_secret = $3, old_until_ms = $4 where id = $1";
            let values = args![
                id.as_str(),
                secret.as_str(),
                known.old.as_ref().map(|old| old.secret.as_str()),
                known.old.as_ref().map(|old| old.until_unix_ms),
            ];
            tx.exec(sql, values).await?;
            Ok(Rotated::Done(known))
        })
    }

    /// Removes a webhook; what waits for it is not sent. False when there was none.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn remove_webhook(&self, id: &TokenId) -> Result<bool, DbError> {
        let id = id.clone();
        write_tx!(self, "remove a webhook", [id], |tx| {
            let sql = "delete from outbox where webhook = $1";
            tx.exec(sql, args![id.as_str()]).await?;
            let sql = "delete from webhooks where id = $1";
            Ok(tx.exec(sql, args![id.as_str()]).await? == 1)
        })
    }

    /// Webhooks of a tenant, or all, by name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn webhooks(&self, tenant: Option<&TenantName>) -> Result<Vec<Webhook>, DbError> {
        let tenant = tenant.map_or(String::new(), ToString::to_string);
        self.read("list webhooks", |tx| {
            Box::pin(async move {
                let sql = "select * from webhooks where $1 = '' or tenant = $1 order by id";
                let rows = tx.rows(sql, args![tenant]).await?;
                let now = tx.now().await?;
                rows.iter().map(|row| webhook(row, now)).collect()
            })
        })
        .await
    }

    /// Takes messages that are due, for `lease_ms`: then they are due again, unless they were sent or put off.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn outbox_take(&self, limit: u32, lease_ms: u64) -> Result<Vec<Message>, DbError> {
        write_tx!(self, "take webhooks to send", [], |tx| {
            let now = tx.now().await?;
            let sql = "select o.*, w.secret, w.old_secret, w.old_until_ms from outbox o left join webhooks w on w.id = o.webhook
                where o.dead_ms is null and o.due_ms <= $1 order by o.due_ms, o.id limit $2 /*lock o skip*/";
            let rows = tx.rows(sql, args![now, limit.min(PAGE_MAX)]).await?;
            let read = rows.iter().map(|row| message(row, now));
            let taken = read.collect::<Result<Vec<_>, _>>()?;
            let ids: Vec<_> = taken.iter().map(|message| [&message.id]).collect();
            let sql = "update outbox set due_ms = $2, tries = tries + 1 from json_each($1) e
                where outbox.id = (e.value ->> 0)";
            if !ids.is_empty() {
                tx.exec(sql, args![json(&ids), now + lease_ms]).await?;
            }
            Ok(taken)
        })
    }

    /// A message was sent.
    ///
    /// # Errors
    /// When the database does not answer: it may be sent again then.
    pub async fn outbox_sent(&self, id: &str) -> Result<(), DbError> {
        let id = id.to_owned();
        write_tx!(self, "note a sent webhook", [id], |tx| {
            let sql = "delete from outbox where id = $1";
            tx.exec(sql, args![id.as_str()]).await.map(drop)
        })
    }

    /// A try failed: again after `wait_ms`, or never when there is none.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn outbox_failed(
        &self,
        id: &str,
        error: &str,
        wait_ms: Option<u64>,
    ) -> Result<(), DbError> {
        let (id, error) = (
            id.to_owned(),
            error.chars().take(ERROR_MAX).collect::<String>(),
        );
        write_tx!(self, "note a failed webhook", [id, error], |tx| {
            let now = tx.now().await?;
            let dead = wait_ms.is_none().then_some(now);
            let sql = "update outbox set due_ms = $2, dead_ms = $3, last_error = $4 where id = $1";
            let due = now + wait_ms.unwrap_or_default();
            tx.exec(sql, args![id.as_str(), due, dead, error.as_str()])
                .await
                .map(drop)
        })
    }

    /// A message that was taken was not tried: it is due again after `wait_ms`, and the try does not count.
    ///
    /// # Errors
    /// When the database does not answer: it is due again when it would have been.
    pub async fn outbox_put_back(&self, id: &str, wait_ms: u64) -> Result<(), DbError> {
        let id = id.to_owned();
        write_tx!(self, "give a webhook back", [id], |tx| {
            let now = tx.now().await?;
            let sql = "update outbox set due_ms = $2, tries = tries - 1 where id = $1 and tries > 0 and dead_ms is null";
            tx.exec(sql, args![id.as_str(), now + wait_ms])
                .await
                .map(drop)
        })
    }

    /// When the next message is due; none when nothing waits.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn outbox_next(&self) -> Result<Option<u64>, DbError> {
        self.read("look when a webhook is due", |tx| {
            Box::pin(async move {
                let sql = "select min(due_ms) as due from outbox where dead_ms is null";
                let row = tx.row(sql, args![]).await?;
                row.map_or(Ok(None), |row| row.opt_u64("due"))
            })
        })
        .await
    }

    /// Messages that were given up, of a tenant or all, oldest first, after the one named `after`.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn dead_letters(
        &self,
        tenant: Option<&TenantName>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Message>, DbError> {
        let tenant = tenant.map_or(String::new(), ToString::to_string);
        let after = after.unwrap_or_default().to_owned();
        self.read("list dead letters", |tx| {
            Box::pin(async move {
                let sql = "select o.*, w.secret, w.old_secret, w.old_until_ms from outbox o left join webhooks w on w.id = o.webhook
                    where o.dead_ms is not null and ($1 = '' or o.tenant = $1) and o.id > $2 order by o.id limit $3";
                let rows = tx.rows(sql, args![tenant, after, limit.min(PAGE_MAX)]).await?;
                let now = tx.now().await?;
                rows.iter().map(|row| message(row, now)).collect()
            })
        })
        .await
    }

    /// Sends a dead letter again, from its first try. False when there is none of this name (in this tenant).
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn replay(&self, id: &str, tenant: Option<&TenantName>) -> Result<bool, DbError> {
        let id = id.to_owned();
        let tenant = tenant.map_or(String::new(), ToString::to_string);
        write_tx!(self, "send a dead letter again", [id, tenant], |tx| {
            let now = tx.now().await?;
            let sql = "update outbox set dead_ms = null, tries = 0, due_ms = $2
                where id = $1 and dead_ms is not null and ($3 = '' or tenant = $3)";
            let changed = tx
                .exec(sql, args![id.as_str(), now, tenant.as_str()])
                .await?;
            tx.wake(Wake::Outbox);
            Ok(changed == 1)
        })
    }
}

async fn put(tx: &mut Tx, webhook: &Webhook) -> Result<(), DbError> {
    let now = tx.now().await?;
    let sql =
        "insert into webhooks (id, tenant, url, secret, kinds, enabled, created_ms, created_by)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        on conflict (id) do update set tenant = excluded.tenant, url = excluded.url,
            kinds = excluded.kinds, enabled = excluded.enabled";
    let values = args![
        webhook.id.as_str(),
        webhook.tenant.as_ref().map(TenantName::as_str),
        webhook.url.as_str(),
        webhook.secret.as_str(),
        json(&webhook.kinds),
        webhook.enabled,
        now,
        webhook.created_by.as_str(),
    ];
    tx.exec(sql, values).await.map(drop)
}

/// The key before the present one, if it signs still.
fn old_secret(row: &Row, now: u64) -> Result<Option<OldSecret>, DbError> {
    let old = row
        .opt_text("old_secret")?
        .zip(row.opt_u64("old_until_ms")?);
    Ok(old
        .filter(|(_, until)| now < *until)
        .map(|(secret, until_unix_ms)| OldSecret {
            secret,
            until_unix_ms,
        }))
}

fn webhook(row: &Row, now: u64) -> Result<Webhook, DbError> {
    Ok(Webhook {
        id: row.parse("id")?,
        tenant: row.opt_parse("tenant")?,
        url: row.text("url")?,
        secret: row.text("secret")?,
        old: old_secret(row, now)?,
        kinds: row.json("kinds")?,
        enabled: row.flag("enabled")?,
        created_by: row.text("created_by")?,
    })
}

fn message(row: &Row, now: u64) -> Result<Message, DbError> {
    Ok(Message {
        id: row.text("id")?,
        job: row.parse("job")?,
        tenant: row.parse("tenant")?,
        webhook: row.opt_parse("webhook")?,
        secret: row.opt_text("secret")?,
        old_secret: old_secret(row, now)?.map(|old| old.secret),
        url: row.text("url")?,
        seq: row.u64("seq")?,
        kind: row.text("kind")?,
        body: row.text("body")?,
        created_unix_ms: row.u64("created_ms")?,
        tries: row.u32("tries")?,
        dead_unix_ms: row.opt_u64("dead_ms")?,
        last_error: row.opt_text("last_error")?,
    })
}
