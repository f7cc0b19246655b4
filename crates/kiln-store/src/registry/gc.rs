//! What walks the whole store: collection of content nobody refers to, scrubbing, removal of trees,
//! and the list of repositories.
//!
//! Collection never stops pushes: it marks what is linked, then removes the rest one by one, each
//! under the names lock and only if nothing linked it meanwhile.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_core::Digest;
use serde::{Deserialize, Serialize};

use super::durable::is_absent;
use super::error::StoreError;
use super::manifest::Manifest;
use super::name::{Reference, RepoName};
use super::quota::NAME_CHARGE;
use super::repo::names_in;
use super::store::Store;

/// Shortest useful grace between the push of a blob and of the manifest that names it.
pub const GRACE_DEFAULT: Duration = Duration::from_secs(3600);
/// What a guest pushed and nobody published or removed is kept for at least this long after its last change:
/// no attempt may run nearly so long.
pub const QUARANTINE_KEEP: Duration = Duration::from_secs(24 * 3600);
/// Content set aside as corrupt is kept for at least this long, for a person to look at.
pub const CORRUPT_KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// Tree of everything that guests push.
pub(super) const QUARANTINE: &str = "quarantine";
/// Deepest nesting of repository directories: names have at most 255 bytes.
const DEPTH_MAX: usize = 128;

/// What a collection did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Collected {
    /// Blob links removed: in their repository no manifest names them.
    pub links: u64,
    /// Contents removed: no repository links them.
    pub contents: u64,
    /// Bytes of these contents.
    pub bytes: u64,
    /// Repositories in quarantine removed: left by attempts that are long over.
    #[serde(default)]
    pub quarantined: u64,
    /// Uploads removed that nobody went on with.
    #[serde(default)]
    pub uploads: u64,
}

/// What a scrub found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Scrubbed {
    /// Contents read in full.
    pub contents: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Digests whose content was bad and has been moved to `corrupt/`.
    pub corrupt: Vec<Digest>,
    /// Manifests that name something missing or damaged: repository and digest.
    pub broken: Vec<(RepoName, Digest)>,
}

/// How much is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Repositories.
    pub repositories: u64,
    /// Manifests, counted once per repository.
    pub manifests: u64,
    /// Distinct contents.
    pub contents: u64,
    /// Bytes of these contents.
    pub bytes: u64,
    /// Unfinished uploads that were begun, or gone on with, while this owner lived.
    pub uploads: u64,
}

/// Ends the collection even when it fails half-way.
struct Collection<'a>(&'a Store);

impl Drop for Collection<'_> {
    fn drop(&mut self) {
        *self.0.linked_meanwhile() = None;
    }
}

impl Store {
    /// Every repository at or below `tree` (all of them for `None`), in lexical order.
    ///
    /// # Errors
    /// File errors.
    pub fn repositories(&self, tree: Option<&RepoName>) -> Result<Vec<RepoName>, StoreError> {
        let mut found = Vec::new();
        let top = self.repos_dir();
        let start = tree.map_or_else(|| top.clone(), |tree| self.repo_dir(tree));
        walk(&top, &start, 0, &mut found)?;
        found.sort_unstable();
        Ok(found)
    }

    /// Removes every repository at and below a name at once: tags, manifests and links.
    ///
    /// # Errors
    /// [`StoreError::RepoUnknown`] when there is none.
    pub fn delete_tree(&self, tree: &RepoName) -> Result<(), StoreError> {
        self.uploads.drop_tree(tree);
        let _alone = self.removing();
        self.quotas.forget(tree);
        let was_there = self.durable.remove_tree(&self.repo_dir(tree))?;
        // Also where another owner was killed between the two.
        self.prune_empty(tree);
        match was_there {
            true => Ok(()),
            false => Err(StoreError::RepoUnknown { repo: tree.clone() }),
        }
    }

    /// Bytes and names stored at and below a name, as quotas count them.
    pub(super) fn stored_bytes(&self, tree: &RepoName) -> Result<u64, StoreError> {
        let mut sum: u64 = 0;
        for repo in self.repositories(Some(tree))? {
            for digest in self
                .links(&repo, "_blobs")?
                .into_iter()
                .chain(self.links(&repo, "_manifests")?)
            {
                let path = self.content_path(&digest);
                let size = fs::metadata(&path).map(|meta| meta.len()).unwrap_or(0);
                sum = sum.saturating_add(size).saturating_add(NAME_CHARGE);
            }
        }
        Ok(sum)
    }

