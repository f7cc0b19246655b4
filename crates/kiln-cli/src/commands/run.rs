//! `kiln run`: a command in a fresh machine, or a container image under runc. Its output and exit code are passed through.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use kiln_controller::api::KeepAsk;
use kiln_core::access::DISK_MIN;
use kiln_core::command_line::{self, CommandTooLong};
use kiln_core::job::{RunCommand, TrustClass};
use kiln_core::{
    ByteSize, FailureClass, ImageRef, JobKind, JobRequest, Label, RunSecret, TenantName,
};
use kiln_proto::msg::{Exit, TtySize};
use kiln_worker::event::Events;
use kiln_worker::fleet::job::{Ended, JobEnd};
use kiln_worker::fleet::local::{LocalFolder, LocalJob, LocalRun};
use kiln_worker::given::Given;
use kiln_worker::host::new_job_id;
use kiln_worker::kept::{Keep, STAYS_DEFAULT};
use kiln_worker::orders::Control;
use kiln_worker::run::ending;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::artifacts::{self, CopyOut};
use super::home_queue::HomeQueue;
use super::kept::{Machine, exec, keeper};
use super::learn::{Lesson, Reached};
use super::operator::Operator;
use super::run_folder::{self, Folder};
use super::run_policy::Ruled;
use super::{run_given, run_ports, source, when};
use crate::args::{NetArg, RunArgs, ServerArgs};
use crate::config::within;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;
use crate::terminal::{self, RawMode, Shown};

/// Exit code when nobody reads the output any more: 128 and SIGPIPE, as a shell has it.
pub(super) const READER_GONE: u8 = 141;

pub(super) async fn run(
    args: RunArgs,
    server: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let lesson = Lesson::default();
    let told = args.net == Some(NetArg::Learn);
    let code = run_and_learn(args, server, screen, cancel, &lesson).await?;
    if told {
        lesson.tell(screen);
    }
    Ok(code)
}

/// As [`run`]; what an open machine reached goes to `lesson`.
pub(super) async fn run_and_learn(
    args: RunArgs,
    server: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
    lesson: &Lesson,
) -> Result<u8> {
    if let Some(server) = crate::server::configured(server)? {
        return super::run_server::run(&server, args, screen, cancel, lesson).await;
    }
    let own = super::queueing::own(&args.queueing)?;
    let operator = Operator::load()?;
    let mut ruled = super::run_policy::rule(&args, &operator, screen)?;
    if ruled.image.is_none() && ruled.argv.is_empty() && args.keep.is_some() {
        // The machine itself is what is wanted.
        ruled.argv = vec!["true".to_owned()];
    }
    something(ruled.image.as_ref(), &ruled.argv)?;
    let given = run_given::open(&args, (&ruled, &operator.home), screen, &cancel).await?;
    let config = &operator.config;
    let mut limits = config.limits(&ruled.limits, false, super::host_cpus())?;
    kiln_policy::below(&mut limits, &ruled.max);
    limits.disk = disk(
        own.disk,
        (ruled.disk, ruled.says_disk()),
        config.limits.disk_max.0,
    )?;
    let folder = run_folder::of(&args, ruled.project())?;
    let (wants_none, bounds) = (ruled.no_source, ruled.bounds.clone());
    let env = environment(&args)?;
    fits(&ruled.argv, &env)?;
    let kept = [ruled.artifacts.as_slice(), args.artifacts.as_slice()].concat();
    let wanted = artifacts::wanted(&kept, &args.copy_out)?;
    let secrets = secrets(&ruled.secrets, &env)?;
    for phase in &ruled.phases {
        let _distinct = self::secrets(&phase.secrets, &env)?;
    }
    let is_given_more = is_given_more(&ruled);
    let listeners = run_ports::listen(run_ports::Said::Publish, &args.publish).await?;
    run_ports::announce(&listeners, screen)?;
    let size = own_terminal(&args, screen)?;
    let wants_stdin = size.is_some() || args.interactive || terminal::stdin_is_piped();
    let ports = run_ports::ports(&listeners)?;
    let [kernel, root_disk] = given.asked();
    let request = JobRequest {
        id: new_job_id('r').map_err(CliError::from_failure)?,
        tenant: TenantName::local(),
        kind: JobKind::Run(Box::new(RunCommand {
            image: ruled.image,
            runtime: None,
            argv: ruled.argv,
            env,
            ports,
            tty: size.is_some(),
            stdin: wants_stdin,
            artifacts: wanted.clone(),
            secrets: secrets.clone(),
            source: folder.as_ref().map(Folder::request),
            git: ruled.git,
            phases: ruled.phases,
            services: ruled.services,
            disk: own.disk.is_some() || ruled.disk_said,
            keep: None,
            kernel,
            root_disk,
            attend: None,
        })),
        network: ruled.network,
        limits,
        trust: trust(is_given_more),
        network_bits: None,
        dispatch: own.dispatch,
        traceparent: None,
        policy: ruled.applied,
    };
    let stay = Stay::of(&args, screen);
    let queue = HomeQueue::open(&operator.home).await?;
    let in_front = InFront {
        folder: folder.as_ref().map(Folder::local),
        given,
        operator: &operator,
        queue: &queue,
        request,
        labels: own.labels,
        listeners,
        size,
        wants_stdin,
        keeps: !wanted.is_empty(),
        copies: &args.copy_out,
        stay,
        lesson: Some(lesson),
    };
    let ended = in_front.run(screen, &cancel).await;
    queue.close().await;
    if folder.is_none() && !wants_none && !matches!(ended, Ok(0)) {
        run_folder::hint(&args, screen);
    }
    ended.map_err(|error| bounds.hinted(error))
}

