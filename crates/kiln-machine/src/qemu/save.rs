//! A machine as files: device state, memory and frozen disks, and back.
//!
//! What the driver keeps in a template's directory (`machine.json`, `state`, `ram`, `disk-<role>.qcow2`) is opaque to everybody else;
//! names, locks and digests are [`crate::template`]'s. Memory is copied from the machine's anonymous memory into a sparse file:
//! pages of zeros are left out, so that clones share the host's zero page instead of reading a disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kiln_core::{ByteSize, DiskRole, MachineSpec};
use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::argv::Accel;
use super::disks;
use super::launch_error;
use super::machine::{CONTROL_DEADLINE, END_DEADLINE, QemuMachine, Ram};
use super::program::Program;
use super::status::Migration;
use crate::driver::{LaunchError, MachineError, MachineState, StopReason, TemplateRef};
use crate::template::{self, DiskOrigin, TemplateError, first_difference};

/// Version of `machine.json`.
const SCHEMA: u32 = 2;
/// Longest time in which device state (below a megabyte) is written.
const SAVE_DEADLINE: Duration = Duration::from_secs(60);
/// How long a guest may take to come to rest after its host hung up; one that does not is saved as it is.
const REST_DEADLINE: Duration = Duration::from_secs(3);
/// Pause between two looks whether it did: nothing tells.
const REST_LOOK: Duration = Duration::from_millis(200);
/// At rest is whoever had the CPU for at most this part of the pause ...
const REST_PART: u32 = 10;
/// ... so many times in a row: a kernel's usual timers run within half a second.
const REST_LOOKS: u32 = 3;
/// Bytes of memory copied at once.
const COPY_BYTES: usize = 1 << 20;
/// A page of the guest.
const PAGE: usize = 4096;
const META_FILE: &str = "machine.json";
const STATE_FILE: &str = "state";
const RAM_FILE: &str = "ram";

/// What a clone must have in common with its template.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Meta {
    schema: u32,
    cpus: u32,
    memory: ByteSize,
    accelerator: String,
    /// The QEMU that wrote the state; only this one reads it.
    vmm: String,
    /// Disks that were attached, and what they stood on.
    disks: Vec<DiskOrigin>,
}

/// Device state alone: memory is a file of its own.
pub(crate) fn migration_features() -> Value {
    json!({ "capabilities": [
        { "capability": "x-ignore-shared", "state": true },
        { "capability": "events", "state": true },
    ]})
}

/// Stops the machine and writes it into the target's directory, which exists and is empty.
pub(crate) async fn save(machine: &QemuMachine, target: &TemplateRef) -> Result<(), MachineError> {
    let own = match &machine.body.ram {
        Ram::Own(own) => own,
        Ram::Clone => return Err(MachineError::Unsupported("a template of a clone")),
        Ram::Adopted => {
            return Err(MachineError::Unsupported(
                "a template of an adopted machine",
            ));
        }
    };
    match machine.status.state() {
        MachineState::Running => machine.status.advance(MachineState::Saving),
        MachineState::Stopped(reason) => return Err(MachineError::Stopped(reason)),
        _ => {
            return Err(MachineError::Unsupported(
                "a template of a machine that does not run yet",
            ));
        }
    }
    machine.hang_up();
    come_to_rest(machine).await;
    write_state(machine, &target.dir.join(STATE_FILE)).await?;
    machine.status.set_reason(StopReason::Saved);
    // Quitting closes the disks in order; an answer may not come any more.
    let _ = machine.qmp.send("quit", Value::Null, None).await;
    if machine.status.stopped_within(END_DEADLINE).await.is_none() {
        machine.status.kill(StopReason::VmmDied);
        return Err(MachineError::Timeout {
            what: "quit",
            deadline: END_DEADLINE,
        });
    }
    let ram = own
        .file
        .try_clone()
        .map_err(machine_error("share", &target.dir))?;
    let origins: io::Result<Vec<_>> = machine
        .disks()
        .iter()
        .map(|disk| DiskOrigin::of(&disk.slot))
        .collect();
    let meta = Meta {
        schema: SCHEMA,
        cpus: own.cpus,
        memory: own.size,
        accelerator: own.accel.name().to_owned(),
        vmm: own.vmm.clone(),
        disks: origins.map_err(machine_error("look at the disks of", &target.dir))?,
    };
    let overlays: Vec<_> = machine
        .disks()
        .iter()
        .filter_map(|disk| Some((disk.overlay()?.to_owned(), disk.slot.role)))
        .collect();
    let dir = target.dir.clone();
    let written = tokio::task::spawn_blocking(move || write_files(&dir, &ram, &meta, &overlays));
    written
        .await
        .unwrap_or_else(|error| Err(machine_error("write", &target.dir)(io::Error::other(error))))
}

