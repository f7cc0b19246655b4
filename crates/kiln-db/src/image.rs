//! Images that several controllers share: names, and which object of the bucket has each content.
//!
//! A name is written in one transaction with the check of the lease, after everything it leads to is in the bucket. What nothing is made of
//! goes after a grace; whoever is about to name it touches it first, in the row that the removal must take.

use kiln_core::{Digest, Lease};

use crate::database::{Database, write_tx};
use crate::door::{DoorError, enter};
use crate::engine::{Row, Tx, args, json};
use crate::error::DbError;

/// Most contents that are removed at a time.
const GARBAGE_MAX: u32 = 200;

/// A content and the object that has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageContent {
    /// Digest of its bytes.
    pub digest: Digest,
    /// Key of the object; never used for another.
    pub key: String,
    /// Bytes.
    pub size: u64,
}

/// A manifest that gets into a repository.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewManifest {
    /// The repository.
    pub repo: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub size: u64,
    /// The manifest it is about, if it is a referrer.
    pub subject: Option<Digest>,
    /// Its type of artifact.
    pub artifact_type: Option<String>,
    /// Its descriptor as lists of referrers show it, JSON.
    pub descriptor: String,
    /// The blobs it names.
    pub blobs: Vec<Digest>,
}

/// A name of a manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageTag {
    /// The repository.
    pub repo: String,
    /// The tag.
    pub tag: String,
    /// Where it points.
    pub digest: Digest,
}

/// Manifests and names that are written together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NewImages {
    /// What gets into repositories.
    pub manifests: Vec<NewManifest>,
    /// What is named, last.
    pub tags: Vec<ImageTag>,
    /// Names that are there already stay where they point.
    pub keeps_names: bool,
}

/// A manifest of a repository.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageManifest {
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub content: ImageContent,
}

/// Why nothing was named.
#[derive(Debug, thiserror::Error)]
pub enum NameImagesError {
    /// The lease, or the database.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// A content was removed meanwhile: it must be stored again.
    #[error("{0} is not in the object store any more")]
    Gone(Digest),
}

impl From<DbError> for NameImagesError {
    fn from(error: DbError) -> Self {
        Self::Door(error.into())
    }
}

fn texts<'a>(digests: impl IntoIterator<Item = &'a Digest>) -> String {
    let mut all: Vec<_> = digests.into_iter().map(|one| [one.to_string()]).collect();
    all.sort_unstable();
    all.dedup();
    json(&all)
}

impl Database {
    /// Those of some contents that are in the bucket. From now on they stay for the grace of [`Database::image_garbage`].
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_contents(&self, digests: &[Digest]) -> Result<Vec<ImageContent>, DbError> {
        let digests = texts(digests);
        write_tx!(self, "look for contents of images", [digests], |tx| {
            touch(tx, &digests).await
        })
    }

