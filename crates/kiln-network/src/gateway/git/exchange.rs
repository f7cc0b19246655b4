//! One request of a machine's git, from its decision to the last byte of its answer.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING,
    CONTENT_TYPE, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT,
};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kiln_core::git_gateway::{GIT_HOST, GIT_PORT, GitRefused};
use kiln_core::network::{EgressEvent, EgressVerdict, Protocol};
use kiln_core::secret::Repository;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::pieces::{Pieces, next};
use super::request::{self, GitRequest, Step, Wanted};
use super::{GitUpstreams, HEAD_BYTES_MAX, REQUEST_BYTES_MAX, TLS_WAIT, words};
use crate::gateway::admitted::Route;
use crate::gateway::bandwidth::Direction;
use crate::gateway::rules::Rules;
use crate::gateway::share::Moving;
use crate::gateway::{Gateway, Refusal};

/// What servers are told is asking: some speak git only to what begins so.
const AGENT: &str = "git/2.0 (kiln)";

/// A task that ends with what it was for.
struct Beside(AbortHandle);

impl Drop for Beside {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Records a request when it is over, however it ends.
struct Tally {
    gateway: Gateway,
    repository: Repository,
    path: String,
    phase: Option<Arc<str>>,
    address: Option<IpAddr>,
    verdict: Mutex<EgressVerdict>,
    narrowed: std::sync::atomic::AtomicBool,
    bytes_out: AtomicU64,
    bytes_in: AtomicU64,
}

impl Drop for Tally {
    fn drop(&mut self) {
        let verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        let unnamed = GitRefused::Repository;
        let admitted =
            !matches!(&*verdict, EgressVerdict::GitRefused { why, .. } if *why == unnamed);
        self.gateway.inner.sink.record(EgressEvent {
            address: self.address,
            rule: admitted.then(|| rule(&self.repository)),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            phase: self.phase.as_deref().map(str::to_owned),
            protocol: Some(Protocol::Tls),
            narrowed: self.narrowed.load(Ordering::Relaxed),
            ..EgressEvent::of(
                self.repository.host(),
                self.repository.port(),
                verdict.clone(),
            )
        });
    }
}

/// A repository as records name the rule that admitted it.
fn rule(repository: &Repository) -> String {
    format!("git {repository}")
}

impl Tally {
    fn is(&self, verdict: EgressVerdict) {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = verdict;
    }

    fn refused(&self, why: GitRefused) -> EgressVerdict {
        EgressVerdict::GitRefused {
            why,
            path: self.path.clone(),
        }
    }

    /// Says no after the server was reached.
    fn refuse(&self, why: GitRefused, text: &str) -> Response<Pieces> {
        self.is(self.refused(why));
        words(StatusCode::FORBIDDEN, &format!("{} ({})", text, why.code()))
    }

    fn failed(&self, error: String) -> Response<Pieces> {
        let text = format!("{}: {error}", self.repository);
        self.is(EgressVerdict::Unreachable { error });
        words(StatusCode::BAD_GATEWAY, &text)
    }
}

/// One flow's view of which repositories a phase reads.
#[derive(Clone)]
struct Watched {
    repository: Repository,
    rules: watch::Receiver<Rules>,
}

impl Watched {
    fn allows(&self) -> bool {
        self.rules.borrow().git.contains(&self.repository)
    }

