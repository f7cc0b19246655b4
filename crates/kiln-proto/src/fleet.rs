//! What controller and worker say to each other: JSON bodies of `/worker/v1`.
//!
//! The table of requests is in `docs/design/control-plane.md`; versions are in COMPATIBILITY.md. Unknown fields are ignored and new fields have
//! defaults, so that a worker and a controller one generation apart understand each other.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use kiln_core::dispatch::WorkerFacts;
use kiln_core::job::{AppliedPolicy, Limits};
use kiln_core::{
    AllowRule, AttemptId, Digest, Epoch, FailureClass, ImageRef, JobId, JobRequest, Label, Lease,
    NetworkPolicy, Observed, Outcome, PoolName, Receipt, WorkerId,
};
use serde::{Deserialize, Serialize};

/// Generation of these messages. A controller serves its own and the one before.
///
/// 2: workers hold a job to its policy (`kiln_core::dispatch::POLICY_GENERATION`); a job with one goes to no older worker.
/// 3: workers let somebody hold a command's streams while it runs (`kiln_core::dispatch::ATTEND_GENERATION`), and bound the rate of disks and
/// open files (`kiln_core::dispatch::BOUNDS_GENERATION`).
pub const GENERATION: u32 = 3;
/// What workers, and controllers among themselves, offer in a handshake besides HTTP/1.1 (ALPN, RFC 7301), so that they are shown the certificate of the authority they
/// pinned, whatever the operator shows to people. It is never chosen.
pub const ALPN: &[u8] = b"kiln-worker";
/// Header with the generation a worker speaks.
pub const GENERATION_HEADER: &str = "kiln-generation";
/// Header with the lease of a request about a job: [`LeaseHeader`].
pub const LEASE_HEADER: &str = "kiln-lease";
/// Header by which a worker on the private socket says its name; over TLS its certificate says it.
pub const WORKER_HEADER: &str = "kiln-worker";
/// A lease lives this long after the heartbeat that renewed it.
pub const LEASE_TTL_MS: u64 = 15_000;
/// Time after a lease's end in which its worker destroys its machines, before the job may be given away.
pub const LEASE_GRACE_MS: u64 = 5_000;
/// Time between two heartbeats of a worker.
pub const HEARTBEAT_MS: u64 = 5_000;
/// Longest time a poll is held open.
pub const POLL_MS: u64 = 25_000;
/// Most leases one worker may hold.
pub const LEASES_MAX: usize = 256;
/// Most bytes of one piece of log.
pub const LOG_PIECE_MAX: usize = 256 * 1024;
/// Most bytes of any other body here, sources and artifacts excepted.
pub const BODY_MAX: usize = 4 << 20;

/// Says which lease a request is made under: `worker/attempt-number/incarnation.count`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeaseHeader {
    /// Who holds it.
    pub worker: WorkerId,
    /// Which attempt of the job that the path names.
    pub attempt: u32,
    /// Which claim.
    pub epoch: Epoch,
}

/// Why a text is not a lease header.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a lease: write worker/attempt/incarnation.count")]
pub struct ParseLeaseHeader;

impl LeaseHeader {
    /// Of a lease.
    #[must_use]
    pub fn of(lease: &Lease) -> Self {
        Self {
            worker: lease.worker.clone(),
            attempt: lease.attempt.number,
            epoch: lease.epoch,
        }
    }
}

impl fmt::Display for LeaseHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.worker, self.attempt, self.epoch)
    }
}

impl FromStr for LeaseHeader {
    type Err = ParseLeaseHeader;

    fn from_str(text: &str) -> Result<Self, ParseLeaseHeader> {
        let mut parts = text.split('/');
        let (Some(worker), Some(attempt), Some(epoch), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(ParseLeaseHeader);
        };
        let (incarnation, count) = epoch.split_once('.').ok_or(ParseLeaseHeader)?;
        Ok(Self {
            worker: worker.parse().map_err(|_| ParseLeaseHeader)?,
            attempt: number(attempt)?,
            epoch: Epoch {
                incarnation: number(incarnation)?,
                count: number(count)?,
            },
        })
    }
}

/// Digits only: `parse` alone would also take a sign.
fn number<T: FromStr>(text: &str) -> Result<T, ParseLeaseHeader> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ParseLeaseHeader);
    }
    text.parse().map_err(|_| ParseLeaseHeader)
}

