//! Identity: keys, tokens, certificates, and who a caller is. Who may do what is [`kiln_core::access`].
//!
//! One key, audience and token type per door (DESIGN rule 13). Keys are files of their owner alone, outside the database; the
//! database keeps hashes. Read next: [`door`], [`jwt`], [`authority`].

pub mod authority;
mod controller_token;
pub mod door;
mod issuer_keys;
pub mod jwt;
mod keys;
pub mod oidc;
pub mod peer;
pub mod registry_token;
mod sealed;
mod secret_seal;
pub mod secret_token;
pub mod shown;
pub mod tls;
pub mod user_token;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::Path;

use kiln_core::access::Principal;
use kiln_core::lease::LeaseRefused;
use kiln_core::{Lease, TenantName, TokenId};
use kiln_store::logs::{LogKey, LogKeys};

pub use authority::{Authority, CertificateError, PeerCertificate, WorkerCertificate};
pub use door::Door;
pub use issuer_keys::IssuerError;
pub(crate) use issuer_keys::{is_safe_url, roots};
pub use jwt::TokenRefused;
pub use keys::SignError;
pub use oidc::{ExchangeRefused, Issuers, SubjectRule, TrustedIssuer};
pub use peer::{Peer, owner};
pub use registry_token::{
    Holder, IssuedRegistryToken, RegistryAction, RegistryGrant, RegistryRefused, RepositoryGrant,
};
pub use sealed::SealedError;
pub(crate) use sealed::random;
pub use secret_seal::{SealedAs, UnsealError};
pub use user_token::{UserToken, VerifiedUser};

use door::{CONTROLLER_LIFE_MAX_S, REGISTRY_LIFE_MAX_S, USER_LIFE_MAX_S};
use keys::KeyRing;
use sealed::Vault;
use secret_seal::SecretKeys;

/// The first key of logs and artifacts, and the first of stored secrets.
const FIRST_LOG_KEY: &str = "0001.key";

/// Everything a controller knows about identity.
#[derive(Debug)]
pub struct Access {
    issuer: String,
    user: KeyRing,
    registry: KeyRing,
    controller: KeyRing,
    authority: Authority,
    webhook: [u8; 32],
    cursor: [u8; 32],
    /// Keys of logs and artifacts at rest, the newest first.
    logs: Vec<[u8; 32]>,
    secrets: SecretKeys,
    issuers: Issuers,
}

impl Access {
    /// Opens the keys below `folder` (`keys` of the home), making those that are missing. `issuer` is this installation's name in
    /// its tokens: the same for every controller of one database.
    ///
    /// # Errors
    /// When a key file is open to others, damaged, or cannot be read or written.
    pub fn open(
        folder: &Path,
        issuer: &str,
        trusted: Vec<TrustedIssuer>,
        now_ms: u64,
    ) -> Result<Self, SealedError> {
        let vault = Vault::open(folder)?;
        let ring = |door: Door, life_s: u64| {
            KeyRing::open(
                vault.inner(door.name())?,
                (life_s + jwt::CLOCK_SKEW_S) * 1000,
                now_ms,
            )
        };
        let secret = |vault: &Vault, name: &str| -> Result<[u8; 32], SealedError> {
            let bytes = vault.read_or_create(name, || sealed::random::<32>().to_vec())?;
            bytes.try_into().map_err(|_| SealedError::Damaged {
                path: vault.path(name),
            })
        };
        // Every key of a folder, the newest first.
        let all = |vault: &Vault| {
            secret(vault, FIRST_LOG_KEY)?;
            let names = vault.names()?;
            let keys = names.iter().rev().map(|name| secret(vault, name));
            keys.collect::<Result<Vec<[u8; 32]>, SealedError>>()
        };
        Ok(Self {
            issuer: issuer.to_owned(),
            user: ring(Door::User, USER_LIFE_MAX_S)?,
            registry: ring(Door::Registry, REGISTRY_LIFE_MAX_S)?,
            controller: ring(Door::Controller, CONTROLLER_LIFE_MAX_S)?,
            authority: Authority::open(&vault.inner(Door::Worker.name())?, now_ms)?,
            webhook: secret(&vault.inner(Door::Webhook.name())?, "master.key")?,
            cursor: secret(&vault, "cursor.key")?,
            logs: all(&vault.inner("logs")?)?,
            secrets: SecretKeys::new(&all(&vault.inner("secrets")?)?),
            issuers: Issuers::new(trusted),
        })
    }

