//! What is asked of kiln, and the states a job passes through.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::{
    ByteSize, Digest, Dispatch, GitAccess, ImageRef, JobId, NetworkPolicy, Outcome, RunSecret,
    SecretName, TenantName,
};

/// A validated request. Path-free: a source is a digest, a secret is a name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JobRequest {
    /// Id, unique for ever.
    pub id: JobId,
    /// Whose job.
    pub tenant: TenantName,
    /// What to do.
    pub kind: JobKind,
    /// What it may reach.
    pub network: NetworkPolicy,
    /// What it may use.
    pub limits: Limits,
    /// Whether its results may enter the tenant's cache: decided from the token and the verified ref, never by the request.
    pub trust: TrustClass,
    /// Bits per second that it may exchange with the network, each way; none means no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_bits: Option<u64>,
    /// How it is queued.
    #[serde(default)]
    pub dispatch: Dispatch,
    /// W3C trace context of whoever asked, checked. Decides nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// The policy file it was narrowed by, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<AppliedPolicy>,
}

/// Names at the top of a tree that are, or nearly are, those of a policy.
pub const POLICY_NAMES: [&str; 7] = [
    "kiln.yaml",
    "cleanroom.yaml",
    ".buildkite/cleanroom.yaml",
    "kiln.yml",
    "cleanroom.yml",
    ".kiln.yaml",
    ".buildkite/cleanroom.yml",
];

/// Longest text of a policy, bytes.
pub const POLICY_BYTES_MAX: usize = 256 * 1024;

/// The policy file a request was narrowed by, and what of it no other field of the request holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AppliedPolicy {
    /// Name of the file, without the folders above it; none where the operator's grant alone holds, or the job is older than this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Hash of what the file means.
    pub file: Digest,
    /// Hash of what held: the file and the operator's grant.
    pub hash: Digest,
    /// Bits per second from the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_bits: Option<u64>,
    /// Bits per second to the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download_bits: Option<u64>,
    /// Connections of the machine at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_max: Option<u32>,
    /// Bytes that its command may write to its output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_bytes_max: Option<u64>,
    /// Processes and threads of its commands at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes_max: Option<u32>,
    /// Bytes per second, read and written, of the disks that its machine may write, together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_second: Option<u64>,
    /// Files that one process of its commands has open at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files_max: Option<u32>,
    /// Its machine is open to learn what a list must name. It has no secrets.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub learn: bool,
    /// Microseconds that it took to find, read and bound it; none where the job is older than this field. A measurement: it decides nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided_us: Option<u64>,
}

impl AppliedPolicy {
    /// Says how long it took to come to it.
    pub fn took(&mut self, time: std::time::Duration) {
        self.decided_us = Some(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }
}

/// A part of a run before its command. The host drives them one after the other in the same machine; nothing of one is the next one's but
/// the files that it left.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunPhase {
    /// Which.
    pub name: RunPhaseName,
    /// What it may reach.
    #[serde(default)]
    pub network: NetworkPolicy,
    /// Command lines, in order; the first one that fails ends the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<Vec<String>>,
    /// Secrets of the tenant's store that it has, and no other phase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<RunSecret>,
    /// Repositories that it reads through the git gateway, and no other phase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub git: Vec<GitAccess>,
}

/// The phases before the command, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunPhaseName {
    /// What is done with the source as it arrived.
    Checkout,
    /// What the project needs is installed.
    Dependencies,
    /// Services are started.
    Services,
}

impl RunPhaseName {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Checkout => "checkout",
            Self::Dependencies => "dependencies",
            Self::Services => "services",
        }
    }
}

/// Something that runs beside a command, in its machine, from the phase `services` on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunService {
    /// The host name by which the command reaches it.
    pub name: String,
    /// Its image; it runs that image's own command.
    pub image: ImageRef,
    /// Its port.
    pub port: u16,
    /// Environment beyond the image's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How it is known to be ready.
    #[serde(default)]
    pub health: RunHealth,
    /// How long that may take, milliseconds.
    pub ready_ms: u64,
}

/// How a service is known to be ready.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunHealth {
    /// Its port takes connections.
    #[default]
    Port,
    /// A GET of this path answers with success.
    Http(String),
    /// This command succeeds in its container.
    Command(Vec<String>),
}

