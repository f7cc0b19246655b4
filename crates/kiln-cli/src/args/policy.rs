//! `kiln policy` and `kiln init`, as clap sees them.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::RunArgs;

/// Verbs of `kiln policy`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln policy check\n  kiln policy show --json\n  kiln policy explain registry.example.org:443"
)]
pub(crate) enum PolicyCommand {
    /// Read a policy and say what is wrong with it
    #[command(
        after_help = "Examples:\n  kiln policy check\n  kiln policy check app/kiln.yaml\n\nExit codes: 0 it can be used as it is, 2 it cannot be read, 4 the operator does not grant what it asks for, this host does not have it, or no run can be held to it."
    )]
    Check {
        /// The policy, or a folder that it holds in
        #[arg(default_value = ".", value_name = "DIR|FILE")]
        at: PathBuf,
    },
    /// Print what holds: the policy, narrowed by the operator's grant, and its hash
    #[command(
        after_help = "Examples:\n  kiln policy show\n  kiln policy show --json | jq -r .hash"
    )]
    Show {
        /// The policy, or a folder that it holds in
        #[arg(default_value = ".", value_name = "DIR|FILE")]
        at: PathBuf,
    },
    /// Say whether a destination may be reached, which line decides, and who wrote it
    #[command(
        after_help = "Examples:\n  kiln policy explain api.example.org\n  kiln policy explain db.example.org:5432 --phase run\n\nExit codes: 0 it may be reached, 4 it may not."
    )]
    Explain {
        /// The destination; without a port 443
        #[arg(value_name = "HOST[:PORT]")]
        destination: String,
        /// In which phase
        #[arg(long, default_value = "run")]
        phase: PhaseArg,
        /// The policy, or a folder that it holds in
        #[arg(long, default_value = ".", value_name = "DIR|FILE")]
        from: PathBuf,
    },
    /// Run a command that may reach every name, print what it reached, and write it into the policy
    ///
    /// The operator grants it: `learn = true` in policy.toml. Addresses below the floor stay closed, and no secret goes into the machine.
    #[command(
        after_help = "Examples:\n  kiln policy learn -- npm ci\n  kiln policy learn --write -- npm ci\n  kiln policy learn --write --yes --image shop:1.4 -- make deps\n\nA command that fails writes nothing; its exit code is passed on. Run it again with `kiln run`: the policy holds then."
    )]
    Learn(Box<LearnArgs>),
    /// Print the JSON Schema of a policy file, for editors
    Schema {
        /// Of cleanroom.yaml instead of kiln.yaml
        #[arg(long)]
        cleanroom: bool,
    },
}

/// Options of `kiln policy learn`.
#[derive(Args, Debug)]
pub(crate) struct LearnArgs {
    /// Write it into the folder's kiln.yaml after showing the difference
    #[arg(long)]
    pub write: bool,
    /// Write without asking
    #[arg(long, requires = "write")]
    pub yes: bool,
    /// The command and how it runs
    #[command(flatten)]
    pub run: RunArgs,
}

/// A phase's name.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PhaseArg {
    /// The source is fetched.
    Checkout,
    /// What the project needs is installed.
    Dependencies,
    /// Services of the job are started.
    Services,
    /// The job's own command.
    Run,
}

/// Options of `kiln init`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  kiln init\n  kiln init app --force")]
pub(crate) struct InitArgs {
    /// The folder
    #[arg(default_value = ".")]
    pub dir: PathBuf,
    /// Replace a policy that is there, or write one below a folder whose policy holds already
    #[arg(long)]
    pub force: bool,
}

/// What a run may reach, in one word.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetArg {
    /// Nothing.
    Isolated,
    /// What --allow names and nothing else.
    Egress,
    /// Every name; needs the operator's grant.
    Open,
    /// As open, and what it reached is printed as an allowlist; needs a grant of its own.
    Learn,
}
