//! The nouns of kiln: ids, jobs, leases, machine specifications, outcomes and policies.
//!
//! This room knows no I/O, no clock, no randomness and no async runtime: time and ids are
//! arguments. Every other room may know this one; this one knows none.
//! Read next: [`job`] (what is asked), [`machine`] (what is started), [`outcome`] (what came out).

pub mod access;
pub mod artifact;
pub mod command_line;
pub mod digest;
pub mod dispatch;
pub mod git_gateway;
pub mod id;
pub mod image_ref;
pub mod job;
pub mod lease;
pub mod machine;
pub mod network;
pub mod observed;
pub mod outcome;
pub mod run_script;
pub mod secret;
pub mod size;

pub use access::{Action, Principal, Role};
pub use artifact::{ArtifactName, ArtifactPath};
pub use digest::Digest;
pub use dispatch::{Assignment, Dispatch, Label, PendingReason, Priority};
pub use git_gateway::{GitAccess, GitCredential, GitRefused};
pub use id::{AttemptId, JobId, MachineName, PoolName, QueueName, TenantName, TokenId, WorkerId};
pub use image_ref::ImageRef;
pub use job::{JobKind, JobRequest, JobState};
pub use lease::{Epoch, Lease};
pub use machine::{DiskRole, DiskSlot, MachineSpec};
pub use network::{AllowRule, NetworkPolicy};
pub use observed::{GitCommit, Observed, Receipt};
pub use outcome::{FailureClass, Outcome, Overrun, Verdict};
pub use secret::{RunSecret, SecretName, SecretPlace};
pub use size::ByteSize;
