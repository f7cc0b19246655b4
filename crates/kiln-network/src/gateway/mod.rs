//! The egress gateway of one machine: the only place where its bytes leave the host.
//!
//! ```text
//! connect(name, port): kiln service? -> policy -> resolve -> floor -> dial -> Admitted
//! relay(stream):       hold first bytes -> TLS SNI / HTTP Host equals the name -> copy both ways
//! ```
//!
//! - A name is resolved once per connection and exactly the checked address is dialled, so a second answer
//!   (DNS rebinding) is never used.
//! - The guest's bytes are held until their name was checked. The server's bytes flow at once: they can leak
//!   nothing of the guest, and server-speaks-first protocols need no special case or wait.
//! - A rule that says `tls` or `http` admits that and nothing else; of one that says `raw` nothing is looked at beyond
//!   name, port and address, so that a server may speak first and a STARTTLS may follow. A rule without a word says what its
//!   port speaks by default: 443 TLS, 80 HTTP, every other port anything. Nothing is told by a connection's first bytes.
//! - Through the operator's HTTP proxy, the proxy resolves the name. The floor is then applied to what the
//!   host itself resolves: one special address among the answers refuses, and a name the host cannot resolve
//!   (normal behind such proxies) is left to the proxy, which is the operator's own.
//!
//! It knows nothing of jobs or of the channel's wire. Read next: [`dial`], [`proxy`], [`relay`](self::Admitted), [`git`] (repositories, with the
//! host's credential).

mod addrinfo;
mod admitted;
mod bandwidth;
pub mod dial;
mod floor;
pub mod git;
pub mod proxy;
mod rules;
mod share;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_core::git_gateway::{GIT_HOST, GIT_PORT};
use kiln_core::network::{
    AllowRule, EgressEvent, EgressVerdict, INTERNAL_SUFFIX, NameVerdict, NetworkPolicy,
    RangeException, SpecialRange, normal_host,
};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};

pub use admitted::{Admitted, RelayEnd, RelayReport};
pub use dial::{BoxedDuplex, Duplex};
pub use floor::{CONTROLLER, HostFloor, OwnPlaces, PLACES_MAX, host_addresses, is_this_host};
pub use git::GitUpstreams;
pub use share::{
    DIALS_MAX, DIALS_OF_MACHINE_MAX, HostShare, RESOLVES_MAX, RESOLVES_OF_MACHINE_MAX,
};

use self::admitted::{Flow, Route};
use self::bandwidth::Bandwidth;
use self::dial::{Dialer, Resolver, SystemResolver, TcpDialer};
use self::floor::Floor;
use self::proxy::{Hop, ProxyConfig};
use self::rules::{Rules, Watched};
use self::share::{Machine, Turn};
use crate::BoxFuture;
use crate::inspect::http::Form;
use crate::record::{EgressSink, TEXT_BYTES_MAX, shortened};

/// Most distinct refused names of DNS questions that become events.
pub const REFUSED_NAMES_MAX: usize = 500;

/// One of kiln's own services inside a guest, such as its registry.
pub trait GuestService: Send + Sync {
    /// Serves one connection until it ends. The stream is hostile; the machine's identity is the service's own.
    fn serve(&self, stream: BoxedDuplex) -> BoxFuture<'static, ()>;
}

/// kiln's own names and what answers there.
#[derive(Clone, Default)]
pub struct Services(BTreeMap<(String, u16), Arc<dyn GuestService>>);

impl Services {
    /// Adds a service at `host:port`.
    #[must_use]
    pub fn with(mut self, host: &str, port: u16, service: Arc<dyn GuestService>) -> Self {
        self.0.insert((host.to_ascii_lowercase(), port), service);
        self
    }

    fn knows(&self, host: &str) -> bool {
        self.0.keys().any(|(name, _)| name == host)
    }
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Bounds of one machine's egress.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Connections at once, services included.
    pub connections_max: usize,
    /// Wait for the host's resolver.
    pub resolve: Duration,
    /// Wait for a connection, all addresses (and the proxy's answer) together.
    pub dial: Duration,
    /// A connection without a byte in either direction ends after this.
    pub idle: Duration,
    /// Once a guest sent its first byte, the name in it must be there within this.
    pub hold: Duration,
    /// Bytes per second from the guest, for the whole machine; `None`: unlimited.
    pub bytes_out_per_second: Option<NonZeroU64>,
    /// Bytes per second to the guest; `None`: unlimited.
    pub bytes_in_per_second: Option<NonZeroU64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 256,
            resolve: Duration::from_secs(10),
            dial: Duration::from_secs(20),
            idle: Duration::from_secs(300),
            hold: Duration::from_secs(30),
            bytes_out_per_second: None,
            bytes_in_per_second: None,
        }
    }
}

