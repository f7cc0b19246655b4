//! Which base fits a folder's commands: its runtime and version, whether or not an image could be built of it.

use std::path::Path;

use kiln_core::ImageRef;

use super::PlanError;
use super::detect::{OTHERS, Request, TELLING, runtime};
use super::folder::Folder;
use super::types::RuntimeKind;
use super::version::choose;
use super::{node, python};
use crate::bases::{BaseKind, Bases};
use crate::build_config::{BUILD_CONFIG_FILE, BuildConfig};

/// What a folder's commands run in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Suited {
    /// The build image of a base: package manager and compilers are in it. Without a digest it is not baked yet.
    Base {
        /// The base, for people: `node 20`.
        name: String,
        /// Its image.
        image: ImageRef,
    },
    /// The folder is of a runtime that kiln has no base for.
    None {
        /// File that says so.
        file: &'static str,
        /// The runtime, for people.
        runtime: &'static str,
    },
    /// Nothing in the folder names a runtime.
    Any,
}

/// Files that make a folder a project besides those of its runtime.
const MARKS: [&str; 4] = [BUILD_CONFIG_FILE, "Makefile", "justfile", ".kilnignore"];

/// Whether a folder is the top of a project: it has a runtime's files, a policy, a Dockerfile, a Makefile or a repository in it.
#[must_use]
pub fn is_project(dir: &Path) -> bool {
    let here = |name: &&str| dir.join(name).symlink_metadata().is_ok();
    let others = OTHERS.iter().map(|(file, _)| file);
    TELLING.iter().chain(others).chain(&MARKS).any(here) || here(&".git")
}

/// Finds the base for the commands of a folder.
///
/// # Errors
/// When a manifest is broken, or asks for a version of which there is no base.
pub fn suited(dir: &Path, bases: &Bases) -> Result<Suited, PlanError> {
    let outer = Folder::open(dir)?;
    let config_text = outer.read(BUILD_CONFIG_FILE)?.unwrap_or_default();
    let config = BuildConfig::parse(&config_text)?;
    let inner = match &config.subfolder {
        Some(sub) if outer.has_folder(sub) => Some(outer.sub(sub)?),
        _ => None,
    };
    let folder = inner.as_ref().unwrap_or(&outer);
    let names = folder.names("")?;
    let request = Request {
        folder,
        names: &names,
        config: &config,
        config_text: &config_text,
        bases,
    };
    let kind = match runtime(&request) {
        Ok(kind) => kind,
        Err(error @ PlanError::Config(_)) => return Err(error),
        Err(_) => return Ok(other(&request)),
    };
    let wanted = match kind {
        RuntimeKind::Node => node::wanted_here(&request)?,
        RuntimeKind::Python => python::wanted_here(&request)?,
        RuntimeKind::Static | RuntimeKind::Dockerfile => return Ok(Suited::Any),
    };
    let (base, version) = choose(kind, wanted, bases, &mut Vec::new())?;
    Ok(Suited::Base {
        name: format!("{} {}", kind.name(), version.version),
        image: base.image(BaseKind::Build).clone(),
    })
}

fn other(request: &Request<'_>) -> Suited {
    let found = OTHERS.iter().find(|(file, _)| request.has(file));
    found.map_or(Suited::Any, |(file, runtime)| Suited::None {
        file,
        runtime,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Result<Suited, PlanError> {
        let dir = tempfile::tempdir().expect("temp dir");
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).expect("write");
        }
        suited(dir.path(), &Bases::builtin())
    }

    fn name(found: Result<Suited, PlanError>) -> String {
        match found.expect("fits") {
            Suited::Base { name, .. } => name,
            Suited::None { runtime, .. } => format!("no {runtime}"),
            Suited::Any => "any".to_owned(),
        }
    }

    #[test]
    fn a_folder_that_cannot_be_built_has_a_base_all_the_same() {
        let package = (
            "package.json",
            r#"{"scripts": {"test": "node --test"}, "dependencies": {"a": "1"}}"#,
        );
        assert_eq!(name(of(&[package])), "node 20", "no lockfile");
        assert_eq!(name(of(&[package, ("Dockerfile", "FROM x")])), "node 20");
        let locks = [("pyproject.toml", ""), ("uv.lock", ""), ("poetry.lock", "")];
        assert_eq!(name(of(&locks)), "python 3.13", "two lockfiles");
        assert_eq!(name(of(&[("go.mod", "module a")])), "no Go");
        assert_eq!(name(of(&[("README", "")])), "any");
        assert_eq!(name(of(&[])), "any");
    }

    #[test]
    fn a_version_of_which_there_is_no_base_is_an_error() {
        let package = ("package.json", r#"{"engines": {"node": ">=99"}}"#);
        assert!(matches!(of(&[package]), Err(PlanError::Version { .. })));
        assert!(of(&[("package.json", "{")]).is_err());
    }

    #[test]
    fn a_project_is_known_by_its_files() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("notes.txt"), "").expect("write");
        assert!(!is_project(dir.path()));
        std::fs::create_dir(dir.path().join(".git")).expect("folder");
        assert!(is_project(dir.path()));
    }
}
