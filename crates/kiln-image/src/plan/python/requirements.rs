//! `requirements.txt`, and the files it includes.
//!
//! Format: pip's "Requirements File Format". Only names, pins and paths are read.

use std::collections::BTreeMap;

use crate::plan::PlanError;
use crate::plan::folder::Folder;

/// Most files that include one another.
const FILES_MAX: usize = 50;
/// Most unpinned names that are kept for messages.
const UNPINNED_MAX: usize = 8;

/// What requirements files say.
#[derive(Debug, Default)]
pub(super) struct Requirements {
    /// Every file, the first one first.
    pub(super) files: Vec<String>,
    /// Normalised names: (file, line).
    pub(super) packages: BTreeMap<String, (String, u32)>,
    /// Names without an exact version: (name, file, line).
    pub(super) unpinned: Vec<(String, String, u32)>,
    /// A requirement that is a path inside the folder: (file, line).
    pub(super) local: Option<(String, u32)>,
}

impl Requirements {
    /// Reads `first` and what it includes; `None` when it is not there.
    pub(super) fn read(folder: &Folder, first: &str) -> Result<Option<Self>, PlanError> {
        if !folder.has(first) {
            return Ok(None);
        }
        let mut all = Self::default();
        let mut queue = vec![(first.to_owned(), None)];
        while let Some((file, from)) = queue.pop() {
            if all.files.contains(&file) {
                continue;
            }
            let Some(text) = folder.read(&file)? else {
                let (from, line): (String, u32) = from.unwrap_or_default();
                return Err(PlanError::Broken {
                    file: from,
                    line: Some(line),
                    what: format!("includes {file}, which is not there"),
                });
            };
            all.files.push(file.clone());
            if all.files.len() > FILES_MAX {
                return Err(PlanError::Broken {
                    file: first.to_owned(),
                    line: None,
                    what: format!("more than {FILES_MAX} files include one another"),
                });
            }
            all.file(&file, &text, &mut queue)?;
        }
        Ok(Some(all))
    }

    fn file(
        &mut self,
        file: &str,
        text: &str,
        queue: &mut Vec<(String, Option<(String, u32)>)>,
    ) -> Result<(), PlanError> {
        let mut continued = String::new();
        for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let number = index as u32 + 1;
            let line = match line.find(" #") {
                Some(at) => &line[..at],
                None => line,
            };
            if let Some(more) = line.strip_suffix('\\') {
                continued.push_str(more);
                continued.push(' ');
                continue;
            }
            continued.push_str(line);
            let whole = std::mem::take(&mut continued);
            let whole = whole.trim();
            if whole.is_empty() || whole.starts_with('#') {
                continue;
            }
            if let Some(included) = included(whole) {
                let path = beside(file, included).ok_or_else(|| PlanError::Broken {
                    file: file.to_owned(),
                    line: Some(number),
                    what: format!("includes {included:?}, which is outside the folder"),
                })?;
                queue.push((path, Some((file.to_owned(), number))));
                continue;
            }
            self.requirement(whole, file, number);
        }
        Ok(())
    }

    fn requirement(&mut self, line: &str, file: &str, number: u32) {
        let editable = ["-e", "--editable"]
            .iter()
            .find_map(|flag| line.strip_prefix(flag))
            .map(|rest| rest.trim_start_matches(['=', ' ']));
        let what = editable.unwrap_or(line);
        let is_path = what.starts_with('.') || what.starts_with('/') || what.starts_with("file:");
        if is_path || (editable.is_some() && !what.contains("://")) {
            self.local.get_or_insert((file.to_owned(), number));
            return;
        }
        if what.starts_with('-') {
            return;
        }
        let Some(name) = name_of(what) else {
            return;
        };
        let pinned = what.contains("==") || what.contains(" @ ") || what.contains("===");
        if !pinned && self.unpinned.len() < UNPINNED_MAX {
            self.unpinned.push((name.clone(), file.to_owned(), number));
        }
        self.packages
            .entry(name)
            .or_insert((file.to_owned(), number));
    }
}

/// The file behind `-r` or `-c`.
fn included(line: &str) -> Option<&str> {
    for flag in ["-r", "--requirement", "-c", "--constraint"] {
        if let Some(rest) = line.strip_prefix(flag)
            && rest.starts_with([' ', '\t', '='])
        {
            return Some(rest.trim_start_matches(['=', ' ', '\t']).trim());
        }
    }
    line.strip_prefix("-r")
        .filter(|rest| !rest.starts_with('-'))
}

/// A path next to `file`, cleaned; `None` when it leaves the folder.
fn beside(file: &str, path: &str) -> Option<String> {
    if path.starts_with('/') || path.contains("://") {
        return None;
    }
    let mut names: Vec<&str> = file.split('/').collect();
    names.pop();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop()?;
            }
            name => names.push(name),
        }
    }
    Some(names.join("/"))
}

/// The normalised name at the front of a requirement (PEP 503, PEP 508); extras are kept apart by callers.
pub(super) fn name_of(requirement: &str) -> Option<String> {
    let text = requirement.trim();
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c))
        .unwrap_or(text.len());
    let name = &text[..end];
    let legal = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    legal.then(|| normal(name))
}

/// PEP 503: lower case, runs of `-`, `_` and `.` are one `-`.
pub(super) fn normal(name: &str) -> String {
    let lower = name.to_ascii_lowercase();
    let words: Vec<_> = lower
        .split(['-', '_', '.'])
        .filter(|w| !w.is_empty())
        .collect();
    words.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_pip_reads_them() {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("folders");
            std::fs::write(path, text).expect("writes");
        };
        write(
            "requirements.txt",
            "# all\n-r req/base.txt\n--index-url https://x.example/simple\nFlask_Login[x] >= 2 ; python_version > '3' # why\nx==1 \\\n  --hash=sha256:aa\n",
        );
        write(
            "req/base.txt",
            "-c ../constraints.txt\nDjango==5.0\n-e ./lib\nzope.interface @ https://x.example/z.whl\n",
        );
        write("constraints.txt", "a==1\n");
        let folder = Folder::open(dir.path()).expect("a folder");
        let found = Requirements::read(&folder, "requirements.txt").expect("reads");
        let found = found.expect("is there");
        assert_eq!(
            found.files,
            ["requirements.txt", "req/base.txt", "constraints.txt"]
        );
        let names: Vec<_> = found.packages.keys().map(String::as_str).collect();
        assert_eq!(names, ["a", "django", "flask-login", "x", "zope-interface"]);
        let unpinned = ("flask-login".to_owned(), "requirements.txt".to_owned(), 4);
        assert_eq!(found.unpinned, [unpinned]);
        assert_eq!(found.local, Some(("req/base.txt".to_owned(), 3)));
        write("requirements.txt", "-r ../up.txt\n");
        assert!(Requirements::read(&folder, "requirements.txt").is_err());
        write("requirements.txt", "\n-r gone.txt\n");
        let error = Requirements::read(&folder, "requirements.txt").expect_err("gone");
        assert!(matches!(error, PlanError::Broken { line: Some(2), .. }));
    }
}
