//! Starts a machine under QEMU and opens a session with its guest.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_proto::hello::Hello;
use kiln_proto::session::{Session, SessionLimits};
use kiln_proto::stream::Incoming;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest boot.
const BOOT: Duration = Duration::from_secs(60);

/// Names the machine image's directory (`kernel`, `initrd`, `root.img`), or a file that holds the name of one beside it.
const IMAGE: &str = "KILN_TEST_IMAGE";
/// Names the static guest.
const GUEST: &str = "KILN_TEST_GUEST";
/// When set, a machine that is not tested is a failure.
const REQUIRE: &str = "KILN_TEST_REQUIRE_TOOLS";

/// Where the parts of a machine lie; `None` (and a word) when they are not given.
pub(crate) fn parts() -> Option<(PathBuf, PathBuf)> {
    let parts = std::env::var_os(IMAGE).zip(std::env::var_os(GUEST));
    let Some((image, guest)) = parts else {
        let required = std::env::var_os(REQUIRE).is_some();
        assert!(!required, "{IMAGE} and {GUEST} are not set");
        println!("skipped: {IMAGE} and {GUEST} are not set");
        return None;
    };
    let image = PathBuf::from(image);
    if image.is_dir() {
        return Some((image, guest.into()));
    }
    let name = fs::read_to_string(&image).unwrap();
    Some((image.with_file_name(name.trim()), guest.into()))
}

/// Whether the long form was asked for, as `make test-hostile` and `make soak` do.
#[expect(
    clippy::disallowed_methods,
    reason = "whoever starts the long version talks to it this way"
)]
pub(crate) fn long() -> bool {
    std::env::var_os("KILN_TEST_LONG").is_some()
}

/// A running machine; killed when dropped.
pub(crate) struct Vm {
    qemu: Child,
    pub(crate) dir: TempDir,
    started: Instant,
}

/// What to attach.
#[derive(Default)]
pub(crate) struct Spec {
    pub(crate) root: bool,
    /// Serial numbers and sizes of new disks.
    pub(crate) disks: Vec<(&'static str, u64)>,
    pub(crate) memory_mib: u32,
}

fn cpio_entry(out: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let header = format!(
        "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
        out.len() + 1,
        0,
        0,
        1,
        0,
        data.len(),
        0,
        0,
        0,
        0,
        name.len() + 1,
        0
    );
    for part in [header.as_bytes(), name.as_bytes(), b"\0"] {
        out.extend_from_slice(part);
    }
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The image's initial RAM disk with this guest in place of its own: of two archives the later one wins.
fn initrd(parts: &Path, guest: &Path) -> Vec<u8> {
    let mut out = fs::read(parts.join("initrd")).unwrap_or_default();
    out.resize(out.len().next_multiple_of(4), 0);
    cpio_entry(&mut out, "init", 0o100_755, &fs::read(guest).unwrap());
    if let Ok(modules) = fs::read_dir(parts.join("modules")) {
        cpio_entry(&mut out, "modules", 0o040_755, b"");
        for entry in modules {
            let entry = entry.unwrap();
            let name = format!("modules/{}", entry.file_name().to_str().unwrap());
            cpio_entry(&mut out, &name, 0o100_644, &fs::read(entry.path()).unwrap());
        }
    }
    cpio_entry(&mut out, "TRAILER!!!", 0, b"");
    out
}

/// As the driver of machines does it: without this every look at the time is a device access, and tests take twice as long.
fn clock() -> &'static str {
    let host = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let host = fs::read_to_string(host).unwrap_or_default();
    match host.trim() {
        "tsc" => "tsc=reliable",
        _ => "",
    }
}

impl Vm {
    /// Starts it. The session is opened by [`Vm::session`].
    pub(crate) fn start(spec: &Spec) -> Option<Self> {
        Self::launch(spec, false)
    }

    /// Starts a copy of a machine whose state was saved by [`Vm::save`].
    pub(crate) fn restore(spec: &Spec, state: &Path) -> Option<Self> {
        let vm = Self::launch(spec, true)?;
        let uri = format!("file:{}", state.to_str().unwrap());
        let mut qmp = Qmp::connect(&vm);
        qmp.ask(&json!({ "execute": "migrate-incoming", "arguments": { "uri": uri } }));
        qmp.wait_for("query-migrate", "completed");
        qmp.ask(&json!({ "execute": "cont" }));
        Some(vm)
    }

    /// Stops the machine for good and saves its memory and devices.
    pub(crate) fn save(&self, state: &Path) {
        let uri = format!("file:{}", state.to_str().unwrap());
        let mut qmp = Qmp::connect(self);
        qmp.ask(&json!({ "execute": "stop" }));
        qmp.ask(&json!({ "execute": "migrate", "arguments": { "uri": uri } }));
        qmp.wait_for("query-migrate", "completed");
    }

