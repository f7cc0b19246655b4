//! The messages that ride on streams: orders of the host, questions of the guest, and their answers.
//!
//! Every stream opens with a kind (one byte) and a JSON payload; what follows depends on the kind and
//! is said at each constant of [`kind`]. Unknown fields are ignored, so that either side may be newer.
//! Everything a guest sends is a claim: the host checks what it can and bounds the rest.
//! Framing and credits live in [`crate::frame`] and [`crate::mux`].

use serde::{Deserialize, Serialize};

/// Protocol generation this build speaks. The lower of both sides' maxima is used.
pub const GENERATION: u32 = 1;

/// Most connections to the host that a machine can ever be given. Each may hold a window of memory on either side.
pub const CONNECTIONS_MOST: u32 = 2048;
/// Streams for everything else that a guest opens, beside its connections: names, events, agents.
pub const OTHER_STREAMS: usize = 64;

// A request whose command line is refused beforehand is one that could not be sent.
const _: () = assert!(
    crate::frame::OPEN_PAYLOAD_MAX == kiln_core::command_line::COMMAND_BYTES_MAX,
    "an order opens a stream, with its command line in it"
);

/// Stream kinds.
pub mod kind {
    /// Host to guest. Payload [`super::Order`]; the guest answers one message
    /// `Result<OrderReply, GuestError>` ([`super::CallResult`]) and half-closes.
    pub const CALL: u8 = 1;
    /// Host to guest. Payload [`super::ExecRequest`]; then tagged chunks both ways ([`super::chunk`]).
    pub const EXEC: u8 = 2;
    /// Host to guest. Payload [`super::PutTree`]; then a tar stream, half-close; the guest answers one
    /// message `Result<TreeReport, GuestError>`.
    pub const PUT_TREE: u8 = 3;
    /// Host to guest. Payload [`super::GetTree`]; the guest sends a tar stream and half-closes, or resets
    /// the stream with a reason.
    pub const GET_TREE: u8 = 4;
    /// Host to guest. Payload [`super::Forward`]; the guest answers one [`super::ConnectReply`], then raw bytes.
    pub const FORWARD: u8 = 5;
    /// Host to guest. Payload [`super::PutFile`]; then the bytes, half-close; the guest answers one
    /// message `Result<TreeReport, GuestError>`.
    pub const PUT_FILE: u8 = 6;
    /// Guest to host. Payload [`super::Connect`]; the host answers one [`super::ConnectReply`], then raw bytes.
    pub const CONNECT: u8 = 64;
    /// Guest to host. Payload [`super::Resolve`]; the host answers one [`super::ResolveReply`] and half-closes.
    pub const RESOLVE: u8 = 65;
    /// Guest to host. Empty payload; a sequence of [`super::GuestEvent`] messages for as long as the session lives.
    pub const EVENTS: u8 = 66;
    /// Guest to host. Payload [`super::SshAgent`]; then raw bytes of the SSH agent protocol. The host resets the stream when
    /// the job offers no agent in that place.
    pub const SSH_AGENT: u8 = 67;
}

/// Tags of chunks on an [`kind::EXEC`] stream.
pub mod chunk {
    /// Host to guest: bytes for standard input (or the terminal).
    pub const STDIN: u8 = 1;
    /// Host to guest: standard input ends.
    pub const STDIN_EOF: u8 = 2;
    /// Host to guest: JSON [`super::Signal`], for the process group.
    pub const SIGNAL: u8 = 3;
    /// Host to guest: JSON [`super::TtySize`].
    pub const RESIZE: u8 = 4;
    /// Guest to host: 8 bytes little-endian offset, then bytes of standard output (or the terminal).
    pub const STDOUT: u8 = 16;
    /// Guest to host: 8 bytes little-endian offset, then bytes of standard error.
    pub const STDERR: u8 = 17;
    /// Guest to host: JSON [`super::Exit`]. The last chunk.
    pub const EXIT: u8 = 18;
    /// Guest to host: JSON [`super::GuestError`]: the command could not be started. The last chunk.
    pub const FAILED: u8 = 19;
}

/// Features a guest may announce in its Hello. Nothing is assumed that is not listed.
pub mod feature {
    /// Takes a new identity after being cloned.
    pub const REIDENTIFY: &str = "reidentify";
    /// Runs commands.
    pub const EXEC: &str = "exec";
    /// Gives commands a terminal.
    pub const TTY: &str = "tty";
    /// Moves trees and files.
    pub const TREE: &str = "tree";
    /// Forwards TCP from the host.
    pub const FORWARD: &str = "forward";
    /// Serves DNS and outgoing connections over the channel.
    pub const EGRESS: &str = "egress";
    /// Can run BuildKit.
    pub const BUILDKIT: &str = "buildkit";
    /// Can run a container image.
    pub const CONTAINER: &str = "container";
    /// Shows secrets that were put as files below `/run/secrets`, in the machine and in containers that name them.
    pub const SECRET_FILES: &str = "secret_files";
    /// Shows the tree of [`super::Place::Work`] in containers, runs one container after the other on the same files, runs
    /// services beside them, and tells what its bounds refused.
    pub const WORK: &str = "work";
    /// Bounds the open files of commands, and says when its own files or the usual bound of processes were full.
    pub const BOUNDS: &str = "bounds";
    /// Its root is a disk, not the initial RAM disk; only a guest that knows this word says it.
    pub const ROOT_DISK: &str = "root_disk";
}

