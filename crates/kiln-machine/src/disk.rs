//! Disk files: copy-on-write overlays, merging and flattening, by `qemu-img`.
//!
//! Formats are always explicit; a format is never guessed from bytes a guest wrote. What a disk is *for* is said
//! by `MachineSpec`; which disks make a cache head is the image room's business.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kiln_core::ByteSize;
use kiln_core::machine::DiskFormat;

/// Longest wait for one disk operation.
pub const DISK_TIMEOUT: Duration = Duration::from_secs(300);
/// Most bytes of `qemu-img`'s complaint that are kept.
const STDERR_BYTES_MAX: usize = 2048;

/// A disk operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The tool could not be started.
    #[error("could not start qemu-img")]
    Start(#[source] std::io::Error),
    /// The tool failed.
    #[error("qemu-img {action} of {path:?} failed: {stderr}")]
    Failed {
        /// What was done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Its words, bounded.
        stderr: String,
    },
    /// It took too long.
    #[error("qemu-img {action} of {path:?} did not finish within {DISK_TIMEOUT:?}")]
    Timeout {
        /// What was done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
    },
}

fn format_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

/// Makes an empty qcow2 disk of this virtual size.
///
/// # Errors
/// When `qemu-img` fails.
pub async fn create_blank(path: &Path, size: ByteSize) -> Result<(), DiskError> {
    let size = size.0.to_string();
    run(
        "create",
        path,
        &["create", "-q", "-f", "qcow2"],
        &[path.as_os_str(), size.as_ref()],
    )
    .await
}

/// Makes a qcow2 overlay of a disk; the backing file is named by its absolute path.
///
/// # Errors
/// When `qemu-img` fails.
pub async fn create_overlay(
    path: &Path,
    backing: &Path,
    format: DiskFormat,
) -> Result<(), DiskError> {
    let head = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        format_name(format),
        "-b",
    ];
    run(
        "create",
        path,
        &head,
        &[backing.as_os_str(), path.as_os_str()],
    )
    .await
}

/// Makes an overlay stand on `backing`, copying into it whatever lay in between.
///
/// # Errors
/// When `qemu-img` fails; the overlay must then be thrown away.
pub async fn rebase(overlay: &Path, backing: &Path, format: DiskFormat) -> Result<(), DiskError> {
    let head = [
        "rebase",
        "-q",
        "-f",
        "qcow2",
        "-F",
        format_name(format),
        "-b",
    ];
    run(
        "rebase",
        overlay,
        &head,
        &[backing.as_os_str(), overlay.as_os_str()],
    )
    .await
}

/// Writes another name of the backing file into an overlay, and nothing else: the name is not looked at, and no content is compared. A
/// relative name counts from the overlay's own folder, wherever that is when the overlay is opened.
///
/// # Errors
/// When `qemu-img` fails.
pub async fn name_backing(
    overlay: &Path,
    name: &Path,
    format: DiskFormat,
) -> Result<(), DiskError> {
    let head = [
        "rebase",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        format_name(format),
        "-b",
    ];
    run(
        "renaming of the backing file",
        overlay,
        &head,
        &[name.as_os_str(), overlay.as_os_str()],
    )
    .await
}

/// Copies a disk and everything below it into one qcow2 file without a backing file.
///
/// # Errors
/// When `qemu-img` fails.
pub async fn flatten(from: &Path, format: DiskFormat, to: &Path) -> Result<(), DiskError> {
    let head = ["convert", "-q", "-f", format_name(format), "-O", "qcow2"];
    run("convert", to, &head, &[from.as_os_str(), to.as_os_str()]).await
}

/// Checks the structure of a qcow2 file.
///
/// # Errors
/// When it is damaged.
pub async fn check(path: &Path) -> Result<(), DiskError> {
    run(
        "check",
        path,
        &["check", "-q", "-f", "qcow2"],
        &[path.as_os_str()],
    )
    .await
}

async fn run(
    action: &'static str,
    path: &Path,
    head: &[&str],
    tail: &[&std::ffi::OsStr],
) -> Result<(), DiskError> {
    let child = tokio::process::Command::new("qemu-img")
        .args(head)
        .args(tail)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(DiskError::Start)?;
    let output = tokio::time::timeout(DISK_TIMEOUT, child.wait_with_output())
        .await
        .map_err(|_| DiskError::Timeout {
            action,
            path: path.to_owned(),
        })?
        .map_err(DiskError::Start)?;
    if output.status.success() {
        return Ok(());
    }
    let end = output.stderr.len().min(STDERR_BYTES_MAX);
    let stderr = String::from_utf8_lossy(&output.stderr[..end])
        .trim()
        .to_owned();
    Err(DiskError::Failed {
        action,
        path: path.to_owned(),
        stderr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn overlays_merge_and_flatten() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = |name: &str| dir.path().join(name);
        create_blank(&path("base"), ByteSize::mib(8))
            .await
            .expect("create");
        create_overlay(&path("a"), &path("base"), DiskFormat::Qcow2)
            .await
            .expect("overlay");
        create_overlay(&path("b"), &path("a"), DiskFormat::Qcow2)
            .await
            .expect("overlay");
        rebase(&path("b"), &path("base"), DiskFormat::Qcow2)
            .await
            .expect("rebase");
        std::fs::remove_file(path("a")).expect("no longer needed");
        check(&path("b")).await.expect("sound");
        flatten(&path("b"), DiskFormat::Qcow2, &path("flat"))
            .await
            .expect("flatten");
        check(&path("flat")).await.expect("sound");
        std::fs::write(path("junk"), b"not a disk").expect("write");
        assert!(matches!(
            check(&path("junk")).await,
            Err(DiskError::Failed { .. })
        ));
    }
}
