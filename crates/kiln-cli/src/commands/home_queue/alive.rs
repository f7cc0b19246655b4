//! How commands of a home show that they live, and how what dead ones held is ended.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::WorkerId;
use kiln_db::Database;
use kiln_worker::host::new_job_id;
use rustix::fs::{FlockOperation, OFlags, flock};

use crate::error::{CliError, OrInfrastructure as _, Result};

/// Time between two looks for commands that died.
const BURY_EVERY: Duration = Duration::from_secs(10);
/// Where commands of a home show that they live, below its controller's folder.
const ALIVE: &str = "commands";

/// Most files that are made until one has its name: each time another command took it for a dead one's, by a clock that jumped.
const MADE_MAX: usize = 8;

/// How old a file is that was never seen under its name, before it is a killed command's: one that lives renames it at once.
const HIDDEN_FOR: Duration = Duration::from_secs(60);

/// A command cannot show that it lives.
#[derive(Debug, thiserror::Error)]
#[error("cannot make {}", path.display())]
struct CannotShow {
    path: PathBuf,
    source: io::Error,
}

/// A locked file: whoever starts this home's controller sees by it at once whether this process still lives.
#[derive(Debug)]
pub(super) struct Alive {
    pub(super) worker: WorkerId,
    path: PathBuf,
    _locked: File,
}

impl Alive {
    /// Under a name that nobody else has, or ever had.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let name = new_job_id('c').map_err(CliError::from_failure)?;
        let worker: WorkerId = format!("command-{name}").parse().or_infrastructure()?;
        let folder = folder.join(ALIVE);
        let (path, hidden) = (
            folder.join(worker.as_str()),
            folder.join(format!(".{worker}")),
        );
        let shows = || -> io::Result<File> {
            fs::create_dir_all(&folder)?;
            // Locked before it is seen: one that can be locked is a dead command's. Whoever looks at it holds it for a moment.
            let file = File::create(&hidden)?;
            flock(&file, FlockOperation::LockExclusive)?;
            fs::rename(&hidden, &path)?;
            Ok(file)
        };
        let mut made = 1;
        let locked = loop {
            match shows() {
                Err(error) if error.kind() == io::ErrorKind::NotFound && made < MADE_MAX => {
                    made += 1;
                }
                shown => break shown,
            }
        };
        let locked = locked.map_err(|source| CannotShow {
            path: path.clone(),
            source,
        });
        Ok(Self {
            worker,
            path,
            _locked: locked.or_infrastructure()?,
        })
    }

    pub(super) fn over(self) {
        let _gone_already = fs::remove_file(&self.path);
    }
}

/// What never comes.
pub(in super::super) enum Never {}

/// Again and again ends what commands of a home held that are dead.
pub(in super::super) async fn bury(folder: &Path, db: &Database) -> Never {
    loop {
        bury_once(folder, db).await;
        tokio::time::sleep(BURY_EVERY).await;
    }
}

/// The lock of a file that nobody holds; none while its command lives, and for what is no file.
fn nobodys(path: &Path) -> Option<File> {
    // A pipe would hold up this controller for ever, a link could lead anywhere.
    let file = File::options()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path);
    let file = file.ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(file)
}

/// Whether a command was killed between the making of its file and its name. One that was only stopped there holds the lock, but for a moment.
fn is_left_hidden(entry: &fs::DirEntry) -> bool {
    let name = entry.file_name();
    let hidden = name.to_str().and_then(|name| name.strip_prefix('.'));
    let age = entry.metadata().ok().filter(fs::Metadata::is_file);
    let age = age.and_then(|meta| meta.modified().ok()?.elapsed().ok());
    hidden.is_some_and(|name| name.parse::<WorkerId>().is_ok())
        && age.is_some_and(|age| age >= HIDDEN_FOR)
        && nobodys(&entry.path()).is_some()
}

pub(super) async fn bury_once(folder: &Path, db: &Database) {
    for entry in fs::read_dir(folder.join(ALIVE))
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        if is_left_hidden(&entry) {
            let _gone_already = fs::remove_file(entry.path());
        }
        let Some(worker) = name.to_str().and_then(|name| name.parse::<WorkerId>().ok()) else {
            continue;
        };
        let Some(_locked) = nobodys(&entry.path()) else {
            continue;
        };
        match db.bury_own_worker(&worker).await {
            Ok(_) => {
                let _gone_already = fs::remove_file(entry.path());
            }
            Err(error) => tracing::warn!(%worker, %error, "what it held is not ended yet"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use kiln_db::{DatabaseUrl, OpenOptions};

    use super::*;

    #[tokio::test]
    async fn files_of_killed_commands_go_and_no_others() {
        let dir = tempfile::tempdir().expect("dir");
        let url = DatabaseUrl::Sqlite(dir.path().join("kiln.db"));
        let db = Database::open(&url, OpenOptions::default())
            .await
            .expect("opens");
        let lives = Alive::new(dir.path()).expect("lives");
        let at = |name: &str| dir.path().join(ALIVE).join(name);
        let old = SystemTime::now() - 2 * HIDDEN_FOR;
        for (name, is_old) in [
            ("command-c1", false),
            (".command-c2", true),
            (".command-c3", false),
            (".command-c4", true),
            (".Notes", true),
        ] {
            let file = File::create(at(name)).expect("made");
            if is_old {
                file.set_modified(old).expect("aged");
            }
        }
        // One that was stopped for long, just before it has its name.
        let stopped = File::open(at(".command-c4")).expect("there");
        flock(&stopped, FlockOperation::NonBlockingLockExclusive).expect("locked");
        bury_once(dir.path(), &db).await;
        for (name, stays) in [
            ("command-c1", false),
            (".command-c2", false),
            (".command-c3", true),
            (".command-c4", true),
            (".Notes", true),
            (lives.worker.as_str(), true),
        ] {
            assert_eq!(at(name).exists(), stays, "{name}");
        }
        lives.over();
        db.close().await;
    }
}
