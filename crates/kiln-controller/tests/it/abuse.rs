//! Bad input, and too much of it.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use kiln_controller::api::{ListenConfig, ListenError, Sockets};
use serde_json::json;

use crate::server::{FORM, Server, archive, multipart, receive};

#[test]
fn what_cannot_be_read_is_refused_with_a_stable_code() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let json_kind = [("content-type", "application/json")];
    for (body, status, code) in [
        (&b"{"[..], 400, "bad_request"),
        (b"[]", 422, "invalid"),
        (b"{\"argv\": 5}", 422, "invalid"),
        (b"{\"argv\": [\"x\"], \"nosuch\": 1}", 422, "invalid"),
        (b"{\"argv\": [\"x\\u0000\"]}", 422, "invalid"),
        (b"\xff\xfe", 400, "bad_request"),
        (b"{\"argv\": [\"x\"], \"cpus\": -1}", 422, "invalid"),
        (b"{\"argv\": [\"x\"], \"cpus\": 1e99}", 422, "invalid"),
    ] {
        let got = acme.send("POST", "/v1/runs", &json_kind, body);
        assert_eq!(
            (got.status, got.code().as_str()),
            (status, code),
            "{}",
            got.text()
        );
    }
    let deep = format!("{{\"x\": {}", "[".repeat(100_000));
    assert_eq!(
        acme.send("POST", "/v1/runs", &json_kind, deep.as_bytes())
            .status,
        400
    );
    let large = format!("{{\"argv\": [\"{}\"]}}", "x".repeat(2 << 20));
    assert_eq!(
        acme.send("POST", "/v1/runs", &json_kind, large.as_bytes())
            .status,
        413
    );
    let kinds = [("content-type", "text/html")];
    assert_eq!(acme.send("POST", "/v1/runs", &kinds, b"{}").status, 415);
    assert_eq!(acme.send("POST", "/v1/builds", &kinds, b"{}").status, 415);
    for bad in [
        "..",
        "%2e%2e%2f",
        "b1'--",
        "%3Cb%3E",
        "%00",
        "B1",
        &"a".repeat(300),
        "b1%0aset",
    ] {
        let got = acme.get(&format!("/v1/jobs/{bad}"));
        assert_eq!(got.status, 404, "{bad}: {}", got.text());
        assert_eq!(got.headers["content-type"], "application/problem+json");
    }
    for bad in ["/v1/jobs/%ff", "/v1/jobs/b1/artifacts/%ff", "/builds/%ff"] {
        let got = acme.get(bad);
        assert_eq!(got.status, 404, "{bad}: {}", got.text());
        let kind = &got.headers["content-type"];
        assert!(kind.ends_with("json"), "{bad}: {kind}");
    }
    for bad in ["x", "AAAA", "", "%00", &"A".repeat(600)] {
        let got = acme.get(&format!("/v1/jobs?cursor={bad}"));
        assert_eq!(got.status, 422, "{bad}");
    }
    for bad in [
        "limit=0",
        "limit=501",
        "state=nosuch",
        "verdict=A'--",
        "label=x",
        "queue=A",
    ] {
        assert_eq!(acme.get(&format!("/v1/jobs?{bad}")).status, 422, "{bad}");
    }
    assert_eq!(acme.get("/v1/jobs?limit=-1").status, 400);
    assert_eq!(acme.get("/v1/nosuch").status, 404);
    assert_eq!(acme.send("PUT", "/v1/jobs", &[], b"").status, 405);
    let long = format!("/v1/jobs?tag={}", "a".repeat(9_000));
    assert_eq!(acme.get(&long).status, 414);
}