    fn links(&self, repo: &RepoName, kind: &str) -> Result<Vec<Digest>, StoreError> {
        let names = names_in(&self.repo_dir(repo).join(kind))?;
        let digests = names.iter().map(|name| format!("sha256:{name}").parse());
        Ok(digests.filter_map(Result::ok).collect())
    }

    /// Everything that a repository's manifests name.
    fn named_by_manifests(&self, repo: &RepoName) -> Result<Option<HashSet<Digest>>, StoreError> {
        let mut named = HashSet::new();
        for digest in self.links(repo, "_manifests")? {
            let stored = match self.get_manifest(repo, &Reference::Digest(digest)) {
                Ok(stored) => stored,
                Err(StoreError::ManifestUnknown { .. }) => continue,
                // What a damaged manifest named cannot be told: keep everything until it is mended.
                Err(StoreError::Corrupt { .. }) => return Ok(None),
                Err(error) => return Err(error),
            };
            let manifest = Manifest::parse(&stored.bytes, Some(&stored.media_type))?;
            named.extend(manifest.blobs().map(|blob| blob.digest));
        }
        Ok(Some(named))
    }

    /// Removes what long-gone attempts left in quarantine, blob links that no manifest of their
    /// repository names, then content that no repository links; all only when older than `grace`.
    ///
    /// # Errors
    /// [`StoreError::Collecting`] while another runs; file errors.
    pub fn gc(&self, grace: Duration) -> Result<Collected, StoreError> {
        let _running = self.begin_collection()?;
        // Ages are told by the clock that dates the files.
        let now = self.uploads.now();
        let old = |path: &Path| is_old(path, now, grace);
        let mut collected = Collected {
            quarantined: self.drop_stale_quarantine(now, grace.max(QUARANTINE_KEEP))?,
            uploads: self.uploads.drop_expired(),
            ..Collected::default()
        };
        self.drop_old_corrupt(now, grace.max(CORRUPT_KEEP))?;
        let mut linked = HashSet::new();
        for repo in self.repositories(None)? {
            linked.extend(self.links(&repo, "_manifests")?);
            let blobs = self.links(&repo, "_blobs")?;
            let (young, aged): (Vec<_>, Vec<_>) = blobs
                .into_iter()
                .partition(|digest| !old(&self.blob_link(&repo, digest)));
            linked.extend(young);
            collected.links += self.drop_unnamed(&repo, aged, &mut linked)?;
        }
        self.each_content(|digest, path| {
            if linked.contains(&digest) || !old(path) {
                return Ok(());
            }
            let _alone = self.removing();
            let fresh = self.linked_meanwhile();
            if fresh.as_ref().is_none_or(|fresh| fresh.contains(&digest)) {
                return Ok(());
            }
            drop(fresh);
            let size = fs::metadata(path).map(|meta| meta.len()).unwrap_or(0);
            self.remove_content(&digest)?;
            collected.contents += 1;
            collected.bytes += size;
            Ok(())
        })?;
        Ok(collected)
    }

    /// Removes what attempts that are long over left in quarantine.
    fn drop_stale_quarantine(&self, now: SystemTime, keep: Duration) -> Result<u64, StoreError> {
        let mut removed = 0;
        let top = self.repos_dir();
        let mut stale = Vec::new();
        walk(&top, &top.join(QUARANTINE), 0, &mut stale)?;
        for repo in stale {
            let dir = self.repo_dir(&repo);
            let _alone = self.removing();
            // A directory's time is that of the last name added to it or removed.
            let kinds = ["_blobs", "_manifests", "_tags", "_referrers"].map(|name| dir.join(name));
            if !kinds.iter().all(|kind| is_old(kind, now, keep)) {
                continue;
            }
            for kind in kinds.iter().rev() {
                self.durable.remove_tree(kind)?;
            }
            self.prune_empty(&repo);
            removed += 1;
        }
        Ok(removed)
    }

    fn drop_old_corrupt(&self, now: SystemTime, keep: Duration) -> Result<(), StoreError> {
        let dir = self.corrupt_dir();
        for name in names_in(&dir)? {
            let path = dir.join(name);
            if is_old(&path, now, keep) {
                self.durable.remove(&path)?;
            }
        }
        Ok(())
    }

