//! The simulated driver: makes machines, hands out their faults, reaps.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kiln_core::{MachineName, MachineSpec};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::process::{Child, Command};

use super::config::{Phase, SimConfig};
use super::disk::SimDisk;
use super::fault::Fault;
use super::guest::Guest;
use super::kept::{self, Keepable};
use super::machine::{SimMachine, needs_backing};
use super::memory::Memory;
use super::template;
use crate::adopt;
use crate::cgroup::{self, CgroupHost, Limits};
use crate::driver::{
    Accelerator, AdoptError, BoxFuture, Capabilities, Driver, HostProbe, LaunchError, Machine,
    ReapReport, SpecRefused, Start,
};
use crate::reap;
use crate::record::{MachineDir, RecordError};

/// The driver's name.
const NAME: &str = "sim";
/// The program that stands in for a VMM: it waits until it is killed.
const STAND_IN: &str = "/bin/sh";
/// What it runs: holds both ends of a fifo of the machine's directory, so that it never reads an end.
const STAND_IN_SCRIPT: &str = "exec 3<>\"$1\"; read _ <&3";

/// A driver whose machines are tasks of this process.
#[derive(Debug)]
pub struct SimDriver {
    home: PathBuf,
    config: Arc<SimConfig>,
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    /// For each machine to come, whatever its name.
    always: Vec<Fault>,
    /// For machines of one name.
    named: BTreeMap<String, Vec<Fault>>,
    /// For the next machine, then gone.
    next: Vec<Fault>,
    machines: BTreeMap<MachineName, Weak<SimMachine>>,
}

impl SimDriver {
    /// A driver that keeps its machines below `home`.
    #[must_use]
    pub fn new(home: &Path, config: SimConfig) -> Self {
        Self {
            home: home.to_owned(),
            config: Arc::new(config),
            plan: Mutex::default(),
        }
    }

    /// The next machine has this fault.
    pub fn inject(&self, fault: Fault) {
        self.plan().next.push(fault);
    }

    /// Every machine has this fault from now on.
    pub fn inject_always(&self, fault: Fault) {
        self.plan().always.push(fault);
    }

    /// Machines whose name ends so have this fault from now on.
    pub fn inject_into(&self, name_end: &str, fault: Fault) {
        let mut plan = self.plan();
        plan.named
            .entry(name_end.to_owned())
            .or_default()
            .push(fault);
    }

