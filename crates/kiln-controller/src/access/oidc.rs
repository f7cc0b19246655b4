//! Trust in another issuer's identity tokens (OpenID Connect Core §3.1.3.7, Discovery §4), for one purpose: exchanging them for our own.
//!
//! An issuer is trusted with an exact audience and rules on the subject; the first rule that matches says tenant and role. Its
//! tokens open no other door. Its keys are [fetched](super::issuer_keys) when one is asked for that is not known, and kept for a while.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use kiln_core::access::Principal;
use kiln_core::job::TrustClass;
use kiln_core::{Priority, Role, TenantName};
use serde::{Deserialize, Serialize};

use super::issuer_keys::{self, IssuerError, IssuerKey};
use super::jwt::{self, TokenRefused};

/// Longest life of an identity token that is taken.
const LIFE_MAX_S: u64 = 24 * 3600;
/// How long fetched keys are used.
const KEYS_MAX_AGE_MS: u64 = 10 * 60 * 1000;
/// Least time between two fetches from one issuer, also when a key is unknown or fetching fails: a token signed with a new key is refused
/// for no longer, and strangers with made-up keys cost an issuer no more.
const FETCH_EVERY_MS: u64 = 5 * 1000;
/// Exchanges that wait for one fetch; more are told to come back. Each holds a thread.
const WAITING_MAX: usize = 32;

/// An issuer that the operator trusts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustedIssuer {
    /// Its `iss`, exactly; also where its discovery document is.
    pub issuer: String,
    /// The `aud` that its tokens must have, exactly.
    pub audience: String,
    /// A file with the certificates (PEM) of an authority of the operator's own, besides those that this system trusts; read at each fetch.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Who its subjects are; the first that matches counts.
    pub rules: Vec<SubjectRule>,
}

impl TrustedIssuer {
    /// Whether its keys could be fetched at all, for the start.
    ///
    /// # Errors
    /// When its address is not HTTPS, or the file of its authority is not there or holds no certificate.
    pub fn check(&self) -> Result<(), IssuerError> {
        issuer_keys::check(self)
    }
}

/// What a subject of a trusted issuer is here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubjectRule {
    /// `sub`, exactly, or with `*` for any characters.
    pub subject: String,
    /// Claims that must have these string values.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
    /// Tenant it belongs to.
    pub tenant: TenantName,
    /// What it is.
    pub role: Role,
    /// Whether its role reaches beyond the tenant.
    #[serde(default)]
    pub operator: bool,
    /// Highest priority it may ask for.
    #[serde(default)]
    pub priority_max: Priority,
    /// The best trust its jobs can have.
    #[serde(default = "untrusted")]
    pub trust: TrustClass,
}

fn untrusted() -> TrustClass {
    TrustClass::Untrusted
}

/// Why an identity token was not exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeRefused {
    /// The token itself.
    #[error("the identity token was refused")]
    Token(#[from] TokenRefused),
    /// No rule matches the subject.
    #[error("no rule of this server matches the token's subject")]
    NoRule,
    /// Too many wait for the issuer's keys.
    #[error("too many identity tokens wait for the keys of the issuer")]
    Busy,
    /// The issuer's keys cannot be had.
    #[error("the keys of the issuer cannot be fetched: {0}")]
    Fetch(String),
}

/// The key that a token says it is signed with.
#[derive(Clone, Copy)]
struct Named<'a> {
    kid: Option<&'a str>,
    algorithm: &'a str,
}

#[derive(Default, Clone, Debug)]
struct Fetched {
    keys: HashMap<String, IssuerKey>,
    good_at_ms: u64,
    tried_at_ms: Option<u64>,
    /// Why the last try failed.
    failed: Option<String>,
}

