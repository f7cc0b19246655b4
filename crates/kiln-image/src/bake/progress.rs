//! What a bake tells its caller while it runs, and how the caller stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Something worth showing happened.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum BakeEvent<'a> {
    /// Another process holds the bake cache; this one waits for it.
    Waiting,
    /// A stage starts.
    Started {
        /// Name of the stage.
        stage: &'a str,
    },
    /// A stage was finished by an earlier bake and is used again.
    Reused {
        /// Name of the stage.
        stage: &'a str,
    },
    /// A program of the stage wrote a line. Untrusted text: escape before a terminal.
    Line {
        /// Name of the stage.
        stage: &'a str,
        /// The line, without its end.
        line: &'a str,
    },
    /// A stage ended well.
    Finished {
        /// Name of the stage.
        stage: &'a str,
        /// How long it took.
        took: Duration,
        /// Bytes of files it made.
        bytes: u64,
    },
}

/// Receives events of a bake, from any thread.
pub trait BakeProgress: Sync {
    /// Called for each event. Should return quickly.
    fn event(&self, event: &BakeEvent<'_>);
}

impl<F: Fn(&BakeEvent<'_>) + Sync> BakeProgress for F {
    fn event(&self, event: &BakeEvent<'_>) {
        self(event);
    }
}

/// A switch that stops a bake: running programs are killed with their process group, stages that
/// did not finish are removed.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A switch that is off.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops every bake that holds a clone of this switch.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was switched.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
