//! The record of a running job, shared by the tasks that write to it: output, events, and the end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_core::{Observed, Outcome, Receipt};
use kiln_store::records::{JobWriter, NewRecord, Records};

use crate::event::Event;
use crate::failure::Failure;
use crate::fleet::mask::{Mask, MaskedStream};
use crate::fleet::spool::Spool;
use crate::home::Home;
use crate::host::now_unix_ms;

/// Most bytes of one step's output in the log; the log as a whole is bounded by the record.
pub const STEP_BYTES_MAX: u64 = 16 << 20;

/// A job's record while the job runs. A disk that cannot take it never fails the job.
#[derive(Debug)]
pub struct JobLog {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    sink: Sink,
    steps: HashMap<usize, u64>,
}

/// Where a job's output is kept.
#[derive(Debug)]
enum Sink {
    /// In a record on this host.
    Record(Box<JobWriter>),
    /// Masked, on its way to a controller.
    Spool(Arc<Spool>, MaskedStream),
    /// The record has ended.
    Ended,
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) {
        match self {
            Self::Record(writer) => {
                let _disk_full = writer.log(bytes);
            }
            Self::Spool(spool, mask) => {
                let masked = mask.push(bytes);
                if !masked.is_empty() {
                    spool.append(&masked);
                }
            }
            Self::Ended => {}
        }
    }
}

impl JobLog {
    /// Begins the record of a job.
    ///
    /// # Errors
    /// When it cannot be written at all.
    pub fn begin(home: &Home, new: NewRecord) -> Result<Self, Failure> {
        let records =
            Records::open(&home.jobs()).map_err(|error| Failure::infrastructure(&error))?;
        let writer = records
            .begin(new)
            .map_err(|error| Failure::infrastructure(&error))?;
        Ok(Self {
            state: Mutex::new(State {
                sink: Sink::Record(Box::new(writer)),
                steps: HashMap::new(),
            }),
        })
    }

    /// The log of an attempt that a controller follows: masked, into a spool. There is no record on this host.
    #[must_use]
    pub fn spooled(spool: Arc<Spool>, mask: &Mask) -> Self {
        Self {
            state: Mutex::new(State {
                sink: Sink::Spool(spool, mask.stream()),
                steps: HashMap::new(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an event; output lines and steps also go into the log.
    pub fn event(&self, event: &Event) {
        let mut state = self.lock();
        match event {
            Event::Log { step, text, .. } => state.line(*step, &format!("#{step} {text}\n")),
            Event::Step {
                number,
                name,
                state: step,
                seconds,
            } => {
                let time = seconds.map(|s| format!(" {s:.1}s")).unwrap_or_default();
                state.line(0, &format!("#{number} {name} {step:?}{time}\n"));
            }
            Event::Warning { text } => state.line(0, &format!("warning: {text}\n")),
            Event::Note { .. } | Event::Phase { .. } | Event::Progress { .. } => {}
        }
        if !matches!(event, Event::Log { .. })
            && let Sink::Record(writer) = &mut state.sink
        {
            let _disk_full = writer.event(event);
        }
    }

    /// Keeps raw output of a command.
    pub fn raw(&self, bytes: &[u8]) {
        self.lock().sink.write(bytes);
    }

    /// Ends the record; a spool only learns that no more comes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(
        &self,
        outcome: Outcome,
        receipt: Option<Receipt>,
        observed: Option<&Observed>,
        details: serde_json::Value,
    ) -> Result<(), Failure> {
        let mut writer = match std::mem::replace(&mut self.lock().sink, Sink::Ended) {
            Sink::Record(writer) => writer,
            Sink::Spool(spool, mut mask) => {
                spool.append(&mask.finish());
                spool.end();
                return Ok(());
            }
            Sink::Ended => return Ok(()),
        };
        let ended = (|| {
            if let Some(observed) = observed {
                writer.observed(observed)?;
            }
            writer.details(details)?;
            writer.finish(outcome, receipt, now_unix_ms())
        })();
        ended.map_err(|error| Failure::infrastructure(&error))
    }
}

impl State {
    fn line(&mut self, step: usize, text: &str) {
        let mut mark = None;
        if step > 0 {
            let used = self.steps.entry(step).or_default();
            let before = *used;
            *used += text.len() as u64;
            if before >= STEP_BYTES_MAX {
                return;
            }
            if *used >= STEP_BYTES_MAX {
                mark = Some(format!(
                    "#{step} [kiln: this step printed more than {STEP_BYTES_MAX} bytes; the rest is cut]\n"
                ));
            }
        }
        self.sink.write(mark.as_deref().unwrap_or(text).as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_flooding_step_is_cut_and_others_are_not() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        home.prepare().expect("home");
        let id: kiln_core::JobId = "b1".parse().expect("name");
        let new = NewRecord {
            id: id.clone(),
            tenant: kiln_core::TenantName::local(),
            kind: "image-build".to_owned(),
            title: "x".to_owned(),
            started_unix_ms: 1,
        };
        let log = JobLog::begin(&home, new).expect("begin");
        let text = "x".repeat(1 << 20);
        for _ in 0..20 {
            log.event(&Event::Log {
                step: 1,
                stream: 1,
                text: text.clone(),
            });
        }
        log.event(&Event::Log {
            step: 2,
            stream: 1,
            text: "after".to_owned(),
        });
        let outcome = Outcome {
            verdict: kiln_core::Verdict::Passed,
            phases_ms: Vec::new(),
        };
        log.finish(outcome, None, None, serde_json::Value::Null)
            .expect("finish");
        let mut kept = String::new();
        let records = Records::open(&home.jobs()).expect("open");
        records
            .open_log(&id)
            .expect("log")
            .read_to_string(&mut kept)
            .expect("read");
        assert!(
            kept.len() < 18 << 20 && kept.contains("#2 after") && kept.contains("the rest is cut")
        );
    }
}
