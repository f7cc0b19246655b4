//! An image build: one attempt from lease to receipt.
//!
//! Phases: queue, machine, source, build, push, verify, commit. The host drives every one; the guest only answers.
//! What BuildKit says of itself is shown and bounded; what is believed is read back from the registry.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_core::job::TrustClass;
use kiln_core::network::RangeException;
use kiln_core::{
    Digest, FailureClass, GitCommit, ImageRef, JobRequest, Lease, NetworkPolicy, Observed, Receipt,
};
use kiln_image::context::Tree;
use kiln_image::heads::Head;
use kiln_network::gateway::Gateway;
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_network::record::{EgressLog, EgressSummary};
use kiln_proto::Session;
use kiln_proto::msg::{Order, Place, PutTree};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::attempt::{Attempt, Wanted};
use crate::buildkit::{self, SolveRequest};
use crate::commit;
use crate::connections::Bounds;
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::fork;
use crate::host::{Host, now_unix_ms};
use crate::joblog::JobLog;
use crate::measured::Measured;
use crate::orders;
use crate::phases::Phases;
use crate::publish::{self, Published};
use crate::registry::RegistryAccess;
use crate::repeat::{self, EarlierResult, Results, Surroundings};
use crate::solve::Solve;
use crate::solve_failure;
use crate::ssh_agent::SshAgents;
use crate::templates::Purpose;

/// Longest time to send the source.
pub const SOURCE_TIMEOUT: Duration = Duration::from_secs(600);
/// Most bytes of one context file tree the guest takes.
pub const CONTEXT_BYTES_MAX: u64 = 8 << 30;
/// Most entries of a context.
pub const CONTEXT_ENTRIES_MAX: u64 = 500_000;
/// Name of the context and Dockerfile trees in the guest. Stable, so that BuildKit recognises unchanged files.
const TREE_NAME: &str = "build";
/// Tag the guest pushes in its quarantine.
pub const QUARANTINE_TAG: &str = "image";

/// Everything a build needs beyond its request.
pub struct BuildInput {
    /// The request: path-free.
    pub request: JobRequest,
    /// The source tree behind its digest.
    pub tree: Arc<Tree>,
    /// The commit it came from, if it was checked out.
    pub git: Option<GitCommit>,
    /// Secrets by id.
    pub secrets: Vec<(String, Vec<u8>)>,
    /// Sockets of SSH agents on the host, by id.
    pub ssh_agents: Vec<(String, PathBuf)>,
    /// The operator's CA bundle, if builds get one.
    pub ca_bundle: Option<Vec<u8>>,
    /// Environment of RUN steps: registry settings of the runtime's tools.
    pub step_env: Vec<(String, String)>,
    /// The operator's exceptions for names in special ranges.
    pub exceptions: Vec<RangeException>,
    /// The host's HTTP proxy.
    pub proxy: ProxyConfig,
    /// Which step's output is kept: all of it, bounded.
    pub log: Arc<JobLog>,
}

impl std::fmt::Debug for BuildInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BuildInput")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

/// What a finished build tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BuildReport {
    /// The job.
    pub job: String,
    /// Reference in kiln's registry.
    pub reference: String,
    /// Digest of the image manifest.
    pub digest: Digest,
    /// Compressed bytes of config and layers.
    pub size: u64,
    /// Digest and compressed bytes of each layer.
    pub layers: Vec<(Digest, u64)>,
    /// Milliseconds of each phase.
    pub phases_ms: Vec<(String, u64)>,
    /// Seconds BuildKit itself reports.
    pub buildkit_seconds: f64,
    /// Milliseconds from submission to the first RUN step, where one ran.
    pub first_run_ms: Option<u64>,
    /// Steps found in the cache, and all steps.
    pub cached: (usize, usize),
    /// Key of the template the machine was cloned from.
    pub template: Option<String>,
    /// Head the build forked, and the one it committed.
    pub head: (Option<String>, Option<String>),
    /// The earlier job whose image this is, when everything that decides the result was the same and nothing had to be built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_as: Option<String>,
    /// Hosts reached and refused.
    pub egress: EgressSummary,
}

