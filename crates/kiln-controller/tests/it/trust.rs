//! How far a server's job is trusted: its token's word AND the operator's for its source, which is then fetched by its full name.

use kiln_core::job::{JobKind, Source, TrustClass};
use serde_json::{Value, json};

use crate::policies::Granting;
use crate::server::{Client, Got, Server, archive};

const GRANT: &str = "[tenant.acme]\ntrusted_refs = ['git.example.org/team/app@refs/heads/main', 'git.example.org/team/app@refs/tags/*']\n";

struct World {
    here: Granting,
    trusted: Client,
    untrusted: Client,
}

fn world() -> World {
    let here = Granting::start();
    here.grant(GRANT);
    let untrusted = here.server.member("acme", "developer");
    let asked = json!({"tenant": "acme", "role": "developer", "trusted": true});
    World {
        trusted: here.server.token(&asked),
        untrusted,
        here,
    }
}

impl World {
    /// What is queued of a build: how far it is trusted, and the ref that its worker fetches.
    fn queued(&self, got: &Got) -> (TrustClass, String) {
        assert_eq!(got.status, 202, "{}", got.text());
        let request = self.here.request(&got.value());
        let reference = match request.kind.source() {
            Some(Source::Git { reference, .. }) => reference.clone(),
            other => panic!("{other:?}"),
        };
        (request.trust, reference)
    }
}

fn build(client: &Client, url: &str, reference: Option<&str>, more: &Value) -> Got {
    let mut asked = json!({"git_url": url, "git_ref": reference});
    for (key, value) in more.as_object().expect("object") {
        asked[key] = value.clone();
    }
    client.json("POST", "/v1/builds", &asked)
}

const APP: &str = "https://git.example.org/team/app.git";

#[test]
fn a_trusted_token_and_a_trusted_ref_make_a_trusted_job() {
    let w = world();
    let none = json!({});
    let main = || (TrustClass::Trusted, "refs/heads/main".to_owned());
    // The short name becomes the ref that was granted: no tag of that name is fetched instead.
    for reference in ["main", "refs/heads/main"] {
        let got = build(&w.trusted, APP, Some(reference), &none);
        assert_eq!(w.queued(&got), main());
        assert!(!got.text().contains("untrusted"), "{}", got.text());
    }
    let tag = build(&w.trusted, APP, Some("refs/tags/v1"), &none);
    assert_eq!(
        w.queued(&tag),
        (TrustClass::Trusted, "refs/tags/v1".to_owned())
    );
    // Neither half is enough, and what is untrusted is fetched as it was asked for.
    let token = build(&w.untrusted, APP, Some("main"), &none);
    assert_eq!(w.queued(&token), (TrustClass::Untrusted, "main".to_owned()));
    let commit = "0123456789abcdef0123456789abcdef01234567";
    for (url, reference, why) in [
        (
            APP,
            Some("feature"),
            "git.example.org/team/app@refs/heads/feature",
        ),
        (APP, Some("refs/pull/7/head"), "@refs/pull/7/head"),
        (APP, Some("v1"), "@refs/heads/v1"),
        (APP, None, "git.example.org/team/app@HEAD"),
        (APP, Some(commit), "only a ref can be trusted"),
        (
            "https://git.example.org/fork/app",
            Some("main"),
            "git.example.org/fork/app@",
        ),
    ] {
        let got = build(&w.trusted, url, reference, &none);
        let said = (
            TrustClass::Untrusted,
            reference.unwrap_or("HEAD").to_owned(),
        );
        assert_eq!(w.queued(&got), said);
        let notes = got.value()["notes"].to_string();
        assert!(
            notes.contains("this job is untrusted") && notes.contains(why),
            "{notes}"
        );
    }
    // What is not trusted has the policy of the ref that is, unless it brings its own or wants none; what is has its own.
    let policy_ref = |got: &Got| {
        assert_eq!(got.status, 202, "{}", got.text());
        match w.here.request(&got.value()).kind {
            JobKind::SourceBuild(build) => build.policy_ref,
            other => panic!("{other:?}"),
        }
    };
    let of =
        |reference: &str, more: &Value| policy_ref(&build(&w.trusted, APP, Some(reference), more));
    let main_ref = Some("refs/heads/main".to_owned());
    assert_eq!(of("feature", &none), main_ref);
    assert_eq!(
        policy_ref(&build(&w.untrusted, APP, Some("main"), &none)),
        main_ref
    );
    assert_eq!(of("main", &none), None);
    assert_eq!(of("feature", &json!({"no_policy": true})), None);
    let fork = "https://git.example.org/fork/app";
    assert_eq!(
        policy_ref(&build(&w.trusted, fork, Some("main"), &none)),
        None
    );
    // A request can take its trust away; it cannot have more than there is.
    let less = build(
        &w.trusted,
        APP,
        Some("main"),
        &json!({"trust": "untrusted"}),
    );
    assert_eq!(w.queued(&less).0, TrustClass::Untrusted);
    let asked = json!({"trust": "trusted"});
    assert_eq!(
        w.queued(&build(&w.trusted, APP, Some("main"), &asked)),
        main()
    );
    let more = build(&w.trusted, APP, Some("feature"), &asked);
    assert_eq!(
        (more.status, &more.value()["field"]),
        (422, &json!("trust"))
    );
    assert!(
        more.value()["hint"].to_string().contains("trusted_refs"),
        "{}",
        more.text()
    );
    assert_eq!(build(&w.untrusted, APP, Some("main"), &asked).status, 422);
    // What the operator withdraws is withdrawn from the next job on.
    w.here.grant("");
    let got = build(&w.trusted, APP, Some("main"), &none);
    assert_eq!(w.queued(&got).0, TrustClass::Untrusted);
}

