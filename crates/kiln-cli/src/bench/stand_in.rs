//! A worker that starts no machine: it speaks a worker's protocol to a controller's private socket and "runs" each job for a fixed time.
//! For benchmarks of the controller alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln_core::dispatch::{Room, WorkerFacts};
use kiln_core::{ByteSize, JobId, Lease, Outcome, Verdict, WorkerId};
use kiln_proto::fleet::{
    Finish, HEARTBEAT_MS, Heartbeat, HeartbeatAnswer, HeldLease, JobEvents, Join, Joined, Leased,
    POLL_MS, Poll, PollAnswer,
};
use kiln_worker::fleet::client::{Client, REQUEST_TIMEOUT, job_path};
use kiln_worker::fleet::http::Target;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::error::{OrInfrastructure as _, Result};

/// Pause before something is asked again that was not answered.
const AGAIN: Duration = Duration::from_millis(100);

/// A lease that arrived.
#[derive(Clone, Debug)]
pub(super) struct Arrived {
    pub(super) job: JobId,
    pub(super) worker: WorkerId,
    pub(super) at: Instant,
}

/// How it works.
#[derive(Clone, Debug)]
pub(super) struct Way {
    /// Machines at a time.
    pub(super) machines: u32,
    /// How long each job takes.
    pub(super) works: Duration,
    /// Where arrivals are told.
    pub(super) arrived: mpsc::UnboundedSender<Arrived>,
}

/// One worker. Dropping it is its death: nobody is told.
#[derive(Debug)]
pub(super) struct StandIn {
    pub(super) name: WorkerId,
    dead: CancellationToken,
}

struct Inner {
    client: Client,
    way: Way,
    facts: WorkerFacts,
    name: WorkerId,
    held: Mutex<BTreeMap<JobId, Lease>>,
    beat: Notify,
    dead: CancellationToken,
}

impl StandIn {
    /// Joins over a controller's private socket, and works from then on.
    pub(super) async fn join(socket: &std::path::Path, name: &str, way: Way) -> Result<Self> {
        let name: WorkerId = name.parse().or_infrastructure()?;
        let client = Client::new(Target::Socket(socket.to_owned()), name.clone());
        let facts = facts(way.machines)?;
        let join = Join {
            worker: name.clone(),
            token: String::new(),
            csr: String::new(),
            labels: BTreeMap::new(),
            facts: facts.clone(),
        };
        let joined: Joined = client
            .call("/worker/v1/join", None, &join, REQUEST_TIMEOUT)
            .await
            .or_infrastructure()?;
        let dead = CancellationToken::new();
        let inner = Arc::new(Inner {
            client,
            way,
            facts,
            name: joined.worker,
            held: Mutex::default(),
            beat: Notify::new(),
            dead: dead.clone(),
        });
        let name = inner.name.clone();
        tokio::spawn(until_dead(dead.clone(), {
            let inner = Arc::clone(&inner);
            async move { inner.beats().await }
        }));
        tokio::spawn(until_dead(dead.clone(), async move { inner.polls().await }));
        Ok(Self { name, dead })
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.dead.cancel();
    }
}

async fn until_dead(dead: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = dead.cancelled() => {}
        () = work => {}
    }
}

impl Inner {
    fn held(&self) -> Vec<HeldLease> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let leases = held.values();
        leases
            .map(|lease| HeldLease {
                attempt: lease.attempt.clone(),
                epoch: lease.epoch,
            })
            .collect()
    }

    async fn beats(&self) {
        loop {
            let beat = Heartbeat {
                addresses: Vec::new(),
                kept: Vec::new(),
                facts: self.facts.clone(),
                held: self.held(),
                draining: false,
                orphans: 0,
            };
            let call = self.client.call::<_, HeartbeatAnswer>(
                "/worker/v1/heartbeat",
                None,
                &beat,
                REQUEST_TIMEOUT,
            );
            let _missed = call.await;
            let wait = Duration::from_millis(HEARTBEAT_MS);
            let _woken = tokio::time::timeout(wait, self.beat.notified()).await;
        }
    }

    async fn polls(self: Arc<Self>) {
        loop {
            let poll = Poll { held: self.held() };
            let longest = Duration::from_millis(POLL_MS) + REQUEST_TIMEOUT;
            let asked = self
                .client
                .call::<_, PollAnswer>("/worker/v1/poll", None, &poll, longest);
            match asked.await {
                Ok(answer) => {
                    for leased in answer.leases {
                        self.begin(leased);
                    }
                }
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }

    fn begin(self: &Arc<Self>, leased: Leased) {
        let at = Instant::now();
        let job = leased.lease.attempt.job.clone();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.insert(job.clone(), leased.lease.clone()).is_some() {
            return;
        }
        drop(held);
        let _nobody_asks = self.way.arrived.send(Arrived {
            job,
            worker: self.name.clone(),
            at,
        });
        self.beat.notify_one();
        let inner = Arc::clone(self);
        let dead = self.dead.clone();
        tokio::spawn(until_dead(dead, async move {
            inner.work(&leased.lease).await;
        }));
    }

    async fn work(&self, lease: &Lease) {
        let job = &lease.attempt.job;
        let started = JobEvents {
            from: 0,
            events: Vec::new(),
            started: true,
        };
        self.tell(lease, &job_path(job, "event"), &started).await;
        tokio::time::sleep(self.way.works).await;
        let finish = Finish {
            egress: Vec::new(),
            outcome: Outcome {
                verdict: Verdict::Passed,
                phases_ms: Vec::new(),
            },
            receipt: None,
            observed: None,
            runtime: None,
            details: serde_json::Value::Null,
        };
        self.tell(lease, &job_path(job, "finish"), &finish).await;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.remove(job);
    }

    /// Until it is taken or refused.
    async fn tell(&self, lease: &Lease, path: &str, message: &impl serde::Serialize) {
        loop {
            let told = self.client.call::<_, serde_json::Value>(
                path,
                Some(lease),
                message,
                REQUEST_TIMEOUT,
            );
            match told.await {
                Err(error) if error.is_passing() => tokio::time::sleep(AGAIN).await,
                _ => return,
            }
        }
    }
}

fn facts(machines: u32) -> Result<WorkerFacts> {
    Ok(WorkerFacts {
        arch: "amd64".parse().or_infrastructure()?,
        runtimes: BTreeSet::new(),
        capacity: Room {
            cpus: machines * 2,
            memory: ByteSize::gib(u64::from(machines) * 4),
            disk: ByteSize::gib(u64::from(machines) * 20),
            machines,
        },
        whole_cpus: None,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        generation: kiln_core::dispatch::POLICY_GENERATION,
        warm: BTreeSet::new(),
    })
}
