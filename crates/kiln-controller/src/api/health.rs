//! `/healthz` and `/readyz`: for load balancers and supervisors. They ask for no token, so they say one word and nothing of this installation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{StatusCode, header};
use kiln_db::Database;
use tokio::sync::Mutex;

/// How long an answer about the database stands for the next ones: whoever asks often asks it no more than this.
const STANDS: Duration = Duration::from_secs(1);
/// Longest time the database is given to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was found last, and when.
#[derive(Debug)]
struct Health {
    db: Database,
    seen: Mutex<Option<(Instant, bool)>>,
}

/// `GET /healthz`: the process answers. `GET /readyz`: so does its database, 503 when it does not.
pub(crate) fn router(db: Database) -> Router {
    let health = Health {
        db,
        seen: Mutex::new(None),
    };
    Router::new()
        .route("/healthz", get(|| async { word(StatusCode::OK, "ok\n") }))
        .route("/readyz", get(ready))
        .with_state(Arc::new(health))
}

async fn ready(State(health): State<Arc<Health>>) -> Response {
    // One asks, the others wait for its answer.
    let mut seen = health.seen.lock().await;
    let is_ready = match *seen {
        Some((at, is_ready)) if at.elapsed() < STANDS => is_ready,
        _ => {
            let answered = tokio::time::timeout(PATIENCE, health.db.now()).await;
            let is_ready = matches!(answered, Ok(Ok(_)));
            *seen = Some((Instant::now(), is_ready));
            is_ready
        }
    };
    match is_ready {
        true => word(StatusCode::OK, "ready\n"),
        false => word(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

fn word(status: StatusCode, word: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (status, headers, word).into_response()
}
