//! The loopback door's secret and the short-lived bearer tokens made from it.
//!
//! Token protocol: the distribution project's "Token Authentication Specification" (`/token`, scopes
//! such as `repository:<name>:pull,push`). A bearer is `<claims>.<mac>`, both base64url: the claims
//! are JSON, the mac is HMAC-SHA-256 (RFC 2104) under a key derived from the secret, so bearers outlive
//! the process that made them, and a new secret ends them all.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kiln_core::Digest;
use serde::{Deserialize, Serialize};

use super::authority::{Action, Authority, Grant, Names, UserAuthority};
use super::durable::{Durable, is_absent};
use super::error::StoreError;
use super::name::RepoName;

/// Life of a bearer token, seconds (DESIGN "Registry": at most 5 minutes).
pub const BEARER_LIFE_S: u64 = 300;
/// Scopes in one token at most.
pub(crate) const SCOPES_MAX: usize = 16;
/// Longest bearer or basic credential looked at, bytes.
pub(crate) const CREDENTIAL_BYTES_MAX: usize = 16 << 10;
/// Longest secret file read, bytes.
const SECRET_FILE_BYTES_MAX: u64 = 256;
/// Separates this use of the secret from every other.
const KEY_PURPOSE: &[u8] = b"kiln registry loopback bearer v1";

/// The long-lived secret of one registry. Its file is for its owner alone (mode 0600).
#[derive(Clone)]
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Why the secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Others can read it.
    #[error("{} can be read by others (mode {mode:o}): remove it, and log in again", path.display())]
    Exposed {
        /// The file.
        path: std::path::PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It does not hold a secret.
    #[error("{} does not hold a registry token: remove it, and log in again", path.display())]
    Malformed {
        /// The file.
        path: std::path::PathBuf,
    },
    /// It could not be read or made.
    #[error("the registry token in {} cannot be used", path.display())]
    Files {
        /// The file.
        path: std::path::PathBuf,
        /// What failed.
        #[source]
        source: StoreError,
    },
}

impl Secret {
    /// Reads the secret from `path`, or makes one there: also when the file is empty or torn, which ends every login made with
    /// the old one. For the registry's owner alone.
    ///
    /// # Errors
    /// A file that others can read is refused.
    pub fn load_or_make(path: &Path, tmp: &Path) -> Result<Self, SecretError> {
        let files = |source| SecretError::Files {
            path: path.to_owned(),
            source,
        };
        let found = match OpenOptions::new().read(true).open(path) {
            Ok(file) => Self::read(path, file).map(Some),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(files(StoreError::io("open", path)(error))),
        };
        match found {
            Ok(Some(secret)) => Ok(secret),
            Ok(None) | Err(SecretError::Malformed { .. }) => {
                if found.is_err() {
                    tracing::warn!(
                        path = %path.display(),
                        "the registry's token was damaged and is made anew: log in again"
                    );
                }
                let text = format!("{}{}\n", hex32().map_err(files)?, hex32().map_err(files)?);
                make(path, tmp, &text).map_err(files)?;
                Ok(Self(text.trim_end().to_owned()))
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the secret that the registry's owner made.
    ///
    /// # Errors
    /// As [`Self::load_or_make`]; absence is an error too.
    pub fn load(path: &Path) -> Result<Self, SecretError> {
        let file = fs::File::open(path).map_err(|error| SecretError::Files {
            path: path.to_owned(),
            source: StoreError::io("open", path)(error),
        })?;
        Self::read(path, file)
    }

    fn read(path: &Path, file: fs::File) -> Result<Self, SecretError> {
        let path = || path.to_owned();
        let failed = |error| SecretError::Files {
            path: path(),
            source: StoreError::io("read", path())(error),
        };
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SecretError::Exposed { path: path(), mode });
        }
        let mut text = String::new();
        if let Err(error) = file.take(SECRET_FILE_BYTES_MAX).read_to_string(&mut text) {
            return Err(match error.kind() {
                std::io::ErrorKind::InvalidData => SecretError::Malformed { path: path() },
                _ => failed(error),
            });
        }
        let text = text.trim_end();
        if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(SecretError::Malformed { path: path() })
        }
    }

    /// The text a user's tools show as their password.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Compares without telling by time how much of a guess was right.
    pub(crate) fn is(&self, guess: &str) -> bool {
        Digest::of(guess.as_bytes()) == Digest::of(self.0.as_bytes())
    }

