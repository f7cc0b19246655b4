//! Plans of whole folders: the examples, fixtures, and folders that have none.

#![expect(clippy::unwrap_used, reason = "tests")]

mod near_misses;
mod plans;
