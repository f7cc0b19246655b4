//! `kiln build`: words become a path-free request, the worker runs it, the result is shown and sent where it was asked for.

use std::path::Path;
use std::time::Duration;

use kiln_core::job::{Limits, SourceBuild, TrustClass};
use kiln_core::{FailureClass, JobKind, JobRequest, TenantName};
use kiln_image::context::ContextError;
use kiln_image::plan::{DockerfileChoice, Options};
use kiln_policy::HeldBuild;
use kiln_worker::build::BuildReport;
use kiln_worker::event::Events;
use kiln_worker::fleet::job::{Ended, JobEnd};
use kiln_worker::fleet::local::{LocalFolder, LocalJob};
use kiln_worker::host::new_job_id;
use tokio_util::sync::CancellationToken;

use super::home_queue::HomeQueue;
use super::operator::Operator;
use super::source::{self, Source};
use super::table::counted;
use crate::args::{BuildArgs, LimitArgs, ServerArgs};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

pub(super) async fn run(
    args: BuildArgs,
    server: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    if args.platform != "linux/amd64" {
        return Err(CliError::usage(format!(
            "--platform {}: only linux/amd64 is built here",
            args.platform
        )));
    }
    if let Some(server) = crate::server::configured(server)? {
        return super::build_server::run(&server, args, screen, cancel).await;
    }
    let own = super::queueing::own(&args.queueing)?;
    let output = super::output::Output::parse(&args)?;
    let operator = Operator::load()?;
    let secrets = source::secrets(&args.secrets)?;
    let found = super::build_policy::found(&args, &source::parse(&args.source)?)?;
    let held = super::build_policy::rule(&args, found.as_ref(), &secrets, &operator, screen)?;
    let limits = limits(&held, &operator)?;
    let ssh_agents = source::ssh_agents(&args.ssh)?;
    let (mut wanted, folder) = wanted(&args, &operator, &secrets)?;
    wanted.only_network = held.only;
    let request = JobRequest {
        id: new_job_id('b').map_err(CliError::from_failure)?,
        tenant: TenantName::local(),
        kind: JobKind::SourceBuild(wanted),
        network: held.network,
        limits,
        trust: TrustClass::Trusted,
        network_bits: None,
        dispatch: own.dispatch,
        traceparent: None,
        policy: held.applied,
    };
    let queue = HomeQueue::open(&operator.home).await?;
    let (events, receiver) = Events::channel();
    let follow = tokio::spawn(screen.follow(receiver));
    let local = LocalJob {
        folder,
        secrets: secrets.given,
        ssh_agents,
        events: Some(events.clone()),
        ..LocalJob::default()
    };
    let ended = queue
        .run(&operator, request, own.labels, local, &events, &cancel)
        .await;
    drop(events);
    let _screen_ended = follow.await;
    let delivered = async {
        let report = finish(ended?, screen)?;
        output
            .deliver(&operator, &report, &args, screen, &cancel)
            .await
    };
    let delivered = delivered.await;
    queue.close().await;
    delivered.map(|()| 0)
}

/// What its machine may use: asked for, else the policy's, else the defaults; never more than the operator's maxima.
fn limits(held: &HeldBuild, operator: &Operator) -> Result<Limits> {
    let resources = &held.resources;
    let said = LimitArgs {
        cpus: resources.cpus,
        memory: resources.memory,
        timeout: resources.timeout_ms.map(Duration::from_millis),
    };
    let config = &operator.config;
    let mut limits = config.limits(&said, true, super::host_cpus())?;
    limits.disk = held.disk.unwrap_or(limits.disk);
    kiln_policy::below(&mut limits, &held.max);
    Ok(limits)
}

/// Shows the result.
fn finish(end: JobEnd, screen: Screen) -> Result<BuildReport> {
    let egress = end.egress.to_string();
    match end.result {
        Ok(Ended::Built(report)) => {
            show(&report, &egress, screen);
            Ok(*report)
        }
        Ok(Ended::Ran(_)) => Err(CliError::new(
            FailureClass::Infrastructure,
            "the build ended as a command does",
        )),
        Err(failure) => {
            if !egress.is_empty() {
                screen.note(&egress);
            }
            Err(CliError::from_failure(failure))
        }
    }
}

