//! Takes Debian's kernel package apart: an ELF that VMMs boot directly, and modules in the order they load.
//!
//! The ELF inside the bzImage has a Xen PVH note; booting it skips the kernel's own decompression. Modules come out of
//! their `.xz`, because decompressing them in an emulated machine is slow, and without their
//! signature, because checking it there is slower still: the image's digests protect them.
//! Sources: Documentation/arch/x86/boot.rst (setup header), include/linux/module_signature.h,
//! include/linux/module.h (`.modinfo`).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

/// Offset of the boot sector magic's neighbour that counts setup sectors.
const SETUP_SECTS: usize = 0x1f1;
/// Offset of the magic `HdrS`.
const HEADER_MAGIC: usize = 0x202;
/// Offset of the protocol version.
const VERSION: usize = 0x206;
/// Offset of the payload's offset, protocol 2.08 and newer.
const PAYLOAD_OFFSET: usize = 0x248;
/// Offset of the payload's length.
const PAYLOAD_LENGTH: usize = 0x24c;
/// Largest kernel that is unpacked.
const ELF_BYTES_MAX: u64 = 256 << 20;
/// What a signed module ends with.
const SIGNATURE_MAGIC: &[u8] = b"~Module signature appended~\n";
/// Length of `struct module_signature` before the magic.
const SIGNATURE_INFO: usize = 12;

/// Why a kernel cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// It is not a bzImage of a known form.
    #[error("the kernel is not a bzImage that can be unpacked: {0}")]
    NotBzImage(&'static str),
    /// Its payload does not decompress.
    #[error("the kernel's payload does not decompress")]
    Payload(#[source] io::Error),
    /// A module of the recipe exists neither as a file nor in the kernel.
    #[error("the kernel has no module {0:?}")]
    NoModule(String),
    /// A module does not say what it needs, or needs itself.
    #[error("what the module {0:?} needs cannot be told")]
    Dependencies(String),
}

/// The ELF inside a bzImage.
///
/// # Errors
/// When the image has another form, is truncated, or is compressed in a way not known here.
pub fn elf_of_bzimage(image: &[u8]) -> Result<Vec<u8>, KernelError> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let broken = KernelError::NotBzImage;
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        return Err(broken("no setup header"));
    }
    if word(VERSION).is_none_or(|version| version & 0xffff < 0x208) {
        return Err(broken("boot protocol older than 2.08"));
    }
    let sectors = usize::from(image[SETUP_SECTS]).max(1);
    let (offset, length) = match (word(PAYLOAD_OFFSET), word(PAYLOAD_LENGTH)) {
        (Some(offset), Some(length)) if length > 4 => (offset, length),
        _ => return Err(broken("no payload")),
    };
    let start = (sectors + 1) * 512 + offset;
    // The last four bytes are the length of what comes out.
    let payload = image
        .get(start..start + length - 4)
        .ok_or(broken("truncated"))?;
    let elf = decompress(payload)?;
    if elf.get(..4) != Some(b"\x7fELF") {
        return Err(broken("the payload is not an ELF"));
    }
    Ok(elf)
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    let mut elf = Vec::new();
    let read = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder =
                zstd::stream::read::Decoder::new(payload).map_err(KernelError::Payload)?;
            decoder
                .single_frame()
                .take(ELF_BYTES_MAX)
                .read_to_end(&mut elf)
        }
        [0x1f, 0x8b, ..] => flate2::read::GzDecoder::new(payload)
            .take(ELF_BYTES_MAX)
            .read_to_end(&mut elf),
        [0x7f, b'E', b'L', b'F', ..] => return Ok(payload.to_vec()),
        _ => {
            return Err(KernelError::NotBzImage(
                "its compression is neither zstd nor gzip",
            ));
        }
    };
    read.map_err(KernelError::Payload)?;
    Ok(elf)
}

