//! One simulated machine.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_core::machine::DiskAccess;
use kiln_core::{ByteSize, DiskRole, DiskSlot, MachineName, MachineSpec};
use tokio::process::Child;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::config::{Phase, SimConfig};
use super::disk::{SimDisk, file_name};
use super::guest::Guest;
use super::kept::{self, Keepable, Living};
use super::template;
use crate::adopt::{self, Taken};
use crate::driver::{
    BoxFuture, Channel, HostStats, Kept, LeakReport, Machine, MachineError, MachineState,
    StopReason, TemplateRef,
};
use crate::record::MachineDir;

/// What is asked of a machine that was not launched for it.
const NOT_KEEPABLE: &str = "keep a machine that was not launched to be kept";
/// How long a killed machine may take to be gone.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// A simulated machine; see [`super`].
#[derive(Debug)]
pub struct SimMachine {
    config: Arc<SimConfig>,
    guest: Arc<Guest>,
    state: Arc<watch::Sender<MachineState>>,
    dir: Arc<MachineDir>,
    memory: ByteSize,
    /// The disks as they were asked for.
    slots: Mutex<Vec<DiskSlot>>,
    /// Keeps the template from being pruned.
    _template: Option<File>,
    keepable: Option<Keepable>,
    /// This owner let go of it.
    released: watch::Sender<bool>,
}

impl SimMachine {
    /// Takes over what was prepared and lets the guest run.
    pub(super) fn start(
        config: Arc<SimConfig>,
        guest: Guest,
        dir: MachineDir,
        spec: &MachineSpec,
        stand_in: Option<Child>,
        template: Option<File>,
        keepable: Option<Keepable>,
    ) -> Self {
        let boot_time = match template {
            Some(_) => config.clone_time,
            None => config.boot_time,
        };
        let guest = Arc::new(guest);
        let state = Arc::new(watch::Sender::new(MachineState::Running));
        let body = tokio::spawn(Arc::clone(&guest).run(boot_time));
        tokio::spawn(supervise(
            Arc::clone(&guest),
            Arc::clone(&state),
            body,
            stand_in,
        ));
        Self {
            config,
            guest,
            state,
            dir: Arc::new(dir),
            memory: spec.memory,
            slots: Mutex::new(spec.disks.clone()),
            _template: template,
            keepable,
            released: watch::Sender::new(false),
        }
    }

    /// Takes over a guest that lives.
    pub(super) fn adopted(config: Arc<SimConfig>, living: Living, taken: Taken) -> Self {
        let (dir, kept) = taken.own();
        let lock = kept.template.as_ref().map(crate::template::lock_for_use);
        Self {
            config,
            guest: living.guest,
            state: living.state,
            dir,
            memory: kept.spec.memory,
            slots: Mutex::new(kept.spec.disks.clone()),
            _template: lock.and_then(Result::ok),
            keepable: Some(Keepable {
                spec: kept.spec,
                template: kept.template,
            }),
            released: watch::Sender::new(false),
        }
    }

    /// Where the machine keeps its files.
    #[must_use]
    pub fn dir(&self) -> &MachineDir {
        &self.dir
    }

    /// The guest stops answering and reading for good.
    pub fn silence(&self) {
        self.guest.port.silence();
    }

    /// The machine stops for this reason, as if from outside.
    pub fn break_down(&self, reason: StopReason) {
        self.guest.power_off(reason);
    }

    /// Reads a file of the guest without asking it.
    #[must_use]
    pub fn read_guest_file(&self, path: &str) -> Option<Vec<u8>> {
        self.guest.memory().read(path)
    }

    /// Lets go of the machine as if this process had been killed: nothing is removed, the lock falls. A kept one lives on. For tests.
    pub fn abandon(&self) {
        if self.kept().is_some() {
            return self.leave();
        }
        self.guest.power_off(StopReason::Killed);
        self.dir.abandon();
    }

    fn leave(&self) {
        let living = Living {
            guest: Arc::clone(&self.guest),
            state: Arc::clone(&self.state),
        };
        kept::leave(self.dir.token(), living);
        self.released.send_replace(true);
        self.dir.abandon();
    }

