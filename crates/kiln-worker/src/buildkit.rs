//! BuildKit in a machine, as the worker drives it: start, a Dockerfile, one solve with its progress.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_proto::Session;
use kiln_proto::msg::{
    BuildkitConfig, ExecRequest, Exit, GuestError, GuestErrorCode, Order, Place, PutTree,
};
use serde::Serialize;
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
/// What passes a build to the client that runs beside BuildKit.
const CLIENT: &str = "/run/kiln/kiln-solve";

/// Starts BuildKit on the mounted state disk.
///
/// # Errors
/// See [`CallError`].
pub async fn start(session: &Session) -> Result<(), CallError> {
    order(session, "start BuildKit", false).await
}

/// Starts BuildKit as far as it goes without a state disk: [`start`] then is half as long. A guest that cannot is left as it is.
///
/// # Errors
/// See [`CallError`].
pub async fn start_before_disk(session: &Session) -> Result<(), CallError> {
    match order(session, "start BuildKit before its disk", true).await {
        Err(CallError::Refused { error, .. }) if error.code == GuestErrorCode::Invalid => {
            tracing::debug!(%error, "BuildKit starts with its disk");
            Ok(())
        }
        other => other,
    }
}

async fn order(
    session: &Session,
    what: &'static str,
    wait_for_disk: bool,
) -> Result<(), CallError> {
    let config = BuildkitConfig {
        step_pids_max: STEP_PIDS_MAX,
        // More than is kept, so that it is the host that cuts, and says so.
        step_log_bytes_max: joblog::STEP_BYTES_MAX + STEP_LOG_SLACK,
        wait_for_disk,
        ..BuildkitConfig::default()
    };
    let order = Order::StartBuildkit(config);
    orders::call_done(session, what, &order, BUILDKIT_TIMEOUT).await
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

/// What stays behind was decided on the host, before the source was sent: nothing is looked up or left out again in the machine.
const IGNORES: &str = "# nothing\n";

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
        bytes_max: (text.len() + IGNORES.len()) as u64,
        entries_max: 4,
    };
    let sent = orders::put_tree(
        session,
        "take the Dockerfile",
        &order,
        orders::ORDER_TIMEOUT,
        move |out| {
            let mut tar = tar::Builder::new(out);
            let files = [
                ("Dockerfile", text.as_str()),
                ("Dockerfile.dockerignore", IGNORES),
            ];
            for (name, text) in files {
                let mut header = tar::Header::new_gnu();
                header.set_size(text.len() as u64);
                header.set_mode(0o644);
                tar.append_data(&mut header, name, text.as_bytes())?;
            }
            tar.finish()
        },
    )
    .await?;
    Ok(sent.path)
}

/// One build as the client in the machine takes it: `request` of `machine-image/buildkit/kiln-solve/main.go`. Paths are the machine's.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct SolveRequest {
    /// Options of the Dockerfile frontend.
    pub options: BTreeMap<String, String>,
    /// Folders by the name the frontend asks for.
    pub folders: BTreeMap<String, String>,
    /// Files that hold secrets, by id.
    pub secrets: BTreeMap<String, String>,
    /// Sockets of SSH agents, by id.
    pub ssh: BTreeMap<String, String>,
    /// Attributes of the image to export; nothing is exported without any.
    pub image: BTreeMap<String, String>,
}

/// A build of these folders, without outputs.
#[must_use]
pub fn request(context: &str, dockerfile: &str) -> SolveRequest {
    let text = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    SolveRequest {
        options: [
            // The built-in frontend whatever the file's first line says: the host has checked it.
            ("cmdline", "docker/dockerfile:1"),
            ("filename", "Dockerfile"),
        ]
        .map(text)
        .into(),
        folders: [("context", context), ("dockerfile", dockerfile)]
            .map(text)
            .into(),
        ..SolveRequest::default()
    }
}

/// Has the client build until it ends; `each` sees every event as it comes.
///
/// # Errors
/// See [`CallError`]. A build that failed is no error here: see the exit and [`Solve::failed`].
pub async fn solve(
    session: &Session,
    build: &SolveRequest,
    timeout_ms: u64,
    mut each: impl AsyncFnMut(Event),
) -> Result<(Exit, Solve), CallError> {
    let line = serde_json::to_string(build).map_err(|error| CallError::Source(error.into()))?;
    let request = ExecRequest {
        argv: vec![CLIENT.to_owned(), line],
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
    Ok((exit.map_err(older_image)?, solve))
}

/// A machine without the client was made by an earlier kiln.
fn older_image(error: CallError) -> CallError {
    match error {
        CallError::Refused { what, error } if error.code == GuestErrorCode::NotFound => {
            let message = "its machine image is older than this kiln; run `kiln setup`".to_owned();
            let error = GuestError { message, ..error };
            CallError::Refused { what, error }
        }
        other => other,
    }
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
