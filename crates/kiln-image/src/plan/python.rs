//! Python apps.
//!
//! A lockfile or `requirements.txt` freezes the dependencies; they become a virtual environment at `/opt/venv`, made in a
//! stage with compilers and copied into the image at the same path. The tools that make it stay behind.
//! Read next: `project` (what the files say), `manager` (pip, uv, poetry, pdm, pipenv), `framework` (how it starts),
//! `dockerfile` (the text).

mod dockerfile;
mod framework;
mod manager;
mod project;
mod requirements;
mod source;

use super::PlanError;
use super::detect::Request;
use super::lockfiles;
use super::types::{Command, Evidence, Plan, PlannedBase, RuntimeKind};
use super::version::{Wanted, choose};
use crate::bases::BaseKind;
use framework::Entry;
use manager::Manager;
use project::Project;

/// Port of the app when PORT is not set.
const PORT: u16 = 8000;

/// Scripts that are started when nothing else says what to start.
pub(super) const SCRIPTS: [&str; 8] = [
    "main.py",
    "app.py",
    "server.py",
    "start.py",
    "run.py",
    "bot.py",
    "hello.py",
    "wsgi.py",
];

/// Never part of a Python source: environments and byte code of the developer's machine.
const EXTRA_IGNORES: [&str; 7] = [
    "**/__pycache__",
    ".venv",
    "venv",
    ".tox",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
];

/// What was found out; the Dockerfile is written from this alone.
struct App {
    project: Project,
    manager: Manager,
    entry: Entry,
}

/// The version that the folder asks for, whether or not it could be built.
pub(super) fn wanted_here(request: &Request<'_>) -> Result<Option<Wanted>, PlanError> {
    Project::named(request)?.wanted(request)
}

pub(super) fn plan(request: &Request<'_>) -> Result<Plan, PlanError> {
    let mut notes = Vec::new();
    let project = Project::read(request, &mut notes)?;
    let mut evidence = vec![project.why.clone()];
    let (base, version) = choose(
        RuntimeKind::Python,
        project.wanted(request)?,
        request.bases,
        &mut notes,
    )?;
    if version.wanted.is_none() {
        let what = "no Python version is asked for: add a .python-version file so that a newer base changes nothing";
        notes.push(Evidence::kiln(what));
    }
    if request.has("package.json") {
        let what =
            "not used: this is built as a Python app; [build] runtime in kiln.toml says otherwise";
        notes.push(Evidence::at(what, "package.json", None));
    }
    let manager = Manager::of(&project, &base);
    let entry = Entry::find(request, &project, &mut notes)?;
    evidence.extend(entry.evidence.iter().cloned());
    let port = request.config.port.unwrap_or(PORT);
    let app = App {
        project,
        manager,
        entry,
    };
    let written = dockerfile::write(request, &app, &base, port);
    let image = |kind| PlannedBase {
        written: base.image(kind).to_string(),
        reference: base.image(kind).clone(),
    };
    let mut registries = vec!["python".to_owned()];
    if !request.config.system_packages.is_empty() {
        registries.push("debian".to_owned());
    }
    let build = app.entry.collectstatic.clone();
    let build = match request.config.build.as_deref() {
        None => build,
        Some("") => None,
        Some(line) => Some(Command {
            line: line.to_owned(),
            why: request.config_says("build"),
        }),
    };
    let files = &app.project.requirement_files;
    Ok(Plan {
        schema: Plan::SCHEMA,
        runtime: RuntimeKind::Python,
        root: String::new(),
        version: Some(version),
        framework: app.entry.framework.map(str::to_owned),
        package_manager: app.manager.describe(),
        install: written.install,
        build: build.into_iter().collect(),
        start: Some(app.entry.command()),
        system_packages: request.config.system_packages.clone(),
        port: Some(port),
        static_site: None,
        evidence,
        notes,
        dockerfile_path: None,
        dockerfile: written.text,
        bases: vec![image(BaseKind::Build), image(BaseKind::Run)],
        lockfiles: lockfiles::digests(request.folder, files)?,
        hosts_named: lockfiles::hosts(request.folder, files)?,
        registries,
        extra_ignores: EXTRA_IGNORES.map(str::to_owned).to_vec(),
    })
}
