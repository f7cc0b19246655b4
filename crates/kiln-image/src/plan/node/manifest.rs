//! `package.json`: the fields a plan needs, each with its line.

use serde_json::{Map, Value};

use crate::plan::PlanError;
use crate::plan::folder::Folder;
use crate::plan::locate::json_line;

/// Its name.
pub(super) const FILE: &str = "package.json";

/// A `package.json`.
#[derive(Debug)]
pub(super) struct Manifest {
    text: String,
    root: Map<String, Value>,
}

impl Manifest {
    pub(super) fn read(folder: &Folder) -> Result<Self, PlanError> {
        let Some(text) = folder.read(FILE)? else {
            return Err(PlanError::UnknownRuntime {
                found: "no package.json".to_owned(),
                hint: "add a package.json: npm init".to_owned(),
            });
        };
        Self::parse(text)
    }

    pub(super) fn parse(text: String) -> Result<Self, PlanError> {
        let bare = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let value: Value = serde_json::from_str(bare).map_err(|e| {
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or(&what);
            PlanError::Broken {
                file: FILE.to_owned(),
                line: Some(e.line() as u32),
                what: format!("not JSON: {what}"),
            }
        })?;
        let Value::Object(root) = value else {
            return Err(PlanError::Broken {
                file: FILE.to_owned(),
                line: Some(1),
                what: "not a JSON object".to_owned(),
            });
        };
        let manifest = Self { text, root };
        for table in [
            "scripts",
            "dependencies",
            "devDependencies",
            "optionalDependencies",
        ] {
            manifest.check_table(table)?;
        }
        Ok(manifest)
    }

    fn broken(&self, path: &[&str], what: &str) -> PlanError {
        PlanError::Broken {
            file: FILE.to_owned(),
            line: self.line(path),
            what: format!("{} {what}", path.join(".")),
        }
    }

    fn check_table(&self, name: &str) -> Result<(), PlanError> {
        match self.root.get(name) {
            None | Some(Value::Null) => Ok(()),
            Some(Value::Object(table)) => match table.iter().find(|(_, v)| !v.is_string()) {
                Some((key, _)) => Err(self.broken(&[name, key], "must be a text")),
                None => Ok(()),
            },
            Some(_) => Err(self.broken(&[name], "must be an object")),
        }
    }

    /// Line of a field.
    pub(super) fn line(&self, path: &[&str]) -> Option<u32> {
        json_line(&self.text, path)
    }

    /// A text field of the root.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.root.get(name)?.as_str()
    }

    /// A script, unless it is empty.
    pub(super) fn script(&self, name: &str) -> Option<&str> {
        let script = self.root.get("scripts")?.get(name)?.as_str()?.trim();
        (!script.is_empty()).then_some(script)
    }

    /// `engines.NAME`.
    pub(super) fn engine(&self, name: &str) -> Result<Option<String>, PlanError> {
        match self.root.get("engines").and_then(|e| e.get(name)) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.broken(&["engines", name], "must be a text")),
        }
    }

    /// Whether a package is wanted at run time.
    pub(super) fn needs(&self, package: &str) -> bool {
        self.in_table("dependencies", package) || self.in_table("optionalDependencies", package)
    }

    /// Whether a package is wanted for development only.
    pub(super) fn needs_for_development(&self, package: &str) -> bool {
        self.in_table("devDependencies", package) && !self.needs(package)
    }

    /// Whether a package is wanted at all.
    pub(super) fn mentions(&self, package: &str) -> bool {
        self.needs(package) || self.in_table("devDependencies", package)
    }

    fn in_table(&self, table: &str, package: &str) -> bool {
        self.root
            .get(table)
            .is_some_and(|t| t.get(package).is_some())
    }

    /// Whether it lists any dependency.
    pub(super) fn has_dependencies(&self) -> bool {
        ["dependencies", "devDependencies", "optionalDependencies"]
            .iter()
            .filter_map(|table| self.root.get(*table)?.as_object())
            .any(|table| !table.is_empty())
    }

    /// `workspaces`, as a list or as `{"packages": […]}`.
    pub(super) fn workspaces(&self) -> Result<Vec<String>, PlanError> {
        let list = match self.root.get("workspaces") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Object(table)) => table.get("packages"),
            other => other,
        };
        let texts = |list: &Vec<Value>| {
            let texts = list.iter().map(|item| item.as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>()
        };
        list.and_then(Value::as_array)
            .and_then(texts)
            .ok_or_else(|| self.broken(&["workspaces"], "must be a list of texts"))
    }

    /// The install scripts of the app itself that exist, in the order a package manager runs them.
    pub(super) fn install_scripts(&self) -> Vec<&'static str> {
        let all = ["preinstall", "install", "postinstall"];
        let found = all.into_iter().filter(|name| self.script(name).is_some());
        found.collect()
    }
}
