//! One machine of one attempt: from a specification to a guest that takes orders, and to nothing left behind.
//!
//! The choice of how to start is made here, in this order: a template for exactly this head; the plain template with the
//! head plugged in; a cold boot.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::{ByteSize, DiskRole, DiskSlot, FailureClass, MachineName, MachineSpec};
use kiln_image::heads::Head;
use kiln_machine::bring_up::{self, BringUpError, Deadlines, Ready, Timings};
use kiln_machine::driver::{
    Kept, LaunchError, Machine, MachineError, MachineState, PublicIdentity, Start,
};
use kiln_machine::ledger::Ticket;
use kiln_machine::template::Held;
use kiln_network::gateway::Gateway;
use kiln_proto::msg::{Mount, Order, feature};
use kiln_proto::{Hello, Session};
use tokio::task::JoinHandle;

use crate::event::Events;
use crate::failure::Failure;
use crate::given::GivenBoot;
use crate::host::{Host, now_unix_ms};
use crate::kept::HANDOVER_MAX;
use crate::measured::{Measured, add, ms};
use crate::orders;
use crate::services::Services;
use crate::templates::{self, Chosen, Purpose};

/// Longest boot of a cold machine, without KVM on a busy host.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a plugged disk to appear and mount.
pub const MOUNT_TIMEOUT: Duration = Duration::from_secs(30);
/// Lines of the console that a failure shows.
const CONSOLE_LINES: usize = 12;
/// Longest wait for a guest to power itself off.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A machine that takes orders, with everything that belongs to it.
#[derive(Debug)]
pub struct Attempt {
    /// The machine.
    pub machine: Arc<dyn Machine>,
    /// The session on its channel.
    pub session: Session,
    /// What its guest may ask for.
    pub services: Arc<Services>,
    /// Key of the template it was cloned from.
    pub template: Option<String>,
    /// How long the steps of its start took.
    pub timings: Timings,
    /// Milliseconds of plugging and mounting disks.
    disk_ms: AtomicU64,
    /// Whether BuildKit already runs on the mounted state disk.
    pub build_ready: bool,
    identity: PublicIdentity,
    /// What its guest says of itself.
    pub hello: Hello,
    serving: JoinHandle<()>,
    _ticket: Ticket,
    _template: Option<Held>,
}

/// What a machine is needed for.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Name of the machine.
    pub name: MachineName,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// What for.
    pub purpose: Purpose<'a>,
    /// Make a missing template first (true for people who wait anyway), or boot cold.
    pub make_template: bool,
    /// It may stay when its job is over: see [`Attempt::let_go`].
    pub may_stay: bool,
    /// Bytes per second of the disks that it may write, together; none means no bound.
    pub disk_bytes_per_second: Option<NonZeroU64>,
}

/// The shared, read-only root disk.
#[must_use]
pub fn root_disk(host: &Host) -> DiskSlot {
    DiskSlot {
        role: DiskRole::Root,
        backing: Some(host.image.root.clone()),
        format: DiskFormat::Raw,
        access: DiskAccess::ReadOnly,
    }
}

/// When a machine that is let go of now must have found another owner.
fn handed_over_until() -> u64 {
    let most = u64::try_from(HANDOVER_MAX.as_millis()).unwrap_or(u64::MAX);
    now_unix_ms().saturating_add(most)
}

/// A copy-on-write fork of a head.
#[must_use]
pub fn state_disk(host: &Host, head: &Head) -> DiskSlot {
    DiskSlot {
        role: DiskRole::State,
        backing: Some(host.heads.disk(head)),
        format: DiskFormat::Qcow2,
        access: DiskAccess::Fork,
    }
}

