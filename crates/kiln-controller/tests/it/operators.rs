//! What operators say of the whole installation: retention, holds, limits, the audit trail; and what a supervisor asks.

use kiln_controller::api::ListenConfig;
use kiln_controller::webhooks::ReceiverPolicy;
use kiln_db::Retention;
use serde_json::{Value, json};

use crate::server::{Client, FORM, Server, archive, multipart};

/// Operators of each role, for the matrix: admin, build-engineer, security, developer, read-only.
const ROLES: [&str; 5] = [
    "admin",
    "build-engineer",
    "security",
    "developer",
    "read-only",
];

fn operator(server: &Server, role: &str) -> Client {
    server.token(&json!({"tenant": "acme", "role": role, "operator": true}))
}

/// A finished job of this client.
fn finished(server: &Server, client: &Client) -> String {
    let job = client.run();
    let lease = server.lease(&job);
    server.finish(&lease, Server::passed());
    job
}

#[test]
fn a_tenant_is_kept_in_its_own_way_and_a_dry_run_says_what_goes() {
    let at_once = Retention {
        hot_ms: 0,
        ..Retention::default()
    };
    let server = Server::with(|api| api.retention = at_once, ListenConfig::default());
    let acme = server.member("acme", "developer");
    let rival = server.member("rival", "developer");
    let jobs = [finished(&server, &acme), finished(&server, &acme)];
    let owner = server.owner();
    let at = "/v1/tenants/acme/retention";
    let rule = acme.get(at).value();
    assert_eq!((&rule["own"], &rule["hot_ms"]), (&json!(false), &json!(0)));
    assert_eq!(rival.get(at).status, 404);
    assert_eq!(rival.get(&format!("{at}/plan")).status, 404);
    let plan = acme.get(&format!("{at}/plan")).value();
    assert_eq!((&plan["to_warm"], &plan["gone"]), (&json!(2), &json!(0)));
    assert_eq!(plan["jobs"][0]["job"], json!(jobs[0]));
    let none = owner.get(&format!("{at}/plan?cold_ms=0&warm_ms=0")).value();
    assert_eq!(
        (&none["gone"], &none["jobs"][0]["to"]),
        (&json!(2), &json!("gone"))
    );
    assert_eq!(acme.get(at).value(), rule, "a dry run changes nothing");
    for bad in [
        json!({"hot_ms": 2, "warm_ms": 1}),
        json!({"warm_ms": 3, "cold_ms": 2}),
        json!({"cold_ms": u64::MAX}),
        json!({"usual": true, "hot_ms": 1}),
    ] {
        let got = owner.json("POST", at, &bad);
        assert_eq!((got.status, got.code().as_str()), (422, "invalid"), "{bad}");
    }
    for role in ROLES {
        let got = operator(&server, role).json("POST", at, &json!({"hot_ms": 86_400_000}));
        let may = if role == "admin" { 200 } else { 403 };
        assert_eq!(got.status, may, "{role}: {}", got.text());
    }
    let own = acme.get(at).value();
    assert_eq!(
        (&own["own"], &own["hot_ms"]),
        (&json!(true), &json!(86_400_000))
    );
    assert_eq!(acme.get(&format!("{at}/plan")).value()["jobs"], json!([]));
    let usual = owner.json("POST", at, &json!({"usual": true}));
    assert_eq!(usual.value(), rule);
    let nobody = owner.json("POST", "/v1/tenants/nobody/retention", &json!({}));
    assert_eq!(nobody.status, 404);
}