/// Whether its owner gives it secrets, to whichever phase, has the host log in for it, or opens its network to learn.
fn is_given_more(ruled: &Ruled) -> bool {
    let phases = || ruled.phases.iter();
    let mut git = phases().flat_map(|phase| &phase.git).chain(&ruled.git);
    !ruled.secrets.is_empty()
        || phases().any(|phase| !phase.secrets.is_empty())
        || git.any(|one| one.credential.is_some())
        || ruled.applied.as_ref().is_some_and(|one| one.learn)
}

/// What its owner gives secrets, or an open network to learn, is trusted by them; whatever else is run here may be anything.
fn trust(is_given_more: bool) -> TrustClass {
    match is_given_more {
        true => TrustClass::Trusted,
        false => TrustClass::Untrusted,
    }
}

/// The variables of files and of words; words win.
pub(super) fn environment(args: &RunArgs) -> Result<BTreeMap<String, String>> {
    let mut env = BTreeMap::new();
    for file in &args.env_file {
        env.extend(source::env_file(file)?);
    }
    env.extend(source::pairs(&args.env, "--env")?);
    Ok(env)
}

/// What can be sent to no machine is refused before one starts.
fn fits(argv: &[String], env: &BTreeMap<String, String>) -> Result<()> {
    let fits = command_line::fits(argv, env);
    fits.map_err(|long| CliError::usage(long.to_string()).hint(CommandTooLong::HINT))
}

/// The disk that was asked for, at most the policy's and the operator's; each says no in its own name.
fn disk(
    asked: Option<ByteSize>,
    (ruled, by): (Option<ByteSize>, Option<&str>),
    most: ByteSize,
) -> Result<ByteSize> {
    if let (Some(asked), Some(allowed)) = (asked, ruled)
        && asked > allowed
    {
        return Err(match by {
            Some(file) => CliError::usage(format!(
                "--disk {asked}: {file} allows {allowed}, and a flag can only narrow a policy"
            ))
            .hint(format!(
                "write it into limits.disk of {file}, or take the flag away"
            )),
            None => CliError::new(
                FailureClass::Policy,
                format!("--disk {asked}: at most {allowed} is granted"),
            )
            .hint("the operator's maximum is max.disk in policy.toml"),
        });
    }
    if let Some(asked) = asked {
        within("disk", asked, (DISK_MIN, most))?;
    }
    Ok(asked.or(ruled).unwrap_or(most).min(most))
}

