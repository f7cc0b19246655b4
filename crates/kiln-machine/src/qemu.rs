//! The QEMU driver: KVM where it truly boots guests, translation elsewhere.
//!
//! One process per machine: no default devices, a private control socket, system-call filter, files by descriptor, a user and a
//! cgroup of its own where the host allows. Clones map a template's memory copy-on-write. `argv` has every argument with
//! its reason, `launch` the order of a start, `save` the making of templates, `probe` the truth about KVM.

mod adopt;
mod argv;
mod console;
mod disks;
mod launch;
mod machine;
mod probe;
mod program;
mod qcow2;
mod qmp;
mod save;
mod sockets;
mod spawn;
mod status;
mod users;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_core::machine::{BootSource, DiskAccess};
use kiln_core::{ByteSize, MachineName, MachineSpec};
use tokio::sync::OnceCell;

pub use program::{PROGRAM, Program, VERSION_MIN};

use crate::cgroup::CgroupHost;
use crate::driver::{
    Accelerator, AdoptError, BoxFuture, Capabilities, Check, CheckLevel, Driver, HostProbe,
    LaunchError, Machine, ReapReport, SpecRefused, Start,
};
use crate::reap;
use users::OwnUsers;

/// Name of the channel's socket in a machine's directory.
pub(crate) const CHANNEL_SOCKET: &str = "channel.sock";
/// The same of a kept machine's control socket and console.
pub(crate) const CONTROL_SOCKET: &str = "control.sock";
pub(crate) const CONSOLE_SOCKET: &str = "console.sock";
/// The driver's name.
const NAME: &str = "qemu";
/// Most virtual CPUs of one machine.
const CPUS_MAX: u32 = 64;
/// Least memory that Debian's kernel boots in.
const MEMORY_MIN: ByteSize = ByteSize::mib(128);
/// Most memory of one machine. Above 3 GiB the `pc` machine splits it; that works up to its address limit.
const MEMORY_MAX: ByteSize = ByteSize::gib(512);

/// How the driver is set up.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// `KILN_HOME`: machines, records and the probe's verdict live in it, and templates in its `templates`.
    pub home: PathBuf,
    /// The QEMU program, when the operator names one.
    pub program: Option<PathBuf>,
    /// Kernel and initial RAM disk for the probe, when there is a machine image already.
    pub probe_boot: Option<BootSource>,
    /// Never use KVM.
    pub emulate: bool,
    /// The KVM device.
    pub kvm: PathBuf,
}

impl QemuConfig {
    /// The usual setting for a home.
    #[must_use]
    pub fn new(home: &Path) -> Self {
        Self {
            home: home.to_owned(),
            program: None,
            probe_boot: None,
            emulate: false,
            kvm: probe::DEVICE.into(),
        }
    }
}

/// Starts machines with QEMU.
#[derive(Debug)]
pub struct QemuDriver {
    config: QemuConfig,
    program: Program,
    users: Result<OwnUsers, String>,
    cgroups: CgroupHost,
    verdict: OnceCell<probe::Verdict>,
}

impl QemuDriver {
    /// Looks at the host; starts nothing but `qemu --version`, and that only when the program is new to this home.
    ///
    /// # Errors
    /// [`LaunchError::Vmm`] when QEMU is missing or too old.
    pub fn new(config: QemuConfig) -> Result<Self, LaunchError> {
        let remembered = probe::remembered_program(&config.home);
        let program = Program::find_or_remember(config.program.as_deref(), remembered.as_ref())?;
        Ok(Self {
            users: OwnUsers::of(&config.home),
            cgroups: CgroupHost::detect(),
            program,
            verdict: OnceCell::new(),
            config,
        })
    }

    /// The QEMU in use.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// What runs guests here. Boots a kernel the first time in each boot of the host; what was found without one does not stick.
    async fn verdict(&self, boot: Option<&BootSource>) -> probe::Verdict {
        let boot = self.config.probe_boot.as_ref().or(boot);
        let find = || probe::verdict(&self.config, &self.program, boot);
        match (boot, self.verdict.get()) {
            (_, Some(verdict)) => verdict.clone(),
            (Some(_), None) => self.verdict.get_or_init(find).await.clone(),
            (None, None) => find().await,
        }
    }

