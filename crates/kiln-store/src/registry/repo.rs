//! Manifests, tags and referrers of a repository, and the lists of them.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

use super::authority::{Action, Authority};
use super::durable::is_absent;
use super::error::StoreError;
use super::manifest::{Descriptor, MANIFEST_BYTES_MAX, Manifest};
use super::name::{Reference, RepoName};
use super::quota::{Account, NAME_CHARGE};
use super::store::{Store, is_there};

/// Most names read from one directory into memory: tags or referrers of one repository.
pub(super) const NAMES_MAX: usize = 200_000;
/// Longest record of the store's own read back, bytes (a referrer's annotations are the bulk).
const RECORD_BYTES_MAX: u64 = MANIFEST_BYTES_MAX + 4096;

/// A manifest as stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredManifest {
    /// Digest of `bytes`, checked.
    pub digest: Digest,
    /// Media type it was pushed with.
    pub media_type: String,
    /// The exact bytes.
    pub bytes: Vec<u8>,
}

/// What a manifest's link holds.
#[derive(Serialize, Deserialize)]
struct Link {
    media_type: String,
    size: u64,
}

/// Result of [`Store::put_manifest`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PutManifest {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The subject it refers to, if any.
    pub subject: Option<Digest>,
}

impl Store {
    fn manifest_link(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        self.repo_dir(repo).join("_manifests").join(digest.hex())
    }

    fn tag_path(&self, repo: &RepoName, tag: &str) -> PathBuf {
        self.repo_dir(repo).join("_tags").join(tag)
    }

    fn referrers_dir(&self, repo: &RepoName, subject: &Digest) -> PathBuf {
        self.repo_dir(repo).join("_referrers").join(subject.hex())
    }

    /// The account of a caller that has a quota.
    pub(super) fn account_of(
        &self,
        authority: &Authority,
    ) -> Result<Option<Arc<Account>>, StoreError> {
        authority
            .quota()
            .map(|(tree, max)| self.quotas.account(tree, max, || self.stored_bytes(tree)))
            .transpose()
    }

    /// Stores a manifest and, when `reference` is a tag, points the tag at it. Makes no blob link:
    /// everything it refers to must be in the repository already, except its subject.
    ///
    /// # Errors
    /// [`StoreError::ReferenceMissing`], [`StoreError::ManifestInvalid`], or a right or file error.
    pub fn put_manifest(
        &self,
        authority: &Authority,
        repo: &RepoName,
        reference: &Reference,
        content_type: Option<&str>,
        bytes: &[u8],
    ) -> Result<PutManifest, StoreError> {
        authority.check(Action::Push, repo)?;
        self.check_room()?;
        let digest = Digest::of(bytes);
        if let Reference::Digest(expected) = reference
            && *expected != digest
        {
            return Err(StoreError::DigestMismatch {
                expected: *expected,
                actual: digest,
            });
        }
        let manifest = Manifest::parse(bytes, content_type)?;
        let account = self.account_of(authority)?;
        let _names = self.linking();
        self.check_references(repo, &manifest)?;
        if let Some(account) = &account {
            account.charge(bytes.len() as u64 + NAME_CHARGE)?;
        }
        self.note_linked(&digest);
        let (mut file, temp) = self.durable.temp_file()?;
        let put = std::io::Write::write_all(&mut file, bytes)
            .and_then(|()| file.sync_all())
            .map_err(StoreError::io("write", &temp))
            .and_then(|()| authority.check(Action::Push, repo))
            .and_then(|()| self.put_content(&digest, &file, &temp));
        if put.is_err() {
            // Best effort: what stays is reaped on the next open.
            let _ = std::fs::remove_file(&temp);
        }
        put?;
        self.link_manifest(repo, &digest, &manifest, bytes.len() as u64)?;
        if let Reference::Tag(tag) = reference {
            self.write_tag(repo, tag, &digest)?;
        }
        Ok(PutManifest {
            digest,
            subject: manifest.subject.map(|subject| subject.digest),
        })
    }

    /// Everything the manifest names must be linked here, good, and of the stated size.
    fn check_references(&self, repo: &RepoName, manifest: &Manifest) -> Result<(), StoreError> {
        for descriptor in manifest.blobs() {
            let blob = self.open_blob(repo, &descriptor.digest);
            let blob = blob.map_err(|error| missing(error, repo, descriptor))?;
            descriptor.check_size(blob.size)?;
        }
        for descriptor in manifest.manifests() {
            let link = self.read_link(repo, &descriptor.digest)?.ok_or_else(|| {
                StoreError::ReferenceMissing {
                    repo: repo.clone(),
                    digest: descriptor.digest,
                }
            })?;
            descriptor.check_size(link.size)?;
        }
        Ok(())
    }

