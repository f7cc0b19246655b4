//! `scripts/e2e`, as a CI step of a repository runs it: beside another one, and beside every other kiln of the host.

use std::process::{Command, Stdio};

use crate::support::{kiln, root, said};

#[test]
fn two_at_once_are_well_and_leave_nothing() {
    let Some(kiln) = kiln() else { return };
    let rooms = tempfile::tempdir().expect("temp dir");
    let script = || {
        let mut command = Command::new(root().join("scripts/e2e"));
        command
            .arg("--kiln")
            .arg(&kiln.program)
            .arg("--home")
            .arg(&kiln.home);
        command.env("TMPDIR", rooms.path()).stdin(Stdio::null());
        command
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| said(script()));
        said(script()).exits(0).says("all is well");
        other
            .join()
            .expect("the other")
            .exits(0)
            .says("all is well");
    });
    let left = std::fs::read_dir(rooms.path()).expect("list").count();
    assert_eq!(left, 0, "{rooms:?}");
    let mut wrong = script();
    wrong.args(["--home", "/nowhere"]);
    said(wrong).exits(3).says("no machine image");
    let mut wrong = script();
    wrong.arg("--what");
    said(wrong).exits(2).says("unknown option --what");
}