/// The kinds of job.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum JobKind {
    /// Source to container image, not planned yet: the host that runs it reads the source, decides how it is built and
    /// goes on with an [`ImageBuild`].
    SourceBuild(SourceBuild),
    /// Source to container image.
    ImageBuild(ImageBuild),
    /// A command, in the machine image or in a container image. Boxed: it says much more than the others.
    Run(Box<RunCommand>),
}

/// Where a source comes from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "from")]
pub enum Source {
    /// An uploaded tree.
    Tree {
        /// Digest of the uploaded archive, computed as it arrived.
        digest: Digest,
        /// Its bytes.
        size: u64,
    },
    /// A commit, fetched in a checkout machine by the host that runs the job.
    Git {
        /// Where from.
        url: String,
        /// Branch, tag or commit; `HEAD` when none was named.
        reference: String,
    },
    /// A folder of the host whose command asks: only that command's own worker builds it, as it lies there then.
    Folder {
        /// Where, for people.
        path: String,
    },
}

/// A source-to-image job as it is asked for: what the plan will be is decided by the host that runs it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SourceBuild {
    /// What is built.
    pub source: Source,
    /// A short name for lists, and the image's name when no tag is given: the folder's or repository's.
    pub name: String,
    /// Path of the Dockerfile in the source; none means the source's own, else the detected runtime's.
    #[serde(default)]
    pub dockerfile: Option<String>,
    /// Text of a Dockerfile that is not part of the source; it wins over `dockerfile`, which then only names it.
    #[serde(default)]
    pub dockerfile_text: Option<String>,
    /// Stage to build, the last one if none.
    #[serde(default)]
    pub target: Option<String>,
    /// Build arguments.
    #[serde(default)]
    pub build_args: BTreeMap<String, String>,
    /// Names of the secrets it may ask for.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// Those of them that the tenant's store has: the values of the others came with the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stored_secrets: Vec<SecretName>,
    /// Where the verified image is tagged, within the tenant; empty means after `name`.
    #[serde(default)]
    pub tags: Vec<ImageRef>,
    /// Neither use nor feed the cache.
    #[serde(default)]
    pub no_cache: bool,
    /// It reaches what the request's network says and nothing else: not the registries of its runtime either.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_network: bool,
    /// It is held to the policy that lies at the top of the commit it is built from, if one does: known when the host has the commit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repository_policy: bool,
    /// Ref of the same repository whose policy holds it in place of the one in its own commit, by its full name or `HEAD`: of a job whose own
    /// ref is not trusted, and whose repository has one that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_ref: Option<String>,
}

/// A source-to-image job.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ImageBuild {
    /// Digest of the source tree, computed by the host.
    pub source: Digest,
    /// The exact Dockerfile to use, with every FROM resolved to a digest.
    pub dockerfile: String,
    /// Stage to build, the last one if none.
    pub target: Option<String>,
    /// Build arguments.
    pub build_args: BTreeMap<String, String>,
    /// Names of the secrets it may ask for.
    pub secrets: Vec<String>,
    /// Base images by the name the Dockerfile used, resolved to digests.
    pub bases: Vec<(String, ImageRef)>,
    /// Where the verified image is tagged, within the tenant.
    pub tags: Vec<ImageRef>,
    /// Neither use nor feed the cache.
    pub no_cache: bool,
}

/// Files that a command works on: they are its working directory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunSource {
    /// Where they come from.
    pub source: Source,
    /// Folder in them in which the command begins; empty is the topmost.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub folder: String,
}