    fn is_released(&self) -> bool {
        *self.released.borrow()
    }

    /// Ends the guest, unless it is another owner's.
    fn kill(&self) {
        if !self.is_released() {
            self.guest.power_off(StopReason::Killed);
        }
    }

    async fn wait_stopped(&self) -> MachineState {
        let (mut state, mut released) = (self.state.subscribe(), self.released.subscribe());
        let stopped = tokio::select! {
            biased;
            _ = released.wait_for(|released| *released) => StopReason::Released,
            stopped = state.wait_for(|state| state.is_terminal()) => {
                return stopped.map_or(MachineState::Stopped(StopReason::Killed), |state| *state);
            }
        };
        MachineState::Stopped(stopped)
    }

    fn check_running(&self) -> Result<(), MachineError> {
        match self.state() {
            MachineState::Stopped(reason) => Err(MachineError::Stopped(reason)),
            _ => Ok(()),
        }
    }

    fn keep_until(&self, kept: Kept) -> Result<(), MachineError> {
        self.check_running()?;
        let keepable = self.keepable.as_ref();
        let keepable = keepable.ok_or(MachineError::Unsupported(NOT_KEEPABLE))?;
        let mut spec = keepable.spec.clone();
        spec.disks.clone_from(&self.slots());
        adopt::keep(&self.dir, kept, &spec, keepable.template.as_ref())
    }

    async fn save(&self, target: &TemplateRef) -> Result<(), MachineError> {
        self.check_running()?;
        if !self.config.capabilities.templates {
            return Err(MachineError::Unsupported("make templates"));
        }
        let memory = {
            let memory = self.guest.memory();
            if !memory.frozen {
                return Err(MachineError::Control {
                    command: "save".to_owned(),
                    why: "the workload is not frozen".to_owned(),
                });
            }
            memory.clone()
        };
        self.guest.port.silence();
        self.state.send_if_modified(|state| {
            let running = *state == MachineState::Running;
            if running {
                *state = MachineState::Saving;
            }
            running
        });
        self.config.reached(Phase::Saving);
        let slots = self.slots().clone();
        let saved = template::save(&memory, &slots, target);
        self.guest.power_off(StopReason::Saved);
        self.wait_stopped().await;
        let report = self.remove().await;
        if !report.leaks.is_empty() {
            tracing::warn!(machine = %self.dir.name(), leaks = ?report.leaks, "a machine left something behind");
        }
        saved.map_err(|source| MachineError::Io {
            action: "save the template to",
            path: target.dir.clone(),
            source,
        })
    }

    fn slots(&self) -> MutexGuard<'_, Vec<DiskSlot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn remove(&self) -> LeakReport {
        let dir = Arc::clone(&self.dir);
        match tokio::task::spawn_blocking(move || dir.remove()).await {
            Ok(report) => report,
            Err(error) => LeakReport {
                leaks: vec![error.to_string()],
            },
        }
    }

    fn attach(&self, slot: &DiskSlot) -> Result<(), MachineError> {
        self.check_running()?;
        if !self.config.capabilities.hotplug_disk {
            return Err(MachineError::Unsupported("add disks while it runs"));
        }
        let serial = slot.role.serial().to_owned();
        if self.guest.memory().disks.contains_key(&serial) {
            return Err(MachineError::Control {
                command: "attach".to_owned(),
                why: format!("there is a disk {serial} already"),
            });
        }
        let disk = SimDisk::make(slot, self.dir.dir()).map_err(|source| MachineError::Io {
            action: "make",
            path: self.dir.path(&file_name(slot.role)),
            source,
        })?;
        self.guest.memory().disks.insert(serial, disk);
        self.slots().push(slot.clone());
        match self.kept() {
            Some(kept) => self.keep_until(kept),
            None => Ok(()),
        }
    }
}

