//! What the disks of a template stood on when it was taken, so that a clone never gets another file below the same writes.
//!
//! A template's record names what its machine was made of by content; this is the driver's own check that the files are still those.
//! A home that was moved, copied or restored has others: its templates are stale then, and are made again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use kiln_core::machine::DiskAccess;
use kiln_core::{DiskRole, DiskSlot, MachineSpec};
use serde::{Deserialize, Serialize};

/// One disk of a template, as it was asked for, with its backing file's real path and look.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct DiskOrigin {
    slot: DiskSlot,
    file: Option<Mark>,
}

/// How a sealed file is recognised. The device's number is left out: some hosts give it anew at each boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Mark {
    inode: u64,
    size: u64,
    mtime_s: i64,
    mtime_ns: i64,
}

impl Mark {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self {
            inode: meta.ino(),
            size: meta.size(),
            mtime_s: meta.mtime(),
            mtime_ns: meta.mtime_nsec(),
        })
    }
}

impl DiskOrigin {
    /// What this disk stands on now.
    pub(crate) fn of(slot: &DiskSlot) -> io::Result<Self> {
        let mut slot = slot.clone();
        let mut file = None;
        if let Some(backing) = &slot.backing {
            file = Some(Mark::of(backing)?);
            slot.backing = Some(fs::canonicalize(backing)?);
        }
        Ok(Self { slot, file })
    }

    /// What it is for.
    pub(crate) fn role(&self) -> DiskRole {
        self.slot.role
    }

    /// Whether a clone with the disk `now` can start. The writes of a fork name their backing file, so that one has to be
    /// at the same place, too.
    fn fits(&self, now: &Self) -> bool {
        let same = |a: &DiskSlot, b: &DiskSlot| {
            (a.role, a.format, &a.access) == (b.role, b.format, &b.access)
        };
        let placed = self.slot.access == DiskAccess::ReadOnly;
        same(&self.slot, &now.slot)
            && self.file == now.file
            && (placed || self.slot.backing == now.slot.backing)
    }
}

/// The first disk of a template that this machine has not, or has otherwise; in words.
pub(crate) fn first_difference(origins: &[DiskOrigin], spec: &MachineSpec) -> Option<String> {
    origins.iter().find_map(|origin| {
        let role = origin.role();
        let now = spec.disk(role).map(DiskOrigin::of);
        match now {
            None => Some(format!("the machine has no {role:?} disk")),
            Some(Err(error)) => Some(format!("its {role:?} disk: {error}")),
            Some(Ok(now)) if origin.fits(&now) => None,
            Some(Ok(_)) => Some(format!(
                "its {role:?} disk was moved, copied or replaced since"
            )),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::key::tests::spec;
    use super::*;

    #[test]
    fn a_link_is_the_same_a_copy_is_not_and_a_moved_one_only_below_no_writes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("home")).unwrap();
        fs::write(at("home/disk"), b"content").unwrap();
        std::os::unix::fs::symlink(at("home"), at("link")).unwrap();
        let mut spec = spec();
        for access in [DiskAccess::ReadOnly, DiskAccess::Fork] {
            spec.disks[0].access = access.clone();
            let mut differs = |origins: &[DiskOrigin], path: &str| {
                spec.disks[0].backing = Some(at(path));
                first_difference(origins, &spec)
            };
            let slot = DiskSlot {
                backing: Some(at("link/disk")),
                ..self::spec_disk(&access)
            };
            let origins = [DiskOrigin::of(&slot).unwrap()];
            assert_eq!(differs(&origins, "home/disk"), None);
            assert_eq!(differs(&origins, "link/disk"), None);
            fs::copy(at("home/disk"), at("copy")).unwrap();
            assert!(differs(&origins, "copy").is_some());
            assert!(differs(&origins, "gone").is_some());
            fs::rename(at("home"), at("moved")).unwrap();
            let moved = differs(&origins, "moved/disk");
            assert_eq!(moved.is_none(), access == DiskAccess::ReadOnly, "{moved:?}");
            fs::rename(at("moved"), at("home")).unwrap();
        }
        spec.disks.clear();
        let slot = spec_disk(&DiskAccess::New {
            size: kiln_core::ByteSize(1),
        });
        let origins = [DiskOrigin::of(&slot).unwrap()];
        assert!(first_difference(&origins, &spec).is_some(), "no such role");
    }

    fn spec_disk(access: &DiskAccess) -> DiskSlot {
        DiskSlot {
            access: access.clone(),
            backing: None,
            ..spec().disks[0].clone()
        }
    }
}
