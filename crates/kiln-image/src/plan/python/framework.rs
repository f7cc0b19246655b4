//! How a Python app starts: framework and server.
//!
//! kiln adds no server that the app does not name: what runs is what the lockfile froze. An app without one gets an
//! error that names the package to add.

use super::SCRIPTS;
use super::project::{Kind, Project};
use super::source::{Found, find_app};
use crate::plan::PlanError;
use crate::plan::detect::Request;
use crate::plan::procfile;
use crate::plan::start::Cmd;
use crate::plan::types::{Command, Evidence};

/// How it starts and why.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) cmd: Cmd,
    why: Evidence,
    pub(super) framework: Option<&'static str>,
    pub(super) evidence: Vec<Evidence>,
    /// Django: gathers static files while the image is built.
    pub(super) collectstatic: Option<Command>,
}

/// Packages that tell the framework.
const FRAMEWORKS: [(&str, &str); 6] = [
    ("django", "django"),
    ("fastapi", "fastapi"),
    ("flask", "flask"),
    ("starlette", "starlette"),
    ("quart", "quart"),
    ("litestar", "litestar"),
];

impl Entry {
    pub(super) fn find(
        request: &Request<'_>,
        project: &Project,
        notes: &mut Vec<Evidence>,
    ) -> Result<Self, PlanError> {
        let framework = FRAMEWORKS.iter().find(|(package, _)| project.has(package));
        let mut entry = Self {
            cmd: Cmd::Exec(Vec::new()),
            why: Evidence::kiln(""),
            framework: framework.map(|(_, name)| *name),
            evidence: Vec::new(),
            collectstatic: None,
        };
        if let Some((package, name)) = framework {
            let (file, line) = project.place(package);
            let what = format!("framework: {name}");
            entry.evidence.push(Evidence::at(what, &file, line));
        }
        let django = entry.framework == Some("django") && request.has("manage.py");
        let settings = match django {
            true => Some(Settings::read(request)?),
            false => None,
        };
        if let Some(settings) = &settings {
            settings.statics(project, &mut entry, notes);
        }
        if let Some(start) = &request.config.start {
            entry.cmd = Cmd::of_config(start);
            entry.why = request.config_says("start");
            return Ok(entry);
        }
        if let Some(command) = procfile::web(request.folder)? {
            entry.cmd = Cmd::of_line(&command.line);
            entry.why = command.why;
            return Ok(entry);
        }
        match (entry.framework, &settings) {
            (Some("django"), Some(settings)) => entry.django(project, settings)?,
            (Some("fastapi"), _) => entry.asgi(request, project, "FastAPI")?,
            (Some("starlette"), _) => entry.asgi(request, project, "Starlette")?,
            (Some("litestar"), _) => entry.asgi(request, project, "Litestar")?,
            (Some("quart"), _) => entry.asgi(request, project, "Quart")?,
            (Some("flask"), _) => entry.flask(request, project)?,
            _ => entry.script(request, project)?,
        }
        Ok(entry)
    }

    /// For the plan.
    pub(super) fn command(&self) -> Command {
        Command {
            line: self.cmd.line(),
            why: self.why.clone(),
        }
    }

    fn started(&mut self, line: &str, why: Evidence) {
        self.cmd = Cmd::of_line(line);
        self.why = why;
    }

    fn flask(&mut self, request: &Request<'_>, project: &Project) -> Result<(), PlanError> {
        let Some(found) = find_app(request.folder, "Flask")? else {
            return self.script(request, project);
        };
        let Found { module, name, .. } = &found;
        let call = if found.factory { "()" } else { "" };
        // gunicorn reads PORT itself and then listens on all addresses.
        let line = if project.has("gunicorn") {
            match found.factory {
                true => format!("gunicorn '{module}:{name}()'"),
                false => format!("gunicorn {module}:{name}"),
            }
        } else if project.has("waitress") {
            let flag = if found.factory { "--call " } else { "" };
            format!("waitress-serve --host=0.0.0.0 --port=$PORT {flag}{module}:{name}")
        } else if project.has("hypercorn") {
            format!("hypercorn --bind 0.0.0.0:$PORT '{module}:{name}{call}'")
        } else {
            return Err(no_server(project, "Flask", "gunicorn"));
        };
        self.started(&line, at(&found, "Flask"));
        Ok(())
    }

    fn asgi(
        &mut self,
        request: &Request<'_>,
        project: &Project,
        class: &'static str,
    ) -> Result<(), PlanError> {
        let Some(found) = find_app(request.folder, class)? else {
            return self.script(request, project);
        };
        let Found { module, name, .. } = &found;
        let line = if project.has("uvicorn") {
            let factory = if found.factory { "--factory " } else { "" };
            format!("uvicorn --host 0.0.0.0 --port $PORT {factory}{module}:{name}")
        } else if project.has("hypercorn") {
            format!("hypercorn --bind 0.0.0.0:$PORT {module}:{name}")
        } else if project.has("granian") {
            let factory = if found.factory { "--factory " } else { "" };
            format!("granian --interface asgi --host 0.0.0.0 --port $PORT {factory}{module}:{name}")
        } else {
            return Err(no_server(project, class, "uvicorn"));
        };
        self.started(&line, at(&found, class));
        Ok(())
    }

    fn django(&mut self, project: &Project, settings: &Settings) -> Result<(), PlanError> {
        let package = &settings.package;
        let line = if project.has("gunicorn") {
            format!("gunicorn {package}.wsgi:application")
        } else if project.has("uvicorn") {
            format!("uvicorn --host 0.0.0.0 --port $PORT {package}.asgi:application")
        } else if project.has("daphne") {
            format!("daphne --bind 0.0.0.0 --port $PORT {package}.asgi:application")
        } else if project.has("waitress") {
            format!("waitress-serve --host=0.0.0.0 --port=$PORT {package}.wsgi:application")
        } else {
            return Err(no_server(project, "Django", "gunicorn"));
        };
        self.started(&line, settings.why.clone());
        Ok(())
    }

