//! An internet in two namespaces: every address is at the far end of one cable, and all that comes there is written down.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What kiln's end of the cable has, and the other.
const NEAR: &str = "11.0.0.2";
const FAR: &str = "11.0.0.1";
/// Longest time a server waits for what a guest sends.
const READ_MAX: Duration = Duration::from_secs(5);
/// Ports that are served.
const PORTS: [u16; 7] = [22, 53, 80, 443, 853, 5432, 8080];

/// What came.
#[derive(Debug, Default, Clone)]
pub(super) struct Seen {
    /// Names that the name server was asked for.
    pub(super) asked: Vec<String>,
    /// `ADDRESS:PORT` of connections.
    pub(super) opened: Vec<String>,
    /// The first bytes of each that sent some.
    pub(super) sent: Vec<String>,
}

pub(super) struct Internet {
    near: String,
    far: String,
    seen: Arc<Mutex<Seen>>,
    dir: tempfile::TempDir,
}

#[expect(
    clippy::print_stdout,
    reason = "why there is no network shows in the test's output"
)]
fn ip(words: &str) -> bool {
    let output = Command::new("ip").args(words.split(' ')).output();
    match output {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            println!("ip {words}: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
        Err(error) => {
            println!("ip {words}: {error}");
            false
        }
    }
}

impl Internet {
    /// None where this user may make no namespaces, unless they are required.
    #[expect(
        clippy::disallowed_methods,
        reason = "whoever starts the tests talks to them this way"
    )]
    pub(super) fn open(number: u8) -> Option<Self> {
        let pid = std::process::id();
        let (near, far) = (
            format!("kiln-near-{pid}-{number}"),
            format!("kiln-far-{pid}-{number}"),
        );
        if !ip(&format!("netns add {near}")) {
            assert!(
                std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_none(),
                "no network namespace can be made, which KILN_TEST_REQUIRE_TOOLS asks for"
            );
            return None;
        }
        let world = Self {
            near,
            far,
            seen: Arc::default(),
            dir: tempfile::tempdir().expect("folder"),
        };
        let (near, far) = (&world.near, &world.far);
        let made = ip(&format!("netns add {far}"))
            && ip(&format!("-n {near} link add out type veth peer name wire netns {far}"))
            && world.quiet()
            && ip(&format!("-n {near} addr add {NEAR}/24 dev out"))
            && ip(&format!("-n {near} link set lo up"))
            && ip(&format!("-n {near} link set out up"))
            && ip(&format!("-n {near} route add default via {FAR}"))
            && ip(&format!("-n {far} addr add {FAR}/24 dev wire"))
            && ip(&format!("-n {far} link set lo up"))
            && ip(&format!("-n {far} link set wire up"))
            // Every address is this one's own.
            && ip(&format!("-n {far} route add local 0.0.0.0/0 dev lo"));
        assert!(made, "no cable");
        std::fs::write(
            world.resolver(),
            format!("nameserver {FAR}\noptions timeout:1 attempts:1\n"),
        )
        .expect("write");
        world.serve();
        Some(world)
    }

    /// No neighbour discovery of the kernel's own on the cable: what is counted is somebody's doing.
    fn quiet(&self) -> bool {
        [(&self.near, "out"), (&self.far, "wire")]
            .iter()
            .all(|(space, card)| {
                let off = format!("echo 1 > /proc/sys/net/ipv6/conf/{card}/disable_ipv6");
                let net = format!("--net=/run/netns/{space}");
                let done = Command::new("nsenter")
                    .args([&net, "sh", "-c", &off])
                    .status();
                done.is_ok_and(|status| status.success())
            })
    }

    pub(super) fn near(&self) -> &str {
        &self.near
    }

    pub(super) fn resolver(&self) -> PathBuf {
        self.dir.path().join("resolv.conf")
    }

    pub(super) fn seen(&self) -> Seen {
        self.seen.lock().expect("lock").clone()
    }

    /// Frames that arrived at the far end so far, whatever they are.
    pub(super) fn packets(&self) -> u64 {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.far, "cat", "/proc/net/dev"])
            .output();
        let text = String::from_utf8(output.expect("ip").stdout).expect("text");
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("wire:"));
        let mut fields = line.expect("the cable").split_whitespace();
        fields
            .nth(1)
            .and_then(|count| count.parse().ok())
            .expect("a count")
    }

    /// Servers live as long as the test's process: each thread waits for ever on a socket of the namespace.
    fn serve(&self) {
        let space = Path::new("/run/netns").join(&self.far);
        let inside = |work: Box<dyn FnOnce() + Send>| {
            let space = File::open(&space).expect("it is there");
            let (ready, is_ready) = std::sync::mpsc::channel::<()>();
            thread::spawn(move || {
                move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("enters");
                drop(ready);
                work();
            });
            // The channel closes when the thread is inside; a panic closes it too, and shows.
            let _closed = is_ready.recv();
        };
        let seen = Arc::clone(&self.seen);
        inside(Box::new(move || names(&seen)));
        for port in PORTS {
            let seen = Arc::clone(&self.seen);
            inside(Box::new(move || server(port, &seen)));
        }
        self.wait_for_servers();
    }

    fn wait_for_servers(&self) {
        let listening = || {
            let output = Command::new("ip")
                .args([
                    "netns",
                    "exec",
                    &self.far,
                    "cat",
                    "/proc/net/tcp",
                    "/proc/net/udp",
                ])
                .output();
            let text = String::from_utf8(output.expect("ip").stdout).expect("text");
            // State 0A is LISTEN, 07 a bound datagram socket (proc_net_tcp.txt of the kernel).
            text.lines()
                .filter(|line| line.contains(" 0A ") || line.contains(" 07 "))
                .count()
        };
        crate::support::until("the servers", || (listening() > PORTS.len()).then_some(()));
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.near));
        ip(&format!("netns del {}", self.far));
    }
}

