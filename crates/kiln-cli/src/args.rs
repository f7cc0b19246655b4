//! The command line, as clap sees it. Raw words only: nothing past `commands` sees these types.

mod fleet;
pub(crate) mod machines;
mod operators;
mod policy;
mod run;
mod secret;
mod serve;
mod setup;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_core::{AllowRule, ImageRef};

#[cfg(test)]
pub(crate) use fleet::Bound;
pub(crate) use fleet::parse_life;
pub(crate) use fleet::{
    BackupCommand, JobCommand, JobFilterArgs, QueueCommand, QueueingArgs, QuotaArgs, ServerArgs,
    TenantCommand, TokenArgs, TokenCommand, WebhookCommand, WorkerArgs, WorkerCommand,
    WorkerStateArgs,
};
pub(crate) use operators::{
    AuditArgs, AuditCommand, FillingText, HeldArgs, HoldCommand, Moment, RetentionArgs,
    RetentionCommand, SchedulerCommand, StoredImageCommand,
};
pub(crate) use policy::{InitArgs, LearnArgs, NetArg, PhaseArg, PolicyCommand};
pub(crate) use run::{LimitArgs, RunArgs};
pub(crate) use secret::{OwnerArgs, ScopeArgs, SecretCommand, ValueArgs};
pub(crate) use serve::ServeArgs;
pub(crate) use setup::{HostArgs, HostMode, SetupArgs, SetupPart};

pub(crate) use machines::{ConsoleArgs, CpArgs, ExecArgs, ForwardArgs, MachineCommand};

/// Builds container images and runs untrusted commands, each in a fresh microVM on this machine.
#[derive(Parser, Debug)]
#[command(
    name = "kiln",
    version,
    propagate_version = true,
    disable_help_subcommand = true
)]
#[command(
    after_help = "Exit codes: 0 success, 1 your build or command failed, 2 usage or configuration,\n\
3 infrastructure, 4 refused by policy, 5 guest fault, 124 timeout, 130 cancelled.\n\
`kiln run` passes on the command's own code.\n\n\
`kiln help VERB` says what `kiln VERB --help` says.\n\n\
Examples:\n  kiln setup\n  kiln build examples/node-express --tag hello\n  kiln run --image hello -p 8080:3000\n  kiln run -- uname -a"
)]
pub(crate) struct Cli {
    /// Print data as JSON, one object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on standard error; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// The server to use
    #[command(flatten)]
    pub server: ServerArgs,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Build a container image from a folder or git URL
    Build(Box<BuildArgs>),
    /// Run a command, or a container image, in a fresh machine
    Run(Box<RunArgs>),
    /// List, show, end and look into machines that were kept
    #[command(subcommand)]
    Machine(MachineCommand),
    /// Run a command in a kept machine
    Exec(ExecArgs),
    /// Stand in a kept machine: a shell on your terminal
    Console(ConsoleArgs),
    /// Copy files into or out of a kept machine
    Cp(CpArgs),
    /// Reach ports of a kept machine
    PortForward(ForwardArgs),
    /// Keep a machine: started by kiln itself, told what to do on standard input
    #[command(
        hide = true,
        after_help = "Examples:\n  kiln keep-machine < handover.json"
    )]
    KeepMachine(machines::KeepMachineArgs),
    /// Print how a folder would be built, without building it
    Plan(PlanArgs),
    /// Write a commented policy, kiln.yaml, that fits a folder
    Init(InitArgs),
    /// Read a folder's policy, say what holds of it and why
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Say what this host offers and how to mend what is missing
    Doctor(DoctorArgs),
    /// List, show, read, cancel and repeat jobs
    #[command(subcommand)]
    Job(JobCommand),
    /// Show, pause, resume, make and bound queues
    #[command(subcommand)]
    Queue(QueueCommand),
    /// Make, list and remove templates that machines are cloned from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Make, list, verify and remove machine images
    #[command(subcommand)]
    MachineImage(ImageCommand),
    /// List, add and make runtime base images
    #[command(subcommand)]
    Bases(BasesCommand),
    /// Find out which hosts builds may reach for packages
    #[command(subcommand)]
    Registries(RegistriesCommand),
    /// The built-in image registry
    #[command(subcommand)]
    Registry(RegistryCommand),
    /// Show and bound what kiln keeps on disk
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Serve a queue for many tenants and hosts: API, scheduler, registry, logs
    Serve(ServeArgs),
    /// Run jobs of a controller on this host; steer a server's workers
    Worker(WorkerArgs),
    /// Bound all running jobs of a server, and say how its hosts are filled
    #[command(subcommand)]
    Scheduler(SchedulerCommand),
    /// Make, list and bound a server's tenants
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Keep what age would take: legal holds of a server's jobs and tenants
    #[command(subcommand)]
    Hold(HoldCommand),
    /// List a server's images, take names of them away
    #[command(subcommand)]
    Image(StoredImageCommand),
    /// Read who asked a server for what, and what it said
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Make, list and revoke a server's tokens
    #[command(subcommand)]
    Token(TokenCommand),
    /// Keep secrets for jobs, say who may have them, see who had them
    #[command(subcommand)]
    Secret(SecretCommand),
    /// Copy this home's queue while it is served, and put a copy back
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Make, list, remove and replay a server's webhooks
    #[command(subcommand)]
    Webhook(WebhookCommand),
    /// Measure what PROMISES.md promises
    Bench(BenchArgs),
    /// Do all set-up that needs no root: machine image, bases, registries, templates
    Setup(SetupArgs),
    /// Remove everything kiln keeps on this machine
    Uninstall(UninstallArgs),
    /// Print a completion script
    #[command(
        after_help = "Examples:\n  kiln completions bash > ~/.local/share/bash-completion/completions/kiln\n  kiln completions zsh > ~/.zfunc/_kiln"
    )]
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Write man pages into a folder
    #[command(after_help = "Examples:\n  kiln man ~/.local/share/man/man1")]
    Man {
        /// The folder
        dir: PathBuf,
    },
}

