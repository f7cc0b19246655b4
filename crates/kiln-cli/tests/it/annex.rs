//! Homes of one test's own: what the tested home has baked, and own machines, jobs and settings, so that what is left behind shows.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use crate::support::{Kiln, Said, kiln, path, said, until};

/// What is baked once and only read, or shared safely by several kiln processes.
const BAKED: [&str; 4] = ["images", "heads", "registry", "templates"];

/// A home with own machines and jobs; its baked parts are the tested home's unless they were replaced by copies.
pub(crate) struct Annex {
    kiln: Kiln,
    dir: tempfile::TempDir,
    found: BTreeSet<String>,
    machines: Mutex<BTreeSet<String>>,
}

impl Deref for Annex {
    type Target = Kiln;

    fn deref(&self) -> &Kiln {
        &self.kiln
    }
}

impl Annex {
    /// `None` when this run has no home to test.
    pub(crate) fn open() -> Option<Self> {
        Self::open_with("")
    }

    /// With these settings of the operator (`kiln.toml`).
    pub(crate) fn open_with(settings: &str) -> Option<Self> {
        let kiln = kiln()?;
        let beside = kiln.home.parent().expect("a parent");
        let dir = tempfile::Builder::new()
            .prefix("annex-")
            .tempdir_in(beside)
            .expect("temp dir");
        for name in BAKED {
            let from = kiln.home.join(name);
            fs::create_dir_all(&from).expect("folder");
            symlink(from, dir.path().join(name)).expect("link");
        }
        // Made when a first machine stays, and empty again when its job has its record.
        fs::create_dir_all(dir.path().join("machine-records")).expect("folder");
        for name in ["bases.json", "version.json", "probe.json"] {
            let _not_there_yet = fs::copy(kiln.home.join(name), dir.path().join(name));
        }
        let config = dir.path().join("config");
        fs::create_dir_all(&config).expect("folder");
        for entry in fs::read_dir(kiln.home.join("config"))
            .into_iter()
            .flatten()
            .flatten()
        {
            fs::copy(entry.path(), config.join(entry.file_name())).expect("copy");
        }
        if !settings.is_empty() {
            fs::write(config.join("kiln.toml"), settings).expect("settings");
        }
        let home = dir.path().to_owned();
        let mut annex = Self {
            kiln: Kiln { home, ..kiln },
            dir,
            found: BTreeSet::new(),
            machines: Mutex::default(),
        };
        annex.run(&["template", "list"]).exits(0);
        annex.found = annex.files();
        Some(annex)
    }

    /// From now on the operator grants what is written here (`policy.toml`).
    pub(crate) fn grants(&mut self, text: &str) {
        fs::write(self.home.join("config/policy.toml"), text).expect("write");
        self.found = self.files();
    }

    /// Puts a copy of a baked part in place of the link; gives where it is.
    pub(crate) fn own(&mut self, part: &str) -> PathBuf {
        let to = self.home.join(part);
        let from = fs::canonicalize(&to).expect("a link");
        fs::remove_file(&to).expect("unlink");
        copy(&from, &to);
        self.found = self.files();
        to
    }

    /// A link to the tested home's part again, in place of what was put there.
    pub(crate) fn give_back(&mut self, part: &str) {
        fs::remove_dir_all(self.home.join(part)).expect("remove");
        let home = kiln().expect("a home").home;
        symlink(home.join(part), self.home.join(part)).expect("link");
    }

    /// Puts an empty folder in place of a link.
    pub(crate) fn without(&mut self, part: &str) -> PathBuf {
        let to = self.home.join(part);
        fs::remove_file(&to).expect("unlink");
        fs::create_dir(&to).expect("folder");
        self.found = self.files();
        to
    }

