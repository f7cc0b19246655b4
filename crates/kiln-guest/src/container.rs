//! Running a container image: its root filesystem, its user, and what runc is told.
//!
//! The image's files are a tenant's: `/etc/passwd` and `/etc/group` are read without leaving the image, bounded, and
//! believed only as far as they name numbers. Format: OCI runtime specification, `config.md` and `config-linux.md`.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::lchown;
use std::path::Path;
use std::sync::Arc;

use kiln_core::DiskRole;
use kiln_proto::msg::{ContainerSpec, GuestError, GuestErrorCode};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use serde_json::{Value, json};

use crate::error::{Context, SysError, failure, invalid};
use crate::state::Guest;
use crate::{container_init, identity, mounts, net, oci_wrapper, tree};

/// Where the command's container is put together; those of services lie beside it.
const BUNDLE: &str = "/run/kiln/container";
/// The tree that the host sent, in the machine and in a container that has it.
const WORK: &str = "/work";
/// Copies of the secrets of the container's user; a tmpfs.
const SECRETS: &str = "/run/kiln/container-secrets";
/// Where runc keeps its state.
const RUNC_ROOT: &str = "/run/kiln/runc";
/// Most bytes of passwd and group that are read.
const DATABASE_MAX: u64 = 1024 * 1024;
/// Most additional groups of one user.
const GROUPS_MAX: usize = 64;
/// Path of images that have none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where a container has file systems of its own.
const MOUNTED: [&str; 3] = ["/proc", "/dev", "/sys"];
/// Capabilities of a container's root, as container engines usually give them.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Where one container of this machine has its parts.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Parts {
    /// Where it is put together.
    bundle: String,
    /// The image's files, read-only.
    image: String,
    /// Its own files, above those.
    layer: String,
    /// Copies of the secrets of its user.
    secrets: String,
}

impl Parts {
    /// Of a place: 0 is the command's own container, the others are services. `layers` is where containers keep their own files.
    fn of(place: u8, layers: &str) -> Option<Self> {
        let image = format!("{}/rootfs", mounts::image_at(place)?);
        let named = |name: &str| match place {
            0 => name.to_owned(),
            place => format!("{name}-service{place}"),
        };
        Some(Self {
            bundle: named(BUNDLE),
            image,
            layer: named(layers),
            secrets: named(SECRETS),
        })
    }
}

/// A user as numbers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

/// Fields of a line, when there are enough of them.
fn fields<const N: usize>(line: &str) -> Option<[&str; N]> {
    let mut parts = line.splitn(N, ':');
    let mut fields = [""; N];
    for field in &mut fields {
        *field = parts.next()?;
    }
    Some(fields)
}

/// A line of passwd: name, uid, gid, home.
fn passwd_line(line: &str) -> Option<(&str, u32, u32, &str)> {
    let [name, _, uid, gid, _, home, _] = fields::<7>(line)?;
    Some((name, uid.parse().ok()?, gid.parse().ok()?, home))
}

/// A line of group: name, gid, members.
fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let [name, _, gid, members] = fields::<4>(line)?;
    Some((name, gid.parse().ok()?, members))
}

/// Finds the user an image asks for: `name`, `uid`, `name:group`, `uid:gid`, or nothing for root.
fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (who, with) = match wanted.split_once(':') {
        Some((who, with)) => (who, Some(with)),
        None => (wanted, None),
    };
    let who = if who.is_empty() { "0" } else { who };
    let number: Option<u32> = who.parse().ok();
    let matches = |line: &(&str, u32, u32, &str)| match number {
        Some(uid) => line.1 == uid,
        None => line.0 == who,
    };
    let entry = passwd.lines().filter_map(passwd_line).find(matches);
    let uid = entry.map(|(_, uid, _, _)| uid).or(number);
    let uid = uid.ok_or_else(|| format!("the image has no user {who:?}"))?;
    let home = entry.map_or("/", |(_, _, _, home)| home);
    let home = if home.starts_with('/') { home } else { "/" };
    let user = User {
        uid,
        home: home.to_owned(),
        ..User::default()
    };
    if let Some(with) = with.filter(|with| !with.is_empty()) {
        let named = group
            .lines()
            .filter_map(group_line)
            .find(|(name, _, _)| *name == with);
        let gid = with.parse().ok().or(named.map(|(_, gid, _)| gid));
        let gid = gid.ok_or_else(|| format!("the image has no group {with:?}"))?;
        return Ok(User { gid, ..user });
    }
    let gid = entry.map_or(0, |(_, _, gid, _)| gid);
    let member =
        |members: &str| entry.is_some_and(|(name, ..)| members.split(',').any(|m| m == name));
    let groups = group.lines().filter_map(group_line);
    let groups = groups.filter(|(_, other, members)| *other != gid && member(members));
    let groups = groups.map(|(_, gid, _)| gid).take(GROUPS_MAX).collect();
    Ok(User {
        gid,
        groups,
        ..user
    })
}

