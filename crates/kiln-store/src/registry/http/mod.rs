//! The registry as an HTTP service (OCI distribution-spec v1.1) over a [`Store`].
//!
//! The caller's [`Authority`] is fixed by whoever wires the connection, as a request extension;
//! without one every request is refused. Loopback doors and tokens are in [`super::token`] and
//! [`super::serve`]. Read next: `route` (what is asked), `transfer` (how bytes move).

pub(crate) mod answer;
mod blobs;
pub(crate) mod drain;
mod lists;
mod manifests;
pub(crate) mod range;
pub mod route;
pub(crate) mod transfer;
pub(crate) mod uploads;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use http::request::Parts;
use http::{HeaderMap, Method, StatusCode};

pub use self::answer::store_error;

use self::answer::Answer;
use self::route::Route;
use crate::registry::authority::Authority;
use crate::registry::error::StoreError;
use crate::registry::store::Store;

/// The registry's service. Add an [`Authority`] to each request's extensions, as
/// [`router_for`] does for connections whose identity is known beforehand.
pub fn router(store: Arc<Store>) -> Router {
    Router::new().fallback(handle).with_state(store)
}

/// The service for one connection whose peer is `authority`.
pub fn router_for(store: Arc<Store>, authority: Authority) -> Router {
    router(store).layer(axum::Extension(authority))
}

/// One request, taken apart.
pub(crate) struct Asked {
    pub(crate) store: Arc<Store>,
    pub(crate) authority: Authority,
    pub(crate) parts: Parts,
}

impl Asked {
    pub(crate) fn query(&self, key: &str) -> Option<String> {
        route::query_value(self.parts.uri.query(), key)
    }

    pub(crate) fn header(&self, name: impl http::header::AsHeaderName) -> Option<&str> {
        header(&self.parts.headers, name)
    }

    pub(crate) fn is_head(&self) -> bool {
        self.parts.method == Method::HEAD
    }
}

/// A header as text.
pub(crate) fn header(headers: &HeaderMap, name: impl http::header::AsHeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// What a handler gives: errors of the store become answers in one place.
type Handled = Result<Response, StoreError>;

async fn handle(State(store): State<Arc<Store>>, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    let Some(authority) = parts.extensions.remove::<Authority>() else {
        return answer::error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "who is asking?");
    };
    let route = match Route::parse(parts.uri.path()) {
        Ok(route) => route,
        Err(error) => return answer::route_error(error),
    };
    // A client that waits for "100 Continue" has not sent its body and will not after a refusal.
    let waits = parts.headers.contains_key(http::header::EXPECT);
    let (lent, body) = drain::lend(body);
    let asked = Asked {
        store,
        authority,
        parts,
    };
    let response = match dispatch(asked, route, body).await {
        Ok(response) => response,
        Err(error) => answer::store_error(&error),
    };
    if !response.status().is_success() && !waits {
        lent.drain().await;
    }
    response
}

async fn dispatch(asked: Asked, route: Route, body: Body) -> Handled {
    let read = matches!(asked.parts.method, Method::GET | Method::HEAD);
    match (route, asked.parts.method.clone()) {
        (Route::Base, _) if read => Ok(Answer::new(StatusCode::OK).json(&serde_json::json!({}))),
        (Route::Catalog, Method::GET) => lists::catalog(asked).await,
        (Route::Blob(repo, digest), _) if read => blobs::get(asked, repo, digest).await,
        (Route::Blob(repo, digest), Method::DELETE) => blobs::delete(asked, repo, digest).await,
        (Route::Uploads(repo), Method::POST) => uploads::post(asked, repo, body).await,
        (Route::Upload(repo, id), Method::GET) => uploads::status(asked, repo, id).await,
        (Route::Upload(repo, id), Method::PATCH) => uploads::patch(asked, repo, id, body).await,
        (Route::Upload(repo, id), Method::PUT) => uploads::put(asked, repo, id, body).await,
        (Route::Upload(repo, id), Method::DELETE) => uploads::cancel(asked, repo, id).await,
        (Route::Manifest(repo, what), _) if read => manifests::get(asked, repo, what).await,
        (Route::Manifest(repo, what), Method::PUT) => manifests::put(asked, repo, what, body).await,
        (Route::Manifest(repo, what), Method::DELETE) => manifests::delete(asked, repo, what).await,
        (Route::Tags(repo), Method::GET) => lists::tags(asked, repo).await,
        (Route::Referrers(repo, digest), Method::GET) => {
            lists::referrers(asked, repo, digest).await
        }
        _ => Ok(answer::unsupported("this method is not supported here")),
    }
}