    /// This installation's name in its tokens.
    #[must_use]
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The certificate authority of workers.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Trusted issuers of identity tokens.
    #[must_use]
    pub fn issuers(&self) -> &Issuers {
        &self.issuers
    }

    /// Digest of what never changes among these keys: controllers of one database have the same.
    #[must_use]
    pub fn fingerprint(&self) -> kiln_core::Digest {
        let mut bytes = self.authority.fingerprint().to_string().into_bytes();
        bytes.extend_from_slice(&self.webhook);
        bytes.extend_from_slice(&self.cursor);
        // The first of them: later ones are added now and then.
        bytes.extend_from_slice(self.logs.last().map_or(&[][..], |key| key));
        kiln_core::Digest::of(&bytes)
    }

    /// Digest of all keys of this moment, those that are replaced now and then included.
    #[must_use]
    pub fn fingerprint_now(&self) -> kiln_core::Digest {
        let rings = [&self.user, &self.registry, &self.controller].map(KeyRing::public);
        let secrets = self.secrets.ids();
        let text = format!(
            "{} {} {secrets:?}",
            self.fingerprint(),
            serde_json::json!(rings)
        );
        kiln_core::Digest::of(text.as_bytes())
    }

    /// Makes a token by which this controller is known to the others of its database, for a minute or two.
    ///
    /// # Errors
    /// When signing fails.
    pub fn issue_controller(&self, id: &str, now_ms: u64) -> Result<String, SignError> {
        controller_token::issue(&self.controller, &self.issuer, id, now_ms)
    }

    /// Checks such a token; gives the other controller's name.
    ///
    /// # Errors
    /// Why it was refused.
    pub fn verify_controller(&self, token: &str, now_ms: u64) -> Result<String, TokenRefused> {
        if secret_token::is_secret(token) {
            return Err(TokenRefused::Kind);
        }
        controller_token::verify(&self.controller, &self.issuer, token, now_ms)
    }

    /// What the signing secrets of webhooks are derived from; nothing else is.
    #[must_use]
    pub fn webhook_master(&self) -> &[u8; 32] {
        &self.webhook
    }

    /// The keys of logs and artifacts at rest: the newest seals when they are `encrypted`; each opens what it sealed either way. A new key is a file
    /// whose name sorts after the others', in `logs` of the keys' folder.
    #[must_use]
    pub fn log_keys(&self, encrypted: bool) -> LogKeys {
        let mut keys = self.logs.iter().map(|secret| LogKey::new(*secret));
        match keys.next() {
            Some(current) if encrypted => LogKeys::new(current, keys),
            current => LogKeys::opening(current.into_iter().chain(keys)),
        }
    }

    /// Seals a stored secret's value. The newest key of the folder `secrets` among the keys seals, each opens what it sealed.
    ///
    /// # Errors
    /// When there is no key that works.
    pub fn seal_secret(&self, about: SealedAs<'_>, value: &[u8]) -> Result<String, SignError> {
        self.secrets.seal(about, value).ok_or(SignError)
    }

    /// Opens a stored secret's value.
    ///
    /// # Errors
    /// When it is not what was sealed as this, or its key is not here.
    pub fn open_secret(&self, about: SealedAs<'_>, sealed: &str) -> Result<Vec<u8>, UnsealError> {
        self.secrets.open(about, sealed)
    }

    /// What cursors of lists are authenticated with.
    #[must_use]
    pub fn cursor_key(&self) -> &[u8; 32] {
        &self.cursor
    }

    /// The public keys of the user door (RFC 7517), for others who want to verify its tokens.
    #[must_use]
    pub fn jwks(&self) -> serde_json::Value {
        serde_json::json!({ "keys": self.user.public() })
    }

