//! What an attempt says while it runs: its log and its events, sent to the controller as they come, again after a break, never past a lease.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_core::Lease;
use kiln_proto::fleet::{JobEvents, LOG_PIECE_MAX, LogAnswer};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::client::{Client, LinkError, REQUEST_TIMEOUT, job_path};
use super::mask::Mask;
use super::spans::AttemptSpans;
use super::spool::Spool;
use crate::event::{Event, Events};

/// Most times that one question is asked.
const ASKED_MAX: u32 = 8;
/// First wait before something is sent again; it doubles.
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// Longest wait before something is sent again.
const RETRY_MAX: Duration = Duration::from_secs(3);
/// Most events of one message.
const EVENTS_MAX: usize = 64;
/// Events that may wait to be sent; more are left out, the log has what matters.
const EVENTS_QUEUE: usize = 1024;

/// The spans of an attempt, told by its events and ended with it.
pub(super) type Spans = Arc<Mutex<AttemptSpans>>;

/// The tasks that report on one attempt.
#[derive(Debug)]
pub struct Reporter {
    log: JoinHandle<()>,
    events: JoinHandle<()>,
    sorting: JoinHandle<()>,
}

/// Where an attempt reports to.
#[derive(Clone, Debug)]
pub struct To {
    /// The controller.
    pub client: Client,
    /// The lease everything is sent under.
    pub lease: Lease,
    /// Cancelled when the lease is over: nothing more is sent.
    pub fenced: CancellationToken,
}

impl Reporter {
    /// Starts reporting: `receiver` is what happens, `spool` what is printed. `also` sees every event at once.
    #[must_use]
    pub(super) fn start(
        to: &To,
        spool: Arc<Spool>,
        receiver: mpsc::Receiver<Event>,
        also: Option<Events>,
        mask: Mask,
        spans: Spans,
    ) -> Self {
        let (sender, queued) = mpsc::channel(EVENTS_QUEUE);
        Self {
            log: tokio::spawn(send_log(to.clone(), spool)),
            events: tokio::spawn(send_events(to.clone(), queued)),
            sorting: tokio::spawn(sort(receiver, sender, also, mask, spans)),
        }
    }

    /// Waits until everything that was said has been acknowledged, at most this long.
    pub async fn drain(self, at_most: Duration) {
        let all = async {
            let _said = tokio::join!(self.sorting, self.events, self.log);
        };
        if tokio::time::timeout(at_most, all).await.is_err() {
            tracing::warn!("the end of a log was not acknowledged in time");
        }
    }
}

/// An event for the controller; `started` is set once, when the machine is ready.
struct Said {
    event: serde_json::Value,
    started: bool,
}

async fn sort(
    mut receiver: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Said>,
    also: Option<Events>,
    mask: Mask,
    spans: Spans,
) {
    let mut started = false;
    while let Some(event) = receiver.recv().await {
        let event = masked(event, &mask);
        if let Some(also) = &also {
            also.tell(event.clone()).await;
        }
        let before = started;
        if let Event::Phase { name } = &event {
            spans
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .phase(name);
            // What comes after the machine's own phase happens in a machine that is ready.
            started |= !matches!(*name, "queue" | "checkout" | "plan" | "machine");
        }
        // Lines of output travel as the log.
        if matches!(event, Event::Log { .. } | Event::Progress { .. }) {
            continue;
        }
        let Ok(value) = serde_json::to_value(&event) else {
            continue;
        };
        let said = Said {
            event: value,
            started: started && !before,
        };
        match said.started {
            true => {
                let _gone = sender.send(said).await;
            }
            // A controller that is away must not hold up the job.
            false => {
                let _full = sender.try_send(said);
            }
        }
    }
}

fn masked(event: Event, mask: &Mask) -> Event {
    match event {
        Event::Progress { what, detail } => Event::Progress {
            what: mask.text(&what),
            detail: mask.text(&detail),
        },
        Event::Note { text } => Event::Note {
            text: mask.text(&text),
        },
        Event::Warning { text } => Event::Warning {
            text: mask.text(&text),
        },
        Event::Step {
            number,
            name,
            state,
            seconds,
        } => Event::Step {
            number,
            name: mask.text(&name),
            state,
            seconds,
        },
        Event::Log { step, stream, text } => Event::Log {
            step,
            stream,
            text: mask.text(&text),
        },
        event @ Event::Phase { .. } => event,
    }
}

