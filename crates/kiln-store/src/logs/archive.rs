//! An ended log in the object store: packs of compressed pieces, and an index that is written last and makes it exist.
//!
//! ```text
//! logs/TENANT/JOB/ATTEMPT/index          preamble, sealed JSON: Index
//! logs/TENANT/JOB/ATTEMPT/SALT-N.pack    zstd frames, each sealed
//! expire/CLASS/DAY/TENANT/JOB/ATTEMPT    empty, DAY is days since 1970 as six digits: written by earlier builds, removed with its log
//! ```
//! A close that was cut short leaves packs nobody names; the next close of the same log removes them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use kiln_core::{JobId, TenantName};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutOptions};
use serde::{Deserialize, Serialize};

use super::retention::RetentionClass;
use super::seal::{LogKeys, PREAMBLE, Sealer};
use super::{LogError, LogName};

/// Bytes of log that are compressed together: the unit of a range read.
pub(super) const PIECE_BYTES: usize = 256 * 1024;
/// A pack is put into the store when it is this long.
const PACK_BYTES: usize = 4 << 20;
/// Longest index that is read.
const INDEX_MAX: u64 = 4 << 20;
/// Compression: fast, and a fifth of the size of what a build prints.
const LEVEL: i32 = 3;
const MAGIC: &[u8; 8] = b"KLNIDX1\n";
const VERSION: u32 = 1;
/// Number under which an index is sealed; pieces count from 0.
const INDEX_NUMBER: u64 = u64::MAX;

/// What an ended log is made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Index {
    version: u32,
    /// Length as its writer counts, kept or not.
    pub(super) next: u64,
    /// Length as it is read.
    pub(super) bytes: u64,
    pub(super) truncated: bool,
    pub(super) dropped: u64,
    pub(super) class: RetentionClass,
    pub(super) ended_unix_ms: u64,
    packs: Vec<String>,
    pieces: Vec<Piece>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Piece {
    offset: u64,
    raw: u32,
    pack: u32,
    at: u64,
    stored: u32,
}

impl Index {
    /// Pieces follow each other and stay within bounds; what comes out of a bucket is not taken on trust.
    fn is_sound(&self) -> bool {
        let mut end = 0;
        for piece in &self.pieces {
            let fits = piece.offset == end
                && piece.raw > 0
                && piece.raw as usize <= PIECE_BYTES
                && (piece.pack as usize) < self.packs.len();
            if !fits {
                return false;
            }
            end += u64::from(piece.raw);
        }
        self.version == VERSION && end == self.bytes
    }
}

/// An opened index.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) index: Index,
    sealer: Sealer,
}

pub(super) fn folder(name: &LogName) -> Key {
    Key::from(format!(
        "logs/{}/{}/{}",
        name.tenant, name.attempt.job, name.attempt.number
    ))
}

fn index_key(name: &LogName) -> Key {
    Key::from(format!("{}/index", folder(name)))
}

/// Writes an ended log piece by piece.
pub(super) struct Packer<'a> {
    store: &'a dyn ObjectStore,
    name: &'a LogName,
    sealer: Sealer,
    preamble: [u8; PREAMBLE],
    index: Index,
    pack: Vec<u8>,
    waiting: Vec<u8>,
}

/// What the index says beside the pieces.
#[derive(Clone, Copy, Debug)]
pub(super) struct About {
    pub(super) next: u64,
    pub(super) truncated: bool,
    pub(super) dropped: u64,
    pub(super) class: RetentionClass,
    pub(super) now_unix_ms: u64,
}

impl<'a> Packer<'a> {
    pub(super) fn new(
        store: &'a dyn ObjectStore,
        name: &'a LogName,
        keys: &LogKeys,
        about: About,
    ) -> Result<Self, LogError> {
        let (sealer, preamble) = Sealer::create(keys, MAGIC)?;
        Ok(Self {
            store,
            name,
            sealer,
            preamble,
            index: Index {
                version: VERSION,
                next: about.next,
                bytes: 0,
                truncated: about.truncated,
                dropped: about.dropped,
                class: about.class,
                ended_unix_ms: about.now_unix_ms,
                packs: Vec::new(),
                pieces: Vec::new(),
            },
            pack: Vec::new(),
            waiting: Vec::new(),
        })
    }

    /// The next bytes of the log.
    pub(super) async fn push(&mut self, mut bytes: &[u8]) -> Result<(), LogError> {
        while !bytes.is_empty() {
            let take = bytes.len().min(PIECE_BYTES - self.waiting.len());
            self.waiting.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.waiting.len() == PIECE_BYTES {
                self.piece().await?;
            }
            if self.pack.len() >= PACK_BYTES {
                self.flush().await?;
            }
        }
        Ok(())
    }

