//! JSON web tokens, as narrow as they can be: ES256 alone, one audience, one type, one ring of keys per door.
//!
//! RFC 7515, 7519 and the advice of RFC 8725. The algorithm is never taken from a token: a header that names another one, or
//! none, or any extension, is refused before a key is looked at.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::keys::{KeyRing, SignError};

/// Longest token that is looked at.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// How far another clock may be ahead.
pub const CLOCK_SKEW_S: u64 = 60;

/// Why a token was refused. The words go to the audit trail; a caller learns the code.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenRefused {
    /// Not three parts of unpadded base64url with JSON objects in them, or too long.
    #[error("it is not a token of this door")]
    Malformed,
    /// `alg` is not ES256: `none`, an HMAC, anything else.
    #[error("its algorithm is not the one of this door")]
    Algorithm,
    /// `typ` is another door's.
    #[error("it is a token of another kind")]
    Kind,
    /// `kid` names no key of this door, or the signature is not that key's.
    #[error("its signature is not of this door's keys")]
    Signature,
    /// `iss` is somebody else.
    #[error("its issuer is not one that this door trusts")]
    Issuer,
    /// `aud` is another door's.
    #[error("it is meant for another audience")]
    Audience,
    /// `exp` has passed.
    #[error("it has expired")]
    Expired,
    /// `nbf` or `iat` lies in the future.
    #[error("it is not valid yet")]
    Future,
    /// It lives longer than any token of this door may.
    #[error("it lives longer than tokens of this door may")]
    TooLong,
    /// It, or what it was made from, was revoked.
    #[error("it was revoked")]
    Revoked,
    /// No such token.
    #[error("it is not known")]
    Unknown,
}

impl TokenRefused {
    /// Stable short name.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Algorithm => "algorithm",
            Self::Kind => "kind",
            Self::Signature => "signature",
            Self::Issuer => "issuer",
            Self::Audience => "audience",
            Self::Expired => "expired",
            Self::Future => "future",
            Self::TooLong => "too_long",
            Self::Revoked => "revoked",
            Self::Unknown => "unknown",
        }
    }
}

/// What one door's tokens are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    /// `typ` of the header.
    pub(crate) typ: &'static str,
    /// `aud`.
    pub(crate) audience: &'static str,
    /// Longest life in seconds.
    pub(crate) life_max_s: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

/// The registered claims; every token has all of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Registered {
    pub(crate) iss: String,
    pub(crate) aud: String,
    pub(crate) sub: String,
    pub(crate) iat: u64,
    pub(crate) nbf: u64,
    pub(crate) exp: u64,
    pub(crate) jti: String,
}

#[derive(Serialize, Deserialize)]
struct Claims<T> {
    #[serde(flatten)]
    registered: Registered,
    kiln: T,
}

/// Makes a token of this kind.
pub(crate) fn sign<T: Serialize>(
    ring: &KeyRing,
    kind: Kind,
    registered: Registered,
    own: T,
) -> Result<String, SignError> {
    let claims = Claims {
        registered,
        kiln: own,
    };
    let claims = serde_json::to_vec(&claims).map_err(|_| SignError)?;
    let (text, signature) = ring.sign(|kid| {
        let header = serde_json::json!({"alg": "ES256", "typ": kind.typ, "kid": kid});
        format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(claims)
        )
    })?;
    Ok(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// Checks a token of this kind at `now_ms`. Everything but revocation.
pub(crate) fn verify<T: DeserializeOwned>(
    ring: &KeyRing,
    kind: Kind,
    issuer: &str,
    token: &str,
    now_ms: u64,
) -> Result<(Registered, T), TokenRefused> {
    let (message, claims, signature) = split(token)?;
    let header: serde_json::Value = part(message.split('.').next().unwrap_or_default())?;
    // The kind of wrong is worth knowing in an audit row; none of it is taken as true before the signature holds.
    if header["alg"] != "ES256" {
        return Err(TokenRefused::Algorithm);
    }
    if header["typ"] != kind.typ {
        return Err(TokenRefused::Kind);
    }
    let header: Header = serde_json::from_value(header).map_err(|_| TokenRefused::Malformed)?;
    if !ring.verify(&header.kid, message.as_bytes(), &signature, now_ms) {
        return Err(TokenRefused::Signature);
    }
    let claims: Claims<T> = part(claims)?;
    let registered = claims.registered;
    if registered.iss != issuer {
        return Err(TokenRefused::Issuer);
    }
    if registered.aud != kind.audience {
        return Err(TokenRefused::Audience);
    }
    times(
        registered.iat,
        registered.nbf,
        registered.exp,
        kind.life_max_s,
        now_ms,
    )?;
    Ok((registered, claims.kiln))
}

/// Refuses what is over, not yet begun, or longer than allowed.
pub(crate) fn times(
    iat: u64,
    nbf: u64,
    exp: u64,
    life_max_s: u64,
    now_ms: u64,
) -> Result<(), TokenRefused> {
    let now = now_ms / 1000;
    if exp <= now {
        return Err(TokenRefused::Expired);
    }
    if iat.max(nbf) > now.saturating_add(CLOCK_SKEW_S) {
        return Err(TokenRefused::Future);
    }
    if exp.saturating_sub(iat) > life_max_s {
        return Err(TokenRefused::TooLong);
    }
    Ok(())
}

/// Signed text, claims part and signature bytes of a compact token.
pub(crate) fn split(token: &str) -> Result<(&str, &str, Vec<u8>), TokenRefused> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(TokenRefused::Malformed);
    }
    let (message, signature) = token.rsplit_once('.').ok_or(TokenRefused::Malformed)?;
    let (header, claims) = message.split_once('.').ok_or(TokenRefused::Malformed)?;
    if header.is_empty() || claims.is_empty() || claims.contains('.') {
        return Err(TokenRefused::Malformed);
    }
    let signature = URL_SAFE_NO_PAD
        .decode(signature)
        .map_err(|_| TokenRefused::Malformed)?;
    Ok((message, claims, signature))
}

/// One base64url part as JSON.
pub(crate) fn part<T: DeserializeOwned>(text: &str) -> Result<T, TokenRefused> {
    let bytes = URL_SAFE_NO_PAD
        .decode(text)
        .map_err(|_| TokenRefused::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| TokenRefused::Malformed)
}
