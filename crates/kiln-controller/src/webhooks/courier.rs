//! The delivery loop.
//!
//! One tenant's slow receivers hold up nobody else: few are tried at once for each tenant, few wait here for each, and a receiver that
//! is out is not tried for a while: what is due for it fails at once and waits in the database.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kiln_core::TenantName;
use kiln_db::{Database, Message, Wake};
use kiln_telemetry::metrics::Metrics;
use tokio::sync::Notify;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::destination::{Destination, ReceiverPolicy};
use super::outbox::Outbox;
use super::post::{HostNetwork, Letter, Network, PostError, Sender, tls};
use super::signature::{Signer, sign_with};

/// Seconds between a failed try and the next. After the last of them a message is dead. Together just under a day.
pub const BACKOFF_S: [u64; 12] = [
    5, 30, 120, 600, 1_800, 3_600, 7_200, 7_200, 14_400, 14_400, 14_400, 21_600,
];
/// Most tries at once.
const TRIES_MAX: usize = 32;
/// Most tries at once for one tenant.
const TENANT_TRIES_MAX: usize = 4;
/// Most messages of one tenant that wait here; others wait in the database.
const TENANT_WAITING_MAX: usize = 16;
/// Most messages here.
const HERE_MAX: usize = 256;
/// Messages taken at once.
const TAKE: u32 = 64;
/// Longer than a message can be here: all that wait before it, and itself.
const LEASE: Duration = Duration::from_secs(180);
/// Until a message that found no place is due again.
const PUT_BACK: Duration = Duration::from_secs(20);
/// Longest time between two looks into the outbox, should a wake-up be lost.
const LOOK: Duration = Duration::from_secs(5);
/// Wait before the next look when one tenant has more than fits here.
const CROWDED: Duration = Duration::from_millis(250);
/// Wait after the database did not answer.
const DATABASE_AGAIN: Duration = Duration::from_secs(1);
/// A receiver is out after this many outages in a row.
const OUTAGES: u32 = 3;
/// For how long it is not tried then; each further outage doubles it.
const OUT_FOR: Duration = Duration::from_secs(15);
/// Longest time a receiver is not tried.
const OUT_MAX: Duration = Duration::from_secs(300);
/// Most receivers that are remembered as out.
const RECEIVERS_MAX: usize = 4096;
/// Time for tries under way when the courier is stopped; they are due again otherwise.
const STOP: Duration = Duration::from_secs(5);

/// What the operator set.
#[derive(Clone, Debug, Default)]
pub struct CourierOptions {
    /// Where webhooks may go.
    pub policy: ReceiverPolicy,
    /// Certificates to trust besides the host's own.
    pub extra_roots: Vec<rustls::pki_types::CertificateDer<'static>>,
}

/// Sends what is in the outbox. Cheap to clone.
#[derive(Debug)]
pub struct Courier<O, N> {
    inner: Arc<Inner<O, N>>,
}

#[derive(Debug)]
struct Inner<O, N> {
    outbox: O,
    sender: Sender<N>,
    signer: Signer,
    metrics: Metrics,
    receivers: Mutex<HashMap<String, Receiver>>,
    bell: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Receiver {
    outages: u32,
    out_until: Instant,
}

/// Messages that are here.
#[derive(Default)]
struct Here {
    ids: HashSet<String>,
    tenants: BTreeMap<TenantName, OfTenant>,
    running: usize,
    /// Whose turn is after this one's.
    last: Option<TenantName>,
}

#[derive(Default)]
struct OfTenant {
    waiting: VecDeque<Message>,
    running: usize,
}

impl Here {
    fn has_room(&self) -> bool {
        self.ids.len() + TAKE as usize <= HERE_MAX
    }

    /// A place for it, or it is given back.
    fn place(&mut self, message: Message) -> Option<Message> {
        if self.ids.contains(&message.id) {
            return None;
        }
        let of = self.tenants.entry(message.tenant.clone()).or_default();
        if of.waiting.len() >= TENANT_WAITING_MAX {
            return Some(message);
        }
        self.ids.insert(message.id.clone());
        of.waiting.push_back(message);
        None
    }

    /// The next one to try: tenants take turns.
    fn next(&mut self) -> Option<Message> {
        if self.running >= TRIES_MAX {
            return None;
        }
        let ready = |of: &OfTenant| of.running < TENANT_TRIES_MAX && !of.waiting.is_empty();
        let after = |name: &TenantName| self.last.as_ref().is_none_or(|last| name > last);
        let tenant = self
            .tenants
            .iter()
            .find(|(name, of)| after(name) && ready(of))
            .or_else(|| self.tenants.iter().find(|(_, of)| ready(of)))
            .map(|(name, _)| name.clone())?;
        let of = self.tenants.get_mut(&tenant)?;
        let message = of.waiting.pop_front()?;
        of.running += 1;
        self.running += 1;
        self.last = Some(tenant);
        Some(message)
    }

