//! How values of stored secrets lie in the database: sealed with AES-256-GCM by a key that is not there.
//!
//! What is sealed opens only as what it was sealed as: tenant, name and version are its associated data, so that whoever can write rows
//! cannot give one job another's value. A sealed text is `1.KEY.DATA`: the form, the key's id, and nonce, ciphertext and tag in base 64.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use kiln_core::{SecretName, TenantName};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sha2::{Digest as _, Sha256};

use super::sealed::random;

/// Bytes of a key.
pub(super) const KEY_BYTES: usize = 32;
/// The form of a sealed text.
const FORM: &str = "1";

/// Why a sealed value was not opened. Says nothing of it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnsealError {
    /// It was sealed with a key that is not here.
    #[error("it was sealed with the key {0}, which is not among this controller's")]
    Key(String),
    /// It is not what was sealed for this tenant, name and version.
    #[error("its row is not what was written: somebody changed the database, or it is damaged")]
    Damaged,
}

/// What a value is sealed as.
#[derive(Clone, Copy, Debug)]
pub struct SealedAs<'a> {
    /// Whose.
    pub tenant: &'a TenantName,
    /// Which.
    pub name: &'a SecretName,
    /// Which of its values.
    pub version: u64,
}

impl SealedAs<'_> {
    /// Every part with its length before it: no two of them have one text.
    fn data(&self) -> Vec<u8> {
        let mut out = b"kiln secret 1".to_vec();
        for part in [self.tenant.as_str(), self.name.as_str()] {
            out.extend((part.len() as u64).to_be_bytes());
            out.extend(part.as_bytes());
        }
        out.extend(self.version.to_be_bytes());
        out
    }
}

/// The keys: the first seals, each opens what it sealed.
pub(super) struct SecretKeys(Vec<(String, LessSafeKey)>);

impl std::fmt::Debug for SecretKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(id, _)| id))
            .finish()
    }
}

impl SecretKeys {
    /// Of these, the newest first.
    pub(super) fn new(keys: &[[u8; KEY_BYTES]]) -> Self {
        let keys = keys.iter().filter_map(|bytes| {
            let hash = Sha256::new()
                .chain_update(b"kiln secret key id\0")
                .chain_update(bytes)
                .finalize();
            let key = UnboundKey::new(&AES_256_GCM, bytes).ok()?;
            Some((hex::encode(&hash[..8]), LessSafeKey::new(key)))
        });
        Self(keys.collect())
    }

    /// Ids of the keys; they say nothing of them.
    pub(super) fn ids(&self) -> Vec<&str> {
        self.0.iter().map(|(id, _)| id.as_str()).collect()
    }

    /// Seals a value.
    pub(super) fn seal(&self, about: SealedAs<'_>, value: &[u8]) -> Option<String> {
        let (id, key) = self.0.first()?;
        // 96 random bits: far fewer values are sealed by one key than would make two nonces alike.
        let nonce: [u8; NONCE_LEN] = random();
        let mut data = value.to_vec();
        let aad = Aad::from(about.data());
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut data)
            .ok()?;
        let all = [&nonce[..], &data].concat();
        Some(format!("{FORM}.{id}.{}", STANDARD_NO_PAD.encode(all)))
    }

    /// Opens a sealed text.
    pub(super) fn open(&self, about: SealedAs<'_>, sealed: &str) -> Result<Vec<u8>, UnsealError> {
        let damaged = || UnsealError::Damaged;
        let mut parts = sealed.splitn(3, '.');
        let (form, id, data) = (parts.next(), parts.next(), parts.next());
        let (Some(FORM), Some(id), Some(data)) = (form, id, data) else {
            return Err(damaged());
        };
        let known = self.0.iter().find(|(known, _)| known == id);
        let (_, key) = known.ok_or_else(|| {
            UnsealError::Key(
                id.chars()
                    .filter(char::is_ascii_hexdigit)
                    .take(16)
                    .collect(),
            )
        })?;
        let mut data = STANDARD_NO_PAD.decode(data).map_err(|_| damaged())?;
        if data.len() < NONCE_LEN {
            return Err(damaged());
        }
        let mut sealed = data.split_off(NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(&data).map_err(|_| damaged())?;
        let opened = key
            .open_in_place(nonce, Aad::from(about.data()), &mut sealed)
            .map_err(|_| damaged())?;
        Ok(opened.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named<'a>(tenant: &'a TenantName, name: &'a SecretName, version: u64) -> SealedAs<'a> {
        SealedAs {
            tenant,
            name,
            version,
        }
    }

    #[test]
    fn a_value_opens_as_what_it_was_sealed_as_and_no_other() {
        let keys = SecretKeys::new(&[[7; 32]]);
        let (acme, other): (TenantName, TenantName) =
            ("acme".parse().expect("name"), "acm".parse().expect("name"));
        let (token, longer): (SecretName, SecretName) = (
            "token".parse().expect("name"),
            "etoken".parse().expect("name"),
        );
        let about = named(&acme, &token, 3);
        let sealed = keys.seal(about, b"hunter2").expect("seals");
        assert!(!sealed.contains("hunter2"));
        assert_eq!(keys.open(about, &sealed).expect("opens"), b"hunter2");
        assert_ne!(keys.seal(about, b"hunter2").expect("seals"), sealed);
        for swapped in [
            named(&other, &token, 3),
            named(&acme, &longer, 3),
            named(&other, &longer, 3),
            named(&acme, &token, 2),
        ] {
            let opened = keys.open(swapped, &sealed);
            assert_eq!(opened, Err(UnsealError::Damaged), "{swapped:?}");
        }
        for broken in ["", "1", "1..", "2.x.y", "1.x", &sealed[..sealed.len() - 2]] {
            assert!(keys.open(about, broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn older_keys_open_what_they_sealed() {
        let (tenant, name): (TenantName, SecretName) = (
            "acme".parse().expect("name"),
            "token".parse().expect("name"),
        );
        let about = named(&tenant, &name, 1);
        let old = SecretKeys::new(&[[1; 32]]);
        let sealed = old.seal(about, b"x").expect("seals");
        let both = SecretKeys::new(&[[2; 32], [1; 32]]);
        assert_eq!(both.open(about, &sealed).expect("opens"), b"x");
        let error = SecretKeys::new(&[[2; 32]]).open(about, &sealed);
        assert_eq!(error, Err(UnsealError::Key(old.ids()[0].to_owned())));
        assert!(!format!("{old:?}").contains("1, 1"));
    }
}
