//! What a simulated guest remembers: everything that a template keeps and a clone inherits.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_core::DiskRole;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::disk::{Files, SimDisk};

/// The guest's memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) boot_id: String,
    pub(super) machine_id: String,
    pub(super) hostname: String,
    /// The kernel's generator: what it gives depends on this and nothing else.
    rng: [u8; 32],
    drawn: u64,
    /// The wall clock, and the moment it was set. Nanoseconds since the Unix epoch.
    wall_ns: u64,
    #[serde(skip)]
    wall_set: Option<tokio::time::Instant>,
    /// The workload may not run.
    pub(super) frozen: bool,
    pub(super) secret_issued: bool,
    pub(super) job_ran: bool,
    pub(super) workload_ran: u64,
    pub(super) buildkit: bool,
    pub(super) oom_kills: u64,
    pub(super) memory_max: u64,
    pub(super) step_env: Vec<(String, String)>,
    /// Files in memory: trees from the host, what commands wrote.
    pub(super) files: Files,
    /// Disks by serial.
    pub(super) disks: BTreeMap<String, SimDisk>,
}

impl Memory {
    /// A guest that was just booted.
    pub(super) fn booted(disks: Vec<SimDisk>) -> Self {
        let fresh = |count: usize| -> String { hex::encode(&random()[..count]) };
        Self {
            boot_id: uuid(random()),
            machine_id: fresh(16),
            hostname: "kiln".to_owned(),
            rng: random(),
            drawn: 0,
            wall_ns: host_wall_ns(),
            wall_set: Some(tokio::time::Instant::now()),
            frozen: false,
            secret_issued: false,
            job_ran: false,
            workload_ran: 0,
            buildkit: false,
            oom_kills: 0,
            memory_max: 0,
            step_env: Vec::new(),
            files: Files::new(),
            disks: disks
                .into_iter()
                .map(|disk| (disk.role.serial().to_owned(), disk))
                .collect(),
        }
    }

    /// Draws from the kernel's generator.
    pub(super) fn draw(&mut self) -> [u8; 32] {
        self.drawn += 1;
        let mut hash = Sha256::new();
        hash.update(self.rng);
        hash.update(self.drawn.to_le_bytes());
        hash.finalize().into()
    }

    /// Mixes entropy in.
    pub(super) fn reseed(&mut self, seed: &[u8]) {
        let mut hash = Sha256::new();
        hash.update(self.rng);
        hash.update(seed);
        self.rng = hash.finalize().into();
        self.drawn = 0;
    }

    /// The wall clock now.
    pub(super) fn wall_ns(&self) -> u64 {
        let since = self.wall_set.map_or(0, |set| set.elapsed().as_nanos());
        self.wall_ns
            .saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }

    pub(super) fn set_wall_ns(&mut self, wall_ns: u64) {
        self.wall_ns = wall_ns;
        self.wall_set = Some(tokio::time::Instant::now());
    }

    /// Fixes the clock before saving: a template's clock stands still.
    pub(super) fn stop_clock(&mut self) {
        self.wall_ns = self.wall_ns();
        self.wall_set = None;
    }

    /// Lets the clock of a clone go on from where its template's stood.
    pub(super) fn start_clock(&mut self) {
        self.wall_set = Some(tokio::time::Instant::now());
    }

    /// Reads a file of the guest, wherever it lies.
    pub(super) fn read(&mut self, path: &str) -> Option<Vec<u8>> {
        match path {
            "/etc/machine-id" => return Some(format!("{}\n", self.machine_id).into_bytes()),
            "/etc/hostname" | "/proc/sys/kernel/hostname" => {
                return Some(format!("{}\n", self.hostname).into_bytes());
            }
            "/proc/sys/kernel/random/boot_id" => {
                return Some(format!("{}\n", self.boot_id).into_bytes());
            }
            "/proc/sys/kernel/random/uuid" => {
                return Some(format!("{}\n", uuid(self.draw())).into_bytes());
            }
            _ => {}
        }
        match self.on_disk(path) {
            Some((serial, inner)) => {
                let disk = self.disks.get(&serial)?;
                disk.mounted.as_ref()?.get(&inner).cloned()
            }
            None => self.files.get(path).cloned(),
        }
    }

    /// Writes a file of the guest; false when its place is read-only.
    pub(super) fn write(&mut self, path: &str, content: Vec<u8>) -> bool {
        if let Some((serial, inner)) = self.on_disk(path) {
            let Some(disk) = self.disks.get_mut(&serial).filter(|disk| disk.writable) else {
                return false;
            };
            if let Some(files) = &mut disk.mounted {
                files.insert(inner, content);
            }
        } else {
            self.files.insert(path.to_owned(), content);
        }
        true
    }

    /// The mounted disk that a path lies on, and the path in it.
    fn on_disk(&self, path: &str) -> Option<(String, String)> {
        self.disks.iter().find_map(|(serial, disk)| {
            let inner = path.strip_prefix(&mount_path(disk.role))?;
            (disk.mounted.is_some() && inner.starts_with('/'))
                .then(|| (serial.clone(), inner.to_owned()))
        })
    }

    /// Bytes that files in memory take.
    pub(super) fn bytes(&self) -> u64 {
        let total: usize = self.files.values().map(Vec::len).sum();
        total as u64
    }
}

/// Where a disk is mounted in the guest.
pub(super) fn mount_path(role: DiskRole) -> String {
    format!("/kiln/{}", role.serial().trim_start_matches("kiln-"))
}

/// A random UUID from 16 random bytes (RFC 9562, version 4).
pub(super) fn uuid(random: [u8; 32]) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&random[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex::encode(bytes);
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

pub(super) fn host_wall_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    #[expect(
        clippy::expect_used,
        reason = "without randomness no machine may be made"
    )]
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}
