//! A ClientHello of a guest: never panics, and a longer input never changes an answer already given.
#![no_main]

use kiln_network::inspect::tls::{Hello, client_hello};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let whole = client_hello(data);
    let early = client_hello(&data[..data.len() / 2]);
    if matches!(early, Ok(Hello::Name(_) | Hello::NoName)) {
        assert_eq!(early, whole);
    }
});
