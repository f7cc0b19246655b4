//! How builds and runs end, in the words of a job.

use kiln_core::job::AppliedPolicy;
use kiln_core::{FailureClass, Outcome, Verdict};
use kiln_network::EgressSummary;

use super::job::{Ended, JobEnd};
use crate::build::BuildEnd;
use crate::run::{RunEnd, ending, exit_code};

/// What would admit what was refused: a rule of the file that the job is held to, where one is; there a flag admits nothing.
pub(super) fn under_policy(
    egress: EgressSummary,
    policy: Option<&AppliedPolicy>,
    phase: &str,
) -> EgressSummary {
    match policy.and_then(|policy| policy.name.as_deref()) {
        Some(file) => egress.under_policy(file, phase),
        None => egress,
    }
}

pub(super) fn built(end: BuildEnd) -> JobEnd {
    let verdict = match &end.result {
        Ok(_) => Verdict::Passed,
        Err(failure) => failure.verdict(),
    };
    JobEnd {
        outcome: Outcome {
            verdict,
            phases_ms: end.phases_ms,
        },
        result: end.result.map(|report| Ended::Built(Box::new(report))),
        egress: end.egress,
        learned: Vec::new(),
        runtime: None,
        artifacts: Vec::new(),
        measured: end.measured,
        source: None,
        policy: None,
        kept: None,
    }
}

pub(super) fn ran(end: RunEnd) -> JobEnd {
    let verdict = match &end.result {
        Ok(exit) if exit.code == Some(0) => Verdict::Passed,
        Ok(exit) => Verdict::Failed {
            class: FailureClass::User,
            message: ending(exit),
            hint: None,
            command_code: Some(exit_code(exit)),
            reason: None,
        },
        Err(failure) => failure.verdict(),
    };
    JobEnd {
        outcome: Outcome {
            verdict,
            phases_ms: end.phases_ms,
        },
        result: end.result.map(Ended::Ran),
        egress: end.egress,
        learned: end.learned,
        runtime: None,
        artifacts: Vec::new(),
        measured: end.measured,
        source: end.source,
        policy: None,
        kept: end.kept.map(Box::new),
    }
}
