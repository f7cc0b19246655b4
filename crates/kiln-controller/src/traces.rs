//! Where a job stands in a trace: below its caller's span when the request brought one, else at the top of a trace of its own.
//!
//! The ids follow from what is kept with the job, so every controller finds the same ones.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use kiln_core::{JobId, JobRequest, JobState, Verdict};
use kiln_db::Job;
use kiln_telemetry::otlp::{Span, Tracer};
use kiln_telemetry::trace::{TRACEPARENT, TraceContext};

/// The trace context of a request; one that is none counts for nothing, as the standard has it.
pub(crate) fn of_headers(headers: &HeaderMap) -> Option<String> {
    let mut all = headers.get_all(TRACEPARENT).iter();
    let first = all.next().filter(|_| all.next().is_none())?;
    let context: TraceContext = first.to_str().ok()?.parse().ok()?;
    Some(context.to_string())
}

/// The span of a job, and the id of its caller's.
pub(crate) fn of_job(request: &JobRequest) -> (TraceContext, Option<String>) {
    let caller: Option<TraceContext> = request
        .traceparent
        .as_deref()
        .and_then(|text| text.parse().ok());
    match caller {
        Some(caller) => (caller.named(request.id.as_str()), Some(caller.span_id())),
        None => (root(&request.id), None),
    }
}

fn root(job: &JobId) -> TraceContext {
    TraceContext::of_name(job.as_str())
}

/// A job is over: its span, and the one of its wait.
pub(crate) fn ended(tracer: &Tracer, job: &Job, first_leased_unix_ms: Option<u64>) {
    if !tracer.is_on() {
        return;
    }
    let (context, parent) = of_job(&job.request);
    let (Some(finished), JobState::Finished { outcome }) = (job.finished_unix_ms, &job.state)
    else {
        return;
    };
    let attributes = || {
        vec![
            ("kiln.job", job.request.id.to_string()),
            ("kiln.tenant", job.request.tenant.to_string()),
            ("kiln.queue", job.request.dispatch.queue.to_string()),
        ]
    };
    if let Some(leased) = first_leased_unix_ms {
        tracer.record(Span {
            context: context.named("wait"),
            parent: Some(context.span_id()),
            name: "wait".to_owned(),
            start: at(job.created_unix_ms),
            end: at(leased),
            ok: true,
            attributes: attributes(),
        });
    }
    tracer.record(Span {
        context,
        parent,
        name: kiln_db::kind_name(&job.request.kind).to_owned(),
        start: at(job.created_unix_ms),
        end: at(finished),
        ok: outcome.verdict == Verdict::Passed,
        attributes: attributes(),
    });
}

fn at(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unix_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_brings_one_context_or_none() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut headers = HeaderMap::new();
        assert!(of_headers(&headers).is_none());
        headers.insert(TRACEPARENT, good.parse().expect("a value"));
        assert_eq!(of_headers(&headers).as_deref(), Some(good));
        headers.append(TRACEPARENT, good.parse().expect("a value"));
        assert!(of_headers(&headers).is_none(), "two are none");
        headers.insert(TRACEPARENT, "00-nonsense".parse().expect("a value"));
        assert!(of_headers(&headers).is_none());
    }

    #[test]
    fn a_job_stands_below_its_caller() {
        let mut request = crate::webhooks::job_for_tests("b1", None).request;
        let (own, none) = of_job(&request);
        assert!(none.is_none() && own.is_sampled());
        assert_eq!(of_job(&request).0, own);
        let caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
        request.traceparent = Some(caller.to_owned());
        let (below, parent) = of_job(&request);
        assert_eq!(below.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(parent.as_deref(), Some("00f067aa0ba902b7"));
        assert_ne!(below.span_id(), "00f067aa0ba902b7");
        assert!(!below.is_sampled(), "its caller does not record it");
    }
}
