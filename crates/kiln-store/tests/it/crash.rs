//! Kill -9 between any two steps: a child process works on a store and kills itself at the n-th
//! step, for every n; then this process opens the store and looks for harm.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kiln_core::Digest;
use kiln_store::registry::manifest::OCI_MANIFEST;
use kiln_store::registry::{Authority, Reference, RepoName, Store, StoreConfig, StoreError};

use crate::client::manifest;
use crate::room::{entries, opened_again};

/// File in the child's working directory that says at which step to die.
const ORDER: &str = "die-at";
/// No run has nearly as many steps.
const STEPS_MAX: u64 = 1000;

fn tag(text: &str) -> Reference {
    Reference::Tag(text.to_owned())
}

fn push(store: &Arc<Store>, repo: &RepoName, layer: &[u8], name: &str) -> Result<Digest> {
    let operator = Authority::Operator;
    for bytes in [layer, b"{}"] {
        let mut upload = store.begin_upload(&operator, repo)?;
        let (first, second) = bytes.split_at(bytes.len() / 2);
        upload.write(first)?;
        upload.write(second)?;
        upload.commit(&operator, &Digest::of(bytes))?;
    }
    let bytes = serde_json::to_vec(&manifest(b"{}", &[layer]))?;
    let put = store.put_manifest(&operator, repo, &tag(name), Some(OCI_MANIFEST), &bytes)?;
    Ok(put.digest)
}

/// An upload that one owner after the other goes on with.
const CARRIED: &[u8] = b"a layer that outlives its owners";
/// File with the name of its session.
const CARRIED_ID: &str = "carried";

/// Goes on with the upload where it stands, unless it is done, and names what it made.
fn carry_on(store: &Arc<Store>, dir: &Path) -> Result<()> {
    let operator = Authority::Operator;
    let (repo, digest) = ("t/local/carried".parse()?, Digest::of(CARRIED));
    if !store.has_blob(&repo, &digest)? {
        let id = std::fs::read_to_string(dir.join(CARRIED_ID))?;
        let mut upload = store.resume_upload(&operator, &repo, &id)?;
        let at = usize::try_from(upload.size())?;
        anyhow::ensure!((10..=CARRIED.len()).contains(&at), "it stands at {at}");
        for bytes in CARRIED[at..].chunks(8) {
            upload.write(bytes)?;
        }
        upload.commit(&operator, &digest)?;
    }
    let bytes = serde_json::to_vec(&manifest(CARRIED, &[]))?;
    store.put_manifest(&operator, &repo, &tag("v1"), Some(OCI_MANIFEST), &bytes)?;
    Ok(())
}

/// One of everything that writes.
fn work(store: &Arc<Store>, dir: &Path) -> Result<()> {
    carry_on(store, dir)?;
    let quarantine: RepoName = "quarantine/b1/1".parse()?;
    let target: RepoName = "t/local/app".parse()?;
    let pushed = push(store, &quarantine, b"new layer", "x")?;
    store.adopt(&quarantine, &target, &pushed)?;
    store.tag(&target, "moving", &pushed)?;
    store.delete_tree(&quarantine)?;
    match store.delete_manifest(&target, &tag("old")) {
        Ok(()) | Err(StoreError::ManifestUnknown { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    store.gc(Duration::ZERO)?;
    Ok(())
}

/// Not a test of its own: what the child process runs.
#[test]
#[ignore = "run by `every_step_survives_a_kill` in a process of its own"]
fn child() -> Result<()> {
    let Ok(order) = std::fs::read_to_string(ORDER) else {
        return Ok(());
    };
    let die_at: u64 = order.trim().parse()?;
    let count = AtomicU64::new(0);
    let config = StoreConfig {
        fault: Some(Arc::new(move |_| {
            if count.fetch_add(1, Ordering::SeqCst) == die_at {
                let own = rustix::process::getpid();
                rustix::process::kill_process(own, rustix::process::Signal::KILL)?;
            }
            Ok(())
        })),
        ..StoreConfig::default()
    };
    let store = opened_again(Path::new("registry"), &config)?;
    work(&store, Path::new("."))
}

/// Whether the child came to its end alive.
fn run_child(dir: &Path, die_at: u64) -> Result<bool> {
    use std::os::unix::process::ExitStatusExt;
    std::fs::write(dir.join(ORDER), die_at.to_string())?;
    let output = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "crash::child", "--ignored", "--test-threads=1"])
        .current_dir(dir)
        .output()?;
    match (output.status.success(), output.status.signal()) {
        (true, _) => Ok(true),
        (false, Some(9)) => Ok(false),
        _ => bail!(
            "the child failed: {}",
            String::from_utf8_lossy(&output.stdout)
        ),
    }
}

/// In memory where the host has that: a kill, unlike a power loss, does not ask the disk.
fn scratch() -> std::io::Result<tempfile::TempDir> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}

fn prepare(dir: &Path) -> Result<()> {
    let store = Arc::new(Store::open(&dir.join("registry"), StoreConfig::default())?);
    let target = "t/local/app".parse()?;
    push(&store, &target, b"kept layer", "kept")?;
    push(&store, &target, b"kept layer", "moving")?;
    push(&store, &target, b"old layer", "old")?;
    let mut upload = store.begin_upload(&Authority::Operator, &"t/local/carried".parse()?)?;
    upload.write(&CARRIED[..10])?;
    std::fs::write(dir.join(CARRIED_ID), upload.id())?;
    Ok(())
}

/// Everything that a tag names is there and good, and nothing half-made is.
fn inspect(dir: &Path) -> Result<()> {
    let registry = dir.join("registry");
    let store = opened_again(&registry, &StoreConfig::default())?;
    anyhow::ensure!(
        entries(&registry.join("tmp")) == 0,
        "temporary files are left"
    );
    anyhow::ensure!(
        entries(&registry.join("uploads")) <= 4,
        "files of sessions are left"
    );
    for job in std::fs::read_dir(registry.join("repos/quarantine"))
        .into_iter()
        .flatten()
    {
        anyhow::ensure!(entries(&job?.path()) > 0, "an empty quarantine is left");
    }
    for repo in store.repositories(None)? {
        for name in store.tags(&repo)? {
            store
                .get_manifest(&repo, &tag(&name))
                .with_context(|| format!("{repo}:{name}"))?;
        }
    }
    let target: RepoName = "t/local/app".parse()?;
    store.get_manifest(&target, &tag("kept"))?;
    store.get_manifest(&target, &tag("moving"))?;
    let report = store.scrub()?;
    anyhow::ensure!(
        report.corrupt.is_empty() && report.broken.is_empty(),
        "{report:?}"
    );
    carry_on(&store, dir).context("the upload cannot go on")?;
    anyhow::ensure!(store.has_blob(&"t/local/carried".parse()?, &Digest::of(CARRIED))?);
    Ok(())
}

#[test]
fn every_step_survives_a_kill() -> Result<()> {
    for die_at in 0..STEPS_MAX {
        let dir = scratch()?;
        prepare(dir.path())?;
        let survived = run_child(dir.path(), die_at)?;
        inspect(dir.path()).with_context(|| format!("killed at step {die_at}"))?;
        if survived {
            assert!(die_at > 40, "only {die_at} steps were tried");
            return Ok(());
        }
        // Beginning again finishes the work, whatever was left.
        let store = opened_again(&dir.path().join("registry"), &StoreConfig::default())?;
        work(&store, dir.path()).with_context(|| format!("again after step {die_at}"))?;
        drop(store);
        inspect(dir.path()).with_context(|| format!("again after step {die_at}"))?;
    }
    bail!("the work has more than {STEPS_MAX} steps")
}
