//! Machines that stay when their command is over, so that their user can look around in them.
//!
//! ```text
//! kiln run --keep: command over -> machine kept for a moment, without an owner -> its *keeper* adopts it
//! <home>/machines/<name>/keeper.json    what the keeper holds, and until when
//! <home>/machines/<name>/keeper.sock    its private socket: this user alone
//! <home>/machines/<name>/keeper.log     what was done through it
//! <home>/machine-records/<name>.json    what it reached, until its job's controller has that
//! ```
//!
//! A keeper is one process for one machine: the same program, detached from any terminal. It owns the machine as every other owner does, serves
//! its egress, answers whoever may ask, and ends it at its deadline. When the keeper dies, however it dies, its machine has no owner any more: who
//! watches the keeper (a process that the command starts beside it) removes it with everything named above, else the next command that touches
//! machines does. Nothing else has to be remembered.
//! Read next: [`keeper`] (the process), [`ask`] (what it is asked), [`client`] (who asks).

pub mod client;
mod container;
pub mod copy;
mod doors;
pub mod egress;
mod incident;
mod journal;
pub mod keeper;

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use self::container::CONFIG as CONTAINER_CONFIG;
use kiln_core::MachineName;
use kiln_machine::driver::KEEP_MAX;
pub use kiln_proto::kept as ask;
pub use kiln_proto::kept::{Facts, Handover};

/// How long a machine stays unless its user says.
pub const STAYS_DEFAULT: Duration = Duration::from_secs(60 * 60);
/// The longest time for which a machine may stay.
pub const STAYS_MAX: Duration = KEEP_MAX;
/// The shortest.
pub const STAYS_MIN: Duration = Duration::from_secs(1);
/// How long a machine lives without an owner, from its command's end until its keeper adopts it.
pub const HANDOVER_MAX: Duration = Duration::from_secs(60);
/// Version of [`Handover`] and [`Facts`].
pub const SCHEMA: u32 = 1;

/// The keeper's facts, in its machine's directory.
const FACTS_FILE: &str = "keeper.json";
/// The keeper's socket, in its machine's directory.
const SOCKET_FILE: &str = "keeper.sock";
/// What was done through the keeper, in its machine's directory.
pub const LOG_FILE: &str = "keeper.log";
/// Bytes of a facts file that are read.
const FACTS_BYTES_MAX: u64 = 256 * 1024;
/// Directory of machines below a home (`kiln_machine::record`).
const MACHINES_DIR: &str = "machines";

/// That a machine is to stay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keep {
    /// For how long from its command's end.
    pub stays: Duration,
    /// Only when the command failed.
    pub on_failure_only: bool,
}

/// Writes a private file, which appears whole or not at all; `lasting`: also when the host loses its power now.
fn write_whole(path: &Path, bytes: &[u8], lasting: bool) -> io::Result<()> {
    let fresh = path.with_added_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(bytes)?;
    if lasting {
        file.sync_all()?;
    }
    fs::rename(&fresh, path)
}

/// Where a machine's files lie.
pub(crate) fn dir_of(home: &Path, machine: &MachineName) -> PathBuf {
    home.join(MACHINES_DIR).join(machine.as_str())
}

/// The socket of a machine's keeper.
pub(crate) fn socket_of(home: &Path, machine: &MachineName) -> PathBuf {
    dir_of(home, machine).join(SOCKET_FILE)
}

/// Kept machines of a home, whether or not their keeper still lives: reap first. A home without machines has none. Blocks for moments.
#[must_use]
pub fn list(home: &Path) -> Vec<Facts> {
    let entries = fs::read_dir(home.join(MACHINES_DIR));
    let entries = entries.into_iter().flatten().flatten();
    let mut found: Vec<Facts> = entries
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        .filter_map(|entry| facts_in(&entry.path()))
        .collect();
    found.sort_by(|a, b| {
        let key = |facts: &Facts| (facts.since_unix_ms, facts.machine.machine.clone());
        key(a).cmp(&key(b))
    });
    found
}

