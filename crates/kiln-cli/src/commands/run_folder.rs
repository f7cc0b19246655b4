//! Which folder a run works on: the project that somebody stands in, one that they name, or none.

use std::path::{Path, PathBuf};

use kiln_core::job::{RunSource, Source};
use kiln_worker::fleet::local::LocalFolder;

use super::source;
use crate::args::RunArgs;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

/// A folder of this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Folder {
    /// Its top: what is copied.
    pub(super) top: PathBuf,
    /// Where below it the command begins.
    pub(super) inner: String,
}

impl Folder {
    /// As a request names it.
    pub(super) fn request(&self) -> RunSource {
        let path = self.top.shown().to_string();
        RunSource {
            source: Source::Folder { path },
            folder: self.inner.clone(),
        }
    }

    /// As this process has it.
    pub(super) fn local(&self) -> LocalFolder {
        LocalFolder {
            dir: self.top.clone(),
            git: None,
        }
    }
}

/// What a policy says of the folder.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Project<'a> {
    /// Top of the project whose policy was found here.
    pub(super) top: Option<&'a Path>,
    /// The policy that wants nothing copied in.
    pub(super) without: Option<&'a str>,
}

/// The folder of a run.
///
/// # Errors
/// When the folder that was named cannot be looked into, or the policy wants none.
pub(super) fn of(args: &RunArgs, of_policy: Project<'_>) -> Result<Option<Folder>> {
    if let Some(file) = of_policy.without {
        return match &args.source {
            None => Ok(None),
            Some(_) => Err(CliError::usage(format!(
                "--source: {file} wants nothing copied in, and a flag can only narrow a policy"
            ))
            .hint("take the flag away, or let the policy say otherwise")),
        };
    }
    if let Some(dir) = &args.source {
        source::folder(dir)?;
        let top = dir.canonicalize().or_infrastructure()?;
        let inner = String::new();
        return Ok(Some(Folder { top, inner }));
    }
    // An image that is named has its own files.
    if args.no_source || args.image.is_some() {
        return Ok(None);
    }
    let here = std::env::current_dir()
        .and_then(|here| here.canonicalize())
        .map_err(|error| CliError::usage(format!("the current folder cannot be found: {error}")))?;
    project(here, of_policy.top)
}

fn project(here: PathBuf, policy_of: Option<&Path>) -> Result<Option<Folder>> {
    let Some(top) = policy_of else {
        let inner = String::new();
        return Ok(kiln_image::plan::is_project(&here).then_some(Folder { top: here, inner }));
    };
    let top = top.canonicalize().or_infrastructure()?;
    let inner = here.strip_prefix(&top).unwrap_or(Path::new(""));
    let inner = inner
        .to_str()
        .ok_or_else(|| CliError::usage("the name of the current folder is not UTF-8"))?;
    let inner = inner.to_owned();
    Ok(Some(Folder { top, inner }))
}

/// A command that failed may have missed the files that were not copied in.
pub(super) fn hint(args: &RunArgs, screen: Screen) {
    if !args.no_source && args.image.is_none() {
        screen.note("kiln: no file was copied in: this folder has nothing that makes it a project; --source . copies it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_begins_where_one_stands_in_the_project() {
        let dir = tempfile::tempdir().expect("temp dir");
        let top = dir.path().canonicalize().expect("path");
        let below = top.join("web/app");
        std::fs::create_dir_all(&below).expect("folder");
        assert_eq!(project(below.clone(), None).expect("looks"), None);
        let found = project(below.clone(), Some(&top))
            .expect("looks")
            .expect("a project");
        assert_eq!((found.top, found.inner.as_str()), (top.clone(), "web/app"));
        std::fs::write(below.join("package.json"), "{}").expect("write");
        let found = project(below.clone(), None)
            .expect("looks")
            .expect("a project");
        assert_eq!((found.top, found.inner.as_str()), (below, ""));
    }
}
