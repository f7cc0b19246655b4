//! A worker's own key and certificates: made when it joins, renewed while it works, kept in a folder of its owner alone.
//!
//! A join token pins the controller's authority, so the first connection is as safe as the token; every later one trusts that authority
//! alone. The private key never leaves this host.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_core::dispatch::WorkerFacts;
use kiln_core::{Digest, WorkerId};
use kiln_proto::fleet::{Join, Joined, Renew};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::client::{Client, LinkError, REQUEST_TIMEOUT};
use super::http::Target;

/// A certificate is renewed when this part of its life is left.
const RENEW_AT: f64 = 1.0 / 3.0;
/// Shortest wait between two tries to renew.
const RENEW_RETRY: Duration = Duration::from_secs(60);
/// Longest wait before the certificate's end is looked at again: the host may have slept.
const LOOK_AGAIN: Duration = Duration::from_secs(300);

/// Why a worker has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The text is no URL of a controller.
    #[error("{0:?} is not the URL of a controller: write https://HOST:PORT")]
    Url(String),
    /// The text is no join token.
    #[error("this is not a join token: `kiln token create --join` makes one")]
    Token,
    /// A key or certificate could not be made or read.
    #[error("the worker's key or certificate cannot be used: {0}")]
    Key(String),
    /// The folder cannot be used.
    #[error("use {path}")]
    Folder {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another process works with this identity.
    #[error("another kiln process is this worker already")]
    Taken,
    /// The controller did not let it join.
    #[error("join the controller")]
    Link(#[from] LinkError),
}

/// Where a controller is: `https://HOST:PORT`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ControllerUrl {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl std::str::FromStr for ControllerUrl {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let wrong = || IdentityError::Url(text.chars().take(200).collect());
        let uri: http::Uri = text.parse().map_err(|_| wrong())?;
        if uri.scheme_str() != Some("https") || !matches!(uri.path(), "" | "/") {
            return Err(wrong());
        }
        let host = uri.host().ok_or_else(wrong)?.trim_matches(['[', ']']);
        Ok(Self {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(443),
        })
    }
}

/// What is kept about a membership besides key and certificates.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Membership {
    worker: WorkerId,
    controller: ControllerUrl,
    expires_unix_ms: u64,
}

/// A worker that joined.
#[derive(Debug)]
pub struct Identity {
    folder: PathBuf,
    key: KeyPair,
    membership: RwLock<Membership>,
    resolver: Arc<Resolver>,
    authority: CertificateDer<'static>,
    _lock: fs::File,
}

#[derive(Debug)]
struct Resolver(RwLock<Arc<CertifiedKey>>);

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(
            &self.0.read().unwrap_or_else(PoisonError::into_inner),
        ))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn key_error(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::Key(error.to_string())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn now_unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What a worker offers in a handshake.
fn offered() -> Vec<Vec<u8>> {
    vec![kiln_proto::fleet::ALPN.to_vec(), b"http/1.1".to_vec()]
}

/// The authority that a join token pins.
fn pinned(token: &str) -> Result<Digest, IdentityError> {
    let hex = token.rsplit('_').next().unwrap_or_default();
    if !token.starts_with("kjt_") || hex.len() != 64 {
        return Err(IdentityError::Token);
    }
    format!("sha256:{hex}")
        .parse()
        .map_err(|_| IdentityError::Token)
}

fn request(key: &KeyPair, worker: &WorkerId) -> Result<String, IdentityError> {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, worker.as_str());
    let request = params.serialize_request(key).map_err(key_error)?;
    request.pem().map_err(key_error)
}

