//! What all controllers of one database must have in common: keys, the name in their tokens, and the store of logs and sources. The
//! first one records its own; each later one is compared, and refused rather than let in half.
//!
//! A SQLite file has one controller, which agrees with itself.

use std::path::{Path, PathBuf};

use kiln_db::{Database, DbError, Settled};
use kiln_store::logs::{ObjectTarget, S3Target};
use kiln_store::{Bucket, BucketError};

use crate::access::Access;
use crate::peers::DEAD_AFTER_MS;

/// Object that names a bucket, whatever address it is reached by.
const STORE_ID: &str = "store-id";

/// What controllers of one database share, and how the others reach this one.
#[derive(Clone, Debug, Default)]
pub struct Sharing {
    /// Bucket of ended logs and uploaded sources; none: the controller's folder.
    pub store: Option<S3Target>,
    /// `HOST:PORT` at which other controllers reach this one; none: the first address it listens on, if that says which host it is.
    pub advertise: Option<String>,
    /// Take the database over: its controllers are gone, their keys and store are replaced by this one's.
    pub adopt: bool,
}

/// Why a controller may not share a database.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The first controller keeps logs and sources in its folder.
    #[error(
        "this database has a controller that keeps logs and sources in its own folder ({known}): several controllers need one object store"
    )]
    FileStore {
        /// Whose folder.
        known: String,
    },
    /// The others have a bucket and this one was given none, or another one.
    #[error(
        "the controllers of this database keep logs and sources in another object store ({known}, not {own})"
    )]
    OtherStore {
        /// Theirs.
        known: String,
        /// This one's.
        own: String,
    },
    /// The keys are not the others'.
    #[error(
        "the keys in {} are not those of the other controllers of this database: tokens and workers of one would be refused by the other",
        .0.display()
    )]
    OtherKeys(PathBuf),
    /// There are no keys yet, and the others have some.
    #[error("this database has controllers with keys, and {} does not exist", .0.display())]
    NoKeys(PathBuf),
    /// It is not free to be taken over.
    #[error("the database cannot be taken over: controller {0} uses it now")]
    InUse(String),
    /// The bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The database.
    #[error(transparent)]
    Database(#[from] DbError),
}

/// Whether this controller may replace what is recorded: it was asked to, and no other one is alive.
pub(crate) async fn may_adopt(db: &Database, id: &str, asked: bool) -> Result<bool, SharedError> {
    if !asked || !db.is_shared() {
        return Ok(false);
    }
    let (all, now) = db.controllers().await?;
    let lives = |other: &&kiln_db::Controller| {
        let silent = now.saturating_sub(other.seen_unix_ms);
        other.id != id && other.url.is_some() && silent < DEAD_AFTER_MS
    };
    match all.iter().find(lives) {
        Some(other) => Err(SharedError::InUse(other.id.clone())),
        None => Ok(true),
    }
}

/// The name in tokens: the first controller's.
pub(crate) async fn issuer(db: &Database, own: String, adopt: bool) -> Result<String, SharedError> {
    if !db.is_shared() {
        return Ok(own);
    }
    Ok(match db.settle("issuer", &own, adopt).await? {
        Settled::Same => own,
        Settled::Other(known) => known,
    })
}

/// Before keys are made: where the others have some, new ones would be of no use.
pub(crate) async fn keys_expected(
    db: &Database,
    keys: &Path,
    adopt: bool,
) -> Result<(), SharedError> {
    let made = db.is_shared() && !adopt && db.settled("keys").await?.is_some();
    match made && !keys.exists() {
        true => Err(SharedError::NoKeys(keys.to_owned())),
        false => Ok(()),
    }
}

/// The keys are the others'.
pub(crate) async fn keys(
    db: &Database,
    access: &Access,
    folder: &Path,
    adopt: bool,
) -> Result<(), SharedError> {
    if !db.is_shared() {
        return Ok(());
    }
    let own = access.fingerprint().to_string();
    match db.settle("keys", &own, adopt).await? {
        Settled::Same => Ok(()),
        Settled::Other(_) => Err(SharedError::OtherKeys(folder.to_owned())),
    }
}

/// The store is the others'. Gives the bucket, if it is one.
pub(crate) async fn store(
    db: &Database,
    target: Option<&S3Target>,
    id: &str,
    adopt: bool,
) -> Result<Option<Bucket>, SharedError> {
    let bucket = match target {
        None => None,
        Some(target) => Some(Bucket::open(&ObjectTarget::S3(target.clone()))?),
    };
    if !db.is_shared() {
        return Ok(bucket);
    }
    let own = match &bucket {
        None => format!("folder of {id}"),
        Some(bucket) => {
            let make = || format!("{:016x}", crate::fleet::sweep::random()).into_bytes();
            let name = bucket.small_or_create(STORE_ID, make).await?;
            format!("bucket {}", String::from_utf8_lossy(&name))
        }
    };
    match db.settle("store", &own, adopt).await? {
        Settled::Same => Ok(bucket),
        Settled::Other(known) if known.starts_with("folder") => {
            Err(SharedError::FileStore { known })
        }
        Settled::Other(known) => Err(SharedError::OtherStore { known, own }),
    }
}
