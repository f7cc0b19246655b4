//! `/v2` of a controller: workers of other hosts push what they verified into the quarantine of their attempt, with a token that is bound to
//! its live epoch. The host then verifies again and names it (`POST …/image`). People read and write their tenant's repositories with a token of
//! [`super::registry_login`].
//!
//! The lease is checked at every request, and by the registry again before a write takes effect.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use hyper_util::rt::TokioIo;
use kiln_core::lease::LeaseRefused;
use kiln_core::{JobKind, Lease};
use kiln_db::DoorError;
use kiln_store::registry::{
    self, AttemptAuthority, Authority, Grant, LeaseCheck, Names, RepoName, UserAuthority,
};

use super::registry_login::SERVICE;
use super::shield::DoorLimits;
use super::who::now_unix_ms;
use crate::access::{Door, Holder, Peer, RegistryAction, RegistryGrant};
use crate::api::listen::Connection;
use crate::images;
use crate::peers::Relayed;
use crate::state::Controller;

/// Bytes between this server and the registry that may wait in memory, each way.
const PIPE_BYTES: usize = 256 * 1024;

/// What one attempt may do in the registry. Asks the database whether its lease is the live one.
struct LiveLease {
    controller: Controller,
    runtime: tokio::runtime::Handle,
}

impl LeaseCheck for LiveLease {
    fn check(&self, lease: &Lease) -> Result<(), LeaseRefused> {
        let ask = live(&self.controller, lease.clone());
        tokio::task::block_in_place(|| self.runtime.block_on(ask))
    }
}

async fn live(controller: &Controller, lease: Lease) -> Result<(), LeaseRefused> {
    match controller.db.check_lease(&lease).await {
        Ok(()) => Ok(()),
        Err(DoorError::Lease(refused)) => Err(refused),
        // Without an answer nothing is published.
        Err(_) => Err(LeaseRefused::Expired {
            attempt: lease.attempt,
        }),
    }
}

/// The authority of an attempt over its quarantine. Layers of the images it is to name lie here already and are mounted, not sent.
pub(super) async fn authority(controller: &Controller, lease: Lease) -> AttemptAuthority {
    let job = controller.db.job(&lease.attempt.job).await.ok().flatten();
    let own = format!("t/{}/", lease.tenant);
    let below = |repository: &str| match repository.starts_with(&own) {
        true => repository.parse().ok(),
        false => format!("{own}{repository}").parse().ok(),
    };
    let named: Vec<RepoName> = match job.map(|job| job.request.kind) {
        Some(JobKind::SourceBuild(build)) => {
            let tags = build.tags.iter();
            tags.filter_map(|tag| below(&tag.repository)).collect()
        }
        _ => Vec::new(),
    };
    let read: Vec<String> = named.iter().map(|name| name.as_str().to_owned()).collect();
    let check = LiveLease {
        controller: controller.clone(),
        runtime: tokio::runtime::Handle::current(),
    };
    // What a worker needs of its tenant's images is what it may read, not all of them.
    AttemptAuthority::new(lease, Arc::new(check))
        .with_pull(read)
        .with_sources(named)
}

/// Any request below `/v2`.
pub(super) async fn serve(
    State(controller): State<Controller>,
    Extension(limits): Extension<Arc<DoorLimits>>,
    peer: Option<Extension<Peer>>,
    connection: Option<Extension<Connection>>,
    request: Request,
) -> Response {
    let challenge = challenge(peer.as_deref(), request.headers(), Some(&request));
    let Some(token) = token(request.headers()) else {
        return refuse("a token is needed", &challenge);
    };
    let verified = controller
        .access
        .verify_registry(&token, now_unix_ms(), |lease| {
            let controller = controller.clone();
            async move { live(&controller, lease).await }
        });
    let grant = match verified.await {
        Ok(grant) => grant,
        Err(error) => {
            let (path, why) = (request.uri().path(), error.to_string());
            controller
                .turned_away(Door::Registry, "registry", path, &why)
                .await;
            return refuse(&why, &challenge);
        }
    };
    let writes = !matches!(*request.method(), Method::GET | Method::HEAD);
    if writes && !limits.may_push(&grant.tenant) {
        return too_many("this tenant writes too much at once");
    }
    let authority = match grant.lease() {
        Some(lease) => {
            let first = connection.is_some_and(|known| known.belongs_to(&lease.worker));
            // Its worker may have been removed before this connection was known to be its.
            if first && live(&controller, lease.clone()).await.is_err() {
                return refuse("the worker does not hold its lease", &challenge);
            }
            Authority::Attempt(authority(&controller, lease).await)
        }
        None => match person(&controller, &grant).await {
            Ok(user) => Authority::User(user),
            Err(why) => return refuse(why, &challenge),
        },
    };
    let request = match images::answer(&controller, &authority, request).await {
        Ok(response) => return response,
        Err(request) => request,
    };
    // What was pushed before images were shared lies with the controller that took it.
    let elsewhere = Relayed::of(&request).filter(|_| grant.lease().is_none());
    match forward(&controller, authority, request).await {
        Ok(response) if response.status() == StatusCode::NOT_FOUND => {
            let answer = match &elsewhere {
                Some(asked) => controller.relayed(asked).await,
                None => None,
            };
            answer.unwrap_or(response)
        }
        Ok(response) => response,
        Err(error) => {
            tracing::warn!(%error, "the registry did not answer");
            StatusCode::BAD_GATEWAY.into_response()
        }
    }
}

