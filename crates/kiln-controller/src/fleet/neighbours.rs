//! Where this installation is, for the floor of its workers' gateways: no machine may reach a controller, a worker, or the database,
//! however public its address, unless the operator says so.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_core::WorkerId;
use kiln_proto::fleet::{OWN_PLACES_MAX, WORKER_ADDRESSES_MAX};

use crate::access::Peer;
use crate::state::Controller;

/// How long a worker that says nothing is still taken to be where it was.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// What is known of where the installation is.
#[derive(Debug, Default)]
pub struct Neighbours {
    /// Database and this controller: host names or addresses.
    fixed: Vec<String>,
    workers: Mutex<BTreeMap<WorkerId, Heard>>,
}

/// Where one worker is.
#[derive(Debug)]
struct Heard {
    /// Where its connection came from, if that says anything, then what it told of its interfaces.
    addresses: Vec<IpAddr>,
    at: Instant,
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

    /// A worker that proved its name speaks from here, and tells these addresses of its interfaces. It can only take away by that: what it tells is
    /// refused to machines of this installation.
    fn heard(&self, worker: &WorkerId, from: Option<IpAddr>, told: Vec<IpAddr>) {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.retain(|_, heard| heard.at.elapsed() < REMEMBERED);
        if workers.len() < OWN_PLACES_MAX || workers.contains_key(worker) {
            let told = told.into_iter().take(WORKER_ADDRESSES_MAX);
            let heard = Heard {
                addresses: from.into_iter().chain(told).collect(),
                at: Instant::now(),
            };
            workers.insert(worker.clone(), heard);
        }
    }

    fn places(&self, controllers: Vec<String>) -> Vec<String> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        // Where there are too many, every worker's first address comes before anybody's second.
        let nth = |at: usize| {
            workers
                .values()
                .filter_map(move |heard| heard.addresses.get(at))
        };
        let workers = (0..=WORKER_ADDRESSES_MAX).flat_map(nth);
        let fixed = self.fixed.iter().cloned();
        let all = fixed
            .chain(controllers)
            .chain(workers.map(ToString::to_string));
        let mut seen = BTreeSet::new();
        let places = all.filter(|place| seen.insert(place.clone()));
        places.take(OWN_PLACES_MAX).collect()
    }
}

impl Controller {
    /// Every place of the installation that this controller knows, after a worker spoke from where it is and told its addresses.
    pub(super) fn own_places(
        &self,
        worker: &WorkerId,
        peer: Option<&Peer>,
        told: Vec<IpAddr>,
    ) -> Vec<String> {
        let from = match peer {
            Some(Peer::Tls { address, .. } | Peer::Plain { address }) => {
                Some(address.ip().to_canonical())
            }
            _ => None,
        };
        self.neighbours.heard(worker, from, told);
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
            here.heard(&worker, Some(addr), Vec::new());
        }
        let places = here.places(vec!["db.example.org".to_owned()]);
        assert_eq!(places.len(), 8, "{places:?}");
        let crowd = Neighbours::new(vec!["db.example.org".to_owned()]);
        let addr = |at: usize| IpAddr::from(u32::try_from(at).expect("small").to_be_bytes());
        for at in 0..OWN_PLACES_MAX / 2 {
            let worker: WorkerId = format!("w{at}").parse().expect("name");
            let told = (1..200).map(|more| addr((more << 16) | at)).collect();
            crowd.heard(&worker, None, told);
        }
        let places = crowd.places(vec!["c.example.org".to_owned()]);
        assert_eq!(places.len(), OWN_PLACES_MAX);
        for at in 0..OWN_PLACES_MAX / 2 {
            assert!(places.contains(&addr((1 << 16) | at).to_string()), "{at}");
        }
        assert_eq!(places[..2], ["db.example.org", "c.example.org"]);
        assert_eq!(
            host("https://c.example.org:7443/x").as_deref(),
            Some("c.example.org")
        );
        assert_eq!(host("https://[2600::1]:7443").as_deref(), Some("2600::1"));
    }
}
