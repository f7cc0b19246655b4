//! Secrets that tenants keep, sealed by the caller: rows, who may have them under a lease, and who had them.

use kiln_core::secret::{SECRETS_MAX, SecretJob, SecretRefused, SecretScope, decide};
use kiln_core::{JobRequest, Lease, SecretName, TenantName};
use serde_json::{Value, json as object};

use crate::audit::{AuditRow, NewAudit, audit_row, write_audit};
use crate::database::{Database, write_tx};
use crate::door::DoorError;
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;
use crate::lease::admit;
use crate::list::PAGE_MAX;

/// Audit action of a secret that was given to a worker, or refused to one.
pub const SECRET_READ: &str = "secret.read";

/// Where a secret's value is.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretValue {
    /// Here, sealed by a key that is elsewhere, for this tenant, name and version alone.
    Sealed(String),
    /// Elsewhere: it is fetched when a job needs it.
    Source(String),
}

impl std::fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sealed(_) => f.write_str("Sealed"),
            Self::Source(source) => write!(f, "Source({source:?})"),
        }
    }
}

/// A secret as it is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Secret {
    /// Whose.
    pub tenant: TenantName,
    /// Its name, unique within the tenant.
    pub name: SecretName,
    /// Counts the values it had, from 1.
    pub version: u64,
    /// Where its value is.
    pub value: SecretValue,
    /// Which jobs may have it.
    pub scope: SecretScope,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Who made it.
    pub created_by: String,
    /// When it got its present value, if not when it was made.
    pub rotated_unix_ms: Option<u64>,
    /// Who gave it.
    pub rotated_by: Option<String>,
}

/// A value for a secret.
#[derive(Clone, Debug)]
pub struct NewValue {
    /// Whose.
    pub tenant: TenantName,
    /// Which.
    pub name: SecretName,
    /// The version it was sealed for: one more than the present one, 1 for a new secret.
    pub version: u64,
    /// The value.
    pub value: SecretValue,
    /// A new scope; none keeps the present one, which is the widest for a new secret.
    pub scope: Option<SecretScope>,
    /// Who gives it.
    pub by: String,
}

/// What became of a new value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// It is kept.
    Kept,
    /// Somebody else changed the secret meanwhile: look, seal and try again.
    Changed,
    /// The tenant has as many secrets as it may have.
    TooMany,
}

/// Where a job's secret comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SecretFrom {
    /// The request brought it: it is the job's own.
    Request {
        /// Whether it is still here; a controller that was started again has lost it.
        here: bool,
    },
    /// The tenant's store.
    Store,
}

/// What a worker is told of a secret.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opened {
    /// The job may have it.
    Allowed(Box<Secret>),
    /// Its value came with the request.
    Given,
    /// It may not.
    Refused(SecretRefused),
    /// There is none.
    Missing,
}

impl Opened {
    /// Why a job does not get it, as audit rows and metrics have it.
    #[must_use]
    pub fn refused(&self) -> Option<&'static str> {
        match self {
            Self::Allowed(_) | Self::Given => None,
            Self::Refused(why) => Some(why.code()),
            Self::Missing => Some("missing"),
        }
    }
}

