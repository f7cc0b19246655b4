//! Policies over HTTP: compiled by the controller, bounded by the operator's grant of that tenant, narrowed by the request, and never given to a
//! worker that would not hold a job to them.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;

use kiln_controller::api::{Backend as _, ListenConfig};
use kiln_core::dispatch::POLICY_GENERATION;
use kiln_core::{JobKind, JobRequest, NetworkPolicy, PendingReason};
use kiln_db::OpenOptions;
use kiln_proto::fleet::GENERATION;
use serde_json::{Value, json};

use crate::fleet_server::{BEAT, Fleet, PATIENCE, script};
use crate::fleet_worker::{Ledger, Line, SimWorker};
use crate::server::{Client, Server, archive};

/// A server whose operator's grants a test writes.
pub(crate) struct Granting {
    pub(crate) server: Server,
    grants: PathBuf,
    _folder: tempfile::TempDir,
}

impl Granting {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let grants = folder.path().join("policy.toml");
        let path = grants.clone();
        let server = Server::with(
            move |config| config.grants = Some(path),
            ListenConfig::default(),
        );
        Self {
            server,
            grants,
            _folder: folder,
        }
    }

    pub(crate) fn grant(&self, text: &str) {
        std::fs::write(&self.grants, text).expect("grants");
    }

    pub(crate) fn request(&self, job: &Value) -> JobRequest {
        let id = job["id"].as_str().expect("id").parse().expect("id");
        let job = self.server.run(self.server.parts.db().job(&id));
        job.expect("answers").expect("a job").request
    }
}

fn run(policy: &str) -> Value {
    json!({"argv": ["true"], "policy": {"file": "kiln.yaml", "text": policy}})
}

fn ask(client: &Client, body: &Value) -> crate::server::Got {
    client.json("POST", "/v1/runs", body)
}