/// A command to run.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RunCommand {
    /// Container image by digest; `None` runs in the base of `runtime`, else in the one that fits the source's runtime, else in the machine image itself.
    pub image: Option<ImageRef>,
    /// Instead of an image: a runtime (`node`, `python3.13`) of which the host that runs it has a base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// Command line; empty means the image's own.
    pub argv: Vec<String>,
    /// Environment beyond the image's own.
    pub env: BTreeMap<String, String>,
    /// Guest ports that are forwarded, as (host port, guest port).
    pub ports: Vec<(u16, u16)>,
    /// Give the command a terminal.
    pub tty: bool,
    /// Connect standard input.
    pub stdin: bool,
    /// Files and folders of the machine that are kept when the command has ended, however it did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub artifacts: Vec<crate::ArtifactPath>,
    /// Secrets of the tenant's store that it has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<RunSecret>,
    /// What it works on; none: it begins in an empty home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<RunSource>,
    /// Repositories that the command itself reads through the git gateway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub git: Vec<GitAccess>,
    /// What is done before the command, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<RunPhase>,
    /// What runs beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<RunService>,
    /// What it writes lies on a disk of `limits.disk`, not in its memory. With a source it always does, but on a root disk of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disk: bool,
    /// Its machine stays on its worker when it is over. Not of a command that runs its own job: that one keeps the machine itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<RunKeep>,
    /// Kernel of its machine, instead of the machine image's. Only of a command that runs its own job and has the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<GivenFile>,
    /// Root disk of its machine, instead of the machine image's; as [`Self::kernel`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_disk: Option<GivenFile>,
    /// Somebody holds its streams while it runs, through the controller. Not of a command that runs its own job: that one holds them itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attend: Option<RunAttend>,
}

/// A file of whoever asks, of which a machine is made: which one it is, not where it lies.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GivenFile {
    /// Its name, without a folder.
    pub name: String,
    /// Digest of all of it.
    pub digest: Digest,
}

/// That a command does not begin before somebody holds its streams, and ends with whoever does. Whether it has a terminal and a standard input is
/// said by [`RunCommand::tty`] and [`RunCommand::stdin`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RunAttend {
    /// Ports of the machine that whoever holds the streams may connect to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

impl RunAttend {
    /// Most ports of one command.
    pub const PORTS_MAX: usize = 16;
}

/// That a machine stays when its command is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunKeep {
    /// Milliseconds for which it stays, from the command's end.
    pub stays_ms: u64,
    /// Only when the command failed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub on_failure_only: bool,
}

impl RunCommand {
    /// Names of the secrets of the command, of the phases before it and of the git gateway, each once.
    fn all_secrets(&self) -> impl Iterator<Item = &SecretName> {
        let git = self.all_git().filter_map(|one| one.credential.as_ref());
        let git = git.map(|credential| &credential.secret);
        let names: BTreeSet<_> = self.inner_secrets().chain(git).collect();
        names.into_iter()
    }

    /// Names of the secrets that go into the machine.
    fn inner_secrets(&self) -> impl Iterator<Item = &SecretName> {
        let phases = self.phases.iter().flat_map(|phase| &phase.secrets);
        phases.chain(&self.secrets).map(|one| &one.name)
    }

    /// Repositories of the command and of the phases before it.
    pub fn all_git(&self) -> impl Iterator<Item = &GitAccess> {
        let phases = self.phases.iter().flat_map(|phase| &phase.git);
        phases.chain(&self.git)
    }
}

impl JobKind {
    /// Where its source comes from, if it has one that is not read yet.
    #[must_use]
    pub fn source(&self) -> Option<&Source> {
        match self {
            Self::SourceBuild(build) => Some(&build.source),
            Self::ImageBuild(_) => None,
            Self::Run(run) => run.source.as_ref().map(|files| &files.source),
        }
    }
}

/// A bound below a byte a second is one all the same.
fn bytes_per_second(bits: u64) -> NonZeroU64 {
    NonZeroU64::new(bits / 8).unwrap_or(NonZeroU64::MIN)
}

impl JobRequest {
    /// Names of all secrets it asks for, those of the store and those whose values came with it.
    #[must_use]
    pub fn secret_names(&self) -> Vec<&str> {
        match &self.kind {
            JobKind::SourceBuild(build) => build.secrets.iter().map(String::as_str).collect(),
            JobKind::ImageBuild(build) => build.secrets.iter().map(String::as_str).collect(),
            JobKind::Run(run) => run.all_secrets().map(SecretName::as_str).collect(),
        }
    }

    /// Whether it asks for this secret for the git gateway and gives it to no command.
    #[must_use]
    pub fn is_for_git_alone(&self, name: &str) -> bool {
        let JobKind::Run(run) = &self.kind else {
            return false;
        };
        let shows = |one: &GitAccess| {
            let credential = one.credential.as_ref();
            credential.is_some_and(|credential| credential.secret.as_str() == name)
        };
        run.all_git().any(shows) && !run.inner_secrets().any(|inner| inner.as_str() == name)
    }