impl Command {
    /// Whether it answers somebody or runs for itself.
    pub(crate) fn kind(&self) -> kiln_telemetry::Kind {
        match self {
            Self::Serve(_) => kiln_telemetry::Kind::Service,
            Self::Worker(args) if args.verb.is_none() => kiln_telemetry::Kind::Service,
            _ => kiln_telemetry::Kind::Command,
        }
    }

    /// What the first Ctrl-C does: it ends looking and serving, and cancels work.
    pub(crate) fn interrupted(&self) -> &'static str {
        match self {
            Self::Job(_) | Self::Serve(_) | Self::Worker(_) => "stopping",
            Self::Registry(RegistryCommand::Serve { .. }) => "stopping",
            _ => "cancelling",
        }
    }
}

/// Options of `kiln build`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln build .\n  kiln build --tag shop:1.4 examples/node-express\n  \
kiln build https://git.example.org/team/app.git#v2 --push registry.example.org/app:v2\n  \
kiln build . --secret id=token,env=TOKEN --allow api.example.org:443"
)]
pub(crate) struct BuildArgs {
    /// Folder, or git URL with an optional #ref
    #[arg(default_value = ".")]
    pub source: String,
    /// Name for the image, within your tenant; may be given more than once
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    pub tags: Vec<ImageRef>,
    /// Dockerfile to use instead of a detected plan
    #[arg(short, long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Build only up to this stage
    #[arg(long)]
    pub target: Option<String>,
    /// Build argument; KEY alone takes the value from the environment
    #[arg(long = "build-arg", value_name = "KEY[=VALUE]")]
    pub build_args: Vec<String>,
    /// Secret for RUN --mount=type=secret: id=NAME of `kiln secret`, id=NAME,src=FILE or id=NAME,env=VARIABLE
    #[arg(long = "secret", value_name = "SPEC")]
    pub secrets: Vec<String>,
    /// SSH agent for RUN --mount=type=ssh: ID, with the agent of SSH_AUTH_SOCK, or ID=SOCKET
    #[arg(long = "ssh", value_name = "ID[=SOCKET]")]
    pub ssh: Vec<String>,
    /// Also let the build reach this host; `*.HOST` is every name below it. Without a protocol 443 is tls, 80 http, others raw
    #[arg(long = "allow", value_name = "HOST[:PORTS[/tls|http|raw]]")]
    pub allow: Vec<AllowRule>,
    /// Policy to hold it to, instead of the one in the folder or repository
    #[arg(long, value_name = "FILE", conflicts_with = "no_policy")]
    pub policy: Option<PathBuf>,
    /// Do not read the policy of the folder or repository: the command line alone decides
    #[arg(long)]
    pub no_policy: bool,
    /// Neither use nor feed the cache
    #[arg(long)]
    pub no_cache: bool,
    /// Where the result goes
    #[arg(long, value_name = "registry|oci:FILE", default_value = "registry")]
    pub output: String,
    /// Push to another registry with your own docker or podman credentials
    #[arg(long, value_name = "REF")]
    pub push: Option<ImageRef>,
    /// Load into the local Docker or Podman
    #[arg(long)]
    pub load: bool,
    /// Also write the result as JSON into this file
    #[arg(long, value_name = "FILE")]
    pub result: Option<PathBuf>,
    /// Platform of the image
    #[arg(long, default_value = "linux/amd64")]
    pub platform: String,
    /// Limits of the machine
    #[command(flatten)]
    pub limits: LimitArgs,
    /// How a server queues it
    #[command(flatten)]
    pub queueing: QueueingArgs,
}