    fn done(&mut self, tenant: &TenantName, id: &str) {
        self.ids.remove(id);
        self.running = self.running.saturating_sub(1);
        if let Some(of) = self.tenants.get_mut(tenant) {
            of.running = of.running.saturating_sub(1);
            if of.running == 0 && of.waiting.is_empty() {
                self.tenants.remove(tenant);
            }
        }
    }
}

impl<O, N> Clone for Courier<O, N> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl Courier<Database, HostNetwork> {
    /// Starts a courier of this database that wakes by itself. Wait for the handle after cancelling `stop`.
    ///
    /// # Errors
    /// When a certificate cannot be used.
    pub fn start(
        db: Database,
        signer: Signer,
        options: CourierOptions,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Result<(Self, JoinHandle<()>), rustls::Error> {
        let wakes = db.subscribe();
        let courier = Self::new(db, HostNetwork, signer, options, metrics)?;
        tokio::spawn(courier.clone().listen(wakes, stop.clone()));
        let running = tokio::spawn(courier.clone().run(stop));
        Ok((courier, running))
    }
}

impl<O: Outbox, N: Network> Courier<O, N> {
    /// A courier; it does nothing until [`Self::run`].
    ///
    /// # Errors
    /// When a certificate cannot be used.
    pub fn new(
        outbox: O,
        network: N,
        signer: Signer,
        options: CourierOptions,
        metrics: Metrics,
    ) -> Result<Self, rustls::Error> {
        let sender = Sender {
            network,
            policy: options.policy,
            tls: tls(options.extra_roots)?,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                outbox,
                sender,
                signer,
                metrics,
                receivers: Mutex::default(),
                bell: Notify::new(),
            }),
        })
    }

    /// Says that there may be something to send. Forgetting it costs a few seconds, no message.
    pub fn wake(&self) {
        self.inner.bell.notify_one();
    }

    /// Wakes this courier whenever the database says that there is something to send, until `stop`.
    pub async fn listen(self, mut wakes: broadcast::Receiver<Wake>, stop: CancellationToken) {
        loop {
            let wake = tokio::select! {
                () = stop.cancelled() => return,
                wake = wakes.recv() => wake,
            };
            match wake {
                Ok(Wake::Outbox | Wake::Everything) | Err(RecvError::Lagged(_)) => self.wake(),
                Ok(_) => {}
                // Without wake-ups the outbox is looked into all the same.
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Delivers until `stop`. What is under way then gets a few seconds; what does not make it is due again later.
    pub async fn run(self, stop: CancellationToken) {
        let mut here = Here::default();
        let mut tries = JoinSet::new();
        let mut look_at = Instant::now();
        loop {
            if Instant::now() >= look_at && here.has_room() {
                look_at = Instant::now() + self.fill(&mut here).await;
            }
            while let Some(message) = here.next() {
                let courier = self.clone();
                tries.spawn(async move {
                    let (tenant, id) = (message.tenant.clone(), message.id.clone());
                    courier.deliver(message).await;
                    (tenant, id)
                });
            }
            self.inner.metrics.webhook_backlog(here.ids.len());
            tokio::select! {
                () = stop.cancelled() => break,
                Some(done) = tries.join_next() => {
                    if let Ok((tenant, id)) = done {
                        here.done(&tenant, &id);
                    }
                }
                () = self.inner.bell.notified() => look_at = Instant::now(),
                () = tokio::time::sleep_until(look_at), if here.has_room() => {}
            }
        }
        let all = async { while tries.join_next().await.is_some() {} };
        // What is cut off here is due again when its lease in the outbox ends.
        let _ = tokio::time::timeout(STOP, all).await;
    }

    /// Takes what is due; says when to look again.
    async fn fill(&self, here: &mut Here) -> Duration {
        let outbox = &self.inner.outbox;
        let lease_ms = u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX);
        let filled = async {
            match outbox.due_in().await? {
                Some(Duration::ZERO) => {}
                later => return Ok(later.unwrap_or(LOOK).min(LOOK)),
            }
            let taken = outbox.take(TAKE, lease_ms).await?;
            let mut wait = if taken.len() == TAKE as usize {
                Duration::ZERO
            } else {
                LOOK
            };
            for message in taken {
                if let Some(message) = here.place(message) {
                    let later = u64::try_from(PUT_BACK.as_millis()).unwrap_or(u64::MAX);
                    outbox.put_back(&message.id, later).await?;
                    wait = CROWDED;
                }
            }
            Ok::<_, kiln_db::DbError>(wait)
        };
        match filled.await {
            Ok(wait) => wait,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "webhooks wait: the database does not answer"
                );
                DATABASE_AGAIN
            }
        }
    }

    /// One try, and what becomes of the message.
    async fn deliver(&self, message: Message) {
        let inner = &self.inner;
        let noted = match self.attempt(&message).await {
            Ok(()) => {
                inner.metrics.webhook("delivered");
                inner.outbox.sent(&message.id).await
            }
            Err(failure) => {
                let wait = backoff_ms(message.tries).filter(|_| !failure.last);
                inner.metrics.webhook(failure.result);
                if wait.is_none() {
                    inner.metrics.webhook("dead");
                    tracing::warn!(message = %message.id, tenant = %message.tenant, why = %failure.text, "a webhook was given up");
                }
                inner.outbox.failed(&message.id, &failure.text, wait).await
            }
        };
        if let Err(error) = noted {
            // It is due again when its lease ends, and then perhaps sent twice: receivers know it by its id.
            tracing::warn!(message = %message.id, error = &error as &dyn std::error::Error, "what became of a webhook was not noted");
        }
    }

    async fn attempt(&self, message: &Message) -> Result<(), Failure> {
        let inner = &self.inner;
        let to = Destination::parse(&message.url, &inner.sender.policy)
            .map_err(|why| Failure::of(&why.into()))?;
        let receiver = to.authority();
        if let Some(left) = self.out(&receiver) {
            return Err(Failure {
                text: format!(
                    "not tried: the receiver was out and is tried again in {} s",
                    left.as_secs() + 1
                ),
                last: false,
                result: "failed",
            });
        }
        let mut secrets = vec![match &message.secret {
            Some(key) => inner.signer.webhook(key),
            None => inner.signer.tenant(&message.tenant),
        }];
        let old = message.old_secret.as_ref();
        secrets.extend(old.map(|key| inner.signer.webhook(key)));
        let timestamp = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let letter = Letter {
            signature: sign_with(&secrets, &message.id, timestamp, message.body.as_bytes()),
            id: message.id.clone(),
            timestamp,
            body: message.body.clone().into(),
        };
        let answer = inner.sender.post(&to, &letter).await;
        self.remember(receiver, answer.as_ref().err());
        answer.map_err(|error| Failure::of(&error))
    }

    /// How long this receiver is not tried yet.
    fn out(&self, receiver: &str) -> Option<Duration> {
        let receivers = lock(&self.inner.receivers);
        let known = receivers.get(receiver)?;
        if known.outages < OUTAGES {
            return None;
        }
        known.out_until.checked_duration_since(Instant::now())
    }

    fn remember(&self, receiver: String, error: Option<&PostError>) {
        let mut receivers = lock(&self.inner.receivers);
        if !error.is_some_and(PostError::is_outage) {
            receivers.remove(&receiver);
            return;
        }
        if receivers.len() >= RECEIVERS_MAX {
            receivers.clear();
        }
        let now = Instant::now();
        let known = receivers.entry(receiver).or_insert(Receiver {
            outages: 0,
            out_until: now,
        });
        known.outages += 1;
        let more = known.outages.saturating_sub(OUTAGES).min(10);
        known.out_until = now + (OUT_FOR * 2_u32.pow(more)).min(OUT_MAX);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A try that failed, as it is kept.
struct Failure {
    text: String,
    last: bool,
    result: &'static str,
}

impl Failure {
    fn of(error: &PostError) -> Self {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(why) = cause {
            text.push_str(": ");
            text.push_str(&why.to_string());
            cause = why.source();
        }
        Self {
            text,
            last: error.is_final(),
            result: error.result(),
        }
    }
}

/// Wait before the next try, up to a fifth less than listed, so that what failed together does not come again together.
fn backoff_ms(tries: u32) -> Option<u64> {
    let most = BACKOFF_S.get(usize::try_from(tries).ok()?)? * 1000;
    let mut random = [0; 2];
    // Without the kernel's help every message waits the whole time.
    let less = match getrandom::fill(&mut random) {
        Ok(()) => u64::from(u16::from_le_bytes(random)),
        Err(_) => 0,
    };
    Some(most - most * less / (5 * 65_536))
}
