//! Makes the root disk: a raw, read-only ext4 filesystem from a normalised tar.
//!
//! No journal (nothing to replay, so it mounts read-only from a read-only disk), no metadata checksums (the
//! host checks the file's digest), fixed identifiers. Not bit-identical between runs all the same:
//! nothing is ever named after its digest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{Program, RunContext, RunError};
use super::stage::as_root;
use super::tree::{MTIME, Tree};

/// How long unpacking and making the filesystem may take.
const DEADLINE: Duration = Duration::from_secs(300);
/// Room besides the contents: superblocks, bitmaps, directory blocks that grow.
const SLACK_BYTES: u64 = 8 << 20;
/// Bytes of one inode.
const INODE_BYTES: u64 = 256;
/// Identifier of every root filesystem we make.
const UUID: &str = "6b696c6e-726f-4f74-8000-000000000001";

/// Every feature by name, so that no default of the host's mke2fs.conf decides.
const FEATURES: &str = "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super";

/// Why the disk was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A program failed.
    #[error("cannot make the root disk{}", hint())]
    Run(#[source] RunError),
    /// A file operation failed.
    #[error("cannot write {}", .path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn hint() -> &'static str {
    if rustix::process::geteuid().is_root() {
        ""
    } else {
        " (as an ordinary user this needs user namespaces and a range of ids in /etc/subuid and /etc/subgid)"
    }
}

/// Makes `<work>/root.img` from a normalised tar of `tree`.
///
/// # Errors
/// See [`DiskError`].
pub fn make_disk(
    tree: &Tree,
    tar: &Path,
    work: &Path,
    context: &RunContext<'_>,
) -> Result<PathBuf, DiskError> {
    let image = work.join("root.img");
    let inodes = tree.len() as u64 + 64;
    let bytes = tree.block_bytes() * 102 / 100 + inodes * INODE_BYTES + SLACK_BYTES;
    let file =
        fs::File::create(&image).and_then(|file| file.set_len(bytes.next_multiple_of(1 << 20)));
    file.map_err(|source| DiskError::Io {
        path: image.clone(),
        source,
    })?;
    // One shell, so that both steps share one user namespace and the tree is gone when it ends.
    let script = "set -eu; mkdir \"$1\"; trap 'rm -rf \"$1\"' EXIT; \
                  tar --extract --file \"$2\" --directory \"$1\" --numeric-owner --same-owner --preserve-permissions; \
                  chmod 755 \"$1\"; \
                  mkfs.ext4 -q -F -d \"$1\" -L kiln-root -U \"$4\" -E hash_seed=\"$4\",nodiscard,root_owner=0:0 \
                  -b 4096 -I 256 -N \"$5\" -m 0 -O \"$6\" \"$3\"";
    let tree_path = work.join("tree");
    as_root("sh", DEADLINE)
        .args(["-c", script, "sh"])
        .args([tree_path.as_path(), tar, &image])
        .args([UUID, &inodes.to_string(), FEATURES])
        .env("SOURCE_DATE_EPOCH", MTIME.to_string())
        .env("E2FSPROGS_FAKE_TIME", MTIME.to_string())
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .run(context)
        .map_err(DiskError::Run)?;
    Program::new("e2fsck", DEADLINE)
        .args(["-f", "-n"])
        .arg(&image)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .run(context)
        .map_err(DiskError::Run)?;
    Ok(image)
}
