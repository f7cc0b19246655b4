//! One verb, one module.

pub(crate) mod artifacts;
mod audit;
mod backup;
mod bases;
mod bench;
mod build;
mod build_policy;
mod build_server;
mod cache;
mod disk_use;
mod doctor;
mod hold;
pub(crate) mod home_queue;
mod image;
mod init;
mod job;
mod job_record;
mod kept;
pub(crate) mod landing;
mod learn;
mod load;
mod machine_image;
mod meta;
pub(crate) mod operator;
mod output;
mod plan;
mod policy;
mod push;
mod queue;
mod queueing;
mod reference;
mod registries;
mod registry;
mod replace;
mod retention;
mod retry;
mod run;
mod run_attend;
mod run_bounds;
mod run_folder;
mod run_given;
mod run_policy;
mod run_ports;
mod run_server;
mod scheduler;
mod secret;
mod serve;
mod setup;
mod setup_host;
mod source;
pub(crate) mod table;
mod template;
mod tenant;
mod timeline;
mod token;
mod uninstall;
mod webhook;
pub(crate) mod when;
mod why;
mod worker;
mod worker_server;

use kiln_worker::home::{Home, HomeError};
use tokio_util::sync::CancellationToken;

use crate::args::{Command, PolicyCommand, ServerArgs};
use crate::error::{CliError, Result, chain};
use crate::show::Screen;

/// Runs a verb; gives the exit code.
pub(crate) async fn run(
    command: Command,
    server: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    if touches_home(&command) {
        refuse_other_layouts()?;
    }
    match command {
        Command::Build(args) => build::run(*args, server, screen, cancel).await,
        Command::Run(args) => run::run(*args, server, screen, cancel).await,
        Command::Machine(verb) => kept::machine::run(verb, server, screen, cancel).await,
        Command::Exec(args) => kept::exec::run(args, server, screen, cancel).await,
        Command::Console(args) => kept::exec::console(args, server, screen, cancel).await,
        Command::Cp(args) => kept::copy::run(args, server, screen, cancel).await,
        Command::PortForward(args) => kept::forward::run(args, server, screen, cancel).await,
        Command::KeepMachine(args) => match args.watch {
            Some(machine) => kept::watch::run(&machine, args.for_ms, cancel).await,
            None => kept::keeper::run(screen, cancel).await,
        },
        Command::Plan(args) => plan::run(&args, screen),
        Command::Init(args) => init::run(&args, screen),
        Command::Policy(PolicyCommand::Learn(args)) => {
            learn::learn(*args, server, screen, cancel).await
        }
        Command::Policy(verb) => policy::run(verb, server, screen),
        Command::Doctor(args) => doctor::run(&args, screen).await,
        Command::Job(verb) => job::run(verb, server, screen, cancel).await,
        Command::Queue(verb) => queue::run(verb, server, screen).await,
        Command::Template(verb) => template::run(verb, screen, cancel).await,
        Command::MachineImage(verb) => machine_image::run(verb, screen, cancel).await,
        Command::Bases(verb) => bases::run(verb, screen, cancel).await,
        Command::Registries(verb) => registries::run(verb, screen).await,
        Command::Registry(verb) => registry::run(verb, screen, cancel).await,
        Command::Cache(verb) => cache::run(verb, screen).await,
        Command::Serve(args) => serve::run(args, screen, cancel).await,
        Command::Worker(args) => match args.verb {
            Some(verb) => worker_server::run(verb, server, screen).await,
            None => worker::run(args, screen, cancel).await,
        },
        Command::Scheduler(verb) => scheduler::run(verb, server, screen).await,
        Command::Hold(verb) => hold::run(verb, server, screen).await,
        Command::Image(verb) => image::run(verb, server, screen).await,
        Command::Audit(verb) => audit::run(verb, server, screen).await,
        Command::Tenant(verb) => tenant::run(verb, server, screen).await,
        Command::Token(verb) => token::run(verb, server, screen).await,
        Command::Secret(verb) => secret::run(verb, server, screen).await,
        Command::Backup(verb) => backup::run(verb, server, screen).await,
        Command::Webhook(verb) => webhook::run(verb, server, screen).await,
        Command::Bench(args) => bench::run(args, screen, cancel).await,
        Command::Setup(args) => setup::run(args, screen, cancel).await,
        Command::Uninstall(args) => uninstall::run(&args, screen).await,
        Command::Completions { shell } => meta::completions(shell, screen),
        Command::Man { dir } => meta::man(&dir, screen),
    }
}

/// Whether a verb reads or writes what kiln keeps. The doctor says what is wrong with it, and uninstalling removes it.
fn touches_home(command: &Command) -> bool {
    !matches!(
        command,
        Command::Doctor(_)
            | Command::Uninstall(_)
            | Command::Completions { .. }
            | Command::Man { .. }
    )
}

/// What another kiln wrote is neither used nor changed.
fn refuse_other_layouts() -> Result<()> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    match home.check_layout() {
        Ok(_) => Ok(()),
        Err(HomeError::Io { source, .. })
            if source.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            Err(CliError::usage(chain(&HomeError::Io {
                action: "read",
                path: home.data,
                source,
            }))
            .hint("it belongs to another user: set KILN_HOME to a directory of your own"))
        }
        Err(error @ HomeError::Damaged { .. }) => Err(CliError::usage(chain(&error)).hint(format!(
            "if this kiln wrote that home, write {{\"layout\":{}}} into the file; else set KILN_HOME to another directory",
            kiln_worker::home::LAYOUT
        ))),
        Err(error) => Err(CliError::usage(chain(&error))
            .hint("use the kiln that wrote it, or set KILN_HOME to another directory")),
    }
}

/// CPUs of this host.
fn host_cpus() -> u32 {
    std::thread::available_parallelism()
        .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}
