//! Which synthetic address stands for which name, and what the host said about names.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::{NETWORK, PREFIX};

/// Names that have an address at the same time. The one used longest ago goes first.
pub(crate) const NAMES_MAX: usize = 4096;
/// Answers of the host that are remembered.
const VERDICTS_MAX: usize = 4096;
/// How long a known name is not asked again.
const KNOWN_FOR: Duration = Duration::from_secs(30);
/// How long an unknown name is not asked again.
const UNKNOWN_FOR: Duration = Duration::from_secs(5);
/// Addresses at the start of the network that stand for no name.
const RESERVED: u32 = 2;
/// Addresses that can stand for a name: all but the reserved ones and the last.
const ADDRESSES: u32 = (1 << (32 - PREFIX)) - RESERVED - 1;

/// Names and their addresses. An address is not given to another name until all others were used.
#[derive(Debug, Default)]
pub(crate) struct Names {
    by_name: HashMap<String, Entry>,
    by_address: HashMap<Ipv4Addr, String>,
    by_use: BTreeMap<u64, String>,
    uses: u64,
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: Ipv4Addr,
    used: u64,
}

impl Names {
    /// The address of a name, a new one if it has none.
    pub(crate) fn address(&mut self, name: &str) -> Ipv4Addr {
        if let Some(address) = self.touch(name) {
            return address;
        }
        if self.by_name.len() >= NAMES_MAX {
            self.forget_oldest();
        }
        let address = self.free_address();
        self.uses += 1;
        self.by_name.insert(
            name.to_owned(),
            Entry {
                address,
                used: self.uses,
            },
        );
        self.by_address.insert(address, name.to_owned());
        self.by_use.insert(self.uses, name.to_owned());
        address
    }

    /// The name an address stands for.
    pub(crate) fn name(&mut self, address: Ipv4Addr) -> Option<String> {
        let name = self.by_address.get(&address)?.clone();
        self.touch(&name);
        Some(name)
    }

    fn touch(&mut self, name: &str) -> Option<Ipv4Addr> {
        let entry = self.by_name.get_mut(name)?;
        self.uses += 1;
        let text = self.by_use.remove(&entry.used)?;
        entry.used = self.uses;
        self.by_use.insert(self.uses, text);
        Some(entry.address)
    }

    fn forget_oldest(&mut self) {
        if let Some((_, name)) = self.by_use.pop_first()
            && let Some(entry) = self.by_name.remove(&name)
        {
            self.by_address.remove(&entry.address);
        }
    }

    /// There is one: far fewer names than addresses.
    fn free_address(&mut self) -> Ipv4Addr {
        loop {
            let address = Ipv4Addr::from(u32::from(NETWORK) + RESERVED + self.next);
            self.next = (self.next + 1) % ADDRESSES;
            if !self.by_address.contains_key(&address) {
                return address;
            }
        }
    }
}

/// What the host said about names, for a short time.
#[derive(Debug, Default)]
pub(crate) struct Verdicts(HashMap<String, (bool, Instant)>);

impl Verdicts {
    /// Whether the name is known, if that was asked lately.
    pub(crate) fn get(&self, name: &str, now: Instant) -> Option<bool> {
        let (known, asked) = *self.0.get(name)?;
        let lasts = if known { KNOWN_FOR } else { UNKNOWN_FOR };
        (now.saturating_duration_since(asked) < lasts).then_some(known)
    }

    /// Remembers an answer.
    pub(crate) fn put(&mut self, name: &str, known: bool, now: Instant) {
        if self.0.len() >= VERDICTS_MAX {
            self.0.clear();
        }
        self.0.insert(name.to_owned(), (known, now));
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_address_while_it_is_used() {
        let mut names = Names::default();
        let first = names.address("kept.example");
        assert_eq!(first, Ipv4Addr::new(198, 18, 0, 2));
        let lost = names.address("lost.example");
        for index in 0..NAMES_MAX - 1 {
            names.address(&format!("host{index}.example"));
            assert_eq!(names.name(first).as_deref(), Some("kept.example"));
        }
        assert_eq!(names.name(lost), None);
        assert_eq!(names.by_name.len(), NAMES_MAX);
        assert_eq!(
            (names.by_address.len(), names.by_use.len()),
            (NAMES_MAX, NAMES_MAX)
        );
        assert_ne!(names.address("lost.example"), lost);
    }

    #[test]
    fn addresses_stay_inside_the_network_for_ever() {
        let mut names = Names {
            next: ADDRESSES - 1,
            ..Names::default()
        };
        assert_eq!(
            names.address("last.example"),
            Ipv4Addr::new(198, 19, 255, 254)
        );
        assert_eq!(names.address("first.example"), Ipv4Addr::new(198, 18, 0, 2));
    }

    #[test]
    fn verdicts_grow_old() {
        let mut verdicts = Verdicts::default();
        let now = Instant::now();
        verdicts.put("a", true, now);
        verdicts.put("b", false, now);
        let later = now + UNKNOWN_FOR;
        assert_eq!(
            (verdicts.get("a", later), verdicts.get("b", later)),
            (Some(true), None)
        );
        assert_eq!(verdicts.get("b", now), Some(false));
        assert_eq!(verdicts.get("a", now + KNOWN_FOR), None);
    }
}
