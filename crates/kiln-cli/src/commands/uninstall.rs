//! `kiln uninstall`: removes what kiln keeps on this host, and nothing else.

use std::fs;
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use kiln_core::{ByteSize, FailureClass};
use kiln_image::bake::root::scratch_of;
use kiln_image::bake::stage::remove_tree;
use kiln_machine::reap::reap_home;
use kiln_store::registry::{OpenError, Secret, Store, StoreConfig};
use kiln_worker::home::Home;
use kiln_worker::kept::Facts;
use serde::Serialize;
use serde_json::json;

use super::disk_use;
use super::registry::AuthFiles;
use crate::args::UninstallArgs;
use crate::environment;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

/// What kiln writes into its data directory. A `KILN_HOME` may be a directory that holds other things too.
const DATA: [&str; 20] = [
    "images",
    "heads",
    "templates",
    "machines",
    "machine-records",
    "incidents",
    "ledger",
    "registry",
    "jobs",
    "controller",
    "worker",
    "results",
    "bases-pulled.json",
    "unpacked",
    "bake",
    "bench",
    "probe.json",
    "bases.json",
    "version.json",
    "guest",
];
/// What kiln writes into its cache directory.
const CACHE: [&str; 4] = ["bake", "downloads", "checkouts", "spool"];
/// What kiln and its operator write into its configuration directory.
const CONFIG: [&str; 3] = ["kiln.toml", "bases.toml", "registries.toml"];

/// What would be removed.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct Doomed {
    path: PathBuf,
    bytes: u64,
}

pub(super) async fn run(args: &UninstallArgs, screen: Screen) -> Result<u8> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    let doomed = doomed(&home);
    if doomed.is_empty() {
        screen.note("there is nothing to remove");
        return Ok(0);
    }
    refuse_while_used(&home)?;
    if !args.yes {
        confirm(&doomed, screen).await?;
    }
    // Taken now and held to the end, so that no other kiln process begins to use what goes.
    let _store = own_registry(&home)?;
    forget_tokens(&home, screen);
    let work = {
        let home = home.clone();
        move || remove(&home, &doomed)
    };
    let removed = tokio::task::spawn_blocking(work)
        .await
        .or_infrastructure()??;
    let bytes: u64 = removed.iter().map(|one| one.bytes).sum();
    let left = leftovers(&home);
    screen.data(&json!({ "removed": removed, "left": left }), || {
        format!("removed {} ({} freed)", listed(&removed), ByteSize(bytes))
    });
    for path in left {
        screen.note(&format!(
            "{} is not empty: what is left there is not kiln's",
            path.shown()
        ));
    }
    Ok(0)
}

/// Whether a directory is kiln's as a whole: `.../kiln` of the XDG directories. Below `KILN_HOME` only what kiln writes is.
fn is_whole(dir: &Path, home: &Home) -> bool {
    !home.cache.starts_with(&home.data) && dir.file_name().is_some_and(|name| name == "kiln")
}

fn doomed(home: &Home) -> Vec<Doomed> {
    let mut paths = Vec::new();
    let dirs: [(&PathBuf, &[&str]); 3] = [
        (&home.cache, &CACHE),
        (&home.config, &CONFIG),
        (&home.data, &DATA),
    ];
    for (dir, names) in dirs {
        if is_whole(dir, home) {
            paths.push(dir.clone());
        } else {
            paths.extend(names.iter().map(|name| dir.join(name)));
        }
    }
    // What a killed bake left in the directory for temporary files, if it is ours.
    let uid = rustix::process::geteuid().as_raw();
    let scratch = scratch_of(&home.cache.join("bake"));
    if fs::symlink_metadata(&scratch).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid) {
        paths.push(scratch);
    }
    let there = paths
        .into_iter()
        .filter(|path| fs::symlink_metadata(path).is_ok());
    there
        .map(|path| Doomed {
            bytes: disk_use::of(&path),
            path,
        })
        .collect()
}

fn listed(doomed: &[Doomed]) -> String {
    let paths: Vec<String> = doomed.iter().map(|one| one.path.shown()).collect();
    paths.join(", ")
}

