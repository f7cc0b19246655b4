//! What a build gets: of the folder's policy what means something for one, the operator's grant and the command line. `kiln-policy` decides.

use std::time::Instant;

use kiln_core::TenantName;
use kiln_policy::policy::Resources;
use kiln_policy::{BuildAsked, HeldBuild, hold_build};

use super::operator::Operator;
use super::policy::tell_removed;
use super::run_bounds;
use super::run_policy::refused;
use super::source::{self, Secrets, Source};
use crate::args::BuildArgs;
use crate::error::Result;
use crate::policy_file::{self, Found};
use crate::show::Screen;

/// The policy that a build is held to, as far as it is known here: the folder's own, or the one that is named. That of a repository is
/// known when the host has proven the commit ([`of_repository`]).
///
/// # Errors
/// When it cannot be used.
pub(super) fn found(args: &BuildArgs, source: &Source) -> Result<Option<Found>> {
    policy_file::timed(|| match (&args.policy, args.no_policy, source) {
        (Some(file), _, _) => policy_file::read(file).map(Some),
        (None, false, Source::Folder(dir)) => policy_file::of_folder(dir),
        (None, _, _) => Ok(None),
    })
}

/// Whether a build of a repository is held to the policy in the commit that is built.
pub(super) fn of_repository(args: &BuildArgs) -> bool {
    let fetched = matches!(source::parse(&args.source), Ok(Source::Git { .. }));
    fetched && args.policy.is_none() && !args.no_policy
}

/// What holds of a build on this host.
///
/// # Errors
/// Policy when something asked for is not granted, or a build cannot honour it; usage when the command line asks for more than the policy.
pub(super) fn rule(
    args: &BuildArgs,
    found: Option<&Found>,
    secrets: &Secrets,
    operator: &Operator,
    screen: Screen,
) -> Result<HeldBuild> {
    let since = Instant::now();
    let grants = policy_file::grants(&operator.home.config)?;
    let timeout = args.limits.timeout;
    let names = secrets.names();
    let asked = BuildAsked {
        allow: &args.allow,
        resources: Resources {
            cpus: args.limits.cpus,
            memory: args.limits.memory,
            timeout_ms: timeout
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        },
        disk: args.queueing.disk,
        secrets: &names,
        connections_most: kiln_proto::msg::CONNECTIONS_MOST,
    };
    let compiled = found.map(|found| &found.compiled);
    let mut held = hold_build(compiled, &grants, &TenantName::local(), &asked).map_err(refused)?;
    if let Some(applied) = &mut held.applied {
        let found = found.map(|found| found.took);
        applied.took(found.unwrap_or_default() + since.elapsed());
    }
    if let Some(found) = found {
        for note in &found.notes {
            screen.note(note);
        }
        let file = found.compiled.file();
        tell_removed(file, &held.removed, screen);
        run_bounds::given(&found.compiled, &args.limits, &operator.config)?;
        screen.note(&match held.only {
            true => format!("policy: {file}, the build reaches what its phase dependencies names"),
            false => format!(
                "policy: {file}, which has no phase dependencies: the build reaches the registries of its runtime"
            ),
        });
    }
    Ok(held)
}
