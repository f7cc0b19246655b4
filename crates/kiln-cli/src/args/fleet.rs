//! Words of the verbs that make or ask a server.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::TypedValueParser as _;
use clap::{Args, Subcommand};

use super::operators::RetentionCommand;
use super::parse_duration;

/// Where the server is.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct ServerArgs {
    /// Server to use instead of this host: https://HOST:PORT, or unix:PATH; also [server] url in kiln.toml
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "KILN_SERVER",
        hide_env_values = true
    )]
    pub server: Option<String>,
    /// Authority that signed the server's certificate, PEM; also [server] ca in kiln.toml
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "KILN_CA",
        hide_env_values = true,
        // Empty is as good as unset, as it is for the other variables.
        value_parser = clap::builder::OsStringValueParser::new().map(PathBuf::from)
    )]
    pub ca: Option<PathBuf>,
}

/// How a job is queued.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Queue")]
pub(crate) struct QueueingArgs {
    /// Disk its machine may fill, for example 10G
    #[arg(long, value_name = "SIZE")]
    pub disk: Option<kiln_core::ByteSize>,
    /// Queue to wait in
    #[arg(long, value_name = "NAME")]
    pub queue: Option<String>,
    /// Order there, -100 (last) to 100 (first); with a server at most what the token allows
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub priority: Option<i16>,
    /// At most one job of this group runs at a time
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    /// Label for lists and filters; may be given more than once
    #[arg(long = "label", value_name = "LABEL=VALUE")]
    pub labels: Vec<String>,
    /// Print the job's id and do not wait for its end
    #[arg(long, help_heading = WITH_A_SERVER)]
    pub detach: bool,
    /// Label its worker must have; may be given more than once
    #[arg(long = "require", value_name = "LABEL=VALUE", help_heading = WITH_A_SERVER)]
    pub require: Vec<String>,
    /// For which tenant; the token's own without
    #[arg(long, value_name = "NAME", help_heading = WITH_A_SERVER)]
    pub tenant: Option<String>,
    /// Where webhooks about it go
    #[arg(long, value_name = "URL", help_heading = WITH_A_SERVER)]
    pub notify_url: Option<String>,
}

/// Heading of options that mean nothing without a server.
const WITH_A_SERVER: &str = "With a server";

/// Verbs of `kiln job`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln job list\n  kiln job show\n  kiln job logs --follow b1m7\n  kiln job why b1m7\n  kiln job artifacts r1m7 --all\n\nJobs of the server that --server, KILN_SERVER or kiln.toml names, else of this home."
)]
pub(crate) enum JobCommand {
    /// List jobs, newest first
    List {
        /// How many
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// Which jobs
        #[command(flatten)]
        filter: JobFilterArgs,
    },
    /// Show one job
    Show {
        /// Its id, or the beginning of it; the newest job without
        id: Option<String>,
    },
    /// Print a job's log; with --json its events
    Logs {
        /// Its id, or the beginning of it; the newest job without
        id: Option<String>,
        /// Go on until the job ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Stop jobs; those that wait never begin
    Cancel {
        /// Their ids, or the beginnings of them
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
        /// Why, in a few words
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Queue a server's finished job again, as a new one; run a command of this home again, here
    #[command(
        after_help = "Examples:\n  kiln job retry r1m7\n  kiln job retry r1m7 --shell\n\nA command that ran without a server is run again in front of you, with the same words, environment, limits and network,\nas a new job. What nobody kept (standard input, ports, a build's folder and secrets), and a folder that has changed, is refused, with the command to type."
    )]
    Retry {
        /// Its id, or the beginning of it
        id: String,
        /// In a terminal, stand in the machine when the command fails again
        #[arg(long)]
        shell: bool,
    },
    /// Show what a job reached and was refused, by rule, with bytes
    #[command(after_help = "Examples:\n  kiln job egress\n  kiln job egress r1m7 --json")]
    Egress {
        /// Its id, or the beginning of it; the newest job without
        id: Option<String>,
    },
    /// List the files that a job left, or fetch them
    #[command(
        after_help = "Examples:\n  kiln job artifacts\n  kiln job artifacts r1m7\n  kiln job artifacts r1m7 out/report.xml\n  kiln job artifacts r1m7 --all -o results\n\nA fetch that broke off goes on where it was when it is asked for again; what came is checked by its digest. Files that have\nthe same name below DIR are replaced, links there are not followed."
    )]
    Artifacts {
        /// Its id, or the beginning of it; the newest job without
        id: Option<String>,
        /// Fetch these
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Fetch all
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// Where fetched files go, below it by their names
        #[arg(short, long, value_name = "DIR", default_value = ".")]
        output: PathBuf,
    },
    /// Print when everything happened to a job
    Timeline {
        /// Its id, or the beginning of it; the newest job without
        id: Option<String>,
    },
    /// Say why a job has not begun, and when it is expected to
    Why {
        /// Its id, or the beginning of it; the newest job without
        id: Option<String>,
    },
}

