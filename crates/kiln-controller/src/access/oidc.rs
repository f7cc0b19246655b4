//! Trust in another issuer's identity tokens (OpenID Connect Core §3.1.3.7, Discovery §4), for one purpose: exchanging them for our own.
//!
//! An issuer is trusted with an exact audience and rules on the subject; the first rule that matches says tenant and role. Its
//! tokens open no other door. Keys are fetched from where its discovery document says, over HTTPS, bounded, and kept for a while.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kiln_core::access::Principal;
use kiln_core::job::TrustClass;
use kiln_core::{Priority, Role, TenantName};
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use serde::{Deserialize, Serialize};

use super::jwt::{self, TokenRefused};
use super::keys::verify_es256;

/// Longest life of an identity token that is taken.
const LIFE_MAX_S: u64 = 24 * 3600;
/// How long fetched keys are used.
const KEYS_MAX_AGE_MS: u64 = 10 * 60 * 1000;
/// Least time between two fetches from one issuer, also when a key is unknown or fetching fails.
const FETCH_EVERY_MS: u64 = 30 * 1000;
/// Most bytes of a discovery document or key set.
const DOCUMENT_MAX: u64 = 256 * 1024;
/// Most keys of one issuer.
const KEYS_MAX: usize = 32;
/// Longest time one fetch may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// Who its subjects are; the first that matches counts.
    pub rules: Vec<SubjectRule>,
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

/// One public key of an issuer.
#[derive(Clone, Debug)]
enum IssuerKey {
    Es256 { point: Vec<u8> },
    Rs256 { n: Vec<u8>, e: Vec<u8> },
}

#[derive(Default, Clone, Debug)]
struct Fetched {
    keys: HashMap<String, IssuerKey>,
    good_at_ms: u64,
    tried_at_ms: Option<u64>,
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
        let trusted = self.issuer_of(token)?;
        let (message, claims, signature) = jwt::split(token)?;
        let header: serde_json::Value = jwt::part(message.split('.').next().unwrap_or_default())?;
        let algorithm = header["alg"].as_str().unwrap_or_default();
        if !matches!(algorithm, "ES256" | "RS256") || !header["crit"].is_null() {
            return Err(TokenRefused::Algorithm.into());
        }
        let kid = header["kid"].as_str().ok_or(TokenRefused::Malformed)?;
        let key = self.key(trusted, kid, now_ms)?;
        if !verify(&key, algorithm, message.as_bytes(), &signature) {
            return Err(TokenRefused::Signature.into());
        }
        let claims: Claims = jwt::part(claims)?;
        if !claims.aud.is_only(&trusted.audience) {
            return Err(TokenRefused::Audience.into());
        }
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
    fn known(&self, trusted: &TrustedIssuer, kid: &str, now_ms: u64) -> Option<IssuerKey> {
        let all = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.get(&trusted.issuer)?;
        let fresh = one.good_at_ms.saturating_add(KEYS_MAX_AGE_MS) > now_ms;
        one.keys.get(kid).filter(|_| fresh).cloned()
    }

    /// Notes a try at fetching; false when the last one was just now.
    fn may_fetch(&self, trusted: &TrustedIssuer, now_ms: u64) -> bool {
        let mut all = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.entry(trusted.issuer.clone()).or_default();
        let tried = one.tried_at_ms;
        if tried.is_some_and(|at| at.saturating_add(FETCH_EVERY_MS) > now_ms) {
            return false;
        }
        one.tried_at_ms = Some(now_ms);
        true
    }

    fn key(
        &self,
        trusted: &TrustedIssuer,
        kid: &str,
        now_ms: u64,
    ) -> Result<IssuerKey, ExchangeRefused> {
        if let Some(key) = self.known(trusted, kid, now_ms) {
            return Ok(key);
        }
        let _waits = Waits::begin(&self.waiting).ok_or(ExchangeRefused::Busy)?;
        let _one = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever was before may have fetched it.
        if let Some(key) = self.known(trusted, kid, now_ms) {
            return Ok(key);
        }
        if !self.may_fetch(trusted, now_ms) {
            return Err(TokenRefused::Signature.into());
        }
        let keys = fetch(&trusted.issuer).map_err(ExchangeRefused::Fetch)?;
        let found = keys.get(kid).cloned();
        let mut all = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.entry(trusted.issuer.clone()).or_default();
        one.keys = keys;
        one.good_at_ms = now_ms;
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

fn verify(key: &IssuerKey, algorithm: &str, message: &[u8], signature: &[u8]) -> bool {
    match (key, algorithm) {
        (IssuerKey::Es256 { point }, "ES256") => verify_es256(point, message, signature),
        (IssuerKey::Rs256 { n, e }, "RS256") => RsaPublicKeyComponents { n, e }
            .verify(&RSA_PKCS1_2048_8192_SHA256, message, signature)
            .is_ok(),
        _ => false,
    }
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<serde_json::Value>,
}

fn fetch(issuer: &str) -> Result<HashMap<String, IssuerKey>, String> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(FETCH_TIMEOUT))
        .max_redirects(0)
        .build()
        .into();
    let at = format!(
        "{}/.well-known/openid-configuration",
        issuer.trim_end_matches('/')
    );
    let discovery: Discovery = get(&agent, &at)?;
    if discovery.issuer != issuer {
        return Err("its discovery document names another issuer".to_owned());
    }
    let set: KeySet = get(&agent, &discovery.jwks_uri)?;
    Ok(set
        .keys
        .iter()
        .take(KEYS_MAX)
        .filter_map(read_key)
        .collect())
}

