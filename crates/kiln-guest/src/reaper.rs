//! The one place where children are started and reaped.
//!
//! PID 1 gets every orphan of the machine. One loop takes all exit statuses; whoever started a child through
//! [`Reaper::spawn`] gets its status, the others are dropped. Starting and reaping exclude each other by a lock,
//! so a child that ends at once is never reaped before it is known.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{Context, SysError};
use crate::log;

/// How a child ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

impl Ended {
    /// From a status of wait(2).
    pub(crate) fn from_status(status: i32) -> Option<Self> {
        if libc::WIFEXITED(status) {
            Some(Self::Code(libc::WEXITSTATUS(status)))
        } else if libc::WIFSIGNALED(status) {
            Some(Self::Signal(libc::WTERMSIG(status)))
        } else {
            None
        }
    }
}

/// A child that was started.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its process id. Valid until `ended` was received.
    pub(crate) pid: i32,
    /// Tells how it ended.
    pub(crate) ended: oneshot::Receiver<Ended>,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<Ended>>>,
}

impl Reaper {
    /// Starts a child. Blocks until it has called exec or failed to.
    ///
    /// # Errors
    /// What fork, the preparations of the child or exec said.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let (sender, ended) = oneshot::channel();
        waiting.insert(pid, sender);
        Ok(Child { pid, ended })
    }

    /// Reaps for ever.
    ///
    /// # Errors
    /// When signals cannot be received.
    pub(crate) async fn run(&self) -> Result<(), SysError> {
        let mut children =
            signal(SignalKind::child()).context(|| "receive signals of children".to_owned())?;
        loop {
            while self.reap_one() {}
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    /// True if a child was reaped.
    #[expect(
        unsafe_code,
        reason = "rustix gives no status for unknown children without a pid"
    )]
    fn reap_one(&self) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut status = 0;
        // SAFETY: the pointer is to a local that outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return false;
        }
        match (waiting.remove(&pid), Ended::from_status(status)) {
            (Some(sender), Some(ended)) => {
                let _nobody_waits = sender.send(ended);
            }
            (Some(sender), None) => {
                // Stopped or continued: not asked for, and not the end.
                waiting.insert(pid, sender);
            }
            (None, _) => log::debug(&format!("orphan {pid} reaped")),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test: two reapers in one process would take each other's children.
    #[tokio::test]
    async fn every_child_gets_its_own_status() {
        let reaper = std::sync::Arc::new(Reaper::default());
        let running = std::sync::Arc::clone(&reaper);
        let task = tokio::spawn(async move { running.run().await });
        let children: Vec<_> = (0..20)
            .map(|code| {
                let script = format!("exit {code}");
                (
                    code,
                    reaper
                        .spawn(Command::new("sh").args(["-c", &script]))
                        .unwrap(),
                )
            })
            .collect();
        for (code, child) in children {
            assert_eq!(child.ended.await.unwrap(), Ended::Code(code));
        }
        let killed = reaper
            .spawn(Command::new("sh").args(["-c", "kill -9 $$"]))
            .unwrap();
        assert_eq!(killed.ended.await.unwrap(), Ended::Signal(9));
        assert!(reaper.spawn(&mut Command::new("/nonexistent")).is_err());
        task.abort();
    }
}