#[test]
fn multipart_that_is_no_multipart_is_refused() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let send = |kind: &str, body: &[u8]| {
        acme.send("POST", "/v1/builds", &[("content-type", kind)], body)
            .status
    };
    assert_eq!(send("multipart/form-data", b""), 415, "no boundary");
    assert_eq!(send(FORM, b"nonsense"), 400);
    assert_eq!(send(FORM, b"--XX\r\n\r\n"), 400, "a cut head");
    let whole = multipart(&[("source", &archive())]);
    assert_eq!(send(FORM, &whole[..whole.len() - 40]), 400, "a cut body");
    assert_eq!(send(FORM, &multipart(&[])), 422, "no source");
    let source = archive();
    let two = multipart(&[("source", &source), ("source", &source)]);
    assert_eq!(send(FORM, &two), 422, "two sources");
    assert_eq!(send(FORM, &multipart(&[("nosuch", b"x")])), 422);
    for bad in [&b""[..], b"PK\x03\x04 zip", b"not a tar", &[0; 2048]] {
        let got = acme.form("/v1/builds", &[("source", bad)]);
        assert_eq!(
            (got.status, got.code().as_str()),
            (422, "invalid_source"),
            "{}",
            got.text()
        );
    }
    let many: Vec<(String, Vec<u8>)> = (0..200)
        .map(|i| (format!("secret.s{i}"), vec![b'x']))
        .collect();
    let many: Vec<(&str, &[u8])> = many
        .iter()
        .map(|(n, v)| (n.as_str(), v.as_slice()))
        .collect();
    assert_eq!(send(FORM, &multipart(&many)), 400, "too many parts");
    let late = json!({"tenant": "local"}).to_string();
    let late = multipart(&[("source", &source), ("request", late.as_bytes())]);
    assert_eq!(send(FORM, &late), 422, "the tenant came after the source");
    assert_eq!(
        acme.get("/v1/jobs").value()["items"],
        json!([]),
        "nothing was queued"
    );
}

#[test]
fn a_request_can_only_narrow() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    for (name, value) in [
        ("cpus", json!(5)),
        ("cpus", json!(0)),
        ("cpus", json!(4_294_967_295_u32)),
        ("memory", json!("9G")),
        ("memory", json!("1")),
        ("memory", json!("99999999T")),
        ("memory", json!("x")),
        ("disk", json!("51G")),
        ("timeout_seconds", json!(0)),
        ("timeout_seconds", json!(18_446_744_073_709_551_615_u64)),
        ("priority", json!(1)),
        ("priority", json!(1000)),
        ("trust", json!("trusted")),
        ("attempts_max", json!(4)),
        ("allow", json!(["169.254.169.254:80"])),
        ("allow", json!(["*"])),
        ("queue", json!("A b")),
        ("queue", json!("nosuch")),
        ("tags", json!(["a\nb"])),
        ("tags", json!(["<script>"])),
        ("tags", json!(["\u{1b}[2J"])),
        ("labels", json!({"a'; drop table jobs; --": "x"})),
        ("concurrency_group", json!("a b")),
        ("require", json!({"x": "a\u{0}"})),
        ("notify_url", json!("file:///etc/passwd")),
        ("notify_url", json!("https://user:secret@a.example/")),
        ("notify_url", json!("https://")),
        ("env", json!({"A=B": "x"})),
        ("image", json!("A//B")),
    ] {
        let mut ask = json!({"argv": ["true"]});
        ask[name] = value.clone();
        let got = acme.json("POST", "/v1/runs", &ask);
        assert_eq!(got.status, 422, "{name} {value}: {}", got.text());
    }
    for (name, value) in [
        ("git_ref", json!("--upload-pack=x")),
        ("git_url", json!("file:///etc")),
        ("git_url", json!("ext::sh -c x")),
        ("dockerfile", json!("../../etc/passwd")),
        ("dockerfile", json!("/etc/passwd")),
        ("images", json!(["evil.example/x"])),
        ("build_args", json!({"A B": "x"})),
        ("secrets", json!(["../x y"])),
        ("name", json!("../x")),
    ] {
        let mut ask = json!({"git_url": "https://git.example/a.git"});
        ask[name] = value.clone();
        let got = acme.json("POST", "/v1/builds", &ask);
        assert_eq!(got.status, 422, "{name} {value}: {}", got.text());
    }
    let low = acme.json(
        "POST",
        "/v1/runs",
        &json!({"argv": ["x"], "priority": -100, "cpus": 1}),
    );
    assert_eq!(low.status, 202, "{}", low.text());
}

