//! Repository names, tags, digests and image references: read within bounds or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    kiln_store::fuzz::name(input);
});
