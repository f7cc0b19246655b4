//! Multipart uploads (RFC 7578), streamed: a source goes to disk as it arrives, everything else is small and bounded.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Body;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderMap, StatusCode, header};
use kiln_core::{Action, Digest, TenantName};
use multer::{Constraints, Field, Multipart, SizeLimit};

use super::Api;
use super::limits::Slot;
use super::ports::SourceRefused;
use super::problem::{Problem, is_disk_full};
use crate::access::Door;

/// Largest part that is not a source.
const PART_MAX: u64 = 1 << 20;
/// Most bytes of an upload beside its source: parts, boundaries, headers.
const BESIDE_MAX: u64 = 8 << 20;
/// Most bytes of all parts of one upload that are not a source: they are kept in memory.
const SMALL_BYTES_MAX: u64 = 4 << 20;
/// Most parts of one upload.
const PARTS_MAX: usize = 128;
/// Most bytes that are read while the head of the next part is looked for: they wait in memory.
const HEAD_BYTES_MAX: u64 = 256 * 1024;
/// Longest boundary (RFC 2046 §5.1.1).
const BOUNDARY_MAX: usize = 70;
/// Bytes by which an archive is recognised: up to the end of the magic of a tar header.
const MAGIC: usize = 262;

/// No byte of a body came for too long.
#[derive(Debug, thiserror::Error)]
#[error("no byte came for too long")]
pub(crate) struct Stalled;

/// What is before a part, or its head, is longer than any is.
#[derive(Debug, thiserror::Error)]
#[error("the head of a part is too long")]
struct LongHead;

/// Whether an error is, or was caused by, [`Stalled`].
pub(crate) fn is_stalled(error: &(dyn Error + 'static)) -> bool {
    is_caused_by::<Stalled>(error)
}

fn is_caused_by<E: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<E>() {
            return true;
        }
        if let Some(inner) = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
            && is_caused_by::<E>(inner)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Bytes that may still come before a part begins.
type HeadLeft = Arc<AtomicU64>;

/// A body that ends with [`LongHead`] when more comes than may: its reader keeps everything until it finds the next part.
fn gauged(
    body: Body,
    left: HeadLeft,
) -> impl Stream<Item = Result<Bytes, axum::BoxError>> + Send + 'static {
    body.into_data_stream().map(move |piece| {
        let piece = piece?;
        let more = piece.len() as u64;
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| match left {
            u64::MAX => Some(left),
            left => left.checked_sub(more),
        });
        match taken {
            Ok(_) => Ok(piece),
            Err(_) => Err(LongHead.into()),
        }
    })
}

/// The answer to a body that stands still.
pub(crate) fn stalled() -> Problem {
    Problem::new(
        StatusCode::REQUEST_TIMEOUT,
        "stalled",
        "the body stood still for too long",
    )
}

/// The parts of an upload, one after the other.
pub(crate) struct Form {
    multipart: Multipart<'static>,
    parts: usize,
    head_left: HeadLeft,
    small_left: u64,
    /// The tenant's slot: what is kept in memory of an upload counts from its first byte.
    _slot: Slot,
}