/// A module without its appended signature.
#[must_use]
pub fn without_signature(module: &[u8]) -> &[u8] {
    let Some(body) = module.strip_suffix(SIGNATURE_MAGIC) else {
        return module;
    };
    let Some(info_at) = body.len().checked_sub(SIGNATURE_INFO) else {
        return module;
    };
    let length = &body[info_at + SIGNATURE_INFO - 4..];
    let length = length
        .iter()
        .fold(0_usize, |acc, byte| (acc << 8) | usize::from(*byte));
    info_at
        .checked_sub(length)
        .map_or(module, |end| &body[..end])
}

/// A module ready to be loaded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    /// Name with underscores, such as `virtio_blk`.
    pub name: String,
    /// Its bytes: an ELF, not compressed, not signed.
    pub bytes: Vec<u8>,
}

/// Which modules one kernel has, as files and built in.
#[derive(Clone, Debug, Default)]
pub struct ModuleIndex {
    by_name: BTreeMap<String, String>,
    builtin: BTreeSet<String>,
}

impl ModuleIndex {
    /// From the paths of module files and the text of `modules.builtin`.
    #[must_use]
    pub fn new<'a>(paths: impl IntoIterator<Item = &'a str>, builtin: &str) -> Self {
        let paths = paths.into_iter().filter(|path| path.contains(".ko"));
        Self {
            by_name: paths
                .map(|path| (module_name(path), path.to_owned()))
                .collect(),
            builtin: builtin.lines().map(module_name).collect(),
        }
    }

    /// The modules named and what they need, each after what it needs; built-in ones are left out. `read` gives the
    /// decompressed bytes of a path.
    ///
    /// # Errors
    /// When a module does not exist, needs itself, or cannot be read.
    pub fn load_order<E: From<KernelError>>(
        &self,
        names: &[String],
        mut read: impl FnMut(&str) -> Result<Vec<u8>, E>,
    ) -> Result<Vec<Module>, E> {
        let mut order = Vec::new();
        for name in names {
            self.push(
                &name.replace('-', "_"),
                &mut Vec::new(),
                &mut order,
                &mut read,
            )?;
        }
        Ok(order)
    }

    fn push<E: From<KernelError>>(
        &self,
        name: &str,
        above: &mut Vec<String>,
        order: &mut Vec<Module>,
        read: &mut impl FnMut(&str) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        if order.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.by_name.get(name) else {
            return match self.builtin.contains(name) {
                true => Ok(()),
                false => Err(KernelError::NoModule(name.to_owned()).into()),
            };
        };
        if above.iter().any(|one| one == name) {
            return Err(KernelError::Dependencies(name.to_owned()).into());
        }
        let bytes = without_signature(&read(path)?).to_vec();
        let needs =
            dependencies(&bytes).ok_or_else(|| KernelError::Dependencies(name.to_owned()))?;
        above.push(name.to_owned());
        for need in needs {
            self.push(&need, above, order, read)?;
        }
        above.pop();
        order.push(Module {
            name: name.to_owned(),
            bytes,
        });
        Ok(())
    }
}

/// What a module says it needs: `depends=` of its `.modinfo` section. `None` when it is not a module.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let info = elf_section(module, b".modinfo")?;
    let field = info
        .split(|b| *b == 0)
        .find_map(|text| text.strip_prefix(b"depends="))?;
    let names = String::from_utf8_lossy(field);
    let names = names.split(',').filter(|name| !name.is_empty());
    Some(names.map(|name| name.replace('-', "_")).collect())
}

/// Content of a section of a 64-bit little-endian ELF. Source: elf(5).
fn elf_section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let part = |at: usize, len: usize| elf.get(at..at.checked_add(len)?);
    let half = |at| {
        Some(usize::from(u16::from_le_bytes(
            part(at, 2)?.try_into().ok()?,
        )))
    };
    let word = |at| usize::try_from(u32::from_le_bytes(part(at, 4)?.try_into().ok()?)).ok();
    let long = |at| usize::try_from(u64::from_le_bytes(part(at, 8)?.try_into().ok()?)).ok();
    if part(0, 6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count, names) = (long(40)?, half(58)?, half(60)?, half(62)?);
    let header = |number: usize| table.checked_add(number.checked_mul(size)?);
    let content = |at: usize| part(long(at.checked_add(24)?)?, long(at.checked_add(32)?)?);
    let names = content(header(names)?)?;
    for number in 0..count {
        let at = header(number)?;
        let name = names.get(word(at)?..)?;
        if name.starts_with(wanted) && name.get(wanted.len()) == Some(&0) {
            return content(at);
        }
    }
    None
}

