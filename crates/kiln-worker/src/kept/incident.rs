//! What tells of a kept machine that was ended as an incident.

use std::io;
use std::path::{Path, PathBuf};

use kiln_network::record::EgressRecord;
use serde_json::json;

use super::keeper::Held;
use super::{Facts, LOG_FILE, dir_of};
use crate::fleet::told;
use crate::host::now_unix_ms;
use crate::incident::{self, bytes_of};

/// Taken from a machine that still runs, without asking its guest anything.
#[derive(Debug)]
pub(super) struct Evidence {
    facts: Facts,
    note: String,
    console: String,
    record: Vec<u8>,
    journal: Vec<u8>,
    egress: EgressRecord,
    asked_unix_ms: u64,
}

impl Evidence {
    pub(super) fn take(held: &Held, home: &Path, note: &str) -> Self {
        let mut egress = held.egress.snapshot();
        told::events(&mut egress.events, &held.mask);
        let dir = dir_of(home, &held.facts.machine.machine);
        Self {
            facts: held.facts.clone(),
            note: note.chars().take(1000).collect(),
            console: console_of(held),
            record: bytes_of(&dir.join("record.json")),
            journal: bytes_of(&dir.join(LOG_FILE)),
            egress,
            asked_unix_ms: now_unix_ms(),
        }
    }
}

/// The end of its console, without its command's secrets. A keeper of its own never had their values, so it could not leave them out.
fn console_of(held: &Held) -> String {
    match held.facts.machine.had_secrets && held.mask.is_empty() {
        true => "left out: the command had secrets, and may have printed one here\n".to_owned(),
        false => held.mask.text(&held.machine.console_tail()),
    }
}

/// Puts everything into a folder that appears whole, and survives a crash of the host from then on.
pub(super) fn preserve(home: &Path, evidence: &Evidence, leaks: &[String]) -> io::Result<PathBuf> {
    let told = json!({
        "machine": evidence.facts,
        "note": evidence.note,
        "asked_unix_ms": evidence.asked_unix_ms,
        "gone_unix_ms": now_unix_ms(),
        "left_behind": leaks,
        // What a machine could act with, and how each ended.
        "revoked": {
            "channel": "closed, and with it every stream, connection and command of the machine",
            "egress": "its gateway ended with its keeper",
            "lease": "the attempt's lease ended with its command: no door takes anything under it",
            "registry_tokens": "bound to that lease's epoch, so none is valid",
            "secrets": "taken out of the machine when its command had ended; what its user passed by -e was in the machine alone",
        },
    });
    let files: [(&str, &[u8]); 5] = [
        ("incident.json", &serde_json::to_vec_pretty(&told)?),
        ("record.json", &evidence.record),
        ("console.log", evidence.console.as_bytes()),
        (LOG_FILE, &evidence.journal),
        ("egress.json", &serde_json::to_vec_pretty(&evidence.egress)?),
    ];
    incident::preserve(home, evidence.facts.id(), evidence.asked_unix_ms, &files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_there() {
        let home = tempfile::tempdir().expect("dir");
        let evidence = Evidence {
            facts: super::super::sample("ra1-1-run"),
            note: "it mined".to_owned(),
            console: "panic".to_owned(),
            record: b"{}".to_vec(),
            journal: b"lines".to_vec(),
            egress: EgressRecord::default(),
            asked_unix_ms: 77,
        };
        let dir = preserve(home.path(), &evidence, &["a file".to_owned()]).expect("kept");
        assert_eq!(dir, home.path().join("incidents/ra1-77"));
        let text = std::fs::read_to_string(dir.join("incident.json")).expect("reads");
        assert!(
            text.contains("it mined") && text.contains("a file"),
            "{text}"
        );
        for name in ["record.json", "console.log", LOG_FILE, "egress.json"] {
            assert!(dir.join(name).exists(), "{name}");
        }
    }
}
