//! Folders without a plan: each error names what to add. And small folders for one detail each.

use std::collections::BTreeMap;
use std::fs;

use kiln_image::bases::Bases;
use kiln_image::plan::{DockerfileChoice, Options, Plan, PlanError, RuntimeKind, plan};

use crate::plans::baked;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("folders");
        fs::write(path, text).expect("a file");
    }
    dir
}

fn with(files: &[(&str, &str)], bases: &Bases) -> Result<Plan, PlanError> {
    plan(folder(files).path(), &Options::default(), bases)
}

fn of(files: &[(&str, &str)]) -> Plan {
    with(files, &baked()).unwrap_or_else(|e| panic!("{files:?}: {e}: {:?}", e.hint()))
}

/// The error and its hint, in one text.
fn refused(files: &[(&str, &str)]) -> String {
    let error = with(files, &baked()).expect_err("no plan");
    assert_eq!(error.class().exit_code(), 2, "{error}");
    let source = std::error::Error::source(&error).map_or_else(String::new, ToString::to_string);
    format!("{error} | {source} | {}", error.hint().unwrap_or_default())
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

const APP: &str = r#"{"name": "a", "main": "index.js", "dependencies": {"x": "1"}}"#;
const LOCK: &str = r#"{"lockfileVersion": 3, "packages": {}}"#;

#[test]
fn nothing_to_build() {
    has(&refused(&[]), &["is empty", "package.json", "Dockerfile"]);
    has(&refused(&[(".gitignore", "x")]), &["is empty"]);
    has(
        &refused(&[("notes.md", ""), ("a/b", "")]),
        &["notes.md", "subfolder"],
    );
    has(
        &refused(&[("go.mod", "module x")]),
        &["go.mod", "Go", "Dockerfile"],
    );
    has(
        &refused(&[("web/package.json", "{}")]),
        &["web", "subfolder = \"web\""],
    );
    has(
        &refused(&[("web/package.json", "{}"), ("api/Dockerfile", "")]),
        &["apps in api, web", "subfolder"],
    );
    let outer = folder(&[("package.json", "{}"), ("src/x.js", ""), ("src/none/a", "")]);
    for (below, said) in [("src", "one level up"), ("src/none", "add a package.json")] {
        let bases = baked();
        let error = plan(&outer.path().join(below), &Options::default(), &bases);
        let hint = error.expect_err("no app").hint().expect("a hint");
        has(&hint, &[said]);
    }
    let gone = plan("/does/not/exist".as_ref(), &Options::default(), &baked());
    assert!(matches!(gone, Err(PlanError::Read { .. })));
}

#[test]
fn misspelt_files_are_named() {
    has(
        &refused(&[("requirments.txt", ""), ("app.py", "")]),
        &["requirments.txt", "rename", "requirements.txt"],
    );
    has(
        &refused(&[("pakcage.json", "")]),
        &["rename pakcage.json to package.json"],
    );
    has(
        &refused(&[("package-lock.json", LOCK)]),
        &["no package.json"],
    );
    has(
        &refused(&[("uv.lock", "version = 1"), ("main.py", "")]),
        &["pyproject.toml"],
    );
    has(
        &refused(&[("main.py", "import os\nfrom flask import Flask\n")]),
        &["line 2", "requirements.txt", "flask"],
    );
}

#[test]
fn lockfiles_that_are_missing_or_too_many() {
    has(
        &refused(&[("package.json", APP), ("index.js", "")]),
        &["lockfile", "npm install --package-lock-only"],
    );
    let pnpm = r#"{"packageManager": "pnpm@9.1.0", "dependencies": {"x": "1"}}"#;
    has(
        &refused(&[("package.json", pnpm)]),
        &["pnpm install --lockfile-only"],
    );
    let both = [
        ("package.json", APP),
        ("package-lock.json", LOCK),
        ("yarn.lock", "# yarn lockfile v1\n"),
    ];
    has(
        &refused(&both),
        &["package-lock.json, yarn.lock", "packageManager"],
    );
    let project = "[project]\nname = \"x\"\ndependencies = [\"flask\"]\n";
    has(
        &refused(&[("pyproject.toml", project)]),
        &["uv lock", "uv.lock"],
    );
    has(
        &refused(&[(
            "pyproject.toml",
            "[tool.poetry.dependencies]\npython = \"^3.11\"\nflask = \"3\"\n",
        )]),
        &["poetry lock"],
    );
    has(
        &refused(&[("Pipfile", "[packages]\nflask = \"*\"\n")]),
        &["pipenv lock"],
    );
    let two = [
        ("pyproject.toml", project),
        ("uv.lock", ""),
        ("poetry.lock", ""),
    ];
    has(&refused(&two), &["uv.lock, poetry.lock"]);
    has(
        &refused(&[("package.json", APP), ("bun.lockb", "")]),
        &["Bun"],
    );
    let mismatch = r#"{"packageManager": "yarn@4.1.0",
        "dependencies": {"x": "1"}}"#;
    has(
        &refused(&[("package.json", mismatch), ("package-lock.json", LOCK)]),
        &["line 1", "package-lock.json"],
    );
}

