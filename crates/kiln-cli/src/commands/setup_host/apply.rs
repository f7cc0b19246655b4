//! Does the steps as root. No shell, no path that another user could bend: folders are entered one by one without following links.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Component, Path};
use std::process::Stdio;
use std::time::Duration;

use kiln_core::FailureClass;
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::facts::getent;
use super::plan::{MARK, SUB_IDS, Step, new_name};
use crate::error::{CliError, Result};

/// Where root's programs are: not what the caller's environment says.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Longest time one of them may take: the databases of users are locked by others for seconds at most.
const PROGRAM_MAX: Duration = Duration::from_secs(60);
/// Most of an existing file that is compared.
const FILE_MAX: u64 = 64 << 10;

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    Made,
    Unchanged,
}

pub(super) async fn step(step: &Step) -> Result<Done> {
    match step {
        Step::Group(name) => {
            if getent("group", name).await?.is_some() {
                return Ok(Done::Unchanged);
            }
            program("groupadd", &["--system", name]).await
        }
        Step::User { name, home } => {
            if getent("passwd", name).await?.is_some() {
                return Ok(Done::Unchanged);
            }
            let home = home.to_string_lossy();
            let args = ["--system", "--user-group", "--home-dir", &home];
            let rest = ["--no-create-home", "--shell", "/usr/sbin/nologin", name];
            program("useradd", &[args, rest].concat()).await
        }
        Step::Member { user, group } => {
            program("usermod", &["--append", "--groups", group, user]).await
        }
        Step::SubIds { user, first } => {
            let range = format!("{first}-{}", first + SUB_IDS - 1);
            let args = ["--add-subuids", &range, "--add-subgids", &range, user];
            program("usermod", &args).await
        }
        Step::Folder { path, owner, mode } => {
            let owner = ids(owner).await?;
            folder(path, owner, *mode).map_err(|why| refused(path, &why))
        }
        Step::File {
            path,
            mode,
            content,
            sudoers,
        } => file(path, *mode, content, *sudoers).await,
    }
}

fn refused(path: &Path, why: &str) -> CliError {
    CliError::new(
        FailureClass::Infrastructure,
        format!("{}: {why}", path.display()),
    )
}

/// Runs one of root's programs to its end.
async fn program(name: &str, args: &[&str]) -> Result<Done> {
    let mut command = tokio::process::Command::new(name);
    command
        .args(args)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    let failed =
        |why: String| CliError::new(FailureClass::Infrastructure, format!("{name}: {why}"));
    let output = tokio::time::timeout(PROGRAM_MAX, command.output())
        .await
        .map_err(|_elapsed| failed(format!("did not end within {PROGRAM_MAX:?}")))?
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(Done::Made);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.trim().chars().take(400).collect();
    Err(failed(format!("{}: {said}", output.status)))
}

/// A user's own ids.
async fn ids(owner: &str) -> Result<(Uid, Gid)> {
    let line = getent("passwd", owner).await?;
    let mut numbers = line.iter().flat_map(|line| line.split(':').skip(2)).take(2);
    let mut next = || numbers.next().and_then(|text| text.parse().ok());
    match (next(), next()) {
        (Some(uid), Some(gid)) => Ok((Uid::from_raw(uid), Gid::from_raw(gid))),
        _ => Err(CliError::new(
            FailureClass::Infrastructure,
            format!("there is no user {owner}"),
        )),
    }
}

