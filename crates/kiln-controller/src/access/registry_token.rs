//! Tokens of the registry door: at most five minutes, named repositories and actions, and for a build bound to its attempt and the
//! epoch it was made under, which is looked up again at every request.

use kiln_core::lease::LeaseRefused;
use kiln_core::{AttemptId, Epoch, Lease, TenantName, TokenId, WorkerId};
use serde::{Deserialize, Serialize};

use super::door::{REGISTRY, REGISTRY_LIFE_MAX_S};
use super::jwt::{self, Registered, TokenRefused};
use super::keys::{KeyRing, SignError};
use super::sealed::random;

/// Most repositories one token may name.
pub const REPOSITORIES_MAX: usize = 16;

/// What may be done in a repository.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegistryAction {
    /// Read.
    Pull,
    /// Write.
    Push,
}

/// Actions on one repository, by its whole name: there are no patterns.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryGrant {
    /// Name.
    pub name: String,
    /// What.
    pub actions: Vec<RegistryAction>,
}

/// For whom a registry token was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "for")]
pub enum Holder {
    /// The worker that runs an attempt, under one claim of it.
    Attempt {
        /// The attempt.
        attempt: AttemptId,
        /// Who runs it.
        worker: WorkerId,
        /// Under which claim.
        epoch: Epoch,
    },
    /// A person or service, by the token it showed at the user door.
    Person {
        /// That token.
        token: Option<TokenId>,
        /// What that one was made from, if it was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<TokenId>,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RegistryClaims {
    tenant: TenantName,
    holder: Holder,
    access: Vec<RepositoryGrant>,
}

/// A registry token that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedRegistryToken {
    /// Its text.
    pub text: String,
    /// Its end, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
}

/// What a verified registry token is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryGrant {
    /// Whose.
    pub tenant: TenantName,
    /// For whom it was made.
    pub holder: Holder,
    /// What it allows.
    pub access: Vec<RepositoryGrant>,
    /// Its end, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
}

impl RegistryGrant {
    /// Whether it allows an action in a repository.
    #[must_use]
    pub fn allows(&self, repository: &str, action: RegistryAction) -> bool {
        self.access
            .iter()
            .any(|grant| grant.name == repository && grant.actions.contains(&action))
    }

    /// The lease it was made under, as it is presented at a door: its deadline is the database's to know.
    #[must_use]
    pub fn lease(&self) -> Option<Lease> {
        match &self.holder {
            Holder::Attempt {
                attempt,
                worker,
                epoch,
            } => Some(Lease {
                attempt: attempt.clone(),
                tenant: self.tenant.clone(),
                worker: worker.clone(),
                epoch: *epoch,
                deadline_unix_ms: 0,
            }),
            Holder::Person { .. } => None,
        }
    }
}

/// Why a request at the registry door was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RegistryRefused {
    /// The token itself.
    #[error("the registry token was refused")]
    Token(#[from] TokenRefused),
    /// The attempt it was made for is not the live one any more.
    #[error("the attempt that this registry token was made for does not hold its lease")]
    Lease(#[from] LeaseRefused),
}

/// Makes a token; more repositories than [`REPOSITORIES_MAX`] are a mistake of the caller's and refused.
pub(crate) fn issue(
    ring: &KeyRing,
    issuer: &str,
    grant: RegistryGrant,
    now_ms: u64,
) -> Result<IssuedRegistryToken, SignError> {
    if grant.access.len() > REPOSITORIES_MAX {
        return Err(SignError);
    }
    let now = now_ms / 1000;
    let exp = (now + REGISTRY_LIFE_MAX_S).min(grant.expires_unix_ms / 1000);
    let sub = match &grant.holder {
        Holder::Attempt { attempt, .. } => format!("attempt:{attempt}"),
        Holder::Person { .. } => "person".to_owned(),
    };
    let registered = Registered {
        iss: issuer.to_owned(),
        aud: REGISTRY.audience.to_owned(),
        sub,
        iat: now,
        nbf: now,
        exp,
        jti: hex::encode(random::<12>()),
    };
    let own = RegistryClaims {
        tenant: grant.tenant,
        holder: grant.holder,
        access: grant.access,
    };
    Ok(IssuedRegistryToken {
        text: jwt::sign(ring, REGISTRY, registered, own)?,
        expires_unix_ms: exp * 1000,
    })
}

/// Checks a token in everything but its lease.
pub(crate) fn verify(
    ring: &KeyRing,
    issuer: &str,
    text: &str,
    now_ms: u64,
) -> Result<RegistryGrant, TokenRefused> {
    let (registered, own) = jwt::verify::<RegistryClaims>(ring, REGISTRY, issuer, text, now_ms)?;
    Ok(RegistryGrant {
        tenant: own.tenant,
        holder: own.holder,
        access: own.access,
        expires_unix_ms: registered.exp.saturating_mul(1000),
    })
}
