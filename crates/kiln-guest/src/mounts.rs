//! The machine's own disks: where each is mounted, how, and how it is let go of so that its files are whole.
//!
//! A disk is named by its serial number; each role has one place. Unmounting is complete only when the kernel holds
//! the device no more: then everything is on the disk and the next mount replays no journal.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_core::DiskRole;
use kiln_proto::msg::{FullMemory, GuestError, GuestErrorCode, Mount, Mounted};
use rustix::fs::{Mode, OFlags, fsync, statvfs, syncfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use crate::error::{Context, SysError, failure, invalid};
use crate::state::Guest;
use crate::{container, log, tool, tree, uevent};

/// Where the state disk is mounted: BuildKit's root.
pub(crate) const STATE: &str = "/var/lib/buildkit";
/// Where the scratch disk is mounted.
pub(crate) const SCRATCH: &str = "/scratch";
/// Where the disks of services are mounted.
const SERVICES: [&str; 4] = ["/service/1", "/service/2", "/service/3", "/service/4"];
/// Where the image disk is mounted.
pub(crate) const IMAGE: &str = "/image";
/// Longest wait for a disk, whatever the order says.
const APPEAR_MAX: Duration = Duration::from_secs(60);
/// How long making a filesystem may take.
const FORMAT_WAIT: Duration = Duration::from_secs(60);
/// How long the kernel may take to let go of an unmounted disk.
const RELEASE_WAIT: Duration = Duration::from_secs(30);
/// Pause between two looks whether it did: there is no notification for it.
const RELEASE_PAUSE: Duration = Duration::from_millis(2);
/// Bytes at the start of a disk that decide whether it is blank.
const PROBE_LEN: usize = 64 * 1024;
/// Offset of the magic number in an ext4 superblock, from the start of the disk.
const EXT4_MAGIC_AT: usize = 1024 + 56;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];
/// Directories of the scratch disk that stand in for those of the root.
const SCRATCH_BINDS: [(&str, &str, u32); 3] = [
    ("work", "/work", 0o755),
    ("tmp", "/tmp", 0o1777),
    ("var-tmp", "/var/tmp", 0o1777),
];

/// What lies on a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Content {
    Blank,
    Ext4,
    Other,
}

