//! The directory of machine images: list, show, verify, prune, and which one is current.
//!
//! Digests are computed in full when an image is made and at its first use after the host booted; after that device,
//! inode, size and change time must be what they were then (DESIGN rule 8). `current` is a file with a name, replaced
//! atomically.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_core::{ByteSize, Digest};
use serde::{Deserialize, Serialize};

use super::machine_image::{BakeError, KERNEL_ARGS};
use super::manifest::{FILE, FileDigest, MachineImageManifest, SCHEMA};
use super::recipe::RecipeFiles;

/// Images kept by default.
pub const KEEP: usize = 4;
/// Largest manifest that is read.
const MANIFEST_BYTES_MAX: u64 = 8 << 20;
/// Name of the file that names the current image.
const CURRENT: &str = "current";
/// Directory of what was verified since the host booted.
const VERIFIED: &str = ".verified";
/// Prefix of an image that is being put together or removed.
pub(super) const UNFINISHED: &str = ".unfinished-";

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImagesError {
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
    /// There is no image of this name.
    #[error("there is no machine image {0:?}; `kiln machine-image list` shows those there are")]
    NotFound(String),
    /// No image was baked yet.
    #[error("there is no machine image yet; `kiln machine-image bake` makes one")]
    NoCurrent,
    /// A name that cannot be one of an image.
    #[error("{0:?} cannot be the name of a machine image")]
    BadName(String),
    /// The manifest is not one.
    #[error("{} is not a manifest of a machine image", .path.display())]
    BadManifest {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is of a newer or unknown form, or of another image.
    #[error("{} does not belong here: {what}", .path.display())]
    ForeignManifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A file is not what the manifest says.
    #[error("{} is damaged: its digest is {found}, the manifest says {expected}; bake the image again", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
}

impl ImagesError {
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// How thorough a verification is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VerifyDepth {
    /// In full at the first use after the host booted, by file identity after that.
    OncePerBoot,
    /// Read every byte again.
    Full,
}

/// One line of a list of images.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageSummary {
    /// Its manifest.
    pub manifest: MachineImageManifest,
    /// Where its files are.
    pub directory: PathBuf,
    /// Whether machines start from it by default.
    pub current: bool,
    /// Bytes of its files on disk; the root disk may be shared with other images.
    pub bytes: ByteSize,
}

/// The directory where finished images live.
#[derive(Clone, Debug)]
pub struct MachineImages {
    directory: PathBuf,
}

/// What was verified, and by which identity it is recognised until the host boots again.
#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Verified {
    boot_id: String,
    files: BTreeMap<String, FileIdentity>,
}

#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    changed_s: i64,
    changed_ns: i64,
    digest: Digest,
}

impl FileIdentity {
    fn of(path: &Path, digest: Digest) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.len(),
            changed_s: meta.ctime(),
            changed_ns: meta.ctime_nsec(),
            digest,
        })
    }
}

impl MachineImages {
    /// The images in a directory, which need not exist yet.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where an image is or would be.
    ///
    /// # Errors
    /// When the name is none of an image.
    pub fn path(&self, name: &str) -> Result<PathBuf, ImagesError> {
        let (prefix, hash) = name.rsplit_once('-').unwrap_or(("", ""));
        let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let good = !prefix.is_empty()
            && prefix.bytes().all(word)
            && hash.len() == 16
            && hash.bytes().all(|b| b.is_ascii_hexdigit());
        match good {
            true => Ok(self.directory.join(name)),
            false => Err(ImagesError::BadName(name.chars().take(80).collect())),
        }
    }

