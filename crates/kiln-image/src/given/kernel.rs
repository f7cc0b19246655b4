//! A kernel that somebody gives: a bzImage, or an ELF that boots by PVH.
//!
//! Sources: Documentation/arch/x86/boot.rst (setup header); elf(5) and Xen's public/elfnote.h (`XEN_ELFNOTE_PHYS32_ENTRY`), by which QEMU
//! boots an ELF; init/version.c (the banner, which names the release).

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use kiln_core::Digest;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{Refused, half, known, open, shown, word};

/// Largest kernel that is taken, bytes.
pub const KERNEL_BYTES_MAX: u64 = 256 << 20;
/// Longest release, as `uname` has it.
const RELEASE_MAX: usize = 64;
/// Longest version text that is read.
const VERSION_TEXT_MAX: usize = 1024;
/// Oldest boot protocol: the first with 64-bit kernels that say so.
const PROTOCOL_MIN: u16 = 0x20c;
/// Most headers of an ELF's segments that are read.
const SEGMENTS_MAX: u16 = 512;
/// Most bytes of notes that are read.
const NOTES_MAX: usize = 64 * 1024;
/// The note that says where a kernel is entered by PVH.
const NOTE_PVH: u32 = 18;
/// What a kernel's banner begins with.
const BANNER: &[u8] = b"Linux version ";
/// What to give instead.
const HINT: &str = "give a kernel for x86-64 as distributions install it (vmlinuz), or an uncompressed one that boots by PVH";

/// A kernel, read once: what is booted is what was looked at.
#[derive(Debug)]
pub struct Kernel {
    /// Its file's name.
    pub name: String,
    /// Digest of the file.
    pub digest: Digest,
    /// Its release, as `uname -r` says it; the name of its folder of modules.
    pub release: String,
    /// A copy in memory.
    pub copy: File,
}

impl Kernel {
    /// Reads a kernel and checks what can be checked without starting it.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn open(path: &Path) -> Result<Self, Refused> {
        let opened = open(path, "kernel")?;
        let shown = shown(path);
        if opened.stamp.size > KERNEL_BYTES_MAX {
            let message = format!("the kernel {shown} is larger than 256 MiB");
            return Err(Refused::new(message, HINT));
        }
        let failed = |error: io::Error| {
            let message = format!("the kernel {shown} cannot be read: {error}");
            Refused::new(message, "see that the file can be read")
        };
        let mut bytes = Vec::new();
        let reading = (&opened.file).take(KERNEL_BYTES_MAX);
        let mut reading = reading;
        reading.read_to_end(&mut bytes).map_err(failed)?;
        let release = release(&bytes).map_err(|why| {
            let message = format!("the kernel {shown} cannot be booted: {why}");
            Refused::new(message, HINT)
        })?;
        let copy = in_memory(&[&bytes]).map_err(failed)?;
        Ok(Self {
            name: opened.name,
            digest: Digest::of(&bytes),
            release,
            copy,
        })
    }
}

/// A file of these pieces that has no name and is gone with the last process that holds it.
///
/// # Errors
/// When there is no memory for it.
pub fn in_memory(pieces: &[&[u8]]) -> io::Result<File> {
    let mut file = File::from(memfd_create("kiln-given", MemfdFlags::CLOEXEC)?);
    for piece in pieces {
        file.write_all(piece)?;
    }
    Ok(file)
}

/// The release of a kernel of either form.
///
/// # Errors
/// Why it is none, in words.
pub fn release(image: &[u8]) -> Result<String, String> {
    if image.get(0x202..0x206) == Some(b"HdrS") {
        return release_of_bzimage(image);
    }
    if image.starts_with(b"\x7fELF") {
        return release_of_elf(image);
    }
    Err(match known(image) {
        Some(other) => format!("it is {other}"),
        None => "it is neither a bzImage nor an ELF".to_owned(),
    })
}

fn release_of_bzimage(image: &[u8]) -> Result<String, String> {
    let cut = || "its header is cut off".to_owned();
    let flags = |at: usize| half(image, at).ok_or_else(cut);
    if flags(0x1fe)? != 0xaa55 {
        return Err("its boot sector has no signature".to_owned());
    }
    if flags(0x206)? < PROTOCOL_MIN {
        return Err("its boot protocol is older than 2.12".to_owned());
    }
    // Loaded high (bit 0 of loadflags), and entered in 64 bits (bit 0 of xloadflags).
    if flags(0x211)? & 1 == 0 {
        return Err("it is a zImage".to_owned());
    }
    if flags(0x236)? & 1 == 0 {
        return Err("it is not for x86-64".to_owned());
    }
    let sectors = match image.get(0x1f1) {
        None | Some(0) => 4,
        Some(sectors) => usize::from(*sectors),
    };
    let setup = (sectors + 1) * 512;
    let paragraphs = word(image, 0x1f4).ok_or_else(cut)?;
    let whole = u64::from(paragraphs) * 16 + setup as u64;
    // The last paragraph need not be full.
    if (image.len() as u64).saturating_add(16) < whole {
        return Err(format!(
            "it has {} of the {whole} bytes that its header says",
            image.len()
        ));
    }
    let at = usize::from(flags(0x20e)?) + 0x200;
    if at == 0x200 || at >= setup {
        return Err("it does not say its release".to_owned());
    }
    let text = image.get(at..setup.min(image.len())).ok_or_else(cut)?;
    first_word(text).ok_or_else(|| "it does not say its release".to_owned())
}

