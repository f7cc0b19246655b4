//! Whether KVM boots guests here, found out by booting one.
//!
//! `/dev/kvm` that opens proves nothing: some hosts accept every call and never run a guest's first instruction. So a kernel is booted
//! once per boot of the host, kernel, QEMU and guest kernel; it must reach its first process before a deadline. The verdict is kept in
//! `<home>/probe.json`. Without a machine image the guest is a few bytes of our own; that verdict is not kept.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use kiln_core::machine::BootSource;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::argv::Accel;
use super::{Program, QemuConfig};
use crate::driver::{Accelerator, Check, CheckLevel};
use crate::{own_file, proc};

/// How long a kernel may take to its first process under KVM. It takes below a second where KVM works.
const BOOT_DEADLINE: Duration = Duration::from_secs(10);
/// How long the payload of a few bytes may take.
const PAYLOAD_DEADLINE: Duration = Duration::from_secs(5);
/// How long opening the device may take. It takes microseconds where KVM works.
const OPEN_DEADLINE: Duration = Duration::from_secs(2);
/// How long the end of a killed QEMU is awaited. One that the kernel's KVM holds may never end: it is left behind, and said so.
const END_DEADLINE: Duration = Duration::from_secs(2);
/// The device, where nobody says otherwise.
pub(super) const DEVICE: &str = "/dev/kvm";
/// What the kernel prints when it hands over to its first process.
const PROOF: &[u8] = b"Run /init as init process";
/// Bytes of console that are looked at.
const CONSOLE_MAX: usize = 1 << 20;
/// What `isa-debug-exit` makes of the payload's byte 0x2a: `value * 2 + 1` (QEMU's `hw/misc/debugexit.c`).
const PAYLOAD_EXIT: i32 = 0x2a * 2 + 1;
const FILE: &str = "probe.json";
const SCHEMA: u32 = 1;

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Verdict {
    /// What runs guests.
    pub(crate) accelerator: Accelerator,
    /// How long the boot took, if one was made and worked.
    pub(crate) boot_ms: Option<u64>,
    /// Why, in words.
    pub(crate) why: String,
    /// No kernel was booted yet: some hosts run a few bytes and still boot no kernel.
    #[serde(default)]
    pub(crate) preliminary: bool,
}

impl Verdict {
    fn of(accelerator: Accelerator, why: impl Into<String>) -> Self {
        Self {
            accelerator,
            boot_ms: None,
            why: why.into(),
            preliminary: false,
        }
    }

    /// A line for `kiln doctor`.
    pub(crate) fn check(&self) -> Check {
        let (level, hint) = match self.accelerator {
            Accelerator::Kvm if self.preliminary => (
                CheckLevel::Warn,
                Some("bake a machine image: then its kernel is booted to be sure"),
            ),
            Accelerator::Kvm | Accelerator::Simulated => (CheckLevel::Pass, None),
            Accelerator::KvmBroken => (
                CheckLevel::Warn,
                Some(
                    "use a host whose KVM runs guests (hardware, or nested with VT-x/AMD-V passed on)",
                ),
            ),
            Accelerator::Emulation => (
                CheckLevel::Warn,
                Some("give this user access to /dev/kvm (group kvm), or enable virtualisation"),
            ),
        };
        Check {
            name: "accelerator".to_owned(),
            level,
            found: self.why.clone(),
            hint: hint.map(str::to_owned),
        }
    }
}

/// What the verdict depends on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Subject {
    host_boot: String,
    host_kernel: String,
    device: String,
    program: String,
    guest_kernel: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Remembered {
    schema: u32,
    program: Program,
    subject: Option<Subject>,
    verdict: Option<Verdict>,
}

/// The program as it was last found in this home.
pub(crate) fn remembered_program(home: &Path) -> Option<Program> {
    read(home).map(|remembered| remembered.program)
}

fn read(home: &Path) -> Option<Remembered> {
    let text = own_file::read(&home.join(FILE)).ok()?;
    let remembered: Remembered = serde_json::from_slice(&text).ok()?;
    (remembered.schema == SCHEMA).then_some(remembered)
}

/// Losing it costs another probe, nothing else.
fn write(home: &Path, remembered: &Remembered) {
    let write = || -> io::Result<()> {
        fs::create_dir_all(home)?;
        let temp = home.join(proc::partial_name(FILE));
        fs::write(&temp, serde_json::to_vec_pretty(remembered)?)?;
        fs::rename(&temp, home.join(FILE))
    };
    if let Err(error) = write() {
        tracing::warn!(%error, "the probe's verdict could not be kept");
    }
}

/// How long each step of the probe may take.
#[derive(Clone, Copy, Debug)]
struct Deadlines {
    open: Duration,
    boot: Duration,
    payload: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            open: OPEN_DEADLINE,
            boot: BOOT_DEADLINE,
            payload: PAYLOAD_DEADLINE,
        }
    }
}