const GB: u64 = 1 << 30;

/// Most programs read the answer when all is sent: until then the connection must not be reset.
#[test]
fn who_sends_everything_before_they_read_sees_why_they_were_refused() {
    let server = Server::with(|c| c.source_max = 1 << 20, ListenConfig::default());
    let acme = server.member("acme", "developer");
    let mut line = acme.line();
    let headers = [("content-type", FORM), ("transfer-encoding", "chunked")];
    let head = acme.head("POST", "/v1/builds", &headers);
    line.write_all(format!("{head}\r\n").as_bytes())
        .expect("writes");
    let mut piece = multipart(&[("source", &archive())]);
    piece.truncate(piece.len() - 10);
    for _ in 0..256 {
        let chunk = format!("{:x}\r\n", piece.len());
        line.write_all(chunk.as_bytes()).expect("still read");
        line.write_all(&piece).expect("still read");
        line.write_all(b"\r\n").expect("still read");
        piece = vec![0; 64 * 1024];
    }
    assert_eq!(receive(&mut *line).status, 413);
    assert_eq!(acme.get("/v1/jobs").value()["items"], json!([]));
}

#[test]
fn ten_gigabytes_to_a_limit_of_one_are_refused_to_liars_too() {
    let server = Server::with(|c| c.source_max = GB, ListenConfig::default());
    let acme = server.member("acme", "developer");
    // Honest: refused before a byte of it is read.
    let mut line = acme.line();
    let length = (10 * GB).to_string();
    let head = acme.head(
        "POST",
        "/v1/builds",
        &[("content-type", FORM), ("content-length", &length)],
    );
    line.write_all(format!("{head}\r\n").as_bytes())
        .expect("writes");
    assert_eq!(receive(&mut *line).status, 413);
    // Chunked and lying: small limit, so that the test moves megabytes and not gigabytes.
    let server = Server::with(|c| c.source_max = 4 << 20, ListenConfig::default());
    let acme = server.member("acme", "developer");
    let mut line = acme.line();
    let headers = [("content-type", FORM), ("transfer-encoding", "chunked")];
    let head = acme.head("POST", "/v1/builds", &headers);
    line.write_all(format!("{head}\r\n").as_bytes())
        .expect("writes");
    let mut sent = 0_u64;
    let mut piece = multipart(&[("source", &archive())]);
    piece.truncate(piece.len() - 10);
    let mut broke = false;
    while sent < 64 << 20 {
        let chunk = format!("{:x}\r\n", piece.len());
        let wrote = line
            .write_all(chunk.as_bytes())
            .and_then(|()| line.write_all(&piece))
            .and_then(|()| line.write_all(b"\r\n"));
        if wrote.is_err() {
            broke = true;
            break;
        }
        sent += piece.len() as u64;
        piece = vec![0; 64 * 1024];
    }
    if !broke {
        assert_eq!(receive(&mut *line).status, 413);
    }
    assert!(broke || sent >= 4 << 20);
    let most = *server.parts.most_in_memory.lock().expect("lock");
    assert!(most <= 1 << 20, "pieces of {most} bytes were held");
    assert_eq!(acme.get("/v1/jobs").value()["items"], json!([]));
    // A part that is no source has a limit of its own.
    let ask = vec![b' '; (1 << 20) + 1];
    assert_eq!(acme.form("/v1/builds", &[("request", &ask)]).status, 413);
}