#[test]
fn what_is_on_hold_stays_and_admins_and_security_alone_say_so() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let job = finished(&server, &acme);
    let at = format!("/v1/holds/job/{job}");
    let why = json!({"reason": "case 7"});
    for role in ROLES {
        let client = operator(&server, role);
        let may = matches!(role, "admin" | "security");
        let status = if may { 200 } else { 403 };
        assert_eq!(client.json("PUT", &at, &why).status, status, "{role}");
        assert_eq!(client.get("/v1/holds").status, status, "{role}");
        let ended = if may { 204 } else { 403 };
        assert_eq!(client.delete(&at).status, ended, "{role}");
        let member = server.member("acme", role);
        assert_eq!(member.json("PUT", &at, &why).status, 403, "{role}");
    }
    let owner = server.owner();
    assert_eq!(owner.delete(&at).status, 404);
    for (path, body, status) in [
        (at.as_str(), json!({}), 422),
        (at.as_str(), json!({"reason": " "}), 422),
        (at.as_str(), json!({"reason": "x".repeat(501)}), 422),
        ("/v1/holds/job/b1", why.clone(), 404),
        ("/v1/holds/tenant/nobody", why.clone(), 404),
        ("/v1/holds/disk/x", why.clone(), 404),
        ("/v1/holds/job/%ff", why.clone(), 404),
    ] {
        let got = owner.json("PUT", path, &body);
        assert_eq!(got.status, status, "{path}: {}", got.text());
    }
    assert_eq!(owner.json("PUT", &at, &why).value()["tenant"], "acme");
    let again = owner.json("PUT", &at, &json!({"reason": "another"}));
    assert_eq!(again.value()["reason"], "case 7", "it stays as it was put");
    let tenant = owner.json("PUT", "/v1/holds/tenant/acme", &why);
    assert_eq!(tenant.status, 200);
    let held = owner.get("/v1/holds").value();
    assert_eq!(held["items"].as_array().map(Vec::len), Some(2));
    let plan = owner.get("/v1/tenants/acme/retention/plan?cold_ms=0&warm_ms=0&hot_ms=0");
    let plan = plan.value();
    assert_eq!((&plan["gone"], &plan["held"]), (&json!(0), &json!(1)));
    let rows = owner
        .get("/v1/audit?action=hold:control&newest=true")
        .value();
    assert_eq!(rows["items"][0]["action"], "hold:control");
    let target = rows["items"].as_array().expect("rows").iter();
    let mut target = target.map(|row| row["target"].as_str().unwrap_or_default().to_owned());
    assert!(target.any(|target| target == format!("release job {job}")));
}

#[test]
fn limits_of_the_installation_are_checked_for_sense() {
    let server = Server::start();
    let owner = server.owner();
    let _acme = server.member("acme", "developer");
    for role in ROLES {
        let client = operator(&server, role);
        let got = client.json("POST", "/v1/scheduler", &json!({"filling": "pack"}));
        let may = matches!(role, "admin" | "build-engineer");
        assert_eq!(got.status, if may { 200 } else { 403 }, "{role}");
    }
    let quota = |change: &Value| owner.json("POST", "/v1/tenants/acme", change);
    for (bad, field) in [
        (json!({"burst": 2}), "burst"),
        (
            json!({"running_max": 2, "burst": 1, "reserved": 4}),
            "reserved",
        ),
    ] {
        let got = quota(&bad);
        assert_eq!((got.status, &got.value()["field"]), (422, &json!(field)));
    }
    let got = quota(&json!({"running_max": 4, "burst": 2, "reserved": 3}));
    assert_eq!(got.status, 200, "{}", got.text());
    assert_eq!(got.value()["burst"], 2);
    let set = |change: &Value| owner.json("POST", "/v1/scheduler", change);
    assert_eq!(
        set(&json!({"running_max": 2})).status,
        422,
        "three are promised"
    );
    let got = set(&json!({"running_max": 5, "filling": "spread"})).value();
    let want = json!({"running_max": 5, "running": 0, "reserved": 3, "filling": "spread"});
    assert_eq!(got, want);
    let rival = json!({"name": "rival", "reserved": 3});
    assert_eq!(
        owner.json("POST", "/v1/tenants", &rival).status,
        422,
        "six of five"
    );
    assert_eq!(set(&json!({"filling": "tetris"})).status, 422);
    let open = set(&json!({"running_max": null})).value();
    assert_eq!(
        (&open["running_max"], &open["filling"]),
        (&json!(null), &json!("spread"))
    );
    assert_eq!(owner.json("POST", "/v1/tenants", &rival).status, 201);
}

