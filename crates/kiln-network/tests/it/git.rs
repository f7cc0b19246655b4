//! The git gateway between a real git and a real `git http-backend` behind TLS. Needs `git`; says so where there is none.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kiln_core::git_gateway::{GIT_HOST, GIT_PORT, GitRefused, steer};
use kiln_core::network::{EgressEvent, EgressVerdict, NetworkPolicy};
use kiln_core::secret::Repository;
use kiln_network::gateway::{Gateway, GatewayConfig, GitUpstreams};
use kiln_network::record::EgressLog;
use kiln_network::{Refusal, summary};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::world::{PUBLIC, World, events};

const HOST: &str = "git.example.org";
const OTHER: &str = "other.example.org";
const TOKEN: &str = "t0ken-that-nobody-sees";
/// base64 of `ci:` and the token.
const LOGIN: &str = "Basic Y2k6dDBrZW4tdGhhdC1ub2JvZHktc2Vlcw==";
/// Bounds a hang.
const HANG: std::time::Duration = std::time::Duration::from_secs(120);

/// What a server saw: host, target, and headers.
#[derive(Clone, Debug)]
struct Asked {
    target: String,
    headers: BTreeMap<String, String>,
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Asked>>>);

impl Seen {
    fn all(&self) -> Vec<Asked> {
        self.0.lock().expect("no panics inside").clone()
    }
}

struct Place {
    dir: tempfile::TempDir,
    world: World,
    seen: Seen,
    log: Arc<EgressLog>,
    gateway: Gateway,
    port: u16,
    servers: Vec<JoinHandle<()>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        for task in &self.servers {
            task.abort();
        }
    }
}

#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn git_is_here() -> bool {
    let here = std::process::Command::new("git")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !here {
        eprintln!("skipped: there is no git");
    }
    here
}

fn plain(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("HOME", "/nonexistent")
        .kill_on_drop(true)
        .stdin(Stdio::null());
    command
}

