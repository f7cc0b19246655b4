//! The installation's own certificate authority: it signs workers' certificates and, where the operator gives none, the server's.
//!
//! Of a certificate request only the public key and the proof that its sender holds the private one are used: names, purposes and
//! times are the controller's. X.509 by RFC 5280.

use std::fmt;
use std::time::Duration;

use kiln_core::{Digest, WorkerId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::sealed::{SealedError, Vault, random};

/// Life of a worker's certificate.
pub const WORKER_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How far certificates begin in the past, for clocks that are behind.
pub const BACKDATED: Duration = Duration::from_secs(3600);
/// How long after its end a worker's certificate still proves who it is, to get the next one.
pub const RENEWAL_GRACE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Life of a server certificate made by the authority; it is made anew at every start.
pub(crate) const SERVER_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Life of the authority.
const AUTHORITY_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Longest certificate request.
pub const CSR_BYTES_MAX: usize = 16 * 1024;
/// What a worker's name in a certificate begins with.
const WORKER_URI: &str = "kiln://worker/";

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The request cannot be read or its signature is not its key's.
    #[error("the certificate request is not readable, or not signed by its own key")]
    Request(#[source] Option<rcgen::Error>),
    /// The key is of a kind that is not taken.
    #[error("the certificate request's key must be ECDSA P-256 or Ed25519")]
    KeyKind,
    /// The key is not the one that the worker joined with.
    #[error("the certificate request is for another key than the worker joined with")]
    OtherKey,
    /// A name is not one.
    #[error("{0:?} is not a DNS name or an address")]
    Name(String),
    /// Signing failed.
    #[error("the authority could not sign")]
    Sign(#[source] rcgen::Error),
}

/// A certificate that was made.
#[derive(Clone, Debug)]
pub struct WorkerCertificate {
    /// PEM.
    pub pem: String,
    /// Its end, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
    /// Digest of its public key (SubjectPublicKeyInfo): what a renewal must match.
    pub key: Digest,
}

/// A chain and its key, for a server.
pub struct ServerIdentity {
    /// The certificate, then what signed it.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
}

impl fmt::Debug for ServerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerIdentity").finish_non_exhaustive()
    }
}

/// The authority.
pub struct Authority {
    pem: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

const FILE: &str = "authority.key";

impl Authority {
    /// Opens the authority, making it when there is none. Key and certificate are one file, so that they cannot disagree.
    pub(crate) fn open(vault: &Vault, now_ms: u64) -> Result<Self, SealedError> {
        let damaged = || SealedError::Damaged {
            path: vault.path(FILE),
        };
        let bytes =
            vault.read_or_create(FILE, || create(now_ms).unwrap_or_default().into_bytes())?;
        let text = String::from_utf8(bytes).map_err(|_| damaged())?;
        let at = text.find("-----BEGIN CERTIFICATE").ok_or_else(damaged)?;
        let (key, pem) = text.split_at(at);
        let key = KeyPair::from_pem(key).map_err(|_| damaged())?;
        let der = pem_to_der(pem).ok_or_else(damaged)?;
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|_| damaged())?;
        Ok(Self {
            pem: pem.to_owned(),
            der,
            issuer,
        })
    }

    /// Its certificate, PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its certificate.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// Digest of its certificate: what a join token pins.
    #[must_use]
    pub fn fingerprint(&self) -> Digest {
        Digest::of(&self.der)
    }

    /// Signs a worker's request. `joined_with` is the key of its first certificate: a renewal must be for that key.
    ///
    /// # Errors
    /// When the request is bad or for another key.
    pub fn worker_certificate(
        &self,
        csr_pem: &str,
        worker: &WorkerId,
        joined_with: Option<&Digest>,
        now_ms: u64,
    ) -> Result<WorkerCertificate, CertificateError> {
        if csr_pem.len() > CSR_BYTES_MAX {
            return Err(CertificateError::Request(None));
        }
        let request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(|error| CertificateError::Request(Some(error)))?;
        let algorithm = request.public_key.algorithm();
        if algorithm != &rcgen::PKCS_ECDSA_P256_SHA256 && algorithm != &rcgen::PKCS_ED25519 {
            return Err(CertificateError::KeyKind);
        }
        let key = Digest::of(&request.public_key.subject_public_key_info());
        if joined_with.is_some_and(|joined| *joined != key) {
            return Err(CertificateError::OtherKey);
        }
        let uri = format!("{WORKER_URI}{worker}");
        let name = uri
            .clone()
            .try_into()
            .map_err(|_| CertificateError::Name(uri))?;
        let expires_unix_ms = now_ms.saturating_add(millis(WORKER_LIFE));
        let mut params = leaf(worker.as_str(), now_ms, expires_unix_ms);
        params.subject_alt_names = vec![SanType::URI(name)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(CertificateError::Sign)?;
        Ok(WorkerCertificate {
            pem: certificate.pem(),
            expires_unix_ms,
            key,
        })
    }

    /// Makes a server's certificate for these DNS names and addresses, with a new key.
    ///
    /// # Errors
    /// When a name is not one.
    pub fn server_identity(
        &self,
        names: &[String],
        now_ms: u64,
    ) -> Result<ServerIdentity, CertificateError> {
        let mut params = leaf("kiln", now_ms, now_ms.saturating_add(millis(SERVER_LIFE)));
        for name in names {
            let wrong = || CertificateError::Name(name.chars().take(260).collect());
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(
                    kiln_core::network::normal_host(name)
                        .ok_or_else(wrong)?
                        .try_into()
                        .map_err(|_| wrong())?,
                ),
            });
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().map_err(CertificateError::Sign)?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(CertificateError::Sign)?;
        Ok(ServerIdentity {
            chain: vec![certificate.der().clone(), self.der.clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        })
    }
}

fn create(now_ms: u64) -> Result<String, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = leaf("", now_ms, now_ms.saturating_add(millis(AUTHORITY_LIFE)));
    params.distinguished_name = subject(&format!("kiln authority {}", hex::encode(random::<4>())));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?;
    Ok(format!("{}{}", key.serialize_pem(), certificate.pem()))
}

