//! How the app starts, in an image that has Node and no package manager.

use super::manifest::{FILE, Manifest};
use super::{site, workspaces};
use crate::plan::PlanError;
use crate::plan::detect::Request;
use crate::plan::procfile;
use crate::plan::start::Cmd;
use crate::plan::types::{Command, Evidence, StaticSite};

/// Most scripts that start one another (`start` runs `serve` runs …).
const SCRIPT_HOPS_MAX: usize = 8;
/// Entry files that are looked for when nothing names one.
const ENTRY_FILES: [&str; 7] = [
    "index.js",
    "index.mjs",
    "index.cjs",
    "server.js",
    "server.mjs",
    "app.js",
    "main.js",
];
/// Programs of start scripts that are runtimes of their own.
const OTHER_RUNTIMES: [&str; 3] = ["bun", "bunx", "deno"];
/// Frameworks by the package that tells them, most telling first.
const FRAMEWORKS: [(&str, &str); 16] = [
    ("next", "next"),
    ("nuxt", "nuxt"),
    ("@sveltejs/kit", "sveltekit"),
    ("@remix-run/serve", "remix"),
    ("@react-router/serve", "react-router"),
    ("astro", "astro"),
    ("@nestjs/core", "nest"),
    ("@adonisjs/core", "adonis"),
    ("fastify", "fastify"),
    ("express", "express"),
    ("koa", "koa"),
    ("hono", "hono"),
    ("@hapi/hapi", "hapi"),
    ("react-scripts", "create-react-app"),
    ("@vue/cli-service", "vue-cli"),
    ("vite", "vite"),
];

/// How it starts and why.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) cmd: Cmd,
    why: Evidence,
    pub(super) framework: Option<String>,
    pub(super) site: Option<StaticSite>,
    /// Runs after the build: `prestart`, which an image must not do at each start.
    pub(super) prestart: bool,
    pub(super) evidence: Vec<Evidence>,
}

