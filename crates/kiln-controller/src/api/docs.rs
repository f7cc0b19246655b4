//! `/v1/openapi.json`, and a page that reads it: our own few lines, nothing from elsewhere.

use std::sync::Arc;

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderValue, header};
use utoipa::openapi::OpenApi;

use super::Api;

const PAGE: &str = include_str!("docs/page.html");
const SCRIPT: &str = include_str!("docs/page.js");
const STYLE: &str = include_str!("docs/page.css");
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

fn text(kind: &'static str, body: impl Into<axum::body::Body>) -> Response {
    let mut response = body.into().into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(POLICY),
    );
    response
}

/// The document and its page. Neither says anything about this installation, so neither needs a token.
pub(crate) fn routes(document: &OpenApi) -> Router<Arc<Api>> {
    let json: bytes::Bytes = serde_json::to_vec(document).unwrap_or_default().into();
    let json = move || async move { text("application/json", json) };
    Router::new()
        .route("/v1/openapi.json", get(json))
        .route(
            "/docs",
            get(|| async { text("text/html; charset=utf-8", PAGE) }),
        )
        .route(
            "/docs/page.js",
            get(|| async { text("text/javascript; charset=utf-8", SCRIPT) }),
        )
        .route(
            "/docs/page.css",
            get(|| async { text("text/css; charset=utf-8", STYLE) }),
        )
}
