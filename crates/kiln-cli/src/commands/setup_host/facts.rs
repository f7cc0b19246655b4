//! What a host has already: asked of its own databases, changed by nothing here.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::plan::{SUB_IDS, Wanted};
use crate::args::HostMode;
use crate::error::{CliError, Result};

/// Longest time getent(1) may take: a directory service may be asked.
const ASK_MAX: Duration = Duration::from_secs(20);
/// Where Debian begins to grant subordinate ids (`SUB_UID_MIN` of login.defs(5)).
const SUB_FIRST: u32 = 100_000;
/// `SUB_UID_MAX` of login.defs(5).
const SUB_LAST: u32 = 600_100_000;

/// What there is.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    pub(super) user_exists: bool,
    /// The group to join for `/dev/kvm`; none without the device, or where it is a member or lets everybody in.
    pub(super) kvm_group: Option<String>,
    /// Where free subordinate ids begin; none where the user has some, or needs none.
    pub(super) sub_ids_first: Option<u32>,
    pub(super) systemctl: PathBuf,
}

impl Facts {
    pub(super) async fn gather(wanted: &Wanted) -> Result<Self> {
        let user = &wanted.user;
        let entry = getent("passwd", user).await?;
        let uid = entry.as_deref().and_then(|line| line.split(':').nth(2));
        let systemctl = ["/usr/bin/systemctl", "/bin/systemctl"]
            .map(PathBuf::from)
            .into_iter()
            .find(|path| path.exists());
        let systemctl = match (systemctl, wanted.mode) {
            (Some(path), _) => path,
            (None, HostMode::Service) => {
                return Err(CliError::usage("this host has no systemd")
                    .hint("start `kiln serve --with-worker` with what keeps services here"));
            }
            (None, _) => PathBuf::new(),
        };
        Ok(Self {
            user_exists: entry.is_some(),
            kvm_group: kvm_group(Path::new("/dev/kvm"), user).await?,
            sub_ids_first: sub_ids_first(user, uid),
            systemctl,
        })
    }
}

/// Whoever asked: the user behind sudo(8), else this process's own.
pub(super) async fn asking_user() -> Option<String> {
    if let Some(user) = crate::environment::var("SUDO_USER").filter(|user| !user.is_empty()) {
        return Some(user);
    }
    let uid = rustix::process::getuid().as_raw().to_string();
    let line = getent("passwd", &uid).await.ok()??;
    line.split(':').next().map(str::to_owned)
}

async fn kvm_group(device: &Path, user: &str) -> Result<Option<String>> {
    let Ok(meta) = fs::metadata(device) else {
        return Ok(None);
    };
    if !meta.file_type().is_char_device() || meta.mode() & 0o006 == 0o006 || user == "root" {
        return Ok(None);
    }
    let Some(line) = getent("group", &meta.gid().to_string()).await? else {
        return Ok(None);
    };
    let mut fields = line.split(':');
    let name = fields.next().unwrap_or_default();
    let members = fields.nth(2).unwrap_or_default();
    let joins =
        meta.mode() & 0o060 == 0o060 && name != "root" && !members.split(',').any(|m| m == user);
    Ok(joins.then(|| name.to_owned()))
}

fn sub_ids_first(user: &str, uid: Option<&str>) -> Option<u32> {
    if user == "root" {
        return None;
    }
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    free_sub_ids(&read("/etc/subuid"), &read("/etc/subgid"), user, uid)
}

/// subuid(5): `name-or-number:first:count`. None where the user has enough of both, or where all are taken.
pub(super) fn free_sub_ids(uids: &str, gids: &str, user: &str, uid: Option<&str>) -> Option<u32> {
    let ranges = |text: &str| -> Vec<(String, u32, u32)> {
        let parse = |line: &str| {
            let mut parts = line.trim().split(':');
            let owner = parts.next()?.to_owned();
            Some((
                owner,
                parts.next()?.parse().ok()?,
                parts.next()?.parse().ok()?,
            ))
        };
        text.lines().filter_map(parse).collect()
    };
    let (uids, gids) = (ranges(uids), ranges(gids));
    let has = |all: &[(String, u32, u32)]| {
        let its = |owner: &str| owner == user || Some(owner) == uid;
        all.iter()
            .any(|(owner, _, count)| its(owner) && *count >= SUB_IDS)
    };
    if has(&uids) && has(&gids) {
        return None;
    }
    let mut taken: Vec<(u32, u32)> = uids.iter().chain(&gids).map(|(_, f, c)| (*f, *c)).collect();
    taken.sort_unstable();
    let mut first = SUB_FIRST;
    for (begin, count) in taken {
        if begin.saturating_add(count) <= first || begin >= first.saturating_add(SUB_IDS) {
            continue;
        }
        first = begin.saturating_add(count);
    }
    (first <= SUB_LAST - SUB_IDS).then_some(first)
}

/// A line of a database of nsswitch(5), by name or number.
pub(super) async fn getent(database: &str, key: &str) -> Result<Option<String>> {
    let mut command = tokio::process::Command::new("getent");
    command
        .args([database, key])
        .env("PATH", super::apply::PATH)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = match tokio::time::timeout(ASK_MAX, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            return Err(CliError::infrastructure(&error).hint("install getent (package libc-bin)"));
        }
        Err(_elapsed) => {
            return Err(CliError::new(
                kiln_core::FailureClass::Infrastructure,
                format!("getent {database} {key} did not answer within {ASK_MAX:?}"),
            ));
        }
    };
    // 2: the key is not there (getent(1)).
    match output.status.code() {
        Some(0) => {
            let text = String::from_utf8_lossy(&output.stdout);
            Ok(text.lines().next().map(str::to_owned))
        }
        Some(2) => Ok(None),
        _ => Err(CliError::new(
            kiln_core::FailureClass::Infrastructure,
            format!("getent {database} {key}: {}", output.status),
        )),
    }
}
