//! Serves a peer's connection from the owner's store here, or through the owner's private socket.
//!
//! Attached, this process is the door: it knows who the peer is and whether its lease is live. A
//! write is forwarded only while it is, and completed only if it still is then. The peer does not notice when
//! an owner ends: uploads go on at the next one ([`super::relay`]), and so do downloads; everything else is asked again
//! ([`super::ask`]).

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use http::header::{
    ACCEPT, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, EXPECT, HeaderName, RANGE,
};
use http::request::Parts;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Limited};
use kiln_core::Digest;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::ServiceExt;

use super::ask::{Ask, part_of};
use super::error::HostError;
use super::relay::{Relay, Stopped};
use super::{HostRegistry, Role};
use crate::registry::http::answer;
use crate::registry::http::drain;
use crate::registry::http::header;
use crate::registry::http::range::chunk;
use crate::registry::http::route::{Route, query_value};
use crate::registry::http::transfer::BODY_IDLE_MAX;
use crate::registry::manifest::MANIFEST_BYTES_MAX;
use crate::registry::serve::{HEAD_WAIT_MAX, serve_router};
use crate::registry::{Authority, RepoName, StoreError};

/// Headers of a request that mean something to the registry; no others are forwarded.
const FORWARDED: [HeaderName; 4] = [ACCEPT, CONTENT_RANGE, CONTENT_TYPE, RANGE];

/// Most bytes of an answer that is held here until it is whole: manifests and lists of names.
const ANSWER_BYTES_MAX: usize = 16 << 20;

#[derive(Clone)]
struct Proxy {
    host: HostRegistry,
    authority: Authority,
}

pub(super) async fn serve(
    host: HostRegistry,
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    authority: Authority,
) -> Result<(), hyper::Error> {
    let proxy = Proxy { host, authority };
    let router = Router::new().fallback(handle).with_state(proxy);
    serve_router(io, router, HEAD_WAIT_MAX).await
}

async fn handle(State(proxy): State<Proxy>, mut request: Request) -> Response {
    // Only the registry's own endpoints: nothing else of the private socket is in reach.
    let route = match Route::parse(request.uri().path()) {
        Ok(route) => route,
        Err(error) => return answer::route_error(error),
    };
    if let Role::Owner(owner) = proxy.host.role().await {
        request.extensions_mut().insert(proxy.authority);
        return match owner.router.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
    }
    let (parts, body) = request.into_parts();
    // A client that waits for "100 Continue" has not sent its body and will not after a refusal.
    let waits = parts.headers.contains_key(EXPECT);
    let (lent, body) = drain::lend(body);
    let query = |key| query_value(parts.uri.query(), key);
    let done = match (route, parts.method.clone()) {
        (Route::Blob(..), Method::GET) => proxy.download(&parts).await,
        (Route::Upload(repo, _), Method::PATCH | Method::PUT) => {
            proxy.upload(&parts, &repo, body).await
        }
        (Route::Uploads(repo), Method::POST)
            if query("digest").is_some() && query("mount").is_none() =>
        {
            proxy.upload_at_once(&parts, &repo, body).await
        }
        _ => proxy.small(&parts, body).await,
    };
    let response = match done {
        Ok(response) => response,
        Err(Stopped::Answer(response)) => *response,
        Err(Stopped::Store(error)) => answer::store_error(&error),
        Err(Stopped::Host(error)) => unavailable(&error),
    };
    if !response.status().is_success() && !waits {
        lent.drain().await;
    }
    response
}

impl Proxy {
    fn ask(&self, parts: &Parts) -> Ask {
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut ask = Ask::new(parts.method.clone(), path);
        for name in FORWARDED {
            if let Some(value) = parts.headers.get(&name) {
                ask.headers.insert(name, value.clone());
            }
        }
        ask
    }

