//! Apps as people publish them: each is built in a machine, started, asked over HTTP, and looked into.
//!
//! The apps lie in `tests/apps` with their lockfiles. No lockfile there names a registry: which one is used is the host's setting.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::build::copy;
use crate::support::{Kiln, Started, app, free_port, get, kiln, path, root, said, until};

/// Number of the user that apps run as.
const USER: u64 = 10001;

/// An image that runs and answers.
struct App {
    running: Started,
    port: u16,
}

impl App {
    fn start(kiln: &Kiln, image: &str, guest_port: u16, env: &[&str]) -> Self {
        let port = free_port();
        let publish = format!("{port}:{guest_port}");
        let mut args = vec!["run", "--image", image, "-p", &publish];
        args.extend(env.iter().flat_map(|pair| ["--env", pair]));
        Self {
            running: kiln.start(&args),
            port,
        }
    }

    /// Status, and the whole answer.
    fn get(&mut self, target: &str) -> (u16, String) {
        until("the app to answer", || {
            if let Ok(Some(status)) = self.running.child.try_wait() {
                panic!("kiln run ended: {status}");
            }
            get(self.port, target).filter(|(code, _)| *code != 502)
        })
    }

    /// The body of a page that is there.
    #[track_caller]
    fn page(&mut self, target: &str) -> String {
        let (code, text) = self.get(target);
        assert_eq!(code, 200, "{target}: {text}");
        let (_, body) = text.split_once("\r\n\r\n").expect("a body");
        body.to_owned()
    }

    #[track_caller]
    fn json(&mut self, target: &str) -> Value {
        let body = self.page(target);
        serde_json::from_str(&body).unwrap_or_else(|e| panic!("{target}: {e}: {body}"))
    }

    fn stop(self) {
        self.running.signal("INT");
        let said = self.running.end();
        assert_eq!(said.code, 130, "{said:?}");
    }
}

/// What a command in the image prints.
fn inside(kiln: &Kiln, image: &str, command: &str) -> String {
    let args = ["run", "--image", image, "--", "/bin/sh", "-c", command];
    kiln.run(&args).exits(0).out
}

fn words(text: &str) -> BTreeSet<&str> {
    text.split_whitespace().collect()
}

#[test]
fn a_multi_stage_node_app_with_a_build_script_and_a_native_module() {
    let Some(kiln) = kiln() else { return };
    let dir = copy("crates/kiln-cli/tests/apps/node-native");
    let image = "it-node-native";
    let built = kiln.build(dir.path(), image, &["--build-arg", "VERSION=2.3.0"]);
    let mut app = App::start(&kiln, image, 3000, &[]);
    let version = app.json("/version");
    assert_eq!(version["version"], "2.3.0", "the build argument: {version}");
    assert_eq!(version["user"], USER);
    // A message through a WebSocket, whose frames the native module masks: the one that was compiled here.
    let echo = app.json("/echo");
    assert_eq!(echo["length"], 1000);
    let native = echo["native"].as_str().expect("a loaded module");
    assert!(
        native.ends_with("/build/Release/bufferutil.node"),
        "{native}"
    );
    assert!(app.page("/site.css").contains("font-family"));
    app.stop();
    let found = inside(
        &kiln,
        image,
        "cd node_modules; ls -d */package.json; command -v npm gcc || true",
    );
    assert_eq!(
        words(&found),
        words("bufferutil/package.json node-gyp-build/package.json ws/package.json"),
        "{found}"
    );
    assert_eq!(built["egress"]["refused"], serde_json::json!([]), "{built}");
}

#[test]
fn a_yarn_1_app_with_a_build_script() {
    let Some(kiln) = kiln() else { return };
    let dir = copy("crates/kiln-cli/tests/apps/node-yarn1");
    let image = "it-node-yarn1";
    kiln.build(dir.path(), image, &[]);
    let mut app = App::start(&kiln, image, 3000, &[]);
    let about = app.json("/");
    assert_eq!(
        (&about["name"], &about["user"]),
        (&"links".into(), &USER.into())
    );
    let (code, text) = app.get("/docs");
    assert_eq!(code, 302, "{text}");
    assert!(text.contains("https://example.org/docs"), "{text}");
    app.stop();
    let found = inside(&kiln, image, "ls node_modules");
    let modules = words(&found);
    assert!(
        modules.contains("polka") && !modules.contains("uglify-js"),
        "{found}"
    );
}

#[test]
fn a_django_site_with_static_files() {
    let Some(kiln) = kiln() else { return };
    let dir = copy("crates/kiln-cli/tests/apps/django-site");
    let image = "it-django";
    kiln.build(dir.path(), image, &[]);
    let mut app = App::start(&kiln, image, 8000, &["DJANGO_SECRET_KEY=of-this-run"]);
    let page = app.page("/");
    assert!(page.contains(&format!("served by user {USER}")), "{page}");
    let sheet = page
        .split('"')
        .find(|part| part.ends_with(".css"))
        .expect("a style sheet");
    assert_ne!(sheet, "/static/pages/site.css", "named by its content");
    let (code, style) = app.get(sheet);
    assert_eq!(code, 200, "{style}");
    assert!(style.to_lowercase().contains("immutable"), "{style}");
    let picture = style
        .split('"')
        .find(|part| part.ends_with(".svg"))
        .expect("a picture");
    assert_ne!(picture, "paper.svg", "{style}");
    assert!(
        app.page(&format!("/static/pages/{picture}"))
            .contains("<svg")
    );
    app.stop();
    let found = inside(
        &kiln,
        image,
        "env | cut -d= -f1; ls /opt/venv/bin /opt/venv/lib/python3*/site-packages",
    );
    let names = words(&found);
    assert!(
        names.contains("whitenoise") && names.contains("gunicorn"),
        "{found}"
    );
    for absent in ["DJANGO_SECRET_KEY", "pytest", "pytest_django", "pip"] {
        assert!(!names.contains(absent), "{absent}: {found}");
    }
}