/// A file of the image, resolved as inside it; empty when there is none.
fn database(root: &OwnedFd, path: &str) -> Result<String, SysError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let Ok(fd) = openat2(root, path, flags, Mode::empty(), resolve) else {
        return Ok(String::new());
    };
    let file = fs::File::from(fd);
    let what = || format!("read {path} of the image");
    if !file.metadata().context(what)?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(DATABASE_MAX)
        .read_to_end(&mut bytes)
        .context(what)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn bind(source: &str, destination: &str) -> Value {
    json!({
        "destination": destination, "type": "bind", "source": source,
        "options": ["bind", "ro", "nosuid", "nodev", "noexec"],
    })
}

fn file_systems(bundle: &str) -> Value {
    let on = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    json!([
        on("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        on(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"]
        ),
        on(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5"
            ]
        ),
        on(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777"]
        ),
        on("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        on("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        on(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"]
        ),
        bind("/etc/resolv.conf", "/etc/resolv.conf"),
        bind(&format!("{bundle}/hosts"), "/etc/hosts"),
        bind(&format!("{bundle}/hostname"), "/etc/hostname"),
    ])
}

/// What runc is told. The machine's network is the container's: forwards and names work as they are.
fn config(spec: &ContainerSpec, user: &User, bundle: &str, open_files: u64) -> Value {
    let mut env: Vec<String> = spec.env.clone();
    let has = |env: &[String], name: &str| env.iter().any(|item| item.starts_with(name));
    if !has(&env, "PATH=") {
        env.push(PATH.to_owned());
    }
    if !has(&env, "HOME=") {
        env.push(format!("HOME={}", user.home));
    }
    if spec.tty && !has(&env, "TERM=") {
        env.push("TERM=xterm".to_owned());
    }
    let held: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": spec.tty,
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
            "args": spec.argv,
            "env": env,
            "cwd": if spec.cwd.is_empty() { "/" } else { &spec.cwd },
            "capabilities": { "bounding": CAPABILITIES, "effective": held, "permitted": held },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": open_files, "soft": open_files }],
            "noNewPrivileges": true,
        },
        "root": { "path": format!("{bundle}/rootfs"), "readonly": false },
        "hostname": spec.hostname,
        "mounts": file_systems(bundle),
        "linux": {
            // Relative: beside the cgroup of the runc that starts it, so the command's bounds hold for it.
            "cgroupsPath": "container",
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" },
            ],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug",
                "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// Puts a container together. Gives the command that runs it.
pub(crate) async fn prepare(
    guest: &Arc<Guest>,
    spec: ContainerSpec,
) -> Result<Vec<String>, GuestError> {
    if spec.argv.is_empty()
        || spec
            .argv
            .iter()
            .chain(&spec.env)
            .any(|text| text.contains('\0'))
    {
        return Err(invalid("a container needs a command without zero bytes"));
    }
    if !spec.cwd.is_empty() && !spec.cwd.starts_with('/') {
        return Err(invalid("the working directory of a container is absolute"));
    }
    let runc = oci_wrapper::runc();
    let runc =
        runc.ok_or_else(|| failure(GuestErrorCode::NotFound, "the root disk has no runc"))?;
    let parts = {
        let mounts = guest.mounts.lock().await;
        if !mounts::image_at(spec.place).is_some_and(|path| mounts.is_mounted(path)) {
            return Err(invalid("the image disk is not mounted"));
        }
        let layers = match mounts.is_writable(mounts::SCRATCH) {
            true => "/scratch/container",
            false => "/run/kiln/container-layer",
        };
        Parts::of(spec.place, layers).ok_or_else(|| invalid("there is no such place"))?
    };
    let services = guest.services.lock().map(|names| names.clone());
    let services = services.map_err(|_| invalid("a lock is broken"))?;
    let bundle = parts.bundle.clone();
    let number = guest.next_exec();
    let open_files = guest.open_files();
    let work = tokio::task::spawn_blocking(move || {
        container_init::place(number)?;
        put_together(&spec, &parts, &services, open_files)
    });
    work.await.map_err(|error| invalid(error.to_string()))??;
    let id = format!("container-{number}");
    let words = ["--root", RUNC_ROOT, "run", "--bundle", &bundle, &id];
    let mut argv = vec![runc.display().to_string()];
    argv.extend(words.map(str::to_owned));
    Ok(argv)
}

