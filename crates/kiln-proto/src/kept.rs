//! Machines that are kept: what is known of one, and what is said on its keeper's socket, one connection per question. Same program on both ends,
//! but not always the same version. Between a person and a machine that a worker keeps lies a controller: it reads the question, whether that person
//! may ask it, and passes everything else on.
//!
//! ```text
//! asker:  Ask (message)                      keeper:  Answer (message)
//! after Begins, by kind of question:
//!   exec     chunks of [`crate::msg::chunk`], both ways, as the guest and a host exchange them
//!   tree     keeper to asker: chunks DATA, then one END or FAILED
//!   forward  raw bytes, both ways, each direction to its own end
//!   attend   chunks of [`attend`], both ways
//! ```
//!
//! `attend`, and `forward` beside it, are asked of a machine whose command has not ended, by whoever submitted its job; everything else of one
//! that is kept.

use kiln_core::{ByteSize, ImageRef, JobId, MachineName, NetworkPolicy, TenantName, WorkerId};
use serde::{Deserialize, Serialize};

use crate::msg::{MachineStats, TtySize};

/// Most bytes of a question or an answer.
pub const MESSAGE_BYTES_MAX: usize = 512 * 1024;

/// Chunks of a tree on its way to the asker.
pub mod tree {
    /// Bytes of the tar stream.
    pub const DATA: u8 = 1;
    /// It is whole.
    pub const END: u8 = 2;
    /// It is not: why, as text.
    pub const FAILED: u8 = 3;
}

/// Chunks between whoever attends a command and its worker. The attender never waits for the command: it sends no more of standard input than it
/// was given room for, so its signals, and its end, are always heard.
pub mod attend {
    /// Bytes of standard input that may be on their way before the worker gave room for more.
    pub const STDIN_ROOM: usize = 256 * 1024;
    /// How often an attender says that it is there.
    pub const ALIVE_EVERY: std::time::Duration = std::time::Duration::from_secs(10);
    /// An attender that said nothing for so long is gone.
    pub const SILENCE_MAX: std::time::Duration = std::time::Duration::from_secs(60);

    /// To the worker: bytes for standard input (or the terminal).
    pub const STDIN: u8 = 1;
    /// To the worker: standard input ends.
    pub const STDIN_END: u8 = 2;
    /// To the worker: JSON [`crate::msg::Signal`], for the process group.
    pub const SIGNAL: u8 = 3;
    /// To the worker: JSON [`crate::msg::TtySize`].
    pub const RESIZE: u8 = 4;
    /// To the worker: the attender is there.
    pub const ALIVE: u8 = 5;
    /// To the attender: bytes of standard output (or the terminal).
    pub const STDOUT: u8 = 16;
    /// To the attender: bytes of standard error.
    pub const STDERR: u8 = 17;
    /// To the attender: so many more bytes of standard input may be sent, 4 bytes little-endian.
    pub const ROOM: u8 = 18;
    /// To the attender: nothing more comes. How the command ended is the job's to say.
    pub const OVER: u8 = 19;
}

/// A question.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum Ask {
    /// How it stands.
    Show,
    /// What it uses.
    Stats,
    /// The end of its console.
    Console,
    /// Run a command.
    Exec(ExecAsk),
    /// Send a file or folder.
    Tree {
        /// Absolute path, as commands in the machine see it.
        path: String,
    },
    /// Connect to a port of it.
    Forward {
        /// Which.
        port: u16,
    },
    /// Hold the streams of its command, which begins then.
    Attend {
        /// Size of the terminal, where the command gets one.
        tty: Option<TtySize>,
    },
    /// Let its guest power off, then remove it.
    Stop,
    /// Remove it at once.
    Remove,
    /// Remove it at once, and keep what tells of it.
    Incident {
        /// The user's words.
        note: String,
    },
}