/// What a parser of multipart keeps until it finds the next part, and what is kept of parts that are no source.
#[test]
fn what_an_upload_keeps_in_memory_is_bounded() {
    let server = Server::with(|c| c.source_max = 64 << 20, ListenConfig::default());
    let acme = server.member("acme", "developer");
    let before = [b'x'; 300 * 1024];
    let mut head = b"--XX\r\ncontent-disposition: form-data; name=\"source\"\r\nx: ".to_vec();
    head.resize(300 * 1024, b'y');
    for (what, body) in [("before the first part", &before[..]), ("in a head", &head)] {
        for path in ["/v1/builds", "/builds"] {
            let got = acme.send("POST", path, &[("content-type", FORM)], body);
            assert_eq!(got.status, 413, "{what} of {path}: {}", got.text());
        }
    }
    let value = vec![b'v'; (1 << 20) - 1];
    let names: Vec<String> = (0..6).map(|n| format!("secret.s{n}")).collect();
    let parts: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &value[..])).collect();
    let got = acme.form("/v1/builds", &parts);
    assert_eq!(got.status, 413, "{}", got.text());
    let kind = format!("multipart/form-data; boundary={}", "b".repeat(71));
    let long = acme.send("POST", "/v1/builds", &[("content-type", &kind)], b"--b");
    assert_eq!(long.status, 400, "{}", long.text());
    // Long contents are no heads.
    let mut source = archive();
    source.resize(2 << 20, 0);
    let whole = acme.form("/v1/builds", &[("source", &source), ("secret.a", b"x")]);
    assert_eq!(whole.status, 202, "{}", whole.text());
}

#[test]
fn an_upload_that_is_cut_in_the_middle_leaves_nothing() {
    let server = Server::start();
    let acme = server.member("acme", "developer");
    let mut line = acme.line();
    let body = multipart(&[("source", &archive())]);
    let length = body.len().to_string();
    let head = acme.head(
        "POST",
        "/v1/builds",
        &[("content-type", FORM), ("content-length", &length)],
    );
    line.write_all(format!("{head}\r\n").as_bytes())
        .expect("writes");
    line.write_all(&body[..body.len() / 2]).expect("writes");
    drop(line);
    assert_eq!(
        acme.form("/v1/builds", &[("source", &archive())]).status,
        202
    );
    assert_eq!(
        acme.get("/v1/jobs").value()["items"]
            .as_array()
            .map(Vec::len),
        Some(1)
    );
}

#[test]
fn slow_senders_are_cut_and_cost_nobody_else() {
    let listen = ListenConfig {
        head_timeout: Duration::from_millis(300),
        ..ListenConfig::default()
    };
    let server = Server::with(|c| c.body_stall = Duration::from_millis(300), listen);
    let acme = server.member("acme", "developer");
    let began = Instant::now();
    let mut heads: Vec<_> = (0..20).map(|_| acme.line()).collect();
    for line in &mut heads {
        line.write_all(b"GET /v1/jobs HTTP/1.1\r\nhost: x\r\nx-slow: ")
            .expect("writes");
    }
    assert_eq!(
        acme.get("/v1/jobs").status,
        200,
        "others are served meanwhile"
    );
    for line in &mut heads {
        let mut rest = Vec::new();
        let _closed = line.read_to_end(&mut rest);
    }
    let mut line = acme.line();
    let headers = [
        ("content-type", "application/json"),
        ("content-length", "100"),
    ];
    let head = acme.head("POST", "/v1/runs", &headers);
    line.write_all(format!("{head}\r\n{{").as_bytes())
        .expect("writes");
    let got = receive(&mut *line);
    assert_eq!((got.status, got.code().as_str()), (408, "stalled"));
    let mut line = acme.line();
    let headers = [("content-type", FORM), ("content-length", "100000")];
    let head = acme.head("POST", "/v1/builds", &headers);
    line.write_all(format!("{head}\r\n--XX\r\n").as_bytes())
        .expect("writes");
    assert_eq!(receive(&mut *line).status, 408);
    assert!(began.elapsed() < Duration::from_secs(120));
}