fn release_of_elf(image: &[u8]) -> Result<String, String> {
    if !has_pvh(image) {
        return Err("it is an ELF that does not boot by PVH".to_owned());
    }
    // Others of its texts may begin alike.
    let mut rest = image;
    while let Some(at) = find(rest, BANNER) {
        rest = &rest[at + BANNER.len()..];
        if let Some(release) = first_word(rest).filter(|word| word.starts_with(is_digit)) {
            return Ok(release);
        }
    }
    Err("it does not say its release".to_owned())
}

fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

/// Where `wanted` begins first.
fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = wanted.first()?;
    let mut from = 0;
    loop {
        let rest = bytes.get(from..)?;
        let at = from + rest.iter().position(|byte| byte == first)?;
        if bytes[at..].starts_with(wanted) {
            return Some(at);
        }
        from = at + 1;
    }
}

/// The release a version text begins with, if it can be one: it names a folder later.
fn first_word(text: &[u8]) -> Option<String> {
    let text = &text[..text.len().min(VERSION_TEXT_MAX)];
    let end = text
        .iter()
        .position(|byte| matches!(byte, 0 | b' ' | b'\n'))?;
    let word = std::str::from_utf8(&text[..end]).ok()?;
    is_release(word).then(|| word.to_owned())
}

/// Whether a text can be a release: plain characters, no path.
#[must_use]
pub fn is_release(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+~-".contains(&byte);
    (1..=RELEASE_MAX).contains(&text.len())
        && text.bytes().all(plain)
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Whether an ELF for x86-64 has the note by which QEMU enters it.
fn has_pvh(elf: &[u8]) -> bool {
    const MACHINE_X86_64: u16 = 62;
    const SEGMENT_NOTE: u32 = 4;
    if !elf.starts_with(b"\x7fELF\x02\x01") || half(elf, 18) != Some(MACHINE_X86_64) {
        return false;
    }
    let long = |at: usize| {
        let bytes = elf.get(at..at.checked_add(8)?)?;
        usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let (Some(table), Some(size), Some(count)) = (long(32), half(elf, 54), half(elf, 56)) else {
        return false;
    };
    let note = |number: u16| {
        let at = table.checked_add(usize::from(number).checked_mul(usize::from(size))?)?;
        if word(elf, at)? != SEGMENT_NOTE {
            return None;
        }
        let (from, len) = (long(at.checked_add(8)?)?, long(at.checked_add(32)?)?);
        elf.get(from..from.checked_add(len.min(NOTES_MAX))?)
    };
    let notes = (0..count.min(SEGMENTS_MAX)).filter_map(note);
    notes.into_iter().any(names_pvh)
}

/// Whether a segment of notes has the one for PVH.
fn names_pvh(mut notes: &[u8]) -> bool {
    let next = |notes: &[u8]| -> Option<(bool, usize)> {
        let (name, content, kind) = (word(notes, 0)?, word(notes, 4)?, word(notes, 8)?);
        let name_len = usize::try_from(name).ok()?;
        let named = notes.get(12..12_usize.checked_add(name_len)?)?;
        let is_it = kind == NOTE_PVH && named == b"Xen\0";
        let padded = |len: u32| usize::try_from(len).ok()?.checked_next_multiple_of(4);
        let len = padded(name)?.checked_add(padded(content)?)?;
        Some((is_it, len.checked_add(12)?))
    };
    while let Some((is_it, len)) = next(notes) {
        if is_it {
            return true;
        }
        let Some(rest) = notes.get(len..) else {
            return false;
        };
        notes = rest;
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A bzImage with one sector of setup beyond the first and this version text.
    fn bzimage(version: &str) -> Vec<u8> {
        let mut image = vec![0_u8; 5 * 512 + 64];
        image[0x1f1] = 4;
        put(&mut image, 0x1f4, &4_u32.to_le_bytes());
        put(&mut image, 0x1fe, &[0x55, 0xaa]);
        put(&mut image, 0x202, b"HdrS");
        put(&mut image, 0x206, &0x20f_u16.to_le_bytes());
        put(&mut image, 0x20e, &0x400_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x236] = 1;
        put(&mut image, 0x600, version.as_bytes());
        image
    }

    /// An ELF with one segment of notes, whose last is this one.
    fn elf(note: u32, name: &[u8; 4], after: &[u8]) -> Vec<u8> {
        let mut elf = vec![0_u8; 64 + 56];
        put(&mut elf, 0, b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 4;
        put(&mut elf, 72, &120_u64.to_le_bytes());
        put(&mut elf, 96, &44_u64.to_le_bytes());
        for (kind, name, content) in [(6, b"Xen\0", 5_u32), (note, name, 4)] {
            elf.extend(4_u32.to_le_bytes());
            elf.extend(content.to_le_bytes());
            elf.extend(kind.to_le_bytes());
            elf.extend(name);
            elf.extend(vec![0; content.next_multiple_of(4) as usize]);
        }
        elf.extend(after);
        elf
    }

    #[test]
    fn a_release_is_read_of_both_forms() {
        let version = "6.1.0-30-cloud-amd64 (debian-kernel@lists) #1 SMP\0";
        assert_eq!(
            release(&bzimage(version)).expect("a kernel"),
            "6.1.0-30-cloud-amd64"
        );
        let banner = b"Linux version %s (%s)\0Linux version 6.12.63+deb13-cloud-amd64 (x)\0";
        assert_eq!(
            release(&elf(18, b"Xen\0", banner)).expect("a kernel"),
            "6.12.63+deb13-cloud-amd64"
        );
    }

    #[test]
    fn what_cannot_be_booted_says_why() {
        let changed = |at: usize, bytes: &[u8]| {
            let mut image = bzimage("6.1.0 x\0");
            put(&mut image, at, bytes);
            image
        };
        let banner = b"Linux version 6.1 (x)\0";
        for (image, why) in [
            (Vec::new(), "neither a bzImage nor an ELF"),
            (b"QFI\xfb".to_vec(), "a qcow2 image"),
            (b"\x1f\x8b\x08".to_vec(), "compressed with gzip"),
            (changed(0x1fe, &[0, 0]), "no signature"),
            (changed(0x206, &[9, 2]), "older than 2.12"),
            (changed(0x211, &[0]), "zImage"),
            (changed(0x236, &[0]), "not for x86-64"),
            (changed(0x1f4, &[0, 1]), "bytes that its header says"),
            (changed(0x20e, &[0, 0]), "does not say its release"),
            (changed(0x20e, &[0xff, 0xff]), "does not say its release"),
            (bzimage("../../etc x\0"), "does not say its release"),
            (bzimage(&"6".repeat(65)), "does not say its release"),
            (elf(17, b"Xen\0", banner), "does not boot by PVH"),
            (elf(18, b"GNU\0", banner), "does not boot by PVH"),
            (elf(18, b"Xen\0", b"no words"), "does not say its release"),
        ] {
            let refused = release(&image).expect_err(why);
            assert!(refused.contains(why), "{refused:?} lacks {why:?}");
        }
    }

    #[test]
    fn a_kernel_that_is_cut_off_anywhere_is_refused() {
        let image = bzimage("6.1.0 x\0");
        for cut in 0..image.len() - 16 {
            assert!(release(&image[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn what_is_booted_is_what_was_read() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("vmlinuz");
        let image = bzimage("6.1.0 x\0");
        std::fs::write(&path, &image).expect("write");
        let kernel = Kernel::open(&path).expect("a kernel");
        assert_eq!(kernel.name, "vmlinuz");
        assert_eq!(kernel.digest, Digest::of(&image));
        std::fs::write(&path, "something else").expect("write");
        use std::os::unix::fs::FileExt as _;
        let mut copied = vec![0; image.len()];
        kernel.copy.read_exact_at(&mut copied, 0).expect("whole");
        assert!(copied == image);
        assert!(Kernel::open(&path).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            version in ".{0,80}",
            changes in proptest::collection::vec((0_usize..0x700, any::<u8>()), 0..12),
            cut in 0_usize..3000,
            form in any::<bool>(),
        ) {
            let mut image = match form {
                true => bzimage(&version.chars().take(20).collect::<String>()),
                false => elf(18, b"Xen\0", &bzimage(&version.chars().take(20).collect::<String>())),
            };
            let len = image.len();
            for (at, byte) in changes {
                // The beginning decides most.
                image[if form { at % len } else { at % 180 }] = byte;
            }
            image.truncate(cut.min(len));
            if let Ok(release) = release(&image) {
                prop_assert!(is_release(&release));
            }
        }

        #[test]
        fn notes_of_any_bytes_end(notes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = names_pvh(&notes);
        }
    }
}
