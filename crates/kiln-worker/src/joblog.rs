//! The log of a running job, shared by the tasks that write to it: masked, into the spool from which its controller is sent it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::event::Event;
use crate::fleet::mask::{Mask, MaskedStream};
use crate::fleet::spool::Spool;

/// Most bytes of one step's output in the log; the log as a whole is bounded by the record.
pub const STEP_BYTES_MAX: u64 = 16 << 20;

/// A job's log while the job runs. A disk that cannot take it never fails the job.
#[derive(Debug)]
pub struct JobLog {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    sink: Sink,
    steps: HashMap<usize, u64>,
}

#[derive(Debug)]
struct Sink {
    spool: Arc<Spool>,
    /// None when the log has ended.
    mask: Option<MaskedStream>,
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) {
        let Some(mask) = &mut self.mask else { return };
        let masked = mask.push(bytes);
        if !masked.is_empty() {
            self.spool.append(&masked);
        }
    }
}

impl JobLog {
    /// Of an attempt whose controller is sent the spool.
    #[must_use]
    pub fn new(spool: Arc<Spool>, mask: &Mask) -> Self {
        let mask = Some(mask.stream());
        Self {
            state: Mutex::new(State {
                sink: Sink { spool, mask },
                steps: HashMap::new(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what belongs into a log: lines of output, steps, warnings.
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
    }

    /// Keeps raw output of a command.
    pub fn raw(&self, bytes: &[u8]) {
        self.lock().sink.write(bytes);
    }

    /// No more comes.
    pub fn end(&self) {
        let sink = &mut self.lock().sink;
        if let Some(mut mask) = sink.mask.take() {
            sink.spool.append(&mask.finish());
            sink.spool.end();
        }
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
    use super::*;

    #[test]
    fn a_flooding_step_is_cut_and_others_are_not() {
        let dir = tempfile::tempdir().expect("temp dir");
        let spool = Arc::new(Spool::create(&dir.path().join("log")).expect("a spool"));
        let log = JobLog::new(Arc::clone(&spool), &Mask::new([]));
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
        log.end();
        let bytes = spool.progress().borrow().bytes;
        let all = usize::try_from(bytes).expect("fits");
        let kept = String::from_utf8(spool.read(0, all).expect("read")).expect("text");
        assert!(
            kept.len() < 18 << 20 && kept.contains("#2 after") && kept.contains("the rest is cut")
        );
    }
}
