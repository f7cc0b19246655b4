//! Ctrl-C: once cancels cleanly, twice ends the process at once (the next kiln command cleans up after it).

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::show::Screen;

/// A clean cancel that takes longer than this is given up.
pub(crate) const CANCEL_DEADLINE: Duration = Duration::from_secs(3);

/// Starts watching for SIGINT, SIGTERM and SIGHUP; the token is cancelled by the first of them. `what` says what that does: `cancelling`.
pub(crate) fn watch(screen: Screen, what: &'static str) -> CancellationToken {
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = (
            signal(SignalKind::interrupt()),
            signal(SignalKind::terminate()),
            signal(SignalKind::hangup()),
        ) else {
            return;
        };
        let mut count = 0;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            count += 1;
            if count == 1 {
                screen.note(&format!("{what}; press Ctrl-C again to stop at once"));
                cancelled.cancel();
            } else {
                crate::terminal::restore();
                #[expect(clippy::exit, reason = "the second interrupt asks for exactly this")]
                std::process::exit(130);
            }
        }
    });
    token
}