/// Lets go of the disks that containers were made of.
pub(crate) fn release() {
    let places = 0..=DiskRole::SERVICES.len();
    for parts in places.filter_map(|place| Parts::of(u8::try_from(place).ok()?, "")) {
        let _none_before = unmount(format!("{}/rootfs", parts.bundle), UnmountFlags::DETACH);
    }
}

/// Mounts the container's files: new ones, or those that the container before it left.
fn mount_files(spec: &ContainerSpec, parts: &Parts) -> Result<(), GuestError> {
    let rootfs = format!("{}/rootfs", parts.bundle);
    let _none_before = unmount(rootfs.as_str(), UnmountFlags::DETACH);
    let layer = Path::new(&parts.layer);
    let make =
        |path: &Path| fs::create_dir_all(path).context(|| format!("make {}", path.display()));
    if layer.exists() && !spec.again {
        fs::remove_dir_all(layer).context(|| format!("empty {}", parts.layer))?;
    }
    for path in [&layer.join("data"), &layer.join("work"), Path::new(&rootfs)] {
        make(path)?;
    }
    let (image, upper) = (&parts.image, &parts.layer);
    let options = format!("lowerdir={image},upperdir={upper}/data,workdir={upper}/work");
    let options = std::ffi::CString::new(options).unwrap_or_default();
    let mounted = mount(
        "overlay",
        &rootfs,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    );
    mounted.context(|| "mount the container's files".to_owned())?;
    match spec.work {
        true => show_work(&rootfs),
        false => Ok(()),
    }
}

/// Shows the tree in the container's files, so that whoever reads those from outside finds it, too. Those files are a tenant's: no link
/// of theirs is followed.
fn show_work(rootfs: &str) -> Result<(), GuestError> {
    let place = format!("{rootfs}{WORK}");
    let what = || format!("show {WORK} in the container");
    match fs::create_dir(&place) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        made => made.context(what)?,
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = rustix::fs::open(place, flags, Mode::empty()).context(what)?;
    let at = format!("/proc/self/fd/{}", place.as_raw_fd());
    Ok(mount_bind(WORK, at).context(what)?)
}

/// Makes the tree its user's own. Nothing runs in it meanwhile; no link is followed.
fn own_work(user: &User) -> Result<(), SysError> {
    let mut folders = vec![Path::new(WORK).to_owned()];
    while let Some(folder) = folders.pop() {
        let what = || format!("own {}", folder.display());
        lchown(&folder, Some(user.uid), Some(user.gid)).context(what)?;
        for entry in fs::read_dir(&folder).context(what)? {
            let entry = entry.context(what)?;
            if entry.file_type().context(what)?.is_dir() {
                folders.push(entry.path());
            } else {
                lchown(entry.path(), Some(user.uid), Some(user.gid)).context(what)?;
            }
        }
    }
    Ok(())
}

fn put_together(
    spec: &ContainerSpec,
    parts: &Parts,
    services: &[String],
    open_files: u64,
) -> Result<(), GuestError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&parts.image, flags, Mode::empty());
    let root = root.context(|| format!("open {}", parts.image))?;
    let (passwd, group) = (
        database(&root, "etc/passwd")?,
        database(&root, "etc/group")?,
    );
    let user = resolve(&spec.user, &passwd, &group)
        .map_err(|why| failure(GuestErrorCode::NotFound, why))?;
    drop(root);
    mount_files(spec, parts)?;
    if spec.work && user.uid != 0 && !spec.again {
        own_work(&user)?;
    }
    let hostname = if spec.hostname.is_empty() {
        rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned()
    } else {
        spec.hostname.clone()
    };
    let write = |name: &str, text: &str| {
        tree::write_file(
            &Path::new(&parts.bundle).join(name),
            0o755,
            0o644,
            text.as_bytes(),
        )
    };
    write("hosts", &identity::hosts(&hostname, services))?;
    write("hostname", &format!("{hostname}\n"))?;
    if !Path::new("/etc/resolv.conf").exists() {
        identity::replace("/etc/resolv.conf", net::RESOLV_CONF)?;
    }
    let spec = ContainerSpec {
        hostname,
        ..spec.clone()
    };
    let mut config = config(&spec, &user, &parts.bundle, open_files);
    container_init::add(&mut config);
    give_secrets(&spec.secrets, &user, Path::new(&parts.secrets), &mut config)?;
    if Path::new(tree::CA_OPERATOR).exists() {
        oci_wrapper::add_certificates(&mut config, tree::CA_BUNDLE);
    }
    write("config.json", &config.to_string())?;
    Ok(())
}

