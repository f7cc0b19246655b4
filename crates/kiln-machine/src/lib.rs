//! Machines behind one Driver trait: sim and qemu.
//!
//! Read [`driver`] first: the trait and its words. It knows nothing of jobs, tenants or builds. [`bring_up`] leads from a
//! specification to a guest that may be given work; [`record`] and [`reap`] make sure that nothing stays after a crash, and that
//! a kept machine finds a new owner;
//! [`ledger`] shares the host between kiln processes, [`pins`] its single CPUs.

mod adopt;
pub mod bring_up;
pub mod cgroup;
pub mod disk;
pub mod driver;
pub mod ledger;
mod own_file;
pub mod pins;
pub mod proc;
pub mod qemu;
pub mod reap;
pub mod record;
pub mod sim;
pub mod template;
