//! `kiln registry` in a home of its own, with nothing in it but what a client pushed: no machine is needed.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_core::Digest;
use serde_json::{Value, json};

use crate::support::{Said, WAIT, said};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &[u8] = b"not even a tar";

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("temp dir"))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command
            .args(args)
            .env("KILN_HOME", self.0.path().join("kiln"))
            .env("HOME", self.0.path())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        for name in [
            "DOCKER_CONFIG",
            "REGISTRY_AUTH_FILE",
            "XDG_RUNTIME_DIR",
            "XDG_CONFIG_HOME",
        ] {
            command.env_remove(name);
        }
        command
    }

    fn run(&self, args: &[&str]) -> Said {
        said(self.command(args))
    }

    fn registry(&self) -> std::path::PathBuf {
        let below = ["kiln/registry", "kiln/data/registry"].map(|path| self.0.path().join(path));
        let found = below.into_iter().find(|path| path.is_dir());
        found.expect("a registry")
    }

    fn serve(&self, more: &[&str]) -> Served {
        let args = ["registry", "serve", "--json", "--listen", "127.0.0.1:0"];
        let mut child = self
            .command(&[&args[..], more].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("kiln starts");
        let mut out = std::io::BufReader::new(child.stdout.take().expect("pipe"));
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).expect("a line");
        let value: Value = serde_json::from_str(&line).expect("JSON");
        let address = value["address"].as_str().expect("an address");
        let address = address.parse().expect("legal");
        Served { child, address }
    }

    /// `user:password` in base64, as login wrote it for docker.
    fn token(&self, address: &SocketAddr) -> String {
        let text = std::fs::read(self.0.path().join(".docker/config.json")).expect("logged in");
        let value: Value = serde_json::from_slice(&text).expect("JSON");
        let auth = value["auths"][address.to_string()]["auth"].as_str();
        auth.expect("a token").to_owned()
    }
}

struct Served {
    child: Child,
    address: SocketAddr,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Served {
    /// One request; gives status and body.
    fn ask(&self, head: &str, auth: Option<&str>, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).expect("it listens");
        let auth = auth.map(|auth| format!("authorization: Basic {auth}\r\n"));
        let head = format!(
            "{head} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: {MANIFEST}\r\ncontent-length: {}\r\n{}\r\n",
            self.address,
            body.len(),
            auth.unwrap_or_default()
        );
        stream.write_all(head.as_bytes()).expect("sent");
        stream.write_all(body).expect("sent");
        let mut text = Vec::new();
        stream.read_to_end(&mut text).expect("an answer");
        let text = String::from_utf8_lossy(&text).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    fn push(&self, name: &str, auth: &str) -> Digest {
        let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers"}}"#;
        for bytes in [LAYER, config] {
            let path = format!(
                "POST /v2/{name}/blobs/uploads/?digest={}",
                Digest::of(bytes)
            );
            assert_eq!(self.ask(&path, Some(auth), bytes).0, 201);
        }
        let part = |media_type: &str, bytes: &[u8]| json!({"mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len()});
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": part("application/vnd.oci.image.config.v1+json", config),
            "layers": [part("application/vnd.oci.image.layer.v1.tar", LAYER)],
        });
        let bytes = manifest.to_string().into_bytes();
        for tag in ["v1", "v2"] {
            let path = format!("PUT /v2/{name}/manifests/{tag}");
            assert_eq!(self.ask(&path, Some(auth), &bytes).0, 201);
        }
        Digest::of(&bytes)
    }
}

fn lines(said: &Said) -> Vec<Value> {
    let read = |line| serde_json::from_str(line).expect("JSON");
    said.out.lines().map(read).collect()
}

#[test]
fn what_is_pushed_is_listed_removed_and_collected() {
    let home = Home::new();
    assert_eq!(home.run(&["registry", "list", "--json"]).exits(0).out, "");
    let served = home.serve(&[]);
    let address = served.address.to_string();
    assert_eq!(served.ask("GET /v2/", None, b"").0, 401);
    home.run(&["registry", "login", "--address", &address])
        .exits(0);
    let token = home.token(&served.address);
    assert_eq!(served.ask("GET /v2/", Some(&token), b"").0, 200);
    let digest = served.push("t/local/app", &token);
    // While it is served, other kiln processes use it through the private socket.
    let listed = home.run(&["registry", "list", "--json"]).exits(0);
    let listed = lines(&listed);
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0]["repository"], "t/local/app");
    assert_eq!(listed[0]["digest"], digest.to_string());
    let table = home.run(&["registry", "list"]).exits(0).out;
    assert!(
        table.starts_with("REPOSITORY") && table.contains(&digest.short(12)),
        "{table}"
    );
    let removed = home.run(&["registry", "rm", "app:v1", "--json"]).exits(0);
    assert_eq!(lines(&removed)[0]["image"], false, "one tag is left");
    home.run(&["registry", "rm", "app:v1"])
        .exits(2)
        .says("kiln registry list");
    let kept = home
        .run(&["registry", "gc", "--grace", "0s", "--json"])
        .exits(0);
    assert_eq!(lines(&kept)[0]["contents"], 0);
    let removed = home.run(&["registry", "rm", "app:v2", "--json"]).exits(0);
    assert_eq!(lines(&removed)[0]["image"], true);
    let collected = home
        .run(&["registry", "gc", "--grace", "0s", "--json"])
        .exits(0);
    assert_eq!(lines(&collected)[0]["contents"], 3);
    let out = home.run(&["registry", "logout"]).exits(0).out;
    assert!(out.contains("config.json"), "{out}");
    let config = std::fs::read_to_string(home.0.path().join(".docker/config.json"));
    assert!(!config.unwrap_or_default().contains(&token));
}

