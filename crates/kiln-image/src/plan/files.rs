//! A folder with an `index.html` and nothing to build: its files as they are, served by the small server that built front
//! ends get too.

use std::collections::BTreeMap;

use super::PlanError;
use super::detect::Request;
use super::node::{SITE, serve_site};
use super::types::{Command, Evidence, Plan, PlannedBase, RuntimeKind, StaticSite};
use super::version::choose;
use super::write::{APP_USER, Text};
use crate::bases::BaseKind;
use crate::build_config::BUILD_CONFIG_FILE;

/// The page that makes a folder a site.
pub(super) const INDEX: &str = "index.html";
/// Port when PORT is not set.
const PORT: u16 = 3000;
/// Stays behind: what is about the folder and not of the site.
const EXTRA_IGNORES: [&str; 4] = [
    BUILD_CONFIG_FILE,
    "**/node_modules",
    "**/.env*",
    "**/.DS_Store",
];

pub(super) fn plan(request: &Request<'_>) -> Result<Plan, PlanError> {
    let config = request.config;
    let meaningless = [
        ("install", config.install.is_some()),
        ("build", config.build.is_some()),
        ("start", config.start.is_some()),
        ("system_packages", !config.system_packages.is_empty()),
    ];
    if let Some((key, _)) = meaningless.iter().find(|(_, set)| *set) {
        return Err(PlanError::Unsupported {
            file: BUILD_CONFIG_FILE.to_owned(),
            line: request.config_says(key).line,
            what: format!("[build] {key} has no meaning for a folder of files"),
            hint: "add a package.json or a Dockerfile if the site must be built, or remove it"
                .to_owned(),
        });
    }
    if !request.has(INDEX) {
        return Err(PlanError::NoStart {
            hint: format!(
                "a site of files starts with an {INDEX}: add one, or name its folder in {BUILD_CONFIG_FILE}: [build] subfolder = \"…\""
            ),
        });
    }
    let mut notes = Vec::new();
    let (base, _) = choose(RuntimeKind::Node, None, request.bases, &mut notes)?;
    let port = config.port.unwrap_or(PORT);
    let run = base.image(BaseKind::Run);
    let mut environment = BTreeMap::from([
        ("NODE_ENV".to_owned(), "production".to_owned()),
        ("PORT".to_owned(), port.to_string()),
        ("SITE".to_owned(), SITE.to_owned()),
    ]);
    environment.extend(config.environment.clone());
    let mut text = Text::default();
    text.line(format!("# Written by kiln from {INDEX}."));
    text.stage(&run.to_string(), None);
    text.line("WORKDIR /app").env(&environment);
    let command = serve_site(&mut text);
    text.line(format!("COPY --link . {SITE}"));
    text.line(format!("USER {APP_USER}"));
    text.line(format!("EXPOSE {port}"));
    text.line(command.instruction());
    let why = Evidence::at("a site of files: nothing is built", INDEX, None);
    Ok(Plan {
        schema: Plan::SCHEMA,
        runtime: RuntimeKind::Static,
        root: String::new(),
        version: None,
        framework: None,
        package_manager: None,
        install: Vec::new(),
        build: Vec::new(),
        start: Some(Command {
            line: command.line(),
            why: why.clone(),
        }),
        system_packages: Vec::new(),
        port: Some(port),
        static_site: Some(StaticSite {
            folder: ".".to_owned(),
            single_page: false,
        }),
        evidence: vec![why],
        notes,
        dockerfile_path: None,
        dockerfile: text.finish(),
        bases: vec![PlannedBase {
            written: run.to_string(),
            reference: run.clone(),
        }],
        lockfiles: Vec::new(),
        hosts_named: Vec::new(),
        registries: Vec::new(),
        extra_ignores: EXTRA_IGNORES.map(str::to_owned).to_vec(),
    })
}
