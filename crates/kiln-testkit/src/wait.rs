//! Waiting for a state, never for a time.

use std::time::Duration;

use tokio::time::Instant;

/// How often the state is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Waits until something is so. For states that nobody announces: a file of another process, a process that ends.
///
/// # Panics
/// When it is not so at the deadline.
pub async fn wait_until(what: &str, deadline: Duration, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !is_so() {
        assert!(Instant::now() < end, "not within {deadline:?}: {what}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_waits_for_the_state() {
        let mut looks = 0;
        wait_until("three looks", Duration::from_secs(5), || {
            looks += 1;
            looks == 3
        })
        .await;
        assert_eq!(looks, 3);
    }
}
