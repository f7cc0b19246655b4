//! HTTP requests of a guest on their way to a server: the same decision and the same bytes, in whatever pieces they come; and what passes is framed in
//! one way only, as a reader that knows nothing of the checker finds.
#![no_main]

use kiln_network::inspect::http::{Form, HttpChecker};
use libfuzzer_sys::fuzz_target;

#[path = "../../crates/kiln-network/src/inspect/http_framing.rs"]
mod http_framing;
use http_framing::framed_in_one_way;

/// What was passed on, and whether it ended in a refusal.
fn run(form: &Form, pieces: &[&[u8]]) -> (Vec<u8>, bool) {
    let mut checker = HttpChecker::new("example.test", 80, form.clone());
    let mut out = Vec::new();
    for piece in pieces {
        if checker.push(piece, &mut out).is_err() {
            return (out, true);
        }
    }
    (out, false)
}

fuzz_target!(|input: &[u8]| {
    let Some((at, bytes)) = input.split_first() else {
        return;
    };
    let at = usize::from(*at).min(bytes.len());
    let authorization = Some("Basic eDp5".to_owned());
    for form in [Form::Origin, Form::Proxy { authorization }] {
        let whole = run(&form, &[bytes]);
        framed_in_one_way(&whole.0, "example.test");
        let (first, second) = bytes.split_at(at);
        assert_eq!(whole, run(&form, &[first, second]), "in two pieces");
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(whole, run(&form, &single), "byte by byte");
    }
});
