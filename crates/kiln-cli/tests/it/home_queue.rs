//! Without a server every command goes through the queue of its home, whose controller runs in one of them: what happens when that one ends.

use std::io::{BufRead as _, BufReader, Read as _};

use serde_json::Value;

use crate::annex::Annex;
use crate::support::{Started, until};

/// A run that has said it started; it says `over` after so many seconds.
fn started(annex: &Annex, seconds: u32) -> Started {
    let script = format!("echo started; sleep {seconds}; echo over");
    let mut running = annex.start(&["run", "--", "sh", "-c", &script]);
    let mut first = [0; 8];
    let stdout = running.child.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut first).expect("started");
    running
}

fn jobs(annex: &Annex) -> Vec<Value> {
    let listed = annex.run(&["job", "list", "--json"]).exits(0).out;
    let line = |line: &str| serde_json::from_str(line).expect("JSON");
    listed.lines().map(line).collect()
}

#[test]
fn a_command_outlives_the_one_that_had_the_controller() {
    let Some(annex) = Annex::open() else { return };
    let first = started(&annex, 600);
    // Longer than a lease lives without a controller that renews it.
    let second = started(&annex, 18);
    assert_eq!(jobs(&annex).len(), 2);
    first.signal("KILL");
    first.end();
    let said = second.end().exits(0);
    assert_eq!(said.out, "over\n");
    // What the killed one held ended when its controller was taken over; it is not tried again.
    let lost = until("the end of the killed command's job", || {
        let over = jobs(&annex)
            .into_iter()
            .all(|job| job["state"] == "finished");
        over.then(|| jobs(&annex))
    });
    let classes: Vec<_> = lost
        .iter()
        .map(|job| job["outcome"]["class"].clone())
        .collect();
    assert_eq!(classes, [Value::Null, "lost".into()], "newest first");
    // Its machine's folder goes with the next command that starts a machine.
    annex.run(&["run", "--", "true"]).exits(0);
    annex.is_well();
}

#[test]
fn a_command_makes_room_for_a_server_and_goes_on() {
    let Some(annex) = Annex::open() else { return };
    let running = started(&annex, 5);
    let mut server = annex.start(&["serve", "--json"]);
    let out = server.child.stdout.take().expect("piped");
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line).expect("a line");
    let said: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(said["event"], "serving", "{said}");
    annex
        .run(&["serve"])
        .exits(2)
        .says("another kiln controller");
    assert_eq!(running.end().exits(0).out, "over\n");
    assert_eq!(jobs(&annex)[0]["outcome"]["verdict"], "passed");
    server.signal("TERM");
    server.child.wait().expect("ends");
    assert_eq!(jobs(&annex).len(), 1, "its jobs stay");
    annex.is_well();
}

#[test]
fn a_suspended_command_holds_up_nobody_and_goes_on() {
    let Some(annex) = Annex::open() else { return };
    let first = started(&annex, 3);
    first.signal("TSTP");
    let status = format!("/proc/{}/stat", first.child.id());
    until("the command to be suspended", || {
        let stat = std::fs::read_to_string(&status).ok()?;
        stat.contains(") T ").then_some(())
    });
    annex.run(&["run", "--", "echo", "meanwhile"]).exits(0);
    // Longer than a lease of a fleet's worker and its grace.
    let second = started(&annex, 22);
    assert_eq!(second.end().exits(0).out, "over\n");
    first.signal("CONT");
    assert_eq!(first.end().exits(0).out, "over\n");
    let verdicts = jobs(&annex)
        .into_iter()
        .map(|job| job["outcome"]["verdict"].clone());
    assert!(
        verdicts.clone().all(|verdict| verdict == "passed"),
        "{:?}",
        verdicts.collect::<Vec<_>>()
    );
    annex.is_well();
}
