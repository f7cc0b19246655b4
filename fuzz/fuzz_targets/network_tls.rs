//! The first bytes of a connection that a guest opened: which protocol, and for TLS which server it names.
#![no_main]

use kiln_network::inspect::{classify, tls};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let _ = classify(input, false);
    let _ = classify(input, true);
    if let Ok(hello @ (tls::Hello::Name(_) | tls::Hello::NoName | tls::Hello::Encrypted)) = tls::client_hello(input) {
        // Once it is complete, more of the same connection never changes who was named.
        let mut longer = input.to_vec();
        longer.extend_from_slice(&[0x17, 3, 3, 0, 1, 0]);
        let again = tls::client_hello(&longer).expect("what was complete stays so");
        assert_eq!(hello, again);
    }
});