#[test]
fn versions_that_are_not_there_list_those_that_are() {
    let text = refused(&[
        (
            "package.json",
            "{\n  \"main\": \"a.js\",\n  \"engines\": {\n    \"node\": \"^22\"\n  }\n}",
        ),
        ("a.js", ""),
    ]);
    has(
        &text,
        &[
            "package.json:4",
            "node ^22",
            "20 (20.19.2)",
            "kiln bases add node",
        ],
    );
    has(
        &refused(&[("main.py", ""), (".python-version", "# x\n3.12.1\n")]),
        &[".python-version:2", "3.13"],
    );
    has(
        &refused(&[
            ("package.json", r#"{"main": "a.js"}"#),
            ("a.js", ""),
            (".nvmrc", "lts/jod"),
        ]),
        &[".nvmrc:1"],
    );
    has(
        &refused(&[(
            "package.json",
            r#"{"main": "a.js", "engines": {"node": "new"}}"#,
        )]),
        &["no version or range"],
    );
    let error = with(&[("main.py", "")], &Bases::default()).expect_err("no bases");
    has(&error.to_string(), &["none"]);
}

#[test]
fn versions_that_are_there() {
    let version = |files: &[(&str, &str)]| of(files).version.expect("a version");
    let js = [("package.json", r#"{"main": "a.js"}"#), ("a.js", "")];
    for (file, text) in [
        (".nvmrc", "v20.11.1"),
        (".nvmrc", "lts/iron\n"),
        (".node-version", "20"),
        (".nvmrc", "lts/*"),
    ] {
        let found = version(&[js[0], js[1], (file, text)]);
        assert_eq!(
            (found.version.as_str(), found.why.file.as_str()),
            ("20", file)
        );
    }
    for (file, text) in [
        (".python-version", "3.13\n"),
        ("runtime.txt", "python-3.13.2"),
        (
            "pyproject.toml",
            "[project]\nname = \"x\"\nrequires-python = \">=3.11,<4\"\n",
        ),
        ("Pipfile.lock", "{}"),
    ] {
        let mut files = vec![("main.py", ""), (file, text)];
        if file == "Pipfile.lock" {
            files.push(("Pipfile", "[requires]\npython_version = \"3.13\"\n"));
        }
        assert_eq!(version(&files).version, "3.13", "{file}");
    }
    let plan = of(&[js[0], js[1], (".nvmrc", "20.1.0")]);
    assert!(
        plan.notes
            .iter()
            .any(|note| note.what.contains("exactly 20.1.0")),
        "{:?}",
        plan.notes
    );
}

#[test]
fn broken_files_name_the_line() {
    has(
        &refused(&[("package.json", "{\n \"a\": 1,\n}")]),
        &["package.json, line 3", "not JSON"],
    );
    has(
        &refused(&[("package.json", "{\n \"scripts\": {\n \"start\": 1}\n}")]),
        &["line 3", "scripts.start"],
    );
    has(&refused(&[("package.json", "[]")]), &["not a JSON object"]);
    has(
        &refused(&[("pyproject.toml", "[project]\nname = \n")]),
        &["pyproject.toml, line 2"],
    );
    has(
        &refused(&[("main.py", ""), ("kiln.toml", "[build]\nstrat = \"x\"\n")]),
        &["kiln.toml, line 2", "strat"],
    );
    has(
        &refused(&[
            ("main.py", ""),
            ("kiln.toml", "[build]\n\nsubfolder = \"x\"\n"),
        ]),
        &["line 3", "no folder"],
    );
    has(
        &refused(&[("main.py", ""), ("Procfile", "worker: x\n")]),
        &["Procfile", "web:", "worker"],
    );
    has(
        &refused(&[("Dockerfile", "FROM scratch\nFORM x\n")]),
        &["Dockerfile line 2", "FORM".to_lowercase().as_str()],
    );
    has(
        &refused(&[("requirements.txt", "-r base.txt\n"), ("app.py", "")]),
        &["requirements.txt, line 1", "base.txt"],
    );
}

#[test]
fn apps_that_cannot_start() {
    has(
        &refused(&[("package.json", "{}")]),
        &["start script", "Procfile", "kiln.toml"],
    );
    has(
        &refused(&[("package.json", r#"{"main": "gone.js"}"#)]),
        &["gone.js"],
    );
    let nodemon = r#"{"scripts": {"start": "nodemon a.js"}, "devDependencies": {"nodemon": "3"}}"#;
    has(
        &refused(&[("package.json", nodemon), ("package-lock.json", LOCK)]),
        &["nodemon", "development dependency"],
    );
    let flask = [
        ("requirements.txt", "flask==3.1.3\n"),
        ("app.py", "from flask import Flask\napp = Flask(__name__)\n"),
    ];
    has(
        &refused(&flask),
        &["Flask", "add gunicorn to requirements.txt", "Procfile"],
    );
    let fast = [
        ("requirements.txt", "fastapi==0.1\n"),
        ("m.py", "app = FastAPI()\n"),
    ];
    has(&refused(&fast), &["FastAPI", "uvicorn"]);
    has(&refused(&[("requirements.txt", "x==1\n")]), &["main.py"]);
}

#[test]
fn what_the_owner_says_wins() {
    let js = [
        (
            "package.json",
            r#"{"main": "a.js", "scripts": {"build": "x", "start": "y"}}"#,
        ),
        ("a.js", ""),
    ];
    let said = "[build]\nstart = [\"node\", \"b c.js\"]\nbuild = \"make all && true\"\nport = 8080\nenvironment = { A = \"x y\" }\n";
    let plan = of(&[js[0], js[1], ("kiln.toml", said), ("Procfile", "web: z\n")]);
    assert_eq!(plan.port, Some(8080));
    has(
        &plan.dockerfile,
        &[
            "CMD [\"node\", \"b c.js\"]",
            "\"PATH=/app/node_modules/.bin:$PATH; make all && true\"",
            "A=\"x y\"",
            "PORT=8080",
            "EXPOSE 8080",
        ],
    );
    let plan = of(&[
        js[0],
        js[1],
        ("Procfile", "# x\nweb: node z.js --port $PORT\n"),
    ]);
    let start = plan.start.expect("a start");
    assert_eq!(
        (start.line.as_str(), start.why.line),
        ("exec node z.js --port $PORT", Some(2))
    );
    let sub = [
        ("kiln.toml", "[build]\nsubfolder = \"apps/a\"\n"),
        ("apps/a/main.py", ""),
        ("package.json", "{}"),
    ];
    let plan = of(&sub);
    assert_eq!(
        (plan.root.as_str(), plan.runtime),
        ("apps/a", RuntimeKind::Python)
    );
    let both = [
        ("requirements.txt", "x==1\n"),
        ("main.py", ""),
        js[0],
        js[1],
    ];
    assert_eq!(of(&both).runtime, RuntimeKind::Python);
    let both = [
        both[0],
        both[1],
        both[2],
        both[3],
        ("kiln.toml", "[build]\nruntime = \"node\"\n"),
    ];
    assert_eq!(of(&both).runtime, RuntimeKind::Node);
}

#[test]
fn an_install_command_without_dependencies_is_run() {
    let plan = of(&[
        ("package.json", r#"{"main": "a.js"}"#),
        ("a.js", ""),
        ("setup.sh", ""),
        ("kiln.toml", "[build]\ninstall = \"sh setup.sh\"\n"),
    ]);
    assert_eq!(plan.install.len(), 1);
    assert_eq!(plan.install[0].line, "sh setup.sh");
    let at = |text: &str| plan.dockerfile.find(text).expect(text);
    assert!(
        at("COPY . .") < at("\"sh setup.sh\""),
        "{}",
        plan.dockerfile
    );
    assert!(at("\"sh setup.sh\"") < at("--from=build /app ./"));
    assert!(
        !plan.dockerfile.contains("npm prune"),
        "{}",
        plan.dockerfile
    );
}

#[test]
fn a_dockerfile_may_be_a_link_that_stays_in_the_folder() {
    use std::os::unix::fs::symlink;
    let dir = folder(&[("deploy/app", "FROM scratch\nCOPY x /\n"), ("x", "")]);
    let file = dir.path().join("Dockerfile");
    symlink("deploy/app", &file).expect("link");
    let plan = plan_with(&dir, &Options::default()).expect("inside");
    assert_eq!(plan.dockerfile_path.as_deref(), Some("Dockerfile"));
    for (target, said) in [
        ("/etc/hostname", "not in the folder"),
        ("../x", "not in the folder"),
        ("gone", "not there"),
        ("deploy", "not a file"),
    ] {
        std::fs::remove_file(&file).expect("removed");
        symlink(target, &file).expect("link");
        let error = plan_with(&dir, &Options::default()).expect_err(target);
        assert_eq!(error.class().exit_code(), 2);
        has(&error.to_string(), &["Dockerfile is a symbolic link", said]);
        has(&error.hint().expect("a hint"), &["--file"]);
    }
    let dir = folder(&[("p.json", "{}")]);
    symlink("p.json", dir.path().join("package.json")).expect("link");
    let error = plan_with(&dir, &Options::default()).expect_err("a manifest");
    has(&error.to_string(), &["package.json is a symbolic link"]);
}

#[test]
fn names_do_not_drive_the_terminal() {
    let text = refused(&[("a\nhint: rm -rf\x1b[2J", "")]);
    has(&text, &["a\\nhint: rm -rf\\u{1b}[2J"]);
    let plan = of(&[
        (
            "package.json",
            "{\"scripts\": {\"start\": \"a\\u001b[2J\\nnode x\"}}",
        ),
        ("x.js", ""),
    ]);
    let shown = kiln_image::plan::render(&plan);
    let above = shown.split("as it is built").next().expect("the facts");
    assert!(!above.contains('\x1b'), "{above}");
}

#[test]
fn the_users_dockerfile_is_used_and_pinned() {
    let text = "# syntax=docker/dockerfile:1\nFROM node:20-slim\nRUN npm ci && apt-get update\nEXPOSE 80\n";
    let plan = of(&[("Dockerfile", text), ("package.json", "{}")]);
    assert_eq!(plan.runtime, RuntimeKind::Dockerfile);
    assert_eq!(plan.dockerfile_path.as_deref(), Some("Dockerfile"));
    assert_eq!(plan.registries, ["node", "debian"]);
    assert_eq!(plan.port, Some(80));
    assert!(
        plan.dockerfile
            .contains("FROM registry.kiln.internal/shared/node:20-build@sha256:")
    );
    let refused = with(&[("Dockerfile", "FROM busybox\n")], &baked()).expect_err("unknown");
    assert_eq!(refused.class().exit_code(), 4);
    has(
        &refused.hint().expect("a hint"),
        &["kiln bases add busybox"],
    );
    let dir = folder(&[
        (
            "docker/app.Dockerfile",
            "FROM scratch AS one\nFROM scratch\n",
        ),
        ("Dockerfile", "x"),
    ]);
    let mut options = Options {
        dockerfile: Some(DockerfileChoice::InFolder(
            "docker/app.Dockerfile".to_owned(),
        )),
        target: Some("one".to_owned()),
        build_args: BTreeMap::new(),
    };
    assert!(plan_with(&dir, &options).is_ok());
    options.target = Some("two".to_owned());
    assert!(plan_with(&dir, &options).is_err());
    options.dockerfile = Some(DockerfileChoice::Text {
        name: "-".to_owned(),
        text: "FROM scratch AS two\n".to_owned(),
    });
    let found = plan_with(&dir, &options).expect("plans");
    assert_eq!(found.dockerfile_path.as_deref(), Some("-"));
    options.dockerfile = Some(DockerfileChoice::InFolder("gone".to_owned()));
    assert!(matches!(
        plan_with(&dir, &options),
        Err(PlanError::Read { .. })
    ));
    let said = [
        ("Dockerfile", "FROM scratch\n"),
        ("kiln.toml", "[build]\nstart = \"x\"\n"),
    ];
    has(
        &super::near_misses::refused(&said),
        &["start has no meaning"],
    );
}

fn plan_with(dir: &tempfile::TempDir, options: &Options) -> Result<Plan, PlanError> {
    plan(dir.path(), options, &baked())
}

#[test]
fn a_folder_with_an_index_page_is_a_site() {
    let site = [("index.html", "<h1>x</h1>"), ("style.css", "")];
    let plan = of(&site);
    assert_eq!(plan.runtime, RuntimeKind::Static);
    assert_eq!((plan.port, plan.registries.len()), (Some(3000), 0));
    assert!(plan.install.is_empty() && plan.build.is_empty());
    has(
        &plan.dockerfile,
        &[
            "node:20-run@sha256:",
            "COPY --link . /app/site\n",
            "USER 10001:10001\n",
            "\"/app/serve.mjs\"",
        ],
    );
    assert!(!plan.dockerfile.contains("-build@"), "nothing is built");
    assert!(plan.extra_ignores.iter().any(|one| one == "kiln.toml"));
    let config = (
        "kiln.toml",
        "[build]\nport = 80\nenvironment = { TZ = \"UTC\" }\n",
    );
    has(&of(&[site[0], config]).dockerfile, &["PORT=80", "TZ=UTC"]);
    let config = ("kiln.toml", "[build]\n\nbuild = \"hugo\"\n");
    has(
        &refused(&[site[0], config]),
        &["kiln.toml, line 3", "folder of files", "Dockerfile"],
    );
    // Said by the owner, also where there is a package.json.
    let config = ("kiln.toml", "[build]\nruntime = \"static\"\n");
    let json = ("package.json", r#"{"devDependencies": {"prettier": "3"}}"#);
    assert_eq!(of(&[site[0], json, config]).runtime, RuntimeKind::Static);
    has(&refused(&[("x.txt", ""), config]), &["index.html"]);
    // Another runtime's page is not a site.
    has(
        &refused(&[site[0], ("go.mod", "module x")]),
        &["Go", "Dockerfile"],
    );
}

#[test]
fn bun_says_what_to_do_instead() {
    let lock = "npm install --package-lock-only";
    has(
        &refused(&[("package.json", APP), ("bun.lock", "")]),
        &["bun.lock", "Bun is not supported", lock],
    );
    has(
        &refused(&[
            ("package.json", r#"{"packageManager": "bun@1.2.3"}"#),
            ("bun.lock", ""),
        ]),
        &[
            "package.json, line 1",
            "bun is not supported",
            "npm, pnpm or yarn",
            "Dockerfile",
        ],
    );
    let start = r#"{"scripts": {"start": "bun run index.ts"}}"#;
    has(
        &refused(&[("package.json", start), ("package-lock.json", LOCK)]),
        &["runs bun", "start with node", "Dockerfile"],
    );
}

const ROOT: &str = r#"{"private": true, "workspaces": ["apps/*", "libs/*"]}"#;

#[test]
fn workspaces_install_together_or_say_what_is_missing() {
    let members = [
        ("package-lock.json", LOCK),
        (
            "apps/api/package.json",
            r#"{"name": "api", "scripts": {"start": "node server.js"}}"#,
        ),
        ("apps/api/server.js", ""),
        (
            "libs/log/package.json",
            r#"{"name": "log", "main": "index.js"}"#,
        ),
    ];
    // Which member starts is nowhere said.
    let root = ("package.json", ROOT);
    let mut files = vec![root];
    files.extend(members);
    has(
        &refused(&files),
        &[
            "workspace",
            "kiln.toml",
            r#"start = "cd apps/api && node server.js""#,
            "--workspaces",
        ],
    );
    let config = (
        "kiln.toml",
        "[build]\nstart = \"cd apps/api && node server.js\"\n",
    );
    files.push(config);
    let plan = of(&files);
    has(
        &plan.dockerfile,
        &[
            "COPY apps/api/package.json ./apps/api/\n",
            "COPY libs/log/package.json ./libs/log/\n",
            "npm ci",
            "cd apps/api && node server.js",
        ],
    );
    // A member is not an app of its own: its lockfile is the workspace's.
    files.pop();
    files.push(("kiln.toml", "[build]\nsubfolder = \"apps/api\"\n"));
    files[2].1 =
        r#"{"name": "api", "dependencies": {"x": "1"}, "scripts": {"start": "node server.js"}}"#;
    has(
        &refused(&files),
        &[
            "no lockfile",
            "apps/api is a member of the workspace",
            "remove subfolder",
        ],
    );
    // Without a lockfile there is nothing to install from.
    has(
        &refused(&[root, members[1], members[2]]),
        &["lockfile", "npm install --package-lock-only"],
    );
}

#[test]
fn public_names_are_build_bases_and_the_plan_says_what_is_smaller() {
    let slim = "FROM python:3.13-slim\nRUN pip install flask\nCMD [\"flask\", \"run\"]\n";
    let plan = of(&[("Dockerfile", slim)]);
    has(&plan.dockerfile, &["python:3.13-build@sha256:"]);
    let note = plan.notes.first().expect("a note");
    assert_eq!(note.line, Some(1));
    has(
        &note.what,
        &[
            "python:3.13-slim",
            "FROM registry.kiln.internal/shared/python:3.13-run",
        ],
    );
    let own = "FROM node:20-slim AS deps\nRUN npm ci\nFROM registry.kiln.internal/shared/node:20-run\nCOPY --from=deps /x /x\n";
    let plan = of(&[("Dockerfile", own)]);
    has(
        &plan.dockerfile,
        &["node:20-build@sha256:", "node:20-run@sha256:"],
    );
    assert_eq!(plan.notes, []);
}