/// A folder and those above it. One that is there keeps its owner, who must be the wanted one.
fn folder(path: &Path, owner: (Uid, Gid), mode: u32) -> std::result::Result<Done, String> {
    let parent = enter(path.parent().unwrap_or(Path::new("/")), true)?;
    let name = path.file_name().ok_or("has no name")?;
    let made = match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(format!("cannot be made: {error}")),
    };
    let dir = open_folder(&parent, name)?;
    let stat = rustix::fs::fstat(&dir).map_err(|error| error.to_string())?;
    // Made by a run that was killed before it gave the folder away: root's, and empty to all but root.
    if !made && stat.st_uid != owner.0.as_raw() && stat.st_uid != 0 {
        return Err(format!("belongs to user {} already", stat.st_uid));
    }
    let same = stat.st_uid == owner.0.as_raw() && stat.st_mode & 0o7777 == mode;
    if same {
        return Ok(Done::Unchanged);
    }
    rustix::fs::fchmod(&dir, Mode::from_raw_mode(mode)).map_err(|error| error.to_string())?;
    rustix::fs::fchown(&dir, Some(owner.0), Some(owner.1)).map_err(|error| error.to_string())?;
    rustix::fs::fsync(&parent).map_err(|error| error.to_string())?;
    Ok(Done::Made)
}

/// Opens a folder by its absolute path, each part without following a link, each root's alone to change.
fn enter(path: &Path, make: bool) -> std::result::Result<OwnedFd, String> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let mut at = rustix::fs::openat(CWD, "/", flags, Mode::empty()).map_err(|e| e.to_string())?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        if make {
            match rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(format!("{} cannot be made: {error}", name.display())),
            }
        }
        at = open_folder(&at, name)?;
        let stat = rustix::fs::fstat(&at).map_err(|error| error.to_string())?;
        if stat.st_uid != 0 || stat.st_mode & 0o022 != 0 {
            return Err(format!(
                "{} can be changed by others than root",
                name.display()
            ));
        }
    }
    Ok(at)
}

fn open_folder(at: &OwnedFd, name: &OsStr) -> std::result::Result<OwnedFd, String> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    rustix::fs::openat(at, name, flags, Mode::empty()).map_err(|error| match error {
        Errno::LOOP | Errno::NOTDIR => format!("{} is not a folder (or a link)", name.display()),
        error => format!("{}: {error}", name.display()),
    })
}

/// Written beside its place, checked, then renamed: there is the old file or the new one, never a part of one.
async fn file(path: &Path, mode: u32, content: &str, sudoers: bool) -> Result<Done> {
    let refuse = |why: String| refused(path, &why);
    let parent = path.parent().unwrap_or(Path::new("/"));
    let dir = enter(parent, true).map_err(refuse)?;
    let name = path.file_name().unwrap_or_default();
    match read(&dir, name).map_err(refuse)? {
        Some(old) if old == content => return Ok(Done::Unchanged),
        Some(old) if !old.starts_with(MARK) => {
            return Err(refuse("was not written by kiln, and stays".to_owned())
                .hint("move it away, or compare it with `kiln setup host --print`"));
        }
        _ => {}
    }
    let new = new_name(path);
    let new_name = new.file_name().unwrap_or_default();
    write(&dir, new_name, mode, content).map_err(refuse)?;
    if sudoers {
        let checked = program("visudo", &["-cf", &new.to_string_lossy()]).await;
        if let Err(error) = checked {
            let _gone = rustix::fs::unlinkat(&dir, new_name, AtFlags::empty());
            return Err(error
                .hint("package sudo has visudo(8); a mode without a sudoers file needs neither"));
        }
    }
    rustix::fs::renameat(&dir, new_name, &dir, name).map_err(|e| refuse(e.to_string()))?;
    rustix::fs::fsync(&dir).map_err(|e| refuse(e.to_string()))?;
    Ok(Done::Made)
}

fn read(dir: &OwnedFd, name: &OsStr) -> std::result::Result<Option<String>, String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(format!("is there and cannot be read: {error}")),
    };
    let file = File::from(fd);
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err("is there and is no file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

fn write(dir: &OwnedFd, name: &OsStr, mode: u32, content: &str) -> std::result::Result<(), String> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => {
            return Err(format!(
                "what a stopped run left cannot be removed: {error}"
            ));
        }
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600))
        .map_err(|e| e.to_string())?;
    let mut file = File::from(fd);
    file.write_all(content.as_bytes())
        .map_err(|e| e.to_string())?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(|e| e.to_string())?;
    rustix::fs::fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT)).map_err(|e| e.to_string())?;
    file.sync_all().map_err(|e| e.to_string())
}