/// Copies secrets, in memory, into a folder that the container has: files of its user alone.
fn give_secrets(
    ids: &[String],
    user: &User,
    folder: &Path,
    config: &mut Value,
) -> Result<(), GuestError> {
    if folder.exists() {
        fs::remove_dir_all(folder).context(|| format!("empty {}", folder.display()))?;
    }
    if ids.is_empty() {
        return Ok(());
    }
    for id in ids {
        if !tree::is_secret_id(id) {
            return Err(invalid("the id of a secret has letters, digits, - _ ."));
        }
        let what = || format!("give the container the secret {id}");
        let value = fs::read(Path::new(tree::SECRETS).join(id)).context(what)?;
        let path = folder.join(id);
        tree::write_file(&path, 0o755, 0o400, &value)?;
        std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid)).context(what)?;
    }
    if let Some(mounts) = config.get_mut("mounts").and_then(Value::as_array_mut) {
        mounts.push(bind(&folder.display().to_string(), tree::SECRETS_INSIDE));
    }
    Ok(())
}

/// Why what is about to be run cannot start, if it is one of these containers and its files say so; else its init tells.
///
/// # Errors
/// As for a command that runs in the machine itself: that there is no such program, or that it cannot be run.
pub(crate) fn check(argv: &[String]) -> Result<(), SysError> {
    let [_, _, root, _, _, bundle, _] = argv else {
        return Ok(());
    };
    if root != RUNC_ROOT {
        return Ok(());
    }
    let bytes = fs::read(Path::new(bundle).join("config.json"));
    let config: Option<Value> = bytes
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let why = config.as_ref().and_then(|config| {
        let program = *container_init::command(config)?.first()?;
        Some((program, missing(config, program)?))
    });
    match why {
        Some((program, error)) => Err(error).context(|| format!("run {program:?}")),
        None => Ok(()),
    }
}

