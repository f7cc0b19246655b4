//! Tokens of the controllers' door: made by one controller for one request to another of the same database and keys.

use serde::{Deserialize, Serialize};

use super::door::{CONTROLLER, CONTROLLER_LIFE_MAX_S};
use super::jwt::{self, Registered, TokenRefused};
use super::keys::{KeyRing, SignError};
use super::sealed::random;

/// kiln's own claims: none beside who it is.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ControllerClaims {}

pub(crate) fn issue(
    ring: &KeyRing,
    issuer: &str,
    id: &str,
    now_ms: u64,
) -> Result<String, SignError> {
    let now = now_ms / 1000;
    let registered = Registered {
        iss: issuer.to_owned(),
        aud: CONTROLLER.audience.to_owned(),
        sub: id.to_owned(),
        iat: now,
        nbf: now,
        exp: now + CONTROLLER_LIFE_MAX_S,
        jti: format!("peer-{}", hex::encode(random::<8>())),
    };
    jwt::sign(ring, CONTROLLER, registered, ControllerClaims {})
}

pub(crate) fn verify(
    ring: &KeyRing,
    issuer: &str,
    text: &str,
    now_ms: u64,
) -> Result<String, TokenRefused> {
    let (registered, ControllerClaims {}) =
        jwt::verify::<ControllerClaims>(ring, CONTROLLER, issuer, text, now_ms)?;
    Ok(registered.sub)
}