#[test]
fn nobody_fills_the_disk_with_what_waits() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let owner = server.owner();
    let tenants = owner.get("/v1/tenants").value();
    for tenant in tenants["items"].as_array().expect("tenants") {
        let bounds = (&tenant["pending_max"], &tenant["stored_max"]);
        assert_eq!(bounds, (&json!(10_000), &json!(20_u64 << 30)), "{tenant}");
    }
    let open = json!({"name": "open", "pending_max": null, "stored_max": null});
    let open = owner.json("POST", "/v1/tenants", &open).value();
    assert_eq!(
        (&open["pending_max"], &open["stored_max"]),
        (&json!(null), &json!(null))
    );
    let bound = |bytes: u64| {
        let got = owner.json("POST", "/v1/tenants/acme", &json!({"stored_max": bytes}));
        assert_eq!(got.status, 200, "{}", got.text());
        got.value()["requests"].as_u64().expect("bytes")
    };
    assert_eq!(bound(25_000), 0);
    let large = json!({"argv": ["true", "x".repeat(15_000)]});
    assert_eq!(acme.json("POST", "/v1/runs", &large).status, 202);
    let refused = acme.json("POST", "/v1/runs", &large);
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (429, "stored_quota")
    );
    assert!(
        refused.value()["hint"]
            .as_str()
            .is_some_and(|hint| hint.contains("--stored"))
    );
    assert_eq!(refused.headers["retry-after"], "600");
    let other = server.member("rival", "developer");
    assert_eq!(
        other.json("POST", "/v1/runs", &large).status,
        202,
        "nobody else's"
    );
    // An upload has the room that requests leave.
    let used = bound(1_000_000);
    assert!(used > 15_000, "{used}");
    let request = json!({"name": "app"}).to_string();
    let upload = |archive: &[u8]| {
        let parts = [("request", request.as_bytes()), ("source", archive)];
        acme.send(
            "POST",
            "/v1/builds",
            &[("content-type", FORM)],
            &multipart(&parts),
        )
    };
    assert_eq!(upload(&archive()).status, 202);
    let mut more = archive();
    more.resize(990_000, 0);
    let refused = upload(&more);
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (429, "stored_quota")
    );
}

#[test]
fn the_audit_trail_is_read_from_either_end_and_by_what_is_looked_for() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    for _ in 0..3 {
        acme.run();
    }
    assert_eq!(acme.get("/v1/workers").status, 403);
    let owner = server.owner();
    for role in ROLES {
        let status = operator(&server, role).get("/v1/audit").status;
        let may = matches!(role, "admin" | "security");
        assert_eq!(status, if may { 200 } else { 403 }, "{role}");
    }
    let seqs = |path: &str| {
        let page = owner.get(path).value();
        let items = page["items"].as_array().expect("items").clone();
        let seqs: Vec<u64> = items.iter().filter_map(|row| row["seq"].as_u64()).collect();
        (seqs, page["next"].as_str().map(str::to_owned))
    };
    let submits = "action=job:submit&verdict=allowed&tenant=acme";
    let (oldest, _) = seqs(&format!("/v1/audit?{submits}"));
    let (newest, _) = seqs(&format!("/v1/audit?newest=true&{submits}"));
    assert_eq!(oldest.len(), 3);
    assert_eq!(oldest, newest.into_iter().rev().collect::<Vec<_>>());
    let mut pages = Vec::new();
    let mut start = "newest=true".to_owned();
    loop {
        let (page, next) = seqs(&format!("/v1/audit?{start}&{submits}&limit=2"));
        pages.extend(page);
        match next {
            Some(next) => start = format!("before={next}"),
            None => break,
        }
    }
    assert_eq!(pages.into_iter().rev().collect::<Vec<_>>(), oldest);
    let refused = owner
        .get("/v1/audit?verdict=refused&action=worker:read")
        .value();
    let who = refused["items"][0]["actor"]
        .as_str()
        .expect("actor")
        .to_owned();
    let id = who
        .split(' ')
        .next()
        .and_then(|id| id.strip_prefix("token:"));
    let (by, _) = seqs(&format!("/v1/audit?actor={}", id.expect("a token")));
    assert!(by.len() >= 4, "{by:?}");
    assert_eq!(
        seqs("/v1/audit?actor=%25").0,
        Vec::<u64>::new(),
        "no pattern"
    );
    assert_eq!(seqs("/v1/audit?until_unix_ms=1000").0, Vec::<u64>::new());
    assert_eq!(
        seqs("/v1/audit?from_unix_ms=9000000000000").0,
        Vec::<u64>::new()
    );
    let first = owner.get("/v1/audit?limit=1").value()["items"][0].clone();
    let at = first["at_unix_ms"].as_u64().expect("time");
    assert!(
        seqs(&format!("/v1/audit?until_unix_ms={at}"))
            .0
            .contains(&1)
    );
    let security = server.member("acme", "security");
    let own = security.get("/v1/audit").value();
    let own = own["items"].as_array().expect("items");
    assert!(!own.is_empty() && own.iter().all(|row| row["tenant"] == "acme"));
    assert_eq!(security.get("/v1/audit?tenant=local").status, 404);
    for bad in [
        "after=1&before=2",
        "after=1&newest=true",
        "before=99999999999999999999",
        "verdict=maybe",
        "limit=0",
        "limit=501",
        "tenant=A",
    ] {
        let status = owner.get(&format!("/v1/audit?{bad}")).status;
        assert!(matches!(status, 400 | 422), "{bad}: {status}");
    }
}

