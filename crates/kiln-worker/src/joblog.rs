//! The log of a running job, shared by the tasks that write to it: masked, into the spool from which its controller is sent it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::event::Event;
use crate::fleet::mask::{Mask, MaskedStream};
use crate::fleet::spool::Spool;
use crate::fleet::witness::Witness;

/// Most bytes of one step's output in the log; the log as a whole is bounded by the record.
pub const STEP_BYTES_MAX: u64 = 16 << 20;

/// A job's log while the job runs. A disk that cannot take it never fails the job.
#[derive(Debug)]
pub struct JobLog {
    state: Mutex<State>,
    /// Told when something is held back.
    held: Notify,
    /// What the job can be remembered by.
    witness: Witness,
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

    fn held_until(&self) -> Option<tokio::time::Instant> {
        self.mask.as_ref().and_then(MaskedStream::held_until)
    }

    fn let_go(&mut self) {
        let out = self.mask.as_mut().map(MaskedStream::let_go);
        if let Some(out) = out.filter(|out| !out.is_empty()) {
            self.spool.append(&out);
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
            held: Notify::new(),
            witness: Witness::default(),
        }
    }

    /// Fills this one from now on.
    #[must_use]
    pub fn seen_by(self, witness: Witness) -> Self {
        Self { witness, ..self }
    }

    /// What the job can be remembered by when it is ended as an incident.
    #[must_use]
    pub fn witness(&self) -> &Witness {
        &self.witness
    }

    /// Lets go what could have been the beginning of a secret when it was held long enough. Never completes.
    pub async fn let_go(&self) -> Infallible {
        loop {
            // Bound here, so that nothing is locked while it waits.
            let until = self.lock().sink.held_until();
            match until {
                None => self.held.notified().await,
                Some(until) => {
                    tokio::time::sleep_until(until).await;
                    self.lock().sink.let_go();
                }
            }
        }
    }

    fn tell_held(&self, state: &State) {
        if state.sink.held_until().is_some() {
            self.held.notify_one();
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
        self.tell_held(&state);
    }

    /// Keeps raw output.
    pub fn raw(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.sink.write(bytes);
        self.tell_held(&state);
    }

    /// Keeps output of a command that is masked already, and was held back where it had to be.
    pub(crate) fn masked(&self, bytes: &[u8]) {
        let sink = &mut self.lock().sink;
        let Some(mask) = &mut sink.mask else { return };
        let before = mask.finish();
        if !before.is_empty() {
            sink.spool.append(&before);
        }
        sink.spool.append(bytes);
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
    use crate::fleet::mask::HELD_MAX;

    #[tokio::test(start_paused = true)]
    async fn what_could_begin_a_secret_is_soon_in_the_log() {
        let dir = tempfile::tempdir().expect("temp dir");
        let spool = Arc::new(Spool::create(&dir.path().join("log")).expect("a spool"));
        let log = JobLog::new(Arc::clone(&spool), &Mask::new([&b"hunter2"[..]]));
        let mut progress = spool.progress();
        let mut said = async |bytes: u64| {
            let all = progress.wait_for(|now| now.bytes >= bytes).await;
            all.expect("a spool").bytes
        };
        let since = tokio::time::Instant::now();
        let writing = async {
            log.raw(b"your name? h");
            assert_eq!(said(11).await, 11);
            assert_eq!(said(12).await, 12);
            assert_eq!(since.elapsed(), HELD_MAX);
            log.raw(b"unter2");
            assert_eq!(said(15).await, 15);
        };
        tokio::select! {
            () = writing => {}
            never = log.let_go() => match never {},
        }
        log.end();
        let kept = spool.read(0, 100).expect("read");
        assert_eq!(kept, b"your name? h***");
    }

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
