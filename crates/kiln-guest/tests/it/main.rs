//! The guest in real machines, driven over the real channel.
//!
//! Needs `KILN_TEST_VM`: a directory with `kernel`, `modules/` and `root.img`; and `KILN_TEST_GUEST`: the static
//! guest program. Without them every test here says so and passes, as there is nothing it could run in.

mod buildkit;
mod host;
mod machine;
mod network;
mod trees;
mod vm;
