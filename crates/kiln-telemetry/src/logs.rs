//! Log set-up of a process.

use tracing_subscriber::EnvFilter;

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, on standard error.
    Text,
    /// One JSON object a line, on standard error: `timestamp`, `level`, `target`, `message` and the event's fields, and `span` with the
    /// fields of the span it happened in. Control characters are escaped, so that no logged text can begin a line of its own.
    Json,
}

/// Sets up logging for this process. `verbosity` 0 shows errors, 1 information, 2 and more debugging; `KILN_LOG` overrides it.
/// A second call does nothing.
pub fn init_logs(format: LogFormat, verbosity: u8) {
    let level = match verbosity {
        0 => "error",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("KILN_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let _already_set = match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init(),
    };
}
