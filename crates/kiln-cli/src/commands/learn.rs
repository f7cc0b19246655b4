//! Learning: a command runs open above the floor of addresses, what it reached is told, and written into the folder's policy once a person
//! agreed to the difference. The operator grants it (`learn = true` in `policy.toml`); no secret is ever in such a machine.

use std::io::{self, IsTerminal as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kiln_core::{AllowRule, ByteSize, FailureClass};
use kiln_network::Learned;
use kiln_policy::{CannotWrite, Format, KILN_FILE, Phase, with_learned};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::replace::replace;
use super::table::counted;
use super::{run, run_policy};
use crate::args::{LearnArgs, NetArg, ServerArgs};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::policy_file;
use crate::show::{Screen, ShownPath as _, printable};

/// Mode of a policy that was not there before.
const NEW_FILE_MODE: u32 = 0o644;

/// What a run learned, for whoever had it run.
#[derive(Debug, Default)]
pub(super) struct Lesson(Mutex<Option<Reached>>);

/// What an open machine reached.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Reached {
    /// As an allowlist says it.
    pub(super) list: Vec<Learned>,
    /// How many more destinations there are that nobody told.
    pub(super) more: u64,
}

impl Lesson {
    /// Takes what a run reached; none when nobody told.
    pub(super) fn take(&self, reached: Option<Reached>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reached;
    }

    fn give(&self) -> Option<Reached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Says what was reached, as an allowlist; gives it back, if anybody told it.
    pub(super) fn tell(&self, screen: Screen) -> Option<Reached> {
        let Some(reached) = self.give() else {
            screen.note("warning: what it reached is not known: nobody told");
            return None;
        };
        if reached.more > 0 {
            screen.note(&format!(
                "warning: it reached {} destinations more than are told; a list of so many is no policy",
                reached.more
            ));
        }
        if screen.json() {
            for line in &reached.list {
                screen.data(&json!({ "event": "learned", "learned": line }), String::new);
            }
            return Some(reached);
        }
        screen.note(match reached.list.len() {
            0 => "learned: it reached nothing",
            _ => "learned, as an allowlist:",
        });
        for line in &reached.list {
            let phase = line
                .phase
                .as_deref()
                .map(|phase| format!("{phase}: "))
                .unwrap_or_default();
            screen.note(&format!(
                "  {phase}{}   {}, {} out, {} in",
                line.rule,
                counted(line.connections, "connection"),
                ByteSize(line.bytes_out),
                ByteSize(line.bytes_in)
            ));
        }
        Some(reached)
    }
}

/// `kiln policy learn`
pub(super) async fn learn(
    mut args: LearnArgs,
    server: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    args.run.net = Some(NetArg::Learn);
    // What could not be written afterwards is told before anything runs.
    let file = match args.write {
        true => Some(target(&args)?),
        false => None,
    };
    if args.write && !args.yes && (screen.json() || !io::stdin().is_terminal()) {
        return Err(CliError::usage(
            "--write asks before it writes, and nobody is there to answer",
        )
        .hint("--yes writes without asking; without --write the allowlist is only printed"));
    }
    let named = args.run.policy.is_some();
    let lesson = Lesson::default();
    let code = run::run_and_learn(args.run, server, screen, cancel, &lesson).await?;
    let reached = lesson.tell(screen);
    let Some(file) = file else {
        return Ok(code);
    };
    if code != 0 {
        screen
            .note("nothing is written: the command failed, so what it reached is not all it needs");
        return Ok(code);
    }
    let learned = whole(reached)?;
    let file = (file.as_path(), named);
    match args.yes {
        true => write(file, &learned, std::future::ready(Ok(())), screen).await?,
        false => write(file, &learned, asked(file.0, screen), screen).await?,
    }
    Ok(0)
}

/// All that was reached: a list that lacks something would be written as if it were the whole.
fn whole(reached: Option<Reached>) -> Result<Vec<Learned>> {
    match reached {
        Some(Reached { list, more: 0 }) => Ok(list),
        Some(Reached { list, more }) => Err(CliError::usage(format!(
            "nothing is written: {} destinations are known of the {} that it reached",
            list.len(),
            more.saturating_add(list.len() as u64)
        ))
        .hint("learn a part of the command at a time, or name the hosts yourself, with *.HOST for many below one name")),
        None => Err(CliError::new(
            FailureClass::Infrastructure,
            "nothing is written: what it reached is not known",
        )
        .hint("`kiln job show ID --json` has what the worker told")),
    }
}

/// The file to write: the folder's policy, or a new one.
fn target(args: &LearnArgs) -> Result<PathBuf> {
    let Some(found) = run_policy::found(&args.run)? else {
        return Ok(PathBuf::from(KILN_FILE));
    };
    match found.compiled.format() {
        Format::Kiln => Ok(found.path),
        Format::Cleanroom => Err(CliError::usage(format!(
            "{} is not written: only a kiln.yaml is",
            found.path.shown()
        ))
        .hint("leave --write out and add the destinations yourself")),
    }
}

