//! Durable state of a controller: the queue, leases, workers, tenants, tokens, events, webhooks, audit rows.
//!
//! The only room that knows SQL. SQLite for one controller, PostgreSQL for several; one text of every statement and one conformance
//! suite for both. It decides nothing: who runs what is `kiln-scheduler`'s, what a state change means is `kiln_core::JobState`'s.
//! Next: [`Database`], then the module named after what you want to change.

mod announce;
mod attend;
mod audit;
mod cancel;
mod claim;
mod clock;
mod close;
mod controllers;
mod database;
mod door;
mod engine;
mod error;
mod event;
mod expire;
mod hold;
mod image;
mod image_names;
mod incident;
mod job;
mod kept;
mod leader;
mod lease;
mod leases_of;
mod list;
pub mod measure;
mod notify;
mod open;
mod outbox;
mod own;
mod pipeline;
mod record;
mod restore;
mod retention;
mod schema;
mod secret;
mod submit;
mod tenant;
mod token;
mod url;
mod view;
mod wake;
mod worker;

pub use audit::{AuditFilter, AuditFrom, AuditPage, AuditRow, NewAudit};
pub use cancel::{CancelError, Cancelled};
pub use claim::{CLAIM_MAX, ClaimError, ClaimRefused, Claimed};
pub use clock::{Clock, SystemClock};
pub use controllers::{Controller, Settled};
pub use database::{Database, LeaseTimes, OpenOptions};
pub use door::{
    AttemptEnd, Door, DoorError, DoorKind, EVENT_BYTES_MAX, EVENT_KIND_MAX, EVENTS_MAX, Finish,
    LogMark, RECORD_EVENTS_MAX,
};
pub use error::{Cause, DbError};
pub use event::{Event, EventMark};
pub use expire::{Expired, Sweep, Swept};
pub use hold::{HOLDS_MAX, Hold, HoldError, Holding};
pub use image::{ImageContent, ImageManifest, ImageTag, NameImagesError, NewImages, NewManifest};
pub use image_names::NamedImage;
pub use incident::{EndedIncident, INCIDENT, Incidented, NewIncident};
pub use job::{
    Attempt, CancelMark, Estimate, HeldJob, Idempotency, Job, NewJob, PendingJob, Tier, kind_name,
};
pub use kept::{KEPT_LISTED_MAX, KeepError, Kept, NewKept};
pub use leader::Leadership;
pub use lease::{Heartbeat, HeartbeatError, LeaseAnswer, UnnamedLease};
pub use list::{Artifact, Cursor, JobFilter, JobSummary, PAGE_MAX, Page, ParseCursorError};
pub use open::OpenError;
pub use outbox::{Message, MessageFilter, OldSecret, Rotated, WEBHOOKS_MAX, Webhook};
pub use record::HandedIn;
pub use restore::{BackupError, RestoreError, Restored};
pub use retention::{Aged, Aging, Retention, RetentionPlan};
pub use schema::VERSION as SCHEMA_VERSION;
pub use secret::{NewValue, Opened, SECRET_READ, Secret, SecretFrom, SecretValue, Written};
pub use submit::{SubmitError, Submitted};
pub use tenant::{
    Depth, Filling, GlobalLimits, NameError, PENDING_MAX_USUAL, Paused, Queue, Quota,
    STORED_MAX_USUAL, Tenant, Usage, WEIGHT_DEFAULT,
};
pub use token::{NewToken, Token, TokenRefused};
pub use url::{DatabaseUrl, ParseUrlError, PostgresUrl};
pub use view::{Learnt, PoolRows};
pub use wake::Wake;
pub use worker::{
    Certificate, JoinError, JoinToken, NewJoinToken, NewWorker, Placement, Worker, WorkerError,
};
