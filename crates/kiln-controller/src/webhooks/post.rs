//! One request to one receiver.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::destination::{Destination, DestinationRefused, ReceiverPolicy};

/// Time for one try, name, connection and answer together.
pub(super) const TRY_TIMEOUT: Duration = Duration::from_secs(15);
/// Time for one address.
const DIAL_TIMEOUT: Duration = Duration::from_secs(4);
/// Most addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;
/// Longest head of an answer.
const HEAD_MAX: usize = 16 * 1024;
/// Most headers of an answer.
const HEADERS_MAX: usize = 64;

/// A byte stream with both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Names and connections, so that tests need no network.
pub trait Network: Send + Sync + 'static {
    /// Every address of a name.
    fn resolve(&self, host: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>>;
    /// Connects to exactly this address.
    fn dial(&self, addr: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Duplex>>>;
}

/// This host's resolver and TCP. No proxy is used, whatever the environment says.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostNetwork;

impl Network for HostNetwork {
    fn resolve(&self, host: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        let host = host.to_owned();
        Box::pin(async move {
            let answer = tokio::task::spawn_blocking(move || {
                let addrs = (host.as_str(), 0_u16).to_socket_addrs()?;
                Ok(addrs.map(|addr| addr.ip()).collect())
            });
            answer.await.map_err(io::Error::other)?
        })
    }

    fn dial(&self, addr: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Duplex>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Duplex>)
        })
    }
}

/// Why a try failed. Says nothing of what the receiver wrote beside its status.
#[derive(Debug, thiserror::Error)]
pub enum PostError {
    /// The receiver is not one that may be called.
    #[error(transparent)]
    Refused(#[from] DestinationRefused),
    /// Its name has no address.
    #[error("its name has no address")]
    Resolve(#[source] io::Error),
    /// No connection.
    #[error("it cannot be reached")]
    Dial(#[source] io::Error),
    /// TLS failed: its certificate is not for this name, or nobody here trusts it.
    #[error("TLS with it failed")]
    Tls(#[source] io::Error),
    /// It did not speak HTTP.
    #[error("it did not answer in HTTP")]
    Protocol(#[source] hyper::Error),
    /// Too slow.
    #[error("it did not answer within {} seconds", TRY_TIMEOUT.as_secs())]
    Late,
    /// A redirect.
    #[error("it answered {0}; redirects are not followed")]
    Redirect(u16),
    /// It does not want these messages any more (410).
    #[error("it answered 410: it wants no more of these")]
    Gone,
    /// Any other status that is not a success.
    #[error("it answered {0}")]
    Status(u16),
}

impl PostError {
    /// Whether trying again is pointless.
    pub(super) fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Gone | Self::Refused(DestinationRefused::Url(_) | DestinationRefused::NotHttps)
        )
    }

    /// Whether the receiver itself is in trouble, not this message.
    pub(super) fn is_outage(&self) -> bool {
        matches!(
            self,
            Self::Resolve(_) | Self::Dial(_) | Self::Tls(_) | Self::Protocol(_) | Self::Late
        )
    }

    /// Label of the metric.
    pub(super) fn result(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            _ => "failed",
        }
    }
}

/// A signed message.
pub(super) struct Letter {
    pub(super) id: String,
    pub(super) timestamp: u64,
    pub(super) signature: String,
    pub(super) body: Bytes,
}

/// Everything a try needs.
pub(super) struct Sender<N> {
    pub(super) network: N,
    pub(super) policy: ReceiverPolicy,
    pub(super) tls: TlsConnector,
}

impl<N> fmt::Debug for Sender<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// Trusts this host's certificates and those given. HTTP/1.1 only.
pub(super) fn tls(
    extra: impl IntoIterator<Item = rustls::pki_types::CertificateDer<'static>>,
) -> Result<TlsConnector, rustls::Error> {
    let mut roots = rustls::RootCertStore::empty();
    // A broken certificate of the host is its operator's matter; without any, TLS says so.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for cert in extra {
        roots.add(cert)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

impl<N: Network> Sender<N> {
    /// One try.
    pub(super) async fn post(&self, to: &Destination, letter: &Letter) -> Result<(), PostError> {
        tokio::time::timeout(TRY_TIMEOUT, self.post_within(to, letter))
            .await
            .map_err(|_| PostError::Late)?
    }

    async fn post_within(&self, to: &Destination, letter: &Letter) -> Result<(), PostError> {
        let stream = self.connect(to).await?;
        if !to.is_secure() {
            return exchange(stream, to, letter).await;
        }
        let name = ServerName::try_from(to.host().to_owned())
            .map_err(|error| PostError::Tls(io::Error::other(error)))?;
        let stream = self
            .tls
            .connect(name, stream)
            .await
            .map_err(PostError::Tls)?;
        exchange(Box::new(stream), to, letter).await
    }

    /// Resolves the name once, and dials only addresses of that answer that passed.
    async fn connect(&self, to: &Destination) -> Result<Box<dyn Duplex>, PostError> {
        let found = match to.host().parse() {
            Ok(addr) => vec![addr],
            Err(_) => self
                .network
                .resolve(to.host())
                .await
                .map_err(PostError::Resolve)?,
        };
        let mut refused = None;
        let mut passed = Vec::new();
        for addr in found {
            match to.check(addr, &self.policy) {
                Ok(()) if !passed.contains(&addr) => passed.push(addr),
                Ok(()) => {}
                Err(why) => refused = Some(why),
            }
        }
        passed.truncate(ADDRESSES_MAX);
        let mut last = match (passed.is_empty(), refused) {
            (true, Some(why)) => return Err(why.into()),
            (true, None) => {
                return Err(PostError::Resolve(io::ErrorKind::NotFound.into()));
            }
            (false, _) => io::Error::from(io::ErrorKind::NotConnected),
        };
        for addr in passed {
            let dialling = self.network.dial(SocketAddr::new(addr, to.port()));
            match tokio::time::timeout(DIAL_TIMEOUT, dialling).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(PostError::Dial(last))
    }
}

/// Ends a task with its owner.
struct Ends(tokio::task::JoinHandle<()>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn exchange(
    stream: Box<dyn Duplex>,
    to: &Destination,
    letter: &Letter,
) -> Result<(), PostError> {
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(PostError::Protocol)?;
    let _connection = Ends(tokio::spawn(async move {
        // How it ended is seen by the request.
        let _ = connection.await;
    }));
    let agent = concat!("kiln-webhooks/", env!("CARGO_PKG_VERSION"));
    let request = Request::post(to.path())
        .header(header::HOST, to.authority())
        .header(header::USER_AGENT, agent)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .header("webhook-id", &letter.id)
        .header("webhook-timestamp", letter.timestamp)
        .header("webhook-signature", &letter.signature)
        .body(Full::new(letter.body.clone()))
        .map_err(|_| DestinationRefused::Url("it does not fit into a request"))?;
    let status = sender
        .send_request(request)
        .await
        .map_err(PostError::Protocol)?
        .status();
    // The body of the answer is never read.
    match status {
        StatusCode::GONE => Err(PostError::Gone),
        status if status.is_success() => Ok(()),
        status if status.is_redirection() => Err(PostError::Redirect(status.as_u16())),
        status => Err(PostError::Status(status.as_u16())),
    }
}