impl Form {
    /// Of a request of somebody of `tenant`; refuses at once what says itself that it is too large.
    pub(crate) fn new(
        api: &Api,
        tenant: &TenantName,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<Self, Problem> {
        let kind = headers.get(header::CONTENT_TYPE);
        let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let boundary = multer::parse_boundary(kind).map_err(|_| {
            Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "media_type",
                "the body must be multipart/form-data with a boundary",
            )
        })?;
        if boundary.is_empty() || boundary.len() > BOUNDARY_MAX {
            let text = format!("a boundary has 1 to {BOUNDARY_MAX} characters");
            return Err(Problem::bad_request(text));
        }
        let most = api.config.source_max.saturating_add(BESIDE_MAX);
        let said = headers.get(header::CONTENT_LENGTH);
        let said = said.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if said.is_some_and(|said| said > most) {
            return Err(too_large(api));
        }
        let sizes = SizeLimit::new()
            .whole_stream(most)
            .per_field(PART_MAX)
            .for_field("source", api.config.source_max);
        let constraints = Constraints::new().size_limit(sizes);
        let slot = api.uploads.take(tenant.as_str()).ok_or_else(|| {
            Problem::too_many("uploads", "this tenant has too many uploads under way")
        })?;
        let head_left = HeadLeft::new(AtomicU64::new(HEAD_BYTES_MAX));
        let body = gauged(body, Arc::clone(&head_left));
        Ok(Self {
            multipart: Multipart::with_constraints(body, boundary, constraints),
            parts: 0,
            head_left,
            small_left: SMALL_BYTES_MAX,
            _slot: slot,
        })
    }

    /// The next part and its name.
    pub(crate) async fn next(
        &mut self,
        api: &Api,
    ) -> Result<Option<(String, Field<'static>)>, Problem> {
        self.head_left.store(HEAD_BYTES_MAX, Ordering::Relaxed);
        let field = self.multipart.next_field().await;
        // What follows is the part itself, whose reader counts.
        self.head_left.store(u64::MAX, Ordering::Relaxed);
        let Some(field) = field.map_err(|error| broken(api, &error))? else {
            return Ok(None);
        };
        self.parts += 1;
        if self.parts > PARTS_MAX {
            return Err(Problem::bad_request(format!(
                "there are more than {PARTS_MAX} parts"
            )));
        }
        let name = field.name().unwrap_or_default().to_owned();
        Ok(Some((name, field)))
    }

    /// A small part, whole.
    pub(crate) async fn small(
        &mut self,
        api: &Api,
        mut field: Field<'static>,
    ) -> Result<Vec<u8>, Problem> {
        let mut whole = Vec::new();
        while let Some(piece) = field.chunk().await.map_err(|error| broken(api, &error))? {
            let left = self.small_left.checked_sub(piece.len() as u64);
            self.small_left = left.ok_or_else(|| {
                Problem::too_large(format!(
                    "the parts that are not the source have at most {SMALL_BYTES_MAX} bytes together"
                ))
            })?;
            whole.extend_from_slice(&piece);
        }
        Ok(whole)
    }

    /// A small part that is text.
    pub(crate) async fn text(
        &mut self,
        api: &Api,
        name: &str,
        field: Field<'static>,
    ) -> Result<String, Problem> {
        let bytes = self.small(api, field).await?;
        String::from_utf8(bytes).map_err(|_| Problem::invalid(name, "it is not UTF-8"))
    }
}

/// The answer to a part that nobody asked for, by its name.
pub(crate) fn no_such_part(name: &str) -> Problem {
    let shown: String = name
        .chars()
        .filter(|c| !kiln_policy::unseen(*c))
        .take(80)
        .collect();
    let text = format!("there is no part {shown:?}");
    Problem::invalid(shown, text)
}

/// The source: recognised by its first bytes, then streamed to its store.
pub(crate) async fn source(
    api: &Api,
    tenant: &TenantName,
    mut field: Field<'static>,
) -> Result<(Digest, u64), Problem> {
    let mut head = Vec::new();
    let mut first = Vec::new();
    while head.len() < MAGIC {
        let Some(piece) = field.chunk().await.map_err(|error| broken(api, &error))? else {
            break;
        };
        head.extend_from_slice(&piece[..piece.len().min(MAGIC - head.len())]);
        first.push(Ok(piece));
    }
    if !is_archive(&head) {
        return Err(Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid_source",
            "the source is not a tar archive, plain or compressed with gzip or zstd",
        )
        .field("source"));
    }
    let kept_max = room_of(api, tenant).await?;
    let rest = field.map(|piece| piece.map_err(io::Error::other));
    let pieces = stream::iter(first).chain(rest).boxed();
    api.backend()
        .put_source(tenant, kept_max, pieces)
        .await
        .map_err(|error| match error {
            SourceRefused::TooLarge(_) => too_large(api),
            SourceRefused::Full(_) => full(api),
            SourceRefused::Cut(cause) => cut(api, &cause),
            SourceRefused::Store(cause) if is_disk_full(&*cause) => Problem::disk_full(&*cause),
            SourceRefused::Store(cause) => Problem::unavailable(&*cause),
        })
}

