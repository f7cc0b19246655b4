//! `kiln run` through a server: the command is queued and followed; its output and exit code are passed through.

use kiln_controller::api::{JobView, KeepAsk, MachineView, RunAsk};
use kiln_core::{FailureClass, Verdict};
use kiln_image::context::{Limits, Tree};
use kiln_policy::Compiled;
use kiln_worker::event::Events;
use tokio_util::sync::CancellationToken;

use super::artifacts::CopyOut;
use super::job_record::Record;
use super::kept::Machine;
use super::learn::{Lesson, Reached};
use super::run::{Stay, exited, with_files};
use super::run_attend::Held;
use super::run_bounds::Bounds;
use super::run_folder::Project;
use super::{artifacts, build, build_server, queueing, run_policy};
use crate::args::{NetArg, RunArgs};
use crate::error::{CliError, Result};
use crate::server::follow::{Ended, LogKind, follow};
use crate::server::{Server, upload};
use crate::show::Screen;

pub(super) async fn run(
    server: &Server,
    args: RunArgs,
    screen: Screen,
    cancel: CancellationToken,
    lesson: &Lesson,
) -> Result<u8> {
    refuse(&args)?;
    let found = run_policy::found(&args)?;
    if found.is_none() {
        // What a policy runs is the policy's to say, and the server's to judge.
        super::run::something(args.image.as_ref(), &args.command)?;
    }
    let wanted = artifacts::wanted(&args.artifacts, &args.copy_out)?;
    let env = super::run::environment(&args)?;
    let top = run_policy::top(&args, found.as_ref());
    let without = found.as_ref().map(|found| &found.compiled);
    let without = without.filter(|compiled| compiled.policy().no_source);
    let project = Project {
        top: top.as_deref(),
        without: without.map(Compiled::file),
    };
    let folder = super::run_folder::of(&args, project)?;
    let secrets = super::run::secrets(&args.secrets, &env)?;
    let inner = folder.as_ref().map(|folder| folder.inner.clone());
    let stay = Stay::of(&args, screen);
    let held = Held::of(&args, screen).await?;
    let asked = RunAsk {
        keep: stay.asked(),
        attend: held.as_ref().map(Held::asked),
        secrets: secrets.iter().map(ToString::to_string).collect(),
        artifacts: wanted.iter().map(ToString::to_string).collect(),
        image: args.image.as_ref().map(ToString::to_string),
        folder: inner.filter(|inner| !inner.is_empty()),
        argv: args.command.clone(),
        env,
        policy: found.as_ref().map(run_policy::sent),
        git: args.git.iter().map(ToString::to_string).collect(),
        net: args.net.map(|net| run_policy::mode_word(net).to_owned()),
        common: queueing::common(&args.queueing, &args.limits, &args.allow)?,
    };
    let bounds = Bounds::of(found.as_ref().map(|found| &found.compiled), &args.limits);
    let keeps = !wanted.is_empty() || found.is_some_and(|found| found.keeps());
    let job: JobView = match &folder {
        None => server.post("/v1/runs", &asked).await?,
        Some(folder) => {
            let tree = Tree::open_for_run(&folder.top, Limits::default())
                .map_err(|error| build::folder_error(&error))?;
            tokio::select! {
                job = upload::run(server, &asked, tree, build::folder_error) => job?,
                () = cancel.cancelled() => {
                    return Err(CliError::new(FailureClass::Cancelled, "cancelled before the files were sent"));
                }
            }
        }
    };
    for note in &job.notes {
        screen.note(note);
    }
    if args.queueing.detach {
        build_server::detached(&job, screen);
        return Ok(0);
    }
    let left = Left {
        stay,
        copies: Some(args.copy_out.as_slice()).filter(|_| keeps),
        lesson: Some(lesson),
    };
    let ended = match held {
        None => to_its_end(server, &job, left, screen, &cancel).await,
        Some(held) => held.followed(server, &job, left, screen, &cancel).await,
    };
    ended.map_err(|error| bounds.hinted(error))
}

/// What is to be left of a run here.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    /// Its machine.
    pub(super) stay: Stay,
    /// Its files; none when it keeps none.
    pub(super) copies: Option<&'a [CopyOut]>,
    /// Gets what an open machine reached.
    pub(super) lesson: Option<&'a Lesson>,
}

/// Follows a run to its end, shows what it prints, and gives its exit code.
///
/// # Errors
/// When it did not run, or what it left is not here.
pub(super) async fn to_its_end(
    server: &Server,
    job: &JobView,
    left: Left<'_>,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<u8> {
    let (events, receiver) = Events::channel();
    // A command's own output is what its user wants to see: progress is shown only while it waits.
    let drawing = tokio::spawn(screen.follow_quietly(receiver));
    let ended = follow(server, &job.line.id, LogKind::Raw, &events, screen, cancel).await;
    drop(events);
    let _screen_ended = drawing.await;
    finish(server, job, left, ended?, screen, cancel).await
}

