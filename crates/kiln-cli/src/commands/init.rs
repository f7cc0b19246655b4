//! `kiln init`: writes a commented policy that fits the folder.

use std::fs::OpenOptions;
use std::io::Write as _;

use kiln_image::plan::{Options, RuntimeKind, plan};
use kiln_network::registries::Runtime;
use kiln_policy::{KILN_FILE, StarterFacts, choose, starter};
use serde_json::json;

use super::operator::Operator;
use super::source;
use crate::args::InitArgs;
use crate::error::{CliError, Result};
use crate::policy_file;
use crate::show::{Screen, ShownPath as _};

pub(super) fn run(args: &InitArgs, screen: Screen) -> Result<u8> {
    source::folder(&args.dir)?;
    let exists = |name: &str| args.dir.join(name).symlink_metadata().is_ok();
    let there = choose(exists).map(|choice| choice.map(|choice| choice.name));
    match there {
        Ok(None) => {}
        Ok(Some(KILN_FILE)) if args.force => {}
        Ok(Some(name)) => {
            return Err(
                CliError::usage(format!("{} has a policy: {name}", args.dir.shown())).hint(
                    match name {
                        KILN_FILE => "--force replaces it",
                        _ => "it is read as it is; move it away for a kiln.yaml",
                    },
                ),
            );
        }
        Err(error) => {
            return Err(
                CliError::usage(format!("{}: {error}", args.dir.shown())).hint("keep one policy")
            );
        }
    }
    if let Some(above) = policy_file::above(&args.dir)? {
        let above = above.shown();
        let message = format!(
            "{above} holds in {}: a policy here would take its place",
            args.dir.shown()
        );
        if !args.force {
            return Err(CliError::usage(message).hint(format!(
                "write what this folder needs into {above}; --force gives the folder a policy of its own"
            )));
        }
        screen.note(&format!(
            "from now on {above} is not read in {}",
            args.dir.shown()
        ));
    }
    let facts = facts(args)?;
    let path = args.dir.join(KILN_FILE);
    let mut options = OpenOptions::new();
    match args.force {
        true => options.write(true).create(true).truncate(true),
        // What came in between is not replaced.
        false => options.write(true).create_new(true),
    };
    options
        .open(&path)
        .and_then(|mut file| file.write_all(starter(&facts).as_bytes()))
        .map_err(|error| CliError::usage(format!("could not write {}: {error}", path.shown())))?;
    screen.data(
        &json!({ "written": path, "runtime": facts.runtime }),
        || format!("wrote {}: `kiln policy check` reads it", path.shown()),
    );
    Ok(0)
}

/// Files that tell a runtime where a folder cannot be planned, a lockfile missing for example.
const MARKS: [(&str, &str); 4] = [
    ("package.json", "node"),
    ("pyproject.toml", "python"),
    ("requirements.txt", "python"),
    ("setup.py", "python"),
];

/// What the folder is, as far as kiln can tell.
fn facts(args: &InitArgs) -> Result<StarterFacts> {
    let operator = Operator::load()?;
    let Ok(plan) = plan(&args.dir, &Options::default(), &operator.bases()?) else {
        let mark = MARKS.iter().find(|(file, _)| args.dir.join(file).is_file());
        return Ok(StarterFacts {
            runtime: mark.map(|(_, runtime)| (*runtime).to_owned()),
            evidence: mark.map(|(file, _)| (*file).to_owned()),
            hosts: Vec::new(),
        });
    };
    let mut facts = StarterFacts::default();
    if matches!(plan.runtime, RuntimeKind::Node | RuntimeKind::Python) {
        let version = plan
            .version
            .as_ref()
            .map(|choice| choice.version.as_str())
            .unwrap_or_default();
        facts.runtime = Some(format!("{}{version}", plan.runtime.name()));
        facts.evidence = plan.version.as_ref().map(|choice| choice.why.place());
    }
    if let Some(registries) = &operator.registries {
        let named = |name: &String| {
            Runtime::ALL
                .into_iter()
                .find(|runtime| runtime.name() == name)
        };
        let rules = plan
            .registries
            .iter()
            .filter_map(named)
            .flat_map(|runtime| registries.rules(runtime));
        facts.hosts = rules.map(|rule| rule.to_string()).collect();
    }
    Ok(facts)
}