/// `POST /worker/v1/join`: a single-use token for a certificate.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Join {
    /// The name the worker wants; the token may fix another.
    pub worker: WorkerId,
    /// The token.
    pub token: String,
    /// Certificate request, PEM. Empty on the private socket, where the peer's uid is the proof.
    #[serde(default)]
    pub csr: String,
    /// Labels it wants. Only on the private socket: elsewhere the token fixes them.
    #[serde(default)]
    pub labels: BTreeMap<Label, Label>,
    /// What it is.
    pub facts: WorkerFacts,
}

/// Answer to [`Join`] and [`Renew`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Joined {
    /// Its name from now on.
    pub worker: WorkerId,
    /// Its pool.
    pub pool: PoolName,
    /// Labels the token fixed.
    pub labels: BTreeMap<Label, Label>,
    /// Certificate chain, PEM; empty on the private socket.
    #[serde(default)]
    pub certificate: String,
    /// The controller's authority, PEM; empty on the private socket.
    #[serde(default)]
    pub authority: String,
    /// End of the certificate, milliseconds since the Unix epoch.
    #[serde(default)]
    pub expires_unix_ms: u64,
}

/// `POST /worker/v1/renew`: the next certificate for the same key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Renew {
    /// Certificate request, PEM.
    pub csr: String,
}

/// `POST /worker/v1/release`: a worker's process has just started, or is about to end: whatever is still held in its name is lost, and may go
/// on elsewhere at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Release {
    /// It ends: it gets no more jobs.
    #[serde(default)]
    pub leaving: bool,
}

/// Answer to [`Release`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Released {
    /// Leases that were given up.
    pub leases: u32,
}

/// Most addresses that a worker tells of itself.
pub const WORKER_ADDRESSES_MAX: usize = 64;

/// Most places that a [`HeartbeatAnswer`] names.
pub const OWN_PLACES_MAX: usize = 1024;

/// `POST /worker/v1/heartbeat`: every lease at once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Heartbeat {
    /// What it is now.
    pub facts: WorkerFacts,
    /// Leases it works on.
    pub held: Vec<HeldLease>,
    /// The operator asked this worker, on its host, to take no more.
    #[serde(default)]
    pub draining: bool,
    /// Machines without a lease that it found and destroyed since the last heartbeat that was answered.
    #[serde(default)]
    pub orphans: u64,
    /// Attempts whose machines it keeps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<HeldLease>,
    /// Addresses of its network interfaces, at most [`WORKER_ADDRESSES_MAX`]: no machine of another worker may reach them. Empty from workers that
    /// do not tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
}

/// One lease in a heartbeat.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HeldLease {
    /// The attempt.
    pub attempt: AttemptId,
    /// Which claim.
    pub epoch: Epoch,
}

/// Answer to [`Heartbeat`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HeartbeatAnswer {
    /// How long every lease named alive in `leases` lives from when the heartbeat was *sent*.
    pub ttl_ms: u64,
    /// One for each lease asked about, in the same order.
    pub leases: Vec<LeaseAnswer>,
    /// Controllers, workers and database of the installation, by host name or address, at most [`OWN_PLACES_MAX`]: no machine may
    /// reach them unless the worker's operator says so.
    #[serde(default)]
    pub own: Vec<String>,
    /// One for each kept machine asked about, in the same order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<LeaseAnswer>,
}

/// What is to become of one lease.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "lease")]
pub enum LeaseAnswer {
    /// It lives on.
    Live {
        /// Somebody asked to stop the job: cancel it and finish.
        #[serde(default)]
        cancel: bool,
    },
    /// It does not: destroy what runs for it, say nothing more about it.
    Gone {
        /// Why, for the worker's log.
        why: String,
        /// Somebody ended the job as an incident: what tells of it stays on the worker's host. A worker that does not know this destroys all the same.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        incident: Option<Incident>,
    },
}

/// Why a job was ended as an incident.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Incident {
    /// Who ended it.
    pub by: String,
    /// In a few words.
    #[serde(default)]
    pub note: String,
    /// When, milliseconds since the Unix epoch; with the job's id it names what is kept of it.
    pub at_unix_ms: u64,
}

/// `POST /worker/v1/poll`: held open until there is work or [`POLL_MS`] have passed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Poll {
    /// Leases it has already: it is told the others.
    #[serde(default)]
    pub held: Vec<HeldLease>,
}

