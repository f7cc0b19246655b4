//! An ordinary user sets up, asks the doctor, builds, runs and uninstalls: only system packages need root.
//!
//! A suite that an ordinary user starts is this test by itself. As root, a user is made up inside a private mount namespace, with
//! copies of `/etc` and `/home` of its own, so that nothing is written outside the suite's directory. What costs minutes and was
//! tested elsewhere comes from the suite's home: BuildKit's programs, the packed bases, and the head they are unpacked on.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Kiln, Said, Started, kiln, root, said, until};

/// The made-up user: nobody has this id, and no process but ours runs with it or its subordinate ids.
const UID: u32 = 60_617;
/// First of its subordinate ids.
const SUB_FIRST: u32 = 1_606_170_000;
/// How many, as subuid(5) usually grants.
const SUB_COUNT: u32 = 65_536;
/// Files up to this size are copied, so that they belong to the user; larger ones are read only and linked.
const COPY_MAX: u64 = 64 << 10;
/// From Ctrl-C to the end, far below what the command would run for; how fast it is, `kiln bench` says.
const CANCEL_MAX: Duration = Duration::from_secs(60);

/// In a mount namespace of its own: the user's `/etc` and `/home`, then the program with the user's ids alone.
const BECOME: &str = r#"
mount --bind "$1/etc" /etc
mount --bind "$1/home" /home
shift
cd /home/user
exec setpriv --reuid 60617 --regid 60617 --clear-groups --inh-caps=-all \
  env -u KILN_HOME -u XDG_DATA_HOME -u XDG_CACHE_HOME -u XDG_CONFIG_HOME -u XDG_RUNTIME_DIR -u TMPDIR \
  HOME=/home/user USER=kiln-test NO_COLOR=1 "$@"
"#;

/// A world with one more user.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(kiln: &Kiln, guest: &Path) -> Self {
        let parent = kiln.home.parent().expect("a parent");
        let dir = tempfile::tempdir_in(parent).expect("temp dir");
        let world = Self { dir };
        let copied = Command::new("cp")
            .args(["-a", "/etc"])
            .arg(world.dir.path())
            .status();
        assert!(copied.expect("cp").success());
        for (file, line) in [
            (
                "passwd",
                format!("kiln-test:x:{UID}:{UID}::/home/user:/bin/sh\n"),
            ),
            ("group", format!("kiln-test:x:{UID}:\n")),
            ("subuid", format!("kiln-test:{SUB_FIRST}:{SUB_COUNT}\n")),
            ("subgid", format!("kiln-test:{SUB_FIRST}:{SUB_COUNT}\n")),
        ] {
            let file = world.dir.path().join("etc").join(file);
            let old = fs::read_to_string(&file).unwrap_or_default();
            fs::write(&file, old + &line).expect("write");
        }
        fs::create_dir(world.home()).expect("home");
        fs::create_dir(world.user()).expect("home");
        chown(world.user(), Some(UID), Some(UID)).expect("chown");
        take(&kiln.program, &world.home().join("kiln"));
        take(guest, &world.home().join("kiln-guest"));
        world
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// What the user sees as `/home/user`.
    fn user(&self) -> PathBuf {
        self.home().join("user")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-euc",
                BECOME,
                "sh",
            ])
            .arg(self.dir.path())
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn kiln(&self, args: &[&str]) -> Said {
        said(self.command(&[&["/home/kiln"], args].concat()))
    }

    /// Links what is large and sealed, copies the rest; all of it is the user's then.
    fn give(&self, from: &Path, to: &Path) {
        if from.is_dir() {
            fs::create_dir_all(to).expect("folder");
            for entry in fs::read_dir(from).expect("list").flatten() {
                self.give(&entry.path(), &to.join(entry.file_name()));
            }
            chown(to, Some(UID), Some(UID)).expect("chown");
        } else if fs::symlink_metadata(from).is_ok_and(|meta| meta.len() > COPY_MAX) {
            take(from, to);
        } else {
            fs::copy(from, to).expect("copy");
            chown(to, Some(UID), Some(UID)).expect("chown");
        }
    }
}

/// A file in another place of the same disk; everybody may read it.
fn take(from: &Path, to: &Path) {
    let readable = fs::metadata(from).expect("there").permissions().mode() & 0o044 == 0o044;
    if !readable || fs::hard_link(from, to).is_err() {
        fs::copy(from, to).expect("copy");
        let mode = fs::metadata(from).expect("there").permissions().mode() | 0o044;
        fs::set_permissions(to, fs::Permissions::from_mode(mode)).expect("chmod");
    }
}

/// Names of the processes that run with one of the user's ids.
fn processes() -> Vec<String> {
    let ours = |uid: u32| uid == UID || (SUB_FIRST..SUB_FIRST + SUB_COUNT).contains(&uid);
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let of_user = entries.filter(|entry| entry.metadata().is_ok_and(|meta| ours(meta.uid())));
    let names = of_user.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    names.map(|name| name.trim().to_owned()).collect()
}

/// Directories that bakes of this user made outside its home.
fn scratch() -> Vec<PathBuf> {
    let entries = fs::read_dir(std::env::temp_dir()).expect("list").flatten();
    let of_user = entries.filter(|entry| entry.metadata().is_ok_and(|meta| meta.uid() == UID));
    of_user.map(|entry| entry.path()).collect()
}

