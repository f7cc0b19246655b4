//! HTTP/1.1 to a controller: over its private socket, over TCP, or over mutual TLS. Connections are kept and used again.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::combinators::BoxBody;
use hyper::body::Incoming;
use hyper::rt::ReadBufCursor;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kiln_store::private_socket;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Longest wait for a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;
/// Idle connections kept.
const IDLE_MAX: usize = 8;

/// Where the controller is.
#[derive(Clone, Debug)]
pub enum Target {
    /// Its private socket: the peer's uid is the proof on both sides.
    Socket(PathBuf),
    /// Plain TCP; only on loopback or where the operator said so.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// Mutual TLS.
    Tls {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
        /// Trusted authority and this worker's certificate.
        config: Arc<rustls::ClientConfig>,
    },
}

/// Body of a request.
pub type Body = BoxBody<Bytes, std::io::Error>;

/// Why a request was not answered.
pub use hyper_util::client::legacy::Error as HttpError;

/// A connection after the answer 101 (RFC 9110 §7.8).
pub type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// The connection of such an answer.
///
/// # Errors
/// When it broke.
pub async fn upgraded(response: Response<Incoming>) -> Result<Upgraded, hyper::Error> {
    hyper::upgrade::on(response).await.map(TokioIo::new)
}

/// A pool of connections to one controller. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Http {
    pool: Pool<Connector, Body>,
    authority: String,
    host: Option<String>,
}

impl Http {
    /// Towards a controller; nothing is connected yet.
    #[must_use]
    pub fn new(target: Target) -> Self {
        let authority = match &target {
            Target::Socket(_) => "controller".to_owned(),
            Target::Tcp { host, port } | Target::Tls { host, port, .. } => {
                match host.contains(':') {
                    true => format!("[{host}]:{port}"),
                    false => format!("{host}:{port}"),
                }
            }
        };
        let host = match &target {
            Target::Socket(_) => None,
            Target::Tcp { host, .. } | Target::Tls { host, .. } => Some(host.clone()),
        };
        let pool = Pool::builder(TokioExecutor::new())
            .pool_max_idle_per_host(IDLE_MAX)
            .build(Connector {
                target: Arc::new(target),
                last: Arc::default(),
            });
        Self {
            pool,
            authority,
            host,
        }
    }

    /// The controller's host name or address; none over a private socket.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// The URI of a path, which begins with a slash. What it begins with only fills the `Host` header: where a connection goes, the
    /// target says.
    #[must_use]
    pub fn uri(&self, path: &str) -> String {
        format!("http://{}{path}", self.authority)
    }

    /// Sends a request; its URI comes from [`Http::uri`].
    ///
    /// # Errors
    /// When nobody answers or the connection breaks.
    pub async fn request(&self, request: Request<Body>) -> Result<Response<Incoming>, HttpError> {
        self.pool.request(request).await
    }
}

#[derive(Clone, Debug)]
struct Connector {
    target: Arc<Target>,
    /// The address that answered last. A name may have several, of controllers that stand in for each other: as long as one answers it
    /// is not left, since it keeps the logs it was sent.
    last: Arc<Mutex<Option<SocketAddr>>>,
}

enum Wire {
    Socket(TokioIo<UnixStream>),
    Tcp(TokioIo<TcpStream>),
    Tls(Box<TokioIo<TlsStream<TcpStream>>>),
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

type Last = Mutex<Option<SocketAddr>>;

async fn connect(target: &Target, last: &Last) -> std::io::Result<Wire> {
    match target {
        Target::Socket(path) => Ok(Wire::Socket(TokioIo::new(
            private_socket::connect(path).await?,
        ))),
        Target::Tcp { host, port } => Ok(Wire::Tcp(TokioIo::new(tcp(host, *port, last).await?))),
        Target::Tls { host, port, config } => {
            let name = ServerName::try_from(host.clone()).map_err(std::io::Error::other)?;
            let tcp = tcp(host, *port, last).await?;
            let tls = TlsConnector::from(Arc::clone(config))
                .connect(name, tcp)
                .await?;
            Ok(Wire::Tls(Box::new(TokioIo::new(tls))))
        }
    }
}

/// Connects to the address that answered last, else to the first that does: one whose host is gone may not use up the others' time.
async fn tcp(host: &str, port: u16, last: &Last) -> std::io::Result<TcpStream> {
    let lock = || last.lock().unwrap_or_else(PoisonError::into_inner);
    let mut addresses: Vec<_> = lookup_host((host, port)).await?.collect();
    addresses.truncate(ADDRESSES_MAX);
    let known = *lock();
    match known.and_then(|known| addresses.iter().position(|address| *address == known)) {
        Some(at) => addresses.swap(0, at),
        // Workers spread over what the name gives.
        None if !addresses.is_empty() => {
            let turn = std::process::id() as usize % addresses.len();
            addresses.rotate_left(turn);
        }
        None => {}
    }
    let each = CONNECT_TIMEOUT / u32::try_from(addresses.len().max(1)).unwrap_or(1);
    let mut failed = std::io::Error::from(std::io::ErrorKind::NotFound);
    for address in addresses {
        match tokio::time::timeout(each, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                *lock() = Some(address);
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => failed = error,
            Err(_) => failed = std::io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failed)
}

impl tower::Service<Uri> for Connector {
    type Response = Wire;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Wire>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let (target, last) = (Arc::clone(&self.target), Arc::clone(&self.last));
        Box::pin(async move {
            // With time for TLS.
            tokio::time::timeout(2 * CONNECT_TIMEOUT, connect(&target, &last))
                .await
                .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        })
    }
}

impl hyper::rt::Read for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Socket(io) => Pin::new(io).poll_read(cx, buffer),
            Self::Tcp(io) => Pin::new(io).poll_read(cx, buffer),
            Self::Tls(io) => Pin::new(io.as_mut()).poll_read(cx, buffer),
        }
    }
}

impl hyper::rt::Write for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Socket(io) => Pin::new(io).poll_write(cx, bytes),
            Self::Tcp(io) => Pin::new(io).poll_write(cx, bytes),
            Self::Tls(io) => Pin::new(io.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Socket(io) => Pin::new(io).poll_flush(cx),
            Self::Tcp(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Socket(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tcp(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io.as_mut()).poll_shutdown(cx),
        }
    }
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Socket(_) => "Socket",
            Self::Tcp(_) => "Tcp",
            Self::Tls(_) => "Tls",
        })
    }
}
