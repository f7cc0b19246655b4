//! First bytes of a guest: more bytes never turn a checked protocol into an unchecked one.
#![no_main]

use kiln_network::inspect::{Protocol, classify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let early = classify(&data[..data.len() / 2], false);
    if matches!(early, Protocol::Tls | Protocol::Http) {
        assert_eq!(classify(data, false), early);
    }
});
