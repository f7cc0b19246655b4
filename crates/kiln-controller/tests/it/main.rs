//! The public interface over real HTTP on loopback: what it gives, what it refuses, what it survives.

mod abuse;
mod identity;
mod jobs;
mod schema;
mod server;
