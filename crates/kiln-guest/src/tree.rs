//! Trees and files that move between the host and the machine.
//!
//! The host names a [`Place`], never a path. Tar streams are read and written on blocking threads; `extract` keeps
//! what they hold inside the place, `pack` sends what is there. Read next: `tree/walk.rs` (how a path stays inside).

mod bridge;
mod extract;
mod pack;
mod reader;
mod walk;

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiln_proto::msg::{GetTree, GuestError, GuestErrorCode, Place, PutFile, PutTree, TreeReport};
use kiln_proto::mux::CODE_FIRST_FREE;
use kiln_proto::stream::Stream;
use rustix::fs::{Mode, OFlags};
use tokio::io::AsyncReadExt;

use crate::error::{Context, SysError, failure, invalid};
use crate::serve::answer;
use crate::state::Guest;

use extract::{Content, Rules};

/// Where secrets lie: a tmpfs, readable for root alone.
pub(crate) const SECRETS: &str = "/run/kiln/secrets";
/// Where commands look for them.
pub(crate) const SECRETS_INSIDE: &str = "/run/secrets";
/// Certificates for programs in the machine: those of the root disk and the operator's.
pub(crate) const CA_BUNDLE: &str = "/run/kiln/ca/bundle.pem";
/// The operator's certificates alone; there only when the operator gave some.
pub(crate) const CA_OPERATOR: &str = "/run/kiln/ca/operator.pem";
/// The root disk's own certificates.
const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Where trees go when no disk is mounted.
const ON_TMPFS: &str = "/run/kiln";
/// Where trees go on the scratch disk.
const ON_SCRATCH: &str = "/scratch";
/// Where trees go on the state disk. Removed before the disk is unmounted.
pub(crate) const ON_STATE: &str = "/var/lib/buildkit/.kiln";
/// Longest name of a context.
const NAME_MAX: usize = 64;
/// Longest id of a secret.
const SECRET_ID_MAX: usize = 128;
/// Most bytes of one file.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Reset code: a tree cannot be sent; the reason says why.
const RESET_TREE: u16 = CODE_FIRST_FREE + 1;

fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(plain)
}

pub(crate) fn is_secret_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=SECRET_ID_MAX).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(plain)
}

/// Directory of a tree, and what may be in it.
async fn directory(guest: &Guest, place: &Place) -> Result<(PathBuf, Content), GuestError> {
    let named = |kind: &str, name: &str, base: &str| {
        if is_name(name) {
            Ok((Path::new(base).join(kind).join(name), Content::Plain))
        } else {
            Err(invalid("a name has lower-case letters, digits and hyphens"))
        }
    };
    let mounts = guest.mounts.lock().await;
    let base = if mounts.is_mounted(ON_SCRATCH) {
        ON_SCRATCH
    } else if mounts.is_mounted(crate::mounts::STATE) {
        ON_STATE
    } else {
        ON_TMPFS
    };
    match place {
        Place::Context { name } => named("ctx", name, base),
        Place::Dockerfile { name } => named("dockerfile", name, base),
        Place::Work => Ok((PathBuf::from("/work"), Content::Plain)),
        Place::ImageLayer { .. } if mounts.is_writable(crate::mounts::IMAGE) => {
            Ok((PathBuf::from("/image/rootfs"), Content::Layer))
        }
        Place::ImageLayer { .. } if mounts.is_mounted(ON_SCRATCH) => {
            Ok((PathBuf::from("/scratch/image/rootfs"), Content::Layer))
        }
        Place::ImageLayer { .. } => Err(invalid("no disk is mounted for an image")),
        Place::Secret { .. } | Place::CaBundle => {
            Err(invalid("this place takes a file, not a tree"))
        }
    }
}

/// Makes the directory; a named one afresh.
fn make(place: &Place, path: &Path) -> Result<(), SysError> {
    let what = || format!("make {}", path.display());
    if matches!(place, Place::Context { .. } | Place::Dockerfile { .. }) {
        remove(path)?;
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .context(what)
}

fn remove(path: &Path) -> Result<(), SysError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.context(|| format!("remove {}", path.display())),
    }
}

/// Serves a tree that comes as a tar stream.
pub(crate) async fn put_tree(guest: Arc<Guest>, order: PutTree, stream: Stream) {
    let (reader, writer) = tokio::io::split(stream);
    let result = receive(&guest, &order, reader).await;
    answer(writer, &result).await;
}

async fn receive(
    guest: &Guest,
    order: &PutTree,
    reader: tokio::io::ReadHalf<Stream>,
) -> Result<TreeReport, GuestError> {
    let (path, content) = directory(guest, &order.place).await?;
    let rules = Rules {
        content,
        bytes_max: order.bytes_max,
        entries_max: order.entries_max,
    };
    let (source, pump) = bridge::reader(reader);
    let (place, at) = (order.place.clone(), path.clone());
    let work = tokio::task::spawn_blocking(move || {
        make(&place, &at)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&at, flags, Mode::empty());
        extract::extract(
            source,
            root.context(|| format!("open {}", at.display()))?,
            rules,
        )
    });
    let (done, ()) = tokio::join!(work, pump);
    let counts = done.map_err(|error| invalid(error.to_string()))??;
    let path = path.display().to_string();
    Ok(TreeReport {
        path,
        entries: counts.entries,
        bytes: counts.bytes,
    })
}

