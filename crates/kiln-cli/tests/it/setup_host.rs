//! `kiln setup host` in a world whose `/etc` and `/srv` are the test's own: what is printed is what is done, twice changes nothing,
//! and nobody's file or link is trusted.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::support::{Said, kiln, said};

/// In a mount namespace of its own, so that nothing of the host is changed.
const INSIDE: &str = r#"
mount --bind "$1/etc" /etc
mount --bind "$1/srv" /srv
mount --bind "$1/bin" /usr/local/bin
shift
exec "$@"
"#;
const SERVICE: [&str; 6] = ["setup", "host", "--mode", "service", "--state", "/srv/kiln"];

struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// None where the suite is not root: then there is nobody to prepare a host.
    fn new() -> Option<Self> {
        let kiln = kiln()?;
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let dir = tempfile::tempdir().expect("temp dir");
        let world = Self { dir };
        // Quiet: what it could not copy, a test would miss.
        let copied = Command::new("cp")
            .args(["-a", "/etc"])
            .arg(world.dir.path())
            .stderr(Stdio::null())
            .status();
        assert!(copied.expect("cp").success());
        for name in ["srv", "bin"] {
            fs::create_dir(world.dir.path().join(name)).expect("folder");
        }
        fs::copy(&kiln.program, world.dir.path().join("bin/kiln")).expect("program");
        Some(world)
    }

    fn path(&self, at: &str) -> PathBuf {
        self.dir.path().join(at)
    }

    fn run(&self, args: &[&str]) -> Said {
        let mut command = Command::new("unshare");
        let private = [
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-euc",
            INSIDE,
            "sh",
        ];
        command.args(private).arg(self.dir.path()).args(args);
        command.env_remove("SUDO_USER").stdin(Stdio::null());
        said(command)
    }

    fn kiln(&self, args: &[&str]) -> Said {
        self.run(&[&["/usr/local/bin/kiln"], args].concat())
    }

    /// What set-up writes, without what holds a date or a random number.
    fn made(&self) -> Vec<(String, String)> {
        let files = [
            "passwd",
            "group",
            "subuid",
            "subgid",
            "systemd/system/kiln.service",
            "sudoers.d/kiln",
        ];
        let read = |name: &str| fs::read_to_string(self.path("etc").join(name)).unwrap_or_default();
        files.map(|name| (name.to_owned(), read(name))).into()
    }
}

fn apply(world: &World) -> Said {
    world.kiln(&[&SERVICE[..], &["--apply"]].concat())
}

