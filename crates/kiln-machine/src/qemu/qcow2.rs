//! The qcow2 header: read where it points, and write empty overlays without starting a program.
//!
//! A `qemu-img` process costs 10 to 20 ms; an overlay without content is four clusters, of which only the header
//! and two table entries are not zero. Source: QEMU's `docs/interop/qcow2.rst`, version 3.
//! Files read here were written by QEMU or by this module; a guest writes a disk's content, never its header.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use kiln_core::machine::DiskFormat;

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Bytes of disk that one entry of the first-level table covers: 8192 second-level entries of one cluster.
const L1_ENTRY_SPAN: u64 = CLUSTER * (CLUSTER / 8);
/// One cluster of first-level table: the largest disk this module makes (4 TiB).
pub(crate) const VIRTUAL_SIZE_MAX: u64 = L1_ENTRY_SPAN * (CLUSTER / 8);
const HEADER_LEN: u32 = 104;
const BACKING_FORMAT_EXTENSION: u32 = 0xe279_2aca;
/// Longest backing file name, by the format.
const BACKING_NAME_MAX: usize = 1023;
/// Files in one chain, the top one included.
pub(crate) const CHAIN_MAX: usize = 16;

/// One file of a disk's chain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Link {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Its format.
    pub(crate) format: DiskFormat,
}

/// What a header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    /// Bytes of the disk as a guest sees it.
    pub(crate) virtual_size: u64,
    /// The file below, if any.
    pub(crate) backing: Option<Link>,
}

fn invalid(path: &Path, why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{}: {why}", path.display()),
    )
}

/// Makes an empty disk of this size, over `backing` if one is given. The file must not exist.
pub(crate) fn create(path: &Path, virtual_size: u64, backing: Option<&Link>) -> io::Result<()> {
    if virtual_size == 0 || virtual_size > VIRTUAL_SIZE_MAX {
        return Err(invalid(path, "a disk is between 1 byte and 4 TiB"));
    }
    let size = virtual_size.next_multiple_of(512);
    let header = header_bytes(path, size, backing)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&header)?;
    // Cluster 1: refcount table with one entry; 2: its block, four clusters in use; 3: empty first-level table.
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    file.write_all_at(&[0, 1, 0, 1, 0, 1, 0, 1], 2 * CLUSTER)?;
    file.set_len(4 * CLUSTER)
}

fn header_bytes(path: &Path, size: u64, backing: Option<&Link>) -> io::Result<Vec<u8>> {
    let (name, format): (&[u8], &[u8]) = match backing {
        Some(link) => {
            let name = link.path.as_os_str().as_bytes();
            if !link.path.is_absolute() || name.len() > BACKING_NAME_MAX {
                return Err(invalid(
                    path,
                    "a backing file needs an absolute path of at most 1023 bytes",
                ));
            }
            (
                name,
                if link.format == DiskFormat::Raw {
                    b"raw"
                } else {
                    b"qcow2"
                },
            )
        }
        None => (b"", b""),
    };
    // Header, extension (8 + 8 bytes), end of extensions (8), name.
    let name_at = if name.is_empty() {
        0
    } else {
        u64::from(HEADER_LEN) + 24
    };
    let mut out = Vec::with_capacity(HEADER_LEN as usize + 24 + name.len());
    let put32 = |out: &mut Vec<u8>, value: u32| out.extend_from_slice(&value.to_be_bytes());
    let put64 = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_be_bytes());
    put32(&mut out, MAGIC);
    put32(&mut out, VERSION);
    put64(&mut out, name_at);
    put32(&mut out, name.len() as u32);
    put32(&mut out, CLUSTER_BITS);
    put64(&mut out, size);
    put32(&mut out, 0); // no encryption
    put32(&mut out, size.div_ceil(L1_ENTRY_SPAN) as u32);
    put64(&mut out, 3 * CLUSTER); // first-level table
    put64(&mut out, CLUSTER); // refcount table
    put32(&mut out, 1); // clusters of it
    put32(&mut out, 0); // no snapshots
    put64(&mut out, 0);
    put64(&mut out, 0); // incompatible, compatible and autoclear features
    put64(&mut out, 0);
    put64(&mut out, 0);
    put32(&mut out, 4); // refcounts of 16 bits
    put32(&mut out, HEADER_LEN);
    if !format.is_empty() {
        put32(&mut out, BACKING_FORMAT_EXTENSION);
        put32(&mut out, format.len() as u32);
        out.extend_from_slice(format);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    put64(&mut out, 0); // end of extensions
    out.extend_from_slice(name);
    Ok(out)
}

/// Reads a qcow2 header. A backing file without an explicit format is refused: formats are never guessed.
pub(crate) fn read_header(path: &Path) -> io::Result<Header> {
    let mut bytes = Vec::new();
    File::open(path)?.take(CLUSTER).read_to_end(&mut bytes)?;
    parse_header(path, &bytes)
}