    /// Writes the referrer's entry first: an entry without a manifest link is not shown.
    fn link_manifest(
        &self,
        repo: &RepoName,
        digest: &Digest,
        manifest: &Manifest,
        size: u64,
    ) -> Result<(), StoreError> {
        if let Some(subject) = &manifest.subject {
            let entry = Descriptor {
                media_type: manifest.media_type.clone(),
                digest: *digest,
                size,
                artifact_type: manifest.artifact_type.clone(),
                platform: None,
                annotations: manifest.annotations.clone(),
            };
            let path = self.referrers_dir(repo, &subject.digest).join(digest.hex());
            self.durable.write(&path, &json(&entry))?;
        }
        let link = Link {
            media_type: manifest.media_type.clone(),
            size,
        };
        self.durable
            .write(&self.manifest_link(repo, digest), &json(&link))
    }

    /// Lets `to` hold a manifest of `from`, whose blobs must be in `to` already. For the host's publishing.
    pub(super) fn mount_manifest(
        &self,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
    ) -> Result<(), StoreError> {
        let stored = self.get_manifest(from, &Reference::Digest(*digest))?;
        let manifest = Manifest::parse(&stored.bytes, Some(&stored.media_type))?;
        let _names = self.linking();
        self.note_linked(digest);
        self.check_references(to, &manifest)?;
        if self.open_content(digest)?.is_none() {
            return Err(unknown_manifest(from, &Reference::Digest(*digest)));
        }
        self.link_manifest(to, digest, &manifest, stored.bytes.len() as u64)
    }

    /// Points a tag at a manifest that is in the repository.
    ///
    /// # Errors
    /// [`StoreError::ManifestUnknown`] when it is not.
    pub fn tag(&self, repo: &RepoName, tag: &str, digest: &Digest) -> Result<(), StoreError> {
        let _names = self.linking();
        if self.read_link(repo, digest)?.is_none() {
            return Err(unknown_manifest(repo, &Reference::Digest(*digest)));
        }
        self.write_tag(repo, tag, digest)
    }

    fn write_tag(&self, repo: &RepoName, tag: &str, digest: &Digest) -> Result<(), StoreError> {
        let text = format!("{digest}\n");
        self.durable
            .write(&self.tag_path(repo, tag), text.as_bytes())
    }

