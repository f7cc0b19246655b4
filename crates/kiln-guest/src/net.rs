//! The machine's network: loopback, and names that lead to the host.
//!
//! ```text
//! program -> DNS 198.18.0.1:53 -> RESOLVE stream -> host: known?      -> 198.18.x.y, or NXDOMAIN
//! program -> TCP 198.18.x.y:p  -> steered here   -> CONNECT name:p    -> host: policy, dial -> bytes
//! ```
//!
//! There is no device and no default route: anything else is unreachable at once. What may be reached is the host's
//! decision alone; this side only keeps names and addresses apart. Read next: `steer` (how TCP gets here).

mod dns;
mod names;
mod relay;
mod resolver;
mod ssh_agent;
mod steer;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_proto::session::Session;

pub(crate) use relay::forward;

use crate::error::SysError;
use crate::identity;
use crate::netlink::Route;
use crate::state::Guest;

/// Network of the synthetic addresses: reserved for benchmarks, so nobody's real address.
pub(crate) const NETWORK: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
/// Its prefix length.
pub(crate) const PREFIX: u8 = 15;
/// Where the guest answers DNS. Not in 127.0.0.0/8, which BuildKit would remove from a step's resolv.conf.
pub(crate) const NAMESERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The text of `/etc/resolv.conf`.
pub(crate) const RESOLV_CONF: &str = "nameserver 198.18.0.1\n";

/// What the network's parts share.
#[derive(Debug, Default)]
pub(crate) struct Net {
    names: Mutex<names::Names>,
    verdicts: Mutex<names::Verdicts>,
    session: Mutex<Option<Session>>,
    room: relay::Room,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Net {
    /// Gives the host's session to the network, or takes it away. What former hosts said is forgotten.
    pub(crate) fn set_session(&self, session: Option<Session>) {
        lock(&self.verdicts).clear();
        *lock(&self.session) = session;
    }

    /// Forgets what the host said of names: its rules have changed.
    pub(crate) fn forget_names(&self) {
        lock(&self.verdicts).clear();
    }

    fn session(&self) -> Option<Session> {
        lock(&self.session).clone()
    }
}

/// Sets the network up and serves it from now on.
///
/// # Errors
/// What keeps the machine without a network.
pub(crate) fn start(guest: &Arc<Guest>) -> Result<(), SysError> {
    let route = Route::open()?;
    route.loopback_up()?;
    route.add_address(NAMESERVER)?;
    route.add_local(NETWORK, PREFIX)?;
    relay::start(guest)?;
    resolver::start(guest)?;
    ssh_agent::start(guest)?;
    identity::replace("/etc/resolv.conf", RESOLV_CONF)
}
