//! `kiln build`: words become a path-free request, the worker runs it, the result is shown and sent where it was asked for.

use std::path::Path;
use std::sync::Arc;

use kiln_core::job::TrustClass;
use kiln_core::{ImageRef, JobKind, JobRequest, NetworkPolicy, Outcome, TenantName, Verdict};
use kiln_image::context::ContextError;
use kiln_image::plan::Options;
use kiln_store::records::NewRecord;
use kiln_worker::build::{BuildEnd, BuildInput, BuildReport};
use kiln_worker::event::Events;
use kiln_worker::host::{new_job_id, now_unix_ms};
use kiln_worker::joblog::JobLog;
use kiln_worker::prepare::{self, Prepared, Wishes};
use kiln_worker::site::Site;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::source;
use super::table::counted;
use crate::args::{BuildArgs, ServerArgs};
use crate::error::{CliError, Result};
use crate::show::Screen;

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
    super::queueing::refuse(&args.queueing)?;
    let output = super::output::Output::parse(&args)?;
    let operator = Operator::load()?;
    let limits = operator
        .config
        .limits(&args.limits, true, super::host_cpus())?;
    let secrets = source::secrets(&args.secrets)?;
    let ssh_agents = source::ssh_agents(&args.ssh)?;
    let source = source::parse(&args.source)?;
    let file = args.file.as_deref();
    let local =
        super::checkout::local(&operator, source, file, limits.timeout_ms, screen, &cancel).await?;
    let site = operator.site()?;
    let named = secrets.iter().map(|(id, _)| id.clone()).collect();
    let prepared = prepared(&args, &site, &local, named)?;
    let (events, receiver) = Events::channel();
    let follow = tokio::spawn(screen.follow(receiver));
    let id = new_job_id('b').map_err(CliError::from_failure)?;
    let title = format!(
        "build {} -> {}",
        kiln_image::plan::shown(&args.source),
        prepared.build.tags[0]
    );
    let log = JobLog::begin(&operator.home, record(&id, "image-build", title))
        .map_err(CliError::from_failure)?;
    let log = Arc::new(log);
    let request = JobRequest {
        id: id.clone(),
        tenant: TenantName::local(),
        kind: JobKind::ImageBuild(prepared.build),
        network: prepared.network,
        limits,
        trust: TrustClass::Trusted,
        network_bits: None,
        dispatch: kiln_core::Dispatch::default(),
    };
    let input = BuildInput {
        request,
        tree: Arc::new(prepared.tree),
        git: local.git(),
        secrets,
        ssh_agents,
        step_env: site.step_env(&prepared.runtimes),
        exceptions: site.exceptions(),
        ca_bundle: site.ca_bundle,
        proxy: site.proxy,
        log: Arc::clone(&log),
    };
    let end = work(&operator, input, limits.timeout_ms, &events, &cancel).await;
    drop(events);
    let _screen_ended = follow.await;
    let result = finish(&log, end, screen)?;
    output
        .deliver(&operator, &result, &args, screen, &cancel)
        .await?;
    Ok(0)
}

async fn work(
    operator: &Operator,
    input: BuildInput,
    timeout_ms: u64,
    events: &Events,
    cancel: &CancellationToken,
) -> BuildEnd {
    let failed = |failure: CliError| BuildEnd {
        result: Err(failure.into_failure()),
        phases_ms: Vec::new(),
        egress: kiln_network::record::EgressSummary::default(),
        observed: None,
    };
    let host = match operator.host().await {
        Ok(host) => host,
        Err(error) => return failed(error),
    };
    let registry = match operator.registry().await {
        Ok(registry) => registry,
        Err(error) => return failed(error),
    };
    let lease = host.lease(&input.request.id, &input.request.tenant, timeout_ms);
    kiln_worker::build::run(&host, &registry, input, lease, events, cancel).await
}

/// Writes the record, shows the result.
fn finish(log: &JobLog, end: BuildEnd, screen: Screen) -> Result<BuildReport> {
    let BuildEnd {
        result,
        phases_ms,
        egress,
        observed,
    } = end;
    let verdict = match &result {
        Ok(_) => Verdict::Passed,
        Err(failure) => failure.verdict(),
    };
    let details = match &result {
        Ok(report) => serde_json::to_value(report).unwrap_or_default(),
        Err(_) => serde_json::json!({ "egress": egress }),
    };
    let receipt = result
        .as_ref()
        .ok()
        .zip(observed.as_ref())
        .map(|(report, observed)| report.receipt(observed));
    let kept = log.finish(
        Outcome { verdict, phases_ms },
        receipt,
        observed.as_ref(),
        details,
    );
    if let Err(failure) = kept {
        screen.note(&format!(
            "warning: the job's record could not be written: {failure}"
        ));
    }
    let egress_line = egress.to_string();
    match result {
        Ok(report) => {
            show(&report, &egress_line, screen);
            Ok(report)
        }
        Err(failure) => {
            if !egress_line.is_empty() {
                screen.note(&egress_line);
            }
            Err(CliError::from_failure(failure))
        }
    }
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

/// The record of a job that starts now.
pub(super) fn record(id: &kiln_core::JobId, kind: &str, title: String) -> NewRecord {
    NewRecord {
        id: id.clone(),
        tenant: TenantName::local(),
        kind: kind.to_owned(),
        title,
        started_unix_ms: now_unix_ms(),
    }
}

/// Plans the folder and prepares its build, as a worker does.
fn prepared(
    args: &BuildArgs,
    site: &Site,
    local: &super::checkout::Local,
    secrets: Vec<String>,
) -> Result<Prepared> {
    let wishes = Wishes {
        options: options(args, &local.dir)?,
        tags: tags(args, &local.name)?,
        secrets,
        no_cache: args.no_cache,
        allow: &NetworkPolicy::from_rules(args.allow.iter().cloned()),
    };
    prepare::prepare(&local.dir, wishes, site).map_err(CliError::from_failure)
}

/// A folder that cannot be a source: whose fault, and what to do.
pub(super) fn source_error(error: &ContextError) -> CliError {
    let told = CliError::new(error.class(), crate::error::chain(error));
    match error.hint() {
        Some(hint) => told.hint(hint),
        None => told,
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

/// `t/local/<name>:<tag>` for every --tag, else for the source's own name.
fn tags(args: &BuildArgs, name: &str) -> Result<Vec<ImageRef>> {
    if args.tags.is_empty() {
        return Ok(vec![super::reference::of_folder(name)]);
    }
    args.tags.iter().map(super::reference::in_tenant).collect()
}
