//! The file server of built sites, run by the host's own Node where there is one; the end-to-end tests run it in an image.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Status line and head in lower case, and body.
struct Answer {
    head: String,
    body: String,
}

impl Server {
    /// `None` where the host has no Node.
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    fn start(site: &Path, single_page: bool) -> Option<Self> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/plan/node/static_server.mjs");
        let started = Command::new("node")
            .arg(program)
            .env("SITE", site)
            .env("PORT", "0")
            .env("SINGLE_PAGE", if single_page { "1" } else { "0" })
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = started else {
            eprintln!("skipped: node is not installed");
            return None;
        };
        let stdout = child.stdout.take().expect("piped");
        let line = BufReader::new(stdout).lines().next().expect("a line");
        let line = line.expect("text");
        let port = line.rsplit(' ').next().expect("a word").parse();
        Some(Self {
            child,
            port: port.expect("a port"),
        })
    }

    fn ask(&self, request: &str) -> Answer {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("connects");
        let (line, headers) = request.split_once('\n').unwrap_or((request, ""));
        write!(
            stream,
            "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n"
        )
        .expect("sends");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("answers");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        Answer {
            head: head.to_lowercase(),
            body: body.to_owned(),
        }
    }

    #[track_caller]
    fn gives(&self, request: &str, status: u16, body: &str) -> Answer {
        let answer = self.ask(request);
        let line = format!("http/1.1 {status} ");
        assert!(answer.head.starts_with(&line), "{request}: {}", answer.head);
        assert!(answer.body.contains(body), "{request}: {}", answer.body);
        answer
    }
}

fn site() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path().join("site");
    for (name, text) in [
        ("index.html", "the first page"),
        ("about.html", "about us"),
        ("404.html", "lost"),
        ("blog/index.html", "the blog"),
        ("assets/app-1a2b3c4d.js", "run()"),
        (".env", "SECRET"),
        (".well-known/x.txt", "known"),
    ] {
        let file = root.join(name);
        fs::create_dir_all(file.parent().expect("inside")).expect("folders");
        fs::write(file, text).expect("a file");
    }
    fs::write(dir.path().join("outside.txt"), "OUTSIDE").expect("a file");
    std::os::unix::fs::symlink("../outside.txt", root.join("link.txt")).expect("a link");
    (dir, root)
}

#[test]
fn pages_files_and_nothing_else() {
    let (_dir, root) = site();
    let Some(server) = Server::start(&root, false) else {
        return;
    };
    let page = server.gives("GET /?x=1", 200, "the first page");
    assert!(page.head.contains("content-type: text/html; charset=utf-8"));
    assert!(page.head.contains("cache-control: no-cache"));
    server.gives("GET /about", 200, "about us");
    server.gives("GET /blog/", 200, "the blog");
    server.gives("GET /.well-known/x.txt", 200, "known");
    let script = server.gives("GET /assets/app-1a2b3c4d.js", 200, "run()");
    assert!(script.head.contains("immutable"), "{}", script.head);
    let tag = script
        .head
        .lines()
        .find_map(|line| line.strip_prefix("etag: "));
    let again = format!(
        "GET /assets/app-1a2b3c4d.js\nIf-None-Match: {}\r\n",
        tag.expect("a tag")
    );
    assert_eq!(server.gives(&again, 304, "").body, "");
    assert_eq!(server.gives("HEAD /", 200, "").body, "");
    for hidden in ["/.env", "/link.txt", "/nothing", "/nothing.png"] {
        let answer = server.gives(&format!("GET {hidden}"), 404, "lost");
        assert!(!answer.body.contains("OUTSIDE") && !answer.body.contains("SECRET"));
    }
    for bad in ["/../outside.txt", "/%2e%2e/outside.txt", "/%zz"] {
        server.gives(&format!("GET {bad}"), 400, "bad request");
    }
    server.gives("GET /..%5coutside.txt", 404, "");
    server.gives("POST /", 405, "method not allowed");
}

#[test]
fn unknown_pages_of_a_single_page_app_are_its_own() {
    let (_dir, root) = site();
    let Some(server) = Server::start(&root, true) else {
        return;
    };
    server.gives("GET /users/7", 200, "the first page");
    server.gives("GET /nothing.js", 404, "lost");
}
