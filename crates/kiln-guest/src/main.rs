//! PID 1 of a machine: mounts, commands, trees, forwards, DNS and egress.

fn main() {}
