//! Verbs about machines that were kept: which one is meant, and what its keeper's refusals are to a person.
//!
//! Read next: `kept::keeper` (the process that keeps one), `kept::machine` (list, show, end), `kept::exec` (commands and terminals), `kept::copy`,
//! `kept::forward`.

pub(super) mod copy;
pub(super) mod exec;
pub(super) mod forward;
pub(super) mod keeper;
pub(super) mod machine;

use kiln_core::FailureClass;
use kiln_machine::reap::reap_home;
use kiln_worker::failure::Failure;
use kiln_worker::home::Home;
use kiln_worker::kept::ask::{Ask, Reply};
use kiln_worker::kept::client::{self, AskError};
use kiln_worker::kept::{self, Facts};
use kiln_worker::run::start_failure;

use crate::error::{CliError, OrInfrastructure as _, Result, chain};

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

/// Asks for something that is answered at once.
async fn ask(home: &Home, facts: &Facts, what: &Ask) -> Result<Reply> {
    let answer = client::answer(&home.data, facts, what).await;
    answer.map_err(refused)
}

fn refused(error: AskError) -> CliError {
    match error {
        AskError::Refused(refused) if refused.usage => CliError::usage(refused.message),
        AskError::Command(error) => CliError::from_failure(match error {
            refused @ kiln_worker::orders::CallError::Refused { .. } => start_failure(refused),
            other => Failure::from(other),
        }),
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
