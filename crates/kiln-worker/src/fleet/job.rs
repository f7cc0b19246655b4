//! One lease, from its source to its finish: what was a request becomes a build or a run on this host.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_core::job::{AppliedPolicy, RunAttend, RunCommand, RunKeep, RunService, SourceBuild};
use kiln_core::{
    ArtifactName, Digest, FailureClass, ImageRef, JobKind, JobRequest, Lease, MachineName,
    NetworkPolicy, Outcome, Verdict,
};
use kiln_image::plan::{DockerfileChoice, Options};
use kiln_proto::fleet::{AskSecrets, Finish, Incident, Leased, Secrets};
use kiln_proto::msg::Exit;
use kiln_telemetry::otlp::Tracer;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Instrument as _;

use super::artifacts;
use super::client::{Client, REQUEST_TIMEOUT, job_path};
use super::commit_policy::Ruled;
use super::ends::{built, ran, under_policy};
use super::far::publish_far;
use super::local::{LocalFolder, LocalJob, LocalJobs, LocalRun};
use super::mask::Mask;
use super::report::{Reporter, Spans, To, answered, retried};
use super::spans::AttemptSpans;
use super::spool::Spool;
use super::staying::{AtDoor, Staying};
use super::told::{self, finish_of, masked};
use super::witness::Witness;
use crate::attend::door::{Attend, Door};
use crate::build::{self, BuildEnd, BuildInput, BuildReport};
use crate::checkout::CheckoutDir;
use crate::container;
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::given::Given;
use crate::host::Host;
use crate::joblog::JobLog;
use crate::kept::{Handover, Keep, STAYS_MAX};
use crate::measured::{Measured, add};
use crate::prepare::{self, Prepared, RegistriesOf, Wishes};
use crate::registry::RegistryAccess;
use crate::run::{RunInput, ServiceInput};
use crate::run_git;
use crate::run_secrets::RunSecrets;
use crate::site::Site;

/// Longest wait for the end of a log to be acknowledged.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// What the runtime of a build is called that uses no runtime's registries.
const OWN_DOCKERFILE: &str = "dockerfile";
/// Room for a command's output on its way into the log, pieces.
const OUTPUT_PIECES: usize = 64;

/// Where a command finds the trace it is a part of, as OpenTelemetry's own tools name it.
const TRACEPARENT_ENV: &str = "TRACEPARENT";

/// What a worker runs its jobs with.
#[derive(Debug)]
pub struct Workshop {
    /// The host.
    pub host: Host,
    /// Its registry.
    pub registry: RegistryAccess,
    /// The operator's decisions.
    pub site: Site,
    /// The controller.
    pub client: Client,
    /// Jobs of this process.
    pub local: LocalJobs,
    /// Where logs wait to be acknowledged.
    pub spool: PathBuf,
    /// The controller's authority, PEM, when it is on another host.
    pub authority: Option<Vec<u8>>,
    /// Where spans go.
    pub tracer: Tracer,
    /// Who removes a machine that may stay, when this process is gone.
    pub watch: Watch,
}

/// Starts somebody who removes a machine when this process is gone, however it went, also by `SIGKILL`: one that may stay does not die with it.
///
/// # Errors
/// When nobody can be started.
pub type Watch = fn(&MachineName) -> std::io::Result<Watched>;

/// That somebody watches; dropped, he removes what is left of the machine and goes.
pub type Watched = Box<dyn Send + Sync>;

/// How a job ended, for the process that waits for it.
#[derive(Debug)]
pub struct JobEnd {
    /// Verdict and times.
    pub outcome: Outcome,
    /// What came of it.
    pub result: Result<Ended, Failure>,
    /// Hosts reached and refused, in one line.
    pub egress: kiln_network::record::EgressSummary,
    /// What an open machine reached, as an allowlist says it.
    pub learned: Vec<kiln_network::Learned>,
    /// Language runtime of an image build, as it was planned.
    pub runtime: Option<String>,
    /// Artifacts that the controller has.
    pub artifacts: Vec<ArtifactName>,
    /// What the host measured.
    pub measured: Measured,
    /// Digest of the files that a command was given.
    pub source: Option<Digest>,
    /// The policy in its commit that it was held to.
    pub policy: Option<AppliedPolicy>,
    /// The machine, when it stays: without an owner, for [`crate::kept::HANDOVER_MAX`] at most.
    pub kept: Option<Box<Handover>>,
}

