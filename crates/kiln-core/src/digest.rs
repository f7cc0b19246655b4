//! Content digests as OCI writes them: `sha256:<64 lower-case hex>`.
//!
//! Source: OCI image-spec v1.1.1, descriptor.md. Only sha256 is made by kiln; others are refused.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest of some content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Why a text is not a digest kiln accepts.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a digest of the form sha256:<64 lower-case hex digits>: {0:?}")]
pub struct ParseDigestError(String);

impl Digest {
    /// Digest of bytes in memory.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Digest of everything a reader gives, and how many bytes that was.
    ///
    /// # Errors
    /// Any read error, unchanged.
    pub fn of_reader(mut reader: impl Read) -> io::Result<(Self, u64)> {
        let mut hasher = Hasher::default();
        let mut buffer = vec![0_u8; 256 * 1024];
        loop {
            let got = reader.read(&mut buffer)?;
            if got == 0 {
                return Ok(hasher.finish());
            }
            hasher.update(&buffer[..got]);
        }
    }

    /// The 64 hex digits, without the algorithm.
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first `n` hex digits (at most 64): for names people read, never for trust.
    #[must_use]
    pub fn short(&self, n: usize) -> String {
        let mut text = self.hex();
        text.truncate(n);
        text
    }

    /// Raw 32 bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Incremental digest that also counts bytes.
#[derive(Default, Clone, Debug)]
pub struct Hasher {
    inner: Sha256,
    bytes: u64,
}

impl Hasher {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.inner.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// The digest and the number of bytes seen.
    #[must_use]
    pub fn finish(self) -> (Digest, u64) {
        (Digest(self.inner.finalize().into()), self.bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDigestError(text.chars().take(100).collect());
        let digits = text.strip_prefix("sha256:").ok_or_else(error)?;
        if digits.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(error());
        }
        let mut bytes = [0_u8; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| error())?;
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip_and_refusals() {
        let digest = Digest::of(b"kiln");
        assert_eq!(digest.to_string().parse::<Digest>(), Ok(digest));
        for bad in [
            "",
            "sha256:",
            "sha256:00",
            "sha512:00",
            &digest.hex(),
            &digest.to_string().to_uppercase(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn reader_and_memory_agree() {
        let bytes = vec![7_u8; 1_000_003];
        let (digest, count) = Digest::of_reader(&bytes[..]).expect("memory reads do not fail");
        assert_eq!((digest, count), (Digest::of(&bytes), 1_000_003));
    }
}