/// A command for a kept machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExecAsk {
    /// Command and arguments.
    pub argv: Vec<String>,
    /// Environment beyond what every command has.
    pub env: Vec<(String, String)>,
    /// Working directory; empty means where the first command ran.
    pub cwd: String,
    /// A terminal of this size.
    pub tty: Option<TtySize>,
    /// Standard input is connected.
    pub stdin: bool,
    /// In the machine itself, also when it runs an image.
    pub in_machine: bool,
}

/// An answer.
pub type Answer = Result<Reply, Refused>;

/// What a keeper answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// To [`Ask::Show`].
    Shown(Box<Status>),
    /// To [`Ask::Stats`].
    Used(Used),
    /// To [`Ask::Console`]: hostile text.
    Text {
        /// The text.
        text: String,
    },
    /// What was asked begins.
    Begins,
    /// It is gone.
    Gone {
        /// What could not be removed.
        leaks: Vec<String>,
        /// Where what tells of it was put.
        incident: Option<std::path::PathBuf>,
    },
}

/// How a kept machine stands.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// What is known of it.
    #[serde(flatten)]
    pub facts: Facts,
    /// Milliseconds that are left.
    pub left_ms: u64,
    /// Questions that are being answered, this one not counted.
    pub busy: usize,
    /// Where files of its commands lie in the machine; empty when that is the machine's own root.
    pub root: String,
    /// What it reached and was refused since its command ended, in one line.
    pub egress: String,
}

/// What a kept machine uses.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Used {
    /// Resident bytes of its VMM.
    pub rss: u64,
    /// Proportional bytes of its VMM.
    pub pss: u64,
    /// CPU time of its VMM, milliseconds.
    pub cpu_ms: u64,
    /// What its guest says: a claim.
    pub guest: Option<MachineStats>,
}

/// Why a keeper does not do what it was asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// One sentence.
    pub message: String,
    /// The question was wrong; else something failed.
    pub usage: bool,
}

impl Refused {
    /// The question was wrong.
    #[must_use]
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            usage: true,
        }
    }

    /// Something failed.
    #[must_use]
    pub fn failed(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            usage: false,
        }
    }
}

/// What a keeper has to know of a machine whose command is over. Holds no secret: what the command was given by `-e` is not in it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Handover {
    /// Version of this.
    pub schema: u32,
    /// The machine.
    pub machine: MachineName,
    /// The job that it was made for.
    pub job: JobId,
    /// Whose it is.
    pub tenant: TenantName,
    /// The image it runs, if it does.
    pub image: Option<ImageRef>,
    /// The command line; empty when there was none, or the image's own.
    pub command: Vec<String>,
    /// How the command ended, for a person.
    pub ended: String,
    /// Its exit code, as a shell has it.
    pub exit_code: Option<i32>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// What it may reach, as before.
    pub network: NetworkPolicy,
    /// Bytes a second, out and in; none means no bound.
    pub bytes_out_and_in_per_second: [Option<std::num::NonZeroU64>; 2],
    /// Connections at once; none means the gateway's own bound.
    pub connections_max: Option<u32>,
    /// The program that runs containers in the machine, when it runs an image.
    pub runc: Option<String>,
    /// Where its command began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Variables of its command that were secrets: nobody who comes later has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secret_env: Vec<String>,
    /// Its command had secrets, be it as files.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub had_secrets: bool,
    /// Milliseconds for which it stays.
    pub stays_ms: u64,
    /// The worker that keeps it, in its own process: it is not ended by ending its keeper. None: a keeper of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerId>,
}

/// What is known of a kept machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// What it was when its command ended.
    #[serde(flatten)]
    pub machine: Handover,
    /// The user who owns it.
    pub uid: u32,
    /// Its keeper.
    pub pid: u32,
    /// The keeper's version.
    pub version: String,
    /// Since when it is kept, milliseconds since the Unix epoch.
    pub since_unix_ms: u64,
    /// Until when, milliseconds since the Unix epoch. The time that is left is measured on the host's boot clock.
    pub until_unix_ms: u64,
}

impl Facts {
    /// The short name by which people call it: its job's.
    #[must_use]
    pub fn id(&self) -> &str {
        self.machine.job.as_str()
    }
}