    fn read_link(&self, repo: &RepoName, digest: &Digest) -> Result<Option<Link>, StoreError> {
        let path = self.manifest_link(repo, digest);
        let Some(bytes) = read_record(&path)? else {
            return Ok(None);
        };
        match serde_json::from_slice(&bytes) {
            Ok(link) => Ok(Some(link)),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "a manifest link is corrupt: ignored");
                Ok(None)
            }
        }
    }

    /// The digest a reference stands for in this repository.
    ///
    /// # Errors
    /// [`StoreError::ManifestUnknown`].
    pub fn resolve(&self, repo: &RepoName, reference: &Reference) -> Result<Digest, StoreError> {
        let digest = match reference {
            Reference::Digest(digest) => Some(*digest),
            Reference::Tag(tag) => read_record(&self.tag_path(repo, tag))?
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .and_then(|text| text.trim_end().parse().ok()),
        };
        digest.ok_or_else(|| unknown_manifest(repo, reference))
    }

    /// Gives the digest back when the repository holds a manifest of it.
    pub(crate) fn require_manifest(
        &self,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<Digest, StoreError> {
        match self.read_link(repo, digest)? {
            Some(_) => Ok(*digest),
            None => Err(unknown_manifest(repo, &Reference::Digest(*digest))),
        }
    }

    /// Reads a manifest; its bytes have the digest that is returned.
    ///
    /// # Errors
    /// [`StoreError::ManifestUnknown`], [`StoreError::Corrupt`] or a file error.
    pub fn get_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<StoredManifest, StoreError> {
        let unknown = || unknown_manifest(repo, reference);
        let digest = self.resolve(repo, reference)?;
        let link = self.read_link(repo, &digest)?.ok_or_else(unknown)?;
        let content = self.open_content(&digest)?.ok_or_else(unknown)?;
        let path = self.content_path(&digest);
        let mut bytes = Vec::new();
        rewind(&content.file, &path)?;
        content
            .file
            .take(MANIFEST_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(StoreError::io("read", &path))?;
        if Digest::of(&bytes) != digest {
            return Err(StoreError::Corrupt { digest });
        }
        Ok(StoredManifest {
            digest,
            media_type: link.media_type,
            bytes,
        })
    }

    /// Removes a tag, or a manifest with every tag that points at it.
    ///
    /// # Errors
    /// [`StoreError::ManifestUnknown`].
    pub fn delete_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<(), StoreError> {
        let _alone = self.removing();
        let removed = match reference {
            Reference::Tag(tag) => self.durable.remove(&self.tag_path(repo, tag))?,
            Reference::Digest(digest) => self.delete_by_digest(repo, digest)?,
        };
        if !removed {
            return Err(unknown_manifest(repo, reference));
        }
        self.prune_empty(repo);
        Ok(())
    }

    fn delete_by_digest(&self, repo: &RepoName, digest: &Digest) -> Result<bool, StoreError> {
        let link = self.manifest_link(repo, digest);
        if !is_there(&link)? {
            return Ok(false);
        }
        for tag in self.tags(repo)? {
            if self.resolve(repo, &Reference::Tag(tag.clone())).ok() == Some(*digest) {
                self.durable.remove(&self.tag_path(repo, &tag))?;
            }
        }
        let content = self.get_manifest(repo, &Reference::Digest(*digest));
        let subject = content
            .ok()
            .and_then(|m| Manifest::parse(&m.bytes, Some(&m.media_type)).ok())
            .and_then(|m| m.subject);
        let removed = self.durable.remove(&link)?;
        if let Some(subject) = subject {
            let dir = self.referrers_dir(repo, &subject.digest);
            self.durable.remove(&dir.join(digest.hex()))?;
            let _ = fs::remove_dir(&dir);
        }
        Ok(removed)
    }

    /// All tags, in lexical order.
    ///
    /// # Errors
    /// [`StoreError::RepoUnknown`], or more than [`NAMES_MAX`].
    pub fn tags(&self, repo: &RepoName) -> Result<Vec<String>, StoreError> {
        let mut tags = names_in(&self.repo_dir(repo).join("_tags"))?;
        if tags.is_empty() && !self.is_repository(repo)? {
            return Err(StoreError::RepoUnknown { repo: repo.clone() });
        }
        tags.sort_unstable();
        Ok(tags)
    }

    /// Whether anything was ever pushed to exactly this name.
    pub(super) fn is_repository(&self, repo: &RepoName) -> Result<bool, StoreError> {
        let dir = self.repo_dir(repo);
        Ok(is_there(&dir.join("_blobs"))? || is_there(&dir.join("_manifests"))?)
    }

    /// Manifests whose subject is `subject`, ordered by digest, beginning after `last`, at most `max`.
    /// The flag tells whether more follow.
    ///
    /// # Errors
    /// File errors. An unknown subject or repository has no referrers.
    pub fn referrers(
        &self,
        repo: &RepoName,
        subject: &Digest,
        artifact_type: Option<&str>,
        last: Option<&Digest>,
        max: usize,
    ) -> Result<(Vec<Descriptor>, bool), StoreError> {
        let dir = self.referrers_dir(repo, subject);
        let mut names = names_in(&dir)?;
        names.sort_unstable();
        let mut found = Vec::new();
        let mut bytes_sum = 0;
        for name in names {
            let Ok(digest) = format!("sha256:{name}").parse::<Digest>() else {
                continue;
            };
            if last.is_some_and(|last| digest <= *last) || self.read_link(repo, &digest)?.is_none()
            {
                continue;
            }
            let Some(bytes) = read_record(&dir.join(&name))? else {
                continue;
            };
            let Ok(entry) = serde_json::from_slice::<Descriptor>(&bytes) else {
                tracing::error!(%repo, %digest, "a referrer's record is corrupt: ignored");
                continue;
            };
            if artifact_type.is_some_and(|wanted| entry.artifact_type.as_deref() != Some(wanted)) {
                continue;
            }
            bytes_sum += bytes.len() as u64;
            if found.len() >= max || (bytes_sum > MANIFEST_BYTES_MAX && !found.is_empty()) {
                return Ok((found, true));
            }
            found.push(entry);
        }
        Ok((found, false))
    }
}

/// A damaged or absent blob under a manifest is the pusher's to mend: push it again.
fn missing(error: StoreError, repo: &RepoName, descriptor: &Descriptor) -> StoreError {
    match error {
        StoreError::BlobUnknown { .. } | StoreError::Corrupt { .. } => {
            StoreError::ReferenceMissing {
                repo: repo.clone(),
                digest: descriptor.digest,
            }
        }
        other => other,
    }
}

fn unknown_manifest(repo: &RepoName, reference: &Reference) -> StoreError {
    StoreError::ManifestUnknown {
        repo: repo.clone(),
        reference: reference.clone(),
    }
}

pub(super) fn rewind(mut file: &File, path: &Path) -> Result<(), StoreError> {
    std::io::Seek::rewind(&mut file).map_err(StoreError::io("read", path))
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // These types have string keys and no failing serializer: this cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

/// A small file of the store's own; `None` when absent, an error when longer than any such file can be.
fn read_record(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(StoreError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(RECORD_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(StoreError::io("read", path))?;
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(StoreError::TooLarge {
            what: "a record of the registry",
            max: RECORD_BYTES_MAX,
        });
    }
    Ok(Some(bytes))
}

/// Names of the entries of a directory; none when it is absent.
pub(super) fn names_in(dir: &Path) -> Result<Vec<String>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", dir)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::io("list", dir))?;
        if names.len() >= NAMES_MAX {
            return Err(StoreError::TooMany {
                what: "names in one directory of the registry",
                max: NAMES_MAX as u64,
            });
        }
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}
