//! Runs test programs in two lanes: the one whose builds compute in machines all the time, and beside it all others, one after another.
//!
//! The first lane prints as it goes; what a program of the second lane said is printed in one piece, between two lines of the first. It knows libtest's lines, and nothing of what a test does.

use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::run;

/// Tests at a time in a program of the first lane: machines wait a part of their time.
pub(crate) const THREADS_MACHINES: usize = 3;
/// The same in the second lane.
const THREADS_BESIDE: usize = 2;

/// The package whose tests take longest by far: they have the first lane for themselves.
const LONGEST: &str = "kiln-cli";
/// Packages whose tests start real machines or compress much: last in the second lane, when what waits for clocks is over.
const MACHINES: [&str; 4] = ["kiln-guest", "kiln-machine", "kiln-image", "kiln-worker"];

/// Tests of [`LONGEST`] that go to the end of the second lane when all of it is run: else the first would be over minutes after the second.
const MOVED: &[&str] = &["faults"];

/// A compiled test program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Program {
    pub(crate) package: String,
    /// `lib`, `it`, ...
    target: String,
    path: PathBuf,
    /// Where it expects to be run.
    folder: PathBuf,
    /// Which of its tests are run, by parts of their names; none named is all.
    pub(crate) names: &'static [&'static str],
    /// Which are not.
    skipped: &'static [&'static str],
}

/// What cargo built for the tests.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) programs: Vec<Program>,
    /// The `kiln` that end-to-end tests start.
    pub(crate) kiln: PathBuf,
}

/// What a line of cargo's messages names.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Named {
    Test(Program),
    Kiln(PathBuf),
}

/// What became of test programs.
#[derive(Debug)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// Names of the tests that failed.
    pub(crate) names: Vec<String>,
    /// Every program's own verdict.
    pub(crate) success: bool,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            passed: 0,
            failed: 0,
            names: Vec::new(),
            success: true,
        }
    }
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.names.extend(other.names);
        self.success &= other.success;
    }

    fn see(&mut self, line: &str) {
        if let Some((passed, failed)) = result_of(line) {
            self.passed += passed;
            self.failed += failed;
        }
        self.names.extend(failed_of(line).map(str::to_owned));
    }
}

/// Compiles the tests that this `cargo test` would run, and the program that they start.
pub(crate) fn compile(cargo: &mut Command) -> Result<Compiled> {
    let listed = run::output(cargo.args([
        "--no-run",
        "--quiet",
        "--message-format=json-render-diagnostics",
    ]))?;
    run::go_on()?;
    let mut programs = Vec::new();
    let mut kiln = None;
    for line in listed.lines() {
        match named_by(line)? {
            Some(Named::Test(program)) => programs.push(program),
            Some(Named::Kiln(path)) => kiln = Some(path),
            None => {}
        }
    }
    if programs.is_empty() {
        bail!("cargo named no test program");
    }
    let kiln = kiln.context("cargo built no `kiln` with the tests")?;
    Ok(Compiled { programs, kiln })
}

/// The program that a line of cargo's messages names, if it names one that is asked for here.
fn named_by(line: &str) -> Result<Option<Named>> {
    let message: serde_json::Value = serde_json::from_str(line).context("a message of cargo")?;
    let Some(path) = message["executable"].as_str() else {
        return Ok(None);
    };
    let target = message["target"]["name"].as_str().context("a target")?;
    if message["profile"]["test"].as_bool() != Some(true) {
        return Ok((target == "kiln").then(|| Named::Kiln(path.into())));
    }
    let manifest = Path::new(message["manifest_path"].as_str().context("a manifest")?);
    let folder = manifest.parent().context("a manifest's folder")?;
    let package = folder.file_name().context("a package's folder")?;
    Ok(Some(Named::Test(Program {
        package: package.to_string_lossy().into_owned(),
        target: target.to_owned(),
        path: path.into(),
        folder: folder.to_owned(),
        names: &[],
        skipped: &[],
    })))
}

