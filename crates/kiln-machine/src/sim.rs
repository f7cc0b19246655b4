//! A driver without a VMM: the guest is a task in this process that speaks the real wire protocol.
//!
//! It ships in the product, so that everything above the driver can be tried without hardware, and is what most tests use. It is
//! honest by default and leaves real traces on disk (record, lock, overlays, and on request a stand-in process and a cgroup), so that
//! reaping and leak checks mean something. [`Fault`]s make it dishonest, slow, silent or dead at a chosen [`Step`]. All waits go through
//! `tokio::time`, so a test may pause the clock. What commands do is a [`Script`]; a few of a real system's are built in.
//! It isolates nothing: it must never be given a command of a tenant. Read next: [`SimConfig`], `guest`, `port`.

mod config;
mod disk;
mod driver;
mod exec;
mod fault;
mod guest;
mod kept;
mod machine;
mod memory;
mod orders;
mod port;
mod script;
mod template;
mod tree;

pub use config::{Phase, PhaseHook, SimConfig};
pub use disk::{read_disk, write_disk};
pub use driver::SimDriver;
pub use fault::{Fault, Lie, Step, Trouble, Violation};
pub use machine::SimMachine;
pub use script::{Action, ExecCall, ExecEnd, GuestHandle, Listener, Script};
