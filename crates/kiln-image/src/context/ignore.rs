//! Which files stay behind: `.dockerignore`, or `.gitignore` where there is neither it nor a Dockerfile. For a run a `.kilnignore` comes
//! before both.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;

use ::ignore::Match;
use ::ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::ContextError;
use super::patterns::Patterns;
use super::read::{open_beneath, read_small};

/// Largest ignore file, bytes.
const IGNORE_BYTES_MAX: u64 = 1024 * 1024;
/// Says what stays behind of a run, as a `.dockerignore` does of a build.
const OF_RUN: &str = ".kilnignore";
/// Version control data is never part of a source.
const NEVER: [&str; 1] = [".git"];

/// Which files decide.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "file")]
pub enum IgnoreSource {
    /// A `.dockerignore`, `<Dockerfile>.dockerignore` or `.kilnignore`: its path inside the folder.
    Dockerignore(String),
    /// The `.gitignore` of every folder.
    Gitignore,
    /// None: everything is sent.
    Nothing,
}

/// The rules for one source folder.
#[derive(Clone, Debug)]
pub struct Ignores {
    source: IgnoreSource,
    docker: Patterns,
    extra: Patterns,
    /// Files that are sent whatever the rules say.
    kept: BTreeSet<String>,
}

impl Ignores {
    /// No rules but the one about `.git`.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            source: IgnoreSource::Nothing,
            docker: Patterns::default(),
            extra: Patterns::default(),
            kept: BTreeSet::new(),
        }
    }

    /// Finds the rules of a folder. `dockerfile` is the user's own Dockerfile inside the folder, if one is used.
    /// `extra` patterns hold besides and are never taken back.
    ///
    /// # Errors
    /// When an ignore file cannot be read or is wrong.
    pub fn of_folder(
        root: BorrowedFd<'_>,
        dockerfile: Option<&str>,
        extra: &[&str],
    ) -> Result<Self, ContextError> {
        let mut rules = Self::nothing();
        for pattern in extra {
            rules
                .extra
                .add(pattern)
                .map_err(|source| ContextError::Ignore {
                    file: "kiln's own patterns".to_owned(),
                    line: 1,
                    source,
                })?;
        }
        // A Dockerfile from elsewhere counts as one, and has no ignore file in the folder.
        let inside = dockerfile.filter(|path| {
            !path.starts_with('/') && !path.split('/').any(|name| matches!(name, ".." | "" | "-"))
        });
        let own = inside.map(|path| format!("{path}.dockerignore"));
        let otherwise = match dockerfile {
            None => IgnoreSource::Gitignore,
            Some(_) => IgnoreSource::Nothing,
        };
        rules.first_of(
            root,
            own.into_iter().chain([".dockerignore".to_owned()]),
            otherwise,
        )
    }

    /// Finds the rules of a folder for a run: its `.kilnignore`, else its `.dockerignore`, else the `.gitignore`s, whatever is built of it.
    ///
    /// # Errors
    /// When an ignore file cannot be read or is wrong.
    pub fn of_run(root: BorrowedFd<'_>) -> Result<Self, ContextError> {
        let files = [OF_RUN, ".dockerignore"].map(str::to_owned);
        Self::nothing().first_of(root, files, IgnoreSource::Gitignore)
    }

    fn first_of(
        mut self,
        root: BorrowedFd<'_>,
        files: impl IntoIterator<Item = String>,
        otherwise: IgnoreSource,
    ) -> Result<Self, ContextError> {
        self.source = otherwise;
        for file in files {
            let Some(text) = ignore_file(root, &file)? else {
                continue;
            };
            self.docker = Patterns::parse(&text).map_err(|(line, source)| {
                let file = file.clone();
                ContextError::Ignore { file, line, source }
            })?;
            self.source = IgnoreSource::Dockerignore(file);
            break;
        }
        Ok(self)
    }

    /// Sends these files (paths inside the folder) whatever the rules say; version control data excepted.
    pub(super) fn keep(&mut self, paths: impl IntoIterator<Item = String>) {
        self.kept.extend(paths);
    }

    fn leads_to_kept(&self, folder: &str) -> bool {
        let below = format!("{folder}/");
        let next = self.kept.range(below.clone()..).next();
        next.is_some_and(|path| path.starts_with(&below))
    }

    /// Which files decide.
    #[must_use]
    pub fn source(&self) -> &IgnoreSource {
        &self.source
    }

    /// The `.gitignore` of one folder (relative path, empty for the root), where those count.
    pub(super) fn of_subfolder(
        &self,
        root: BorrowedFd<'_>,
        folder: &str,
    ) -> Result<Option<Gitignore>, ContextError> {
        if self.source != IgnoreSource::Gitignore {
            return Ok(None);
        }
        let file = join(folder, ".gitignore");
        let Some(text) = ignore_file(root, &file)? else {
            return Ok(None);
        };
        let mut builder = GitignoreBuilder::new(format!("/{folder}"));
        for line in text.lines() {
            // git itself skips lines it cannot read as a pattern.
            let _ = builder.add_line(None, line);
        }
        Ok(builder.build().ok())
    }

    /// Whether `path` stays behind. `git` are the `.gitignore`s from the root down to its folder.
    pub(super) fn verdict(&self, path: &str, is_folder: bool, git: &[&Gitignore]) -> Verdict {
        let name = path.rsplit('/').next().unwrap_or(path);
        if NEVER.contains(&name) {
            return Verdict::Skip;
        }
        if !is_folder && self.kept.contains(path) {
            return Verdict::Send;
        }
        match self.by_rules(path, is_folder, git) {
            Verdict::Skip if is_folder && self.leads_to_kept(path) => Verdict::Enter,
            verdict => verdict,
        }
    }

    fn by_rules(&self, path: &str, is_folder: bool, git: &[&Gitignore]) -> Verdict {
        if self.extra.is_ignored(path) {
            return Verdict::Skip;
        }
        let rooted = format!("/{path}");
        for rules in git.iter().rev() {
            match rules.matched(&rooted, is_folder) {
                Match::Ignore(_) => return Verdict::Skip,
                Match::Whitelist(_) => return Verdict::Send,
                Match::None => {}
            }
        }
        if !self.docker.is_ignored(path) {
            return Verdict::Send;
        }
        match is_folder && self.docker.take_back() {
            true => Verdict::Enter,
            false => Verdict::Skip,
        }
    }
}

/// What becomes of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Send,
    /// An ignored folder that may hold entries that are not.
    Enter,
    Skip,
}

/// `folder/name`, or `name` in the root.
pub(super) fn join(folder: &str, name: &str) -> String {
    match folder {
        "" => name.to_owned(),
        folder => format!("{folder}/{name}"),
    }
}

fn ignore_file(root: BorrowedFd<'_>, file: &str) -> Result<Option<String>, ContextError> {
    let error = |source| ContextError::Read {
        path: file.to_owned(),
        source,
    };
    let opened = match open_beneath(root, file.as_bytes(), false) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(error)?,
    };
    let bytes = read_small(opened, IGNORE_BYTES_MAX)
        .map_err(error)?
        .ok_or_else(|| ContextError::IgnoreSize {
            file: file.to_owned(),
            max: IGNORE_BYTES_MAX,
        })?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