    /// Notes that a content is in the bucket. Gives what is noted of it: an object that somebody else stored at the same time stays,
    /// unless it is the one named `instead`.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_stored(
        &self,
        content: ImageContent,
        instead: Option<String>,
    ) -> Result<ImageContent, DbError> {
        write_tx!(self, "note a content of images", [content, instead], |tx| {
            let now = tx.now().await?;
            let digest = content.digest.to_string();
            let sql = "insert into image_contents (digest, key, size, touched_ms) values ($1, $2, $3, $4)
                on conflict (digest) do update set touched_ms = excluded.touched_ms,
                    key = case when image_contents.key = $5 then excluded.key else image_contents.key end,
                    size = excluded.size
                returning digest, key, size";
            let instead = instead.as_deref().unwrap_or_default();
            let values = args![digest, content.key.as_str(), content.size, now, instead];
            let row = tx.row(sql, values).await?;
            read_content(&row.ok_or(DbError::missing("digest"))?)
        })
    }

    /// Names images whose contents are all in the bucket: everything or nothing. With a lease given, it is the live one then.
    ///
    /// # Errors
    /// See [`NameImagesError`]; nothing was named.
    pub async fn name_images(
        &self,
        lease: Option<&Lease>,
        images: NewImages,
    ) -> Result<(), NameImagesError> {
        let lease = lease.cloned();
        write_tx!(self, "name an image", [lease, images], |tx| {
            if let Some(lease) = &*lease {
                match enter(tx, lease, "tag").await? {
                    Ok(live) if live.cancel.is_some() => {
                        return Ok(Err(DoorError::Cancelled.into()));
                    }
                    Ok(_) => {}
                    Err(refused) => return Ok(Err(refused.into())),
                }
            }
            name(tx, &images).await
        })?
    }

    /// The manifest that a tag points at.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_tagged(
        &self,
        repo: &str,
        tag: &str,
    ) -> Result<Option<ImageManifest>, DbError> {
        let (repo, tag) = (repo.to_owned(), tag.to_owned());
        self.read("find an image", |tx| {
            Box::pin(async move {
                let sql = "select m.media_type, c.digest, c.key, c.size from image_tags t
                        join image_manifests m on m.repo = t.repo and m.digest = t.digest
                        join image_contents c on c.digest = m.digest
                    where t.repo = $1 and t.tag = $2";
                let row = tx.row(sql, args![repo, tag]).await?;
                row.as_ref().map(read_manifest).transpose()
            })
        })
        .await
    }

    /// A manifest of a repository.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_manifest(
        &self,
        repo: &str,
        digest: &Digest,
    ) -> Result<Option<ImageManifest>, DbError> {
        let (repo, digest) = (repo.to_owned(), digest.to_string());
        self.read("find a manifest", |tx| {
            Box::pin(async move {
                let sql = "select m.media_type, c.digest, c.key, c.size from image_manifests m
                        join image_contents c on c.digest = m.digest
                    where m.repo = $1 and m.digest = $2";
                let row = tx.row(sql, args![repo, digest]).await?;
                row.as_ref().map(read_manifest).transpose()
            })
        })
        .await
    }

    /// A content that something of a repository is made of: by its digest alone nothing is opened.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_content(
        &self,
        repo: &str,
        digest: &Digest,
    ) -> Result<Option<ImageContent>, DbError> {
        let (repo, digest) = (repo.to_owned(), digest.to_string());
        self.read("find a content of an image", |tx| {
            Box::pin(async move {
                let sql = "select c.digest, c.key, c.size from image_links l
                        join image_contents c on c.digest = l.digest
                    where l.repo = $1 and l.digest = $2 limit 1";
                let row = tx.row(sql, args![repo, digest]).await?;
                row.as_ref().map(read_content).transpose()
            })
        })
        .await
    }

    /// Tags of a repository by name, after the one named `after`; none when there is no such repository.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_tags(
        &self,
        repo: &str,
        after: &str,
        limit: u32,
    ) -> Result<Option<Vec<String>>, DbError> {
        let (repo, after) = (repo.to_owned(), after.to_owned());
        self.read("list the tags of an image", |tx| {
            Box::pin(async move {
                let sql = "select digest from image_manifests where repo = $1 limit 1";
                if tx.row(sql, args![repo.as_str()]).await?.is_none() {
                    return Ok(None);
                }
                let sql =
                    "select tag from image_tags where repo = $1 and tag > $2 order by tag limit $3";
                let rows = tx.rows(sql, args![repo, after, limit]).await?;
                rows.iter()
                    .map(|row| row.text("tag"))
                    .collect::<Result<_, _>>()
                    .map(Some)
            })
        })
        .await
    }

    /// Descriptors of a manifest's referrers, JSON, by digest, after the one of `after`; of one type of artifact alone, if that is given.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_referrers(
        &self,
        repo: &str,
        subject: &Digest,
        artifact_type: Option<&str>,
        after: Option<&Digest>,
        limit: u32,
    ) -> Result<Vec<String>, DbError> {
        let (repo, subject) = (repo.to_owned(), subject.to_string());
        let (kind, any) = (
            artifact_type.unwrap_or_default().to_owned(),
            artifact_type.is_none(),
        );
        let after = after.map(ToString::to_string).unwrap_or_default();
        self.read("list referrers", |tx| {
            Box::pin(async move {
                let sql = "select descriptor from image_manifests
                    where repo = $1 and subject = $2 and digest > $3 and ($4 = 1 or artifact_type = $5)
                    order by digest limit $6";
                let values = args![repo, subject, after, any, kind, limit];
                let rows = tx.rows(sql, values).await?;
                rows.iter().map(|row| row.text("descriptor")).collect()
            })
        })
        .await
    }

    /// Forgets contents that nothing is made of and nobody has touched for `grace_ms`, some at a time; their objects are the caller's to remove.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_garbage(&self, grace_ms: u64) -> Result<Vec<ImageContent>, DbError> {
        write_tx!(self, "forget contents of images", [], |tx| {
            let before = tx.now().await?.saturating_sub(grace_ms);
            // Whoever names one of them has its row: it is passed over, and young afterwards.
            let sql = "delete from image_contents where touched_ms < $1 and digest in (
                    select c.digest from image_contents c where c.touched_ms < $1
                        and not exists (select 1 from image_links l where l.digest = c.digest)
                    order by c.touched_ms limit $2 /*lock c skip*/)
                returning digest, key, size";
            let rows = tx.rows(sql, args![before, GARBAGE_MAX]).await?;
            rows.iter().map(read_content).collect()
        })
    }

    /// Those of some keys that a content has.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_keys(&self, keys: &[String]) -> Result<Vec<String>, DbError> {
        let keys: Vec<_> = keys.iter().map(|key| [key.clone()]).collect();
        let keys = json(&keys);
        self.read("look for objects of images", |tx| {
            Box::pin(async move {
                let sql = "select c.key from json_each($1) e join image_contents c on c.key = (e.value ->> 0)";
                let rows = tx.rows(sql, args![keys]).await?;
                rows.iter().map(|row| row.text("key")).collect()
            })
        })
        .await
    }
}

