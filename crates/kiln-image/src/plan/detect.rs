//! Which way a folder is built, and what to say when there is none.

use std::path::Path;

use super::folder::{Folder, Name};
use super::types::{Evidence, Options, Plan, RuntimeKind};
use super::{PlanError, custom, files, node, python};
use crate::bases::Bases;
use crate::build_config::{BUILD_CONFIG_FILE, BuildConfig, BuildConfigError};

/// Everything a runtime's planner needs.
pub(super) struct Request<'a> {
    pub(super) folder: &'a Folder,
    pub(super) names: &'a [Name],
    pub(super) config: &'a BuildConfig,
    /// Text of `kiln.toml`, for line numbers.
    pub(super) config_text: &'a str,
    pub(super) bases: &'a Bases,
}

impl Request<'_> {
    /// Evidence for something that `kiln.toml` says.
    pub(super) fn config_says(&self, key: &str) -> Evidence {
        let line = BuildConfig::line_of_key(self.config_text, key);
        Evidence::at(format!("[build] {key}"), BUILD_CONFIG_FILE, line)
    }

    /// Whether the root has a file of that name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.iter().any(|n| n.text == name && !n.is_folder)
    }
}

/// Plans the image build of a source folder.
///
/// # Errors
/// See [`PlanError`]: each variant has a hint where a file or key would help.
pub fn plan(dir: &Path, options: &Options, bases: &Bases) -> Result<Plan, PlanError> {
    let outer = Folder::open(dir)?;
    let config_text = outer.read(BUILD_CONFIG_FILE)?.unwrap_or_default();
    let config = BuildConfig::parse(&config_text)?;
    let inner = match &config.subfolder {
        Some(sub) if outer.has_folder(sub) => Some(outer.sub(sub)?),
        Some(sub) => {
            return Err(PlanError::Config(BuildConfigError {
                line: BuildConfig::line_of_key(&config_text, "subfolder").unwrap_or(1),
                what: format!("there is no folder {sub:?}"),
            }));
        }
        None => None,
    };
    let folder = inner.as_ref().unwrap_or(&outer);
    let found = plan_folder(folder, &config, &config_text, options, bases);
    let mut plan = match (found, &config.subfolder) {
        (Err(PlanError::NoLockfile { manifest, .. }), Some(sub))
            if node::has_member(&outer, sub) =>
        {
            let hint = format!(
                "{sub} is a member of the workspace around it, whose lockfile freezes it: remove subfolder from kiln.toml and say there how it starts, below [build]: start = \"cd {sub} && …\""
            );
            return Err(PlanError::NoLockfile { manifest, hint });
        }
        (Err(error), None) => return Err(pointed(error, dir, &outer)),
        (found, _) => found?,
    };
    if let Some(sub) = &config.subfolder {
        plan.root = sub.trim_matches('/').to_owned();
    }
    Ok(plan)
}

fn plan_folder(
    folder: &Folder,
    config: &BuildConfig,
    config_text: &str,
    options: &Options,
    bases: &Bases,
) -> Result<Plan, PlanError> {
    if (config.runtime.is_none() || options.dockerfile.is_some())
        && let Some(found) = custom::find(folder, options)?
    {
        return custom::plan(found, options, config, bases);
    }
    if let Some(target) = &options.target {
        return Err(PlanError::Unsupported {
            file: folder.display().to_owned(),
            line: None,
            what: format!("--target {target} needs a Dockerfile, and there is none"),
            hint: "leave --target out: generated Dockerfiles have one image to build".to_owned(),
        });
    }
    let names = folder.names("")?;
    let request = Request {
        folder,
        names: &names,
        config,
        config_text,
        bases,
    };
    match runtime(&request)? {
        RuntimeKind::Node => node::plan(&request),
        RuntimeKind::Static => files::plan(&request),
        _ => python::plan(&request),
    }
}

/// Files that say "Python" whatever else is there.
const PYTHON: [&str; 9] = [
    "requirements.txt",
    "pyproject.toml",
    "Pipfile",
    "uv.lock",
    "poetry.lock",
    "pdm.lock",
    "Pipfile.lock",
    "setup.py",
    "manage.py",
];

