//! The public interface over real HTTP on loopback: what it gives, what it refuses, what it survives.

mod abuse;
/// When a worker's leases end: the worker's own code, which this room may not depend on.
#[path = "../../../kiln-worker/src/fleet/fence.rs"]
#[expect(unreachable_pub, reason = "it is a part of another crate's interface")]
mod fence;
mod fleet_artifacts;
mod fleet_attacks;
mod fleet_backup;
mod fleet_disk;
mod fleet_doors;
mod fleet_faults;
mod fleet_followers;
mod fleet_images;
mod fleet_kept;
mod fleet_lease_model;
mod fleet_lease_sim;
mod fleet_line;
mod fleet_pools;
mod fleet_postgres;
mod fleet_record;
mod fleet_server;
mod fleet_shared;
mod fleet_tokens;
mod fleet_traces;
mod fleet_update;
mod fleet_worker;
mod identity;
mod identity_issuer;
mod jobs;
mod operators;
mod policies;
mod registry_people;
mod schema;
mod secret_stores;
mod secrets;
mod server;
mod trust;
mod webhooks;
