//! A range of an artifact, piece by piece, out of a file or an object.

use std::io::SeekFrom;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use kiln_core::Digest;
use kiln_core::digest::Hasher;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::{ArtifactError, PIECE, objects};
use crate::logs::seal::{PREAMBLE, Sealer};

/// Pieces that one request to a bucket reads.
const PIECES_AT_ONCE: u64 = 16;

/// Where the sealed bytes are.
pub(super) enum Source {
    File(PathBuf, File),
    Object(Arc<dyn ObjectStore>, Key),
}

impl Source {
    /// The bytes of a range, fewer only where the file ends.
    pub(super) async fn read(&mut self, range: Range<u64>) -> Result<Bytes, ArtifactError> {
        match self {
            Self::File(path, file) => {
                let io = |source| ArtifactError::Io {
                    doing: "read",
                    path: path.clone(),
                    source,
                };
                file.seek(SeekFrom::Start(range.start)).await.map_err(io)?;
                let mut bytes = Vec::new();
                let mut part = file.take(range.end - range.start);
                part.read_to_end(&mut bytes).await.map_err(io)?;
                Ok(bytes.into())
            }
            Self::Object(store, key) => store.get_range(key, range).await.map_err(objects("read")),
        }
    }
}

/// A range on its way out.
pub(super) struct Reading {
    pub(super) source: Source,
    pub(super) sealer: Sealer,
    pub(super) about: Vec<u8>,
    pub(super) size: u64,
    pub(super) at: u64,
    pub(super) end: u64,
    pub(super) whole: Option<(Hasher, Digest)>,
}

impl Reading {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ArtifactError> {
        if self.at >= self.end {
            // Nothing to give is nothing to check: an empty file has the digest of nothing.
            return Ok(None);
        }
        let piece = PIECE as u64;
        let sealed_piece = piece + u64::from(self.sealer.overhead());
        let first = self.at / piece;
        let until = (first + PIECES_AT_ONCE).min(self.end.div_ceil(piece));
        let start = PREAMBLE as u64 + first * sealed_piece;
        let end = PREAMBLE as u64 + until * sealed_piece;
        // The last piece is shorter than the others.
        let pieces = self.size.div_ceil(piece);
        let stored = PREAMBLE as u64 + self.size + pieces * u64::from(self.sealer.overhead());
        let bytes = self.source.read(start..end.min(stored)).await?;
        let mut plain = Vec::with_capacity(bytes.len());
        let length = usize::try_from(sealed_piece).unwrap_or(usize::MAX);
        for (number, sealed) in (first..until).zip(bytes.chunks(length)) {
            let opened = self.sealer.open(number, &self.about, sealed.to_vec());
            plain.extend(opened.ok_or(ArtifactError::Damaged("a piece does not open"))?);
        }
        let have = first * piece + plain.len() as u64;
        if have < self.end.min(until * piece) {
            return Err(ArtifactError::Damaged("it is cut short"));
        }
        let skip = usize::try_from(self.at - first * piece).unwrap_or(usize::MAX);
        let take = usize::try_from(have.min(self.end) - self.at).unwrap_or(usize::MAX);
        let given = Bytes::from(plain).slice(skip..skip + take);
        self.at += given.len() as u64;
        if let Some((hasher, _)) = &mut self.whole {
            hasher.update(&given);
        }
        if self.at >= self.end
            && let Some((hasher, digest)) = self.whole.take()
            && hasher.finish().0 != digest
        {
            return Err(ArtifactError::Damaged("its content has another digest"));
        }
        Ok(Some(given))
    }
}
