//! The user's own Dockerfile.

use kiln_core::ImageRef;

use super::PlanError;
use super::folder::Folder;
use super::types::{DockerfileChoice, Evidence, Options, Plan, PlannedBase, RuntimeKind};
use crate::bases::Bases;
use crate::build_config::BuildConfig;
use crate::dockerfile::{DOCKERFILE_BYTES_MAX, DockerfileError, PinOptions, Pinned, pin, split};

/// Names that are looked for, in this order.
const NAMES: [&str; 3] = ["Dockerfile", "dockerfile", "Containerfile"];

/// The Dockerfile that is used: its path inside the folder or its name when it comes from elsewhere, and its bytes.
pub(super) struct Found {
    name: String,
    bytes: Vec<u8>,
}

pub(super) fn find(folder: &Folder, options: &Options) -> Result<Option<Found>, PlanError> {
    let max = DOCKERFILE_BYTES_MAX as u64;
    let read = |path: &str| -> Result<Option<Found>, PlanError> {
        Ok(folder.linked_bytes(path, max)?.map(|bytes| Found {
            name: path.to_owned(),
            bytes,
        }))
    };
    match &options.dockerfile {
        Some(DockerfileChoice::Text { name, text }) => Ok(Some(Found {
            name: name.clone(),
            bytes: text.clone().into_bytes(),
        })),
        Some(DockerfileChoice::InFolder(path)) => match read(path)? {
            Some(found) => Ok(Some(found)),
            None => Err(PlanError::Read {
                path: path.clone(),
                source: std::io::ErrorKind::NotFound.into(),
            }),
        },
        None => {
            for name in NAMES {
                if let Some(found) = read(name)? {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        }
    }
}

pub(super) fn plan(
    found: Found,
    options: &Options,
    config: &BuildConfig,
    bases: &Bases,
) -> Result<Plan, PlanError> {
    let ignored = [
        ("install", config.install.is_some()),
        ("build", config.build.is_some()),
        ("start", config.start.is_some()),
        ("system_packages", !config.system_packages.is_empty()),
        ("environment", !config.environment.is_empty()),
        ("port", config.port.is_some()),
    ];
    if let Some((key, _)) = ignored.iter().find(|(_, set)| *set) {
        return Err(PlanError::Unsupported {
            file: crate::build_config::BUILD_CONFIG_FILE.to_owned(),
            line: None,
            what: format!("[build] {key} has no meaning for {}", found.name),
            hint: format!("say it in {}, or remove it from there", found.name),
        });
    }
    let error = |source| PlanError::Dockerfile {
        file: found.name.clone(),
        source,
    };
    let text = std::str::from_utf8(&found.bytes).map_err(|e| {
        let good = &found.bytes[..e.valid_up_to()];
        let line = good.iter().filter(|&&b| b == b'\n').count() as u32 + 1;
        error(DockerfileError::NotUtf8 { line })
    })?;
    let request = PinOptions {
        target: options.target.clone(),
        build_args: options.build_args.clone(),
    };
    let pinned = pin(text, &request, bases).map_err(error)?;
    let mut evidence = vec![Evidence::at(
        "builds with this Dockerfile",
        &found.name,
        None,
    )];
    for base in &pinned.bases {
        let what = format!("{} is {}", base.name, base.reference);
        evidence.push(Evidence::at(what, &found.name, Some(base.line)));
    }
    let notes = match request.target {
        None => smaller(&pinned, &found.name, bases).into_iter().collect(),
        Some(_) => Vec::new(),
    };
    let registries = registries(&pinned.text, &found.name, &mut evidence);
    let uses = pinned.bases.into_iter().map(|base| PlannedBase {
        written: base.written,
        reference: base.reference,
    });
    Ok(Plan {
        schema: Plan::SCHEMA,
        runtime: RuntimeKind::Dockerfile,
        root: String::new(),
        version: None,
        framework: None,
        package_manager: None,
        install: Vec::new(),
        build: Vec::new(),
        start: None,
        system_packages: Vec::new(),
        port: pinned.ports.first().copied(),
        static_site: None,
        evidence,
        notes,
        dockerfile_path: Some(found.name),
        dockerfile: pinned.text,
        bases: uses.collect(),
        lockfiles: Vec::new(),
        hosts_named: Vec::new(),
        registries,
        extra_ignores: Vec::new(),
    })
}

/// That the last stage stands on a build base: public names, `-slim` ones too, mean it, because Dockerfiles install on them.
fn smaller(pinned: &Pinned, file: &str, bases: &Bases) -> Option<Evidence> {
    let instructions = split(&pinned.text).ok()?;
    let last = instructions.iter().rfind(|i| i.keyword == "from")?;
    let used = pinned.bases.iter().find(|base| base.line == last.line)?;
    let base = bases
        .bases
        .iter()
        .find(|base| base.build == used.reference)?;
    let run = ImageRef {
        digest: None,
        ..base.run.clone()
    };
    let what = format!(
        "{} has package managers and compilers here; an image that installs nothing more is smaller FROM {run}, which starts as an unprivileged user",
        used.name
    );
    Some(Evidence::at(what, file, Some(used.line)))
}

/// Commands, and the registries they need.
const COMMANDS: [(&str, &[&str]); 3] = [
    ("node", &["npm", "npx", "pnpm", "yarn", "corepack"]),
    ("python", &["pip", "pip3", "uv", "poetry", "pdm", "pipenv"]),
    ("debian", &["apt", "apt-get"]),
];

/// The registries that the Dockerfile's RUN steps need, going by the commands they name.
fn registries(text: &str, file: &str, evidence: &mut Vec<Evidence>) -> Vec<String> {
    let Ok(instructions) = split(text) else {
        return Vec::new();
    };
    let mut found: Vec<String> = Vec::new();
    for run in instructions.iter().filter(|i| i.keyword == "run") {
        let bodies = run.heredocs.iter().map(|doc| doc.body.as_str());
        let texts: Vec<_> = bodies.chain([run.rest.text()]).collect();
        for (registry, commands) in COMMANDS {
            let words = texts.iter().flat_map(|text| {
                text.split(|c: char| !c.is_ascii_alphanumeric() && !"-_.=/".contains(c))
            });
            let mut words = words;
            let Some(word) = words.find(|word| commands.contains(word)) else {
                continue;
            };
            if !found.iter().any(|one| one == registry) {
                found.push(registry.to_owned());
                let what = format!("`{word}` needs the {registry} registries");
                evidence.push(Evidence::at(what, file, Some(run.line)));
            }
        }
    }
    found
}
