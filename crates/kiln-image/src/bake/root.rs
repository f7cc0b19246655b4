//! Makes a Debian root tree as a tar with `mmdebstrap`: as root, or as an ordinary user in a user namespace.
//!
//! Packages that were downloaded once are kept beside the stages. The mirror comes from the host's
//! apt ([`super::apt`]); the tar is raw material that [`super::tree`] filters and normalises.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::Digest;

use super::apt::HostApt;
use super::dpkg::PackageVersion;
use super::process::{Program, RunContext, RunError};
use super::stage::remove_tree;

/// How long mmdebstrap may take.
const DEADLINE: Duration = Duration::from_secs(20 * 60);
/// Directory of the tree that a kernel package is unpacked into.
pub const KERNEL_DIRECTORY: &str = "kiln-kernel";
/// Name of the tar a stage makes.
pub const TAR: &str = "root.tar";

/// Why a root tree was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// mmdebstrap failed.
    #[error("cannot make the Debian root")]
    Run(#[source] RunError),
    /// A file operation failed.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The scratch directory belongs to somebody else.
    #[error("{} exists and belongs to another user", .0.display())]
    Foreign(PathBuf),
}

impl RootError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// What a root tree has.
#[derive(Clone, Debug)]
pub struct RootSpec<'a> {
    /// Debian release.
    pub suite: &'a str,
    /// Debian architecture.
    pub architecture: &'a str,
    /// mmdebstrap's variant: `essential` (no apt inside) or `apt`.
    pub variant: &'a str,
    /// Packages besides the variant's.
    pub packages: &'a [String],
    /// A kernel metapackage to unpack into [`KERNEL_DIRECTORY`] without installing it.
    pub kernel: Option<&'a str>,
    /// Directories whose Python byte code is compiled, valid whatever time files have.
    pub byte_compile: &'a [String],
    /// Where downloaded packages are kept.
    pub debs: &'a Path,
}

/// Makes the tree; the tar is `<work>/root.tar`.
///
/// # Errors
/// See [`RootError`].
pub fn make_root(
    spec: &RootSpec<'_>,
    apt: &HostApt,
    work: &Path,
    context: &RunContext<'_>,
) -> Result<(), RootError> {
    let scratch = Scratch::make(work, context)?;
    fs::create_dir_all(spec.debs).map_err(RootError::io("make", spec.debs))?;
    let hook = scratch.path.join("customize");
    fs::write(&hook, hook_script(spec)).map_err(RootError::io("write", &hook))?;
    let mode = Permissions::from_mode(0o755);
    fs::set_permissions(&hook, mode).map_err(RootError::io("chmod", &hook))?;
    let made = program(spec, apt, &scratch.path, &hook, &work.join(TAR)).run(context);
    scratch.remove(context)?;
    made.map_err(RootError::Run)
}

fn program(spec: &RootSpec<'_>, apt: &HostApt, scratch: &Path, hook: &Path, tar: &Path) -> Program {
    let debs = spec.debs.display();
    // As root mmdebstrap mounts proc, sys and dev where the whole host sees them; in a mount namespace of its own they are
    // gone with it, also when it is killed. A container without the right to that may still do without mounts.
    let (program, mode) = if rustix::process::geteuid().is_root() {
        let alone = "if unshare --mount true 2>/dev/null; then exec unshare --mount -- \"$@\"; fi; exec \"$@\"";
        let shell = Program::new("sh", DEADLINE);
        (shell.args(["-c", alone, "sh", "mmdebstrap"]), "root")
    } else {
        (Program::new("mmdebstrap", DEADLINE), "unshare")
    };
    let mut program = program
        .env("TMPDIR", scratch)
        .env("SOURCE_DATE_EPOCH", super::tree::MTIME.to_string())
        .arg(format!("--mode={mode}"))
        .arg(format!("--variant={}", spec.variant))
        .arg(format!("--architectures={}", spec.architecture))
        .arg("--format=tar")
        .arg("--skip=essential/unlink")
        .arg("--dpkgopt=force-unsafe-io")
        .arg(format!("--include={}", spec.packages.join(",")))
        .arg("--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives/")
        .arg(format!(
            "--setup-hook=sync-in '{debs}' /var/cache/apt/archives/"
        ))
        .arg(format!("--customize-hook='{}' \"$1\"", hook.display()))
        .arg(format!(
            "--customize-hook=sync-out /var/cache/apt/archives '{debs}'"
        ));
    for option in &apt.options {
        program = program.arg(format!("--aptopt={option}"));
    }
    let lines = apt.sources.iter().map(|source| source.line(spec.suite));
    program.arg(spec.suite).arg(tar).args(lines)
}

