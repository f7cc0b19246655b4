//! What a machine that stays reaches, on its way into its job's record.
//!
//! ```text
//! <home>/machine-records/<machine>.json   written by its keeper: while it lives every NOTED_EVERY in which something was decided, and at its end
//! ```
//!
//! A file there outlives machine and keeper. Whoever works for the job's controller hands it in ([`hand_in`]) and removes it then: the worker that kept
//! the machine, also one that was started again; for a command's own machine the keeper, else the next command of the home that asks for such a record. When a keeper is killed, what was decided
//! after its last note is lost, and the record says that it has no end.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::{AttemptId, MachineName, WorkerId};
use kiln_network::record::parts::parts;
use kiln_network::record::{EgressRecord, EgressSummary};
use kiln_proto::fleet::MachineRecord;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Handover, dir_of};
use crate::fleet::client::{Client, REQUEST_TIMEOUT};
use crate::fleet::mask::Mask;
use crate::fleet::told;
use crate::host::now_unix_ms;

/// How often a keeper writes down what its machine reached since.
pub const NOTED_EVERY: Duration = Duration::from_secs(10);
/// Most records that wait to be handed in; the oldest go first.
pub const NOTES_MAX: usize = 1_000;
/// Version of a note.
const SCHEMA: u32 = 1;
/// Folder of notes below a home.
const NOTES_DIR: &str = "machine-records";
/// Most bytes of a note that are read.
const NOTE_BYTES_MAX: u64 = 4 << 20;

/// What is known of one machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    schema: u32,
    machine: MachineName,
    /// Whose worker kept it; none: a command's own keeper.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    worker: Option<WorkerId>,
    record: MachineRecord,
}

/// Writes down what a machine reached until now, without these secrets. `over`: nothing more comes. Blocks for moments.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn note(
    home: &Path,
    handover: &Handover,
    record: &EgressRecord,
    over: bool,
    mask: &Mask,
) -> io::Result<()> {
    let Some((attempt, _)) = AttemptId::of_machine(&handover.machine) else {
        return Err(io::Error::other("the machine is named after no attempt"));
    };
    let mut summary = record.summary();
    told::summary(&mut summary, mask);
    let note = Note {
        schema: SCHEMA,
        machine: handover.machine.clone(),
        worker: handover.worker.clone(),
        record: told_of(attempt, &summary, over),
    };
    let dir = home.join(NOTES_DIR);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)?;
    let path = path_of(home, &note.machine);
    if !path.exists() {
        make_room(&dir);
    }
    super::write_whole(&path, &serde_json::to_vec(&note)?, over)
}

fn told_of(attempt: AttemptId, summary: &EgressSummary, over: bool) -> MachineRecord {
    let (parts, left_out) = parts(summary, &[]);
    MachineRecord {
        attempt,
        report: json!({
            "measured": { "egress": summary.totals() }, "egress": summary.first(0),
            "egress_left_out": left_out, "over": over, "noted_unix_ms": now_unix_ms(),
        }),
        egress: parts.iter().map(|part| json!(part)).collect(),
    }
}

fn path_of(home: &Path, machine: &MachineName) -> PathBuf {
    home.join(NOTES_DIR).join(format!("{machine}.json"))
}

/// Files of notes, the oldest first.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "json"))
        .map(|entry| {
            let at = entry.metadata().and_then(|meta| meta.modified());
            (at.ok(), entry.path())
        })
        .collect();
    all.sort();
    all.into_iter().map(|(_, path)| path).collect()
}

fn make_room(dir: &Path) {
    let all = files(dir);
    for path in &all[..all.len().saturating_sub(NOTES_MAX - 1)] {
        tracing::warn!(file = %path.display(), "a machine's record was handed in nowhere: it is removed");
        let _gone_already = fs::remove_file(path);
    }
}

fn read(path: &Path) -> Option<Note> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).ok()?;
    file.take(NOTE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let note: Note = serde_json::from_slice(&bytes).ok()?;
    (note.schema == SCHEMA).then_some(note)
}

