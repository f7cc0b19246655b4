//! What the files of a Python folder say: who manages packages, which ones, which Python.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::requirements::{Requirements, name_of, normal};
use crate::bases::line_of;
use crate::plan::PlanError;
use crate::plan::detect::Request;
use crate::plan::folder::LOCKFILE_BYTES_MAX;
use crate::plan::locate::toml_line;
use crate::plan::ranges::Ranges;
use crate::plan::types::Evidence;
use crate::plan::version::Wanted;

const PYPROJECT: &str = "pyproject.toml";
const PIPFILE: &str = "Pipfile";
const REQUIREMENTS: &str = "requirements.txt";

/// Who installs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Pip,
    Uv,
    Poetry,
    Pdm,
    Pipenv,
    /// Nothing to install.
    Nothing,
}

/// Lockfile, its manager, its manifest, and the command that makes it.
const LOCKS: [(&str, Kind, &str, &str); 4] = [
    ("uv.lock", Kind::Uv, PYPROJECT, "uv lock"),
    ("poetry.lock", Kind::Poetry, PYPROJECT, "poetry lock"),
    ("pdm.lock", Kind::Pdm, PYPROJECT, "pdm lock"),
    ("Pipfile.lock", Kind::Pipenv, PIPFILE, "pipenv lock"),
];

/// A Python project.
#[derive(Debug)]
pub(super) struct Project {
    pub(super) kind: Kind,
    pub(super) why: Evidence,
    /// Files that the install step reads, in the root.
    pub(super) inputs: Vec<String>,
    /// Requirements files, for pip.
    pub(super) requirement_files: Vec<String>,
    /// A requirement is a path in the folder: the source must be there before the install.
    pub(super) needs_source: bool,
    /// The project itself is installed (`[build-system]`).
    pub(super) is_package: bool,
    /// Packages that the manifests name: (file, line).
    declared: BTreeMap<String, (String, Option<u32>)>,
    /// Packages that the lockfile names.
    locked: BTreeSet<String>,
    pyproject: Option<(String, Table)>,
    pipfile: Option<(String, Table)>,
}

impl Project {
    pub(super) fn read(
        request: &Request<'_>,
        notes: &mut Vec<Evidence>,
    ) -> Result<Self, PlanError> {
        let mut project = Self::named(request)?;
        project.declare();
        let locks: Vec<_> = LOCKS
            .iter()
            .filter(|(lock, ..)| request.has(lock))
            .collect();
        match locks.as_slice() {
            [(lock, kind, manifest, _)] => {
                if !request.has(manifest) {
                    return Err(PlanError::NearMiss {
                        found: (*lock).to_owned(),
                        meant: (*manifest).to_owned(),
                        hint: format!("add the {manifest} that {lock} was made from"),
                    });
                }
                project.locked(request, lock, *kind, manifest, notes)?;
            }
            [] => project.unlocked(request, notes)?,
            several => {
                return Err(PlanError::SeveralLockfiles {
                    files: several
                        .iter()
                        .map(|(lock, ..)| (*lock).to_owned())
                        .collect(),
                    hint: "remove all but the one of the tool you use".to_owned(),
                });
            }
        }
        Ok(project)
    }

    /// What its manifests are, before anybody asks who installs.
    pub(super) fn named(request: &Request<'_>) -> Result<Self, PlanError> {
        Ok(Self {
            kind: Kind::Nothing,
            why: Evidence::kiln("a Python app without dependencies"),
            inputs: Vec::new(),
            requirement_files: Vec::new(),
            needs_source: false,
            is_package: false,
            declared: BTreeMap::new(),
            locked: BTreeSet::new(),
            pyproject: table(request, PYPROJECT)?,
            pipfile: table(request, PIPFILE)?,
        })
    }

    /// Whether a package is installed, as far as manifests and lockfile tell.
    pub(super) fn has(&self, package: &str) -> bool {
        self.declared.contains_key(package) || self.locked.contains(package)
    }

    /// Where a package is named.
    pub(super) fn place(&self, package: &str) -> (String, Option<u32>) {
        match self.declared.get(package) {
            Some((file, line)) => (file.clone(), *line),
            None => (self.why.file.clone(), None),
        }
    }

