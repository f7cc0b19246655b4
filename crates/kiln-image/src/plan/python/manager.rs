//! The commands of pip, uv, poetry, pdm and pipenv.
//!
//! All but pip are installed into an environment of their own, at a version pinned here or in the base, and make
//! `/opt/venv` from the lockfile. A lockfile that does not fit its manifest fails the build.

use super::project::{Kind, Project};
use crate::bases::Base;
use crate::plan::write::cache;

/// The virtual environment, in the build stage and in the image.
pub(super) const VENV: &str = "/opt/venv";
/// Where the tools themselves live.
const TOOLS: &str = "/opt/tools";

/// A tool that the base does not bring: its version, and the packages that must stand beside it in these versions.
struct Tool {
    name: &'static str,
    version: &'static str,
    beside: &'static str,
}

const VERSIONS: [Tool; 4] = [
    Tool {
        name: "uv",
        version: "0.13.8",
        beside: "",
    },
    Tool {
        name: "poetry",
        version: "2.5.1",
        beside: " poetry-plugin-export==1.10.1",
    },
    // Later ones of these two do not fit this version, which does not say so.
    Tool {
        name: "pdm",
        version: "2.29.3",
        beside: " hishel==1.4.0 unearth==0.18.3",
    },
    Tool {
        name: "pipenv",
        version: "2026.10.3",
        beside: "",
    },
];

/// A package manager as this project uses it.
#[derive(Clone, Debug)]
pub(super) struct Manager {
    kind: Kind,
    /// Version of the tool; `None` for pip.
    version: Option<String>,
    /// The base brings it.
    in_base: bool,
    files: Vec<String>,
}

impl Manager {
    pub(super) fn of(project: &Project, base: &Base) -> Self {
        let name = name(project.kind);
        let pinned = VERSIONS.iter().find(|tool| tool.name == name);
        // The others bring companions, so only uv may come with the base.
        let baked = base.tools.get(name).filter(|_| project.kind == Kind::Uv);
        Self {
            kind: project.kind,
            version: pinned.map(|tool| baked.cloned().unwrap_or_else(|| tool.version.to_owned())),
            in_base: baked.is_some(),
            files: project.requirement_files.clone(),
        }
    }

    /// For people: `uv 0.13.8`.
    pub(super) fn describe(&self) -> Option<String> {
        match (self.kind, &self.version) {
            (Kind::Nothing, _) => None,
            (kind, Some(version)) => Some(format!("{} {version}", name(kind))),
            (kind, None) => Some(name(kind).to_owned()),
        }
    }

    /// Whether there is anything to install.
    pub(super) fn installs(&self) -> bool {
        self.kind != Kind::Nothing
    }

    /// The command that puts the tool on the PATH of the stage, if it is not there.
    pub(super) fn setup(&self) -> Option<String> {
        let version = self.version.as_ref().filter(|_| !self.in_base)?;
        let tool = name(self.kind);
        let pinned = VERSIONS.iter().find(|one| one.name == tool)?;
        let beside = pinned.beside;
        Some(format!(
            "python3 -m venv {TOOLS} && {TOOLS}/bin/pip install --no-warn-script-location {tool}=={version}{beside} && ln -s {TOOLS}/bin/{tool} /usr/local/bin/{tool}"
        ))
    }

    /// Environment of the stage.
    pub(super) fn environment(&self) -> Vec<(&'static str, &'static str)> {
        let mut all = vec![
            ("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
            ("PIP_NO_INPUT", "1"),
            ("PIP_ROOT_USER_ACTION", "ignore"),
        ];
        all.extend_from_slice(match self.kind {
            Kind::Uv => &[
                ("UV_COMPILE_BYTECODE", "1"),
                ("UV_LINK_MODE", "copy"),
                ("UV_NO_PROGRESS", "1"),
                ("UV_PROJECT_ENVIRONMENT", VENV),
                ("UV_PYTHON_DOWNLOADS", "never"),
            ],
            Kind::Poetry => &[
                ("POETRY_NO_INTERACTION", "1"),
                ("POETRY_VIRTUALENVS_CREATE", "false"),
            ],
            Kind::Pdm => &[
                ("PDM_CHECK_UPDATE", "false"),
                ("PDM_NON_INTERACTIVE", "1"),
                ("VIRTUAL_ENV", VENV),
            ],
            Kind::Pipenv => &[("PIPENV_VERBOSITY", "-1"), ("VIRTUAL_ENV", VENV)],
            Kind::Pip | Kind::Nothing => &[],
        });
        all
    }

    /// Makes the empty environment. pip is not in it: nothing installs at run time.
    pub(super) fn make(&self) -> String {
        match self.kind {
            Kind::Pipenv => format!("python3 -m venv {VENV}"),
            _ => format!("python3 -m venv --without-pip {VENV}"),
        }
    }

    /// Installs the dependencies.
    pub(super) fn install(&self) -> String {
        match self.kind {
            Kind::Nothing => String::new(),
            Kind::Pip => {
                let first = self
                    .files
                    .first()
                    .map_or("requirements.txt", String::as_str);
                format!("python3 -m pip --python {VENV}/bin/python install --requirement {first}")
            }
            Kind::Uv => "uv sync --locked --no-dev --no-install-project".to_owned(),
            // pip installs, because Poetry itself asks an index in a way that many mirrors do not answer.
            Kind::Poetry => format!(
                "poetry check --lock && poetry export --only main --output /tmp/requirements.txt && python3 -m pip --python {VENV}/bin/python install --no-deps --requirement /tmp/requirements.txt"
            ),
            Kind::Pdm => format!("pdm use -f {VENV} && pdm install --check --prod --no-self"),
            Kind::Pipenv => {
                format!("pipenv install --deploy && {VENV}/bin/python -m pip uninstall --yes pip")
            }
        }
    }

    /// Installs the project itself when its source is there.
    pub(super) fn install_project(&self) -> Option<String> {
        (self.kind == Kind::Uv).then(|| "uv sync --locked --no-dev --no-editable".to_owned())
    }

    /// Cache mounts.
    pub(super) fn caches(&self) -> Vec<String> {
        let own = match self.kind {
            Kind::Uv => Some(("uv", "/root/.cache/uv")),
            Kind::Poetry => Some(("poetry", "/root/.cache/pypoetry")),
            Kind::Pdm => Some(("pdm", "/root/.cache/pdm")),
            Kind::Pipenv => Some(("pipenv", "/root/.cache/pipenv")),
            Kind::Pip | Kind::Nothing => None,
        };
        let own = own.map(|(id, target)| cache(id, target));
        [pip_cache()].into_iter().chain(own).collect()
    }
}

/// pip's cache, which also serves the install of the other tools.
pub(super) fn pip_cache() -> String {
    cache("pip", "/root/.cache/pip")
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Pip | Kind::Nothing => "pip",
        Kind::Uv => "uv",
        Kind::Poetry => "poetry",
        Kind::Pdm => "pdm",
        Kind::Pipenv => "pipenv",
    }
}