/// `git http-backend`, private below `/private`, with some ways of servers that a gateway must not pass on.
async fn answer(
    folder: Arc<Path>,
    seen: Seen,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let headers = head.headers.iter();
    let headers: BTreeMap<String, String> = headers
        .map(|(name, value)| (name.to_string(), value.to_str().expect("text").to_owned()))
        .collect();
    let target = head
        .uri
        .path_and_query()
        .expect("target")
        .as_str()
        .to_owned();
    let asked = Asked {
        target: target.clone(),
        headers: headers.clone(),
    };
    seen.0.lock().expect("no panics inside").push(asked);
    let body = body.collect().await.expect("body").to_bytes();
    let get = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let path = head.uri.path();
    let said = |status: u16, pairs: &[(&str, &str)], body: &str| {
        let mut answer = Response::builder().status(status);
        for (name, value) in pairs {
            answer = answer.header(*name, *value);
        }
        answer.body(Full::from(body.to_owned())).expect("answer")
    };
    if let Some(rest) = target.strip_prefix("/moved/") {
        let to = format!("https://{OTHER}/{rest}");
        return said(302, &[("location", &to)], "");
    }
    if let Some(rest) = target.strip_prefix("/short/") {
        return said(301, &[("location", &format!("/{rest}"))], "");
    }
    if path.starts_with("/echo") {
        let text = format!("you are {}", get("authorization"));
        let kind = [("content-type", "text/plain"), ("set-cookie", "a=b")];
        return said(200, &kind, &text);
    }
    if path.starts_with("/private") && get("authorization") != LOGIN {
        let ask = [("www-authenticate", "Basic realm=\"secret realm\"")];
        return said(401, &ask, &format!("no: {}", get("authorization")));
    }
    let mut backend = plain("git");
    backend
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", &*folder)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REMOTE_ADDR", "test")
        .env("REMOTE_USER", "test")
        .env("REQUEST_METHOD", head.method.as_str())
        .env("PATH_INFO", path)
        .env("QUERY_STRING", head.uri.query().unwrap_or_default())
        .env("CONTENT_TYPE", get("content-type"))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", get("content-encoding"))
        .env("GIT_PROTOCOL", get("git-protocol"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = backend.spawn().expect("git http-backend");
    let mut stdin = child.stdin.take().expect("pipe");
    let feed = async move {
        let _closed = stdin.write_all(&body).await;
    };
    let (_, output) = tokio::join!(feed, child.wait_with_output());
    let output = output.expect("output").stdout;
    let at = output
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .expect("a head");
    let (head, rest) = output.split_at(at + 4);
    let mut answer = Response::builder().header("set-cookie", "session=of-the-host");
    for line in std::str::from_utf8(head).expect("text").lines() {
        match line.split_once(": ") {
            Some(("Status", status)) => {
                answer = answer.status(status[..3].parse::<u16>().expect("status"));
            }
            Some((name, value)) => answer = answer.header(name, value),
            None => {}
        }
    }
    answer.body(Full::from(rest.to_vec())).expect("answer")
}

impl Place {
    /// Repositories `public.git` and `private/one.git`, `private/two.git`; the policy names some.
    async fn new(named: &[&str]) -> Option<Self> {
        if !git_is_here() {
            return None;
        }
        let dir = tempfile::tempdir().expect("folder");
        let (world, seen) = (World::default(), Seen::default());
        let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned(), OTHER.to_owned()]);
        let made = made.expect("certificate");
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let tls = rustls::ServerConfig::builder_with_provider(
            rustls::crypto::ring::default_provider().into(),
        )
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .expect("certificate");
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let folder: Arc<Path> = dir.path().join("served").into();
        world.name(HOST, &[&[PUBLIC]]);
        world.name(OTHER, &[&[PUBLIC]]);
        let served = seen.clone();
        let serve = move |stream: TcpStream| {
            let (acceptor, folder, seen) = (acceptor.clone(), folder.clone(), served.clone());
            async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let service = service_fn(move |request| {
                    let (folder, seen) = (folder.clone(), seen.clone());
                    async move { Ok::<_, Infallible>(answer(folder, seen, request).await) }
                });
                let http = hyper::server::conn::http1::Builder::new();
                let _ended = http.serve_connection(TokioIo::new(stream), service).await;
            }
        };
        let server = world.server(&format!("{PUBLIC}:443"), serve).await;
        let mut upstreams = GitUpstreams::new(Some(made.cert.pem().as_bytes())).expect("roots");
        for own in ["private/one", "echo", "moved/private/one"] {
            let repository = format!("{HOST}/{own}").parse().expect("repository");
            upstreams = upstreams
                .with(&repository, "ci", TOKEN.as_bytes())
                .expect("credential");
        }
        let log = Arc::new(EgressLog::new());
        let mut config = GatewayConfig::new(NetworkPolicy::Isolated, log.clone());
        config.git = Some(Arc::new(upstreams));
        let gateway = world.gateway(config);
        let repositories = named.iter().map(|text| text.parse().expect("repository"));
        gateway.enter_with_git("run", NetworkPolicy::Isolated, repositories.collect());
        // What the guest's own network does with the gateway's name.
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("address").port();
        let of_guest = gateway.clone();
        let guest = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let gateway = of_guest.clone();
                tokio::spawn(async move {
                    let admitted = gateway
                        .connect(GIT_HOST, GIT_PORT)
                        .await
                        .expect("the gateway");
                    admitted.relay(Box::new(stream)).await;
                });
            }
        });
        let place = Self {
            dir,
            world,
            seen,
            log,
            gateway,
            port,
            servers: vec![server, guest],
        };
        for name in ["public", "private/one", "private/two"] {
            let folder = place.path(&format!("served/{name}.git"));
            let _made = place
                .git(&["init", "-q", "-b", "main", &folder], true)
                .await;
            place.commit(name, "one").await;
        }
        Some(place)
    }

    fn path(&self, below: &str) -> String {
        let path = self.dir.path().join(below);
        path.to_str().expect("text").to_owned()
    }

    /// A commit in a served repository, which is no bare one.
    async fn commit(&self, name: &str, message: &str) {
        let folder = self.path(&format!("served/{name}.git"));
        let config = ["-c", "user.name=t", "-c", "user.email=t@example.org"];
        let file = self.path(&format!("served/{name}.git/{message}"));
        tokio::fs::write(file, message).await.expect("written");
        let add = ["-C", &folder, "add", "-A"];
        self.git(&add, true).await;
        let commit = [
            &["-C", &folder][..],
            &config,
            &["commit", "-q", "-m", message],
        ]
        .concat();
        self.git(&commit, true).await;
    }

    /// The machine's git, led to the gateway as a command's environment leads it; what it printed.
    async fn git(&self, args: &[&str], passes: bool) -> String {
        self.git_with(args, passes, &[]).await
    }

    async fn git_with(&self, args: &[&str], passes: bool, more: &[(&str, &str)]) -> String {
        let repositories: Vec<Repository> = [HOST, OTHER]
            .map(|host| format!("{host}/x").parse().expect("repository"))
            .to_vec();
        let mut env: BTreeMap<String, String> = more
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        steer(&mut env, &repositories);
        let mut git = plain("git");
        git.args(args).current_dir(self.dir.path());
        for (name, value) in env {
            // The guest's resolver is not here.
            git.env(
                name,
                value.replace(GIT_HOST, &format!("127.0.0.1:{}", self.port)),
            );
        }
        let output = timeout(HANG, git.output())
            .await
            .expect("no hang")
            .expect("git");
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert_eq!(output.status.success(), passes, "{args:?}: {said}");
        assert!(!said.contains(TOKEN) && !said.contains("Y2k6"), "{said}");
        said
    }

    /// A request of the guest's own making; everything that comes back.
    async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))
            .await
            .expect("connected");
        let request = request.replace('\n', "\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut all = Vec::new();
        timeout(HANG, stream.read_to_end(&mut all))
            .await
            .expect("no hang")
            .expect("read");
        let all = String::from_utf8_lossy(&all).into_owned();
        assert!(!all.contains(TOKEN) && !all.contains("Y2k6"), "{all}");
        all
    }

    async fn refs(&self, path: &str, headers: &str) -> String {
        self.raw(&format!(
            "GET /{HOST}/{path}/info/refs?service=git-upload-pack HTTP/1.1\nHost: {GIT_HOST}\n{headers}Connection: close\n\n"
        ))
        .await
    }

    fn events(&self) -> Vec<EgressEvent> {
        events(&self.log)
    }

    fn refusals(&self) -> Vec<GitRefused> {
        let why = |event: EgressEvent| match event.verdict {
            EgressVerdict::GitRefused { why, .. } => Some(why),
            _ => None,
        };
        self.events().into_iter().filter_map(why).collect()
    }
}

