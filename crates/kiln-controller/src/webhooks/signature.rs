//! Who signs and how: HMAC-SHA256 over `id.timestamp.body` (Standard Webhooks 1.0).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_core::TenantName;
use ring::hmac;

/// First characters of a secret's text.
const PREFIX: &str = "whsec_";

/// A receiver's secret: it proves that a message is from here.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// The text a receiver is given, once: `whsec_…`.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", STANDARD.encode(&self.0))
    }

    /// From such a text; nothing when it is not one.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let bytes = STANDARD.decode(text.strip_prefix(PREFIX)?).ok()?;
        // The specification's bounds.
        (24..=64).contains(&bytes.len()).then_some(Self(bytes))
    }

    /// Value of the header `webhook-signature`.
    #[must_use]
    pub fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        let mut context = hmac::Context::with_key(&key);
        context.update(format!("{id}.{timestamp}.").as_bytes());
        context.update(body);
        format!("v1,{}", STANDARD.encode(context.sign()))
    }
}

/// Value of the header `webhook-signature` while several secrets are good: a signature of each, the newest first, between spaces.
#[must_use]
pub fn sign_with(secrets: &[Secret], id: &str, timestamp: u64, body: &[u8]) -> String {
    let each = secrets
        .iter()
        .map(|secret| secret.sign(id, timestamp, body));
    each.collect::<Vec<_>>().join(" ")
}

/// Derives every receiver's secret from one master that is sealed outside the database.
#[derive(Clone)]
pub struct Signer(hmac::Key);

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signer")
    }
}

impl Signer {
    /// From the master.
    #[must_use]
    pub fn new(master: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, master))
    }

    fn derive(&self, kind: &str, name: &str) -> Secret {
        let text = format!("kiln webhook 1\0{kind}\0{name}");
        Secret(hmac::sign(&self.0, text.as_bytes()).as_ref().to_vec())
    }

    /// Of a webhook, by the name of its key; another name is another secret.
    #[must_use]
    pub fn webhook(&self, key: &str) -> Secret {
        self.derive("key", key)
    }

    /// Of a tenant, for the `notify_url` of its jobs.
    #[must_use]
    pub fn tenant(&self, tenant: &TenantName) -> Secret {
        self.derive("tenant", tenant.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's own example.
    #[test]
    fn the_published_vector() {
        let secret = Secret::from_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("legal");
        assert_eq!(secret.reveal(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let signature = secret.sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn every_receiver_has_its_own() {
        let signer = Signer::new(&[1; 32]);
        let a = signer.webhook("a").reveal();
        assert_ne!(a, signer.webhook("b").reveal());
        assert_ne!(a, signer.tenant(&"a".parse().expect("name")).reveal());
        assert_ne!(a, Signer::new(&[2; 32]).webhook("a").reveal());
        assert!(Secret::from_text(&a).is_some());
        for bad in [
            "",
            "whsec_",
            "whsec_aGk=",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "whsec_!",
        ] {
            assert!(Secret::from_text(bad).is_none(), "{bad}");
        }
        assert_eq!(
            format!("{:?}{signer:?}", signer.webhook("a")),
            "SecretSigner"
        );
    }
}
