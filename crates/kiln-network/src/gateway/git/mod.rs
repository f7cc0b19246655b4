//! The git gateway: a machine's git reads the repositories that its policy names, and the host shows their servers its own credential.
//!
//! ```text
//! guest: http://git.kiln.internal/HOST/PATH -> read (one of two requests, or refused) -> rules of the phase
//!        -> resolve, floor, dial as any connection -> TLS of the host's own -> request written anew, credential added -> answer, reduced
//! ```
//!
//! - Both sides are HTTP of the gateway's own: no byte of a head goes through. Of the guest's headers three words decide something, its
//!   `Authorization`, `Cookie` and proxy headers are never looked at.
//! - A credential goes to the very host, port and repository it is for, and nowhere by a redirect: one that leads to a repository of the
//!   policy is given to the guest as another address here, which is a new request and a new decision; every other one is refused.
//! - An answer that is not git's own type is replaced by words of the gateway's, so nothing else that a server says reaches the guest.
//! - Every request has a connection of its own to its server: nothing is shared between machines, and nothing is kept.
//!
//! Read next: [`request`] (what is asked, pure), `exchange` (one request and its answer).

mod exchange;
mod pieces;
pub mod request;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kiln_core::git_gateway::is_git_user;
use kiln_core::secret::Repository;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use self::pieces::Pieces;
use super::{BoxedDuplex, Gateway, GuestService};
use crate::BoxFuture;

/// Most bytes of a guest's request: what it has already of a repository, at most.
pub const REQUEST_BYTES_MAX: u64 = 32 << 20;
/// Most bytes of the head of a request or an answer.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Most headers of a request.
const HEADERS_MAX: usize = 64;
/// How long a guest may take between two requests, and for the head of one.
const HEAD_WAIT: Duration = Duration::from_secs(120);
/// How long TLS with a server may take.
const TLS_WAIT: Duration = Duration::from_secs(20);

/// Why the gateway cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum GitSetupError {
    /// The authorities.
    #[error("the host's certificates cannot be used: {0}")]
    Roots(String),
    /// A user or password that no header can hold.
    #[error("the credential of {0} is not one line of text, or its user is no name")]
    Credential(Repository),
}

/// What the gateway has of the host: whom it trusts, and credentials.
#[derive(Clone)]
pub struct GitUpstreams {
    tls: Arc<rustls::ClientConfig>,
    credentials: BTreeMap<Repository, HeaderValue>,
}

impl fmt::Debug for GitUpstreams {
    /// Never a value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.credentials.keys()).finish()
    }
}

impl GitUpstreams {
    /// Trusts the system's authorities, and these (PEM).
    ///
    /// # Errors
    /// When they are no certificates.
    pub fn new(authorities: Option<&[u8]>) -> Result<Self, GitSetupError> {
        let wrong = |error: &dyn fmt::Display| GitSetupError::Roots(error.to_string());
        let mut roots = rustls::RootCertStore::empty();
        // A broken certificate of the system is its operator's matter; without any, TLS says so.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        for one in authorities
            .into_iter()
            .flat_map(CertificateDer::pem_slice_iter)
        {
            let one = one.map_err(|error| wrong(&error))?;
            // What TLS cannot use among many is not trusted, and nothing else.
            let _unusable = roots.add(one);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(&error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            tls: Arc::new(tls),
            credentials: BTreeMap::new(),
        })
    }

    /// Adds what is shown to a repository's server.
    ///
    /// # Errors
    /// When it is no user or no password.
    pub fn with(
        mut self,
        repository: &Repository,
        user: &str,
        password: &[u8],
    ) -> Result<Self, GitSetupError> {
        let wrong = || GitSetupError::Credential(repository.clone());
        // A file's last newline is no part of a password.
        let password = password.strip_suffix(b"\n").unwrap_or(password);
        let password = password.strip_suffix(b"\r").unwrap_or(password);
        let plain = !password.is_empty() && !password.iter().any(u8::is_ascii_control);
        if !is_git_user(user) || !plain {
            return Err(wrong());
        }
        let login = [user.as_bytes(), b":", password].concat();
        let value = format!("Basic {}", STANDARD.encode(login));
        let mut value = HeaderValue::try_from(value).map_err(|_| wrong())?;
        value.set_sensitive(true);
        self.credentials.insert(repository.clone(), value);
        Ok(self)
    }
}

/// The gateway as one connection of a guest finds it.
pub(super) struct Door {
    pub(super) gateway: Gateway,
    pub(super) upstreams: Arc<GitUpstreams>,
}

impl GuestService for Door {
    fn serve(&self, stream: BoxedDuplex) -> BoxFuture<'static, ()> {
        let (gateway, upstreams) = (self.gateway.clone(), Arc::clone(&self.upstreams));
        Box::pin(async move {
            let service = service_fn(move |request| {
                let (gateway, upstreams) = (gateway.clone(), Arc::clone(&upstreams));
                async move {
                    let answer = exchange::exchange(&gateway, &upstreams, request).await;
                    Ok::<_, Infallible>(answer)
                }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WAIT)
                .max_buf_size(HEAD_BYTES_MAX)
                .max_headers(HEADERS_MAX)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                // What broke one connection is the guest's to see.
                tracing::trace!(%error, "a connection of git ended");
            }
        })
    }
}

/// Words for the guest: git shows them.
fn words(status: StatusCode, text: &str) -> Response<Pieces> {
    let mut answer = Response::new(Pieces::whole(format!("kiln: {text}\n")));
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain");
    answer.headers_mut().insert(CONTENT_TYPE, plain);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_one_line_and_never_printed() {
        let repository: Repository = "h.example.org/a".parse().expect("repository");
        let none = GitUpstreams::new(None).expect("system's");
        for (user, password) in [
            ("a:b", &b"x"[..]),
            ("", b"x"),
            ("a", b""),
            ("a", b"x\r\ny"),
            ("a", b"\0"),
        ] {
            assert!(none.clone().with(&repository, user, password).is_err());
        }
        let one = none.with(&repository, "me", b"hunter2\n").expect("legal");
        assert_eq!(one.credentials[&repository], "Basic bWU6aHVudGVyMg==");
        assert_eq!(format!("{one:?}"), "{Repository(\"h.example.org/a\")}");
        assert!(!format!("{:?}", one.credentials).contains("bWU6"));
        assert!(GitUpstreams::new(Some(b"no certificate")).is_ok());
        let broken = b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
        assert!(GitUpstreams::new(Some(broken)).is_err());
    }
}