    /// The file to which a missing package is added.
    pub(super) fn manifest(&self) -> &'static str {
        match self.kind {
            Kind::Pipenv => PIPFILE,
            Kind::Uv | Kind::Poetry | Kind::Pdm => PYPROJECT,
            Kind::Pip | Kind::Nothing => REQUIREMENTS,
        }
    }

    /// How a missing package is added.
    pub(super) fn how_to_add(&self, package: &str) -> String {
        match self.kind {
            Kind::Uv => format!("uv add {package}"),
            Kind::Poetry => format!("poetry add {package}"),
            Kind::Pdm => format!("pdm add {package}"),
            Kind::Pipenv => format!("pipenv install {package}"),
            Kind::Pip | Kind::Nothing => format!("add {package} to {REQUIREMENTS}"),
        }
    }

    fn locked(
        &mut self,
        request: &Request<'_>,
        lock: &str,
        kind: Kind,
        manifest: &str,
        notes: &mut Vec<Evidence>,
    ) -> Result<(), PlanError> {
        self.kind = kind;
        self.why = Evidence::at(format!("{lock} freezes the dependencies"), lock, None);
        self.inputs = vec![manifest.to_owned(), lock.to_owned()];
        for more in ["uv.toml", "poetry.toml", "pdm.toml"] {
            let ours = more.split('.').next() == lock.split('.').next();
            if ours && request.has(more) {
                self.inputs.push(more.to_owned());
            }
        }
        self.is_package = kind == Kind::Uv && self.uv_package();
        let bytes = request.folder.bytes(lock, LOCKFILE_BYTES_MAX)?;
        let text = String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned();
        self.locked = locked_names(&text, kind);
        if kind == Kind::Pipenv {
            check_pipfile_lock(&text)?;
        } else if toml::de::DeTable::parse(&text).is_err() {
            return Err(parse_error::<Table>(&text, lock));
        }
        if request.has(REQUIREMENTS) {
            let what = format!("not used: {lock} says what is installed");
            notes.push(Evidence::at(what, REQUIREMENTS, None));
        }
        Ok(())
    }

    /// `[build-system]`, unless `tool.uv.package` says otherwise.
    fn uv_package(&self) -> bool {
        let Some((_, table)) = &self.pyproject else {
            return false;
        };
        let said = get(table, &["tool", "uv", "package"]).and_then(Value::as_bool);
        said.unwrap_or_else(|| table.contains_key("build-system"))
    }

    fn unlocked(
        &mut self,
        request: &Request<'_>,
        notes: &mut Vec<Evidence>,
    ) -> Result<(), PlanError> {
        if let Some(found) = Requirements::read(request.folder, REQUIREMENTS)? {
            self.kind = Kind::Pip;
            self.why = Evidence::at("requirements for pip", REQUIREMENTS, None);
            self.needs_source = found.local.is_some();
            if let Some((file, line)) = &found.local {
                let what = "a path: the source is copied before the install, so every change installs again";
                notes.push(Evidence::at(what, file, Some(*line)));
            }
            for (name, file, line) in &found.unpinned {
                let what = format!("{name} has no exact version (==): another day, another image");
                notes.push(Evidence::at(what, file, Some(*line)));
            }
            for (name, (file, line)) in found.packages {
                self.declared.insert(name, (file, Some(line)));
            }
            self.inputs = found.files.clone();
            self.requirement_files = found.files;
            return Ok(());
        }
        let no_lock = |manifest: &str, command: &str, lock: &str| PlanError::NoLockfile {
            manifest: manifest.to_owned(),
            hint: format!("run `{command}` and keep {lock}"),
        };
        if self.pipfile.is_some() {
            return Err(no_lock(PIPFILE, "pipenv lock", "Pipfile.lock"));
        }
        if let Some((_, table)) = &self.pyproject
            && !self.declared.is_empty()
        {
            let tool = |name| get(table, &["tool", name]).is_some();
            let (command, lock) = match (tool("poetry"), tool("pdm")) {
                (true, _) => ("poetry lock", "poetry.lock"),
                (_, true) => ("pdm lock", "pdm.lock"),
                _ => ("uv lock", "uv.lock"),
            };
            return Err(no_lock(PYPROJECT, command, lock));
        }
        let other = ["setup.py", "setup.cfg"]
            .into_iter()
            .find(|f| request.has(f));
        if let Some(file) = other {
            return Err(PlanError::Unsupported {
                file: file.to_owned(),
                line: None,
                what: "setup.py alone does not freeze dependencies".to_owned(),
                hint: "add a requirements.txt: `.` and the pinned dependencies".to_owned(),
            });
        }
        Ok(())
    }

    /// Dependencies that pyproject.toml and Pipfile name.
    fn declare(&mut self) {
        let mut found = BTreeMap::new();
        if let Some((text, table)) = &self.pyproject {
            let line = toml_line(text, &["project", "dependencies"]);
            let list = get(table, &["project", "dependencies"]).and_then(Value::as_array);
            for requirement in list.into_iter().flatten().filter_map(Value::as_str) {
                if let Some(name) = name_of(requirement) {
                    // Where the name stands in the list, if it stands there plainly.
                    let at = text.find(&format!("\"{requirement}\""));
                    let line = at.map(|at| line_of(text, at) as u32).or(line);
                    found.insert(name, (PYPROJECT.to_owned(), line));
                }
            }
            let path = ["tool", "poetry", "dependencies"];
            let poetry = get(table, &path).and_then(Value::as_table);
            for name in poetry
                .into_iter()
                .flat_map(Table::keys)
                .filter(|n| *n != "python")
            {
                let line = toml_line(text, &["tool", "poetry", "dependencies", name]);
                found.insert(normal(name), (PYPROJECT.to_owned(), line));
            }
        }
        if let Some((text, table)) = &self.pipfile {
            let packages = get(table, &["packages"]).and_then(Value::as_table);
            for name in packages.into_iter().flat_map(Table::keys) {
                let line = toml_line(text, &["packages", name]);
                found.insert(normal(name), (PIPFILE.to_owned(), line));
            }
        }
        self.declared = found;
    }

    /// `.python-version`, `runtime.txt`, `requires-python`, Poetry's `python`, Pipfile's `requires`, in this order.
    pub(super) fn wanted(&self, request: &Request<'_>) -> Result<Option<Wanted>, PlanError> {
        for file in [".python-version", "runtime.txt"] {
            let Some(text) = request.folder.read(file)? else {
                continue;
            };
            let lines = text.lines().enumerate();
            let mut lines = lines.map(|(i, l)| (i, l.split('#').next().unwrap_or("").trim()));
            let Some((index, said)) = lines.find(|(_, line)| !line.is_empty()) else {
                continue;
            };
            let bare = said
                .strip_prefix("cpython-")
                .or_else(|| said.strip_prefix("python-"));
            let why = Evidence::at(file, file, Some(index as u32 + 1));
            return version_file(said, bare.unwrap_or(said), why).map(Some);
        }
        if let Some((text, table)) = &self.pyproject {
            let say = |path: &[&str], parse: fn(&str) -> Option<Ranges>| {
                let said = get(table, path)?.as_str()?;
                let why = Evidence::at(path.join("."), PYPROJECT, toml_line(text, path));
                Some(ranges(said, parse, why))
            };
            let poetry = ["tool", "poetry", "dependencies", "python"];
            let found = say(&["project", "requires-python"], Ranges::pep440);
            if let Some(found) = found.or_else(|| say(&poetry, Ranges::poetry)) {
                return found.map(Some);
            }
        }
        let Some((text, table)) = &self.pipfile else {
            return Ok(None);
        };
        for key in ["python_full_version", "python_version"] {
            if let Some(said) = get(table, &["requires", key]).and_then(Value::as_str) {
                let line = toml_line(text, &["requires", key]);
                let why = Evidence::at(format!("requires.{key}"), PIPFILE, line);
                return version_file(said, said, why).map(Some);
            }
        }
        Ok(None)
    }
}

