//! The door for the user's own tools: plain HTTP on a loopback address, with tokens.
//!
//! Basic credentials (user `kiln`, the registry's secret) buy bearers at `/token`; anonymous pull is
//! an option. Requests whose `Host` is not a loopback name are refused, so that a web page cannot reach
//! the registry through a name of its own.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, HOST, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{Method, StatusCode};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::authority::{Action, Authority, UserAuthority};
use super::http::answer::{self, Answer};
use super::http::route::{Route, query_values};
use super::http::{header, router};
use super::serve::{LOOPBACK_HEAD_WAIT_MAX, serve_router};
use super::store::Store;
use super::token::{Access, BEARER_LIFE_S, CREDENTIAL_BYTES_MAX, Claims, Secret};

/// The user name that goes with the secret.
pub const USER: &str = "kiln";
/// Connections served at once; more wait.
pub const CONNECTIONS_MAX: usize = 256;
/// Pause after a failed accept (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the loopback door needs to know.
#[derive(Clone, Debug)]
pub struct LoopbackConfig {
    /// Where to listen. Anything but a loopback address is refused.
    pub address: SocketAddr,
    /// What the holder of the secret may do.
    pub user: UserAuthority,
    /// Trees anybody on this host may pull from without a token; empty: none.
    pub anonymous_pull: Vec<String>,
}

/// Why the door cannot open.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Not a loopback address.
    #[error("{address} is not a loopback address: the registry speaks plain HTTP")]
    NotLoopback {
        /// What was asked.
        address: SocketAddr,
    },
    /// Some other program listens there.
    #[error("port {} is taken by another program: choose another for the registry", address.port())]
    Taken {
        /// What was asked.
        address: SocketAddr,
    },
    /// Anything else.
    #[error("the registry cannot listen on {address}")]
    Failed {
        /// What was asked.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Begins to listen.
///
/// # Errors
/// See [`BindError`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    if !address.ip().is_loopback() {
        return Err(BindError::NotLoopback { address });
    }
    TcpListener::bind(address)
        .await
        .map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::Taken { address },
            _ => BindError::Failed { address, source },
        })
}

/// The door's view of one request.
struct Door {
    secret: Secret,
    config: LoopbackConfig,
    local: SocketAddr,
}

/// Serves the registry on a listener from [`bind`] until dropped.
pub async fn serve(
    listener: TcpListener,
    store: Arc<Store>,
    secret: Secret,
    config: LoopbackConfig,
) {
    let local = listener.local_addr().unwrap_or(config.address);
    let door = Arc::new(Door {
        secret,
        config,
        local,
    });
    let layer = middleware::from_fn_with_state(door, authorize);
    accept_all(&listener, &router(store).layer(layer)).await;
}

