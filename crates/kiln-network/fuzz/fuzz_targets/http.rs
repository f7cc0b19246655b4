//! Requests of a guest: never panics, cutting the input differently changes nothing, and every head that passes
//! names the admitted host.
#![no_main]

use kiln_network::inspect::http::{Form, HttpChecker};
use libfuzzer_sys::fuzz_target;

fn run<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, bool) {
    let mut checker = HttpChecker::new("a.example.org", 80, Form::Origin);
    let mut out = Vec::new();
    for part in parts {
        if checker.push(part, &mut out).is_err() {
            return (out, false);
        }
    }
    (out, true)
}

fuzz_target!(|data: &[u8]| {
    let whole = run(std::iter::once(data));
    let cut = run(data.chunks(1));
    assert_eq!(whole.1, cut.1);
    if whole.1 {
        assert_eq!(whole.0, cut.0);
    } else {
        // Of a refused body, more may have passed when it came in pieces.
        assert!(cut.0.starts_with(&whole.0));
    }
    if !whole.0.is_empty() {
        let text = whole.0.to_ascii_lowercase();
        assert!(text.windows(13).any(|part| part == b"a.example.org"));
    }
});
