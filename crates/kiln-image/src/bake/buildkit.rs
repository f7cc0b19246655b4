//! Builds BuildKit's programs from a pinned Go module; go.sum is the integrity check.
//!
//! Go's own settings of the host (proxy, checksum database, private modules) are used as they are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{Program, RunContext, RunError};
use super::recipe::{BuildkitRecipe, RecipeError, RecipeFiles};

/// How long a build from an empty module cache may take.
const DEADLINE: Duration = Duration::from_secs(20 * 60);
/// The module whose version is BuildKit's version.
const MODULE: &str = "github.com/moby/buildkit";

/// Why BuildKit was not built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildkitError {
    /// The recipe is incomplete.
    #[error("cannot read the module of BuildKit")]
    Recipe(#[source] RecipeError),
    /// go.mod does not require BuildKit.
    #[error("go.mod of the recipe does not require {MODULE}")]
    NoVersion,
    /// The Go tool failed.
    #[error("cannot build BuildKit")]
    Run(#[source] RunError),
    /// A file operation failed.
    #[error("cannot write {}", .path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// BuildKit's version as go.mod pins it, such as `v0.33.1`.
///
/// # Errors
/// When go.mod has none.
pub fn version(recipe: &BuildkitRecipe, files: &RecipeFiles) -> Result<String, BuildkitError> {
    let text = files
        .get(&recipe.path("go.mod"))
        .map_err(BuildkitError::Recipe)?;
    let text = String::from_utf8_lossy(text);
    let found = text.lines().find_map(|line| {
        let line = line.trim().trim_start_matches("require ");
        line.strip_prefix(MODULE)?
            .strip_prefix(' ')?
            .split_whitespace()
            .next()
            .map(str::to_owned)
    });
    found.ok_or(BuildkitError::NoVersion)
}

/// Builds the programs into `<work>/bin`.
///
/// # Errors
/// See [`BuildkitError`].
pub fn build(
    recipe: &BuildkitRecipe,
    files: &RecipeFiles,
    work: &Path,
    context: &RunContext<'_>,
) -> Result<(), BuildkitError> {
    let module = work.join("module");
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| BuildkitError::Io { path, source }
    };
    fs::create_dir(&module).map_err(io_error(&module))?;
    for name in recipe.files() {
        let content = files
            .get(&recipe.path(name))
            .map_err(BuildkitError::Recipe)?;
        let path = module.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&module)).map_err(io_error(&path))?;
        fs::write(&path, content).map_err(io_error(&path))?;
    }
    let bin = work.join("bin");
    fs::create_dir(&bin).map_err(io_error(&bin))?;
    let flags = format!(
        "-s -w -X {MODULE}/version.Version={}",
        version(recipe, files)?
    );
    Program::new("go", DEADLINE)
        .env("CGO_ENABLED", "0")
        .env("GOTOOLCHAIN", "auto")
        .env("GOOS", "linux")
        .env("GOARCH", "amd64")
        .env("GOWORK", "off")
        .args([
            "build",
            "-trimpath",
            "-mod=readonly",
            "-buildvcs=false",
            "-ldflags",
            &flags,
            "-o",
        ])
        .arg(&bin)
        .args(&recipe.packages)
        .directory(&module)
        .run(context)
        .map_err(BuildkitError::Run)?;
    fs::remove_dir_all(&module).map_err(io_error(&module))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_go_mod_pins() {
        let files = RecipeFiles::built_in();
        let recipe = files.image().expect("a recipe").buildkit;
        let version = version(&recipe, &files).expect("pinned");
        assert!(version.starts_with("v0."), "{version}");
    }
}
