//! The registry and the job records as their users meet them.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests may stop at the first surprise and say what they skip"
)]

mod client;
mod clients;
mod conformance;
mod crash;
mod ends;
mod guest;
mod host_api;
mod image;
mod integrity;
mod logs;
mod logs_s3;
mod loopback;
mod pull;
mod push_pull;
mod remote;
mod room;
mod sessions;
mod skopeo;