/// Options of `kiln plan`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln plan .\n  kiln plan examples/python-flask --dockerfile\n  kiln plan . --json"
)]
pub(crate) struct PlanArgs {
    /// The folder
    #[arg(default_value = ".")]
    pub dir: PathBuf,
    /// Dockerfile to use instead of a detected plan
    #[arg(short, long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Build only up to this stage
    #[arg(long)]
    pub target: Option<String>,
    /// Build argument; KEY alone takes the value from the environment
    #[arg(long = "build-arg", value_name = "KEY[=VALUE]")]
    pub build_args: Vec<String>,
    /// Print the Dockerfile alone
    #[arg(long)]
    pub dockerfile: bool,
}

/// Options of `kiln doctor`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln doctor\n  kiln doctor --json | jq 'select(.level != \"pass\")'\n  kiln doctor --scrub\n\nExit codes: 0 all works (it may be slower or less isolated than it could be), 3 something must be mended."
)]
pub(crate) struct DoctorArgs {
    /// Read every stored byte again and compare digests
    #[arg(long)]
    pub scrub: bool,
}

/// Verbs of `kiln template`.
#[derive(Subcommand, Debug)]
#[command(after_help = "Examples:\n  kiln template prepare\n  kiln template list")]
pub(crate) enum TemplateCommand {
    /// Make the templates that builds and runs start from, also for your current cache head
    Prepare,
    /// List templates
    List,
    /// Remove templates that no job would use again
    Prune {
        /// Also those that are still current (not those in use)
        #[arg(long)]
        all: bool,
    },
}

/// Verbs of `kiln machine-image`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln machine-image bake --recipe machine-image\n  kiln machine-image show --packages\n  kiln machine-image verify"
)]
pub(crate) enum ImageCommand {
    /// Make the machine image
    Bake {
        /// The recipe's folder
        #[arg(long, default_value = "machine-image")]
        recipe: PathBuf,
        /// The static kiln-guest binary
        #[arg(long, value_name = "PATH")]
        guest: Option<PathBuf>,
    },
    /// List machine images
    List,
    /// Show one machine image
    Show {
        /// Its name; the current one without
        name: Option<String>,
        /// Also list its packages
        #[arg(long)]
        packages: bool,
    },
    /// Read all files of a machine image again
    Verify {
        /// Its name; the current one without
        name: Option<String>,
    },
    /// Remove all but the newest four
    Prune,
}

/// Verbs of `kiln bases`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln bases list\n  kiln bases add golang:1.24 && kiln bases pull\n  kiln bases add alpine:3.20@sha256:0123..."
)]
#[expect(clippy::large_enum_variant, reason = "made once, read once")]
pub(crate) enum BasesCommand {
    /// List base images and where they come from
    List,
    /// Let Dockerfiles use an image of another registry, pinned by digest
    #[command(
        after_help = "Examples:\n  kiln bases add golang:1.24\n  kiln bases add golang:1.24@sha256:0123...\n  \
kiln bases add golang:1.24 registry.example.org/mirror/golang:1.24\n  \
kiln bases add node:22 example.org/node-build@sha256:0123... --run example.org/node-run@sha256:4567..."
    )]
    Add {
        /// The name Dockerfiles use, for example golang:1.24; alone it also is what it stands for, at Docker Hub
        #[arg(value_name = "NAME[@DIGEST]")]
        name: String,
        /// What it stands for; a tag is looked up now and its digest kept
        reference: Option<ImageRef>,
        /// Slim image to run on: NAME (RUNTIME:VERSION) becomes a version that plans can choose
        #[arg(long, value_name = "REFERENCE")]
        run: Option<ImageRef>,
    },
    /// Take an image out of bases.toml again
    Rm {
        /// The name Dockerfiles use
        name: String,
    },
    /// Pull what bases.toml names from other registries; builds can stand on it then
    Pull,
    /// Pull and make the bases, then the shared cache head and its templates, so that builds need not unpack them
    Bake {
        /// The recipe's folder
        #[arg(long, default_value = "machine-image")]
        recipe: PathBuf,
    },
}

/// Verbs of `kiln registries`.
#[derive(Subcommand, Debug)]
#[command(after_help = "Examples:\n  kiln registries discover --dry-run\n  kiln registries show")]
pub(crate) enum RegistriesCommand {
    /// Ask this host's package managers and write registries.toml; what you edited stays
    Discover {
        /// Print the file instead of writing it
        #[arg(long)]
        dry_run: bool,
    },
    /// Print registries.toml
    Show,
}