/// Finds out, or remembers.
pub(crate) async fn verdict(
    config: &QemuConfig,
    program: &Program,
    boot: Option<&BootSource>,
) -> Verdict {
    let device = config.kvm.clone();
    let open = move || open_device(&device);
    verdict_within(config, program, boot, open, Deadlines::default()).await
}

fn open_device(device: &Path) -> io::Result<()> {
    let opened = fs::OpenOptions::new().read(true).write(true).open(device);
    opened.map(drop)
}

async fn verdict_within(
    config: &QemuConfig,
    program: &Program,
    boot: Option<&BootSource>,
    open: impl FnOnce() -> io::Result<()> + Send + 'static,
    deadlines: Deadlines,
) -> Verdict {
    if config.emulate {
        return Verdict::of(
            Accelerator::Emulation,
            "emulation, because it was asked for",
        );
    }
    let subject = boot.map(|boot| subject(&config.kvm, program, boot));
    let old = read(&config.home).filter(|old| old.program == *program);
    if let Some(old) = &old
        && subject.is_some()
        && old.subject == subject
        && let Some(verdict) = &old.verdict
    {
        return verdict.clone();
    }
    let verdict = find_out(config, program, boot, open, deadlines).await;
    if verdict.accelerator == Accelerator::KvmBroken {
        tracing::warn!(
            "/dev/kvm is there but does not boot a guest: machines are emulated, which is slower"
        );
    }
    let remembered = Remembered {
        schema: SCHEMA,
        program: program.clone(),
        verdict: subject.is_some().then(|| verdict.clone()),
        subject,
    };
    if old.as_ref() != Some(&remembered) {
        write(&config.home, &remembered);
    }
    verdict
}

/// Opens the device on a thread of its own, which is left behind when that never ends: a runtime would wait for its own.
async fn opens(
    open: impl FnOnce() -> io::Result<()> + Send + 'static,
    deadline: Duration,
) -> Option<io::Result<()>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let started = std::thread::Builder::new()
        .name("kiln-kvm-probe".to_owned())
        .spawn(move || drop(sender.send(open())));
    if let Err(error) = started {
        return Some(Err(error));
    }
    tokio::time::timeout(deadline, receiver).await.ok()?.ok()
}

async fn find_out(
    config: &QemuConfig,
    program: &Program,
    boot: Option<&BootSource>,
    open: impl FnOnce() -> io::Result<()> + Send + 'static,
    deadlines: Deadlines,
) -> Verdict {
    let device = config.kvm.display();
    match opens(open, deadlines.open).await {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            let why = format!("emulation: {device} cannot be opened ({error})");
            return Verdict::of(Accelerator::Emulation, why);
        }
        None => {
            let waited = deadlines.open;
            let why = format!("emulation: {device} did not open within {waited:?}");
            return Verdict::of(Accelerator::KvmBroken, why);
        }
    }
    let began = Instant::now();
    let booted = match boot {
        Some(boot) => boot_kernel(program, boot, deadlines.boot).await,
        None => run_payload(&config.home, program, deadlines.payload).await,
    };
    match booted {
        Ok(()) => Verdict {
            accelerator: Accelerator::Kvm,
            boot_ms: u64::try_from(began.elapsed().as_millis()).ok(),
            preliminary: boot.is_none(),
            why: match boot {
                Some(_) => "KVM boots guests".to_owned(),
                None => "KVM runs code; no machine image yet to boot a kernel with".to_owned(),
            },
        },
        Err(why) => {
            let why = format!("emulation: {device} is there but does not boot a guest ({why})");
            Verdict::of(Accelerator::KvmBroken, why)
        }
    }
}

fn subject(device: &Path, program: &Program, boot: &BootSource) -> Subject {
    let file = |path: &Path| match fs::metadata(path) {
        Ok(meta) => format!(
            "{} {} {} {}",
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime()
        ),
        Err(_) => String::new(),
    };
    Subject {
        host_boot: proc::boot_id(),
        host_kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        device: fs::metadata(device)
            .map(|m| format!("{:o} {}", m.mode(), m.gid()))
            .unwrap_or_default(),
        program: program.identity.clone(),
        guest_kernel: file(&boot.kernel),
    }
}

/// Model and stepping of the host's CPU, and its microcode: a template of one does not run on another.
pub(crate) fn host_cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let wanted = [
        "vendor_id",
        "cpu family",
        "model\t",
        "model name",
        "stepping",
        "flags",
    ];
    let lines = first
        .lines()
        .filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    let text: Vec<&str> = lines.collect();
    kiln_core::Digest::of(text.join("\n").as_bytes()).short(16)
}