/// Everything a gateway needs to know.
#[derive(Clone)]
pub struct GatewayConfig {
    /// What the machine may reach.
    pub policy: NetworkPolicy,
    /// Special-purpose ranges the operator excepts for single names.
    pub exceptions: Vec<RangeException>,
    /// Where the installation itself is; the process's own list unless set.
    pub own: Arc<OwnPlaces>,
    /// What it shares with the gateways of other machines; the process's own unless set.
    pub share: Arc<HostShare>,
    /// kiln's own names.
    pub services: Services,
    /// The operator's HTTP proxy.
    pub proxy: ProxyConfig,
    /// What the git gateway has of the host; none: the machine has no git gateway. Which repositories it serves, the rules of a phase say.
    pub git: Option<Arc<GitUpstreams>>,
    /// Bounds.
    pub limits: Limits,
    /// Where decisions go.
    pub sink: Arc<dyn EgressSink>,
}

impl GatewayConfig {
    /// A configuration with defaults for everything else.
    #[must_use]
    pub fn new(policy: NetworkPolicy, sink: Arc<dyn EgressSink>) -> Self {
        Self {
            policy,
            exceptions: Vec::new(),
            own: OwnPlaces::of_process(),
            share: HostShare::of_process(),
            services: Services::default(),
            proxy: ProxyConfig::default(),
            git: None,
            limits: Limits::default(),
            sink,
        }
    }
}

impl fmt::Debug for GatewayConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayConfig")
            .field("policy", &self.policy)
            .field("exceptions", &self.exceptions)
            .field("services", &self.services)
            .field("git", &self.git)
            .field("proxy", &self.proxy)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Why a guest gets no connection. The text may be shown to the guest.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// No rule names the host.
    #[error("{host} is not allowed: no rule names it")]
    Host {
        /// As asked, shortened.
        host: String,
    },
    /// A rule names the host, none this port.
    #[error("{host}:{port} is not allowed: the rule for {host} does not name port {port}")]
    Port {
        /// As asked.
        host: String,
        /// As asked.
        port: u16,
    },
    /// Every address of the name lies in a special-purpose range without an exception.
    #[error("{host} resolves into a special-purpose range ({range:?}) that is not excepted")]
    Address {
        /// As asked.
        host: String,
        /// The range of the first address.
        range: SpecialRange,
        /// That address. The record has it, the guest is not told.
        address: IpAddr,
    },
    /// Too many connections of this machine at once.
    #[error("the machine already has {connections_max} connections")]
    TooMany {
        /// The bound.
        connections_max: usize,
    },
    /// Allowed, but the network did not do it.
    #[error("{host}:{port} cannot be reached: {error}")]
    Unreachable {
        /// As asked.
        host: String,
        /// As asked.
        port: u16,
        /// What happened.
        error: String,
        /// The address that was dialled last, if one was. The record has it, the guest is not told.
        address: Option<IpAddr>,
    },
}

impl Refusal {
    /// The address that was refused, or dialled without an answer.
    fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Address { address, .. } => Some(*address),
            Self::Unreachable { address, .. } => *address,
            Self::Host { .. } | Self::Port { .. } | Self::TooMany { .. } => None,
        }
    }
}

/// The gateway of one machine. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
}

struct Inner {
    rules: watch::Sender<Rules>,
    floor: Floor,
    services: Services,
    proxy: ProxyConfig,
    git: Option<Arc<GitUpstreams>>,
    limits: Limits,
    sink: Arc<dyn EgressSink>,
    resolver: Arc<dyn Resolver>,
    dialer: Arc<dyn Dialer>,
    connections: Arc<Semaphore>,
    bandwidth: Arc<Bandwidth>,
    share: Arc<HostShare>,
    machine: Machine,
    refused_names: Mutex<HashSet<String>>,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway")
            .field("rules", &*self.inner.rules.borrow())
            .finish_non_exhaustive()
    }
}