/// Waits for the end of the guest or of its stand-in, whichever is first, and ends the other.
async fn supervise(
    guest: Arc<Guest>,
    state: Arc<watch::Sender<MachineState>>,
    body: JoinHandle<()>,
    mut stand_in: Option<Child>,
) {
    let mut power = guest.power();
    let reason = {
        let off = power.wait_for(Option::is_some);
        let died = async {
            match &mut stand_in {
                Some(child) => drop(child.wait().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            off = off => off.ok().and_then(|reason| *reason).unwrap_or(StopReason::Killed),
            () = died => StopReason::VmmDied,
        }
    };
    guest.port.close();
    guest.power_off(reason);
    body.abort();
    if let Some(child) = &mut stand_in {
        // It may have ended by itself.
        let _ = child.kill().await;
    }
    state.send_replace(MachineState::Stopped(reason));
}

impl Machine for SimMachine {
    fn name(&self) -> &MachineName {
        self.dir.name()
    }

    fn state(&self) -> MachineState {
        match self.is_released() {
            true => MachineState::Stopped(StopReason::Released),
            false => *self.state.borrow(),
        }
    }

    fn stopped(&self) -> BoxFuture<'_, MachineState> {
        Box::pin(self.wait_stopped())
    }

    fn channel(&self) -> BoxFuture<'_, Result<Channel, MachineError>> {
        Box::pin(async move {
            self.check_running()?;
            Ok(Box::new(self.guest.port.connect()) as Channel)
        })
    }

    fn attach_disk<'a>(&'a self, disk: &'a DiskSlot) -> BoxFuture<'a, Result<(), MachineError>> {
        Box::pin(async move { self.attach(disk) })
    }

    fn stats(&self) -> BoxFuture<'_, Result<HostStats, MachineError>> {
        Box::pin(async move {
            self.check_running()?;
            let used = ByteSize(self.guest.memory().bytes().min(self.memory.0));
            Ok(HostStats {
                rss: used,
                rss_peak: used,
                pss: used,
                cpu_ms: 1,
            })
        })
    }

    fn console_tail(&self) -> String {
        self.guest.console()
    }

    fn into_template<'a>(
        &'a self,
        target: &'a TemplateRef,
    ) -> BoxFuture<'a, Result<(), MachineError>> {
        Box::pin(self.save(target))
    }

    fn stop(&self, deadline: Duration) -> BoxFuture<'_, MachineState> {
        Box::pin(async move {
            if let Ok(state) = tokio::time::timeout(deadline, self.wait_stopped()).await {
                return state;
            }
            self.kill();
            self.wait_stopped().await
        })
    }

    fn take_disk(&self, role: DiskRole) -> Result<PathBuf, MachineError> {
        if !self.state().is_terminal() {
            return Err(MachineError::Control {
                command: "take a disk".to_owned(),
                why: "the machine still runs".to_owned(),
            });
        }
        let memory = self.guest.memory();
        match memory.disks.get(role.serial()).filter(|disk| disk.writable) {
            Some(disk) => Ok(disk.file.clone()),
            None => Err(MachineError::Unsupported(
                "give a disk that it did not write",
            )),
        }
    }

    fn keep(&self, kept: Kept) -> Result<(), MachineError> {
        self.keep_until(kept)
    }

    fn kept(&self) -> Option<Kept> {
        self.dir.record().kept.map(|kept| kept.kept)
    }

    fn release(&self) -> Result<(), MachineError> {
        self.check_running()?;
        if self.kept().is_none() {
            return Err(MachineError::Unsupported(NOT_KEEPABLE));
        }
        self.leave();
        Ok(())
    }

    fn destroy(&self) -> BoxFuture<'_, LeakReport> {
        Box::pin(async move {
            self.kill();
            let ended = tokio::time::timeout(END_DEADLINE, self.wait_stopped()).await;
            self.config.reached(Phase::Destroying);
            let mut report = self.remove().await;
            if ended.is_err() {
                report
                    .leaks
                    .push(format!("the guest still runs after {END_DEADLINE:?}"));
            }
            report
        })
    }
}

impl Drop for SimMachine {
    fn drop(&mut self) {
        // The supervisor ends the guest and the stand-in; the directory removes the rest.
        self.kill();
    }
}

/// Whether a slot can be simulated: a fork and a read-only disk need a file behind them.
pub(super) fn needs_backing(slot: &DiskSlot) -> bool {
    !matches!(slot.access, DiskAccess::New { .. })
}
