//! `kiln build --ssh`: a real agent's keys are used by the steps that mount it, and by no other.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::{app, kiln, path, until};

struct Agent {
    child: Child,
    socket: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Agent {
    /// An agent with one new key; `None` where OpenSSH's client is not installed.
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    fn start(dir: &Path) -> Option<Self> {
        let socket = dir.join("agent.sock");
        let started = Command::new("ssh-agent")
            .args(["-D", "-a", path(&socket)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = started else {
            eprintln!("skipped: ssh-agent is not installed");
            return None;
        };
        let agent = Self { child, socket };
        until("the agent", || agent.socket.exists().then_some(()));
        let key = dir.join("key");
        let made = Command::new("ssh-keygen")
            .args([
                "-q",
                "-t",
                "ed25519",
                "-N",
                "",
                "-C",
                "a key of the test",
                "-f",
                path(&key),
            ])
            .status();
        assert!(made.expect("ssh-keygen").success());
        agent.ssh_add(&[path(&key)]);
        Some(agent)
    }

    fn ssh_add(&self, args: &[&str]) -> String {
        let output = Command::new("ssh-add")
            .args(args)
            .env("SSH_AUTH_SOCK", &self.socket)
            .output()
            .expect("ssh-add");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// Lists keys, signs, and tries to remove all keys, in the agent's own protocol.
const CLIENT: &str = r#"
import os, socket, struct, sys

agent = socket.socket(socket.AF_UNIX)
agent.connect(os.environ["SSH_AUTH_SOCK"])

def ask(message):
    agent.sendall(struct.pack(">I", len(message)) + message)
    length, = struct.unpack(">I", agent.recv(4, socket.MSG_WAITALL))
    return agent.recv(length, socket.MSG_WAITALL)

def text(data):
    return struct.pack(">I", len(data)) + data

keys = ask(b"\x0b")
assert keys[0] == 12 and struct.unpack(">I", keys[1:5])[0] == 1, keys
length, = struct.unpack(">I", keys[5:9])
blob = keys[9:9 + length]
assert b"a key of the test" in keys, keys
signed = ask(b"\x0d" + text(blob) + text(b"words") + struct.pack(">I", 0))
assert signed[0] == 14 and b"ssh-ed25519" in signed, signed
assert ask(b"\x13")[0] == 5, "all keys can be removed"
"#;

#[test]
fn a_users_ssh_agent_signs_for_the_steps_that_mount_it() {
    let Some(kiln) = kiln() else { return };
    let work = tempfile::tempdir().expect("temp dir");
    let Some(agent) = Agent::start(work.path()) else {
        return;
    };
    let dockerfile = "FROM python:3.13 AS build\nCOPY client.py /\n\
                      RUN --mount=type=ssh python3 /client.py && echo used > /made\n\
                      RUN test -z \"$SSH_AUTH_SOCK\" && test ! -e /run/kiln\n\
                      FROM scratch\nCOPY --from=build /made /made\n";
    let dir = app(&[("Dockerfile", dockerfile), ("client.py", CLIENT)]);
    let spec = format!("default={}", path(&agent.socket));
    kiln.build(dir.path(), "it-ssh", &["--ssh", &spec, "--no-cache"]);
    assert!(
        agent.ssh_add(&["-l"]).contains("a key of the test"),
        "the key is still there"
    );
    // Nobody's agent: the step has none, and a socket that does not answer is said before anything starts.
    let args = ["build", path(dir.path()), "--tag", "it-ssh", "--no-cache"];
    kiln.run(&args).exits(1);
    let args = ["build", path(dir.path()), "--ssh", "default=/nowhere/agent"];
    kiln.run(&args)
        .exits(2)
        .says("no agent answers")
        .says("ssh-agent");
}