impl Gateway {
    /// A gateway on the host's own resolver and network.
    #[must_use]
    pub fn new(config: GatewayConfig) -> Self {
        Self::with_network(config, Arc::new(SystemResolver), Arc::new(TcpDialer))
    }

    /// A gateway on another resolver and dialer (tests). The address check stands between the two and is
    /// not replaceable.
    #[must_use]
    pub fn with_network(
        config: GatewayConfig,
        resolver: Arc<dyn Resolver>,
        dialer: Arc<dyn Dialer>,
    ) -> Self {
        let inner = Inner {
            rules: watch::Sender::new(Rules::new(config.policy)),
            floor: Floor::new(config.exceptions, config.own),
            services: config.services,
            proxy: config.proxy,
            git: config.git,
            limits: config.limits,
            sink: config.sink,
            resolver,
            dialer,
            connections: Arc::new(Semaphore::new(config.limits.connections_max)),
            bandwidth: Arc::new(Bandwidth::new(
                config.limits.bytes_out_per_second,
                config.limits.bytes_in_per_second,
            )),
            machine: config.share.machine(),
            share: config.share,
            refused_names: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Whether the guest's DNS may answer for this name. Nothing is sent anywhere: a question leaks nothing.
    /// The first [`REFUSED_NAMES_MAX`] distinct refused names become events.
    #[must_use]
    pub fn knows(&self, host: &str) -> bool {
        let name = normal_host(host);
        let known = name.as_deref().is_some_and(|name| {
            self.serves(name)
                || (!is_internal(name) && self.inner.rules.borrow().policy.knows_host(name))
        });
        if let Some(name) = name.filter(|_| !known) {
            let mut refused = self.refused_names();
            if refused.len() < REFUSED_NAMES_MAX && refused.insert(name.clone()) {
                drop(refused);
                self.record(&name, 0, EgressVerdict::HostRefused);
            }
        }
        known
    }

    /// Decides, resolves, checks and dials. The guest's bytes are not looked at yet.
    ///
    /// # Errors
    /// A [`Refusal`], after it was recorded.
    pub async fn connect(&self, host: &str, port: u16) -> Result<Admitted, Refusal> {
        let Some(name) = normal_host(host) else {
            let host = shown(host);
            self.record(&host, port, EgressVerdict::HostRefused);
            return Err(Refusal::Host { host });
        };
        let permit = Arc::clone(&self.inner.connections)
            .try_acquire_owned()
            .map_err(|_| self.refuse_limit(&name, port))?;
        if let Some(service) = self.inner.services.0.get(&(name.clone(), port)) {
            return Ok(Admitted::service(Arc::clone(service), permit));
        }
        if let (Some(upstreams), GIT_HOST, GIT_PORT) = (&self.inner.git, &*name, port) {
            let door = git::Door {
                gateway: self.clone(),
                upstreams: Arc::clone(upstreams),
            };
            return Ok(Admitted::service(Arc::new(door), permit));
        }
        // Subscribed before the decision: a narrowing in between is seen by the flow.
        let rules = self.inner.rules.subscribe();
        let phase = rules.borrow().phase.clone();
        let rule = match self.decide(&name, port) {
            NameVerdict::Allowed(rule) => rule,
            NameVerdict::PortRefused => {
                self.record(&name, port, EgressVerdict::PortRefused);
                return Err(Refusal::Port { host: name, port });
            }
            NameVerdict::HostRefused => {
                self.record(&name, port, EgressVerdict::HostRefused);
                return Err(Refusal::Host { host: name });
            }
        };
        let route = self.route(&name, port).await;
        let route = route.map_err(|refusal| self.refuse(&name, port, &rule, refusal))?;
        Ok(Admitted::flow(
            Flow {
                watched: Watched::new(&name, port, rule.speaks(port), rules),
                name,
                port,
                phase,
                rule: rule.to_string(),
                protocol: rule.speaks(port),
                limits: self.inner.limits,
                sink: Arc::clone(&self.inner.sink),
                bandwidth: Arc::clone(&self.inner.bandwidth),
                moving: self.inner.share.moves.moving(self.inner.machine),
            },
            route,
            permit,
        ))
    }

    /// Returns once no connection of the machine is open: every one is recorded then. What is asked meanwhile waits, or is refused as too much.
    pub async fn idle(&self) {
        let most = u32::try_from(self.inner.limits.connections_max).unwrap_or(u32::MAX);
        // Never closed.
        let _none_open = self.inner.connections.acquire_many(most).await;
    }

    fn decide(&self, name: &str, port: u16) -> NameVerdict {
        if is_internal(name) {
            return if self.serves(name) {
                NameVerdict::PortRefused
            } else {
                NameVerdict::HostRefused
            };
        }
        self.inner.rules.borrow().policy.decide(name, port)
    }

    /// Whether one of kiln's own names is here.
    fn serves(&self, name: &str) -> bool {
        self.inner.services.knows(name) || (name == GIT_HOST && self.inner.git.is_some())
    }

    /// Opens a connection to a name that was admitted.
    async fn route(&self, name: &str, port: u16) -> Result<Route, Refusal> {
        match self.inner.proxy.hop(name, port) {
            Some(hop) => self.through(name, port, hop.clone()).await,
            None => self.direct(name, port).await,
        }
    }

    /// Dials an address of the name that passes the floor.
    async fn direct(&self, name: &str, port: u16) -> Result<Route, Refusal> {
        let answers = self.resolve(name, port).await?;
        let mut first_refused = None;
        let mut checked = Vec::new();
        for (addr, verdict) in self.checked(name, &answers).await {
            match verdict {
                Ok(()) => checked.push(SocketAddr::new(addr, port)),
                Err(range) => first_refused = first_refused.or(Some((addr, range))),
            }
        }
        if let (Some((address, range)), true) = (first_refused, checked.is_empty()) {
            return Err(Refusal::Address {
                host: name.to_owned(),
                range,
                address,
            });
        }
        let deadline = Instant::now() + self.inner.limits.dial;
        let _turn = self.dial_turn(name, port, deadline).await?;
        let dialled = dial::dial_any(&self.inner.dialer, &checked, deadline).await;
        let (stream, addr) = dialled.map_err(|failed| Refusal::Unreachable {
            host: name.to_owned(),
            port,
            error: failed.error,
            address: failed.last.map(|addr| addr.ip()),
        })?;
        Ok(Route {
            stream,
            early: Vec::new(),
            address: Some(addr.ip()),
            form: Form::Origin,
            http_only: false,
        })
    }

    /// Goes through the operator's proxy.
    async fn through(&self, name: &str, port: u16, hop: Hop) -> Result<Route, Refusal> {
        // A name only the proxy can resolve is left to it; one special answer refuses.
        let answers = self.resolve(name, port).await.unwrap_or_default();
        for (address, verdict) in self.checked(name, &answers).await {
            if let Err(range) = verdict {
                return Err(Refusal::Address {
                    host: name.to_owned(),
                    range,
                    address,
                });
            }
        }
        let deadline = Instant::now() + self.inner.limits.dial;
        let _turn = self.dial_turn(name, port, deadline).await?;
        let hop_addrs = timeout_at(deadline, self.inner.resolver.resolve(hop.url.host())).await;
        let hop_addrs: Vec<SocketAddr> = match hop_addrs {
            Ok(Ok(addrs)) => addrs
                .into_iter()
                .map(|addr| SocketAddr::new(addr, hop.url.port()))
                .collect(),
            Ok(Err(error)) => return Err(unreachable(name, port, &format!("proxy: {error}"))),
            Err(_) => {
                return Err(unreachable(
                    name,
                    port,
                    "the proxy's name did not resolve in time",
                ));
            }
        };
        let (mut stream, _) = dial::dial_any(&self.inner.dialer, &hop_addrs, deadline)
            .await
            .map_err(|failed| unreachable(name, port, &format!("proxy: {}", failed.error)))?;
        let (early, form) = if hop.forward {
            let authorization = hop.url.authorization().map(str::to_owned);
            (Vec::new(), Form::Proxy { authorization })
        } else {
            let tunnel = proxy::open_tunnel(&mut stream, &hop.url, name, port);
            let early = match timeout_at(deadline, tunnel).await {
                Ok(Ok(early)) => early,
                Ok(Err(error)) => return Err(unreachable(name, port, &error.to_string())),
                Err(_) => return Err(unreachable(name, port, "the proxy did not answer in time")),
            };
            (early, Form::Origin)
        };
        Ok(Route {
            stream,
            early,
            address: None,
            http_only: matches!(form, Form::Proxy { .. }),
            form,
        })
    }

    /// What the floor says to each address.
    async fn checked(
        &self,
        name: &str,
        addrs: &[IpAddr],
    ) -> Vec<(IpAddr, Result<(), SpecialRange>)> {
        let deadline = Instant::now() + self.inner.limits.resolve;
        let resolver = self.inner.resolver.as_ref();
        self.inner
            .floor
            .check(name, addrs, resolver, deadline)
            .await
    }

    /// A place among the host's dials.
    async fn dial_turn(&self, name: &str, port: u16, deadline: Instant) -> Result<Turn, Refusal> {
        let turn = self.inner.share.dials.turn(self.inner.machine);
        let late = |_| unreachable(name, port, "too many connections are being opened");
        timeout_at(deadline, turn).await.map_err(late)
    }

    async fn resolve(&self, name: &str, port: u16) -> Result<Vec<IpAddr>, Refusal> {
        let deadline = Instant::now() + self.inner.limits.resolve;
        let question = async {
            // Given back when nobody waits for the answer any more: what then still asks is bounded by the resolver itself.
            let _turn = self.inner.share.resolves.turn(self.inner.machine).await;
            self.inner.resolver.resolve(name).await
        };
        match timeout_at(deadline, question).await {
            Ok(Ok(answers)) if answers.is_empty() => {
                Err(unreachable(name, port, "the name has no address"))
            }
            Ok(Ok(answers)) => Ok(answers),
            Ok(Err(error)) => Err(unreachable(name, port, &error.to_string())),
            Err(_) => Err(unreachable(name, port, "the name did not resolve in time")),
        }
    }

    fn refuse_limit(&self, name: &str, port: u16) -> Refusal {
        let refusal = Refusal::TooMany {
            connections_max: self.inner.limits.connections_max,
        };
        let error = refusal.to_string();
        self.record(name, port, EgressVerdict::Unreachable { error });
        refusal
    }

    fn refuse(&self, name: &str, port: u16, rule: &AllowRule, refusal: Refusal) -> Refusal {
        let verdict = match &refusal {
            Refusal::Address { range, .. } => EgressVerdict::AddressRefused { range: *range },
            Refusal::Unreachable { error, .. } => EgressVerdict::Unreachable {
                error: error.clone(),
            },
            Refusal::Host { .. } => EgressVerdict::HostRefused,
            Refusal::Port { .. } => EgressVerdict::PortRefused,
            Refusal::TooMany { .. } => EgressVerdict::Unreachable {
                error: refusal.to_string(),
            },
        };
        self.inner.sink.record(EgressEvent {
            address: refusal.address(),
            rule: Some(rule.to_string()),
            protocol: rule.protocol(),
            phase: self.phase(),
            ..EgressEvent::of(name, port, verdict)
        });
        refusal
    }

    fn record(&self, name: &str, port: u16, verdict: EgressVerdict) {
        self.inner.sink.record(EgressEvent {
            phase: self.phase(),
            ..EgressEvent::of(name, port, verdict)
        });
    }

    fn phase(&self) -> Option<String> {
        let rules = self.inner.rules.borrow();
        rules.phase.as_deref().map(str::to_owned)
    }

    fn refused_names(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        let names = &self.inner.refused_names;
        names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unreachable(name: &str, port: u16, error: &str) -> Refusal {
    Refusal::Unreachable {
        host: name.to_owned(),
        port,
        error: error.to_owned(),
        address: None,
    }
}

/// Whether a name belongs to kiln itself: never resolved outside, whatever a rule says.
fn is_internal(name: &str) -> bool {
    name.ends_with(INTERNAL_SUFFIX) || Some(name) == INTERNAL_SUFFIX.strip_prefix('.')
}

/// A text that is no host name, fit for a record; never equal to a host name.
fn shown(host: &str) -> String {
    let begins: String = host.chars().take(TEXT_BYTES_MAX).collect();
    shortened(&format!("{begins:?}"))
}