    /// Returns once the phase may no longer read it.
    async fn ended(&mut self) {
        let repository = self.repository.clone();
        let forbids = |rules: &Rules| !rules.git.contains(&repository);
        // The answer borrows the rules: only whether there was one is kept.
        let gone = self.rules.wait_for(forbids).await.is_err();
        if gone {
            // The gateway is gone: nobody can narrow any more.
            std::future::pending::<()>().await;
        }
    }
}

/// Answers one request of a guest.
pub(super) async fn exchange(
    gateway: &Gateway,
    upstreams: &GitUpstreams,
    asked: Request<Incoming>,
) -> Response<Pieces> {
    let uri = asked.uri();
    let target = match (uri.authority(), uri.path_and_query()) {
        (None, Some(target)) => target.as_str().to_owned(),
        _ => String::new(),
    };
    let read = request::read(asked.method().as_str(), &target);
    let git = match read {
        Ok(git) => git,
        Err(refused) => {
            let (host, port) = refused
                .to
                .unwrap_or_else(|| (GIT_HOST.to_owned(), GIT_PORT));
            let text = format!("{} ({})", refused.why.why(), refused.why.code());
            gateway.record(
                &host,
                port,
                EgressVerdict::GitRefused {
                    why: refused.why,
                    path: refused.path,
                },
            );
            return words(StatusCode::FORBIDDEN, &text);
        }
    };
    let header = |name: &'static str| asked.headers().get(name).map(HeaderValue::as_bytes);
    let wanted = request::headers(git.step, header);
    // Subscribed before the decision: a narrowing in between is seen.
    let watched = Watched {
        repository: git.repository.clone(),
        rules: gateway.inner.rules.subscribe(),
    };
    let named = git.repository.as_str();
    let (_, below) = named.split_once('/').unwrap_or_default();
    let mut tally = Tally {
        gateway: gateway.clone(),
        repository: git.repository.clone(),
        path: below.to_owned(),
        phase: watched.rules.borrow().phase.clone(),
        address: None,
        verdict: Mutex::new(EgressVerdict::Allowed),
        narrowed: false.into(),
        bytes_out: AtomicU64::new(0),
        bytes_in: AtomicU64::new(0),
    };
    if !watched.allows() {
        let why = GitRefused::Repository;
        return tally.refuse(why, &format!("{}: {}", git.repository, why.why()));
    }
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(why) => return tally.refuse(why, why.why()),
    };
    let route = match gateway
        .route(git.repository.host(), git.repository.port())
        .await
    {
        Ok(route) => route,
        Err(refusal) => {
            tally.address = refusal.address();
            return unrouted(&tally, &refusal);
        }
    };
    tally.address = route.address;
    let moving = gateway.inner.share.moves.moving(gateway.inner.machine);
    let going = Going {
        tally: Arc::new(tally),
        moving: Arc::new(moving),
        watched,
        git,
    };
    going.on(upstreams, route, wanted, asked.into_body()).await
}

fn unrouted(tally: &Tally, refusal: &Refusal) -> Response<Pieces> {
    match refusal {
        Refusal::Address { range, .. } => {
            tally.is(EgressVerdict::AddressRefused { range: *range });
            words(StatusCode::FORBIDDEN, &refusal.to_string())
        }
        other => tally.failed(other.to_string()),
    }
}

/// A request that is allowed, on its way.
struct Going {
    tally: Arc<Tally>,
    moving: Arc<Moving>,
    watched: Watched,
    git: GitRequest,
}

impl Going {
    async fn on(
        self,
        upstreams: &GitUpstreams,
        route: Route,
        wanted: Wanted,
        body: Incoming,
    ) -> Response<Pieces> {
        let mut watched = self.watched.clone();
        let tally = Arc::clone(&self.tally);
        tokio::select! {
            biased;
            () = watched.ended() => {
                tally.narrowed.store(true, Ordering::Relaxed);
                words(StatusCode::FORBIDDEN, "the phase that named this repository is over")
            }
            answer = self.asked(upstreams, route, wanted, body) => {
                answer.unwrap_or_else(|error| tally.failed(error))
            }
        }
    }

