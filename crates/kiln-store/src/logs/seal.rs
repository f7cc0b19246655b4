//! How pieces of a log are protected where they lie: by a checksum, or by a key (ChaCha20-Poly1305 with a key of
//! its own for each file, derived by HKDF-SHA256 from the operator's key and the file's salt).
//!
//! A derived key never seals two different pieces under one number: every file has a fresh salt, and a file is never written
//! on after a restart or after a failed write.

use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf;
use sha2::{Digest as _, Sha256};

use super::{LogError, LogName};

/// Bytes of a [`LogKey`].
pub const KEY_BYTES: usize = 32;
/// Bytes of a preamble: magic 8, kind 8, key id 8, salt 32, checksum 8.
pub(crate) const PREAMBLE: usize = 64;
/// Most bytes that sealing adds.
pub(crate) const SEAL_MAX: usize = 16;

const SUM: usize = 8;
const INFO: &[&[u8]] = &[b"kiln log file 1"];

/// A key for logs at rest. The caller keeps it sealed; this room keeps it in memory only.
#[derive(Clone)]
pub struct LogKey {
    secret: [u8; KEY_BYTES],
    id: [u8; 8],
}

impl LogKey {
    /// From 32 secret bytes.
    #[must_use]
    pub fn new(secret: [u8; KEY_BYTES]) -> Self {
        let hash = Sha256::new()
            .chain_update(b"kiln log key id\0")
            .chain_update(secret)
            .finalize();
        let mut id = [0; 8];
        id.copy_from_slice(&hash[..8]);
        Self { secret, id }
    }

    /// Names the key in messages; says nothing about the secret.
    #[must_use]
    pub fn id(&self) -> String {
        hex::encode(self.id)
    }
}

impl fmt::Debug for LogKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogKey")
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}

/// The first seals what is written, unless nothing is sealed; every one opens what was sealed with it. Empty: nothing is encrypted.
#[derive(Clone, Debug, Default)]
pub struct LogKeys {
    keys: Vec<LogKey>,
    open_only: bool,
}

impl LogKeys {
    /// `current` seals from now on; `older` still open what they sealed.
    #[must_use]
    pub fn new(current: LogKey, older: impl IntoIterator<Item = LogKey>) -> Self {
        Self {
            keys: std::iter::once(current).chain(older).collect(),
            open_only: false,
        }
    }

    /// Nothing is sealed from now on; `older` still open what they sealed.
    #[must_use]
    pub fn opening(older: impl IntoIterator<Item = LogKey>) -> Self {
        Self {
            keys: older.into_iter().collect(),
            open_only: true,
        }
    }

    fn current(&self) -> Option<&LogKey> {
        self.keys.first().filter(|_| !self.open_only)
    }
}

/// Why a file was not opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum NotOpened {
    /// It is not what was written.
    Damaged(&'static str),
    /// It was sealed with this key, which is not among those given.
    Key(String),
}

impl NotOpened {
    /// As an error of a log.
    pub(crate) fn of_log(self, name: &LogName) -> LogError {
        let name = name.clone();
        match self {
            Self::Damaged(what) => LogError::Damaged { name, what },
            Self::Key(key) => LogError::Key { name, key },
        }
    }
}

/// What protects the pieces of one file.
pub(crate) struct Sealer {
    key: Option<LessSafeKey>,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer")
            .field("encrypted", &self.key.is_some())
            .finish()
    }
}

impl Sealer {
    /// Of a new file, with the preamble it starts with.
    pub(crate) fn create(
        keys: &LogKeys,
        magic: &[u8; 8],
    ) -> Result<(Self, [u8; PREAMBLE]), LogError> {
        let mut preamble = [0; PREAMBLE];
        preamble[..8].copy_from_slice(magic);
        getrandom::fill(&mut preamble[24..56]).map_err(|error| LogError::Io {
            what: "read",
            path: "the system's random source".into(),
            source: std::io::Error::other(error.to_string()),
        })?;
        if let Some(key) = keys.current() {
            preamble[8] = 1;
            preamble[16..24].copy_from_slice(&key.id);
        }
        let sum = Sha256::digest(&preamble[..56]);
        preamble[56..].copy_from_slice(&sum[..SUM]);
        let key = keys
            .current()
            .map(|key| derive(key, &preamble[24..56]))
            .transpose()?;
        Ok((Self { key }, preamble))
    }

    /// Of a file that starts with this preamble.
    pub(crate) fn open_file(
        keys: &LogKeys,
        magic: &[u8; 8],
        preamble: &[u8; PREAMBLE],
    ) -> Result<Self, NotOpened> {
        let damaged = NotOpened::Damaged;
        if preamble[..8] != magic[..] {
            return Err(damaged("a file does not start as one"));
        }
        if Sha256::digest(&preamble[..56])[..SUM] != preamble[56..] {
            return Err(damaged("the start of a file has another checksum"));
        }
        let key = match preamble[8] {
            0 => None,
            1 => {
                let id = &preamble[16..24];
                let key = keys
                    .keys
                    .iter()
                    .find(|key| key.id == *id)
                    .ok_or_else(|| NotOpened::Key(hex::encode(id)))?;
                let derived = derive(key, &preamble[24..56]);
                Some(derived.map_err(|_| damaged("its key cannot be derived"))?)
            }
            _ => {
                return Err(damaged(
                    "a file is sealed in a way this version does not know",
                ));
            }
        };
        Ok(Self { key })
    }