    /// Names of the secrets that the tenant's store is to give it.
    #[must_use]
    pub fn stored_secrets(&self) -> Vec<&SecretName> {
        match &self.kind {
            JobKind::SourceBuild(build) => build.stored_secrets.iter().collect(),
            JobKind::ImageBuild(_) => Vec::new(),
            JobKind::Run(run) => run.all_secrets().collect(),
        }
    }

    /// Whether it is to learn and is not trusted: an open machine is for those alone whom the operator trusts, whatever its grant says.
    #[must_use]
    pub fn learns_untrusted(&self) -> bool {
        let learns = self.policy.as_ref().is_some_and(|policy| policy.learn);
        learns && self.trust != TrustClass::Trusted
    }

    /// The oldest generation of the workers' protocol whose workers hold it to everything it says. One that is older would leave out what it
    /// does not know.
    #[must_use]
    pub fn generation(&self) -> u32 {
        let narrowed = match &self.kind {
            JobKind::Run(run) => {
                run.runtime.is_some() || !run.phases.is_empty() || !run.services.is_empty()
            }
            JobKind::SourceBuild(build) => build.only_network || build.repository_policy,
            JobKind::ImageBuild(_) => false,
        };
        let stays = matches!(&self.kind, JobKind::Run(run) if run.keep.is_some());
        let attended = self.attend().map(|_| crate::dispatch::ATTEND_GENERATION);
        let policy =
            (narrowed || self.policy.is_some()).then_some(crate::dispatch::POLICY_GENERATION);
        let keep = stays.then_some(crate::dispatch::KEEP_GENERATION);
        let bounded = self.policy.as_ref().is_some_and(|policy| {
            policy.disk_bytes_per_second.is_some() || policy.open_files_max.is_some()
        });
        let bounds = bounded.then_some(crate::dispatch::BOUNDS_GENERATION);
        let elsewhere =
            matches!(&self.kind, JobKind::SourceBuild(build) if build.policy_ref.is_some());
        let elsewhere = elsewhere.then_some(crate::dispatch::POLICY_REF_GENERATION);
        let newest = policy.max(keep).max(attended).max(bounds).max(elsewhere);
        newest.unwrap_or(1)
    }

    /// What somebody holds of it while it runs, if anybody does.
    #[must_use]
    pub fn attend(&self) -> Option<&RunAttend> {
        match &self.kind {
            JobKind::Run(run) => run.attend.as_ref(),
            _ => None,
        }
    }

    /// Asks for a worker that holds it to everything it says.
    pub fn needs_its_generation(&mut self) {
        let generation = self.generation();
        self.dispatch.requires.generation = match generation {
            1 => 0,
            newer => newer,
        };
    }

    /// The bound of its network as a gateway counts it, bytes per second of each direction.
    #[must_use]
    pub fn network_bytes_per_second(&self) -> Option<NonZeroU64> {
        self.network_bits.map(bytes_per_second)
    }

    /// Bytes per second of its machine's disks together, if they have a bound.
    #[must_use]
    pub fn disk_bytes_per_second(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.policy.as_ref()?.disk_bytes_per_second?)
    }

    /// Bytes per second from and to its machine: the request's bound and the policy's, whichever is lower.
    #[must_use]
    pub fn bytes_out_and_in_per_second(&self) -> [Option<NonZeroU64>; 2] {
        let each = self.network_bytes_per_second();
        let policy = |of: fn(&AppliedPolicy) -> Option<u64>| {
            let own = self.policy.as_ref().and_then(of).map(bytes_per_second);
            own.into_iter().chain(each).min()
        };
        [
            policy(|policy| policy.upload_bits),
            policy(|policy| policy.download_bits),
        ]
    }
}

/// What a job may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory of the machine.
    pub memory: ByteSize,
    /// Size its disk may grow to.
    pub disk: ByteSize,
    /// Wall time in milliseconds.
    pub timeout_ms: u64,
}

/// Whether a job may write the tenant's cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrustClass {
    /// A ref the host verified, or the operator's own machine.
    Trusted,
    /// Reads the cache, never writes it.
    Untrusted,
}