    async fn asked(
        self,
        upstreams: &GitUpstreams,
        route: Route,
        wanted: Wanted,
        body: Incoming,
    ) -> Result<Response<Pieces>, String> {
        if !route.early.is_empty() || route.http_only {
            return Err("the operator's proxy gives no tunnel to it".to_owned());
        }
        let name = self.git.repository.host().to_owned();
        let name = name
            .try_into()
            .map_err(|_| "its name is none for TLS".to_owned())?;
        let connector = TlsConnector::from(Arc::clone(&upstreams.tls));
        let stream = timeout(TLS_WAIT, connector.connect(name, route.stream)).await;
        let stream = stream
            .map_err(|_| "TLS took too long".to_owned())?
            .map_err(|error| format!("TLS: {error}"))?;
        let handshake = hyper::client::conn::http1::Builder::new()
            .max_buf_size(HEAD_BYTES_MAX)
            .handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(|error| error.to_string())?;
        let driven = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::trace!(%error, "a connection to a git server ended");
            }
        });
        let driven = Beside(driven.abort_handle());
        let (body, bringing) = self.request_body(body)?;
        let request = self.request(upstreams, wanted, body)?;
        let idle = self.tally.gateway.inner.limits.idle;
        let answer = timeout(idle, sender.send_request(request)).await;
        let answer = answer
            .map_err(|_| "it did not answer in time".to_owned())?
            .map_err(|error| error.to_string())?;
        Ok(self.answered(answer, (driven, bringing)))
    }

    /// The guest's body, counted and shaped; the task that brings it.
    fn request_body(&self, mut from: Incoming) -> Result<(Pieces, Option<Beside>), String> {
        if self.git.step == Step::Refs {
            return Ok((Pieces::whole(Bytes::new()), None));
        }
        let length = from.size_hint().exact();
        if length.is_some_and(|length| length > REQUEST_BYTES_MAX) {
            return Err("the request is too large".to_owned());
        }
        let (to, body) = Pieces::brought(length);
        let (tally, moving, watched) = (
            Arc::clone(&self.tally),
            Arc::clone(&self.moving),
            self.watched.clone(),
        );
        let bringing = tokio::spawn(async move {
            let inner = &tally.gateway.inner;
            let mut sum = 0_u64;
            loop {
                let Ok(piece) = timeout(inner.limits.idle, next(&mut from)).await else {
                    return;
                };
                match piece {
                    None => break,
                    Some(Err(_)) => return,
                    Some(Ok(bytes)) => {
                        let len = bytes.len();
                        sum = sum.saturating_add(len as u64);
                        inner.bandwidth.admit(Direction::Out, len).await;
                        if sum > REQUEST_BYTES_MAX || !watched.allows() {
                            return;
                        }
                        if moving.step(to.send(Some(bytes))).await.is_err() {
                            return;
                        }
                        tally.bytes_out.fetch_add(len as u64, Ordering::Relaxed);
                    }
                }
            }
            let _nobody_listens = to.send(None).await;
        });
        Ok((body, Some(Beside(bringing.abort_handle()))))
    }

    /// The request as the server gets it: nothing of the guest's head is in it but what was read.
    fn request(
        &self,
        upstreams: &GitUpstreams,
        wanted: Wanted,
        body: Pieces,
    ) -> Result<Request<Pieces>, String> {
        let method = match self.git.step {
            Step::Refs => "GET",
            Step::Pack => "POST",
        };
        let authority = self.git.repository.authority();
        let mut request = Request::builder()
            .method(method)
            .uri(&self.git.target)
            .header(HOST, authority)
            .header(USER_AGENT, AGENT)
            .header(ACCEPT, self.git.step.answer_type())
            .header(CONNECTION, "close");
        if wanted.gzip {
            request = request.header(ACCEPT_ENCODING, "gzip");
        }
        if let Some(version) = wanted.version {
            request = request.header(HeaderName::from_static("git-protocol"), version);
        }
        if let Some(typed) = request::body_type(self.git.step) {
            request = request.header(CONTENT_TYPE, typed);
        }
        if wanted.gzip_body {
            request = request.header(CONTENT_ENCODING, "gzip");
        }
        if let Some(credential) = upstreams.credentials.get(&self.git.repository) {
            request = request.header(AUTHORIZATION, credential.clone());
        }
        request.body(body).map_err(|error| error.to_string())
    }

    fn answered(
        self,
        answer: Response<Incoming>,
        beside: (Beside, Option<Beside>),
    ) -> Response<Pieces> {
        let status = answer.status();
        if status.is_redirection() {
            return self.redirected(&answer);
        }
        let repository = &self.git.repository;
        match status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let text = format!("{repository}: {}", GitRefused::Credential.why());
                return self.tally.refuse(GitRefused::Credential, &text);
            }
            StatusCode::NOT_FOUND => {
                return words(
                    status,
                    &format!("{repository}: its server has no such repository"),
                );
            }
            other => {
                let text = format!("{repository}: its server answered {}", other.as_u16());
                return words(StatusCode::BAD_GATEWAY, &text);
            }
        }
        let typed = answer.headers().get(CONTENT_TYPE);
        let typed = typed.is_some_and(|typed| *typed == self.git.step.answer_type());
        let encoding = answer.headers().get(CONTENT_ENCODING).cloned();
        let plain = |encoding: &HeaderValue| *encoding == "gzip" || *encoding == "identity";
        if !typed || !encoding.as_ref().is_none_or(plain) {
            let text = format!("{repository}: its server does not answer as git does");
            return self.tally.refuse(GitRefused::Protocol, &text);
        }
        let kind = HeaderValue::from_static(self.git.step.answer_type());
        let (to, body) = Pieces::brought(None);
        tokio::spawn(self.bring(answer.into_body(), to, beside));
        let mut given = Response::new(body);
        given.headers_mut().insert(CONTENT_TYPE, kind);
        let fresh = HeaderValue::from_static("no-cache");
        given.headers_mut().insert(CACHE_CONTROL, fresh);
        if let Some(encoding) = encoding {
            given.headers_mut().insert(CONTENT_ENCODING, encoding);
        }
        given
    }

    /// A redirect to a repository of the policy is the guest's to follow, here; the decision is made again then.
    fn redirected(&self, answer: &Response<Incoming>) -> Response<Pieces> {
        let location = answer.headers().get(LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        let to = location.and_then(|location| request::redirected(&self.git, location));
        let may = |to: &GitRequest| self.watched.rules.borrow().git.contains(&to.repository);
        let address = to
            .filter(may)
            .map(|to| HeaderValue::try_from(request::address(&to)));
        let Some(Ok(address)) = address else {
            let why = GitRefused::Redirect;
            let text = format!("{}: {}", self.git.repository, why.why());
            return self.tally.refuse(why, &text);
        };
        let mut answer = words(StatusCode::FOUND, "it moved");
        answer.headers_mut().insert(LOCATION, address);
        answer
    }

    /// Brings the answer to the guest until its end, the guest's, or the phase's.
    async fn bring(
        self,
        mut from: Incoming,
        to: mpsc::Sender<Option<Bytes>>,
        _beside: (Beside, Option<Beside>),
    ) {
        let Self {
            tally,
            moving,
            watched,
            ..
        } = self;
        let inner = &tally.gateway.inner;
        let mut narrowing = watched.clone();
        let bring = async {
            loop {
                let piece = timeout(inner.limits.idle, next(&mut from)).await;
                match piece {
                    Err(_) => return Err("nothing came for too long".to_owned()),
                    Ok(None) => break,
                    Ok(Some(Err(error))) => return Err(error.to_string()),
                    Ok(Some(Ok(bytes))) => {
                        let len = bytes.len();
                        inner.bandwidth.admit(Direction::In, len).await;
                        if !watched.allows() {
                            return Ok(());
                        }
                        if moving.step(to.send(Some(bytes))).await.is_err() {
                            return Ok(());
                        }
                        tally.bytes_in.fetch_add(len as u64, Ordering::Relaxed);
                    }
                }
            }
            let _gone = to.send(None).await;
            Ok(())
        };
        tokio::select! {
            biased;
            () = narrowing.ended() => tally.narrowed.store(true, Ordering::Relaxed),
            ended = bring => if let Err(error) = ended {
                tracing::debug!(repository = %tally.repository, %error, "an answer was cut off");
            },
            // The guest is gone.
            () = to.closed() => {}
        }
    }
}
