//! `kiln setup`, as clap sees it.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// Options of `kiln setup`.
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  kiln setup\n  kiln setup --recipe my-recipe --guest ./kiln-guest\n  kiln setup host --print\n\nWhat is there already is kept. It may be stopped at any time: the next run goes on where it was."
)]
pub(crate) struct SetupArgs {
    /// Another part of setting up
    #[command(subcommand)]
    pub part: Option<SetupPart>,
    /// The recipe's folder
    #[arg(long, default_value = "machine-image")]
    pub recipe: PathBuf,
    /// The static kiln-guest binary
    #[arg(long, value_name = "PATH")]
    pub guest: Option<PathBuf>,
}

/// Parts of setting up that are not done for every home.
#[derive(Subcommand, Debug)]
pub(crate) enum SetupPart {
    /// Prepare groups, folders and, for a service, its unit and a minimal sudoers file
    #[command(
        after_help = "Examples:\n  kiln setup host\n  kiln setup host --mode agent --user buildkite-agent --print\n  sudo kiln setup host --mode service --apply\n\n\
            Modes: `user` is whoever starts kiln, and needs root for nothing but /dev/kvm and bakes; `agent` is a CI agent's user with a home of its own;\n\
            `service` is `kiln serve --with-worker` under systemd as a user of its own, which members of a group may start and stop.\n\
            Only `service` writes a sudoers file, which visudo(8) checks before it takes effect.\n\
            Without --apply nothing is changed: the steps are printed as a shell script."
    )]
    Host(HostArgs),
}

/// Options of `kiln setup host`.
#[derive(Args, Debug)]
pub(crate) struct HostArgs {
    /// Print the steps as a shell script (the default)
    #[arg(long, conflicts_with = "apply")]
    pub print: bool,
    /// Do the steps; needs root
    #[arg(long)]
    pub apply: bool,
    /// Who runs kiln on this host
    #[arg(long, value_enum, default_value_t = HostMode::User)]
    pub mode: HostMode,
    /// The user: for `user` whoever asks, for `agent` one that exists, for `service` one that is made [default for service: kiln]
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Where `agent` and `service` keep their state: a folder below it for an agent, itself for a service
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kiln")]
    pub state: PathBuf,
    /// For `service`: the group that may start and stop it
    #[arg(long, value_name = "GROUP", default_value = "kiln-operators")]
    pub operators: String,
}

/// Who runs kiln on a host.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostMode {
    /// A person, with their own folders.
    User,
    /// A CI agent's user.
    Agent,
    /// A service of its own.
    Service,
}
