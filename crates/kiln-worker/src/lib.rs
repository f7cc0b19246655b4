//! Assembly on one host: runs one lease from machine to receipt.
//!
//! This room knows every stage room and wires them: machines, network, images, store. It decides nothing about
//! queues or fairness; it prints nothing. Read next: [`host`] (what a host has ready), [`attempt`] (one machine of
//! one attempt), [`build`] and [`run`] (the two kinds of job).

pub mod ask;
pub mod attempt;
pub mod attend;
pub mod build;
pub mod buildkit;
pub mod checkout;
pub mod collect;
pub mod commit;
mod connections;
pub mod container;
pub mod event;
pub mod failure;
pub mod fleet;
pub mod fork;
pub mod given;
pub mod home;
pub mod host;
pub mod image;
pub mod incident;
pub mod joblog;
pub mod kept;
pub mod measured;
pub mod orders;
pub mod phases;
pub mod prepare;
pub mod publish;
pub mod registry;
pub mod repeat;
pub mod run;
pub mod run_files;
mod run_git;
pub mod run_secrets;
pub mod services;
pub mod setup;
pub mod site;
pub mod solve;
pub mod solve_failure;
pub mod ssh_agent;
pub mod templates;
pub mod unpack;
pub mod warm;
