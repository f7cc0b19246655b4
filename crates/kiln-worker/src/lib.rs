//! Assembly on one host: runs one lease from machine to receipt.
//!
//! This room knows every stage room and wires them: machines, network, images, store. It decides nothing about
//! queues or fairness; it prints nothing. Read next: [`host`] (what a host has ready), [`attempt`] (one machine of
//! one attempt), [`build`] and [`run`] (the two kinds of job).

pub mod event;
pub mod home;
pub mod solve;
pub mod orders;
pub mod services;