/// Live machines, and a kiln process that serves the registry, keep everything in place.
fn refuse_while_used(home: &Home) -> Result<()> {
    if home.data.join("machines").is_dir() {
        let report = reap_home(&home.data);
        if let Some(leak) = report.leaks.first() {
            return Err(CliError::new(
                FailureClass::Infrastructure,
                format!("a dead machine could not be removed: {leak}"),
            ));
        }
    }
    let machines = live_machines(home);
    let kept = kiln_worker::kept::list(&home.data);
    if !kept.is_empty() && kept.len() == machines.len() {
        let ids: Vec<&str> = kept.iter().map(Facts::id).collect();
        let count = super::table::counted(kept.len() as u64, "kept machine");
        return Err(
            CliError::usage(format!("there is still {count}: {}", ids.join(", ")))
                .hint("`kiln machine rm --all` ends them, then try again"),
        );
    }
    if !machines.is_empty() {
        return Err(CliError::usage(format!(
            "{} in use: {}",
            super::table::counted(machines.len() as u64, "machine"),
            machines.join(", ")
        ))
        .hint("end the kiln commands that use them, then try again"));
    }
    Ok(())
}

/// Directories of machines that the reaper left: their owners live.
fn live_machines(home: &Home) -> Vec<String> {
    let entries = fs::read_dir(home.data.join("machines"))
        .into_iter()
        .flatten()
        .flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let names = dirs.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.')).collect()
}

fn own_registry(home: &Home) -> Result<Option<Store>> {
    if !home.registry().is_dir() {
        return Ok(None);
    }
    match Store::open(&home.registry(), StoreConfig::default()) {
        Ok(store) => Ok(Some(store)),
        Err(OpenError::Owned { .. }) => {
            Err(CliError::usage("another kiln process uses the registry")
                .hint("end it (`kiln registry serve`, `kiln build` or `kiln run`), then try again"))
        }
        // Damaged or of a newer kiln: nobody uses it, and it may go.
        Err(_) => Ok(None),
    }
}

/// The registry's token is worth nothing once the registry is gone; it should not stay in the user's files.
fn forget_tokens(home: &Home, screen: Screen) {
    let Ok(secret) = Secret::load(&home.registry().join("token")) else {
        return;
    };
    let Some(files) = AuthFiles::find(&environment::var) else {
        return;
    };
    match files.logout(kiln_store::registry::loopback::USER, secret.reveal()) {
        Ok(changed) => {
            for path in changed {
                screen.note(&format!("removed kiln's token from {}", path.shown()));
            }
        }
        Err(error) => screen.note(&format!("warning: {error}")),
    }
}

async fn confirm(doomed: &[Doomed], screen: Screen) -> Result<()> {
    let not_yes = || {
        CliError::usage("nothing was removed")
            .hint("say `kiln uninstall --yes` to remove it without asking")
    };
    for one in doomed {
        screen.note(&format!("  {}  {}", one.path.shown(), ByteSize(one.bytes)));
    }
    if screen.json() || !io::stdin().is_terminal() {
        return Err(not_yes());
    }
    screen.note("Remove all of this, images and build caches included? Type yes to go on:");
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().read_line(&mut line).map(|_| line)
    });
    let answer = answer.await.or_infrastructure()?.or_infrastructure()?;
    if answer.trim().eq_ignore_ascii_case("yes") {
        Ok(())
    } else {
        Err(not_yes())
    }
}

fn remove(home: &Home, doomed: &[Doomed]) -> Result<Vec<Doomed>> {
    let mut removed = Vec::new();
    for one in doomed {
        remove_path(&one.path).map_err(|why| {
            CliError::new(
                FailureClass::Infrastructure,
                format!("could not remove {}: {why}", one.path.shown()),
            )
            .hint("what was not removed is still listed by `kiln uninstall`")
        })?;
        removed.push(Doomed {
            path: one.path.clone(),
            bytes: one.bytes,
        });
    }
    for dir in [&home.cache, &home.config, &home.data] {
        // Fails when something that is not ours is in it, and that is right.
        let _not_empty = fs::remove_dir(dir);
    }
    Ok(removed)
}