    async fn start(
        &self,
        spec: &MachineSpec,
        start: &Start,
    ) -> Result<Arc<dyn Machine>, LaunchError> {
        check_spec(spec, start)?;
        let verdict = self.verdict(Some(&spec.boot)).await;
        let host = launch::Host {
            home: &self.config.home,
            program: &self.program,
            kvm: (verdict.accelerator == Accelerator::Kvm).then_some(self.config.kvm.as_path()),
            users: self.users.clone().ok(),
            cgroups: &self.cgroups,
        };
        let machine: Arc<dyn Machine> = launch::launch(&host, spec, start).await?;
        Ok(machine)
    }

    async fn host_probe(&self) -> HostProbe {
        let verdict = self.verdict(None).await;
        let mut checks = vec![
            Check {
                name: "qemu".to_owned(),
                level: CheckLevel::Pass,
                found: format!("{} {}", self.program.path.display(), self.program.version),
                hint: None,
            },
            verdict.check(),
            user_check(&self.users),
        ];
        checks.extend(self.cgroups.checks());
        checks.push(crate::pins::check());
        HostProbe {
            driver: self.name().to_owned(),
            accelerator: verdict.accelerator,
            vmm_version: self.program.version.clone(),
            boot_probe_ms: verdict.boot_ms,
            checks,
        }
    }
}

fn user_check(users: &Result<OwnUsers, String>) -> Check {
    let name = "vmm-user".to_owned();
    match users {
        Ok(_) => Check {
            name,
            level: CheckLevel::Pass,
            found: "each VMM runs as an unprivileged user of its own".to_owned(),
            hint: None,
        },
        Err(why) => Check {
            name,
            level: CheckLevel::Warn,
            found: format!("VMMs run as kiln's own user: {why}"),
            hint: Some("run kiln as root to give each VMM a user of its own".to_owned()),
        },
    }
}

impl Driver for QemuDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> BoxFuture<'_, HostProbe> {
        Box::pin(self.host_probe())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            templates: true,
            hotplug_disk: true,
            vmgenid: self
                .verdict
                .get()
                .is_some_and(|v| v.accelerator == Accelerator::Kvm),
            own_user: self.users.is_ok(),
            cgroup: self.cgroups.version().is_some(),
            adopt: true,
            machines_max: 0,
        }
    }

    fn validate(&self, spec: &MachineSpec, start: &Start) -> Result<(), SpecRefused> {
        check_spec(spec, start)?;
        match (start, self.verdict.get()) {
            // Without a verdict yet, the launch finds out.
            (Start::Cold, _) | (_, None) => Ok(()),
            (Start::Template(template), Some(verdict)) => {
                let saved =
                    save::open(template).map_err(|error| SpecRefused::Stale(error.to_string()))?;
                match saved.difference(spec, accel_of(verdict), &self.program) {
                    Some(why) => Err(SpecRefused::Stale(why)),
                    None => Ok(()),
                }
            }
        }
    }

    fn launch<'a>(
        &'a self,
        spec: &'a MachineSpec,
        start: Start,
    ) -> BoxFuture<'a, Result<Arc<dyn Machine>, LaunchError>> {
        Box::pin(async move { self.start(spec, &start).await })
    }

    fn template_facts(&self) -> BoxFuture<'_, Vec<(String, String)>> {
        Box::pin(async {
            let accel = accel_of(&self.verdict(None).await);
            vec![
                ("driver".to_owned(), self.name().to_owned()),
                (
                    "vmm".to_owned(),
                    format!("{} {}", self.program.version, self.program.identity),
                ),
                ("accelerator".to_owned(), accel.name().to_owned()),
                ("guest-cpu".to_owned(), accel.cpu_model().to_owned()),
                ("host-cpu".to_owned(), probe::host_cpu()),
                ("clock".to_owned(), probe::clock_args(accel).join(" ")),
            ]
        })
    }

    fn reap(&self) -> BoxFuture<'_, ReapReport> {
        Box::pin(async {
            let home = self.config.home.clone();
            let sweep = move || {
                let mut report = reap::reap_home(&home);
                let partial = reap::sweep_partial(&[home.join("templates"), home]);
                report.reaped.extend(partial.reaped);
                report.leaks.extend(partial.leaks);
                report
            };
            let report = tokio::task::spawn_blocking(sweep).await;
            report.unwrap_or_else(|error| ReapReport {
                reaped: Vec::new(),
                leaks: vec![error.to_string()],
            })
        })
    }

    fn adoptable(&self) -> BoxFuture<'_, Vec<MachineName>> {
        Box::pin(crate::adopt::adoptable_of(self.config.home.clone(), NAME))
    }

    fn adopt<'a>(
        &'a self,
        name: &'a MachineName,
    ) -> BoxFuture<'a, Result<Arc<dyn Machine>, AdoptError>> {
        Box::pin(async move {
            let home = self.config.home.clone();
            let taken = crate::adopt::take_of(home, name, NAME).await?;
            let machine: Arc<dyn Machine> = Arc::new(adopt::adopt(taken).await?);
            Ok(machine)
        })
    }
}

