//! Tokens of the user door: short-lived, made here from something that proved more (a service token, an OIDC token).

use std::collections::BTreeSet;

use kiln_core::access::Principal;
use kiln_core::job::TrustClass;
use kiln_core::{Action, Priority, Role, TenantName, TokenId};
use serde::{Deserialize, Serialize};

use super::door::USER;
use super::jwt::{self, Registered, TokenRefused};
use super::keys::{KeyRing, SignError};
use super::sealed::random;

/// Life of a user token unless less was asked.
pub const USER_LIFE_S: u64 = 900;

/// kiln's own claims of a user token.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserClaims {
    tenant: TenantName,
    role: Role,
    #[serde(default)]
    operator: bool,
    #[serde(default)]
    scopes: Option<BTreeSet<Action>>,
    priority_max: Priority,
    trust: TrustClass,
    /// What it was made from: when that is revoked, so is this.
    #[serde(default)]
    parent: Option<TokenId>,
    /// See [`Principal::gives_until_unix_ms`].
    #[serde(default)]
    gives_until_unix_ms: Option<u64>,
}

/// A token that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserToken {
    /// Its text.
    pub text: String,
    /// Its own id.
    pub id: TokenId,
    /// Its end, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
}

/// A token that was verified in everything but revocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedUser {
    /// Who it speaks for.
    pub principal: Principal,
    /// Its own id, and what it was made from: revoked if either is.
    pub revocable: Vec<TokenId>,
}

/// Makes a token for a principal, for at most `life_s` seconds and never beyond the end of what it is made from.
pub(crate) fn issue(
    ring: &KeyRing,
    issuer: &str,
    principal: &Principal,
    life_s: u64,
    now_ms: u64,
) -> Result<UserToken, SignError> {
    let now = now_ms / 1000;
    let ends = principal.expires_unix_ms.map_or(u64::MAX, |ms| ms / 1000);
    let exp = (now + life_s.clamp(1, USER.life_max_s)).min(ends);
    let id = format!("jwt-{}", hex::encode(random::<12>()));
    let registered = Registered {
        iss: issuer.to_owned(),
        aud: USER.audience.to_owned(),
        sub: principal.subject.clone(),
        iat: now,
        nbf: now,
        exp,
        jti: id.clone(),
    };
    let own = UserClaims {
        tenant: principal.tenant.clone(),
        role: principal.role,
        operator: principal.operator,
        scopes: principal.scopes.clone(),
        priority_max: principal.priority_max,
        trust: principal.trust,
        parent: principal.token.clone(),
        gives_until_unix_ms: principal.gives_until_unix_ms,
    };
    Ok(UserToken {
        text: jwt::sign(ring, USER, registered, own)?,
        id: id.parse().map_err(|_| SignError)?,
        expires_unix_ms: exp * 1000,
    })
}

/// Checks a token at the user door.
pub(crate) fn verify(
    ring: &KeyRing,
    issuer: &str,
    text: &str,
    now_ms: u64,
) -> Result<VerifiedUser, TokenRefused> {
    let (registered, own) = jwt::verify::<UserClaims>(ring, USER, issuer, text, now_ms)?;
    let id: TokenId = registered
        .jti
        .parse()
        .map_err(|_| TokenRefused::Malformed)?;
    let mut revocable = vec![id.clone()];
    revocable.extend(own.parent);
    Ok(VerifiedUser {
        principal: Principal {
            subject: registered.sub,
            token: Some(id),
            tenant: own.tenant,
            role: own.role,
            operator: own.operator,
            scopes: own.scopes,
            priority_max: own.priority_max,
            trust: own.trust,
            expires_unix_ms: Some(registered.exp.saturating_mul(1000)),
            gives_until_unix_ms: own.gives_until_unix_ms,
        },
        revocable,
    })
}
