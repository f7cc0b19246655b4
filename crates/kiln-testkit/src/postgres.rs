//! A real PostgreSQL for the length of this test run: made by `initdb` in a temporary folder, on a Unix socket only, as an
//! unprivileged user. A shell stands between, which ends the server as soon as this process is gone, however it goes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

/// A server.
#[derive(Debug)]
pub struct Postgres {
    bin: PathBuf,
    folder: PathBuf,
    /// Its standard input is the life line.
    shell: Mutex<(Child, BufReader<ChildStdout>)>,
}

static SERVER: OnceLock<Postgres> = OnceLock::new();
static NAMES: AtomicU32 = AtomicU32::new(0);

/// Starts the server, or gives the one that runs.
pub fn server() -> &'static Postgres {
    SERVER.get_or_init(|| start(None))
}

impl Postgres {
    /// Makes an empty database; gives its name.
    ///
    /// # Panics
    /// When it cannot.
    #[must_use]
    pub fn database(&self) -> String {
        let name = format!("t{}", NAMES.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("create database {name}"));
        name
    }

    /// Where it is: its socket and certificates are there.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The place of a database.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let host = self.folder.display();
        format!("postgres://kiln@localhost/{database}?host={host}")
    }

    /// Stops the server as a crash would and starts it again.
    ///
    /// # Panics
    /// When it does not come back.
    pub fn restart(&self) {
        let mut shell = self.shell.lock().expect("nobody panicked");
        let (child, words) = &mut *shell;
        let orders = child.stdin.as_mut().expect("piped");
        orders.write_all(b"restart\n").expect("hears");
        let mut line = String::new();
        words.read_line(&mut line).expect("the shell speaks");
        assert_eq!(line.trim(), "restarted");
    }

    /// Runs a statement as the operator's own tool would; gives what it prints.
    ///
    /// # Panics
    /// When it is refused.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let done = Command::new(self.bin.join("psql"))
            .args([
                "-X",
                "-q",
                "-t",
                "-A",
                "-v",
                "ON_ERROR_STOP=1",
                "-U",
                "kiln",
            ])
            .arg("-h")
            .arg(&self.folder)
            .args(["-d", database, "-c", sql])
            .output()
            .expect("psql runs");
        let words = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{sql}: {words}");
        String::from_utf8_lossy(&done.stdout).trim().to_owned()
    }
}

/// Starts a server of one's own; with a port it also listens on 127.0.0.1, by TLS alone, as `localhost` with a certificate of
/// `root.crt` in its folder.
///
/// # Panics
/// When it does not start.
#[must_use]
pub fn start(tls: Option<u16>) -> Postgres {
    let bin = binaries();
    let folder = tempfile::Builder::new()
        .prefix("kiln-pg-")
        .tempdir()
        .expect("temporary folder")
        .keep();
    let ids = unprivileged();
    if let Some((user, group)) = ids {
        chown(&folder, Some(user), Some(group)).expect("the folder changes hands");
    }
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(SCRIPT).arg("sh").arg(&bin).arg(&folder);
    shell.arg(tls.map_or(String::new(), |port| port.to_string()));
    if let Some((user, group)) = ids {
        shell.uid(user).gid(group);
    }
    let mut shell = shell
        .current_dir(&folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell starts");
    let mut words = BufReader::new(shell.stdout.take().expect("piped"));
    let mut said = String::new();
    loop {
        let mut line = String::new();
        let read = words.read_line(&mut line).expect("the shell speaks");
        if line.trim() == "ready" {
            break;
        }
        said.push_str(&line);
        assert!(read > 0, "PostgreSQL did not start:\n{said}");
    }
    Postgres {
        bin,
        folder,
        shell: Mutex::new((shell, words)),
    }
}

const SCRIPT: &str = r#"
bin=$1 folder=$2 port=$3
fail() { tail -n 30 "$folder/log" 2>/dev/null; rm -rf "$folder"; exit 1; }
"$bin/initdb" -D "$folder/data" --auth=trust --no-sync -U kiln --locale=C -E UTF8 >"$folder/log" 2>&1 || fail
tls="-c listen_addresses=''"
if [ -n "$port" ]; then
  curve="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
  openssl req -x509 $curve -days 2 -subj /CN=root -keyout "$folder/root.key" -out "$folder/root.crt" >>"$folder/log" 2>&1 || fail
  echo 'subjectAltName=DNS:localhost' >"$folder/names"
  openssl req -new $curve -subj /CN=localhost -keyout "$folder/server.key" -out "$folder/server.csr" >>"$folder/log" 2>&1 || fail
  openssl x509 -req -in "$folder/server.csr" -CA "$folder/root.crt" -CAkey "$folder/root.key" -CAcreateserial -days 2 \
    -extfile "$folder/names" -out "$folder/server.crt" >>"$folder/log" 2>&1 || fail
  tls="-c listen_addresses=127.0.0.1 -c port=$port -c ssl=on -c ssl_cert_file=$folder/server.crt -c ssl_key_file=$folder/server.key"
  echo 'hostssl all all 127.0.0.1/32 trust' >"$folder/data/pg_hba.conf"
  echo 'local all all trust' >>"$folder/data/pg_hba.conf"
fi
"$bin/pg_ctl" -D "$folder/data" -w -t 60 -l "$folder/log" \
  -o "-k '$folder' $tls -c max_connections=200 -c shared_buffers=64MB -c fsync=off" start >/dev/null 2>&1 || fail
echo ready
while read -r order; do
  if [ "$order" = restart ]; then
    "$bin/pg_ctl" -D "$folder/data" -m immediate -w -t 60 -l "$folder/log" restart >/dev/null 2>&1 || fail
    echo restarted
  fi
done
"$bin/pg_ctl" -D "$folder/data" -m immediate stop >/dev/null 2>&1
rm -rf "$folder"
"#;

/// Debian keeps the programs of each version apart.
fn binaries() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let found = versions
        .flatten()
        .map(|version| version.path().join("bin"))
        .filter(|bin| bin.join("initdb").exists())
        .max();
    found.expect("PostgreSQL is needed for these tests: install the package `postgresql` (scripts/bootstrap.sh --test does)")
}

/// PostgreSQL refuses to run as root: then the system's `postgres` or `nobody` runs it.
fn unprivileged() -> Option<(u32, u32)> {
    use std::os::unix::fs::MetadataExt as _;
    let own = std::fs::metadata(Path::new("/proc/self")).expect("proc");
    if own.uid() != 0 {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").expect("passwd");
    let ids = |name: &str| {
        let line = users
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    Some(
        ids("postgres")
            .or_else(|| ids("nobody"))
            .expect("an unprivileged user"),
    )
}
