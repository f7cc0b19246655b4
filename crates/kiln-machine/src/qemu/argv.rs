//! QEMU's arguments as a pure function of what a machine is made of.
//!
//! The device tree is the same for a cold machine and a clone of its template: same devices, same addresses.
//! No default device, no monitor but the private control socket, no format ever guessed, no path that QEMU has to open:
//! files are descriptors it inherits.

use std::ffi::OsString;
use std::num::NonZeroU64;
use std::os::fd::RawFd;

use kiln_core::machine::DiskFormat;
use kiln_core::{ByteSize, DiskRole};
use serde_json::{Value, json};

/// `pc`: its one PCI bus takes new disks while the guest runs, without bridges that a boot would have to scan. No USB, no
/// SMBus, no VMware port, no HPET: nobody in a machine needs them.
const MACHINE_TYPE: &str =
    "pc,usb=off,smbus=off,vmport=off,hpet=off,dump-guest-core=off,memory-backend=ram";
/// Translated code is kept up to this many MiB; the memory is only touched as code is translated.
const TRANSLATION_MIB: u32 = 256;
/// Without privileges, child processes or changes of scheduling.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Kernel arguments of every cold boot, after the image's own so that they win. A panic resets at once, and a reset ends the machine;
/// log level 1 lets the panic's words through, 0 would not. Self tests of the kernel's ciphers and the
/// patching of locks cost 0.6 s without KVM. A host that is busy for a moment must not look like a broken timer: the kernel's check of
/// it panics then (seen), and is of no use in a machine that QEMU made.
const KERNEL_ARGS: &str =
    "console=ttyS0 panic=-1 quiet loglevel=1 cryptomgr.notests noreplace-smp no_timer_check";
/// Name of the channel's port in the guest.
pub(crate) const PORT_NAME: &str = "kiln.channel";
/// First slot of the PCI bus that is used for disks.
const DISK_SLOT_FIRST: u32 = 8;

/// How guest code is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Accel {
    /// Hardware. The device's descriptor set, where QEMU can take it that way.
    Kvm {
        /// Number of the set; without one QEMU opens `/dev/kvm` itself.
        set: Option<u32>,
    },
    /// Translation.
    Tcg,
}

impl Accel {
    /// The CPU model. Without KVM, five-level page tables (`la57`) cost every miss, and a guest that is told of fast string instructions
    /// copies and clears everything with them: each byte is then a round of its own, where other ways take 8 to 32 at a time.
    pub(crate) fn cpu_model(self) -> &'static str {
        match self {
            Self::Kvm { .. } => "host",
            Self::Tcg => "max,la57=off,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off",
        }
    }

    /// For keys and messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm { .. } => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What to do once QEMU is up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Wake {
    /// Boot this kernel.
    Boot {
        /// Kernel, readable.
        kernel: RawFd,
        /// Initial RAM disk, readable.
        initrd: RawFd,
        /// Arguments beyond [`KERNEL_ARGS`].
        args: Vec<String>,
    },
    /// Wait for the state of a template.
    Incoming,
}

/// Node and group of everything that is bounded in its rate.
const RATE_GROUP: &str = "disks";
/// For at most so many seconds the disks may take this many times their rate: what starts is quick, what goes on is not.
const BURST: u64 = 2;
const BURST_SECONDS: u64 = 1;
/// Most that QEMU counts, bytes per second.
const RATE_MOST: u64 = 1_000_000_000_000_000;

/// A disk whose files are open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct DiskNodes {
    /// What it is for.
    pub(crate) role: DiskRole,
    /// Its files, top first: format and number of the descriptor set.
    pub(crate) files: Vec<(DiskFormat, u32)>,
    /// Whether the guest may write.
    pub(crate) writable: bool,
    /// Whether it has its part of the machine's rate, and waits for it.
    pub(crate) rated: bool,
}