fn get<T: serde::de::DeserializeOwned>(agent: &ureq::Agent, url: &str) -> Result<T, String> {
    if !is_safe(url) {
        return Err("its address is not HTTPS".to_owned());
    }
    let mut answer = agent.get(url).call().map_err(|error| error.to_string())?;
    if answer.status() != 200 {
        return Err(format!("it answered {}", answer.status()));
    }
    let body = answer
        .body_mut()
        .with_config()
        .limit(DOCUMENT_MAX)
        .read_to_vec()
        .map_err(|error| error.to_string())?;
    serde_json::from_slice(&body).map_err(|_| "its answer is not readable".to_owned())
}

/// HTTPS, or HTTP to this very host.
fn is_safe(url: &str) -> bool {
    let Ok(url) = url.parse::<http::Uri>() else {
        return false;
    };
    let loopback = url.host().is_some_and(|host| {
        host == "localhost"
            || host
                .trim_matches(['[', ']'])
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    });
    match url.scheme_str() {
        Some("https") => true,
        Some("http") => loopback,
        _ => false,
    }
}

fn read_key(key: &serde_json::Value) -> Option<(String, IssuerKey)> {
    let text = |name: &str| key[name].as_str();
    let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
    if text("use").is_some_and(|purpose| purpose != "sig") {
        return None;
    }
    let kid = text("kid")?.to_owned();
    let key = match (text("kty")?, text("crv")) {
        ("EC", Some("P-256")) => {
            let (x, y) = (bytes("x")?, bytes("y")?);
            (x.len() == 32 && y.len() == 32).then(|| IssuerKey::Es256 {
                point: [&[4], &x[..], &y].concat(),
            })?
        }
        ("RSA", _) => IssuerKey::Rs256 {
            n: bytes("n")?,
            e: bytes("e")?,
        },
        _ => return None,
    };
    Some((kid, key))
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

    /// A signature over `header.claims` made once with another program, and its public key.
    #[test]
    fn rsa_signatures_of_others_are_verified_and_keys_are_not_mixed_up() {
        let n = concat!(
            "rTKsCMoq0861nQucDrvvxPv3-AHzObzA2igOa0BhnwLsDBpQpaPCpkRH1PS09wcOyZlGu9s8BDGSETgq",
            "k0qDViRKbl9kN6AgnOZbaDUF3J93Ur1t3VKFh5FjNj_JLxovb2RlPP8Vq4BFemB-Cm3ZpS1XW2U-dTMt",
            "R_xrJvKM0Znwl98boo7w4uL9LcdqD1yapNXzPtB-mvgS8Y5wQYZjFp0utrshd4ZifF9HtF72oY-1vg-Z",
            "n9u94ahvJkJcq3umCuLqu3Afjw8RHq0QZIZXdxU5a_Y6Cdn0ALMpFMl01U1XYyZGl0gwADOGu1JmkLYe",
            "4K0ONbzlGWj354FUteLRqw"
        );
        let signature = concat!(
            "QEWq_OVRRLIzgdaN7u8coMjoI5kO8Nz79UotY4GB1JsyQnndD_0rgKE_4JXkWCPS23CEKvBtJFN349sM",
            "p3MDpRHEnghVglszjE1ypMTtYIj4P529a2SeyICef16YZfpmvLG38RNTUV4lTzxUhtXiDjwgAXPdcgAG",
            "po4aO8BbpSTEWJD2bfOxGhGMydnvR6VMZxlD1HfF-ZOFBGpYyy0-vo87FLCQ4yznDfdp1KKJ9JhD0e01",
            "gXq2niaTblHnqDDDZ6gXpM2qPyOzomEnPRt5uCPueHzjrS2v--9TE59fTQqN3VdEDlNSh0FoE1MOwupA",
            "_W1V7AGo4UwTennyxNaJhw"
        );
        let jwk = serde_json::json!({"kty": "RSA", "kid": "k", "use": "sig", "n": n, "e": "AQAB"});
        let (kid, key) = read_key(&jwk).expect("a key");
        assert_eq!(kid, "k");
        let signature = URL_SAFE_NO_PAD.decode(signature).expect("base64");
        let check = |alg, message: &[u8]| verify(&key, alg, message, &signature);
        assert!(check("RS256", b"header.claims"));
        assert!(!check("RS256", b"header.claims2"));
        assert!(
            !check("ES256", b"header.claims"),
            "an RSA key signs no ES256"
        );
        for (name, value) in [("use", "enc"), ("kty", "oct"), ("n", "?")] {
            let mut bad = jwk.clone();
            bad[name] = value.into();
            assert!(read_key(&bad).is_none(), "{name}");
        }
    }

    #[test]
    fn only_https_and_this_host_are_asked() {
        for good in [
            "https://a.example/x",
            "http://127.0.0.1:1/",
            "http://[::1]:1/",
        ] {
            assert!(is_safe(good), "{good}");
        }
        for bad in [
            "http://a.example/",
            "file:///etc/passwd",
            "x",
            "http://127.0.0.1.a.example/",
        ] {
            assert!(!is_safe(bad), "{bad}");
        }
    }
}
