//! A controller in a process of its own: `kiln serve`, timed from before its start until it answers, and watched.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use kiln_controller::api::{List, WorkerView};
use kiln_core::FailureClass;
use tokio::process::{Child, Command};

use super::child::{self, THIS_PROGRAM};
use super::{Bench, cancelled};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::server::Server;

/// Longest wait for a controller that starts, its worker included.
const START_MAX: Duration = Duration::from_secs(60);
/// Pause between two looks at what cannot be waited for.
const LOOK: Duration = Duration::from_millis(1);

/// A controller that answers. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Serving {
    child: Child,
    /// Its private socket.
    pub(super) socket: PathBuf,
    /// The way to it.
    pub(super) server: Server,
    /// From before its start to its first answer.
    pub(super) ready: Duration,
}

impl Serving {
    /// Starts `kiln serve WORDS...` on a home.
    ///
    /// # Errors
    /// When it ends, or does not answer in time.
    pub(super) async fn start(bench: &Bench<'_>, home: &Path, words: &[&str]) -> Result<Self> {
        let stderr = fs::File::create(bench.work.join("serve.stderr")).or_infrastructure()?;
        let socket = kiln_controller::server::socket_path(&home.join("controller"));
        let began = Instant::now();
        let mut child = Command::new(THIS_PROGRAM)
            .arg("serve")
            .args(words)
            .env("KILN_HOME", home)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .or_infrastructure()?;
        let server = Server::of_home(socket.clone());
        loop {
            if tokio::net::UnixStream::connect(&socket).await.is_ok()
                && server.get::<List<WorkerView>>("/v1/workers").await.is_ok()
            {
                break;
            }
            let ended = child.try_wait().or_infrastructure()?;
            if ended.is_some() || began.elapsed() > START_MAX {
                let words = fs::read_to_string(bench.work.join("serve.stderr"));
                let told = format!("`kiln serve` did not start: {}", words.unwrap_or_default());
                return Err(CliError::new(FailureClass::Infrastructure, told));
            }
            pause(bench, LOOK).await?;
        }
        Ok(Self {
            child,
            socket,
            server,
            ready: began.elapsed(),
        })
    }

    /// Its memory that is resident now, bytes.
    pub(super) fn memory(&self) -> Result<f64> {
        let pid = self.child.id().unwrap_or_default();
        let text = fs::read_to_string(format!("/proc/{pid}/status")).or_infrastructure()?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        kib.map(|kib| kib * 1024.0)
            .ok_or_else(|| CliError::new(FailureClass::Infrastructure, "the controller is gone"))
    }

    /// Asks it to end, and waits.
    pub(super) async fn stop(mut self) {
        child::end(&mut self.child).await;
    }
}

/// The environment in which a command asks this server.
pub(super) fn asks(socket: &Path) -> [(&'static str, OsString); 1] {
    let mut place = OsString::from("unix:");
    place.push(socket);
    [("KILN_SERVER", place)]
}

/// Waits, unless the command is cancelled.
pub(super) async fn pause(bench: &Bench<'_>, time: Duration) -> Result<()> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        () = bench.cancel.cancelled() => Err(cancelled()),
    }
}
