//! Paths, queries and range headers of a request to the registry: read within bounds or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    kiln_store::fuzz::http(input);
});
