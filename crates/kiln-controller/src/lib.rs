//! The one decision-making server: takes requests, keeps them, decides who runs them, and tells how it went.
//!
//! Assembly: it knows the database, the scheduler and the stores; it starts no machine.

pub mod access;
pub mod api;
mod backend;
pub mod backup;
pub mod fleet;
pub mod images;
pub mod metrics;
pub mod peers;
pub mod pipelines;
pub mod retention;
pub mod secret_stores;
pub mod server;
mod shared;
pub mod state;
mod stored;
mod strangers;
mod traces;
pub mod webhooks;