/// Where the host says which clock it trusts.
const HOST_CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// Words for the guest's kernel about its clock. An emulated CPU's time stamp counter is the host's: when the host trusts it, so may the
/// guest. Left to itself the guest's kernel compares it with timer ticks that come late under emulation, gives it up, and from then
/// on every look at the clock is a device access, and in programs a system call.
pub(crate) fn clock_args(accel: Accel) -> &'static [&'static str] {
    let host = fs::read_to_string(HOST_CLOCK).unwrap_or_default();
    clock_args_on(accel, host.trim())
}

fn clock_args_on(accel: Accel, host_clock: &str) -> &'static [&'static str] {
    match (accel, host_clock) {
        (Accel::Tcg, "tsc") => &["tsc=reliable"],
        _ => &[],
    }
}

fn command(program: &Program) -> Command {
    let mut command = Command::new(&program.path);
    command
        .env_clear()
        .current_dir("/")
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-M",
            "pc,usb=off,vmport=off,hpet=off",
        ])
        .args([
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Boots a kernel until it starts its first process.
async fn boot_kernel(
    program: &Program,
    boot: &BootSource,
    deadline: Duration,
) -> Result<(), String> {
    let mut child = command(program)
        .args(["-m", "256M", "-serial", "stdio", "-append"])
        .arg("console=ttyS0 panic=-1 cryptomgr.notests")
        .arg("-kernel")
        .arg(&boot.kernel)
        .arg("-initrd")
        .arg(&boot.initrd)
        .spawn()
        .map_err(|error| error.to_string())?;
    let Some(mut console) = child.stdout.take() else {
        return Err("no console".to_owned());
    };
    let mut seen = Vec::new();
    let watch = async {
        let mut part = [0; 4096];
        loop {
            match console.read(&mut part).await {
                Ok(count) if count > 0 => seen.extend_from_slice(&part[..count]),
                _ => return Err("QEMU ended".to_owned()),
            }
            if seen.windows(PROOF.len()).any(|window| window == PROOF) {
                return Ok(());
            }
            if seen.len() > CONSOLE_MAX {
                return Err("its console says something else".to_owned());
            }
        }
    };
    let result = tokio::time::timeout(deadline, watch).await;
    end(&mut child).await;
    result.unwrap_or_else(|_| {
        let bytes = seen.len();
        Err(format!(
            "no first process within {deadline:?}, {bytes} bytes of console"
        ))
    })
}

/// Kills QEMU; waits for its end, but not for ever.
async fn end(child: &mut tokio::process::Child) {
    if tokio::time::timeout(END_DEADLINE, child.kill())
        .await
        .is_err()
    {
        tracing::warn!(pid = ?child.id(), "a QEMU that was to try KVM does not end");
    }
}

/// Runs a few bytes of 16-bit code at the reset vector: they leave by the debug exit port.
async fn run_payload(home: &Path, program: &Program, deadline: Duration) -> Result<(), String> {
    let path = home.join(proc::partial_name("probe.bin"));
    let made = fs::create_dir_all(home).and_then(|()| fs::write(&path, payload()));
    made.map_err(|error| format!("{}: {error}", path.display()))?;
    let status = command(program)
        .args([
            "-m",
            "16M",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04",
            "-bios",
        ])
        .arg(&path)
        .spawn()
        .map_err(|error| error.to_string());
    let result = match status {
        Ok(mut child) => match tokio::time::timeout(deadline, child.wait()).await {
            Ok(Ok(status)) if status.code() == Some(PAYLOAD_EXIT) => Ok(()),
            Ok(Ok(status)) => Err(format!("QEMU ended with {status}")),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => {
                end(&mut child).await;
                Err(format!(
                    "its first instruction did not run within {deadline:?}"
                ))
            }
        },
        Err(error) => Err(error),
    };
    let _ = fs::remove_file(&path);
    result
}

/// A 64 KiB firmware: at the reset vector (16 bytes below its end) a jump back to `mov dx, 0xf4; mov al, 0x2a; out dx, al; hlt`.
fn payload() -> Vec<u8> {
    const CODE: [u8; 7] = [0xba, 0xf4, 0x00, 0xb0, 0x2a, 0xee, 0xf4];
    const RESET: usize = 0xfff0;
    const CODE_AT: usize = 0xff00;
    let mut image = vec![0xf4; 0x1_0000];
    image[CODE_AT..CODE_AT + CODE.len()].copy_from_slice(&CODE);
    // `jmp rel16`: relative to the next instruction.
    let distance = (CODE_AT as u16)
        .wrapping_sub(RESET as u16 + 3)
        .to_le_bytes();
    image[RESET..RESET + 3].copy_from_slice(&[0xe9, distance[0], distance[1]]);
    image
}

#[cfg(test)]
mod tests;
