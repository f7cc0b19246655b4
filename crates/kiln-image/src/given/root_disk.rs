//! A root disk that somebody gives: a raw image of one ext4 file system, clean, of features that a machine's kernel mounts.
//!
//! Source: Documentation/filesystems/ext4/super.rst. The host looks at the superblock and computes a digest; it never mounts the image and
//! never writes to it. Machines have it read-only.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use kiln_core::{ByteSize, Digest};

use crate::sealed::digest_of;

use super::{Opened, Refused, Stamp, half, known, open, shown, word};

/// Largest root disk that is taken.
pub const ROOT_DISK_MAX: ByteSize = ByteSize::gib(64);
/// Bytes of a disk's sectors.
const SECTOR: u64 = 512;
/// Bytes that are looked at: beyond the superblock as far as other file systems have their names.
const START: usize = 0x10100;
/// Where the superblock lies.
const SUPERBLOCK: usize = 1024;
/// Length of a superblock.
const SUPERBLOCK_LEN: usize = 1024;
/// How an ext4 disk is made.
const MAKE_HINT: &str = "make a raw ext4 image, for example: mke2fs -t ext4 -d FOLDER disk.img 2G";

/// Features that a machine's kernel must know to mount it at all, and does: files with types, extents, 64 bits, checksums of any seed, and
/// so on. Others are refused by name or number.
const INCOMPATIBLE_KNOWN: u32 =
    0x2 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000;
/// There is a journal that must be replayed: the file system was not unmounted.
const RECOVER: u32 = 0x4;
/// It is a journal of another file system.
const JOURNAL_DEVICE: u32 = 0x8;
/// It has a journal.
const HAS_JOURNAL: u32 = 0x4;

/// A root disk, open: what the machine gets is what was looked at, whatever its name leads to by then.
#[derive(Debug)]
pub struct RootDisk {
    /// Its file's name.
    pub name: String,
    /// Digest of the file.
    pub digest: Digest,
    /// The file, for reading.
    pub file: File,
    stamp: Stamp,
}

impl RootDisk {
    /// Opens a disk, checks what can be checked without mounting it, and computes its digest. Blocks for as long as reading all of it takes;
    /// one that did not change since it was read last in this boot of the host is known by its note in `notes`.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn open(path: &Path, notes: &Path) -> Result<Self, Refused> {
        let opened = open(path, "root disk")?;
        let shown = shown(path);
        let failed = |error: io::Error| {
            let message = format!("the root disk {shown} cannot be read: {error}");
            Refused::new(message, "see that the file can be read")
        };
        check(&opened, &shown, failed)?;
        let disk = Self {
            name: opened.name,
            digest: digest_of(&opened.file, notes).map_err(failed)?,
            file: opened.file,
            stamp: opened.stamp,
        };
        disk.unchanged()?;
        Ok(disk)
    }

    /// Fails when the file is not what it was when it was opened.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn unchanged(&self) -> Result<(), Refused> {
        match Stamp::of(&self.file) {
            Ok(now) if now == self.stamp => Ok(()),
            _ => Err(Refused::new(
                format!("the root disk {} changed while it was in use", self.name),
                "let nothing write to it, mount it for writing or replace it while a machine runs on it; give each writer a copy",
            )),
        }
    }
}

fn check(
    opened: &Opened,
    shown: &str,
    failed: impl Fn(io::Error) -> Refused,
) -> Result<(), Refused> {
    let size = opened.stamp.size;
    let refused = |why: &str, hint: &str| {
        let message = format!("the root disk {shown} cannot be used: {why}");
        Err(Refused::new(message, hint))
    };
    if size > ROOT_DISK_MAX.0 {
        let why = format!("it is larger than {ROOT_DISK_MAX}");
        return refused(
            &why,
            "give a smaller one; what the command writes does not lie on it",
        );
    }
    let mut start = vec![0; START.min(usize::try_from(size).unwrap_or(START))];
    opened.file.read_exact_at(&mut start, 0).map_err(failed)?;
    match superblock(&start, size) {
        Ok(()) => Ok(()),
        Err(Wrong { why, hint }) => refused(&why, hint),
    }
}

/// What is wrong with a disk.
#[derive(Debug)]
struct Wrong {
    why: String,
    hint: &'static str,
}

fn wrong<T>(why: impl Into<String>, hint: &'static str) -> Result<T, Wrong> {
    Err(Wrong {
        why: why.into(),
        hint,
    })
}