    /// New keys for the token doors; tokens of the old ones stay good until they end by themselves.
    ///
    /// # Errors
    /// When a key file cannot be written.
    pub fn rotate(&self, now_ms: u64) -> Result<(), SealedError> {
        self.user.rotate(now_ms)?;
        self.controller.rotate(now_ms)?;
        self.registry.rotate(now_ms)
    }

    /// Reads the keys again, as another controller or the operator may have changed them; drops those whose time is over.
    ///
    /// # Errors
    /// When a key file cannot be read.
    pub fn reload(&self, now_ms: u64) -> Result<(), SealedError> {
        self.user.reload(now_ms)?;
        self.controller.reload(now_ms)?;
        self.registry.reload(now_ms)
    }

    /// Makes a user token of at most `life_s` seconds, never beyond the end of the principal's own proof.
    ///
    /// # Errors
    /// When signing fails.
    pub fn issue_user(
        &self,
        principal: &Principal,
        life_s: u64,
        now_ms: u64,
    ) -> Result<UserToken, SignError> {
        user_token::issue(&self.user, &self.issuer, principal, life_s, now_ms)
    }

    /// Checks a user token in everything but revocation, which is the database's to know.
    ///
    /// # Errors
    /// Why it was refused.
    pub fn verify_user(&self, token: &str, now_ms: u64) -> Result<VerifiedUser, TokenRefused> {
        if secret_token::is_secret(token) {
            return Err(TokenRefused::Kind);
        }
        user_token::verify(&self.user, &self.issuer, token, now_ms)
    }

    /// Makes a registry token for the worker that holds a lease: these repositories, at most five minutes.
    ///
    /// # Errors
    /// When signing fails or too many repositories are named.
    pub fn issue_for_attempt(
        &self,
        lease: &Lease,
        access: Vec<RepositoryGrant>,
        now_ms: u64,
    ) -> Result<IssuedRegistryToken, SignError> {
        let grant = RegistryGrant {
            tenant: lease.tenant.clone(),
            holder: Holder::Attempt {
                attempt: lease.attempt.clone(),
                worker: lease.worker.clone(),
                epoch: lease.epoch,
            },
            access,
            expires_unix_ms: now_ms + REGISTRY_LIFE_MAX_S * 1000,
        };
        registry_token::issue(&self.registry, &self.issuer, grant, now_ms)
    }

    /// Makes a registry token for somebody who showed a token at the user door, which was made from `parent` if it is a session; never beyond
    /// the end of that one.
    ///
    /// # Errors
    /// When signing fails or too many repositories are named.
    pub fn issue_for_person(
        &self,
        principal: &Principal,
        parent: Option<TokenId>,
        tenant: &TenantName,
        access: Vec<RepositoryGrant>,
        now_ms: u64,
    ) -> Result<IssuedRegistryToken, SignError> {
        let most = now_ms + REGISTRY_LIFE_MAX_S * 1000;
        let grant = RegistryGrant {
            tenant: tenant.clone(),
            holder: Holder::Person {
                token: principal.token.clone(),
                parent,
            },
            access,
            expires_unix_ms: principal.expires_unix_ms.unwrap_or(most).min(most),
        };
        registry_token::issue(&self.registry, &self.issuer, grant, now_ms)
    }

    /// Checks a registry token, and with `live` that the lease it was made under is the live one: at every request, for every
    /// upload session, at every piece.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn verify_registry<F>(
        &self,
        token: &str,
        now_ms: u64,
        live: impl FnOnce(Lease) -> F,
    ) -> Result<RegistryGrant, RegistryRefused>
    where
        F: Future<Output = Result<(), LeaseRefused>>,
    {
        if secret_token::is_secret(token) {
            return Err(TokenRefused::Kind.into());
        }
        let grant = registry_token::verify(&self.registry, &self.issuer, token, now_ms)?;
        if let Some(lease) = grant.lease() {
            live(lease).await?;
        }
        Ok(grant)
    }
}