    /// Everything whose body, if any, is a manifest. All of it may be asked twice: what was done at the first time is found done,
    /// and a session begun for nobody expires.
    async fn small(&self, parts: &Parts, body: Body) -> Result<Response, Stopped> {
        let writes = !matches!(parts.method, Method::GET | Method::HEAD);
        if writes {
            self.authority.check_live()?;
        }
        let max = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
        let collected = Limited::new(body, max).collect();
        let body = match tokio::time::timeout(BODY_IDLE_MAX, collected).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                let (what, max) = ("the manifest", MANIFEST_BYTES_MAX);
                return Err(StoreError::TooLarge { what, max }.into());
            }
            Ok(Err(error)) => {
                let source = Some(error);
                return Err(StoreError::BodyBroken { source }.into());
            }
            Err(_silent) => return Err(StoreError::BodyBroken { source: None }.into()),
        };
        if writes {
            self.authority.check_live()?;
        }
        let ask = self.ask(parts).body(body);
        let whole = self.host.ask_whole(&self.authority, &ask, ANSWER_BYTES_MAX);
        let (head, body) = whole.await?;
        Ok(Response::from_parts(head, Body::from(body)))
    }

    async fn download(&self, parts: &Parts) -> Result<Response, Stopped> {
        let ask = self.ask(parts);
        let answer = self.host.ask(&self.authority, &ask).await?;
        let Some((from, count)) = part_of(&answer).filter(|_| answer.status().is_success()) else {
            return Ok(answer);
        };
        let (head, body) = answer.into_parts();
        let authority = self.authority.clone();
        let body = self.host.read_on(authority, ask.path, from, count, body);
        Ok(Response::from_parts(head, body))
    }

    /// `PATCH` or `PUT` of a session.
    async fn upload(
        &self,
        parts: &Parts,
        repo: &RepoName,
        body: Body,
    ) -> Result<Response, Stopped> {
        let finishes = parts.method == Method::PUT;
        let digest = match finishes {
            true => Some(digest_of(parts)?),
            false => None,
        };
        let path = parts.uri.path();
        let mut relay = Relay::take_up(&self.host, &self.authority, repo, path).await?;
        let promised = match promised(parts, relay.at()) {
            Ok(promised) => promised,
            // The owner says the same, and where the session stands.
            Err(StoreError::UploadOffset { .. }) => {
                let ask = self.ask(parts).body(Bytes::new());
                return Ok(self.host.ask(&self.authority, &ask).await?);
            }
            Err(error) => return Err(error.into()),
        };
        relay.append(body, promised).await?;
        match digest {
            Some(digest) => relay.commit(&digest).await,
            None => {
                self.authority.check_live()?;
                let mut answer = relay.status().await?;
                if answer.status() == StatusCode::NO_CONTENT {
                    *answer.status_mut() = StatusCode::ACCEPTED;
                }
                Ok(answer)
            }
        }
    }

    /// `POST` with the whole blob.
    async fn upload_at_once(
        &self,
        parts: &Parts,
        repo: &RepoName,
        body: Body,
    ) -> Result<Response, Stopped> {
        let digest = digest_of(parts)?;
        let promised = promised(parts, 0)?;
        let mut relay = Relay::begin(&self.host, &self.authority, repo).await?;
        let path = relay.path();
        let done = match relay.append(body, promised).await {
            Ok(()) => relay.commit(&digest).await,
            Err(stopped) => Err(stopped),
        };
        if done.is_err() {
            // The client does not know this session: nothing could continue it.
            Relay::cancel(&self.host, &self.authority, &path).await;
        }
        done
    }
}

fn digest_of(parts: &Parts) -> Result<Digest, Stopped> {
    query_value(parts.uri.query(), "digest")
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Stopped::Answer(Box::new(answer::digest_invalid())))
}

/// How many bytes the body must have; a chunk must begin where the session stands.
fn promised(parts: &Parts, expected: u64) -> Result<Option<u64>, StoreError> {
    let length = header(&parts.headers, CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
    let Some(text) = header(&parts.headers, CONTENT_RANGE) else {
        return Ok(length);
    };
    let Some((start, end)) = chunk(text).filter(|(start, _)| *start == expected) else {
        return Err(StoreError::UploadOffset { expected });
    };
    let got = (end - start).saturating_add(1);
    match length {
        Some(promised) if promised != got => Err(StoreError::UploadLength { promised, got }),
        _ => Ok(Some(got)),
    }
}

fn unavailable(error: &HostError) -> Response {
    tracing::warn!(%error, "the registry cannot be reached");
    answer::error(
        StatusCode::SERVICE_UNAVAILABLE,
        "UNKNOWN",
        "the registry's owner went away: try again",
    )
}