/// Which jobs.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Which")]
pub(crate) struct JobFilterArgs {
    /// In these states: queued, leased, running, finished
    #[arg(long, value_name = "STATE,...")]
    pub state: Option<String>,
    /// In this queue
    #[arg(long, value_name = "NAME")]
    pub queue: Option<String>,
    /// Of this tenant
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// With this label
    #[arg(long, value_name = "LABEL=VALUE")]
    pub label: Option<String>,
    /// On this worker, now or last
    #[arg(long, value_name = "NAME")]
    pub worker: Option<String>,
}

/// Verbs of `kiln queue`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln queue list\n  kiln queue pause default --reason \"disks are changed\"\n  kiln queue resume default\n  \
kiln queue create nightly && kiln queue quota nightly --running 2"
)]
pub(crate) enum QueueCommand {
    /// List queues, with what waits and runs in them
    List,
    /// Show one queue and what waits in it
    Show {
        /// Its name
        #[arg(default_value = "default")]
        name: String,
    },
    /// Count what waits, by reason
    Stats,
    /// Let nothing more of a queue begin; what runs goes on
    Pause {
        /// Its name
        name: String,
        /// Why, in a few words
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Let a queue go on
    Resume {
        /// Its name
        name: String,
    },
    /// Make a queue
    Create {
        /// Its name
        name: String,
        /// The workers its jobs may use; the default pool without
        #[arg(long, value_name = "NAME")]
        pool: Option<String>,
    },
    /// Bound how many jobs of a queue run, whoever sent them
    Quota {
        /// Its name
        name: String,
        /// Most jobs that have a worker at a time; none for no bound
        #[arg(long, value_name = "N|none", value_parser = parse_bound)]
        running: Bound,
    },
    /// Set a queue's share against other queues of the same tenant
    Weight {
        /// Its name
        name: String,
        /// 1 to 10000; 100 is usual
        weight: u32,
    },
}

/// Verbs of `kiln worker`.
#[derive(Subcommand, Debug)]
pub(crate) enum WorkerCommand {
    /// List a server's workers
    List {
        /// Of this pool
        #[arg(long, value_name = "NAME")]
        pool: Option<String>,
    },
    /// Show one worker
    Show {
        /// Its name
        name: String,
    },
    /// Let a worker finish what it has and give it no more
    Drain(WorkerStateArgs),
    /// Give a worker jobs again
    Resume(WorkerStateArgs),
    /// Mark a worker unusable; what runs on it goes on
    Cordon(WorkerStateArgs),
    /// Remove a worker for good: its leases and its key are worth nothing from then on
    Remove {
        /// Its name
        name: String,
    },
}

/// Which worker, and why.
#[derive(Args, Debug)]
pub(crate) struct WorkerStateArgs {
    /// Its name
    pub name: String,
    /// Why, in a few words
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Verbs of `kiln tenant`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln tenant create acme --running 8 --pending 500\n  kiln tenant quota acme --burst 4 --reserved 2 --stored 50G\n  kiln tenant weight acme 200\n  kiln tenant quota acme --running none\n  kiln tenant usage acme\n  kiln tenant retention set acme --hot 7d --dry-run"
)]
pub(crate) enum TenantCommand {
    /// Make a tenant
    Create {
        /// Its name
        name: String,
        /// Its bounds
        #[command(flatten)]
        quota: QuotaArgs,
    },
    /// List tenants
    List,
    /// Bound how many jobs of a tenant run and wait, and what is kept of them
    Quota {
        /// Its name
        name: String,
        /// Its bounds
        #[command(flatten)]
        quota: QuotaArgs,
    },
    /// Set a tenant's share against others
    Weight {
        /// Its name
        name: String,
        /// 1 to 10000; 100 is usual
        weight: u32,
    },
    /// Show what a tenant used
    Usage {
        /// Its name
        name: String,
        /// Of the last so many days
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3650))]
        days: u64,
    },
    /// Show and change how long a tenant's finished jobs are kept
    #[command(subcommand)]
    Retention(RetentionCommand),
}