/// `kernel/drivers/block/virtio-blk.ko.xz` as `virtio_blk`.
#[must_use]
pub fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0_u8; 1024 + 16];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        let length = u32::try_from(payload.len() + 4).expect("small");
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0; 4]);
        image
    }

    #[test]
    fn the_elf_comes_out_and_other_things_are_refused() {
        let elf = b"\x7fELF and so on".to_vec();
        let packed = zstd::stream::encode_all(&elf[..], 3).expect("memory");
        assert_eq!(elf_of_bzimage(&bzimage(&packed)).expect("an ELF"), elf);
        let text = zstd::stream::encode_all(&b"text"[..], 3).expect("memory");
        assert!(elf_of_bzimage(&bzimage(&text)).is_err());
        assert!(elf_of_bzimage(&bzimage(b"BZh9")).is_err());
        let whole = bzimage(&packed);
        for cut in [0, 0x205, 0x24d, 1030] {
            assert!(elf_of_bzimage(&whole[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_signature_is_cut_off_and_nothing_else_is() {
        let mut signed = b"module".to_vec();
        signed.extend_from_slice(b"SIGNED");
        signed.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 6]);
        signed.extend_from_slice(SIGNATURE_MAGIC);
        assert_eq!(without_signature(&signed), b"module");
        assert_eq!(without_signature(b"module"), b"module");
        let mut lying = vec![0xff; 12];
        lying.extend_from_slice(SIGNATURE_MAGIC);
        assert_eq!(without_signature(&lying), lying);
    }

    /// The least ELF that has a `.modinfo`.
    pub(crate) fn module(depends: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={depends}\0name=x\0");
        let names = b"\0.modinfo\0.strtab\0";
        let mut elf = vec![0_u8; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let table = 64 + info.len() + names.len();
        elf[40] = u8::try_from(table).expect("small");
        elf[58] = 64;
        elf[60] = 3;
        elf[62] = 2;
        elf.extend_from_slice(info.as_bytes());
        elf.extend_from_slice(names);
        for (name, at, len) in [
            (0, 0, 0),
            (1, 64, info.len()),
            (10, 64 + info.len(), names.len()),
        ] {
            let mut header = [0_u8; 64];
            header[0] = name;
            header[24] = u8::try_from(at).expect("small");
            header[32] = u8::try_from(len).expect("small");
            elf.extend_from_slice(&header);
        }
        elf
    }

    fn order_of(files: &[(&str, &str)], names: &[&str]) -> Result<Vec<String>, KernelError> {
        let index = ModuleIndex::new(files.iter().map(|file| file.0), "kernel/fs/ext4/ext4.ko\n");
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let read = |path: &str| {
            let found = files.iter().find(|file| file.0 == path);
            Ok(found.map(|file| module(file.1)).unwrap_or_default())
        };
        let order = index.load_order::<KernelError>(&names, read)?;
        Ok(order.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn modules_load_after_what_they_need() {
        let files = [
            ("k/a.ko.xz", "b-x,c"),
            ("k/b-x.ko.xz", "c,ext4"),
            ("k/c.ko.xz", ""),
        ];
        let order = order_of(&files, &["ext4", "a", "b-x"]).expect("all exist");
        assert_eq!(order, ["c", "b_x", "a"]);
        assert!(matches!(
            order_of(&files, &["zzz"]),
            Err(KernelError::NoModule(_))
        ));
        let circle = [("k/a.ko", "b"), ("k/b.ko", "a")];
        assert!(matches!(
            order_of(&circle, &["a"]),
            Err(KernelError::Dependencies(_))
        ));
    }

    #[test]
    fn damaged_modules_are_refused_without_a_panic() {
        let whole = module("a");
        for cut in 0..whole.len() {
            let _ = dependencies(&whole[..cut]);
        }
        let mut wild = whole.clone();
        wild[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(dependencies(&wild), None);
        assert_eq!(dependencies(b"text"), None);
    }
}