/// Answer to [`Poll`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PollAnswer {
    /// Its leases that the poll did not name.
    pub leases: Vec<Leased>,
    /// Something became of a lease it has: a heartbeat now says what.
    #[serde(default)]
    pub beat: bool,
}

/// `POST /worker/v1/own`, on the private socket alone: the job that the worker's own command asks for and nobody else runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Own {
    /// What is to be done.
    pub request: JobRequest,
    /// Labels for lists and filters.
    #[serde(default)]
    pub labels: BTreeMap<Label, Label>,
}

/// `POST /worker/v1/own-asked`, on the private socket alone: what a finished job of a command's own was asked for, so that a command may ask for
/// it again. The answer is its [`Own`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AskOwn {
    /// The job.
    pub job: JobId,
}

/// Answer to [`Own`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Owned {
    /// The job.
    pub job: JobId,
}

/// One job to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Leased {
    /// The right to do it.
    pub lease: Lease,
    /// What to do.
    pub request: JobRequest,
    /// W3C trace context of whoever asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// `POST /worker/v1/jobs/{job}/event`: something happened.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct JobEvents {
    /// Number of the first of these within the attempt, from 0: a repeat is recognised by it.
    pub from: u64,
    /// In order. Each is an object with a member `event`; the set of names is open.
    pub events: Vec<serde_json::Value>,
    /// The machine is ready: the job counts as running from now on.
    #[serde(default)]
    pub started: bool,
}

/// Answer to a piece of log: `POST /worker/v1/jobs/{job}/log?from=OFFSET`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogAnswer {
    /// The next offset that is wanted.
    pub next: u64,
    /// The log's limit is reached: more is not kept.
    #[serde(default)]
    pub full: bool,
}

/// `POST /worker/v1/jobs/{job}/image`: name what this attempt pushed into its quarantine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PublishImage {
    /// The manifest the worker verified; the controller reads it again.
    pub manifest: Digest,
    /// Names within the tenant.
    pub tags: Vec<ImageRef>,
}

/// Answer to `POST /worker/v1/jobs/{job}/registry-token`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RegistryToken {
    /// Where the registry is, `host:port`; empty when worker and controller share one.
    pub registry: String,
    /// Bearer token for this attempt's quarantine.
    pub token: String,
    /// Its end, milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
    /// Whether the controller names the image: also one in a registry that both share, when it shares its images with other controllers.
    #[serde(default)]
    pub named_by_controller: bool,
}

/// Code of the answer to [`PublishImage`] when this controller has no such image: it was pushed to another one, and is to be pushed again.
pub const NOT_PUSHED: &str = "not_pushed";

/// Code of the answer to [`Own`] when its tenant's store lacks a secret that it names.
pub const NO_SECRET: &str = "no_secret";

/// `POST /worker/v1/jobs/{job}/finish`: the end of the attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finish {
    /// How it ended.
    pub outcome: Outcome,
    /// What was stored, when something was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// What the host saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<Box<Observed>>,
    /// Language runtime of an image build, as it was planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// What is shown of it: the report of a build, the end of a run. Never decides anything.
    #[serde(default)]
    pub details: serde_json::Value,
    /// What its machine reached and was refused, in at most [`EGRESS_PARTS_MAX`] parts, each an object of at most [`EVENT_DATA_MAX`] bytes. Shown, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<serde_json::Value>,
}

/// Most parts of a record of egress.
pub const EGRESS_PARTS_MAX: usize = 40;
/// Most bytes of JSON that one event of a job has room for.
pub const EVENT_DATA_MAX: usize = 64 * 1024;

/// Most machines that one worker keeps.
pub const KEPT_MAX: usize = 64;
/// What a request names in `Upgrade` (RFC 9110 §7.8) for a way to a machine, person to controller and worker to controller.
pub const MACHINE_UPGRADE: &str = "kiln-machine";

/// `POST /worker/v1/jobs/{job}/keep`, before the attempt ends: its machine is to stay.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct KeepMachine {
    /// What people are shown of it. Holds no secret, decides nothing.
    pub facts: Box<crate::kept::Handover>,
}

/// Answer to [`KeepMachine`]: it may. From then on the machine has a lease of its own, under the epoch of its attempt's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MayStay {
    /// For how long, milliseconds.
    pub stays_ms: u64,
}

/// `POST /worker/v1/machines/gone`: machines that were kept and are not any more.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MachinesGone {
    /// Their attempts, at most [`KEPT_MAX`].
    pub gone: Vec<HeldLease>,
}