pub(super) fn runtime(request: &Request<'_>) -> Result<RuntimeKind, PlanError> {
    match request.config.runtime.as_deref() {
        Some("node") => return Ok(RuntimeKind::Node),
        Some("python") => return Ok(RuntimeKind::Python),
        Some("static") => return Ok(RuntimeKind::Static),
        Some(other) => {
            return Err(PlanError::Config(BuildConfigError {
                line: request.config_says("runtime").line.unwrap_or(1),
                what: format!("runtime {other:?} is not known; there are node, python and static"),
            }));
        }
        None => {}
    }
    // Python first: Python apps carry a package.json for their assets, Node apps carry no requirements.
    if PYTHON.iter().any(|name| request.has(name)) {
        return Ok(RuntimeKind::Python);
    }
    if request.has("package.json") {
        return Ok(RuntimeKind::Node);
    }
    if let Some(near) = near_miss(request.names) {
        return Err(near);
    }
    if python::SCRIPTS.iter().any(|name| request.has(name)) {
        return Ok(RuntimeKind::Python);
    }
    let meaningful =
        |n: &&Name| !matches!(n.text.as_str(), ".git" | ".gitignore" | ".dockerignore");
    let found: Vec<_> = request.names.iter().filter(meaningful).collect();
    if found.is_empty() {
        return Err(PlanError::Empty {
            dir: request.folder.display().to_owned(),
            hint: None,
        });
    }
    let other = OTHERS
        .iter()
        .any(|(file, _)| found.iter().any(|n| n.text == *file));
    if request.has(files::INDEX) && !other {
        return Ok(RuntimeKind::Static);
    }
    Err(unknown(&found))
}

/// Names that kiln reads, for telling typing errors.
const KNOWN: [&str; 9] = [
    "package.json",
    "requirements.txt",
    "pyproject.toml",
    "Pipfile",
    "Dockerfile",
    "package-lock.json",
    "pnpm-lock.yaml",
    "Procfile",
    "yarn.lock",
];

/// Lockfiles, and the manifest each belongs to.
const BELONGS: [(&str, &str); 8] = [
    ("package-lock.json", "package.json"),
    ("npm-shrinkwrap.json", "package.json"),
    ("pnpm-lock.yaml", "package.json"),
    ("yarn.lock", "package.json"),
    ("Pipfile.lock", "Pipfile"),
    ("uv.lock", "pyproject.toml"),
    ("poetry.lock", "pyproject.toml"),
    ("pdm.lock", "pyproject.toml"),
];

fn near_miss(names: &[Name]) -> Option<PlanError> {
    let has = |name: &str| names.iter().any(|n| n.text == name);
    for name in names.iter().filter(|n| !n.is_folder) {
        let belongs = BELONGS.iter().find(|(lock, _)| name.text == *lock);
        if let Some((lock, manifest)) = belongs
            && !has(manifest)
        {
            return Some(PlanError::NearMiss {
                found: (*lock).to_owned(),
                meant: (*manifest).to_owned(),
                hint: format!("add the {manifest} that {lock} was made from"),
            });
        }
        let meant = KNOWN.iter().find(|known| is_near(&name.text, known));
        if let Some(meant) = meant {
            return Some(PlanError::NearMiss {
                found: name.text.clone(),
                meant: (*meant).to_owned(),
                hint: format!("rename {} to {meant}", name.text),
            });
        }
    }
    None
}

/// Near, but not the same: another case, another common ending, or at most two letters off.
pub(super) fn is_near(name: &str, known: &str) -> bool {
    if name == known {
        return false;
    }
    let (a, b) = (name.to_lowercase(), known.to_lowercase());
    let stem = |text: &str| text.split('.').next().unwrap_or_default().to_owned();
    a == b || (stem(&a) == stem(&b) && a.ends_with(".txt.txt")) || distance(&a, &b) <= 2
}

/// Edits (one letter added, removed, replaced, or two neighbours swapped) between two short names.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 2 || a.len() > 64 {
        return usize::MAX;
    }
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j - 1] + cost)
                .min(rows[i - 1][j] + 1)
                .min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// Manifests of runtimes that need a Dockerfile.
pub(super) const OTHERS: [(&str, &str); 8] = [
    ("go.mod", "Go"),
    ("Cargo.toml", "Rust"),
    ("Gemfile", "Ruby"),
    ("pom.xml", "Java"),
    ("build.gradle", "Java"),
    ("build.gradle.kts", "Java"),
    ("composer.json", "PHP"),
    ("deno.json", "Deno"),
];

