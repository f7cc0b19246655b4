//! Tokens of people and services: only their digests are here. And short-lived tokens that were called back.

use std::collections::BTreeSet;

use kiln_core::{Digest, TenantName, TokenId};
use serde_json::Value;

use crate::database::{Database, write_tx};
use crate::engine::{Row, args, json};
use crate::error::DbError;

/// The last use is written at most this often.
const LAST_USED_STEP_MS: u64 = 60_000;

/// A token on its way in. The secret itself is never here.
#[derive(Clone, PartialEq, Debug)]
pub struct NewToken {
    /// Its public name.
    pub id: TokenId,
    /// Digest of the secret (which is random, so that a plain digest is enough).
    pub hash: Digest,
    /// Whose.
    pub tenant: TenantName,
    /// Role, as the controller names it.
    pub role: String,
    /// What it may be used for; empty means what its role may.
    pub scopes: BTreeSet<String>,
    /// What else the controller decides by: highest priority, trust class.
    pub claims: Value,
    /// For people.
    pub description: String,
    /// Not good from then on, milliseconds since the Unix epoch.
    pub expires_unix_ms: Option<u64>,
    /// Who made it.
    pub created_by: String,
}

/// A token as it is kept.
#[derive(Clone, PartialEq, Debug)]
pub struct Token {
    /// Its public name.
    pub id: TokenId,
    /// Whose.
    pub tenant: TenantName,
    /// Role.
    pub role: String,
    /// What it may be used for.
    pub scopes: BTreeSet<String>,
    /// What else the controller decides by.
    pub claims: Value,
    /// For people.
    pub description: String,
    /// When it was made.
    pub created_unix_ms: u64,
    /// Who made it.
    pub created_by: String,
    /// Not good from then on.
    pub expires_unix_ms: Option<u64>,
    /// When it was called back.
    pub revoked_unix_ms: Option<u64>,
    /// When it was used last, to the minute.
    pub last_used_unix_ms: Option<u64>,
}

/// Why a token opens nothing.
#[derive(Debug, thiserror::Error)]
pub enum TokenRefused {
    /// No such token.
    #[error("this token is not known")]
    Unknown,
    /// It is too old.
    #[error("token {0} has expired")]
    Expired(TokenId),
    /// It was called back.
    #[error("token {0} was revoked")]
    Revoked(TokenId),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
}

impl Database {
    /// Keeps a token. False when there is one of this name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn create_token(&self, token: NewToken) -> Result<bool, DbError> {
        write_tx!(self, "keep a token", [token], |tx| {
            let now = tx.now().await?;
            let sql = "insert into tokens (id, hash, tenant, role, scopes, claims, description, created_ms, created_by,
                    expires_ms)
                values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) on conflict (id) do nothing";
            let values = args![
                token.id.as_str(),
                token.hash.to_string(),
                token.tenant.as_str(),
                token.role.as_str(),
                json(&token.scopes),
                json(&token.claims),
                token.description.as_str(),
                now,
                token.created_by.as_str(),
                token.expires_unix_ms,
            ];
            Ok(tx.exec(sql, values).await? == 1)
        })
    }

    /// The token with this digest, if it is good now. Notes its use.
    ///
    /// # Errors
    /// Why it is not good.
    pub async fn use_token(&self, hash: &Digest) -> Result<Token, TokenRefused> {
        let text = hash.to_string();
        let found = self.read("look for a token", |tx| {
            Box::pin(async move {
                let now = tx.now().await?;
                let row = tx.row("select * from tokens where hash = $1", args![text]);
                let found = row.await?.as_ref().map(token_row).transpose()?;
                Ok(found.map(|found| (found, now)))
            })
        });
        let (found, now) = found.await?.ok_or(TokenRefused::Unknown)?;
        if found.revoked_unix_ms.is_some() {
            return Err(TokenRefused::Revoked(found.id));
        }
        if found.expires_unix_ms.is_some_and(|end| now >= end) {
            return Err(TokenRefused::Expired(found.id));
        }
        let fresh = |at: u64| now.saturating_sub(at) < LAST_USED_STEP_MS;
        if !found.last_used_unix_ms.is_some_and(fresh) {
            let id = found.id.clone();
            let noted = write_tx!(self, "note a token's use", [id], |tx| {
                let sql = "update tokens set last_used_ms = $2 where id = $1";
                tx.exec(sql, args![id.as_str(), now]).await
            });
            if let Err(error) = noted {
                // A disk that is full keeps nobody out.
                tracing::warn!(%error, token = %found.id, "the use of a token was not noted");
            }
        }
        Ok(found)
    }

    /// Tokens of a tenant, or all, by name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn tokens(&self, tenant: Option<&TenantName>) -> Result<Vec<Token>, DbError> {
        let tenant = tenant.map_or(String::new(), ToString::to_string);
        self.read("list tokens", |tx| {
            Box::pin(async move {
                let sql = "select * from tokens where $1 = '' or tenant = $1 order by id";
                let rows = tx.rows(sql, args![tenant]).await?;
                rows.iter().map(token_row).collect()
            })
        })
        .await
    }

    /// Calls a token back, for ever. False when there is none (in this tenant).
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn revoke_token(
        &self,
        id: &TokenId,
        tenant: Option<&TenantName>,
    ) -> Result<bool, DbError> {
        let id = id.clone();
        let tenant = tenant.map_or(String::new(), ToString::to_string);
        write_tx!(self, "revoke a token", [id, tenant], |tx| {
            let now = tx.now().await?;
            let sql = "update tokens set revoked_ms = coalesce(revoked_ms, $2)
                where id = $1 and ($3 = '' or tenant = $3)";
            let changed = tx
                .exec(sql, args![id.as_str(), now, tenant.as_str()])
                .await?;
            Ok(changed == 1)
        })
    }

    /// Calls a short-lived token back by its id (`jti`); kept until its own end.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn revoke_session(&self, id: &str, until_unix_ms: u64) -> Result<(), DbError> {
        let id = id.to_owned();
        write_tx!(self, "revoke a session", [id], |tx| {
            let now = tx.now().await?;
            tx.exec("delete from revoked where until_ms < $1", args![now])
                .await?;
            let sql = "insert into revoked (id, until_ms) values ($1, $2)
                on conflict (id) do update set until_ms = excluded.until_ms";
            tx.exec(sql, args![id.as_str(), until_unix_ms])
                .await
                .map(drop)
        })
    }

    /// Whether a short-lived token was called back.
    ///
    /// # Errors
    /// When the database does not answer: then it opens nothing.
    pub async fn session_revoked(&self, id: &str) -> Result<bool, DbError> {
        let id = id.to_owned();
        self.read("look for a revoked session", |tx| {
            Box::pin(async move {
                let sql = "select 1 as one from revoked where id = $1";
                Ok(tx.row(sql, args![id]).await?.is_some())
            })
        })
        .await
    }
}

fn token_row(row: &Row) -> Result<Token, DbError> {
    Ok(Token {
        id: row.parse("id")?,
        tenant: row.parse("tenant")?,
        role: row.text("role")?,
        scopes: row.json("scopes")?,
        claims: row.json("claims")?,
        description: row.text("description")?,
        created_unix_ms: row.u64("created_ms")?,
        created_by: row.text("created_by")?,
        expires_unix_ms: row.opt_u64("expires_ms")?,
        revoked_unix_ms: row.opt_u64("revoked_ms")?,
        last_used_unix_ms: row.opt_u64("last_used_ms")?,
    })
}