impl JobEnd {
    /// The end of a job that came to nothing.
    #[must_use]
    pub fn failed(failure: Failure) -> Self {
        Self {
            outcome: Outcome {
                verdict: failure.verdict(),
                phases_ms: Vec::new(),
            },
            result: Err(failure),
            egress: kiln_network::record::EgressSummary::default(),
            learned: Vec::new(),
            runtime: None,
            artifacts: Vec::new(),
            measured: Measured::default(),
            source: None,
            policy: None,
            kept: None,
        }
    }
}

/// What came of a job that ended by itself.
#[derive(Debug)]
pub enum Ended {
    /// An image.
    Built(Box<BuildReport>),
    /// The end of a command.
    Ran(Exit),
}

/// How a job is stopped from outside.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Somebody asked for its end: it is cancelled and reported.
    pub cancel: CancellationToken,
    /// Its lease is over: it is destroyed and nothing more is said.
    pub fenced: CancellationToken,
    /// Set by the job when its machine is gone and only its end is to be told: the controller may hear of that end, and call the lease over,
    /// before this process knows that it did.
    pub finishing: CancellationToken,
    /// Why what tells of it is kept when its lease is over: set before [`Self::fenced`].
    pub incident: Arc<OnceLock<Incident>>,
}

/// Runs one lease to its end and tells the controller. Nothing is left of it on this host but what it published.
pub(super) async fn run(shop: &Arc<Workshop>, staying: &Arc<Staying>, leased: Leased, stop: Stop) {
    let (traceparent, id) = (leased.traceparent.as_deref(), &leased.lease.attempt);
    let spans = AttemptSpans::begin(&shop.tracer, traceparent, id);
    let context = spans.context();
    let spans = Arc::new(Mutex::new(spans));
    let log = context.map_or_else(tracing::Span::none, |context| context.phase_span("attempt"));
    let here = (shop, staying);
    let (witness, lease) = (Witness::default(), leased.lease.clone());
    let mut local = shop.local.take(&leased.request.id);
    let done = Mutex::new(local.done.take());
    let spans_too = Arc::clone(&spans);
    let seen = (spans_too, &witness, &done);
    let mut work = Box::pin(attempt(here, leased, stop.clone(), local, seen).instrument(log));
    let evidence = tokio::select! {
        () = &mut work => return,
        () = stop.fenced.cancelled() => {
            lock(&spans).end(false);
            let why = stop.incident.get().cloned();
            why.map(|why| (witness.take(&shop.host, &lease, why.clone()), why))
        }
    };
    let Some((evidence, why)) = evidence else {
        // Dropped, the work destroys its machine.
        return;
    };
    let kept = evidence.end_and_keep(&shop.host).await;
    drop(work);
    if let Err(error) = kept {
        tracing::warn!(%error, "what tells of an incident could not be kept");
    }
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(done) = done {
        let message = match why.note.is_empty() {
            true => format!("ended as an incident by {}", why.by),
            false => format!("ended as an incident by {}: {}", why.by, why.note),
        };
        let _nobody_waits = done.send(JobEnd::failed(Failure::new(
            FailureClass::Cancelled,
            message,
        )));
    }
}

fn lock(spans: &Mutex<AttemptSpans>) -> MutexGuard<'_, AttemptSpans> {
    spans.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What outlives an attempt that is dropped.
type Seen<'a> = (
    Spans,
    &'a Witness,
    &'a Mutex<Option<oneshot::Sender<JobEnd>>>,
);