impl Database {
    /// A secret of a tenant.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn secret(
        &self,
        tenant: &TenantName,
        name: &SecretName,
    ) -> Result<Option<Secret>, DbError> {
        let (tenant, name) = (tenant.clone(), name.clone());
        self.read("look for a secret", |tx| {
            Box::pin(async move { find(tx, &tenant, &name).await })
        })
        .await
    }

    /// All secrets of a tenant, by name; at most [`SECRETS_MAX`].
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn secrets(&self, tenant: &TenantName) -> Result<Vec<Secret>, DbError> {
        let tenant = tenant.clone();
        self.read("list secrets", |tx| {
            Box::pin(async move {
                let sql = "select * from secrets where tenant = $1 order by name";
                let rows = tx.rows(sql, args![tenant.as_str()]).await?;
                rows.iter().map(secret_row).collect()
            })
        })
        .await
    }

    /// Keeps a value: of a new secret, or in the place of the present one, which is gone then.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn write_secret(&self, new: NewValue) -> Result<Written, DbError> {
        write_tx!(self, "keep a secret", [new], |tx| write(tx, &new).await)
    }

    /// Changes which jobs may have a secret. False when there is none.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn set_secret_scope(
        &self,
        tenant: &TenantName,
        name: &SecretName,
        scope: &SecretScope,
    ) -> Result<bool, DbError> {
        let (tenant, name, scope) = (tenant.clone(), name.clone(), json(scope));
        write_tx!(
            self,
            "change a secret's scope",
            [tenant, name, scope],
            |tx| {
                let sql = "update secrets set scope = $3 where tenant = $1 and name = $2";
                let values = args![tenant.as_str(), name.as_str(), scope.as_str()];
                Ok(tx.exec(sql, values).await? == 1)
            }
        )
    }

    /// Forgets a secret. False when there is none.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn remove_secret(
        &self,
        tenant: &TenantName,
        name: &SecretName,
    ) -> Result<bool, DbError> {
        let (tenant, name) = (tenant.clone(), name.clone());
        write_tx!(self, "remove a secret", [tenant, name], |tx| {
            let sql = "delete from secrets where tenant = $1 and name = $2";
            Ok(tx.exec(sql, args![tenant.as_str(), name.as_str()]).await? == 1)
        })
    }

    /// Whether the holder of a lease gets a secret that its job names, decided at this moment; the answer is an audit row of the same
    /// transaction.
    ///
    /// # Errors
    /// When the lease is not the live one, or the job is being cancelled.
    pub async fn open_secret(
        &self,
        lease: &Lease,
        request: &JobRequest,
        name: &str,
        from: SecretFrom,
    ) -> Result<Opened, DoorError> {
        let job = SecretJob::of(request).using(request, name);
        let (lease, name) = (lease.clone(), name.to_owned());
        write_tx!(self, "open a secret", [lease, job, name], |tx| {
            let live = match admit(tx, &lease).await? {
                Ok(live) => live,
                Err(refused) => {
                    let row = read_row(&lease, &name, Some("lease"), &Value::Null);
                    write_audit(tx, &row).await?;
                    return Ok(Err(refused.into()));
                }
            };
            if live.cancel.is_some() {
                let row = read_row(&lease, &name, Some("cancelled"), &Value::Null);
                write_audit(tx, &row).await?;
                return Ok(Err(DoorError::Cancelled));
            }
            let opened = match from {
                SecretFrom::Request { here: true } => Opened::Given,
                SecretFrom::Request { here: false } => Opened::Missing,
                SecretFrom::Store => look(tx, &live.tenant, &job, &name).await?,
            };
            let more = match &opened {
                Opened::Allowed(secret) => object!({ "version": secret.version }),
                Opened::Given => object!({ "from": "request" }),
                Opened::Refused(_) | Opened::Missing => Value::Null,
            };
            write_audit(tx, &read_row(&lease, &name, opened.refused(), &more)).await?;
            Ok(Ok(opened))
        })?
    }

    /// Whether a request may have every secret of the store that it names, before it is queued: the first that it may not have, and why.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn refused_secret(
        &self,
        request: &JobRequest,
    ) -> Result<Option<(SecretName, Opened)>, DbError> {
        let as_used = |name: &SecretName| SecretJob::of(request).using(request, name.as_str());
        let names = request.stored_secrets().into_iter();
        let names: Vec<(SecretName, SecretJob)> =
            names.map(|name| (name.clone(), as_used(name))).collect();
        if names.is_empty() {
            return Ok(None);
        }
        let tenant = request.tenant.clone();
        self.read("look for secrets", |tx| {
            Box::pin(async move {
                for (name, job) in names {
                    let opened = look(tx, &tenant, &job, name.as_str()).await?;
                    if opened.refused().is_some() {
                        return Ok(Some((name, opened)));
                    }
                }
                Ok(None)
            })
        })
        .await
    }

    /// Audit rows about one secret of a tenant after `after`, oldest first.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn secret_accesses(
        &self,
        tenant: &TenantName,
        name: &SecretName,
        after: u64,
        limit: u32,
    ) -> Result<Vec<AuditRow>, DbError> {
        let (tenant, name) = (tenant.clone(), name.clone());
        self.read("read who had a secret", |tx| {
            Box::pin(async move {
                let sql = "select * from audit where tenant = $1 and target = $2 and seq > $3 and action like 'secret%'
                    order by seq limit $4";
                let values = args![tenant.as_str(), name.as_str(), after, limit.min(PAGE_MAX)];
                let rows = tx.rows(sql, values).await?;
                rows.iter().map(audit_row).collect()
            })
        })
        .await
    }
}

