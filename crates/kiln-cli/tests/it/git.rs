//! Git sources, from a real git server on a private address of a network namespace: loopback can never be excepted.
//! Needs root, `unshare`, `nsenter`, `ip`, `git`, `openssl` and `python3`; says so where one is missing.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::support::{Kiln, Said, Started, kiln, path, said, until};

const ADDRESS: &str = "10.77.0.1";
/// An operator's exception names it.
const HOST: &str = "git.kiln-test.example.org";
/// No exception names it.
const OTHER_HOST: &str = "other.kiln-test.example.org";

/// Serves `git http-backend` over TLS.
const SERVER: &str = r#"
import http.server, os, ssl, subprocess, sys, time
address, folder = sys.argv[1], sys.argv[2]
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def serve(self):
        path, _, query = self.path.partition("?")
        if path.startswith("/silent.git/"):
            open(folder + "/asked", "w").close()
            time.sleep(120)
        if path.startswith("/private/"):
            login = self.headers.get("Authorization", "")
            with open(folder + "/logins", "a") as log: log.write(login + "\n")
            if login != "Basic Y2k6dDBrZW4tb2YtdGhlLWhvc3Q=":
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="private"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        if path.startswith("/moved.git/"):
            self.send_response(302)
            self.send_header("Location", "https://@OTHER@/shop.git/" + self.path[len("/moved.git/"):])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while True:
                size = int(self.rfile.readline(), 16)
                body += self.rfile.read(size)
                self.rfile.readline()
                if size == 0: break
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        env = {"PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": folder, "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "REMOTE_ADDR": "test",
            "REQUEST_METHOD": self.command, "PATH_INFO": path, "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", "")}
        out = subprocess.run(["git", "http-backend"], input=body, env=env, stdout=subprocess.PIPE).stdout
        head, _, rest = out.partition(b"\r\n\r\n")
        status, headers = 200, []
        for line in head.decode().split("\r\n"):
            key, _, value = line.partition(": ")
            if key == "Status": status = int(value.split()[0])
            elif key: headers.append((key, value))
        self.send_response(status)
        for key, value in headers: self.send_header(key, value)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest)
    do_GET = do_POST = serve
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer((address, 443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(folder + "/cert.pem", folder + "/cert.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
"#;

/// A git server in namespaces of its own, and kiln commands beside it.
struct World {
    kiln: Kiln,
    holder: Child,
    dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ended = self.holder.kill();
        let _reaped = self.holder.wait();
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("the program runs");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn tools_are_here() -> bool {
    let ready = Command::new("sh")
        .args(["-c", "for t in unshare nsenter ip git openssl python3; do command -v $t || exit 1; done; unshare -n -m true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !ready {
        eprintln!("skipped: needs root and unshare, nsenter, ip, git, openssl, python3");
    }
    ready
}

impl World {
    fn new() -> Option<Self> {
        let kiln = kiln()?;
        if !tools_are_here() {
            return None;
        }
        let dir = tempfile::tempdir().expect("temp dir");
        let at = |name: &str| dir.path().join(name);
        let hosts = format!("127.0.0.1 localhost\n{ADDRESS} {HOST} {OTHER_HOST}\n");
        std::fs::write(at("hosts"), hosts).expect("write");
        std::fs::write(at("server.py"), SERVER.replace("@OTHER@", OTHER_HOST)).expect("write");
        certificate(dir.path());
        // Settings of this test lie over the prepared home's, in the namespace alone.
        for name in ["config", "cache"] {
            std::fs::create_dir(at(name)).expect("dir");
            std::fs::create_dir_all(kiln.home.join(name)).expect("dir");
        }
        let settings = format!(
            "version = 1\n[ca]\nfiles = [{:?}]\n[[exception]]\nallow = true\nhost = \"{HOST}\"\nrange = \"10.77.0.0/24\"\n",
            path(&at("ca.pem"))
        );
        std::fs::write(at("config/registries.toml"), settings).expect("write");
        let setup = format!(
            "ip link set lo up && ip addr add {ADDRESS}/32 dev lo && mount --bind \"$1/hosts\" /etc/hosts && \
             mount --bind \"$1/config\" \"$2/config\" && mount --bind \"$1/cache\" \"$2/cache\" && \
             exec python3 \"$1/server.py\" {ADDRESS} \"$1\""
        );
        let mut holder = Command::new("unshare")
            .args(["-n", "-m", "sh", "-c", &setup, "sh"])
            .arg(dir.path())
            .arg(&kiln.home)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare runs");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("pipe");
        BufReader::new(stdout).read_line(&mut line).expect("read");
        assert_eq!(line, "ready\n");
        Some(Self { kiln, holder, dir })
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn kiln(&self, args: &[&str]) -> Said {
        said(self.command(args))
    }

    /// kiln where the server can be reached.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.holder.id().to_string(), "-n", "-m", "--"])
            .arg(&self.kiln.program)
            .args(args)
            .env("KILN_HOME", &self.kiln.home)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    fn git(&self, repository: &str, args: &[&str]) -> String {
        let mut command = Command::new("git");
        command
            .arg("-C")
            .arg(self.at(repository))
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
            .args(args)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null");
        run(&mut command)
    }

    /// What the host noted about a build's commit.
    fn observed(&self, result: &Path) -> serde_json::Value {
        let json = |path: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(path).expect("file")).expect("JSON")
        };
        let job = json(result)["job"].as_str().expect("job").to_owned();
        let shown = self.kiln.run(&["job", "show", "--json", &job]).exits(0).out;
        let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        shown["observed"]["git"].clone()
    }

    fn checkouts(&self) -> usize {
        std::fs::read_dir(self.at("cache/checkouts")).map_or(0, Iterator::count)
    }
}

/// An authority, and what the server shows: not everybody takes an authority for a server.
fn certificate(dir: &Path) {
    let openssl = |name: &str, more: &[&str]| {
        let mut command = Command::new("openssl");
        command
            .current_dir(dir)
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt"])
            .args(["ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", &format!("/CN={name}"), "-keyout"])
            .arg(format!("{name}.key"))
            .args(["-out", &format!("{name}.pem")])
            .args(more);
        run(&mut command);
    };
    openssl("ca", &[]);
    let names = format!("subjectAltName=DNS:{HOST},DNS:{OTHER_HOST}");
    let leaf = [
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ];
    openssl("cert", &[&leaf[..], &["-addext", &names]].concat());
}

#[test]
fn a_commit_becomes_an_image() {
    let Some(world) = World::new() else { return };
    std::fs::create_dir(world.at("shop.git")).expect("dir");
    world.git("shop.git", &["init", "-q", "-b", "main"]);
    let file = |name: &str, text: &str| {
        let path = world.at("shop.git").join(name);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("dir");
        std::fs::write(path, text).expect("write");
    };
    file("words", "the words\n");
    file("bin/run", "#!/bin/sh\n");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(world.at("shop.git/bin/run"), mode).expect("mode");
    // What git's own checkout would do with these must not happen.
    file(".gitattributes", "words export-ignore eol=crlf\n");
    world.git("shop.git", &["add", "-A"]);
    world.git("shop.git", &["commit", "-q", "-m", "one"]);
    let first = world.git("shop.git", &["rev-parse", "HEAD"]);
    let base = "registry.kiln.internal/shared/node:20-run";
    file(
        "Dockerfile",
        &format!("FROM {base}\nWORKDIR /shop\nCOPY . .\nCMD [\"cat\", \"words\"]\n"),
    );
    world.git("shop.git", &["add", "-A"]);
    world.git("shop.git", &["commit", "-q", "-m", "two"]);
    let second = world.git("shop.git", &["rev-parse", "HEAD"]);
    world.git("shop.git", &["tag", "-a", "-m", "words", "v2"]);

    // An older commit, by its id: checked out, and then there is nothing that says how to build it.
    let url = format!("https://{HOST}/shop.git");
    let older = world.kiln(&["build", &format!("{url}#{first}")]).exits(2);
    older
        .says(&format!("is commit {first} (3 files"))
        .says("nothing here says how to build it");

    let (source, result) = (format!("{url}#v2"), world.at("result.json"));
    let args = [
        "build",
        &source,
        "--tag",
        "it-git",
        "--result",
        path(&result),
    ];
    world
        .kiln(&args)
        .exits(0)
        .says(&format!("is commit {second}"));
    let observed = world.observed(&result);
    assert_eq!(
        (&observed["url"], &observed["reference"]),
        (&url.as_str().into(), &"v2".into())
    );
    assert_eq!(observed["commit"], second.as_str());
    assert_eq!(
        observed["tree"],
        world
            .git("shop.git", &["rev-parse", "HEAD^{tree}"])
            .as_str()
    );
    let ran = world.kiln(&["run", "--image", "it-git"]).exits(0);
    assert_eq!(ran.out, "the words\n");
    assert_eq!(world.checkouts(), 0, "nothing is left behind");
}

#[test]
fn what_cannot_be_fetched_is_told() {
    let Some(world) = World::new() else { return };
    std::fs::create_dir(world.at("shop.git")).expect("dir");
    world.git("shop.git", &["init", "-q", "-b", "main"]);
    world.git("shop.git", &["commit", "-q", "--allow-empty", "-m", "one"]);
    let fails = |repository: &str, code: i32, words: &[&str]| {
        let said = world
            .kiln(&["build", &format!("https://{repository}")])
            .exits(code);
        words.iter().fold(said, |said, text| said.says(text));
    };
    fails(
        &format!("{HOST}/shop.git#nowhere"),
        2,
        &["couldn't find remote ref nowhere"],
    );
    fails(&format!("{HOST}/nothing.git"), 2, &["not found"]);
    fails(
        &format!("{OTHER_HOST}/shop.git"),
        4,
        &[OTHER_HOST, "exception"],
    );
    fails(
        &format!("{HOST}/moved.git"),
        4,
        &[OTHER_HOST, "the URL's own host alone"],
    );
    let tree = world.git("shop.git", &["rev-parse", "HEAD^{tree}"]);
    fails(&format!("{HOST}/shop.git#{tree}"), 2, &["commit"]);

    let mut command = world.command(&["build", &format!("https://{HOST}/silent.git")]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kiln starts");
    let waiting = Started { child };
    until("the fetch to begin", || {
        world.at("asked").exists().then_some(())
    });
    assert_eq!(world.checkouts(), 2, "a folder and its lock");
    waiting.signal("INT");
    waiting.end().exits(130);
    assert_eq!(world.checkouts(), 0, "nothing is left behind");
}

/// The password of `ci` at the server.
const TOKEN: &str = "t0ken-of-the-host";

/// What a command does with a repository that it may read, one that it may not, and a server that it may not write to.
const TRIES: &str = r#"
cd /tmp
git clone -q https://@HOST@/private/shop.git a && cat a/words
git clone -q --depth 1 git@@HOST@:private/shop b && cat b/words
git -C a -c user.name=t -c user.email=t@example.org commit -q --allow-empty -m mine
git -C a push -q origin HEAD:refs/heads/mine && echo PUSHED
git clone -q https://@HOST@/private/other.git c && echo READ
git -c url.x.insteadOf=none ls-remote http://git.kiln.internal/@HOST@/shop.git && echo READ
(timeout 5 bash -c "exec 3<>/dev/tcp/@HOST@/443" && echo REACHED) 2>/dev/null
grep -rls 't0ke[n]-of' /proc/[0-9]*/environ /proc/[0-9]*/cmdline /root /tmp /etc /run 2>/dev/null
grep -rls 'Y2k6dD[B]r' /root /tmp /etc /run 2>/dev/null
echo over
"#;

#[test]
fn a_run_reads_its_repositories_with_the_hosts_credential_and_nothing_else() {
    let Some(world) = World::new() else { return };
    for name in ["private/shop.git", "private/other.git", "shop.git"] {
        std::fs::create_dir_all(world.at(name)).expect("dir");
        world.git(name, &["init", "-q", "-b", "main"]);
        std::fs::write(world.at(name).join("words"), "the words\n").expect("write");
        world.git(name, &["add", "-A"]);
        world.git(name, &["commit", "-q", "-m", "one"]);
    }
    let grant = format!(
        "[tenant.local]\ngit = [{{ repository = \"{HOST}/private/*\", secret = \"IT_GIT\", user = \"ci\" }}]\n"
    );
    std::fs::write(world.at("config/policy.toml"), grant).expect("write");
    std::fs::write(world.at("token"), TOKEN).expect("write");
    let token = std::fs::File::open(world.at("token")).expect("file");
    let mut set = world.command(&["secret", "set", "IT_GIT", "--for", "git"]);
    set.stdin(token);
    said(set).exits(0);
    let shop = format!("{HOST}/private/shop");
    let run = |more: &[&str], script: &str| {
        let args = [
            &["run", "--no-source"][..],
            more,
            &["--", "bash", "-c", script],
        ]
        .concat();
        world.kiln(&args)
    };
    // It is the host's, not a machine's; and its owner has to say that a project may have it.
    run(&["--secret", "IT_GIT"], "true").exits(4);
    run(&["--git", &shop, "--secret", "IT_GIT"], "true").exits(2);
    run(&["--git", &format!("{HOST}/shop")], "true").exits(4);
    run(&["--git", &shop, "--allow", HOST], "true").exits(4);
    let policy = format!("version: 1\nnetwork: {{git: [{shop}]}}\n");
    std::fs::write(world.at("kiln.yaml"), policy).expect("write");
    let file = world.at("kiln.yaml");
    let refused = run(&["--policy", path(&file)], "true").exits(4);
    refused.says(&format!("--git {shop}"));
    let tries = TRIES.replace("@HOST@", HOST);
    let ran = run(&["--policy", path(&file), "--git", &shop], &tries).exits(0);
    assert_eq!(ran.out, "the words\nthe words\nover\n", "{ran:?}");
    let ran = ran.says("git_repository_not_allowed").says("403");
    assert!(!ran.err.contains(TOKEN), "{ran:?}");
    let logins = std::fs::read_to_string(world.at("logins")).expect("logins");
    assert!(
        logins.lines().count() >= 4 && logins.lines().all(|line| line.starts_with("Basic Y2k6")),
        "{logins}"
    );
    // Others run jobs in this home meanwhile; this secret is this test's.
    let read = ["secret", "access-log", "IT_GIT", "--json"];
    let read = world.kiln(&read).exits(0).out;
    let rows = read
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let given = rows.filter(|row| row["allowed"] == true);
    let job = given
        .filter_map(|row| Some(row["detail"]["job"].as_str()?.to_owned()))
        .next_back();
    let job = job.unwrap_or_else(|| panic!("{read}"));
    let egress = world.kiln(&["job", "egress", &job, "--json"]).exits(0).out;
    for word in [
        "git_push_refused",
        "git_repository_not_allowed",
        &format!("git {shop}"),
    ] {
        assert!(egress.contains(word), "{word}: {egress}");
    }
    assert!(
        !egress.contains(TOKEN) && !egress.contains("Y2k6dDBr"),
        "{egress}"
    );
    world.kiln(&["secret", "delete", "IT_GIT"]).exits(0);
}