/// Bounds of a tenant.
#[derive(Args, Debug)]
pub(crate) struct QuotaArgs {
    /// Most jobs that have a worker at a time; none for no bound
    #[arg(long, value_name = "N|none", value_parser = parse_bound)]
    pub running: Option<Bound>,
    /// How many more may run while what they use would otherwise be idle
    #[arg(long, value_name = "N")]
    pub burst: Option<u32>,
    /// Running jobs it is sure of: below this it comes first, and others leave as much of the installation's limit
    #[arg(long, value_name = "N")]
    pub reserved: Option<u32>,
    /// Most jobs that wait; none for no bound; 10000 for a new tenant
    #[arg(long, value_name = "N|none", value_parser = parse_bound)]
    pub pending: Option<Bound>,
    /// Most bytes of its uploads and its jobs' requests; none for no bound; 20G for a new tenant
    #[arg(long, value_name = "SIZE|none", value_parser = parse_bytes)]
    pub stored: Option<BytesBound>,
}

/// A number, or no bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bound(pub Option<u32>);

/// Bytes, or no bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct BytesBound(pub Option<u64>);

/// Verbs of `kiln token`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln token create --role developer --tenant acme --description nightly\n  kiln token create --join --label zone=a\n  kiln token revoke kst-4f2a\n\n\
A token is shown once. Commands find theirs in KILN_TOKEN, or in the file `token` in\n\
~/.config/kiln ($KILN_HOME/config), which nobody else may read."
)]
pub(crate) enum TokenCommand {
    /// Make a token, and show it this once
    Create(Box<TokenArgs>),
    /// List tokens
    List,
    /// Make a token worthless, at once and for ever
    Revoke {
        /// Its id
        id: String,
    },
}

/// Options of `kiln token create`.
#[derive(Args, Debug)]
pub(crate) struct TokenArgs {
    /// admin, build-engineer, security, developer or read-only
    #[arg(long, value_name = "ROLE", required_unless_present = "join")]
    pub role: Option<String>,
    /// For which tenant; your own without
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// The only actions it is good for; may be given more than once; all of its role without
    #[arg(long = "scope", value_name = "ACTION")]
    pub scopes: Vec<String>,
    /// Its role reaches beyond its tenant
    #[arg(long)]
    pub operator: bool,
    /// Highest priority its jobs may have
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub priority_max: i16,
    /// Its jobs may be trusted
    #[arg(long)]
    pub trusted: bool,
    /// What it is for
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// How long it lives, for example 12h or 90d (90d; 1h to join)
    #[arg(long, value_name = "TIME", value_parser = parse_life)]
    pub expires: Option<Duration>,
    /// Make a single-use token by which one worker joins
    #[arg(long, conflicts_with_all = ["role", "tenant", "scopes", "operator", "trusted"])]
    pub join: bool,
    /// Pool of the worker that joins
    #[arg(long, value_name = "NAME", requires = "join")]
    pub pool: Option<String>,
    /// Label of the worker that joins; may be given more than once
    #[arg(long = "label", value_name = "LABEL=VALUE", requires = "join")]
    pub labels: Vec<String>,
    /// Tenant whose jobs it may run; may be given more than once; all without
    #[arg(long = "for", value_name = "TENANT", requires = "join")]
    pub tenants: Vec<String>,
}

/// Verbs of `kiln backup`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln backup create /backup/kiln-monday.db\n  kiln backup restore --replace /backup/kiln-monday.db\n\nIt holds the queue, its history, tenants and tokens. Sources, logs, images and keys\n\
are files of the home: copy them after it. A PostgreSQL database has its own tools\n\
(docs/design/state.md)."
)]
pub(crate) enum BackupCommand {
    /// Write a whole copy of the database of this home's server, while it serves
    Create {
        /// Where to; nothing is overwritten
        file: PathBuf,
    },
    /// Put a copy back into this home, while no server runs
    Restore {
        /// The copy
        file: PathBuf,
        /// Put it in the place of the database that is there, which is kept under another name
        #[arg(long)]
        replace: bool,
    },
}