/// A link is removed, not what it points at. Files of subordinate ids go through a user namespace.
fn remove_path(path: &Path) -> std::result::Result<(), String> {
    let kind = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !kind.is_dir() {
        return fs::remove_file(path).map_err(|error| error.to_string());
    }
    let lock = fs::File::open(path).map_err(|error| error.to_string())?;
    remove_tree(path, &lock).map_err(|error| crate::error::chain(&error))
}

/// Directories of kiln that still hold something.
fn leftovers(home: &Home) -> Vec<PathBuf> {
    let dirs = [&home.data, &home.cache, &home.config]
        .into_iter()
        .filter(|dir| dir.is_dir());
    dirs.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(home: &Home) {
        home.prepare().expect("home");
        fs::create_dir_all(home.images().join("ci-0011223344556677")).expect("make");
        fs::create_dir_all(home.cache.join("bake/root-1")).expect("make");
        fs::create_dir_all(home.data.join("machine-records")).expect("make");
        fs::write(home.config.join("kiln.toml"), "").expect("write");
    }

    #[test]
    fn below_a_shared_kiln_home_only_what_is_kilns_goes() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        fill(&home);
        fs::write(dir.path().join("thesis.tex"), "years").expect("write");
        fs::write(home.config.join("notes"), "mine").expect("write");
        remove(&home, &doomed(&home)).expect("removes");
        let left: Vec<PathBuf> = leftovers(&home);
        assert_eq!(left, [home.data.clone(), home.config.clone()]);
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .expect("list")
            .flatten()
            .map(|e| e.file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["config", "thesis.tex"]);
        assert!(doomed(&home).is_empty());
    }

    #[test]
    fn the_xdg_directories_go_whole_and_their_parents_stay() {
        let dir = tempfile::tempdir().expect("temp dir");
        let below = |name: &str| dir.path().join(name).join("kiln");
        let home = Home {
            data: below("share"),
            cache: below("cache"),
            config: below("config"),
        };
        fill(&home);
        fs::write(home.data.join("anything"), "").expect("write");
        assert_eq!(doomed(&home).len(), 3);
        remove(&home, &doomed(&home)).expect("removes");
        assert!(leftovers(&home).is_empty());
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 3);
    }

    #[test]
    fn what_a_killed_bake_left_goes_too() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(&dir.path().join("home"));
        let scratch = scratch_of(&home.cache.join("bake"));
        fs::create_dir_all(scratch.join("mmdebstrap.x/etc")).expect("make");
        let all = doomed(&home);
        assert_eq!(all.len(), 1, "{all:?}");
        remove(&home, &all).expect("removes");
        assert!(!scratch.exists());
    }

    #[test]
    fn a_link_goes_and_what_it_points_at_stays() {
        let (dir, other) = (
            tempfile::tempdir().expect("temp dir"),
            tempfile::tempdir().expect("temp dir"),
        );
        let home = Home::below(dir.path());
        fill(&home);
        fs::write(other.path().join("keep"), "").expect("write");
        std::os::unix::fs::symlink(other.path(), home.data.join("unpacked")).expect("link");
        remove(&home, &doomed(&home)).expect("removes");
        assert!(other.path().join("keep").exists() && !home.data.exists());
    }

    #[test]
    fn running_machines_and_a_served_registry_stop_it() {
        use kiln_machine::record::MachineDir;
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        fill(&home);
        let machine = MachineDir::create(&home.data, &"b1-1-build".parse().expect("name"), "sim")
            .expect("machine");
        let error = refuse_while_used(&home).expect_err("a live machine");
        assert!(error.message.contains("b1-1-build"), "{error:?}");
        assert_eq!(error.exit_code(), 2);
        drop(machine);
        refuse_while_used(&home).expect("nothing runs");
        let store = Store::open(&home.registry(), StoreConfig::default()).expect("open");
        assert_eq!(own_registry(&home).expect_err("owned").exit_code(), 2);
        drop(store);
        assert!(own_registry(&home).expect("free").is_some());
    }
}
