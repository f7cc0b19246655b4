//! Wake-ups after a commit. Losing one is harmless: everybody who listens also sweeps.

use kiln_core::{JobId, PoolName, WorkerId};
use tokio::sync::broadcast;

/// Something was committed that somebody may wait for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wake {
    /// A job came, ended or may be tried again, or room became free, in this pool.
    Queue(PoolName),
    /// A job has new events.
    Job(JobId),
    /// A worker got leases, a cancel or another state.
    Worker(WorkerId),
    /// Nobody schedules this pool any more.
    Lead(PoolName),
    /// Webhooks wait to be sent.
    Outbox,
    /// More happened than was kept: look at everything.
    Everything,
}

/// Wake-ups kept for a slow listener before it is told to look at everything.
const WAKES_MAX: usize = 4096;

/// Where wake-ups go: to listeners of this process, and to the one that tells other controllers.
#[derive(Clone)]
pub(crate) struct Wakes {
    pub(crate) here: broadcast::Sender<Wake>,
    pub(crate) elsewhere: broadcast::Sender<Wake>,
}

impl Wakes {
    pub(crate) fn new() -> Self {
        Self {
            here: broadcast::channel(WAKES_MAX).0,
            elsewhere: broadcast::channel(WAKES_MAX).0,
        }
    }

    /// After a commit of this process.
    pub(crate) fn send(&self, wakes: Vec<Wake>) {
        for wake in wakes {
            let _nobody = self.elsewhere.send(wake.clone());
            let _nobody = self.here.send(wake);
        }
    }
}
