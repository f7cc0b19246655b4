//! What all parts of the guest share.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use kiln_proto::msg::feature;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::error::SysError;
use crate::freezer::Freezer;
use crate::memory::Memory;
use crate::mounts::Mounts;
use crate::net::Net;
use crate::reaper::Reaper;
use crate::{boot, buildkit, identity, oci_wrapper};

/// Name of the workload's cgroup.
pub(crate) const WORKLOAD: &str = "workload";

/// The state of the machine, one for the whole process.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Starts and reaps children.
    pub(crate) reaper: Reaper,
    /// Everything that is not the guest itself.
    pub(crate) workload: Cgroup,
    /// Kills for memory.
    pub(crate) memory: Memory,
    /// A secret was given to this machine.
    pub(crate) secret_issued: AtomicBool,
    /// A job's command ran in this machine.
    pub(crate) job_ran: AtomicBool,
    /// Freezes and thaws the workload.
    pub(crate) freezer: Freezer,
    /// The files that hold the identity.
    pub(crate) identity: identity::Files,
    /// Disks that are mounted.
    pub(crate) mounts: tokio::sync::Mutex<Mounts>,
    /// BuildKit, when it was started.
    pub(crate) buildkit: tokio::sync::Mutex<Option<buildkit::Running>>,
    /// Names that mean this machine.
    pub(crate) services: std::sync::Mutex<Vec<String>>,
    /// Names, addresses, and the way to the host.
    pub(crate) net: Net,
    /// Files that one process of a command may have open.
    open_files: AtomicU64,
    streams: AtomicU32,
    execs: AtomicU64,
    prepared: watch::Sender<bool>,
}

impl Guest {
    /// The state right after boot. The workload's cgroup exists.
    pub(crate) fn new(workload: Cgroup) -> Result<Self, SysError> {
        Ok(Self {
            reaper: Reaper::default(),
            freezer: Freezer::open(&workload)?,
            identity: identity::Files::open()?,
            workload,
            memory: Memory::default(),
            secret_issued: AtomicBool::new(false),
            job_ran: AtomicBool::new(false),
            mounts: tokio::sync::Mutex::default(),
            buildkit: tokio::sync::Mutex::default(),
            services: std::sync::Mutex::default(),
            net: Net::default(),
            open_files: AtomicU64::new(boot::OPEN_FILES_MAX),
            streams: AtomicU32::new(0),
            execs: AtomicU64::new(0),
            prepared: watch::channel(false).0,
        })
    }

    /// Files that one process of a command that is started from now on may have open.
    pub(crate) fn open_files(&self) -> u64 {
        self.open_files.load(Ordering::Relaxed)
    }

    /// Bounds them; 0 means what is usual, and nothing is more than that.
    pub(crate) fn bound_open_files(&self, most: u64) {
        let most = match most {
            0 => boot::OPEN_FILES_MAX,
            most => most.min(boot::OPEN_FILES_MAX),
        };
        self.open_files.store(most, Ordering::Relaxed);
    }

    /// A number for the next command.
    pub(crate) fn next_exec(&self) -> u64 {
        self.execs.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Streams being served now.
    pub(crate) fn open_streams(&self) -> u32 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Counts a stream for as long as the result lives.
    pub(crate) fn count_stream(self: &Arc<Self>) -> StreamCount {
        self.streams.fetch_add(1, Ordering::Relaxed);
        StreamCount(Arc::clone(self))
    }

    /// Says that what boots in the background is done.
    pub(crate) fn set_prepared(&self) {
        self.prepared.send_replace(true);
    }

    /// Waits for what boots in the background.
    pub(crate) async fn prepared(&self) {
        let mut prepared = self.prepared.subscribe();
        let _sender_lives_in_self = prepared.wait_for(|done| *done).await;
    }

    /// True while the workload is frozen or being frozen.
    pub(crate) fn is_frozen(&self) -> bool {
        self.freezer.is_frozen()
    }

    /// What this guest can do here.
    pub(crate) fn features(&self) -> Vec<&'static str> {
        let mut features = vec![
            feature::REIDENTIFY,
            feature::EXEC,
            feature::TTY,
            feature::TREE,
            feature::FORWARD,
            feature::EGRESS,
            feature::SECRET_FILES,
            feature::WORK,
            feature::BOUNDS,
        ];
        if boot::has_root_disk() {
            features.push(feature::ROOT_DISK);
        }
        if Path::new(buildkit::DAEMON).exists() {
            features.push(feature::BUILDKIT);
        }
        if oci_wrapper::runc().is_some() {
            features.push(feature::CONTAINER);
        }
        features
    }
}

/// See [`Guest::count_stream`].
#[derive(Debug)]
pub(crate) struct StreamCount(Arc<Guest>);

impl Drop for StreamCount {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
