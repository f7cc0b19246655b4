//! Which steps prepare a host: pure, so that what is printed is what is done.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::facts::Facts;
use crate::args::{HostArgs, HostMode};
use crate::error::{CliError, Result};

/// The service's unit.
pub(super) const UNIT: &str = "kiln.service";
/// First line of every file written here: one without it is somebody else's and stays.
pub(super) const MARK: &str = "# Written by `kiln setup host`.";
const UNIT_PATH: &str = "/etc/systemd/system/kiln.service";
const SUDOERS_PATH: &str = "/etc/sudoers.d/kiln";
/// What the unit hides from the service (`ProtectHome`, `PrivateTmp`).
const HIDDEN: [&str; 5] = ["/home", "/root", "/run/user", "/tmp", "/var/tmp"];
/// Ids that a user needs for a user namespace: subuid(5)'s usual grant.
pub(super) const SUB_IDS: u32 = 65_536;
/// Longest name of a user or group that useradd(8) takes.
const NAME_MAX: usize = 32;
/// Longest path, as sudoers(5) and unit files shall stay readable.
const PATH_MAX: usize = 200;

/// What was asked for, checked: nothing in it can end a line, a word or a quotation of a file that is written.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) mode: HostMode,
    pub(super) user: String,
    pub(super) state: PathBuf,
    pub(super) operators: String,
    /// This program, which the unit starts.
    pub(super) program: PathBuf,
}

impl Wanted {
    pub(super) fn of(args: &HostArgs, asking: Option<String>) -> Result<Self> {
        let user = match (args.mode, &args.user, asking) {
            (_, Some(user), _) => user.clone(),
            (HostMode::Service, None, _) => "kiln".to_owned(),
            (HostMode::User, None, Some(asking)) => asking,
            (HostMode::User, None, None) => {
                return Err(CliError::usage("whose kiln is it?").hint("name the user: --user NAME"));
            }
            (HostMode::Agent, None, _) => {
                return Err(CliError::usage("which user is the agent's?")
                    .hint("name it, for example --user buildkite-agent"));
            }
        };
        let program = std::env::current_exe()
            .and_then(|path| path.canonicalize())
            .map_err(|error| CliError::infrastructure(&error))?;
        let mut wanted = Self {
            mode: args.mode,
            user: account_name("user", &user)?,
            state: plain_path("--state", &args.state)?,
            operators: account_name("group", &args.operators)?,
            program,
        };
        if wanted.mode == HostMode::Service {
            wanted.program = plain_path("the path of this program", &wanted.program)?;
            if wanted.user == "root" {
                return Err(CliError::usage(
                    "a service needs no root: name another user",
                ));
            }
            if HIDDEN.iter().any(|dir| wanted.program.starts_with(dir)) {
                let at = wanted.program.display();
                return Err(CliError::usage(format!("a service does not see {at}"))
                    .hint("install it first: install -m 0755 kiln /usr/local/bin/"));
            }
        }
        if wanted.mode == HostMode::Agent {
            wanted.state = wanted.state.join(&wanted.user);
        }
        Ok(wanted)
    }
}

/// As useradd(8) takes it in Debian: a lower-case letter or underscore, then those, digits and dashes.
fn account_name(what: &str, name: &str) -> Result<String> {
    let mut bytes = name.bytes();
    let first = bytes
        .next()
        .is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
    let rest =
        bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'));
    if first && rest && name.len() <= NAME_MAX {
        return Ok(name.to_owned());
    }
    Err(CliError::usage(format!("{name:?} is no name of a {what}"))
        .hint("lower-case letters, digits, _ and -, at most 32, not beginning with a digit"))
}