fn leaf(name: &str, now_ms: u64, expires_unix_ms: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(name);
    params.not_before = time(now_ms.saturating_sub(millis(BACKDATED)));
    params.not_after = time(expires_unix_ms);
    params.serial_number = Some(SerialNumber::from_slice(&{
        let mut bytes = random::<16>();
        bytes[0] &= 0x7f;
        bytes
    }));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn subject(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

/// RFC 5280 knows no fractions of a second.
fn time(unix_ms: u64) -> time::OffsetDateTime {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX);
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn pem_to_der(pem: &str) -> Option<CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).ok()
}

/// What a peer's certificate says. Only meaningful when the handshake verified it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerCertificate {
    /// Who it was made for.
    pub worker: WorkerId,
    /// Digest of its public key.
    pub key: Digest,
    /// Its end, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
}

impl PeerCertificate {
    /// Reads a certificate that the handshake verified.
    #[must_use]
    pub fn read(der: &[u8]) -> Option<Self> {
        let (rest, certificate) = X509Certificate::from_der(der).ok()?;
        if !rest.is_empty() {
            return None;
        }
        let names = certificate.subject_alternative_name().ok()??;
        let [GeneralName::URI(uri)] = names.value.general_names[..] else {
            return None;
        };
        let worker = uri.strip_prefix(WORKER_URI)?.parse().ok()?;
        Some(Self {
            worker,
            key: Digest::of(certificate.public_key().raw),
            expires_unix_ms: not_after_ms(&certificate),
        })
    }

    /// Whether it has not expired: what every door of a worker asks but that of renewal.
    #[must_use]
    pub fn is_current(&self, now_ms: u64) -> bool {
        now_ms < self.expires_unix_ms
    }

    /// Whether it may get the next one.
    #[must_use]
    pub fn may_renew(&self, now_ms: u64) -> bool {
        now_ms < self.expires_unix_ms.saturating_add(millis(RENEWAL_GRACE))
    }
}

/// End of a certificate, milliseconds since the Unix epoch.
pub(crate) fn not_after_ms(certificate: &X509Certificate<'_>) -> u64 {
    let seconds = certificate.validity().not_after.timestamp();
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority() -> (tempfile::TempDir, Authority) {
        let dir = tempfile::tempdir().expect("dir");
        let vault = Vault::open(&dir.path().join("worker")).expect("vault");
        let authority = Authority::open(&vault, 1_800_000_000_000).expect("authority");
        let again = Authority::open(&vault, 0).expect("again");
        assert_eq!(authority.fingerprint(), again.fingerprint());
        (dir, authority)
    }

    fn csr(key: &KeyPair) -> String {
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).expect("params");
        params.is_ca = IsCa::NoCa;
        params
            .serialize_request(key)
            .expect("csr")
            .pem()
            .expect("pem")
    }

    #[test]
    fn names_in_a_request_are_not_taken() {
        let (_dir, authority) = authority();
        let key = KeyPair::generate().expect("key");
        let worker: WorkerId = "w1".parse().expect("name");
        let now = 1_800_000_000_000;
        let made = authority
            .worker_certificate(&csr(&key), &worker, None, now)
            .expect("made");
        let der = pem_to_der(&made.pem).expect("der");
        let peer = PeerCertificate::read(&der).expect("peer");
        assert_eq!((&peer.worker, peer.key), (&worker, made.key));
        assert_eq!(peer.expires_unix_ms, now + 24 * 3_600_000);
        let (_, parsed) = X509Certificate::from_der(&der).expect("parse");
        let begins = parsed.validity().not_before.timestamp();
        assert_eq!(begins, 1_800_000_000 - 3600, "backdated");
        assert!(!parsed.is_ca());
        assert!(peer.is_current(now) && !peer.is_current(peer.expires_unix_ms));
        let day = 86_400_000;
        assert!(peer.may_renew(peer.expires_unix_ms + 30 * day - 1));
        assert!(!peer.may_renew(peer.expires_unix_ms + 30 * day));
    }

    #[test]
    fn a_renewal_is_for_the_key_it_joined_with() {
        let (_dir, authority) = authority();
        let (key, other) = (
            KeyPair::generate().expect("key"),
            KeyPair::generate().expect("key"),
        );
        let worker = "w1".parse().expect("name");
        let made = authority
            .worker_certificate(&csr(&key), &worker, None, 0)
            .expect("made");
        let renew = |key| authority.worker_certificate(&csr(key), &worker, Some(&made.key), 0);
        assert!(renew(&key).is_ok());
        assert!(matches!(renew(&other), Err(CertificateError::OtherKey)));
        let bad = csr(&key).replacen('M', "N", 3);
        for bad in ["", "x", &bad, &"-".repeat(CSR_BYTES_MAX + 1)] {
            assert!(authority.worker_certificate(bad, &worker, None, 0).is_err());
        }
    }
}