    /// Bytes that sealing adds.
    pub(crate) fn overhead(&self) -> u32 {
        if self.key.is_some() { 16 } else { 8 }
    }

    /// Seals a piece; `number` is used once in the file, `about` is checked when it is opened.
    pub(crate) fn seal(&self, number: u64, about: &[u8], mut piece: Vec<u8>) -> Option<Vec<u8>> {
        match &self.key {
            None => {
                let sum = checksum(number, about, &piece);
                piece.extend_from_slice(&sum);
            }
            Some(key) => key
                .seal_in_place_append_tag(nonce(number), Aad::from(about), &mut piece)
                .ok()?,
        }
        Some(piece)
    }

    /// The piece, or nothing when it is not the one that was sealed.
    pub(crate) fn open(&self, number: u64, about: &[u8], mut sealed: Vec<u8>) -> Option<Vec<u8>> {
        match &self.key {
            None => {
                let at = sealed.len().checked_sub(SUM)?;
                let sum = checksum(number, about, &sealed[..at]);
                if sum != sealed[at..] {
                    return None;
                }
                sealed.truncate(at);
            }
            Some(key) => {
                let len = key
                    .open_in_place(nonce(number), Aad::from(about), &mut sealed)
                    .ok()?
                    .len();
                sealed.truncate(len);
            }
        }
        Some(sealed)
    }
}

fn derive(key: &LogKey, salt: &[u8]) -> Result<LessSafeKey, LogError> {
    let unusable = |_| LogError::Target {
        why: "the key cannot be derived".to_owned(),
    };
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(&key.secret);
    let okm = prk.expand(INFO, &CHACHA20_POLY1305).map_err(unusable)?;
    Ok(LessSafeKey::new(UnboundKey::from(okm)))
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn checksum(number: u64, about: &[u8], piece: &[u8]) -> [u8; SUM] {
    let hash = Sha256::new()
        .chain_update(number.to_le_bytes())
        .chain_update(about)
        .chain_update(piece)
        .finalize();
    let mut sum = [0; SUM];
    sum.copy_from_slice(&hash[..SUM]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: &[u8; 8] = b"TESTTEST";

    fn name() -> LogName {
        LogName::new("local".parse().unwrap(), "b1".parse().unwrap(), 1)
    }

    #[test]
    fn a_piece_opens_only_in_its_place_and_unchanged() {
        for keys in [LogKeys::default(), LogKeys::new(LogKey::new([7; 32]), [])] {
            let (sealer, preamble) = Sealer::create(&keys, MAGIC).unwrap();
            let again = Sealer::open_file(&keys, MAGIC, &preamble).unwrap();
            let sealed = sealer.seal(3, b"about", b"line".to_vec()).unwrap();
            assert!(sealed.len() <= 4 + SEAL_MAX);
            assert_eq!(again.open(3, b"about", sealed.clone()).unwrap(), b"line");
            assert!(again.open(4, b"about", sealed.clone()).is_none());
            assert!(again.open(3, b"other", sealed.clone()).is_none());
            for bit in 0..sealed.len() * 8 {
                let mut changed = sealed.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert!(again.open(3, b"about", changed).is_none(), "bit {bit}");
            }
            assert!(again.open(3, b"about", Vec::new()).is_none());
        }
    }

    #[test]
    fn another_key_is_named_and_old_keys_still_open() {
        let old = LogKey::new([1; 32]);
        let new = LogKey::new([2; 32]);
        let (sealer, preamble) = Sealer::create(&LogKeys::new(old.clone(), []), MAGIC).unwrap();
        let sealed = sealer.seal(0, b"", b"x".to_vec()).unwrap();
        assert!(!sealed.starts_with(b"x"));
        let both = LogKeys::new(new.clone(), [old.clone()]);
        let opened = Sealer::open_file(&both, MAGIC, &preamble).unwrap();
        assert_eq!(opened.open(0, b"", sealed).unwrap(), b"x");
        let opening = LogKeys::opening([new.clone(), old.clone()]);
        assert!(Sealer::open_file(&opening, MAGIC, &preamble).is_ok());
        let (_, plain) = Sealer::create(&opening, MAGIC).unwrap();
        assert_eq!(plain[8], 0, "nothing is sealed any more");
        let error = Sealer::open_file(&LogKeys::new(new, []), MAGIC, &preamble)
            .map_err(|why| why.of_log(&name()))
            .expect_err("other key");
        assert!(error.to_string().contains(&old.id()), "{error}");
        assert!(!format!("{old:?}").contains("1, 1"), "{old:?}");
    }
}