/// A run of this command's own, in front of whoever typed it.
pub(super) struct InFront<'a> {
    /// What it works on.
    pub(super) folder: Option<LocalFolder>,
    /// Files of which its machine is made.
    pub(super) given: Given,
    pub(super) operator: &'a Operator,
    pub(super) queue: &'a HomeQueue,
    pub(super) request: JobRequest,
    pub(super) labels: BTreeMap<Label, Label>,
    pub(super) listeners: Vec<(TcpListener, u16)>,
    /// Of the terminal, if the command gets one.
    pub(super) size: Option<TtySize>,
    pub(super) wants_stdin: bool,
    /// Files of it are kept.
    pub(super) keeps: bool,
    pub(super) copies: &'a [CopyOut],
    /// Whether its machine stays.
    pub(super) stay: Stay,
    /// Gets what an open machine reached.
    pub(super) lesson: Option<&'a Lesson>,
}

impl InFront<'_> {
    /// Runs it to its end; gives the exit code.
    ///
    /// # Errors
    /// When it did not run, or what it left could not be brought here.
    pub(super) async fn run(self, screen: Screen, cancel: &CancellationToken) -> Result<u8> {
        let (events, receiver) = Events::channel();
        // A run's own output belongs to the user: progress is shown only until the command starts.
        let follow = tokio::spawn(screen.follow_quietly(receiver));
        let (queue, job) = (self.queue, self.request.id.clone());
        let (keeps, copies) = (self.keeps, self.copies);
        let (operator, stay, lesson) = (self.operator, self.stay, self.lesson);
        let attached = Attached {
            folder: self.folder,
            given: self.given,
            operator: self.operator,
            queue,
            request: self.request,
            labels: self.labels,
            listeners: self.listeners,
            size: self.size,
            wants_stdin: self.wants_stdin,
            shown: match (screen.json(), self.size) {
                (true, _) => Shown::Events,
                (false, Some(_)) => Shown::Terminal,
                (false, None) => Shown::Streams,
            },
            keep: stay.keep(),
        };
        let ended = attached.run(&events, cancel).await;
        drop(events);
        let _screen_ended = follow.await;
        let (mut end, printed) = ended?;
        if let Some(lesson) = lesson {
            lesson.take(Some(Reached {
                list: std::mem::take(&mut end.learned),
                more: 0,
            }));
        }
        let kept = match end.kept.take() {
            // At once: it has no owner.
            Some(handover) => Some(keeper::hand_over(operator, &handover).await),
            None => None,
        };
        let left = keeps && (end.result.is_ok() || !end.artifacts.is_empty());
        let brought = match left {
            true => artifacts::after_run(&queue.server(), job.as_str(), copies, screen).await,
            false => Ok(()),
        };
        let ended = with_files(finish(end, cancel, screen), brought, screen);
        exited(job.as_str(), &ended, screen);
        if let Some(kept) = kept {
            // The command's own end is told first, and stays what this command ends with.
            let told = match kept {
                Ok(facts) => {
                    let machine = Machine::near(&operator.home, facts);
                    stay.tell(&machine, screen, cancel).await
                }
                Err(error) => Err(error),
            };
            if let Err(error) = told {
                screen.error(&error);
                return ended.map(|code| code.max(error.exit_code()));
            }
        }
        match printed {
            // Like any program whose reader has gone; one that ended before keeps its own code.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ended.or(Ok(READER_GONE)),
            Err(error) => Err(CliError::new(
                FailureClass::Infrastructure,
                format!("the command's output could not be written: {error}"),
            )),
            Ok(()) => ended,
        }
    }
}

/// A command that passed has failed all the same when what was to be copied out is not here; else its own end says more.
pub(super) fn with_files(ended: Result<u8>, brought: Result<()>, screen: Screen) -> Result<u8> {
    match (ended, brought) {
        (Ok(0), brought) => brought.map(|()| 0),
        (ended, Err(error)) => {
            screen.note(&format!("kiln: {error}"));
            ended
        }
        (ended, Ok(())) => ended,
    }
}

/// With `--json`: how the command ended. What is not the command's own end is told as an error.
pub(super) fn exited(job: &str, ended: &Result<u8>, screen: Screen) {
    if let (true, Ok(code)) = (screen.json(), ended) {
        let told = serde_json::json!({ "event": "exit", "job": job, "code": code });
        screen.data(&told, String::new);
    }
}

pub(super) fn something(image: Option<&ImageRef>, argv: &[String]) -> Result<()> {
    match image.is_none() && argv.is_empty() {
        true => Err(CliError::usage("there is nothing to run")
            .hint("give a command after --, or an --image")),
        false => Ok(()),
    }
}