/// Why the guest could not do what it was told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// What kind of failure.
    pub code: GuestErrorCode,
    /// One sentence.
    pub message: String,
}

/// Kinds of failure in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestErrorCode {
    /// The order makes no sense here.
    Invalid,
    /// A file, command or disk does not exist.
    NotFound,
    /// No space left.
    DiskFull,
    /// A cap of the order was passed.
    LimitExceeded,
    /// A path would leave the place it was meant for.
    UnsafePath,
    /// It took too long.
    Timeout,
    /// Anything else the system said.
    System,
    /// A code of a newer guest.
    #[serde(other)]
    Unknown,
}

/// Answer to an order.
pub type CallResult = Result<OrderReply, GuestError>;

/// What the host tells the guest to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "order")]
pub enum Order {
    /// Freeze the workload cgroup, sync filesystems, and say what is still open. Before a template is taken.
    Quiesce,
    /// Take a new identity. The workload stays frozen.
    Reidentify(Identity),
    /// Let the workload run.
    Thaw,
    /// Make a disk usable.
    Mount(Mount),
    /// Unmount and flush a disk that [`Order::Mount`] mounted.
    Unmount {
        /// Serial of the disk (see `DiskRole::serial`).
        serial: String,
    },
    /// Bound the workload as a whole.
    SetLimits {
        /// Bytes of memory for everything under the workload cgroup; 0 means what the machine has less a reserve.
        memory_max: u64,
        /// Processes and threads; 0 means what is usual.
        pids_max: u64,
        /// Bytes that may be written to the state disk from now on, until it is unmounted; 0 means all that are free.
        #[serde(default)]
        disk_bytes_max: u64,
        /// Files that one process of a command may have open at once; 0 means what is usual.
        #[serde(default)]
        open_files_max: u64,
    },
    /// How many connections to the host programs may have at once; more wait. Without this order: what is usual. The host takes that many
    /// streams before it says so.
    SetConnections {
        /// At most [`CONNECTIONS_MOST`].
        most: u32,
    },
    /// Environment that every RUN step gets unless it sets the same name itself: registry settings of
    /// package managers. Replaces what was set before.
    SetStepEnv {
        /// Names and values.
        env: Vec<(String, String)>,
    },
    /// Start BuildKit on the mounted state disk and wait until it answers.
    StartBuildkit(BuildkitConfig),
    /// Stop BuildKit and wait until it has gone.
    StopBuildkit,
    /// Make a directory ready to run a container image in; answers the command to exec.
    PrepareContainer(Box<ContainerSpec>),
    /// Names of services: each means this machine, for its own programs and for containers that are prepared from now on.
    /// Replaces those before. What the guest remembers of the host's word on other names is forgotten: a phase begins.
    NameServices {
        /// Host names.
        names: Vec<String>,
    },
    /// Remove a tree that [`kind::PUT_TREE`] made.
    RemoveTree {
        /// Where it was put.
        place: Place,
    },
    /// Resource use of the machine.
    Stats,
    /// Stop everything, unmount, and power off. The answer may never arrive.
    Shutdown,
}

/// What the guest answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum OrderReply {
    /// Done, nothing to say.
    Done,
    /// To [`Order::Quiesce`].
    Quiesced(Quiesced),
    /// To [`Order::Reidentify`].
    Reidentified(Reidentified),
    /// To [`Order::Mount`].
    Mounted(Mounted),
    /// To [`Order::PrepareContainer`].
    Prepared {
        /// What to pass to an [`ExecRequest`].
        argv: Vec<String>,
    },
    /// To [`Order::Stats`].
    Stats(MachineStats),
}

/// A new identity for a clone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// 64 hex digits of fresh entropy, mixed in and followed by `RNDRESEEDCRNG`.
    pub seed: String,
    /// Wall clock of the host, nanoseconds since the Unix epoch.
    pub wall_unix_ns: u64,
    /// New boot id (a UUID with hyphens).
    pub boot_id: String,
    /// New machine-id (32 hex digits).
    pub machine_id: String,
    /// New host name.
    pub hostname: String,
}