/// Verbs of `kiln webhook`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln webhook create https://hooks.example.org/kiln --kind finished\n  kiln webhook deliveries --dead\n  kiln webhook replay b1m7z8.4.kwh-2f\n\nMessages are signed as Standard Webhooks has it. The secret is shown once, when it is made."
)]
pub(crate) enum WebhookCommand {
    /// Make a webhook, and show its secret this once
    Create {
        /// Where to, https://
        url: String,
        /// Told of this state: queued, leased, running or finished; may be given more than once; of all without
        #[arg(long = "kind", value_name = "STATE")]
        kinds: Vec<String>,
        /// Of this tenant's jobs; your own without
        #[arg(long, value_name = "NAME", conflicts_with = "all_tenants")]
        tenant: Option<String>,
        /// Of every tenant's jobs
        #[arg(long)]
        all_tenants: bool,
    },
    /// List webhooks
    List,
    /// Give a webhook another secret, and show it this once
    Rotate {
        /// Its id
        id: String,
        /// For how long the secret before signs too, so that receivers can change over: at most 7d; 0s when it leaked
        #[arg(long, value_name = "TIME", default_value = "1d", value_parser = parse_overlap)]
        overlap: Duration,
        /// End the overlap of an earlier rotation that still runs
        #[arg(long)]
        end_overlap: bool,
    },
    /// Let a webhook be told again
    Enable {
        /// Its id
        id: String,
    },
    /// Tell a webhook nothing more until it is enabled
    Disable {
        /// Its id
        id: String,
    },
    /// Remove a webhook; what waits for it is not sent
    Remove {
        /// Its id
        id: String,
    },
    /// List messages that wait or were given up
    Deliveries {
        /// Only those that were given up
        #[arg(long)]
        dead: bool,
        /// Only those of this webhook
        #[arg(long, value_name = "ID")]
        webhook: Option<String>,
    },
    /// Send messages that were given up again
    Replay {
        /// Their names; `kiln webhook deliveries --dead` has them
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Show the secret that signs messages to the notify URLs of your tenant's jobs
    NotifySecret,
}

/// A number, or `none`.
pub(super) fn parse_bound(text: &str) -> Result<Bound, String> {
    match text {
        "none" => Ok(Bound(None)),
        text => match text.parse() {
            Ok(number) => Ok(Bound(Some(number))),
            Err(_) => Err(format!("{text:?} is neither a number nor none")),
        },
    }
}

/// A size, or `none`.
fn parse_bytes(text: &str) -> Result<BytesBound, String> {
    match text {
        "none" => Ok(BytesBound(None)),
        text => match text.parse::<kiln_core::ByteSize>() {
            Ok(size) => Ok(BytesBound(Some(size.0))),
            Err(_) => Err(format!("{text:?} is neither a size, as 50G, nor none")),
        },
    }
}

/// As [`parse_life`], and none at all: `0s`.
fn parse_overlap(text: &str) -> Result<Duration, String> {
    match text {
        "0" | "0s" => Ok(Duration::ZERO),
        text => parse_life(text),
    }
}

/// As [`parse_duration`], and days: `90d`.
pub(crate) fn parse_life(text: &str) -> Result<Duration, String> {
    let days = text
        .strip_suffix('d')
        .and_then(|days| days.parse::<u64>().ok());
    match days {
        Some(days @ 1..=36_500) => Ok(Duration::from_secs(days * 86_400)),
        Some(_) => Err(format!("{text:?} is no sensible time")),
        None => parse_duration(text),
    }
}

/// Options of `kiln worker`.
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  kiln worker --controller https://ci.example.org:8443 --join TOKEN\n  kiln worker\n  kiln worker list\n  kiln worker drain host-2 --reason \"new disks\""
)]
pub(crate) struct WorkerArgs {
    /// What to do with a server's workers; without, this host becomes one
    #[command(subcommand)]
    pub verb: Option<WorkerCommand>,
    /// Controller to join; without it the one that was joined before
    #[arg(long, value_name = "URL", requires = "join")]
    pub controller: Option<String>,
    /// Single-use join token
    #[arg(
        long,
        value_name = "TOKEN",
        env = "KILN_JOIN_TOKEN",
        hide_env_values = true,
        requires = "controller"
    )]
    pub join: Option<String>,
    /// Name of this worker; this host's name without
    #[arg(long)]
    pub name: Option<String>,
    /// Most machines at a time
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub machines: u32,
    /// Send spans of jobs to this OpenTelemetry collector (OTLP over HTTP), http://HOST:4318
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_and_bounds() {
        assert_eq!(parse_life("2d"), Ok(Duration::from_secs(172_800)));
        assert!(parse_life("0d").is_err() && parse_life("d").is_err());
        assert_eq!(parse_bound("none"), Ok(Bound(None)));
        assert_eq!(parse_bound("7"), Ok(Bound(Some(7))));
        assert!(parse_bound("-1").is_err());
        assert_eq!(parse_bytes("1G"), Ok(BytesBound(Some(1 << 30))));
        assert_eq!(parse_bytes("none"), Ok(BytesBound(None)));
        assert!(parse_bytes("much").is_err());
    }
}