    fn begin_collection(&self) -> Result<Collection<'_>, StoreError> {
        let mut fresh = self.linked_meanwhile();
        if fresh.is_some() {
            return Err(StoreError::Collecting);
        }
        *fresh = Some(HashSet::new());
        drop(fresh);
        Ok(Collection(self))
    }

    /// Drops those of a repository's blob links that none of its manifests names; the others are
    /// added to `linked`. Gives how many were dropped.
    fn drop_unnamed(
        &self,
        repo: &RepoName,
        blobs: Vec<Digest>,
        linked: &mut HashSet<Digest>,
    ) -> Result<u64, StoreError> {
        if blobs.is_empty() {
            return Ok(0);
        }
        let _alone = self.removing();
        let Some(named) = self.named_by_manifests(repo)? else {
            linked.extend(blobs);
            return Ok(0);
        };
        let mut dropped = 0;
        for digest in blobs {
            if named.contains(&digest) {
                linked.insert(digest);
            } else if self.durable.remove(&self.blob_link(repo, &digest))? {
                dropped += 1;
            }
        }
        self.prune_empty(repo);
        Ok(dropped)
    }

    /// Reads everything again, sets bad content aside and reports what it breaks (`kiln doctor --scrub`).
    ///
    /// # Errors
    /// File errors.
    pub fn scrub(&self) -> Result<Scrubbed, StoreError> {
        let mut report = Scrubbed::default();
        self.each_content(|digest, path| {
            report.contents += 1;
            report.bytes += fs::metadata(path).map(|meta| meta.len()).unwrap_or(0);
            if !self.scrub_content(&digest)? {
                report.corrupt.push(digest);
            }
            Ok(())
        })?;
        for repo in self.repositories(None)? {
            for digest in self.links(&repo, "_manifests")? {
                if !self.is_whole(&repo, &digest)? {
                    report.broken.push((repo.clone(), digest));
                }
            }
        }
        Ok(report)
    }

    /// Whether a manifest and everything it names is there. Run after content was hashed.
    fn is_whole(&self, repo: &RepoName, digest: &Digest) -> Result<bool, StoreError> {
        let stored = match self.get_manifest(repo, &Reference::Digest(*digest)) {
            Ok(stored) => stored,
            Err(StoreError::ManifestUnknown { .. } | StoreError::Corrupt { .. }) => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let manifest = Manifest::parse(&stored.bytes, Some(&stored.media_type))?;
        for blob in manifest.blobs() {
            match self.has_blob(repo, &blob.digest) {
                Ok(true) => {}
                Ok(false) | Err(StoreError::Corrupt { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Counts what is stored.
    ///
    /// # Errors
    /// File errors.
    pub fn stats(&self) -> Result<Stats, StoreError> {
        let mut stats = Stats {
            uploads: self.uploads.count() as u64,
            ..Stats::default()
        };
        for repo in self.repositories(None)? {
            stats.repositories += 1;
            stats.manifests += self.links(&repo, "_manifests")?.len() as u64;
        }
        self.each_content(|_, path| {
            stats.contents += 1;
            stats.bytes += fs::metadata(path).map(|meta| meta.len()).unwrap_or(0);
            Ok(())
        })?;
        Ok(stats)
    }

    fn each_content(
        &self,
        mut visit: impl FnMut(Digest, &Path) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let top = self.content_dir();
        for shelf in names_in(&top)? {
            let shelf = top.join(shelf);
            for name in names_in(&shelf)? {
                if let Ok(digest) = format!("sha256:{name}").parse() {
                    visit(digest, &shelf.join(name))?;
                }
            }
        }
        Ok(())
    }
}

/// Collects the repositories below `dir`.
fn walk(top: &Path, dir: &Path, depth: usize, found: &mut Vec<RepoName>) -> Result<(), StoreError> {
    let names = names_in(dir)?;
    let is_repository = names.iter().any(|n| n == "_blobs" || n == "_manifests");
    if let Some(name) = is_repository.then(|| repo_of(top, dir)).flatten() {
        found.push(name);
    }
    if depth >= DEPTH_MAX {
        return Ok(());
    }
    for name in names.into_iter().filter(|name| !name.starts_with('_')) {
        let below: PathBuf = dir.join(name);
        walk(top, &below, depth + 1, found)?;
    }
    Ok(())
}

fn repo_of(top: &Path, dir: &Path) -> Option<RepoName> {
    dir.strip_prefix(top).ok()?.to_str()?.parse().ok()
}

/// Whether a file was last written at least `grace` ago, by the clock that dates files. One from the future (the clock jumped) is young.
fn is_old(path: &Path, now: SystemTime, grace: Duration) -> bool {
    match fs::metadata(path).and_then(|meta| meta.modified()) {
        Ok(modified) => now.duration_since(modified).is_ok_and(|age| age >= grace),
        Err(error) => is_absent(&error),
    }
}