impl BuildReport {
    /// Proof of what was stored, beside what the host saw.
    #[must_use]
    pub fn receipt(&self, observed: &Observed) -> Receipt {
        let stored = serde_json::to_vec(observed).unwrap_or_default();
        Receipt {
            tags: self.reference.parse().into_iter().collect(),
            manifest: self.digest,
            size: self.size,
            observed: Digest::of(&stored),
            head: self.head.1.clone(),
        }
    }
}

/// How a build ended.
#[derive(Debug)]
pub struct BuildEnd {
    /// The report of a build that passed.
    pub result: Result<BuildReport, Failure>,
    /// Milliseconds of each phase.
    pub phases_ms: Vec<(String, u64)>,
    /// What the gateway decided.
    pub egress: EgressSummary,
    /// What the host saw, when there is an image.
    pub observed: Option<Observed>,
    /// What the host measured.
    pub measured: Measured,
}

struct Job<'a> {
    host: &'a Host,
    input: BuildInput,
    lease: Lease,
    build: kiln_core::job::ImageBuild,
    egress: Arc<EgressLog>,
    events: Events,
    started_unix_ms: u64,
    submitted: std::time::Instant,
    measured: Mutex<Measured>,
}

/// Runs one build. The lease must be live; it is ended here.
pub async fn run(
    host: &Host,
    registry: &RegistryAccess,
    input: BuildInput,
    lease: Lease,
    events: &Events,
    cancel: &CancellationToken,
) -> BuildEnd {
    let mut phases = Phases::new(events.clone());
    let egress = Arc::new(EgressLog::new());
    let kiln_core::JobKind::ImageBuild(build) = input.request.kind.clone() else {
        let failure = Failure::new(FailureClass::Usage, "this job is not an image build");
        return BuildEnd {
            result: Err(failure),
            phases_ms: Vec::new(),
            egress: EgressSummary::default(),
            observed: None,
            measured: Measured::default(),
        };
    };
    let job = Job {
        host,
        build,
        lease,
        egress: Arc::clone(&egress),
        events: events.clone(),
        started_unix_ms: now_unix_ms(),
        submitted: std::time::Instant::now(),
        measured: Mutex::default(),
        input,
    };
    let limit = Duration::from_millis(job.input.request.limits.timeout_ms);
    let result = tokio::select! {
        result = tokio::time::timeout(limit, job.work(registry, &mut phases, cancel)) => match result {
            Ok(result) => result,
            Err(_) => Err(Failure::new(FailureClass::Timeout, format!("the build took longer than {limit:?}"))
                .hint("give it more with --timeout")),
        },
        () = cancel.cancelled() => {
            // The attempt's own cancellation path destroys the machine; here only the wait ends.
            Err(Failure::cancelled())
        }
    };
    host.leases.end(&job.lease.attempt);
    registry.discard_quarantine(&job.lease.attempt).await;
    let phases_ms = phases.finish();
    let summary = egress.snapshot().summary();
    let mut measured = job.measured.into_inner().unwrap_or_default();
    measured.finish(&phases_ms, &summary);
    let (result, observed) = match result {
        Ok((mut report, observed)) => {
            report.phases_ms.clone_from(&phases_ms);
            report.egress = summary.clone();
            (Ok(report), Some(observed))
        }
        Err(failure) => (Err(failure), None),
    };
    BuildEnd {
        result,
        phases_ms,
        egress: summary,
        observed,
        measured,
    }
}

