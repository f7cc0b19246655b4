//! Looking into Python source for the app object, a line at a time. Nothing is run.

use crate::plan::PlanError;
use crate::plan::folder::Folder;

/// Most source files that are looked into.
const FILES_MAX: usize = 200;
/// Names in the order in which they are looked into.
const PREFERRED: [&str; 9] = [
    "wsgi.py",
    "asgi.py",
    "app.py",
    "main.py",
    "application.py",
    "server.py",
    "api.py",
    "run.py",
    "__init__.py",
];
/// Folders that hold no app.
const SKIPPED: [&str; 8] = [
    "tests",
    "test",
    "docs",
    "venv",
    "node_modules",
    "migrations",
    "build",
    "dist",
];

/// An app object or the function that makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// `package.module`.
    pub(super) module: String,
    /// Name of the object or function.
    pub(super) name: String,
    /// It is a function to call.
    pub(super) factory: bool,
    pub(super) file: String,
    pub(super) line: u32,
}

/// Looks for `NAME = CLASS(…)`, else for `def create_app(`, in the root and in packages one and two levels down.
pub(super) fn find_app(folder: &Folder, class: &str) -> Result<Option<Found>, PlanError> {
    let mut factory = None;
    for file in files(folder)? {
        let Some(text) = folder.read(&file)? else {
            continue;
        };
        let found = |name: &str, line: usize, factory: bool| Found {
            module: module(&file),
            name: name.to_owned(),
            factory,
            file: file.clone(),
            line: line as u32 + 1,
        };
        for (index, line) in text.lines().enumerate() {
            if let Some(name) = assigned(line, class) {
                return Ok(Some(found(name, index, false)));
            }
            let def = line
                .strip_prefix("def ")
                .or_else(|| line.strip_prefix("async def "));
            let name = def.and_then(|rest| rest.split('(').next()).map(str::trim);
            if let Some(name @ ("create_app" | "make_app")) = name
                && factory.is_none()
                && text.contains(class)
            {
                factory = Some(found(name, index, true));
            }
        }
    }
    Ok(factory)
}

/// `app = Flask(__name__)`, `app: flask.Flask = flask.Flask(`: the name.
fn assigned<'a>(line: &'a str, class: &str) -> Option<&'a str> {
    let (target, value) = line.split_once('=')?;
    let name = target.split(':').next()?.trim_end();
    let legal = !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let called = value.trim_start().split_once('(')?.0.trim_end();
    let called = called.rsplit('.').next()?;
    (legal && called == class).then_some(name)
}

fn module(file: &str) -> String {
    let path = file.strip_suffix(".py").unwrap_or(file);
    let path = path.strip_suffix("/__init__").unwrap_or(path);
    path.replace('/', ".")
}

/// Source files, likely ones first, the root before packages.
fn files(folder: &Folder) -> Result<Vec<String>, PlanError> {
    let mut found = Vec::new();
    let mut level = vec![String::new()];
    for _ in 0..3 {
        let mut below = Vec::new();
        let mut here = Vec::new();
        for at in &level {
            for name in folder.names(at)? {
                let path = match at.as_str() {
                    "" => name.text.clone(),
                    at => format!("{at}/{}", name.text),
                };
                let identifier =
                    |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
                if name.is_folder {
                    if identifier(&name.text) && !SKIPPED.contains(&name.text.as_str()) {
                        below.push(path);
                    }
                } else if name.text.strip_suffix(".py").is_some_and(identifier) {
                    let rank = PREFERRED.iter().position(|p| *p == name.text);
                    here.push((rank.unwrap_or(PREFERRED.len()), path));
                }
            }
        }
        here.sort();
        found.extend(here.into_iter().map(|(_, path)| path));
        level = below;
        level.truncate(FILES_MAX);
    }
    found.truncate(FILES_MAX);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_objects_are_assignments_at_the_left_edge() {
        for (line, want) in [
            ("app = Flask(__name__)", Some("app")),
            ("api: flask.Flask = flask.Flask(__name__)", Some("api")),
            ("    app = Flask(__name__)", None),
            ("app = MyFlask()", None),
            ("# app = Flask()", None),
            ("app == Flask()", None),
            ("x.app = Flask()", None),
        ] {
            assert_eq!(assigned(line, "Flask"), want, "{line}");
        }
        assert_eq!(module("src/app/__init__.py"), "src.app");
    }
}
