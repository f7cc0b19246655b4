//! Repositories of a run: what its policy names, and what its owner says to credentials.

use std::collections::BTreeMap;

use kiln_core::job::RunPhase;
use kiln_core::secret::Repository;
use kiln_core::{FailureClass, GitAccess, RunSecret};

use crate::effective::Effective;
use crate::policy::Phase;
use crate::run::{Asked, Mode, Refusal};

/// Repositories by the phase that reads them.
#[derive(Debug, Default)]
pub(crate) struct Repositories(BTreeMap<Phase, Vec<GitAccess>>);

impl Repositories {
    /// Those of one phase.
    pub(crate) fn of(&self, phase: Phase) -> Vec<GitAccess> {
        self.0.get(&phase).cloned().unwrap_or_default()
    }
}

/// What a policy names, in each of its phases. A policy comes with a project, and a credential is its owner's: a repository that the host
/// logs in for is read only when the request names it as well. Where that narrows the network, what it names is left.
///
/// # Errors
/// Policy, for a repository with a credential that nobody named; usage, where one is named that the policy does not have.
pub(crate) fn of_policy(
    holds: &Effective,
    asked: &Asked<'_>,
    file: &str,
) -> Result<Repositories, Refusal> {
    let narrowed =
        !asked.allow.is_empty() || matches!(asked.mode, Some(Mode::Isolated | Mode::Open));
    let learns = asked.mode == Some(Mode::Learn);
    let mut found = Repositories::default();
    for phase in Phase::ALL {
        let mut all = holds.git(phase);
        if narrowed {
            all.retain(|one| asked.git.contains(&one.repository));
        }
        for one in &mut all {
            if learns {
                // Nothing secret is used for what is still learned from.
                one.credential = None;
            }
            if let (Some(credential), false) =
                (&one.credential, asked.git.contains(&one.repository))
            {
                let message = format!(
                    "{file} reads {} in the phase {phase}, where the host logs in with the secret {}",
                    one.repository, credential.secret
                );
                let hint = format!(
                    "if this project may have it, say so with --git {}",
                    one.repository
                );
                return Err(Refusal::new(FailureClass::Policy, "git", message).hint(hint));
            }
        }
        found.0.insert(phase, all);
    }
    let unknown = |repository: &&Repository| {
        let mut all = found.0.values().flatten();
        !all.any(|one| one.repository == **repository)
    };
    let Some(other) = asked.git.iter().find(unknown) else {
        return Ok(found);
    };
    let message = format!(
        "{file} does not name it, or the operator does not grant it, and a flag can only narrow a policy"
    );
    Err(Refusal {
        said: Some(other.to_string()),
        ..Refusal::new(FailureClass::Usage, "git", message)
    }
    .hint(format!("`kiln policy explain {other}` says what holds")))
}

/// The modes in which repositories of the request say something.
///
/// # Errors
/// Usage, for one that they contradict or add nothing to.
pub(crate) fn fits(asked: &Asked<'_>) -> Result<(), Refusal> {
    let wrong = |what: &str| {
        let refusal = Refusal::new(FailureClass::Usage, "net", what);
        Err(refusal.hint("leave one of them out"))
    };
    match asked.mode {
        _ if asked.git.is_empty() => Ok(()),
        Some(Mode::Isolated) => wrong("--net isolated reaches nothing: --git contradicts it"),
        Some(Mode::Open) => wrong("--net open reaches every name: --git adds nothing"),
        Some(Mode::Learn) => wrong("--net learn has no credentials: --git adds nothing"),
        Some(Mode::Egress) | None => Ok(()),
    }
}

/// A credential of the host is no machine's: one name cannot be both.
///
/// # Errors
/// Usage, where it is.
pub(crate) fn stay_outside(
    git: &[GitAccess],
    phases: &[RunPhase],
    secrets: &[RunSecret],
) -> Result<(), Refusal> {
    let all = phases.iter().flat_map(|phase| &phase.git).chain(git);
    let shown: Vec<_> = all
        .filter_map(|one| Some(&one.credential.as_ref()?.secret))
        .collect();
    let mut inner = phases
        .iter()
        .flat_map(|phase| &phase.secrets)
        .chain(secrets);
    let Some(both) = inner.find(|one| shown.contains(&&one.name)) else {
        return Ok(());
    };
    let message = "the host logs in with it for git, so it cannot go into the machine";
    Err(Refusal {
        said: Some(both.name.to_string()),
        ..Refusal::new(FailureClass::Usage, "secret", message)
    })
}
