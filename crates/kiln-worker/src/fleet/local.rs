//! What the process that submitted a job has for it beyond the request, when it runs the job itself: a folder, a terminal, agents, ports.
//! None of it travels; a job without it runs from its request alone.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_core::{GitCommit, JobId};
use kiln_proto::msg::TtySize;
use tokio::io::AsyncRead;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::job::JobEnd;
use crate::event::Events;
use crate::given::Given;
use crate::kept::Keep;
use crate::orders::Control;

/// A source folder of this host.
#[derive(Clone, Debug)]
pub struct LocalFolder {
    /// Where.
    pub dir: PathBuf,
    /// The commit, when it was checked out here.
    pub git: Option<GitCommit>,
}

/// A terminal and ports of this host.
pub struct LocalRun {
    /// Standard input.
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Size of the terminal.
    pub tty: Option<TtySize>,
    /// Gets output in order: stream (1 or 2) and bytes.
    pub output: mpsc::Sender<(u8, Vec<u8>)>,
    /// Signals and window sizes.
    pub control: mpsc::Receiver<Control>,
    /// Ports already bound, each with its guest port.
    pub listeners: Vec<(TcpListener, u16)>,
    /// That the machine stays when the command is over. Whoever asks takes it over then: see [`JobEnd::kept`].
    pub keep: Option<Keep>,
}

impl std::fmt::Debug for LocalRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LocalRun")
    }
}

/// Everything this process has for one job.
#[derive(Debug, Default)]
pub struct LocalJob {
    /// The source, so that it need not be uploaded.
    pub folder: Option<LocalFolder>,
    /// Secrets by name.
    pub secrets: Vec<(String, Vec<u8>)>,
    /// Sockets of SSH agents, by name.
    pub ssh_agents: Vec<(String, PathBuf)>,
    /// Terminal and ports of a run.
    pub run: Option<LocalRun>,
    /// Files of which the machine of a run is made.
    pub given: Given,
    /// Shows what happens as it happens.
    pub events: Option<Events>,
    /// Stops it at once, without a word of the controller's.
    pub cancel: Option<CancellationToken>,
    /// Hears how it ended, after the controller has.
    pub done: Option<oneshot::Sender<JobEnd>>,
}

/// Jobs of this process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct LocalJobs {
    jobs: Arc<Mutex<HashMap<JobId, LocalJob>>>,
}

impl LocalJobs {
    /// Puts what there is for a job. To be done before the job can be leased.
    pub fn put(&self, job: JobId, local: LocalJob) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.insert(job, local);
    }

    /// Whether a job was put and not taken yet.
    #[must_use]
    pub fn holds(&self, job: &JobId) -> bool {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.contains_key(job)
    }

    /// Takes it, once.
    #[must_use]
    pub fn take(&self, job: &JobId) -> LocalJob {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.remove(job).unwrap_or_default()
    }
}