async fn attempt(
    (shop, staying): (&Arc<Workshop>, &Arc<Staying>),
    leased: Leased,
    stop: Stop,
    mut local: LocalJob,
    (spans, witness, done): Seen<'_>,
) {
    let Leased {
        lease, mut request, ..
    } = leased;
    if let (true, JobKind::Run(command), Some(context)) = (
        request.traceparent.is_some(),
        &mut request.kind,
        lock(&spans).context(),
    ) {
        // A caller that traces sees what its command traces below it.
        let run = context.named(kiln_telemetry::span::RUN).to_string();
        command.env.entry(TRACEPARENT_ENV.to_owned()).or_insert(run);
    }
    if let JobKind::Run(command) = &mut request.kind {
        let repositories = command.all_git().map(|one| one.repository.clone());
        let repositories: Vec<_> = repositories.collect();
        kiln_core::git_gateway::steer(&mut command.env, &repositories);
    }
    let to = To {
        client: shop.client.clone(),
        lease: lease.clone(),
        fenced: stop.fenced.clone(),
    };
    let _linked = local.cancel.take().map(|asked| linked(asked, &stop.cancel));
    let (events, receiver) = Events::channel();
    let secrets = secrets(&to, &request, &mut local).await;
    let values = secrets.as_ref().map(Vec::as_slice).unwrap_or_default();
    let mask = Mask::new(values.iter().map(|(_, value)| &value[..]));
    witness.was_given(values.iter().map(|(name, _)| name.clone()), &mask);
    let name = format!("{}-{}.log", lease.attempt.job, lease.attempt.number);
    let spool = match Spool::create(&shop.spool.join(name)) {
        Ok(spool) => Arc::new(spool),
        Err(error) => {
            let failure = Failure::infrastructure(&error);
            let end = JobEnd::failed(failure);
            tell_finish(&to, finish_of(&end, None)).await;
            return;
        }
    };
    witness.prints(&spool);
    let log = JobLog::new(Arc::clone(&spool), &mask).seen_by(witness.clone());
    let log = Arc::new(log);
    let reporter = Reporter::start(
        &to,
        Arc::clone(&spool),
        receiver,
        local.events.take(),
        mask.clone(),
        Arc::clone(&spans),
    );
    let work = Work {
        shop,
        staying,
        to: &to,
        lease: &lease,
        events: &events,
        cancel: stop.cancel.clone(),
        log: &log,
        mask: &mask,
    };
    let ran = async {
        match secrets {
            Ok(secrets) => work.run(request, local, secrets).await,
            Err(failure) => (JobEnd::failed(failure), None),
        }
    };
    let (end, mut observed) = tokio::select! {
        ran = ran => ran,
        never = log.let_go() => match never {},
    };
    log.end();
    if let Some(cut) = spool.cut() {
        tracing::warn!(job = %lease.attempt.job, cut, "a log is not whole");
        events.warn(cut).await;
    }
    drop(events);
    reporter.drain(DRAIN_TIMEOUT).await;
    lock(&spans).end(end.outcome.verdict == Verdict::Passed);
    let end = masked(end, &mask);
    if let Some(observed) = &mut observed {
        told::events(&mut observed.egress, &mask);
    }
    stop.finishing.cancel();
    let told = tell_finish(&to, finish_of(&end, observed)).await;
    let done = done.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let (true, Some(done)) = (told, done) {
        let _nobody_waits = done.send(end);
    }
}

/// Whoever asks by one token cancels by the other, until what is given is dropped.
fn linked(asked: CancellationToken, stop: &CancellationToken) -> DropGuard {
    let (over, stop) = (CancellationToken::new(), stop.clone());
    let ended = over.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = asked.cancelled() => stop.cancel(),
            () = ended.cancelled() => {}
        }
    });
    over.drop_guard()
}

