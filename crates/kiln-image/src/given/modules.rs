//! The modules that a kernel somebody gives needs, of this host's folder of them: a second archive behind kiln's initrd.
//!
//! The kernel unpacks one archive after the other into the same tree (Documentation/driver-api/early-userspace/buffer-format.rst), so the
//! second one's list of modules stands in place of kiln's own, whose modules fit kiln's own kernel alone.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::bake::cpio::CpioWriter;
use crate::bake::kernel::{KernelError, Module, ModuleIndex};
use crate::bake::process::{Program, RunContext, RunError};
use crate::bake::{BakeEvent, Cancel};

use super::Refused;
use super::kernel::{in_memory, is_release};

/// Where a Linux host keeps modules, a folder for each release.
pub const HOST_MODULES: &str = "/lib/modules";
/// Without these no machine comes up, in the order in which they load.
const NEEDED: [&str; 5] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "ext4",
    "overlay",
];
/// Taken where they are: ext4's checksums in kernels before 6.14, entropy.
const WANTED: [&str; 3] = ["crc32c_generic", "crc32c_intel", "virtio_rng"];
/// Largest of the lists that are read, bytes.
const LIST_BYTES_MAX: u64 = 32 << 20;
/// Largest module, as a file and unpacked, bytes.
const MODULE_BYTES_MAX: u64 = 64 << 20;
/// How long decompressing one module may take.
const XZ_DEADLINE: Duration = Duration::from_secs(30);

/// What goes behind kiln's initrd for a kernel that is not kiln's own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Behind {
    /// An archive: the modules and their order.
    pub archive: Vec<u8>,
    /// Names of the modules, in that order.
    pub modules: Vec<String>,
    /// Where they were looked for; none: this host has no folder for the release.
    pub folder: Option<PathBuf>,
}

/// Why a module cannot be taken.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    /// It is not what it should be.
    #[error("{0}")]
    Kernel(#[from] KernelError),
    /// A file.
    #[error("{} cannot be read: {source}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The program that decompresses.
    #[error("{} cannot be decompressed: {source}", .path.display())]
    Xz {
        path: PathBuf,
        #[source]
        source: RunError,
    },
}

/// The modules of a release, from its folder below `host`; none where there is no such folder. Blocks.
///
/// # Errors
/// When the folder is there but lacks what every machine needs, or cannot be read.
pub fn behind(release: &str, host: &Path) -> Result<Behind, Refused> {
    let folder = host.join(release);
    if !is_release(release) || !folder.is_dir() {
        return Ok(Behind {
            archive: archive(&[]).map_err(|error| unreadable(release, &error))?,
            modules: Vec::new(),
            folder: None,
        });
    }
    let modules = found(release, &folder)?;
    Ok(Behind {
        archive: archive(&modules).map_err(|error| unreadable(release, &error))?,
        modules: modules.into_iter().map(|module| module.name).collect(),
        folder: Some(folder),
    })
}

fn unreadable(release: &str, error: &dyn std::error::Error) -> Refused {
    Refused::new(
        format!("the modules of the kernel {release} cannot be used: {error}"),
        "install the kernel's package anew, or give a kernel that has everything built in",
    )
}

