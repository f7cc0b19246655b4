//! From a specification to a machine that may be given work: launch, hello, new identity, thaw.
//!
//! The order is the same for a cold boot and a clone, because neither is trusted to be unique before it has proved it. The workload stays
//! frozen until every answer was checked; one false answer destroys the machine. Nothing of a tenant is in it yet, so a fault here
//! says nothing about a job. Making templates lives here too: it is the same road up to the quiesced guest.

mod adopt;
mod identity;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::{FailureClass, MachineName, MachineSpec};
use kiln_proto::msg::{CallResult, GuestError, Order, OrderReply, feature, kind};
use kiln_proto::{
    CodecError, Hello, Incoming, OpenError, Session, SessionError, SessionLimits, read_msg,
};

use crate::driver::{
    AdoptError, Driver, LaunchError, LeakReport, Machine, MachineError, MachineState, Start,
    StopReason, TemplateRef,
};

pub use crate::driver::PublicIdentity;
pub use adopt::adopt;
pub use identity::{CLOCK_TOLERANCE, FalseAnswer};

/// Most bytes of an answer to an order.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Most lines of console that go into an error.
const CONSOLE_LINES_MAX: usize = 40;
/// Identities that a guest is given because its answers are slow. The last one holds: on such a host a late clock is the least evil.
const IDENTITIES_MAX: u32 = 3;
/// Code of the session's end before a template is taken.
const CLOSE_FOR_TEMPLATE: u16 = 0;

/// How long each step may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deadlines {
    /// From the launched machine to the guest's hello. A cold boot takes the specification's own.
    pub clone_hello: Duration,
    /// Each order of the way: identity, thaw, quiesce.
    pub order: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            clone_hello: Duration::from_secs(20),
            order: Duration::from_secs(20),
        }
    }
}

/// A machine that may be given work.
#[derive(Debug)]
pub struct Ready {
    /// The machine.
    pub machine: Arc<dyn Machine>,
    /// The session with its guest.
    pub session: Session,
    /// Streams the guest opens.
    pub incoming: Incoming,
    /// What the guest says of itself.
    pub hello: Hello,
    /// The identity it has proved to have.
    pub identity: PublicIdentity,
    /// How long each step took.
    pub timings: Timings,
}

/// How long the steps of a start took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timings {
    /// The driver's launch.
    pub launch: Duration,
    /// From there to the guest's hello.
    pub hello: Duration,
    /// New identity and its proof.
    pub identity: Duration,
    /// Thaw.
    pub thaw: Duration,
    /// Starts that were thrown away before.
    pub retries: u32,
}

impl Timings {
    /// All steps of the start that succeeded.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.launch + self.hello + self.identity + self.thaw
    }
}