impl Entry {
    pub(super) fn find(
        request: &Request<'_>,
        manifest: &Manifest,
        members: &[String],
        builds: bool,
        notes: &mut Vec<Evidence>,
    ) -> Result<Self, PlanError> {
        let framework = FRAMEWORKS
            .iter()
            .find(|(package, _)| manifest.mentions(package));
        let mut entry = Self {
            cmd: Cmd::Exec(Vec::new()),
            why: Evidence::kiln(""),
            framework: framework.map(|(_, name)| (*name).to_owned()),
            site: None,
            prestart: false,
            evidence: Vec::new(),
        };
        if let Some((package, name)) = framework {
            let table = match manifest.needs(package) {
                true => "dependencies",
                false => "devDependencies",
            };
            let line = manifest.line(&[table, package]);
            entry
                .evidence
                .push(Evidence::at(format!("framework: {name}"), FILE, line));
        }
        if let Some(start) = &request.config.start {
            entry.cmd = Cmd::of_config(start);
            entry.why = request.config_says("start");
        } else if let Some(command) = procfile::web(request.folder)? {
            entry.cmd = Cmd::of_line(&command.line);
            entry.why = command.why;
        } else if let Some(found) = site::find(request, manifest, builds)? {
            entry.cmd = site::server_command();
            entry.why = found.why;
            entry.site = Some(found.site);
        } else if let Some(script) = manifest.script("start") {
            entry.script(manifest, script, notes)?;
        } else {
            entry.file(request, manifest, members, builds)?;
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

    fn script(
        &mut self,
        manifest: &Manifest,
        script: &str,
        notes: &mut Vec<Evidence>,
    ) -> Result<(), PlanError> {
        let line = manifest.line(&["scripts", "start"]);
        let plain = without_package_manager(manifest, script, 0)?;
        let first = first_program(&plain);
        if let Some(other) = OTHER_RUNTIMES.iter().find(|other| **other == first) {
            return Err(PlanError::Unsupported {
                file: FILE.to_owned(),
                line,
                what: format!("scripts.start runs {other}, which is not in the image"),
                hint:
                    "start with node (`node server.js`), or write a Dockerfile for another runtime"
                        .to_owned(),
            });
        }
        if manifest.needs_for_development(first) {
            return Err(PlanError::Unsupported {
                file: FILE.to_owned(),
                line,
                what: format!("scripts.start needs {first}, a development dependency"),
                hint: format!(
                    "start with node (`node server.js`), or move {first} to dependencies: development dependencies are not in the image"
                ),
            });
        }
        self.cmd = Cmd::of_line(&plain);
        self.why = Evidence::at(format!("scripts.start: {script}"), FILE, line);
        if manifest.script("prestart").is_some() {
            self.prestart = true;
            let line = manifest.line(&["scripts", "prestart"]);
            let what = "prestart runs once, while the image is built";
            notes.push(Evidence::at(what, FILE, line));
        }
        Ok(())
    }

    fn file(
        &mut self,
        request: &Request<'_>,
        manifest: &Manifest,
        members: &[String],
        builds: bool,
    ) -> Result<(), PlanError> {
        if self.framework.as_deref() == Some("next") {
            self.cmd = Cmd::Exec(["next", "start"].map(str::to_owned).to_vec());
            self.why = Evidence::kiln("Next.js without a start script");
            return Ok(());
        }
        if let Some(main) = manifest.text("main") {
            let line = manifest.line(&["main"]);
            let main = main.strip_prefix("./").unwrap_or(main);
            let with = ["", ".js", ".cjs", ".json", "/index.js"];
            let there = with
                .iter()
                .any(|end| request.folder.has(&format!("{main}{end}")));
            if !there && !builds {
                return Err(PlanError::Broken {
                    file: FILE.to_owned(),
                    line,
                    what: format!("main names {main:?}, which is not there, and nothing builds it"),
                });
            }
            self.cmd = Cmd::Exec(vec!["node".to_owned(), main.to_owned()]);
            self.why = Evidence::at("main", FILE, line);
            return Ok(());
        }
        if let Some(file) = ENTRY_FILES.iter().find(|file| request.has(file)) {
            self.cmd = Cmd::Exec(vec!["node".to_owned(), (*file).to_owned()]);
            self.why = Evidence::at("the usual name of an entry file", file, None);
            return Ok(());
        }
        if let Some(hint) = workspaces::start_hint(request.folder, members)? {
            return Err(PlanError::NoStart { hint });
        }
        Err(PlanError::NoStart {
            hint: "add a start script to package.json (\"scripts\": {\"start\": \"node server.js\"}), a Procfile with `web: …`, or [build] start in kiln.toml"
                .to_owned(),
        })
    }
}

/// The program of a command, assignments skipped.
fn first_program(line: &str) -> &str {
    let mut words = line.split_whitespace();
    words
        .find(|word| !word.contains('=') && !matches!(*word, "exec" | "env" | "cross-env"))
        .unwrap_or_default()
}

/// Replaces `npm run x`, `yarn x`, `pnpm x` by what the script does, and `npx x` by x, which is on the PATH.
fn without_package_manager(
    manifest: &Manifest,
    script: &str,
    hops: usize,
) -> Result<String, PlanError> {
    let refuse = |what: String| {
        PlanError::Unsupported {
        file: FILE.to_owned(),
        line: manifest.line(&["scripts", "start"]),
        what,
        hint: "the image has Node and no package manager: start with node, or a program of a dependency".to_owned(),
    }
    };
    if hops > SCRIPT_HOPS_MAX {
        return Err(refuse(
            "scripts.start leads from script to script without end".to_owned(),
        ));
    }
    let mut out = String::new();
    for (separator, part) in parts(script) {
        out.push_str(separator);
        let trimmed = part.trim();
        let words: Vec<_> = trimmed.split_whitespace().collect();
        let run = match words.as_slice() {
            ["npm", "start", ..] | ["pnpm" | "yarn", "start", ..] => Some(("start", 2)),
            ["npm" | "pnpm" | "yarn", "run" | "run-script", name, ..] => Some((*name, 3)),
            ["pnpm" | "yarn", name, ..] if manifest.script(name).is_some() => Some((*name, 2)),
            ["npx" | "pnpx", rest @ ..] | ["npm" | "pnpm" | "yarn", "exec", rest @ ..] => {
                let rest: Vec<_> = rest
                    .iter()
                    .skip_while(|w| w.starts_with('-'))
                    .copied()
                    .collect();
                out.push_str(&rest.join(" "));
                continue;
            }
            ["npm" | "pnpm" | "yarn", ..] => {
                return Err(refuse(format!("scripts.start runs `{trimmed}`")));
            }
            _ => None,
        };
        let Some((name, used)) = run else {
            out.push_str(trimmed);
            continue;
        };
        let Some(inner) = manifest.script(name) else {
            return Err(refuse(format!(
                "scripts.start runs {name:?}, and there is no such script"
            )));
        };
        let inner = without_package_manager(manifest, inner, hops + 1)?;
        let rest: Vec<_> = words[used..]
            .iter()
            .filter(|w| **w != "--")
            .copied()
            .collect();
        let whole = separator.is_empty() && trimmed.len() == script.trim().len();
        let line = [&[inner.as_str()], rest.as_slice()].concat().join(" ");
        match whole || !line.contains(['&', '|', ';']) {
            true => out.push_str(&line),
            false => out.push_str(&format!("( {line} )")),
        }
    }
    Ok(out)
}

/// Commands between `&&`, `||` and `;`, each with the separator in front of it. A script with quotes is one part.
fn parts(script: &str) -> Vec<(&'static str, &str)> {
    if script.contains(['"', '\'', '\\', '`']) {
        return vec![("", script)];
    }
    let mut found = Vec::new();
    let mut separator = "";
    let mut rest = script;
    loop {
        let next = [("&&", " && "), ("||", " || "), (";", "; ")]
            .into_iter()
            .filter_map(|(mark, text)| Some((rest.find(mark)?, mark, text)))
            .min();
        let Some((at, mark, text)) = next else {
            found.push((separator, rest));
            return found;
        };
        found.push((separator, &rest[..at]));
        separator = text;
        rest = &rest[at + mark.len()..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(json: &str, script: &str) -> Result<String, PlanError> {
        let manifest = Manifest::parse(json.to_owned()).expect("legal");
        without_package_manager(&manifest, script, 0)
    }

    #[test]
    fn start_scripts_lose_their_package_manager() {
        let json = r#"{"scripts": {"serve": "node dist/x.js", "a": "npm run b", "b": "npm run a", "two": "x && y"}}"#;
        for (script, want) in [
            ("node .", "node ."),
            ("npm run serve", "node dist/x.js"),
            ("npm run serve -- --port 1", "node dist/x.js --port 1"),
            ("yarn serve", "node dist/x.js"),
            ("pnpm run two && node y", "( x && y ) && node y"),
            ("npx next start", "next start"),
            ("npx --no-install tsx a.ts", "tsx a.ts"),
            ("node -e 'a && b'", "node -e 'a && b'"),
        ] {
            assert_eq!(plain(json, script).expect(script), want);
        }
        for bad in ["npm run a", "npm run none", "npm install && node x", "yarn"] {
            assert!(plain(json, bad).is_err(), "{bad}");
        }
    }
}
