//! What a job that runs can be remembered by when it is ended as an incident: its machine, its log, what it reached, what it was given.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kiln_core::Lease;
use kiln_machine::driver::Machine;
use kiln_network::record::{EgressLog, EgressRecord};
use kiln_proto::fleet::Incident;
use serde_json::{Value, json};

use super::mask::Mask;
use super::spool::Spool;
use super::told;
use crate::host::{Host, now_unix_ms};
use crate::incident;
use crate::kept::dir_of;

/// Most bytes of a log that are kept beside what the controller has of it.
const LOG_BYTES_MAX: usize = 64 << 20;

/// Filled by the job as it goes on. Cheap to clone; keeps no machine alive.
#[derive(Clone, Debug, Default)]
pub struct Witness(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// Names of the secrets whose values it has.
    secrets: Vec<String>,
    mask: Mask,
    spool: Option<Arc<Spool>>,
    machine: Option<(Weak<dyn Machine>, Arc<EgressLog>)>,
}

/// Everything, taken from a machine that still runs without asking its guest anything.
#[derive(Debug)]
pub(super) struct Evidence {
    lease: Lease,
    why: Incident,
    secrets: Vec<String>,
    machine: Option<Arc<dyn Machine>>,
    console: String,
    record: Vec<u8>,
    log: Vec<u8>,
    egress: EgressRecord,
}

impl Witness {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has the values of these secrets from now on, and what is kept of it is told without them.
    pub(super) fn was_given(&self, secrets: impl IntoIterator<Item = String>, mask: &Mask) {
        let mut seen = self.lock();
        seen.secrets.extend(secrets);
        seen.mask = mask.clone();
    }

    /// What it prints goes there.
    pub(super) fn prints(&self, spool: &Arc<Spool>) {
        self.lock().spool = Some(Arc::clone(spool));
    }

    /// It has this machine, whose gateway notes here what it decides.
    pub fn has(&self, machine: &Arc<dyn Machine>, egress: &Arc<EgressLog>) {
        self.lock().machine = Some((Arc::downgrade(machine), Arc::clone(egress)));
    }

    /// What there is now.
    pub(super) fn take(&self, host: &Host, lease: &Lease, why: Incident) -> Evidence {
        let seen = self.lock();
        let machine = seen.machine.as_ref().and_then(|(one, _)| one.upgrade());
        let dir = machine
            .as_ref()
            .map(|one| dir_of(&host.home.data, one.name()));
        let record = dir.map(|dir| incident::bytes_of(&dir.join("record.json")));
        let egress = seen.machine.as_ref().map(|(_, egress)| egress.snapshot());
        let mut egress = egress.unwrap_or_default();
        told::events(&mut egress.events, &seen.mask);
        let console = machine.as_ref().map(|one| one.console_tail());
        let log = seen.spool.as_ref();
        Evidence {
            lease: lease.clone(),
            why,
            secrets: seen.secrets.clone(),
            // A machine that was told a secret may print it where no command's output goes.
            console: seen.mask.text(&console.unwrap_or_default()),
            machine,
            record: record.unwrap_or_default(),
            log: log
                .and_then(|spool| spool.read(0, LOG_BYTES_MAX).ok())
                .unwrap_or_default(),
            egress,
        }
    }
}

impl Evidence {
    /// Ends the machine, and keeps what tells of it; gives where.
    pub(super) async fn end_and_keep(mut self, host: &Host) -> std::io::Result<PathBuf> {
        let leaks = match self.machine.take() {
            Some(machine) => machine.destroy().await.leaks,
            None => Vec::new(),
        };
        let home = host.home.data.clone();
        let written = tokio::task::spawn_blocking(move || {
            let told = serde_json::to_vec_pretty(&self.told(&leaks))?;
            let egress = serde_json::to_vec_pretty(&self.egress)?;
            let files: [(&str, &[u8]); 5] = [
                ("incident.json", &told),
                ("record.json", &self.record),
                ("console.log", self.console.as_bytes()),
                ("worker.log", &self.log),
                ("egress.json", &egress),
            ];
            let job = self.lease.attempt.job.as_str();
            incident::preserve(&home, job, self.why.at_unix_ms, &files)
        });
        written.await.map_err(std::io::Error::other)?
    }

    fn told(&self, leaks: &[String]) -> Value {
        json!({
            "job": self.lease.attempt.job,
            "attempt": self.lease.attempt.number,
            "tenant": self.lease.tenant,
            "worker": self.lease.worker,
            "by": self.why.by,
            "note": self.why.note,
            "asked_unix_ms": self.why.at_unix_ms,
            "gone_unix_ms": now_unix_ms(),
            "left_behind": leaks,
            // What a machine could act with, and how each ended.
            "revoked": {
                "lease": "ended by the controller before the machine did: no door takes anything under it",
                "registry_tokens": "bound to that lease's epoch, so none is valid",
                "channel": "closed, and with it every stream, connection and command of the machine",
                "egress": "its gateway ended with its machine",
                "secrets": "no door answers their values under that lease again",
            },
            // A value that was read cannot be unread: whoever made it has to make another.
            "secrets_given": self.secrets,
        })
    }
}
