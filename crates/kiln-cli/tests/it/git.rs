//! Git sources, from a real git server on a private address of a network namespace: loopback can never be excepted.
//! Needs root, `unshare`, `nsenter`, `ip`, `git`, `openssl` and `python3`; says so where one is missing.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::annex::Annex;
use crate::support::{Kiln, Said, Started, free_port, kiln, path, said, until};

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
        login, private = self.headers.get("Authorization", ""), path.startswith("/private/")
        if login or private:
            with open(folder + "/logins", "a") as log: log.write(login + "\n")
        if private:
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
#[expect(
    clippy::disallowed_methods,
    reason = "whoever starts the tests talks to them this way"
)]
fn tools_are_here() -> bool {
    let ready = Command::new("sh")
        .args(["-c", "for t in unshare nsenter ip git openssl python3; do command -v $t || exit 1; done; unshare -n -m true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !ready {
        assert!(
            std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_none(),
            "KILN_TEST_REQUIRE_TOOLS asks for root, unshare, nsenter, ip, git, openssl and python3"
        );
        eprintln!("skipped: needs root and unshare, nsenter, ip, git, openssl, python3");
    }
    ready
}

impl World {
    fn new() -> Option<Self> {
        Self::around(kiln()?)
    }

    /// With the commands of this home.
    fn around(kiln: Kiln) -> Option<Self> {
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

    /// Two that want a login, and one that anybody reads.
    fn repositories(&self) {
        for name in [
            "private/shop.git",
            "private/other.git",
            "public/words.git",
            "shop.git",
        ] {
            std::fs::create_dir_all(self.at(name)).expect("dir");
            self.git(name, &["init", "-q", "-b", "main"]);
            std::fs::write(self.at(name).join("words"), "the words\n").expect("write");
            let open = "version: 1\nphases:\n  dependencies:\n    network: {mode: open}\n";
            std::fs::write(self.at(name).join("kiln.yaml"), open).expect("write");
            self.git(name, &["add", "-A"]);
            self.git(name, &["commit", "-q", "-m", "one"]);
        }
        std::fs::write(self.at("token"), TOKEN).expect("write");
    }

    /// Beside the branch that is trusted, one with a policy that nobody could follow.
    fn feature(&self) {
        self.git("shop.git", &["checkout", "-q", "-b", "feature"]);
        std::fs::write(self.at("shop.git/kiln.yaml"), "version: 1\nwrong: x\n").expect("write");
        let dockerfile = "FROM scratch\nCOPY words /words\n";
        std::fs::write(self.at("shop.git/Dockerfile"), dockerfile).expect("write");
        self.git("shop.git", &["add", "-A"]);
        self.git("shop.git", &["commit", "-q", "-m", "two"]);
        self.git("shop.git", &["checkout", "-q", "main"]);
    }

    /// A tenant may read two of them, one with the host's login; no other tenant reads any.
    fn grants(&self, tenant: &str) {
        let grant = format!(
            "[tenant.{tenant}]\ntrusted_uploads = true\ntrusted_refs = ['{HOST}/shop@refs/heads/main', '{HOST}/shop@refs/heads/gone']\ngit = [{{ repository = \"{HOST}/private/*\", secret = \"IT_GIT\", user = \"ci\" }}, \"{HOST}/public/*\"]\n\
             [tenant.\"*\"]\ngit = []\n"
        );
        std::fs::write(self.at("config/policy.toml"), grant).expect("write");
    }

    /// What a run of [`TRIES`] said; and every login that the server was shown is the host's own, no machine's.
    #[track_caller]
    fn only_what_was_granted(&self, ran: &Said) {
        // Through a server git's own words are in the same log.
        let gits = |line: &&str| line.starts_with("remote: ") || line.starts_with("fatal: ");
        let lines: Vec<_> = ran.out.lines().filter(|line| !gits(line)).collect();
        assert_eq!(
            lines,
            [&["the words"; 4][..], &["over"]].concat(),
            "{ran:?}"
        );
        let all = format!("{}{}", ran.out, ran.err);
        for word in ["git_repository_not_allowed", "git_push_refused", "403"] {
            assert!(all.contains(word), "{word}: {all}");
        }
        assert!(!all.contains(TOKEN), "{all}");
        let logins = std::fs::read_to_string(self.at("logins")).expect("logins");
        assert!(
            logins.lines().count() >= 4
                && logins.lines().all(|line| line.starts_with("Basic Y2k6")),
            "{logins}"
        );
    }

    /// The newest job that was given this secret has every decision in its record, and never the credential.
    #[track_caller]
    fn every_decision_is_told(&self, secret: &[&str]) {
        let read = [&["secret", "access-log", "--json"], secret].concat();
        let read = self.kiln(&read).exits(0).out;
        let rows = read
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        let given = rows.filter(|row| row["allowed"] == true);
        let job = given
            .filter_map(|row| Some(row["detail"]["job"].as_str()?.to_owned()))
            .next_back();
        let job = job.unwrap_or_else(|| panic!("{read}"));
        let egress = self.kiln(&["job", "egress", &job, "--json"]).exits(0).out;
        let rule = format!("git {HOST}/private/shop");
        for word in ["git_push_refused", "git_repository_not_allowed", &rule] {
            assert!(egress.contains(word), "{word}: {egress}");
        }
        assert!(
            !egress.contains(TOKEN) && !egress.contains("Y2k6dDBr"),
            "{egress}"
        );
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
    // The commit says what its build reaches.
    let policy = "version: 1\nphases:\n  dependencies:\n    network: {mode: isolated}\n";
    file("kiln.yaml", policy);
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
        .says(&format!("is commit {second}"))
        .says(&format!("policy: kiln.yaml of commit {second}"));
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

    // What it may not have is refused before its machine starts.
    file(
        "kiln.yaml",
        "version: 1\nphases:\n  dependencies:\n    network: {mode: open}\n",
    );
    world.git("shop.git", &["commit", "-q", "-a", "-m", "three"]);
    let refused = world.kiln(&["build", &url]).exits(4);
    refused.says("kiln.yaml:4").says("not grant");
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
git -c http.extraHeader='Authorization: Basic bXk6b3du' clone -q https://@HOST@/private/shop d && cat d/words
git -c http.extraHeader='Authorization: Basic bXk6b3du' clone -q https://@HOST@/public/words e && cat e/words
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
    world.repositories();
    world.grants("local");
    let token = std::fs::File::open(world.at("token")).expect("file");
    let mut set = world.command(&["secret", "set", "IT_GIT", "--for", "git"]);
    set.stdin(token);
    said(set).exits(0);
    let (shop, public) = (
        format!("{HOST}/private/shop"),
        format!("{HOST}/public/words"),
    );
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
    let policy = format!("version: 1\nnetwork: {{git: [{shop}, {public}]}}\n");
    std::fs::write(world.at("kiln.yaml"), policy).expect("write");
    let file = world.at("kiln.yaml");
    let refused = run(&["--policy", path(&file)], "true").exits(4);
    refused.says(&format!("--git {shop}"));
    let tries = TRIES.replace("@HOST@", HOST);
    let ran = run(&["--policy", path(&file), "--git", &shop], &tries).exits(0);
    world.only_what_was_granted(&ran);
    // Others run jobs in this home meanwhile; this secret is this test's.
    world.every_decision_is_told(&["IT_GIT"]);
    world.kiln(&["secret", "delete", "IT_GIT"]).exits(0);
}

#[test]
fn a_server_reads_a_tenants_repositories_with_its_credential() {
    let Some(annex) = Annex::open() else { return };
    let Some(world) = World::around(Kiln::clone(&annex)) else {
        return;
    };
    world.repositories();
    world.grants("acme");
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let serve = ["serve", "--with-worker", "--listen", &listen];
    let server = Started::of(world.command(&serve));
    until("a worker", || {
        let listed = world.kiln(&["worker", "list", "--json"]);
        (listed.code == 0 && listed.out.contains("\"active\"")).then_some(())
    });
    world.kiln(&["tenant", "create", "acme"]).exits(0);
    let owner = ["--tenant", "acme"];
    let set = ["secret", "set", "IT_GIT", "--for", "git"];
    let mut set = world.command(&[&set[..], &owner].concat());
    set.stdin(std::fs::File::open(world.at("token")).expect("file"));
    said(set).exits(0);
    let token = |more: &[&str]| {
        let create = ["token", "create", "--role", "developer"];
        let made = world.kiln(&[&create[..], &owner, more].concat());
        made.exits(0).out
    };
    let (strangers, token) = (token(&[]), token(&["--trusted"]));
    let (url, ca) = (
        format!("https://127.0.0.1:{port}"),
        annex.home.join("controller/authority.pem"),
    );
    let (shop, public) = (
        format!("{HOST}/private/shop"),
        format!("{HOST}/public/words"),
    );
    let run = |token: Option<&str>, more: &[&str], script: &str| {
        let at = match token {
            Some(_) => vec!["--server", &url, "--ca", path(&ca)],
            None => vec![],
        };
        let args = ["run", "--no-source"];
        let args = [&at[..], &args, more, &["--", "bash", "-c", script]].concat();
        let mut command = world.command(&args);
        command.envs(token.map(|token| ("KILN_TOKEN", token.trim())));
        said(command)
    };
    let acme = |more: &[&str], script: &str| run(Some(&token), more, script);
    // What is not granted is refused when it is asked for, with the reason; and a grant is one tenant's.
    let refused = acme(&["--git", &format!("{HOST}/shop")], "true").exits(4);
    refused.says(&format!("{HOST}/shop")).says("policy.toml");
    run(None, &["--git", &shop], "true").exits(4).says(&shop);
    acme(&["--secret", "IT_GIT"], "true").exits(4);
    // A job that anybody may have written has no credential, and the host shows none for it.
    let untrusted = run(Some(&strangers), &["--git", &shop], "true").exits(4);
    untrusted.says("untrusted jobs get no stored secrets");
    let tries = TRIES.replace("@HOST@", HOST);
    let ran = acme(&["--git", &shop, "--git", &public], &tries).exits(0);
    world.only_what_was_granted(&ran);
    world.every_decision_is_told(&["IT_GIT", "--tenant", "acme"]);
    // A build of a commit is held to the policy in it, as without a server.
    let build = |fragment: &str| {
        let source = format!("https://{HOST}/shop.git{fragment}");
        let build = ["--server", &url, "--ca", path(&ca), "build", &source];
        let mut build = world.command(&[&build[..], &["--disk", "1G"]].concat());
        build.env("KILN_TOKEN", token.trim());
        said(build)
    };
    // A trusted ref is fetched by its full name, and what only ends with that name is not it.
    world.git("shop.git", &["tag", "refs/heads/gone"]);
    let main = build("#main").exits(4);
    let main = main
        .says("at refs/heads/main is commit")
        .says("kiln.yaml:4");
    assert!(!main.err.contains("untrusted"), "{main:?}");
    let gone = build("#gone").exits(2);
    gone.says("no ref that is called exactly refs/heads/gone");
    // What anybody may have written has the policy of the trusted ref: its own, which is wrong, is not read.
    world.feature();
    let open = build("#feature").exits(4).says("kiln.yaml:4");
    let open = open.says("this is the policy of refs/heads/main (commit ");
    open.says(&format!("does not name {HOST}/shop@refs/heads/feature"));
    world.git("shop.git", &["rm", "-q", "kiln.yaml"]);
    world.git("shop.git", &["commit", "-q", "-m", "no policy"]);
    // Where that ref has none, the commit's own takes away.
    build("#feature")
        .exits(2)
        .says("the policy in the commit is wrong");
    std::fs::write(world.at("shop.git/kiln.yaml"), "version: 1\n").expect("write");
    world.git("shop.git", &["add", "-A"]);
    world.git("shop.git", &["commit", "-q", "-m", "a policy"]);
    let built = build("#feature").exits(0);
    built.says("policy: kiln.yaml of refs/heads/main (commit ");
    server.signal("INT");
    server.end().exits(0);
    annex.is_clear();
}