/// Everything the arguments depend on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Machine {
    /// Name of the process; has the machine's token.
    pub(crate) name: String,
    /// Accelerator.
    pub(crate) accel: Accel,
    /// Virtual CPUs.
    pub(crate) cpus: u32,
    /// Guest memory.
    pub(crate) memory: ByteSize,
    /// Guest RAM: a file.
    pub(crate) ram: RawFd,
    /// Whether writes to RAM go to the file. False: they stay this machine's own.
    pub(crate) ram_shared: bool,
    /// Connected control socket; a listening one when kept.
    pub(crate) control: RawFd,
    /// Listening socket of the channel.
    pub(crate) channel: RawFd,
    /// Connected socket that takes the serial console; a listening one when kept.
    pub(crate) console: RawFd,
    /// Another owner may connect later.
    pub(crate) kept: bool,
    /// Bytes per second of all disks that are rated together.
    pub(crate) disk_rate: Option<NonZeroU64>,
    /// Cold disks.
    pub(crate) disks: Vec<DiskNodes>,
    /// Descriptor to add to each set: (descriptor, set).
    pub(crate) sets: Vec<(RawFd, u32)>,
    /// Boot or wait.
    pub(crate) wake: Wake,
}

/// The arguments, without the program.
pub(crate) fn arguments(machine: &Machine) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::with_capacity(64);
    let mut put = |flag: &str, value: String| {
        out.push(flag.into());
        out.push(value.into());
    };
    put("-name", machine.name.clone());
    put("-sandbox", SANDBOX.into());
    put("-display", "none".into());
    put("-M", MACHINE_TYPE.into());
    for (fd, set) in &machine.sets {
        put("-add-fd", format!("fd={fd},set={set}"));
    }
    put("-accel", accelerator(machine.accel));
    put("-cpu", machine.accel.cpu_model().into());
    put("-smp", machine.cpus.to_string());
    put("-m", format!("{}M", machine.memory.as_mib()));
    put("-object", memory(machine));
    put_ports(machine, &mut put);
    if let Some(rate) = machine.disk_rate {
        put("-object", rate_group(rate).to_string());
    }
    for disk in &machine.disks {
        for node in block_nodes(disk) {
            put("-blockdev", node.to_string());
        }
        put("-device", block_device(disk).to_string());
    }
    match &machine.wake {
        Wake::Boot {
            kernel,
            initrd,
            args,
        } => {
            put("-kernel", format!("/proc/self/fd/{kernel}"));
            put("-initrd", format!("/proc/self/fd/{initrd}"));
            let line = args.iter().map(String::as_str).chain([KERNEL_ARGS]);
            put("-append", line.collect::<Vec<_>>().join(" "));
        }
        Wake::Incoming => put("-incoming", "defer".into()),
    }
    // The process stays after the guest's end until it was asked why and told to quit: nothing is lost.
    out.extend(
        [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-no-shutdown",
        ]
        .map(Into::into),
    );
    out
}

fn accelerator(accel: Accel) -> String {
    match accel {
        Accel::Kvm { set: None } => "kvm".to_owned(),
        Accel::Kvm { set: Some(set) } => format!("kvm,device=/dev/fdset/{set}"),
        Accel::Tcg => format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}"),
    }
}

fn memory(machine: &Machine) -> String {
    let (size, fd) = (machine.memory.0, machine.ram);
    let sharing = match machine.ram_shared {
        true => "share=on",
        false => "share=off,readonly=on,rom=off",
    };
    format!("memory-backend-file,id=ram,size={size},mem-path=/proc/self/fd/{fd},{sharing}")
}

/// What the rated disks share: reads and writes count alike.
fn rate_group(rate: NonZeroU64) -> Value {
    let rate = rate.get().min(RATE_MOST / BURST);
    json!({
        "qom-type": "throttle-group",
        "id": RATE_GROUP,
        "limits": {
            "bps-total": rate,
            "bps-total-max": rate * BURST,
            "bps-total-max-length": BURST_SECONDS,
        },
    })
}

