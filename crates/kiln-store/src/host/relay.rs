//! An upload through an attached process. Its bytes go to the owner in bounded pieces, each kept until the owner has
//! it, so that the session goes on with the next owner when one ends in the middle.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_RANGE, LOCATION};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use kiln_core::Digest;

use super::ask::{Ask, PIECE_WAIT_MAX};
use super::error::HostError;
use super::{HostRegistry, OWNERS_MAX};
use crate::registry::http::answer::UPLOAD_BYTES;
use crate::registry::http::header;
use crate::registry::http::transfer::BODY_IDLE_MAX;
use crate::registry::http::uploads::created;
use crate::registry::{Authority, RepoName, StoreError};

/// Bytes of one upload held here at most, next to what its connection buffers.
const PIECE_BYTES: usize = 2 << 20;

/// Why an upload does not go on.
pub(super) enum Stopped {
    /// The registry's own answer, for the client.
    Answer(Box<Response>),
    /// What the client did, or its lease.
    Store(StoreError),
    /// The registry cannot be reached.
    Host(HostError),
}

impl From<HostError> for Stopped {
    fn from(error: HostError) -> Self {
        Self::Host(error)
    }
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// A session at the registry, whoever owns it.
pub(super) struct Relay<'a> {
    host: &'a HostRegistry,
    authority: &'a Authority,
    repo: RepoName,
    path: String,
    at: u64,
}

impl<'a> Relay<'a> {
    /// Begins a session.
    pub(super) async fn begin(
        host: &'a HostRegistry,
        authority: &'a Authority,
        repo: &RepoName,
    ) -> Result<Self, Stopped> {
        authority.check_live()?;
        let ask = Ask::new(Method::POST, format!("/v2/{repo}/blobs/uploads/"));
        let answer = host.ask(authority, &ask).await?;
        let location = header(answer.headers(), LOCATION).map(str::to_owned);
        match (answer.status(), location) {
            (StatusCode::ACCEPTED, Some(path)) => Ok(Self {
                host,
                authority,
                repo: repo.clone(),
                path,
                at: 0,
            }),
            _ => Err(Stopped::Answer(Box::new(answer))),
        }
    }

    /// Takes up a session where it stands.
    pub(super) async fn take_up(
        host: &'a HostRegistry,
        authority: &'a Authority,
        repo: &RepoName,
        path: &str,
    ) -> Result<Self, Stopped> {
        authority.check_live()?;
        let mut relay = Self {
            host,
            authority,
            repo: repo.clone(),
            path: path.to_owned(),
            at: 0,
        };
        relay.at = relay.stands_at().await?;
        Ok(relay)
    }