/// Most bytes that all sources of a tenant may have: what is kept for it, less its jobs' requests. None: no bound.
async fn room_of(api: &Api, tenant: &TenantName) -> Result<Option<u64>, Problem> {
    let tenants = api.db().tenants().await?;
    let known = tenants.into_iter().find(|known| known.name == *tenant);
    Ok(known.and_then(|known| Some(known.quota.stored_max?.saturating_sub(known.stored))))
}

/// The answer when as much is kept for a tenant as may be.
pub(crate) fn full(api: &Api) -> Problem {
    api.backend()
        .count(Door::User, Action::JobSubmit.name(), Some("stored_quota"));
    Problem::too_many(
        "stored_quota",
        "as many bytes of uploads and requests are kept for this tenant as may be",
    )
    .hint("uploads go a day after they came, when no job needs them, and requests with their jobs; an operator gives more with `kiln tenant quota TENANT --stored SIZE`")
    .retry_after(600)
}

fn is_archive(head: &[u8]) -> bool {
    head.starts_with(&[0x1f, 0x8b])
        || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || head.get(257..MAGIC) == Some(b"ustar")
}

fn cut(api: &Api, cause: &io::Error) -> Problem {
    let inner = cause
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<multer::Error>());
    if let Some(error) = inner {
        return broken(api, error);
    }
    // A store may wrap the stream's error once more.
    let nested = cause
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<io::Error>())
        .and_then(io::Error::get_ref)
        .and_then(|inner| inner.downcast_ref::<multer::Error>());
    match nested {
        Some(error) => broken(api, error),
        None => Problem::bad_request("the upload ended before it was whole"),
    }
}

fn too_large(api: &Api) -> Problem {
    let most = kiln_core::ByteSize(api.config.source_max);
    Problem::too_large(format!("a source has at most {most}")).hint(
        "leave out what is not needed (a build with .dockerignore, a run with .kilnignore), or ask the operator for a higher limit",
    )
}

fn broken(api: &Api, error: &multer::Error) -> Problem {
    match error {
        multer::Error::StreamSizeExceeded { .. } => too_large(api),
        multer::Error::FieldSizeExceeded { field_name, .. } => {
            if field_name.as_deref() == Some("source") {
                return too_large(api);
            }
            Problem::too_large(format!(
                "a part that is not the source has at most {PART_MAX} bytes"
            ))
        }
        multer::Error::StreamReadFailed(cause) if is_stalled(&**cause) => stalled(),
        multer::Error::StreamReadFailed(cause) if is_caused_by::<LongHead>(&**cause) => {
            Problem::too_large(format!(
                "what is before a part, its head included, has at most {HEAD_BYTES_MAX} bytes"
            ))
        }
        _ => Problem::bad_request("the multipart body is broken or was cut"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_told_by_their_first_bytes() {
        let mut tar = vec![0_u8; 512];
        tar[257..262].copy_from_slice(b"ustar");
        for good in [&tar[..], b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"] {
            assert!(is_archive(good));
        }
        for bad in [&b""[..], b"PK\x03\x04", b"<html>", &[0; 512]] {
            assert!(!is_archive(bad));
        }
    }

    #[test]
    fn a_stall_is_found_below_other_errors() {
        let error = io::Error::other(io::Error::other(Stalled));
        assert!(is_stalled(&error));
        assert!(!is_stalled(&io::Error::other("x")));
    }
}
