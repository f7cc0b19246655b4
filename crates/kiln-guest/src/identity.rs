//! A clone's new identity: entropy, clock, boot id, machine-id, host name; everything is read back.
//!
//! The kernel's boot id is made when it is first read, and nothing here reads it: a clone's kernel never holds its
//! template's, and what containers see in their own `/proc` is fresh as well. Over the machine's own one lies a file.
//!
//! A clone waits for this, on a processor that has not run any code yet. So [`prepare`] makes every file at boot, [`Files`]
//! keeps them open, and [`take`] only writes into them.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kiln_proto::msg::{GuestError, Identity, Reidentified};
use rustix::mount::{MountFlags, mount_bind, mount_remount};
use rustix::system::{sethostname, uname};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::error::{Context, SysError, invalid};
use crate::state::Guest;

/// Bytes of entropy in a seed.
const SEED_LEN: usize = 32;
/// `RNDADDENTROPY` of random(4).
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG` of random(4).
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
/// Bytes read back from the generator.
const SAMPLE_LEN: usize = 16;
/// Where the kernel shows its boot id.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Where ours is kept.
const OWN_BOOT_ID: &str = "/run/kiln/boot_id";
/// The machine-id of systemd and of D-Bus.
const MACHINE_ID: &str = "/etc/machine-id";
const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";
const HOSTS: &str = "/etc/hosts";
const HOSTNAME: &str = "/etc/hostname";
/// The kernel's generator.
const RANDOM: &str = "/dev/random";
/// Longest host name.
const HOSTNAME_MAX: usize = 63;
/// Most bytes of one of the files.
const TEXT_MAX: usize = 256;

/// The files that hold the identity, open from boot on.
#[derive(Debug)]
pub(crate) struct Files {
    own_boot_id: Kept,
    /// The boot id as programs see it.
    boot_id: File,
    machine_id: Kept,
    hosts: Kept,
    hostname: Kept,
    random: File,
}

/// A file that is written again as a whole.
#[derive(Debug)]
struct Kept {
    file: File,
    path: &'static str,
    len: AtomicU64,
}

impl Kept {
    fn open(path: &'static str) -> Result<Self, SysError> {
        let what = || format!("open {path}");
        let file = File::options().read(true).write(true).open(path);
        let file = file.context(what)?;
        let len = AtomicU64::new(file.metadata().context(what)?.len());
        Ok(Self { file, path, len })
    }

    fn write(&self, text: &str) -> Result<(), SysError> {
        let len = text.len() as u64;
        let written = self.file.write_all_at(text.as_bytes(), 0).and_then(|()| {
            match self.len.swap(len, Ordering::Relaxed) > len {
                true => self.file.set_len(len),
                false => Ok(()),
            }
        });
        written.context(|| format!("write {}", self.path))
    }

    fn read(&self) -> Result<String, SysError> {
        read(&self.file, self.path)
    }
}

/// What a small file holds, without the white space around it.
fn read(file: &File, path: &str) -> Result<String, SysError> {
    let mut text = [0; TEXT_MAX];
    let len = file
        .read_at(&mut text, 0)
        .context(|| format!("read {path}"))?;
    Ok(String::from_utf8_lossy(&text[..len]).trim().to_owned())
}

impl Files {
    /// Opens what [`prepare`] made.
    pub(crate) fn open() -> Result<Self, SysError> {
        let boot_id = File::open(BOOT_ID).context(|| format!("open {BOOT_ID}"))?;
        let random = File::options().write(true).open(RANDOM);
        Ok(Self {
            own_boot_id: Kept::open(OWN_BOOT_ID)?,
            boot_id,
            machine_id: Kept::open(MACHINE_ID)?,
            hosts: Kept::open(HOSTS)?,
            hostname: Kept::open(HOSTNAME)?,
            random: random.context(|| format!("open {RANDOM}"))?,
        })
    }

    /// The boot id this machine was given, or made at boot.
    pub(crate) fn known_boot_id(&self) -> String {
        self.own_boot_id.read().unwrap_or_default()
    }
}

/// Bytes of hexadecimal text of exactly that length.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value & 15)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(*byte)])
        .collect()
}

fn is_uuid(text: &str) -> bool {
    let hyphens = [8, 13, 18, 23];
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| {
            if hyphens.contains(&at) {
                byte == b'-'
            } else {
                byte.is_ascii_hexdigit()
            }
        })
}

fn is_hostname(text: &str) -> bool {
    (1..=HOSTNAME_MAX).contains(&text.len())
        && !text.starts_with('-')
        && !text.ends_with('-')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Makes the files that hold the identity, with one that is good until the host gives another.
///
/// # Errors
/// What keeps the machine without an identity.
pub(crate) fn prepare(hostname: &str) -> Result<(), SysError> {
    fs::create_dir_all("/etc").context(|| "make /etc".to_owned())?;
    let [a, b, c, d, e, f, g, h, rest @ ..] = random()?;
    let machine_id = hex(&random()?);
    let boot_id = format!(
        "{}-{}-{}-{}-{}",
        hex(&[a, b, c, d]),
        hex(&[e, f]),
        hex(&[g & 0x0f | 0x40, h]),
        hex(&[rest[0] & 0x3f | 0x80, rest[1]]),
        hex(&rest[2..])
    );
    replace(MACHINE_ID, &format!("{machine_id}\n"))?;
    if Path::new(DBUS_MACHINE_ID)
        .parent()
        .is_some_and(Path::is_dir)
    {
        let _none_before = fs::remove_file(DBUS_MACHINE_ID);
        std::os::unix::fs::symlink(MACHINE_ID, DBUS_MACHINE_ID)
            .context(|| format!("link {DBUS_MACHINE_ID}"))?;
    }
    sethostname(hostname.as_bytes()).context(|| "set the host name".to_owned())?;
    replace(HOSTS, &hosts(hostname, &[]))?;
    replace(HOSTNAME, &format!("{hostname}\n"))?;
    write(OWN_BOOT_ID, &format!("{boot_id}\n"))?;
    // The kernel has no way to change its own: cover it.
    mount_bind(OWN_BOOT_ID, BOOT_ID).context(|| format!("cover {BOOT_ID}"))?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID;
    mount_remount(BOOT_ID, flags, "").context(|| format!("cover {BOOT_ID} read-only"))
}

/// Takes the identity. The workload is frozen.
pub(crate) fn take(guest: &Guest, identity: &Identity) -> Result<Reidentified, GuestError> {
    let ran = guest.freezer.used_since();
    let seed: [u8; SEED_LEN] =
        unhex(&identity.seed).ok_or_else(|| invalid("a seed has 64 hex digits"))?;
    if !is_uuid(&identity.boot_id) {
        return Err(invalid("a boot id is a UUID with hyphens"));
    }
    if unhex::<16>(&identity.machine_id).is_none() {
        return Err(invalid("a machine-id has 32 hex digits"));
    }
    if !is_hostname(&identity.hostname) {
        return Err(invalid("the host name is no label of DNS"));
    }
    Ok(apply(&guest.identity, identity, &seed, ran)?)
}

fn apply(
    files: &Files,
    identity: &Identity,
    seed: &[u8; SEED_LEN],
    ran: u64,
) -> Result<Reidentified, SysError> {
    let (entropy_added, reseeded) = reseed(&files.random, seed);
    set_clock(identity.wall_unix_ns)?;
    let line = |text: &str| [text, "\n"].concat();
    files.own_boot_id.write(&line(&identity.boot_id))?;
    files.machine_id.write(&line(&identity.machine_id))?;
    sethostname(identity.hostname.as_bytes()).context(|| "set the host name".to_owned())?;
    files.hosts.write(&hosts(&identity.hostname, &[]))?;
    files.hostname.write(&line(&identity.hostname))?;
    let sample = random()?;
    Ok(Reidentified {
        entropy_added,
        reseeded,
        sample: hex(&sample),
        wall_unix_ns: wall_ns(),
        boot_id: read(&files.boot_id, BOOT_ID)?,
        machine_id: files.machine_id.read()?,
        hostname: uname().nodename().to_string_lossy().into_owned(),
        workload_ran: ran,
    })
}

/// Bytes of the kernel's generator.
#[expect(unsafe_code, reason = "getrandom(2)")]
fn random() -> Result<[u8; SAMPLE_LEN], SysError> {
    let mut bytes = [0; SAMPLE_LEN];
    // SAFETY: the buffer has the stated length and outlives the call.
    let got =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_INSECURE) };
    match usize::try_from(got) {
        Ok(SAMPLE_LEN) => Ok(bytes),
        _ => Err(SysError {
            what: "read random bytes".to_owned(),
            source: std::io::Error::last_os_error(),
        }),
    }
}

fn write(path: &str, text: &str) -> Result<(), SysError> {
    fs::write(path, text).context(|| format!("write {path}"))
}

/// Mixes the seed in with credit, then makes the kernel's generator use it. Credit alone does not.
#[expect(unsafe_code, reason = "rustix has no ioctls of random(4)")]
fn reseed(random: &File, seed: &[u8; SEED_LEN]) -> (bool, bool) {
    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        len: libc::c_int,
        seed: [u8; SEED_LEN],
    }
    let len = SEED_LEN as libc::c_int;
    let pool = Pool {
        entropy_bits: 8 * len,
        len,
        seed: *seed,
    };
    // SAFETY: the structure is rand_pool_info followed by `len` bytes and outlives the call.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) } == 0;
    // SAFETY: this ioctl has no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) } == 0;
    (added, reseeded)
}

fn wall_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000) + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn set_clock(unix_ns: u64) -> Result<(), SysError> {
    let time = Duration::from_nanos(unix_ns);
    let time = Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    };
    clock_settime(ClockId::Realtime, time).context(|| "set the clock".to_owned())
}

/// The text of a hosts file, with the names of services beside the machine's own.
pub(crate) fn hosts(hostname: &str, services: &[String]) -> String {
    let own = ["localhost", hostname].into_iter();
    let names: Vec<&str> = own.chain(services.iter().map(String::as_str)).collect();
    format!("127.0.0.1 {}\n", names.join(" "))
}

/// Most names of services.
const SERVICE_NAMES_MAX: usize = 16;

/// Lets names mean this machine.
pub(crate) fn name_services(guest: &Guest, names: Vec<String>) -> Result<(), GuestError> {
    if names.len() > SERVICE_NAMES_MAX || !names.iter().all(|name| is_hostname(name)) {
        return Err(invalid("the name of a service is a label of DNS"));
    }
    let hostname = uname().nodename().to_string_lossy().into_owned();
    guest.identity.hosts.write(&hosts(&hostname, &names))?;
    let mut services = guest.services.lock();
    let services = services.as_mut().map_err(|_| invalid("a lock is broken"))?;
    **services = names;
    Ok(())
}

/// Replaces a file of the root disk as a whole, whatever it was (often a symlink).
pub(crate) fn replace(path: &str, text: &str) -> Result<(), SysError> {
    let fresh = format!("{path}.kiln");
    let _none_before = fs::remove_file(&fresh);
    let written = File::create_new(&fresh).and_then(|mut file| {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())
    });
    written
        .and_then(|()| fs::rename(&fresh, path))
        .context(|| format!("write {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_identities_pass() {
        assert_eq!(unhex::<2>("0aFF"), Some([10, 255]));
        for bad in ["", "0a", "0aFFF", "0aF+", "+aFF"] {
            assert_eq!(unhex::<2>(bad), None, "{bad}");
        }
        assert_eq!(hex(&[0, 255, 16]), "00ff10");
        assert!(is_uuid("01234567-89ab-cdef-0123-456789abcdef"));
        assert!(!is_uuid("01234567-89ab-cdef-0123-456789abcde/"));
        assert!(!is_uuid("0123456789abcdef0123456789abcdef"));
        assert!(is_hostname("kiln-1") && is_hostname("a"));
        for bad in ["", "-a", "a-", "a.b", "a b", &"x".repeat(64)] {
            assert!(!is_hostname(bad), "{bad}");
        }
    }

    #[test]
    fn a_file_is_replaced_even_when_it_is_a_dangling_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        std::os::unix::fs::symlink("/nonexistent/target", &path).unwrap();
        replace(path.to_str().unwrap(), "nameserver\n").unwrap();
        assert!(!path.is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver\n");
    }
}
