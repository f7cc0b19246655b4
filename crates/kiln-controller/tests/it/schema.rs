//! The OpenAPI document against the server itself, by schemathesis: whatever it makes up, nothing of it is a server error.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::json;

use crate::server::Server;

/// The tools: one that makes requests up, one that reads the document itself, and a provider of identity tokens for
/// [`crate::identity_issuer`]. Another major version has other options.
const TOOLS: [&str; 3] = [
    "schemathesis>=4.0,<5",
    "openapi-spec-validator>=0.7,<1",
    "oidc-provider-mock>=0.3,<0.4",
];
/// What must hold: no server error, and of every answer status, type and body as the document says.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
/// Longest time it may take.
const SECONDS: &str = "45";

/// Folder of the tools' programs: an environment of their own, made once below the build folder.
pub(crate) fn tools() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| install(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("api-tools-2")))
}

fn install(folder: &Path) -> PathBuf {
    let done = folder.join("complete");
    if done.exists() {
        return folder.join("bin");
    }
    let run = |program: &Path, arguments: &[&str]| {
        let done = Command::new(program)
            .args(arguments)
            .output()
            .expect("starts");
        let words = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(
            done.status.success(),
            "{} {arguments:?}: {words}",
            program.display()
        );
    };
    // Never skipped: without the tools the promise is not kept, and the tests say so.
    let path = folder.to_str().expect("path");
    run(Path::new("python3"), &["-m", "venv", path]);
    let install = ["-m", "pip", "install", "--quiet"];
    run(&folder.join("bin/python"), &[&install[..], &TOOLS].concat());
    std::fs::write(done, "").expect("written");
    folder.join("bin")
}

#[test]
fn the_document_is_what_openapi_asks_for() {
    let folder = tempfile::tempdir().expect("dir");
    let file = folder.path().join("openapi.json");
    let document = kiln_controller::api::openapi().to_json().expect("JSON");
    std::fs::write(&file, document).expect("written");
    let done = Command::new(tools().join("openapi-spec-validator"))
        .arg(&file)
        .output();
    let done = done.expect("starts");
    let words = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        done.status.success(),
        "{words}{}",
        String::from_utf8_lossy(&done.stderr)
    );
}

#[test]
fn nothing_that_can_be_made_up_is_a_server_error() {
    let program = tools().join("schemathesis");
    let server = Server::start();
    let token = server
        .token(&json!({"tenant": "local", "role": "admin", "operator": true}))
        .token;
    let other = server.member("acme", "developer");
    other.run();
    let folder = tempfile::tempdir().expect("dir");
    // Followers wait until a job is over, so jobs come to their end while the tool works.
    let over = Arc::new(AtomicBool::new(false));
    let ender = {
        let (owner, over) = (server.owner(), Arc::clone(&over));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let open = owner.get("/v1/jobs?state=queued&limit=500").value();
                for job in open["items"].as_array().into_iter().flatten() {
                    owner.delete(&format!(
                        "/v1/jobs/{}",
                        job["id"].as_str().unwrap_or_default()
                    ));
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        })
    };
    // One worker: threads of Python 3.11 trip over each other when they read source code.
    let done = Command::new("timeout")
        .args(["120"])
        .arg(program)
        .args(["run", &format!("http://{}/v1/openapi.json", server.address)])
        .args(["--header", &format!("Authorization: Bearer {token}")])
        // One worker: with two, Python 3.11 itself loses count of its parser (`AST constructor recursion depth mismatch`).
        .args(["--checks", CHECKS, "--max-time", SECONDS, "--workers", "1"])
        .args([
            "--max-examples",
            "40",
            "--seed",
            "1",
            "--request-timeout",
            "10",
        ])
        .args(["--suppress-health-check", "all", "--no-color"])
        .current_dir(folder.path())
        .output()
        .expect("starts");
    over.store(true, Ordering::Relaxed);
    ender.join().expect("thread");
    let words = String::from_utf8_lossy(&done.stdout).into_owned();
    let wrong = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{words}\n{wrong}");
    assert_eq!(server.owner().get("/v1/jobs").status, 200, "it serves on");
    assert_eq!(
        server.client(&token).get("/v1/whoami").status,
        200,
        "it had a good token to the end"
    );
}

#[test]
fn the_document_in_the_docs_is_the_servers() {
    let document = kiln_controller::api::openapi()
        .to_pretty_json()
        .expect("JSON");
    kiln_testkit::Golden::new("../../docs/reference/api/openapi.json").check(&document);
}