    fn mac(&self, claims: &str) -> [u8; 32] {
        let key = hmac(self.0.as_bytes(), KEY_PURPOSE);
        hmac(&key, claims.as_bytes())
    }
}

fn hex32() -> Result<String, StoreError> {
    super::durable::random_hex()
}

fn make(path: &Path, tmp: &Path, text: &str) -> Result<(), StoreError> {
    let durable = Durable::new(tmp.to_owned(), None);
    let (mut file, temp) = durable.temp_file()?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(StoreError::io("write", &temp))?;
    durable.move_into_place(&temp, path)
}

/// HMAC-SHA-256, RFC 2104.
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    use sha2::{Digest as _, Sha256};
    const BLOCK: usize = 64;
    let mut block = [0_u8; BLOCK];
    if key.len() > BLOCK {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let pad = |with: u8| block.map(|byte| byte ^ with);
    let inner = Sha256::new()
        .chain_update(pad(0x36))
        .chain_update(message)
        .finalize();
    Sha256::new()
        .chain_update(pad(0x5c))
        .chain_update(inner)
        .finalize()
        .into()
}

/// One thing a token allows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Access {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) actions: Vec<String>,
}

impl Access {
    /// Reads `repository:<name>:<action>,<action>`; names contain no colon.
    pub(crate) fn parse(scope: &str) -> Option<Self> {
        let mut parts = scope.splitn(3, ':');
        let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self {
            kind: kind.to_owned(),
            name: name.to_owned(),
            actions: actions.split(',').take(8).map(str::to_owned).collect(),
        })
    }

    /// What is both asked here and granted to the authority; `None` when that is nothing.
    fn granted(&self, authority: &Authority) -> Option<Self> {
        let wants = |word: &str| self.actions.iter().any(|a| a == word || a == "*");
        let actions: Vec<String> = if self.kind == "registry" && self.name == "catalog" {
            vec!["*".to_owned()]
        } else {
            let repo: RepoName = self.name.parse().ok()?;
            [Action::Pull, Action::Push, Action::Delete]
                .into_iter()
                .filter(|action| wants(action.as_str()) && authority.allows(*action, &repo))
                .map(|action| action.as_str().to_owned())
                .collect()
        };
        (!actions.is_empty()).then(|| Self {
            actions,
            ..self.clone()
        })
    }

    fn grant(&self) -> Option<Grant> {
        let actions = self.actions.iter().filter_map(|word| match word.as_str() {
            "pull" => Some(Action::Pull),
            "push" => Some(Action::Push),
            "delete" => Some(Action::Delete),
            _ => None,
        });
        (self.kind == "repository")
            .then(|| self.name.parse().ok())
            .flatten()
            .map(|repo| Grant {
                names: Names::Exactly(repo),
                actions: actions.collect(),
            })
    }
}

/// What a bearer says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// Who; empty for anonymous.
    pub(crate) user: String,
    /// End of its life, seconds since the Unix epoch.
    pub(crate) until: u64,
    /// What it allows.
    pub(crate) access: Vec<Access>,
}

impl Claims {
    /// Claims for a caller: the intersection of what was asked and what it may do.
    pub(crate) fn for_scopes(
        user: &str,
        asked: &[Access],
        authority: &Authority,
        now: u64,
    ) -> Self {
        let granted = asked.iter().take(SCOPES_MAX);
        Self {
            user: user.to_owned(),
            until: now + BEARER_LIFE_S,
            access: granted.filter_map(|a| a.granted(authority)).collect(),
        }
    }

    /// The bearer token.
    pub(crate) fn seal(&self, secret: &Secret) -> String {
        // String keys, no failing serializer: this cannot fail.
        let json = serde_json::to_vec(self).unwrap_or_default();
        let claims = URL_SAFE_NO_PAD.encode(json);
        let mac = URL_SAFE_NO_PAD.encode(secret.mac(&claims));
        format!("{claims}.{mac}")
    }

    /// Checks a bearer token. `None` when forged, expired, or living longer than any we make.
    pub(crate) fn open(token: &str, secret: &Secret, now: u64) -> Option<Self> {
        if token.len() > CREDENTIAL_BYTES_MAX {
            return None;
        }
        let (claims, mac) = token.split_once('.')?;
        let mac = URL_SAFE_NO_PAD.decode(mac).ok()?;
        if Digest::of(&mac) != Digest::of(&secret.mac(claims)) {
            return None;
        }
        let claims: Self = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
        let alive = claims.until > now && claims.until <= now + BEARER_LIFE_S;
        alive.then_some(claims)
    }

