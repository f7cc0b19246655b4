//! Measures the promise about followers: how long a line takes from its writer to each of many.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use tokio::task::JoinSet;

use super::{LogError, LogName, LogStore};

/// Longest wait for one line at all followers.
const LINE_MAX: Duration = Duration::from_secs(30);

/// Lets `followers` follow the log, writes `lines` lines one after the other, and gives for each line how long it took to each of the
/// followers, in no order. The log must be new; the caller ends it.
///
/// # Errors
/// When the log cannot be written or read; [`LogError::Stopping`] when a line did not reach everybody.
pub async fn line_to_follower(
    store: &LogStore,
    name: &LogName,
    followers: usize,
    lines: usize,
) -> Result<Vec<Vec<Duration>>, LogError> {
    let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    for _ in 0..followers {
        let mut stream = Box::pin(store.follow(name, 0));
        let sender = sender.clone();
        tasks.spawn(async move {
            let mut have = 0;
            while let Some(Ok(bytes)) = stream.next().await {
                have += bytes.len() as u64;
                if sender.send((have, Instant::now())).is_err() {
                    break;
                }
            }
        });
    }
    let (mut end, mut rounds) = (0, Vec::new());
    // The first line finds followers that are still arriving; it is not counted.
    for number in 0..=lines {
        let line = format!("#{number} a line of what a build prints while somebody looks at it\n");
        let sent = Instant::now();
        end = store.append(name, end, line.into()).await?.next;
        let mut took = Vec::with_capacity(followers);
        while took.len() < followers {
            let next = tokio::time::timeout(LINE_MAX, seen.recv()).await;
            let (have, at) = next.ok().flatten().ok_or(LogError::Stopping)?;
            if have == end {
                took.push(at.duration_since(sent));
            }
        }
        rounds.push(took);
    }
    rounds.remove(0);
    Ok(rounds)
}
