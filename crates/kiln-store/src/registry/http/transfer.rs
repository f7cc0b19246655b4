//! Moves bytes between connections and files in constant memory: while one batch is written and
//! hashed, or read, on a blocking thread, the next one travels. No thread is held while a peer is slow.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt;
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;

use crate::registry::error::StoreError;
use crate::registry::store::{BlobFile, Store};
use crate::registry::upload::Upload;

/// Bytes moved at once by one of the first [`FAST_TRANSFERS`] transfers: fewest switches between threads.
pub(crate) const FAST_BATCH_BYTES: usize = 1 << 20;
/// Bytes moved at once by every further one, so that many slow peers cannot hold much memory.
const SLOW_BATCH_BYTES: usize = 64 << 10;
/// Transfers that move large batches at the same time. Each holds two of them at most.
pub(crate) const FAST_TRANSFERS: usize = 16;
/// A sender that is silent for this long has its request ended; what it sent stays in its session.
pub(crate) const BODY_IDLE_MAX: Duration = Duration::from_secs(60);

/// Runs blocking work, with a panic or shutdown told as an error.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(join_error)?
}

fn join_error(error: tokio::task::JoinError) -> StoreError {
    StoreError::Io {
        what: "finish work on",
        path: "the registry".into(),
        source: io::Error::other(error),
    }
}

/// Writes a whole body to an upload. However it ends, the session keeps what was written.
pub(crate) async fn receive(
    mut body: Body,
    upload: Upload,
    promised: Option<u64>,
) -> Result<Upload, StoreError> {
    let pace = Pace::new(upload.store());
    let mut writer = Writer::Idle(upload);
    let mut batch: Vec<Bytes> = Vec::new();
    let mut batched = 0;
    let mut got: u64 = 0;
    loop {
        let frame = tokio::time::timeout(BODY_IDLE_MAX, body.frame()).await;
        let frame = match frame {
            Err(_silent) => Some(Err(StoreError::BodyBroken { source: None })),
            Ok(frame) => frame.map(|frame| frame.map_err(broken)),
        };
        let data = match frame {
            None => break,
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            Some(Err(error)) => {
                writer.write(batch).await?.finish().await?;
                return Err(error);
            }
        };
        got += data.len() as u64;
        if promised.is_some_and(|promised| got > promised) {
            break;
        }
        batched += data.len();
        batch.push(data);
        if batched >= pace.batch_bytes() {
            writer = writer.write(std::mem::take(&mut batch)).await?;
            batched = 0;
        }
    }
    if let Some(promised) = promised.filter(|promised| *promised != got) {
        return Err(StoreError::UploadLength { promised, got });
    }
    writer.write(batch).await?.finish().await
}

fn broken(error: axum::Error) -> StoreError {
    StoreError::BodyBroken {
        source: Some(Box::new(error)),
    }
}

/// The upload, or the thread that is writing to it.
enum Writer {
    Idle(Upload),
    Writing(JoinHandle<Result<Upload, StoreError>>),
}

impl Writer {
    async fn finish(self) -> Result<Upload, StoreError> {
        match self {
            Self::Idle(upload) => Ok(upload),
            Self::Writing(thread) => thread.await.map_err(join_error)?,
        }
    }

    /// Waits for the batch before this one, then begins to write this one.
    async fn write(self, batch: Vec<Bytes>) -> Result<Self, StoreError> {
        let mut upload = self.finish().await?;
        if batch.is_empty() {
            return Ok(Self::Idle(upload));
        }
        Ok(Self::Writing(tokio::task::spawn_blocking(move || {
            for bytes in batch {
                upload.write(&bytes)?;
            }
            Ok(upload)
        })))
    }
}

/// A body that reads `len` bytes of a blob from `start`, one batch ahead of the connection.
pub(crate) fn send(store: &Store, blob: BlobFile, start: u64, len: u64) -> Body {
    let file = Arc::new(blob.file);
    let pace = Pace::new(store);
    let first = (len > 0).then(|| read_batch(&file, start, len, &pace));
    let state = (file, pace, start, len, first);
    let batches = stream::try_unfold(state, |(file, pace, start, len, next)| async move {
        let Some(reading) = next else {
            return Ok::<_, io::Error>(None);
        };
        let bytes = reading.await.map_err(io::Error::other)??;
        let (start, len) = (start + bytes.len() as u64, len - bytes.len() as u64);
        let next = (len > 0).then(|| read_batch(&file, start, len, &pace));
        Ok(Some((bytes, (file, pace, start, len, next))))
    });
    Body::from_stream(batches)
}

/// How much one transfer moves at once.
struct Pace(Option<OwnedSemaphorePermit>);

impl Pace {
    fn new(store: &Store) -> Self {
        Self(store.fast_transfers.clone().try_acquire_owned().ok())
    }

    fn batch_bytes(&self) -> usize {
        match self.0 {
            Some(_) => FAST_BATCH_BYTES,
            None => SLOW_BATCH_BYTES,
        }
    }
}

fn read_batch(
    file: &Arc<File>,
    start: u64,
    len: u64,
    pace: &Pace,
) -> JoinHandle<io::Result<Bytes>> {
    let file = file.clone();
    let max = pace.batch_bytes();
    let want = usize::try_from(len).map_or(max, |len| len.min(max));
    tokio::task::spawn_blocking(move || {
        let mut buffer = Vec::with_capacity(want);
        while buffer.len() < want {
            let at = start + buffer.len() as u64;
            // Straight into memory that was never zeroed; a short read goes on where it stopped.
            match rustix::io::pread(&*file, spare_capacity(&mut buffer), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // The allocator may have given more room than was asked for.
        buffer.truncate(want);
        Ok(Bytes::from(buffer))
    })
}
