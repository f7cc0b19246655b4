//! What is said on a keeper's socket: one connection per question. Same program on both ends, but not always the same version.
//!
//! ```text
//! asker:  Ask (message)                      keeper:  Answer (message)
//! after Begins, by kind of question:
//!   exec     chunks of `kiln_proto::msg::chunk`, both ways, as the guest and a host exchange them
//!   tree     keeper to asker: chunks DATA, then one END or FAILED
//!   forward  raw bytes, both ways, each direction to its own end
//! ```

use kiln_proto::msg::{MachineStats, TtySize};
use serde::{Deserialize, Serialize};

use super::Facts;

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
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            usage: true,
        }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            usage: false,
        }
    }
}
