//! Words of the verbs about kept machines.

use std::time::Duration;

use clap::{Args, Subcommand};
use kiln_core::MachineName;
use kiln_worker::kept::STAYS_MAX;

use super::parse_duration;

/// How a kept machine is named: shown by `kiln machine list`, or a beginning of that.
type Id = String;

/// Verbs of `kiln machine`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln run --keep -- make test\n  kiln machine list\n  kiln machine show r0abc\n  kiln machine rm --all\n\nID is what `kiln machine list` shows, or a beginning of it that no other has. Docs: docs/guides/kept-machines.md."
)]
pub(crate) enum MachineCommand {
    /// List kept machines
    List,
    /// Show one: what ran in it, until when it stays, what it reached
    #[command(
        after_help = "Examples:\n  kiln machine show r0abc\n  kiln machine show r0abc --json"
    )]
    Show {
        /// Which
        id: Id,
    },
    /// Let machines power off, then remove them
    #[command(after_help = "Examples:\n  kiln machine stop r0abc")]
    Stop {
        /// Which
        #[arg(required = true, value_name = "ID")]
        ids: Vec<Id>,
    },
    /// Remove machines at once
    #[command(after_help = "Examples:\n  kiln machine rm r0abc\n  kiln machine rm --all")]
    Rm {
        /// Which
        #[arg(required_unless_present = "all", value_name = "ID")]
        ids: Vec<Id>,
        /// All of this home
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
    /// Print the end of a machine's console, or what was done through its keeper
    #[command(
        after_help = "Examples:\n  kiln machine logs r0abc\n  kiln machine logs r0abc --keeper\n\nThe command's own output is the job's: kiln job logs ID."
    )]
    Logs {
        /// Which
        id: Id,
        /// What was done: commands, copies, refusals; one JSON line each
        #[arg(long)]
        keeper: bool,
    },
    /// Show what a machine uses of this host
    #[command(after_help = "Examples:\n  kiln machine stats r0abc")]
    Stats {
        /// Which
        id: Id,
    },
    /// End a machine, or a job that runs, at once because of what it did, and keep what tells of it
    #[command(
        after_help = "Examples:\n  kiln machine kill r0abc --incident\n  kiln machine kill r0abc --incident=\"scanned the network\"\n\nRecord, console, log and egress stay below incidents/ in kiln's data directory. Everything the machine\ncould act with ends. Exit codes: 0 it is gone and all of that is kept, 3 one of both failed."
    )]
    Kill {
        /// Which
        id: Id,
        /// Keep record, console and logs; with some words why
        #[arg(long, required = true, value_name = "WHY", num_args = 0..=1, require_equals = true, default_missing_value = "")]
        incident: String,
    },
}

/// Options of `kiln keep-machine`.
#[derive(Args, Debug)]
pub(crate) struct KeepMachineArgs {
    /// Remove this machine when whoever holds the other end of standard input is gone, instead of keeping one
    #[arg(long, value_name = "MACHINE")]
    pub watch: Option<MachineName>,
    /// End whoever keeps it after this many milliseconds, too
    #[arg(long, value_name = "MS", requires = "watch")]
    pub for_ms: Option<u64>,
}

/// Options of `kiln exec`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln exec r0abc -- ls -l /tmp\n  kiln exec -t -e LOG=debug r0abc -- sh\n  tar c . | kiln exec -i r0abc -- tar x -C /tmp\n\nThe exit code is the command's own. Ctrl-C reaches the command; killing `kiln exec` ends it."
)]
pub(crate) struct ExecArgs {
    /// Which kept machine
    pub id: Id,
    /// Environment variable; KEY alone takes the value from the environment
    #[arg(short, long = "env", value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Give it a terminal, and this one's input
    #[arg(short, long)]
    pub tty: bool,
    /// Connect standard input (the default when it is not a terminal, or with --tty)
    #[arg(short, long)]
    pub interactive: bool,
    /// Directory to start in, in the machine
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Options of `kiln console`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln console r0abc\n  kiln console r0abc -- bash -l\n\nCtrl-] twice leaves; the shell ends with it, the machine stays. Everything else reaches the machine, and what it\nprints reaches your terminal unchanged: do not stand in a machine you would not let write to your terminal."
)]
pub(crate) struct ConsoleArgs {
    /// Which kept machine
    pub id: Id,
    /// Environment variable; KEY alone takes the value from the environment
    #[arg(short, long = "env", value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// What to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Options of `kiln cp`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln cp r0abc:/root/report.xml .\n  kiln cp ./fixtures r0abc:/root/\n\nPaths in the machine are below its root. What comes out of a machine is never written through a link, nor over a folder\nthat is there; devices, absolute names and `..` are refused, links that lead out of the copy are left out."
)]
pub(crate) struct CpArgs {
    /// ID:PATH, or a file or folder of this host
    pub source: String,
    /// ID:PATH, or where to on this host
    pub dest: String,
}

/// Options of `kiln port-forward`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln port-forward r0abc 8080:3000\n  kiln port-forward r0abc 0.0.0.0:8080:3000 5432:5432\n\nUntil Ctrl-C. Addresses are loopback unless you name another."
)]
pub(crate) struct ForwardArgs {
    /// Which kept machine
    pub id: Id,
    /// Ports: HOST:GUEST or ADDRESS:HOST:GUEST
    #[arg(required = true, value_name = "HOST:GUEST")]
    pub ports: Vec<String>,
}

/// How long a machine stays: as [`parse_duration`], and not beyond the longest.
pub(crate) fn parse_stays(text: &str) -> Result<Duration, String> {
    let asked = parse_duration(text)?;
    match asked <= STAYS_MAX {
        true => Ok(asked),
        false => Err(format!(
            "a machine stays for at most {}h",
            STAYS_MAX.as_secs() / 3600
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_machine_stays_longer_than_a_day() {
        assert_eq!(parse_stays("24h"), Ok(STAYS_MAX));
        assert!(parse_stays("25h").is_err_and(|error| error.contains("at most 24h")));
        assert!(parse_stays("0").is_err());
    }
}
