//! Machines behind one Driver trait: sim and qemu.

pub mod disk;
pub mod driver;