/// What becomes of what a run left, and its exit code.
///
/// # Errors
/// As [`to_its_end`].
pub(super) async fn finish(
    server: &Server,
    job: &JobView,
    left: Left<'_>,
    ended: Ended,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<u8> {
    let stay = left.stay;
    let record = Record::told(ended.report.as_ref(), &ended.parts);
    if let Some(lesson) = left.lesson {
        lesson.take(ended.report.as_ref().and_then(|_| reached(&record)));
    }
    let egress = record.egress;
    if !egress.refused.is_empty() {
        screen.note(&egress.to_string());
    }
    let verdict = ended.outcome.verdict;
    let brought = match left.copies {
        None => Ok(()),
        Some(copies) => artifacts::after_run(server, &job.line.id, copies, screen).await,
    };
    let brought = match &verdict {
        Verdict::Passed
        | Verdict::Failed {
            command_code: Some(_),
            ..
        } => brought,
        // It did not run: there is nothing to miss.
        Verdict::Failed { .. } => Ok(()),
    };
    let remains = remains(&verdict);
    let ended = with_files(code_of(verdict, screen, cancel), brought, screen);
    exited(&job.line.id, &ended, screen);
    if !stay.asked().is_some_and(remains) {
        return ended;
    }
    match kept(server, &job.line.id, stay, screen, cancel).await {
        Ok(()) => ended,
        Err(error) => {
            // The command's own end is told first, and stays what this command ends with.
            screen.error(&error);
            ended.map(|code| code.max(error.exit_code()))
        }
    }
}

/// Which wishes for a machine that stays this end fulfils: one that does not work, and one whose user wanted an end, go.
fn remains(verdict: &Verdict) -> impl Fn(KeepAsk) -> bool + use<> {
    use FailureClass::{OutOfMemory, Timeout, User};
    let (passed, ran) = match verdict {
        Verdict::Passed => (true, true),
        Verdict::Failed { class, .. } => (false, matches!(class, User | Timeout | OutOfMemory)),
    };
    move |keep| ran && !(passed && keep.on_failure_only)
}

/// Says how to reach the machine that stayed, and stands in it where that was asked for.
async fn kept(
    server: &Server,
    id: &str,
    stay: Stay,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    let view: Result<MachineView> = server.get(&format!("/v1/machines/{id}")).await;
    let view = view.map_err(|error| match error.class {
        FailureClass::Usage => CliError::new(
            FailureClass::Infrastructure,
            format!("the machine of {id} does not stay"),
        )
        .hint(format!("`kiln job events {id}` says why")),
        _ => error,
    })?;
    let machine = Machine::far(server, view);
    stay.tell(&machine, screen, cancel).await
}

/// What an open machine reached, as its worker told; none when a part of it is missing.
fn reached(record: &Record) -> Option<Reached> {
    record.missing.is_none().then(|| Reached {
        list: record.learned.clone(),
        more: record.egress.left_out.learned,
    })
}

/// As the command ended.
fn code_of(verdict: Verdict, screen: Screen, cancel: &CancellationToken) -> Result<u8> {
    match verdict {
        Verdict::Passed => Ok(0),
        Verdict::Failed {
            class: FailureClass::User,
            message,
            command_code: Some(code),
            ..
        } => {
            if !cancel.is_cancelled() {
                // Tells the command's own code from one of kiln's.
                screen.note(&format!("kiln: {message}"));
            }
            Ok(u8::try_from(code & 0xff).unwrap_or(1))
        }
        Verdict::Failed {
            class,
            message,
            hint,
            reason,
            ..
        } => {
            let mut error = CliError {
                reason,
                ..CliError::new(class, message)
            };
            error.hints.extend(hint);
            Err(error)
        }
    }
}

/// What nobody would be there for.
fn refuse(args: &RunArgs) -> Result<()> {
    if args.queueing.detach && !args.copy_out.is_empty() {
        return Err(
            CliError::usage("--copy-out needs somebody who waits: --detach does not").hint(
                "keep the files with --artifact, and fetch them with `kiln job artifacts ID --all`",
            ),
        );
    }
    if args.queueing.detach && args.net == Some(NetArg::Learn) {
        return Err(CliError::usage(
            "what a machine learns is told when its command ended: --detach does not wait for it",
        )
        .hint("leave --detach out"));
    }
    let files = [
        ("--kernel", args.kernel.is_some()),
        ("--root-disk", args.root_disk.is_some()),
    ];
    match files.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(CliError::usage(format!(
            "{flag} does not work through a server: machines there are made of files of their worker's host"
        ))
        .hint("without a server the machine is on this host, and it works")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn nobody_learns_from_a_run_that_nobody_waits_for() {
        let args = |words: &[&str]| {
            let words = ["kiln", "run"].iter().chain(words);
            match Cli::try_parse_from(words).expect("legal").command {
                Command::Run(args) => *args,
                other => panic!("{other:?}"),
            }
        };
        let refused = refuse(&args(&["--net", "learn", "--detach", "--", "true"]));
        let refused = refused.expect_err("detached");
        assert_eq!((refused.exit_code(), refused.hints.len()), (2, 1));
        assert!(refuse(&args(&["--net", "learn", "--", "true"])).is_ok());
        assert!(refuse(&args(&["--detach", "--", "true"])).is_ok());
    }

    #[test]
    fn what_was_reached_is_known_only_where_it_was_told() {
        let line = json!({ "rule": "a.example.org:443/tls", "connections": 1, "bytes_out": 1, "bytes_in": 1 });
        let told = |more, missing: Option<&str>| {
            let mut record = Record {
                learned: serde_json::from_value(json!([line])).expect("a line"),
                missing: missing.map(str::to_owned),
                ..Record::default()
            };
            record.egress.left_out.learned = more;
            reached(&record).map(|reached| (reached.list.len(), reached.more))
        };
        assert_eq!(told(3, None), Some((1, 3)));
        assert_eq!(told(0, None), Some((1, 0)));
        assert_eq!(told(0, Some("a part of it")), None);
        assert_eq!(reached(&Record::default()), Some(Reached::default()));
    }
}
