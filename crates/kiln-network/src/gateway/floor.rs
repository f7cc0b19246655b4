//! The floor under every policy, as this host knows it: which addresses are its own or its installation's, and under which
//! prefixes its network translates IPv6 to IPv4. What an address means by itself is `kiln_core::network::floor`.
//!
//! An address of this host is found by asking the kernel whether a socket may be bound to it, which is exact, also for addresses
//! added a moment ago. Behind a translator that gives the host another public address nobody here knows that one: the operator writes it
//! (`network.own` in `kiln.toml`).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_core::network::{
    Cidr, Nat64Prefix, RangeException, SpecialRange, Surroundings, normal_host, special_range,
};
use tokio::time::{Instant, timeout_at};

use super::dial::{Resolver, SystemResolver};

/// The teller of [`OwnPlaces`] that a worker's controller is.
pub const CONTROLLER: &str = "controller";
/// Most places of one teller; what is beyond is told in the log and left out.
pub const PLACES_MAX: usize = 4096;
/// How long the addresses of an installation's names are believed.
const NAMES_FRESH: Duration = Duration::from_secs(60);
/// How long the prefixes of a translator are believed (RFC 7050 §3 leaves it to the answer's own time, which a host's resolver does not tell).
const PREFIXES_FRESH: Duration = Duration::from_secs(600);

/// How often the translator's prefixes are asked for before one connection's IPv6 addresses are refused.
const PREFIX_TRIES: usize = 3;

/// A controller, worker, database or store of the installation.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Range(Cidr),
    Name(String),
}

/// Where the installation itself is: what no machine may reach unless the operator says so.
#[derive(Debug, Default)]
pub struct OwnPlaces {
    told: Mutex<BTreeMap<String, Vec<Place>>>,
    names: Mutex<BTreeMap<String, (Instant, Vec<IpAddr>)>>,
}

impl OwnPlaces {
    /// The places of this process, which all its gateways keep off.
    #[must_use]
    pub fn of_process() -> Arc<Self> {
        static PLACES: LazyLock<Arc<OwnPlaces>> = LazyLock::new(Arc::default);
        Arc::clone(&PLACES)
    }

