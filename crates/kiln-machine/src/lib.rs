//! Machines behind one Driver trait: sim and qemu.

pub mod bring_up;
pub mod cgroup;
pub mod disk;
pub mod driver;
pub mod ledger;
pub mod proc;
pub mod reap;
pub mod record;
pub mod sim;
pub mod qemu;
pub mod template;