const PHASES: &str = "\
version: 1
image: node
resources: {cpus: 2, memory: 1G, timeout: 10m}
limits: {upload: 1Mbit, connections: 8}
phases:
  dependencies: {network: {allow: [a.example.org:443]}, commands: [npm ci]}
  run: {network: {allow: [\"*.b.example.org:443\"]}, commands: [npm test]}
artifacts: [report.xml]
";

#[test]
fn a_policy_is_compiled_bounded_and_kept_with_the_job() {
    let here = Granting::start();
    let acme = here.server.member("acme", "developer");
    let got = ask(&acme, &run(PHASES));
    assert_eq!(got.status, 202, "{}", got.text());
    let job = got.value();
    let compiled = kiln_policy::compile(kiln_policy::Format::Kiln, "kiln.yaml", PHASES);
    let hash = compiled.expect("legal").hash();
    let hash: Value = serde_json::to_value(hash).expect("json");
    assert_eq!(job["policy"]["file"], hash);
    assert_eq!(job["policy"]["hash"], hash, "no grant took anything away");
    assert_eq!(job["policy"]["connections_max"], 8);
    assert_eq!(
        (&job["limits"]["cpus"], &job["notes"]),
        (&json!(2), &Value::Null)
    );
    let request = here.request(&job);
    assert_eq!(request.dispatch.requires.generation, POLICY_GENERATION);
    let JobKind::Run(command) = &request.kind else {
        panic!("{request:?}")
    };
    assert_eq!(command.runtime.as_deref(), Some("node"));
    assert_eq!(command.phases.len(), 1);
    assert_eq!(command.phases[0].network.rules().len(), 1);
    assert_eq!(
        command.argv[..2],
        ["/bin/sh", "-ec"],
        "the policy's commands come first"
    );
    assert_eq!(command.argv.last().map(String::as_str), Some("true"));
    assert_eq!(command.artifacts.len(), 1);

    // What is not granted is taken away, and told; another tenant is not bounded by it.
    here.grant("[tenant.acme]\nhosts = [\"a.example.org\"]\nmax = {cpus = 2}\n");
    let job = ask(&acme, &run(PHASES)).value();
    assert_eq!(job["network"]["mode"], "isolated");
    assert_ne!(job["policy"]["hash"], hash);
    let note = job["notes"][0].as_str().unwrap_or_default();
    assert!(
        note.starts_with("kiln.yaml:7: *.b.example.org:443/tls is not granted"),
        "{job}"
    );
    let rival = here.server.member("rival", "developer");
    assert_eq!(ask(&rival, &run(PHASES)).value()["policy"]["hash"], hash);
    // It bounds what no file says as well.
    let flag = ask(
        &acme,
        &json!({"argv": ["true"], "allow": ["b.example.org:443"]}),
    );
    assert_eq!((flag.status, flag.code().as_str()), (403, "policy_refused"));
    here.grant("[tenant.acme]\nmax = {cpus = 1}\n");
    let wide = ask(&acme, &run(PHASES));
    assert_eq!((wide.status, wide.code().as_str()), (403, "policy_refused"));
    assert!(
        wide.text().contains("at most 1 is granted"),
        "{}",
        wide.text()
    );
    assert_eq!(
        ask(&acme, &json!({"argv": ["true"]})).value()["limits"]["cpus"],
        1
    );
    // A file of the operator's that cannot be read grants nothing, and its words are not shown.
    here.grant("[tenant.acme]\nopne = true\n");
    let broken = ask(&acme, &run("version: 1\n"));
    assert_eq!(broken.status, 503);
    assert!(!broken.text().contains("opne"), "{}", broken.text());
}

#[test]
fn grants_that_others_may_have_written_or_that_cannot_be_read_grant_nothing() {
    let here = Granting::start();
    let acme = here.server.member("acme", "developer");
    let plain = json!({"argv": ["true"], "allow": ["b.example.org:443"]});
    assert_eq!(ask(&acme, &plain).status, 202, "without a file: defaults");
    let refused = |why: &str| {
        let got = ask(&acme, &plain);
        assert_eq!(got.status, 503, "{why}: {}", got.text());
        std::fs::remove_file(&here.grants).expect(why);
    };
    symlink(here.grants.with_file_name("gone"), &here.grants).expect("link");
    refused("a link to nowhere");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &here.grants,
        rustix::fs::FileType::Fifo,
        mode,
        0,
    )
    .expect("pipe");
    refused("a pipe that nobody writes to");
    std::fs::create_dir(&here.grants).expect("folder");
    assert_eq!(ask(&acme, &plain).status, 503, "a folder");
    std::fs::remove_dir(&here.grants).expect("folder");
    here.grant("[tenant.acme]\n");
    std::fs::set_permissions(&here.grants, PermissionsExt::from_mode(0o646)).expect("mode");
    refused("anybody may write it");
    // Where the server keeps it is no tenant's business.
    here.grant("[tenant.acme]\nhosts = [\"a.example.org\"]\n");
    let got = ask(&acme, &plain);
    let folder = here.grants.parent().expect("folder").to_string_lossy();
    assert_eq!(got.status, 403, "{}", got.text());
    assert!(
        got.text().contains("policy.toml") && !got.text().contains(&*folder),
        "{}",
        got.text()
    );
    // A name that is read as another is none.
    let turned =
        json!({"argv": ["true"], "policy": {"file": "a\u{202e}b.yaml", "text": "version: 1\n"}});
    let got = ask(&acme, &turned);
    assert_eq!(
        (got.status, &got.value()["field"]),
        (422, &json!("policy.file"))
    );
    // Times are told as they are asked for.
    let long = ask(
        &acme,
        &json!({"argv": ["true"], "timeout_seconds": 32_400_000}),
    );
    assert_eq!(long.value()["field"], "timeout_seconds");
    assert!(
        long.text().contains("32400000 s is outside"),
        "{}",
        long.text()
    );
}

#[test]
fn open_and_learn_are_granted_to_the_tenant_or_refused() {
    let here = Granting::start();
    let untrusted = here.server.member("acme", "developer");
    let asked = json!({"tenant": "acme", "role": "developer", "trusted": true});
    let acme = here.server.token(&asked);
    let rival = here.server.member("rival", "developer");
    let open = run("version: 1\nnetwork: {mode: open}\n");
    let learn = json!({"argv": ["true"], "net": "learn"});
    for asked in [&open, &learn, &json!({"argv": ["true"], "net": "open"})] {
        let got = ask(&acme, asked);
        assert_eq!(
            (got.status, got.code().as_str()),
            (403, "policy_refused"),
            "{}",
            got.text()
        );
        assert!(
            got.value()["hint"]
                .as_str()
                .is_some_and(|hint| hint.contains("[tenant.acme]"))
        );
    }
    here.grant("[tenant.acme]\nopen = true\n");
    assert_eq!(ask(&acme, &open).value()["network"]["mode"], "open");
    assert_eq!(ask(&acme, &learn).status, 403, "open is not learn");
    assert_eq!(ask(&rival, &open).status, 403, "another tenant's grant");
    let opened = ask(&untrusted, &open);
    assert_eq!(opened.status, 202, "open needs its grant alone");
    // Learning is for trusted jobs: neither an upload that nobody vouched for nor a token of strangers opens a machine.
    here.grant("[tenant.acme]\nlearn = true\n");
    let refused = |client: &Client, why: &str| {
        let got = ask(client, &learn);
        assert_eq!(
            (got.status, got.code().as_str()),
            (403, "policy_refused"),
            "{}",
            got.text()
        );
        assert!(got.text().contains(why), "{}", got.text());
    };
    refused(&acme, "trusted_uploads = true");
    here.grant("[tenant.acme]\nlearn = true\ntrusted_uploads = true\n");
    refused(&untrusted, "this token's jobs are untrusted");
    let mut less = learn.clone();
    less["trust"] = json!("untrusted");
    assert_eq!(ask(&acme, &less).status, 403, "asked for as untrusted");
    let job = ask(&acme, &learn).value();
    assert_eq!(
        (&job["network"]["mode"], &job["policy"]["learn"]),
        (&json!("open"), &json!(true))
    );
    assert_eq!(
        here.request(&job).dispatch.requires.generation,
        POLICY_GENERATION
    );
    // Nor does it learn again when nobody vouches for it any more.
    let id = job["id"].as_str().expect("an id").to_owned();
    let lease = here.server.lease(&id);
    here.server.finish(&lease, Server::passed());
    let retry = |client: &Client| client.json("POST", &format!("/v1/jobs/{id}/retry"), &json!({}));
    assert_eq!(retry(&acme).status, 202);
    assert_eq!(retry(&untrusted).status, 403);
    here.grant("[tenant.acme]\nlearn = true\n");
    let got = retry(&acme);
    assert_eq!(got.status, 403, "{}", got.text());
    assert!(got.text().contains("trusted_uploads"), "{}", got.text());
    let secret = json!({"argv": ["true"], "net": "learn", "secrets": ["TOKEN"]});
    let got = ask(&acme, &secret);
    assert_eq!(
        (got.status, &got.value()["field"]),
        (403, &json!("secrets")),
        "{}",
        got.text()
    );
    let mode = ask(&acme, &json!({"argv": ["true"], "net": "wide"}));
    assert_eq!((mode.status, &mode.value()["field"]), (422, &json!("net")));
}

#[test]
fn a_request_only_narrows_its_policy() {
    let here = Granting::start();
    let acme = here.server.member("acme", "developer");
    let with = |more: &Value| {
        let mut asked = run(PHASES);
        for (key, value) in more.as_object().expect("object") {
            asked[key] = value.clone();
        }
        ask(&acme, &asked)
    };
    for (more, field) in [
        (json!({"cpus": 3}), "cpus"),
        (json!({"memory": "2G"}), "memory"),
        (json!({"timeout_seconds": 601}), "timeout_seconds"),
        (json!({"allow": ["c.example.org:443"]}), "allow"),
        (json!({"net": "open"}), "net"),
        (json!({"image": "shop:1.4"}), "image"),
    ] {
        let got = with(&more);
        assert_eq!(
            (got.status, got.code().as_str()),
            (422, "policy_narrows"),
            "{}",
            got.text()
        );
        assert_eq!(got.value()["field"], field);
    }
    let narrow = with(&json!({"cpus": 1, "allow": ["x.b.example.org:443"], "timeout_seconds": 60}));
    let job = narrow.value();
    assert_eq!(job["limits"]["timeout_ms"], 60_000, "{job}");
    let JobKind::Run(command) = here.request(&job).kind else {
        panic!("{job}")
    };
    let before = &command.phases[0].network;
    assert_eq!(
        *before,
        NetworkPolicy::Isolated,
        "a narrower list narrows every phase"
    );
}

#[test]
fn a_file_that_is_wrong_is_told_with_its_lines() {
    let here = Granting::start();
    let acme = here.server.member("acme", "developer");
    let got = ask(
        &acme,
        &run("version: 1\nnetwork:\n  alow: [a.example.org]\n"),
    );
    assert_eq!((got.status, got.code().as_str()), (422, "policy_invalid"));
    let told = got.value();
    assert_eq!(told["field"], "policy");
    let fault = &told["errors"][0];
    assert_eq!(
        (&fault["file"], &fault["line"]),
        (&json!("kiln.yaml"), &json!(3)),
        "{told}"
    );
    assert!(
        fault["hint"].is_string() && fault["column"].is_u64(),
        "{told}"
    );
    let detail = told["detail"].as_str().expect("detail");
    assert!(
        detail.contains("  --> kiln.yaml:3:3") && detail.contains("alow"),
        "{detail}"
    );
    // Its name says which language it is in.
    let text = "version: 1\nsandbox: {image: {ref: 'a.example.org/b'}}\n";
    let cleanroom = json!({"argv": ["true"], "policy": {"file": "cleanroom.yaml", "text": text}});
    assert!(ask(&acme, &cleanroom).text().contains("cleanroom.yaml"));
    let large = " ".repeat(kiln_policy::FILE_BYTES_MAX + 1);
    let got = ask(&acme, &run(&large));
    assert_eq!(
        (got.status, got.code().as_str()),
        (422, "policy_invalid"),
        "{}",
        got.text()
    );
    for policy in [
        json!({"file": "", "text": "version: 1\n"}),
        json!({"file": "a\u{1b}[2J", "text": "version: 1\n"}),
        json!({"file": "kiln.yaml", "text": "version: 1\n", "phase": "run"}),
        json!("version: 1"),
    ] {
        let got = ask(&acme, &json!({"argv": ["true"], "policy": policy}));
        assert_eq!(got.status, 422, "{}", got.text());
    }
}

#[test]
fn a_policys_secrets_are_named_by_their_owner_and_judged_by_the_store() {
    let here = Granting::start();
    let acme = here.server.member("acme", "admin");
    let text = "version: 1\nphases:\n  dependencies: {network: {allow: [a.example.org:443]}, commands: [npm ci]}\nsecrets: [{name: key, env: KEY, phase: dependencies, hosts: ['a.example.org:443']}]\n";
    let got = ask(&acme, &run(text));
    assert_eq!(
        (got.status, &got.value()["field"]),
        (403, &json!("secrets")),
        "{}",
        got.text()
    );
    let mut named = run(text);
    named["secrets"] = json!(["key:file"]);
    let got = ask(&acme, &named);
    assert_eq!(got.status, 422, "there is none yet: {}", got.text());
    let value = json!({"value": "hunter2-hunter2"});
    let put = acme.json("PUT", "/v1/secrets/key", &value);
    assert!(put.status < 300, "{}", put.text());
    // An upload's run is untrusted unless its token says more: it gets none.
    let got = ask(&acme, &named);
    let refused = got.status == 403 && got.code() == "secret_refused";
    assert!(refused, "{}", got.text());
}

#[test]
fn a_build_is_held_to_what_means_something_for_one() {
    let here = Granting::start();
    let acme = here.server.member("acme", "developer");
    let build = |policy: &str, more: &Value| {
        let mut asked = json!({"git_url": "https://git.example.org/a.git", "policy": {"file": "kiln.yaml", "text": policy}});
        for (key, value) in more.as_object().expect("object") {
            asked[key] = value.clone();
        }
        acme.json("POST", "/v1/builds", &asked)
    };
    let got = build(PHASES, &json!({}));
    assert_eq!(got.status, 202, "{}", got.text());
    let job = got.value();
    assert_eq!(
        job["network"]["allow"],
        json!(["a.example.org:443/tls"]),
        "{job}"
    );
    let request = here.request(&job);
    let JobKind::SourceBuild(wanted) = &request.kind else {
        panic!("{job}")
    };
    assert!(wanted.only_network);
    assert_eq!(request.dispatch.requires.generation, POLICY_GENERATION);
    let wider = build(PHASES, &json!({"allow": ["c.example.org"]}));
    assert_eq!(
        (wider.status, wider.code().as_str()),
        (422, "policy_narrows")
    );
    let bound = build("version: 1\nlimits: {processes: 4}\n", &json!({}));
    assert_eq!(
        (bound.status, bound.code().as_str()),
        (403, "policy_refused")
    );
    assert!(
        bound.text().contains("limits.processes"),
        "{}",
        bound.text()
    );
    // As a form, too.
    let asked = json!({"policy": {"file": "kiln.yaml", "text": PHASES}}).to_string();
    let parts: [(&str, &[u8]); 2] = [("request", asked.as_bytes()), ("source", &archive())];
    let got = acme.form("/v1/builds", &parts);
    assert_eq!(got.status, 202, "{}", got.text());
    assert!(got.value()["policy"]["hash"].is_string());
}

#[test]
fn a_retry_is_judged_by_the_grants_of_today() {
    let here = Granting::start();
    let acme = here.server.member("acme", "developer");
    here.grant("[tenant.acme]\nopen = true\n");
    let open = ask(&acme, &run("version: 1\nnetwork: {mode: open}\n")).value();
    let listed = ask(
        &acme,
        &json!({"argv": ["true"], "allow": ["a.example.org:443"]}),
    )
    .value();
    let retry = |job: &Value| {
        let id = job["id"].as_str().expect("id");
        acme.send("POST", &format!("/v1/jobs/{id}/retry"), &[], b"")
    };
    for job in [&open, &listed] {
        let lease = here.server.lease(job["id"].as_str().expect("id"));
        here.server.finish(&lease, Server::passed());
        let again = retry(job);
        assert_eq!(again.status, 202, "{}", again.text());
        assert_eq!(again.value()["policy"], job["policy"]);
    }
    here.grant("[tenant.acme]\nhosts = [\"b.example.org\"]\n");
    for job in [&open, &listed] {
        let got = retry(job);
        assert_eq!(
            (got.status, got.code().as_str()),
            (403, "policy_refused"),
            "{}",
            got.text()
        );
        assert!(got.text().contains("withdrawn"), "{}", got.text());
    }
    here.grant("[tenant.acme]\nlearn = true\n");
    assert_eq!(retry(&open).status, 403, "open, not learn");
    assert_eq!(retry(&listed).status, 202, "any host may be named again");
}

/// A job of a sim worker, whose command is attended.
async fn attended(fleet: &Fleet, name: &str) -> kiln_core::JobId {
    let mut new = script(name, 2, 10);
    if let kiln_core::JobKind::Run(run) = &mut new.request.kind {
        run.attend = Some(kiln_core::job::RunAttend::default());
    }
    new.request.needs_its_generation();
    let submitted = fleet.db().submit(new).await.expect("submits");
    submitted.job.request.id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_waits_for_a_worker_that_knows_all_of_it() {
    let folder = tempfile::tempdir().expect("folder");
    let ledger = Arc::new(Ledger::default());
    let fleet = Fleet::start(folder.path(), OpenOptions::default()).await;
    let worker = |name: &str, generation: u32| {
        let mut line = Line::new(&fleet.socket, name);
        line.generation = generation;
        SimWorker::start(line, 4, BEAT, &ledger)
    };
    // It says of itself what it likes: what its requests speak is what counts.
    let old = worker("old", GENERATION - 1);
    let held = attended(&fleet, "held").await;
    let plain = fleet.submit("plain", 2, 10).await;
    fleet.all_over(std::slice::from_ref(&plain)).await;
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let job = fleet.db().job(&held).await.expect("answers");
        let reason = job.and_then(|job| job.reason);
        if let Some(PendingReason::NoWorkerMatches { missing, .. }) = &reason {
            assert!(
                missing.contains("generation 3") && missing.contains("attended"),
                "{missing}"
            );
            break;
        }
        assert!(
            tokio::time::Instant::now() < end,
            "it does not say why it waits: {reason:?}"
        );
        tokio::time::sleep(BEAT).await;
    }
    let new = worker("new", GENERATION);
    fleet.all_over(std::slice::from_ref(&held)).await;
    let began = ledger.began.lock().expect("lock").clone();
    let of_held = began.iter().filter(|(attempt, _, _)| attempt.job == held);
    let by: Vec<_> = of_held.map(|(_, worker, _)| worker.as_str()).collect();
    assert_eq!(by, ["new"]);
    drop((old, new));
    fleet.stop().await;
}
