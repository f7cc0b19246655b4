//! End-to-end tests: the built `kiln` against real machines, BuildKit and registries of packages.
//!
//! `make test` names the program and a prepared home (`KILN_TEST_BIN`, `KILN_TEST_HOME`); without them these tests say that they
//! are skipped, and fail when `KILN_TEST_REQUIRE_TOOLS=1`.

mod apps;
mod build;
mod engines;
mod faults;
mod git;
mod input;
mod ordinary_user;
mod push;
mod run;
mod support;
mod terminal;
