//! `kiln cp`: files into and out of a kept machine.

use std::path::{Path, PathBuf};

use kiln_core::FailureClass;
use kiln_worker::kept::ask::{Ask, ExecAsk, Reply};
use kiln_worker::kept::client;
use kiln_worker::kept::copy::{Copied, CopyError, TAKE_IN, Target, give, place, take_out};
use kiln_worker::orders::ExecIo;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::io::SyncIoBridge;
use tokio_util::sync::CancellationToken;

use super::{Machine, ask, refused, surprised};
use crate::args::{CpArgs, ServerArgs};
use crate::commands::landing::{enter, folder_of, look_at};
use crate::commands::table::counted;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::{Screen, ShownPath as _};

/// Bytes on their way into a machine.
const ON_THE_WAY: usize = 256 * 1024;
/// Most bytes of what the machine says about a copy that failed.
const SAID_MAX: usize = 2000;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    There { id: String, path: String },
}

/// `ID:PATH`, unless a slash comes before the colon.
fn side(word: &str) -> Side {
    match word.split_once(':') {
        Some((id, path)) if !id.is_empty() && !id.contains('/') => Side::There {
            id: id.to_owned(),
            path: format!("/{}", path.trim_start_matches('/')),
        },
        _ => Side::Here(word.into()),
    }
}

pub(in crate::commands) async fn run(
    args: CpArgs,
    said: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let copy = async {
        match (side(&args.source), side(&args.dest)) {
            (Side::There { id, path }, Side::Here(dest)) => {
                let target = target(&dest, name_of(&path))?;
                let machine = Machine::named(said, &id).await?;
                out(&machine, (&args.source, &path), target, screen).await
            }
            (Side::Here(source), Side::There { id, path }) => {
                let machine = Machine::named(said, &id).await?;
                into(&machine, &source, &path, &cancel).await?;
                if screen.json() {
                    screen.data(&json!({ "id": machine.id(), "path": path }), String::new);
                }
                Ok(())
            }
            _ => Err(
                CliError::usage("one side of a copy is a machine's, the other this host's").hint(
                    "kiln cp ID:PATH DEST, or kiln cp SOURCE ID:PATH; ./a:b is a file of this host",
                ),
            ),
        }
    };
    tokio::select! {
        done = copy => done.map(|()| 0),
        () = cancel.cancelled() => Err(CliError::new(FailureClass::Cancelled, "cancelled")),
    }
}

fn failed(error: &CopyError) -> CliError {
    let class = match error {
        CopyError::Place { .. } | CopyError::Machine(_) => FailureClass::Usage,
        CopyError::Refused(_) => FailureClass::GuestFault,
        CopyError::Io { .. } => FailureClass::Infrastructure,
    };
    CliError::new(class, chain(error))
}

/// The last name of a path in a machine.
fn name_of(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    path.rsplit('/').next().unwrap_or_default()
}

/// Where a copy called `name` goes on this host. Only what the user vouches for may be links on the way there, and no device gives way to a file.
fn target(dest: &Path, name: &str) -> Result<Target> {
    let path = place(dest, name).map_err(|error| failed(&error))?;
    let entered = enter(folder_of(&path)).and_then(|folder| look_at(&path).map(|()| folder));
    let folder = entered.map_err(|error| error.told(&path))?;
    Ok(Target { folder, path })
}

/// Why a copy failed, with paths as the user knows them: files of a container lie below a folder of the machine's own.
async fn explained(machine: &Machine, (typed, path): (&str, &str), error: &CopyError) -> CliError {
    let CopyError::Machine(why) = error else {
        return failed(error);
    };
    let root = match ask(machine.reach(), &Ask::Show).await {
        Ok(Reply::Shown(status)) => status.root,
        // It ended, perhaps: what it said is told all the same.
        _ => String::new(),
    };
    let folder = folder_of(Path::new(path)).shown();
    CliError::usage(format!(
        "{typed}: the machine does not give it: {}",
        without_root(why, &root)
    ))
    .hint(format!(
        "`kiln exec {} -- ls -la {folder}` shows what is there",
        machine.id()
    ))
}

/// What a machine says, without the folder that its files lie below.
fn without_root(said: &str, root: &str) -> String {
    match root {
        "" => said.to_owned(),
        root => said.replace(root, ""),
    }
}