fn of(name: &str) -> String {
    format!("{HOST}/{name}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_repository_is_cloned_and_fetched_with_the_hosts_credential() {
    let Some(place) = Place::new(&[&of("private/one"), &of("public")]).await else {
        return;
    };
    for (form, into) in [
        (format!("https://{HOST}/private/one.git"), "a"),
        (format!("git@{HOST}:private/one"), "b"),
        (format!("ssh://git@{HOST}/private/one.git"), "c"),
        (format!("https://{HOST}/public"), "d"),
    ] {
        place.git(&["clone", "-q", &form, into], true).await;
        assert!(Path::new(&place.path(&format!("{into}/one"))).is_file());
    }
    place.commit("private/one", "two").await;
    place.git(&["-C", "a", "pull", "-q"], true).await;
    assert!(Path::new(&place.path("a/two")).is_file());
    let url = format!("https://{HOST}/private/one");
    place
        .git(&["clone", "-q", "--depth", "1", &url, "shallow"], true)
        .await;
    assert!(Path::new(&place.path("shallow/.git/shallow")).is_file());
    // The oldest protocol, and a request that git compresses.
    place
        .git(
            &["-c", "protocol.version=0", "clone", "-q", &url, "old"],
            true,
        )
        .await;
    let asked = place.seen.all();
    assert!(
        asked
            .iter()
            .all(|one| match one.target.starts_with("/private") {
                true => one.headers["authorization"] == LOGIN,
                false => !one.headers.contains_key("authorization"),
            })
    );
    assert!(asked.iter().any(|one| {
        one.headers
            .get("git-protocol")
            .is_some_and(|v| v == "version=2")
    }));
    let events = place.events();
    assert!(
        events.iter().all(|one| {
            (
                one.verdict == EgressVerdict::Allowed,
                one.host.as_str(),
                one.port,
            ) == (true, HOST, 443)
                && one.address.is_some()
                && one.phase.as_deref() == Some("run")
        }),
        "{events:?}"
    );
    let rules: Vec<_> = events
        .iter()
        .filter_map(|one| one.rule.as_deref())
        .collect();
    assert!(
        rules.contains(&"git git.example.org/private/one")
            && rules.contains(&"git git.example.org/public")
    );
    assert!(
        events
            .iter()
            .any(|one| one.bytes_in > 100 && one.bytes_out > 50),
        "{events:?}"
    );
    // What was reached through the gateway is nothing that an allowlist names.
    assert!(kiln_network::flows::learned(&events).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_pushed_and_no_other_repository_read() {
    let Some(place) = Place::new(&[&of("private/one")]).await else {
        return;
    };
    let url = format!("https://{HOST}/private/one.git");
    place.git(&["clone", "-q", &url, "a"], true).await;
    let config = [
        "-C",
        "a",
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.org",
    ];
    let commit = [
        &config[..],
        &["commit", "-q", "--allow-empty", "-m", "mine"],
    ]
    .concat();
    place.git(&commit, true).await;
    let asked = place.seen.all().len();
    let said = place
        .git(
            &["-C", "a", "push", "-q", "origin", "HEAD:refs/heads/mine"],
            false,
        )
        .await;
    assert!(said.contains("403"), "{said}");
    let other = format!("https://{HOST}/private/two.git");
    let said = place.git(&["clone", "-q", &other, "b"], false).await;
    assert!(said.contains("git_repository_not_allowed"), "{said}");
    let said = place
        .git(
            &["clone", "-q", &format!("https://{OTHER}/public"), "b"],
            false,
        )
        .await;
    assert!(said.contains("git_repository_not_allowed"), "{said}");
    for (request, code) in [
        (
            format!("POST /{HOST}/private/one/git-receive-pack"),
            "git_push_refused",
        ),
        (
            format!("GET /{HOST}/private/one/info/refs"),
            "git_protocol_refused",
        ),
        (
            format!("GET /{HOST}/private/one/HEAD"),
            "git_protocol_refused",
        ),
        (
            format!("GET /{HOST}/private/one/../two/info/refs?service=git-upload-pack"),
            "git_request_refused",
        ),
        (
            format!("GET /{HOST}/private%2fone/info/refs?service=git-upload-pack"),
            "git_request_refused",
        ),
        (
            format!("GET http://{GIT_HOST}/{HOST}/private/one/info/refs?service=git-upload-pack"),
            "git_request_refused",
        ),
        (
            format!("POST /{HOST}/private/one/git-upload-pack"),
            "git_request_refused",
        ),
    ] {
        let request = format!(
            "{request} HTTP/1.1\nHost: {GIT_HOST}\nContent-Length: 0\nConnection: close\n\n"
        );
        let said = place.raw(&request).await;
        assert!(
            said.starts_with("HTTP/1.1 403") && said.contains(code),
            "{request}: {said}"
        );
    }
    assert_eq!(place.seen.all().len(), asked, "no server was asked");
    let refusals = place.refusals();
    for why in [
        GitRefused::Push,
        GitRefused::Repository,
        GitRefused::Protocol,
        GitRefused::Request,
    ] {
        assert!(refusals.contains(&why), "{why:?}: {refusals:?}");
    }
    let told = summary(&place.events());
    let codes: Vec<&str> = told.refused.iter().map(|one| one.code.as_str()).collect();
    assert!(codes.contains(&"git_repository_not_allowed"), "{codes:?}");
    assert!(
        told.refused
            .iter()
            .any(|one| one.reason.contains("private/two")),
        "{told:?}"
    );
    assert_eq!(told.counts.git, refusals.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_login_of_the_guest_goes_out_and_none_of_the_host_comes_in() {
    let Some(place) = Place::new(&[
        &of("private/one"),
        &of("private/two"),
        &of("echo"),
        &of("public"),
    ])
    .await
    else {
        return;
    };
    let mine = "Authorization: Basic bWluZTptaW5l\nCookie: mine=1\nProxy-Authorization: Basic bWluZQ==\nX-Mine: mine\nReferer: mine\n";
    let said = place.refs("public", mine).await;
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    assert!(!said.to_ascii_lowercase().contains("set-cookie"), "{said}");
    let said = place.refs("private/one", mine).await;
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    // No credential for this one: what the server asks for is not the guest's to answer.
    let said = place.refs("private/two", mine).await;
    assert!(
        said.contains("403") && said.contains("git_credential_refused"),
        "{said}"
    );
    assert!(
        !said.contains("realm") && !said.to_ascii_lowercase().contains("www-authenticate"),
        "{said}"
    );
    let said = place.refs("echo", mine).await;
    assert!(
        said.contains("403") && said.contains("git_protocol_refused"),
        "{said}"
    );
    assert!(!said.contains("you are"), "{said}");
    let asked = place.seen.all();
    assert_eq!(asked.len(), 4);
    for one in &asked {
        assert!(
            !format!("{one:?}").to_ascii_lowercase().contains("mine"),
            "{one:?}"
        );
        let login = one.headers.get("authorization").map(String::as_str);
        let own = ["/private/one", "/echo"]
            .iter()
            .any(|path| one.target.starts_with(path));
        assert_eq!(login, own.then_some(LOGIN), "{one:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_takes_no_credential_along() {
    let named = [
        of("moved/private/one"),
        of("moved/public"),
        of("short/private/one"),
        of("private/one"),
    ];
    let mut named: Vec<&str> = named.iter().map(String::as_str).collect();
    let to = format!("{OTHER}/public");
    named.push(&to);
    let Some(place) = Place::new(&named).await else {
        return;
    };
    // Elsewhere, and nothing that the policy names.
    let said = place.refs("moved/private/one", "").await;
    assert!(
        said.contains("403") && said.contains("git_redirect_refused"),
        "{said}"
    );
    assert!(!said.contains("location"), "{said}");
    assert_eq!(place.seen.all().len(), 1, "nobody followed");
    // To what the policy names: the guest's to ask, and decided again.
    let said = place.refs("moved/public", "").await;
    let here =
        format!("location: http://{GIT_HOST}/{OTHER}/public/info/refs?service=git-upload-pack");
    assert!(
        said.starts_with("HTTP/1.1 302") && said.contains(&here),
        "{said}"
    );
    let said = place.refs("short/private/one", "").await;
    assert!(
        said.contains(&format!(
            "location: http://{GIT_HOST}/{HOST}/private/one/info"
        )),
        "{said}"
    );
    let asked = place.seen.all();
    assert_eq!(asked.len(), 3);
    assert!(!asked[1].headers.contains_key("authorization"));
    assert!(
        !asked[2].headers.contains_key("authorization"),
        "it is for another repository"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_phase_has_its_own_repositories_and_the_floor_holds() {
    let Some(place) = Place::new(&[&of("public")]).await else {
        return;
    };
    assert!(place.gateway.knows(GIT_HOST));
    assert!(matches!(
        place.gateway.connect(HOST, 443).await,
        Err(Refusal::Host { .. })
    ));
    assert!(matches!(
        place.gateway.connect(GIT_HOST, 443).await,
        Err(Refusal::Port { .. })
    ));
    place.gateway.enter("services", NetworkPolicy::Isolated);
    let said = place.refs("public", "").await;
    assert!(said.contains("git_repository_not_allowed"), "{said}");
    let both: [Repository; 2] =
        [of("public"), of("private/one")].map(|text| text.parse().expect("repository"));
    place
        .gateway
        .enter_with_git("run", NetworkPolicy::Isolated, [both[0].clone()].into());
    place.gateway.only_narrow();
    place
        .gateway
        .enter_with_git("run", NetworkPolicy::Isolated, both.into());
    assert!(place.refs("public", "").await.starts_with("HTTP/1.1 200"));
    assert!(
        place
            .refs("private/one", "")
            .await
            .contains("git_repository_not_allowed")
    );
    place.gateway.narrow(&NetworkPolicy::Isolated);
    assert!(
        place
            .refs("public", "")
            .await
            .contains("git_repository_not_allowed")
    );
    // An address below the floor is refused as on any connection.
    let Some(inside) = Place::new(&["inside.example.org/a"]).await else {
        return;
    };
    inside.world.name("inside.example.org", &[&["10.0.0.1"]]);
    let said = inside
        .raw(&format!("GET /inside.example.org/a/info/refs?service=git-upload-pack HTTP/1.1\nHost: {GIT_HOST}\nConnection: close\n\n"))
        .await;
    assert!(
        said.starts_with("HTTP/1.1 403") && said.contains("special-purpose"),
        "{said}"
    );
    assert!(inside.world.dialled().is_empty());
    let last = inside.events().pop().expect("an event");
    assert!(
        matches!(last.verdict, EgressVerdict::AddressRefused { .. }),
        "{last:?}"
    );
    assert_eq!(last.address, Some("10.0.0.1".parse().expect("address")));
}
