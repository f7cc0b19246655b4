//! Records of jobs: their life, a killed process, newer schemas, retention.

use std::io::Read;
use std::path::Path;

use anyhow::Result;
use kiln_core::{JobId, Outcome, TenantName, Verdict};
use kiln_store::records::{NewRecord, RecordError, RecordState, Records};
use serde_json::{Value, json};

fn new(id: &str) -> NewRecord {
    NewRecord {
        id: id.parse().unwrap(),
        tenant: TenantName::local(),
        kind: "image-build".to_owned(),
        title: "build .".to_owned(),
        started_unix_ms: 1,
    }
}

fn passed() -> Outcome {
    Outcome {
        verdict: Verdict::Passed,
        phases_ms: vec![("build".to_owned(), 7)],
    }
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut value = serde_json::from_slice(&std::fs::read(path)?)?;
    change(&mut value);
    Ok(std::fs::write(path, serde_json::to_vec(&value)?)?)
}

#[test]
fn a_job_is_running_then_finished_with_log_and_events() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let records = Records::open(&dir.path().join("jobs"))?;
    let id: JobId = "b1".parse()?;
    let mut writer = records.begin(new("b1"))?;
    assert_eq!(records.show(&id)?.state, RecordState::Running);
    assert!(matches!(
        records.begin(new("b1")),
        Err(RecordError::Exists { .. })
    ));
    writer.log(b"hello\n")?;
    writer.event(&json!({"event": "machine-booted"}))?;
    writer.details(json!({"layers": 3}))?;
    assert!(records.observed(&id)?.is_none());
    writer.finish(passed(), None, 9)?;
    let record = records.show(&id)?;
    assert_eq!(record.state.name(), "passed");
    assert_eq!((record.log_bytes, record.log_cut_bytes), (6, 0));
    assert_eq!(record.details, json!({"layers": 3}));
    let mut text = String::new();
    records.open_log(&id)?.read_to_string(&mut text)?;
    records.open_events(&id)?.read_to_string(&mut text)?;
    assert_eq!(text, "hello\n{\"event\":\"machine-booted\"}\n");
    assert!(matches!(
        records.show(&"b2".parse()?),
        Err(RecordError::Unknown { .. })
    ));
    Ok(())
}

#[test]
fn a_job_whose_process_is_gone_is_lost_and_a_dropped_one_failed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let records = Records::open(dir.path())?;
    let id: JobId = "b1".parse()?;
    let writer = records.begin(new("b1"))?;
    let path = writer.dir().join("record.json");
    let before = std::fs::read(&path)?;
    drop(writer);
    assert_eq!(records.show(&id)?.state.name(), "failed");
    std::fs::write(&path, before)?;
    edit(&path, |value| value["process"]["started_ticks"] = json!(1))?;
    assert_eq!(records.show(&id)?.state, RecordState::Lost);
    Ok(())
}

#[test]
fn newer_and_damaged_records_are_told_not_hidden() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let records = Records::open(dir.path())?;
    for id in ["b1", "b2", "b3"] {
        records.begin(new(id))?.finish(passed(), None, 2)?;
    }
    edit(&dir.path().join("b1/record.json"), |value| {
        *value = json!({"schema": 2, "everything": "else"});
    })?;
    std::fs::write(dir.path().join("b2/record.json"), "{")?;
    let newer = records.show(&"b1".parse()?).unwrap_err();
    assert!(newer.to_string().contains("use a newer kiln"), "{newer}");
    let listing = records.list(0, 10)?;
    assert_eq!((listing.records.len(), listing.unreadable.len()), (1, 2));
    Ok(())
}

#[test]
fn lists_are_newest_first_and_bounded_and_pruning_spares_the_running() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let records = Records::open(dir.path())?;
    let _running = records.begin(new("b0"))?;
    for id in ["b1", "r2", "b3", "r4"] {
        records.begin(new(id))?.finish(passed(), None, 2)?;
    }
    let ids = |skip, max| -> Result<(Vec<String>, bool)> {
        let listing = records.list(skip, max)?;
        let ids = listing.records.iter().map(|r| r.id.to_string()).collect();
        Ok((ids, listing.more))
    };
    assert_eq!(ids(0, 2)?, (vec!["r4".into(), "b3".into()], true));
    assert_eq!(
        ids(2, 9)?,
        (vec!["r2".into(), "b1".into(), "b0".into()], false)
    );
    // Left by a process that was killed while it began a job.
    std::fs::create_dir(dir.path().join(".work-999999-1-b9"))?;
    let pruned = records.prune(2)?;
    assert_eq!((pruned.removed, pruned.kept), (2, 3));
    assert_eq!(ids(0, 9)?.0, ["r4", "b3", "b0"]);
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 3);
    Ok(())
}
