//! A request with a source as it goes to a server: `multipart/form-data` (RFC 7578), the source streamed as it is read, never held in memory.

use std::io::{self, Write};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use http::Method;
use http::header::CONTENT_TYPE;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use kiln_controller::api::{BuildAsk, JobView, RunAsk};
use kiln_image::context::{self, ContextError, Tree};
use kiln_worker::fleet::http::Body;
use serde::Serialize;
use tokio::sync::mpsc;

use super::Server;
use crate::error::{CliError, Result};

/// Pieces that may wait for the network.
const PIECES: usize = 16;
/// Bytes of a piece.
const PIECE: usize = 64 * 1024;

/// Sends a build; gives the queued job. `tree` is the source, unless the request names a git repository.
///
/// # Errors
/// What the server says; what is wrong with the source, by `source_error`.
pub(crate) async fn build(
    server: &Server,
    asked: &BuildAsk,
    secrets: Vec<(String, Vec<u8>)>,
    tree: Option<Tree>,
    source_error: fn(&ContextError) -> CliError,
) -> Result<JobView> {
    send(server, "/v1/builds", asked, (secrets, tree), source_error).await
}

/// Sends a run with the files that it works on; gives the queued job.
///
/// # Errors
/// As [`build`].
pub(crate) async fn run(
    server: &Server,
    asked: &RunAsk,
    tree: Tree,
    source_error: fn(&ContextError) -> CliError,
) -> Result<JobView> {
    let parts = (Vec::new(), Some(tree));
    send(server, "/v1/runs", asked, parts, source_error).await
}

async fn send(
    server: &Server,
    path: &str,
    asked: &(impl Serialize + Sync),
    (secrets, tree): (Vec<(String, Vec<u8>)>, Option<Tree>),
    source_error: fn(&ContextError) -> CliError,
) -> Result<JobView> {
    let boundary = boundary();
    let request = serde_json::to_vec(asked).map_err(|error| CliError::infrastructure(&error))?;
    let mut head = Vec::new();
    part(&mut head, &boundary, "request", "application/json");
    head.extend(request);
    for (name, value) in secrets {
        part(
            &mut head,
            &boundary,
            &format!("secret.{name}"),
            "application/octet-stream",
        );
        head.extend(value);
    }
    if tree.is_some() {
        part(&mut head, &boundary, "source", "application/x-tar");
    }
    let tail = format!("\r\n--{boundary}--\r\n");
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(PIECES);
    let packing = tokio::task::spawn_blocking(move || {
        let mut out = Pieces {
            sender,
            buffer: head,
        };
        if let Some(tree) = tree {
            let packed = context::pack(&tree, &mut out);
            if let Err(error) = packed {
                out.give_up();
                return Err(error);
            }
        }
        // A server that went away has said why.
        let _gone = out.write_all(tail.as_bytes()).and_then(|()| out.flush());
        Ok(())
    });
    let kind = format!("multipart/form-data; boundary={boundary}");
    let response = server
        .send(Method::POST, path, body(receiver), &[(CONTENT_TYPE, kind)])
        .await;
    match (response, packing.await) {
        // The folder's own trouble is the cause of a broken upload, never the other way round.
        (_, Ok(Err(error))) if !matches!(error, ContextError::Write(_)) => {
            Err(source_error(&error))
        }
        (Ok(response), _) => server.read(response).await,
        (Err(error), _) => Err(error),
    }
}

fn body(receiver: mpsc::Receiver<io::Result<Bytes>>) -> Body {
    StreamBody::new(Arriving(receiver)).boxed()
}

/// Pieces as they come.
struct Arriving(mpsc::Receiver<io::Result<Bytes>>);

impl Stream for Arriving {
    type Item = io::Result<Frame<Bytes>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0
            .poll_recv(context)
            .map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

fn part(out: &mut Vec<u8>, boundary: &str, name: &str, kind: &str) {
    let first = if out.is_empty() { "" } else { "\r\n" };
    let file = if name == "request" {
        ""
    } else {
        "; filename=\"data\""
    };
    let text = format!(
        "{first}--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\nContent-Type: {kind}\r\n\r\n"
    );
    out.extend(text.into_bytes());
}

/// 128 random bits: no source holds them by chance.
fn boundary() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    format!(
        "kiln-{:016x}{:016x}",
        RandomState::new().hash_one(1),
        RandomState::new().hash_one(2)
    )
}

/// What is written goes to the network in pieces; waits when the network is slower.
struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
    buffer: Vec<u8>,
}

impl Pieces {
    fn give_up(&mut self) {
        let _gone = self
            .sender
            .blocking_send(Err(io::Error::other("the source could not be read")));
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.buffer);
        if piece.is_empty() {
            return Ok(());
        }
        let sent = self.sender.blocking_send(Ok(piece.into()));
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stand_between_boundaries() {
        let mut out = Vec::new();
        part(&mut out, "B", "request", "application/json");
        out.extend(b"{}");
        part(&mut out, "B", "source", "application/x-tar");
        let want = "--B\r\nContent-Disposition: form-data; name=\"request\"\r\nContent-Type: application/json\r\n\r\n{}\r\n\
--B\r\nContent-Disposition: form-data; name=\"source\"; filename=\"data\"\r\nContent-Type: application/x-tar\r\n\r\n";
        assert_eq!(String::from_utf8(out).expect("text"), want);
        assert_ne!(boundary(), boundary());
    }
}