/// Verbs of `kiln registry`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln registry serve\n  kiln registry login && skopeo inspect --tls-verify=false docker://127.0.0.1:5080/t/local/hello\n  kiln registry list\n  kiln registry rm hello:latest"
)]
pub(crate) enum RegistryCommand {
    /// Serve the registry on loopback until interrupted
    #[command(
        after_help = "Examples:\n  kiln registry serve\n  kiln registry serve --listen 127.0.0.1:5000 --anonymous-pull"
    )]
    Serve {
        /// Address to listen on
        #[arg(long, default_value = "127.0.0.1:5080")]
        listen: std::net::SocketAddr,
        /// Let anybody on this machine pull without a token
        #[arg(long)]
        anonymous_pull: bool,
    },
    /// Write a token where docker, podman and skopeo look for it
    #[command(
        after_help = "Examples:\n  kiln registry login\n  kiln registry login --address 127.0.0.1:5000 && podman pull --tls-verify=false 127.0.0.1:5000/t/local/hello"
    )]
    Login {
        /// Address the registry is served on
        #[arg(long, default_value = "127.0.0.1:5080")]
        address: std::net::SocketAddr,
    },
    /// Remove kiln's tokens from where login wrote them
    Logout,
    /// List images
    #[command(
        after_help = "Examples:\n  kiln registry list\n  kiln registry list --json | jq -r .repository"
    )]
    List {
        /// Also what unfinished jobs pushed
        #[arg(long)]
        all: bool,
    },
    /// Remove images
    #[command(
        after_help = "Examples:\n  kiln registry rm hello:latest && kiln registry gc --grace 0s"
    )]
    Rm {
        /// Which: NAME:TAG, or NAME@DIGEST for the image with all its tags
        #[arg(required = true, value_name = "NAME[:TAG]")]
        references: Vec<ImageRef>,
    },
    /// Remove blobs that no image needs, and uploads that nobody went on with
    #[command(after_help = "Examples:\n  kiln registry gc\n  kiln registry gc --grace 0s")]
    Gc {
        /// Keep blobs younger than this; 0s only while nobody pushes
        #[arg(long, default_value = "1h", value_parser = parse_grace)]
        grace: Duration,
    },
}

/// Verbs of `kiln cache`.
#[derive(Subcommand, Debug)]
#[command(after_help = "Examples:\n  kiln cache show\n  kiln cache prune")]
pub(crate) enum CacheCommand {
    /// Show what is kept and how much it takes
    Show,
    /// Remove what nothing needs, then the least recently used until the rest fits the budget
    Prune {
        /// Also forget your build cache (the shared one stays)
        #[arg(long)]
        heads: bool,
    },
}

/// Options of `kiln bench`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  kiln bench\n  kiln bench clone run --samples 20")]
pub(crate) struct BenchArgs {
    /// Which benchmarks; all without
    pub names: Vec<String>,
    /// Samples of each
    #[arg(long, default_value_t = 10)]
    pub samples: usize,
    /// For `bake`: the recipe's folder
    #[arg(long, default_value = "machine-image")]
    pub recipe: PathBuf,
    /// For `bake`: the static kiln-guest binary; else the one beside this program
    #[arg(long, value_name = "PATH")]
    pub guest: Option<PathBuf>,
    /// For `soak`: its length for each database
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub soak: u64,
}

/// Options of `kiln uninstall`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln uninstall\n  kiln uninstall --yes\n\nRemoves images, build caches, the queue with its logs, and settings: what lies below kiln's XDG directories or KILN_HOME."
)]
pub(crate) struct UninstallArgs {
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// When colour is used.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Color {
    /// On a terminal without `NO_COLOR`.
    Auto,
    /// Never.
    Never,
}

/// As [`parse_duration`], and none at all.
fn parse_grace(text: &str) -> Result<Duration, String> {
    match text {
        "0" | "0s" => Ok(Duration::ZERO),
        text => parse_duration(text),
    }
}

/// `90`, `90s`, `10m`, `2h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let error = || format!("{text:?} is not a time: write for example 90s, 10m or 1h");
    let at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(error()),
    };
    let count: u64 = number.parse().map_err(|_| error())?;
    count
        .checked_mul(seconds)
        .filter(|s| *s > 0)
        .map(Duration::from_secs)
        .ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("10m"), Ok(Duration::from_secs(600)));
        for bad in ["", "m", "1d", "0", "-1", "99999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
