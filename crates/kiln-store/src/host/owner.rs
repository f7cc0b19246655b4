//! What the owning process runs: the private socket for attached processes, and the loopback door.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::post;
use http::StatusCode;
use http_body_util::BodyExt;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use super::HostConfig;
use super::call::{
    AUTHORITY_HEADER, About, CALL_PATH, Call, LoopbackState, PRIVATE_VERSION, Reply, WireAuthority,
    execute, failed,
};
use super::error::HostError;
use super::socket;
use crate::registry::http::answer::{self, Answer};
use crate::registry::http::{header, router, transfer};
use crate::registry::serve::{HEAD_WAIT_MAX, serve_router};
use crate::registry::{Authority, Secret, Store, loopback};

/// Private connections served at once; more wait.
const CONNECTIONS_MAX: usize = 512;
/// Largest call, bytes.
const CALL_BYTES_MAX: usize = 64 << 10;
/// Pause after a failed accept (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Ends a task when dropped.
#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The registry, owned by this process. Dropping it closes its doors and lets the next process in.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) store: Arc<Store>,
    pub(crate) about: Arc<About>,
    pub(crate) router: Router,
    _tasks: Vec<Task>,
}

impl Owner {
    /// Opens the doors of a store just opened. A loopback door that cannot open is told, not fatal.
    pub(crate) async fn start(store: Store, config: &HostConfig) -> Result<Self, HostError> {
        let dir = store.dir().to_owned();
        let secret = Secret::load_or_make(&dir.join("token"), &dir.join("tmp"))?;
        let store = Arc::new(store);
        let mut tasks = Vec::new();
        let loopback = match &config.loopback {
            None => LoopbackState::Off,
            Some(wanted) => match open_loopback(&store, secret, wanted).await {
                Ok((state, task)) => {
                    tasks.push(task);
                    state
                }
                Err(error) => {
                    tracing::warn!(%error, "the registry's loopback port is not served");
                    LoopbackState::Failed(error.to_string())
                }
            },
        };
        let about = Arc::new(About {
            version: PRIVATE_VERSION,
            pid: std::process::id(),
            loopback,
        });
        let listener = socket::listen(&dir).map_err(|source| HostError::Socket { dir, source })?;
        let private = private_router(store.clone(), about.clone());
        let task = tokio::spawn(accept_all(listener, private));
        tasks.push(Task(task.abort_handle()));
        Ok(Self {
            router: router(store.clone()),
            store,
            about,
            _tasks: tasks,
        })
    }
}

async fn open_loopback(
    store: &Arc<Store>,
    secret: Secret,
    config: &loopback::LoopbackConfig,
) -> Result<(LoopbackState, Task), HostError> {
    let listener = loopback::bind(config.address).await?;
    let address = listener.local_addr().unwrap_or(config.address);
    let door = loopback::serve(listener, store.clone(), secret, config.clone());
    let task = Task(tokio::spawn(door).abort_handle());
    Ok((LoopbackState::Open(address), task))
}

async fn accept_all(listener: UnixListener, router: Router) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // The semaphore is never closed: this waits for a free slot.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the private socket cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if socket::peer_uid(&stream).ok() != Some(socket::own_uid()) {
            tracing::warn!("a connection of another user to the private socket was refused");
            continue;
        }
        let router = router.clone();
        connections.spawn(async move {
            if let Err(error) = serve_router(stream, router, HEAD_WAIT_MAX).await {
                tracing::debug!(%error, "private connection ended");
            }
            drop(slot);
        });
    }
}

#[derive(Clone)]
struct Private {
    store: Arc<Store>,
    about: Arc<About>,
}

fn private_router(store: Arc<Store>, about: Arc<About>) -> Router {
    let private = Private {
        store: store.clone(),
        about,
    };
    Router::new()
        .route(CALL_PATH, post(call).with_state(private))
        .fallback_service(router(store).layer(middleware::from_fn(take_authority)))
}

async fn call(State(private): State<Private>, request: Request) -> Response {
    if named_authority(&request) != Some(WireAuthority::Operator) {
        return answer::error(StatusCode::FORBIDDEN, "DENIED", "host code only");
    }
    let limited = http_body_util::Limited::new(request.into_body(), CALL_BYTES_MAX);
    let collected = tokio::time::timeout(transfer::BODY_IDLE_MAX, limited.collect()).await;
    let parsed = match collected {
        Ok(Ok(body)) => serde_json::from_slice::<Call>(&body.to_bytes()).ok(),
        Ok(Err(_)) | Err(_) => None,
    };
    let Some(call) = parsed else {
        return answer::error(StatusCode::BAD_REQUEST, "UNSUPPORTED", "not a call");
    };
    let done = transfer::blocking(move || execute(&private.store, &private.about, call)).await;
    let reply = done.unwrap_or_else(|error| failed(&error));
    match serde_json::to_value(&reply) {
        Ok(value) => Answer::new(StatusCode::OK).json(&value),
        Err(_) => Answer::new(StatusCode::INTERNAL_SERVER_ERROR).empty(),
    }
}

/// Attached processes speak for whom they say: they are the same user, and have checked.
async fn take_authority(mut request: Request, next: Next) -> Response {
    let Some(authority) = named_authority(&request) else {
        return answer::error(
            StatusCode::UNAUTHORIZED,
            "UNAUTHORIZED",
            "an authority is needed on the private socket",
        );
    };
    request
        .extensions_mut()
        .insert::<Authority>(authority.into());
    next.run(request).await
}

fn named_authority(request: &Request) -> Option<WireAuthority> {
    let text = header(request.headers(), AUTHORITY_HEADER)?;
    serde_json::from_str(text).ok()
}

/// A reply as the owner's own result.
pub(crate) fn run(owner: &Owner, call: Call) -> Result<Reply, HostError> {
    Ok(execute(&owner.store, &owner.about, call)?)
}
