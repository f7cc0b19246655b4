//! The public keys of another issuer: from where its discovery document says (OpenID Connect Discovery §4, RFC 7517), over HTTPS, bounded.
//!
//! Trusted are the authorities of this system and those of the operator's file, which is read anew each time. What the keys are good for is
//! decided in [`oidc`](super::oidc).

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use serde::Deserialize;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::keys::verify_es256;
use super::oidc::TrustedIssuer;

/// Most bytes of a discovery document or key set.
const DOCUMENT_MAX: u64 = 256 * 1024;
/// Most keys of one issuer.
const KEYS_MAX: usize = 32;
/// Longest time one fetch may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a trusted issuer cannot be one.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// Its keys would come over a line that anybody can change.
    #[error("{0} is not an https:// address")]
    NotHttps(String),
    /// The file of its authority.
    #[error("the authority of {issuer}, {path:?}: {why}")]
    Ca {
        /// Whose.
        issuer: String,
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// One public key of an issuer.
#[derive(Clone, Debug)]
pub(super) enum IssuerKey {
    Es256 { point: Vec<u8> },
    Rs256 { n: Vec<u8>, e: Vec<u8> },
}

/// The key that a token names. One that names none is of the only key for its algorithm (OpenID Connect Core §10.1), or of none.
pub(super) fn pick<'k>(
    keys: &'k HashMap<String, IssuerKey>,
    kid: Option<&str>,
    algorithm: &str,
) -> Option<&'k IssuerKey> {
    let Some(kid) = kid else {
        let fits = |key: &&IssuerKey| match key {
            IssuerKey::Es256 { .. } => algorithm == "ES256",
            IssuerKey::Rs256 { .. } => algorithm == "RS256",
        };
        let mut fitting = keys.values().filter(fits);
        return fitting.next().filter(|_| fitting.next().is_none());
    };
    keys.get(kid)
}

/// Whether a trusted issuer can be one: its address, and its authority's file as it is now.
pub(super) fn check(trusted: &TrustedIssuer) -> Result<(), IssuerError> {
    if !is_safe_url(&trusted.issuer) {
        return Err(IssuerError::NotHttps(trusted.issuer.clone()));
    }
    issuer_roots(trusted).map(|_| ())
}

fn issuer_roots(trusted: &TrustedIssuer) -> Result<RootCerts, IssuerError> {
    let Some(path) = &trusted.ca else {
        return Ok(RootCerts::PlatformVerifier);
    };
    roots(Some(path)).map_err(|why| IssuerError::Ca {
        issuer: trusted.issuer.clone(),
        path: path.clone(),
        why,
    })
}

/// The system's authorities and those of the operator's file (PEM).
///
/// # Errors
/// When the file cannot be read, or holds something else than certificates.
pub(crate) fn roots(ca: Option<&Path>) -> Result<RootCerts, String> {
    let Some(path) = ca else {
        return Ok(RootCerts::PlatformVerifier);
    };
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut all = Vec::new();
    for item in parse_pem(&pem) {
        match item.map_err(|error| error.to_string())? {
            PemItem::Certificate(certificate) => all.push(certificate),
            _ => return Err("it holds something else than certificates".to_owned()),
        }
    }
    if all.is_empty() {
        return Err("it holds no certificate in PEM".to_owned());
    }
    // What cannot be loaded of the system's own is simply not trusted.
    let system = rustls_native_certs::load_native_certs().certs;
    let own = system.iter();
    all.extend(own.map(|der| Certificate::from_der(der).to_owned()));
    Ok(RootCerts::from(all))
}

/// Whether `signature` is this key's, by this algorithm.
pub(super) fn verify(key: &IssuerKey, algorithm: &str, message: &[u8], signature: &[u8]) -> bool {
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

/// The keys that an issuer shows now, by id. Blocks.
///
/// # Errors
/// Why there are none, for the operator.
pub(super) fn fetch(trusted: &TrustedIssuer) -> Result<HashMap<String, IssuerKey>, String> {
    let issuer = &trusted.issuer;
    let roots = issuer_roots(trusted).map_err(|error| error.to_string())?;
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(FETCH_TIMEOUT))
        .max_redirects(0)
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .build()
        .into();
    let at = format!(
        "{}/.well-known/openid-configuration",
        issuer.trim_end_matches('/')
    );
    let discovery: Discovery = get(&agent, &at)?;
    if discovery.issuer != *issuer {
        return Err("its discovery document names another issuer".to_owned());
    }
    let set: KeySet = get(&agent, &discovery.jwks_uri)?;
    Ok(set
        .keys
        .iter()
        .take(KEYS_MAX)
        .enumerate()
        .filter_map(|(at, key)| read_key(at, key))
        .collect())
}

fn get<T: serde::de::DeserializeOwned>(agent: &ureq::Agent, url: &str) -> Result<T, String> {
    if !is_safe_url(url) {
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
pub(crate) fn is_safe_url(url: &str) -> bool {
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

/// A key and its id; one without an id, as an issuer of one key may have it, gets its place for one.
fn read_key(at: usize, key: &serde_json::Value) -> Option<(String, IssuerKey)> {
    let text = |name: &str| key[name].as_str();
    let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
    if text("use").is_some_and(|purpose| purpose != "sig") {
        return None;
    }
    let kid = text("kid").map_or_else(|| format!("#{at}"), str::to_owned);
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
        let (kid, key) = read_key(0, &jwk).expect("a key");
        assert_eq!(kid, "k");
        let signature = URL_SAFE_NO_PAD.decode(signature).expect("base64");
        let check = |alg, message: &[u8]| verify(&key, alg, message, &signature);
        assert!(check("RS256", b"header.claims"));
        assert!(!check("RS256", b"header.claims2"));
        assert!(
            !check("ES256", b"header.claims"),
            "an RSA key signs no ES256"
        );
        let mut keys = HashMap::from([(kid, key.clone())]);
        let picked = |keys: &_, kid, alg| pick(keys, kid, alg).is_some();
        assert!(picked(&keys, Some("k"), "RS256") && !picked(&keys, Some("x"), "RS256"));
        assert!(picked(&keys, None, "RS256") && !picked(&keys, None, "ES256"));
        let mut nameless = jwk.clone();
        nameless.as_object_mut().expect("object").remove("kid");
        let (place, second) = read_key(1, &nameless).expect("a key");
        keys.insert(place, second);
        assert!(!picked(&keys, None, "RS256"), "of two it could be either");
        for (name, value) in [("use", "enc"), ("kty", "oct"), ("n", "?")] {
            let mut bad = jwk.clone();
            bad[name] = value.into();
            assert!(read_key(0, &bad).is_none(), "{name}");
        }
    }

    #[test]
    fn only_https_and_this_host_are_asked() {
        for good in [
            "https://a.example/x",
            "http://127.0.0.1:1/",
            "http://[::1]:1/",
        ] {
            assert!(is_safe_url(good), "{good}");
        }
        for bad in [
            "http://a.example/",
            "file:///etc/passwd",
            "x",
            "http://127.0.0.1.a.example/",
        ] {
            assert!(!is_safe_url(bad), "{bad}");
        }
    }
}