#[test]
fn anybody_may_pull_where_it_is_allowed_and_nobody_push() {
    let home = Home::new();
    let served = home.serve(&["--anonymous-pull"]);
    let address = served.address.to_string();
    home.run(&["registry", "login", "--address", &address])
        .exits(0);
    let token = home.token(&served.address);
    let digest = served.push("t/local/app", &token);
    let (status, body) = served.ask("GET /v2/t/local/app/manifests/v1", None, b"");
    assert_eq!((status, Digest::of(body.as_bytes())), (200, digest));
    assert_eq!(
        served
            .ask("POST /v2/t/local/app/blobs/uploads/", None, b"")
            .0,
        401
    );
}

#[test]
fn damage_is_named_and_mended_by_a_push() {
    let home = Home::new();
    let served = home.serve(&[]);
    let address = served.address.to_string();
    home.run(&["registry", "login", "--address", &address])
        .exits(0);
    let token = home.token(&served.address);
    let manifest = served.push("t/local/app", &token);
    let layer = Digest::of(LAYER);
    let hex = layer.hex();
    let file = home
        .registry()
        .join("blobs/sha256")
        .join(&hex[..2])
        .join(hex);
    rot(&file);
    let scrub = home.run(&["doctor", "--scrub", "--json"]).exits(3).out;
    let about = |text: &str| {
        let mut found = scrub.lines().filter(|line| line.contains("scrub-registry"));
        found.any(|line| line.contains(text))
    };
    assert!(about(&format!("{layer} is corrupt")), "{scrub}");
    assert!(
        about(&format!("t/local/app@{manifest} lacks content")),
        "{scrub}"
    );
    let blob = format!("GET /v2/t/local/app/blobs/{layer}");
    assert_eq!(
        served.ask(&blob, Some(&token), b"").0,
        404,
        "never served as good"
    );
    served.push("t/local/app", &token);
    assert_eq!(served.ask(&blob, Some(&token), b"").0, 200);
    let scrub = home.run(&["doctor", "--scrub"]).out;
    assert!(scrub.contains("registry blobs"), "{scrub}");
    // A manifest: the list goes on without it.
    let hex = manifest.hex();
    rot(&home
        .registry()
        .join("blobs/sha256")
        .join(&hex[..2])
        .join(hex));
    home.run(&["registry", "list"]).exits(0).says("is damaged");
}

/// Changes a file as bit rot would; its times tell.
fn rot(file: &Path) {
    let stamp = || {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(file)
            .map(|meta| (meta.ctime(), meta.ctime_nsec()))
            .expect("there")
    };
    let mut bytes = std::fs::read(file).expect("there");
    bytes[0] ^= 1;
    let (before, deadline) = (stamp(), Instant::now() + WAIT);
    while stamp() == before {
        assert!(Instant::now() < deadline);
        std::fs::write(file, &bytes).expect("written");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_verb_has_help_with_an_example() {
    let home = Home::new();
    for verb in ["serve", "login", "list", "rm", "gc"] {
        let help = home.run(&["registry", verb, "--help"]).exits(0).out;
        assert!(
            help.contains(&format!("Examples:\n  kiln registry {verb}")),
            "{help}"
        );
    }
}
