//! Templates of simulated machines: the guest's memory as JSON, and the disks frozen with it.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use kiln_core::{DiskSlot, MachineSpec};
use serde::{Deserialize, Serialize};

use super::disk::{SimDisk, file_name};
use super::memory::Memory;
use crate::driver::{LaunchError, SpecRefused, TemplateRef};
use crate::template::{DiskOrigin, first_difference, lock_for_use};

const MEMORY_FILE: &str = "memory.json";
const SCHEMA: u32 = 2;

#[derive(Serialize, Deserialize)]
struct Saved {
    schema: u32,
    key: String,
    disks: Vec<DiskOrigin>,
    memory: Memory,
}

/// Fills a template's directory. Who asked makes it appear whole: see `crate::template`.
pub(super) fn save(memory: &Memory, slots: &[DiskSlot], target: &TemplateRef) -> io::Result<()> {
    let mut memory = memory.clone();
    memory.stop_clock();
    for disk in memory.disks.values_mut().filter(|disk| disk.writable) {
        disk.flush()?;
        let name = file_name(disk.role);
        fs::copy(&disk.file, target.dir.join(&name))?;
        disk.file = name.into();
    }
    let saved = Saved {
        schema: SCHEMA,
        key: target.key.clone(),
        disks: slots
            .iter()
            .map(DiskOrigin::of)
            .collect::<io::Result<_>>()?,
        memory,
    };
    fs::write(target.dir.join(MEMORY_FILE), serde_json::to_vec(&saved)?)
}

/// Marks a template as used.
pub(super) fn lock(template: &TemplateRef) -> Result<File, LaunchError> {
    lock_for_use(template).map_err(|error| LaunchError::Template {
        key: template.key.clone(),
        why: error.to_string(),
    })
}

/// What a template holds, if it is one of this machine.
fn open(template: &TemplateRef, spec: &MachineSpec) -> Result<Saved, String> {
    let bytes = fs::read(template.dir.join(MEMORY_FILE)).map_err(|error| error.to_string())?;
    let saved: Saved = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if saved.schema != SCHEMA || saved.key != template.key {
        return Err("it was made for another key or version".to_owned());
    }
    match first_difference(&saved.disks, spec) {
        Some(why) => Err(why),
        None => Ok(saved),
    }
}

/// Whether a machine can be a clone of this template.
pub(super) fn check(template: &TemplateRef, spec: &MachineSpec) -> Result<(), SpecRefused> {
    open(template, spec).map(drop).map_err(SpecRefused::Stale)
}

/// The memory of a clone, with its own copy of the template's disks in `dir`.
pub(super) fn restore(
    template: &TemplateRef,
    spec: &MachineSpec,
    dir: &Path,
) -> Result<Memory, LaunchError> {
    let unusable = |why: String| LaunchError::Template {
        key: template.key.clone(),
        why,
    };
    let mut memory = open(template, spec).map_err(unusable)?.memory;
    for disk in memory.disks.values_mut() {
        own_copy(disk, template, dir).map_err(|error| unusable(error.to_string()))?;
    }
    memory.start_clock();
    Ok(memory)
}

fn own_copy(disk: &mut SimDisk, template: &TemplateRef, dir: &Path) -> io::Result<()> {
    if disk.writable {
        let own = dir.join(file_name(disk.role));
        fs::copy(template.dir.join(file_name(disk.role)), &own)?;
        disk.file = own;
    }
    Ok(())
}