/// A version as a file says it: `3.13`, `3.13.1`, `3`.
fn version_file(said: &str, bare: &str, why: Evidence) -> Result<Wanted, PlanError> {
    let plain = bare
        .bytes()
        .all(|b| b.is_ascii_digit() || b == b'.' || b == b'*');
    ranges(said, |_| plain.then(|| Ranges::npm(bare)).flatten(), why)
}

fn ranges(
    said: &str,
    parse: impl Fn(&str) -> Option<Ranges>,
    why: Evidence,
) -> Result<Wanted, PlanError> {
    match parse(said) {
        Some(ranges) => Ok(Wanted {
            text: said.to_owned(),
            ranges,
            why,
        }),
        None => Err(PlanError::Broken {
            file: why.file,
            line: why.line,
            what: format!("{said:?} is no version or range of Python versions"),
        }),
    }
}

fn get<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, folders) = path.split_last()?;
    let mut table = table;
    for name in folders {
        table = table.get(*name)?.as_table()?;
    }
    table.get(*last)
}

fn table(request: &Request<'_>, file: &str) -> Result<Option<(String, Table)>, PlanError> {
    let Some(text) = request.folder.read(file)? else {
        return Ok(None);
    };
    match toml::from_str::<Table>(&text) {
        Ok(table) => Ok(Some((text, table))),
        Err(_) => Err(parse_error::<Table>(&text, file)),
    }
}

fn parse_error<T: serde::de::DeserializeOwned>(text: &str, file: &str) -> PlanError {
    let (line, what) = match toml::from_str::<T>(text) {
        Ok(_) => (None, "not TOML".to_owned()),
        Err(e) => {
            let line = e.span().map(|span| line_of(text, span.start) as u32);
            (line, format!("not TOML: {}", e.message()))
        }
    };
    PlanError::Broken {
        file: file.to_owned(),
        line,
        what,
    }
}

fn check_pipfile_lock(text: &str) -> Result<(), PlanError> {
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(_) => Ok(()),
        Err(e) => Err(PlanError::Broken {
            file: "Pipfile.lock".to_owned(),
            line: Some(e.line() as u32),
            what: "not JSON".to_owned(),
        }),
    }
}

/// Names of all packages in a lockfile.
fn locked_names(text: &str, kind: Kind) -> BTreeSet<String> {
    if kind == Kind::Pipenv {
        let json = serde_json::from_str::<serde_json::Value>(text).unwrap_or_default();
        let table = json.get("default").and_then(|d| d.as_object());
        return table
            .into_iter()
            .flat_map(|t| t.keys())
            .map(|n| normal(n))
            .collect();
    }
    let mut found = BTreeSet::new();
    let mut in_package = false;
    for line in text.lines() {
        if line.starts_with('[') {
            in_package = line.trim() == "[[package]]";
        } else if in_package && let Some(name) = line.strip_prefix("name = \"") {
            found.insert(normal(name.trim_end_matches('"')));
        }
    }
    found
}
