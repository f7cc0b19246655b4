//! Pipelines whose builds fail again and again: counted without naming them, named in the log.
//!
//! A pipeline is a tenant's builds of one name in one queue. What is remembered is this process's and bounded; it begins anew with a start.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use kiln_core::{FailureClass, JobKind, JobRequest, Outcome, Verdict};
use kiln_telemetry::metrics::Metrics;

/// Failed builds in a row that make a pipeline count.
pub const FAILURES: u32 = 3;
/// Pipelines that are remembered because their last build failed.
const PIPELINES_MAX: usize = 10_000;

/// Failed builds in a row, by pipeline; those that pass are not here.
#[derive(Debug, Default)]
pub struct Pipelines(Mutex<HashMap<[String; 3], u32>>);

impl Pipelines {
    /// A job is over. What failed for other reasons than its own says nothing about its pipeline.
    pub fn ended(&self, metrics: &Metrics, request: &JobRequest, outcome: &Outcome) {
        let JobKind::SourceBuild(build) = &request.kind else {
            return;
        };
        let failed = match &outcome.verdict {
            Verdict::Passed => false,
            Verdict::Failed { class, .. } => match class {
                FailureClass::Infrastructure | FailureClass::Lost | FailureClass::Cancelled => {
                    return;
                }
                _ => true,
            },
        };
        let pipeline = [
            request.tenant.to_string(),
            request.dispatch.queue.to_string(),
            build.name.clone(),
        ];
        let mut failing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !failed {
            failing.remove(&pipeline);
        } else if failing.len() < PIPELINES_MAX || failing.contains_key(&pipeline) {
            let [tenant, queue, name] = pipeline.clone();
            let count = failing.entry(pipeline).or_insert(0);
            *count = count.saturating_add(1);
            if *count == FAILURES {
                metrics.pipeline_failed();
                tracing::warn!(tenant, queue, name, job = %request.id, "{FAILURES} builds of a pipeline failed in a row");
            }
        }
        let many = failing.values().filter(|count| **count >= FAILURES).count();
        metrics.failing_pipelines(u64::try_from(many).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use kiln_core::Digest;
    use kiln_core::job::{Source, SourceBuild};
    use kiln_telemetry::metrics::Prefix;

    use super::*;

    fn outcome(class: Option<FailureClass>) -> Outcome {
        let verdict = class.map_or(Verdict::Passed, |class| Verdict::Failed {
            class,
            message: String::new(),
            hint: None,
            command_code: None,
        });
        Outcome {
            verdict,
            phases_ms: Vec::new(),
        }
    }

    fn build(name: &str) -> JobRequest {
        let mut request = crate::webhooks::job_for_tests("b1", None).request;
        request.kind = JobKind::SourceBuild(SourceBuild {
            source: Source::Tree {
                digest: Digest::of(b""),
                size: 0,
            },
            name: name.to_owned(),
            dockerfile: None,
            dockerfile_text: None,
            target: None,
            build_args: std::collections::BTreeMap::new(),
            secrets: Vec::new(),
            tags: Vec::new(),
            no_cache: false,
        });
        request
    }

    #[test]
    fn three_in_a_row_count_and_a_pass_ends_it() {
        let (pipelines, metrics) = (Pipelines::default(), Metrics::new(Prefix::Kiln, "1"));
        let shown = |line: &str| metrics.render().lines().any(|l| l == line);
        let user = Some(FailureClass::User);
        for class in [
            user,
            user,
            Some(FailureClass::Infrastructure),
            None,
            user,
            user,
        ] {
            pipelines.ended(&metrics, &build("app"), &outcome(class));
            pipelines.ended(
                &metrics,
                &build(&format!("other-{class:?}")),
                &outcome(None),
            );
        }
        assert!(shown("kiln_pipelines_failing 0"));
        pipelines.ended(&metrics, &build("app"), &outcome(user));
        assert!(shown("kiln_pipelines_failing 1") && shown("kiln_pipeline_failures_total 1"));
        pipelines.ended(&metrics, &build("app"), &outcome(user));
        assert!(
            shown("kiln_pipeline_failures_total 1"),
            "{}",
            metrics.render()
        );
        pipelines.ended(&metrics, &build("app"), &outcome(None));
        assert!(shown("kiln_pipelines_failing 0") && shown("kiln_pipeline_failures_total 1"));
        assert!(!metrics.render().contains("app"));
    }
}