/// `POST /worker/v1/machines/record`: what a machine that stayed reached and was refused, when it is gone. For each attempt the first one counts.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MachineRecord {
    /// The attempt whose machine it was.
    pub attempt: AttemptId,
    /// What is told of it: `measured.egress` has the sums, `over` is false where its keeper was killed and more may have happened.
    pub report: serde_json::Value,
    /// The parts; see [`Finish::egress`].
    #[serde(default)]
    pub egress: Vec<serde_json::Value>,
}

/// `POST /worker/v1/machines/calls`: held open until somebody wants to reach one of the machines that this worker keeps, or one whose command is
/// attended, or [`POLL_MS`] have passed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AwaitCalls {}

/// Answer to [`AwaitCalls`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Calls {
    /// Who calls. For each the worker opens one way: `GET /worker/v1/machines/ways/{way}` with [`MACHINE_UPGRADE`].
    pub calls: Vec<MachineCall>,
}

/// Somebody wants to reach a machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineCall {
    /// The way's name: good once.
    pub way: String,
    /// The attempt whose machine it is.
    pub attempt: AttemptId,
    /// Under which claim.
    pub epoch: Epoch,
}

/// `POST /worker/v1/jobs/{job}/secrets`: the values of secrets that the request names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AskSecrets {
    /// Their names.
    pub names: Vec<String>,
}

/// Answer to [`AskSecrets`].
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Secrets {
    /// Name and value in base 64.
    pub values: BTreeMap<String, String>,
    /// Names of secrets that the job may not have, and why. Those that are in neither are not there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub refused: BTreeMap<String, String>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.values.keys()).finish()
    }
}

/// `POST /worker/v1/jobs/{job}/policy`: what the policy in the commit that a build is made from, or in a trusted ref beside it, means for it.
/// The worker read the files from the tree that it proved; the controller compiles the one that counts and bounds it by what the operator grants.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AskPolicy {
    /// Every file whose name counts, [`kiln_core::job::POLICY_NAMES`], and its text.
    pub files: BTreeMap<String, String>,
    /// The ref they were read at, if it is not the build's own: the job's `policy_ref`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

/// Answer to [`AskPolicy`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum PolicyAnswer {
    /// No policy is there: the build is what its request says.
    None,
    /// What it is held to.
    Held(Box<HeldPolicy>),
    /// It cannot be run so.
    Refused {
        /// Whose fault.
        class: FailureClass,
        /// Why, with lines where there are some.
        message: String,
        /// What to try.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

/// What a build is held to by the policy in its commit.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HeldPolicy {
    /// What it may reach.
    pub network: NetworkPolicy,
    /// That and nothing else: not the registries of its runtime either.
    pub only_network: bool,
    /// What it may use: at most what was asked for.
    pub limits: Limits,
    /// For its record.
    pub applied: AppliedPolicy,
    /// What a person should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Of an untrusted job: besides `network` the registries of its runtime, as far as this covers them. A worker that does not know it gives none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registries_within: Option<NetworkPolicy>,
    /// What the policy of an untrusted job names and nobody else does; reached only where it is such a registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub beyond: Vec<BeyondPolicy>,
}

/// A destination that an untrusted commit names for itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BeyondPolicy {
    /// Which.
    pub rule: AllowRule,
    /// Where it is named: file and line.
    pub place: String,
}

/// Body of every refusal on these routes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// Stable short name: `lease_refused`, `unknown_worker`, `generation`, `bad_request`, `unavailable`.
    pub code: String,
    /// One sentence.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_lease_header_reads_back() {
        let header = LeaseHeader {
            worker: "w1".parse().expect("name"),
            attempt: 2,
            epoch: Epoch {
                incarnation: 3,
                count: 7,
            },
        };
        assert_eq!(header.to_string(), "w1/2/3.7");
        assert_eq!(header.to_string().parse(), Ok(header));
        for bad in [
            "",
            "w1/2",
            "w1/2/3",
            "w1/+2/3.7",
            "w1/2/3.7/x",
            "W/1/1.1",
            "w/-1/1.1",
        ] {
            assert_eq!(bad.parse::<LeaseHeader>(), Err(ParseLeaseHeader), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_header_or_not(text in ".{0,200}") {
            let _never_panics = text.parse::<LeaseHeader>();
        }
    }
}
