//! One admitted connection: the guest's bytes are held until their name was checked, then both directions are
//! copied with half-close, idle timeout and byte counts, until an end or until the policy no longer allows it.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kiln_core::network::{EgressEvent, EgressVerdict, NameFault, Protocol as Speaks, normal_host};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::bandwidth::{Bandwidth, Direction};
use super::dial::BoxedDuplex;
use super::rules::Watched;
use super::share::Moving;
use super::{GuestService, Limits};
use crate::inspect::http::{Form, HttpChecker, HttpRefusal};
use crate::inspect::tls::{Hello, client_hello};
use crate::inspect::{FIRST_LINE_BYTES_MAX, Protocol, classify};
use crate::record::EgressSink;

/// Bytes of one read; each connection owns two such buffers.
const COPY_BYTES: usize = 16 * 1024;
/// How long the last words to a refused guest may take.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(1);
/// TLS alert `unrecognized_name`, fatal (RFC 6066 §3).
const TLS_ALERT: &[u8] = &[0x15, 3, 3, 0, 2, 2, 112];

/// A connection that was decided, resolved, checked and dialled.
pub struct Admitted {
    kind: Kind,
    _permit: OwnedSemaphorePermit,
}

enum Kind {
    Service(Arc<dyn GuestService>),
    Egress(Box<Egress>),
}

struct Egress {
    flow: Flow,
    route: Route,
}

/// What belongs to one flow whatever its route.
pub(super) struct Flow {
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) rule: String,
    /// What it must speak.
    pub(super) protocol: Speaks,
    pub(super) phase: Option<Arc<str>>,
    pub(super) limits: Limits,
    pub(super) watched: Watched,
    pub(super) sink: Arc<dyn EgressSink>,
    pub(super) bandwidth: Arc<Bandwidth>,
    pub(super) moving: Moving,
}

/// An open connection to the next hop.
pub(super) struct Route {
    pub(super) stream: BoxedDuplex,
    /// Bytes of the server that came with the proxy's answer.
    pub(super) early: Vec<u8>,
    /// The address dialled; `None` behind a proxy.
    pub(super) address: Option<IpAddr>,
    pub(super) form: Form,
    /// The next hop understands HTTP requests and nothing else.
    pub(super) http_only: bool,
}

/// Why a relay ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RelayEnd {
    /// Both sides closed.
    Closed,
    /// One of kiln's own services was done.
    Service,
    /// The guest's bytes did not name the host that was admitted. Nothing of them was sent, or nothing after
    /// the last legal request.
    NameRefused {
        /// The name the guest said, if any.
        said: Option<String>,
        /// What kind of fault.
        fault: NameFault,
        /// What was wrong.
        reason: String,
    },
    /// No byte in either direction for the idle limit.
    Idle,
    /// The policy was narrowed.
    Narrowed,
    /// A side broke.
    Broken(String),
}

/// How a relay went.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RelayReport {
    /// Bytes sent to the host named.
    pub bytes_out: u64,
    /// Bytes given to the guest.
    pub bytes_in: u64,
    /// Why it ended.
    pub end: RelayEnd,
}

impl fmt::Debug for Admitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Service(_) => f.write_str("Admitted(service)"),
            Kind::Egress(egress) => write!(
                f,
                "Admitted({}:{} at {:?})",
                egress.flow.name, egress.flow.port, egress.route.address
            ),
        }
    }
}

impl Admitted {
    pub(super) fn service(service: Arc<dyn GuestService>, permit: OwnedSemaphorePermit) -> Self {
        Self {
            kind: Kind::Service(service),
            _permit: permit,
        }
    }

    pub(super) fn flow(flow: Flow, route: Route, permit: OwnedSemaphorePermit) -> Self {
        Self {
            kind: Kind::Egress(Box::new(Egress { flow, route })),
            _permit: permit,
        }
    }