#[test]
fn what_is_printed_is_what_is_done_and_twice_changes_nothing() {
    let (Some(done), Some(typed)) = (World::new(), World::new()) else {
        return;
    };
    let told = apply(&done).exits(0);
    assert!(
        told.out
            .contains("made      file /etc/sudoers.d/kiln, mode 0440"),
        "{told:?}"
    );
    let script = typed.kiln(&SERVICE).exits(0).out;
    typed.run(&["sh", "-c", &script]).exits(0);
    assert_eq!(done.made(), typed.made());
    for world in [&done, &typed] {
        world
            .run(&["visudo", "-cf", "/etc/sudoers.d/kiln"])
            .exits(0);
        let meta = fs::metadata(world.path("srv/kiln")).expect("state");
        let passwd = fs::read_to_string(world.path("etc/passwd")).expect("passwd");
        let line = passwd
            .lines()
            .find(|line| line.starts_with("kiln:"))
            .expect("its line");
        assert_eq!(
            line.split(':').nth(2),
            Some(meta.uid().to_string().as_str())
        );
        assert_eq!(meta.mode() & 0o7777, 0o700);
        assert!(line.ends_with(":/srv/kiln:/usr/sbin/nologin"), "{line}");
        let sudoers = fs::metadata(world.path("etc/sudoers.d/kiln")).expect("sudoers");
        assert_eq!((sudoers.uid(), sudoers.mode() & 0o7777), (0, 0o440));
    }
    let before = done.made();
    let again = apply(&done).exits(0);
    assert!(
        again.out.lines().all(|line| line.starts_with("unchanged ")),
        "{again:?}"
    );
    assert_eq!(done.made(), before);
    let json = done
        .kiln(&[&["--json"], &SERVICE[..]].concat())
        .exits(0)
        .out;
    assert!(
        json.lines()
            .all(|line| line.contains(r#""state":"planned""#)),
        "{json}"
    );
}

#[test]
fn other_peoples_files_and_links_stay() {
    let Some(world) = World::new() else { return };
    // What a stopped run left is written anew; what kiln did not write stays.
    fs::write(world.path("etc/sudoers.d/.kiln.new"), "half a li").expect("write");
    let own = "# the operator's own\n";
    fs::write(world.path("etc/sudoers.d/kiln"), own).expect("write");
    apply(&world).exits(3).says("was not written by kiln");
    let kept = fs::read_to_string(world.path("etc/sudoers.d/kiln")).expect("read");
    assert_eq!(kept, own);
    fs::remove_file(world.path("etc/sudoers.d/kiln")).expect("removed");
    apply(&world).exits(0);
    assert!(!world.path("etc/sudoers.d/.kiln.new").exists());

    // A folder that somebody else can bend.
    let outside = world.path("outside");
    fs::create_dir(&outside).expect("folder");
    symlink(&outside, world.path("srv/link")).expect("link");
    let loose = world.path("srv/loose");
    fs::create_dir(&loose).expect("folder");
    fs::set_permissions(&loose, fs::Permissions::from_mode(0o777)).expect("mode");
    let theirs = world.path("srv/theirs");
    fs::create_dir(&theirs).expect("folder");
    chown(&theirs, Some(12_345), Some(12_345)).expect("owner");
    for (state, why) in [
        ("/srv/link", "is not a folder (or a link)"),
        ("/srv/link/below", "is not a folder (or a link)"),
        ("/srv/loose/below", "can be changed by others"),
        ("/srv/theirs", "belongs to user 12345"),
        ("/srv/theirs/below", "can be changed by others"),
    ] {
        let args = [
            "setup", "host", "--mode", "service", "--apply", "--state", state,
        ];
        world.kiln(&args).exits(3).says(why);
    }
    assert_eq!(fs::read_dir(&outside).expect("list").count(), 0);
    assert_eq!(fs::metadata(&theirs).expect("theirs").uid(), 12_345);
    symlink(
        "/etc/shadow",
        world.path("etc/systemd/system/.kiln.service.new"),
    )
    .expect("link");
    fs::remove_file(world.path("etc/systemd/system/kiln.service")).expect("removed");
    let shadow = fs::read(world.path("etc/shadow")).expect("shadow");
    apply(&world).exits(0);
    assert_eq!(fs::read(world.path("etc/shadow")).expect("shadow"), shadow);
}

#[test]
fn an_agent_gets_a_folder_and_no_sudoers_file() {
    let Some(world) = World::new() else { return };
    world
        .kiln(&["setup", "host", "--mode", "agent"])
        .exits(2)
        .says("--user buildkite-agent");
    let agent = [
        "setup",
        "host",
        "--mode",
        "agent",
        "--user",
        "buildkite-agent",
        "--state",
        "/srv/kiln",
    ];
    world
        .kiln(&agent)
        .exits(2)
        .says("there is no user buildkite-agent");
    world
        .run(&["useradd", "--system", "buildkite-agent"])
        .exits(0);
    world
        .kiln(&[&agent[..], &["--apply"]].concat())
        .exits(0)
        .says("no sudoers entry is needed");
    let meta = fs::metadata(world.path("srv/kiln/buildkite-agent")).expect("its folder");
    assert_eq!(meta.mode() & 0o7777, 0o700);
    assert_ne!(meta.uid(), 0);
    assert!(!world.path("etc/sudoers.d/kiln").exists());
    let own = world.path("srv/nobody");
    fs::create_dir(&own).expect("folder");
    chown(&own, Some(65_534), None).expect("owner");
    let nobody = [
        "env",
        "KILN_HOME=/srv/nobody",
        "setpriv",
        "--reuid",
        "65534",
        "--clear-groups",
        "/usr/local/bin/kiln",
        "setup",
        "host",
        "--apply",
    ];
    world
        .run(&nobody)
        .exits(2)
        .says("only root may prepare a host");
}
