//! `kiln job retry`: a server queues the job again; a job that a command ran itself is run again by this one, from what was asked for then.

use kiln_controller::api::{JobView, command_line};
use kiln_core::job::{RunPhase, Source, TrustClass};
use kiln_core::{Digest, GitAccess, JobKind, JobRequest};
use kiln_image::context::{self, Limits, Tree};
use kiln_policy::{Standing, stands};
use kiln_proto::fleet::Own;
use kiln_worker::fleet::local::LocalFolder;
use kiln_worker::given::Given;
use kiln_worker::host::new_job_id;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::home_queue::{Asked, HomeQueue};
use super::job_record::Record;
use super::operator::Operator;
use super::run::{InFront, Stay};
use super::run_policy::refused;
use super::run_server::{Left, to_its_end};
use crate::error::{CliError, Result};
use crate::policy_file;
use crate::show::{Screen, ShownPath as _};
use crate::terminal;

pub(super) async fn run(
    id: &str,
    shell: bool,
    asked: &Asked,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<u8> {
    let job = asked.server.job(Some(id)).await?;
    if let (true, Some(queue)) = (job.own, asked.of_home()) {
        let stay = match shell {
            true => Stay::shell()?,
            false => Stay::default(),
        };
        let sent = Record::of(&asked.server, &job).await?.source;
        return here(&job, queue, (sent, stay), screen, cancel).await;
    }
    let stay = match shell {
        true => Stay::shell()?,
        false => Stay::default(),
    };
    let path = format!("/v1/jobs/{}/retry", job.line.id);
    let wanted = match stay.asked() {
        None => json!({}),
        Some(keep) => json!({ "keep": keep }),
    };
    let new: JobView = asked.server.post(&path, &wanted).await?;
    if shell {
        screen.note(&format!(
            "kiln: job {} again, as {}",
            job.line.id, new.line.id
        ));
        let left = Left {
            stay,
            copies: None,
            lesson: None,
        };
        return to_its_end(&asked.server, &new, left, screen, cancel).await;
    }
    let value = json!({ "event": "queued", "job": new.line.id, "again": job.line.id });
    screen.data(&value, || new.line.id.clone());
    Ok(0)
}

/// Runs a command's own job again, in front of whoever asks now.
async fn here(
    job: &JobView,
    queue: &HomeQueue,
    (sent, stay): (Option<Digest>, Stay),
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<u8> {
    let id = job.line.id.parse();
    let id = id.map_err(|_| CliError::usage("the job's id is malformed"))?;
    let Own { request, labels } = queue.asked(&id).await?;
    if let Some(why) = missing(&request, terminal::size().is_some()) {
        return Err(
            CliError::usage(format!("job {id} cannot be run again here: {why}"))
                .hint(format!("type it again: {}", command_line(&request))),
        );
    }
    if let Some(folder) = folder(&request) {
        same(&folder, sent)?;
    }
    let operator = Operator::load()?;
    let most = &operator.config.limits;
    let mut request = JobRequest {
        id: new_job_id('r').map_err(CliError::from_failure)?,
        traceparent: None,
        ..request
    };
    // Today's limits decide, not those of then.
    request.limits.cpus = request.limits.cpus.min(most.cpus_max.max(1));
    request.limits.memory = request.limits.memory.min(most.memory_max.0);
    granted(&mut request, &operator)?;
    if request.learns_untrusted() {
        // Recorded by a kiln that did not ask: who may let it learn is who asks now.
        request.trust = TrustClass::Trusted;
    }
    let (tty, keeps) = match &request.kind {
        JobKind::Run(run) => (run.tty, !run.artifacts.is_empty()),
        _ => (false, false),
    };
    screen.note(&format!("kiln: job {id} again, as {}", request.id));
    let again = InFront {
        given: Given::default(),
        folder: folder(&request),
        operator: &operator,
        queue,
        request,
        labels,
        listeners: Vec::new(),
        size: tty.then(terminal::size).flatten(),
        wants_stdin: tty,
        keeps,
        copies: &[],
        stay,
        lesson: None,
    };
    again.run(screen, cancel).await
}

/// Today's grant decides, too: what was withdrawn since is not run again.
fn granted(request: &mut JobRequest, operator: &Operator) -> Result<()> {
    let grants = policy_file::grants(&operator.home.config)?;
    let (phases, git): (&[RunPhase], &[GitAccess]) = match &request.kind {
        JobKind::Run(run) => (&run.phases, &run.git),
        _ => (&[], &[]),
    };
    let standing = Standing {
        network: &request.network,
        phases,
        git,
        applied: request.policy.clone(),
    };
    let (max, applied) = stands(&standing, &grants, &request.tenant).map_err(|refusal| {
        let told = refused(refusal);
        CliError {
            message: format!("what the job was granted was withdrawn: {}", told.message),
            ..told
        }
    })?;
    kiln_policy::below(&mut request.limits, &max);
    request.policy = applied;
    Ok(())
}

/// The folder that it worked on, as it lies there today.
fn folder(request: &JobRequest) -> Option<LocalFolder> {
    match request.kind.source() {
        Some(Source::Folder { path }) => Some(LocalFolder {
            dir: path.into(),
            git: None,
        }),
        _ => None,
    }
}

/// Whether the folder still holds what was sent then.
fn same(folder: &LocalFolder, sent: Option<Digest>) -> Result<()> {
    let again = |message: String| {
        CliError::usage(message).hint("`kiln run` in that folder runs on what is there now")
    };
    let shown = folder.dir.shown();
    // A job that ended before anything was sent had no other folder.
    let Some(sent) = sent else {
        return Ok(());
    };
    let tree = Tree::open_for_run(&folder.dir, Limits::default());
    let now = tree.and_then(|tree| context::digest(&tree));
    let now = now.map_err(|error| {
        again(format!(
            "its folder {shown}: {}",
            crate::error::chain(&error)
        ))
    })?;
    match now.digest == sent {
        true => Ok(()),
        false => Err(again(format!("its folder {shown} has changed since"))),
    }
}

/// What the job had and nobody has kept.
fn missing(request: &JobRequest, terminal: bool) -> Option<&'static str> {
    match &request.kind {
        JobKind::Run(run) if run.stdin && !run.tty => {
            Some("what came on its standard input is not kept")
        }
        JobKind::Run(run) if run.tty && !terminal => Some("it had a terminal, and here is none"),
        JobKind::Run(run) if run.kernel.is_some() || run.root_disk.is_some() => {
            Some("its kernel or root disk was a file of the command that asked, and is not kept")
        }
        JobKind::Run(run) if !run.ports.is_empty() => {
            Some("its ports belonged to the command that is over")
        }
        JobKind::Run(_) => None,
        _ => Some("a build's folder and secrets are not kept"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: &serde_json::Value) -> JobRequest {
        let request = json!({
            "id": "r1m7z7g68prr466fez", "tenant": "local", "kind": kind, "network": {"mode": "isolated"},
            "limits": {"cpus": 1, "memory": 1 << 29, "disk": 1 << 30, "timeout_ms": 1000}, "trust": "untrusted",
        });
        serde_json::from_value(request).expect("a request")
    }

    #[test]
    fn what_nobody_kept_cannot_be_run_again() {
        let run = |tty: bool, stdin: bool, ports: serde_json::Value| {
            request(
                &json!({"kind": "run", "image": null, "argv": ["true"], "env": {}, "ports": ports, "tty": tty, "stdin": stdin}),
            )
        };
        let none = json!([]);
        assert_eq!(missing(&run(false, false, none.clone()), false), None);
        assert_eq!(missing(&run(true, true, none.clone()), true), None);
        assert!(missing(&run(true, true, none.clone()), false).is_some());
        assert!(missing(&run(false, true, none), true).is_some());
        assert!(missing(&run(false, false, json!([[8080, 80]])), true).is_some());
        let digest = Digest::of(b"x");
        for file in ["kernel", "root_disk"] {
            let given = request(&json!({
                "kind": "run", "image": null, "argv": ["true"], "env": {}, "ports": [], "tty": false, "stdin": false,
                file: {"name": "vmlinuz", "digest": digest},
            }));
            assert!(missing(&given, true).is_some_and(|why| why.contains("not kept")));
        }
        let build = json!({"kind": "source_build", "name": "a", "source": {"from": "folder", "path": "/a"}});
        assert!(missing(&request(&build), true).is_some());
    }
}
