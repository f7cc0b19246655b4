//! The road of a machine that is ready already to a new owner: take it, begin a session anew, see that it is the same guest.
//!
//! A session begins by a nonce, so nothing that the dead owner left on the channel is taken for an answer. The guest ends its old session
//! with everything that belonged to it: its streams, their connections, and its commands. What orders began (mounts, `BuildKit`) stays.

use std::sync::Arc;
use std::time::Instant;

use kiln_core::MachineName;
use kiln_proto::msg::feature;
use kiln_proto::{Hello, Session, SessionError, SessionLimits};

use super::{
    BringUpError, Deadlines, FalseAnswer, Ready, Timings, console_of, report_leaks, unless_stopped,
};
use crate::driver::{Driver, Kept, Machine};

/// Becomes the owner of a kept machine and of its channel. See [`Machine::keep`].
///
/// # Errors
/// [`BringUpError::Adopt`] when the driver refuses. A guest that says nothing within [`Deadlines::clone_hello`] gives
/// [`BringUpError::Hello`] and stays as it was, kept until its time is over, as when this future is dropped. One that breaks the protocol
/// or is not the guest that was kept is destroyed, as is one that has stopped.
pub async fn adopt(
    driver: &dyn Driver,
    name: &MachineName,
    deadlines: Deadlines,
) -> Result<Ready, BringUpError> {
    let began = Instant::now();
    let adopted = driver.adopt(name).await.map_err(BringUpError::Adopt)?;
    let launch = began.elapsed();
    let mut leash = Leash(Some(Arc::clone(&adopted)));
    let result = unless_stopped(&adopted, greet(&adopted, deadlines)).await;
    match result {
        Ok(mut ready) => {
            leash.0 = None;
            ready.timings.launch = launch;
            Ok(ready)
        }
        Err(error) if is_silence(&error) => Err(error),
        Err(error) => {
            leash.0 = None;
            report_leaks(name, &adopted.destroy().await);
            Err(error)
        }
    }
}

/// Lets go of a machine when its adoption is given up.
struct Leash(Option<Arc<dyn Machine>>);

impl Drop for Leash {
    fn drop(&mut self) {
        if let Some(machine) = self.0.take()
            && let Err(error) = machine.release()
        {
            tracing::warn!(machine = %machine.name(), %error, "a machine whose adoption failed ends");
        }
    }
}

fn is_silence(error: &BringUpError) -> bool {
    match error {
        BringUpError::Hello { source, .. } => !matches!(
            source,
            SessionError::Protocol(_) | SessionError::NoEcho { .. }
        ),
        BringUpError::Machine(_) => true,
        _ => false,
    }
}

async fn greet(machine: &Arc<dyn Machine>, deadlines: Deadlines) -> Result<Ready, BringUpError> {
    let began = Instant::now();
    let channel = machine.channel().await.map_err(BringUpError::Machine)?;
    let limits = SessionLimits::default();
    let connected = Session::connect(channel, limits, deadlines.clone_hello).await;
    let (session, hello, incoming) = connected.map_err(|source| BringUpError::Hello {
        source,
        console: console_of(machine),
    })?;
    let hello_time = began.elapsed();
    // An adopted machine is kept: its record says as whom.
    let kept = machine.kept();
    let kept = kept.ok_or(BringUpError::False(FalseAnswer::NotTaken("record")))?;
    check(&hello, &kept).map_err(BringUpError::False)?;
    Ok(Ready {
        machine: Arc::clone(machine),
        session,
        incoming,
        hello,
        identity: kept.identity,
        timings: Timings {
            hello: hello_time,
            ..Timings::default()
        },
    })
}

/// Whether it is the guest that was made ready: a boot id is given once.
fn check(hello: &Hello, kept: &Kept) -> Result<(), FalseAnswer> {
    if !hello.has(feature::REIDENTIFY) {
        return Err(FalseAnswer::NoReidentify);
    }
    if hello.boot_id != kept.identity.boot_id {
        return Err(FalseAnswer::NotTaken("boot id"));
    }
    Ok(())
}
