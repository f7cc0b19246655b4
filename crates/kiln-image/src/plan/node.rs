//! Node.js apps.
//!
//! `package.json` says what, a lockfile freezes it, the generated Dockerfile has four parts: production dependencies, all
//! dependencies, the build, the image. A source change reaches none of the first two.
//! Read next: `manifest` (package.json), `manager` (npm, pnpm, yarn), `entry` (how it starts), `dockerfile` (the text).

mod dockerfile;
mod entry;
mod manager;
mod manifest;
mod site;
mod workspaces;

pub(super) use site::{SITE, serve_site};
pub(super) use workspaces::has_member;

use super::PlanError;
use super::detect::Request;
use super::lockfiles;
use super::ranges::Ranges;
use super::types::{Command, Evidence, Plan, PlannedBase, RuntimeKind};
use super::version::{Wanted, choose};
use crate::bases::BaseKind;
use entry::Entry;
use manager::Manager;
use manifest::Manifest;

/// Port of the app when PORT is not set.
const PORT: u16 = 3000;

/// Never part of a Node source: installed afresh from the lockfile.
const EXTRA_IGNORES: [&str; 3] = ["**/node_modules", ".pnpm-store", "npm-debug.log"];

/// What was found out; the Dockerfile is written from this alone.
struct App {
    manifest: Manifest,
    manager: Manager,
    /// Folders of workspace members.
    members: Vec<String>,
    entry: Entry,
    build: Option<Command>,
    /// Files and folders that the install step reads, besides the members' manifests.
    inputs: Vec<String>,
}

pub(super) fn plan(request: &Request<'_>) -> Result<Plan, PlanError> {
    let mut evidence = Vec::new();
    let mut notes = Vec::new();
    let manifest = Manifest::read(request.folder)?;
    evidence.push(Evidence::at("a Node app", manifest::FILE, None));
    let wanted = wanted_version(request, &manifest)?;
    let (base, version) = choose(RuntimeKind::Node, wanted, request.bases, &mut notes)?;
    if version.wanted.is_none() {
        let what = "no Node version is asked for: add \"engines\": {\"node\": \"…\"} so that a newer base changes nothing";
        notes.push(Evidence::at(what, manifest::FILE, None));
    }
    let members = workspaces::members(request.folder, &manifest)?;
    let manager = Manager::find(request, &manifest, &base, &members, &mut notes)?;
    evidence.push(manager.why.clone());
    let build = build_command(request, &manifest, &manager);
    let entry = Entry::find(request, &manifest, &members, build.is_some(), &mut notes)?;
    evidence.extend(entry.evidence.iter().cloned());
    if let Some(npmrc) = request.folder.read(".npmrc")? {
        let literal = |line: &str| line.contains("_authToken=") && !line.contains("${");
        if let Some(line) = npmrc.lines().position(literal) {
            let what = "a token stands here and would be in the image: use a secret";
            notes.push(Evidence::at(what, ".npmrc", Some(line as u32 + 1)));
        }
    }
    let inputs = manager.inputs(request)?;
    let framework = entry.framework.clone();
    let app = App {
        manifest,
        manager,
        members,
        entry,
        build,
        inputs,
    };
    let port = request.config.port.unwrap_or(PORT);
    let written = dockerfile::write(request, &app, &base, port)?;
    let image = |kind| PlannedBase {
        written: base.image(kind).to_string(),
        reference: base.image(kind).clone(),
    };
    let mut registries = vec!["node".to_owned()];
    if !request.config.system_packages.is_empty() {
        registries.push("debian".to_owned());
    }
    Ok(Plan {
        schema: Plan::SCHEMA,
        runtime: RuntimeKind::Node,
        root: String::new(),
        version: Some(version),
        framework,
        package_manager: Some(app.manager.describe()),
        install: written.install,
        build: app.build.into_iter().chain(written.more_build).collect(),
        start: Some(app.entry.command()),
        system_packages: request.config.system_packages.clone(),
        port: Some(port),
        static_site: app.entry.site.clone(),
        evidence,
        notes,
        dockerfile_path: None,
        dockerfile: written.text,
        bases: vec![image(BaseKind::Build), image(BaseKind::Run)],
        lockfiles: lockfiles::digests(request.folder, &[])?,
        hosts_named: lockfiles::hosts(request.folder, &[])?,
        registries,
        extra_ignores: EXTRA_IGNORES.map(str::to_owned).to_vec(),
    })
}

fn build_command(request: &Request<'_>, manifest: &Manifest, manager: &Manager) -> Option<Command> {
    match request.config.build.as_deref() {
        Some("") => return None,
        Some(line) => {
            return Some(Command {
                line: line.to_owned(),
                why: request.config_says("build"),
            });
        }
        None => {}
    }
    manifest.script("build").map(|script| Command {
        line: manager.run_script("build"),
        why: Evidence::at(
            format!("scripts.build: {script}"),
            manifest::FILE,
            manifest.line(&["scripts", "build"]),
        ),
    })
}

/// The version that the folder asks for, whether or not it could be built.
pub(super) fn wanted_here(request: &Request<'_>) -> Result<Option<Wanted>, PlanError> {
    wanted_version(request, &Manifest::read(request.folder)?)
}

/// Names that `.nvmrc` gives to release lines.
const NAMED_LINES: [(&str, &str); 6] = [
    ("fermium", "14"),
    ("gallium", "16"),
    ("hydrogen", "18"),
    ("iron", "20"),
    ("jod", "22"),
    ("krypton", "24"),
];

/// `engines.node`, `.nvmrc`, `.node-version`, in this order.
fn wanted_version(request: &Request<'_>, manifest: &Manifest) -> Result<Option<Wanted>, PlanError> {
    if let Some(text) = manifest.engine("node")? {
        let line = manifest.line(&["engines", "node"]);
        return wanted(&text, Evidence::at("engines.node", manifest::FILE, line)).map(Some);
    }
    for file in [".nvmrc", ".node-version"] {
        let Some(text) = request.folder.read(file)? else {
            continue;
        };
        let lines = text.lines().enumerate();
        let mut lines = lines.map(|(i, line)| (i, line.split('#').next().unwrap_or("").trim()));
        if let Some((index, text)) = lines.find(|(_, text)| !text.is_empty()) {
            let why = Evidence::at(file, file, Some(index as u32 + 1));
            return wanted(text, why).map(Some);
        }
    }
    Ok(None)
}

fn wanted(text: &str, why: Evidence) -> Result<Wanted, PlanError> {
    let word = text.trim().to_lowercase();
    let ranges = match word.as_str() {
        "lts" | "lts/*" | "node" | "stable" | "latest" | "current" | "lts/-1" => {
            Some(Ranges::all())
        }
        word => {
            let name = word.strip_prefix("lts/").unwrap_or(word);
            let line = NAMED_LINES.iter().find(|(known, _)| *known == name);
            match line {
                Some((_, line)) => Ranges::npm(line),
                None => Ranges::npm(text),
            }
        }
    };
    match ranges {
        Some(ranges) => Ok(Wanted {
            text: text.to_owned(),
            ranges,
            why,
        }),
        None => Err(PlanError::Broken {
            file: why.file.clone(),
            line: why.line,
            what: format!("{text:?} is no version or range"),
        }),
    }
}