fn content(start: &[u8]) -> Content {
    if start.get(EXT4_MAGIC_AT..EXT4_MAGIC_AT + 2) == Some(&EXT4_MAGIC) {
        Content::Ext4
    } else if start.iter().all(|byte| *byte == 0) {
        Content::Blank
    } else {
        Content::Other
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Entry {
    path: &'static str,
    /// The disk; `None` for memory.
    node: Option<PathBuf>,
    read_only: bool,
}

/// The disks that are mounted, by serial number.
#[derive(Debug, Default)]
pub(crate) struct Mounts(HashMap<String, Entry>);

impl Mounts {
    fn at(&self, path: &str) -> Option<&Entry> {
        self.0.values().find(|entry| entry.path == path)
    }

    /// True if a disk is mounted there.
    pub(crate) fn is_mounted(&self, path: &str) -> bool {
        self.at(path).is_some()
    }

    /// True if a disk is mounted there for writing.
    pub(crate) fn is_writable(&self, path: &str) -> bool {
        self.at(path).is_some_and(|entry| !entry.read_only)
    }
}

/// Where a disk belongs.
fn place(serial: &str) -> Option<&'static str> {
    let services = DiskRole::SERVICES.into_iter().zip(SERVICES);
    [
        (DiskRole::State, STATE),
        (DiskRole::Scratch, SCRATCH),
        (DiskRole::Source, "/source"),
        (DiskRole::Image, IMAGE),
    ]
    .into_iter()
    .chain(services)
    .find_map(|(role, path)| (role.serial() == serial).then_some(path))
}

/// Mounts a disk when it is there, at the place of its role.
pub(crate) async fn mount_disk(guest: &Guest, order: Mount) -> Result<Mounted, GuestError> {
    let path = place(&order.serial)
        .ok_or_else(|| invalid(format!("disk {:?} is not for mounting", order.serial)))?;
    let mut mounts = guest.mounts.lock().await;
    if mounts.is_mounted(path) {
        return Err(invalid(format!("{path} is mounted already")));
    }
    if order.memory_bytes > 0 {
        let bytes = order.memory_bytes;
        blocking(move || mount_memory(path, bytes)).await?;
        let entry = Entry {
            path,
            node: None,
            read_only: false,
        };
        mounts.0.insert(order.serial, entry);
        return Ok(space(path)?);
    }
    let within = Duration::from_millis(order.timeout_ms).min(APPEAR_MAX);
    let serial = order.serial.clone();
    let disk = blocking(move || uevent::wait_for(&serial, within)).await?;
    if order.format_blank && !order.read_only {
        format(guest, &disk.node, path == SCRATCH).await?;
    }
    let node = disk.node.clone();
    let read_only = order.read_only;
    blocking(move || mount_at(&node, path, read_only)).await?;
    let entry = Entry {
        path,
        node: Some(disk.node),
        read_only,
    };
    mounts.0.insert(order.serial, entry);
    Ok(space(path)?)
}

/// Unmounts a disk and waits until all of it is written.
pub(crate) async fn unmount_disk(guest: &Guest, serial: &str) -> Result<(), GuestError> {
    let mut mounts = guest.mounts.lock().await;
    let entry = mounts.0.get(serial).cloned();
    let entry = entry.ok_or_else(|| invalid(format!("disk {serial:?} is not mounted")))?;
    blocking(move || let_go(&entry)).await?;
    mounts.0.remove(serial);
    Ok(())
}

/// Unmounts every disk at power-off. Failures are logged: nothing else can be done then.
pub(crate) async fn unmount_all(guest: &Guest) {
    let serials: Vec<String> = guest.mounts.lock().await.0.keys().cloned().collect();
    for serial in serials {
        if let Err(error) = unmount_disk(guest, &serial).await {
            log::error(&format!("disk {serial} was not unmounted: {error}"));
        }
    }
}

/// Bytes free on the disk at `path`; none when no disk is mounted there.
pub(crate) async fn bytes_free(guest: &Guest, path: &str) -> Option<u64> {
    let mounted = guest.mounts.lock().await.is_mounted(path);
    let space = mounted.then(|| space(path).ok()).flatten()?;
    Some(space.bytes_free)
}

/// Where files lie in memory as long as no disk is mounted for them. The first is the writable layer of the root.
const IN_MEMORY: [&str; 4] = ["/", "/tmp", "/run", "/dev/shm"];
/// With less room than this they are full, bytes; small ones with less than a 64th of it.
const FULL_BELOW: u64 = 1024 * 1024;

/// Files in memory that take no more, if any do.
pub(crate) async fn full_memory(guest: &Guest) -> Option<FullMemory> {
    let on_disk = guest.mounts.lock().await.is_writable(SCRATCH);
    let places = IN_MEMORY.iter().filter(|place| {
        let bound = SCRATCH_BINDS.iter().any(|(_, target, _)| target == *place);
        !(on_disk && bound)
    });
    places
        .filter_map(|place| space(place).ok())
        .find(|space| is_full(space.bytes_free, space.bytes_total))
        .map(|space| FullMemory {
            path: space.path,
            bytes_total: space.bytes_total,
        })
}

fn is_full(free: u64, total: u64) -> bool {
    free < FULL_BELOW.min(total / 64)
}

/// Where the image disk of a service is mounted; 0 is that of the command's own container.
pub(crate) fn image_at(place: u8) -> Option<&'static str> {
    match usize::from(place).checked_sub(1) {
        None => Some(IMAGE),
        Some(index) => SERVICES.get(index).copied(),
    }
}

/// Bounds what may be written to the state disk from now on. The kernel sets the rest aside, for root too, until the disk is
/// unmounted; nothing of it is kept on the disk.
pub(crate) async fn bound_state(guest: &Guest, bytes_max: u64) -> Result<(), GuestError> {
    let mounts = guest.mounts.lock().await;
    let entry = mounts.at(STATE).filter(|entry| !entry.read_only);
    let device = entry.and_then(|entry| entry.node.as_deref()?.file_name());
    // Kernel documentation, admin-guide/ext4: "reserved_clusters".
    let file = match device {
        Some(device) => Path::new("/sys/fs/ext4")
            .join(device)
            .join("reserved_clusters"),
        None => return Err(invalid("no state disk is mounted for writing")),
    };
    blocking(move || {
        let stat = statvfs(STATE).context(|| format!("look at {STATE}"))?;
        let kept = aside(stat.f_bfree, stat.f_frsize, bytes_max);
        fs::write(&file, kept.to_string()).context(|| format!("write {}", file.display()))
    })
    .await
}

