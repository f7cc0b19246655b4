//! The records of jobs: what was asked, how it stands or ended, its log and its events, as files that
//! people and programs can read long after the process that wrote them is gone.
//!
//! ```text
//! <root>/<job id>/record.json     state and outcome; replaced as a whole
//! <root>/<job id>/log             raw output, bounded, with a mark where something was cut
//! <root>/<job id>/events.jsonl    one JSON object a line, bounded likewise
//! <root>/<job id>/observed.json   what the host itself observed, when a build came that far
//! ```
//!
//! Until a control plane with a database exists these files are the job's only state. A record is
//! written when the job starts, with the process that runs it, so that a killed kiln's job reads as lost.

mod files;
mod process;
mod record;
mod store;
mod writer;

pub use process::ProcessMark;
pub use record::{JobRecord, NewRecord, RECORD_SCHEMA, RecordError, RecordState};
pub use store::{KEEP_DEFAULT, Listing, Pruned, Records, Unreadable};
pub use writer::{EVENTS_BYTES_MAX, JobWriter, LOG_BYTES_MAX, LOG_TAIL_BYTES};
