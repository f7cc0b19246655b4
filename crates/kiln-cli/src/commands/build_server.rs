//! `kiln build` through a server: the source is sent, the job is followed, the result is shown as if it were built here.

use std::path::{Path, PathBuf};

use kiln_controller::api::{BuildAsk, JobView};
use kiln_core::{FailureClass, ImageRef, Verdict};
use kiln_image::context::{Limits, Tree};
use kiln_image::plan::{DockerfileChoice, PlanError};
use kiln_worker::build::BuildReport;
use kiln_worker::event::Events;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::source::{self, Source};
use super::{build, output, queueing, reference};
use crate::args::BuildArgs;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::server::follow::{Ended, LogKind, follow};
use crate::server::{Server, upload};
use crate::show::Screen;

/// Files that a plan is made from: they are sent even where `.dockerignore` keeps them out of the image. Not those that may hold
/// credentials.
const PLANNED_FROM: [&str; 27] = [
    ".dockerignore",
    ".gitignore",
    ".node-version",
    ".nvmrc",
    ".python-version",
    "Containerfile",
    "Dockerfile",
    "Pipfile",
    "Pipfile.lock",
    "Procfile",
    "bun.lock",
    "constraints.txt",
    "kiln.toml",
    "manage.py",
    "npm-shrinkwrap.json",
    "package-lock.json",
    "package.json",
    "pdm.lock",
    "pnpm-lock.yaml",
    "pnpm-workspace.yaml",
    "poetry.lock",
    "pyproject.toml",
    "requirements.txt",
    "runtime.txt",
    "setup.py",
    "uv.lock",
    "yarn.lock",
];

pub(super) async fn run(
    server: &Server,
    args: BuildArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    refuse(&args)?;
    output::look_at_result(&args)?;
    let secrets = source::secrets(&args.secrets)?;
    let mut asked = asked(&args, &secrets)?;
    let source = source::parse(&args.source)?;
    let found = super::build_policy::found(&args, &source)?;
    asked.policy = found.as_ref().map(super::run_policy::sent);
    asked.no_policy = args.no_policy;
    let tree = match source {
        Source::Folder(dir) => Some(folder(&args, &dir, &mut asked)?),
        Source::Git { url, reference } => {
            git(&args, &url, reference, &mut asked)?;
            None
        }
    };
    let job = tokio::select! {
        job = upload::build(server, &asked, secrets.given, tree, build::source_error) => job?,
        () = cancel.cancelled() => {
            return Err(CliError::new(FailureClass::Cancelled, "cancelled before the source was sent"));
        }
    };
    for note in &job.notes {
        screen.note(note);
    }
    if args.queueing.detach {
        detached(&job, screen);
        return Ok(0);
    }
    let id = job.line.id;
    let (events, receiver) = Events::channel();
    let drawing = tokio::spawn(screen.follow(receiver));
    events.note(format!("job {id}")).await;
    let ended = follow(server, &id, LogKind::Steps, &events, screen, &cancel).await;
    drop(events);
    let _screen_ended = drawing.await;
    finish(server, &id, ended?, &args, screen).await
}

/// The id of a job that nobody waits for.
pub(super) fn detached(job: &JobView, screen: Screen) {
    let value = serde_json::json!({ "event": "queued", "job": job.line.id });
    screen.data(&value, || job.line.id.clone());
    screen.note(&format!(
        "follow it with `kiln job logs --follow {}`",
        job.line.id
    ));
}

/// What only works where the image is built.
fn refuse(args: &BuildArgs) -> Result<()> {
    let flags = [
        ("--push", args.push.is_some()),
        ("--load", args.load),
        ("--output", args.output != "registry"),
        ("--ssh", !args.ssh.is_empty()),
    ];
    match flags.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(CliError::usage(format!("{flag} does not work through a server yet"))
            .hint("the image stays in the registry of the host that built it; without a server this host builds, and the flag works")),
    }
}

fn asked(args: &BuildArgs, secrets: &source::Secrets) -> Result<BuildAsk> {
    let images = args.tags.iter().map(image).collect::<Result<_>>()?;
    Ok(BuildAsk {
        target: args.target.clone(),
        build_args: source::pairs(&args.build_args, "--build-arg")?,
        secrets: secrets.names(),
        images,
        no_cache: args.no_cache,
        common: queueing::common(&args.queueing, &args.limits, &args.allow)?,
        ..BuildAsk::default()
    })
}

/// A name within the tenant, whichever that is.
fn image(tag: &ImageRef) -> Result<String> {
    if tag.registry.is_some() || tag.digest.is_some() || tag.repository.starts_with("t/") {
        return Err(CliError::usage(format!(
            "--tag {tag}: write a name and an optional tag, for example shop:1.4"
        )));
    }
    Ok(tag.to_string())
}

/// The name of an image of this folder when nobody says.
fn name(folder: &str) -> String {
    let full = reference::of_folder(folder).repository;
    full.rsplit('/').next().unwrap_or("app").to_owned()
}

fn git(args: &BuildArgs, url: &str, reference: Option<String>, asked: &mut BuildAsk) -> Result<()> {
    asked.name = Some(name(&source::repository_name(url)));
    asked.git_url = Some(url.to_owned());
    asked.git_ref = reference;
    if let Some(file) = &args.file {
        match super::plan::dockerfile_of_repository(file)? {
            DockerfileChoice::Text { text, .. } => asked.dockerfile_text = Some(text),
            DockerfileChoice::InFolder(path) => asked.dockerfile = Some(path),
        }
    }
    Ok(())
}

