//! The host side of a machine's network: the only way out of it.
//!
//! A machine has no network device. Its guest asks over the channel for "NAME:PORT", the worker hands that
//! stream to this room, and the [`gateway`] decides, resolves, checks addresses, dials, and relays, holding
//! the guest's first bytes until the TLS or HTTP name in them equals the name that was admitted.
//! What a policy *means* lives in `kiln_core::network`; this room gives it effect.
//!
//! It is not a packet filter and knows nothing of jobs, machines or the wire: it gets a name, a port and a
//! byte stream. It never reads the environment by itself; callers pass plain maps.
//!
//! Read next: [`gateway`] (the flow of one connection), [`inspect`] (the pure parsers of guest bytes),
//! [`record`] (what is kept of it), [`flows`] (told by kind, and learned from), [`registries`] (which hosts builds need), [`ca`] (what the host trusts),
//! [`lockfile`] (which hosts a project names).

pub mod ca;
pub mod flows;
pub mod gateway;
pub mod inspect;
pub mod lockfile;
pub mod origin;
pub mod record;
pub mod registries;

pub use flows::{Counts, Flow, Learned};
pub use gateway::{
    Admitted, BoxedDuplex, Gateway, GatewayConfig, GitUpstreams, GuestService, Limits, OwnPlaces,
    Refusal, RelayReport,
};
pub use record::{EgressLog, EgressSink, EgressSummary, summary};

use std::future::Future;
use std::pin::Pin;

/// A boxed future, for traits that are used as objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
