//! `manifest.json` of a machine image: what is in it, made from what.

use std::collections::BTreeMap;

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

use super::dpkg::PackageVersion;

/// Version of the format.
pub const SCHEMA: u32 = 1;
/// File name of the manifest in an image directory.
pub const FILE: &str = "manifest.json";
/// File name of the kernel, an ELF that boots by PVH.
pub const KERNEL: &str = "kernel";
/// File name of the initrd.
pub const INITRD: &str = "initrd";
/// File name of the root disk, raw ext4, read-only.
pub const ROOT: &str = "root.img";

/// What one machine image is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineImageManifest {
    /// Version of the format.
    pub schema: u32,
    /// `ci-<first 16 hex digits of the content hash>`.
    pub name: String,
    /// Hash over recipe, normalised root tree, kernel, modules and guest; not over the filesystem, which cannot be made
    /// bit-identical.
    pub content: Digest,
    /// Digest of the recipe files.
    pub recipe: Digest,
    /// Digest of the guest binary.
    pub guest: Digest,
    /// Digest of the normalised root tree.
    pub root_tree: Digest,
    /// Release of the kernel, as `uname -r` in a machine says it.
    pub kernel_release: String,
    /// Kernel command line that this image boots fastest with, without console and role-specific words.
    pub kernel_args: String,
    /// Modules the guest loads, in order.
    pub modules: Vec<String>,
    /// BuildKit's version.
    pub buildkit_version: String,
    /// Debian release and architecture inside.
    pub debian: String,
    /// When it was baked, seconds since the Unix epoch.
    pub baked_unix_s: u64,
    /// Size and digest of each file of the image, by name.
    pub files: BTreeMap<String, FileDigest>,
    /// Every package of the root disk, and the kernel's.
    pub packages: Vec<PackageVersion>,
}

/// Size and digest of one file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDigest {
    /// Bytes.
    pub bytes: u64,
    /// Digest.
    pub digest: Digest,
}
