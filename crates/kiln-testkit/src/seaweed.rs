//! A real S3 server (SeaweedFS) for the length of a test run: in a temporary folder, on loopback, with one bucket `kiln`. A shell stands
//! between, which ends the server as soon as this process is gone, however it goes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Time until the server answers.
const START: Duration = Duration::from_secs(90);

/// A server; `key` and `secret` are its key.
#[derive(Debug)]
pub struct Seaweed {
    port: u16,
    folders: AtomicU32,
    shell: Child,
}

static SERVER: OnceLock<Option<Seaweed>> = OnceLock::new();

/// Starts the server, or gives the one that runs. None, and a word about it, when the program is not there and not required.
///
/// # Panics
/// When it does not start, or is required and not there.
pub fn server() -> Option<&'static Seaweed> {
    SERVER
        .get_or_init(|| program().map(|weed| start(&weed)))
        .as_ref()
}

impl Seaweed {
    /// A folder of the bucket that nobody else uses, as `s3://…`.
    #[must_use]
    pub fn url(&self) -> String {
        let folder = self.folders.fetch_add(1, Ordering::Relaxed);
        format!(
            "s3://kiln/{}-{folder}?endpoint=http://127.0.0.1:{}",
            std::process::id(),
            self.port
        )
    }
}

impl Drop for Seaweed {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ended = self.shell.wait();
    }
}

#[expect(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "the tests' own switches are read from the environment"
)]
fn program() -> Option<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/seaweedfs/bin/weed");
    let weed = std::env::var_os("KILN_TEST_WEED").map_or(ours, PathBuf::from);
    if weed.is_file() {
        return Some(weed);
    }
    assert!(
        std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_none(),
        "{} is required and not there",
        weed.display()
    );
    eprintln!(
        "SKIPPED: {} is not there (cargo xtask test makes it)",
        weed.display()
    );
    None
}

/// A port that is free, and its gRPC sister 10,000 above as well.
fn port() -> u16 {
    for _ in 0..200 {
        let bound = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
        let port = bound.expect("a port").port();
        let pair = if port > 45_000 { port - 20_000 } else { port };
        let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free(pair) && free(pair + 10_000) {
            return pair;
        }
    }
    panic!("no pair of free ports")
}

fn start(weed: &Path) -> Seaweed {
    let folder = tempfile::Builder::new().prefix("kiln-s3-").tempdir();
    let folder = folder.expect("temporary folder").keep();
    let config = r#"{"identities":[{"name":"kiln","credentials":[{"accessKey":"key","secretKey":"secret"}],
        "actions":["Admin","Read","Write","List","Tagging"]}]}"#;
    std::fs::write(folder.join("s3.json"), config).expect("writes");
    let (master, volume, filer, s3) = (port(), port(), port(), port());
    let mut shell = Command::new("/bin/sh")
        .arg("-c")
        .arg(SCRIPT)
        .arg("sh")
        .arg(weed)
        .args([master, volume, filer, s3].map(|port| port.to_string()))
        .current_dir(&folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("a shell starts");
    let mut words = BufReader::new(shell.stdout.take().expect("piped"));
    let mut line = String::new();
    words.read_line(&mut line).expect("the shell speaks");
    make_bucket(weed, master);
    let deadline = Instant::now() + START;
    // Its door to S3 opens last.
    while TcpStream::connect(("127.0.0.1", s3)).is_err() {
        assert!(Instant::now() < deadline, "the S3 door stays closed");
        std::thread::sleep(Duration::from_millis(50));
    }
    Seaweed {
        port: s3,
        folders: AtomicU32::new(0),
        shell,
    }
}

/// By the server's own shell, again until it is up.
fn make_bucket(weed: &Path, master: u16) {
    let deadline = Instant::now() + START;
    loop {
        let mut shell = Command::new(weed)
            .args(["shell", &format!("-master=127.0.0.1:{master}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let mut stdin = shell.stdin.take().expect("piped");
        let _gone = stdin.write_all(b"s3.bucket.create -name kiln\n");
        drop(stdin);
        let said = shell.wait_with_output().expect("ends").stdout;
        if String::from_utf8_lossy(&said).contains("created bucket kiln") {
            return;
        }
        assert!(Instant::now() < deadline, "the S3 server does not answer");
        std::thread::sleep(Duration::from_millis(200));
    }
}

const SCRIPT: &str = r#"
weed=$1 master=$2 volume=$3 filer=$4 s3=$5 folder=$PWD
"$weed" -logtostderr=true server -dir=. -ip=127.0.0.1 -ip.bind=127.0.0.1 -filer=true -s3=true -s3.config=s3.json \
  -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false -filer.localSocket=filer.sock -s3.localSocket=s3.sock \
  -volume.max=4 -master.volumeSizeLimitMB=64 -master.port="$master" -volume.port="$volume" -filer.port="$filer" \
  -s3.port="$s3" >/dev/null 2>log </dev/null &
echo started
while read -r _; do :; done
kill -9 $! 2>/dev/null
wait 2>/dev/null
rm -f "/tmp/seaweedfs-master-grpc-$((master + 10000)).sock" "/tmp/seaweedfs-volume-grpc-$((volume + 10000)).sock" \
  "/tmp/seaweedfs-filer-grpc-$((filer + 10000)).sock" "/tmp/seaweedfs-s3-grpc-$((s3 + 10000)).sock"
rm -rf "$folder"
"#;
