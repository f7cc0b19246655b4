//! Test support: temporary homes, fixtures, golden files, a clock that stands still. Development only: no product code may depend on it.
//!
//! It holds nothing that knows a stage of the flow; fakes of a stage live with that stage (the simulated driver is `kiln_machine::sim`).

mod clock;
mod fixture;
mod golden;
mod home;
pub mod postgres;
pub mod seaweed;
mod wait;

pub use clock::FakeClock;
pub use fixture::{copy_tree, free_port, tree_of};
pub use golden::{Golden, redact};
pub use home::TempHome;
pub use wait::wait_until;