/// Tells the end of the attempt. False when the lease was over before.
async fn tell_finish(to: &To, finish: Finish) -> bool {
    let path = job_path(&to.lease.attempt.job, "finish");
    let (path, finish) = (&path, &finish);
    let send = || {
        let lease = Some(&to.lease);
        to.client
            .call::<_, serde_json::Value>(path, lease, finish, REQUEST_TIMEOUT)
    };
    retried(&to.fenced, send).await.is_some()
}

/// Says of an attempt whose machine is gone that it is lost.
pub(super) async fn give_up(client: &Client, lease: &Lease) {
    let lost = Failure::new(
        FailureClass::Lost,
        "its machine was destroyed when no heartbeat was answered in time",
    );
    let finish = finish_of(&JobEnd::failed(lost), None);
    let path = job_path(&lease.attempt.job, "finish");
    let said = client.call::<_, serde_json::Value>(&path, Some(lease), &finish, REQUEST_TIMEOUT);
    if let Err(error) = said.await {
        // It is offered again, or its lease ends.
        tracing::debug!(error = crate::orders::chain(&error), "not given up yet");
    }
}

/// Values of the secrets a request names: this process's own, else the controller's. They stay in memory.
async fn secrets(
    to: &To,
    request: &JobRequest,
    local: &mut LocalJob,
) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let mut found = std::mem::take(&mut local.secrets);
    let missing = request
        .secret_names()
        .into_iter()
        .filter(|name| !found.iter().any(|(have, _)| have == name));
    let names: Vec<_> = missing.map(str::to_owned).collect();
    if names.is_empty() {
        return Ok(found);
    }
    let path = job_path(&request.id, "secrets");
    let ask = AskSecrets { names };
    let asked = || {
        to.client
            .call::<_, Secrets>(&path, Some(&to.lease), &ask, REQUEST_TIMEOUT)
    };
    let answer = answered(&to.fenced, asked).await;
    let answer = answer.map_err(|error| Failure::infrastructure(&error))?;
    for name in ask.names {
        if let Some(why) = answer.refused.get(&name) {
            let message = format!("this job may not have the secret {name}: {why}");
            return Err(Failure::new(FailureClass::Policy, message)
                .hint("`kiln secret list` shows who may have it"));
        }
        let value = answer
            .values
            .get(&name)
            .and_then(|v| STANDARD.decode(v).ok());
        let Some(value) = value else {
            let message = format!("there is no secret {name:?} for this job");
            return Err(Failure::new(FailureClass::Usage, message)
                .hint("a value that comes with a request is lost when its controller starts again; `kiln secret set` keeps one"));
        };
        found.push((name, value));
    }
    Ok(found)
}

/// What an attempt works with.
pub(super) struct Work<'a> {
    pub(super) shop: &'a Arc<Workshop>,
    staying: &'a Arc<Staying>,
    pub(super) to: &'a To,
    pub(super) lease: &'a Lease,
    pub(super) events: &'a Events,
    pub(super) cancel: CancellationToken,
    log: &'a Arc<JobLog>,
    mask: &'a Mask,
}