/// An absolute path of letters, digits, `.`, `_` and `-`: it means itself in a shell, a unit and sudoers(5) alike.
fn plain_path(what: &str, path: &Path) -> Result<PathBuf> {
    let refuse =
        |why: &str| CliError::usage(format!("{what}: {:?} {why}", path.display().to_string()));
    let text = path.to_str().ok_or_else(|| refuse("is not UTF-8"))?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'.' | b'_' | b'-');
    if !text.starts_with('/') || text.len() < 2 {
        return Err(refuse("is not an absolute path of a folder"));
    }
    if text.len() > PATH_MAX || !text.bytes().all(plain) {
        return Err(refuse(
            "has other characters than letters, digits, . _ - /, or is too long",
        ));
    }
    let parts = text[1..].trim_end_matches('/').split('/');
    if parts
        .into_iter()
        .any(|part| matches!(part, "" | "." | ".."))
    {
        return Err(refuse("must not have empty parts, . or .."));
    }
    Ok(PathBuf::from(text.trim_end_matches('/')))
}

/// One thing that must be so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// A system group.
    Group(String),
    /// A system user with a group of its own name, without login.
    User { name: String, home: PathBuf },
    /// A user in a group.
    Member { user: String, group: String },
    /// Subordinate user and group ids, for bakes in a user namespace.
    SubIds { user: String, first: u32 },
    /// A folder.
    Folder {
        path: PathBuf,
        owner: String,
        mode: u32,
    },
    /// A file of root's.
    File {
        path: PathBuf,
        mode: u32,
        content: String,
        sudoers: bool,
    },
}

impl Step {
    /// In a few words.
    pub(super) fn what(&self) -> String {
        match self {
            Self::Group(name) => format!("group {name}"),
            Self::User { name, .. } => format!("system user {name}, without login"),
            Self::Member { user, group } => format!("{user} in group {group}"),
            Self::SubIds { user, first } => {
                format!("subordinate ids {first}-{} of {user}", first + SUB_IDS - 1)
            }
            Self::Folder { path, owner, mode } => {
                format!("folder {} of {owner}, mode {mode:04o}", path.display())
            }
            Self::File { path, mode, .. } => format!("file {}, mode {mode:04o}", path.display()),
        }
    }

    /// For `--json`.
    pub(super) fn told(&self, state: &str) -> Value {
        let mut told = match self {
            Self::Group(name) => json!({"step": "group", "name": name}),
            Self::User { name, home } => json!({"step": "user", "name": name, "home": home}),
            Self::Member { user, group } => json!({"step": "member", "user": user, "group": group}),
            Self::SubIds { user, first } => {
                json!({"step": "subordinate_ids", "user": user, "first": first, "count": SUB_IDS})
            }
            Self::Folder { path, owner, mode } => {
                json!({"step": "folder", "path": path, "owner": owner, "mode": format!("{mode:04o}")})
            }
            Self::File {
                path,
                mode,
                content,
                ..
            } => {
                json!({"step": "file", "path": path, "mode": format!("{mode:04o}"), "content": content})
            }
        };
        told["state"] = state.into();
        told
    }

    /// As a person with a shell would do it. Every word is plain, see [`Wanted`].
    fn shell(&self) -> String {
        match self {
            Self::Group(name) => {
                format!("getent group {name} >/dev/null || groupadd --system {name}")
            }
            Self::User { name, home } => format!(
                "getent passwd {name} >/dev/null || useradd --system --user-group --home-dir {} --no-create-home --shell /usr/sbin/nologin {name}",
                home.display()
            ),
            Self::Member { user, group } => format!("usermod --append --groups {group} {user}"),
            Self::SubIds { user, first } => {
                let last = first + SUB_IDS - 1;
                format!("usermod --add-subuids {first}-{last} --add-subgids {first}-{last} {user}")
            }
            Self::Folder { path, owner, mode } => {
                format!(
                    "install -d -o {owner} -g \"$(id -g {owner})\" -m {mode:04o} {}",
                    path.display()
                )
            }
            Self::File {
                path,
                mode,
                content,
                sudoers,
            } => {
                let (path, new) = (path.display(), new_name(path));
                let check = if *sudoers {
                    format!("visudo -cf {}\n", new.display())
                } else {
                    String::new()
                };
                format!(
                    "install -o root -g root -m {mode:04o} /dev/stdin {} <<'EOF'\n{content}EOF\n{check}mv {} {path}",
                    new.display(),
                    new.display()
                )
            }
        }
    }
}

