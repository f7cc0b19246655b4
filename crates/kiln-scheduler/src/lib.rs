//! Decides which job runs where: `plan(&PoolView)` gives assignments and one reason for every job that stays.
//!
//! Pure: no clock, no randomness, no runtime. The same view always gives the same plan.
