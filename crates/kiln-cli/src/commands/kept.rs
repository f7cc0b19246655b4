//! Verbs about machines that were kept: which one is meant, and what its keeper's refusals are to a person.
//!
//! A machine lies on this host, or is kept by a worker of the server that is used: [`Machine`] is either, and everything else is one code.
//!
//! Read next: `kept::keeper` (the process that keeps one), `kept::watch` (the one that watches it), `kept::machine` (list, show, end), `kept::exec` (commands and terminals), `kept::copy`,
//! `kept::forward`.

pub(super) mod copy;
pub(super) mod exec;
mod far;
pub(super) mod forward;
mod incident;
pub(super) mod keeper;
pub(super) mod machine;
mod machine_server;
pub(super) mod watch;

use futures_util::future::BoxFuture;
use kiln_controller::api::MachineView;
use kiln_core::FailureClass;
use kiln_machine::reap::reap_home;
use kiln_worker::failure::Failure;
use kiln_worker::home::Home;
use kiln_worker::kept::ask::{Ask, Reply};
use kiln_worker::kept::client::{self, AskError, Line, Near, Reach};
use kiln_worker::kept::{self, Facts};
use kiln_worker::run::{Place, start_failure};

use crate::args::ServerArgs;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::server::{Server, escaped};

/// This user's home.
fn home() -> Result<Home> {
    Home::from_env().map_err(|error| CliError::usage(error.to_string()))
}

/// Removes what dead keepers left, so that what is listed lives.
async fn reap(home: &Home) -> Result<()> {
    let data = home.data.clone();
    let reaped = tokio::task::spawn_blocking(move || reap_home(&data));
    for leak in reaped.await.or_infrastructure()?.leaks {
        tracing::warn!(leak, "could not be reaped");
    }
    Ok(())
}

/// The kept machine that somebody means.
async fn find(home: &Home, id: &str) -> Result<Facts> {
    reap(home).await?;
    kept::find(&home.data, id).map_err(|error| {
        CliError::usage(error.to_string())
            .hint("`kiln machine list` shows them; `kiln run --keep` keeps one")
    })
}

/// A kept machine, wherever it is.
#[derive(Clone, Debug)]
pub(super) enum Machine {
    /// On this host.
    Near(Home, Near),
    /// Kept by a worker.
    Far(Far),
}

/// A machine that a worker keeps.
#[derive(Clone, Debug)]
pub(super) struct Far {
    server: Server,
    view: MachineView,
}

impl Machine {
    /// One on this host.
    pub(super) fn near(home: &Home, facts: Facts) -> Self {
        let near = Near {
            home: home.data.clone(),
            facts,
        };
        Self::Near(home.clone(), near)
    }

    /// One that a worker keeps.
    pub(super) fn far(server: &Server, view: MachineView) -> Self {
        Self::Far(Far {
            server: server.clone(),
            view,
        })
    }

    /// The one that somebody means, on the server that is used or on this host.
    async fn named(said: &ServerArgs, id: &str) -> Result<Self> {
        if let Some(server) = crate::server::configured(said)? {
            let view = machine_server::find(&server, id).await?;
            return Ok(Self::far(&server, view));
        }
        let home = home()?;
        let facts = find(&home, id).await?;
        Ok(Self::near(&home, facts))
    }