/// Hands in what `whose` machines reached that are gone: to the controller that `client` asks. What it takes, or will never take, is removed. Gives how many are
/// left for later.
pub async fn hand_in(home: &Path, client: &Client, whose: Option<&WorkerId>) -> usize {
    let dir = home.join(NOTES_DIR);
    let found = {
        let (dir, home, whose) = (dir.clone(), home.to_owned(), whose.cloned());
        tokio::task::spawn_blocking(move || ready(&dir, &home, whose.as_ref())).await
    };
    let mut left = 0;
    for (path, note) in found.unwrap_or_default() {
        let sent = client.call::<_, serde_json::Value>(
            "/worker/v1/machines/record",
            None,
            &note.record,
            REQUEST_TIMEOUT,
        );
        match sent.await {
            Ok(_) => {
                let _gone_already = fs::remove_file(&path);
            }
            Err(error) if error.is_passing() => {
                left += 1;
                let error = crate::orders::chain(&error);
                tracing::debug!(machine = %note.machine, error, "a record is handed in later");
            }
            Err(error) => {
                tracing::warn!(machine = %note.machine, %error, "the record of a machine was refused");
                let _gone_already = fs::remove_file(&path);
            }
        }
    }
    left
}

/// Notes of machines that are gone.
fn ready(dir: &Path, home: &Path, whose: Option<&WorkerId>) -> Vec<(PathBuf, Note)> {
    let all = files(dir).into_iter().take(NOTES_MAX);
    all.filter_map(|path| Some((read(&path)?, path)))
        .filter(|(note, _)| note.worker.as_ref() == whose)
        // One whose keeper was killed says no end, but has no files any more.
        .filter(|(note, _)| note.is_over() || !dir_of(home, &note.machine).exists())
        .map(|(note, path)| (path, note))
        .collect()
}

impl Note {
    fn is_over(&self) -> bool {
        self.record.report["over"] == true
    }
}

#[cfg(test)]
mod tests {
    use kiln_core::network::{EgressEvent, EgressVerdict};
    use kiln_network::{EgressLog, EgressSink as _};

    use super::*;

    fn log() -> EgressLog {
        let log = EgressLog::new();
        log.record(EgressEvent::of(
            "sup3rs3cret.example.org",
            443,
            EgressVerdict::HostRefused,
        ));
        log
    }

    #[test]
    fn a_machine_that_is_gone_is_told_of_even_when_its_keeper_was_killed() {
        let home = tempfile::tempdir().expect("dir");
        let home = home.path();
        let mask = Mask::new([&b"Sup3rS3cret"[..]]);
        let (lives, killed, over) = ("ra1-1-run", "ra2-1-run", "ra3-2-run");
        for (machine, is_over) in [(lives, false), (killed, false), (over, true)] {
            let handover = super::super::sample(machine).machine;
            fs::create_dir_all(dir_of(home, &handover.machine)).expect("dir");
            note(home, &handover, &log().snapshot(), is_over, &mask).expect("noted");
        }
        let machine: MachineName = killed.parse().expect("a name");
        fs::remove_dir(dir_of(home, &machine)).expect("reaped");
        let dir = home.join(NOTES_DIR);
        let found = ready(&dir, home, None);
        let mut names: Vec<_> = found.iter().map(|(_, one)| one.machine.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, [killed, over]);
        let text = serde_json::to_string(&found[0].1).expect("JSON");
        assert!(
            text.contains("***.example.org") && !text.contains("sup3rs3cret"),
            "{text}"
        );
        let worker: WorkerId = "w1".parse().expect("an id");
        assert!(
            ready(&dir, home, Some(&worker)).is_empty(),
            "not that worker's"
        );
    }

    #[test]
    fn what_nobody_takes_does_not_fill_the_disk() {
        let home = tempfile::tempdir().expect("dir");
        for at in 0..NOTES_MAX + 5 {
            let handover = super::super::sample(&format!("r{at}-1-run")).machine;
            let mask = Mask::default();
            note(
                home.path(),
                &handover,
                &EgressRecord::default(),
                true,
                &mask,
            )
            .expect("noted");
        }
        assert_eq!(files(&home.path().join(NOTES_DIR)).len(), NOTES_MAX);
    }
}
