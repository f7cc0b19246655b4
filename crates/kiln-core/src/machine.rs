//! What a machine is made of. It knows nothing of jobs, tenants or builds.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, Digest, MachineName};

/// What a disk is for. A driver decides how it gets there: re-pointed, hot-plugged or attached cold.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskRole {
    /// The machine image's root disk: shared, read-only.
    Root,
    /// BuildKit's store: a copy-on-write fork of a head.
    State,
    /// Empty space for this machine alone.
    Scratch,
    /// Sources as a read-only disk.
    Source,
    /// An unpacked container image, read-only.
    Image,
    /// As [`Self::Image`], of the first service beside the command.
    Service1,
    /// Of the second service.
    Service2,
    /// Of the third service.
    Service3,
    /// Of the fourth service.
    Service4,
}

impl DiskRole {
    /// Disks of services, the first place first.
    pub const SERVICES: [Self; 4] = [
        Self::Service1,
        Self::Service2,
        Self::Service3,
        Self::Service4,
    ];

    /// The disk of a service's place, from 1.
    #[must_use]
    pub fn service(place: u8) -> Option<Self> {
        Self::SERVICES
            .get(usize::from(place).checked_sub(1)?)
            .copied()
    }

    /// The disk's serial number as the guest sees it in `/sys/block/*/serial` (at most 20 bytes).
    #[must_use]
    pub fn serial(self) -> &'static str {
        match self {
            Self::Root => "kiln-root",
            Self::State => "kiln-state",
            Self::Scratch => "kiln-scratch",
            Self::Source => "kiln-source",
            Self::Image => "kiln-image",
            Self::Service1 => "kiln-service1",
            Self::Service2 => "kiln-service2",
            Self::Service3 => "kiln-service3",
            Self::Service4 => "kiln-service4",
        }
    }
}

/// Format of a disk file. Always explicit: a driver never probes a format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// QEMU copy-on-write.
    Qcow2,
}

/// How a machine may use a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "access")]
pub enum DiskAccess {
    /// Shared by any number of machines.
    ReadOnly,
    /// Writes go to a new overlay that dies with the machine, unless the caller takes it first.
    Fork,
    /// A new empty disk of this size that dies with the machine.
    New {
        /// Size in bytes, allocated as it is written.
        size: ByteSize,
    },
}

/// One disk of a machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskSlot {
    /// What it is for; at most one disk per role.
    pub role: DiskRole,
    /// The file behind it; `None` for a new disk.
    pub backing: Option<PathBuf>,
    /// Format of `backing`.
    pub format: DiskFormat,
    /// How it may be used.
    #[serde(flatten)]
    pub access: DiskAccess,
}

/// What to boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BootSource {
    /// Linux kernel (bzImage).
    pub kernel: PathBuf,
    /// Initial RAM disk with `kiln-guest` as `/init`.
    pub initrd: PathBuf,
    /// Kernel arguments beyond the driver's own.
    pub args: Vec<String>,
    /// One digest over kernel, initrd and root disk: the machine image's identity.
    pub image: Digest,
}

/// Everything a driver needs to start one machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Unique on this host; names every resource of the machine.
    pub name: MachineName,
    /// Virtual CPUs, at least 1.
    pub cpus: u32,
    /// Guest memory.
    pub memory: ByteSize,
    /// What to boot.
    pub boot: BootSource,
    /// Disks, at most one per role.
    pub disks: Vec<DiskSlot>,
    /// How long from start to a guest that said hello, in milliseconds.
    pub boot_timeout_ms: u64,
    /// Whether the machine can be kept: then it may outlive the process that started it, from the moment in which that says so. Otherwise it
    /// ends with its owner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keepable: bool,
    /// CPUs of the host that are this machine's alone, by the kernel's numbers; none means that it shares those that are nobody's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_cpus: Vec<u32>,
    /// Bytes per second, read and written, that the disks which the guest may write have together, those that are added later as well;
    /// none means no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_second: Option<std::num::NonZeroU64>,
}

impl MachineSpec {
    /// The disk of a role.
    #[must_use]
    pub fn disk(&self, role: DiskRole) -> Option<&DiskSlot> {
        self.disks.iter().find(|disk| disk.role == role)
    }
}
