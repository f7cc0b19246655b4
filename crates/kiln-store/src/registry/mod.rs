//! The embedded OCI registry: content-addressed files, a link per repository for every blob, tags,
//! referrers and uploads, behind typed authorities and an HTTP interface.
//!
//! It is not a proxy and not a cache: what is in it was pushed to it. Read next: [`store`] (what lies
//! where), [`authority`] (who may do what), [`http`] (the protocol).

mod adopt;
pub mod authority;
mod durable;
mod error;
mod gc;
pub mod http;
pub mod loopback;
pub mod manifest;
mod name;
mod quota;
mod repo;
pub mod serve;
mod sessions;
mod stall;
pub mod store;
pub mod token;
pub mod upload;
mod verified;

pub use adopt::Adopted;
pub use authority::{
    ATTEMPT_BYTES_MAX, Action, AttemptAuthority, Authority, Grant, LeaseCheck, LeaseTable, Names,
    UserAuthority,
};
pub use durable::FaultHook;
pub use error::{ErrorKind, StoreError};
pub use gc::{CORRUPT_KEEP, Collected, GRACE_DEFAULT, QUARANTINE_KEEP, Scrubbed, Stats};
pub use loopback::{BindError, LoopbackConfig};
pub use name::{ParseReferenceError, ParseRepoError, Reference, RepoName};
pub use repo::{PutManifest, StoredManifest};
pub use store::{BlobFile, OpenError, Store, StoreConfig};
pub use token::{Secret, SecretError};