#[test]
fn one_token_cannot_take_all_requests_and_others_keep_theirs() {
    let server = Server::with(
        |c| {
            c.requests_per_s = 1;
            c.requests_burst = 5;
        },
        ListenConfig::default(),
    );
    let (greedy, other) = (
        server.member("acme", "developer"),
        server.member("rival", "developer"),
    );
    let statuses: Vec<u16> = (0..20).map(|_| greedy.get("/v1/jobs").status).collect();
    assert!(statuses.contains(&429), "{statuses:?}");
    let refused = greedy.get("/v1/jobs");
    assert_eq!(
        refused.headers.get("retry-after").map(String::as_str),
        Some("1")
    );
    assert_eq!(other.get("/v1/jobs").status, 200);
    assert_eq!(server.owner().get("/v1/jobs").status, 200);
}

#[test]
fn answers_cannot_be_framed_sniffed_or_kept_and_docs_load_nothing_from_elsewhere() {
    let server = Server::start();
    let nobody = server.client("");
    let refused = nobody.get("/v1/jobs");
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("cache-control", "no-store"),
        ("referrer-policy", "no-referrer"),
    ] {
        assert_eq!(refused.headers[name], value, "{name}");
    }
    assert!(refused.headers["content-security-policy"].contains("default-src 'none'"));
    for path in ["/docs", "/docs/page.js", "/docs/page.css"] {
        let page = nobody.get(path);
        assert_eq!(page.status, 200, "{path}");
        assert!(
            page.headers["content-security-policy"].contains("script-src 'self'"),
            "{path}"
        );
        assert!(!page.text().contains("://"), "{path} names no other host");
    }
    let api = nobody.get("/v1/openapi.json").value();
    assert_eq!(
        api["openapi"].as_str().map(|v| v.starts_with("3.1")),
        Some(true)
    );
    let paths = api["paths"].as_object().expect("paths");
    let mut names = std::collections::BTreeSet::new();
    for path in [
        "/v1/builds",
        "/v1/runs",
        "/v1/jobs",
        "/v1/jobs/{id}/events",
        "/builds",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    for (path, item) in paths {
        for (method, spec) in item.as_object().expect("item") {
            let name = spec["operationId"].as_str().expect("operationId");
            assert!(names.insert(name.to_owned()), "{name} is there twice");
            let summary = spec["summary"].as_str().unwrap_or_default();
            assert!(!summary.is_empty(), "{method} {path} has no summary");
            assert!(
                spec["responses"].get("4XX").is_some() || path == "/v1/whoami",
                "{path}"
            );
        }
    }
}

#[test]
fn plain_http_for_others_is_refused_unless_it_was_asked_for() {
    let server = Server::start();
    let sockets = Sockets::new(ListenConfig::default());
    let any = "0.0.0.0:0".parse().expect("address");
    let refused = server.run(sockets.tcp(any, None, axum::Router::new()));
    let Err(ListenError::Plain(_)) = &refused else {
        panic!("it listens: {refused:?}");
    };
    assert!(refused.expect_err("refused").to_string().contains("TLS"));
    let taken = server.run(sockets.tcp(server.address, None, axum::Router::new()));
    assert!(
        matches!(taken, Err(ListenError::Bind { .. })),
        "a port in use is said"
    );
    let told = Sockets::new(ListenConfig {
        plain_is_fine: true,
        ..ListenConfig::default()
    });
    assert!(server.run(told.tcp(any, None, axum::Router::new())).is_ok());
}

#[test]
fn a_page_of_another_site_cannot_reach_in_by_another_name() {
    let server = Server::with(
        |c| c.hosts = vec!["kiln.test".to_owned()],
        ListenConfig::default(),
    );
    let ask = |host: &str| {
        let client = server.client("");
        let mut line = client.line();
        let text =
            format!("GET /v1/openapi.json HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        line.write_all(text.as_bytes()).expect("writes");
        receive(&mut *line).status
    };
    for good in [
        "kiln.test",
        "KILN.test:80",
        "localhost:1",
        "127.0.0.1:1",
        "[::1]:1",
    ] {
        assert_eq!(ask(good), 200, "{good}");
    }
    for bad in [
        "evil.example",
        "kiln.test.evil.example",
        "127.0.0.1.evil.example:1",
    ] {
        assert_eq!(ask(bad), 421, "{bad}");
    }
}