fn server(port: u16, seen: &Arc<Mutex<Seen>>) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("binds");
    while let Ok((mut stream, _)) = listener.accept() {
        let to = stream.local_addr().map(|at| at.to_string());
        seen.lock()
            .expect("lock")
            .opened
            .push(to.unwrap_or_default());
        let seen = Arc::clone(seen);
        thread::spawn(move || {
            let _sent = stream.write_all(b"hello");
            let _set = stream.set_read_timeout(Some(READ_MAX));
            let mut bytes = [0; 512];
            while let Ok(count @ 1..) = stream.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
                seen.lock().expect("lock").sent.push(text);
            }
        });
    }
}

/// A record: type and data.
type Record = (String, u16, Vec<u8>);

const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;

/// What the zone says to the `count`th question (from 0) for a name.
fn answers(name: &str, kind: u16, count: u32) -> Vec<Record> {
    let a = |address: [u8; 4]| (kind == A).then(|| (name.to_owned(), A, address.to_vec()));
    let six = |text: &str| {
        let address: Ipv6Addr = text.parse().expect("an address");
        (kind == AAAA).then(|| (name.to_owned(), AAAA, address.octets().to_vec()))
    };
    let alias = |from: &str, to: &str| (from.to_owned(), CNAME, encoded(to));
    match name {
        "good.test" => a([11, 1, 0, 10]).into_iter().collect(),
        // Rebinding: a public address once, then this host.
        "rebind.test" if count == 0 => a([11, 1, 0, 11]).into_iter().collect(),
        "rebind.test" => a([127, 0, 0, 1]).into_iter().collect(),
        "mixed.test" => a([10, 0, 0, 1])
            .into_iter()
            .chain(a([11, 1, 0, 12]))
            .collect(),
        "web.test" => a([11, 1, 0, 13]).into_iter().collect(),
        "inside.test" => a([127, 0, 0, 1]).into_iter().collect(),
        "meta.test" => a([169, 254, 169, 254]).into_iter().collect(),
        "own.test" => a([11, 0, 0, 2]).into_iter().collect(),
        "placed.test" => a([11, 1, 0, 14]).into_iter().collect(),
        "mapped.test" => six("::ffff:127.0.0.1").into_iter().collect(),
        "translated.test" => six("64:ff9b::7f00:1").into_iter().collect(),
        "chain.test" => {
            let mut all = vec![
                alias("chain.test", "middle.test"),
                alias("middle.test", "end.test"),
            ];
            all.extend((kind == A).then(|| ("end.test".to_owned(), A, vec![127, 0, 0, 1])));
            all
        }
        "loop.test" => vec![alias("loop.test", "loop.test")],
        _ => Vec::new(),
    }
}

fn encoded(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).expect("a label"));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

/// A name server (RFC 1035 §4) of one question a message.
fn names(seen: &Arc<Mutex<Seen>>) {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).expect("binds");
    let mut counts: BTreeMap<(String, u16), u32> = BTreeMap::new();
    let mut query = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut query) {
        let Some((name, kind, end)) = question(&query[..length]) else {
            continue;
        };
        seen.lock().expect("lock").asked.push(name.clone());
        let count = counts.entry((name.clone(), kind)).or_default();
        let records = answers(&name, kind, *count);
        *count += 1;
        let known = !answers(&name, A, 0).is_empty() || !answers(&name, AAAA, 0).is_empty();
        reply(&socket, from, &query[..end], known, &records);
    }
}

fn question(query: &[u8]) -> Option<(String, u16, usize)> {
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]);
    query.get(at + 3)?;
    Some((labels.join("."), kind, at + 4))
}

fn reply(socket: &UdpSocket, to: SocketAddr, question: &[u8], known: bool, records: &[Record]) {
    let mut bytes = question[..2].to_vec();
    bytes.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1]);
    bytes.extend(u16::try_from(records.len()).expect("few").to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(&question[12..]);
    for (name, kind, data) in records {
        bytes.extend(encoded(name));
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1, 0, 0, 0, 0]);
        bytes.extend(u16::try_from(data.len()).expect("short").to_be_bytes());
        bytes.extend(data);
    }
    let _sent = socket.send_to(&bytes, to);
}
