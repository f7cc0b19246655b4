//! The Dockerfile of a Node app.
//!
//! Two shapes. *Apart*: production dependencies are installed in a stage of their own; the build sees all dependencies
//! through a bind mount, so they are in no layer that is copied. *In place*: one stage installs, builds and prunes, for
//! workspaces, for apps whose own install scripts write into node_modules, and for Yarn 2 and later.

use std::collections::BTreeMap;

use super::App;
use super::manager::{TOOLS_PATH, npm_cache};
use super::manifest::FILE;
use super::site::{SITE, serve_site};
use crate::bases::Base;
use crate::plan::PlanError;
use crate::plan::detect::Request;
use crate::plan::system_packages;
use crate::plan::types::{Command, Evidence};
use crate::plan::write::{APP_USER, Text, json};

/// Removes the app's own install scripts from the manifests: they would run before the source is there.
const STRIP: &str = "const fs = require('fs'); for (const f of process.argv.slice(1)) { const p = JSON.parse(fs.readFileSync(f)); for (const s of ['preinstall', 'install', 'postinstall', 'prepare']) if (p.scripts) delete p.scripts[s]; fs.writeFileSync(f, JSON.stringify(p)); }";

/// A Dockerfile and the commands in it.
pub(super) struct Written {
    pub(super) text: String,
    pub(super) install: Vec<Command>,
    /// Commands that run after the build command.
    pub(super) more_build: Vec<Command>,
}

pub(super) fn write(
    request: &Request<'_>,
    app: &App,
    base: &Base,
    port: u16,
) -> Result<Written, PlanError> {
    let mut writer = Writer {
        request,
        app,
        text: Text::default(),
        install: Vec::new(),
        more_build: Vec::new(),
    };
    let own_scripts = !app.manifest.install_scripts().is_empty();
    let installs = app.manager.lockfile.is_some();
    let in_place = request.config.install.is_some()
        || (installs && (own_scripts || !app.members.is_empty() || !app.manager.installs_apart()));
    writer.tools(base);
    let builds = app.build.is_some() || app.entry.prestart;
    if in_place {
        writer.in_place();
    } else if builds {
        writer.apart(installs);
    } else if installs {
        writer.modules("production", true);
    }
    let packages = &request.config.system_packages;
    let (build, run) = (base.build.to_string(), base.run.to_string());
    let system = system_packages::stage(&mut writer.text, packages, &build, &run);
    writer.image(&run, system, installs, in_place, builds, port);
    Ok(Written {
        text: writer.text.finish(),
        install: writer.install,
        more_build: writer.more_build,
    })
}

struct Writer<'a> {
    request: &'a Request<'a>,
    app: &'a App,
    text: Text,
    install: Vec<Command>,
    more_build: Vec<Command>,
}

