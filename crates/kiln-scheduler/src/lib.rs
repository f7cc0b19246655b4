//! Decides which job runs where: [`plan`] gives assignments and one reason for every job that stays.
//!
//! Pure: no clock, no randomness, no runtime. The same view always gives the same plan, in whatever order its lists came.
//! It keeps nothing between two decisions: the controller reads a [`PoolView`], plans, and claims what the plan says in the
//! database, which may refuse (then the next view is different). Read next: [`view`], then [`plan`](mod@plan).

mod classes;
mod decide;
mod fleet;
mod host_set;
mod order;
pub mod plan;
mod prepare;
mod room;
pub mod sample;
mod timeline;
pub mod view;

pub use plan::{Estimate, EstimateBasis, Plan, Reservation, Waiting, plan};
pub use view::{
    HistoryKey, PendingJob, PoolView, Profile, QueueRule, RunningJob, TenantRule, Typical, Worker,
};