/// Blocks to set aside so that at most this many bytes can be written.
fn aside(blocks_free: u64, block_bytes: u64, bytes_max: u64) -> u64 {
    blocks_free.saturating_sub(bytes_max.div_ceil(block_bytes.max(1)))
}

/// Bytes the filesystem at `path` has.
pub(crate) fn bytes_total(path: &str) -> Result<u64, SysError> {
    space(path).map(|space| space.bytes_total)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SysError> + Send + 'static,
) -> Result<T, GuestError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| invalid(error.to_string()))?
        .map_err(GuestError::from)
}

fn space(path: &str) -> Result<Mounted, SysError> {
    let stat = statvfs(path).context(|| format!("look at {path}"))?;
    Ok(Mounted {
        path: path.to_owned(),
        bytes_total: stat.f_blocks.saturating_mul(stat.f_frsize),
        bytes_free: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// Makes a filesystem on a blank disk. A disk with anything else on it is left alone. One that dies with the machine has no journal and no
/// checksums of its metadata: nobody mounts it again.
async fn format(guest: &Guest, node: &Path, dies: bool) -> Result<(), GuestError> {
    let mut start = vec![0; PROBE_LEN];
    let read = File::open(node).and_then(|mut disk| disk.read_exact(&mut start));
    read.context(|| format!("read {}", node.display()))?;
    match content(&start) {
        Content::Ext4 => return Ok(()),
        Content::Other => {
            let message = format!("{} holds neither nothing nor ext4", node.display());
            return Err(failure(GuestErrorCode::Invalid, message));
        }
        Content::Blank => {}
    }
    let node = node.display().to_string();
    // A new disk reads as zeros: neither inode tables nor free space need writing.
    let options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,assume_storage_prezeroed=1";
    let features = if dies {
        "^has_journal,^metadata_csum"
    } else {
        "has_journal"
    };
    let argv = [
        "mkfs.ext4",
        "-q",
        "-F",
        "-m",
        "0",
        "-O",
        features,
        "-E",
        options,
        &node,
    ];
    Ok(tool::run(guest, &argv, FORMAT_WAIT).await?)
}

fn mount_at(node: &Path, path: &str, read_only: bool) -> Result<(), SysError> {
    fs::create_dir_all(path).context(|| format!("make {path}"))?;
    let mut flags = MountFlags::NOATIME;
    // Barriers stay on: a disk's file must be whole whenever it is copied. No lazy initialisation in the background:
    // an idle machine must be idle.
    let mut options = c"commit=60,noinit_itable,errors=remount-ro";
    if path == SCRATCH {
        // It has no journal that could be committed.
        options = c"noinit_itable,errors=remount-ro";
    }
    if read_only {
        flags |= MountFlags::RDONLY;
        options = c"";
    }
    mount(node, path, "ext4", flags, options)
        .context(|| format!("mount {} on {path}", node.display()))?;
    if path == SCRATCH && !read_only {
        for (name, target, mode) in SCRATCH_BINDS {
            let source = Path::new(path).join(name);
            let what = || format!("put {target} on the scratch disk");
            fs::create_dir_all(&source).context(what)?;
            fs::set_permissions(&source, fs::Permissions::from_mode(mode)).context(what)?;
            mount_bind(&source, target).context(what)?;
        }
    }
    Ok(())
}

/// Mount points below `path` in a mountinfo file, deepest first, `path` itself last.
fn mounted_below(mountinfo: &str, path: &str) -> Vec<String> {
    let inside = |point: &str| {
        point
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let mut found: Vec<String> = mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|point| inside(point))
        .collect();
    // Later mounts may cover earlier ones: the last mounted goes first.
    found.reverse();
    found.sort_by_key(|point| std::cmp::Reverse(point.matches('/').count()));
    found
}

/// Undoes the octal escapes of mountinfo.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| byte == b'\\');
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(value.unwrap_or(byte));
        rest = if value.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn let_go(entry: &Entry) -> Result<(), SysError> {
    let path = entry.path;
    if path == STATE && !entry.read_only {
        // Build contexts are this machine's alone and no part of a head.
        let _none = fs::remove_dir_all(tree::ON_STATE);
    }
    if path == SCRATCH || path == IMAGE || SERVICES.contains(&path) {
        container::release();
    }
    if path == SCRATCH {
        for (_, target, _) in SCRATCH_BINDS.iter().rev() {
            let _was_not = unmount(*target, UnmountFlags::empty());
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        rustix::fs::open(path, flags, Mode::empty()).context(|| format!("open {path}"))?;
    syncfs(&directory).context(|| format!("write out {path}"))?;
    drop(directory);
    let mountinfo = fs::read_to_string("/proc/self/mountinfo");
    let mountinfo = mountinfo.context(|| "read the mounts".to_owned())?;
    for point in mounted_below(&mountinfo, path) {
        unmount(&point, UnmountFlags::empty()).context(|| format!("unmount {point}"))?;
    }
    match &entry.node {
        Some(node) => released(node, entry.read_only),
        None => Ok(()),
    }
}

/// Memory in place of a disk: for programs that shall have run before their disk is known.
fn mount_memory(path: &str, bytes: u64) -> Result<(), SysError> {
    fs::create_dir_all(path).context(|| format!("make {path}"))?;
    let options = CString::new(format!("size={bytes},mode=0711")).unwrap_or_default();
    mount(
        "tmpfs",
        path,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(options.as_c_str()),
    )
    .context(|| format!("mount memory at {path}"))
}

/// Waits until nothing holds the device: mounts in namespaces that just died are undone a little later.
fn released(node: &Path, read_only: bool) -> Result<(), SysError> {
    let deadline = Instant::now() + RELEASE_WAIT;
    let access = if read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    loop {
        match rustix::fs::open(node, access | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
            Ok(device) => return fsync(&device).context(|| format!("flush {}", node.display())),
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(RELEASE_PAUSE),
            Err(error) => {
                let failed: Result<(), Errno> = Err(error);
                return failed.context(|| format!("release {}", node.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_aside_leaves_what_is_allowed() {
        assert_eq!(aside(1000, 4096, 4096 * 10), 990);
        assert_eq!(aside(1000, 4096, 1), 999);
        assert_eq!(aside(10, 4096, 1 << 40), 0);
    }

    #[test]
    fn files_in_memory_are_full_when_nothing_more_fits() {
        const MIB: u64 = 1024 * 1024;
        assert!(is_full(0, 64 * MIB) && is_full(MIB - 1, 64 * MIB));
        assert!(!is_full(MIB, 64 * MIB) && !is_full(32 * 1024, 2 * MIB));
        // A root without a writable layer of its own says nothing of its size.
        assert!(!is_full(0, 0));
    }

    #[test]
    fn content_is_told_by_the_superblock() {
        let mut start = vec![0; PROBE_LEN];
        assert_eq!(content(&start), Content::Blank);
        start[0] = 1;
        assert_eq!(content(&start), Content::Other);
        start[EXT4_MAGIC_AT..EXT4_MAGIC_AT + 2].copy_from_slice(&EXT4_MAGIC);
        assert_eq!(content(&start), Content::Ext4);
    }

    #[test]
    fn inner_mounts_come_first() {
        let info = "1 0 0:1 / / rw - ext4 /dev/vda rw\n\
            2 1 0:2 / /var/lib/buildkit rw - ext4 /dev/vdb rw\n\
            3 2 0:3 / /var/lib/buildkit/a rw - overlay overlay rw\n\
            4 2 0:3 / /var/lib/buildkit/a/b\\040c rw - tmpfs tmpfs rw\n\
            5 1 0:4 / /var/lib/buildkit-other rw - tmpfs tmpfs rw\n";
        let found = mounted_below(info, "/var/lib/buildkit");
        assert_eq!(
            found,
            [
                "/var/lib/buildkit/a/b c",
                "/var/lib/buildkit/a",
                "/var/lib/buildkit"
            ]
        );
    }

    #[test]
    fn every_role_but_root_has_a_place() {
        assert_eq!(place("kiln-state"), Some(STATE));
        assert_eq!(place("kiln-root"), None);
        assert_eq!(place("kiln-service4"), Some("/service/4"));
        assert_eq!(
            (image_at(0), image_at(1), image_at(5)),
            (Some(IMAGE), Some("/service/1"), None)
        );
        assert_eq!(place("other"), None);
    }
}
