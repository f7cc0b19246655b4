//! End-to-end tests: the built `kiln` against real machines, BuildKit and registries of packages.
//!
//! `make test` names the program and a prepared home (`KILN_TEST_BIN`, `KILN_TEST_HOME`); without them these tests say that they
//! are skipped, and fail when `KILN_TEST_REQUIRE_TOOLS=1`.

mod annex;
mod apps;
mod artifacts;
mod attend_serve;
mod attend_sim;
mod bounds;
mod build;
mod confinement;
mod e2e_script;
mod engines;
mod faults;
mod faults_disk;
mod faults_host;
mod faults_kill;
mod faults_large;
mod faults_rot;
mod fleet_artifacts;
mod fleet_hostile;
mod fleet_kill;
mod fleet_network;
mod fleet_orphans;
mod fleet_secrets;
mod fleet_sim;
mod git;
mod home_queue;
mod hostile_network;
mod hostile_output;
mod input;
mod kept;
mod kept_serve;
mod kept_server;
mod learn;
mod ordinary_user;
mod policy;
mod push;
mod registry;
mod residue;
mod room;
mod run;
mod run_flags;
mod run_folder;
mod run_given;
mod run_phases;
mod secret_sources;
mod serve;
mod serve_images;
mod serve_policy;
mod serve_state;
mod setup_host;
mod ssh;
mod support;
mod tables;
mod terminal;
