//! The sockets: TCP with or without TLS, and the private one. Says who is at the other end, and bounds what a connection may cost.
//!
//! Slow senders: a head must come within [`ListenConfig::head_timeout`] and a handshake too; bodies are bounded by the routes.
//! Connections are counted per address and in all, and can be closed by the worker that made them.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use kiln_core::WorkerId;
use kiln_db::{Database, Wake};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::access::peer::network_of;
use crate::access::{Peer, PeerCertificate};

/// Connections on the private socket, which others cannot take: commands of this host and its own worker come by it.
const PRIVATE_MAX: usize = 1_024;
/// Longest head of a request, bytes.
const HEAD_MAX: usize = 64 * 1024;
/// Wait after a failed accept, so that a full file table does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bounds of the sockets.
#[derive(Clone, Debug)]
pub struct ListenConfig {
    /// Connections over TCP in all.
    pub connections_max: usize,
    /// Connections of one address (of a /64 of IPv6), loopback aside.
    pub connections_per_address: usize,
    /// Longest time for a TLS handshake, and for the head of a request.
    pub head_timeout: Duration,
    /// Plain HTTP on an address that others reach: only when the operator says so.
    pub plain_is_fine: bool,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            connections_max: 8_192,
            connections_per_address: 1_024,
            head_timeout: Duration::from_secs(10),
            plain_is_fine: false,
        }
    }
}

/// Why a socket was not opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Others could read tokens on the wire.
    #[error(
        "{0} can be reached by others, and without TLS they could read tokens: give --tls-cert and --tls-key, listen on 127.0.0.1, or say --insecure-plain-http"
    )]
    Plain(SocketAddr),
    /// The address is taken or not ours.
    #[error("cannot listen on {address}")]
    Bind {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Open sockets and their connections.
#[derive(Clone, Debug)]
pub struct Sockets {
    config: ListenConfig,
    stop: CancellationToken,
    cut: CancellationToken,
    tasks: TaskTracker,
    all: Arc<Semaphore>,
    private: Arc<Semaphore>,
    table: Arc<Table>,
}

/// The connection that a request came on: another extension of every request.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    table: Arc<Table>,
    cut: CancellationToken,
    entered: Arc<Mutex<Option<Entered>>>,
}

impl Connection {
    /// Notes that it is a worker's, who proved it by something else than a certificate: it is closed when the worker is removed. False when
    /// that was known already.
    pub(crate) fn belongs_to(&self, worker: &WorkerId) -> bool {
        let mut entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
        if entered
            .as_ref()
            .is_some_and(|known| known.worker == *worker)
        {
            return false;
        }
        // Of two workers one after the other the later one counts: both prove themselves at every request.
        *entered = Some(self.table.enter(worker, self.cut.clone()));
        true
    }
}

#[derive(Debug, Default)]
struct Table {
    addresses: Mutex<HashMap<IpAddr, usize>>,
    workers: Mutex<HashMap<WorkerId, Vec<(u64, CancellationToken)>>>,
    next: std::sync::atomic::AtomicU64,
}

impl Table {
    fn enter(self: &Arc<Self>, worker: &WorkerId, cut: CancellationToken) -> Entered {
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.entry(worker.clone()).or_default().push((id, cut));
        Entered {
            table: Arc::clone(self),
            worker: worker.clone(),
            id,
        }
    }
}

