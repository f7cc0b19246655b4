//! A bake that is stopped in each of its stages, by kill -9 and by a cancel, and the one after it.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::sync::Mutex;

use super::super::machine_image::BakeError;
use super::*;

/// Names the cache and the stage in which the child hangs.
const ROLE: &str = "KILN_TEST_BAKE";
const STAGES: [&str; 3] = ["root", "kernel", "disk"];
/// For the start and the end of small programs on a busy host.
const SOON: Duration = Duration::from_secs(30);

fn quiet(_: &BakeEvent<'_>) {}

/// A chain of stages, each a program whose result the next one reads. One of them hangs halfway. Gives those that ran.
fn chain(cache: &Path, hangs: Option<&str>, cancel: &Cancel) -> Result<Vec<String>, BakeError> {
    let cache = StageCache::open(cache, &quiet, cancel)?;
    let ran = Mutex::new(Vec::new());
    let mut before = Digest::of(b"inputs");
    for stage in STAGES {
        let key = StageKey::new(1).with("before", before.bytes()).digest();
        let done = cache.stage(stage, &key, |work, context| {
            ran.lock().expect("test lock").push(stage.to_owned());
            let then = match hangs == Some(stage) {
                true => "sleep 1000",
                false => "mv half whole",
            };
            Program::new("sh", SOON * 100)
                .args(["-c", &format!("echo {stage} > half; {then}")])
                .directory(work)
                .run(context)
                .map_err(BakeError::from)
        })?;
        before = stage_digest(&done)?;
    }
    Ok(ran.into_inner().expect("test lock"))
}

/// The child's part: does nothing when it is run as one of the tests.
#[test]
fn plays_a_bake_that_hangs() {
    #[expect(clippy::disallowed_methods, reason = "how the parent gives the role")]
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let (stage, cache) = role.split_once(' ').expect("two words");
    let ended = chain(Path::new(cache), Some(stage), &Cancel::new());
    panic!("it should hang: {ended:?}");
}

/// Waits until the stage has written half of its result; gives its unfinished directory.
fn wait_for_half(cache: &Path, stage: &str) -> PathBuf {
    let end = Instant::now() + SOON;
    let wanted = format!("{UNFINISHED}{stage}-");
    loop {
        let entries = fs::read_dir(cache).into_iter().flatten().flatten();
        let found = entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&wanted))
            .map(|entry| entry.path())
            .find(|path| path.join("half").exists());
        if let Some(found) = found {
            return found;
        }
        assert!(Instant::now() < end, "{stage} never began");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What the bake after a stopped one does: the stages before are used again, the stopped one is made anew.
fn assert_resumes(cache: &Path, stopped: usize) {
    let began = Instant::now();
    let ran = chain(cache, None, &Cancel::new()).expect("it resumes");
    assert_eq!(ran, STAGES[stopped..]);
    assert!(began.elapsed() < SOON, "it waited {:?}", began.elapsed());
    let names: Vec<String> = fs::read_dir(cache)
        .expect("listable")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    assert!(
        !names.iter().any(|name| name.starts_with(UNFINISHED)),
        "{names:?}"
    );
    assert_eq!(names.len(), STAGES.len() + 1, "{names:?}");
    assert_eq!(chain(cache, None, &Cancel::new()).expect("again"), [""; 0]);
}

#[test]
fn a_bake_killed_in_any_stage_goes_on_there_and_its_program_is_ended() {
    for (index, stage) in STAGES.iter().enumerate() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut child = Command::new("/proc/self/exe")
            .args(["--exact", "bake::stage::resume::plays_a_bake_that_hangs"])
            .env(ROLE, format!("{stage} {}", dir.path().display()))
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("own binary");
        wait_for_half(dir.path(), stage);
        child.kill().expect("killed");
        let status = child.wait().expect("ended");
        assert_eq!(status.signal(), Some(9), "{status:?}");
        // Its program still sleeps and holds the lock: the next bake ends it instead of waiting.
        assert_resumes(dir.path(), index);
    }
}

#[test]
fn a_bake_cancelled_in_any_stage_ends_at_once_and_goes_on_there() {
    for (index, stage) in STAGES.iter().enumerate() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cancel = Cancel::new();
        thread::scope(|scope| {
            let bake = scope.spawn(|| chain(dir.path(), Some(stage), &cancel));
            let half = wait_for_half(dir.path(), stage);
            cancel.cancel();
            let error = bake.join().expect("it ends").expect_err("cancelled");
            assert!(error.is_cancelled(), "{error:?}");
            assert!(!half.exists(), "half a stage stayed");
        });
        assert_resumes(dir.path(), index);
    }
}
