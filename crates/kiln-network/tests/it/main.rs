//! Integration tests of the gateway: loopback servers behind a resolver and dialer of our own.

mod fairness;
mod floor;
mod gateway;
mod git;
mod names;
mod phases;
mod proxy;
mod rules;
mod world;
