//! Logins and tokens; challenges, locations and files of logins of other registries: read within bounds or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    kiln_store::fuzz::login(input);
});