impl Work<'_> {
    async fn run(
        &self,
        request: JobRequest,
        local: LocalJob,
        secrets: Vec<(String, Vec<u8>)>,
    ) -> (JobEnd, Option<Box<kiln_core::Observed>>) {
        if request.learns_untrusted() {
            return (JobEnd::failed(untrusted_lesson()), None);
        }
        match request.kind.clone() {
            JobKind::SourceBuild(wanted) => match self.build(request, wanted, local, secrets).await
            {
                Ok((end, observed)) => (end, observed.map(Box::new)),
                Err(failure) => (JobEnd::failed(failure), None),
            },
            JobKind::Run(command) => {
                let local = (local.folder, local.run, local.given);
                let ran = self.command(request, &command, local, secrets).await;
                (ran.unwrap_or_else(JobEnd::failed), None)
            }
            JobKind::ImageBuild(_) => {
                let message = "a build that is planned already cannot be queued";
                (
                    JobEnd::failed(Failure::new(FailureClass::Usage, message)),
                    None,
                )
            }
        }
    }

    async fn build(
        &self,
        request: JobRequest,
        wanted: SourceBuild,
        local: LocalJob,
        secrets: Vec<(String, Vec<u8>)>,
    ) -> Result<(JobEnd, Option<kiln_core::Observed>), Failure> {
        let here = self.source(&request, &wanted.source, local.folder).await?;
        let Ruled {
            request,
            wanted,
            narrowed,
        } = self.ruled(&here, request, wanted).await?;
        // A rule in the file admits something only where the file gives.
        let gives = wanted.only_network && narrowed.is_none();
        let policy = request.policy.clone();
        let of_commit = wanted.repository_policy;
        self.events.tell(Event::Phase { name: "plan" }).await;
        let tags = match wanted.tags.is_empty() {
            true => vec![prepare::image_of(&request.tenant, &wanted.name)],
            false => {
                let named = wanted.tags.iter();
                let named = named.map(|tag| prepare::in_tenant(&request.tenant, tag));
                named.collect::<Result<_, _>>()?
            }
        };
        let named = tags.clone();
        let site = self.shop.site.clone();
        let (dir, network) = (here.dir.clone(), request.network.clone());
        let within = narrowed.as_ref().map(|one| one.registries.clone());
        let planned = tokio::task::spawn_blocking(move || {
            let wishes = wishes(wanted, named, (&network, within.as_ref()));
            prepare::prepare(&dir, wishes, &site)
        });
        let prepared = planned
            .await
            .map_err(|error| Failure::infrastructure(&error))??;
        let Prepared {
            build,
            network,
            runtimes,
            tree,
        } = prepared;
        if let Some(narrowed) = &narrowed {
            narrowed.tell(&network, self.events).await;
        }
        let runtime = runtimes
            .first()
            .map_or(OWN_DOCKERFILE, |runtime| runtime.name());
        let runtime = runtime.to_owned();
        let shop = self.shop;
        let input = BuildInput {
            request: JobRequest {
                kind: JobKind::ImageBuild(build),
                network,
                ..request
            },
            tree: Arc::new(tree),
            git: here.git.clone(),
            secrets,
            ssh_agents: local.ssh_agents,
            ca_bundle: shop.site.ca_bundle.clone(),
            step_env: shop.site.step_env(&runtimes),
            exceptions: shop.site.exceptions(),
            proxy: shop.site.proxy.clone(),
            log: Arc::clone(self.log),
        };
        let lease = self.lease.clone();
        let run = build::run(
            &shop.host,
            &shop.registry,
            input,
            lease,
            self.events,
            &self.cancel,
        );
        let mut end = run.await;
        let observed = end.observed.take();
        self.published(&mut end, &tags).await;
        // A file without that phase says nothing of what a build reaches.
        let said = policy.as_ref().filter(|_| gives);
        end.egress = under_policy(end.egress, said, "dependencies");
        if let Ok(report) = &mut end.result {
            report.egress = under_policy(std::mem::take(&mut report.egress), said, "dependencies");
        }
        let end = JobEnd {
            runtime: Some(runtime),
            policy: policy.filter(|_| of_commit),
            ..built(end)
        };
        Ok((end, observed))
    }

    /// Brings an image to a controller elsewhere, and notes how long that took.
    async fn published(&self, end: &mut BuildEnd, tags: &[ImageRef]) {
        let shop = self.shop;
        let Ok(report) = &end.result else {
            return;
        };
        let since = std::time::Instant::now();
        if shop.authority.is_some() {
            self.events.tell(Event::Phase { name: "publish" }).await;
        }
        let published = publish_far(shop, self.to, report, tags, self.cancel.clone()).await;
        match published {
            Ok(false) => {}
            Ok(true) => {
                let ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                end.phases_ms.push(("publish".to_owned(), ms));
            }
            Err(failure) => end.result = Err(failure),
        }
    }

    /// The services of a run, their images unpacked.
    async fn services(
        &self,
        tenant: &kiln_core::TenantName,
        wanted: &[RunService],
    ) -> Result<Vec<ServiceInput>, Failure> {
        let shop = self.shop;
        let mut found = Vec::new();
        for (place, service) in (1..).zip(wanted) {
            let command = container::Command {
                argv: &[],
                env: &service.env,
            };
            let names = (tenant, &service.image);
            let job = &self.lease.attempt.job;
            let image =
                container::prepare(&shop.host, &shop.registry, names, command, job, self.events);
            found.push(ServiceInput {
                wanted: service.clone(),
                place,
                image: image.await?,
            });
        }
        Ok(found)
    }

    /// Keeps a machine that has no owner; what becomes of the job does not depend on it.
    async fn stay(&self, handover: Handover, watched: Watched) {
        let with = (watched, self.mask.clone());
        let stayed = self.staying.stay(self.shop, self.to, handover, with);
        if let Err(failure) = stayed.await {
            let text = format!("the machine does not stay: {failure}");
            self.events.warn(text).await;
        }
    }

    /// Has the command's machine watched.
    fn watched(&self) -> Result<Watched, Failure> {
        let name = self.lease.attempt.machine_name("run");
        let name = name.map_err(|error| Failure::infrastructure(&error))?;
        (self.shop.watch)(&name).map_err(|error| Failure::infrastructure(&error))
    }

    /// Where whoever attends the command arrives.
    fn attended(&self, wanted: &RunAttend) -> (AtDoor, Attend) {
        let (door, attend) = Door::of(wanted);
        (self.staying.attended(self.lease, door), attend)
    }

    /// A folder for the files that the command leaves, if any are wanted.
    fn artifacts_dir(&self, command: &RunCommand) -> Result<Option<CheckoutDir>, Failure> {
        if command.artifacts.is_empty() {
            return Ok(None);
        }
        let parent = self.shop.host.home.cache.join("checkouts");
        let name = format!("{}-artifacts", self.lease.attempt.job);
        let made = CheckoutDir::fresh(&parent, &name);
        made.map(Some)
            .map_err(|error| Failure::infrastructure(&error))
    }

    async fn command(
        &self,
        request: JobRequest,
        command: &RunCommand,
        (folder, local, given): (Option<LocalFolder>, Option<LocalRun>, Given),
        secrets: Vec<(String, Vec<u8>)>,
    ) -> Result<JobEnd, Failure> {
        let shop = self.shop;
        given.are_of(command)?;
        let values = secrets;
        let secrets = RunSecrets::new(&command.secrets, &values)?;
        let mut phases = Vec::new();
        for phase in &command.phases {
            phases.push((phase.clone(), RunSecrets::new(&phase.secrets, &values)?));
        }
        let worked = match &command.source {
            None => None,
            Some(wanted) => {
                let elsewhere = command.runtime.is_some() || given.has_root_disk();
                let find_base = command.image.is_none() && !elsewhere;
                Some(self.worked(&request, wanted, folder, find_base).await?)
            }
        };
        let named = command.runtime.as_deref().map(|name| self.named(name));
        let named = named.transpose()?;
        let base = worked.as_ref().and_then(|worked| worked.base.as_ref());
        let image = match command.image.as_ref().or(named.as_ref()).or(base) {
            None => None,
            Some(image) => {
                let wanted = container::Command {
                    argv: &command.argv,
                    env: &command.env,
                };
                let names = (&request.tenant, image);
                let prepared = container::prepare(
                    &shop.host,
                    &shop.registry,
                    names,
                    wanted,
                    &request.id,
                    self.events,
                );
                Some(prepared.await?)
            }
        };
        let dir = self.artifacts_dir(command)?;
        // A command's own machine is kept by that command, and its streams are that command's.
        let keeps = local.is_none().then_some(command.keep).flatten();
        let wanted = command.attend.as_ref().filter(|_| local.is_none());
        let (at_door, attend) = wanted.map(|wanted| self.attended(wanted)).unzip();
        let mut local = local.unwrap_or_else(nobody_watches);
        local.keep = keeps.map(keep_of).or(local.keep);
        let (tenant, policy) = (&request.tenant.clone(), request.policy.clone());
        let input = RunInput {
            request,
            image,
            stdin: local.stdin,
            tty: local.tty,
            output: local.output,
            control: local.control,
            listeners: local.listeners,
            ca_bundle: shop.site.ca_bundle.clone(),
            exceptions: shop.site.exceptions(),
            proxy: shop.site.proxy.clone(),
            git: run_git::upstreams(command, shop.site.ca_bundle.as_deref(), &values)?,
            log: Arc::clone(self.log),
            mask: self.mask.clone(),
            artifacts: dir.as_ref().map(|dir| dir.path().to_owned()),
            keep: local.keep,
            secrets,
            files: worked.as_ref().map(|worked| worked.files.clone()),
            phases,
            services: self.services(tenant, &command.services).await?,
            given,
            attend,
        };
        let lease = self.lease.clone();
        // From its start: it would outlive this process from then on.
        let watched = keeps.map(|_| self.watched()).transpose()?;
        let mut end = crate::run::run(&shop.host, input, lease, self.events, &self.cancel).await;
        // Calls lead to the machine that stays from now on.
        drop(at_door);
        end.egress = under_policy(end.egress, policy.as_ref(), "run");
        if let Some(watched) = watched
            && let Some(handover) = end.kept.take()
        {
            self.stay(handover, watched).await;
        }
        let files = std::mem::take(&mut end.artifacts);
        let since = std::time::Instant::now();
        let sent = artifacts::send(self.to, &files, self.mask, self.events).await;
        if !files.is_empty() {
            add(&mut end.measured.artifacts_ms, since);
        }
        Ok(JobEnd {
            artifacts: sent,
            ..ran(end)
        })
    }
}