impl Job<'_> {
    async fn work(
        &self,
        registry: &RegistryAccess,
        phases: &mut Phases,
        cancel: &CancellationToken,
    ) -> Result<(BuildReport, Observed), Failure> {
        let key = self.repeat_key();
        if let Some(key) = &key
            && let Some(done) = self.repeat(registry, phases, key).await?
        {
            return Ok(done);
        }
        let done = self.anew(registry, phases, cancel).await?;
        if let Some(key) = key {
            self.remember(&key, &done.1).await;
        }
        Ok(done)
    }

    fn repeat_key(&self) -> Option<Digest> {
        // What a lent agent opens is not known here.
        if !self.input.ssh_agents.is_empty() {
            return None;
        }
        let around = Surroundings {
            machine_image: &self.host.image.name,
            buildkit: &self.host.image.buildkit,
            ca_bundle: self.input.ca_bundle.as_deref(),
            step_env: &self.input.step_env,
        };
        repeat::key(&self.input.request, &around)
    }

    /// Names the image of an earlier, equal build again; `None` when there is none, or it must be built.
    async fn repeat(
        &self,
        registry: &RegistryAccess,
        phases: &mut Phases,
        key: &Digest,
    ) -> Result<Option<(BuildReport, Observed)>, Failure> {
        let results = Results::below(&self.host.home.data);
        if self.build.no_cache {
            return Ok(None);
        }
        let Some(earlier) = results.find(key) else {
            return Ok(None);
        };
        phases.begin("verify").await;
        let image = (&earlier.repository, earlier.manifest);
        let named =
            publish::name_again(registry, &self.host.leases, &self.lease, &self.build, image);
        let Some(published) = named.await? else {
            results.forget(key);
            return Ok(None);
        };
        let (mut report, mut observed) =
            self.report(None, None, published, &Solve::default(), None);
        report.same_as = Some(earlier.attempt.job.to_string());
        observed.repeats = Some(earlier.attempt);
        Ok(Some((report, observed)))
    }

    /// Remembers what this build gave. A failure here does not fail the build.
    async fn remember(&self, key: &Digest, observed: &Observed) {
        let Some(repository) = self
            .build
            .tags
            .first()
            .and_then(|tag| tag.repository.parse().ok())
        else {
            return;
        };
        let result = EarlierResult {
            schema: repeat::SCHEMA,
            repository,
            manifest: observed.manifest,
            attempt: self.lease.attempt.clone(),
            built_unix_ms: observed.ended_unix_ms,
        };
        if let Err(error) = Results::below(&self.host.home.data).remember(key, &result) {
            self.events
                .warn(format!(
                    "the result is not remembered for an unchanged build: {error}"
                ))
                .await;
        }
    }

    async fn anew(
        &self,
        registry: &RegistryAccess,
        phases: &mut Phases,
        cancel: &CancellationToken,
    ) -> Result<(BuildReport, Observed), Failure> {
        phases.begin("queue").await;
        let limits = self.input.request.limits;
        let memory = crate::templates::size_class(limits.memory);
        let ticket = self
            .host
            .admit_for(&self.input.request, memory, &self.events)
            .await?;
        phases.begin("machine").await;
        let head = fork::head(self.host, &self.scope(), self.build.no_cache, &self.events).await?;
        let pin = self
            .host
            .heads
            .pin(&head)
            .map_err(|error| Failure::infrastructure(&error))?;
        let name = self
            .lease
            .attempt
            .machine_name("build")
            .map_err(|error| Failure::infrastructure(&error))?;
        let wanted = Wanted {
            name,
            cpus: limits.cpus,
            memory: limits.memory,
            purpose: Purpose::Build { head: &head },
            make_template: true,
            may_stay: false,
            disk_bytes_per_second: self.input.request.disk_bytes_per_second(),
        };
        let mut measured = Measured::default();
        let since = std::time::Instant::now();
        let gateway = self.gateway(registry);
        measured.policy(self.input.request.policy.as_ref(), since);
        let attempt = Attempt::start(self.host, wanted, ticket, gateway, &self.events).await?;
        let bounds = Bounds::of(&self.input.request);
        bounds.allow(&attempt.session, &self.events).await;
        self.input.log.witness().has(&attempt.machine, &self.egress);
        let done = match self.in_machine(&attempt, registry, phases).await {
            Ok(solve) => self.finish(&attempt, &head, registry, phases, solve).await,
            Err(failure) if cancel.is_cancelled() => Err(failure),
            Err(failure) => Err(attempt.explain(failure).await),
        };
        let template = attempt.template.clone();
        attempt.destroy_measured(&self.events, &mut measured).await;
        if let Ok(mut kept) = self.measured.lock() {
            *kept = measured;
        }
        drop(pin);
        let (published, solve, committed) = done?;
        Ok(self.report(Some(&head), template, published, &solve, committed))
    }

    fn gateway(&self, registry: &RegistryAccess) -> Gateway {
        let policy: NetworkPolicy = self.input.request.network.clone();
        let mut config = Bounds::of(&self.input.request).gateway(policy, &self.egress);
        config.exceptions.clone_from(&self.input.exceptions);
        config.proxy = self.input.proxy.clone();
        // Layers of the bases, and of the images that get another tag now, lie in the registry already.
        let known = self
            .build
            .bases
            .iter()
            .map(|(_, base)| base)
            .chain(&self.build.tags);
        let sources = known.filter_map(|image| image.repository.parse().ok());
        config.services = registry.services_for(&self.lease, &self.host.leases, sources.collect());
        Gateway::new(config)
    }

    async fn in_machine(
        &self,
        attempt: &Attempt,
        registry: &RegistryAccess,
        phases: &mut Phases,
    ) -> Result<Solve, Failure> {
        self.provide_settings(&attempt.session).await?;
        attempt.services.lend(self.ssh_agents());
        let paths = self.start_and_send(attempt, phases).await?;
        phases.begin("build").await;
        let submitted_ms = self.submitted.elapsed();
        let solved = self.solve(attempt, &paths).await;
        let mut solve = solved.map_err(|failure| room_failure(failure, registry))?;
        let pushed = solve.push_seconds();
        phases.split("push", pushed);
        solve.submitted_ms = u64::try_from(submitted_ms.as_millis()).unwrap_or(u64::MAX);
        Ok(solve)
    }

    /// Verifies and names what was pushed, while the machine that is needed no more lets go of its disk; then commits that.
    async fn finish(
        &self,
        attempt: &Attempt,
        head: &Head,
        registry: &RegistryAccess,
        phases: &mut Phases,
        solve: Solve,
    ) -> Result<(Published, Solve, Option<String>), Failure> {
        let verify = async {
            phases.begin("verify").await;
            let claimed = solve.claimed_manifest.as_deref();
            let leases = &self.host.leases;
            let published =
                publish::verify_and_tag(registry, leases, &self.lease, &self.build, claimed).await;
            phases.begin("commit").await;
            published
        };
        // An image that is refused does not wait for the machine.
        let seal = async { Ok(self.seal(attempt).await) };
        let (published, sealed) = tokio::try_join!(verify, seal)?;
        let committed = self.commit(attempt, head, sealed).await;
        Ok((published, solve, committed))
    }

    /// Whose cache it reads, and feeds when it is trusted.
    fn scope(&self) -> String {
        let received = !self.input.secrets.is_empty() || !self.input.ssh_agents.is_empty();
        fork::scope(&self.input.request, received)
    }

    /// Ends the machine cleanly when its disk is wanted; `None` when it is not.
    async fn seal(&self, attempt: &Attempt) -> Option<Result<(), Failure>> {
        let trusted = self.input.request.trust == TrustClass::Trusted;
        match trusted && !self.build.no_cache {
            true => Some(commit::seal(attempt).await),
            false => None,
        }
    }

    /// Starts BuildKit where it does not run yet, and sends the source in that time. What the source takes beyond is a phase of its own.
    async fn start_and_send(
        &self,
        attempt: &Attempt,
        phases: &mut Phases,
    ) -> Result<TreePaths, Failure> {
        let session = &attempt.session;
        let mut source = std::pin::pin!(self.send_source(session));
        let mut sent = None;
        if !attempt.build_ready {
            let mut start = std::pin::pin!(buildkit::start(session));
            loop {
                tokio::select! {
                    started = &mut start => break started?,
                    paths = &mut source, if sent.is_none() => sent = Some(paths?),
                }
            }
        }
        phases.begin("source").await;
        match sent {
            Some(paths) => Ok(paths),
            None => source.await,
        }
    }

    /// Bound of the disk; CA bundle, environment of RUN steps, secrets, all of them in guest memory.
    async fn provide_settings(&self, session: &Session) -> Result<(), Failure> {
        let limits = Order::SetLimits {
            memory_max: 0,
            pids_max: 0,
            disk_bytes_max: self.input.request.limits.disk.0,
            open_files_max: 0,
        };
        orders::call_done(session, "take its limits", &limits, orders::ORDER_TIMEOUT).await?;
        let bundle = self.input.ca_bundle.as_deref().unwrap_or_default();
        orders::put_file(session, "take the CA bundle", Place::CaBundle, bundle).await?;
        let env = self.input.step_env.clone();
        orders::call_done(
            session,
            "take settings",
            &Order::SetStepEnv { env },
            orders::ORDER_TIMEOUT,
        )
        .await?;
        for (id, value) in &self.input.secrets {
            orders::put_file(
                session,
                "take a secret",
                Place::Secret { id: id.clone() },
                value,
            )
            .await?;
        }
        Ok(())
    }

    async fn send_source(&self, session: &Session) -> Result<TreePaths, Failure> {
        let tree = Arc::clone(&self.input.tree);
        let expected = self.build.source;
        let order = |place| PutTree {
            place,
            bytes_max: CONTEXT_BYTES_MAX,
            entries_max: CONTEXT_ENTRIES_MAX,
        };
        let (sender, digest) = tokio::sync::oneshot::channel();
        let sent = orders::put_tree(
            session,
            "take the source",
            &order(Place::Context {
                name: TREE_NAME.to_owned(),
            }),
            SOURCE_TIMEOUT,
            move |out| {
                let packed =
                    kiln_image::context::pack(&tree, out).map_err(std::io::Error::other)?;
                let _receiver_gone = sender.send(packed.digest);
                Ok(())
            },
        )
        .await?;
        if digest.await.ok() != Some(expected) {
            return Err(Failure::new(
                FailureClass::User,
                "the source changed while it was being sent",
            )
            .hint("build again when nothing writes to the folder"));
        }
        let dockerfile =
            buildkit::send_dockerfile(session, TREE_NAME, self.build.dockerfile.clone()).await?;
        Ok(TreePaths {
            context: sent.path,
            dockerfile,
        })
    }

    /// Runs BuildKit. Its push goes on whichever process owns the registry meanwhile.
    async fn solve(&self, attempt: &Attempt, paths: &TreePaths) -> Result<Solve, Failure> {
        let tell = async |event: Event| {
            self.input.log.event(&event);
            self.events.tell(event).await;
        };
        let (exit, solve) =
            buildkit::solve(&attempt.session, &self.request(paths), 0, tell).await?;
        if exit.code == Some(0) {
            return Ok(solve);
        }
        let oom_kills = attempt.services.oom_kills();
        Err(solve_failure::classify(&solve, &exit, oom_kills))
    }

    fn ssh_agents(&self) -> SshAgents {
        SshAgents::new(self.input.ssh_agents.clone())
    }

    fn request(&self, paths: &TreePaths) -> SolveRequest {
        let mut request = buildkit::request(&paths.context, &paths.dockerfile);
        let mut option = |key: String, value: &str| request.options.insert(key, value.to_owned());
        if let Some(target) = &self.build.target {
            option("target".to_owned(), target);
        }
        for (key, value) in &self.build.build_args {
            option(format!("build-arg:{key}"), value);
        }
        if self.build.no_cache {
            option("no-cache".to_owned(), "");
        }
        let secret = |(id, _): &(String, Vec<u8>)| (id.clone(), format!("/run/kiln/secrets/{id}"));
        request.secrets = self.input.secrets.iter().map(secret).collect();
        request.ssh = self.ssh_agents().in_machine();
        let repository = publish::quarantine(&self.lease.attempt);
        let name = format!(
            "{}/{repository}:{QUARANTINE_TAG}",
            kiln_core::network::REGISTRY_HOST
        );
        request.image = [
            ("name", name.as_str()),
            ("push", "true"),
            ("oci-mediatypes", "true"),
            ("compression", "gzip"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        request
    }

    /// Commits the sealed machine's overlay as the next head of its scope. A failure here does not fail the build.
    async fn commit(
        &self,
        attempt: &Attempt,
        parent: &Head,
        sealed: Option<Result<(), Failure>>,
    ) -> Option<String> {
        let committed = match sealed? {
            Ok(()) => commit::commit(self.host, attempt, &self.lease, &self.scope(), parent).await,
            Err(failure) => Err(failure),
        };
        match committed {
            Ok(head) => head,
            Err(failure) => {
                self.events
                    .warn(format!("the build cache was not kept: {failure}"))
                    .await;
                None
            }
        }
    }

    fn report(
        &self,
        head: Option<&Head>,
        template: Option<String>,
        published: Published,
        solve: &Solve,
        committed: Option<String>,
    ) -> (BuildReport, Observed) {
        let policy = serde_json::to_vec(&self.input.request.network).unwrap_or_default();
        let observed = Observed {
            schema: Observed::SCHEMA,
            attempt: self.lease.attempt.clone(),
            tenant: self.lease.tenant.clone(),
            source: self.build.source,
            git: self.input.git.clone(),
            dockerfile: Digest::of(self.build.dockerfile.as_bytes()),
            bases: self.build.bases.clone(),
            policy: Digest::of(&policy),
            machine_image: self.host.image.name.clone(),
            template: template.clone(),
            head: head.map(|head| head.id.clone()),
            egress: self.egress.snapshot().events,
            manifest: published.manifest,
            blobs: published.blobs.clone(),
            repeats: None,
            started_unix_ms: self.started_unix_ms,
            ended_unix_ms: now_unix_ms(),
        };
        let first_run_ms = solve.first_run.map(|seconds| {
            solve
                .submitted_ms
                .saturating_add(Duration::from_secs_f64(seconds.clamp(0.0, 1e6)).as_millis() as u64)
        });
        let report = BuildReport {
            job: self.lease.attempt.job.to_string(),
            reference: published
                .tags
                .first()
                .map(ImageRef::to_string)
                .unwrap_or_default(),
            digest: published.manifest,
            size: published.size,
            layers: published.layers,
            phases_ms: Vec::new(),
            buildkit_seconds: solve.seconds(),
            first_run_ms,
            cached: solve.cache_hits(),
            template,
            head: (head.map(|head| head.id.clone()), committed),
            same_as: None,
            egress: EgressSummary::default(),
        };
        (report, observed)
    }
}

/// A push that failed while the host's own disk has no room is the host's failure, not the build's.
fn room_failure(failure: Failure, registry: &RegistryAccess) -> Failure {
    let push = failure.class == FailureClass::User && failure.message.contains("failed to push");
    if !push || !registry.host.is_full() {
        return failure;
    }
    let message = "the host's disk is full: the registry could not take the image";
    Failure::new(FailureClass::Infrastructure, message).hint(crate::failure::ROOM_HINT)
}

struct TreePaths {
    context: String,
    dockerfile: String,
}

/// Build arguments that BuildKit treats as its own and that must not be set by a request.
#[must_use]
pub fn refused_build_args(args: &BTreeMap<String, String>) -> Vec<String> {
    args.keys()
        .filter(|key| *key == "BUILDKIT_SYNTAX")
        .cloned()
        .collect()
}