/// uv on this host: `make test` installs it apart.
fn uv() -> PathBuf {
    #[expect(
        clippy::disallowed_methods,
        reason = "the test command talks to tests this way"
    )]
    let named = std::env::var_os("KILN_TEST_UV");
    named.map_or_else(|| root().join("target/uv/bin/uv"), PathBuf::from)
}

/// Writes `uv.lock` as uv itself writes it with this host's index: same versions, and every file's hash as it is committed.
fn lock_with_this_hosts_index(kiln: &Kiln, dir: &Path) {
    let file = dir.join("uv.lock");
    let committed = fs::read_to_string(&file).expect("the lockfile");
    // Without what it says of the project itself uv makes it anew, and keeps to its versions.
    let (mut keeps, mut without) = (true, String::new());
    for line in committed.lines() {
        keeps = match line {
            "[package.metadata]" => false,
            "" => true,
            _ => keeps,
        };
        if keeps {
            without.push_str(line);
            without.push('\n');
        }
    }
    fs::write(&file, without).expect("write");
    let settings = kiln.home.join("config/registries.toml");
    let settings = fs::read_to_string(settings).expect("settings");
    let settings: toml::Table = settings.parse().expect("TOML");
    let index = settings["runtime"]["python"]["index"].as_str();
    let cache = tempfile::tempdir().expect("temp dir");
    let mut command = Command::new(uv());
    command
        .args(["lock", "--no-config", "--python", "/usr/bin/python3"])
        .args(["--default-index", index.expect("an index")])
        .arg("--directory")
        .arg(dir)
        .env("UV_CACHE_DIR", cache.path())
        .env("UV_PYTHON_DOWNLOADS", "never");
    if let Some(bundle) = settings["ca"]["files"][0].as_str() {
        command.env("SSL_CERT_FILE", bundle);
    }
    let said = said(command);
    assert_eq!(said.code, 0, "{said:?}");
    let lock = fs::read_to_string(&file).expect("the lockfile");
    assert!(!lock.contains(".invalid/"), "{lock}");
    for part in committed.split("hash = \"").skip(1) {
        let hash = part.split('"').next().expect("a hash");
        assert!(
            lock.contains(hash),
            "{hash} is not what this host's index has"
        );
    }
}

#[test]
fn a_fastapi_app_with_uv() {
    let Some(kiln) = kiln() else { return };
    let dir = copy("crates/kiln-cli/tests/apps/fastapi-uv");
    let refused = kiln.run(&["build", path(dir.path())]).exits(4);
    refused
        .says("uv.lock")
        .says("index.invalid")
        .says("--allow");
    lock_with_this_hosts_index(&kiln, dir.path());
    let image = "it-fastapi";
    kiln.build(dir.path(), image, &[]);
    let mut app = App::start(&kiln, image, 8000, &[]);
    let about = app.json("/");
    assert_eq!(about["user"], USER);
    let native = about["native"].as_array().expect("a list");
    assert!(!native.is_empty(), "pydantic's compiled core: {about}");
    assert_eq!(app.json("/quotes/1")["author"], "A. Korzybski");
    assert_eq!(app.get("/quotes/9").0, 404);
    app.stop();
    let found = inside(
        &kiln,
        image,
        "ls /opt/venv/bin /opt/venv/lib/python3*/site-packages; command -v uv || true",
    );
    let names = words(&found);
    assert!(names.contains("fastapi"), "{found}");
    for absent in ["pytest", "pip", "uv", "/usr/local/bin/uv"] {
        assert!(!names.contains(absent), "{absent}: {found}");
    }
}

#[test]
fn a_vite_site_is_built_and_served() {
    let Some(kiln) = kiln() else { return };
    let dir = copy("crates/kiln-cli/tests/apps/vite-site");
    let image = "it-vite";
    kiln.build(dir.path(), image, &[]);
    let mut app = App::start(&kiln, image, 3000, &[]);
    let page = app.page("/");
    let script = page
        .split('"')
        .find(|part| part.ends_with(".js"))
        .expect("a script");
    assert!(script.starts_with("/assets/"), "{page}");
    assert!(app.page(script).contains("you are at"));
    assert!(
        app.page("/some/page/of/the/app").contains(script),
        "a single page app"
    );
    assert!(app.page("/robots.txt").starts_with("User-agent"));
    assert_eq!(app.get("/nothing.png").0, 404);
    app.stop();
}

#[test]
fn a_folder_with_an_index_page_is_served() {
    let Some(kiln) = kiln() else { return };
    let dir = app(&[
        ("index.html", "<h1>hello</h1>"),
        ("docs/index.html", "the docs"),
        ("404.html", "lost"),
        (".env", "SECRET=1"),
        ("kiln.toml", "[build]\nport = 8080\n"),
    ]);
    let image = "it-index-page";
    kiln.build(dir.path(), image, &[]);
    let mut app = App::start(&kiln, image, 8080, &[]);
    assert_eq!(app.page("/"), "<h1>hello</h1>");
    assert_eq!(app.page("/docs/"), "the docs");
    let (code, text) = app.get("/.env");
    assert_eq!(code, 404);
    assert!(text.contains("lost") && !text.contains("SECRET"), "{text}");
    app.stop();
    let found = inside(&kiln, image, "id -u; ls -A site");
    assert_eq!(
        words(&found),
        words("10001 index.html docs 404.html"),
        "{found}"
    );
}
