//! Machines behind one Driver trait: sim and qemu.

pub mod driver;
