//! The initrd: the guest as `/init`, the modules it loads, and their order. Nothing else, so that a new guest
//! needs no new root disk.
//!
//! Layout: `/init`; `/modules/order`, one file name a line; `/modules/<file>`, each ready for `finit_module` with no
//! flags, in that order; empty `/dev`, `/proc`, `/sys`, `/root`. Not compressed: under emulation that is the fastest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::cpio::CpioWriter;

/// Largest guest binary that is accepted.
pub const GUEST_BYTES_MAX: u64 = 64 << 20;
/// Directories made empty, for the guest to mount on.
const DIRECTORIES: [&str; 5] = ["dev", "modules", "proc", "root", "sys"];

/// Why an initrd cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitrdError {
    /// An input cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest binary is not a static program for this architecture.
    #[error("{} cannot be the first program of a machine: {what}", .path.display())]
    Guest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The archive cannot be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes an initrd to `to` from a guest binary and a directory that has `order` and the modules it names.
///
/// # Errors
/// See [`InitrdError`].
pub fn write_initrd(guest: &Path, modules: &Path, to: &Path) -> Result<(), InitrdError> {
    let read = |path: &Path| {
        let fail = |source| InitrdError::Read {
            path: path.to_owned(),
            source,
        };
        fs::read(path).map_err(fail)
    };
    let program = read_guest(guest)?;
    let order = read(&modules.join("order"))?;
    let write = |source| InitrdError::Write {
        path: to.to_owned(),
        source,
    };
    let mut cpio = CpioWriter::new(io::BufWriter::new(fs::File::create(to).map_err(write)?));
    for name in DIRECTORIES {
        cpio.directory(name, 0o755).map_err(write)?;
    }
    cpio.file("init", 0o755, &program).map_err(write)?;
    cpio.file("modules/order", 0o644, &order).map_err(write)?;
    for name in String::from_utf8_lossy(&order).lines() {
        let content = read(&modules.join(name))?;
        cpio.file(&format!("modules/{name}"), 0o644, &content)
            .map_err(write)?;
    }
    cpio.finish().map_err(write)?;
    Ok(())
}

/// Reads a guest binary and checks that a kernel can start it as `/init`: an ELF for x86-64 without an interpreter.
///
/// # Errors
/// When it cannot be read or is something else.
pub fn read_guest(path: &Path) -> Result<Vec<u8>, InitrdError> {
    let read = |source| InitrdError::Read {
        path: path.to_owned(),
        source,
    };
    let refuse = |what| InitrdError::Guest {
        path: path.to_owned(),
        what,
    };
    if fs::metadata(path).map_err(read)?.len() > GUEST_BYTES_MAX {
        return Err(refuse("it is larger than 64 MiB"));
    }
    let bytes = fs::read(path).map_err(read)?;
    match elf_interpreter(&bytes) {
        Some(false) => Ok(bytes),
        Some(true) => Err(refuse("it is not static (it names a dynamic loader)")),
        None => Err(refuse("it is not an ELF program for x86-64")),
    }
}

/// Whether an ELF program for x86-64 names a loader; `None` when the bytes are none. Source: elf(5).
fn elf_interpreter(bytes: &[u8]) -> Option<bool> {
    const MACHINE_X86_64: u16 = 62;
    const SEGMENT_INTERPRETER: u32 = 3;
    let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    if bytes.get(..6)? != b"\x7fELF\x02\x01" || half(18)? != MACHINE_X86_64 {
        return None;
    }
    let table = u64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?);
    let (size, count) = (usize::from(half(54)?), usize::from(half(56)?));
    let table = usize::try_from(table).ok()?;
    for number in 0..count {
        let at = table.checked_add(number.checked_mul(size)?)?;
        let kind = u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?);
        if kind == SEGMENT_INTERPRETER {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The head of an ELF with one segment of this type.
    pub(in crate::bake) fn elf(segment: u32) -> Vec<u8> {
        let mut bytes = vec![0_u8; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64..68].copy_from_slice(&segment.to_le_bytes());
        bytes
    }

    #[test]
    fn only_static_programs_can_be_init() {
        assert_eq!(elf_interpreter(&elf(1)), Some(false));
        assert_eq!(elf_interpreter(&elf(3)), Some(true));
        assert_eq!(elf_interpreter(b"#!/bin/sh"), None);
        let whole = elf(1);
        for cut in 0..whole.len() {
            let _ = elf_interpreter(&whole[..cut]);
        }
    }

    #[test]
    fn the_archive_has_the_guest_and_its_modules_in_order() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let modules = dir.path().join("m");
        fs::create_dir(&modules).expect("writable");
        fs::write(modules.join("order"), "b.ko\na.ko\n").expect("writable");
        fs::write(modules.join("a.ko"), "AAA").expect("writable");
        fs::write(modules.join("b.ko"), "BBB").expect("writable");
        let guest = dir.path().join("guest");
        fs::write(&guest, elf(1)).expect("writable");
        let to = dir.path().join("initrd");
        write_initrd(&guest, &modules, &to).expect("it works");
        let bytes = fs::read(&to).expect("readable");
        let at = |text: &str| {
            bytes
                .windows(text.len())
                .position(|part| part == text.as_bytes())
        };
        assert!(at("init\0") < at("modules/order\0"));
        assert!(at("modules/b.ko\0") < at("modules/a.ko\0"));
        fs::write(&guest, elf(3)).expect("writable");
        assert!(matches!(
            write_initrd(&guest, &modules, &to),
            Err(InitrdError::Guest { .. })
        ));
    }
}
