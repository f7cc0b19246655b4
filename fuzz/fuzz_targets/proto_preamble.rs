//! The start of a session: no bytes shorter than a run are taken for one; Hellos are bounded.
#![no_main]

use kiln_proto::Hello;
use kiln_proto::preamble::{RunScanner, Scan};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut scanner = RunScanner::default();
    let (mut start, mut end) = (0, 0);
    while end < input.len() {
        end = (end + 1 + usize::from(input[end])).min(input.len());
        match scanner.scan(&input[start..end]) {
            Scan::Consumed(count) => start += count,
            Scan::Found(..) => panic!("{} bytes cannot hold a run", input.len()),
        }
        assert!(end - start < kiln_proto::preamble::PREAMBLE_LEN);
    }
    if let Ok(hello) = Hello::parse(input) {
        let body = hello
            .to_body()
            .expect("what was accepted can be said again");
        assert_eq!(Hello::parse(&body).as_ref(), Ok(&hello));
    }
});
