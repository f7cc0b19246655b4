//! Sessions on the channel, and the streams the host opens.
//!
//! One session at a time, for ever: when one ends, for whatever reason, its commands are killed, its connections
//! closed, and the next preamble is waited for. Orders run to their end even when their session does not.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_proto::codec;
use kiln_proto::hello::Hello;
use kiln_proto::msg::{CallResult, ExecRequest, Forward, GetTree, Order, PutFile, PutTree, kind};
use kiln_proto::mux::CODE_FIRST_FREE;
use kiln_proto::session::{Session, SessionError, SessionLimits};
use kiln_proto::stream::{Inbound, Incoming};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::cgroup::{self, Cgroup};
use crate::channel::{self, Port, PortIo};
use crate::error::{Context, SysError, chain, invalid};
use crate::state::{Guest, WORKLOAD};
use crate::{boot, exec, log, memory, net, orders, tree, uevent};

/// Threads for work that blocks.
const BLOCKING_THREADS_MAX: usize = 16;
/// How long the channel may take to appear.
const PORT_WAIT: Duration = Duration::from_secs(20);
/// Pause after a session that failed to start for a reason of its own.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long the host may take to read the answer to its last order.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Reset code: the payload of a stream was not understood.
const RESET_INVALID: u16 = CODE_FIRST_FREE;

/// Serves until the machine is powered off.
///
/// # Errors
/// What makes the machine useless.
pub(crate) fn run() -> Result<Infallible, SysError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build()
        .context(|| "start the runtime".to_owned())?;
    runtime.block_on(serve())
}

async fn serve() -> Result<Infallible, SysError> {
    let workload = Cgroup::at(WORKLOAD);
    cgroup::set_up(&workload)?;
    let guest = Arc::new(Guest::new(workload)?);
    orders::bound_workload(&guest, 0, 0)?;
    let reaping = Arc::clone(&guest);
    tokio::spawn(async move {
        if let Err(error) = reaping.reaper.run().await {
            boot::die(&chain(&error));
        }
    });
    tokio::spawn(memory::watch(Arc::clone(&guest)));
    net::start(&guest)?;
    tokio::spawn(prepare(Arc::clone(&guest)));
    let class = Path::new("/sys/class/virtio-ports");
    let node = uevent::wait_until("the channel", PORT_WAIT, || {
        channel::find(class).filter(|node| node.exists())
    })?;
    let port = Arc::new(Port::open(&node)?);
    log::raw(&format!(
        "kiln-guest: ready {} ms after power-on",
        log::uptime_ms()
    ));
    let features = guest.features();
    loop {
        // Made before anybody waits for it: a template is taken while we wait for a host.
        let boot_id = guest.identity.known_boot_id();
        let hello = Hello::new(env!("CARGO_PKG_VERSION"), &boot_id, &features);
        let hello = hello.prepare().map_err(|error| {
            SysError::other("prepare the first word to the host", &chain(&error))
        })?;
        port.connected().await;
        let io = PortIo(Arc::clone(&port));
        match Session::accept_prepared(io, &hello, SessionLimits::default()).await {
            Ok((session, incoming)) => serve_session(&guest, session, incoming).await,
            Err(SessionError::TransportEnded) => {}
            Err(error) => {
                log::warn(&format!("no session: {}", chain(&error)));
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

/// What need not be there before the first word to the host.
async fn prepare(guest: Arc<Guest>) {
    let cpus = tokio::task::spawn_blocking(boot::start_cpus);
    if let Err(error) = cpus.await {
        log::error(&format!("CPUs were not started: {error}"));
    }
    log::debug("all CPUs run");
    guest.set_prepared();
}

async fn serve_session(guest: &Arc<Guest>, session: Session, mut incoming: Incoming) {
    log::debug("a session begins");
    guest.net.set_session(Some(session.clone()));
    let mut tasks = JoinSet::new();
    let events = session.clone();
    tasks.spawn(async move { send_events(events).await });
    loop {
        tokio::select! {
            inbound = incoming.next() => match inbound {
                Some(inbound) => { tasks.spawn(serve_stream(Arc::clone(guest), inbound)); }
                None => break,
            },
            Some(_finished) = tasks.join_next() => {}
        }
    }
    guest.net.set_session(None);
    tasks.shutdown().await;
    drop(incoming);
    let reason = session.closed().await;
    log::debug(&format!("the session ended: {reason}"));
}

async fn send_events(session: Session) {
    let Ok(mut stream) = session.open(kind::EVENTS, &[]).await else {
        return;
    };
    loop {
        let event = log::next_event().await;
        if codec::write_msg(&mut stream, &event).await.is_err() {
            return;
        }
    }
}

/// Reads the payload, or resets the stream and says why.
fn payload<T: DeserializeOwned>(inbound: &Inbound) -> Result<T, String> {
    serde_json::from_slice(&inbound.payload).map_err(|error| format!("not understood: {error}"))
}

async fn serve_stream(guest: Arc<Guest>, inbound: Inbound) {
    let _counted = guest.count_stream();
    let refused = match inbound.kind {
        kind::CALL => return serve_call(&guest, inbound).await,
        kind::EXEC => match payload::<ExecRequest>(&inbound) {
            Ok(request) => return exec::serve(guest, request, inbound.stream).await,
            Err(why) => why,
        },
        kind::FORWARD => match payload::<Forward>(&inbound) {
            Ok(request) => return net::forward(request, inbound.stream).await,
            Err(why) => why,
        },
        kind::PUT_TREE => match payload::<PutTree>(&inbound) {
            Ok(order) => return tree::put_tree(guest, order, inbound.stream).await,
            Err(why) => why,
        },
        kind::GET_TREE => match payload::<GetTree>(&inbound) {
            Ok(order) => return tree::get_tree(order, inbound.stream).await,
            Err(why) => why,
        },
        kind::PUT_FILE => match payload::<PutFile>(&inbound) {
            Ok(order) => return tree::put_file(guest, order, inbound.stream).await,
            Err(why) => why,
        },
        other => format!("streams of kind {other} are not served"),
    };
    inbound.stream.reset(RESET_INVALID, &refused);
}

async fn serve_call(guest: &Arc<Guest>, inbound: Inbound) {
    let result: CallResult = match payload::<Order>(&inbound) {
        Ok(order) => {
            let last = order == Order::Shutdown;
            // In a task of its own: an order that was begun is carried out.
            let task = tokio::spawn(orders::carry_out(Arc::clone(guest), order));
            let result = task
                .await
                .unwrap_or_else(|_| Err(invalid("the order failed in the guest")));
            if last && result.is_ok() {
                let _host_gone =
                    tokio::time::timeout(LAST_WORDS, answer(inbound.stream, &result)).await;
                return orders::power_off();
            }
            result
        }
        Err(why) => Err(invalid(why)),
    };
    answer(inbound.stream, &result).await;
}

/// Sends one message and half-closes.
pub(crate) async fn answer<T: serde::Serialize + Sync>(
    mut stream: impl AsyncWrite + Unpin,
    message: &T,
) {
    let _host_gone = codec::write_msg(&mut stream, message).await;
    let _host_gone = stream.shutdown().await;
}