/// What the guest reads back after taking a new identity. The host compares each line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reidentified {
    /// `RNDADDENTROPY` succeeded.
    pub entropy_added: bool,
    /// `RNDRESEEDCRNG` succeeded.
    pub reseeded: bool,
    /// 16 bytes read from the kernel's generator afterwards, in hex.
    pub sample: String,
    /// Wall clock read back, nanoseconds since the Unix epoch.
    pub wall_unix_ns: u64,
    /// Read back from `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Read back from `/etc/machine-id`.
    pub machine_id: String,
    /// Read back from the kernel.
    pub hostname: String,
    /// Processes that ran in the workload cgroup since it was frozen: must be 0.
    pub workload_ran: u64,
}

/// State of a guest that is ready to be made a template.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Quiesced {
    /// The workload cgroup reports frozen.
    pub frozen: bool,
    /// Streams open besides this call and the event stream.
    pub open_streams: u32,
    /// Whether a secret was ever given to this machine.
    pub secret_issued: bool,
    /// Whether a job's command ever ran in this machine.
    pub job_ran: bool,
}

/// Which disk to mount, and how.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// Serial of the disk (see `DiskRole::serial`). The guest waits for it to appear.
    pub serial: String,
    /// Mount read-only.
    pub read_only: bool,
    /// Make an ext4 filesystem when the disk is blank.
    pub format_blank: bool,
    /// How long to wait for the disk, in milliseconds.
    pub timeout_ms: u64,
    /// Instead of a disk: memory of this many bytes at the place of the disk's role, gone when it is unmounted.
    /// 0 means the disk.
    #[serde(default)]
    pub memory_bytes: u64,
}

/// Where a disk was mounted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mounted {
    /// Path in the guest.
    pub path: String,
    /// Bytes the filesystem has.
    pub bytes_total: u64,
    /// Bytes free.
    pub bytes_free: u64,
}

/// How BuildKit is started.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct BuildkitConfig {
    /// Memory limit of all RUN steps together, bytes; 0 means what the workload has less a reserve.
    pub step_memory_max: u64,
    /// Process limit of all RUN steps together.
    pub step_pids_max: u64,
    /// Bytes BuildKit may keep on its disk; 0 means three quarters of it.
    pub cache_bytes_max: u64,
    /// Bytes of each step's output that are passed on; 0 means all. The rest is read and dropped in the guest.
    #[serde(default)]
    pub step_log_bytes_max: u64,
    /// Start the program only, and have it wait for another such order, with the state disk mounted. For templates. A guest of an
    /// earlier kiln does not know this, and refuses for want of the disk.
    #[serde(default)]
    pub wait_for_disk: bool,
}

/// Places a tree or file may be put. Never a path of the host's or the tenant's choosing.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "place")]
pub enum Place {
    /// The build context of an image build: a fresh directory `name` on the state disk or scratch disk.
    Context {
        /// Lower-case letters, digits and hyphens.
        name: String,
    },
    /// The Dockerfile directory of an image build.
    Dockerfile {
        /// See `Context`.
        name: String,
    },
    /// Working directory of a command (`/work`).
    Work,
    /// A layer of an image being unpacked on the scratch disk; tar with OCI whiteouts.
    ImageLayer {
        /// Position from the bottom, 0 first.
        index: u32,
    },
    /// A secret: kept on a tmpfs that is never swapped. Only as a file.
    Secret {
        /// Its id.
        id: String,
    },
    /// The operator's CA bundle (PEM). Only as a file. Empty bytes remove it.
    CaBundle,
}

/// A tree that follows as a tar stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PutTree {
    /// Where to.
    #[serde(flatten)]
    pub place: Place,
    /// Most bytes of file content.
    pub bytes_max: u64,
    /// Most entries.
    pub entries_max: u64,
}

/// One file that follows as bytes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PutFile {
    /// Where to.
    #[serde(flatten)]
    pub place: Place,
    /// Most bytes.
    pub bytes_max: u64,
}

/// What arrived.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TreeReport {
    /// Path in the guest.
    pub path: String,
    /// Entries made.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
}

/// A tree to send to the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GetTree {
    /// Absolute path in the guest.
    pub path: String,
    /// Most bytes of file content.
    pub bytes_max: u64,
    /// Most entries.
    pub entries_max: u64,
}

/// A command to run.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Command and arguments; the command is looked up in PATH when it has no slash.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory; empty means `/`.
    #[serde(default)]
    pub cwd: String,
    /// User and group; root when absent.
    #[serde(default)]
    pub user: Option<ExecUser>,
    /// A terminal of this size.
    #[serde(default)]
    pub tty: Option<TtySize>,
    /// Standard input is connected; else `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Runs kiln's own tool (BuildKit's client), not a job's command.
    #[serde(default)]
    pub trusted: bool,
    /// The group is killed after this many milliseconds; 0 means never.
    #[serde(default)]
    pub timeout_ms: u64,
    /// Bytes of memory of its own cgroup; 0 means the workload's limit.
    #[serde(default)]
    pub memory_max: u64,
    /// Processes of its own cgroup; 0 means the workload's limit.
    #[serde(default)]
    pub pids_max: u64,
    /// Output beyond this many bytes (both streams together) is dropped and counted; 0 means no bound in the guest.
    #[serde(default)]
    pub output_bytes_max: u64,
}

