//! A set of hosts as bits: which hosts fit is one AND per requirement, whatever the number of labels.

/// Hosts by their index in the fleet.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct HostSet(Vec<u64>);

impl HostSet {
    pub(crate) fn empty(hosts: usize) -> Self {
        Self(vec![0; hosts.div_ceil(64)])
    }

    pub(crate) fn insert(&mut self, host: usize) {
        self.0[host / 64] |= 1 << (host % 64);
    }

    pub(crate) fn remove(&mut self, host: usize) {
        self.0[host / 64] &= !(1 << (host % 64));
    }

    pub(crate) fn contains(&self, host: usize) -> bool {
        self.0[host / 64] >> (host % 64) & 1 == 1
    }

    pub(crate) fn keep(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word &= other;
        }
    }

    pub(crate) fn drop_all(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word &= !other;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word |= other;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub(crate) fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// In ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0
            .iter()
            .enumerate()
            .flat_map(|(at, word)| Bits(*word).map(move |bit| at * 64 + bit))
    }

    /// Those in both, in ascending order.
    pub(crate) fn both<'s>(&'s self, other: &'s Self) -> impl Iterator<Item = usize> + 's {
        let words = self.0.iter().zip(&other.0).enumerate();
        words.flat_map(|(at, (a, b))| Bits(a & b).map(move |bit| at * 64 + bit))
    }
}

struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_more_than_one_word() {
        let mut a = HostSet::empty(130);
        let mut b = HostSet::empty(130);
        for host in [0, 63, 64, 129] {
            a.insert(host);
        }
        for host in [63, 100, 129] {
            b.insert(host);
        }
        assert_eq!(a.both(&b).collect::<Vec<_>>(), [63, 129]);
        assert!(a.len() == 4 && a.contains(64) && !b.contains(64));
        a.drop_all(&b);
        assert_eq!(a.iter().collect::<Vec<_>>(), [0, 64]);
        a.remove(0);
        a.remove(64);
        assert!(a.is_empty());
    }
}
