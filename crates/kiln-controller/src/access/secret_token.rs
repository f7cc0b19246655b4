//! Tokens that are a secret and nothing else: service tokens and a worker's join token. Shown once, kept as a hash.
//!
//! `kst_<id>_<64 hex>` and `kjt_<id>_<64 hex>_<64 hex of the authority>`: the prefix tells a leak scanner, and every door, what
//! it is looking at. The secret is 256 random bits, so that a plain SHA-256 keeps it.

use std::fmt;

use kiln_core::{Digest, TokenId};

use super::jwt::TokenRefused;
use super::sealed::random;

/// Which door a secret token opens.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SecretKind {
    /// The user door.
    Service,
    /// One join of one worker.
    Join,
}

impl SecretKind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Service => "kst",
            Self::Join => "kjt",
        }
    }
}

/// A token just made. Its text exists here and at whoever is told; nowhere else.
pub struct NewSecret {
    /// The public half.
    pub id: TokenId,
    /// What is shown once.
    pub text: String,
    /// What is kept.
    pub hash: Digest,
}

impl fmt::Debug for NewSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewSecret")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// A presented token: which row it claims to be, and the hash to compare with that row's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PresentedSecret {
    /// The public half.
    pub id: TokenId,
    /// Hash of the secret half.
    pub hash: Digest,
    /// Fingerprint of the authority a join token pins.
    pub authority: Option<Digest>,
}

/// Makes a service token.
#[must_use]
pub fn new_service() -> NewSecret {
    new(SecretKind::Service, "")
}

/// Makes a join token that pins an authority by its fingerprint.
#[must_use]
pub fn new_join(authority: &Digest) -> NewSecret {
    new(SecretKind::Join, &format!("_{}", authority.hex()))
}

/// A name for a webhook; it is no secret.
pub(crate) fn new_webhook_id() -> TokenId {
    let name = format!("kwh-{}", hex::encode(random::<8>()));
    name.parse().unwrap_or_else(|_| unreachable!("{name}"))
}

fn new(kind: SecretKind, tail: &str) -> NewSecret {
    let name = format!("{}-{}", kind.prefix(), hex::encode(random::<8>()));
    let secret = hex::encode(random::<32>());
    // 12 lower-case letters, digits and a hyphen: always a legal id.
    let id: TokenId = name.parse().unwrap_or_else(|_| unreachable!("{name}"));
    NewSecret {
        text: format!("{}_{id}_{secret}{tail}", kind.prefix()),
        hash: Digest::of(secret.as_bytes()),
        id,
    }
}

/// Whether a text is a secret token of any kind, so that a door can tell a wrong kind from nonsense.
#[must_use]
pub fn is_secret(text: &str) -> bool {
    text.starts_with("kst_") || text.starts_with("kjt_")
}

/// Reads a presented token of one kind.
///
/// # Errors
/// When it is of another kind or of none.
pub fn parse(kind: SecretKind, text: &str) -> Result<PresentedSecret, TokenRefused> {
    let mut parts = text.split('_');
    let prefix = parts.next().unwrap_or_default();
    if prefix != kind.prefix() {
        return Err(if is_secret(text) {
            TokenRefused::Kind
        } else {
            TokenRefused::Malformed
        });
    }
    let (Some(id), Some(secret)) = (parts.next(), parts.next()) else {
        return Err(TokenRefused::Malformed);
    };
    let pin = parts.next();
    let hex64 = |t: &str| {
        t.len() == 64
            && t.bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let wanted = usize::from(kind == SecretKind::Join);
    if parts.next().is_some()
        || !hex64(secret)
        || usize::from(pin.is_some()) != wanted
        || !pin.is_none_or(hex64)
    {
        return Err(TokenRefused::Malformed);
    }
    let authority = pin
        .map(|hex| format!("sha256:{hex}").parse())
        .transpose()
        .map_err(|_| TokenRefused::Malformed)?;
    Ok(PresentedSecret {
        id: id.parse().map_err(|_| TokenRefused::Malformed)?,
        hash: Digest::of(secret.as_bytes()),
        authority,
    })
}

/// What is kept of a secret token, as far as a door needs it.
#[derive(Clone, Copy, Debug)]
pub struct KeptSecret<'a> {
    /// Hash of the secret half.
    pub hash: &'a Digest,
    /// End, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
    /// Whether it was revoked (or, for a join token, used).
    pub revoked: bool,
}

impl PresentedSecret {
    /// Checks what was presented against what is kept.
    ///
    /// # Errors
    /// When the secret is another, it has expired, or it was revoked.
    pub fn check(&self, kept: &KeptSecret<'_>, now_ms: u64) -> Result<(), TokenRefused> {
        let (ours, theirs) = (kept.hash.hex(), self.hash.hex());
        let differ = ours
            .bytes()
            .zip(theirs.bytes())
            .fold(0, |all, (a, b)| all | (a ^ b));
        if differ != 0 {
            return Err(TokenRefused::Unknown);
        }
        if kept.revoked {
            return Err(TokenRefused::Revoked);
        }
        if kept.expires_unix_ms <= now_ms {
            return Err(TokenRefused::Expired);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_opens_its_own_row_and_no_other() {
        let made = new_service();
        let shown = parse(SecretKind::Service, &made.text).expect("own");
        assert_eq!((&shown.id, shown.hash), (&made.id, made.hash));
        let kept = |hash, expires_unix_ms, revoked| KeptSecret {
            hash,
            expires_unix_ms,
            revoked,
        };
        assert_eq!(shown.check(&kept(&made.hash, 10, false), 9), Ok(()));
        let other = new_service();
        let refused = [
            (kept(&other.hash, 10, false), TokenRefused::Unknown),
            (kept(&made.hash, 9, false), TokenRefused::Expired),
            (kept(&made.hash, 10, true), TokenRefused::Revoked),
        ];
        for (kept, why) in refused {
            assert_eq!(shown.check(&kept, 9), Err(why));
        }
        assert!(!format!("{made:?}").contains(&made.text));
    }

    #[test]
    fn a_kind_is_refused_at_the_other_door() {
        let authority = Digest::of(b"authority");
        let join = new_join(&authority);
        assert_eq!(
            parse(SecretKind::Service, &join.text),
            Err(TokenRefused::Kind)
        );
        assert_eq!(
            parse(SecretKind::Join, &new_service().text),
            Err(TokenRefused::Kind)
        );
        let shown = parse(SecretKind::Join, &join.text).expect("own");
        assert_eq!(shown.authority, Some(authority));
        let service = new_service().text;
        for bad in [
            format!("{service}_"),
            format!("{service}0"),
            service.to_uppercase(),
            service.replacen("kst_", "kst_../", 1),
        ] {
            assert!(parse(SecretKind::Service, &bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_token_or_not(text in "(kst_|kjt_)?.{0,200}") {
            let _never_panics = parse(SecretKind::Join, &text);
        }
    }
}
