//! A user of its own for each machine's VMM when kiln runs as root.
//!
//! Numbers, not names: nothing is written to the host's user database. Slots are kept by the machines' records; the range depends
//! on the home, so that two homes of one host do not share users. Source of the range: systemd's `UIDS-GIDS.md`, which
//! leaves 1879048192 to 2147483647 to nobody.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kiln_core::Digest;

use crate::record::UID_SLOTS_MAX;

const RANGE_FIRST: u32 = 0x7000_0000;
const RANGE_LAST: u32 = 0x7fff_fffe;

/// The users of one home.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct OwnUsers {
    first: u32,
}

impl OwnUsers {
    /// The users of a home; the reason why there are none otherwise.
    pub(crate) fn of(home: &Path) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("kiln does not run as root".to_owned());
        }
        let users = Self::range_of(home);
        for file in ["/proc/self/uid_map", "/proc/self/gid_map"] {
            let map = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
            if !covers(&map, users.first) || !covers(&map, users.id_of(UID_SLOTS_MAX - 1)) {
                return Err("the user namespace lacks the range 1879048192-2147483646".to_owned());
            }
        }
        Ok(users)
    }

    fn range_of(home: &Path) -> Self {
        let hash = Digest::of(home.as_os_str().as_bytes());
        let number = u32::from_be_bytes([0, 0, hash.bytes()[0], hash.bytes()[1]]);
        let ranges = (RANGE_LAST - RANGE_FIRST + 1) / UID_SLOTS_MAX;
        Self {
            first: RANGE_FIRST + number % ranges * UID_SLOTS_MAX,
        }
    }

    /// User and group number of a slot.
    pub(crate) fn id_of(self, slot: u32) -> u32 {
        self.first + slot.min(UID_SLOTS_MAX - 1)
    }
}

/// Whether a map of a user namespace (user_namespaces(7)) has this number.
fn covers(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line
            .split_whitespace()
            .map(|n| n.parse::<u64>().unwrap_or(0));
        let (inside, _, count) = (numbers.next(), numbers.next(), numbers.next());
        let (first, count) = (inside.unwrap_or(0), count.unwrap_or(0));
        (first..first.saturating_add(count)).contains(&u64::from(id))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes_have_their_own_users_within_the_range() {
        let a = OwnUsers::range_of(Path::new("/a"));
        let b = OwnUsers::range_of(Path::new("/b"));
        assert_ne!(a, b);
        for users in [a, b] {
            assert!(users.id_of(0) >= RANGE_FIRST && users.id_of(u32::MAX) <= RANGE_LAST);
        }
    }

    #[test]
    fn a_namespace_without_the_range_is_noticed() {
        assert!(covers("         0          0 4294967295\n", RANGE_FIRST));
        assert!(!covers("0 100000 65536\n", RANGE_FIRST));
        assert!(!covers("junk\n", RANGE_FIRST));
    }
}
