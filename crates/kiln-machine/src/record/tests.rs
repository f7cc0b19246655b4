//! What a record promises, on real files.

use super::*;

fn name(text: &str) -> MachineName {
    text.parse().expect("a name")
}

#[test]
fn a_live_machine_keeps_its_name_and_a_dropped_one_leaves_nothing() {
    let home = tempfile::tempdir().expect("temp");
    let machine = MachineDir::create(home.path(), &name("m1"), "sim").expect("made");
    fs::write(machine.path("overlay.qcow2"), "x").expect("write");
    let again = MachineDir::create(home.path(), &name("m1"), "sim");
    assert!(matches!(again, Err(RecordError::Exists(_))));
    let other = MachineDir::create(home.path(), &name("m2"), "sim").expect("made");
    assert_ne!(machine.token(), other.token());
    drop(machine);
    assert!(!home.path().join("machines/m1").exists());
    assert!(other.remove().leaks.is_empty());
    assert!(other.remove().leaks.is_empty());
    assert!(matches!(other.update(|_| {}), Err(RecordError::Removed(_))));
    MachineDir::create(home.path(), &name("m1"), "sim").expect("the name is free again");
}

#[test]
fn a_dead_machine_makes_room_for_its_successor() {
    let home = tempfile::tempdir().expect("temp");
    let first = MachineDir::create(home.path(), &name("m1"), "sim").expect("made");
    fs::write(first.path("old"), "x").expect("write");
    first.abandon();
    let second = MachineDir::create(home.path(), &name("m1"), "sim").expect("made");
    assert!(!second.path("old").exists());
    assert_ne!(first.token(), second.token());
    drop(first);
    assert!(
        second.path(LOCK_FILE).exists(),
        "the old handle touches nothing"
    );
}

#[test]
fn records_name_only_their_own_paths() {
    let home = tempfile::tempdir().expect("temp");
    let machine = MachineDir::create(home.path(), &name("m1"), "sim").expect("made");
    let token = machine.token().to_owned();
    for bad in [
        PathBuf::from("/etc/passwd"),
        PathBuf::from(format!("/{token}/x")),
        PathBuf::from(&token),
        PathBuf::from(format!("/x/../{token}")),
    ] {
        let refused = machine.update(|record| record.paths.push(bad.clone()));
        assert!(
            matches!(refused, Err(RecordError::ForeignPath(_))),
            "{bad:?}"
        );
    }
    let own = home.path().join(format!("sock-{token}"));
    fs::write(&own, "x").expect("write");
    machine
        .update(|record| record.paths.push(own.clone()))
        .expect("own path");
    assert_eq!(read_record(machine.dir()).expect("read"), machine.record());
    drop(machine);
    assert!(!own.exists());
}

#[test]
fn uid_slots_are_not_shared_even_with_the_dead() {
    let home = tempfile::tempdir().expect("temp");
    let make = |text| MachineDir::create(home.path(), &name(text), "sim").expect("made");
    let (a, b, c) = (make("a"), make("b"), make("c"));
    assert_eq!(a.take_uid_slot(home.path()).expect("slot"), 0);
    assert_eq!(b.take_uid_slot(home.path()).expect("slot"), 1);
    a.abandon();
    assert_eq!(c.take_uid_slot(home.path()).expect("slot"), 2);
    drop(b);
    assert_eq!(make("d").take_uid_slot(home.path()).expect("slot"), 1);
}

#[test]
fn records_of_before_kept_machines_are_read_and_newer_ones_are_not() {
    let home = tempfile::tempdir().expect("temp");
    let machine = MachineDir::create(home.path(), &name("m1"), "sim").expect("made");
    let path = machine.path(RECORD_FILE);
    let text = fs::read_to_string(&path).expect("read");
    assert!(!text.contains("kept"), "{text}");
    for (schema, readable) in [
        (0, false),
        (1, true),
        (RECORD_SCHEMA, true),
        (RECORD_SCHEMA + 1, false),
    ] {
        let now = format!("\"schema\": {RECORD_SCHEMA}");
        let other = text.replace(&now, &format!("\"schema\": {schema}"));
        fs::write(&path, other).expect("write");
        assert_eq!(read_record(machine.dir()).is_some(), readable, "{schema}");
    }
}

#[test]
fn what_is_no_file_is_no_lock_and_no_record_and_waited_for_by_nobody() {
    use crate::own_file::tests::{fifo, in_time};

    let home = tempfile::tempdir().expect("temp");
    let machine = MachineDir::create(home.path(), &name("m1"), "sim").expect("made");
    machine.abandon();
    for file in [LOCK_FILE, RECORD_FILE] {
        fs::remove_file(machine.path(file)).expect("removed");
        fifo(&machine.path(file));
    }
    let at = home.path().to_owned();
    let report = in_time(move || reap::reap_home(&at));
    assert_eq!(report.reaped, ["m1"], "{report:?}");
    let lock = home.path().join("machines/.lock");
    fs::remove_file(&lock).expect("removed");
    fifo(&lock);
    let at = home.path().to_owned();
    let refused = in_time(move || MachineDir::create(&at, &name("m2"), "sim"));
    assert!(matches!(refused, Err(RecordError::Io { .. })));
}