/// Why a machine did not become ready. It is gone when this is returned; for adoption see [`adopt()`].
#[derive(Debug, thiserror::Error)]
pub enum BringUpError {
    /// The driver did not start it.
    #[error("the machine did not start")]
    Launch(#[source] LaunchError),
    /// It could not be adopted.
    #[error("the machine was not adopted")]
    Adopt(#[source] AdoptError),
    /// The machine stopped on the way.
    #[error("the machine stopped ({reason:?}) before its guest was ready{console}")]
    Stopped {
        /// Why.
        reason: StopReason,
        /// The end of its console, or nothing.
        console: String,
    },
    /// A step of the driver failed.
    #[error("the machine failed before its guest was ready")]
    Machine(#[source] MachineError),
    /// No session with the guest.
    #[error("the guest did not say hello{console}")]
    Hello {
        /// Why.
        #[source]
        source: SessionError,
        /// The end of its console, or nothing.
        console: String,
    },
    /// An order was not answered.
    #[error("the guest did not answer {order}")]
    Order {
        /// Which.
        order: &'static str,
        /// Why.
        #[source]
        source: CallError,
    },
    /// The guest said something that is not so.
    #[error("the guest was refused")]
    False(#[source] FalseAnswer),
    /// The preparation of a template failed.
    #[error("the template's guest could not be prepared")]
    Prepare(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why a call to the guest failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No stream could be opened.
    #[error("no stream to the guest")]
    Open(#[source] OpenError),
    /// The answer could not be read.
    #[error("its answer could not be read")]
    Answer(#[source] CodecError),
    /// The guest said no.
    #[error("the guest refused ({:?})", .0.code)]
    Refused(#[source] GuestError),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl BringUpError {
    /// Whose fault it was.
    #[must_use]
    pub fn class(&self) -> FailureClass {
        match self {
            Self::False(_)
            | Self::Hello {
                source: SessionError::Protocol(_),
                ..
            } => FailureClass::GuestFault,
            Self::Order {
                source: CallError::Answer(error),
                ..
            } if error.is_peer_fault() => FailureClass::GuestFault,
            Self::Order {
                source: CallError::Open(error),
                ..
            } if error.is_peer_fault() => FailureClass::GuestFault,
            _ => FailureClass::Infrastructure,
        }
    }

    /// Whether the same start may work when tried again: a boot that hung or died on a busy host.
    #[must_use]
    pub fn is_worth_a_retry(&self) -> bool {
        match self {
            Self::Hello { source, .. } => !matches!(
                source,
                SessionError::Protocol(_)
                    | SessionError::Generation { .. }
                    | SessionError::Random(_)
            ),
            Self::Launch(error) => {
                matches!(error, LaunchError::Timeout(_) | LaunchError::VmmDied { .. })
            }
            Self::Stopped { reason, .. } => *reason != StopReason::HostIo,
            Self::Order { source, .. } => matches!(source, CallError::Timeout(_)),
            _ => false,
        }
    }
}

/// Gives an order and reads the answer.
///
/// # Errors
/// [`CallError`].
pub async fn call(
    session: &Session,
    order: &Order,
    deadline: Duration,
) -> Result<OrderReply, CallError> {
    let work = async {
        let payload = serde_json::to_vec(order).unwrap_or_default();
        let mut stream = session
            .open(kind::CALL, &payload)
            .await
            .map_err(CallError::Open)?;
        let answer: CallResult = read_msg(&mut stream, ANSWER_BYTES_MAX)
            .await
            .map_err(CallError::Answer)?;
        answer.map_err(CallError::Refused)
    };
    tokio::time::timeout(deadline, work)
        .await
        .unwrap_or(Err(CallError::Timeout(deadline)))
}

/// Starts a machine and makes it ready. A cold boot that hangs or dies is tried once more.
///
/// # Errors
/// [`BringUpError`]; nothing is left of the machine then.
pub async fn start(
    driver: &dyn Driver,
    spec: &MachineSpec,
    start: &Start,
    deadlines: Deadlines,
) -> Result<Ready, BringUpError> {
    let first = start_once(driver, spec, start, deadlines).await;
    match first {
        Err(error) if *start == Start::Cold && error.is_worth_a_retry() => {
            tracing::warn!(machine = %spec.name, %error, "a boot failed and is tried once more");
            let mut ready = start_once(driver, spec, start, deadlines).await?;
            ready.timings.retries = 1;
            Ok(ready)
        }
        other => other,
    }
}

/// As [`start()`], without another try.
///
/// # Errors
/// [`BringUpError`]; nothing is left of the machine then.
pub async fn start_once(
    driver: &dyn Driver,
    spec: &MachineSpec,
    start: &Start,
    deadlines: Deadlines,
) -> Result<Ready, BringUpError> {
    let began = Instant::now();
    let launched = driver.launch(spec, start.clone()).await;
    let machine = launched.map_err(BringUpError::Launch)?;
    let launch = began.elapsed();
    let hello = match start {
        Start::Cold => Duration::from_millis(spec.boot_timeout_ms),
        Start::Template(_) => deadlines.clone_hello,
    };
    let work = make_ready(&machine, spec, hello, deadlines.order);
    match unless_stopped(&machine, work).await {
        Ok(mut ready) => {
            ready.timings.launch = launch;
            Ok(ready)
        }
        Err(error) => {
            report_leaks(&spec.name, &machine.destroy().await);
            Err(error)
        }
    }
}

/// Ends the wait when the machine stops: its guest will not answer any more.
async fn unless_stopped<T>(
    machine: &Arc<dyn Machine>,
    work: impl Future<Output = Result<T, BringUpError>>,
) -> Result<T, BringUpError> {
    let stopped = |state: MachineState| {
        let reason = match state {
            MachineState::Stopped(reason) => reason,
            _ => StopReason::VmmDied,
        };
        BringUpError::Stopped {
            reason,
            console: console_of(machine),
        }
    };
    tokio::select! {
        result = work => match result {
            // The channel's end comes a moment before the machine's: the latter says why.
            Err(error) if error.may_be_an_end() => {
                let soon = tokio::time::timeout(Duration::from_millis(500), machine.stopped());
                Err(soon.await.map_or(error, stopped))
            }
            other => other,
        },
        state = machine.stopped() => Err(stopped(state)),
    }
}

impl BringUpError {
    fn may_be_an_end(&self) -> bool {
        match self {
            Self::Hello { source, .. } => {
                matches!(
                    source,
                    SessionError::TransportEnded | SessionError::Transport(_)
                )
            }
            Self::Order { source, .. } => {
                matches!(
                    source,
                    CallError::Open(_) | CallError::Answer(CodecError::Io(_))
                )
            }
            Self::Machine(_) => true,
            _ => false,
        }
    }
}

async fn make_ready(
    machine: &Arc<dyn Machine>,
    spec: &MachineSpec,
    hello_deadline: Duration,
    order_deadline: Duration,
) -> Result<Ready, BringUpError> {
    let mut timings = Timings::default();
    let began = Instant::now();
    let channel = machine.channel().await.map_err(BringUpError::Machine)?;
    let connected = Session::connect(channel, SessionLimits::default(), hello_deadline).await;
    let (session, hello, incoming) = connected.map_err(|source| BringUpError::Hello {
        source,
        console: console_of(machine),
    })?;
    timings.hello = began.elapsed();
    if !hello.has(feature::REIDENTIFY) {
        return Err(BringUpError::False(FalseAnswer::NoReidentify));
    }
    let began = Instant::now();
    let identity = new_identity(&session, &spec.name, order_deadline).await?;
    timings.identity = began.elapsed();
    let began = Instant::now();
    done(&ordered(&session, "thaw", &Order::Thaw, order_deadline).await?)?;
    timings.thaw = began.elapsed();
    let machine = Arc::clone(machine);
    Ok(Ready {
        machine,
        session,
        incoming,
        hello,
        identity,
        timings,
    })
}

/// Gives the guest a new identity and proves that it has it. An answer that took long came from a clock that is late by most of that
/// time (a clone touches its memory for the first time here): such a guest is told once more, now that it is awake.
async fn new_identity(
    session: &Session,
    name: &MachineName,
    deadline: Duration,
) -> Result<PublicIdentity, BringUpError> {
    let mut attempt = 1;
    loop {
        let asked = tokio::time::Instant::now();
        let fresh = identity::fresh(name).map_err(BringUpError::False)?;
        let order = Order::Reidentify(fresh.clone());
        let reply = ordered(session, "reidentify", &order, deadline).await?;
        let took = asked.elapsed();
        identity::check(&fresh, &reply, took).map_err(BringUpError::False)?;
        if took <= CLOCK_TOLERANCE || attempt == IDENTITIES_MAX {
            return Ok(identity::public(&fresh));
        }
        attempt += 1;
    }
}

async fn ordered(
    session: &Session,
    name: &'static str,
    order: &Order,
    deadline: Duration,
) -> Result<OrderReply, BringUpError> {
    let answer = call(session, order, deadline).await;
    answer.map_err(|source| BringUpError::Order {
        order: name,
        source,
    })
}

fn done(reply: &OrderReply) -> Result<(), BringUpError> {
    match reply {
        OrderReply::Done => Ok(()),
        _ => Err(BringUpError::False(FalseAnswer::WrongReply)),
    }
}

/// Boots a machine, prepares its guest, freezes it and makes a template of it. The machine is gone afterwards, whatever happens.
///
/// # Errors
/// [`BringUpError`].
pub async fn make_template<E, F>(
    driver: &dyn Driver,
    spec: &MachineSpec,
    target: &TemplateRef,
    deadlines: Deadlines,
    prepare: impl FnOnce(Session) -> F + Send,
) -> Result<(), BringUpError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = Result<(), E>> + Send,
{
    let ready = start(driver, spec, &Start::Cold, deadlines).await?;
    let machine = Arc::clone(&ready.machine);
    let work = quiesce(ready, deadlines, prepare);
    let result = match unless_stopped(&machine, work).await {
        Ok(()) => machine
            .into_template(target)
            .await
            .map_err(BringUpError::Machine),
        Err(error) => Err(error),
    };
    report_leaks(&spec.name, &machine.destroy().await);
    result
}

async fn quiesce<E, F>(
    ready: Ready,
    deadlines: Deadlines,
    prepare: impl FnOnce(Session) -> F + Send,
) -> Result<(), BringUpError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = Result<(), E>> + Send,
{
    let Ready {
        session,
        mut incoming,
        ..
    } = ready;
    // The guest's own streams (events) are not wanted in a template's making: each is dropped as it comes.
    let refuse = tokio::spawn(async move { while incoming.next().await.is_some() {} });
    let work = async {
        let prepared = prepare(session.clone()).await;
        prepared.map_err(|error| BringUpError::Prepare(error.into()))?;
        let reply = ordered(&session, "quiesce", &Order::Quiesce, deadlines.order).await?;
        identity::check_quiesced(&reply).map_err(BringUpError::False)
    };
    let result = work.await;
    session.close(CLOSE_FOR_TEMPLATE, "a template is taken");
    let _ = tokio::time::timeout(deadlines.order, session.closed()).await;
    refuse.abort();
    result
}

fn report_leaks(name: &MachineName, leaks: &LeakReport) {
    if !leaks.leaks.is_empty() {
        tracing::warn!(machine = %name, leaks = ?leaks.leaks, "a machine left something behind");
    }
}

/// The last lines of the console, to be put after a sentence.
fn console_of(machine: &Arc<dyn Machine>) -> String {
    let text = machine.console_tail();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    if lines.is_empty() {
        return String::new();
    }
    let last = lines[lines.len().saturating_sub(CONSOLE_LINES_MAX)..].join("\n");
    format!("; its console ends with:\n{last}")
}