fn found(release: &str, folder: &Path) -> Result<Vec<Module>, Refused> {
    let list = |name: &str| {
        let path = folder.join(name);
        let read = read(&path, LIST_BYTES_MAX);
        read.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    let files = list("modules.dep").map_err(|error| unreadable(release, &error))?;
    let builtin = list("modules.builtin").map_err(|error| unreadable(release, &error))?;
    let paths = files.lines().filter_map(|line| line.split(':').next());
    let index = ModuleIndex::new(paths, &builtin);
    let mut order: Vec<Module> = Vec::new();
    let mut missing = Vec::new();
    let wanted = WANTED.iter().map(|name| (name, false));
    let needed = NEEDED.iter().map(|name| (name, true));
    for (name, is_needed) in wanted.chain(needed) {
        let names = [(*name).to_owned()];
        let loaded = index.load_order(&names, |path| module(folder, path));
        match loaded {
            Ok(modules) => {
                for module in modules {
                    if !order.iter().any(|other| other.name == module.name) {
                        order.push(module);
                    }
                }
            }
            Err(_) if !is_needed => {}
            Err(Trouble::Kernel(KernelError::NoModule(lacking))) => missing.push(lacking),
            Err(other) => return Err(unreadable(release, &other)),
        }
    }
    match missing.is_empty() {
        true => Ok(order),
        false => Err(Refused::new(
            format!(
                "the kernel {release} lacks {}: neither built in nor below {}",
                missing.join(", "),
                folder.display()
            ),
            "install the rest of its modules, or give another kernel",
        )),
    }
}

/// The archive of these modules and their order.
fn archive(modules: &[Module]) -> io::Result<Vec<u8>> {
    let mut cpio = CpioWriter::new(Vec::new());
    let mut order = String::from("# of the kernel that was given\n");
    for module in modules {
        // A name of its own: kiln's modules stay where they are, unnamed.
        let file = format!("given-{}.ko", module.name);
        cpio.file(&format!("modules/{file}"), 0o644, &module.bytes)?;
        order.push_str(&file);
        order.push('\n');
    }
    cpio.file("modules/order", 0o644, order.as_bytes())?;
    cpio.finish()
}

/// A module's bytes, decompressed.
fn module(folder: &Path, path: &str) -> Result<Vec<u8>, Trouble> {
    let inner = Path::new(path);
    let stays = |part: Component<'_>| matches!(part, Component::Normal(_));
    if !inner.components().all(stays) {
        return Err(KernelError::NoModule(path.to_owned()).into());
    }
    let path = folder.join(inner);
    let broken = |source| Trouble::Read {
        path: path.clone(),
        source,
    };
    let extension = path.extension().unwrap_or_default();
    if extension == "xz" {
        return unxz(&path);
    }
    let bytes = read(&path, MODULE_BYTES_MAX)?;
    let decoded = match extension.as_encoded_bytes() {
        b"zst" => zstd::stream::read::Decoder::new(&bytes[..])
            .and_then(|decoder| whole(decoder, MODULE_BYTES_MAX)),
        b"gz" => whole(flate2::read::GzDecoder::new(&bytes[..]), MODULE_BYTES_MAX),
        _ => Ok(bytes),
    };
    decoded.map_err(broken)
}

fn unxz(path: &Path) -> Result<Vec<u8>, Trouble> {
    let failed = |source| Trouble::Xz {
        path: path.to_owned(),
        source,
    };
    let lock = in_memory(&[]).map_err(|source| Trouble::Read {
        path: path.to_owned(),
        source,
    })?;
    let silent = |_: &BakeEvent<'_>| {};
    let context = RunContext {
        stage: "modules",
        progress: &silent,
        cancel: &Cancel::new(),
        lock: &lock,
    };
    let program = Program::new("xz", XZ_DEADLINE);
    let program = program.args(["-d", "-c", "-f", "--"]).arg(path);
    program.capture(&context).map_err(failed)
}

fn read(path: &Path, most: u64) -> Result<Vec<u8>, Trouble> {
    let failed = |source| Trouble::Read {
        path: path.to_owned(),
        source,
    };
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    whole(File::open(path).map_err(failed)?, most).map_err(failed)
}

/// Everything a reader gives, unless it is more than this.
fn whole(reader: impl io::Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(io::Error::other(format!("it is larger than {most} bytes"))),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bake::kernel::tests::module as elf;

    /// A host with modules of one release, as files by path with what each needs.
    fn host(files: &[(&str, &str)], builtin: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp dir");
        let folder = dir.path().join("6.1.0-x");
        let mut list = String::new();
        for (path, needs) in files {
            let file = folder.join(path);
            fs::create_dir_all(file.parent().expect("parent")).expect("folder");
            let bytes = elf(needs);
            let packed = match file.extension().expect("extension").to_str() {
                Some("zst") => zstd::stream::encode_all(&bytes[..], 3).expect("memory"),
                _ => bytes,
            };
            fs::write(&file, packed).expect("write");
            list.push_str(&format!("{path}: {needs}\n"));
        }
        fs::create_dir_all(&folder).expect("folder");
        fs::write(folder.join("modules.dep"), list).expect("write");
        fs::write(folder.join("modules.builtin"), builtin).expect("write");
        dir
    }

    const BUILTIN: &str = "kernel/virtio_pci.ko\nkernel/virtio_console.ko\nkernel/ext4.ko\n";

    #[test]
    fn modules_come_with_what_they_need_and_are_unpacked() {
        let host = host(
            &[
                ("kernel/virtio_blk.ko.zst", "virtio"),
                ("kernel/virtio.ko", ""),
                ("kernel/overlay.ko", ""),
            ],
            BUILTIN,
        );
        let behind = behind("6.1.0-x", host.path()).expect("all there");
        assert_eq!(behind.modules, ["virtio", "virtio_blk", "overlay"]);
        let text = String::from_utf8_lossy(&behind.archive);
        let order = "given-virtio.ko\ngiven-virtio_blk.ko\ngiven-overlay.ko\n";
        assert!(text.contains(order), "the order");
        assert!(text.contains("modules/given-virtio_blk.ko\0"));
    }

    #[test]
    fn what_a_machine_needs_is_missed_by_name() {
        let host = host(&[("kernel/virtio_blk.ko", "")], BUILTIN);
        let refused = behind("6.1.0-x", host.path()).expect_err("no overlay");
        assert!(refused.message.contains("lacks overlay"), "{refused}");
        fs::remove_file(host.path().join("6.1.0-x/modules.dep")).expect("remove");
        let refused = behind("6.1.0-x", host.path()).expect_err("no list");
        assert!(refused.message.contains("modules.dep"), "{refused}");
    }

    #[test]
    fn a_list_leads_nowhere_else() {
        let host = host(&[("kernel/overlay.ko", "")], BUILTIN);
        let outside = host.path().join("virtio_blk.ko");
        fs::write(&outside, elf("")).expect("write");
        let folder = host.path().join("6.1.0-x");
        for path in ["../virtio_blk.ko", outside.to_str().expect("UTF-8")] {
            fs::write(
                folder.join("modules.dep"),
                format!("kernel/overlay.ko:\n{path}:\n"),
            )
            .expect("write");
            let refused = behind("6.1.0-x", host.path()).expect_err(path);
            assert!(refused.message.contains("lacks"), "{refused}");
        }
    }

    #[test]
    fn a_release_without_a_folder_has_none() {
        let host = host(&[], "");
        for release in ["6.2", "..", "", "../6.1.0-x"] {
            let behind = behind(release, host.path()).expect("none");
            assert!(behind.modules.is_empty() && behind.folder.is_none());
            let text = String::from_utf8_lossy(&behind.archive);
            assert!(
                text.contains("modules/order\0"),
                "kiln's own are not loaded"
            );
        }
    }

    #[test]
    fn what_is_too_large_is_not_taken() {
        assert!(whole(&[0_u8; 5][..], 5).is_ok());
        assert!(whole(&[0_u8; 6][..], 5).is_err());
    }
}