    /// Who the bearer is. `whole` is what its user may do in all: listing repositories needs that.
    pub(crate) fn authority(&self, whole: &Authority) -> Authority {
        if self.access.iter().any(|access| access.kind == "registry") {
            return whole.clone();
        }
        Authority::User(UserAuthority {
            name: self.user.clone(),
            grants: self.access.iter().filter_map(Access::grant).collect(),
        })
    }
}

/// For the fuzz targets: what nobody sealed does not open, and what was sealed opens within its bounds.
pub(crate) fn fuzz_token(text: &str) {
    const NOW: u64 = 1000;
    let secret = Secret("5".repeat(64));
    assert!(Claims::open(text, &secret, NOW).is_none(), "forged");
    let _any = Access::parse(text);
    let claims = URL_SAFE_NO_PAD.encode(text);
    let mac = URL_SAFE_NO_PAD.encode(secret.mac(&claims));
    if let Some(claims) = Claims::open(&format!("{claims}.{mac}"), &secret, NOW) {
        assert!(claims.until > NOW && claims.until <= NOW + BEARER_LIFE_S);
        let whole = Authority::Anonymous { pull: Vec::new() };
        let _any = claims.authority(&whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::TenantName;
    use proptest::prelude::*;

    fn secret(text: &str) -> Secret {
        Secret(text.to_owned())
    }

    #[test]
    fn hmac_matches_rfc_4231() {
        let mac = hex::encode(hmac(b"Jefe", b"what do ya want for nothing?"));
        assert_eq!(
            mac,
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        let long = hex::encode(hmac(
            &[0xaa; 131],
            b"Test Using Larger Than Block-Size Key - Hash Key First",
        ));
        assert_eq!(
            long,
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    #[test]
    fn a_bearer_holds_the_intersection_and_dies_in_time() {
        let user = Authority::User(UserAuthority::embedded("kiln", &TenantName::local()));
        let asked: Vec<_> = [
            "repository:t/local/a:pull,push",
            "repository:shared/n:pull,push",
            "repository:t/x/a:pull",
            "nonsense",
        ]
        .into_iter()
        .filter_map(Access::parse)
        .collect();
        let claims = Claims::for_scopes("kiln", &asked, &user, 1000);
        let token = claims.seal(&secret("s"));
        let opened = Claims::open(&token, &secret("s"), 1299).expect("alive");
        let bearer = opened.authority(&user);
        let allows = |action, name: &str| bearer.allows(action, &name.parse().expect("name"));
        assert!(allows(Action::Push, "t/local/a") && allows(Action::Pull, "shared/n"));
        assert!(!allows(Action::Push, "shared/n") && !allows(Action::Pull, "t/x/a"));
        assert!(!allows(Action::Pull, "t/local/b"), "only what was asked");
        assert_eq!(Claims::open(&token, &secret("s"), 1300), None);
        assert_eq!(
            Claims::open(&token, &secret("s"), 999),
            None,
            "the clock went back"
        );
        assert_eq!(Claims::open(&token, &secret("t"), 1000), None);
    }

    #[test]
    fn secrets_are_private_and_stay() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("token");
        let first = Secret::load_or_make(&path, dir.path()).expect("made");
        let again = Secret::load_or_make(&path, dir.path()).expect("read");
        assert!(first.is(again.reveal()) && !first.is("x"));
        for torn in [&b""[..], b"0123", b"\xff\xff"] {
            fs::write(&path, torn).expect("torn");
            assert!(matches!(
                Secret::load(&path),
                Err(SecretError::Malformed { .. })
            ));
            let new = Secret::load_or_make(&path, dir.path()).expect("made again");
            assert!(!first.is(new.reveal()) && new.reveal().len() == 64);
            assert!(new.is(Secret::load(&path).expect("kept").reveal()));
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        fs::set_permissions(&path, mode).expect("chmod");
        let exposed = Secret::load_or_make(&path, dir.path());
        assert!(matches!(exposed, Err(SecretError::Exposed { .. })));
    }

    proptest! {
        #[test]
        fn no_other_text_opens(text in "\\PC{0,200}|[A-Za-z0-9_-]{0,60}\\.[A-Za-z0-9_-]{43}") {
            prop_assert_eq!(Claims::open(&text, &secret("s"), 1000), None);
        }
    }
}
