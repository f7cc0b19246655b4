//! Integration tests of the worker: whole builds in simulated machines, with the real registry.

mod idle;
mod orphans;
mod phases;
mod workshop;