impl Sockets {
    /// None open yet.
    #[must_use]
    pub fn new(config: ListenConfig) -> Self {
        Self {
            all: Arc::new(Semaphore::new(config.connections_max)),
            private: Arc::new(Semaphore::new(PRIVATE_MAX)),
            config,
            stop: CancellationToken::new(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
            table: Arc::default(),
        }
    }

    /// Listens on TCP; gives the address, with the port that was chosen for 0.
    ///
    /// # Errors
    /// Without TLS on an address that others reach, and when the address cannot be had.
    pub async fn tcp(
        &self,
        address: SocketAddr,
        tls: Option<Arc<rustls::ServerConfig>>,
        router: Router,
    ) -> Result<SocketAddr, ListenError> {
        if tls.is_none() && !address.ip().is_loopback() && !self.config.plain_is_fine {
            return Err(ListenError::Plain(address));
        }
        let failed = |source| ListenError::Bind {
            address: address.to_string(),
            source,
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let acceptor = tls.map(TlsAcceptor::from);
        let this = self.clone();
        self.tasks.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = this.stop.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                match accepted {
                    Ok((stream, from)) => this.take_tcp(stream, from, acceptor.clone(), &router),
                    Err(error) => this.pause(&error).await,
                }
            }
        });
        Ok(bound)
    }

    /// Listens on the private socket, which the file system keeps for this user alone. A file left by a dead process is replaced.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn unix(&self, path: impl AsRef<Path>, router: Router) -> Result<(), ListenError> {
        let path = path.as_ref();
        let listener =
            kiln_store::private_socket::listen(path).map_err(|source| ListenError::Bind {
                address: path.display().to_string(),
                source,
            })?;
        let this = self.clone();
        self.tasks.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = this.stop.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                match accepted {
                    Ok((stream, _)) => this.take_unix(stream, &router),
                    Err(error) => this.pause(&error).await,
                }
            }
        });
        Ok(())
    }

    async fn pause(&self, error: &io::Error) {
        tracing::warn!(%error, "a connection could not be taken");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }

    /// Closes every connection of a worker, at once.
    pub fn close_worker(&self, worker: &WorkerId) {
        let open = self
            .table
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(worker);
        for (_, connection) in open.into_iter().flatten() {
            connection.cancel();
        }
    }

    /// Closes the connections of workers that are removed, by whichever controller of this database, until the sockets close.
    pub fn close_removed(&self, db: Database) {
        let mut wakes = db.subscribe();
        let this = self.clone();
        self.tasks.spawn(async move {
            loop {
                let woken = tokio::select! {
                    () = this.stop.cancelled() => return,
                    woken = wakes.recv() => woken,
                };
                let suspects = match woken {
                    Ok(Wake::Worker(worker)) => vec![worker],
                    Ok(Wake::Everything) | Err(RecvError::Lagged(_)) => this.connected(),
                    Ok(_) => continue,
                    Err(RecvError::Closed) => return,
                };
                for worker in suspects {
                    // A database that does not answer closes nothing: every request of the worker asks it again.
                    if let Ok(Some(row)) = db.worker(&worker).await
                        && row.removed_unix_ms.is_some()
                    {
                        this.close_worker(&worker);
                    }
                }
            }
        });
    }

    fn connected(&self) -> Vec<WorkerId> {
        let workers = self
            .table
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        workers.keys().cloned().collect()
    }

    /// Takes no more connections, lets requests end for at most `patience`, then cuts what is left.
    pub async fn close(&self, patience: Duration) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(patience, self.tasks.wait())
            .await
            .is_err()
        {
            self.cut.cancel();
            self.tasks.wait().await;
        }
    }

    fn take_unix(&self, stream: UnixStream, router: &Router) {
        let Ok(permit) = Arc::clone(&self.private).try_acquire_owned() else {
            return;
        };
        let Ok(peer) = Peer::local(&stream) else {
            return;
        };
        let (this, router) = (self.clone(), router.clone());
        self.tasks.spawn(async move {
            this.serve(stream, peer, router, CancellationToken::new())
                .await;
            drop(permit);
        });
    }

    fn take_tcp(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        acceptor: Option<TlsAcceptor>,
        router: &Router,
    ) {
        let Some(place) = self.place(from.ip()) else {
            return;
        };
        let _not_needed = stream.set_nodelay(true);
        let (this, router) = (self.clone(), router.clone());
        self.tasks.spawn(async move {
            let Some(acceptor) = acceptor else {
                let peer = Peer::Plain { address: from };
                this.serve(stream, peer, router, CancellationToken::new())
                    .await;
                drop(place);
                return;
            };
            let handshake = acceptor.accept(stream);
            let Ok(Ok(stream)) = tokio::time::timeout(this.config.head_timeout, handshake).await
            else {
                return;
            };
            let chain = stream.get_ref().1.peer_certificates();
            let certificate = chain.and_then(|chain| PeerCertificate::read(chain.first()?));
            let cut = CancellationToken::new();
            let entered = certificate
                .as_ref()
                .map(|own| this.table.enter(&own.worker, cut.clone()));
            let peer = Peer::Tls {
                address: from,
                certificate,
            };
            this.serve(stream, peer, router, cut).await;
            drop((entered, place));
        });
    }

    fn place(&self, address: IpAddr) -> Option<Place> {
        let permit = Arc::clone(&self.all).try_acquire_owned().ok()?;
        let mut addresses = self
            .table
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let place = network_of(address);
        let count = addresses.entry(place).or_insert(0);
        if *count >= self.config.connections_per_address && !address.to_canonical().is_loopback() {
            return None;
        }
        *count += 1;
        Some(Place {
            table: Arc::clone(&self.table),
            address: place,
            _permit: permit,
        })
    }

    async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
        router: Router,
        cut: CancellationToken,
    ) {
        let connection = Connection {
            table: Arc::clone(&self.table),
            cut: cut.clone(),
            entered: Arc::default(),
        };
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer.clone());
            request.extensions_mut().insert(connection.clone());
            router.clone().oneshot(request)
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.config.head_timeout)
            .max_buf_size(HEAD_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended");
                }
            }
            () = cut.cancelled() => {}
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                // Followers would stay for ever.
                tokio::select! {
                    _ended = connection => {}
                    () = cut.cancelled() => {}
                    () = self.cut.cancelled() => {}
                }
            }
        }
    }
}

/// A connection's place among those of its address.
struct Place {
    table: Arc<Table>,
    address: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut addresses = self
            .table
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = addresses.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                addresses.remove(&self.address);
            }
        }
    }
}

/// A worker's connection in the table.
#[derive(Debug)]
struct Entered {
    table: Arc<Table>,
    worker: WorkerId,
    id: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut workers = self
            .table
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = workers.get_mut(&self.worker) {
            open.retain(|(id, _)| *id != self.id);
            if open.is_empty() {
                workers.remove(&self.worker);
            }
        }
    }
}

#[cfg(test)]
mod tests;
