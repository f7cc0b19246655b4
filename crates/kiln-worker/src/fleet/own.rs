//! A command that runs its own job: it joins its home's controller as a worker of its own, hands in the job that only this worker may run,
//! and waits for its end. The job goes through the same queue, lease and doors as any other; its terminal and its folder stay here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_core::dispatch::{Room, WorkerFacts, own_labels};
use kiln_core::{ByteSize, FailureClass, JobId, JobRequest, Label, WorkerId};
use kiln_proto::fleet::{Join, Joined, Own, Owned};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::client::{LinkError, REQUEST_TIMEOUT};
use super::daemon::{self, Ended, Offer};
use super::job::{JobEnd, Workshop};
use super::local::LocalJob;
use crate::failure::Failure;
use crate::orders::chain;

/// Longest wait for a controller that is taken over by another process just now.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);
/// Wait before the controller is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// This process as a worker of its home's controller.
#[derive(Debug)]
pub struct OwnWorker {
    shop: Arc<Workshop>,
    stop: CancellationToken,
    serving: JoinHandle<Result<(), Ended>>,
}

/// A job that was handed in.
#[derive(Debug)]
pub struct Waiting {
    job: JobId,
    done: oneshot::Receiver<JobEnd>,
    shop: Arc<Workshop>,
}

impl OwnWorker {
    /// Joins under a name that was never used before.
    ///
    /// # Errors
    /// When the controller does not answer, or refuses.
    pub async fn join(shop: Arc<Workshop>, worker: WorkerId) -> Result<Self, LinkError> {
        let facts = facts(&shop);
        let join = Join {
            labels: own_labels(&worker),
            worker,
            token: String::new(),
            csr: String::new(),
            facts: facts.clone(),
        };
        let _joined: Joined = asked(&shop, "/worker/v1/join", &join).await?;
        let stop = CancellationToken::new();
        let offer = Offer {
            facts,
            takes_jobs: true,
            own: true,
        };
        let serving = tokio::spawn(daemon::serve(Arc::clone(&shop), offer, stop.clone()));
        Ok(Self {
            shop,
            stop,
            serving,
        })
    }

    /// Hands in a job, with what this process has for it.
    ///
    /// # Errors
    /// When the controller does not answer, or refuses.
    pub async fn submit(
        &self,
        request: JobRequest,
        labels: BTreeMap<Label, Label>,
        mut local: LocalJob,
    ) -> Result<Waiting, LinkError> {
        let job = request.id.clone();
        let (sender, done) = oneshot::channel();
        local.done = Some(sender);
        self.shop.local.put(job.clone(), local);
        let own = Own { request, labels };
        let handed: Result<Owned, _> = asked(&self.shop, "/worker/v1/own", &own).await;
        if let Err(error) = handed {
            drop(self.shop.local.take(&job));
            return Err(error);
        }
        Ok(Waiting {
            job,
            done,
            shop: Arc::clone(&self.shop),
        })
    }

    /// Leaves the controller. What still runs is destroyed.
    pub async fn leave(self) {
        self.stop.cancel();
        let _ended = self.serving.await;
    }
}

impl Waiting {
    /// The job.
    #[must_use]
    pub fn job(&self) -> &JobId {
        &self.job
    }

    /// Whether no attempt has begun yet.
    #[must_use]
    pub fn is_queued(&self) -> bool {
        self.shop.local.holds(&self.job)
    }

    /// Waits for the end. May be waited for again when the wait was dropped.
    pub async fn ended(&mut self) -> Result<JobEnd, Failure> {
        let ended = (&mut self.done).await;
        ended.map_err(|_| {
            Failure::new(
                FailureClass::Lost,
                "the controller gave this job up, and its machine was destroyed",
            )
            .hint("`kiln job show` may say why; run the command again")
        })
    }
}

/// Room for whatever its command asks: how much is really free is decided where machines start, by the ledger that all processes of the
/// home share.
fn facts(shop: &Workshop) -> WorkerFacts {
    WorkerFacts {
        capacity: Room {
            cpus: u32::MAX >> 1,
            memory: ByteSize(u64::MAX >> 2),
            disk: ByteSize(u64::MAX >> 2),
            machines: 1,
        },
        ..daemon::facts(shop, 1)
    }
}

/// Asks until there is an answer: between two controllers of a home there is a moment without one.
async fn asked<Q: serde::Serialize, A: serde::de::DeserializeOwned>(
    shop: &Workshop,
    path: &str,
    message: &Q,
) -> Result<A, LinkError> {
    let end = tokio::time::Instant::now() + ASK_TIMEOUT;
    loop {
        match shop.client.call(path, None, message, REQUEST_TIMEOUT).await {
            Err(error) if error.is_passing() && tokio::time::Instant::now() < end => {
                tracing::debug!(error = chain(&error), path, "asked again");
                tokio::time::sleep(ASK_AGAIN).await;
            }
            answered => return answered,
        }
    }
}