/// Where a file is written before it takes effect. sudo and systemd read no name that begins with a dot.
pub(super) fn new_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// What must be so for this mode, in the order in which it is done.
pub(super) fn steps(wanted: &Wanted, facts: &Facts) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    if !facts.user_exists {
        if wanted.mode != HostMode::Service {
            return Err(CliError::usage(format!("there is no user {}", wanted.user))
                .hint("install the agent first, or name another user with --user"));
        }
        steps.push(Step::User {
            name: wanted.user.clone(),
            home: wanted.state.clone(),
        });
    }
    if wanted.mode == HostMode::User && wanted.user == "root" {
        return Ok(steps);
    }
    if let Some(group) = &facts.kvm_group {
        steps.push(Step::Member {
            user: wanted.user.clone(),
            group: group.clone(),
        });
    }
    if let Some(first) = facts.sub_ids_first {
        steps.push(Step::SubIds {
            user: wanted.user.clone(),
            first,
        });
    }
    if wanted.mode == HostMode::User {
        return Ok(steps);
    }
    if wanted.mode == HostMode::Agent
        && let Some(parent) = wanted.state.parent()
    {
        steps.push(Step::Folder {
            path: parent.to_owned(),
            owner: "root".to_owned(),
            mode: 0o755,
        });
    }
    steps.push(Step::Folder {
        path: wanted.state.clone(),
        owner: wanted.user.clone(),
        mode: 0o700,
    });
    if wanted.mode == HostMode::Service {
        steps.push(Step::Group(wanted.operators.clone()));
        steps.push(Step::File {
            path: UNIT_PATH.into(),
            mode: 0o644,
            content: unit(wanted),
            sudoers: false,
        });
        steps.push(Step::File {
            path: SUDOERS_PATH.into(),
            mode: 0o440,
            content: sudoers(wanted, &facts.systemctl),
            sudoers: true,
        });
    }
    Ok(steps)
}

fn unit(wanted: &Wanted) -> String {
    let (state, program, user) = (
        wanted.state.display(),
        wanted.program.display(),
        &wanted.user,
    );
    format!(
        "{MARK}
[Unit]
Description=kiln: builds and runs, each in a microVM of its own
Wants=network-online.target
After=network-online.target

[Service]
User={user}
Environment=KILN_HOME={state}
ExecStart={program} serve --with-worker
Restart=on-failure
# cgroups of machines are made below this one
Delegate=yes
LimitNOFILE=65536
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectHome=yes
ProtectSystem=strict
ReadWritePaths={state}
RestrictSUIDSGID=yes

[Install]
WantedBy=multi-user.target
"
    )
}

/// Each command whole, with its arguments: no pattern, no program that starts another one (`status` would open a pager).
fn sudoers(wanted: &Wanted, systemctl: &Path) -> String {
    let one = |verb: &str| format!("{} {verb} {UNIT}", systemctl.display());
    let verbs = ["start", "stop", "restart"].map(one).join(", ");
    format!(
        "{MARK}
# Members of {group} may start, stop and restart kiln's service: nothing else, and no other program.
Cmnd_Alias KILN_SERVICE = {verbs}
%{group} ALL=(root) NOPASSWD: KILN_SERVICE
",
        group = wanted.operators
    )
}

/// The steps as a script for sh.
pub(super) fn script(wanted: &Wanted, steps: &[Step]) -> String {
    let mode = format!("{:?}", wanted.mode).to_lowercase();
    let mut text = format!("# kiln setup host --mode {mode}, for {}\n", wanted.user);
    if steps.is_empty() {
        text.push_str("# nothing needs to be done\n");
    } else {
        text.push_str("set -eu\n");
    }
    for step in steps {
        let _infallible = write!(text, "# {}\n{}\n", step.what(), step.shell());
    }
    text.pop();
    text
}

#[cfg(test)]
mod tests;