    async fn piece(&mut self) -> Result<(), LogError> {
        let raw = std::mem::take(&mut self.waiting);
        if raw.is_empty() {
            return Ok(());
        }
        let len = raw.len();
        let squeezed = tokio::task::spawn_blocking(move || zstd::bulk::compress(&raw, LEVEL))
            .await
            .map_err(|_| LogError::Stopping)?
            .map_err(|source| LogError::Io {
                what: "compress",
                path: self.name.to_string().into(),
                source,
            })?;
        let number = self.index.pieces.len() as u64;
        let offset = self.index.bytes;
        let sealed = self
            .sealer
            .seal(number, about(self.name, offset).as_bytes(), squeezed)
            .ok_or_else(|| damaged(self.name, "a piece cannot be sealed"))?;
        self.index.pieces.push(Piece {
            offset,
            raw: u32::try_from(len).unwrap_or(u32::MAX),
            pack: u32::try_from(self.index.packs.len()).unwrap_or(u32::MAX),
            at: self.pack.len() as u64,
            stored: u32::try_from(sealed.len()).unwrap_or(u32::MAX),
        });
        self.index.bytes += len as u64;
        self.pack.extend_from_slice(&sealed);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), LogError> {
        if self.pack.is_empty() {
            return Ok(());
        }
        let salt = hex::encode(&self.preamble[24..32]);
        let file = format!("{salt}-{}.pack", self.index.packs.len());
        let key = Key::from(format!("{}/{file}", folder(self.name)));
        let pack = std::mem::take(&mut self.pack);
        self.store
            .put(&key, pack.into())
            .await
            .map_err(LogError::objects("write a pack of a log"))?;
        self.index.packs.push(file);
        Ok(())
    }

    /// Makes the log exist. False: somebody else did it first, and what this one wrote is not used.
    pub(super) async fn finish(mut self, conditional: bool) -> Result<(Index, bool), LogError> {
        self.piece().await?;
        self.flush().await?;
        let json = serde_json::to_vec(&self.index)
            .map_err(|_| damaged(self.name, "its index cannot be written"))?;
        let sealed = self
            .sealer
            .seal(INDEX_NUMBER, about(self.name, 0).as_bytes(), json)
            .ok_or_else(|| damaged(self.name, "its index cannot be sealed"))?;
        let bytes = [&self.preamble[..], &sealed].concat();
        let mode = if conditional {
            PutMode::Create
        } else {
            PutMode::Overwrite
        };
        let put = self
            .store
            .put_opts(&index_key(self.name), bytes.into(), PutOptions::from(mode))
            .await;
        match put {
            Ok(_) => Ok((self.index, true)),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => Ok((self.index, false)),
            Err(error) => Err(LogError::objects("write the index of a log")(error)),
        }
    }
}

/// The index of an ended log, or nothing.
pub(super) async fn open(
    store: &dyn ObjectStore,
    keys: &LogKeys,
    name: &LogName,
) -> Result<Option<Opened>, LogError> {
    let got = match store.get(&index_key(name)).await {
        Ok(got) => got,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(LogError::objects("read the index of a log")(error)),
    };
    if got.meta.size > INDEX_MAX {
        return Err(damaged(name, "its index is too long"));
    }
    let bytes = got
        .bytes()
        .await
        .map_err(LogError::objects("read the index of a log"))?;
    let Some((preamble, sealed)) = bytes.split_first_chunk::<PREAMBLE>() else {
        return Err(damaged(name, "its index is cut short"));
    };
    let sealer = Sealer::open_file(keys, MAGIC, preamble).map_err(|why| why.of_log(name))?;
    let json = sealer
        .open(INDEX_NUMBER, about(name, 0).as_bytes(), sealed.to_vec())
        .ok_or_else(|| damaged(name, "its index does not open"))?;
    let index: Index =
        serde_json::from_slice(&json).map_err(|_| damaged(name, "its index is not readable"))?;
    if !index.is_sound() {
        return Err(damaged(name, "its index contradicts itself"));
    }
    Ok(Some(Opened { index, sealer }))
}