/// Makes contents young, in the order of their digests: two that do so at once do not lock each other out.
async fn touch(tx: &mut Tx, digests: &str) -> Result<Vec<ImageContent>, DbError> {
    let now = tx.now().await?;
    let sql = "select c.digest, c.key, c.size from image_contents c
        where c.digest in (select (e.value ->> 0) from json_each($1) e) order by c.digest /*lock c*/";
    let rows = tx.rows(sql, args![digests]).await?;
    let sql = "update image_contents set touched_ms = $2
        where digest in (select (e.value ->> 0) from json_each($1) e)";
    tx.exec(sql, args![digests, now]).await?;
    rows.iter().map(read_content).collect()
}

async fn name(tx: &mut Tx, images: &NewImages) -> Result<Result<(), NameImagesError>, DbError> {
    let now = tx.now().await?;
    let wanted = || {
        let of = |new: &'_ NewManifest| new.blobs.clone().into_iter().chain([new.digest]);
        images.manifests.iter().flat_map(of)
    };
    let wanted: Vec<Digest> = wanted().collect();
    let there = touch(tx, &texts(&wanted)).await?;
    let there: std::collections::BTreeSet<_> = there.into_iter().map(|one| one.digest).collect();
    if let Some(gone) = wanted.iter().find(|digest| !there.contains(digest)) {
        return Ok(Err(NameImagesError::Gone(*gone)));
    }
    for new in &images.manifests {
        let digest = new.digest.to_string();
        let sql = "insert into image_manifests (repo, digest, media_type, size, subject, artifact_type, descriptor, named_ms)
            values ($1, $2, $3, $4, $5, $6, $7, $8) on conflict (repo, digest) do nothing";
        let values = args![
            new.repo.as_str(),
            digest.as_str(),
            new.media_type.as_str(),
            new.size,
            new.subject.as_ref().map(ToString::to_string),
            new.artifact_type.as_deref(),
            new.descriptor.as_str(),
            now,
        ];
        tx.exec(sql, values).await?;
        let made_of = texts(new.blobs.iter().chain([&new.digest]));
        let sql = "insert into image_links (repo, digest, manifest)
            select $1, (e.value ->> 0), $2 from json_each($3) e where true
            on conflict (repo, digest, manifest) do nothing";
        tx.exec(sql, args![new.repo.as_str(), digest.as_str(), made_of])
            .await?;
    }
    for tag in &images.tags {
        let sql = match images.keeps_names {
            false => {
                "insert into image_tags (repo, tag, digest, moved_ms) values ($1, $2, $3, $4)
                on conflict (repo, tag) do update set digest = excluded.digest, moved_ms = excluded.moved_ms"
            }
            true => {
                "insert into image_tags (repo, tag, digest, moved_ms) values ($1, $2, $3, $4)
                on conflict (repo, tag) do nothing"
            }
        };
        let digest = tag.digest.to_string();
        tx.exec(sql, args![tag.repo.as_str(), tag.tag.as_str(), digest, now])
            .await?;
    }
    Ok(Ok(()))
}

fn read_content(row: &Row) -> Result<ImageContent, DbError> {
    Ok(ImageContent {
        digest: row.parse("digest")?,
        key: row.text("key")?,
        size: row.u64("size")?,
    })
}

fn read_manifest(row: &Row) -> Result<ImageManifest, DbError> {
    Ok(ImageManifest {
        media_type: row.text("media_type")?,
        content: read_content(row)?,
    })
}