/// Serves a tree that the host wants.
pub(crate) async fn get_tree(order: GetTree, stream: Stream) {
    let (sink, mut chunks) = bridge::writer();
    let work = tokio::task::spawn_blocking(move || pack::pack(&order, sink));
    let mut stream = stream;
    let sent = bridge::drain(&mut chunks, &mut stream).await;
    drop(chunks);
    let packed = work.await.map_err(|error| invalid(error.to_string()));
    match packed {
        Ok(Ok(())) if sent.is_ok() => {
            let _host_gone = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
        }
        Ok(Ok(())) => {}
        Ok(Err(error)) | Err(error) => {
            let reason = serde_json::to_string(&error).unwrap_or_default();
            stream.reset(
                RESET_TREE,
                if reason.len() > 250 {
                    &error.message
                } else {
                    &reason
                },
            );
        }
    }
}

/// Removes a tree.
pub(crate) async fn remove_tree(guest: &Guest, place: &Place) -> Result<(), GuestError> {
    let (path, _) = directory(guest, place).await?;
    let work = tokio::task::spawn_blocking(move || {
        if path == Path::new("/work") {
            empty(&path)
        } else {
            remove(&path)
        }
    });
    work.await.map_err(|error| invalid(error.to_string()))??;
    Ok(())
}

/// Removes what is in a directory that itself must stay.
fn empty(path: &Path) -> Result<(), SysError> {
    let what = || format!("empty {}", path.display());
    for entry in fs::read_dir(path).context(what)? {
        let entry = entry.context(what)?;
        let is_directory = entry.file_type().context(what)?.is_dir();
        if is_directory {
            fs::remove_dir_all(entry.path())
        } else {
            fs::remove_file(entry.path())
        }
        .context(what)?;
    }
    Ok(())
}

/// Serves one file.
pub(crate) async fn put_file(guest: Arc<Guest>, order: PutFile, stream: Stream) {
    let (reader, writer) = tokio::io::split(stream);
    let result = receive_file(&guest, &order, reader).await;
    answer(writer, &result).await;
}

async fn receive_file(
    guest: &Guest,
    order: &PutFile,
    reader: tokio::io::ReadHalf<Stream>,
) -> Result<TreeReport, GuestError> {
    let bytes_max = order.bytes_max.min(FILE_BYTES_MAX);
    let mut bytes = Vec::new();
    let read = reader.take(bytes_max + 1).read_to_end(&mut bytes).await;
    read.context(|| "receive a file".to_owned())?;
    if bytes.len() as u64 > bytes_max {
        let message = format!("a file of more than {bytes_max} bytes");
        return Err(failure(GuestErrorCode::LimitExceeded, message));
    }
    let path = match &order.place {
        Place::Secret { id } if is_secret_id(id) => {
            guest.secret_issued.store(true, Ordering::Relaxed);
            let path = Path::new(SECRETS).join(id);
            write_file(&path, 0o700, 0o400, &bytes)?;
            // Where steps of builds and containers find theirs too. A root disk may have its own: then only the path it is told stands.
            let _there_already = std::os::unix::fs::symlink(SECRETS, SECRETS_INSIDE);
            path
        }
        Place::Secret { .. } => {
            return Err(invalid("the id of a secret has letters, digits, - _ ."));
        }
        Place::CaBundle => ca_bundle(&bytes)?,
        _ => return Err(invalid("this place takes a tree, not a file")),
    };
    let entries = u64::from(!bytes.is_empty());
    Ok(TreeReport {
        path: path.display().to_string(),
        entries,
        bytes: bytes.len() as u64,
    })
}

fn ca_bundle(operator: &[u8]) -> Result<PathBuf, SysError> {
    let path = PathBuf::from(CA_BUNDLE);
    // Programs take one bundle in place of the system's: it must hold both.
    let mut bundle = fs::read(SYSTEM_CA).unwrap_or_default();
    if !bundle.is_empty() && !bundle.ends_with(b"\n") {
        bundle.push(b'\n');
    }
    bundle.extend_from_slice(operator);
    write_file(&path, 0o755, 0o444, &bundle)?;
    if operator.is_empty() {
        let _none_before = fs::remove_file(CA_OPERATOR);
    } else {
        write_file(Path::new(CA_OPERATOR), 0o755, 0o444, operator)?;
    }
    Ok(path)
}

/// Makes sure that there is a bundle for programs that are started before the operator's arrives.
pub(crate) fn ensure_ca_bundle() -> Result<(), SysError> {
    if !Path::new(CA_BUNDLE).exists() {
        ca_bundle(&[])?;
    }
    Ok(())
}

/// Writes a file as a whole: it is there with its content and mode, or not at all.
pub(crate) fn write_file(
    path: &Path,
    dir_mode: u32,
    mode: u32,
    bytes: &[u8],
) -> Result<(), SysError> {
    let what = || format!("write {}", path.display());
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(dir_mode)
            .create(parent)
            .context(what)?;
    }
    let fresh = path.with_added_extension("kiln-new");
    let _none_before = fs::remove_file(&fresh);
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh);
    let written = written.and_then(|mut file| {
        file.write_all(bytes)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        fs::rename(&fresh, path)
    });
    written.context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_are_never_paths() {
        assert!(is_name("build-1") && is_secret_id("npm_TOKEN.v2"));
        for bad in ["", "..", "a/b", "A", "a b", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "a\0b", &"x".repeat(129)] {
            assert!(!is_secret_id(bad), "{bad}");
        }
    }

    #[test]
    fn a_file_is_replaced_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/secret");
        for text in ["one", "two"] {
            write_file(&path, 0o700, 0o400, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o400
        );
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
