//! PID 1 of a container: starts its command, passes signals on, reaps orphans, and ends as the command ended.
//!
//! Without it the command itself would be PID 1, for which the kernel drops every signal that has no handler
//! (pid_namespaces(7)): what is killed by one would seem to succeed. The guest's own binary, called as [`NAME`], is put
//! read-only into every container, on its `/dev`, a tmpfs that is in no layer. It holds nothing that the command has not:
//! the same user, capabilities and bounds.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use serde_json::{Value, json};

use crate::error::{Context, SysError};
use crate::log;
use crate::reaper::Ended;

/// The name under which this program is a container's PID 1.
pub(crate) const NAME: &str = "kiln-init";
/// Its copy in the machine: the guest itself lies in the initial RAM disk, which is out of sight.
const PATH: &str = "/run/kiln/kiln-init";
/// Where containers have it.
const INSIDE: &str = "/dev/kiln-init";
/// Exit code for a command that is there and cannot be run, as shells have it.
const NOT_EXECUTABLE: u8 = 126;
/// Exit code for a command that does not exist.
const NOT_FOUND: u8 = 127;
/// What a signal's number is added to.
const SIGNAL_BASE: i32 = 128;

/// Puts the program where containers can be given it; `number` is of this call alone.
pub(crate) fn place(number: u64) -> Result<(), SysError> {
    if Path::new(PATH).exists() {
        return Ok(());
    }
    let what = || format!("put {PATH} in place");
    let new = format!("{PATH}.{number}");
    fs::copy("/proc/self/exe", &new).context(what)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).context(what)?;
    fs::rename(&new, PATH).context(what)
}

/// Makes it the process of a container (OCI runtime specification, `config.md`).
pub(crate) fn add(config: &mut Value) {
    if let Some(mounts) = config.get_mut("mounts").and_then(Value::as_array_mut) {
        mounts.push(json!({
            "destination": INSIDE, "type": "bind", "source": PATH,
            "options": ["bind", "ro", "nosuid", "nodev"],
        }));
    }
    let args = config.pointer_mut("/process/args");
    if let Some(args) = args.and_then(Value::as_array_mut) {
        args.insert(0, json!(INSIDE));
    }
}

/// The words of the command that it starts in such a container.
pub(crate) fn command(config: &Value) -> Option<Vec<&str>> {
    let args = config.pointer("/process/args")?.as_array()?;
    let words: Vec<&str> = args.iter().filter_map(Value::as_str).collect();
    let (first, rest) = words.split_first()?;
    (*first == INSIDE && !rest.is_empty()).then(|| rest.to_vec())
}

/// `kiln-init COMMAND [WORD...]`.
pub(crate) fn main(arguments: &[OsString]) -> ExitCode {
    let [program, words @ ..] = arguments else {
        log::raw("kiln: kiln-init takes a command");
        return ExitCode::from(crate::USAGE);
    };
    let all = block_signals();
    let terminal = leave_terminal();
    let mut command = Command::new(program);
    command.args(words);
    on_its_own(&mut command, terminal);
    let child = command
        .spawn()
        .and_then(|child| i32::try_from(child.id()).map_err(io::Error::other));
    match child {
        Ok(child) => ExitCode::from(exit_code(serve(child, &all))),
        Err(error) => {
            log::raw(&format!("kiln: run {program:?}: {error}"));
            ExitCode::from(match error.kind() {
                io::ErrorKind::NotFound => NOT_FOUND,
                _ => NOT_EXECUTABLE,
            })
        }
    }
}

fn exit_code(ended: Ended) -> u8 {
    let code = match ended {
        Ended::Code(code) => code & 0xff,
        Ended::Signal(signal) => SIGNAL_BASE + (signal & 0x7f),
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// From now on signals wait until they are asked for; also those that PID 1 would never see.
#[expect(unsafe_code, reason = "rustix has no signal masks")]
fn block_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::uninit();
    // SAFETY: sigfillset initialises the set that it is given; the pointers are to locals.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        let all = all.assume_init();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        all
    }
}

/// Lets go of the terminal, if there is one, so that the command's session can have it.
#[expect(unsafe_code, reason = "rustix has neither this ioctl nor sigtimedwait")]
fn leave_terminal() -> bool {
    // SAFETY: plain system call; then pointers to locals that were initialised.
    unsafe {
        if libc::ioctl(0, libc::TIOCNOTTY) != 0 {
            return false;
        }
        // The kernel tells the terminal's processes, so far this one alone: that is not for the command.
        let mut own = MaybeUninit::uninit();
        libc::sigemptyset(own.as_mut_ptr());
        let mut own = own.assume_init();
        libc::sigaddset(&raw mut own, libc::SIGHUP);
        libc::sigaddset(&raw mut own, libc::SIGCONT);
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        while libc::sigtimedwait(&raw const own, std::ptr::null_mut(), &raw const now) > 0 {}
    }
    true
}

/// The command leads a session, and has the terminal, as one that runs in the machine itself does.
#[expect(unsafe_code, reason = "system calls between fork and exec")]
fn on_its_own(command: &mut Command, terminal: bool) {
    let enter = move || {
        let done = |result: libc::c_int| match result {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        let mut none = MaybeUninit::uninit();
        // SAFETY: system calls on numbers and on a local that sigemptyset initialises.
        unsafe {
            done(libc::setsid())?;
            if terminal {
                done(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            libc::sigemptyset(none.as_mut_ptr());
            done(libc::sigprocmask(
                libc::SIG_SETMASK,
                none.as_ptr(),
                std::ptr::null_mut(),
            ))
        }
    };
    // SAFETY: `enter` makes system calls only, on values that were copied before the fork.
    unsafe { command.pre_exec(enter) };
}

/// Passes signals on and reaps, until the command has ended. What it leaves behind the kernel ends with this process.
#[expect(
    unsafe_code,
    reason = "rustix waits for no signals, and refuses real-time ones"
)]
fn serve(child: i32, all: &libc::sigset_t) -> Ended {
    loop {
        loop {
            let mut status = 0;
            // SAFETY: the pointer is to a local that outlives the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            match Ended::from_status(status) {
                _ if pid <= 0 => break,
                Some(ended) if pid == child => return ended,
                _ => {}
            }
        }
        // SAFETY: the set was initialised; nothing is asked about the signal but its number.
        let signal = unsafe { libc::sigwaitinfo(all, std::ptr::null_mut()) };
        if signal > 0 && signal != libc::SIGCHLD {
            // SAFETY: plain system call without pointers. The child leads this group, and was not reaped.
            let _gone = unsafe { libc::kill(-child, signal) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_process_is_the_init_and_its_command_is_found_again() {
        let mut config = json!({ "process": { "args": ["npm", "test"] }, "mounts": [] });
        assert_eq!(command(&config), None, "not by itself");
        add(&mut config);
        assert_eq!(
            config["process"]["args"],
            json!(["/dev/kiln-init", "npm", "test"])
        );
        assert_eq!(config["mounts"][0]["destination"], INSIDE);
        assert_eq!(command(&config), Some(vec!["npm", "test"]));
        assert_eq!(command(&json!({ "process": { "args": [INSIDE] } })), None);
    }

    #[test]
    fn an_end_is_told_as_shells_tell_it() {
        assert_eq!(exit_code(Ended::Code(0)), 0);
        assert_eq!(exit_code(Ended::Code(3)), 3);
        assert_eq!(exit_code(Ended::Signal(libc::SIGKILL)), 137);
        assert_eq!(exit_code(Ended::Signal(libc::SIGSEGV)), 139);
    }
}
