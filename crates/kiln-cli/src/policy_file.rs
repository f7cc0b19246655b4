//! The policy of a folder and the operator's grants, found and read once.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_core::{FailureClass, TenantName};
use kiln_policy::{
    Choice, Compiled, Diagnostics, Effective, FILE_BYTES_MAX, Format, GRANT_BYTES_MAX, GRANT_FILE,
    Grants, NotGranted, choose, compile, effective,
};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::error::{CliError, Result};
use crate::show::{ShownPath as _, printable};

/// Folders above the current one that are looked through for a policy.
const PARENTS_MAX: usize = 64;

/// A policy that was read.
#[derive(Debug)]
pub(crate) struct Found {
    /// Where it lies.
    pub path: PathBuf,
    /// What it means.
    pub compiled: Compiled,
    /// Its text, as it was compiled.
    pub text: String,
    /// What a person should know.
    pub notes: Vec<String>,
    /// How long it took to find and compile it.
    pub took: Duration,
}

/// Looks for a policy, and counts the time.
///
/// # Errors
/// As `look`.
pub(crate) fn timed(look: impl FnOnce() -> Result<Option<Found>>) -> Result<Option<Found>> {
    let since = Instant::now();
    let found = look()?;
    Ok(found.map(|found| Found {
        took: since.elapsed(),
        ..found
    }))
}

impl Found {
    /// Whether it names files that are kept.
    pub(crate) fn keeps(&self) -> bool {
        !self.compiled.policy().artifacts.is_empty()
    }

    /// The folder that the policy is of.
    pub(crate) fn top(&self) -> Option<PathBuf> {
        let dir = self.path.parent()?;
        // A policy of a CI's own folder is the project's.
        let top = match dir.file_name().is_some_and(|name| name == ".buildkite") {
            true => dir.parent()?,
            false => dir,
        };
        Some(top.to_owned())
    }
}

/// Reads the policy that `at` is, or that lies in the folder `at`.
///
/// # Errors
/// When there is none, two, or one that is not legal: then with every line that is wrong.
pub(crate) fn read(at: &Path) -> Result<Found> {
    match at.is_dir() {
        false => {
            let text = bounded(at, FILE_BYTES_MAX)?;
            let format = Format::of_name(&at.to_string_lossy());
            compiled(at.to_owned(), text, format, Vec::new())
        }
        true => in_folder(at)?.ok_or_else(|| {
            CliError::usage(format!("there is no policy in {}", at.shown()))
                .hint("`kiln init` writes a kiln.yaml")
        }),
    }
}

/// Reads the policy that `at` is, or that holds in the folder `at`: that of a folder above it, too, as [`of_folder`] looks.
///
/// # Errors
/// As [`read`].
pub(crate) fn holding(at: &Path) -> Result<Found> {
    if !at.is_dir() {
        return read(at);
    }
    // As it was named, where it lies there: a path that a person knows.
    if let Some(found) = in_folder(at)? {
        return Ok(found);
    }
    of_folder(at)?.ok_or_else(|| {
        CliError::usage(format!(
            "there is no policy in {}, nor above it in the same git repository",
            at.shown()
        ))
        .hint("`kiln init` writes a kiln.yaml")
    })
}

/// The file above this folder that holds in it, if there is one; it is not read.
///
/// # Errors
/// When a folder above has two, or one whose name is nearly right.
pub(crate) fn above(dir: &Path) -> Result<Option<PathBuf>> {
    for dir in up_to_the_top(dir)?.iter().skip(1) {
        if let Some(choice) = chosen(dir)? {
            return Ok(Some(dir.join(choice.name)));
        }
    }
    Ok(None)
}

/// The policy of the folder, if it has one.
fn in_folder(dir: &Path) -> Result<Option<Found>> {
    let Some(choice) = chosen(dir)? else {
        return Ok(None);
    };
    let unread = choice
        .unread
        .map(|name| format!("{name} is not read: {} holds", choice.name));
    let notes = unread.into_iter().collect();
    let text = text_in(dir, choice.name)?;
    compiled(dir.join(choice.name), text, choice.format, notes).map(Some)
}

/// Which file of the folder is its policy.
fn chosen(dir: &Path) -> Result<Option<Choice>> {
    // A name that cannot be looked at is there: it is not to be passed over.
    let exists = |name: &str| match dir.join(name).symlink_metadata() {
        Ok(_) => true,
        Err(error) => !matches!(
            error.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
        ),
    };
    choose(exists).map_err(|error| {
        CliError::usage(format!("{}: {error}", dir.shown()))
            .hint("keep one policy, called kiln.yaml or cleanroom.yaml")
    })
}