async fn accept_all(listener: &TcpListener, router: &Router) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // The semaphore is never closed: this waits for a free slot.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                let router = router.clone();
                connections.spawn(async move {
                    if let Err(error) = serve_router(stream, router, LOOPBACK_HEAD_WAIT_MAX).await {
                        tracing::debug!(%error, "registry connection ended");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "registry cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Puts the caller's authority on the request, or answers with a challenge.
async fn authorize(State(door): State<Arc<Door>>, mut request: Request, next: Next) -> Response {
    let parts = request_head(&request);
    let Some(host) = door.host(&parts) else {
        return answer::error(
            StatusCode::MISDIRECTED_REQUEST,
            "DENIED",
            "this registry answers to loopback names only",
        );
    };
    if parts.uri.path() == "/token" {
        return door.token(&parts, &host);
    }
    match door.authority(&parts) {
        Ok(authority) => {
            request.extensions_mut().insert(authority);
            next.run(request).await
        }
        Err(refusal) => door.challenge(&parts, &host, refusal),
    }
}

/// A request's head, without its extensions.
fn request_head(request: &Request) -> Parts {
    let mut head = http::Request::new(()).into_parts().0;
    head.method = request.method().clone();
    head.uri = request.uri().clone();
    head.headers = request.headers().clone();
    head
}

/// Why a request must come again with another credential.
#[derive(Clone, Copy)]
enum Refusal {
    Missing,
    Invalid,
    Insufficient,
}

enum Credential {
    None,
    Basic { user: String, password: String },
    Bearer(String),
    Other,
}

fn credential(parts: &Parts) -> Credential {
    let Some(text) = header(&parts.headers, AUTHORIZATION) else {
        return match parts.headers.contains_key(AUTHORIZATION) {
            true => Credential::Other,
            false => Credential::None,
        };
    };
    credential_of(text)
}

/// Reads an `Authorization` header.
fn credential_of(text: &str) -> Credential {
    if text.len() > CREDENTIAL_BYTES_MAX {
        return Credential::Other;
    }
    let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Credential::Bearer(rest.to_owned());
    }
    let decoded = scheme
        .eq_ignore_ascii_case("basic")
        .then(|| STANDARD.decode(rest).ok())
        .flatten()
        .and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.as_deref().and_then(|text| text.split_once(':')) {
        Some((user, password)) => Credential::Basic {
            user: user.to_owned(),
            password: password.to_owned(),
        },
        None => Credential::Other,
    }
}

/// For the fuzz targets: a login round trips or is none.
pub(crate) fn fuzz_credential(text: &str) {
    if let Credential::Basic { user, password } = credential_of(text) {
        assert!(!user.contains(':'));
        let again = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        let same = matches!(credential_of(&again), Credential::Basic { user: u, password: p } if u == user && p == password);
        assert!(same || again.len() > CREDENTIAL_BYTES_MAX);
    }
}

impl Door {
    /// The `Host` the client used, when it is a loopback name.
    fn host(&self, parts: &Parts) -> Option<String> {
        let Some(host) = header(&parts.headers, HOST) else {
            return (!parts.headers.contains_key(HOST)).then(|| self.local.to_string());
        };
        let authority: http::uri::Authority = host.parse().ok()?;
        let name = authority.host().trim_matches(['[', ']']);
        let address = name.parse::<std::net::IpAddr>();
        let loopback = match address {
            Ok(address) => address.is_loopback(),
            Err(_) => name.eq_ignore_ascii_case("localhost"),
        };
        (loopback && authority.as_str().find('@').is_none()).then(|| host.to_owned())
    }

    fn user(&self) -> Authority {
        Authority::User(self.config.user.clone())
    }

    fn anonymous(&self) -> Authority {
        Authority::Anonymous {
            pull: self.config.anonymous_pull.clone(),
        }
    }

    fn knows(&self, user: &str, password: &str) -> bool {
        user == USER && self.secret.is(password)
    }

    /// Who is asking, when that suffices for what is asked.
    fn authority(&self, parts: &Parts) -> Result<Authority, Refusal> {
        let (authority, refusal) = match credential(parts) {
            Credential::None if self.config.anonymous_pull.is_empty() => {
                return Err(Refusal::Missing);
            }
            Credential::None => (self.anonymous(), Refusal::Missing),
            Credential::Basic { user, password } if self.knows(&user, &password) => {
                return Ok(self.user());
            }
            Credential::Bearer(token) => {
                let claims = Claims::open(&token, &self.secret, unix_now());
                let claims = claims.ok_or(Refusal::Invalid)?;
                let whole = match claims.user.as_str() {
                    USER => self.user(),
                    _ => self.anonymous(),
                };
                (claims.authority(&whole), Refusal::Insufficient)
            }
            Credential::Basic { .. } | Credential::Other => return Err(Refusal::Invalid),
        };
        // A client that has no token yet learns from `/v2/` how to get one.
        let first_contact = matches!(refusal, Refusal::Missing);
        match Route::parse(parts.uri.path()) {
            Ok(Route::Base) if first_contact => Err(refusal),
            Ok(route) => match route.repo() {
                Some(repo) if !authority.allows(action(&parts.method), repo) => Err(refusal),
                _ => Ok(authority),
            },
            Err(_) => Ok(authority),
        }
    }

    fn challenge(&self, parts: &Parts, host: &str, refusal: Refusal) -> Response {
        let mut text = format!("Bearer realm=\"http://{host}/token\",service=\"kiln\"");
        if let Some(scope) = scope(parts) {
            text.push_str(&format!(",scope=\"{scope}\""));
        }
        let (error, message) = match refusal {
            Refusal::Missing => ("", "log in first"),
            Refusal::Invalid => (",error=\"invalid_token\"", "the credential is not valid"),
            Refusal::Insufficient => (
                ",error=\"insufficient_scope\"",
                "the token does not allow this",
            ),
        };
        text.push_str(error);
        let mut response = answer::error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message);
        if let Ok(value) = text.parse() {
            response.headers_mut().insert(WWW_AUTHENTICATE, value);
        }
        response
    }

    /// `GET /token?service=..&scope=..&scope=..`
    fn token(&self, parts: &Parts, host: &str) -> Response {
        if parts.method != Method::GET {
            return answer::unsupported("tokens are asked for with GET");
        }
        let (user, authority) = match credential(parts) {
            Credential::Basic { user, password } if self.knows(&user, &password) => {
                (USER, self.user())
            }
            Credential::None if !self.config.anonymous_pull.is_empty() => ("", self.anonymous()),
            _ => {
                let mut response = answer::error(
                    StatusCode::UNAUTHORIZED,
                    "UNAUTHORIZED",
                    "the user is kiln, the password is the registry's token",
                );
                if let Ok(value) = format!("Basic realm=\"{host}\"").parse() {
                    response.headers_mut().insert(WWW_AUTHENTICATE, value);
                }
                return response;
            }
        };
        let asked: Vec<_> = query_values(parts.uri.query(), "scope")
            .iter()
            .flat_map(|text| text.split(' '))
            .filter_map(Access::parse)
            .collect();
        let token = Claims::for_scopes(user, &asked, &authority, unix_now()).seal(&self.secret);
        Answer::new(StatusCode::OK).json(&json!({
            "token": token,
            "access_token": token,
            "expires_in": BEARER_LIFE_S,
        }))
    }
}

fn action(method: &Method) -> Action {
    match *method {
        Method::GET | Method::HEAD => Action::Pull,
        Method::DELETE => Action::Delete,
        _ => Action::Push,
    }
}

/// The scope that would allow the request.
fn scope(parts: &Parts) -> Option<String> {
    let route = Route::parse(parts.uri.path()).ok()?;
    if route == Route::Catalog {
        return Some("registry:catalog:*".to_owned());
    }
    let actions = match action(&parts.method) {
        Action::Pull => "pull",
        Action::Push => "pull,push",
        Action::Delete => "pull,push,delete",
    };
    Some(format!("repository:{}:{actions}", route.repo()?))
}

/// Seconds since the Unix epoch.
fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