/// Where a job stands. It changes only through [`JobState::apply`].
///
/// ```text
/// Queued -> Leased -> Running -> Finished(outcome)
///    ^________|__________|            (lost or infrastructure failure, attempts left)
///    `-> Finished(cancelled)
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum JobState {
    /// Waiting for a worker.
    Queued {
        /// Attempts that have ended.
        attempts: u32,
    },
    /// A worker has the right to run it.
    Leased {
        /// This attempt's number, from 1.
        attempt: u32,
    },
    /// Its machine is working.
    Running {
        /// This attempt's number, from 1.
        attempt: u32,
    },
    /// Over. Final.
    Finished {
        /// What came of it.
        outcome: Outcome,
    },
}

/// What happened to a job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum JobEvent {
    /// A worker claimed it.
    Leased,
    /// Its machine said it is ready.
    Started,
    /// The attempt ended and another may follow.
    AttemptFailed {
        /// How it ended.
        outcome: Outcome,
        /// Most attempts a job may have.
        attempts_max: u32,
    },
    /// The attempt ended for good.
    Ended {
        /// How.
        outcome: Outcome,
    },
}

/// Why an event does not apply.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("event {event} does not apply to a job that is {state}")]
pub struct TransitionRefused {
    state: &'static str,
    event: &'static str,
}

impl JobState {
    /// A new job.
    #[must_use]
    pub fn new() -> Self {
        Self::Queued { attempts: 0 }
    }

    /// Whether nothing can change any more.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Finished { .. })
    }

    /// Short name of the state.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued { .. } => "queued",
            Self::Leased { .. } => "leased",
            Self::Running { .. } => "running",
            Self::Finished { .. } => "finished",
        }
    }

    /// The state after an event.
    ///
    /// # Errors
    /// When the event has no meaning in this state; the state is unchanged.
    pub fn apply(&self, event: JobEvent) -> Result<Self, TransitionRefused> {
        use JobEvent as E;
        match (self, event) {
            (Self::Queued { attempts }, E::Leased) => Ok(Self::Leased {
                attempt: attempts + 1,
            }),
            (Self::Leased { attempt }, E::Started) => Ok(Self::Running { attempt: *attempt }),
            (
                Self::Leased { attempt } | Self::Running { attempt },
                E::AttemptFailed {
                    outcome,
                    attempts_max,
                },
            ) => {
                let retried = match &outcome.verdict {
                    crate::Verdict::Failed { class, .. } => class.is_retried(),
                    crate::Verdict::Passed => false,
                };
                if retried && *attempt < attempts_max {
                    Ok(Self::Queued { attempts: *attempt })
                } else {
                    Ok(Self::Finished { outcome })
                }
            }
            (
                Self::Queued { .. } | Self::Leased { .. } | Self::Running { .. },
                E::Ended { outcome },
            ) => Ok(Self::Finished { outcome }),
            (state, event) => Err(TransitionRefused {
                state: state.name(),
                event: event.name(),
            }),
        }
    }
}

impl Default for JobState {
    fn default() -> Self {
        Self::new()
    }
}

impl JobEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Leased => "leased",
            Self::Started => "started",
            Self::AttemptFailed { .. } => "attempt-failed",
            Self::Ended { .. } => "ended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FailureClass, Verdict};

    fn failed(class: FailureClass) -> Outcome {
        let verdict = Verdict::Failed {
            class,
            message: "x".to_owned(),
            hint: None,
            command_code: None,
            reason: None,
        };
        Outcome {
            verdict,
            phases_ms: Vec::new(),
        }
    }

    #[test]
    fn lost_is_retried_within_bounds_and_guest_fault_never() {
        let running = JobState::new()
            .apply(JobEvent::Leased)
            .and_then(|s| s.apply(JobEvent::Started));
        let running = running.expect("legal");
        let lost = |max| JobEvent::AttemptFailed {
            outcome: failed(FailureClass::Lost),
            attempts_max: max,
        };
        assert_eq!(running.apply(lost(3)), Ok(JobState::Queued { attempts: 1 }));
        assert!(running.apply(lost(1)).expect("legal").is_terminal());
        let fault = JobEvent::AttemptFailed {
            outcome: failed(FailureClass::GuestFault),
            attempts_max: 3,
        };
        assert!(running.apply(fault).expect("legal").is_terminal());
    }

    #[test]
    fn terminal_is_final() {
        let end = JobEvent::Ended {
            outcome: failed(FailureClass::Cancelled),
        };
        let done = JobState::new().apply(end.clone()).expect("legal");
        for event in [end, JobEvent::Leased, JobEvent::Started] {
            assert!(done.apply(event).is_err());
        }
    }
}