    fn script(&mut self, request: &Request<'_>, project: &Project) -> Result<(), PlanError> {
        let Some(file) = SCRIPTS.iter().find(|file| request.has(file)) else {
            return Err(PlanError::NoStart {
                hint: "add a main.py, a Procfile with `web: …`, or [build] start in kiln.toml"
                    .to_owned(),
            });
        };
        if project.kind == Kind::Nothing {
            forgotten_requirements(request, file)?;
        }
        let why = Evidence::at("the usual name of a start script", file, None);
        self.started(&format!("python {file}"), why);
        Ok(())
    }
}

fn at(found: &Found, class: &str) -> Evidence {
    let what = match found.factory {
        true => format!("{}() makes the {class} app", found.name),
        false => format!("{} is the {class} app", found.name),
    };
    Evidence::at(what, &found.file, Some(found.line))
}

fn no_server(project: &Project, framework: &'static str, server: &str) -> PlanError {
    PlanError::NoServer {
        framework,
        hint: format!(
            "{} ({}), or say how it starts: a Procfile with `web: …`, or [build] start in kiln.toml",
            project.how_to_add(server),
            project.manifest()
        ),
    }
}

/// A script that imports a well-known package, in a folder that installs none.
fn forgotten_requirements(request: &Request<'_>, file: &str) -> Result<(), PlanError> {
    let text = request.folder.read(file)?.unwrap_or_default();
    let known = FRAMEWORKS.iter().map(|(package, _)| *package);
    let known = known.chain(["requests", "numpy", "pandas", "aiohttp", "sqlalchemy"]);
    let known: Vec<_> = known.collect();
    for (index, line) in text.lines().enumerate() {
        let mut words = line.split([' ', '.', ',']);
        let imports = matches!(words.next(), Some("import" | "from"));
        let Some(package) = words.next().filter(|word| imports && known.contains(word)) else {
            continue;
        };
        return Err(PlanError::NearMiss {
            found: format!("{file} that imports {package} (line {})", index + 1),
            meant: "requirements.txt".to_owned(),
            hint: format!("add a requirements.txt that names {package}"),
        });
    }
    Ok(())
}

/// What a Django project's settings say.
struct Settings {
    /// The package with `wsgi.py` and `asgi.py`.
    package: String,
    why: Evidence,
    static_root: Option<Evidence>,
    whitenoise: bool,
}

impl Settings {
    fn read(request: &Request<'_>) -> Result<Self, PlanError> {
        let text = request.folder.read("manage.py")?.unwrap_or_default();
        let quoted = |line: &str| {
            let mut parts = line
                .split(['\'', '"'])
                .skip_while(|p| *p != "DJANGO_SETTINGS_MODULE");
            parts.nth(2).map(str::to_owned)
        };
        let mut lines = text.lines().enumerate();
        let found = lines.find_map(|(i, line)| Some((i as u32 + 1, quoted(line)?)));
        let legal = |module: &str| {
            !module.is_empty()
                && module
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.')
        };
        let Some((line, module)) = found.filter(|(_, module)| legal(module)) else {
            return Err(PlanError::Broken {
                file: "manage.py".to_owned(),
                line: None,
                what: "DJANGO_SETTINGS_MODULE is not set as Django's own manage.py sets it"
                    .to_owned(),
            });
        };
        let package = module.split('.').next().unwrap_or_default().to_owned();
        let mut settings = Self {
            package,
            why: Evidence::at(format!("settings: {module}"), "manage.py", Some(line)),
            static_root: None,
            whitenoise: false,
        };
        let path = module.replace('.', "/");
        let mut files = vec![format!("{path}.py")];
        let folder = match path.rsplit_once('/') {
            Some((folder, _)) if folder.contains('/') => folder.to_owned(),
            _ => path.clone(),
        };
        for name in request.folder.names(&folder)? {
            files.push(format!("{folder}/{}", name.text));
        }
        for file in files.iter().filter(|file| file.ends_with(".py")) {
            settings.file(request, file)?;
        }
        Ok(settings)
    }

    fn file(&mut self, request: &Request<'_>, file: &str) -> Result<(), PlanError> {
        let Some(text) = request.folder.read(file)? else {
            return Ok(());
        };
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let name = line.split('=').next().unwrap_or_default().trim_end();
            if name == "STATIC_ROOT" && self.static_root.is_none() {
                self.static_root = Some(Evidence::at(name, file, Some(index as u32 + 1)));
            }
            self.whitenoise |= line.to_ascii_lowercase().contains("whitenoise");
            if name == "WSGI_APPLICATION" {
                let module = line.split(['\'', '"']).nth(1).unwrap_or_default();
                if let Some(package) = module.strip_suffix(".wsgi.application") {
                    self.package = package.to_owned();
                }
            }
        }
        Ok(())
    }

    fn statics(&self, project: &Project, entry: &mut Entry, notes: &mut Vec<Evidence>) {
        let Some(root) = &self.static_root else {
            let what = "no STATIC_ROOT in the settings: static files are not collected";
            notes.push(Evidence::at(what, &self.why.file, self.why.line));
            return;
        };
        entry.collectstatic = Some(Command {
            line: "python manage.py collectstatic --noinput".to_owned(),
            why: root.clone(),
        });
        if !(self.whitenoise && project.has("whitenoise")) {
            let what = format!(
                "static files are collected, but nothing serves them: {} and name its middleware in the settings",
                project.how_to_add("whitenoise")
            );
            notes.push(Evidence::at(what, &root.file, root.line));
        }
    }
}
