//! Spans of an attempt: one for the whole of it, one below for each phase, from when its event was told to the next.

use std::time::SystemTime;

use kiln_core::AttemptId;
use kiln_telemetry::otlp::{Span, Tracer};
use kiln_telemetry::trace::TraceContext;

/// What is told of one attempt.
#[derive(Debug)]
pub(super) struct AttemptSpans {
    tracer: Tracer,
    /// The job's span, and the attempt's below it; none when the controller said no trace.
    contexts: Option<(TraceContext, TraceContext)>,
    attempt: AttemptId,
    began: SystemTime,
    phase: Option<(&'static str, SystemTime)>,
}

impl AttemptSpans {
    /// The attempt begins. `traceparent` is the job's span.
    pub(super) fn begin(tracer: &Tracer, traceparent: Option<&str>, attempt: &AttemptId) -> Self {
        let job: Option<TraceContext> = traceparent.and_then(|text| text.parse().ok());
        let name = format!("attempt {}", attempt.number);
        Self {
            tracer: tracer.clone(),
            contexts: job.map(|job| (job, job.named(&name))),
            attempt: attempt.clone(),
            began: SystemTime::now(),
            phase: None,
        }
    }

    /// The attempt's place in its trace.
    pub(super) fn context(&self) -> Option<TraceContext> {
        self.contexts.map(|(_, attempt)| attempt)
    }

    /// A phase begins, and the one before ends.
    pub(super) fn phase(&mut self, name: &'static str) {
        self.end_phase(true);
        self.phase = Some((name, SystemTime::now()));
    }

    fn end_phase(&mut self, ok: bool) {
        let (Some((name, start)), Some((_, attempt))) = (self.phase.take(), self.contexts) else {
            return;
        };
        self.tracer.record(Span {
            context: attempt.named(name),
            parent: Some(attempt.span_id()),
            name: name.to_owned(),
            start,
            end: SystemTime::now(),
            ok,
            attributes: self.attributes(),
        });
    }

    /// The attempt is over; its last phase is the one it failed in, if it did.
    pub(super) fn end(&mut self, ok: bool) {
        self.end_phase(ok);
        let Some((job, attempt)) = self.contexts.take() else {
            return;
        };
        self.tracer.record(Span {
            context: attempt,
            parent: Some(job.span_id()),
            name: "attempt".to_owned(),
            start: self.began,
            end: SystemTime::now(),
            ok,
            attributes: self.attributes(),
        });
    }

    fn attributes(&self) -> Vec<(&'static str, String)> {
        vec![
            ("kiln.job", self.attempt.job.to_string()),
            ("kiln.attempt", self.attempt.number.to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn phases_are_below_the_attempt_and_the_attempt_below_the_job() {
        let (tracer, spans) = Tracer::to_queue(Arc::new(|_| {}));
        let attempt = AttemptId {
            job: "b1".parse().expect("id"),
            number: 2,
        };
        let job = TraceContext::of_name("b1");
        let text = job.to_string();
        let mut telling = AttemptSpans::begin(&tracer, Some(&text), &attempt);
        let own = telling.context().expect("a place");
        telling.phase("machine");
        telling.phase("build");
        telling.end(false);
        telling.end(true);
        let all: Vec<Span> = spans.try_iter().collect();
        let told: Vec<_> = all
            .iter()
            .map(|span| (span.name.as_str(), span.ok))
            .collect();
        assert_eq!(
            told,
            [("machine", true), ("build", false), ("attempt", false)]
        );
        assert!(
            all.iter()
                .all(|span| span.context.trace_id() == job.trace_id())
        );
        assert_eq!(all[1].parent, Some(own.span_id()));
        assert_eq!(
            (all[2].context, all[2].parent.clone()),
            (own, Some(job.span_id()))
        );
        let mut silent = AttemptSpans::begin(&tracer, Some("nonsense"), &attempt);
        silent.phase("machine");
        silent.end(true);
        assert!(silent.context().is_none() && spans.try_iter().next().is_none());
    }
}
