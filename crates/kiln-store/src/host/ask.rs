//! One request to the registry's own endpoints, whoever owns it now. A request that its owner took along when it
//! ended is made again of the next one: every request here may be made twice with the effect of once.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower::ServiceExt;

use super::call::WireAuthority;
use super::error::HostError;
use super::remote::{ConnectError, refusal, request};
use super::{HostRegistry, OWNERS_MAX, Role};
use crate::registry::Authority;
use crate::registry::http::header;

/// An owner that has not answered a request after this long is given up: it may hash a large blob first.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(3600);
/// As above, where only few bytes are to be written.
pub(super) const PIECE_WAIT_MAX: Duration = Duration::from_secs(120);

/// Most bytes of an error in the owner's words.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// A request whose body is in memory.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) wait_max: Duration,
}

impl Ask {
    pub(super) fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            wait_max: ANSWER_WAIT_MAX,
        }
    }

    pub(super) fn with(mut self, name: http::HeaderName, value: &str) -> Self {
        // A value that no header can carry would be refused by the owner as well: it is left out.
        if let Ok(value) = HeaderValue::try_from(value) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(super) fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    fn request(&self) -> Result<Request, HostError> {
        let body = Body::from(self.body.clone());
        let mut request = request(self.method.clone(), &self.path, body)?;
        request.headers_mut().extend(self.headers.clone());
        if !self.body.is_empty() {
            let length = HeaderValue::from(self.body.len());
            request.headers_mut().insert(CONTENT_LENGTH, length);
        }
        Ok(request)
    }
}

impl HostRegistry {
    /// Asks whoever owns the registry now, and its successors while they end.
    pub(super) async fn ask(
        &self,
        authority: &Authority,
        ask: &Ask,
    ) -> Result<Response, HostError> {
        for _ in 0..OWNERS_MAX {
            match self.ask_once(authority, ask).await {
                Err(HostError::OwnerGone { .. }) => drop(self.next_owner().await?),
                answer => return answer,
            }
        }
        Err(HostError::OwnerGone { source: None })
    }

    /// Asks the present owner. [`HostError::OwnerGone`]: it ended on the way, and may have done what was asked.
    pub(super) async fn ask_once(
        &self,
        authority: &Authority,
        ask: &Ask,
    ) -> Result<Response, HostError> {
        let mut request = ask.request()?;
        let remote = match self.role().await {
            Role::Owner(owner) => {
                request.extensions_mut().insert(authority.clone());
                return match owner.router.clone().oneshot(request).await {
                    Ok(response) => Ok(response),
                    Err(never) => match never {},
                };
            }
            Role::Attached(remote) => remote,
        };
        match remote.connect().await {
            Ok(connection) => {
                let wire = WireAuthority::from(authority);
                let answer = connection.send(request, &wire, ask.wait_max).await?;
                Ok(answer.map(Body::new))
            }
            Err(ConnectError::Absent(why)) => Err(HostError::gone(why.0)),
            Err(ConnectError::Refused(error)) => Err(error),
        }
    }

    /// As [`Self::ask`], the whole answer included: one that its owner could not finish is asked for again of the next.
    pub(super) async fn ask_whole(
        &self,
        authority: &Authority,
        ask: &Ask,
        body_max: usize,
    ) -> Result<(Parts, Bytes), HostError> {
        for _ in 0..OWNERS_MAX {
            let (parts, body) = self.ask(authority, ask).await?.into_parts();
            match Limited::new(body, body_max).collect().await {
                Ok(body) => return Ok((parts, body.to_bytes())),
                Err(error) if error.is::<LengthLimitError>() => {
                    return Err(HostError::Protocol {
                        what: format!("an answer of more than {body_max} bytes"),
                    });
                }
                Err(_broken) => drop(self.next_owner().await?),
            }
        }
        Err(HostError::OwnerGone { source: None })
    }

    /// As the operator: anything but success is an error, and the whole answer is read.
    pub(super) async fn operate(
        &self,
        ask: &Ask,
        body_max: usize,
    ) -> Result<(HeaderMap, Bytes), HostError> {
        let operator = Authority::Operator;
        // An error's words are short, whatever is asked for.
        let body_max = body_max.max(ERROR_BYTES_MAX);
        let (parts, body) = self.ask_whole(&operator, ask, body_max).await?;
        if !parts.status.is_success() {
            return Err(refusal(Response::from_parts(parts, Body::from(body))).await);
        }
        Ok((parts.headers, body))
    }

    /// Reads a blob whose head has been answered, through the ends of its owners: the next one is asked for the
    /// bytes that are missing.
    pub(super) fn read_on(
        &self,
        authority: Authority,
        path: String,
        from: u64,
        count: u64,
        body: Body,
    ) -> Body {
        let reading = Reading {
            host: self.clone(),
            authority,
            path,
            at: from,
            end: from + count,
            body,
            ends: 0,
        };
        Body::from_stream(stream::try_unfold(reading, |mut reading| async move {
            let next = reading.next().await?;
            Ok::<_, HostError>(next.map(|bytes| (bytes, reading)))
        }))
    }
}

/// A blob on its way.
struct Reading {
    host: HostRegistry,
    authority: Authority,
    path: String,
    at: u64,
    end: u64,
    body: Body,
    /// How often it broke off since the last byte.
    ends: u32,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, HostError> {
        while self.at < self.end {
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    let bytes = frame.into_data().unwrap_or_default();
                    if bytes.is_empty() {
                        continue;
                    }
                    self.ends = 0;
                    self.at += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                _ if self.ends < OWNERS_MAX => {
                    self.ends += 1;
                    self.go_on().await?;
                }
                _ => return Err(HostError::OwnerGone { source: None }),
            }
        }
        Ok(None)
    }

    /// Asks the next owner for the rest.
    async fn go_on(&mut self) -> Result<(), HostError> {
        self.host.next_owner().await?;
        let range = format!("bytes={}-{}", self.at, self.end - 1);
        let ask = Ask::new(Method::GET, &self.path).with(RANGE, &range);
        let answer = self.host.ask(&self.authority, &ask).await?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        if answer.status() != StatusCode::PARTIAL_CONTENT
            || part_of(&answer) != Some((self.at, self.end - self.at))
        {
            return Err(HostError::Protocol {
                what: "another part of the blob than was asked for".to_owned(),
            });
        }
        self.body = answer.into_body();
        Ok(())
    }
}

/// Where the body of an answer begins in its blob, and its bytes.
pub(super) fn part_of(answer: &Response) -> Option<(u64, u64)> {
    let length = header(answer.headers(), CONTENT_LENGTH)?.parse().ok()?;
    if answer.status() != StatusCode::PARTIAL_CONTENT {
        return Some((0, length));
    }
    let range = header(answer.headers(), CONTENT_RANGE)?.strip_prefix("bytes ")?;
    Some((range.split_once('-')?.0.parse().ok()?, length))
}
