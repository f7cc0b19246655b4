//! Sends the files that a run left to the controller, each under the run's lease.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use kiln_core::ArtifactName;
use tokio_util::io::ReaderStream;

use super::client::{LinkError, job_path};
use super::mask::Mask;
use super::report::{To, retried};
use crate::collect::Collected;
use crate::event::{Event, Events};

/// Longest time for one file.
const FILE_TIMEOUT: Duration = Duration::from_secs(600);

/// Sends files, one after the other, and again after a break. Gives those that the controller has; what it refuses is a warning.
pub(super) async fn send(
    to: &To,
    files: &[Collected],
    mask: &Mask,
    events: &Events,
) -> Vec<ArtifactName> {
    let mut sent = Vec::new();
    if files.is_empty() {
        return sent;
    }
    events.tell(Event::Phase { name: "artifacts" }).await;
    for file in files {
        let name = file.name.as_str();
        if mask.name(name) != name {
            // Names are in the job's record, where no value of a secret is.
            let text = format!("{name} is not kept: its name has a secret in it");
            events.warn(text).await;
            continue;
        }
        let done = retried(&to.fenced, || one(to, file)).await;
        match done {
            Some(()) => sent.push(file.name.clone()),
            None if to.fenced.is_cancelled() => return sent,
            None => {
                let text = format!("{} is not kept: the controller refused it", file.name);
                events.warn(text).await;
            }
        }
    }
    sent
}

async fn one(to: &To, file: &Collected) -> Result<(), LinkError> {
    let opened = tokio::fs::File::open(&file.path).await;
    let opened = opened.map_err(|error| LinkError::Answer(error.to_string()))?;
    let body = StreamBody::new(ReaderStream::new(opened).map_ok(Frame::data)).boxed();
    let path = path(to, &file.name);
    to.client
        .put(&path, Some(&to.lease), body, FILE_TIMEOUT)
        .await
}

/// A name holds no character that a path escapes, but the slash.
fn path(to: &To, name: &ArtifactName) -> String {
    let escaped = name.as_str().replace('/', "%2F");
    job_path(&to.lease.attempt.job, &format!("artifacts/{escaped}"))
}