/// Adds what was learned to the file, once somebody `agreed` to the difference. One that a person named may be a link.
async fn write(
    (file, named): (&Path, bool),
    learned: &[Learned],
    agreed: impl Future<Output = Result<()>>,
    screen: Screen,
) -> Result<()> {
    let there = match file.symlink_metadata() {
        Ok(_) => Some(policy_file::text(file, named)?),
        Err(_) => None,
    };
    let mut text = there.clone();
    for phase in Phase::ALL {
        let rules: Vec<AllowRule> = learned
            .iter()
            .filter(|line| line.phase.as_deref().unwrap_or(Phase::Run.name()) == phase.name())
            .map(|line| line.rule.clone())
            .collect();
        if phase != Phase::Run && rules.is_empty() {
            continue;
        }
        let changed =
            with_learned(text.as_deref(), phase, &rules).map_err(|error| cannot(file, &error))?;
        text = Some(changed);
    }
    let text = text.unwrap_or_default();
    if there.as_deref() == Some(&*text) {
        screen.note(&format!("{} names all of it already", file.shown()));
        return Ok(());
    }
    for line in difference(there.as_deref().unwrap_or_default(), &text) {
        screen.note(&line);
    }
    agreed.await?;
    // Whoever changed it meanwhile is not overwritten.
    let now = file
        .symlink_metadata()
        .is_ok()
        .then(|| policy_file::text(file, named))
        .transpose()?;
    if now != there {
        return Err(CliError::usage(format!(
            "{} changed meanwhile: nothing is written",
            file.shown()
        )));
    }
    let path = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let mode = path
        .metadata()
        .map_or(NEW_FILE_MODE, |meta| meta.permissions().mode() & 0o777);
    replace(&path, text.as_bytes(), mode)
        .map_err(|error| CliError::usage(format!("could not write {}: {error}", file.shown())))?;
    screen.data(&json!({ "event": "written", "file": file }), || {
        format!(
            "wrote {}: `kiln run` holds the command to it from now on",
            file.shown()
        )
    });
    Ok(())
}

fn cannot(file: &Path, error: &CannotWrite) -> CliError {
    CliError::usage(format!("{}: {error}", file.shown()))
}

/// Asks at the terminal.
async fn asked(file: &Path, screen: Screen) -> Result<()> {
    screen.note(&format!(
        "Write this to {}? Type yes to do so:",
        file.shown()
    ));
    let line = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().read_line(&mut line).map(|_| line)
    });
    said_yes(&line.await.or_infrastructure()?.or_infrastructure()?)
}

fn said_yes(answer: &str) -> Result<()> {
    match answer.trim().eq_ignore_ascii_case("yes") {
        true => Ok(()),
        false => Err(CliError::usage("nothing is written")),
    }
}

/// Lines that go and come, `-` and `+`. Learning only adds lines and changes single ones, so the two texts are walked side by side.
fn difference(before: &str, after: &str) -> Vec<String> {
    let old: Vec<&str> = before.lines().collect();
    let mut at = 0;
    let mut told = Vec::new();
    for line in after.lines() {
        match old[at..].iter().position(|old| *old == line) {
            Some(skipped) => {
                told.extend(old[at..at + skipped].iter().map(|gone| format!("- {gone}")));
                at += skipped + 1;
            }
            None => told.push(format!("+ {line}")),
        }
    }
    told.extend(old[at..].iter().map(|gone| format!("- {gone}")));
    told.into_iter().map(|line| printable(&line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_shows_what_goes_and_comes() {
        let before = "version: 1\nnetwork:\n  mode: learn\n# end\n";
        let after = "version: 1\nnetwork:\n  allow:\n    - \"a\"\n  mode: egress\n# end\n";
        assert_eq!(
            difference(before, after),
            [
                "+   allow:",
                "+     - \"a\"",
                "+   mode: egress",
                "-   mode: learn"
            ]
        );
        assert_eq!(difference("", "a\n"), ["+ a"]);
    }

    fn reached() -> Vec<Learned> {
        vec![Learned {
            phase: None,
            rule: "a.example.org:443/tls".parse().expect("rule"),
            connections: 1,
            bytes_out: 1,
            bytes_in: 1,
        }]
    }

    #[tokio::test]
    async fn nothing_is_written_without_a_yes_or_over_what_came_meanwhile() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("kiln.yaml");
        let text = || std::fs::read_to_string(&file).expect("text");
        let before = "version: 1\nimage: node\n";
        std::fs::write(&file, before).expect("written");
        let screen = Screen::new(false);
        for answer in ["no\n", "\n", "y\n", "yes, but"] {
            let agreed = async { said_yes(answer) };
            let refused = write((&file, false), &reached(), agreed, screen).await;
            assert!(refused.is_err(), "{answer}");
            assert_eq!(text(), before, "{answer}");
        }
        let meanwhile = async {
            std::fs::write(&file, "version: 1\nimage: python\n").expect("written");
            said_yes("yes\n")
        };
        let refused = write((&file, false), &reached(), meanwhile, screen).await;
        let refused = refused.expect_err("changed").message;
        assert!(refused.contains("changed meanwhile"), "{refused}");
        assert_eq!(text(), "version: 1\nimage: python\n");
        let agreed = async { said_yes("YES\n") };
        let written = write((&file, false), &reached(), agreed, screen).await;
        written.expect("written");
        assert!(text().contains("a.example.org:443/tls"), "{}", text());
    }

    #[test]
    fn a_list_that_lacks_something_is_not_the_whole() {
        let list = reached();
        let all = Reached {
            list: list.clone(),
            more: 0,
        };
        assert_eq!(whole(Some(all)).expect("whole"), list);
        let cut = whole(Some(Reached { list, more: 9 })).expect_err("cut");
        assert!(
            cut.message.contains("1 destinations are known of the 10"),
            "{cut:?}"
        );
        assert_eq!((cut.exit_code(), cut.hints.len()), (2, 1));
        assert_eq!(whole(None).expect_err("nobody told").exit_code(), 3);
    }
}
