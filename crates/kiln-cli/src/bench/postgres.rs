//! A PostgreSQL of a benchmark's own: Debian's programs, a folder of its own, a Unix socket only, every write synced.
//!
//! A shell stands between, which ends the server as soon as this process is gone, however it goes.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{CliError, OrInfrastructure as _, Result};

/// Where Debian keeps the programs of each version.
const VERSIONS: &str = "/usr/lib/postgresql";
/// Lines of a server that did not start that are shown.
const WORDS_MAX: usize = 40;

/// Starts the server, says `ready`, and ends it when its standard input ends.
const SCRIPT: &str = r#"
bin=$1 folder=$2
fail() { tail -n 30 "$folder/log" 2>/dev/null; rm -rf "$folder"; exit 1; }
"$bin/initdb" -D "$folder/data" --auth=trust -U kiln --locale=C -E UTF8 >"$folder/log" 2>&1 || fail
"$bin/pg_ctl" -D "$folder/data" -w -t 60 -l "$folder/log" \
  -o "-k '$folder' -c listen_addresses='' -c max_connections=100 -c shared_buffers=64MB" start >/dev/null 2>&1 || fail
echo ready
while read -r order; do :; done
"$bin/pg_ctl" -D "$folder/data" -m immediate stop >/dev/null 2>&1
rm -rf "$folder"
"#;

/// A server that runs as long as this lives.
#[derive(Debug)]
pub(super) struct Postgres {
    shell: Child,
    bin: PathBuf,
    folder: PathBuf,
}

impl Postgres {
    /// Starts one; `None` when the package is not installed.
    ///
    /// # Errors
    /// When it is there and does not start.
    pub(super) fn start() -> Result<Option<Self>> {
        let Some(bin) = binaries() else {
            return Ok(None);
        };
        // A short path that another user may enter: the socket's name is bounded, and PostgreSQL refuses to run as root.
        let folder = PathBuf::from(format!("/tmp/kiln-bench-pg-{}", std::process::id()));
        fs::create_dir(&folder).or_infrastructure()?;
        let ids = unprivileged().or_infrastructure()?;
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(SCRIPT).arg("sh").arg(&bin).arg(&folder);
        if let Some((user, group)) = ids {
            chown(&folder, Some(user), Some(group)).or_infrastructure()?;
            shell.uid(user).gid(group);
        }
        let mut shell = shell
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .or_infrastructure()?;
        let said = shell.stdout.take().map(BufReader::new);
        let mut words = Vec::new();
        for line in said.into_iter().flat_map(BufReader::lines) {
            let line = line.or_infrastructure()?;
            if line == "ready" {
                return Ok(Some(Self { shell, bin, folder }));
            }
            if words.len() < WORDS_MAX {
                words.push(line);
            }
        }
        let _ended = shell.wait();
        let told = format!("PostgreSQL did not start:\n{}", words.join("\n"));
        Err(CliError::new(kiln_core::FailureClass::Infrastructure, told))
    }

    /// Makes an empty database; gives its place.
    ///
    /// # Errors
    /// When the server refuses.
    pub(super) fn database(&self) -> Result<String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("bench{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let made = Command::new(self.bin.join("createdb"))
            .arg("-h")
            .arg(&self.folder)
            .args(["-U", "kiln", &name])
            .output()
            .or_infrastructure()?;
        if !made.status.success() {
            let words = String::from_utf8_lossy(&made.stderr).into_owned();
            return Err(CliError::new(
                kiln_core::FailureClass::Infrastructure,
                words,
            ));
        }
        let host = self.folder.display();
        Ok(format!("postgres://kiln@localhost/{name}?host={host}"))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // The end of its standard input is the order to stop.
        drop(self.shell.stdin.take());
        let _ended = self.shell.wait();
    }
}

fn binaries() -> Option<PathBuf> {
    let versions = fs::read_dir(VERSIONS).ok()?;
    let bins = versions.flatten().map(|entry| entry.path().join("bin"));
    bins.filter(|bin| bin.join("initdb").exists()).max()
}

/// Whom root lets PostgreSQL run as: the system's `postgres` or `nobody`.
fn unprivileged() -> std::io::Result<Option<(u32, u32)>> {
    if fs::metadata(Path::new("/proc/self"))?.uid() != 0 {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd")?;
    let ids = |name: &str| {
        let mut lines = users.lines().map(|line| line.split(':'));
        let mut fields = lines.find(|fields| fields.clone().next() == Some(name))?;
        Some((fields.nth(2)?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    Ok(ids("postgres").or_else(|| ids("nobody")))
}