/// The trusted issuers and their keys.
#[derive(Debug)]
pub struct Issuers {
    trusted: Vec<TrustedIssuer>,
    /// Plain HTTP is taken for loopback issuers only.
    fetched: Mutex<HashMap<String, Fetched>>,
    /// Held while keys are fetched: who needs the same ones waits for them.
    fetching: Mutex<()>,
    waiting: AtomicUsize,
}

/// One that waits; it counts until it is dropped.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn begin(count: &'a AtomicUsize) -> Option<Self> {
        let before = count.fetch_add(1, Ordering::AcqRel);
        let waits = Self(count);
        (before < WAITING_MAX).then_some(waits)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    aud: Audience,
    sub: String,
    iat: u64,
    #[serde(default)]
    nbf: Option<u64>,
    exp: u64,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Audience {
    /// A token for several audiences could be shown here by any of the others: it must be ours alone.
    fn is_only(&self, wanted: &str) -> bool {
        match self {
            Self::One(one) => one == wanted,
            Self::Many(many) => matches!(&many[..], [one] if one == wanted),
        }
    }
}

impl Issuers {
    /// With these issuers.
    #[must_use]
    pub fn new(trusted: Vec<TrustedIssuer>) -> Self {
        Self {
            trusted,
            fetched: Mutex::new(HashMap::new()),
            fetching: Mutex::new(()),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Whether a token names a trusted issuer, so that it is worth a look.
    #[must_use]
    pub fn know(&self, token: &str) -> bool {
        self.issuer_of(token).is_ok()
    }

    fn issuer_of(&self, token: &str) -> Result<&TrustedIssuer, TokenRefused> {
        let (_, claims, _) = jwt::split(token)?;
        let claims: Claims = jwt::part(claims)?;
        self.trusted
            .iter()
            .find(|trusted| trusted.issuer == claims.iss)
            .ok_or(TokenRefused::Issuer)
    }

    /// Checks an identity token and says who its bearer is here. Blocks while keys are fetched.
    ///
    /// # Errors
    /// Why not.
    pub fn exchange(&self, token: &str, now_ms: u64) -> Result<Principal, ExchangeRefused> {
        let issuer = self.issuer_of(token)?;
        let (message, claims, signature) = jwt::split(token)?;
        let header: serde_json::Value = jwt::part(message.split('.').next().unwrap_or_default())?;
        let algorithm = header["alg"].as_str().unwrap_or_default();
        if !matches!(algorithm, "ES256" | "RS256") || !header["crit"].is_null() {
            return Err(TokenRefused::Algorithm.into());
        }
        let named = Named {
            kid: header["kid"].as_str(),
            algorithm,
        };
        let mut key = self.key(issuer, named, now_ms)?;
        // A new key has no new name where keys have none.
        let is_good =
            |key: &IssuerKey| issuer_keys::verify(key, algorithm, message.as_bytes(), &signature);
        if named.kid.is_none() && !is_good(&key) {
            key = self.anew(issuer, named, now_ms, |key| is_good(key))?;
        }
        if !is_good(&key) {
            return Err(TokenRefused::Signature.into());
        }
        let claims: Claims = jwt::part(claims)?;
        // One issuer may be trusted with several audiences, each with rules of its own.
        let trusted = self
            .trusted
            .iter()
            .find(|one| one.issuer == issuer.issuer && claims.aud.is_only(&one.audience))
            .ok_or(TokenRefused::Audience)?;
        let nbf = claims.nbf.unwrap_or(claims.iat);
        jwt::times(claims.iat, nbf, claims.exp, LIFE_MAX_S, now_ms)?;
        let rule = trusted
            .rules
            .iter()
            .find(|rule| rule.matches(&claims))
            .ok_or(ExchangeRefused::NoRule)?;
        Ok(Principal {
            subject: format!(
                "{} ({})",
                printable(&claims.sub),
                printable(&trusted.issuer)
            ),
            token: None,
            tenant: rule.tenant.clone(),
            role: rule.role,
            operator: rule.operator,
            scopes: None,
            priority_max: rule.priority_max,
            trust: rule.trust,
            expires_unix_ms: Some(claims.exp.saturating_mul(1000)),
            gives_until_unix_ms: None,
        })
    }

    /// A key that is known and not too old.
    fn known(&self, trusted: &TrustedIssuer, named: Named<'_>, now_ms: u64) -> Option<IssuerKey> {
        let all = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.get(&trusted.issuer)?;
        let fresh = one.good_at_ms.saturating_add(KEYS_MAX_AGE_MS) > now_ms;
        let found = issuer_keys::pick(&one.keys, named.kid, named.algorithm);
        found.filter(|_| fresh).cloned()
    }

    /// Notes a try at fetching. When the last one was just now, what came of that is the answer.
    fn may_fetch(&self, trusted: &TrustedIssuer, now_ms: u64) -> Result<(), ExchangeRefused> {
        let mut all = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.entry(trusted.issuer.clone()).or_default();
        let tried = one.tried_at_ms;
        if tried.is_some_and(|at| at.saturating_add(FETCH_EVERY_MS) > now_ms) {
            return Err(match &one.failed {
                Some(why) => ExchangeRefused::Fetch(why.clone()),
                None => TokenRefused::Signature.into(),
            });
        }
        one.tried_at_ms = Some(now_ms);
        Ok(())
    }

    fn key(
        &self,
        trusted: &TrustedIssuer,
        named: Named<'_>,
        now_ms: u64,
    ) -> Result<IssuerKey, ExchangeRefused> {
        match self.known(trusted, named, now_ms) {
            Some(key) => Ok(key),
            None => self.anew(trusted, named, now_ms, |_| true),
        }
    }

    /// A key that is fetched now, or was by somebody else meanwhile, if that one is good enough. What is known stays until others came.
    fn anew(
        &self,
        trusted: &TrustedIssuer,
        named: Named<'_>,
        now_ms: u64,
        enough: impl Fn(&IssuerKey) -> bool,
    ) -> Result<IssuerKey, ExchangeRefused> {
        let _waits = Waits::begin(&self.waiting).ok_or(ExchangeRefused::Busy)?;
        let _one = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever was before may have fetched it.
        if let Some(key) = self.known(trusted, named, now_ms).filter(|key| enough(key)) {
            return Ok(key);
        }
        self.may_fetch(trusted, now_ms)?;
        let fetched = issuer_keys::fetch(trusted);
        let mut all = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.entry(trusted.issuer.clone()).or_default();
        one.failed = fetched.as_ref().err().cloned();
        one.keys = fetched.map_err(ExchangeRefused::Fetch)?;
        one.good_at_ms = now_ms;
        let found = issuer_keys::pick(&one.keys, named.kid, named.algorithm).cloned();
        found.ok_or_else(|| TokenRefused::Signature.into())
    }
}

impl SubjectRule {
    fn matches(&self, claims: &Claims) -> bool {
        is_like(&self.subject, &claims.sub)
            && self.claims.iter().all(|(name, wanted)| {
                claims.rest.get(name).and_then(|value| value.as_str()) == Some(wanted)
            })
    }
}

/// Whether `text` is `pattern`, where `*` stands for any characters.
fn is_like(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Somebody else's words, safe in logs and tables.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters_and_nothing_else_does() {
        for (pattern, text, like) in [
            ("repo:acme/app:ref:main", "repo:acme/app:ref:main", true),
            ("repo:acme/app:ref:main", "repo:acme/app:ref:main2", false),
            ("repo:acme/*", "repo:acme/x:y", true),
            ("repo:acme/*", "repo:acme2/x", false),
            ("repo:*:ref:main", "repo:a:ref:main", true),
            ("repo:*:ref:main", "repo:a:ref:mainx", false),
            ("a*a", "a", false),
            ("*", "", true),
            ("", "x", false),
        ] {
            assert_eq!(is_like(pattern, text), like, "{pattern} {text}");
        }
    }
}