/// What the command line asks for, and the folder if it lies on this host. A folder is planned here first, so that mistakes in it are told
/// before anything starts.
fn wanted(
    args: &BuildArgs,
    operator: &Operator,
    secrets: &source::Secrets,
) -> Result<(SourceBuild, Option<LocalFolder>)> {
    for tag in &args.tags {
        let _legal = super::reference::in_tenant(tag)?;
    }
    let file = args.file.as_deref();
    let (source, name, dockerfile, folder) = match source::parse(&args.source)? {
        Source::Folder(dir) => {
            let options = options(args, &dir)?;
            kiln_image::plan::plan(&dir, &options, &operator.bases()?)
                .map_err(super::plan::plan_error)?;
            let canonical = dir.canonicalize().or_infrastructure()?;
            let name = canonical.file_name().and_then(|name| name.to_str());
            let source = kiln_core::job::Source::Folder {
                path: canonical.shown().to_string(),
            };
            let name = name.unwrap_or("app").to_owned();
            (
                source,
                name,
                options.dockerfile,
                Some(LocalFolder { dir, git: None }),
            )
        }
        Source::Git { url, reference } => {
            let name = source::repository_name(&url);
            let dockerfile = file
                .map(super::plan::dockerfile_of_repository)
                .transpose()?;
            let source = kiln_core::job::Source::Git {
                url,
                reference: reference.unwrap_or_else(|| "HEAD".to_owned()),
            };
            (source, name, dockerfile, None)
        }
    };
    let (dockerfile, dockerfile_text) = match dockerfile {
        Some(DockerfileChoice::InFolder(path)) => (Some(path), None),
        Some(DockerfileChoice::Text { name, text }) => (Some(name), Some(text)),
        None => (None, None),
    };
    let wanted = SourceBuild {
        source,
        name,
        dockerfile,
        dockerfile_text,
        target: args.target.clone(),
        build_args: source::pairs(&args.build_args, "--build-arg")?,
        secrets: secrets.names(),
        stored_secrets: secrets.stored.clone(),
        tags: args.tags.clone(),
        no_cache: args.no_cache,
        only_network: false,
        repository_policy: super::build_policy::of_repository(args),
        policy_ref: None,
    };
    Ok((wanted, folder))
}

pub(super) fn show(report: &BuildReport, egress: &str, screen: Screen) {
    let value = serde_json::json!({ "event": "built", "build": report });
    screen.data(&value, || {
        let phases: Vec<String> = report
            .phases_ms
            .iter()
            .map(|(name, ms)| format!("{name} {:.1}s", seconds(*ms)))
            .collect();
        let total: u64 = report.phases_ms.iter().map(|(_, ms)| ms).sum();
        let layers: Vec<String> = report
            .layers
            .iter()
            .map(|(digest, size)| format!("  layer {} {:>9}", digest.short(12), size_text(*size)))
            .collect();
        let steps = match &report.same_as {
            Some(job) => format!("unchanged since job {job}: the same image, nothing was built"),
            None => format!(
                "{} of {} from the cache",
                report.cached.0,
                counted(report.cached.1 as u64, "step")
            ),
        };
        format!(
            "built {}\n  digest {}\n  size {} in {}\n{}\n  {steps}; {:.1}s in all: {}\n  {egress}",
            report.reference,
            report.digest,
            size_text(report.size),
            counted(report.layers.len() as u64, "layer"),
            layers.join("\n"),
            seconds(total),
            phases.join(", "),
        )
    });
}

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds of a job fit a double"
)]
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1e3
}

fn size_text(bytes: u64) -> String {
    kiln_core::ByteSize(bytes).to_string()
}

/// A folder that cannot be a source: whose fault, and what to do.
pub(super) fn source_error(error: &ContextError) -> CliError {
    let told = CliError::new(error.class(), crate::error::chain(error));
    match error.hint() {
        Some(hint) => told.hint(hint),
        None => told,
    }
}

/// A folder that a command cannot work on: whose fault, and what to do.
pub(super) fn folder_error(error: &ContextError) -> CliError {
    CliError {
        hints: error.hint_of_run().into_iter().collect(),
        ..source_error(error)
    }
}

/// What the command line says besides the folder.
pub(super) fn options(args: &BuildArgs, dir: &Path) -> Result<Options> {
    let dockerfile = match &args.file {
        None => None,
        Some(path) => Some(super::plan::dockerfile_choice(dir, path)?),
    };
    let build_args = source::pairs(&args.build_args, "--build-arg")?;
    Ok(Options {
        dockerfile,
        target: args.target.clone(),
        build_args,
    })
}
