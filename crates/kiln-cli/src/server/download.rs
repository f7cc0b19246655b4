//! One artifact, fetched whole: over connections that may break and go on where they were, also where an earlier command was, and checked by
//! its digest.

use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt as _;
use http::header::{CONTENT_RANGE, IF_RANGE, RANGE};
use http::{Method, Response, StatusCode};
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use kiln_controller::api::ArtifactView;
use kiln_core::digest::Hasher;
use kiln_core::{Digest, FailureClass};
use tokio_util::sync::CancellationToken;

use super::{Server, empty, escaped};
use crate::commands::landing::{Landing, Partial};
use crate::error::{CliError, Result};
use crate::show::ShownPath as _;

/// A connection that brings nothing for this long is given up.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Tries in a row that bring nothing.
const TRIES_MAX: u32 = 5;
/// Wait before the next try; it doubles.
const AGAIN: Duration = Duration::from_millis(300);
/// Bytes that are read at a time of what is there already.
const READ_BYTES: usize = 256 * 1024;

/// Fetches an artifact of a job to `inner` below a folder.
///
/// # Errors
/// When it cannot be fetched, is not what the server says it is, or cannot be written. What came stays for the next try unless it is wrong.
pub(crate) async fn artifact(
    server: &Server,
    job: &str,
    artifact: &ArtifactView,
    (landing, inner): (&Landing, &Path),
    cancel: &CancellationToken,
) -> Result<()> {
    let shown = landing.path(inner);
    let write =
        |error: io::Error| CliError::usage(format!("could not write {}: {error}", shown.shown()));
    let digest: Digest = artifact.digest.parse().map_err(|_| wrong(artifact))?;
    let mut partial = landing.begin(inner, &digest).map_err(write)?;
    let fetch = Fetch::resume(&mut partial, artifact.size).map_err(write)?;
    let resumed = fetch.have > 0;
    let path = format!("/v1/jobs/{job}/artifacts/{}", escaped(&artifact.name));
    let whole = fetch.all(server, &path, artifact, cancel).await;
    let whole = whole.map_err(|error| match error {
        FetchError::Told(error) => error,
        FetchError::Write(error) => write(error),
    })?;
    if whole == digest {
        return partial.finish().map_err(write);
    }
    partial.discard().map_err(write)?;
    match resumed {
        // What an earlier command left was not what it should be.
        true => {
            Box::pin(self::artifact(
                server,
                job,
                artifact,
                (landing, inner),
                cancel,
            ))
            .await
        }
        false => Err(wrong(artifact)),
    }
}

fn wrong(artifact: &ArtifactView) -> CliError {
    CliError::new(
        FailureClass::Infrastructure,
        format!("the bytes of {} are not those of its digest", artifact.name),
    )
    .hint("nothing of them is kept; the server's store may be damaged")
}

enum FetchError {
    Told(CliError),
    Write(io::Error),
}

struct Fetch<'a> {
    partial: &'a mut Partial,
    hasher: Hasher,
    have: u64,
    size: u64,
}

