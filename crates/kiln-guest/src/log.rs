//! The guest's own log: JSON lines on the console, and events for the host.
//!
//! Events wait in a bounded queue for whichever session is there; when it is full the oldest go, and the
//! next one that fits says how many.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_proto::msg::GuestEvent;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;

/// Events that wait for a session.
const EVENTS_MAX: usize = 256;
/// Bytes of one log message; the rest is cut.
const MESSAGE_MAX: usize = 2048;

/// How much a message matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub(crate) enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }

    /// `None` for a word that is no level.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        [Self::Error, Self::Warn, Self::Info, Self::Debug]
            .into_iter()
            .find(|l| l.name() == word)
    }
}

struct Queue {
    events: VecDeque<GuestEvent>,
    dropped: u64,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);
static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    events: VecDeque::new(),
    dropped: 0,
});
static ARRIVED: Notify = Notify::const_new();

/// Messages less important than this are dropped.
pub(crate) fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since power-on.
pub(crate) fn uptime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000
        + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

/// One line to the console, as it is.
pub(crate) fn raw(line: &str) {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(b'\n');
    let _console_gone = rustix::io::write(rustix::stdio::stderr(), &bytes);
}

fn write(level: Level, message: &str) {
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let mut end = message.len().min(MESSAGE_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let message = &message[..end];
    // The serial console is slow: it gets what matters, and everything when someone debugs.
    if level <= Level::Warn || LEVEL.load(Ordering::Relaxed) >= Level::Debug as u8 {
        let line =
            serde_json::json!({ "ms": uptime_ms(), "level": level.name(), "message": message });
        raw(&line.to_string());
    }
    emit(GuestEvent::Log {
        level: level.name().to_owned(),
        message: message.to_owned(),
    });
}

/// Queues an event for the host.
pub(crate) fn emit(event: GuestEvent) {
    let mut queue = queue();
    if queue.events.len() >= EVENTS_MAX {
        queue.events.pop_front();
        queue.dropped += 1;
    }
    queue.events.push_back(event);
    drop(queue);
    ARRIVED.notify_one();
}

/// The next event; waits for one. Safe to cancel: an event is taken only when it is given.
pub(crate) async fn next_event() -> GuestEvent {
    loop {
        {
            let mut queue = queue();
            if queue.dropped > 0 {
                let message = format!("{} events were dropped", std::mem::take(&mut queue.dropped));
                return GuestEvent::Log {
                    level: "warn".to_owned(),
                    message,
                };
            }
            if let Some(event) = queue.events.pop_front() {
                return event;
            }
        }
        ARRIVED.notified().await;
    }
}

pub(crate) fn error(message: &str) {
    write(Level::Error, message);
}

pub(crate) fn warn(message: &str) {
    write(Level::Warn, message);
}

pub(crate) fn info(message: &str) {
    write(Level::Info, message);
}

pub(crate) fn debug(message: &str) {
    write(Level::Debug, message);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_drops_the_oldest_and_says_so() {
        for count in 0..EVENTS_MAX as u64 + 3 {
            emit(GuestEvent::OomKill {
                cgroup: String::new(),
                count,
            });
        }
        let GuestEvent::Log { message, .. } = next_event().await else {
            panic!("no word of loss")
        };
        assert!(message.ends_with("events were dropped"), "{message}");
        assert!(matches!(next_event().await, GuestEvent::OomKill { count, .. } if count >= 3));
    }
}
