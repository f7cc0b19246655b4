//! The end of a job because of what it did: at once, with everything it could act by, and with what tells of it kept.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_controller::api::{IncidentView, JobView};
use kiln_core::FailureClass;
use kiln_worker::home::Home;
use kiln_worker::incident::dir_of;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::args::ServerArgs;
use crate::commands::home_queue;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::server::Server;
use crate::server::follow::{Take, read_log};
use crate::show::{Screen, ShownPath as _};

/// Most bytes of a job's log that an incident keeps.
const JOB_LOG_BYTES_MAX: u64 = 256 << 20;
/// Longest wait for the worker to say what it knows: it hears of its lease's end with its next heartbeat.
const KEPT_WITHIN: Duration = Duration::from_secs(60);
/// Pause between two looks whether it did.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Ends a job that runs, or waits, on this host.
///
/// # Errors
/// When there is none, it is over, or what tells of it could not be kept.
pub(super) async fn kill(
    home: &Home,
    id: &str,
    note: String,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<u8> {
    let asked = home_queue::ask(&ServerArgs::default()).await?;
    let here = asked.of_home().is_some();
    let path = format!("/v1/jobs/{id}/incident");
    let ended = asked.server.post(&path, &json!({ "note": note })).await;
    asked.done().await;
    let ended: IncidentView = ended?;
    let told = kept(home, &ended, here, cancel).await;
    let dir = told.as_ref().ok().and_then(Option::as_ref);
    tell(&ended, dir, screen);
    told.map(|_| 0)
}

/// Ends a job of a server: what tells of it stays there and with its worker.
///
/// # Errors
/// When there is none, or it is over.
pub(super) async fn kill_there(
    server: &Server,
    id: &str,
    note: &str,
    screen: Screen,
) -> Result<()> {
    let path = format!("/v1/jobs/{id}/incident");
    let ended: IncidentView = server.post(&path, &json!({ "note": note })).await?;
    tell(&ended, None, screen);
    Ok(())
}

fn tell(ended: &IncidentView, dir: Option<&PathBuf>, screen: Screen) {
    let line = json!({
        "id": ended.id, "gone": true, "incident": dir, "worker": ended.worker, "held": ended.held, "secrets": ended.secrets,
    });
    screen.data(&line, || words(ended, dir));
    if !ended.secrets.is_empty() {
        screen.note(&format!(
            "it may have had {}: what it read it may have passed on. Make new values: kiln secret rotate NAME",
            ended.secrets.join(", ")
        ));
    }
}

fn words(ended: &IncidentView, dir: Option<&PathBuf>) -> String {
    let held = match ended.held {
        true => "its record and log are on hold",
        false => "its record and log stay as long as its tenant's do",
    };
    match (dir, &ended.worker) {
        (Some(dir), _) => format!("{} is over; what tells of it: {}", ended.id, dir.shown()),
        (None, Some(worker)) => format!(
            "{} is over; {held}; console, network and record of its machine are on {worker}: incidents/{}-{}",
            ended.id, ended.id, ended.at_unix_ms
        ),
        (None, None) => format!("{} is over and had no machine; {held}", ended.id),
    }
}

/// Waits for what the worker of this host keeps, and puts the controller's own beside it.
async fn kept(
    home: &Home,
    ended: &IncidentView,
    here: bool,
    cancel: &CancellationToken,
) -> Result<Option<PathBuf>> {
    if !here || ended.worker.is_none() {
        return Ok(None);
    }
    let dir = dir_of(&home.data, &ended.id, ended.at_unix_ms);
    let end = Instant::now() + KEPT_WITHIN;
    while !dir.exists() {
        if Instant::now() >= end || cancel.is_cancelled() {
            let message = format!(
                "{} is over, but its worker has not said what it knew",
                ended.id
            );
            return Err(
                CliError::new(FailureClass::Infrastructure, message).hint(format!(
                    "the job's own record is left: kiln job show {}",
                    ended.id
                )),
            );
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    loop {
        match keep_job(&ended.id, &dir, cancel).await {
            Ok(_) => return Ok(Some(dir)),
            // The controller of this home may have been with the very command that has just ended: the next one takes over.
            Err(error)
                if error.class == FailureClass::Infrastructure
                    && Instant::now() < end
                    && !cancel.is_cancelled() =>
            {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(error) => {
                return Err(error.hint(format!("everything else is in {}", dir.shown())));
            }
        }
    }
}

/// Puts the job's record and log beside the rest, and ends the job if it has not ended: no lease of it lives then.
pub(super) async fn keep_job(id: &str, dir: &Path, cancel: &CancellationToken) -> Result<String> {
    let asked = home_queue::ask(&ServerArgs::default()).await?;
    let kept = job_files(&asked.server, id, dir, cancel).await;
    asked.done().await;
    kept
}

async fn job_files(
    server: &Server,
    id: &str,
    dir: &Path,
    cancel: &CancellationToken,
) -> Result<String> {
    let path = format!("/v1/jobs/{id}");
    let job: JobView = server.get(&path).await?;
    if job.line.state != "finished" {
        server
            .delete::<Value>(&format!("{path}?reason=incident"))
            .await?;
    }
    let job: Value = server.get(&path).await?;
    let state = job["state"].as_str().unwrap_or("unknown").to_owned();
    let create = |name: &str| {
        let mut options = fs::OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(dir.join(name))
            .or_infrastructure()
    };
    let mut file = create("job.json")?;
    file.write_all(&serde_json::to_vec_pretty(&job).or_infrastructure()?)
        .or_infrastructure()?;
    let mut log = LogFile {
        file: create("job.log")?,
        left: JOB_LOG_BYTES_MAX,
        failed: None,
    };
    let over = CancellationToken::new();
    over.cancel();
    tokio::select! {
        read = read_log(server, id, &over, &mut log) => read?,
        () = cancel.cancelled() => return Err(CliError::new(FailureClass::Cancelled, "cancelled")),
    }
    match log.failed {
        None => log.file.sync_all().or_infrastructure().map(|()| state),
        Some(error) => Err(CliError::infrastructure(&error)),
    }
}

struct LogFile {
    file: fs::File,
    left: u64,
    failed: Option<std::io::Error>,
}

impl Take for LogFile {
    async fn take(&mut self, bytes: &[u8]) -> bool {
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        self.left -= most as u64;
        self.failed = self.file.write_all(&bytes[..most]).err();
        self.failed.is_none() && self.left > 0
    }
}