/// Looks at the beginning of a disk of this many bytes.
fn superblock(start: &[u8], size: u64) -> Result<(), Wrong> {
    const MAGIC: u16 = 0xef53;
    let block = start.get(SUPERBLOCK..SUPERBLOCK + SUPERBLOCK_LEN);
    let Some(block) = block.filter(|block| half(block, 0x38) == Some(MAGIC)) else {
        return no_ext4(start);
    };
    if !size.is_multiple_of(SECTOR) {
        return wrong(
            format!("its {size} bytes are no whole number of sectors of {SECTOR}"),
            "it may have been cut off: copy it again",
        );
    }
    let number = |at: usize| word(block, at).unwrap_or(0);
    features(number(0x5c), number(0x60), number(0xe0))?;
    // Bit 0: unmounted cleanly; bit 1: errors were found.
    if half(block, 0x3a).unwrap_or(0) & 3 != 1 {
        return wrong(
            "its file system was not unmounted cleanly, or has errors",
            "unmount it where it is mounted, or run `e2fsck -f` on a copy",
        );
    }
    let shift = number(0x18);
    if shift > 2 {
        return wrong("its blocks are larger than 4 KiB", MAKE_HINT);
    }
    let high = match number(0x60) & 0x80 {
        0 => 0,
        _ => u64::from(number(0x150)),
    };
    let blocks = high << 32 | u64::from(number(0x4));
    let whole = blocks.saturating_mul(1024 << shift);
    if blocks == 0 || whole > size {
        return wrong(
            format!("it has {size} of the {whole} bytes of its file system"),
            "it was cut off: copy it again",
        );
    }
    Ok(())
}

/// Features of a file system: compatible, incompatible, and the inode of its journal.
fn features(compatible: u32, incompatible: u32, journal: u32) -> Result<(), Wrong> {
    if incompatible & JOURNAL_DEVICE != 0 {
        return wrong("it is the journal of another file system", MAKE_HINT);
    }
    if incompatible & RECOVER != 0 {
        return wrong(
            "its journal must be replayed first: it is mounted for writing, or was never unmounted",
            "unmount it where it is mounted, or run `e2fsck -f` on a copy",
        );
    }
    if compatible & HAS_JOURNAL != 0 && journal == 0 {
        return wrong("its journal lies on another disk", MAKE_HINT);
    }
    let unknown = incompatible & !INCOMPATIBLE_KNOWN;
    let names = [
        (0x1, "compression"),
        (0x1000, "dirdata"),
        (0x1_0000, "encrypt"),
        (0x2_0000, "casefold"),
    ];
    match unknown {
        0 => Ok(()),
        _ => {
            let mut named: Vec<String> = names
                .iter()
                .filter(|(bit, _)| unknown & bit != 0)
                .map(|(_, name)| (*name).to_owned())
                .collect();
            let rest = names.iter().fold(unknown, |rest, (bit, _)| rest & !bit);
            if rest != 0 {
                named.push(format!("{rest:#x}"));
            }
            wrong(
                format!(
                    "it needs features of ext4 that machines do not mount: {}",
                    named.join(", ")
                ),
                MAKE_HINT,
            )
        }
    }
}