    /// Manifest of an image. Its files are not looked at.
    ///
    /// # Errors
    /// When there is none or it is not a manifest of this image.
    pub fn show(&self, name: &str) -> Result<MachineImageManifest, ImagesError> {
        let path = self.path(name)?.join(FILE);
        let size = match fs::metadata(&path) {
            Ok(meta) => meta.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImagesError::NotFound(name.to_owned()));
            }
            Err(error) => return Err(ImagesError::io("read", &path)(error)),
        };
        let foreign = |what: String| ImagesError::ForeignManifest {
            path: path.clone(),
            what,
        };
        if size > MANIFEST_BYTES_MAX {
            return Err(foreign(format!("it has {size} bytes")));
        }
        let bytes = fs::read(&path).map_err(ImagesError::io("read", &path))?;
        let manifest: MachineImageManifest =
            serde_json::from_slice(&bytes).map_err(|source| ImagesError::BadManifest {
                path: path.clone(),
                source,
            })?;
        if manifest.schema != SCHEMA {
            return Err(foreign(format!(
                "its schema is {}, this kiln knows {SCHEMA}",
                manifest.schema
            )));
        }
        if manifest.name != name || !name.ends_with(&manifest.content.short(16)) {
            return Err(foreign(format!(
                "it is the manifest of {:?}",
                manifest.name
            )));
        }
        if manifest
            .files
            .keys()
            .any(|file| file.contains('/') || file.starts_with('.'))
        {
            return Err(foreign("it names files elsewhere".to_owned()));
        }
        Ok(manifest)
    }

    /// All images, newest first. A directory whose manifest is broken is left out.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, ImagesError> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ImagesError::io("list", &self.directory)(error)),
        };
        let current = self.current_name()?;
        let mut images = Vec::new();
        for entry in entries {
            let entry = entry.map_err(ImagesError::io("list", &self.directory))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let Ok(manifest) = self.show(&name) else {
                continue;
            };
            images.push(ImageSummary {
                current: current.as_deref() == Some(&name),
                bytes: ByteSize(manifest.files.values().map(|file| file.bytes).sum()),
                directory: entry.path(),
                manifest,
            });
        }
        images.sort_by_key(|image| {
            std::cmp::Reverse((image.manifest.baked_unix_s, image.manifest.name.clone()))
        });
        Ok(images)
    }

    /// The image that machines start from by default.
    ///
    /// # Errors
    /// When there is none or its manifest is broken.
    pub fn current(&self) -> Result<MachineImageManifest, ImagesError> {
        let name = self.current_name()?.ok_or(ImagesError::NoCurrent)?;
        self.show(&name)
    }

    /// The newest image made from this recipe and this guest, for machines that boot as this kiln's do.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn find(
        &self,
        recipe: &Digest,
        guest: &Digest,
    ) -> Result<Option<MachineImageManifest>, ImagesError> {
        let images = self.list()?.into_iter().map(|image| image.manifest);
        Ok(images.into_iter().find(|image| {
            let inputs = (&image.recipe, &image.guest) == (recipe, guest);
            inputs && image.kernel_args == KERNEL_ARGS
        }))
    }

    /// The newest image made from these recipe files and this guest binary: when there is one, a bake would only
    /// take newer packages.
    ///
    /// # Errors
    /// When the recipe, the guest or the directory cannot be read.
    pub fn find_for(
        &self,
        files: &RecipeFiles,
        guest: &Path,
    ) -> Result<Option<MachineImageManifest>, BakeError> {
        let guest = digest_file(guest).map_err(BakeError::io("read", guest))?;
        Ok(self.find(&files.image_digest()?, &guest.digest)?)
    }

    /// Makes an image the current one.
    ///
    /// # Errors
    /// When there is no such image or the pointer cannot be written.
    pub fn set_current(&self, name: &str) -> Result<(), ImagesError> {
        self.show(name)?;
        let path = self.directory.join(CURRENT);
        replace_file(&path, format!("{name}\n").as_bytes()).map_err(ImagesError::io("write", &path))
    }

    fn current_name(&self) -> Result<Option<String>, ImagesError> {
        let path = self.directory.join(CURRENT);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImagesError::io("read", &path)(error)),
        }
    }

    /// Checks the files of an image and returns its manifest.
    ///
    /// # Errors
    /// When a file is missing or is not what the manifest says.
    pub fn verify(
        &self,
        name: &str,
        depth: VerifyDepth,
    ) -> Result<MachineImageManifest, ImagesError> {
        let manifest = self.show(name)?;
        let directory = self.path(name)?;
        let boot_id = boot_id()?;
        let identity = |file: &str, digest: Digest| {
            let path = directory.join(file);
            FileIdentity::of(&path, digest).map_err(ImagesError::io("look at", &path))
        };
        if depth == VerifyDepth::OncePerBoot {
            let mut now = Verified {
                boot_id: boot_id.clone(),
                files: BTreeMap::new(),
            };
            for (file, expected) in &manifest.files {
                now.files
                    .insert(file.clone(), identity(file, expected.digest)?);
            }
            if self.read_verified(name) == Some(now) {
                return Ok(manifest);
            }
        }
        let mut verified = Verified {
            boot_id,
            files: BTreeMap::new(),
        };
        for (file, expected) in &manifest.files {
            // The identity from before the read: a change during it shows at the next use.
            let before = identity(file, expected.digest)?;
            let path = directory.join(file);
            let found = digest_file(&path).map_err(ImagesError::io("read", &path))?;
            if found != *expected {
                return Err(ImagesError::Damaged {
                    path,
                    expected: expected.digest,
                    found: found.digest,
                });
            }
            verified.files.insert(file.clone(), before);
        }
        self.write_verified(name, &verified)?;
        Ok(manifest)
    }

    /// Removes all but the newest `keep` images; the current one and those in `used` stay whatever their age. Returns
    /// the names removed.
    ///
    /// # Errors
    /// When the directory cannot be read or an image cannot be removed.
    pub fn prune(&self, keep: usize, used: &[String]) -> Result<Vec<String>, ImagesError> {
        let mut removed = Vec::new();
        for image in self.list()?.into_iter().skip(keep) {
            let name = image.manifest.name;
            if image.current || used.contains(&name) {
                continue;
            }
            // Renamed first: a half-removed image never looks whole.
            let going = self.directory.join(format!("{UNFINISHED}{name}"));
            fs::rename(&image.directory, &going)
                .map_err(ImagesError::io("rename", &image.directory))?;
            removed.push(name);
        }
        self.remove_unfinished()?;
        for name in &removed {
            let path = self.directory.join(VERIFIED).join(name);
            // It may never have been written.
            let _ = fs::remove_file(path);
        }
        Ok(removed)
    }

    pub(super) fn remove_unfinished(&self) -> Result<(), ImagesError> {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return Ok(());
        };
        for entry in entries {
            let entry = entry.map_err(ImagesError::io("list", &self.directory))?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                fs::remove_dir_all(entry.path())
                    .map_err(ImagesError::io("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    fn read_verified(&self, name: &str) -> Option<Verified> {
        let bytes = fs::read(self.directory.join(VERIFIED).join(name)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn write_verified(&self, name: &str, verified: &Verified) -> Result<(), ImagesError> {
        let directory = self.directory.join(VERIFIED);
        fs::create_dir_all(&directory).map_err(ImagesError::io("make", &directory))?;
        let path = directory.join(name);
        let bytes = serde_json::to_vec(verified).map_err(io::Error::other);
        let written = bytes.and_then(|bytes| replace_file(&path, &bytes));
        written.map_err(ImagesError::io("write", &path))
    }
}

fn boot_id() -> Result<String, ImagesError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(ImagesError::io("read", path))?;
    Ok(text.trim().to_owned())
}

/// Size and digest of a file.
pub(super) fn digest_file(path: &Path) -> io::Result<FileDigest> {
    let (digest, bytes) = Digest::of_reader(File::open(path)?)?;
    Ok(FileDigest { bytes, digest })
}

/// Replaces a small file: the old or the new content is there at any moment.
pub(super) fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside = directory.join(name);
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    let done = written.and_then(|()| fs::rename(&beside, path));
    if done.is_err() {
        // The error above matters; what is left is litter.
        let _ = fs::remove_file(&beside);
    }
    done.and_then(|()| File::open(directory)?.sync_all())
}

#[cfg(test)]
pub(super) mod tests;
