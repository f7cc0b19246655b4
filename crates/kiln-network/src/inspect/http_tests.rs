//! Tests of the HTTP request checker.

use super::*;
use proptest::prelude::*;

#[path = "http_framing.rs"]
mod http_framing;
use http_framing::framed_in_one_way;

fn checker() -> HttpChecker {
    HttpChecker::new("a.example.org", 80, Form::Origin)
}

fn run(bytes: &[u8]) -> Result<Vec<u8>, HttpRefusal> {
    let mut out = Vec::new();
    checker().push(bytes, &mut out).map(|()| out)
}

const GET: &[u8] = b"GET /x HTTP/1.1\r\nHost: a.example.org\r\nAccept: */*\r\n\r\n";

#[test]
fn plain_requests_pass_unchanged() {
    assert_eq!(run(GET).expect("legal"), GET);
    let twice = [GET, GET].concat();
    assert_eq!(run(&twice).expect("legal"), twice);
    let posts = b"POST / HTTP/1.1\r\nhost:A.Example.org:80\r\nContent-Length: 3\r\n\r\nabc\
        POST / HTTP/1.1\r\nHost: a.example.org\r\nTransfer-Encoding: chunked\r\n\r\n\
        3;x=y\r\nabc\r\n0\r\nT: 1\r\n\r\n";
    assert_eq!(run(posts).expect("legal"), posts);
    let absolute = b"GET http://a.example.org/x HTTP/1.1\r\nHost: a.example.org\r\n\r\n";
    assert_eq!(run(absolute).expect("legal"), absolute);
    let lines = [b"\r\n\r\n", GET].concat();
    assert_eq!(run(&lines).expect("legal"), GET);
}

