//! TLS 1.3 for the listeners: the server's certificate, and workers' certificates where they are shown.
//!
//! People show none; a worker's is verified here and read by [`PeerCertificate`](super::PeerCertificate). An expired one passes the
//! handshake for [`RENEWAL_GRACE`]: every worker door but renewal then refuses it by its date.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ResolvesServerCert, WebPkiClientVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::{Authority, CertificateError, RENEWAL_GRACE, not_after_ms};
use super::shown::FilesError;

/// Why no TLS configuration came of it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Certificate and key do not belong together, or are of a kind that is not taken.
    #[error("the certificate and key cannot be used for TLS")]
    Identity(#[source] rustls::Error),
    /// The authority cannot be used to verify.
    #[error("the authority's certificate cannot be used to verify workers")]
    Authority(#[source] rustls::server::VerifierBuilderError),
    /// The operator's files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The controller's own certificate.
    #[error(transparent)]
    Own(#[from] CertificateError),
}

/// TLS for a listener that shows these certificates, and takes workers' of `authority`, and peers without any.
///
/// # Errors
/// When the authority cannot be used.
pub fn server_config(
    shown: Arc<dyn ResolvesServerCert>,
    authority: &Authority,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    let _ = roots.add_parsable_certificates([authority.der().clone()]);
    let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(TlsError::Authority)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Identity)?
        .with_client_cert_verifier(Arc::new(SleepyWorkers { inner }))
        .with_cert_resolver(shown);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Takes workers' certificates that have expired a while ago, as if it were the moment before their end.
#[derive(Debug)]
struct SleepyWorkers {
    inner: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for SleepyWorkers {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let at = match X509Certificate::from_der(end_entity) {
            Ok((_, certificate)) => {
                let end = not_after_ms(&certificate) / 1000;
                let over = now.as_secs().saturating_sub(end);
                if over > 0 && over <= RENEWAL_GRACE.as_secs() {
                    UnixTime::since_unix_epoch(std::time::Duration::from_secs(end))
                } else {
                    now
                }
            }
            Err(_) => now,
        };
        self.inner.verify_client_cert(end_entity, intermediates, at)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