/// Waits until the guest does nothing any more: what it still has to do when it is saved, every clone does before it hears its host.
async fn come_to_rest(machine: &QemuMachine) {
    let end = Instant::now() + REST_DEADLINE;
    let (mut last, mut quiet) = (cpu_time(machine.body.pid), 0);
    while let Some(before) = last
        && quiet < REST_LOOKS
        && Instant::now() < end
    {
        tokio::time::sleep(REST_LOOK).await;
        last = cpu_time(machine.body.pid);
        let rests = last.is_some_and(|now| now.saturating_sub(before) <= REST_LOOK / REST_PART);
        quiet = if rests { quiet + 1 } else { 0 };
    }
}

/// CPU time of all threads of a process (proc(5), `schedstat`).
fn cpu_time(pid: u32) -> Option<Duration> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        sum += text.split(' ').next()?.parse::<u64>().ok()?;
    }
    Some(Duration::from_nanos(sum))
}

async fn write_state(machine: &QemuMachine, path: &Path) -> Result<(), MachineError> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(machine_error("make", path))?;
    let set = machine.next_set.fetch_add(1, Ordering::Relaxed);
    let arguments = json!({ "fdset-id": set });
    let added = machine
        .qmp
        .call_with_fd("add-fd", arguments, Some(file.as_fd()), CONTROL_DEADLINE);
    added
        .await
        .map_err(|error| machine.control_error("add-fd", error))?;
    machine
        .control("migrate-set-capabilities", migration_features())
        .await?;
    machine.control("stop", Value::Null).await?;
    machine
        .control(
            "migrate",
            json!({ "uri": format!("file:/dev/fdset/{set}") }),
        )
        .await?;
    match tokio::time::timeout(SAVE_DEADLINE, machine.status.migrated()).await {
        Ok(Migration::Completed) => Ok(()),
        Ok(_) => {
            let answer = machine.control("query-migrate", Value::Null).await?;
            let why = answer["error-desc"].as_str().unwrap_or("no reason given");
            Err(MachineError::Control {
                command: "migrate".to_owned(),
                why: why.to_owned(),
            })
        }
        Err(_) => Err(MachineError::Timeout {
            what: "migrate",
            deadline: SAVE_DEADLINE,
        }),
    }
}

fn write_files(
    dir: &Path,
    ram: &OwnedFd,
    meta: &Meta,
    overlays: &[(PathBuf, DiskRole)],
) -> Result<(), MachineError> {
    let path = dir.join(RAM_FILE);
    copy_memory(ram, &path, meta.memory.0).map_err(machine_error("write memory to", &path))?;
    for (overlay, role) in overlays {
        let target = dir.join(disks::file_name(*role));
        move_file(overlay, &target).map_err(machine_error("move a disk to", &target))?;
    }
    let path = dir.join(META_FILE);
    let text = serde_json::to_vec_pretty(meta).map_err(io::Error::from);
    text.and_then(|text| fs::write(&path, text))
        .map_err(machine_error("write", &path))?;
    seal(dir).map_err(machine_error("seal", dir))
}

/// Nobody writes to a template any more; any VMM may read what it is handed by descriptor. The directory keeps others out.
fn seal(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        fs::set_permissions(entry?.path(), fs::Permissions::from_mode(0o444))?;
    }
    Ok(())
}

/// A rename, or a copy where the home spans filesystems.
fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            fs::copy(from, to)?;
            fs::remove_file(from)
        }
        other => other,
    }
}

/// Copies memory into a sparse file, pages of zeros left out.
fn copy_memory(memory: &OwnedFd, path: &Path, size: u64) -> io::Result<()> {
    let memory = File::from(memory.try_clone()?);
    let out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    out.set_len(size)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Some(start) = next_data(&memory, at)? {
        let start = start - start % PAGE as u64;
        let end = rustix::fs::seek(&memory, SeekFrom::Hole(start))?.min(size);
        at = start;
        while at < end {
            let want = usize::try_from((end - at).min(COPY_BYTES as u64)).unwrap_or(COPY_BYTES);
            let part = &mut buffer[..want];
            memory.read_exact_at(part, at)?;
            write_pages(&out, part, at)?;
            at += want as u64;
        }
    }
    (&out).flush()
}

fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some(start)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes runs of pages that are not all zeros.
fn write_pages(out: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut run: Option<usize> = None;
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        let start = index * PAGE;
        match (is_zero(page), run) {
            (false, None) => run = Some(start),
            (true, Some(from)) => {
                out.write_all_at(&bytes[from..start], at + from as u64)?;
                run = None;
            }
            _ => {}
        }
    }
    match run {
        Some(from) => out.write_all_at(&bytes[from..], at + from as u64),
        None => Ok(()),
    }
}

/// A template that a clone is being made from. Holding it keeps it from being pruned.
#[derive(Debug)]
pub(crate) struct SavedMachine {
    template: TemplateRef,
    lock: File,
    meta: Meta,
}

/// Opens a template for a clone.
pub(crate) fn open(template: &TemplateRef) -> Result<SavedMachine, LaunchError> {
    let damaged = |why: String| LaunchError::Template {
        key: template.key.clone(),
        why,
    };
    let lock = template::lock_for_use(template).map_err(|error| match error {
        TemplateError::Io {
            action,
            path,
            source,
        } => LaunchError::Io {
            action,
            path,
            source,
        },
        other => damaged(other.to_string()),
    })?;
    let text =
        fs::read(template.dir.join(META_FILE)).map_err(|e| damaged(format!("{META_FILE}: {e}")))?;
    let meta: Meta =
        serde_json::from_slice(&text).map_err(|e| damaged(format!("{META_FILE}: {e}")))?;
    if meta.schema != SCHEMA {
        return Err(damaged(format!("{META_FILE} has version {}", meta.schema)));
    }
    Ok(SavedMachine {
        template: template.clone(),
        lock,
        meta,
    })
}

impl SavedMachine {
    /// Why this machine cannot be a clone of it; `None` when it can.
    pub(crate) fn difference(
        &self,
        spec: &MachineSpec,
        accel: Accel,
        program: &Program,
    ) -> Option<String> {
        let meta = &self.meta;
        if (meta.cpus, meta.memory) != (spec.cpus, spec.memory) {
            Some("it was made for another size".to_owned())
        } else if meta.accelerator != accel.name() || meta.vmm != program.identity {
            Some("another QEMU or accelerator wrote it".to_owned())
        } else {
            first_difference(&meta.disks, spec)
        }
    }

    /// As [`Self::difference`], as a launch's error.
    pub(crate) fn check(
        &self,
        spec: &MachineSpec,
        accel: Accel,
        program: &Program,
    ) -> Result<(), LaunchError> {
        match self.difference(spec, accel, program) {
            Some(why) => Err(LaunchError::Template {
                key: self.template.key.clone(),
                why,
            }),
            None => Ok(()),
        }
    }

    /// `None`: the template lacks the role. `Some(None)`: it has it, and nothing of its own to overlay.
    pub(crate) fn frozen(&self, role: DiskRole) -> Option<Option<PathBuf>> {
        self.meta
            .disks
            .iter()
            .any(|disk| disk.role() == role)
            .then(|| {
                let path = self.template.dir.join(disks::file_name(role));
                disks::is_regular(&path).then_some(path)
            })
    }

    pub(crate) fn open_ram(&self) -> Result<File, LaunchError> {
        let path = self.template.dir.join(RAM_FILE);
        let file = File::open(&path).map_err(launch_error("open", &path))?;
        let len = file.metadata().map_err(launch_error("read", &path))?.len();
        if len == self.meta.memory.0 {
            return Ok(file);
        }
        let why = format!(
            "its memory file has {len} bytes instead of {}",
            self.meta.memory.0
        );
        Err(LaunchError::Template {
            key: self.template.key.clone(),
            why,
        })
    }

    pub(crate) fn open_state(&self) -> Result<File, LaunchError> {
        let path = self.template.dir.join(STATE_FILE);
        File::open(&path).map_err(launch_error("open", &path))
    }

    pub(crate) fn into_lock(self) -> File {
        self.lock
    }
}

fn machine_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> MachineError + 'a {
    move |source| MachineError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn memory_is_copied_without_its_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let memory = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        let size = 8 << 20;
        memory.set_len(size).unwrap();
        memory.write_all_at(b"first", 0).unwrap();
        memory.write_all_at(&vec![0; 1 << 20], 1 << 20).unwrap();
        memory.write_all_at(b"edge", (3 << 20) - 2).unwrap();
        memory.write_all_at(b"last", size - 4).unwrap();
        let path = dir.path().join("ram");
        copy_memory(&memory.try_clone().unwrap().into(), &path, size).unwrap();
        let mut want = vec![0; 8 << 20];
        memory.read_exact_at(&mut want, 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), want);
        let used = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(used <= 64 * 1024, "{used} bytes on disk");
    }
}
