//! Child processes of these tests: this binary again, running one test that does what its environment says.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

/// Names the role and its arguments, separated by line ends.
pub(crate) const ROLE: &str = "KILN_IT_CHILD";

/// A child in a role. Killed with SIGKILL when dropped.
#[derive(Debug)]
pub(crate) struct Role {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Role {
    /// The test that plays a role.
    pub(crate) const TEST: &str = "child::plays_its_role";

    /// Starts this binary in a role.
    pub(crate) fn start(words: &[&str]) -> Self {
        // Not by its path: it may have been built anew meanwhile.
        Self::start_by(Command::new("/proc/self/exe"), words)
    }

    /// Starts this binary in a role by a command that ends with it.
    pub(crate) fn start_by(mut command: Command, words: &[&str]) -> Self {
        let mut child = command
            .args(["--exact", Self::TEST, "--nocapture"])
            .env(ROLE, words.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("own binary");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, stdout }
    }

    /// Waits for a line that the child says with [`say`].
    pub(crate) fn wait_for(&mut self, word: &str) {
        let wanted = format!("child says: {word}");
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            let count = self.stdout.read_line(&mut line).expect("read");
            assert_ne!(count, 0, "the child ended before it said {word}: {seen}");
            if line.trim_end().ends_with(&wanted) {
                return;
            }
            seen.push_str(&line);
        }
    }

    /// kill -9, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        self.child.wait().expect("wait");
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        self.end();
    }
}

/// Tells the parent something.
pub(crate) fn say(word: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nchild says: {word}").expect("stdout");
    out.flush().expect("stdout");
}

/// Stops here until killed.
pub(crate) fn wait_to_be_killed() -> ! {
    loop {
        std::thread::park();
    }
}

/// Does nothing when it is run as one of the tests.
#[test]
fn plays_its_role() {
    #[expect(clippy::disallowed_methods, reason = "how the parent gives the role")]
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let words: Vec<&str> = role.split('\n').collect();
    match words.as_slice() {
        ["machine", driver, home, name, moment] => {
            crate::conformance::crash::play(driver, home.as_ref(), name, moment, false);
        }
        ["machine-to-keep", driver, home, name, moment] => {
            crate::conformance::crash::play(driver, home.as_ref(), name, moment, true);
        }
        ["keeper", driver, home, name] => {
            crate::conformance::kept::play(driver, home.as_ref(), name);
        }
        ["hold", home, gib] => crate::ledger::play_hold(home.as_ref(), gib),
        ["full-disk", home] => crate::host_facts::play_full_disk(home.as_ref()),
        ["cgroup-v2"] => crate::host_facts::play_cgroup_v2(),
        other => panic!("no such role: {other:?}"),
    }
}