#[test]
fn names_of_images_are_for_those_who_may_push_them() {
    let server = Server::start();
    let rival = server.member("rival", "developer");
    for role in ROLES {
        let reads = matches!(role, "read-only");
        for client in [server.member("acme", role), operator(&server, role)] {
            let list = client.get("/v1/images").status;
            assert_eq!(list, if reads { 403 } else { 200 }, "{role}");
            let gone = client.delete("/v1/images/web%2Fshop%3A1").status;
            assert_eq!(gone, if reads { 403 } else { 404 }, "{role}");
        }
    }
    assert_eq!(rival.get("/v1/images?tenant=acme").status, 404);
    assert_eq!(rival.delete("/v1/images/shop?tenant=acme").status, 404);
    assert_eq!(rival.delete("/v1/images/t%2Facme%2Fshop").status, 404);
    for bad in ["after=x", "limit=0", "limit=501", "tenant=A", "nosuch=1"] {
        let status = rival.get(&format!("/v1/images?{bad}")).status;
        assert!(matches!(status, 400 | 422), "{bad}: {status}");
    }
}

#[test]
fn supervisors_learn_one_word() {
    let server = Server::start();
    for client in [server.client(""), server.owner()] {
        for (path, word) in [("/healthz", "ok\n"), ("/readyz", "ready\n")] {
            let got = client.get(path);
            assert_eq!((got.status, got.text().as_str()), (200, word));
            assert_eq!(got.headers["cache-control"], "no-store");
            assert!(!got.headers.contains_key("server"));
        }
    }
    server.close_database();
    let stranger = server.client("");
    assert_eq!(stranger.get("/healthz").status, 200);
    // What was found last stands for a second.
    let mut got = stranger.get("/readyz");
    for _ in 0..100 {
        if got.status != 200 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        got = stranger.get("/readyz");
    }
    assert_eq!((got.status, got.text().as_str()), (503, "not ready\n"));
}

#[test]
fn a_receiver_inside_is_refused_when_it_is_named() {
    let server = Server::start();
    let owner = server.owner();
    let hook =
        |client: &Client, url: &str| client.json("POST", "/v1/webhooks", &json!({"url": url}));
    for url in [
        "https://10.0.0.1/x",
        "https://[::1]/x",
        "https://localhost/",
    ] {
        let got = hook(&owner, url);
        assert_eq!(
            (got.status, &got.value()["field"]),
            (422, &json!("url")),
            "{url}"
        );
        let run = json!({"argv": ["true"], "notify_url": url});
        let got = owner.json("POST", "/v1/runs", &run);
        assert_eq!(
            (got.status, &got.value()["field"]),
            (422, &json!("notify_url")),
            "{url}"
        );
    }
    let made = hook(&owner, "https://hooks.example.org/");
    assert_eq!(made.status, 201);
    let at = format!(
        "/v1/webhooks/{}",
        made.value()["webhook"]["id"].as_str().expect("id")
    );
    let got = owner.json("POST", &at, &json!({"url": "https://127.0.0.1/"}));
    assert_eq!(got.status, 422, "{}", got.text());
    let excepted = json!([{"host": "10.0.0.1", "range": "10.0.0.0/8"}]);
    let receivers = ReceiverPolicy {
        exceptions: serde_json::from_value(excepted).expect("exceptions"),
        allow_http: false,
    };
    let server = Server::with(|api| api.receivers = receivers, ListenConfig::default());
    assert_eq!(hook(&server.owner(), "https://10.0.0.1/x").status, 201);
}

#[test]
fn hypemans_door_names_the_part_it_does_not_know() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    for (parts, name) in [
        (vec![("sorce", &b"x"[..])], "sorce"),
        (
            vec![("source", &archive()[..]), ("source", &archive()[..])],
            "source",
        ),
    ] {
        let got = acme.form("/builds", &parts);
        assert_eq!(got.status, 422);
        let words = got.value()["message"].as_str().expect("words").to_owned();
        assert!(words.contains(name), "{words}");
    }
}