/// Control socket, console, channel, and the signal of a clone.
fn put_ports(machine: &Machine, put: &mut impl FnMut(&str, String)) {
    let socket = |id: &str, fd: RawFd, listens: bool| match listens {
        true => format!("socket,id={id},fd={fd},server=on,wait=off"),
        false => format!("socket,id={id},fd={fd}"),
    };
    put("-chardev", socket("control", machine.control, machine.kept));
    put("-mon", "chardev=control,mode=control".into());
    put("-chardev", socket("console", machine.console, machine.kept));
    put("-serial", "chardev:console".into());
    put("-chardev", socket("channel", machine.channel, true));
    put(
        "-device",
        "virtio-serial-pci,id=ports,addr=3,max_ports=2".into(),
    );
    put(
        "-device",
        format!("virtserialport,bus=ports.0,chardev=channel,name={PORT_NAME},nr=1"),
    );
    if matches!(machine.accel, Accel::Kvm { .. }) {
        // Tells a cloned kernel by itself what the new identity does for certain. Its notification is byte code that the guest
        // interprets: a tenth of a clone's start when the guest is translated, nothing with hardware.
        put("-device", "vmgenid,guid=auto".into());
    }
}

fn role_name(role: DiskRole) -> &'static str {
    role.serial().trim_start_matches("kiln-")
}

/// Id of a role's device.
pub(crate) fn device_id(role: DiskRole) -> String {
    format!("disk-{}", role_name(role))
}

/// Block nodes of a disk, in the order in which they are added: the lowest file first.
pub(crate) fn block_nodes(disk: &DiskNodes) -> Vec<Value> {
    let name = role_name(disk.role);
    let mut nodes = Vec::with_capacity(disk.files.len() * 2);
    for (depth, (format, set)) in disk.files.iter().enumerate().rev() {
        let read_only = depth > 0 || !disk.writable;
        // A machine's own overlay dies with the machine: the guest's flushes need not reach the host's disk.
        let common = json!({
            "read-only": read_only, "auto-read-only": false,
            "discard": if read_only { "ignore" } else { "unmap" },
            "cache": { "direct": false, "no-flush": true },
        });
        let mut file = common.clone();
        file["driver"] = "file".into();
        file["node-name"] = format!("{name}{depth}file").into();
        file["filename"] = format!("/dev/fdset/{set}").into();
        nodes.push(file);
        let mut node = common;
        node["node-name"] = format!("{name}{depth}").into();
        node["file"] = format!("{name}{depth}file").into();
        match format {
            DiskFormat::Raw => node["driver"] = "raw".into(),
            DiskFormat::Qcow2 => {
                node["driver"] = "qcow2".into();
                node["backing"] = match depth + 1 < disk.files.len() {
                    true => format!("{name}{}", depth + 1).into(),
                    false => Value::Null,
                };
            }
        }
        nodes.push(node);
    }
    if disk.rated {
        nodes.push(json!({
            "driver": "throttle",
            "node-name": device_node(disk),
            "file": format!("{name}0"),
            "throttle-group": RATE_GROUP,
            "read-only": !disk.writable, "auto-read-only": false,
            "discard": if disk.writable { "unmap" } else { "ignore" },
            "cache": { "direct": false, "no-flush": true },
        }));
    }
    nodes
}

/// The node that the device of a disk reads and writes.
fn device_node(disk: &DiskNodes) -> String {
    let name = role_name(disk.role);
    match disk.rated {
        true => format!("{name}rated"),
        false => format!("{name}0"),
    }
}

/// The device of a disk. An error of the host's disk stops the guest instead of reaching it.
pub(crate) fn block_device(disk: &DiskNodes) -> Value {
    json!({
        "driver": "virtio-blk-pci",
        "id": device_id(disk.role),
        "drive": device_node(disk),
        "serial": disk.role.serial(),
        "bus": "pci.0",
        "addr": format!("0x{:x}", DISK_SLOT_FIRST + slot(disk.role)),
        "num-queues": 1,
        "werror": "stop",
        "rerror": "stop",
    })
}

/// Each role has its own slot, so that a disk is at the same address whether it was there from the start or added.
fn slot(role: DiskRole) -> u32 {
    match role {
        DiskRole::Root => 0,
        DiskRole::State => 1,
        DiskRole::Scratch => 2,
        DiskRole::Source => 3,
        DiskRole::Image => 4,
        DiskRole::Service1 => 5,
        DiskRole::Service2 => 6,
        DiskRole::Service3 => 7,
        DiskRole::Service4 => 8,
    }
}

#[cfg(test)]
mod tests;