/// The folder to send: planned here first, so that most mistakes are told at once; the server's worker decides.
fn folder(args: &BuildArgs, dir: &Path, asked: &mut BuildAsk) -> Result<Tree> {
    let canonical = dir.canonicalize().or_infrastructure()?;
    let base = canonical
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("app");
    asked.name = Some(name(base));
    let options = build::options(args, dir)?;
    match &options.dockerfile {
        Some(DockerfileChoice::InFolder(path)) => asked.dockerfile = Some(path.clone()),
        Some(DockerfileChoice::Text { text, .. }) => asked.dockerfile_text = Some(text.clone()),
        None => {}
    }
    let plan = match kiln_image::plan::plan(dir, &options, &Operator::load()?.bases()?) {
        Ok(plan) => Some(plan),
        // The server has bases of its own.
        Err(PlanError::Version { .. }) => None,
        Err(error) if error.class() == FailureClass::Policy => None,
        Err(error) => return Err(super::plan::plan_error(error)),
    };
    // An app one folder away, and nothing above it has a say.
    let below = plan
        .as_ref()
        .map(|plan| plan.root.as_str())
        .unwrap_or_default();
    let alone = !below.is_empty() && asked.dockerfile.is_none() && !dir.join("kiln.toml").exists();
    let root: PathBuf = if alone {
        dir.join(below)
    } else {
        dir.to_owned()
    };
    let dockerfile = match &plan {
        Some(plan) => plan.dockerfile_path.clone(),
        None => asked.dockerfile.clone(),
    };
    let extra: Vec<&str> = plan
        .iter()
        .flat_map(|plan| &plan.extra_ignores)
        .map(String::as_str)
        .collect();
    let inside = dockerfile.as_deref().filter(|path| !path.starts_with('/'));
    // What is named below a root is named from there.
    let (prefix, opened) = match alone || below.is_empty() {
        true => (String::new(), dockerfile.as_deref()),
        false => (format!("{below}/"), None),
    };
    let tree = Tree::open(&root, opened, &extra, Limits::default())
        .map_err(|error| build::source_error(&error))?;
    Ok(tree.keeping(kept(&prefix, inside)))
}

/// What is sent whatever the ignore rules say: what a plan is made from at the top and below the root.
fn kept(prefix: &str, dockerfile: Option<&str>) -> Vec<String> {
    let known = PLANNED_FROM.into_iter();
    let mut kept: Vec<String> = known
        .flat_map(|name| [name.to_owned(), format!("{prefix}{name}")])
        .collect();
    if let Some(path) = dockerfile {
        kept.push(format!("{prefix}{path}"));
        kept.push(format!("{prefix}{path}.dockerignore"));
    }
    kept
}

async fn finish(
    server: &Server,
    id: &str,
    ended: Ended,
    args: &BuildArgs,
    screen: Screen,
) -> Result<u8> {
    if let Verdict::Failed {
        class,
        message,
        hint,
        reason,
        ..
    } = ended.outcome.verdict
    {
        let mut error = CliError {
            reason,
            ..CliError::new(class, message)
        };
        error.hints.extend(hint);
        return Err(error);
    }
    let told = ended
        .report
        .and_then(|mut report| report.get_mut("build").map(Value::take));
    match told.and_then(|report| serde_json::from_value::<BuildReport>(report).ok()) {
        Some(report) => {
            output::write_result(args, &report)?;
            build::show(&report, &report.egress.to_string(), screen);
        }
        // The report did not fit; what was stored is known all the same.
        None => {
            let job: JobView = server.get(&format!("/v1/jobs/{id}")).await?;
            let receipt = job.receipt.unwrap_or_default();
            let tag = receipt["tags"][0].as_str().unwrap_or(id).to_owned();
            let value = serde_json::json!({ "event": "built", "receipt": receipt });
            screen.data(&value, || {
                format!(
                    "built {tag}\n  digest {}",
                    receipt["manifest"].as_str().unwrap_or("?")
                )
            });
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_within_the_tenant() {
        let tag = |text: &str| image(&text.parse().expect("a reference"));
        assert_eq!(tag("shop:1.4").expect("legal"), "shop:1.4");
        for bad in ["registry.example.org/shop", "t/other/shop"] {
            assert_eq!(tag(bad).expect_err(bad).exit_code(), 2);
        }
        assert_eq!(name("My Shop"), "my-shop");
    }

    #[test]
    fn a_plan_finds_its_files_on_the_other_side() {
        let dir = tempfile::tempdir().expect("temp dir");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("folder");
            std::fs::write(path, text).expect("write");
        };
        write("deploy/Dockerfile", "FROM scratch\n");
        write("deploy/Dockerfile.dockerignore", "*\n!src\n");
        write("kiln.toml", "");
        write(".env", "SECRET=1");
        write("src/a", "a");
        let tree = Tree::open(
            dir.path(),
            Some("deploy/Dockerfile"),
            &["kiln.toml"],
            Limits::default(),
        )
        .expect("tree");
        let mut tar = Vec::new();
        kiln_image::context::pack(&tree.keeping(kept("", Some("deploy/Dockerfile"))), &mut tar)
            .expect("packs");
        let out = tempfile::tempdir().expect("temp dir");
        kiln_image::context::unpack(&tar[..], out.path(), Limits::default()).expect("unpacks");
        for there in [
            "deploy/Dockerfile",
            "deploy/Dockerfile.dockerignore",
            "kiln.toml",
            "src/a",
        ] {
            assert!(out.path().join(there).is_file(), "{there}");
        }
        assert!(!out.path().join(".env").exists());
    }
}
