//! Signing keys: one ring per door, the newest signs, older ones verify until their overlap ends.
//!
//! ECDSA P-256 with SHA-256 in the fixed encoding (ES256 of RFC 7518 §3.4). A key id is the key's RFC 7638 thumbprint.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
    UnparsedPublicKey,
};
use sha2::{Digest as _, Sha256};

use super::sealed::{SealedError, Vault};

/// Length of an uncompressed P-256 point.
const POINT_LEN: usize = 65;

/// One key of a ring.
struct RingKey {
    created_ms: u64,
    pair: EcdsaKeyPair,
    id: String,
}

/// The keys of one door.
pub(crate) struct KeyRing {
    vault: Vault,
    overlap_ms: u64,
    keys: Mutex<Vec<std::sync::Arc<RingKey>>>,
    random: SystemRandom,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").finish_non_exhaustive()
    }
}

/// Why nothing was signed. Only a broken system gives this.
#[derive(Debug, thiserror::Error)]
#[error("the signing key of this door cannot sign")]
pub struct SignError;

impl KeyRing {
    /// Opens a ring, making its first key when there is none. `overlap_ms` is how long a key verifies after it was replaced.
    pub(crate) fn open(vault: Vault, overlap_ms: u64, now_ms: u64) -> Result<Self, SealedError> {
        let ring = Self {
            vault,
            overlap_ms,
            keys: Mutex::new(Vec::new()),
            random: SystemRandom::new(),
        };
        ring.reload(now_ms)?;
        if ring.live().is_empty() {
            ring.rotate(now_ms)?;
        }
        Ok(ring)
    }

    /// Reads the ring again: another process may have rotated it. Keys whose overlap ended are removed.
    pub(crate) fn reload(&self, now_ms: u64) -> Result<(), SealedError> {
        let mut found = BTreeMap::new();
        for name in self.vault.names()? {
            let damaged = || SealedError::Damaged {
                path: self.vault.path(&name),
            };
            let Some(bytes) = self.vault.read(&name)? else {
                continue;
            };
            let created_ms = name
                .split('-')
                .next()
                .and_then(|text| text.parse().ok())
                .ok_or_else(damaged)?;
            let key = load(&bytes, created_ms).ok_or_else(damaged)?;
            found.insert((created_ms, name), std::sync::Arc::new(key));
        }
        let created: Vec<u64> = found.keys().map(|(at, _)| *at).collect();
        let mut keys = Vec::new();
        for (index, ((_, name), key)) in found.into_iter().enumerate() {
            let replaced = created.get(index + 1);
            if replaced.is_some_and(|at| at.saturating_add(self.overlap_ms) <= now_ms) {
                self.vault.remove(&name)?;
            } else {
                keys.push(key);
            }
        }
        *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    /// Makes a new key that signs from now on.
    pub(crate) fn rotate(&self, now_ms: u64) -> Result<(), SealedError> {
        let newest = self.live().last().map(|key| key.created_ms);
        let created_ms = now_ms.max(newest.map_or(0, |at| at + 1));
        // The first key has one name whoever makes it, so that two processes end with the same one.
        let name = if newest.is_none() {
            "0-first.key".to_owned()
        } else {
            format!(
                "{created_ms}-{}.key",
                hex::encode(super::sealed::random::<4>())
            )
        };
        self.vault.read_or_create(&name, || {
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &self.random)
                .map(|document| document.as_ref().to_vec())
                .unwrap_or_default()
        })?;
        self.reload(now_ms)
    }

    fn live(&self) -> Vec<std::sync::Arc<RingKey>> {
        self.keys
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The id of the key that signs.
    #[cfg(test)]
    fn active_id(&self) -> String {
        self.live()
            .last()
            .map_or_else(String::new, |key| key.id.clone())
    }

    /// Signs with the newest key: its id and the signature made over `message(id)`.
    pub(crate) fn sign(
        &self,
        message: impl FnOnce(&str) -> String,
    ) -> Result<(String, Vec<u8>), SignError> {
        let keys = self.live();
        let key = keys.last().ok_or(SignError)?;
        let text = message(&key.id);
        let signature = key
            .pair
            .sign(&self.random, text.as_bytes())
            .map_err(|_| SignError)?;
        Ok((text, signature.as_ref().to_vec()))
    }

    /// Whether a live key of this ring made the signature.
    pub(crate) fn verify(&self, id: &str, message: &[u8], signature: &[u8], now_ms: u64) -> bool {
        let keys = self.live();
        let Some(at) = keys.iter().position(|key| key.id == id) else {
            return false;
        };
        let replaced = keys.get(at + 1).map(|next| next.created_ms);
        if replaced.is_some_and(|at| at.saturating_add(self.overlap_ms) <= now_ms) {
            return false;
        }
        verify_es256(keys[at].pair.public_key().as_ref(), message, signature)
    }

    /// The public keys as an RFC 7517 set's members.
    pub(crate) fn public(&self) -> Vec<serde_json::Value> {
        self.live()
            .iter()
            .map(|key| {
                let (x, y) = coordinates(key.pair.public_key().as_ref());
                serde_json::json!({
                    "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig",
                    "kid": key.id, "x": x, "y": y,
                })
            })
            .collect()
    }
}

fn load(pkcs8: &[u8], created_ms: u64) -> Option<RingKey> {
    let random = SystemRandom::new();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &random).ok()?;
    let id = thumbprint(pair.public_key().as_ref());
    Some(RingKey {
        created_ms,
        pair,
        id,
    })
}

/// ES256 over a message, with an uncompressed point as key.
pub(crate) fn verify_es256(point: &[u8], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
        .verify(message, signature)
        .is_ok()
}

fn coordinates(point: &[u8]) -> (String, String) {
    let half = |range| point.get(range).map(|half| URL_SAFE_NO_PAD.encode(half));
    (
        half(1..33).unwrap_or_default(),
        half(33..POINT_LEN).unwrap_or_default(),
    )
}

/// RFC 7638 §3: members in lexicographic order, no white space.
fn thumbprint(point: &[u8]) -> String {
    let (x, y) = coordinates(point);
    let text = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
    URL_SAFE_NO_PAD.encode(Sha256::digest(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_key_verifies_until_its_overlap_ends_and_is_then_removed() {
        let dir = tempfile::tempdir().expect("dir");
        let open = |now| {
            let vault = Vault::open(&dir.path().join("user")).expect("vault");
            KeyRing::open(vault, 1_000, now).expect("ring")
        };
        let ring = open(50);
        let (text, old) = ring.sign(|id| id.to_owned()).expect("sign");
        let old_id = ring.active_id();
        ring.rotate(100).expect("rotate");
        assert_ne!(ring.active_id(), old_id);
        assert!(ring.verify(&old_id, text.as_bytes(), &old, 1_099));
        assert!(!ring.verify(&old_id, text.as_bytes(), &old, 1_100));
        assert_eq!(ring.public().len(), 2);
        let again = open(1_099);
        assert_eq!(again.active_id(), ring.active_id(), "read back from disk");
        assert_eq!(open(1_100).public().len(), 1);
        assert!(!again.verify("no-such-key", text.as_bytes(), &old, 200));
        assert!(!again.verify(&again.active_id(), text.as_bytes(), &old, 200));
    }

    #[test]
    fn two_processes_end_with_one_first_key() {
        let dir = tempfile::tempdir().expect("dir");
        let open = || {
            let vault = Vault::open(&dir.path().join("user")).expect("vault");
            KeyRing::open(vault, 1_000, 1).expect("ring").active_id()
        };
        assert_eq!(open(), open());
    }
}