/// Whether the machine stays when its command is over.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stay {
    keep: Option<Duration>,
    shell_on_failure: bool,
}

impl Stay {
    /// What a command line says.
    pub(super) fn of(args: &RunArgs, screen: Screen) -> Self {
        let shell = args.shell_on_failure && terminal::is_interactive();
        if args.shell_on_failure && !shell {
            screen.note("--shell-on-failure needs a terminal: there is none, so no shell either");
        }
        Self {
            keep: args.keep,
            shell_on_failure: shell,
        }
    }

    /// A shell in the machine of a command that fails.
    ///
    /// # Errors
    /// Without a terminal.
    pub(super) fn shell() -> Result<Self> {
        match terminal::is_interactive() {
            true => Ok(Self {
                keep: None,
                shell_on_failure: true,
            }),
            false => Err(CliError::usage(
                "--shell needs a terminal, and there is none",
            )),
        }
    }

    fn keep(self) -> Option<Keep> {
        match (self.keep, self.shell_on_failure) {
            (None, false) => None,
            (stays, _) => Some(Keep {
                stays: stays.unwrap_or(STAYS_DEFAULT),
                on_failure_only: stays.is_none(),
            }),
        }
    }

    /// As a server is asked for it.
    pub(super) fn asked(self) -> Option<KeepAsk> {
        let keep = self.keep()?;
        Some(KeepAsk {
            // Without a word of the user's the operator's usual time.
            seconds: self.keep.map(|stays| stays.as_secs().max(1)),
            on_failure_only: keep.on_failure_only,
        })
    }

    /// Says how to reach it; and stands in it, where the command failed.
    ///
    /// # Errors
    /// When it cannot be entered, or removed afterwards.
    pub(super) async fn tell(
        self,
        machine: &Machine,
        screen: Screen,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let id = machine.id();
        if self.keep.is_some() {
            let (stays_ms, until_unix_ms) = machine.stays();
            let until = when::span(stays_ms);
            screen.note(&format!(
                "machine {id} stays for {until}: kiln exec {id} -- COMMAND, kiln console {id}, kiln machine rm {id}"
            ));
            if screen.json() {
                let told = serde_json::json!({
                    "event": "kept", "id": id, "machine": machine.name(),
                    "until_unix_ms": until_unix_ms,
                });
                screen.data(&told, String::new);
            }
        }
        if self.shell_on_failure && machine.exit_code() != Some(0) {
            let stood = exec::stand_in(machine, Default::default(), screen, cancel);
            let stood = stood.await.map(drop);
            if self.keep.is_none() {
                machine.remove().await?;
            }
            return stood;
        }
        Ok(())
    }
}

/// The secrets of a command, each with a place of its own.
///
/// # Errors
/// When two want one place.
pub(super) fn secrets(
    said: &[RunSecret],
    env: &BTreeMap<String, String>,
) -> Result<Vec<RunSecret>> {
    kiln_core::secret::check_places(said, |variable| env.contains_key(variable))
        .map_err(|twice| CliError::usage(format!("--secret: {twice}")))?;
    Ok(said.to_vec())
}

/// A command whose terminal and ports are this process's.
struct Attached<'a> {
    folder: Option<LocalFolder>,
    given: Given,
    operator: &'a Operator,
    queue: &'a HomeQueue,
    request: JobRequest,
    labels: BTreeMap<Label, Label>,
    listeners: Vec<(TcpListener, u16)>,
    size: Option<TtySize>,
    wants_stdin: bool,
    shown: Shown,
    keep: Option<Keep>,
}

