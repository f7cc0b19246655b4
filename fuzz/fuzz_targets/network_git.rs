//! Request lines of a machine's git: what goes on to a server names one repository as the policy would, and nothing else.
#![no_main]

use kiln_core::secret::Repository;
use kiln_network::gateway::git::request::{address, read, redirected};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let (method, target) = text.split_once(' ').unwrap_or(("GET", text));
    let request = match read(method, target) {
        Ok(request) => request,
        Err(refused) => {
            assert!(refused.path.bytes().all(|b| b.is_ascii_graphic()));
            return;
        }
    };
    let path = request.target.split('?').next().unwrap_or_default();
    let ended = ["/info/refs", "/git-upload-pack"].iter().find_map(|end| path.strip_suffix(end));
    let named = format!("{}{}", request.repository.authority(), ended.expect("one of two"));
    let again: Repository = named.parse().expect("a repository");
    assert_eq!(again, request.repository);
    assert!(!path.contains("//") && !path.contains('%'));
    assert!(path.split('/').all(|part| !matches!(part, "." | "..")));
    // What a server says leads to a request like any other, or nowhere.
    if let Some(next) = redirected(&request, target) {
        let here = address(&next);
        let target = here.strip_prefix("http://git.kiln.internal").expect("here");
        assert_eq!(read("GET", target), Ok(next));
    }
});
