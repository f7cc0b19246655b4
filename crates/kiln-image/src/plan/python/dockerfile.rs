//! The Dockerfile of a Python app.

use std::collections::BTreeMap;

use super::App;
use super::manager::{VENV, pip_cache};
use crate::bases::Base;
use crate::plan::detect::Request;
use crate::plan::system_packages;
use crate::plan::types::{Command, Evidence};
use crate::plan::write::{APP_USER, Text, quoted};

/// Settings that read these must not stop `collectstatic`; the values are in no layer and in no image.
const BUILD_SECRETS: &str = "SECRET_KEY=only-while-building DJANGO_SECRET_KEY=only-while-building";

/// A Dockerfile and the install commands in it.
pub(super) struct Written {
    pub(super) text: String,
    pub(super) install: Vec<Command>,
}

pub(super) fn write(request: &Request<'_>, app: &App, base: &Base, port: u16) -> Written {
    let mut writer = Writer {
        request,
        app,
        text: Text::default(),
        install: Vec::new(),
    };
    let from = match app.project.why.file.as_str() {
        "" => "the folder",
        file => file,
    };
    writer.text.line(format!("# Written by kiln from {from}."));
    let build = base.build.to_string();
    let run = base.run.to_string();
    let given = request.config.build.as_deref();
    let builds = match given {
        Some(line) => !line.is_empty(),
        None => app.entry.collectstatic.is_some(),
    };
    let installs = app.manager.installs() || request.config.install.is_some();
    if installs || builds {
        writer.environment(&build, installs);
    }
    if builds {
        writer.build(given);
    }
    let packages = &request.config.system_packages;
    let system = system_packages::stage(&mut writer.text, packages, &build, &run);
    writer.image(&run, system, installs, builds, port);
    Written {
        text: writer.text.finish(),
        install: writer.install,
    }
}

struct Writer<'a> {
    request: &'a Request<'a>,
    app: &'a App,
    text: Text,
    install: Vec<Command>,
}

impl Writer<'_> {
    /// The stage with the virtual environment.
    fn environment(&mut self, build: &str, installs: bool) {
        let (project, manager) = (&self.app.project, &self.app.manager);
        self.text.stage(build, Some("environment"));
        self.text.line("WORKDIR /app");
        let mut variables: BTreeMap<String, String> = manager
            .environment()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        variables.extend(self.request.config.environment.clone());
        self.text.env(&variables);
        system_packages::install(&mut self.text, &self.request.config.system_packages);
        if !installs {
            return;
        }
        if let Some(setup) = manager.setup() {
            self.text.run(&[pip_cache()], &setup);
        }
        self.text.run(&[], &manager.make());
        if project.needs_source {
            self.text.line("COPY . .");
        } else {
            self.inputs();
        }
        match self.request.config.install.as_deref() {
            Some(given) => {
                let line = format!("PATH={VENV}/bin:$PATH; {given}");
                self.text.run_given(&manager.caches(), &line);
                self.install.push(Command {
                    line: given.to_owned(),
                    why: self.request.config_says("install"),
                });
            }
            None => {
                let command = manager.install();
                self.text.run(&manager.caches(), &command);
                let why = project.why.clone();
                self.install.push(Command { line: command, why });
            }
        }
        if project.is_package
            && let Some(command) = manager.install_project()
        {
            // A stage of its own, so that the dependencies' layer does not depend on the source.
            self.text.stage("environment", Some("project"));
            self.text.line("COPY . .");
            self.text.run(&manager.caches(), &command);
            let why = Evidence::at(
                "[build-system]: the project is a package",
                "pyproject.toml",
                None,
            );
            self.install.push(Command { line: command, why });
        }
    }

    /// Each file into its own folder, because COPY flattens.
    fn inputs(&mut self) {
        let mut folders: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for path in &self.app.project.inputs {
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            folders.entry(folder).or_default().push(quoted(path));
        }
        for (folder, files) in folders {
            let target = match folder {
                "" => "./".to_owned(),
                folder => quoted(&format!("./{folder}/")),
            };
            self.text.line(format!("COPY {} {target}", files.join(" ")));
        }
    }

    fn last_environment(&self) -> &'static str {
        match self.app.project.is_package {
            true => "project",
            false => "environment",
        }
    }

    fn build(&mut self, given: Option<&str>) {
        self.text.stage(self.last_environment(), Some("build"));
        self.text.line(format!("ENV PATH={VENV}/bin:$PATH"));
        self.text.line("COPY . .");
        match (given, &self.app.entry.collectstatic) {
            (Some(given), _) => {
                self.text.run_given(&[], given);
            }
            (None, Some(command)) => {
                self.text
                    .run(&[], &format!("{BUILD_SECRETS} {}", command.line));
            }
            (None, None) => {}
        }
    }

    fn image(&mut self, run: &str, system: bool, installs: bool, builds: bool, port: u16) {
        let mut variables = BTreeMap::from([
            ("PORT".to_owned(), port.to_string()),
            ("PYTHONDONTWRITEBYTECODE".to_owned(), "1".to_owned()),
            ("PYTHONUNBUFFERED".to_owned(), "1".to_owned()),
        ]);
        if self.request.folder.has_folder("src") {
            variables.insert("PYTHONPATH".to_owned(), "/app/src".to_owned());
        }
        variables.extend(self.request.config.environment.clone());
        self.text.stage(run, None);
        if system {
            self.text.line(system_packages::copy());
        }
        self.text.line("WORKDIR /app");
        self.text.env(&variables);
        if installs {
            self.text.line(format!("ENV PATH={VENV}/bin:$PATH"));
            let from = self.last_environment();
            self.text
                .line(format!("COPY --link --from={from} {VENV} {VENV}"));
        }
        let own = format!("COPY --link --chown={APP_USER}");
        self.text.line(match builds {
            true => format!("{own} --from=build /app ./"),
            false => format!("{own} . ."),
        });
        self.text.line(format!("USER {APP_USER}"));
        self.text.line(format!("EXPOSE {port}"));
        self.text.line(self.app.entry.cmd.instruction());
    }
}