impl<'a> Fetch<'a> {
    /// Reads what is there already.
    fn resume(partial: &'a mut Partial, size: u64) -> io::Result<Self> {
        let mut hasher = Hasher::default();
        let mut have = 0;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let got = partial.file.read(&mut buffer)?;
            hasher.update(&buffer[..got]);
            have += got as u64;
            if got == 0 {
                break;
            }
        }
        let mut fetch = Self {
            partial,
            hasher,
            have,
            size,
        };
        if fetch.have > size {
            fetch.restart()?;
        }
        Ok(fetch)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.hasher = Hasher::default();
        self.have = 0;
        self.partial.empty()
    }

    /// Fetches what is missing; gives the digest of all.
    async fn all(
        mut self,
        server: &Server,
        path: &str,
        artifact: &ArtifactView,
        cancel: &CancellationToken,
    ) -> Result<Digest, FetchError> {
        let (mut tries, mut wait) = (0, AGAIN);
        while self.have < self.size {
            let before = self.have;
            let error = tokio::select! {
                done = self.once(server, path, artifact) => match done {
                    Ok(()) => continue,
                    Err(FetchError::Told(error)) if error.class == FailureClass::Infrastructure => error,
                    Err(error) => return Err(error),
                },
                () = cancel.cancelled() => {
                    let text = "stopped; the same command goes on where it was";
                    return Err(FetchError::Told(CliError::new(FailureClass::Cancelled, text)));
                }
            };
            if self.have > before {
                (tries, wait) = (0, AGAIN);
            }
            tries += 1;
            if tries >= TRIES_MAX {
                return Err(FetchError::Told(error));
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
        }
        Ok(self.hasher.finish().0)
    }

    /// One connection: until all is there, or it breaks.
    async fn once(
        &mut self,
        server: &Server,
        path: &str,
        artifact: &ArtifactView,
    ) -> Result<(), FetchError> {
        let broken = |why: &str| {
            let text = format!("{} broke off: {why}", artifact.name);
            FetchError::Told(CliError::new(FailureClass::Infrastructure, text))
        };
        let mut headers = Vec::new();
        if self.have > 0 {
            headers.push((RANGE, format!("bytes={}-", self.have)));
            headers.push((IF_RANGE, format!("\"{}\"", artifact.digest)));
        }
        let sent = server.send(Method::GET, path, empty(), &headers);
        let response = match tokio::time::timeout(STALL_MAX, sent).await {
            Ok(response) => response.map_err(FetchError::Told)?,
            Err(_) => return Err(broken("no answer")),
        };
        if !self.goes_on(&response) {
            self.restart().map_err(FetchError::Write)?;
        }
        let mut body = BodyDataStream::new(response.into_body());
        while self.have < self.size {
            let piece = match tokio::time::timeout(STALL_MAX, body.next()).await {
                Ok(Some(Ok(piece))) => piece,
                Ok(Some(Err(error))) => return Err(broken(&error.to_string())),
                Ok(None) => return Err(broken("it ended early")),
                Err(_) => return Err(broken("nothing came")),
            };
            let left = usize::try_from(self.size - self.have).unwrap_or(usize::MAX);
            let piece = &piece[..piece.len().min(left)];
            self.partial
                .file
                .write_all(piece)
                .map_err(FetchError::Write)?;
            self.hasher.update(piece);
            self.have += piece.len() as u64;
        }
        Ok(())
    }

    /// Whether what comes begins where this is.
    fn goes_on(&self, response: &Response<Incoming>) -> bool {
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return self.have == 0;
        }
        let range = response.headers().get(CONTENT_RANGE);
        let range = range.and_then(|range| range.to_str().ok());
        let from = format!("bytes {}-", self.have);
        range.is_some_and(|range| range.starts_with(&from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    /// What a connection is answered, by its request's head.
    type Answer = Box<dyn Fn(&str) -> Vec<u8> + Send>;

    /// A server that answers each connection with what this gives for its request, and closes it.
    fn fake_server(dir: &Path, answers: Vec<Answer>) -> (Server, mpsc::Receiver<String>) {
        let socket = dir.join("socket");
        let listener = UnixListener::bind(&socket).expect("binds");
        let (asked, requests) = mpsc::channel();
        std::thread::spawn(move || {
            for answer in answers {
                let (mut line, _) = listener.accept().expect("accepts");
                let reader = BufReader::new(line.try_clone().expect("cloned"));
                let head: Vec<String> = reader
                    .lines()
                    .map_while(|line| line.ok().filter(|line| !line.is_empty()))
                    .collect();
                let head = head.join("\n").to_ascii_lowercase();
                line.write_all(&answer(&head)).expect("answers");
                let _test_is_over = asked.send(head);
            }
        });
        (Server::of_home(socket), requests)
    }

    fn whole(body: &'static [u8], cut: usize) -> Answer {
        Box::new(move |_| {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            [head.as_bytes(), &body[..cut]].concat()
        })
    }

    fn rest(body: &'static [u8], from: usize) -> Answer {
        Box::new(move |head| {
            assert!(head.contains(&format!("range: bytes={from}-")), "{head}");
            assert!(
                head.contains(&format!("if-range: \"{}\"", Digest::of(body))),
                "{head}"
            );
            let (left, last) = (body.len() - from, body.len() - 1);
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {from}-{last}/{}\r\ncontent-length: {left}\r\n\r\n",
                body.len()
            );
            [head.as_bytes(), &body[from..]].concat()
        })
    }

    fn view(body: &[u8]) -> ArtifactView {
        ArtifactView {
            name: "out/a.bin".to_owned(),
            digest: Digest::of(body).to_string(),
            size: body.len() as u64,
            media_type: String::new(),
        }
    }

    async fn fetched(server: &Server, dir: &Path, body: &[u8]) -> Result<Vec<u8>> {
        let landing = Landing::open(dir).expect("folder");
        let inner = Path::new("a.bin");
        let never = CancellationToken::new();
        artifact(server, "r1", &view(body), (&landing, inner), &never).await?;
        let read = std::fs::read(dir.join("a.bin")).expect("there");
        assert_eq!(
            std::fs::read_dir(dir).expect("folder").count(),
            1,
            "nothing else"
        );
        Ok(read)
    }

    const BODY: &[u8] = b"0123456789";

    #[tokio::test]
    async fn a_broken_connection_goes_on_where_it_was() {
        let dir = tempfile::tempdir().expect("dir");
        let answers = vec![whole(BODY, 4), rest(BODY, 4)];
        let (server, requests) = fake_server(dir.path(), answers);
        let got = fetched(&server, &dir.path().join("to"), BODY).await;
        assert_eq!(got.expect("fetched"), BODY);
        let first = requests.recv().expect("a request");
        assert!(
            first.starts_with("get /v1/jobs/r1/artifacts/out%2fa.bin "),
            "{first}"
        );
    }

    #[tokio::test]
    async fn what_an_earlier_command_left_is_used_when_it_is_right() {
        let dir = tempfile::tempdir().expect("dir");
        let answers = vec![
            rest(BODY, 7),
            rest(BODY, 3),
            whole(BODY, 10),
            whole(b"012345678X", 10),
        ];
        let (server, _requests) = fake_server(dir.path(), answers);
        let part = format!(".kiln-{}.part", Digest::of(BODY).short(32));
        let begun = |to: &str, content: &[u8]| {
            let to = dir.path().join(to);
            std::fs::create_dir(&to).expect("folder");
            std::fs::write(to.join(&part), content).expect("write");
            to
        };
        let right = begun("right", b"0123456");
        assert_eq!(fetched(&server, &right, BODY).await.expect("fetched"), BODY);
        // A part that is wrong is found out by the digest, and fetched again as a whole.
        let wrong = begun("wrong", b"xyz");
        assert_eq!(fetched(&server, &wrong, BODY).await.expect("fetched"), BODY);
        // A server that gives something else is not believed, and nothing stays.
        let lied = dir.path().join("lied");
        let error = fetched(&server, &lied, BODY)
            .await
            .expect_err("wrong bytes");
        assert!(error.message.contains("not those of its digest"), "{error}");
        assert_eq!(std::fs::read_dir(&lied).expect("folder").count(), 0);
    }
}
