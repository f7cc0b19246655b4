//! The log of a job as it is kept: bounded, with an honest mark where something was cut.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use crate::event::Event;

/// Most bytes of one job's log.
pub const LOG_BYTES_MAX: u64 = 64 << 20;
/// Most bytes of one step's output within it.
pub const STEP_BYTES_MAX: u64 = 16 << 20;

/// A bounded log.
pub struct JobLog {
    state: Mutex<State>,
}

struct State {
    out: Box<dyn Write + Send>,
    written: u64,
    cut: u64,
    steps: std::collections::HashMap<usize, u64>,
    failed: bool,
}

impl std::fmt::Debug for JobLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobLog").finish_non_exhaustive()
    }
}

impl JobLog {
    /// A log that writes here.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        let state = State { out, written: 0, cut: 0, steps: std::collections::HashMap::new(), failed: false };
        Self { state: Mutex::new(state) }
    }

    /// Keeps what belongs into a log: steps and their output.
    pub fn event(&self, event: &Event) {
        match event {
            Event::Log { step, text, .. } => self.line(*step, &format!("#{step} {text}\n")),
            Event::Step { number, name, state, seconds } => {
                let time = seconds.map(|s| format!(" {s:.1}s")).unwrap_or_default();
                self.line(0, &format!("#{number} {name} {state:?}{time}\n"));
            }
            Event::Warning { text } => self.line(0, &format!("warning: {text}\n")),
            Event::Note { .. } | Event::Phase { .. } | Event::Progress { .. } => {}
        }
    }

    /// Keeps raw output of a command.
    pub fn raw(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.write(bytes);
    }

    fn line(&self, step: usize, text: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if step > 0 {
            let used = state.steps.entry(step).or_default();
            let before = *used;
            *used += text.len() as u64;
            if before >= STEP_BYTES_MAX {
                state.cut += text.len() as u64;
                return;
            }
            if *used >= STEP_BYTES_MAX {
                let mark = format!("#{step} [kiln: this step printed more than {STEP_BYTES_MAX} bytes; the rest is cut]\n");
                state.write(mark.as_bytes());
                return;
            }
        }
        state.write(text.as_bytes());
    }

    /// Ends the log; says how much was cut.
    pub fn finish(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.cut > 0 {
            let mark = format!("[kiln: {} bytes of output were cut]\n", state.cut);
            let _full = state.out.write_all(mark.as_bytes());
        }
        let _full = state.out.flush();
    }

    /// Bytes that were cut so far.
    #[must_use]
    pub fn cut(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).cut
    }
}

impl State {
    fn write(&mut self, bytes: &[u8]) {
        if self.failed || self.written + bytes.len() as u64 > LOG_BYTES_MAX {
            self.cut += bytes.len() as u64;
            return;
        }
        if self.out.write_all(bytes).is_err() {
            // A full disk must not fail the job; the mark at the end says what is missing.
            self.failed = true;
            self.cut += bytes.len() as u64;
            return;
        }
        self.written += bytes.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("test").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_flooding_step_is_cut_and_others_are_not() {
        let out = Shared::default();
        let log = JobLog::new(Box::new(out.clone()));
        let text = "x".repeat(1 << 20);
        for _ in 0..20 {
            log.event(&Event::Log { step: 1, stream: 1, text: text.clone() });
        }
        log.event(&Event::Log { step: 2, stream: 1, text: "after".to_owned() });
        log.finish();
        assert!(log.cut() > 3 << 20);
        let kept = String::from_utf8(out.0.lock().expect("test").clone()).expect("text");
        assert!(kept.len() < 18 << 20 && kept.contains("#2 after") && kept.contains("the rest is cut"));
        assert!(kept.ends_with("bytes of output were cut]\n"));
    }
}