impl Identity {
    /// Joins a controller with a single-use token, and keeps what came of it in `folder`.
    ///
    /// # Errors
    /// See [`IdentityError`]. A token that was used is gone even when the answer was lost.
    pub async fn join(
        folder: &Path,
        controller: ControllerUrl,
        token: &str,
        worker: WorkerId,
        facts: WorkerFacts,
    ) -> Result<Self, IdentityError> {
        let pin = pinned(token)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(key_error)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(key_error)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { pin }))
            .with_no_client_auth();
        config.alpn_protocols = offered();
        let target = Target::Tls {
            host: controller.host.clone(),
            port: controller.port,
            config: Arc::new(config),
        };
        let message = Join {
            worker: worker.clone(),
            token: token.to_owned(),
            csr: request(&key, &worker)?,
            labels: std::collections::BTreeMap::new(),
            facts,
        };
        let client = Client::new(target, worker);
        let joined: Joined = client
            .call("/worker/v1/join", None, &message, REQUEST_TIMEOUT)
            .await?;
        let membership = Membership {
            worker: joined.worker,
            controller,
            expires_unix_ms: joined.expires_unix_ms,
        };
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder);
        made.map_err(|source| IdentityError::Folder {
            path: folder.to_owned(),
            source,
        })?;
        write(folder, "key.pem", key.serialize_pem().as_bytes())?;
        write(folder, "authority.pem", joined.authority.as_bytes())?;
        keep(folder, &membership, &joined.certificate)?;
        Self::open(folder)?.ok_or_else(|| key_error("what was written is gone"))
    }

    /// Opens what an earlier join left; `None` when there was none.
    ///
    /// # Errors
    /// When it is there and cannot be used.
    pub fn open(folder: &Path) -> Result<Option<Self>, IdentityError> {
        let Some(membership) = read(folder, "worker.json")? else {
            return Ok(None);
        };
        let lock = lock(folder)?;
        let membership: Membership = serde_json::from_slice(&membership).map_err(key_error)?;
        let needed = |name: &str| {
            let missing = || key_error(format!("{name} is missing"));
            read(folder, name)?.ok_or_else(missing)
        };
        let key = String::from_utf8(needed("key.pem")?).map_err(key_error)?;
        let key = KeyPair::from_pem(&key).map_err(key_error)?;
        let authority = needed("authority.pem")?;
        let authority = CertificateDer::from_pem_slice(&authority).map_err(key_error)?;
        let certified = certified(&key, &needed("certificate.pem")?)?;
        Ok(Some(Self {
            folder: folder.to_owned(),
            key,
            membership: RwLock::new(membership),
            resolver: Arc::new(Resolver(RwLock::new(Arc::new(certified)))),
            authority,
            _lock: lock,
        }))
    }

    /// The worker's name.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        self.membership().worker
    }

    /// The controller it joined.
    #[must_use]
    pub fn controller(&self) -> ControllerUrl {
        self.membership().controller
    }

    /// The controller's authority, PEM.
    ///
    /// # Errors
    /// When its file is gone.
    pub fn authority_pem(&self) -> Result<Vec<u8>, IdentityError> {
        read(&self.folder, "authority.pem")?.ok_or_else(|| key_error("authority.pem is missing"))
    }

    fn membership(&self) -> Membership {
        let membership = self.membership.read();
        membership.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The way to the controller, with whatever certificate is the current one.
    ///
    /// # Errors
    /// When the authority cannot be used.
    pub fn target(&self) -> Result<Target, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone()).map_err(key_error)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(key_error)?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::clone(&self.resolver) as _);
        config.alpn_protocols = offered();
        let controller = self.controller();
        Ok(Target::Tls {
            host: controller.host,
            port: controller.port,
            config: Arc::new(config),
        })
    }

    /// Renews the certificate in time, until `stop`. One that expired while the host slept is renewed first of all.
    pub async fn keep_renewed(&self, client: &Client, stop: &CancellationToken) {
        let mut life_ms = None;
        loop {
            let left = self
                .membership()
                .expires_unix_ms
                .saturating_sub(now_unix_ms());
            let life = *life_ms.get_or_insert(left.max(1));
            #[expect(
                clippy::cast_precision_loss,
                reason = "milliseconds of a day fit a double"
            )]
            let due = (left as f64) <= (life as f64) * RENEW_AT;
            let wait = match due {
                false => LOOK_AGAIN.min(Duration::from_millis(left / 3)),
                true => match self.renew(client).await {
                    Ok(()) => {
                        life_ms = None;
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(
                            error = crate::orders::chain(&error),
                            "the certificate was not renewed"
                        );
                        RENEW_RETRY
                    }
                },
            };
            tokio::select! {
                () = tokio::time::sleep(wait.max(Duration::from_secs(1))) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Renews the certificate now.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub async fn renew(&self, client: &Client) -> Result<(), IdentityError> {
        let mut membership = self.membership();
        let message = Renew {
            csr: request(&self.key, &membership.worker)?,
        };
        let joined: Joined = client
            .call("/worker/v1/renew", None, &message, REQUEST_TIMEOUT)
            .await?;
        let next = certified(&self.key, joined.certificate.as_bytes())?;
        membership.expires_unix_ms = joined.expires_unix_ms;
        keep(&self.folder, &membership, &joined.certificate)?;
        *self
            .resolver
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        *self
            .membership
            .write()
            .unwrap_or_else(PoisonError::into_inner) = membership;
        Ok(())
    }

    /// Whether the certificate has expired: it has to be renewed before anything else is asked.
    #[must_use]
    pub fn has_expired(&self) -> bool {
        self.membership().expires_unix_ms <= now_unix_ms()
    }
}