/// The specification of a machine on the current machine image.
#[must_use]
pub fn spec(
    host: &Host,
    name: MachineName,
    cpus: u32,
    memory: ByteSize,
    disks: Vec<DiskSlot>,
) -> MachineSpec {
    MachineSpec {
        name,
        cpus,
        memory,
        boot: host.image.boot.clone(),
        disks,
        boot_timeout_ms: u64::try_from(BOOT_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
        keepable: false,
        host_cpus: Vec::new(),
        disk_bytes_per_second: None,
    }
}

/// Chooses how to start, and starts. A template that is refused at its start is removed; a clone that did not come up for a reason
/// of the host's is followed by one cold boot. A guest that lied is no such reason.
async fn bring_up(
    host: &Host,
    wanted: &Wanted<'_>,
    memory: ByteSize,
    cpus: &[u32],
    events: &Events,
) -> Result<(Chosen, Ready), Failure> {
    let chosen = templates::choose(host, wanted, memory, events).await?;
    if let Purpose::Given(given) = wanted.purpose {
        let ready = boot_given(host, wanted, (memory, cpus), given, &chosen).await;
        return Ok((chosen, ready?));
    }
    let error = match start_as(host, wanted, memory, cpus, &chosen).await {
        Ok(ready) => return Ok((chosen, ready)),
        Err(error) => error,
    };
    let Some(held) = &chosen.template else {
        return Err(templates::bring_up_failure(error));
    };
    match &error {
        BringUpError::Launch(LaunchError::Template { why, .. }) => {
            templates::give_up(host, held, why, events).await?;
        }
        other if other.is_worth_a_retry() => {
            let text = "a clone did not start; a machine is booted instead";
            tracing::warn!(machine = %wanted.name, error = %orders::chain(other), text);
            events.warn(text).await;
        }
        _ => return Err(templates::bring_up_failure(error)),
    }
    let cold = Chosen {
        template: None,
        holds_head: false,
    };
    let ready = start_as(host, wanted, memory, cpus, &cold).await;
    Ok((cold, ready.map_err(templates::bring_up_failure)?))
}

/// Boots a machine on given files, once; only one that hung where the host is the likeliest reason is booted again.
async fn boot_given(
    host: &Host,
    wanted: &Wanted<'_>,
    (memory, cpus): (ByteSize, &[u32]),
    given: &GivenBoot,
    cold: &Chosen,
) -> Result<Ready, Failure> {
    let spec = MachineSpec {
        boot: given.source().clone(),
        ..spec_as(host, wanted, memory, cpus, cold)
    };
    let boot = || bring_up::start_once(&*host.driver, &spec, &Start::Cold, Deadlines::default());
    let ready = match boot().await {
        Err(error) if given.is_tried_again(&error) => {
            let text = "a boot hung and is tried once more";
            tracing::warn!(machine = %wanted.name, error = %orders::chain(&error), text);
            boot().await
        }
        first => first,
    };
    let ready = ready.map_err(|error| given.failure(error, BOOT_TIMEOUT))?;
    if ready.hello.has(feature::ROOT_DISK) {
        return Ok(ready);
    }
    let failure = given.no_root(&ready.machine.console_tail());
    ready.session.close(0, "the machine has no root disk");
    ready.machine.destroy().await;
    Err(failure)
}

async fn start_as(
    host: &Host,
    wanted: &Wanted<'_>,
    memory: ByteSize,
    cpus: &[u32],
    chosen: &Chosen,
) -> Result<Ready, BringUpError> {
    let spec = spec_as(host, wanted, memory, cpus, chosen);
    let start = chosen
        .template
        .as_ref()
        .map_or(Start::Cold, |held| Start::Template(held.template.clone()));
    bring_up::start(&*host.driver, &spec, &start, Deadlines::default()).await
}

fn spec_as(
    host: &Host,
    wanted: &Wanted<'_>,
    memory: ByteSize,
    cpus: &[u32],
    chosen: &Chosen,
) -> MachineSpec {
    let mut disks = match wanted.purpose {
        Purpose::Given(given) => vec![given.root().clone()],
        _ => vec![root_disk(host)],
    };
    if let (Purpose::Build { head }, true) = (
        &wanted.purpose,
        chosen.holds_head || chosen.template.is_none(),
    ) {
        disks.push(state_disk(host, head));
    }
    MachineSpec {
        host_cpus: cpus.to_vec(),
        keepable: wanted.may_stay,
        disk_bytes_per_second: wanted.disk_bytes_per_second,
        ..spec(host, wanted.name.clone(), wanted.cpus, memory, disks)
    }
}

/// The lines of a console that tell most of an end: from the kernel's panic on, else the last ones.
fn last_words(console: &str) -> Vec<&str> {
    let lines: Vec<&str> = console.lines().collect();
    let panic = lines.iter().position(|line| line.contains("Kernel panic"));
    let from = panic.unwrap_or_else(|| lines.len().saturating_sub(CONSOLE_LINES));
    lines.into_iter().skip(from).take(CONSOLE_LINES).collect()
}

impl Drop for Attempt {
    /// An attempt whose future was dropped (a deadline, a cancel) ends its session; the last handle of the machine kills it.
    fn drop(&mut self) {
        self.session.close(0, "the job is over");
        self.serving.abort();
    }
}

impl Attempt {
    /// Starts a machine and serves its guest.
    ///
    /// # Errors
    /// When no machine can be started, or the clone did not prove its new identity.
    pub async fn start(
        host: &Host,
        wanted: Wanted<'_>,
        ticket: Ticket,
        gateway: Gateway,
        events: &Events,
    ) -> Result<Self, Failure> {
        let memory = templates::size_class(wanted.memory);
        let (chosen, ready) = bring_up(host, &wanted, memory, ticket.cpus(), events).await?;
        let Ready {
            machine,
            session,
            incoming,
            timings,
            identity,
            hello,
            ..
        } = ready;
        let services = Services::new(gateway, events.clone());
        let serving = services.serve(incoming);
        let attempt = Self {
            machine,
            session,
            services,
            template: chosen
                .template
                .as_ref()
                .map(|held| held.template.key.clone()),
            timings,
            disk_ms: AtomicU64::new(0),
            build_ready: chosen.holds_head,
            identity,
            hello,
            serving,
            _ticket: ticket,
            _template: chosen.template,
        };
        if let Purpose::Build { head } = &wanted.purpose
            && !attempt.build_ready
            && let Err(failure) = attempt.take_head(host, head).await
        {
            let explained = attempt.explain(failure).await;
            attempt.destroy(events).await;
            return Err(explained);
        }
        Ok(attempt)
    }

    /// Plugs a fork of the head in, where the machine does not have it yet, and mounts it.
    async fn take_head(&self, host: &Host, head: &Head) -> Result<(), Failure> {
        if self.template.is_some() {
            self.attach(&state_disk(host, head)).await?;
        }
        self.mount(DiskRole::State, false, false).await
    }

    /// Plugs a disk in.
    ///
    /// # Errors
    /// When the machine does not take it.
    pub async fn attach(&self, disk: &DiskSlot) -> Result<(), Failure> {
        let since = Instant::now();
        self.machine.attach_disk(disk).await?;
        self.disk_ms
            .fetch_add(ms(since.elapsed()), Ordering::Relaxed);
        Ok(())
    }

    /// Milliseconds of plugging and mounting disks until now; none when there were none.
    #[must_use]
    pub fn disk_ms(&self) -> Option<u64> {
        Some(self.disk_ms.load(Ordering::Relaxed)).filter(|ms| *ms > 0)
    }

    /// Mounts a disk of the machine.
    ///
    /// # Errors
    /// When the guest cannot.
    pub async fn mount(
        &self,
        role: DiskRole,
        read_only: bool,
        format_blank: bool,
    ) -> Result<(), Failure> {
        let mount = Mount {
            serial: role.serial().to_owned(),
            read_only,
            format_blank,
            timeout_ms: u64::try_from(MOUNT_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
            memory_bytes: 0,
        };
        let since = Instant::now();
        orders::call(
            &self.session,
            "mount a disk",
            &Order::Mount(mount),
            MOUNT_TIMEOUT * 2,
        )
        .await?;
        self.disk_ms
            .fetch_add(ms(since.elapsed()), Ordering::Relaxed);
        Ok(())
    }

    /// Tells the guest to power off and waits; afterwards disks can be taken.
    ///
    /// # Errors
    /// When it did not power off by itself: its disks are then not clean.
    pub async fn power_off(&self) -> Result<(), Failure> {
        // The answer may never arrive: the machine's end is what counts.
        let _answer =
            orders::call(&self.session, "power off", &Order::Shutdown, STOP_TIMEOUT).await;
        match self.machine.stop(STOP_TIMEOUT).await {
            MachineState::Stopped(kiln_machine::driver::StopReason::PoweredOff) => Ok(()),
            other => Err(Failure::new(
                FailureClass::Infrastructure,
                format!("the machine did not power off cleanly: {other:?}"),
            )),
        }
    }

    /// What the end of machine or session explains about a failure seen first.
    pub async fn explain(&self, failure: Failure) -> Failure {
        if matches!(
            failure.class,
            FailureClass::User | FailureClass::Timeout | FailureClass::Cancelled
        ) {
            return failure;
        }
        if let Some(fault) = self.services.fault() {
            return Failure::new(FailureClass::GuestFault, format!("the guest sent {fault}"));
        }
        // A dying machine closes its channel first: give its own end a moment to be known.
        let stopped = tokio::time::timeout(Duration::from_secs(1), self.machine.stopped()).await;
        if let Ok(state) = stopped {
            let explained = failure.explained_by(state);
            let console = self.machine.console_tail();
            // Marked, so that nothing a guest printed there looks like kiln's own words.
            let last = last_words(&console);
            let last: String = last.iter().map(|line| format!("\n  | {line}")).collect();
            if last.is_empty() {
                return explained;
            }
            return Failure {
                message: format!("{}\nconsole:{last}", explained.message),
                ..explained
            };
        }
        match self.session.close_reason() {
            Some(reason) => Failure::from_close(&reason),
            None => failure,
        }
    }

    /// What is measured of a machine before its end, or before it is let go of.
    pub async fn measure(&self, measured: &mut Measured) {
        measured.started(&self.timings);
        measured.disk_ms = self.disk_ms();
        measured.memory(&*self.machine).await;
    }

    /// As [`Attempt::destroy`], with what is measured of a machine at its end.
    pub async fn destroy_measured(self, events: &Events, measured: &mut Measured) {
        self.measure(measured).await;
        let since = Instant::now();
        self.destroy(events).await;
        add(&mut measured.teardown_ms, since);
    }

    /// Lets go of a machine that may stay (until now whoever kills this process kills its job): it runs on without an owner, until somebody adopts it within [`HANDOVER_MAX`].
    ///
    /// # Errors
    /// When it cannot be kept; then it is destroyed when this is dropped.
    pub fn let_go(self) -> Result<(), MachineError> {
        self.session.close(0, "the job is over");
        self.machine.keep(Kept {
            until_unix_ms: handed_over_until(),
            identity: self.identity.clone(),
        })?;
        self.machine.release()
    }

    /// Destroys the machine; what could not be removed is told.
    pub async fn destroy(self, events: &Events) {
        self.session.close(0, "the job is over");
        let report = self.machine.destroy().await;
        for leak in report.leaks {
            events.warn(format!("left behind: {leak}")).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_shown_from_its_beginning() {
        let many: String = (0..40).map(|n| format!("line {n}\n")).collect();
        assert_eq!(last_words(&many).first(), Some(&"line 28"));
        let panic = format!("before\nKernel panic - not syncing: x\n{many}");
        let shown = last_words(&panic);
        assert_eq!(shown[..2], ["Kernel panic - not syncing: x", "line 0"]);
        assert_eq!(shown.len(), CONSOLE_LINES);
        assert!(last_words("").is_empty());
    }
}
