//! Followers of logs that another controller keeps: however many there are here, the other one has one to serve for each log.
//!
//! A mirror holds the last bytes of one log and asks for more while somebody is interested. A follower that fell behind reads past it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kiln_store::logs::{LogName, READ_MAX};
use tokio::sync::watch;

use super::client::Asked;
use crate::api::LogPiece;
use crate::state::Controller;

/// Bytes of one log that are kept here.
const TAIL_BYTES: usize = 256 * 1024;
/// Logs that are mirrored at a time; followers of more look now and then.
const MIRRORS_MAX: usize = 256;
/// Time between two looks of those.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How long one request waits for the log to grow.
const WAIT: Duration = Duration::from_secs(10);
/// A mirror nobody looked at for this long ends.
const IDLE: Duration = Duration::from_secs(15);

/// All mirrors of a controller.
#[derive(Debug, Default)]
pub(super) struct Mirrors {
    by_name: Arc<Mutex<HashMap<LogName, Arc<Mirror>>>>,
}

#[derive(Debug)]
struct Mirror {
    url: String,
    tail: Mutex<Tail>,
    /// Rings when there is more, and for ever when the mirror is over.
    bell: watch::Sender<bool>,
}

#[derive(Debug)]
struct Tail {
    /// Offset of the first byte that is kept.
    from: u64,
    bytes: Vec<u8>,
    size: u64,
    truncated: bool,
    asked: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mirror {
    fn end(&self) -> u64 {
        let tail = lock(&self.tail);
        tail.from + tail.bytes.len() as u64
    }

    fn take(&self, piece: &LogPiece) {
        let mut tail = lock(&self.tail);
        (tail.size, tail.truncated) = (piece.size, piece.truncated);
        tail.bytes.extend_from_slice(&piece.bytes);
        let excess = tail.bytes.len().saturating_sub(TAIL_BYTES);
        if excess > 0 {
            tail.bytes.drain(..excess);
            tail.from += excess as u64;
        }
    }

    fn read(&self, offset: u64, max: usize) -> Option<LogPiece> {
        let mut tail = lock(&self.tail);
        tail.asked = Instant::now();
        let skip = usize::try_from(offset.checked_sub(tail.from)?).ok()?;
        if skip > tail.bytes.len() {
            return None;
        }
        let end = tail.bytes.len().min(skip.saturating_add(max));
        Some(LogPiece {
            bytes: Bytes::copy_from_slice(&tail.bytes[skip..end]),
            size: tail.size,
            truncated: tail.truncated,
        })
    }

    fn is_idle(&self) -> bool {
        self.bell.receiver_count() == 0 && lock(&self.tail).asked.elapsed() >= IDLE
    }
}

impl Mirrors {
    /// What a mirror has at `offset`; nothing when there is none that reaches back so far, or it has nothing new.
    pub(super) fn read(&self, name: &LogName, offset: u64, max: usize) -> Option<LogPiece> {
        let mirror = lock(&self.by_name).get(name).cloned()?;
        mirror.read(offset, max)
    }

    /// Waits until the log is longer than `offset`, or its keeper does not answer any more.
    pub(super) async fn longer(
        &self,
        controller: &Controller,
        url: &str,
        name: &LogName,
        offset: u64,
    ) {
        let Some(mirror) = self.mirror(controller, url, name, offset) else {
            return tokio::time::sleep(LOOK_AGAIN).await;
        };
        let mut bell = mirror.bell.subscribe();
        lock(&mirror.tail).asked = Instant::now();
        while mirror.end() <= offset && !*bell.borrow_and_update() {
            if bell.changed().await.is_err() {
                break;
            }
        }
        if mirror.end() <= offset {
            // The keeper is away: whoever waits looks again, not at once.
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn mirror(
        &self,
        controller: &Controller,
        url: &str,
        name: &LogName,
        offset: u64,
    ) -> Option<Arc<Mirror>> {
        let mut by_name = lock(&self.by_name);
        if let Some(known) = by_name.get(name)
            && known.url == url
        {
            return Some(Arc::clone(known));
        }
        if by_name.len() >= MIRRORS_MAX {
            return None;
        }
        let mirror = Arc::new(Mirror {
            url: url.to_owned(),
            tail: Mutex::new(Tail {
                from: offset,
                bytes: Vec::new(),
                size: offset,
                truncated: false,
                asked: Instant::now(),
            }),
            bell: watch::Sender::new(false),
        });
        by_name.insert(name.clone(), Arc::clone(&mirror));
        let (controller, name) = (controller.clone(), name.clone());
        let (all, own) = (Arc::clone(&self.by_name), Arc::clone(&mirror));
        tokio::spawn(async move {
            keep(&controller, &name, &own).await;
            let mut by_name = lock(&all);
            if by_name
                .get(&name)
                .is_some_and(|known| Arc::ptr_eq(known, &own))
            {
                by_name.remove(&name);
            }
            drop(by_name);
            own.bell.send_replace(true);
        });
        Some(mirror)
    }
}

/// Asks for more until nobody is interested, or the keeper has no more to give.
async fn keep(controller: &Controller, name: &LogName, mirror: &Mirror) {
    while !mirror.is_idle() {
        let end = mirror.end();
        let asked = Asked::log(name, end, READ_MAX, WAIT);
        let client = &controller.peers.client;
        match client.log(controller, &mirror.url, &asked).await {
            Ok(far) => {
                mirror.take(&far.piece);
                mirror.bell.send_replace(false);
                if far.ended && far.piece.bytes.is_empty() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(log = %name, error = &error as &dyn std::error::Error, "a log is not mirrored any more");
                return;
            }
        }
    }
}