/// No controller of this version asks for it.
fn untrusted_lesson() -> Failure {
    let message = "this job is untrusted, and only trusted jobs learn: their machines are open";
    Failure::new(FailureClass::Policy, message)
        .hint("name the hosts in `allow`, or ask for it as a trusted job")
}

/// What a server's job says of its machine.
fn keep_of(keep: RunKeep) -> Keep {
    Keep {
        stays: Duration::from_millis(keep.stays_ms).min(STAYS_MAX),
        on_failure_only: keep.on_failure_only,
    }
}

/// Output goes to the log alone; nothing signals the command.
fn nobody_watches() -> LocalRun {
    let (output, mut pieces) = mpsc::channel(OUTPUT_PIECES);
    tokio::spawn(async move { while pieces.recv().await.is_some() {} });
    let (held, control) = mpsc::channel(1);
    // A closed channel would mean nobody can signal the command any more.
    tokio::spawn(async move { held.closed().await });
    LocalRun {
        stdin: None,
        tty: None,
        output,
        control,
        listeners: Vec::new(),
        keep: None,
    }
}

fn wishes<'a>(
    wanted: SourceBuild,
    tags: Vec<kiln_core::ImageRef>,
    (allow, within): (&'a NetworkPolicy, Option<&'a NetworkPolicy>),
) -> Wishes<'a> {
    let dockerfile = match (wanted.dockerfile_text, wanted.dockerfile) {
        (Some(text), name) => Some(DockerfileChoice::Text {
            name: name.unwrap_or_else(|| "Dockerfile".to_owned()),
            text,
        }),
        (None, Some(path)) => Some(DockerfileChoice::InFolder(path)),
        (None, None) => None,
    };
    Wishes {
        options: Options {
            dockerfile,
            target: wanted.target,
            build_args: wanted.build_args,
        },
        tags,
        secrets: wanted.secrets,
        no_cache: wanted.no_cache,
        allow,
        registries: match (wanted.only_network, within) {
            (false, _) => RegistriesOf::Runtime,
            (true, None) => RegistriesOf::Nobody,
            (true, Some(within)) => RegistriesOf::RuntimeWithin(within),
        },
    }
}
