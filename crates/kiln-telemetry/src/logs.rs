//! Log set-up of a process.

use std::io;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, on standard error.
    Text,
    /// One JSON object a line, on standard error: `timestamp`, `level`, `target`, `message` and the event's fields, and `span` with the
    /// fields of the span it happened in; when a span ends, a line with `time.busy` and `time.idle`. Control characters are escaped, so
    /// that no logged text can begin a line of its own.
    Json,
}

/// What a process is, for how much it says unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Somebody waits for it: what went wrong is in its answer; the log shows errors.
    Command,
    /// It runs for long with nobody before it: the log is where an operator learns of a lost worker or an issuer that is away; it shows warnings, too.
    Service,
}

/// Sets up logging for this process. `verbosity` 0 shows what its `kind` says, 1 information, 2 and more debugging; `KILN_LOG` overrides
/// it. A second call does nothing.
pub fn init_logs(format: LogFormat, kind: Kind, verbosity: u8) {
    let level = match (verbosity, kind) {
        (0, Kind::Command) => "error",
        (0, Kind::Service) => "warn",
        (1, _) => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("KILN_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let _already_set = match format {
        LogFormat::Text => tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            .with_target(false)
            .try_init(),
        LogFormat::Json => json(filter, io::stderr).try_init().map_err(Into::into),
    };
}

fn json<W>(filter: EnvFilter, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_span_events(FmtSpan::CLOSE)
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .finish()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::span;
    use crate::trace::TraceContext;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("whole").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_carry_the_trace_and_no_text_begins_a_line() {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber = json(EnvFilter::new("info"), move || writer.clone());
        let context = TraceContext::root([1; 16], [2; 8], true).expect("not zero");
        tracing::subscriber::with_default(subscriber, || {
            let _phase = context.phase_span(span::BUILD).entered();
            tracing::info!(said = "a\n{\"level\":\"ERROR\"}\u{1b}[2J", "from a guest");
        });
        let text = String::from_utf8(kept.0.lock().expect("whole").clone()).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].contains(r#""message":"from a guest""#), "{text}");
        assert!(
            lines[0].contains(&format!(r#""trace_id":"{}""#, context.trace_id())),
            "{text}"
        );
        assert!(
            lines[0].contains(&format!(r#""span_id":"{}""#, context.span_id())),
            "{text}"
        );
        assert!(
            lines[1].contains(r#""phase":"build""#) && lines[1].contains("time.busy"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'));
    }
}
