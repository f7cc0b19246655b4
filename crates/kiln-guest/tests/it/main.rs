//! The guest in real machines, driven over the real channel.
//!
//! Needs `KILN_TEST_IMAGE`: a machine image's directory (`kernel`, `initrd`, `root.img`); and `KILN_TEST_GUEST`: the static
//! guest program. Without them every test here says so and passes, as there is nothing it could run in.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests say what they see, and a failed step ends them"
)]

mod buildkit;
mod host;
mod hostile;
mod machine;
mod memory;
mod network;
mod trees;
mod vm;
