//! Names a process so that it cannot be mistaken for a later one with the same number.
//!
//! Source: proc(5), `/proc/<pid>/stat`, field 22 (start time in clock ticks after boot).

use std::fs;

use serde::{Deserialize, Serialize};

/// A process of this host: its number, start time and boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProcessMark {
    /// Process id.
    pub pid: u32,
    /// Start time, clock ticks after boot.
    pub started_ticks: u64,
    /// Boot of the host.
    pub boot_id: String,
}

impl ProcessMark {
    /// This process. Where the system does not tell, a mark that matches nothing.
    #[must_use]
    pub fn own() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            started_ticks: started_ticks(pid).unwrap_or(0),
            boot_id: boot_id(),
        }
    }

    /// Whether that process still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.started_ticks != 0
            && self.boot_id == boot_id()
            && started_ticks(self.pid) == Some(self.started_ticks)
    }
}

fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

fn started_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_started(&String::from_utf8_lossy(&stat))
}

/// The command's name, in brackets, may itself hold spaces and brackets. A zombie does not run.
fn parse_started(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z" && state != "X").then_some(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_mark_is_alive_and_another_start_is_not() {
        let own = ProcessMark::own();
        assert!(own.is_alive());
        let later = ProcessMark {
            started_ticks: own.started_ticks + 1,
            ..own.clone()
        };
        assert!(!later.is_alive());
        let rebooted = ProcessMark {
            boot_id: "other".to_owned(),
            ..own
        };
        assert!(!rebooted.is_alive());
    }

    #[test]
    fn names_with_brackets_do_not_confuse() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(parse_started(&format!("7 (a) b) {tail}")), Some(4242));
        assert_eq!(
            parse_started(&format!("7 (x) {}", tail.replace('S', "Z"))),
            None
        );
        assert_eq!(parse_started("7 (x) S 1"), None);
    }
}