/// Bytes from `offset`, at most `max` and at most to the end of a piece; empty at the end.
pub(super) async fn read(
    store: &dyn ObjectStore,
    opened: &Opened,
    name: &LogName,
    offset: u64,
    max: usize,
) -> Result<Bytes, LogError> {
    let pieces = &opened.index.pieces;
    if offset >= opened.index.bytes {
        return Ok(Bytes::new());
    }
    let number = pieces.partition_point(|piece| piece.offset <= offset) - 1;
    let piece = pieces[number];
    let pack = &opened.index.packs[piece.pack as usize];
    let key = Key::from(format!("{}/{pack}", folder(name)));
    let sealed = store
        .get_range(&key, piece.at..piece.at + u64::from(piece.stored))
        .await
        .map_err(LogError::objects("read a pack of a log"))?;
    let squeezed = opened
        .sealer
        .open(
            number as u64,
            about(name, piece.offset).as_bytes(),
            sealed.to_vec(),
        )
        .ok_or_else(|| damaged(name, "a piece does not open"))?;
    let raw = zstd::bulk::decompress(&squeezed, piece.raw as usize)
        .ok()
        .filter(|raw| raw.len() == piece.raw as usize)
        .ok_or_else(|| damaged(name, "a piece cannot be unpacked"))?;
    let skip = usize::try_from(offset - piece.offset).unwrap_or(raw.len());
    let end = raw.len().min(skip.saturating_add(max));
    Ok(Bytes::from(raw).slice(skip..end))
}

/// Removes packs in the folder of a log that its index does not name.
pub(super) async fn tidy(
    store: &Arc<dyn ObjectStore>,
    name: &LogName,
    index: &Index,
) -> Result<(), LogError> {
    let found: Vec<_> = store
        .list(Some(&folder(name)))
        .try_collect()
        .await
        .map_err(LogError::objects("list"))?;
    for object in found {
        let file = object.location.filename().unwrap_or_default().to_owned();
        if file.ends_with(".pack") && !index.packs.contains(&file) {
            store
                .delete(&object.location)
                .await
                .map_err(LogError::objects("delete a pack of a log"))?;
        }
    }
    Ok(())
}

/// The attempts of a job that have something here.
pub(super) async fn attempts(
    store: &Arc<dyn ObjectStore>,
    tenant: &TenantName,
    job: &JobId,
) -> Result<Vec<u32>, LogError> {
    let folder = Key::from(format!("logs/{tenant}/{job}"));
    let listed = store
        .list_with_delimiter(Some(&folder))
        .await
        .map_err(LogError::objects("list"))?;
    let number = |key: &Key| key.filename()?.parse().ok();
    Ok(listed.common_prefixes.iter().filter_map(number).collect())
}

/// Removes an ended log, the index first, so that it is gone at once; then what an earlier build wrote of its end.
pub(super) async fn remove(
    store: &Arc<dyn ObjectStore>,
    name: &LogName,
    marker: Option<Key>,
) -> Result<(), LogError> {
    let gone = |result: object_store::Result<()>| match result {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(LogError::objects("delete a log")(error)),
    };
    gone(store.delete(&index_key(name)).await)?;
    let rest: Vec<_> = store
        .list(Some(&folder(name)))
        .try_collect()
        .await
        .map_err(LogError::objects("list"))?;
    for object in rest {
        gone(store.delete(&object.location).await)?;
    }
    match marker {
        Some(marker) => gone(store.delete(&marker).await),
        None => Ok(()),
    }
}

/// Milliseconds of a day.
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// What earlier builds wrote for each log, and nothing reads any more.
pub(super) fn expiry_key(name: &LogName, class: RetentionClass, ended_unix_ms: u64) -> Key {
    Key::from(format!(
        "expire/{}/{:06}/{}/{}/{}",
        class.name(),
        ended_unix_ms / DAY_MS,
        name.tenant,
        name.attempt.job,
        name.attempt.number
    ))
}

fn about(name: &LogName, offset: u64) -> String {
    format!("{name}\0{offset}")
}

fn damaged(name: &LogName, what: &'static str) -> LogError {
    LogError::Damaged {
        name: name.clone(),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_that_contradicts_itself_is_refused() {
        let piece = |offset, raw, pack| Piece {
            offset,
            raw,
            pack,
            at: 0,
            stored: 9,
        };
        let index = |pieces: Vec<Piece>, bytes| Index {
            version: VERSION,
            next: bytes,
            bytes,
            truncated: false,
            dropped: 0,
            class: RetentionClass::Hot,
            ended_unix_ms: 0,
            packs: vec!["a".to_owned()],
            pieces,
        };
        assert!(index(vec![piece(0, 5, 0), piece(5, 1, 0)], 6).is_sound());
        assert!(index(vec![], 0).is_sound());
        for bad in [
            index(vec![piece(0, 5, 0)], 6),
            index(vec![piece(1, 5, 0)], 6),
            index(vec![piece(0, 5, 1)], 5),
            index(vec![piece(0, 0, 0)], 0),
            index(vec![piece(0, u32::MAX, 0)], u64::from(u32::MAX)),
            index(vec![piece(0, 5, 0), piece(4, 5, 0)], 10),
        ] {
            assert!(!bad.is_sound(), "{bad:?}");
        }
    }
}