#[test]
fn what_a_request_brought_itself_is_trusted_by_another_word() {
    let w = world();
    let run = |client: &Client| {
        client
            .json("POST", "/v1/runs", &json!({"argv": ["true"]}))
            .value()
    };
    let upload = || {
        w.trusted
            .form("/v1/builds", &[("source", &archive()[..])])
            .value()
    };
    let text = json!({"dockerfile_text": "FROM scratch\n"});
    let dockerfile = || build(&w.trusted, APP, Some("main"), &text).value();
    for (job, why) in [
        (run(&w.trusted), "came with the request"),
        (upload(), "an upload"),
        (dockerfile(), "its Dockerfile came with the request"),
    ] {
        assert_eq!(job["trust"], "untrusted", "{job}");
        let notes = job["notes"].to_string();
        assert!(
            notes.contains(why) && notes.contains("trusted_uploads"),
            "{notes}"
        );
    }
    w.here.grant(&format!("{GRANT}trusted_uploads = true\n"));
    for job in [run(&w.trusted), upload(), dockerfile()] {
        assert_eq!(job["trust"], "trusted", "{job}");
    }
    assert_eq!(run(&w.untrusted)["trust"], "untrusted");
    // The owner of this machine asks for what lies on it.
    let owner = w.here.server.owner();
    w.here.grant("");
    assert_eq!(run(&owner)["trust"], "trusted");
    assert_eq!(run(&w.trusted)["trust"], "untrusted");
}

#[test]
fn who_gets_no_secret_for_want_of_trust_is_told_what_is_missing() {
    let w = world();
    let admin = w.here.server.member("acme", "admin");
    let put = admin.json(
        "PUT",
        "/v1/secrets/TOKEN",
        &json!({"value": "hunter2-hunter2"}),
    );
    assert_eq!(put.status, 201, "{}", put.text());
    let refused = |got: &Got, why: &str, hint: &str| {
        assert_eq!(
            (got.status, got.code().as_str()),
            (403, "secret_refused"),
            "{}",
            got.text()
        );
        assert!(got.text().contains(why), "{}", got.text());
        assert!(
            got.value()["hint"].to_string().contains(hint),
            "{}",
            got.text()
        );
    };
    let secret = json!({"argv": ["true"], "secrets": ["TOKEN"]});
    let run = |client: &Client| client.json("POST", "/v1/runs", &secret);
    refused(
        &run(&w.trusted),
        "policy.toml has no `trusted_uploads",
        "[tenant.acme]",
    );
    refused(
        &run(&w.untrusted),
        "this token's jobs are untrusted",
        "--trusted",
    );
    let named = json!({"secrets": ["TOKEN"]});
    let feature = build(&w.trusted, APP, Some("feature"), &named);
    refused(
        &feature,
        "untrusted jobs get no stored secrets",
        "trusted_refs",
    );
    let main = build(&w.trusted, APP, Some("main"), &named);
    assert_eq!(w.queued(&main).0, TrustClass::Trusted);
    // Nor does a job have them again when its ref is not trusted any more.
    let id = main.value()["id"].as_str().expect("an id").to_owned();
    let lease = w.here.server.lease(&id);
    w.here.server.finish(&lease, Server::passed());
    let again = || {
        w.trusted
            .json("POST", &format!("/v1/jobs/{id}/retry"), &json!({}))
    };
    let got = again();
    assert_eq!(
        w.queued(&got),
        (TrustClass::Trusted, "refs/heads/main".to_owned())
    );
    w.here.grant("");
    refused(&again(), "@refs/heads/main", "trusted_refs");
}
