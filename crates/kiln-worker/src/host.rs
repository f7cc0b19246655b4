//! What one host has ready: machine image, driver, templates, heads, ledger, registry. Stages 2-4 in their thin form.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kiln_core::lease::Epoch;
use kiln_core::{AttemptId, ByteSize, JobId, JobRequest, Lease, TenantName, WorkerId};
use kiln_image::heads::HeadStore;
use kiln_machine::driver::{Driver, ReapReport};
use kiln_machine::ledger::{Capacity, Ledger, Need, Ticket};
use kiln_machine::qemu::{QemuConfig, QemuDriver};
use kiln_machine::template::TemplateStore;
use kiln_store::registry::LeaseTable;

use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::home::Home;
use crate::image::CurrentImage;

/// Memory of the host that machines never get.
pub const MEMORY_RESERVE: ByteSize = ByteSize::mib(1024);
/// Virtual CPUs that may be handed out, in percent of the host's.
pub const CPU_OVERCOMMIT_PERCENT: u32 = 400;
/// Longest wait for room on the host.
pub const QUEUE_TIMEOUT: Duration = Duration::from_secs(3600);

/// One host, ready to run attempts.
#[derive(Debug)]
pub struct Host {
    /// Directories.
    pub home: Home,
    /// How machines are started here.
    pub driver: Arc<dyn Driver>,
    /// The machine image machines are started from.
    pub image: CurrentImage,
    /// Machines frozen when ready.
    pub templates: TemplateStore,
    /// Cache heads.
    pub heads: HeadStore,
    /// Room on this host, shared by all kiln processes.
    pub ledger: Ledger,
    /// Leases this process has given itself.
    pub leases: Arc<LeaseTable>,
    /// This host's worker.
    pub worker: WorkerId,
}

/// Milliseconds since the Unix epoch.
#[must_use]
pub fn now_unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since the Unix epoch as this process counts them: the wall clock when it is first asked, and from then on the time
/// that truly went by. Leases are counted in it, so that a wall clock that jumps neither ends nor prolongs one.
#[must_use]
pub fn steady_unix_ms() -> u64 {
    static START: OnceLock<(u64, Instant)> = OnceLock::new();
    let (wall, since) = START.get_or_init(|| (now_unix_ms(), Instant::now()));
    let passed = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
    wall.saturating_add(passed)
}

/// A fresh job id.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn new_job_id(prefix: char) -> Result<JobId, Failure> {
    let mut random = [0; 5];
    getrandom::fill(&mut random).map_err(|error| {
        Failure::new(
            kiln_core::FailureClass::Infrastructure,
            format!("no random bytes: {error}"),
        )
    })?;
    Ok(JobId::new(prefix, now_unix_ms(), random))
}

impl Host {
    /// Opens what this host has ready, and removes what killed kiln processes left behind.
    ///
    /// # Errors
    /// When QEMU or the machine image is missing, or the home cannot be used.
    pub async fn open(home: &Home) -> Result<Self, Failure> {
        home.prepare()
            .map_err(|error| Failure::infrastructure(&error))?;
        let image = CurrentImage::open(home)?;
        let config = QemuConfig {
            probe_boot: Some(image.boot.clone()),
            ..QemuConfig::new(&home.data)
        };
        let driver = QemuDriver::new(config)?;
        let infrastructure = |error: &dyn std::error::Error| Failure::infrastructure(error);
        let host = Self {
            driver: Arc::new(driver),
            image,
            templates: TemplateStore::open(&home.data.join("templates"))
                .map_err(|e| infrastructure(&e))?,
            heads: HeadStore::open(&home.heads()).map_err(|e| infrastructure(&e))?,
            ledger: Self::open_ledger(home).map_err(|e| infrastructure(&e))?,
            leases: Arc::new(LeaseTable::new(steady_unix_ms)),
            worker: "local".parse().map_err(|e| infrastructure(&e))?,
            home: home.clone(),
        };
        let reaped = host.reap().await;
        for leak in reaped.leaks {
            tracing::warn!(leak, "could not be reaped");
        }
        Ok(host)
    }

    /// The ledger of this host.
    ///
    /// # Errors
    /// When the host's memory cannot be read.
    pub fn open_ledger(home: &Home) -> std::io::Result<Ledger> {
        Ok(Ledger::new(
            &home.data,
            Capacity::of_host(CPU_OVERCOMMIT_PERCENT, MEMORY_RESERVE)?,
        ))
    }

    /// Stages 2-4 of one job in process: its first attempt is leased to this worker until `timeout_ms` from now and a margin.
    #[must_use]
    pub fn lease(&self, job: &JobId, tenant: &TenantName, timeout_ms: u64) -> Lease {
        let lease = Lease {
            attempt: AttemptId {
                job: job.clone(),
                number: 1,
            },
            tenant: tenant.clone(),
            worker: self.worker.clone(),
            epoch: Epoch {
                incarnation: 1,
                count: 1,
            },
            deadline_unix_ms: steady_unix_ms()
                .saturating_add(timeout_ms)
                .saturating_add(3_600_000),
        };
        self.leases.grant(lease.clone());
        lease
    }

    /// Waits for room on the host, and says for what it waits.
    ///
    /// # Errors
    /// When it can never fit, or the wait is too long.
    pub async fn admit(
        &self,
        cpus: u32,
        memory: ByteSize,
        who: &str,
        events: &Events,
    ) -> Result<Ticket, Failure> {
        self.admit_need(Need::of(cpus, memory), who, events).await
    }

    /// As [`Self::admit`], for a job: with CPUs of its own where it asks for them.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub async fn admit_for(
        &self,
        request: &JobRequest,
        memory: ByteSize,
        events: &Events,
    ) -> Result<Ticket, Failure> {
        let cpus = request.limits.cpus;
        let need = match request.dispatch.requires.pinned_cpus {
            true => Need::pinned(cpus, memory),
            false => Need::of(cpus, memory),
        };
        self.admit_need(need, request.id.as_str(), events).await
    }

    async fn admit_need(&self, need: Need, who: &str, events: &Events) -> Result<Ticket, Failure> {
        let told = events.clone();
        self.ledger
            .acquire(need, who, QUEUE_TIMEOUT, move |reason| {
                told.tell_now(Event::Progress {
                    what: "waiting for room on this host".to_owned(),
                    detail: reason.to_string(),
                });
            })
            .await
            .map_err(|error| Failure::infrastructure(&error))
    }

    /// Removes what killed kiln processes left behind. Only commands that touch machines call it.
    pub async fn reap(&self) -> ReapReport {
        self.driver.reap().await
    }
}