/// Held as long as this identity is in use: two processes would take each other's leases.
fn lock(folder: &Path) -> Result<fs::File, IdentityError> {
    let path = folder.join("worker.lock");
    let failed = |source| IdentityError::Folder {
        path: path.clone(),
        source,
    };
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(IdentityError::Taken),
        Err(error) => Err(failed(error.into())),
    }
}

fn certified(key: &KeyPair, pem: &[u8]) -> Result<CertifiedKey, IdentityError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem).flatten().collect();
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(key_error)?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(key_error)
}

/// The certificate first: a membership without one would not open.
fn keep(folder: &Path, membership: &Membership, certificate: &str) -> Result<(), IdentityError> {
    write(folder, "certificate.pem", certificate.as_bytes())?;
    let text = serde_json::to_vec(membership).map_err(key_error)?;
    write(folder, "worker.json", &text)
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), IdentityError> {
    let path = folder.join(name);
    let part = folder.join(format!("{name}.part"));
    let written = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, &path)
    })();
    written.map_err(|source| IdentityError::Folder { path, source })
}

fn read(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, IdentityError> {
    let path = folder.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityError::Folder { path, source }),
    }
}

/// Trusts the one authority that the token names, and what it signed for this host name.
#[derive(Debug)]
struct Pinned {
    pin: Digest,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let pinned = intermediates
            .iter()
            .find(|certificate| Digest::of(certificate) == self.pin)
            .ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let verifier = verifier.map_err(|_| unknown())?;
        verifier.verify_server_cert(end_entity, &[], name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_have_https_urls() {
        let url: ControllerUrl = "https://ci.example.org:8443".parse().expect("legal");
        assert_eq!((url.host.as_str(), url.port), ("ci.example.org", 8443));
        let url: ControllerUrl = "https://[::1]/".parse().expect("legal");
        assert_eq!((url.host.as_str(), url.port), ("::1", 443));
        for bad in [
            "http://ci.example.org",
            "ci.example.org",
            "https://x/path",
            "",
        ] {
            assert!(bad.parse::<ControllerUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_pins_its_authority() {
        let hex = "ab".repeat(32);
        let token = format!("kjt_kjt-1_{}_{hex}", "cd".repeat(32));
        assert_eq!(pinned(&token).expect("pin").hex(), hex);
        for bad in ["", "kst_a_b", "kjt_kjt-1_short"] {
            assert!(pinned(bad).is_err(), "{bad}");
        }
    }
}