impl Writer<'_> {
    /// The stage that all others but the image start from.
    fn tools(&mut self, base: &Base) {
        let manager = &self.app.manager;
        let from = match manager.lockfile {
            Some(lockfile) => format!("{FILE} and {lockfile}"),
            None => FILE.to_owned(),
        };
        self.text.line(format!("# Written by kiln from {from}."));
        self.text.stage(&base.build.to_string(), Some("tools"));
        self.text.line("WORKDIR /app");
        let mut environment = self.request.config.environment.clone();
        for (name, value) in manager.environment() {
            environment.insert(name.to_owned(), value.to_owned());
        }
        self.text.env(&environment);
        if let Some(setup) = &manager.setup {
            self.text.run(&[npm_cache()], setup);
            self.text.line(format!("ENV PATH={TOOLS_PATH}:$PATH"));
        }
        system_packages::install(&mut self.text, &self.request.config.system_packages);
    }

    fn inputs(&mut self) {
        let (folders, files): (Vec<_>, Vec<_>) =
            self.app.inputs.iter().partition(|path| path.ends_with('/'));
        let files: Vec<_> = files.into_iter().map(String::as_str).collect();
        self.text.line(format!("COPY {} ./", files.join(" ")));
        for folder in folders {
            self.text.line(format!("COPY {folder} ./{folder}"));
        }
        for member in &self.app.members {
            let line = format!("COPY {member}/{FILE} ./{member}/");
            self.text.line(line);
        }
        let manifest = &self.app.manifest;
        let strips = !manifest.install_scripts().is_empty()
            || manifest.script("prepare").is_some()
            || !self.app.members.is_empty();
        if strips && self.app.manager.lockfile.is_some() {
            let mut words = ["node", "-e", STRIP, "--", FILE]
                .map(str::to_owned)
                .to_vec();
            let members = self.app.members.iter();
            words.extend(members.map(|member| format!("{member}/{FILE}")));
            self.text.line(format!("RUN {}", json(&words)));
        }
    }

    fn installs(&mut self, line: String) {
        let why = self.app.manager.why.clone();
        self.install.push(Command { line, why });
    }

    /// A stage with dependencies, with or without those for development.
    fn modules(&mut self, stage: &str, production: bool) {
        self.text.stage("tools", Some(stage));
        self.inputs();
        let command = self.app.manager.install(production);
        let with_folder = format!("{command} && mkdir -p node_modules");
        self.text.run(&[self.app.manager.cache()], &with_folder);
        self.installs(command);
    }

    fn apart(&mut self, installs: bool) {
        let manager = &self.app.manager;
        if installs {
            self.modules("modules", false);
            if self.app.entry.site.is_none() && manager.prunes_well() {
                // Not a second install: native modules would be compiled twice.
                let prune = manager.prune();
                self.text.stage("modules", Some("production"));
                let with_folder = format!("{prune} && mkdir -p node_modules");
                self.text.run(&[manager.cache()], &with_folder);
                self.installs(prune);
            } else if self.app.entry.site.is_none() {
                self.modules("production", true);
            }
        }
        self.text.stage("tools", Some("build"));
        self.text.line("COPY . .");
        let modules = "type=bind,from=modules,source=/app/node_modules,target=/app/node_modules,rw";
        let mounts = match installs {
            true => vec![modules.to_owned()],
            false => Vec::new(),
        };
        self.build(&mounts);
    }

    fn in_place(&mut self) {
        let manager = &self.app.manager;
        self.text.stage("tools", Some("build"));
        // Without a lockfile the given command installs whatever it likes, maybe from the source.
        let locked = manager.lockfile.is_some();
        match locked {
            true => self.inputs(),
            false => {
                self.text.line("COPY . .");
            }
        }
        match self.request.config.install.as_deref() {
            Some(given) => {
                self.text.run_given(
                    &[manager.cache(), npm_cache()]
                        [..1 + usize::from(manager.cache() != npm_cache())],
                    given,
                );
                self.install.push(Command {
                    line: given.to_owned(),
                    why: self.request.config_says("install"),
                });
            }
            None => {
                let command = manager.install(false);
                self.text.run(&[manager.cache()], &command);
                self.installs(command);
            }
        }
        if locked {
            self.text.line("COPY . .");
        }
        for script in self.app.manifest.install_scripts() {
            let command = manager.run_script(script);
            self.text.run(&[], &command);
            self.install.push(Command {
                line: command,
                why: Evidence::at(
                    format!("scripts.{script}: runs when the source is there"),
                    FILE,
                    self.app.manifest.line(&["scripts", script]),
                ),
            });
        }
        self.build(&[]);
        if locked && self.app.entry.site.is_none() {
            let prune = manager.prune();
            self.text.run(
                &[manager.cache()],
                &format!("{prune} && mkdir -p node_modules"),
            );
            self.more_build.push(Command {
                line: prune,
                why: Evidence::kiln("no development dependencies in the image"),
            });
        }
    }

    fn build(&mut self, mounts: &[String]) {
        let mut mounts = mounts.to_vec();
        if self.app.entry.framework.as_deref() == Some("next") {
            mounts.push(crate::plan::write::cache("next", "/app/.next/cache"));
        }
        let path = "PATH=/app/node_modules/.bin:$PATH";
        if let Some(build) = &self.app.build {
            match self.request.config.build.is_some() {
                true => self
                    .text
                    .run_given(&mounts, &format!("{path}; {}", build.line)),
                false => self.text.run(&mounts, &build.line),
            };
        }
        if self.app.entry.prestart {
            let command = self.app.manager.run_script("prestart");
            self.text.run(&mounts, &command);
            self.more_build.push(Command {
                line: command,
                why: Evidence::at(
                    "scripts.prestart",
                    FILE,
                    self.app.manifest.line(&["scripts", "prestart"]),
                ),
            });
        }
    }

    fn image(
        &mut self,
        run: &str,
        system: bool,
        installs: bool,
        in_place: bool,
        builds: bool,
        port: u16,
    ) {
        let mut environment = BTreeMap::from([
            ("NODE_ENV".to_owned(), "production".to_owned()),
            ("PORT".to_owned(), port.to_string()),
        ]);
        environment.extend(self.request.config.environment.clone());
        let site = self.app.entry.site.as_ref();
        if let Some(site) = site {
            environment.insert("SITE".to_owned(), SITE.to_owned());
            let single_page = u8::from(site.single_page).to_string();
            environment.insert("SINGLE_PAGE".to_owned(), single_page);
        }
        self.text.stage(run, None);
        if system {
            self.text.line(system_packages::copy());
        }
        self.text.line("WORKDIR /app");
        self.text.env(&environment);
        let own = format!("COPY --link --chown={APP_USER}");
        if let Some(site) = site {
            serve_site(&mut self.text);
            let folder = &site.folder;
            self.text
                .line(format!("COPY --link --from=build /app/{folder} {SITE}"));
        } else {
            self.text.line("ENV PATH=/app/node_modules/.bin:$PATH");
            if installs && !in_place {
                let from = "COPY --link --from=production /app/node_modules ./node_modules";
                self.text.line(from);
            }
            self.text.line(match in_place || builds {
                true => format!("{own} --from=build /app ./"),
                false => format!("{own} . ."),
            });
        }
        self.text.line(format!("USER {APP_USER}"));
        self.text.line(format!("EXPOSE {port}"));
        self.text.line(self.app.entry.cmd.instruction());
    }
}