/// Files that say how a folder is built.
pub(super) const TELLING: [&str; 7] = [
    "Dockerfile",
    "Containerfile",
    "package.json",
    "requirements.txt",
    "pyproject.toml",
    "Pipfile",
    "setup.py",
];
/// Most subfolders that are looked into for an app.
const SUBFOLDERS_MAX: usize = 200;

/// The error of a folder with no app in it, with the folder nearby that has one.
fn pointed(error: PlanError, dir: &Path, folder: &Folder) -> PlanError {
    let known = |(file, _): &(&str, &str)| folder.has(file);
    match error {
        PlanError::UnknownRuntime { found, hint } if !OTHERS.iter().any(known) => {
            let hint = below(folder).or_else(|| above(dir)).unwrap_or(hint);
            PlanError::UnknownRuntime { found, hint }
        }
        PlanError::Empty { dir: name, .. } => PlanError::Empty {
            dir: name,
            hint: above(dir),
        },
        other => other,
    }
}

/// That subfolders look like apps.
fn below(folder: &Folder) -> Option<String> {
    let names = folder.names("").ok()?;
    let folders = names.iter().filter(|name| {
        name.is_folder && !name.text.starts_with('.') && name.text != "node_modules"
    });
    let app = |name: &Name| {
        let mut files = TELLING.iter().map(|file| format!("{}/{file}", name.text));
        Some((name.text.clone(), files.find(|file| folder.has(file))?))
    };
    let apps: Vec<_> = folders.take(SUBFOLDERS_MAX).filter_map(app).collect();
    match apps.as_slice() {
        [] => None,
        [(name, file)] => Some(format!(
            "the app seems to be in {name} (there is {file}): build that folder, or say so in kiln.toml: [build] subfolder = {name:?}"
        )),
        several => {
            let names: Vec<_> = several
                .iter()
                .take(NAMES_SHOWN_MAX)
                .map(|(name, _)| name.as_str())
                .collect();
            Some(format!(
                "there seem to be apps in {}: build one of these folders, or name it in kiln.toml: [build] subfolder = \"…\"",
                names.join(", ")
            ))
        }
    }
}

/// That the folder around looks like an app; what lies in a folder that everybody writes into means nothing.
fn above(dir: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;
    let around = dir.canonicalize().ok()?.parent()?.to_owned();
    let for_all = around.metadata().ok()?.mode() & 0o002 != 0;
    if for_all {
        return None;
    }
    let file = TELLING
        .iter()
        .find(|file| around.join(file).symlink_metadata().is_ok())?;
    Some(format!(
        "there is a {file} one level up: build {}",
        around.display()
    ))
}

/// Most names that a message lists.
const NAMES_SHOWN_MAX: usize = 8;

fn unknown(found: &[&Name]) -> PlanError {
    let other = OTHERS
        .iter()
        .find(|(file, _)| found.iter().any(|n| n.text == *file));
    let shown: Vec<_> = found
        .iter()
        .take(NAMES_SHOWN_MAX)
        .map(|name| name.text.clone())
        .collect();
    let more = match found.len() > NAMES_SHOWN_MAX {
        true => ", …",
        false => "",
    };
    let folders: Vec<_> = found.iter().filter(|n| n.is_folder).collect();
    let hint = match (other, folders.as_slice()) {
        (Some((file, runtime)), _) => {
            format!("{file} is of a {runtime} project, which needs a Dockerfile: add one")
        }
        (None, [one]) if found.len() <= 2 => format!(
            "if the app is in {}, say so in kiln.toml: [build] subfolder = {:?}",
            one.text, one.text
        ),
        _ => "add a package.json (Node), a requirements.txt or pyproject.toml (Python), or a Dockerfile; an app in a subfolder is named in kiln.toml: [build] subfolder = \"…\"".to_owned(),
    };
    PlanError::UnknownRuntime {
        found: shown.join(", ") + more,
        hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names() {
        for (name, known) in [
            ("requirments.txt", "requirements.txt"),
            ("requirement.txt", "requirements.txt"),
            ("requirements.txt.txt", "requirements.txt"),
            ("Requirements.txt", "requirements.txt"),
            ("pakcage.json", "package.json"),
            ("pipfile", "Pipfile"),
            ("dokcerfile", "Dockerfile"),
        ] {
            assert!(is_near(name, known), "{name}");
        }
        for (name, known) in [
            ("package.json", "package.json"),
            ("README.md", "Pipfile"),
            ("pyproject.lock", "pyproject.toml"),
        ] {
            assert!(!is_near(name, known), "{name}");
        }
    }
}
