//! Workers and what they do: the scheduling loop, the sweep, and the doors of `/worker/v1`.
//!
//! Read next: [`schedule`] (who runs what), [`doors`] (what a worker may do under its lease), [`sweep`] (what is lost).

pub mod doors;
mod former_life;
pub mod refusal;
pub mod registry_door;
pub mod schedule;
pub mod secrets;
pub mod source;
pub mod sweep;
pub mod who;
