//! Words of the verbs by which operators say what holds for all, what is kept, and who did what.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::OwnerArgs;
use super::fleet::{Bound, parse_bound, parse_life};

/// Verbs of `kiln scheduler`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln scheduler show\n  kiln scheduler set --running 200\n  kiln scheduler set --filling pack\n\n\
It is kept in the database: all controllers of an installation decide by it, from their next decision on."
)]
pub(crate) enum SchedulerCommand {
    /// Show what holds for the whole installation
    Show,
    /// Bound all running jobs, and say how hosts are filled
    Set {
        /// Most jobs that have a worker, of all tenants and queues; none for no bound
        #[arg(long, value_name = "N|none", value_parser = parse_bound)]
        running: Option<Bound>,
        /// How hosts are filled
        #[arg(long)]
        filling: Option<FillingText>,
    },
}

/// How hosts are filled.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FillingText {
    /// The emptiest first: the fastest jobs
    Spread,
    /// The fullest first: hosts become empty and can be switched off
    Pack,
}

/// Verbs of `kiln tenant retention`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln tenant retention show acme\n  kiln tenant retention set acme --hot 7d --warm 90d --dry-run\n  kiln tenant retention set acme --hot 7d --warm 90d\n  \
kiln tenant retention plan\n  kiln tenant retention reset acme\n\n\
Times count from a job's end. Hot: at hand. After warm, its log, artifacts and events go; after cold, nothing of it stays.\n\
A sweep takes what is due once an hour. What is on hold stays: `kiln hold`."
)]
pub(crate) enum RetentionCommand {
    /// Show how long a tenant's finished jobs are kept
    Show {
        /// Its name
        name: String,
    },
    /// Keep a tenant's finished jobs in another way than everybody's
    Set {
        /// Its name
        name: String,
        /// The rule
        #[command(flatten)]
        rule: RetentionArgs,
        /// Change nothing; print what would go
        #[arg(long)]
        dry_run: bool,
    },
    /// Keep a tenant's finished jobs as everybody's again
    Reset {
        /// Its name
        name: String,
        /// Change nothing; print what would go
        #[arg(long)]
        dry_run: bool,
    },
    /// Print what the next sweep takes, and change nothing
    Plan {
        /// Of this tenant; of all without
        name: Option<String>,
    },
}

/// How long finished jobs are kept.
#[derive(Args, Debug)]
#[group(required = true, multiple = true)]
pub(crate) struct RetentionArgs {
    /// At hand for so long, for example 30d
    #[arg(long, value_name = "TIME", value_parser = parse_life)]
    pub hot: Option<Duration>,
    /// Log, artifacts and events for so long
    #[arg(long, value_name = "TIME", value_parser = parse_life)]
    pub warm: Option<Duration>,
    /// The record for so long
    #[arg(long, value_name = "TIME", value_parser = parse_life)]
    pub cold: Option<Duration>,
}

/// Verbs of `kiln hold`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln hold set b1m7z8 --reason \"case 2031-7\"\n  kiln hold set --tenant acme --reason \"case 2031-7\"\n  kiln hold list\n  kiln hold clear b1m7z8\n\n\
For admins and the security role. What is on hold stays whatever its age: records, logs, artifacts, and uploads that are still there."
)]
pub(crate) enum HoldCommand {
    /// Put a job, or everything of a tenant, on hold
    Set {
        /// What
        #[command(flatten)]
        what: HeldArgs,
        /// Why, for whoever asks later
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// End a hold
    Clear {
        /// What
        #[command(flatten)]
        what: HeldArgs,
    },
    /// List what is on hold
    List,
}

/// What is held.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct HeldArgs {
    /// This job
    #[arg(value_name = "JOB")]
    pub job: Option<String>,
    /// Everything of this tenant
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
}

/// Verbs of `kiln image`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln image list\n  kiln image rm shop:1.4\n\n\
Images of the server that --server, KILN_SERVER or kiln.toml names, else of this home's controller; those of this host's own commands: `kiln registry list`."
)]
pub(crate) enum StoredImageCommand {
    /// List the images that a server keeps for a tenant
    List {
        /// Whose they are
        #[command(flatten)]
        owner: OwnerArgs,
    },
    /// Take names of images away, and an image with its last name; its bytes go with the server's next sweep
    Rm {
        /// NAME:TAG
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Whose they are
        #[command(flatten)]
        owner: OwnerArgs,
    },
}

/// Verbs of `kiln audit`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln audit list\n  kiln audit list --verdict refused --since 1d\n  kiln audit list --actor kst-4f2a --action job:cancel\n  kiln audit list --all --oldest --json > audit.jsonl\n\n\
For admins and the security role. Every attempt is a row, allowed or refused."
)]
pub(crate) enum AuditCommand {
    /// List who asked for what, and what the server said, newest first
    List(AuditArgs),
}

/// Which rows.
#[derive(Args, Debug)]
pub(crate) struct AuditArgs {
    /// Of this tenant; of all you may see without
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// Of actors whose name has this in it: a token's id, a user, a worker
    #[arg(long, value_name = "TEXT")]
    pub actor: Option<String>,
    /// Of this action, for example job:cancel
    #[arg(long, value_name = "ACTION")]
    pub action: Option<String>,
    /// Only what was allowed, or only what was refused
    #[arg(long, value_name = "allowed|refused", value_parser = ["allowed", "refused"])]
    pub verdict: Option<String>,
    /// From then on: so long ago (2h, 7d), or a time as 2031-05-04T13:00:00Z
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    pub since: Option<Moment>,
    /// Until then, written alike
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    pub until: Option<Moment>,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 50, conflicts_with = "all")]
    pub limit: usize,
    /// All of them
    #[arg(long)]
    pub all: bool,
    /// Oldest first
    #[arg(long)]
    pub oldest: bool,
}

/// A moment, as it was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Moment {
    /// So long ago.
    Ago(Duration),
    /// Milliseconds since the Unix epoch.
    At(u64),
}

fn parse_moment(text: &str) -> Result<Moment, String> {
    if let Ok(ago) = parse_life(text) {
        return Ok(Moment::Ago(ago));
    }
    let at: Option<jiff::Timestamp> = text.parse().ok();
    let at = at.and_then(|at| u64::try_from(at.as_millisecond()).ok());
    at.map(Moment::At).ok_or_else(|| {
        format!("{text:?} is neither a time ago, as 2h, nor a moment, as 2031-05-04T13:00:00Z")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments() {
        let ago = Moment::Ago(Duration::from_secs(7200));
        assert_eq!(parse_moment("2h"), Ok(ago));
        assert_eq!(parse_moment("1970-01-01T00:00:01Z"), Ok(Moment::At(1000)));
        assert!(
            parse_moment("yesterday").is_err() && parse_moment("1969-01-01T00:00:00Z").is_err()
        );
    }
}