/// A user by numbers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExecUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A signal for a command's process group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Signal {
    /// Number as Linux on x86-64 has it.
    pub number: i32,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TtySize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// How a command ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, when it exited.
    pub code: Option<i32>,
    /// Signal, when one ended it.
    pub signal: Option<i32>,
    /// A process of it was killed because memory ran out; for a trusted command, also one of what it set to work meanwhile
    /// (BuildKit's steps).
    pub oom: bool,
    /// Its deadline had passed.
    pub timed_out: bool,
    /// CPU time in user mode, milliseconds.
    pub user_ms: u64,
    /// CPU time in the kernel, milliseconds.
    pub system_ms: u64,
    /// Peak memory in bytes, by its cgroup.
    pub memory_peak: u64,
    /// Bytes of output that were dropped by `output_bytes_max`.
    pub output_dropped: u64,
}

/// Connect to a port inside the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Forward {
    /// TCP port on the guest's loopback.
    pub port: u16,
}

/// The guest asks for a connection to a name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Connect {
    /// Host name as the guest's DNS gave it a synthetic address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// Whether a connection was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum ConnectReply {
    /// Raw bytes follow.
    Connected,
    /// It was not.
    Refused {
        /// One sentence.
        reason: String,
    },
}

/// Places for SSH agents in a machine.
pub const SSH_AGENTS_MAX: u8 = 4;

/// Where the guest offers the agent of a place, once BuildKit asks for it. No step sees this path.
#[must_use]
pub fn ssh_agent_socket(place: u8) -> String {
    format!("/run/kiln/ssh/{place}.sock")
}

/// The guest passes on a connection to an SSH agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SshAgent {
    /// Which of them, below [`SSH_AGENTS_MAX`].
    pub place: u8,
}

/// The guest asks whether a name exists.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resolve {
    /// Host name.
    pub host: String,
}

/// Answer to a [`Resolve`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ResolveReply {
    /// Whether the guest may give it a synthetic address.
    pub known: bool,
}

/// Something that happened in the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum GuestEvent {
    /// The kernel killed a process for memory.
    OomKill {
        /// Cgroup path below the workload's.
        cgroup: String,
        /// Kills so far.
        count: u64,
    },
    /// A line of the guest's own log.
    Log {
        /// `error`, `warn`, `info` or `debug`.
        level: String,
        /// What it says.
        message: String,
    },
    /// An event of a newer guest.
    #[serde(other)]
    Unknown,
}

/// Resource use of a machine, as its kernel tells it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MachineStats {
    /// Bytes of memory in use by the workload.
    pub memory_bytes: u64,
    /// Peak of it.
    pub memory_peak: u64,
    /// CPU time of the workload, milliseconds.
    pub cpu_ms: u64,
    /// OOM kills in the workload.
    pub oom_kills: u64,
    /// Bytes free on the state disk, when mounted.
    pub state_bytes_free: u64,
    /// Bytes free on the scratch disk, when mounted.
    #[serde(default)]
    pub scratch_bytes_free: Option<u64>,
    /// Processes that were refused because the workload had as many as it may.
    #[serde(default)]
    pub processes_refused: u64,
    /// How many it may have.
    #[serde(default)]
    pub processes_max: u64,
    /// What lies in memory instead of on a disk and is full: the place, and the bytes that it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_memory: Option<FullMemory>,
}

/// Files in memory that take no more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FullMemory {
    /// Where they are in the machine.
    pub path: String,
    /// All that may lie there, bytes.
    pub bytes_total: u64,
}

/// What is needed to run a container image whose root filesystem lies on the image disk.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Command line: entrypoint and command already joined by the host.
    pub argv: Vec<String>,
    /// The whole environment, `KEY=VALUE`.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// User as the image config has it: `name`, `uid`, `name:group`, `uid:gid`, or empty for root.
    pub user: String,
    /// A terminal.
    pub tty: bool,
    /// Host name inside.
    pub hostname: String,
    /// Ids of secrets that were put before: files of its user alone below `/run/secrets`, in memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// It has the tree of [`Place::Work`] at `/work`, as its user's own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub work: bool,
    /// It goes on with the files of the container before it, as that one left them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
    /// It is a service, on the disk of this place (see `DiskRole::service`); 0 is the command's own container.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub place: u8,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
fn is_zero(number: &u8) -> bool {
    *number == 0
}