    /// A machine that lives.
    #[must_use]
    pub fn machine(&self, name: &MachineName) -> Option<Arc<SimMachine>> {
        self.plan().machines.get(name)?.upgrade()
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults_for(&self, name: &MachineName) -> Vec<Fault> {
        let mut plan = self.plan();
        let mut faults = std::mem::take(&mut plan.next);
        faults.extend(plan.always.iter().cloned());
        for (end, named) in &plan.named {
            if name.as_str().ends_with(end) {
                faults.extend(named.iter().cloned());
            }
        }
        faults
    }

    async fn start(
        &self,
        spec: &MachineSpec,
        start: &Start,
    ) -> Result<Arc<SimMachine>, LaunchError> {
        self.check(spec, start)?;
        let used = match start {
            Start::Cold => None,
            Start::Template(template) => Some(template::lock(template)?),
        };
        let faults = self.faults_for(&spec.name);
        let dir = MachineDir::create(&self.home, &spec.name, NAME).map_err(launch_error)?;
        dir.set_host_cpus(&spec.host_cpus).map_err(launch_error)?;
        self.config.reached(Phase::DirMade);
        if faults.contains(&Fault::HostDiskFull) {
            return Err(LaunchError::DiskFull(dir.dir().to_owned()));
        }
        let memory = make_memory(spec, start, dir.dir())?;
        self.config.reached(Phase::FilesMade);
        dir.set_launching(Path::new(STAND_IN), &[])
            .map_err(launch_error)?;
        self.config.reached(Phase::Launching);
        // A kept machine is one whose process lives.
        let stand_in = match self.config.stand_in || spec.keepable {
            true => Some(self.spawn_stand_in(spec, &dir)?),
            false => None,
        };
        self.config.reached(Phase::Spawned);
        if let Some(pid) = stand_in.as_ref().and_then(Child::id) {
            dir.set_running(pid).map_err(launch_error)?;
            crate::ledger::settle_started(&self.home, pid, &spec.host_cpus).map_err(|source| {
                LaunchError::Io {
                    action: "give CPUs of its own to",
                    path: dir.dir().to_owned(),
                    source,
                }
            })?;
        }
        self.config.reached(Phase::Running);
        let guest = Guest::new(memory, faults, self.config.script.clone());
        let keepable = spec.keepable.then(|| Keepable {
            spec: spec.clone(),
            template: match start {
                Start::Cold => None,
                Start::Template(template) => Some(template.clone()),
            },
        });
        let machine = Arc::new(SimMachine::start(
            Arc::clone(&self.config),
            guest,
            dir,
            spec,
            stand_in,
            used,
            keepable,
        ));
        self.remember(&machine);
        Ok(machine)
    }

    fn remember(&self, machine: &Arc<SimMachine>) {
        let mut plan = self.plan();
        plan.machines
            .retain(|_, machine| machine.strong_count() > 0);
        plan.machines
            .insert(machine.dir().name().clone(), Arc::downgrade(machine));
    }

    async fn take(&self, name: &MachineName) -> Result<Arc<SimMachine>, AdoptError> {
        let taken = adopt::take_of(self.home.clone(), name, NAME).await?;
        // A simulated guest lives in the process that made it, and ends with that.
        let Some(living) = kept::take(taken.dir().token()) else {
            return Err(taken.remove("its process has ended".to_owned()).await);
        };
        let machine = SimMachine::adopted(Arc::clone(&self.config), living, taken);
        let machine = Arc::new(machine);
        self.remember(&machine);
        Ok(machine)
    }

    fn spawn_stand_in(&self, spec: &MachineSpec, dir: &MachineDir) -> Result<Child, LaunchError> {
        let fifo = dir.path("vmm.fifo");
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(CWD, &fifo, FileType::Fifo, mode, 0).map_err(|errno| LaunchError::Io {
            action: "make",
            path: fifo.clone(),
            source: errno.into(),
        })?;
        let mut command = Command::new(STAND_IN);
        command
            .args(["-c", STAND_IN_SCRIPT, &dir.process_name()])
            .arg(&fifo)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        if self.config.cgroup {
            enter_cgroup(&mut command, spec, dir)?;
        }
        command.spawn().map_err(|error| LaunchError::Vmm {
            program: STAND_IN.to_owned(),
            why: error.to_string(),
        })
    }

    fn check(&self, spec: &MachineSpec, start: &Start) -> Result<(), SpecRefused> {
        adopt::check_spec(spec, self.config.capabilities.adopt)?;
        if spec.cpus == 0 {
            return Err(SpecRefused::OutOfRange {
                what: "the number of CPUs",
                asked: 0,
                range: "at least 1".to_owned(),
            });
        }
        if matches!(start, Start::Template(_)) && !self.config.capabilities.templates {
            return Err(SpecRefused::Unsupported("start from a template"));
        }
        for (what, path) in [("kernel", &spec.boot.kernel), ("initrd", &spec.boot.initrd)] {
            check_file(what, path)?;
        }
        let mut roles = BTreeSet::new();
        for slot in &spec.disks {
            if !roles.insert(slot.role) {
                return Err(SpecRefused::DuplicateRole(slot.role));
            }
            if needs_backing(slot) {
                let nowhere = PathBuf::new();
                check_file(
                    slot.role.serial(),
                    slot.backing.as_ref().unwrap_or(&nowhere),
                )?;
            }
        }
        Ok(())
    }
}

fn check_file(what: &str, path: &Path) -> Result<(), SpecRefused> {
    if path.is_file() {
        return Ok(());
    }
    Err(SpecRefused::MissingFile {
        what: what.to_owned(),
        path: path.to_owned(),
    })
}

/// The guest's memory at its start, with its disks made in `dir`.
fn make_memory(spec: &MachineSpec, start: &Start, dir: &Path) -> Result<Memory, LaunchError> {
    let mut memory = match start {
        Start::Cold => Memory::booted(Vec::new()),
        Start::Template(template) => template::restore(template, spec, dir)?,
    };
    for slot in &spec.disks {
        let serial = slot.role.serial().to_owned();
        // A template brings its own copy of the disks it was taken with.
        if memory.disks.contains_key(&serial) {
            continue;
        }
        let disk = SimDisk::make(slot, dir).map_err(|source| LaunchError::Io {
            action: "make the disks in",
            path: dir.to_owned(),
            source,
        })?;
        memory.disks.insert(serial, disk);
    }
    Ok(memory)
}

/// Puts the process to be started into a cgroup of its own, where the host has any.
fn enter_cgroup(
    command: &mut Command,
    spec: &MachineSpec,
    dir: &MachineDir,
) -> Result<(), LaunchError> {
    let host = CgroupHost::detect();
    if host.version().is_none() {
        return Ok(());
    }
    let name = dir.process_name();
    dir.update(|record| record.cgroups = host.paths_of(&name))
        .map_err(launch_error)?;
    let limits = Limits::of_guest(spec.cpus, spec.memory);
    let procs = host
        .create(&name, &limits)
        .and_then(|group| group.open_procs())
        .map_err(|error| LaunchError::Vmm {
            program: STAND_IN.to_owned(),
            why: format!("{error:?}"),
        })?;
    #[expect(unsafe_code, reason = "entering a group between fork and exec")]
    // SAFETY: `enter` only makes write(2) calls on files that are open in the child too, and allocates nothing unless it fails.
    unsafe {
        command.pre_exec(move || cgroup::enter(&procs));
    }
    Ok(())
}

fn launch_error(error: RecordError) -> LaunchError {
    match error {
        RecordError::Io { path, source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            LaunchError::DiskFull(path)
        }
        RecordError::Io {
            action,
            path,
            source,
        } => LaunchError::Io {
            action,
            path,
            source,
        },
        other => LaunchError::Io {
            action: "keep the record of",
            path: PathBuf::new(),
            source: io::Error::other(other),
        },
    }
}

impl Driver for SimDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> BoxFuture<'_, HostProbe> {
        Box::pin(async move {
            HostProbe {
                driver: NAME.to_owned(),
                accelerator: Accelerator::Simulated,
                vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
                boot_probe_ms: None,
                checks: Vec::new(),
            }
        })
    }

    fn capabilities(&self) -> Capabilities {
        self.config.capabilities
    }

    fn validate(&self, spec: &MachineSpec, start: &Start) -> Result<(), SpecRefused> {
        self.check(spec, start)?;
        match start {
            Start::Cold => Ok(()),
            Start::Template(template) => template::check(template, spec),
        }
    }

    fn launch<'a>(
        &'a self,
        spec: &'a MachineSpec,
        start: Start,
    ) -> BoxFuture<'a, Result<Arc<dyn Machine>, LaunchError>> {
        Box::pin(async move {
            let machine = self.start(spec, &start).await?;
            Ok(machine as Arc<dyn Machine>)
        })
    }

    fn reap(&self) -> BoxFuture<'_, ReapReport> {
        let home = self.home.clone();
        Box::pin(async move {
            match tokio::task::spawn_blocking(move || reap::reap_home(&home)).await {
                Ok(report) => report,
                Err(error) => ReapReport {
                    reaped: Vec::new(),
                    leaks: vec![error.to_string()],
                },
            }
        })
    }

    fn adoptable(&self) -> BoxFuture<'_, Vec<MachineName>> {
        Box::pin(adopt::adoptable_of(self.home.clone(), NAME))
    }

    fn adopt<'a>(
        &'a self,
        name: &'a MachineName,
    ) -> BoxFuture<'a, Result<Arc<dyn Machine>, AdoptError>> {
        Box::pin(async move {
            let machine = self.take(name).await?;
            Ok(machine as Arc<dyn Machine>)
        })
    }
}