impl Attached<'_> {
    async fn run(
        self,
        events: &Events,
        cancel: &CancellationToken,
    ) -> Result<(JobEnd, io::Result<()>)> {
        let (output, chunks) = mpsc::channel(64);
        let (control_in, control) = mpsc::channel(16);
        let raw = self
            .size
            .map(|_| RawMode::enter())
            .transpose()
            .or_infrastructure()?;
        let stop = cancel.child_token();
        let printing = tokio::spawn(terminal::print(chunks, stop.clone(), self.shown));
        let resizing = self
            .size
            .map(|_| tokio::spawn(terminal::watch_size(control_in.clone())));
        // A closed control channel would mean nobody can signal the command any more.
        let _control: mpsc::Sender<Control> = control_in;
        let local = LocalJob {
            folder: self.folder,
            given: self.given,
            run: Some(LocalRun {
                stdin: self.wants_stdin.then(terminal::stdin),
                tty: self.size,
                output,
                control,
                listeners: self.listeners,
                keep: self.keep,
            }),
            events: Some(events.clone()),
            ..LocalJob::default()
        };
        let end = self
            .queue
            .run(
                self.operator,
                self.request,
                self.labels,
                local,
                events,
                &stop,
            )
            .await;
        let printed = printing.await.unwrap_or(Ok(()));
        if let Some(task) = resizing {
            task.abort();
        }
        drop(raw);
        Ok((end?, printed))
    }
}

fn finish(end: JobEnd, cancel: &CancellationToken, screen: Screen) -> Result<u8> {
    if !end.egress.refused.is_empty() {
        screen.note(&end.egress.to_string());
    }
    match end.result {
        Ok(Ended::Ran(exit)) => {
            if exit.code != Some(0) && !cancel.is_cancelled() {
                // Tells the command's own code from one of kiln's.
                screen.note(&format!("kiln: {}", ending(&exit)));
            }
            Ok(exit_code(&exit))
        }
        Ok(Ended::Built(_)) => Err(CliError::new(
            FailureClass::Infrastructure,
            "the command ended as a build does",
        )),
        Err(failure) => Err(CliError::from_failure(failure)),
    }
}

/// As a process ends with it.
fn exit_code(exit: &Exit) -> u8 {
    u8::try_from(kiln_worker::run::exit_code(exit)).unwrap_or(1)
}

/// Size of the terminal that the command gets, if it gets one. Events of `--json` leave no place for a screen.
pub(super) fn own_terminal(args: &RunArgs, screen: Screen) -> Result<Option<TtySize>> {
    match (screen.json(), args.tty) {
        (true, true) => Err(CliError::usage("-t shows a terminal, --json prints events")
            .hint("leave one of them out")),
        (true, false) => Ok(None),
        (false, asked) => {
            let size = wants_terminal(args).then(terminal::size).flatten();
            if asked && size.is_none() {
                screen.note(
                    "-t needs a terminal: standard output is none, so the command gets none either",
                );
            }
            Ok(size)
        }
    }
}

fn wants_terminal(args: &RunArgs) -> bool {
    args.tty || (terminal::is_interactive() && !args.command.is_empty() && args.interactive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_as_a_shell_has_them() {
        let exit = |code, signal| Exit {
            code,
            signal,
            oom: false,
            timed_out: false,
            user_ms: 0,
            system_ms: 0,
            memory_peak: 0,
            output_dropped: 0,
        };
        assert_eq!(exit_code(&exit(Some(7), None)), 7);
        assert_eq!(exit_code(&exit(None, Some(9))), 137);
    }

    #[test]
    fn whoever_bounds_a_disk_says_no_in_its_own_name() {
        let [small, policy, most] = [64, 256, 1024].map(ByteSize::mib);
        let of_file = (Some(policy), Some("kiln.yaml"));
        let refused = |asked, ruled| disk(Some(asked), ruled, most).expect_err("refused");
        let by_file = refused(ByteSize::mib(300), of_file);
        assert!(by_file.message.contains("kiln.yaml allows"), "{by_file:?}");
        assert_eq!(by_file.exit_code(), 2);
        let by_grant = refused(ByteSize::mib(300), (Some(policy), None));
        assert!(by_grant.hints[0].contains("policy.toml"), "{by_grant:?}");
        assert_eq!(by_grant.exit_code(), 4);
        let by_operator = refused(ByteSize::gib(2), (None, None));
        assert!(
            by_operator.hints[0].contains("limits.disk_max"),
            "{by_operator:?}"
        );
        let none = refused(ByteSize::mib(15), (None, None));
        assert!(!none.hints[0].contains("kiln.toml"), "{none:?}");
        let got = |asked, ruled| disk(asked, ruled, most).expect("allowed");
        assert_eq!(got(Some(small), of_file), small);
        assert_eq!(got(None, of_file), policy);
        assert_eq!(got(None, (None, None)), most);
        assert_eq!(got(None, (Some(ByteSize::gib(9)), None)), most);
    }
}