/// One check of `kiln doctor --json`: (level, what was found).
fn check(doctor: &Said, name: &str) -> (String, String) {
    let lines = doctor
        .out
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    let found = lines
        .into_iter()
        .find(|check: &serde_json::Value| check["name"] == name);
    let found = found.unwrap_or_else(|| panic!("no check {name:?}: {}", doctor.out));
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    (text("level"), text("found"))
}

/// Ctrl-C in the middle of the Debian root: ends in time, says so, and nothing of it is left.
fn setup_is_interrupted(world: &World) {
    let child = world
        .command(&["/home/kiln", "setup"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    let mut setup = Started { child };
    let mut lines = BufReader::new(setup.child.stderr.take().expect("piped")).lines();
    let first = lines.next().expect("a line").expect("UTF-8");
    assert!(
        first.contains("bake root"),
        "progress from the start: {first}"
    );
    until("mmdebstrap to run", || {
        processes().contains(&"mmdebstrap".to_owned()).then_some(())
    });
    let since = Instant::now();
    setup.signal("INT");
    let told: Vec<String> = lines.map_while(Result::ok).collect();
    let status = setup.child.wait().expect("wait");
    assert_eq!(status.code(), Some(130), "{told:?}");
    assert!(
        since.elapsed() < CANCEL_MAX,
        "{:?} {told:?}",
        since.elapsed()
    );
    assert!(
        told.iter()
            .any(|line| line.contains("run it again to go on")),
        "{told:?}"
    );
    until("its programs to be gone", || {
        processes().is_empty().then_some(())
    });
    assert_eq!(scratch(), [] as [PathBuf; 0]);
    let unfinished = fs::read_dir(world.user().join(".cache/kiln/bake"))
        .expect("list")
        .flatten();
    let unfinished = unfinished.filter(|entry| entry.path().is_dir());
    let left: Vec<_> = unfinished.map(|entry| entry.file_name()).collect();
    assert!(
        left.iter()
            .all(|name| name.to_string_lossy().starts_with("debs")),
        "{left:?}"
    );
}

#[test]
fn an_ordinary_user_sets_up_builds_runs_and_uninstalls() {
    let Some(kiln) = kiln() else { return };
    if fs::metadata("/proc/self").expect("/proc").uid() != 0 {
        // The other tests are this one.
        return;
    }
    #[expect(
        clippy::disallowed_methods,
        reason = "the suite names the guest it built"
    )]
    let named = std::env::var_os("KILN_TEST_GUEST");
    let guest = named.map_or_else(
        || root().join("target/guest/x86_64-unknown-linux-gnu/guest/kiln-guest"),
        PathBuf::from,
    );
    let world = World::new(&kiln, &guest);
    let (cache, data) = (
        world.user().join(".cache/kiln"),
        world.user().join(".local/share/kiln"),
    );

    let doctor = world.kiln(&["doctor", "--json"]).exits(3);
    let tried = world.command(&["unshare", "--map-auto", "--map-root-user", "--", "true"]);
    let allowed = said(tried).code == 0;
    assert_eq!(
        check(&doctor, "user-namespaces").0 == "pass",
        allowed,
        "{}",
        doctor.out
    );
    assert_eq!(check(&doctor, "machine-image").0, "fail");
    if !allowed {
        return;
    }
    setup_is_interrupted(&world);

    for entry in fs::read_dir(kiln.home.join("cache/bake"))
        .expect("list")
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if ["buildkit-", "bases-", "debs-", ".archives-bases-"]
            .iter()
            .any(|kind| name.starts_with(kind))
        {
            world.give(&entry.path(), &cache.join("bake").join(name));
        }
    }
    world.give(&kiln.home.join("heads/shared"), &data.join("heads/shared"));
    world.give(
        &kiln.home.join("heads/shared.bases"),
        &data.join("heads/shared.bases"),
    );
    chown(data.join("heads"), Some(UID), Some(UID)).expect("chown");
    // The head is made anew when the suite's bases are of another day than this bake.
    world.kiln(&["setup"]).exits(0).says("templates are ready");

    let doctor = world.kiln(&["doctor", "--json"]).exits(0);
    for name in ["machine-image", "bases", "shared-head", "templates", "home"] {
        assert_eq!(check(&doctor, name).0, "pass", "{}", doctor.out);
    }
    assert!(
        check(&doctor, "vmm-user").1.contains("user"),
        "{}",
        doctor.out
    );

    let app = world.user().join("app");
    fs::create_dir(&app).expect("app");
    let text = "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nRUN id -u > /who\nCMD [\"cat\", \"/who\"]\n";
    fs::write(app.join("Dockerfile"), text).expect("write");
    world.kiln(&["build", "app", "--tag", "mine"]).exits(0);
    assert_eq!(world.kiln(&["run", "--image", "mine"]).exits(0).out, "0\n");

    world.kiln(&["uninstall", "--yes"]).exits(0);
    assert!(processes().is_empty(), "{:?}", processes());
    assert_eq!(scratch(), [] as [PathBuf; 0]);
    fs::remove_dir_all(app).expect("remove");
    assert_eq!(left(&world.user()), [] as [PathBuf; 0]);
}

/// Every file below a directory but the logs of npm, which set-up asks for its registry.
fn left(dir: &Path) -> Vec<PathBuf> {
    let mut open = vec![dir.to_owned()];
    let mut files = Vec::new();
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).expect("list").flatten() {
            match entry.file_type().expect("type").is_dir() {
                true if entry.file_name() == ".npm" => {}
                true => open.push(entry.path()),
                false => files.push(entry.path()),
            }
        }
    }
    files
}
