//! What a job tells while it runs: phases, steps, log lines, notes. The CLI draws it, `--json` prints it,
//! the job record keeps it.

use serde::Serialize;
use tokio::sync::mpsc;

/// Events that may wait for a slow reader before log lines are dropped (and counted).
pub const EVENT_QUEUE_MAX: usize = 4096;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// A phase of the attempt began.
    Phase {
        /// `queue`, `machine`, `source`, `build`, `push`, `verify`, `commit`, `run`.
        name: &'static str,
    },
    /// Progress of something long that is not a build step.
    Progress {
        /// What is being done.
        what: String,
        /// A detail that changes.
        detail: String,
    },
    /// A remark for the user.
    Note {
        /// One line.
        text: String,
    },
    /// Something is not as it should be, and the job goes on.
    Warning {
        /// One line.
        text: String,
    },
    /// A build step changed its state.
    Step {
        /// Number in order of appearance, from 1.
        number: usize,
        /// What the step is.
        name: String,
        /// Its state.
        state: StepState,
        /// Seconds it took, when it ended.
        #[serde(skip_serializing_if = "Option::is_none")]
        seconds: Option<f64>,
    },
    /// A line of a step's or a command's output.
    Log {
        /// The step's number; 0 for a command.
        step: usize,
        /// 1 for standard output, 2 for standard error.
        stream: u8,
        /// Text, with invalid UTF-8 replaced.
        text: String,
    },
}

/// State of a build step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// It runs.
    Running,
    /// It was found in the cache.
    Cached,
    /// It succeeded.
    Done,
    /// It failed.
    Failed,
    /// It was stopped because another failed or the job was cancelled.
    Cancelled,
}

/// Where events go. Cheap to clone. Never blocks: a reader that does not keep up loses log lines, and is told how many.
#[derive(Clone, Debug)]
pub struct Events {
    sender: mpsc::Sender<Event>,
    dropped: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl Events {
    /// A queue for one reader.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE_MAX);
        (
            Self {
                sender,
                dropped: std::sync::Arc::default(),
            },
            receiver,
        )
    }

    /// Tells an event. Waits for a slow reader unless it is a log line.
    pub async fn tell(&self, event: Event) {
        if matches!(event, Event::Log { .. }) {
            self.tell_log(event);
        } else {
            let _reader_gone = self.sender.send(event).await;
        }
    }

    /// Tells an event without waiting.
    pub fn tell_now(&self, event: Event) {
        self.tell_log(event);
    }

    fn tell_log(&self, event: Event) {
        use std::sync::atomic::Ordering::Relaxed;
        match self.sender.try_send(event) {
            Ok(()) => {
                let dropped = self.dropped.swap(0, Relaxed);
                if dropped > 0 {
                    let text = format!(
                        "{dropped} lines of output are not shown here; the job's log has them"
                    );
                    if self.sender.try_send(Event::Note { text }).is_err() {
                        self.dropped.fetch_add(dropped, Relaxed);
                    }
                }
            }
            Err(_) => {
                self.dropped.fetch_add(1, Relaxed);
            }
        }
    }

    /// A remark.
    pub async fn note(&self, text: impl Into<String>) {
        self.tell(Event::Note { text: text.into() }).await;
    }

    /// A warning.
    pub async fn warn(&self, text: impl Into<String>) {
        self.tell(Event::Warning { text: text.into() }).await;
    }
}