fn facts_in(dir: &Path) -> Option<Facts> {
    let file = fs::File::open(dir.join(FACTS_FILE)).ok()?;
    let mut bytes = Vec::new();
    file.take(FACTS_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let facts: Facts = serde_json::from_slice(&bytes).ok()?;
    let its_own = dir.file_name() == Some(std::ffi::OsStr::new(facts.machine.machine.as_str()));
    its_own.then_some(facts)
}

/// Why no kept machine was found.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FindError {
    /// None is called so.
    #[error("there is no kept machine {0:?}")]
    Unknown(String),
    /// The beginning of several.
    #[error("{asked:?} may be any of {}", found.join(", "))]
    Ambiguous {
        /// What was asked.
        asked: String,
        /// What it may mean.
        found: Vec<String>,
    },
}

/// The kept machine that somebody means: by its id, its machine's name, or a beginning of either that only one has.
///
/// # Errors
/// [`FindError`].
pub fn find(home: &Path, asked: &str) -> Result<Facts, FindError> {
    choose(&list(home), asked)
}

fn choose(all: &[Facts], asked: &str) -> Result<Facts, FindError> {
    let unknown = || FindError::Unknown(asked.chars().take(80).collect());
    if asked.is_empty() {
        return Err(unknown());
    }
    let exact = |facts: &Facts| facts.id() == asked || facts.machine.machine.as_str() == asked;
    if let Some(facts) = all.iter().find(|facts| exact(facts)) {
        return Ok(facts.clone());
    }
    let begins = |facts: &&Facts| facts.machine.machine.as_str().starts_with(asked);
    let mut found: Vec<Facts> = all.iter().filter(begins).cloned().collect();
    match (found.pop(), found.is_empty()) {
        (None, _) => Err(unknown()),
        (Some(one), true) => Ok(one),
        (Some(last), false) => {
            found.push(last);
            let found = found.iter().map(|facts| facts.id().to_owned()).collect();
            let asked = asked.to_owned();
            Err(FindError::Ambiguous { asked, found })
        }
    }
}

#[cfg(test)]
pub(crate) fn sample(machine: &str) -> Facts {
    use kiln_core::{ByteSize, NetworkPolicy, TenantName};
    let machine: MachineName = machine.parse().expect("a name");
    let job = machine.as_str().trim_end_matches("-1-run");
    Facts {
        machine: Handover {
            schema: SCHEMA,
            job: job.parse().expect("an id"),
            machine,
            tenant: TenantName::local(),
            image: None,
            command: vec!["make".to_owned(), "test".to_owned()],
            ended: "the command ended with exit code 2".to_owned(),
            exit_code: Some(2),
            cpus: 1,
            memory: ByteSize::mib(512),
            network: NetworkPolicy::from_rules([]),
            bytes_out_and_in_per_second: [None; 2],
            connections_max: None,
            runc: None,
            cwd: None,
            secret_env: Vec::new(),
            had_secrets: false,
            stays_ms: 3_600_000,
            worker: None,
        },
        uid: 1000,
        pid: 4711,
        version: "0.1.0".to_owned(),
        since_unix_ms: 1_900_000_000_000,
        until_unix_ms: 1_900_003_600_000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_found_by_its_id_its_name_or_a_beginning() {
        let all = || vec![sample("ra1b2-1-run"), sample("ra1c3-1-run")];
        for asked in ["ra1b2", "ra1b2-1-run", "ra1b"] {
            assert_eq!(choose(&all(), asked).expect("found").id(), "ra1b2");
        }
        for asked in ["", "x", "ra1b2-2-run", "../ra1b2"] {
            assert!(
                matches!(choose(&all(), asked), Err(FindError::Unknown(_))),
                "{asked}"
            );
        }
        let error = choose(&all(), "ra1").expect_err("two");
        assert_eq!(error.to_string(), "\"ra1\" may be any of ra1b2, ra1c3");
    }

    #[test]
    fn only_a_machines_own_facts_count() {
        let home = tempfile::tempdir().expect("dir");
        let facts = sample("ra1b2-1-run");
        let bytes = serde_json::to_vec(&facts).expect("JSON");
        for dir in ["ra1b2-1-run", "other", ".reaping-ra1b2-1-run-77"] {
            let dir = home.path().join("machines").join(dir);
            fs::create_dir_all(&dir).expect("dir");
            fs::write(dir.join(FACTS_FILE), &bytes).expect("write");
        }
        let broken = home.path().join("machines/broken");
        fs::create_dir_all(&broken).expect("dir");
        fs::write(broken.join(FACTS_FILE), b"{").expect("write");
        assert_eq!(list(home.path()), [facts]);
        assert!(list(&home.path().join("nowhere")).is_empty());
    }
}