/// Runs last, before the tree is packed. Everything in it comes from checked recipe words.
fn hook_script(spec: &RootSpec<'_>) -> String {
    let mut script = String::from("#!/bin/sh\nset -eu\nroot=$1\n");
    if let Some(meta) = spec.kernel {
        script.push_str(&format!(
            "export APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" LC_ALL=C\n\
             package=$(apt-cache depends {meta} | sed -n 's/^ *Depends: *\\(linux-image-[^ ]*\\)$/\\1/p' | head -n 1)\n\
             cd \"$root/var/cache/apt/archives\"\n\
             apt-get -q -oAPT::Sandbox::User=root download \"$package\"\n\
             mkdir \"$root/{KERNEL_DIRECTORY}\"\n\
             dpkg-deb -x \"$package\"_*.deb \"$root/{KERNEL_DIRECTORY}\"\n\
             cd /\n"
        ));
    }
    if !spec.byte_compile.is_empty() {
        let directories = spec.byte_compile.join(" ");
        script.push_str(&format!(
            "chroot \"$root\" python3 -m compileall -q -f --invalidation-mode unchecked-hash {directories}\n"
        ));
    }
    script
}

/// Forgets downloaded packages that are not among the packages in use.
///
/// # Errors
/// When the directory cannot be read or a file cannot be removed.
pub fn prune_debs(debs: &Path, used: &[PackageVersion], also: &str) -> Result<(), RootError> {
    let name = |package: &PackageVersion| {
        let version = package.version.replace(':', "%3a");
        format!("{}_{version}_{}.deb", package.name, package.architecture)
    };
    let used: BTreeSet<_> = used.iter().map(name).collect();
    for entry in fs::read_dir(debs).map_err(RootError::io("list", debs))? {
        let entry = entry.map_err(RootError::io("list", debs))?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.ends_with(".deb") && !used.contains(&file) && !file.starts_with(also) {
            fs::remove_file(entry.path()).map_err(RootError::io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Where bakes of this user with this cache of stages work meanwhile. It is gone when they end, unless they were killed.
#[must_use]
pub fn scratch_of(cache: &Path) -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    let of = Digest::of(cache.to_string_lossy().as_bytes()).short(8);
    std::env::temp_dir().join(format!("kiln-bake-{uid}-{of}"))
}

/// A directory that the ids of a user namespace can reach, which a home directory often is not.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn make(work: &Path, context: &RunContext<'_>) -> Result<Self, RootError> {
        let uid = rustix::process::geteuid();
        let scratch = Self {
            path: scratch_of(work.parent().unwrap_or(work)),
        };
        match fs::symlink_metadata(&scratch.path) {
            Ok(meta) if !meta.is_dir() || meta.uid() != uid.as_raw() => {
                return Err(RootError::Foreign(scratch.path));
            }
            Ok(_) => scratch.remove(context)?,
            Err(_) => {}
        }
        // 0711 whatever the umask: others may pass through, not look.
        let made = fs::DirBuilder::new().mode(0o711).create(&scratch.path);
        made.map_err(RootError::io("make", &scratch.path))?;
        let mode = Permissions::from_mode(0o711);
        fs::set_permissions(&scratch.path, mode).map_err(RootError::io("chmod", &scratch.path))?;
        Ok(scratch)
    }

    fn remove(&self, context: &RunContext<'_>) -> Result<(), RootError> {
        remove_tree(&self.path, context.lock).map_err(RootError::Run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloaded_packages_that_are_in_use_stay() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let files = [
            "a_1%3a2-3_amd64.deb",
            "a_1%3a2-2_amd64.deb",
            "linux-image-6_1_amd64.deb",
            "lock",
        ];
        for file in files {
            fs::write(dir.path().join(file), "x").expect("writable");
        }
        let used = [PackageVersion {
            name: "a".to_owned(),
            version: "1:2-3".to_owned(),
            architecture: "amd64".to_owned(),
        }];
        prune_debs(dir.path(), &used, "linux-image-").expect("it prunes");
        let left = |name: &str| dir.path().join(name).exists();
        assert_eq!(files.map(left), [true, false, true, true]);
    }
}