    fn launch(spec: &Spec, incoming: bool) -> Option<Self> {
        let (parts, guest) = parts()?;
        let dir = tempfile::Builder::new()
            .prefix("kiln-vm")
            .tempdir()
            .unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::File::create(path("initrd"))
            .unwrap()
            .write_all(&initrd(&parts, &guest))
            .unwrap();
        let log = std::env::var("KILN_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
        let append = format!(
            "console=ttyS0 panic=-1 quiet loglevel=0 cryptomgr.notests noreplace-smp no_timer_check maxcpus=1 {} kiln.log={log}",
            clock()
        );
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-M",
            "q35,usb=off,smbus=off,vmport=off,hpet=off",
            "-bios",
            "qboot.rom",
            "-accel",
            "tcg,thread=multi",
        ])
        .args([
            "-cpu",
            "max,la57=off,cx16=off",
            "-smp",
            "2",
            "-nodefaults",
            "-no-user-config",
        ])
        .args([
            "-display",
            "none",
            "-no-reboot",
            "-m",
            &format!("{}", spec.memory_mib.max(256)),
        ])
        .args([
            "-kernel",
            parts.join("kernel").to_str().unwrap(),
            "-initrd",
            &path("initrd"),
        ])
        .args(["-append", &append])
        .args(["-serial", &format!("file:{}", path("console"))])
        .args(["-device", "virtio-serial-pci"])
        .args([
            "-chardev",
            &format!("socket,id=ch,path={},server=on,wait=off", path("channel")),
        ])
        .args(["-device", "virtserialport,chardev=ch,name=kiln.channel"])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
        .args(["-device", "virtio-rng-pci"]);
        if incoming {
            qemu.args(["-incoming", "defer"]);
        }
        if spec.root {
            let file = parts.join("root.img");
            disk(&mut qemu, "kiln-root", file.to_str().unwrap(), true);
        }
        for (serial, size) in &spec.disks {
            let file = path(serial);
            fs::File::create(&file).unwrap().set_len(*size).unwrap();
            disk(&mut qemu, serial, &file, false);
        }
        let qemu = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Some(Self {
            qemu,
            dir,
            started: Instant::now(),
        })
    }

    /// Connects and says hello. A later call replaces an earlier session.
    pub(crate) async fn session(&self) -> (Session, Hello, Incoming) {
        let path = self.dir.path().join("channel");
        let stream = loop {
            match StdStream::connect(&path) {
                Ok(stream) => break stream,
                Err(_) if self.started.elapsed() < BOOT => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("no channel: {error}\n{}", self.console()),
            }
        };
        stream.set_nonblocking(true).unwrap();
        let stream = tokio::net::UnixStream::from_std(stream).unwrap();
        let session = Session::connect(stream, SessionLimits::default(), BOOT).await;
        match session {
            Ok(session) => session,
            Err(error) => panic!("no session: {error:?}\n{}", self.console()),
        }
    }

    /// Time since QEMU was started.
    pub(crate) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// What the console said.
    pub(crate) fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }

    /// True if QEMU ended by itself.
    pub(crate) fn try_ended(&mut self) -> bool {
        self.qemu.try_wait().unwrap().is_some()
    }

    /// Waits for QEMU to end by itself.
    pub(crate) async fn ended(&mut self, within: Duration) {
        let deadline = Instant::now() + within;
        while self.qemu.try_wait().unwrap().is_none() {
            assert!(
                Instant::now() < deadline,
                "the machine does not end\n{}",
                self.console()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn disk(qemu: &mut Command, serial: &str, file: &str, read_only: bool) {
    let flag = if read_only { "on" } else { "off" };
    let locking = if read_only { "off" } else { "auto" };
    let blockdev = format!(
        "driver=raw,node-name={serial},read-only={flag},file.driver=file,file.filename={file},file.locking={locking}"
    );
    qemu.args(["-blockdev", &blockdev]);
    qemu.args([
        "-device",
        &format!("virtio-blk-pci,drive={serial},serial={serial}"),
    ]);
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("console:\n{}", self.console());
        }
        let _ended = self.qemu.kill();
        let _ended = self.qemu.wait();
    }
}

/// QEMU's control socket.
struct Qmp(BufReader<StdStream>);

impl Qmp {
    fn connect(vm: &Vm) -> Self {
        let stream = loop {
            match StdStream::connect(vm.dir.path().join("qmp")) {
                Ok(stream) => break stream,
                Err(_) if vm.started.elapsed() < BOOT => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(error) => panic!("no control socket: {error}"),
            }
        };
        let mut qmp = Self(BufReader::new(stream));
        qmp.line();
        qmp.ask(&json!({ "execute": "qmp_capabilities" }));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &Value) -> Value {
        writeln!(self.0.get_mut(), "{command}").unwrap();
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(result) = answer.get("return") {
                return result.clone();
            }
        }
    }

    fn wait_for(&mut self, query: &str, status: &str) {
        let deadline = Instant::now() + BOOT;
        loop {
            let answer = self.ask(&json!({ "execute": query }));
            if answer["status"] == status {
                return;
            }
            assert!(
                Instant::now() < deadline && answer["status"] != "failed",
                "{answer}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