async fn out(
    machine: &Machine,
    (typed, path): (&str, &str),
    target: Target,
    screen: Screen,
) -> Result<()> {
    // Only a folder has a `.` in it: what is none is asked for once more, as the file it may be.
    let folder = format!("{}/.", path.trim_end_matches('/'));
    let mut reader = client::tree(machine.reach(), &folder)
        .await
        .map_err(refused)?;
    let mut file = None;
    if reader.begin().await.is_err() {
        reader = client::tree(machine.reach(), path).await.map_err(refused)?;
        if let Err(error) = reader.begin().await {
            let error = CopyError::Machine(error.to_string());
            return Err(explained(machine, (typed, path), &error).await);
        }
        file = Some(name_of(path).to_owned());
    }
    let work = tokio::task::spawn_blocking(move || take_out(reader, &target, file.as_deref()));
    let copied = match work.await.or_infrastructure()? {
        Ok(copied) => copied,
        Err(error) => return Err(explained(machine, (typed, path), &error).await),
    };
    let Copied {
        path,
        entries,
        bytes,
        links_left_out,
    } = copied;
    if links_left_out > 0 {
        let links = counted(links_left_out, "link");
        screen.note(&format!(
            "left out: {links} that lead out of the copy, or nowhere in it"
        ));
    }
    let told = json!({ "path": path, "entries": entries, "bytes": bytes, "links_left_out": links_left_out });
    screen.data(&told, || path.shown());
    Ok(())
}

async fn into(
    machine: &Machine,
    source: &Path,
    path: &str,
    cancel: &CancellationToken,
) -> Result<()> {
    // Read before anything is made in the machine.
    let real = source
        .canonicalize()
        .map_err(|error| CliError::usage(format!("{}: {error}", source.shown())))?;
    let name = real
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let name = name.ok_or_else(|| CliError::usage("the root of this host is no source"))?;
    let Reply::Shown(status) = ask(machine.reach(), &Ask::Show).await? else {
        return Err(surprised());
    };
    let words = [
        "/bin/sh",
        "-c",
        TAKE_IN,
        "kiln-cp",
        &status.root,
        path,
        &name,
    ];
    let command = ExecAsk {
        argv: words.map(str::to_owned).to_vec(),
        stdin: true,
        in_machine: true,
        ..ExecAsk::default()
    };
    let (to, from) = tokio::io::duplex(ON_THE_WAY);
    let giving = tokio::task::spawn_blocking(move || give(&real, SyncIoBridge::new(to)));
    let (output, mut said) = mpsc::channel::<(u8, Vec<u8>)>(16);
    let (_nobody, control) = mpsc::channel(1);
    let io = ExecIo {
        stdin: Some(Box::new(from)),
        output,
        control,
    };
    let words = async {
        let mut words = Vec::new();
        while let Some((_, bytes)) = said.recv().await {
            let room = SAID_MAX - words.len().min(SAID_MAX);
            words.extend(bytes.into_iter().take(room));
        }
        String::from_utf8_lossy(&words).trim().to_owned()
    };
    let exec = client::exec(machine.reach(), command, io, cancel);
    let (exit, words) = tokio::join!(exec, words);
    let given = giving.await.or_infrastructure()?;
    match exit.map_err(refused)? {
        Some(exit) if exit.code == Some(0) => given.map_err(|error| failed(&error)),
        Some(_) => {
            // A source that could not be read broke off what the machine was given.
            if let Err(error @ CopyError::Place { .. }) = given {
                return Err(failed(&error));
            }
            Err(CliError::new(
                FailureClass::Usage,
                format!("the machine did not take it: {words}"),
            ))
        }
        None => Err(CliError::new(FailureClass::Cancelled, "cancelled")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_any_slash_names_a_machine() {
        let there = |id: &str, path: &str| Side::There {
            id: id.to_owned(),
            path: path.to_owned(),
        };
        assert_eq!(side("r1:/a/b"), there("r1", "/a/b"));
        assert_eq!(side("r1:a:b"), there("r1", "/a:b"));
        assert_eq!(side("r1:"), there("r1", "/"));
        for here in ["./r1:/a", "a/b", "/x:y", ":x", "."] {
            assert_eq!(side(here), Side::Here(here.into()), "{here}");
        }
        assert_eq!(
            (name_of("/a/b/"), name_of("/"), name_of("/x")),
            ("b", "", "x")
        );
    }

    #[test]
    fn a_copy_goes_through_no_link_and_over_no_device() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("real")).expect("folder");
        std::fs::write(at("file"), "").expect("write");
        for (to, name) in [("real", "link"), ("file", "to-file")] {
            std::os::unix::fs::symlink(to, at(name)).expect("link");
        }
        for (dest, goes) in [
            ("real", "real/x"),
            ("real/y", "real/y"),
            ("new", "new"),
            // Replaced by the copy, not followed.
            ("to-file", "to-file"),
        ] {
            assert_eq!(target(&at(dest), "x").expect(dest).path, at(goes));
        }
        for bad in ["link", "link/", "link/y"] {
            let error = target(&at(bad), "x").expect_err(bad);
            assert_eq!((error.exit_code(), error.hints.len()), (2, 1), "{bad}");
            assert!(
                error.message.contains("link is a link or no folder"),
                "{error}"
            );
        }
        let error = target(Path::new("/dev/null"), "x").expect_err("a device");
        assert!(error.message.contains("/dev/null is a device"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn what_a_machine_says_names_paths_as_its_user_does() {
        let said = "could not open /run/m/rootfs/none: No such file or directory";
        assert_eq!(
            without_root(said, "/run/m/rootfs"),
            "could not open /none: No such file or directory"
        );
        assert_eq!(without_root(said, ""), said);
    }
}