/// The text of a policy that lies in a folder. The folder may be anybody's: a link in it would have this command read, and show lines of, a
/// file that whoever made the folder cannot read. So none is followed.
fn text_in(dir: &Path, name: &str) -> Result<String> {
    let path = dir.join(name);
    let usage = |why: &str| CliError::usage(format!("{}: {why}", path.shown()));
    let opened = |error: Errno| match error {
        Errno::LOOP | Errno::NOTDIR => {
            usage("it is a symbolic link, and those of a folder are not followed")
                .hint("put the policy itself there, or name it with --policy FILE")
        }
        error => usage(&std::io::Error::from(error).to_string()),
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut at = File::open(dir).map_err(|error| usage(&error.to_string()))?;
    let mut parts = name.split('/').peekable();
    while let Some(part) = parts.next() {
        let kind = match parts.peek() {
            Some(_) => OFlags::DIRECTORY,
            None => OFlags::empty(),
        };
        at = openat(&at, part, flags | kind, Mode::empty())
            .map_err(opened)?
            .into();
    }
    let meta = at.metadata().map_err(|error| usage(&error.to_string()))?;
    if !meta.is_file() {
        return Err(usage("it is not a file"));
    }
    whole(&path, at, FILE_BYTES_MAX)
}

/// The policy of the current folder, as [`of_folder`].
///
/// # Errors
/// As [`read`].
pub(crate) fn of_here() -> Result<Option<Found>> {
    let here = std::env::current_dir()
        .map_err(|error| CliError::usage(format!("the current folder cannot be found: {error}")))?;
    of_folder(&here)
}

/// The policy of a folder; inside a git repository also of the folders above it, up to the repository's own.
///
/// # Errors
/// As [`read`].
pub(crate) fn of_folder(dir: &Path) -> Result<Option<Found>> {
    for dir in &up_to_the_top(dir)? {
        if let Some(found) = in_folder(dir)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The folder and, inside a git repository, those above it up to the repository's own.
fn up_to_the_top(dir: &Path) -> Result<Vec<PathBuf>> {
    let here = dir
        .canonicalize()
        .map_err(|error| CliError::usage(format!("{} cannot be found: {error}", dir.shown())))?;
    let mut dirs: Vec<PathBuf> = here
        .ancestors()
        .take(PARENTS_MAX)
        .map(Path::to_owned)
        .collect();
    let top = dirs
        .iter()
        .position(|dir| dir.join(".git").exists())
        .unwrap_or(0);
    dirs.truncate(top + 1);
    Ok(dirs)
}

fn compiled(path: PathBuf, text: String, format: Format, notes: Vec<String>) -> Result<Found> {
    let name = path
        .strip_prefix("./")
        .unwrap_or(&path)
        .display()
        .to_string();
    let name = short(&name);
    let compiled = compile(format, &name, &text).map_err(|wrong| refused(&wrong))?;
    Ok(Found {
        path,
        compiled,
        text,
        notes,
        took: Duration::ZERO,
    })
}

/// A path as messages show it: below the current folder when it is.
fn short(name: &str) -> String {
    let here = std::env::current_dir().ok();
    let below = here.and_then(|here| {
        Path::new(name)
            .strip_prefix(&here)
            .ok()
            .map(|path| path.display().to_string())
    });
    below.unwrap_or_else(|| name.to_owned())
}

/// The text of a policy file. A link is followed where a person named the file, and not where it was found in a folder.
///
/// # Errors
/// When it cannot be read, or is too large.
pub(crate) fn text(path: &Path, named: bool) -> Result<String> {
    let parts = (
        path.parent(),
        path.file_name().and_then(|name| name.to_str()),
    );
    match parts {
        (Some(dir), Some(name)) if !named => text_in(
            match dir.as_os_str().is_empty() {
                true => Path::new("."),
                false => dir,
            },
            name,
        ),
        _ => bounded(path, FILE_BYTES_MAX),
    }
}

/// A text file of at most so many bytes. Devices and pipes are none.
fn bounded(path: &Path, bytes_max: usize) -> Result<String> {
    let usage = |why: String| CliError::usage(format!("{}: {why}", path.shown()));
    let meta = std::fs::metadata(path).map_err(|error| usage(error.to_string()))?;
    if !meta.is_file() {
        return Err(usage("it is not a file".to_owned()));
    }
    let file = File::open(path).map_err(|error| usage(error.to_string()))?;
    whole(path, file, bytes_max)
}

fn whole(path: &Path, file: File, bytes_max: usize) -> Result<String> {
    let usage = |why: String| CliError::usage(format!("{}: {why}", path.shown()));
    let mut bytes = Vec::new();
    file.take(bytes_max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| usage(error.to_string()))?;
    if bytes.len() > bytes_max {
        return Err(usage(format!("it has more than {bytes_max} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| usage("it is not UTF-8 text".to_owned()))
}

/// A file that cannot be used, with every line that is wrong.
pub(crate) fn refused(wrong: &Diagnostics) -> CliError {
    let count = wrong.list.len();
    let what = match (count, wrong.more) {
        (1, _) => "one thing is wrong".to_owned(),
        (count, false) => format!("{count} things are wrong"),
        (count, true) => format!("more than {count} things are wrong"),
    };
    CliError::usage(format!(
        "{what} in {}\n\n{}",
        wrong.file,
        wrong.to_string().trim_end()
    ))
}

/// The operator's grants: `policy.toml` in the configuration directory.
///
/// # Errors
/// When it is there and cannot be used.
pub(crate) fn grants(config: &Path) -> Result<Grants> {
    let path = config.join(GRANT_FILE);
    match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Grants::default()),
        _ => {}
    }
    let text = bounded(&path, GRANT_BYTES_MAX)?;
    Grants::parse(&path.display().to_string(), &text).map_err(|wrong| refused(&wrong))
}

/// What holds of a policy on this host.
///
/// # Errors
/// Policy, with everything that is asked for and not granted.
pub(crate) fn holds(compiled: &Compiled, grants: &Grants) -> Result<Effective> {
    effective(compiled, grants, &TenantName::local()).map_err(|refused| not_granted(&refused))
}

/// Everything that is asked for and not given, each with its line and what to do.
pub(crate) fn not_granted(refused: &[NotGranted]) -> CliError {
    let lines: Vec<String> = refused
        .iter()
        .map(|one| printable(&one.to_string()))
        .collect();
    let error = CliError::new(FailureClass::Policy, lines.join("\n"));
    refused
        .iter()
        .fold(error, |error, one| error.hint(one.hint.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_link_of_a_folder_is_followed() {
        let outer = tempfile::tempdir().expect("temp dir");
        let token = outer.path().join("token");
        std::fs::write(&token, "hunter2: [\n").expect("written");
        let refused = |dir: &Path| {
            for error in [
                read(dir).expect_err("refused"),
                of_folder(dir).expect_err("refused"),
            ] {
                assert!(error.message.contains("symbolic link"), "{error:?}");
                assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
            }
        };
        for name in ["kiln.yaml", "cleanroom.yaml"] {
            let dir = tempfile::tempdir_in(&outer).expect("temp dir");
            std::os::unix::fs::symlink(&token, dir.path().join(name)).expect("link");
            refused(dir.path());
            // Who names a file, names it.
            let error = read(&dir.path().join(name)).expect_err("not legal");
            assert!(error.message.contains("hunter2"), "{error:?}");
        }
        let dir = tempfile::tempdir_in(&outer).expect("temp dir");
        let elsewhere = tempfile::tempdir_in(&outer).expect("temp dir");
        std::fs::copy(&token, elsewhere.path().join("cleanroom.yaml")).expect("written");
        std::os::unix::fs::symlink(&elsewhere, dir.path().join(".buildkite")).expect("link");
        refused(dir.path());
    }

    #[test]
    fn what_is_checked_is_what_a_run_would_find() {
        let outer = tempfile::tempdir().expect("temp dir");
        let top = outer.path().canonicalize().expect("path");
        let web = top.join("web/app");
        std::fs::create_dir_all(&web).expect("folder");
        std::fs::write(top.join("kiln.yaml"), "version: 1\nimage: node\n").expect("written");
        // Without a repository nothing above counts.
        assert!(holding(&web).is_err() && above(&web).expect("looks").is_none());
        std::fs::create_dir(top.join(".git")).expect("folder");
        let found = holding(&web).expect("found");
        assert_eq!(found.path, top.join("kiln.yaml"));
        let runs = of_folder(&web).expect("looks").expect("found");
        assert_eq!(found.path, runs.path);
        assert_eq!(above(&web).expect("looks"), Some(top.join("kiln.yaml")));
        assert_eq!(above(&top).expect("looks"), None, "it is its own");
        std::fs::write(web.join("kiln.yaml"), "version: 1\n").expect("written");
        assert_eq!(holding(&web).expect("found").path, web.join("kiln.yaml"));
    }
}