    /// Runs kiln in a private mount namespace, after these shell commands; `$HOME_DIR` is the home. Nothing of it outlives the call.
    pub(crate) fn run_among(&self, mounts: &str, args: &[&str]) -> Said {
        let script = format!(
            "set -e; {mounts}; set +e; \"$@\"; code=$?; ls -A \"$HOME_DIR/machines\" 2>/dev/null | sed 's/^/LEFT /' >&2; exit $code"
        );
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private"])
            .args(["sh", "-c", &script, "sh", path(&self.program)])
            .args(args)
            .env("HOME_DIR", &self.home)
            .env("KILN_HOME", &self.home)
            .env("NO_COLOR", "1")
            .stdin(std::process::Stdio::null());
        let said = said(command);
        let left: Vec<&str> = said
            .err
            .lines()
            .filter(|line| {
                line.starts_with("LEFT ") && *line != "LEFT .lock" && *line != "LEFT .filler"
            })
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}\n{}", said.err);
        said
    }

    /// Nothing is left of any machine, nothing new lies in the home but records, and an ordinary command works.
    #[track_caller]
    pub(crate) fn is_well(&self) {
        self.is_clear();
        self.run(&["run", "--", "true"]).exits(0);
        self.is_clear();
    }

    #[track_caller]
    pub(crate) fn is_clear(&self) {
        let machines: Vec<_> = fs::read_dir(self.home.join("machines"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name != ".lock")
            .collect();
        assert!(machines.is_empty(), "left behind: {machines:?}");
        // A killed process is seen for a moment after its kill.
        until("the end of every VMM", || {
            self.vmms().is_empty().then_some(())
        });
        let groups = self.groups();
        assert!(groups.is_empty(), "left behind: {groups:?}");
        let new: Vec<_> = self.files().difference(&self.found).cloned().collect();
        assert!(new.is_empty(), "new in the home: {new:?}");
        for job in self.jobs() {
            let quarantine = self.home.join("registry/repos/quarantine").join(&job);
            let left = fs::read_dir(&quarantine).map(|found| found.flatten().collect::<Vec<_>>());
            assert!(left.is_err(), "left behind: {quarantine:?}: {left:?}");
        }
    }

    /// Where the current machine image is.
    pub(crate) fn image(&self) -> PathBuf {
        let images = self.home.join("images");
        let name = fs::read_to_string(images.join("current")).expect("a current image");
        images.join(name.trim())
    }

    /// Has templates of its own from now on: a copy of the one that runs of the usual size start from. Gives its folder.
    pub(crate) fn own_run_template(&mut self) -> PathBuf {
        self.run(&["run", "--", "true"]).exits(0);
        let listed = self.run(&["template", "list", "--json"]).exits(0);
        let all = listed
            .out
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        // The one that was used just now: an older kiln may have left another.
        let one = all
            .filter(|one| one["key"]["purpose"] == "run" && one["key"]["cpus"] == 1)
            .max_by_key(|one| one["used_unix_ms"].as_u64());
        let id = one.expect("a template for runs")["id"].clone();
        let id = id.as_str().expect("an id");
        let from = fs::canonicalize(self.home.join("templates")).expect("a link");
        let to = self.without("templates");
        copy(&from.join(id), &to.join(id));
        to.join(id)
    }

    /// Has cache heads of its own from now on: those of tenants as copies, the shared one as it is. Gives their folder.
    pub(crate) fn own_heads(&mut self) -> PathBuf {
        let from = fs::canonicalize(self.home.join("heads")).expect("a link");
        let to = self.without("heads");
        for entry in fs::read_dir(&from).expect("heads").flatten() {
            match entry.file_name() == "shared" {
                true => symlink(entry.path(), to.join("shared")).expect("link"),
                false => copy(&entry.path(), &to.join(entry.file_name())),
            }
        }
        to
    }

    /// Has no cache heads but the shared one from now on: nobody else commits to what a build here leaves.
    pub(crate) fn fresh_heads(&mut self) {
        let from = fs::canonicalize(self.home.join("heads")).expect("a link");
        let to = self.without("heads");
        symlink(from.join("shared"), to.join("shared")).expect("link");
    }

    /// Has a registry of its own from now on, with the bases and nothing else: nobody else opens it.
    pub(crate) fn own_registry(&mut self) {
        let from = fs::canonicalize(self.home.join("registry")).expect("a link");
        let to = self.without("registry");
        fs::copy(from.join("VERSION"), to.join("VERSION")).expect("copy");
        fs::create_dir(to.join("repos")).expect("folder");
        copy(&from.join("repos/shared"), &to.join("repos/shared"));
        for base in fs::read_dir(to.join("repos/shared"))
            .expect("bases")
            .flatten()
        {
            for kind in ["_blobs", "_manifests"] {
                let names = fs::read_dir(base.path().join(kind)).into_iter().flatten();
                for name in names.flatten().map(|entry| entry.file_name()) {
                    let hex = name.to_str().expect("a digest");
                    let blob = Path::new("blobs/sha256").join(&hex[..2]).join(hex);
                    let target = to.join(&blob);
                    fs::create_dir_all(target.parent().expect("a folder")).expect("folder");
                    if !target.exists() {
                        copy(&from.join(&blob), &target);
                    }
                }
            }
        }
    }

    /// Processes of QEMU that run a machine of this home, those whose machine has no folder any more included.
    pub(crate) fn vmms(&self) -> Vec<u32> {
        let names = self.machines();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("proc").flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let Ok(line) = fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            let line = String::from_utf8_lossy(&line).into_owned();
            let ours = |name: &String| line.contains(&format!("\0-name\0kiln-{name}-"));
            if line.contains("qemu") && names.iter().any(ours) {
                found.push(pid);
            }
        }
        found
    }

    /// Control groups of machines of this home.
    fn groups(&self) -> Vec<PathBuf> {
        let names = self.machines();
        let controllers = fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten();
        let groups = controllers
            .filter_map(|entry| fs::read_dir(entry.path()).ok())
            .flat_map(|entries| entries.flatten());
        groups
            .filter(|entry| {
                let group = entry.file_name().to_string_lossy().into_owned();
                names
                    .iter()
                    .any(|name| group.starts_with(&format!("kiln-{name}-")))
            })
            .map(|entry| entry.path())
            .collect()
    }

    /// Names, or beginnings of names, of every machine this home has or was seen to have.
    fn machines(&self) -> BTreeSet<String> {
        let mut seen = self.machines.lock().expect("not poisoned");
        let entries = fs::read_dir(self.home.join("machines"))
            .into_iter()
            .flatten()
            .flatten();
        seen.extend(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        seen.extend(self.jobs());
        seen.remove(".lock");
        seen.clone()
    }

    /// Ids of every job this home ever had.
    fn jobs(&self) -> Vec<String> {
        let listed = self.run(&["job", "list", "--limit", "1000", "--json"]);
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
        let ids = listed.out.lines().filter_map(line);
        ids.filter_map(|job| job["id"].as_str().map(str::to_owned))
            .collect()
    }

    /// Everything below the home that is not the queue's and no baked part.
    fn files(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        walk(self.dir.path(), self.dir.path(), &mut found);
        found
    }
}