#[test]
fn upgrades_are_refused_and_nothing_of_them_leaves() {
    let refused = |head: &str| {
        let (mut checker, mut out) = (checker(), Vec::new());
        let all = [GET, head.as_bytes()].concat();
        let refusal = checker.push(&all, &mut out).expect_err(head);
        assert_eq!(out, GET, "{head:?}");
        refusal
    };
    for (headers, said) in [
        (
            "Upgrade: h2c\r\nHTTP2-Settings: AAA\r\nConnection: Upgrade, HTTP2-Settings",
            "h2c",
        ),
        (
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c",
            "Upgrade, HTTP2-Settings",
        ),
        ("HTTP2-Settings: AAMAAABkAAQAAP__", "AAMAAABkAAQAAP__"),
        ("UPGRADE: websocket", "websocket"),
        ("Upgrade:", ""),
        ("connection: keep-alive,\tuPgrade", "keep-alive,\tuPgrade"),
    ] {
        let head = format!("GET / HTTP/1.1\r\nHost: a.example.org\r\n{headers}\r\n\r\n");
        let said = said.replace('\t', "");
        assert_eq!(refused(&head), HttpRefusal::Upgrade { said }, "{headers:?}");
    }
    let preface = HttpRefusal::Upgrade {
        said: "HTTP/2".to_owned(),
    };
    assert_eq!(refused("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), preface);
    let kept = "GET / HTTP/1.1\r\nHost: a.example.org\r\nConnection: keep-alive, upgraded\r\n\r\n";
    assert_eq!(run(kept.as_bytes()).expect("legal"), kept.as_bytes());
}

/// Whatever a lenient server takes for a line end is not one here, in every place where a line decides how bytes are framed.
#[test]
fn bare_line_ends_and_other_blanks_never_pass_in_framing() {
    let chunked = "POST / HTTP/1.1\r\nHost: a.example.org\r\nTransfer-Encoding: chunked\r\n\r\n";
    let end = "x\r\n0\r\n\r\n";
    let smuggled = [
        "GET /\n HTTP/1.1\r\nHost: a.example.org\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\nHost: a.example.org\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\rHost: a.example.org\r\n\r\n".to_owned(),
        "\nGET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n".to_owned(),
        "\r\rGET / HTTP/1.1\r\nHost: a.example.org\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: a.example.org\r\n\n\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: a.example.org\r\n\tX: y\r\n\r\n".to_owned(),
        "POST / HTTP/1.1\r\nHost: a.example.org\r\nContent-Length: 1\x0c\r\n\r\nx".to_owned(),
    ];
    let bodies = [
        "1\n;\r\n",
        "1\r;\r\n",
        "1\x0c;\r\n",
        "1 \n;\r\n",
        "1\n\r\n",
        "1\r\r\n",
        "1\x0b\r\n",
        "1;a\nb\r\n",
        "1;a\rb\r\n",
        "\n1\r\n",
        " 1\r\n",
    ];
    let bodies = bodies.map(|line| format!("{chunked}{line}{end}"));
    let trailers = [
        "X: a\nY: b\r\n",
        "X: a\rb\r\n",
        "\nX: a\r\n",
        "X: a\r\n b\r\n",
        "\r\r\n",
    ];
    let trailers = trailers.map(|line| format!("{chunked}0\r\n{line}\r\n"));
    for text in smuggled.iter().chain(&bodies).chain(&trailers) {
        let refused = run(text.as_bytes());
        assert!(
            matches!(refused, Err(HttpRefusal::Malformed(_))),
            "{text:?}: {refused:?}"
        );
    }
    let blanks = format!("{chunked}1 \t;x=\t y\r\n{end}");
    assert_eq!(run(blanks.as_bytes()).expect("legal"), blanks.as_bytes());
}

#[test]
fn a_proxy_gets_absolute_targets_and_our_authorization_only() {
    let form = Form::Proxy {
        authorization: Some("Basic eDp5".to_owned()),
    };
    let asked =
        b"GET /x?y HTTP/1.1\r\nHost: a.example.org\r\nProxy-Authorization: Basic evil\r\n\r\n";
    for (port, authority) in [(80, "a.example.org"), (8080, "a.example.org:8080")] {
        let mut out = Vec::new();
        HttpChecker::new("a.example.org", port, form.clone())
            .push(asked, &mut out)
            .expect("legal");
        let want = format!(
            "GET http://{authority}/x?y HTTP/1.1\r\nHost: a.example.org\r\nProxy-Authorization: Basic eDp5\r\n\r\n"
        );
        assert_eq!(String::from_utf8(out).expect("text"), want);
    }
}

#[test]
fn other_hosts_are_refused_wherever_they_hide() {
    let wrong = |bytes: &[u8], said: Option<&str>| {
        let refusal = run(bytes).expect_err("refused");
        assert_eq!(refusal.said(), said, "{refusal:?}");
    };
    wrong(
        b"GET / HTTP/1.1\r\nHost: b.example.org\r\n\r\n",
        Some("b.example.org"),
    );
    wrong(
        b"GET / HTTP/1.1\r\nHost: a.example.org:81\r\n\r\n",
        Some("a.example.org:81"),
    );
    wrong(b"GET / HTTP/1.1\r\nAccept: x\r\n\r\n", None);
    wrong(b"GET / HTTP/1.0\r\n\r\n", None);
    wrong(
        b"GET http://b.example.org/ HTTP/1.1\r\nHost: a.example.org\r\n\r\n",
        Some("http://b.example.org/"),
    );
    wrong(
        b"CONNECT a.example.org:80 HTTP/1.1\r\nHost: a.example.org\r\n\r\n",
        Some("a.example.org:80"),
    );
    let second = [GET, b"GET / HTTP/1.1\r\nHost: b.example.org\r\n\r\n"].concat();
    wrong(&second, Some("b.example.org"));
    let after_body = b"POST / HTTP/1.1\r\nHost: a.example.org\r\nContent-Length: 1\r\n\r\nx\
        GET / HTTP/1.1\r\nHost: b.example.org\r\n\r\n";
    wrong(after_body, Some("b.example.org"));
    let after_chunks =
        b"POST / HTTP/1.1\r\nHost: a.example.org\r\nTransfer-Encoding: chunked\r\n\r\n\
        1\r\nx\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: b.example.org\r\n\r\n";
    wrong(after_chunks, Some("b.example.org"));
}

#[test]
fn what_could_be_framed_in_two_ways_is_refused() {
    let with =
        |headers: &str| format!("POST / HTTP/1.1\r\nHost: a.example.org\r\n{headers}\r\n\r\n");
    for headers in [
        "Content-Length: 1\r\nTransfer-Encoding: chunked",
        "Content-Length: 1\r\nContent-Length: 1",
        "Content-Length: +1",
        "Content-Length: 1, 1",
        "Content-Length:",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: \x0bchunked",
        "Host: a.example.org",
        "Content-Length : 1",
        "X: y\r\n Transfer-Encoding: chunked",
        "X: y\nTransfer-Encoding: chunked",
        "X: y\rZ: w",
        "X: \0",
        "nocolon",
    ] {
        let refused = run(with(headers).as_bytes());
        assert!(
            matches!(refused, Err(HttpRefusal::Malformed(_))),
            "{headers:?}: {refused:?}"
        );
    }
    for head in [
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        "GET / HTTP/2.0",
        "GET /",
        "GET\t/ HTTP/1.1",
        "G(T / HTTP/1.1",
        "GET http://x@a.example.org/ HTTP/1.1",
        "GET https://a.example.org:80/ HTTP/1.1",
        "PRI * HTTP/1.2",
        "GET a.example.org HTTP/1.1",
        " GET / HTTP/1.1",
    ] {
        let text = format!("{head}\r\nHost: a.example.org\r\n\r\n");
        let refused = run(text.as_bytes());
        assert!(
            matches!(refused, Err(HttpRefusal::Malformed(_))),
            "{head:?}: {refused:?}"
        );
    }
    let chunked = |body: &str| {
        run(format!(
            "POST / HTTP/1.1\r\nHost: a.example.org\r\nTransfer-Encoding: chunked\r\n\r\n{body}"
        )
        .as_bytes())
    };
    for body in [
        "1\r\nxy\r\n",
        "0x1\r\n",
        "\r\n",
        "-1\r\n",
        "1 y\r\n",
        "1\n",
        "1;\x01\r\n",
        "0\r\nbad\r\n",
    ] {
        if body == "1\n" {
            assert_eq!(
                chunked(body).expect("incomplete line is held").last(),
                Some(&b'\n')
            );
            continue;
        }
        assert!(chunked(body).is_err(), "{body:?}");
    }
}

#[test]
fn bounds_hold_and_nothing_of_a_refused_request_leaves() {
    let long = format!(
        "GET / HTTP/1.1\r\nHost: a.example.org\r\nX: {}",
        "y".repeat(HEAD_BYTES_MAX)
    );
    assert_eq!(
        run(long.as_bytes()),
        Err(HttpRefusal::TooLong("request head"))
    );
    let mut out = Vec::new();
    let mut checker = checker();
    checker.push(GET, &mut out).expect("legal");
    assert!(checker.at_rest());
    checker
        .push(b"GET / HTTP/1.1\r\nHost: b.exam", &mut out)
        .expect("held");
    assert!(!checker.at_rest());
    assert!(checker.push(b"ple.org\r\n\r\n", &mut out).is_err());
    assert_eq!(out, GET);
    let chunked = "POST / HTTP/1.1\r\nHost: a.example.org\r\nTransfer-Encoding: chunked\r\n\r\n";
    let line = format!("{chunked}1;{}", "x".repeat(CHUNK_LINE_BYTES_MAX));
    assert_eq!(
        run(line.as_bytes()),
        Err(HttpRefusal::TooLong("chunk line"))
    );
    let trailers = format!("{chunked}0\r\n{}", "X: yyyyyyyyyyyyyyyyyy\r\n".repeat(1000));
    assert_eq!(
        run(trailers.as_bytes()),
        Err(HttpRefusal::TooLong("trailer section"))
    );
}

fn request() -> impl Strategy<Value = (Vec<u8>, bool)> {
    let body = proptest::collection::vec(any::<u8>(), 0..50);
    (0..3_u8, body, prop::bool::weighted(0.1)).prop_map(|(kind, body, evil)| {
        let host = if evil {
            "b.example.org"
        } else {
            "a.example.org"
        };
        let mut out = format!("PUT /p HTTP/1.1\r\nHost: {host}\r\n").into_bytes();
        match kind {
            0 => out.extend(b"\r\n"),
            1 => {
                out.extend(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
                out.extend(&body);
            }
            _ => {
                out.extend(b"Transfer-Encoding: chunked\r\n\r\n");
                for part in body.chunks(7) {
                    out.extend(format!("{:x}\r\n", part.len()).as_bytes());
                    out.extend(part);
                    out.extend(b"\r\n");
                }
                out.extend(b"0\r\n\r\n");
            }
        }
        (out, evil)
    })
}

/// Found by the fuzz target: all at once less of a body went on than piece by piece.
#[test]
fn a_wrong_chunk_end_is_refused_at_the_same_byte_in_any_pieces() {
    let head = "PUT / HTTP/1.1\r\nHost: a.example.org\r\nTransfer-Encoding: chunked\r\n\r\n";
    for chunk in [
        "1\r\nabc\r\n0\r\n\r\n",
        "1\r\na\rb0\r\n\r\n",
        "2\r\nab\n\r0\r\n\r\n",
    ] {
        let text = format!("{head}{chunk}");
        let passed = |size: usize| {
            let (mut checker, mut out) = (checker(), Vec::new());
            let refused = text
                .as_bytes()
                .chunks(size)
                .any(|piece| checker.push(piece, &mut out).is_err());
            assert!(refused, "{chunk:?}");
            out
        };
        let whole = passed(text.len());
        assert!(
            (1..text.len()).all(|size| passed(size) == whole),
            "{chunk:?}"
        );
    }
}

proptest! {
    /// However the bytes are cut: exactly the requests before the first wrong one pass.
    #[test]
    fn cutting_changes_nothing(
        requests in proptest::collection::vec(request(), 1..6),
        cuts in proptest::collection::vec(1..40_usize, 1..20),
    ) {
        let all: Vec<u8> = requests.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        let want: Vec<u8> = requests
            .iter()
            .take_while(|(_, evil)| !evil)
            .flat_map(|(bytes, _)| bytes.clone())
            .collect();
        let mut checker = checker();
        let mut out = Vec::new();
        let mut rest = &all[..];
        let mut refused = false;
        for cut in cuts.iter().cycle() {
            if rest.is_empty() || refused {
                break;
            }
            let (part, tail) = rest.split_at((*cut).min(rest.len()));
            refused = checker.push(part, &mut out).is_err();
            rest = tail;
        }
        prop_assert_eq!(refused, requests.iter().any(|(_, evil)| *evil));
        prop_assert_eq!(out, want);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..6),
    ) {
        let mut checker = checker();
        let mut out = Vec::new();
        for part in parts {
            if checker.push(&part, &mut out).is_err() {
                break;
            }
        }
        prop_assert!(out.is_empty());
    }

    /// Requests made of what smuggling is made of: what passes is framed in one way.
    #[test]
    fn what_passes_is_framed_in_one_way(
        line in "[0-3]([ \t\n\r\x0b\x0c;a]{0,3})",
        ends in proptest::collection::vec(prop::sample::select(vec!["\r\n", "\r\n", "\r\n", "\n", "\r", "\r\n "]), 12),
        value in "(chunked|1|0|x)[ \t\n\r\x0c]{0,2}",
        header in prop::sample::select(vec!["Transfer-Encoding: chunked", "Content-Length: 3", "Connection: upgrade", "X: y"]),
    ) {
        let mut text = String::new();
        let lines = ["PUT / HTTP/1.1", "Host: a.example.org", header, "", &line, "abc", "0", "T: v", "", "GET / HTTP/1.1", "Host: a.example.org", ""];
        for (line, end) in lines.iter().zip(&ends) {
            text.push_str(line);
            text.push_str(end);
        }
        let plain = text.replace("X: y", &format!("X: {value}"));
        for text in [text, plain] {
            let mut out = Vec::new();
            let _ = checker().push(text.as_bytes(), &mut out);
            framed_in_one_way(&out, "a.example.org");
        }
    }

    /// The same where only the line before a chunk is at stake, so that it is reached each time.
    #[test]
    fn a_chunk_line_that_passes_is_one_line(line in "[0-3][ \t\n\r\x0b\x0c;a]{0,4}") {
        let head = "PUT / HTTP/1.1\r\nHost: a.example.org\r\nTransfer-Encoding: chunked\r\n\r\n";
        let mut out = Vec::new();
        let _ = checker().push(format!("{head}{line}\r\nabc\r\n0\r\n\r\n").as_bytes(), &mut out);
        framed_in_one_way(&out, "a.example.org");
    }

    #[test]
    fn near_requests_never_panic(text in "(GET|POST) /[ -~\r\n]{0,20}\r\nHost: a.example.org\r\n(Content-Length: [0-9]{1,3}\r\n|Transfer-Encoding: chunked\r\n)?\r\n[0-9a-f\r\n]{0,40}") {
        let mut out = Vec::new();
        let _ = checker().push(text.as_bytes(), &mut out);
    }
}