/// What a person may do in the registry, while the token behind theirs is good.
async fn person(
    controller: &Controller,
    grant: &RegistryGrant,
) -> Result<UserAuthority, &'static str> {
    let (token, parent) = match &grant.holder {
        Holder::Person { token, parent } => (token.clone(), parent.clone()),
        Holder::Attempt { .. } => return Err("this token is not a person's"),
    };
    for token in token.iter().chain(&parent) {
        // Without an answer nothing is opened.
        let revoked = controller.db.session_revoked(token.as_str()).await;
        if revoked.unwrap_or(true) {
            return Err("the token behind this one was called back");
        }
    }
    let grants = grant.access.iter().filter_map(|access| {
        let actions = access.actions.iter().map(|action| match action {
            RegistryAction::Pull => registry::Action::Pull,
            RegistryAction::Push => registry::Action::Push,
        });
        Some(Grant {
            names: Names::Exactly(access.name.parse().ok()?),
            actions: actions.collect(),
        })
    });
    Ok(UserAuthority {
        name: token.map_or_else(|| "owner".to_owned(), String::from),
        grants: grants.collect(),
    })
}

/// The token of a request: a bearer, or the password of a login, as registry clients send either.
pub(super) fn token(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, rest) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_owned());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(rest.trim()).ok()?).ok()?;
    Some(decoded.split_once(':')?.1.to_owned())
}

/// Says where tokens are to be had, and for which scope: the address is the one that the client used itself.
pub(super) fn challenge(
    peer: Option<&Peer>,
    headers: &HeaderMap,
    request: Option<&Request>,
) -> String {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let legal = |host: &&str| {
        let known = |b: u8| b.is_ascii_alphanumeric() || b".-:[]_".contains(&b);
        !host.is_empty() && host.len() <= 300 && host.bytes().all(known)
    };
    let host = host.filter(legal).unwrap_or("localhost");
    let scheme = match peer {
        Some(Peer::Tls { .. }) => "https",
        _ => "http",
    };
    let mut text = format!("Bearer realm=\"{scheme}://{host}/v2/token\",service=\"{SERVICE}\"");
    if let Some((repo, request)) = request.and_then(|asked| Some((repository(asked)?, asked))) {
        let actions = match *request.method() {
            Method::GET | Method::HEAD => "pull",
            _ => "pull,push",
        };
        text.push_str(&format!(",scope=\"repository:{repo}:{actions}\""));
    }
    text
}

/// The repository that a path is about: `/v2/NAME/(manifests|blobs|tags|referrers)/...`.
fn repository(request: &Request) -> Option<RepoName> {
    let rest = request.uri().path().strip_prefix("/v2/")?;
    let end = ["/manifests/", "/blobs/", "/tags/", "/referrers/"]
        .iter()
        .filter_map(|word| rest.rfind(word))
        .max()?;
    rest[..end].parse().ok()
}

pub(super) fn refuse(why: &str, challenge: &str) -> Response {
    let mut response = error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", why);
    if let Ok(value) = HeaderValue::try_from(challenge) {
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, value);
    }
    response
}

pub(super) fn too_many(why: &str) -> Response {
    error(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", why)
}

fn error(status: StatusCode, code: &str, why: &str) -> Response {
    let body = serde_json::json!({ "errors": [{ "code": code, "message": why }] });
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (status, kind, body.to_string()).into_response()
}

/// The registry may be this process's or another's: it is spoken to over a connection either way.
async fn forward(
    controller: &Controller,
    authority: Authority,
    mut request: Request,
) -> Result<Response, Box<dyn std::error::Error + Send + Sync>> {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let registry = controller.registry.clone();
    tokio::spawn(async move {
        // What broke one connection is its peer's to see.
        let _ended = registry.serve_connection(far, authority).await;
    });
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(near)).await?;
    tokio::spawn(connection);
    request.headers_mut().remove(header::AUTHORIZATION);
    let response = sender.send_request(request).await?;
    Ok(response.map(Body::new))
}
