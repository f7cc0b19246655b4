//! Workers and what they do: the scheduling loop, the sweep, and the doors of `/worker/v1`.
//!
//! Read next: [`schedule`] (who runs what), [`doors`] (what a worker may do under its lease), [`sweep`] (what is lost).

pub mod doors;
mod enrol;
mod former_life;
mod inputs;
pub mod machines;
pub mod neighbours;
mod own;
mod policy;
mod record;
pub mod refusal;
pub mod registry_door;
mod registry_login;
pub(crate) mod reports;
mod results;
pub mod schedule;
pub mod secrets;
pub mod shield;
pub mod source;
pub mod sweep;
pub mod who;