    /// The address that was dialled, if kiln dialled one itself.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        match &self.kind {
            Kind::Service(_) => None,
            Kind::Egress(egress) => egress.route.address,
        }
    }

    /// Joins the guest's stream with the connection until both ended. The decision is recorded with its byte
    /// counts at the end, also when this future is dropped.
    pub async fn relay(self, guest: BoxedDuplex) -> RelayReport {
        match self.kind {
            Kind::Service(service) => {
                service.serve(guest).await;
                RelayReport {
                    bytes_out: 0,
                    bytes_in: 0,
                    end: RelayEnd::Service,
                }
            }
            Kind::Egress(egress) => relay(*egress, guest).await,
        }
    }
}

/// Records the flow when it ends, however it ends.
struct Tally {
    flow: Flow,
    address: Option<IpAddr>,
    verdict: EgressVerdict,
    narrowed: bool,
    start: Instant,
    /// Milliseconds after `start` of the last byte.
    moved_at_ms: AtomicU64,
    bytes_out: AtomicU64,
    bytes_in: AtomicU64,
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.flow.sink.record(EgressEvent {
            host: self.flow.name.clone(),
            port: self.flow.port,
            address: self.address,
            rule: Some(self.flow.rule.clone()),
            verdict: self.verdict.clone(),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            phase: self.flow.phase.as_deref().map(str::to_owned),
            protocol: Some(self.flow.protocol),
            narrowed: self.narrowed,
        });
    }
}

impl Tally {
    fn moved(&self, count: &AtomicU64, bytes: usize) {
        count.fetch_add(bytes as u64, Ordering::Relaxed);
        self.touch();
    }

    fn touch(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved_at_ms.store(now, Ordering::Relaxed);
    }

    /// Returns once nothing moved for the idle limit.
    async fn idle(&self) {
        loop {
            let moved = Duration::from_millis(self.moved_at_ms.load(Ordering::Relaxed));
            let end = self.start + moved + self.flow.limits.idle;
            if end <= Instant::now() {
                return;
            }
            sleep_until(end).await;
        }
    }
}

async fn relay(egress: Egress, guest: BoxedDuplex) -> RelayReport {
    let Egress { flow, route } = egress;
    let mut tally = Tally {
        flow,
        address: route.address,
        verdict: EgressVerdict::Allowed,
        narrowed: false,
        start: Instant::now(),
        moved_at_ms: AtomicU64::new(0),
        bytes_out: AtomicU64::new(0),
        bytes_in: AtomicU64::new(0),
    };
    let (mut from_guest, mut to_guest) = tokio::io::split(guest);
    let (mut from_server, mut to_server) = tokio::io::split(route.stream);
    let mut gate = Gate {
        tally: &tally,
        form: Some(route.form),
        http_only: route.http_only,
        last_words: LastWords::None,
        watched: tally.flow.watched.clone(),
    };
    let mut watched = tally.flow.watched.clone();
    let stopped = {
        let both = async {
            tokio::try_join!(
                gate.out(&mut from_guest, &mut to_server),
                copy_in(&tally, route.early, &mut from_server, &mut to_guest),
            )
        };
        tokio::select! {
            // First: no byte may follow the rules that forbid it.
            biased;
            () = watched.ended() => Some(Stop::End(RelayEnd::Narrowed)),
            ended = both => ended.err(),
            () = tally.idle() => Some(Stop::End(RelayEnd::Idle)),
        }
    };
    let last_words = gate.last_words;
    let end = match stopped {
        None => RelayEnd::Closed,
        Some(Stop::End(end)) => end,
        Some(Stop::Guest(error)) => RelayEnd::Broken(format!("guest: {error}")),
        Some(Stop::Server(error)) => RelayEnd::Broken(format!("server: {error}")),
    };
    tally.narrowed = end == RelayEnd::Narrowed;
    if let RelayEnd::NameRefused {
        said,
        fault,
        reason,
    } = &end
    {
        tracing::debug!(host = %tally.flow.name, port = tally.flow.port, %reason, "egress refused by name");
        tally.verdict = EgressVerdict::NameMismatch {
            said: said.clone(),
            fault: *fault,
        };
        if tally.bytes_in.load(Ordering::Relaxed) == 0 {
            let words = last_words.bytes(&tally.flow.name, reason);
            let say = async {
                to_guest.write_all(&words).await?;
                to_guest.shutdown().await
            };
            // Courtesy only: the guest may be gone or not reading.
            let _ = timeout(LAST_WORDS_WAIT, say).await;
        }
    }
    RelayReport {
        bytes_out: tally.bytes_out.load(Ordering::Relaxed),
        bytes_in: tally.bytes_in.load(Ordering::Relaxed),
        end,
    }
}