    /// Replaces what `teller` told: addresses, ranges or host names.
    pub fn set<'a>(&self, teller: &str, places: impl IntoIterator<Item = &'a str>) {
        let mut known = Vec::new();
        for text in places {
            let range = text.parse::<Cidr>().ok();
            let address = || text.parse::<IpAddr>().ok().map(Cidr::from);
            let place = match range.or_else(address) {
                Some(range) => Some(Place::Range(range)),
                None => normal_host(text).map(Place::Name),
            };
            match place {
                Some(place) if known.len() < PLACES_MAX => known.push(place),
                _ => {
                    tracing::warn!(teller, "a place of the installation cannot be kept in mind");
                }
            }
        }
        lock(&self.told).insert(teller.to_owned(), known);
    }

    /// What `teller` told last, as texts that [`OwnPlaces::set`] takes.
    #[must_use]
    pub fn told_by(&self, teller: &str) -> Vec<String> {
        let told = lock(&self.told);
        let places = told.get(teller).into_iter().flatten();
        let text = |place: &Place| match place {
            Place::Range(range) => range.to_string(),
            Place::Name(name) => name.clone(),
        };
        places.map(text).collect()
    }

    /// Every range, names resolved now or a moment ago. A name that does not resolve now is where it was.
    async fn ranges(&self, resolver: &dyn Resolver, deadline: Instant) -> Vec<Cidr> {
        let places: Vec<Place> = lock(&self.told).values().flatten().cloned().collect();
        let mut ranges = Vec::new();
        for place in places {
            match place {
                Place::Range(range) => ranges.push(range),
                Place::Name(name) => {
                    let addrs = self.addresses(&name, resolver, deadline).await;
                    ranges.extend(addrs.into_iter().map(Cidr::from));
                }
            }
        }
        ranges
    }

    async fn addresses(
        &self,
        name: &str,
        resolver: &dyn Resolver,
        deadline: Instant,
    ) -> Vec<IpAddr> {
        let known = lock(&self.names).get(name).cloned();
        let (at, before) = known.unwrap_or_else(|| (Instant::now(), Vec::new()));
        if !before.is_empty() && at.elapsed() < NAMES_FRESH {
            return before;
        }
        match timeout_at(deadline, resolver.resolve(name)).await {
            Ok(Ok(addrs)) if !addrs.is_empty() => {
                let fresh = (Instant::now(), addrs.clone());
                lock(&self.names).insert(name.to_owned(), fresh);
                addrs
            }
            _ => {
                tracing::debug!(name, "a place of the installation does not resolve");
                before
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The floor of one gateway.
#[derive(Debug)]
pub(super) struct Floor {
    exceptions: Vec<RangeException>,
    own: Arc<OwnPlaces>,
    prefixes: Mutex<Option<(Instant, Vec<Nat64Prefix>)>>,
}

impl Floor {
    pub(super) fn new(exceptions: Vec<RangeException>, own: Arc<OwnPlaces>) -> Self {
        Self {
            exceptions,
            own,
            prefixes: Mutex::default(),
        }
    }

    /// Checks each of a name's addresses, in order.
    pub(super) async fn check(
        &self,
        name: &str,
        addrs: &[IpAddr],
        resolver: &dyn Resolver,
        deadline: Instant,
    ) -> Vec<(IpAddr, Result<(), SpecialRange>)> {
        let mut here = Surroundings {
            own: self.own.ranges(resolver, deadline).await,
            nat64: Vec::new(),
        };
        here.own.extend(
            addrs
                .iter()
                .flat_map(|addr| own_forms(*addr))
                .map(Cidr::from),
        );
        let mut known = true;
        if addrs.iter().any(IpAddr::is_ipv6) {
            match self.prefixes(resolver, deadline).await {
                Some(prefixes) => {
                    let hidden = |addr: &IpAddr| {
                        let hidden = prefixes.iter().filter_map(|prefix| prefix.hidden(*addr));
                        hidden.map(IpAddr::from).collect::<Vec<_>>()
                    };
                    let own = addrs
                        .iter()
                        .flat_map(hidden)
                        .filter(|addr| is_this_host(*addr));
                    here.own.extend(own.map(Cidr::from));
                    here.nat64 = prefixes;
                }
                None => known = false,
            }
        }
        let checked = addrs.iter().map(|addr| {
            let verdict = match addr.is_ipv6() && !known {
                // Where IPv6 leads is not known now; IPv4 is not held up by it.
                true => Err(SpecialRange::Reserved),
                false => here.check(name, *addr, &self.exceptions),
            };
            (*addr, verdict)
        });
        checked.collect()
    }

    /// The prefixes of the network's translator; `None` when nobody knows them now. Only a definite answer is believed, and kept: also
    /// that there are none, which is the usual one.
    async fn prefixes(
        &self,
        resolver: &dyn Resolver,
        deadline: Instant,
    ) -> Option<Vec<Nat64Prefix>> {
        let known = lock(&self.prefixes).clone();
        if let Some((at, prefixes)) = known
            && at.elapsed() < PREFIXES_FRESH
        {
            return Some(prefixes);
        }
        let answers = async {
            let mut answers = resolver.resolve_ipv6(Nat64Prefix::NAME).await;
            for _ in 1..PREFIX_TRIES {
                if answers.is_ok() {
                    break;
                }
                answers = resolver.resolve_ipv6(Nat64Prefix::NAME).await;
            }
            answers
        };
        let answers = match timeout_at(deadline, answers).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(error)) => {
                tracing::warn!(%error, "whether the network translates IPv6 is not known: no IPv6 address is dialled");
                return None;
            }
            Err(_) => return None,
        };
        let found = Nat64Prefix::of_answers(&answers);
        if !found.is_empty() {
            tracing::debug!(prefixes = found.len(), "the network translates IPv6");
        }
        *lock(&self.prefixes) = Some((Instant::now(), found.clone()));
        Some(found)
    }
}

/// The floor of this process's gateways, for who wants to know beforehand what a connection would find. Dials nothing.
#[derive(Debug)]
pub struct HostFloor(Floor);

impl HostFloor {
    /// With these exceptions of the operator's.
    #[must_use]
    pub fn new(exceptions: Vec<RangeException>) -> Self {
        Self(Floor::new(exceptions, OwnPlaces::of_process()))
    }

    /// What a connection to `name` finds of each of these addresses, in order: the special range of one that is refused. Waits at most `within` for
    /// the host's resolver, which knows whether the network translates IPv6; without its answer no IPv6 address is fine.
    pub async fn check(
        &self,
        name: &str,
        addrs: &[IpAddr],
        within: Duration,
    ) -> Vec<(IpAddr, Result<(), SpecialRange>)> {
        let deadline = Instant::now() + within;
        self.0.check(name, addrs, &SystemResolver, deadline).await
    }
}

/// The address, and the IPv4 address it is mapped from, as far as they are this host's.
fn own_forms(addr: IpAddr) -> impl Iterator<Item = IpAddr> {
    let mapped = match addr {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map(IpAddr::V4),
        IpAddr::V4(_) => None,
    };
    [Some(addr), mapped]
        .into_iter()
        .flatten()
        .filter(|addr| is_this_host(*addr))
}

/// Whether an address is one of this host's interfaces, or otherwise delivered to it.
#[must_use]
pub fn is_this_host(addr: IpAddr) -> bool {
    static STRANGERS: LazyLock<bool> = LazyLock::new(|| {
        // Documentation addresses that nobody has: where these can be bound, binding says nothing.
        let nobody = [
            IpAddr::from(Ipv4Addr::new(203, 0, 113, 255)),
            IpAddr::from(Ipv6Addr::new(
                0x2001, 0xdb8, 0xffff, 0xffff, 0, 0, 0, 0xffff,
            )),
        ];
        nobody.into_iter().any(binds)
    });
    if !*STRANGERS {
        return binds(addr);
    }
    // `ip_nonlocal_bind` is set: what this host would talk to itself from is its own.
    let any = match addr {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    let source = || {
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        // Sends nothing: the port is never used.
        socket.connect(SocketAddr::new(addr, 9))?;
        socket.local_addr()
    };
    listed(addr) || source().is_ok_and(|source| source.ip() == addr)
}

fn binds(addr: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(addr, 0)).is_ok()
}

/// Whether the kernel's table of local IPv4 addresses has it (Linux; elsewhere there is none).
fn listed(addr: IpAddr) -> bool {
    let Ok(table) = std::fs::read_to_string("/proc/net/fib_trie") else {
        return false;
    };
    leaves(&table).any(|own| own == addr)
}

/// The addresses of this host's network interfaces, public ones first, at most so many; none of loopback or one link alone, which lead nobody
/// else here. Linux; elsewhere none are known.
#[must_use]
pub fn host_addresses(most: usize) -> Vec<IpAddr> {
    let v4 = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let v6 = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    addresses_of(&v4, &v6, most)
}

fn addresses_of(v4: &str, v6: &str, most: usize) -> Vec<IpAddr> {
    let six = v6.lines().filter_map(|line| {
        let bits = u128::from_str_radix(line.split(' ').next()?, 16).ok()?;
        Some(IpAddr::from(Ipv6Addr::from(bits)))
    });
    let elsewhere = |addr: &IpAddr| {
        !matches!(
            special_range(*addr),
            Some(SpecialRange::Loopback | SpecialRange::LinkLocal)
        )
    };
    let mut found: Vec<IpAddr> = leaves(v4).chain(six).filter(elsewhere).collect();
    found.sort_by_key(|addr| (special_range(*addr).is_some(), *addr));
    found.dedup();
    found.truncate(most);
    found
}

/// The local addresses of the kernel's table, in which a leaf is `|-- ADDRESS` and one line for each of its routes.
fn leaves(table: &str) -> impl Iterator<Item = IpAddr> {
    let mut leaf = None;
    table
        .lines()
        .map(str::trim)
        .filter_map(move |line| match line.strip_prefix("|-- ") {
            Some(text) => {
                leaf = text.parse().ok();
                None
            }
            None if line.ends_with("host LOCAL") => leaf,
            None => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_hosts_addresses_are_known() {
        let addr = |text: &str| -> IpAddr { text.parse().expect("address") };
        assert!(is_this_host(addr("127.0.0.1")));
        assert!(is_this_host(addr("127.9.9.9")));
        assert!(!is_this_host(addr("203.0.113.254")));
        assert!(!is_this_host(addr("8.8.8.8")));
        let outward = UdpSocket::bind("0.0.0.0:0").expect("socket");
        if outward.connect("192.0.2.250:9").is_ok() {
            let own = outward.local_addr().expect("address").ip();
            assert!(is_this_host(own), "{own}");
        }
    }

    #[test]
    fn the_kernels_table_is_read() {
        let table = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 192.0.2.0\n        /24 link UNICAST\nLocal:\n     |-- 192.0.2.7\n        /32 host LOCAL\n     |-- 192.0.2.255\n        /32 link BROADCAST\n";
        let has =
            |text: &str| leaves(table).any(|own| own == text.parse::<IpAddr>().expect("address"));
        assert!(has("192.0.2.7"));
        assert!(!has("192.0.2.0") && !has("192.0.2.255") && !has("192.0.2.8"));
    }

    #[test]
    fn interfaces_addresses_are_told_public_ones_first_and_bounded() {
        let v4 = "Local:\n     |-- 10.0.0.7\n        /32 host LOCAL\n     |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 9.9.9.7\n        /32 host LOCAL\n        /32 host LOCAL\n     |-- 9.9.9.255\n        /32 link BROADCAST\n";
        let v6 = "00000000000000000000000000000001 01 80 10 80       lo\nfe800000000000000000000000000001 02 40 20 80     eth0\n26000000000000000000000000000007 02 40 00 80     eth0\nrubbish\n";
        let texts = |most| -> Vec<String> {
            let found = addresses_of(v4, v6, most);
            found.iter().map(ToString::to_string).collect()
        };
        assert_eq!(texts(9), ["9.9.9.7", "2600::7", "10.0.0.7"]);
        assert_eq!(texts(2), ["9.9.9.7", "2600::7"]);
        assert!(host_addresses(64).into_iter().all(is_this_host));
    }

    #[test]
    fn what_was_told_can_be_handed_on() {
        let places = OwnPlaces::default();
        places.set("controller", ["9.9.9.0/24", "2600::7", "DB.example.net"]);
        let told = places.told_by("controller");
        let again = OwnPlaces::default();
        again.set("controller", told.iter().map(String::as_str));
        assert_eq!(again.told_by("controller"), told);
        assert_eq!(told, ["9.9.9.0/24", "2600::7/128", "db.example.net"]);
        assert!(places.told_by("kiln.toml").is_empty());
    }
}