/// What a disk is that is not ext4.
fn no_ext4<T>(start: &[u8]) -> Result<T, Wrong> {
    const IMAGES: &str = "make it raw: qemu-img convert -O raw IMAGE disk.img; it must then be one ext4 file system without partitions";
    let partitions =
        "cut its ext4 partition out: `fdisk -l` says where it lies, dd or `losetup -P` copies it";
    match known(start) {
        Some(what)
            if what.ends_with("image") && !what.contains("ISO") && !what.contains("squash") =>
        {
            wrong(format!("it is {what}, not a raw one"), IMAGES)
        }
        Some(what) if what.contains("partitions") => {
            wrong(format!("it is {what}, not a file system"), partitions)
        }
        Some(what) => wrong(format!("it is {what}, not an ext4 file system"), MAKE_HINT),
        None if start.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) => wrong(
            "it is a disk with partitions, not a file system",
            partitions,
        ),
        None => wrong("it is not an ext4 file system", MAKE_HINT),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[SUPERBLOCK + at..SUPERBLOCK + at + bytes.len()].copy_from_slice(bytes);
    }

    /// The beginning of a clean ext4 of [`SIZE`] bytes.
    fn ext4() -> Vec<u8> {
        let mut disk = vec![0; START];
        put(&mut disk, 0x4, &256_u32.to_le_bytes());
        put(&mut disk, 0x18, &2_u32.to_le_bytes());
        put(&mut disk, 0x38, &0xef53_u16.to_le_bytes());
        put(&mut disk, 0x3a, &1_u16.to_le_bytes());
        put(&mut disk, 0x5c, &0x3c_u32.to_le_bytes());
        put(&mut disk, 0x60, &0x2c2_u32.to_le_bytes());
        put(&mut disk, 0xe0, &8_u32.to_le_bytes());
        disk
    }

    #[test]
    fn a_clean_file_system_passes_and_others_say_why() {
        superblock(&ext4(), SIZE).expect("clean");
        let changed = |at: usize, bytes: &[u8]| {
            let mut disk = ext4();
            put(&mut disk, at, bytes);
            disk
        };
        let elsewhere = |at: usize, bytes: &[u8]| {
            let mut disk = vec![0; START];
            disk[at..at + bytes.len()].copy_from_slice(bytes);
            disk
        };
        for (disk, size, why) in [
            (Vec::new(), 0, "not an ext4"),
            (vec![0; START], SIZE, "not an ext4"),
            (ext4(), SIZE + 1, "sectors"),
            (ext4(), SIZE - 512, "of its file system"),
            (changed(0x4, &[0; 4]), SIZE, "of its file system"),
            (changed(0x150, &[1]), SIZE, "of its file system"),
            (changed(0x60, &0x2c6_u32.to_le_bytes()), SIZE, "replayed"),
            (
                changed(0x60, &0x2ca_u32.to_le_bytes()),
                SIZE,
                "journal of another",
            ),
            (changed(0xe0, &[0; 4]), SIZE, "another disk"),
            (changed(0x3a, &[0, 0]), SIZE, "cleanly"),
            (changed(0x3a, &[3, 0]), SIZE, "cleanly"),
            (changed(0x18, &[6]), SIZE, "larger than 4 KiB"),
            (
                changed(0x60, &0x3_02c2_u32.to_le_bytes()),
                SIZE,
                "encrypt, casefold",
            ),
            (
                changed(0x60, &0x8000_02c2_u32.to_le_bytes()),
                SIZE,
                "0x80000000",
            ),
            (
                elsewhere(0, b"QFI\xfb"),
                SIZE,
                "a qcow2 image, not a raw one",
            ),
            (elsewhere(0, b"KDMV"), SIZE, "VMDK"),
            (elsewhere(0x1fe, &[0x55, 0xaa]), SIZE, "partitions"),
            (elsewhere(0x10040, b"_BHRfS_M"), SIZE, "btrfs"),
            (elsewhere(0, b"hsqs"), SIZE, "squashfs"),
            (elsewhere(0, b"\x1f\x8b"), SIZE, "gzip"),
        ] {
            let Wrong { why: told, hint } = superblock(&disk, size).expect_err(why);
            assert!(told.contains(why), "{told:?} lacks {why:?}");
            assert!(!hint.is_empty());
        }
    }

    #[test]
    fn a_disk_that_changes_is_told() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("disk.img");
        let mut whole = ext4();
        whole.resize(usize::try_from(SIZE).expect("small"), 0);
        std::fs::write(&path, &whole).expect("write");
        let disk = RootDisk::open(&path, dir.path()).expect("a disk");
        assert_eq!(disk.digest, Digest::of(&whole));
        disk.unchanged().expect("as it was");
        let file = File::options().write(true).open(&path).expect("open");
        file.write_all_at(b"x", 4096).expect("write");
        let refused = disk.unchanged().expect_err("changed");
        assert!(refused.message.contains("disk.img changed"), "{refused}");
        file.set_len(ROOT_DISK_MAX.0 + SECTOR).expect("sparse");
        let refused = RootDisk::open(&path, dir.path()).expect_err("too large");
        assert!(refused.message.contains("larger than"), "{refused}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            changes in proptest::collection::vec((0_usize..0x160, any::<u8>()), 0..24),
            cut in 0_usize..4096,
            size in any::<u64>(),
        ) {
            let mut disk = ext4();
            for (at, byte) in changes {
                disk[SUPERBLOCK + at] = byte;
            }
            disk.truncate(cut);
            if superblock(&disk, size).is_ok() {
                prop_assert!(size.is_multiple_of(SECTOR) && size > 0);
            }
        }
    }
}