/// Copies a file or folder as it is, holes and times and all.
pub(crate) fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .args([
            "-a",
            "--reflink=auto",
            "--sparse=auto",
            path(from),
            path(to),
        ])
        .status()
        .expect("cp");
    assert!(copied.success());
}

/// Folders whose content is a test's business, or the queue's.
const NOT_COUNTED: [&str; 10] = [
    "cache",
    "controller",
    "heads",
    "images",
    "ledger",
    "machines",
    "registry",
    "results",
    "templates",
    "unpacked",
];

fn walk(root: &Path, dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let shown = entry
            .path()
            .strip_prefix(root)
            .expect("inside")
            .display()
            .to_string();
        if NOT_COUNTED.contains(&shown.as_str()) {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(root, &entry.path(), found);
        }
        found.insert(shown);
    }
}

/// Whether this process may mount, or a line that says it may not.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn may_mount() -> bool {
    let may = Command::new("unshare")
        .args(["--mount", "true"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !may {
        eprintln!("skipped: only root may mount in a namespace of its own");
    }
    may
}

/// Changes one byte in the middle of a file as a failing disk would: the file's times stay, except the one no program can set.
pub(crate) fn rot(file: &Path) {
    use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
    let meta = fs::metadata(file).expect("file");
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).expect("unseal");
    let open = fs::File::options()
        .read(true)
        .write(true)
        .open(file)
        .expect("open");
    let middle = meta.len() / 2;
    let mut byte = [0];
    open.read_exact_at(&mut byte, middle).expect("read");
    byte[0] ^= 0x55;
    open.write_all_at(&byte, middle).expect("write");
    open.set_modified(meta.modified().expect("time"))
        .expect("set");
    fs::set_permissions(file, meta.permissions()).expect("seal");
}