    /// How people call it.
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Near(_, near) => near.facts.id(),
            Self::Far(far) => &far.view.id,
        }
    }

    /// Its name on its host, or its id where that is another.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Near(_, near) => near.facts.machine.machine.as_str(),
            Self::Far(far) => &far.view.id,
        }
    }

    /// With its host, for whoever stands in it.
    fn shown(&self) -> String {
        match self {
            Self::Near(_, near) => near.facts.machine.machine.to_string(),
            Self::Far(far) => format!("{} on {}", far.view.id, far.view.worker),
        }
    }

    /// Milliseconds for which it stays from now, and when that is over.
    pub(super) fn stays(&self) -> (u64, u64) {
        match self {
            Self::Near(_, near) => (near.facts.machine.stays_ms, near.facts.until_unix_ms),
            Self::Far(far) => (far.view.left_ms, far.view.until_unix_ms),
        }
    }

    /// How its command ended, as a shell has it.
    pub(super) fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Near(_, near) => near.facts.machine.exit_code,
            Self::Far(far) => far.view.exit_code,
        }
    }

    fn reach(&self) -> &dyn Reach {
        match self {
            Self::Near(_, near) => near,
            Self::Far(far) => far,
        }
    }

    /// Ends it without a word.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(super) async fn remove(&self) -> Result<()> {
        match self {
            Self::Near(home, near) => machine::remove(home, &near.facts).await,
            Self::Far(far) => machine_server::remove(&far.server, &far.view.id, false)
                .await
                .map(drop),
        }
    }
}

impl Reach for Far {
    fn id(&self) -> &str {
        &self.view.id
    }

    fn dial<'a>(&'a self, ask: &'a Ask) -> BoxFuture<'a, Result<Box<dyn Line>, AskError>> {
        Box::pin(async move {
            let verb = match ask {
                Ask::Exec(_) => "exec",
                Ask::Tree { .. } => "tree",
                Ask::Forward { .. } => "forward",
                // Everything else has a route of its own.
                _ => "show",
            };
            let path = format!("/v1/machines/{}/ways/{verb}", escaped(&self.view.id));
            let opened = self.server.upgrade(&path).await;
            let opened = opened.map_err(|error| AskError::NoWay(Box::new(error)))?;
            Ok(Box::new(far::Way(opened)) as Box<dyn Line>)
        })
    }
}

/// A command of a server's job, while it runs.
#[derive(Clone, Debug)]
pub(super) struct Running {
    /// Whose job it is.
    pub(super) server: Server,
    /// The job.
    pub(super) id: String,
}

impl Reach for Running {
    fn id(&self) -> &str {
        &self.id
    }

    fn dial<'a>(&'a self, ask: &'a Ask) -> BoxFuture<'a, Result<Box<dyn Line>, AskError>> {
        Box::pin(async move {
            let verb = match ask {
                Ask::Forward { .. } => "forward",
                // Nothing else is asked of one.
                _ => "attend",
            };
            let path = format!("/v1/jobs/{}/ways/{verb}", escaped(&self.id));
            let opened = self.server.upgrade(&path).await;
            let opened = opened.map_err(|error| AskError::NoWay(Box::new(error)))?;
            Ok(Box::new(far::Way(opened)) as Box<dyn Line>)
        })
    }
}

/// Asks for something that is answered at once.
async fn ask(reach: &dyn Reach, what: &Ask) -> Result<Reply> {
    client::answer(reach, what).await.map_err(refused)
}

pub(super) fn refused(error: AskError) -> CliError {
    match error {
        AskError::Refused(refused) if refused.usage => CliError::usage(refused.message),
        AskError::Command(error) => CliError::from_failure(match error {
            refused @ kiln_worker::orders::CallError::Refused { .. } => {
                start_failure(refused, Place::Kept)
            }
            other => Failure::from(other),
        }),
        AskError::NoWay(error) => match error.downcast::<CliError>() {
            Ok(error) => *error,
            Err(error) => CliError::new(FailureClass::Infrastructure, error.to_string()),
        },
        AskError::Gone { .. } | AskError::Ended { .. } => {
            CliError::new(FailureClass::Infrastructure, chain(&error))
                .hint("`kiln machine list` shows what is still there")
        }
        AskError::Refused(_) => CliError::new(FailureClass::Infrastructure, chain(&error)),
    }
}

/// An answer to another question: the keeper is of another version.
fn surprised() -> CliError {
    CliError::new(
        FailureClass::Infrastructure,
        "the keeper gives another answer than was asked for",
    )
    .hint("it may be of another version of kiln: `kiln machine rm` ends its machine")
}