/// The audit row of a worker that asked for a secret.
fn read_row(lease: &Lease, name: &str, refused: Option<&str>, more: &Value) -> NewAudit {
    let mut detail = object!({
        "job": lease.attempt.job, "attempt": lease.attempt.number, "epoch": lease.epoch.to_string(),
    });
    if let (Some(detail), Some(more)) = (detail.as_object_mut(), more.as_object()) {
        detail.extend(more.clone());
    }
    NewAudit {
        actor: format!("worker:{}", lease.worker),
        tenant: Some(lease.tenant.clone()),
        action: SECRET_READ.to_owned(),
        target: name.to_owned(),
        allowed: refused.is_none(),
        reason: refused.map(str::to_owned),
        detail: Some(detail),
    }
}

async fn look(
    tx: &mut Tx,
    tenant: &TenantName,
    job: &SecretJob,
    name: &str,
) -> Result<Opened, DbError> {
    let Ok(name) = name.parse() else {
        return Ok(Opened::Missing);
    };
    let Some(secret) = find(tx, tenant, &name).await? else {
        return Ok(Opened::Missing);
    };
    Ok(match decide(&secret.tenant, &secret.scope, job) {
        Ok(()) => Opened::Allowed(Box::new(secret)),
        Err(refused) => Opened::Refused(refused),
    })
}

async fn find(
    tx: &mut Tx,
    tenant: &TenantName,
    name: &SecretName,
) -> Result<Option<Secret>, DbError> {
    let sql = "select * from secrets where tenant = $1 and name = $2";
    let row = tx.row(sql, args![tenant.as_str(), name.as_str()]).await?;
    row.as_ref().map(secret_row).transpose()
}

async fn write(tx: &mut Tx, new: &NewValue) -> Result<Written, DbError> {
    let now = tx.now().await?;
    let (sealed, source) = match &new.value {
        SecretValue::Sealed(sealed) => (Some(sealed.as_str()), None),
        SecretValue::Source(source) => (None, Some(source.as_str())),
    };
    let (tenant, name) = (new.tenant.as_str(), new.name.as_str());
    let scope = new.scope.as_ref().map(json);
    if new.version > 1 {
        let sql = "update secrets set version = $3, sealed = $4, source = $5, scope = coalesce($6, scope),
                rotated_ms = $7, rotated_by = $8
            where tenant = $1 and name = $2 and version = $3 - 1";
        let by = new.by.as_str();
        let values = args![tenant, name, new.version, sealed, source, scope, now, by];
        return Ok(match tx.exec(sql, values).await? {
            0 => Written::Changed,
            _ => Written::Kept,
        });
    }
    // Makers of secrets of one tenant take turns, so that the count holds.
    let sql = "select name from tenants where name = $1 /*lock tenants*/";
    tx.row(sql, args![tenant]).await?;
    let sql = "select count(*) as n from secrets where tenant = $1";
    let row = tx.row(sql, args![tenant]).await?;
    if row.ok_or(DbError::missing("n"))?.u32("n")? >= SECRETS_MAX {
        return Ok(Written::TooMany);
    }
    let scope = scope.unwrap_or_else(|| json(&SecretScope::default()));
    let sql =
        "insert into secrets (tenant, name, version, sealed, source, scope, created_ms, created_by)
        values ($1, $2, 1, $3, $4, $5, $6, $7) on conflict (tenant, name) do nothing";
    let values = args![tenant, name, sealed, source, scope, now, new.by.as_str()];
    Ok(match tx.exec(sql, values).await? {
        0 => Written::Changed,
        _ => Written::Kept,
    })
}

fn secret_row(row: &Row) -> Result<Secret, DbError> {
    let value = match (row.opt_text("sealed")?, row.opt_text("source")?) {
        (Some(sealed), _) => SecretValue::Sealed(sealed),
        (None, Some(source)) => SecretValue::Source(source),
        (None, None) => return Err(DbError::missing("sealed")),
    };
    Ok(Secret {
        tenant: row.parse("tenant")?,
        name: row.parse("name")?,
        version: row.u64("version")?,
        value,
        scope: row.json("scope")?,
        created_unix_ms: row.u64("created_ms")?,
        created_by: row.text("created_by")?,
        rotated_unix_ms: row.opt_u64("rotated_ms")?,
        rotated_by: row.opt_text("rotated_by")?,
    })
}
