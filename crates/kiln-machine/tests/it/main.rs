//! Integration tests of kiln-machine: one conformance suite for every driver, faults, crashes, and the ledger between processes.

mod child;
mod conformance;
mod faults;
mod host;
mod host_facts;
mod ledger;
mod life;
mod sim;
