//! Integration tests of the worker: whole builds in simulated machines, with the real registry.

mod phases;
mod workshop;
