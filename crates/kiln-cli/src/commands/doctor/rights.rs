//! Rights: the system, whose kiln this is, who else may look into its folders, and sudoers entries that give more than they say.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use kiln_machine::driver::Check;
use kiln_worker::home::Home;

use super::{fail, pass, warn};
use crate::show::ShownPath as _;

/// Most of a sudoers file that is read, and how many files.
const SUDOERS_MAX: u64 = 64 << 10;
const FILES_MAX: usize = 64;

pub(super) fn checks(home: &Home) -> Vec<Check> {
    let mut checks = vec![system(), folders(home)];
    checks.extend(sudoers(Path::new("/etc/sudoers.d")));
    checks
}

fn system() -> Check {
    let name = rustix::system::uname();
    let word = |word: &std::ffi::CStr| word.to_string_lossy().into_owned();
    let (system, release, machine) = (
        word(name.sysname()),
        word(name.release()),
        word(name.machine()),
    );
    let found = format!("{system} {release}, {machine}");
    if machine == "x86_64" {
        pass("os", found)
    } else {
        fail("os", found, "kiln's machine images are for x86-64 hosts")
    }
}

/// Secrets, keys and tenants' data lie there.
fn folders(home: &Home) -> Check {
    let name = "private-folders";
    let own = rustix::process::geteuid().as_raw();
    for dir in [&home.data, &home.cache, &home.config] {
        let Ok(meta) = fs::metadata(dir) else {
            continue;
        };
        if meta.uid() != own {
            return fail(
                name,
                format!("{} belongs to user {}", dir.shown(), meta.uid()),
                "run kiln as its owner, or set KILN_HOME to a folder of your own",
            );
        }
        if meta.mode() & 0o022 != 0 {
            return fail(
                name,
                format!(
                    "others may change {} (mode {:04o})",
                    dir.shown(),
                    meta.mode() & 0o7777
                ),
                format!("chmod go-w {}", dir.shown()),
            );
        }
    }
    pass(name, "nobody else may change what kiln keeps")
}

/// Only root may read them; a host whose kiln is no root's has no check here.
fn sudoers(dir: &Path) -> Option<Check> {
    let name = "sudoers";
    let mut files: Vec<_> = fs::read_dir(dir).ok()?.flatten().collect();
    files.sort_by_key(std::fs::DirEntry::file_name);
    for entry in files.into_iter().take(FILES_MAX) {
        let mut text = String::new();
        let read = fs::File::open(entry.path())
            .and_then(|file| file.take(SUDOERS_MAX).read_to_string(&mut text));
        if read.is_err() {
            continue;
        }
        if let Some(line) = gives_shell(&text) {
            return Some(warn(
                name,
                format!("{} gives a shell: {line}", entry.path().shown()),
                "name each command with its arguments; kiln itself needs no such line (`kiln setup host --print`)",
            ));
        }
    }
    Some(pass(name, "no entry gives a shell by a pattern"))
}

/// A line that lets a shell, or a program of network set-up, take any argument: root for whoever may use it.
fn gives_shell(text: &str) -> Option<&str> {
    const PROGRAMS: [&str; 10] = [
        "/sh ",
        "/bash ",
        "/dash ",
        "/env ",
        "/ip ",
        "/iptables ",
        "/nft ",
        "/nsenter ",
        "/mount ",
        "/systemctl ",
    ];
    text.lines().map(str::trim).find(|line| {
        !line.starts_with('#')
            && line.split(',').any(|command| {
                command.contains('*') && PROGRAMS.iter().any(|program| command.contains(program))
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_that_give_a_shell_are_seen() {
        let seed = "Cmnd_Alias NET = /usr/sbin/ip *, /usr/sbin/sysctl -w net.ipv4.ip_forward=1\n";
        assert!(gives_shell(seed).is_some());
        assert!(gives_shell("Cmnd_Alias BATCH = /bin/true, /bin/sh -c *\n").is_some());
        let own = "Cmnd_Alias KILN_SERVICE = /usr/bin/systemctl start kiln.service, /usr/bin/systemctl stop kiln.service\n";
        assert_eq!(gives_shell(own), None);
        assert_eq!(
            gives_shell("# /bin/sh -c *\nada ALL=(root) NOPASSWD: /usr/sbin/ip link show\n"),
            None
        );
    }

    #[test]
    fn files_are_read_in_order_and_bounded() {
        let dir = tempfile::tempdir().expect("dir");
        assert_eq!(
            sudoers(&dir.path().join("none")).map(|check| check.level),
            None
        );
        let level = || sudoers(dir.path()).expect("a check").level;
        fs::write(dir.path().join("a"), "ada ALL=(root) /bin/sh -c *\n").expect("write");
        assert_eq!(level(), kiln_machine::driver::CheckLevel::Warn);
        fs::write(dir.path().join("a"), [0xff, 0xfe]).expect("write");
        assert_eq!(level(), kiln_machine::driver::CheckLevel::Pass);
    }
}