/// Why a direction stopped before its end.
enum Stop {
    End(RelayEnd),
    Guest(io::Error),
    Server(io::Error),
}

fn refused(said: Option<&str>, reason: impl fmt::Display) -> Stop {
    faulty(NameFault::Mismatch, said, reason)
}

fn faulty(fault: NameFault, said: Option<&str>, reason: impl fmt::Display) -> Stop {
    Stop::End(RelayEnd::NameRefused {
        said: said.map(str::to_owned),
        fault,
        reason: reason.to_string(),
    })
}

/// How a refused guest is told, when nothing of the server reached it yet.
#[derive(Clone, Copy)]
enum LastWords {
    None,
    Tls,
    Http,
}

impl LastWords {
    fn bytes(self, name: &str, reason: &str) -> Vec<u8> {
        match self {
            Self::None => Vec::new(),
            Self::Tls => TLS_ALERT.to_vec(),
            Self::Http => {
                let body = format!("kiln: this connection was admitted for {name}: {reason}\n");
                format!(
                    "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                )
                .into_bytes()
            }
        }
    }
}

/// The direction from the guest.
struct Gate<'a> {
    tally: &'a Tally,
    form: Option<Form>,
    http_only: bool,
    last_words: LastWords,
    watched: Watched,
}

impl Gate<'_> {
    /// Holds, checks, then copies until the guest ends its side; the server then sees the end too.
    async fn out<R, W>(&mut self, from: &mut R, to: &mut W) -> Result<(), Stop>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let (held, mut http) = self.hold(from).await?;
        let mut out = Vec::with_capacity(held.len());
        match &mut http {
            Some(http) => self.checked(http, &held, &mut out)?,
            None => out = held,
        }
        let mut part = vec![0; COPY_BYTES];
        loop {
            if !out.is_empty() {
                self.tally
                    .flow
                    .bandwidth
                    .admit(Direction::Out, out.len())
                    .await;
                if !self.watched.allows() {
                    return Err(Stop::End(RelayEnd::Narrowed));
                }
                let write = write_all(to, &out);
                if let Err(error) = self.tally.flow.moving.step(write).await {
                    // It no longer listens; what it still says is the guest's to read.
                    tracing::trace!(%error, "server closed its reading side");
                    return Ok(());
                }
                self.tally.moved(&self.tally.bytes_out, out.len());
                out.clear();
            }
            let len = from.read(&mut part).await.map_err(Stop::Guest)?;
            if len == 0 {
                break;
            }
            self.tally.touch();
            match &mut http {
                Some(http) => self.checked(http, &part[..len], &mut out)?,
                None => out.extend_from_slice(&part[..len]),
            }
        }
        // A request cut off in its head was never sent; the server just sees the end.
        let _ = to.shutdown().await;
        Ok(())
    }

    fn checked(
        &mut self,
        http: &mut HttpChecker,
        part: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Stop> {
        http.push(part, out).map_err(|refusal| {
            let fault = match refusal {
                HttpRefusal::Upgrade { .. } => NameFault::Upgrade,
                _ => NameFault::Mismatch,
            };
            faulty(fault, refusal.said(), &refusal)
        })
    }

    /// Reads until the name in the guest's first bytes is checked. Nothing was sent yet.
    async fn hold<R>(&mut self, from: &mut R) -> Result<(Vec<u8>, Option<HttpChecker>), Stop>
    where
        R: AsyncRead + Unpin,
    {
        let mut held = Vec::new();
        let speaks = match self.tally.flow.protocol {
            Speaks::Raw if !self.http_only => return Ok((held, None)),
            // A proxy that understands HTTP alone gets nothing else, whatever the rule says.
            Speaks::Raw => Speaks::Http,
            speaks => speaks,
        };
        let mut part = vec![0; COPY_BYTES];
        let mut deadline: Option<Instant> = None;
        loop {
            let read = from.read(&mut part);
            let len = match deadline {
                None => read.await.map_err(Stop::Guest)?,
                Some(deadline) => match timeout_at(deadline, read).await {
                    Ok(len) => len.map_err(Stop::Guest)?,
                    Err(_) => {
                        return Err(refused(None, "its first bytes did not name a host in time"));
                    }
                },
            };
            held.extend_from_slice(&part[..len]);
            let eof = len == 0;
            if held.is_empty() {
                return Ok((held, None));
            }
            self.tally.touch();
            deadline = deadline.or(Some(Instant::now() + self.tally.flow.limits.hold));
            match classify(&held, eof) {
                Protocol::NeedMore if held.len() >= FIRST_LINE_BYTES_MAX => {
                    return Err(refused(None, "its first line is too long"));
                }
                Protocol::NeedMore => {}
                Protocol::Http if speaks == Speaks::Http => {
                    self.last_words = LastWords::Http;
                    let form = self.form.take().unwrap_or_default();
                    let flow = &self.tally.flow;
                    return Ok((held, Some(HttpChecker::new(&flow.name, flow.port, form))));
                }
                Protocol::Http => {
                    self.last_words = LastWords::Http;
                    return Err(refused(None, "HTTP where the rule says tls"));
                }
                Protocol::Tls => {
                    self.last_words = LastWords::Tls;
                    if speaks == Speaks::Http && !self.http_only {
                        return Err(refused(None, "TLS where the rule says http"));
                    }
                    if self.server_name_is_right(&held, eof)? {
                        return Ok((held, None));
                    }
                }
                Protocol::Other if speaks == Speaks::Tls => {
                    return Err(refused(None, "no TLS where the rule says tls"));
                }
                Protocol::Other => {
                    return Err(refused(None, "no HTTP where the rule says http"));
                }
            }
        }
    }

    /// `Ok(false)`: more bytes are needed.
    fn server_name_is_right(&self, held: &[u8], eof: bool) -> Result<bool, Stop> {
        if self.http_only {
            return Err(refused(
                None,
                "TLS on a port that the operator's proxy forwards as HTTP",
            ));
        }
        match client_hello(held) {
            Ok(Hello::NeedMore) if eof => Err(refused(None, "its ClientHello is cut off")),
            Ok(Hello::NeedMore) => Ok(false),
            Ok(Hello::Name(name))
                if normal_host(&name).as_deref() == Some(&*self.tally.flow.name) =>
            {
                Ok(true)
            }
            Ok(Hello::Name(name)) => Err(refused(
                Some(&name.chars().take(260).collect::<String>()),
                "TLS with another server name",
            )),
            Ok(Hello::Encrypted) => Err(faulty(
                NameFault::Encrypted,
                None,
                "its TLS ClientHello is encrypted (ECH), which only a rule with /raw admits",
            )),
            Ok(Hello::NoName) => Err(refused(None, "TLS without a server name")),
            Err(error) => Err(refused(None, error)),
        }
    }
}

async fn write_all<W: AsyncWrite + Unpin>(to: &mut W, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// The direction to the guest.
async fn copy_in<R, W>(tally: &Tally, early: Vec<u8>, from: &mut R, to: &mut W) -> Result<(), Stop>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    if !early.is_empty() {
        write_all(to, &early).await.map_err(Stop::Guest)?;
        tally.moved(&tally.bytes_in, early.len());
    }
    let mut part = vec![0; COPY_BYTES];
    let mut watched = tally.flow.watched.clone();
    loop {
        let len = from.read(&mut part).await.map_err(Stop::Server)?;
        if len == 0 {
            break;
        }
        tally.touch();
        tally.flow.bandwidth.admit(Direction::In, len).await;
        if !watched.allows() {
            return Err(Stop::End(RelayEnd::Narrowed));
        }
        let write = write_all(to, &part[..len]);
        let written = tally.flow.moving.step(write).await;
        written.map_err(Stop::Guest)?;
        tally.moved(&tally.bytes_in, len);
    }
    // The guest may have closed already.
    let _ = to.shutdown().await;
    Ok(())
}