/// The accelerator, as far as templates are concerned.
fn accel_of(verdict: &probe::Verdict) -> argv::Accel {
    match verdict.accelerator {
        Accelerator::Kvm => argv::Accel::Kvm { set: None },
        _ => argv::Accel::Tcg,
    }
}

fn check_spec(spec: &MachineSpec, start: &Start) -> Result<(), SpecRefused> {
    check_numbers(spec)?;
    crate::adopt::check_spec(spec, true)?;
    for (index, disk) in spec.disks.iter().enumerate() {
        if spec.disks[..index]
            .iter()
            .any(|other| other.role == disk.role)
        {
            return Err(SpecRefused::DuplicateRole(disk.role));
        }
        check_disk(disk)?;
    }
    if *start == Start::Cold {
        for (what, path) in [("kernel", &spec.boot.kernel), ("initrd", &spec.boot.initrd)] {
            check_file(what, path)?;
        }
    }
    Ok(())
}

fn check_numbers(spec: &MachineSpec) -> Result<(), SpecRefused> {
    let range = |what, asked, range: String| Err(SpecRefused::OutOfRange { what, asked, range });
    if !(1..=CPUS_MAX).contains(&spec.cpus) {
        return range("cpus", u64::from(spec.cpus), format!("1 to {CPUS_MAX}"));
    }
    if spec.memory < MEMORY_MIN || spec.memory > MEMORY_MAX {
        return range(
            "memory",
            spec.memory.0,
            format!("{MEMORY_MIN} to {MEMORY_MAX}"),
        );
    }
    if !spec.memory.0.is_multiple_of(1 << 20) {
        return range("memory", spec.memory.0, "whole mebibytes".to_owned());
    }
    Ok(())
}

fn check_disk(disk: &kiln_core::DiskSlot) -> Result<(), SpecRefused> {
    match (&disk.access, &disk.backing) {
        (DiskAccess::New { size }, None) => {
            if size.0 == 0 || size.0 > qcow2::VIRTUAL_SIZE_MAX {
                let (what, asked) = ("size of a new disk", size.0);
                let range = "1 byte to 4 TiB".to_owned();
                return Err(SpecRefused::OutOfRange { what, asked, range });
            }
            Ok(())
        }
        (DiskAccess::New { .. }, Some(_)) => {
            Err(SpecRefused::Unsupported("a new disk with a backing file"))
        }
        (_, Some(path)) => check_file(disk.role.serial(), path),
        (_, None) => Err(SpecRefused::Unsupported(
            "a disk without a backing file that is not new",
        )),
    }
}

fn check_file(what: &str, path: &Path) -> Result<(), SpecRefused> {
    if path.is_absolute() && disks::is_regular(path) {
        return Ok(());
    }
    Err(SpecRefused::MissingFile {
        what: what.to_owned(),
        path: path.to_owned(),
    })
}

/// A file operation's failure as a launch's; a full disk has its own name.
pub(crate) fn launch_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> LaunchError + 'a {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            LaunchError::DiskFull(path.to_owned())
        }
        _ => LaunchError::Io {
            action,
            path: path.to_owned(),
            source,
        },
    }
}