async fn send_events(to: To, mut queued: mpsc::Receiver<Said>) {
    let path = job_path(&to.lease.attempt.job, "event");
    let mut from = 0;
    let mut batch = Vec::with_capacity(EVENTS_MAX);
    loop {
        if queued.recv_many(&mut batch, EVENTS_MAX).await == 0 {
            return;
        }
        let started = batch.iter().any(|said| said.started);
        let events: Vec<_> = batch.drain(..).map(|said| said.event).collect();
        let count = events.len() as u64;
        let message = JobEvents {
            from,
            events,
            started,
        };
        let (to, path, message) = (&to, &path, &message);
        let send = || {
            let lease = Some(&to.lease);
            to.client
                .call::<_, serde_json::Value>(path, lease, message, REQUEST_TIMEOUT)
        };
        if retried(&to.fenced, send).await.is_none() {
            return;
        }
        from += count;
    }
}

async fn send_log(to: To, spool: Arc<Spool>) {
    let mut progress = spool.progress();
    let (mut at, mut asked) = (0, false);
    loop {
        let now = *progress.borrow_and_update();
        // At the end it is asked once more, with nothing: another controller than the one that heard the beginning wants it all.
        let last = now.ended && now.bytes > 0 && !asked;
        if now.bytes <= at && !last {
            if now.ended {
                return;
            }
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { return },
                () = to.fenced.cancelled() => return,
            }
            continue;
        }
        asked = now.bytes <= at;
        let piece = match spool.read(at, LOG_PIECE_MAX) {
            Ok(piece) => bytes::Bytes::from(piece),
            Err(error) => {
                tracing::warn!(%error, "a log could not be read back");
                return;
            }
        };
        let path = job_path(&to.lease.attempt.job, &format!("log?from={at}"));
        let (to, path, piece) = (&to, &path, &piece);
        let send = || {
            let lease = Some(&to.lease);
            let kind = "application/octet-stream";
            to.client
                .post::<LogAnswer>(path, lease, piece.clone(), kind, REQUEST_TIMEOUT)
        };
        let Some(answer) = retried(&to.fenced, send).await else {
            return;
        };
        if answer.full {
            return;
        }
        // The controller says what it has: after its restart that may be less than it had.
        at = answer.next.min(now.bytes);
    }
}

/// Asks again while the controller is away for a moment, as it is when another command of the home takes its place; at most [`ASKED_MAX`] times.
pub(super) async fn answered<T, F>(
    fenced: &CancellationToken,
    send: impl Fn() -> F,
) -> Result<T, LinkError>
where
    F: Future<Output = Result<T, LinkError>>,
{
    let mut wait = RETRY_FIRST;
    let mut left = ASKED_MAX;
    loop {
        left -= 1;
        match send().await {
            Err(error) if error.is_passing() && left > 0 && !fenced.is_cancelled() => {
                tracing::debug!(error = crate::orders::chain(&error), "asked again");
            }
            answer => return answer,
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = fenced.cancelled() => {}
        }
        wait = (wait * 2).min(RETRY_MAX);
    }
}

/// Sends until it is answered. `None` when the lease is over or the controller will never take it.
pub(super) async fn retried<T, F>(fenced: &CancellationToken, send: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = Result<T, LinkError>>,
{
    let mut wait = RETRY_FIRST;
    loop {
        let sent = tokio::select! {
            sent = send() => sent,
            () = fenced.cancelled() => return None,
        };
        match sent {
            Ok(answer) => return Some(answer),
            Err(LinkError::LeaseRefused(why)) => {
                tracing::warn!(why, "the lease is over");
                fenced.cancel();
                return None;
            }
            Err(error) if error.is_passing() => {
                tracing::debug!(error = crate::orders::chain(&error), "sent again");
            }
            Err(error) => {
                tracing::warn!(error = crate::orders::chain(&error), "not taken");
                return None;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = fenced.cancelled() => return None,
        }
        wait = (wait * 2).min(RETRY_MAX);
    }
}
