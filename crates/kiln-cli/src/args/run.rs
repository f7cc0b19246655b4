//! The command line of `kiln run`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kiln_core::secret::Repository;
use kiln_core::{AllowRule, ArtifactPath, ByteSize, ImageRef, RunSecret};

use super::{NetArg, QueueingArgs, machines, parse_duration};
use crate::commands::artifacts::CopyOut;

/// Options of `kiln run`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln run -- npm test\n  kiln run --no-source -- uname -a\n  kiln run --image shop:1.4 -p 8080:3000\n  \
kiln run --image shop:1.4 -e LOG=debug -- node --version\n  \
kiln run --image shop:1.4 --copy-out report.xml -- npm test\n  \
kiln run --artifact 'out/**/*.log' -- sh -c 'mkdir out; date > out/a.log'\n  \
kiln run --keep=2h -- make test\n\nFiles that .kilnignore, else .dockerignore, else .gitignore name stay behind; nothing is written back but --copy-out.\nA policy in this folder (kiln.yaml) holds: flags only narrow it. Without one, and without --allow, the machine reaches nothing."
)]
pub(crate) struct RunArgs {
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    /// Container image to run; without it the base that fits the runtime of the folder, else the machine image itself
    #[arg(long, value_name = "REF")]
    pub image: Option<ImageRef>,
    /// Kernel to boot instead of kiln's own: a bzImage, or an ELF that boots by PVH; its modules come from /lib/modules/RELEASE of this host
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Raw ext4 image whose tree is the machine's root instead of kiln's own; it is only read
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    pub root_disk: Option<PathBuf>,
    /// Folder to copy in and to begin in, whatever it is (default: this one, when it is a project and no --image is named)
    #[arg(long, value_name = "DIR", conflicts_with = "no_source")]
    pub source: Option<PathBuf>,
    /// Copy no folder in
    #[arg(long)]
    pub no_source: bool,
    /// Forward a port of this machine to the guest: HOST:GUEST or [ADDRESS:]HOST:GUEST
    #[arg(short, long = "publish", value_name = "HOST:GUEST")]
    pub publish: Vec<String>,
    /// Environment variable; KEY alone takes the value from the environment
    #[arg(short, long = "env", value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// File of KEY=VALUE lines for the environment; KEY alone takes the value from the environment, --env wins
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Secret of `kiln secret`, as a variable (NAME, NAME=VARIABLE) or as the file /run/secrets/NAME (NAME:file)
    #[arg(long = "secret", value_name = "NAME[=VARIABLE]")]
    pub secrets: Vec<RunSecret>,
    /// Let it reach this host; `*.HOST` is every name below it. Without a protocol 443 is tls, 80 http, others raw
    #[arg(long = "allow", value_name = "HOST[:PORTS[/tls|http|raw]]")]
    pub allow: Vec<AllowRule>,
    /// Let git clone and fetch this repository, with the operator's credential where there is one
    #[arg(long = "git", value_name = "HOST/PATH")]
    pub git: Vec<Repository>,
    /// Keep files when the command has ended, also when it failed: a path, or a pattern with * ? **
    #[arg(long = "artifact", value_name = "GLOB")]
    pub artifacts: Vec<ArtifactPath>,
    /// Copy a file or folder of the machine to this host when the command has ended, also when it failed; the folder it lands in is never a link
    #[arg(long, value_name = "PATH[:DEST]")]
    pub copy_out: Vec<CopyOut>,
    /// What it may reach (egress with --allow, else isolated, else what the policy says)
    #[arg(long, value_name = "MODE")]
    pub net: Option<NetArg>,
    /// Policy to hold it to, instead of the one in this folder
    #[arg(long, value_name = "FILE", conflicts_with = "no_policy")]
    pub policy: Option<PathBuf>,
    /// Do not read this folder's policy: the command line alone decides
    #[arg(long)]
    pub no_policy: bool,
    /// Give it a terminal (also with --interactive and a command, when both ends are one)
    #[arg(short, long)]
    pub tty: bool,
    /// Connect standard input (the default when it is not a terminal, or with --tty)
    #[arg(short, long)]
    pub interactive: bool,
    /// Let the machine stay when the command is over, passed or failed: for 1h, or this long (at most 24h)
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "1h", value_parser = machines::parse_stays)]
    pub keep: Option<Duration>,
    /// In a terminal, stand in the machine when the command failed; the exit code stays the command's
    #[arg(long)]
    pub shell_on_failure: bool,
    /// Limits of the machine
    #[command(flatten)]
    pub limits: LimitArgs,
    /// How a server queues it
    #[command(flatten)]
    pub queueing: QueueingArgs,
}

/// Limits of one machine.
#[derive(Args, Debug, Clone)]
pub(crate) struct LimitArgs {
    /// Virtual CPUs
    #[arg(long, value_name = "COUNT")]
    pub cpus: Option<u32>,
    /// Memory, for example 512M or 2G
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Longest run time, for example 90s, 10m, 1h (10m for builds, none for runs)
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}
