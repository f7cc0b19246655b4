-- Images that several controllers share: their content is in the bucket, their names are here.
-- A content's key is never used again, so that removing the object of a row that is gone hits no later one.
create table image_contents (
  digest text primary key not null,
  key text not null unique,
  size {int} not null,
  touched_ms {int} not null
){strict};
create index image_contents_touched on image_contents (touched_ms);

create table image_manifests (
  repo text not null,
  digest text not null,
  media_type text not null,
  size {int} not null,
  subject text,
  artifact_type text,
  descriptor text not null,
  named_ms {int} not null,
  primary key (repo, digest)
){strict};
create index image_manifests_subject on image_manifests (repo, subject, digest) where subject is not null;

-- What a manifest of a repository is made of, itself included: whoever reads the repository may read these.
create table image_links (
  repo text not null,
  digest text not null,
  manifest text not null,
  primary key (repo, digest, manifest)
){strict};
create index image_links_digest on image_links (digest);

create table image_tags (
  repo text not null,
  tag text not null,
  digest text not null,
  moved_ms {int} not null,
  primary key (repo, tag)
){strict};
