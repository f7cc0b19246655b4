//! Names of images that controllers share: which there are, and how one is taken away. What then has no name goes with it; contents that
//! nothing is made of go with the next collection ([`Database::image_garbage`]).

use kiln_core::Digest;

use crate::database::{Database, write_tx};
use crate::engine::{Tx, args};
use crate::error::DbError;

/// A name of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedImage {
    /// The repository.
    pub repo: String,
    /// The tag.
    pub tag: String,
    /// The manifest.
    pub digest: Digest,
    /// Bytes of the manifest and of what it names itself: of an index, not of its images.
    pub bytes: u64,
    /// When it was named so, milliseconds since the Unix epoch, where that is known.
    pub named_unix_ms: Option<u64>,
}

impl Database {
    /// Names below a tree of repositories, by name, after the given repository and tag.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn image_names(
        &self,
        tree: &str,
        after: (&str, &str),
        limit: u32,
    ) -> Result<Vec<NamedImage>, DbError> {
        // Names of repositories have `_`, which would stand for any character.
        let below = format!(
            "{}/%",
            tree.replace('!', "!!")
                .replace('_', "!_")
                .replace('%', "!%")
        );
        let (repo, tag) = (after.0.to_owned(), after.1.to_owned());
        self.read("list images", |tx| {
            Box::pin(async move {
                let sql = "select t.repo, t.tag, t.digest, t.moved_ms,
                        (select cast(coalesce(sum(c.size), 0) as bigint) from image_links l
                            join image_contents c on c.digest = l.digest
                            where l.repo = t.repo and l.manifest = t.digest) as bytes
                    from image_tags t where t.repo like $1 escape '!'
                        and (t.repo > $2 or (t.repo = $2 and t.tag > $3))
                    order by t.repo, t.tag limit $4";
                let rows = tx.rows(sql, args![below, repo, tag, limit]).await?;
                let named = rows.iter().map(|row| {
                    Ok(NamedImage {
                        repo: row.text("repo")?,
                        tag: row.text("tag")?,
                        digest: row.parse("digest")?,
                        bytes: row.u64("bytes")?,
                        named_unix_ms: Some(row.u64("moved_ms")?),
                    })
                });
                named.collect()
            })
        })
        .await
    }

    /// Takes a name away, and with its last name the manifest, what is about it, and of an index those of its `children` that have no name
    /// and no other index here. False when there is no such name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn unname_image(
        &self,
        repo: &str,
        tag: &str,
        children: Vec<Digest>,
    ) -> Result<bool, DbError> {
        let (repo, tag) = (repo.to_owned(), tag.to_owned());
        write_tx!(
            self,
            "take the name of an image away",
            [repo, tag, children],
            |tx| {
                let sql = "select digest from image_tags where repo = $1 and tag = $2";
                let Some(row) = tx.row(sql, args![repo.as_str(), tag.as_str()]).await? else {
                    return Ok(false);
                };
                let digest = row.text("digest")?;
                // Whoever names it once more at this moment holds its content's row, and comes before or after.
                let sql = "select c.digest from image_contents c where c.digest = $1 /*lock c*/";
                tx.row(sql, args![digest.as_str()]).await?;
                let sql = "delete from image_tags where repo = $1 and tag = $2 and digest = $3";
                let values = args![repo.as_str(), tag.as_str(), digest.as_str()];
                if tx.exec(sql, values).await? == 0 {
                    return Ok(false);
                }
                if !drop_unnamed(tx, &repo, &digest).await? {
                    return Ok(true);
                }
                let sql = "delete from image_links where repo = $1 and manifest in (
                    select digest from image_manifests where repo = $1 and subject = $2)
                and manifest not in (select digest from image_tags where repo = $1)";
                tx.exec(sql, args![repo.as_str(), digest.as_str()]).await?;
                let sql = "delete from image_manifests where repo = $1 and subject = $2
                and digest not in (select digest from image_tags where repo = $1)";
                tx.exec(sql, args![repo.as_str(), digest.as_str()]).await?;
                let sql = "select digest from image_manifests
                where repo = $1 and (media_type like '%index%' or media_type like '%list%') limit 1";
                if tx.row(sql, args![repo.as_str()]).await?.is_none() {
                    for child in children.iter() {
                        drop_unnamed(tx, &repo, &child.to_string()).await?;
                    }
                }
                Ok(true)
            }
        )
    }
}

/// Removes a manifest from a repository unless a tag points at it; whether it did.
async fn drop_unnamed(tx: &mut Tx, repo: &str, digest: &str) -> Result<bool, DbError> {
    let sql = "delete from image_manifests where repo = $1 and digest = $2
        and not exists (select 1 from image_tags t where t.repo = $1 and t.digest = $2)";
    if tx.exec(sql, args![repo, digest]).await? == 0 {
        return Ok(false);
    }
    let sql = "delete from image_links where repo = $1 and manifest = $2";
    tx.exec(sql, args![repo, digest]).await?;
    Ok(true)
}
