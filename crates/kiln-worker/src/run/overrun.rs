//! Which bound a command ran over that failed, as far as its machine can tell.

use kiln_core::{ByteSize, Overrun};
use kiln_proto::msg::MachineStats;

/// A disk with less room than this is full, bytes; a small one with less than a 64th of it.
const FULL_BELOW: u64 = 1024 * 1024;
/// Most of a path of the guest's that a failure shows, characters.
const PLACE_SHOWN_MAX: usize = 80;

/// A bound that was run over.
#[derive(Debug)]
pub(super) struct Over {
    /// Which, and the word for it.
    pub(super) reason: (Overrun, &'static str),
    /// What of it, after how the command ended.
    pub(super) what: String,
    /// What to try.
    pub(super) hint: &'static str,
}

const DISK_FULL: (Overrun, &str) = (Overrun::DiskFull, "disk_full");
const PROCESS_LIMIT: (Overrun, &str) = (Overrun::ProcessLimit, "process_limit");

/// The bound that a machine is at, by what its guest says: a claim, which names a failure and decides nothing else. `disk` is the size of its
/// own disk, `said` the processes that its policy allows.
pub(super) fn of(stats: &MachineStats, disk: ByteSize, said: Option<u32>) -> Option<Over> {
    let full = |free: u64| free < FULL_BELOW.min(disk.0 / 64);
    if stats.scratch_bytes_free.is_some_and(full) {
        return Some(Over {
            reason: DISK_FULL,
            what: format!("and its disk of {disk} is full"),
            hint: "give it more with --disk, or raise limits.disk of the policy",
        });
    }
    if let Some(full) = &stats.full_memory {
        let what = format!(
            "and what it writes at {} lies in {} of its memory, which are full",
            shown(&full.path),
            ByteSize(full.bytes_total)
        );
        return Some(Over {
            reason: DISK_FULL,
            what,
            hint: "give it a disk with --disk, or more memory with --memory",
        });
    }
    // Without a bound of its policy the guest's own holds.
    let usual = Some(stats.processes_max).filter(|most| *most > 0);
    let most = said.map(u64::from).or(usual)?;
    (stats.processes_refused > 0).then(|| Over {
        reason: PROCESS_LIMIT,
        what: format!("and was refused processes beyond {most}"),
        hint: match said {
            Some(_) => "start fewer at once, or raise limits.processes of the policy",
            None => "start fewer at once, or name a higher limits.processes in a policy",
        },
    })
}

/// A place in the machine as the guest names it.
fn shown(path: &str) -> String {
    let shown = path.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.take(PLACE_SHOWN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use kiln_proto::msg::FullMemory;

    use super::*;

    const FINE: MachineStats = MachineStats {
        memory_bytes: 0,
        memory_peak: 0,
        cpu_ms: 0,
        oom_kills: 0,
        state_bytes_free: 0,
        scratch_bytes_free: None,
        processes_refused: 0,
        processes_max: 16_384,
        full_memory: None,
    };

    fn told(stats: &MachineStats, said: Option<u32>) -> Option<(&'static str, String)> {
        let over = of(stats, ByteSize::gib(1), said)?;
        Some((over.reason.1, over.what))
    }

    #[test]
    fn each_bound_is_told_by_its_name_with_and_without_a_policy() {
        assert_eq!(told(&FINE, Some(9)), None);
        let full = MachineStats {
            scratch_bytes_free: Some(4096),
            ..FINE
        };
        assert_eq!(told(&full, None).expect("full").0, "disk_full");
        let room = MachineStats {
            scratch_bytes_free: Some(2 << 20),
            ..FINE
        };
        assert_eq!(told(&room, None), None);
        let memory = MachineStats {
            full_memory: Some(FullMemory {
                path: format!("/tmp\u{1b}[2J{}", "x".repeat(500)),
                bytes_total: 256 << 20,
            }),
            ..FINE
        };
        let (word, what) = told(&memory, None).expect("full");
        assert_eq!(word, "disk_full");
        assert!(what.contains("256.0 MiB of its memory"), "{what}");
        assert!(!what.contains('\u{1b}') && what.len() < 200, "{what}");
        let refused = MachineStats {
            processes_refused: 3,
            ..FINE
        };
        for (said, most) in [(Some(40), "beyond 40"), (None, "beyond 16384")] {
            let (word, what) = told(&refused, said).expect("refused");
            assert!(word == "process_limit" && what.ends_with(most), "{what}");
        }
        // An older guest does not say how many there may be.
        let older = MachineStats {
            processes_max: 0,
            ..refused
        };
        assert_eq!(told(&older, None), None);
    }
}