/// Splits programs into the two lanes, each in the order in which it is run.
fn split(programs: Vec<Program>) -> (Vec<Program>, Vec<Program>) {
    // Only the integration tests start machines; the others are over at once.
    let starts = |program: &Program| program.target == "it";
    let late = |program: &Program| {
        let found = MACHINES.iter().position(|name| *name == program.package);
        found.filter(|_| starts(program))
    };
    let (mut first, mut second): (Vec<_>, Vec<_>) = programs
        .into_iter()
        .partition(|program| starts(program) && program.package == LONGEST);
    second.sort_by(|a, b| (late(a), &a.package, &a.target).cmp(&(late(b), &b.package, &b.target)));
    for program in first.iter_mut().filter(|one| one.names.is_empty()) {
        let moved = Program {
            names: MOVED,
            ..program.clone()
        };
        program.skipped = MOVED;
        second.push(moved);
    }
    (first, second)
}

/// What one program of the second lane said.
struct Said {
    lines: Vec<String>,
    counts: Counts,
}

/// Runs all programs, whatever becomes of single ones. `settings` adds what tests are told to a command.
pub(crate) fn run(
    programs: Vec<Program>,
    settings: &(dyn Fn(&mut Command) + Sync),
) -> Result<Counts> {
    let (first, second) = split(programs);
    let (sender, ended) = mpsc::channel();
    let mut counts = Counts::default();
    std::thread::scope(|scope| {
        let beside = scope.spawn(move || quietly(&second, settings, &sender));
        let done = first.iter().try_for_each(|program| {
            run::say(&heading(program));
            let mut beside = Counts::default();
            let own = counted(command(program, THREADS_MACHINES, settings), || {
                show(&ended, &mut beside, false);
            });
            counts.add(beside);
            counts.add(own?);
            Ok(())
        });
        // What is left of the second lane, as it ends.
        show(&ended, &mut counts, true);
        let quiet = match beside.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        done.and(quiet)
    })?;
    run::go_on()?;
    Ok(counts)
}

