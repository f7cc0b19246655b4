//! Where this installation is, for the floor of its workers' gateways: no machine may reach a controller, a worker, or the database,
//! however public its address, unless the operator says so.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_core::WorkerId;
use kiln_proto::fleet::OWN_PLACES_MAX;

use crate::access::Peer;
use crate::state::Controller;

/// How long a worker that says nothing is still taken to be where it was.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// What is known of where the installation is.
#[derive(Debug, Default)]
pub struct Neighbours {
    /// Database and this controller: host names or addresses.
    fixed: Vec<String>,
    workers: Mutex<BTreeMap<WorkerId, (IpAddr, Instant)>>,
}

impl Neighbours {
    /// With these places, which do not change.
    #[must_use]
    pub fn new(fixed: Vec<String>) -> Self {
        Self {
            fixed,
            workers: Mutex::default(),
        }
    }

    /// A worker that proved its name speaks from here.
    fn heard(&self, worker: &WorkerId, from: IpAddr) {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.retain(|_, (_, at)| at.elapsed() < REMEMBERED);
        if workers.len() < OWN_PLACES_MAX || workers.contains_key(worker) {
            workers.insert(worker.clone(), (from, Instant::now()));
        }
    }

    fn places(&self, controllers: Vec<String>) -> Vec<String> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let workers = workers.values().map(|(addr, _)| addr.to_string());
        let fixed = self.fixed.iter().cloned();
        let mut places: Vec<String> = fixed.chain(controllers).chain(workers).collect();
        places.sort();
        places.dedup();
        places.truncate(OWN_PLACES_MAX);
        places
    }
}

impl Controller {
    /// Every place of the installation that this controller knows, after a worker spoke from where it is.
    pub(super) fn own_places(&self, worker: &WorkerId, peer: Option<&Peer>) -> Vec<String> {
        if let Some(Peer::Tls { address, .. } | Peer::Plain { address }) = peer {
            self.neighbours.heard(worker, address.ip().to_canonical());
        }
        let others = self.peers.others();
        let hosts = others.iter().filter_map(|url| host(url));
        self.neighbours.places(hosts.collect())
    }
}

/// The host of `scheme://HOST[:PORT]/...`.
pub(crate) fn host(url: &str) -> Option<String> {
    let uri: http::Uri = url.parse().ok()?;
    Some(uri.host()?.trim_matches(['[', ']']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_once_and_bounded() {
        let here = Neighbours::new(vec!["db.example.org".to_owned()]);
        for at in 0..OWN_PLACES_MAX + 9 {
            let worker: WorkerId = format!("w{at}").parse().expect("name");
            let addr = IpAddr::from(u32::try_from(at % 7).expect("small").to_be_bytes());
            here.heard(&worker, addr);
        }
        let places = here.places(vec!["db.example.org".to_owned()]);
        assert_eq!(places.len(), 8, "{places:?}");
        assert_eq!(
            host("https://c.example.org:7443/x").as_deref(),
            Some("c.example.org")
        );
        assert_eq!(host("https://[2600::1]:7443").as_deref(), Some("2600::1"));
    }
}
