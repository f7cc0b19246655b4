//! BuildKit in a machine, as the worker drives it: start, a Dockerfile, one solve with its progress.

use std::time::Duration;

use kiln_proto::Session;
use kiln_proto::msg::{BuildkitConfig, ExecRequest, Exit, Order, Place, PutTree};
use tokio::sync::mpsc;

use crate::event::Event;
use crate::joblog;
use crate::orders::{self, CallError, ExecIo};
use crate::solve::{self, Solve};

/// Longest wait for BuildKit to answer after it was started, or to go after it was stopped.
pub const BUILDKIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Processes of all RUN steps of one build together.
pub const STEP_PIDS_MAX: u64 = 4096;
/// How much more of a step's output the guest passes on than the job's log keeps, bytes.
const STEP_LOG_SLACK: u64 = 1 << 20;
/// Where it listens in the machine.
const ADDRESS: &str = "--addr=unix:///run/buildkit/buildkitd.sock";

/// Starts BuildKit on the mounted state disk.
///
/// # Errors
/// See [`CallError`].
pub async fn start(session: &Session) -> Result<(), CallError> {
    let config = BuildkitConfig {
        step_pids_max: STEP_PIDS_MAX,
        // More than is kept, so that it is the host that cuts, and says so.
        step_log_bytes_max: joblog::STEP_BYTES_MAX + STEP_LOG_SLACK,
        ..BuildkitConfig::default()
    };
    orders::call_done(
        session,
        "start BuildKit",
        &Order::StartBuildkit(config),
        BUILDKIT_TIMEOUT,
    )
    .await
}

/// Stops it and waits until it has gone.
///
/// # Errors
/// See [`CallError`].
pub async fn stop(session: &Session) -> Result<(), CallError> {
    orders::call_done(
        session,
        "stop BuildKit",
        &Order::StopBuildkit,
        BUILDKIT_TIMEOUT,
    )
    .await
}

/// Puts a Dockerfile into a folder of its own; gives the folder's path in the guest.
///
/// # Errors
/// See [`CallError`].
pub async fn send_dockerfile(
    session: &Session,
    name: &str,
    text: String,
) -> Result<String, CallError> {
    let place = Place::Dockerfile {
        name: name.to_owned(),
    };
    let order = PutTree {
        place,
        bytes_max: text.len() as u64,
        entries_max: 4,
    };
    let sent = orders::put_tree(
        session,
        "take the Dockerfile",
        &order,
        orders::ORDER_TIMEOUT,
        move |out| {
            let mut tar = tar::Builder::new(out);
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, "Dockerfile", text.as_bytes())?;
            tar.finish()
        },
    )
    .await?;
    Ok(sent.path)
}

/// The client's command line for a build of these folders, without outputs.
#[must_use]
pub fn command(context: &str, dockerfile: &str) -> Vec<String> {
    let mut argv: Vec<String> = [
        "/usr/local/bin/buildctl",
        ADDRESS,
        "build",
        "--progress=rawjson",
        "--frontend=dockerfile.v0",
        // The built-in frontend whatever the file's first line says: the host has checked it.
        "--opt=cmdline=docker/dockerfile:1",
        "--opt=filename=Dockerfile",
    ]
    .map(str::to_owned)
    .to_vec();
    argv.push(format!("--local=context={context}"));
    argv.push(format!("--local=dockerfile={dockerfile}"));
    argv
}

/// Runs the client until the build ends; `each` sees every event as it comes.
///
/// # Errors
/// See [`CallError`]. A build that failed is no error here: see the exit and [`Solve::failed`].
pub async fn solve(
    session: &Session,
    argv: Vec<String>,
    timeout_ms: u64,
    mut each: impl AsyncFnMut(Event),
) -> Result<(Exit, Solve), CallError> {
    let env = vec![
        (
            "PATH".to_owned(),
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        ),
        ("HOME".to_owned(), "/root".to_owned()),
    ];
    let request = ExecRequest {
        argv,
        env,
        trusted: true,
        timeout_ms,
        ..ExecRequest::default()
    };
    let (output, mut chunks) = mpsc::channel::<(u8, Vec<u8>)>(64);
    // Nobody signals the client: a cancelled build is the machine's end.
    let (_control, control) = mpsc::channel(1);
    let mut lines = Lines::default();
    let mut solve = Solve::default();
    let read = async {
        while let Some((_, bytes)) = chunks.recv().await {
            for line in lines.push(&bytes) {
                tracing::trace!(target: "kiln::solve", line);
                for event in solve.line(&line) {
                    each(event).await;
                }
            }
        }
    };
    let io = ExecIo {
        stdin: None,
        output,
        control,
    };
    let (exit, ()) = tokio::join!(orders::exec(session, "build", &request, io), read);
    Ok((exit?, solve))
}

/// Splits a byte stream into lines of at most [`solve::LINE_BYTES_MAX`] bytes.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
    skipping: bool,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let ended = piece.last() == Some(&b'\n');
            if !self.skipping {
                self.partial.extend_from_slice(piece);
            }
            if self.partial.len() > solve::LINE_BYTES_MAX {
                self.partial.clear();
                self.skipping = true;
            }
            if ended {
                if !self.skipping {
                    lines.push(
                        String::from_utf8_lossy(&self.partial)
                            .trim_end_matches('\n')
                            .to_owned(),
                    );
                }
                self.partial.clear();
                self.skipping = false;
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_and_bounded() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"a\nb"), ["a"]);
        assert_eq!(lines.push(b"c\n"), ["bc"]);
        assert!(
            lines
                .push(&vec![b'x'; solve::LINE_BYTES_MAX + 1])
                .is_empty()
        );
        assert_eq!(lines.push(b"tail\nnext\n"), ["next"]);
    }
}