fn quietly(
    programs: &[Program],
    settings: &(dyn Fn(&mut Command) + Sync),
    sender: &Sender<Said>,
) -> Result<()> {
    for program in programs {
        run::go_on()?;
        let mut lines = vec![heading(program)];
        let mut command = command(program, THREADS_BESIDE, settings);
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        let child = command.spawn().context("could not start a test program")?;
        // Its own copies of the writing end would keep the pipe open.
        drop(command);
        let counts = followed(child, reader, |line| lines.push(line.to_owned()))?;
        if sender.send(Said { lines, counts }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Prints what ended in the second lane; with `all`, until it is over.
fn show(ended: &Receiver<Said>, counts: &mut Counts, all: bool) {
    loop {
        let next = match all {
            true => ended.recv().ok(),
            false => ended.try_recv().ok(),
        };
        let Some(said) = next else { return };
        for line in said.lines {
            run::say(&line);
        }
        counts.add(said.counts);
    }
}

fn heading(program: &Program) -> String {
    format!("\n     Running {} {}", program.package, program.target)
}

fn command(program: &Program, threads: usize, settings: &(dyn Fn(&mut Command) + Sync)) -> Command {
    let mut command = Command::new(&program.path);
    settings(&mut command);
    command
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        .args(program.names)
        .args(program.skipped.iter().flat_map(|name| ["--skip", name]))
        .env("RUST_TEST_THREADS", threads.to_string());
    command
}

/// Runs tests, passes their lines on as they come, and sums up. `between` may say something of its own between two lines.
pub(crate) fn counted(mut command: Command, mut between: impl FnMut()) -> Result<Counts> {
    let shown = format!("{:?}", command.get_program());
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start {shown}"))?;
    let stdout = child.stdout.take().context("a pipe")?;
    let counts = followed(child, stdout, |line| {
        between();
        run::say(line);
    })?;
    run::go_on()?;
    Ok(counts)
}

/// Reads what a program says to its end. A test may print what is no text.
fn followed(mut child: Child, said: impl Read, mut line_said: impl FnMut(&str)) -> Result<Counts> {
    let began = Instant::now();
    let mut counts = Counts::default();
    for line in BufReader::new(said).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        counts.see(&line);
        line_said(&line);
    }
    let status = child.wait()?;
    counts.success = status.success();
    if !counts.success && counts.failed == 0 {
        let took = began.elapsed();
        let words = format!("a test program ended with {status} after {took:.0?}");
        line_said(&words);
        counts.names.push(words);
    }
    Ok(counts)
}

/// The name in a line such as `test run::x ... FAILED`.
fn failed_of(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

/// Passed and failed tests of a closing line such as `test result: ok. 3 passed; 0 failed; ...`.
fn result_of(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| {
        let part = counts.split("; ").find(|part| part.ends_with(word))?;
        part.split(' ').next()?.parse().ok()
    };
    Some((count(" passed")?, count(" failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_summed() {
        let line = "test result: FAILED. 21 passed; 5 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.2s";
        assert_eq!(result_of(line), Some((21, 5)));
        assert_eq!(result_of("test build::x ... ok"), None);
        assert_eq!(failed_of("test build::x ... FAILED"), Some("build::x"));
        assert_eq!(failed_of("test result: FAILED. 21 passed"), None);
    }

    fn message(package: &str, target: &str, test: bool) -> String {
        serde_json::json!({
            "reason": "compiler-artifact", "manifest_path": format!("/w/crates/{package}/Cargo.toml"),
            "target": { "name": target }, "profile": { "test": test }, "executable": format!("/t/{package}-{target}"),
        })
        .to_string()
    }

    #[test]
    fn programs_of_machines_go_first_the_longest_at_the_head() {
        let lines = [
            message("kiln-db", "it", true),
            message("kiln-guest", "it", true),
            message("kiln-guest", "kiln_guest", true),
            message("kiln-cli", "kiln", false),
            message("kiln-cli", "it", true),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        let mut programs = Vec::new();
        let mut kiln = None;
        for line in &lines {
            match named_by(line).expect("read") {
                Some(Named::Test(program)) => programs.push(program),
                Some(Named::Kiln(path)) => kiln = Some(path),
                None => {}
            }
        }
        assert_eq!(kiln, Some("/t/kiln-cli-kiln".into()));
        let (first, second) = split(programs);
        let names = |programs: &[Program]| -> Vec<String> {
            let names = programs
                .iter()
                .map(|one| format!("{} {}", one.package, one.target));
            names.collect()
        };
        assert_eq!(names(&first), ["kiln-cli it"]);
        assert_eq!(
            names(&second),
            [
                "kiln-db it",
                "kiln-guest kiln_guest",
                "kiln-guest it",
                "kiln-cli it"
            ]
        );
        // Each of its tests is run once.
        assert_eq!((first[0].names, first[0].skipped), (&[][..], MOVED));
        assert_eq!((second[3].names, second[3].skipped), (MOVED, &[][..]));
        let part = Program {
            names: &["hostile_"],
            skipped: &[],
            ..first[0].clone()
        };
        let (first, second) = split(vec![part.clone()]);
        assert_eq!((first, second), (vec![part], Vec::new()));
    }

    #[test]
    fn a_program_that_dies_without_a_closing_line_is_a_failure() {
        let mut lines = Vec::new();
        let shell = |script: &str| {
            let mut shell = Command::new("/bin/sh");
            let mut child = shell
                .args(["-c", script])
                .stdout(Stdio::piped())
                .spawn()
                .expect("starts");
            let said = child.stdout.take().expect("piped");
            (child, said)
        };
        let (child, said) = shell("echo 'test a::b ... ok'; kill -9 $$");
        let counts = followed(child, said, |line| lines.push(line.to_owned())).expect("runs");
        assert!(!counts.success && counts.names.len() == 1, "{counts:?}");
        assert_eq!(lines.len(), 2);
        let script = "echo 'test a::b ... FAILED'; echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored'; exit 101";
        let (child, said) = shell(script);
        let counts = followed(child, said, |_| {}).expect("runs");
        assert_eq!((counts.passed, counts.failed), (1, 1));
        assert_eq!(counts.names, ["a::b"]);
    }

    #[test]
    fn both_lanes_are_counted_and_a_failure_in_either_counts() {
        let folder = std::env::temp_dir();
        let program = |package: &str, path: &str| Program {
            package: package.to_owned(),
            target: "it".to_owned(),
            path: path.into(),
            folder: folder.clone(),
            names: &[],
            skipped: &[],
        };
        let both = vec![
            program("kiln-cli", "/bin/true"),
            program("kiln-db", "/bin/false"),
        ];
        let counts = run(both, &|_| {}).expect("run");
        assert!(!counts.success && counts.names.len() == 1, "{counts:?}");
        let one = vec![program("kiln-cli", "/bin/true")];
        assert!(run(one, &|_| {}).expect("run").success);
    }
}