fn parse_header(path: &Path, bytes: &[u8]) -> io::Result<Header> {
    let short = || invalid(path, "the qcow2 header is cut short");
    let u32_at = |at: usize| -> io::Result<u32> {
        let part = bytes.get(at..at + 4).ok_or_else(short)?;
        Ok(u32::from_be_bytes(part.try_into().map_err(|_| short())?))
    };
    let u64_at =
        |at: usize| Ok::<u64, io::Error>(u64::from(u32_at(at)?) << 32 | u64::from(u32_at(at + 4)?));
    if u32_at(0)? != MAGIC || !(2..=3).contains(&u32_at(4)?) {
        return Err(invalid(path, "not a qcow2 file of version 2 or 3"));
    }
    let (name_at, name_len) = (u64_at(8)?, u32_at(16)? as usize);
    let virtual_size = u64_at(24)?;
    if name_at == 0 {
        return Ok(Header {
            virtual_size,
            backing: None,
        });
    }
    if name_len > BACKING_NAME_MAX {
        return Err(invalid(path, "the backing file's name is too long"));
    }
    let start = usize::try_from(name_at).map_err(|_| short())?;
    let end = start.checked_add(name_len).ok_or_else(short)?;
    let name = bytes.get(start..end).ok_or_else(short)?;
    let mut at = if u32_at(4)? == 3 {
        u32_at(100)? as usize
    } else {
        72
    };
    let mut format = None;
    while at < start {
        let (kind, len) = (u32_at(at)?, u32_at(at + 4)? as usize);
        let data = bytes
            .get(at + 8..(at + 8).saturating_add(len))
            .ok_or_else(short)?;
        match (kind, data) {
            (0, _) => break,
            (BACKING_FORMAT_EXTENSION, b"raw") => format = Some(DiskFormat::Raw),
            (BACKING_FORMAT_EXTENSION, b"qcow2") => format = Some(DiskFormat::Qcow2),
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    let format = format.ok_or_else(|| invalid(path, "its backing file has no explicit format"))?;
    let name = PathBuf::from(std::ffi::OsString::from_vec(name.to_vec()));
    let path = match path.parent() {
        Some(dir) if name.is_relative() => dir.join(name),
        _ => name,
    };
    Ok(Header {
        virtual_size,
        backing: Some(Link { path, format }),
    })
}

/// A disk and everything below it, top first, and the size a guest sees.
pub(crate) fn chain(path: &Path, format: DiskFormat) -> io::Result<(Vec<Link>, u64)> {
    let mut links = vec![Link {
        path: path.to_owned(),
        format,
    }];
    let mut size = None;
    loop {
        let top = links[links.len() - 1].clone();
        let header = match top.format {
            DiskFormat::Raw => {
                let len = std::fs::metadata(&top.path)?.len();
                Header {
                    virtual_size: len,
                    backing: None,
                }
            }
            DiskFormat::Qcow2 => read_header(&top.path)?,
        };
        size.get_or_insert(header.virtual_size);
        match header.backing {
            Some(link) if links.len() < CHAIN_MAX => links.push(link),
            Some(_) => return Err(invalid(path, "more than 16 files in its chain")),
            None => return Ok((links, size.unwrap_or_default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn qemu_img(args: &[&str], path: &Path) -> String {
        let output = std::process::Command::new("qemu-img")
            .args(args)
            .arg(path)
            .output()
            .expect("qemu-img is installed");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn what_is_written_is_sound_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        File::create(&raw).unwrap().set_len(10 << 20).unwrap();
        let below = Link {
            path: raw,
            format: DiskFormat::Raw,
        };
        let a = dir.path().join("a");
        create(&a, 10 << 20, Some(&below)).unwrap();
        let b = dir.path().join("b");
        let middle = Link {
            path: a.clone(),
            format: DiskFormat::Qcow2,
        };
        create(&b, 10 << 20, Some(&middle)).unwrap();
        let (links, size) = chain(&b, DiskFormat::Qcow2).unwrap();
        assert_eq!(size, 10 << 20);
        let top = Link {
            path: b.clone(),
            format: DiskFormat::Qcow2,
        };
        assert_eq!(links, [top, middle, below]);
        let blank = dir.path().join("blank");
        create(&blank, 2 << 40, None).unwrap();
        for path in [&a, &b, &blank] {
            qemu_img(&["check", "-f", "qcow2"], path);
        }
        let info = qemu_img(
            &["info", "-f", "qcow2", "--output=json", "--backing-chain"],
            &b,
        );
        assert!(
            info.contains("\"backing-filename-format\": \"raw\""),
            "{info}"
        );
        assert!(create(&b, 1, None).is_err(), "never over an existing file");
        assert!(create(&dir.path().join("c"), VIRTUAL_SIZE_MAX + 1, None).is_err());
    }

    #[test]
    fn headers_of_qemu_img_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        File::create(&a).unwrap().set_len(1 << 20).unwrap();
        let name = a.to_str().unwrap();
        qemu_img(
            &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", name],
            &b,
        );
        let (links, size) = chain(&b, DiskFormat::Qcow2).unwrap();
        assert_eq!((links.len(), size), (2, 1 << 20));
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), name_at in 0u64..400) {
            let mut bytes = bytes;
            if bytes.len() > 16 {
                bytes[..8].copy_from_slice(&[0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3]);
                bytes[8..16].copy_from_slice(&name_at.to_be_bytes());
            }
            let _ = parse_header(Path::new("/x"), &bytes);
        }
    }
}