/// Looks for a program as execvp(3) will. None: it is there, or that is not to be known from outside.
fn missing(config: &Value, program: &str) -> Option<Errno> {
    let text = |path: &str| config.pointer(path).and_then(Value::as_str);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(text("/root/path")?, flags, Mode::empty()).ok()?;
    let cwd = Path::new(text("/process/cwd")?);
    let env = config.pointer("/process/env")?.as_array()?.iter();
    let path = env
        .filter_map(Value::as_str)
        .find_map(|pair| pair.strip_prefix("PATH="))?;
    let places: Vec<_> = match program.contains('/') {
        true => vec![cwd.join(program)],
        false => path
            .split(':')
            .map(|folder| cwd.join(folder).join(program))
            .collect(),
    };
    let mut why = Errno::NOENT;
    for place in places {
        // The container sees other files there.
        if MOUNTED.iter().any(|mounted| place.starts_with(mounted)) {
            return None;
        }
        let look = |flags: OFlags| {
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let flags = OFlags::PATH | OFlags::CLOEXEC | flags;
            let found = openat2(&root, &place, flags, Mode::empty(), resolve)?;
            rustix::fs::fstat(found)
        };
        match look(OFlags::empty()) {
            Ok(stat) => {
                let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
                if kind == rustix::fs::FileType::RegularFile && stat.st_mode & 0o111 != 0 {
                    return None;
                }
                why = Errno::ACCESS;
            }
            // A link may lead to what only the container sees.
            Err(Errno::NOENT | Errno::NOTDIR) if look(OFlags::NOFOLLOW).is_err() => {}
            Err(_) => return None,
        }
    }
    Some(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nnode:x:1000:1001:,,:/home/node:/bin/sh\n\
        bad:x:-1:0::/:\nnohome:x:7:7:::\n";
    const GROUP: &str =
        "root:x:0:\nnode:x:1001:\naudio:x:29:node,other\nvideo:x:44:other,node\nbroken:x\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let node = resolve("node", PASSWD, GROUP).unwrap();
        assert_eq!(
            (node.uid, node.gid, node.home.as_str()),
            (1000, 1001, "/home/node")
        );
        assert_eq!(node.groups, [29, 44]);
        assert_eq!(resolve("1000", PASSWD, GROUP).unwrap(), node);
        let root = resolve("", PASSWD, GROUP).unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
        let with = resolve("node:audio", PASSWD, GROUP).unwrap();
        assert_eq!((with.uid, with.gid, with.groups.len()), (1000, 29, 0));
        let numbers = resolve("4242:4343", PASSWD, GROUP).unwrap();
        assert_eq!(
            (numbers.uid, numbers.gid, numbers.home.as_str()),
            (4242, 4343, "/")
        );
        assert_eq!(resolve("4242", "", "").unwrap().gid, 0);
        assert_eq!(resolve("nohome", PASSWD, GROUP).unwrap().home, "/");
        for bad in ["nobody", "bad", "node:nogroup", "-1", "4294967296"] {
            assert!(resolve(bad, PASSWD, GROUP).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_root_holds_capabilities() {
        let spec = ContainerSpec {
            argv: vec!["x".into()],
            env: vec!["HOME=/h".into()],
            ..ContainerSpec::default()
        };
        let user = resolve("node", PASSWD, GROUP).unwrap();
        let config = config(&spec, &user, "/b", 99);
        assert_eq!(config["process"]["capabilities"]["effective"], json!([]));
        assert_eq!(config["process"]["env"], json!(["HOME=/h", PATH]));
        assert_eq!(config["process"]["noNewPrivileges"], true);
        let files = json!([{ "type": "RLIMIT_NOFILE", "hard": 99, "soft": 99 }]);
        assert_eq!(config["process"]["rlimits"], files);
        let root = super::config(&spec, &User::default(), "/b", 99);
        assert_eq!(
            root["process"]["capabilities"]["effective"]
                .as_array()
                .unwrap()
                .len(),
            14
        );
    }

    #[test]
    fn a_program_is_looked_for_among_the_containers_files() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for folder in ["bin", "sbin/folder", "work"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for (file, mode) in [("bin/sh", 0o755), ("bin/plain", 0o644), ("work/own", 0o755)] {
            fs::write(root.join(file), "").unwrap();
            fs::set_permissions(root.join(file), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("/bin/sh", root.join("sbin/ash")).unwrap();
        symlink("/proc/self/exe", root.join("sbin/self")).unwrap();
        let config = json!({
            "process": { "cwd": "/work", "env": ["A=b", "PATH=/sbin:/bin"] },
            "root": { "path": root.display().to_string() },
        });
        for there in ["sh", "ash", "/bin/sh", "./own", "self", "/dev/fd/3"] {
            assert_eq!(missing(&config, there), None, "{there}");
        }
        for absent in ["own", "bash", "/bin/sh/x", "../../sh", "./none"] {
            assert_eq!(missing(&config, absent), Some(Errno::NOENT), "{absent}");
        }
        for denied in ["plain", "folder", "/work"] {
            assert_eq!(missing(&config, denied), Some(Errno::ACCESS), "{denied}");
        }
        assert!(check(&["runc".to_owned(), "run".to_owned()]).is_ok());
    }

    #[test]
    fn every_container_has_parts_of_its_own() {
        let command = Parts::of(0, "/scratch/container").unwrap();
        assert_eq!(
            (command.bundle.as_str(), command.image.as_str()),
            (BUNDLE, "/image/rootfs")
        );
        let service = Parts::of(2, "/scratch/container").unwrap();
        assert_eq!(service.bundle, "/run/kiln/container-service2");
        assert_eq!(service.layer, "/scratch/container-service2");
        assert_eq!(service.image, "/service/2/rootfs");
        assert_eq!(Parts::of(9, ""), None);
    }

    proptest! {
        #[test]
        fn hostile_databases_never_panic(user in ".{0,20}", passwd in ".{0,200}", group in ".{0,200}") {
            let _either = resolve(&user, &passwd, &group);
        }
    }
}