    /// Bytes the session has.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    async fn stands_at(&self) -> Result<u64, Stopped> {
        let answer = self.status().await?;
        let bytes = header(answer.headers(), UPLOAD_BYTES).and_then(|text| text.parse().ok());
        match bytes.filter(|_| answer.status().is_success()) {
            Some(bytes) => Ok(bytes),
            None => Err(Stopped::Answer(Box::new(answer))),
        }
    }

    /// The registry's answer to how far it is.
    pub(super) async fn status(&self) -> Result<Response, HostError> {
        let ask = Ask {
            wait_max: PIECE_WAIT_MAX,
            ..Ask::new(Method::GET, &self.path)
        };
        self.host.ask(self.authority, &ask).await
    }

    /// Appends a whole body. What came of one that breaks off stays in the session.
    pub(super) async fn append(
        &mut self,
        body: Body,
        promised: Option<u64>,
    ) -> Result<(), Stopped> {
        let mut pieces = Pieces::new(body);
        let mut got: u64 = 0;
        loop {
            let (piece, end) = pieces.next().await;
            got = got.saturating_add(piece.len() as u64);
            let length = |promised| StoreError::UploadLength { promised, got };
            if let Some(promised) = promised.filter(|promised| got > *promised) {
                return Err(length(promised).into());
            }
            self.piece(piece).await?;
            match end {
                End::NotYet => {}
                End::Broken(error) => return Err(error.into()),
                End::Whole => {
                    let short = promised.filter(|promised| *promised != got);
                    return short.map_or(Ok(()), |promised| Err(length(promised).into()));
                }
            }
        }
    }

    async fn piece(&mut self, piece: Bytes) -> Result<(), Stopped> {
        let (start, end) = (self.at, self.at + piece.len() as u64);
        for _ in 0..OWNERS_MAX {
            if self.at == end {
                return Ok(());
            }
            self.authority.check_live()?;
            let done = usize::try_from(self.at - start).unwrap_or(usize::MAX);
            let range = format!("{}-{}", self.at, end - 1);
            let ask = Ask {
                wait_max: PIECE_WAIT_MAX,
                ..Ask::new(Method::PATCH, &self.path)
            };
            let ask = ask.with(CONTENT_RANGE, &range).body(piece.slice(done..));
            match self.host.ask_once(self.authority, &ask).await {
                Ok(answer) if answer.status() == StatusCode::ACCEPTED => {
                    self.at = end;
                    return Ok(());
                }
                Ok(answer) => return Err(Stopped::Answer(Box::new(answer))),
                Err(HostError::OwnerGone { .. }) => {
                    self.host.next_owner().await?;
                    let at = self.stands_at().await?;
                    if !(start..=end).contains(&at) {
                        return Err(StoreError::UploadOffset { expected: at }.into());
                    }
                    self.at = at;
                }
                Err(error) => return Err(error.into()),
            }
        }
        if self.at == end {
            return Ok(());
        }
        Err(HostError::OwnerGone { source: None }.into())
    }

    /// Makes the session's bytes a blob. An owner that ended right after it did so has ended the session as well:
    /// then the blob tells.
    pub(super) async fn commit(self, digest: &Digest) -> Result<Response, Stopped> {
        let ask = Ask::new(Method::PUT, format!("{}?digest={digest}", self.path));
        let mut ended = false;
        for _ in 0..OWNERS_MAX {
            self.authority.check_live()?;
            match self.host.ask_once(self.authority, &ask).await {
                Ok(answer) if ended && answer.status() == StatusCode::NOT_FOUND => {
                    let look = Ask::new(Method::HEAD, format!("/v2/{}/blobs/{digest}", self.repo));
                    let found = self.host.ask(self.authority, &look).await?;
                    return match found.status().is_success() {
                        true => Ok(created(&self.repo, digest)),
                        false => Err(Stopped::Answer(Box::new(answer))),
                    };
                }
                Ok(answer) if answer.status() == StatusCode::CREATED => return Ok(answer),
                Ok(answer) => return Err(Stopped::Answer(Box::new(answer))),
                Err(HostError::OwnerGone { .. }) => {
                    ended = true;
                    self.host.next_owner().await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(HostError::OwnerGone { source: None }.into())
    }

    /// Gives the session up. Best effort: it expires.
    pub(super) async fn cancel(host: &HostRegistry, authority: &Authority, path: &str) {
        let ask = Ask {
            wait_max: Duration::from_secs(30),
            ..Ask::new(Method::DELETE, path)
        };
        let _expires = host.ask(authority, &ask).await;
    }

    /// Where the session is, for [`Self::cancel`].
    pub(super) fn path(&self) -> String {
        self.path.clone()
    }
}

/// How a body goes on after a piece.
enum End {
    NotYet,
    Whole,
    Broken(StoreError),
}

/// A body in pieces of about [`PIECE_BYTES`].
struct Pieces(Body);

impl Pieces {
    fn new(body: Body) -> Self {
        Self(body)
    }

    async fn next(&mut self) -> (Bytes, End) {
        let mut held = BytesMut::new();
        while held.len() < PIECE_BYTES {
            let frame = match tokio::time::timeout(BODY_IDLE_MAX, self.0.frame()).await {
                Err(_silent) => {
                    return (
                        held.freeze(),
                        End::Broken(StoreError::BodyBroken { source: None }),
                    );
                }
                Ok(None) => return (held.freeze(), End::Whole),
                Ok(Some(Err(error))) => {
                    let source = Some(error.into());
                    return (
                        held.freeze(),
                        End::Broken(StoreError::BodyBroken { source }),
                    );
                }
                Ok(Some(Ok(frame))) => frame,
            };
            held.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
        (held.freeze(), End::NotYet)
    }
}
