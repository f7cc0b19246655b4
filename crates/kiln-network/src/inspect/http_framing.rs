//! What passed the HTTP checker, read by somebody who knows nothing of it: a line ends with CR LF and has no other byte that anybody takes for a line
//! end, and every request says in one way where it ends and to whom it goes. For tests and the fuzz target, which fail where that is not so.

/// The line at the front, which ends at the first CR LF; no other byte of it may be a line end to anybody, or a control but HTAB.
fn line<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let end = rest.windows(2).position(|two| two == b"\r\n");
    let (line, tail) = rest.split_at(end.expect("a line that passes is whole"));
    let plain = |b: &u8| *b == b'\t' || (*b >= 0x20 && *b != 0x7f);
    assert!(
        line.iter().all(plain),
        "{:?}",
        String::from_utf8_lossy(line)
    );
    *rest = &tail[2..];
    line
}

/// Header lines up to the empty one, as names in lower case and values.
fn fields(rest: &mut &[u8]) -> Vec<(String, String)> {
    let mut all = Vec::new();
    loop {
        let field = line(rest);
        if field.is_empty() {
            return all;
        }
        let field = String::from_utf8_lossy(field);
        let (name, value) = field.split_once(':').expect("a field has a colon");
        all.push((name.to_ascii_lowercase(), value.trim().to_ascii_lowercase()));
    }
}

/// Walks what passed as a strict server for `host` would. What was cut off ends the walk.
pub(crate) fn framed_in_one_way(mut rest: &[u8], host: &str) {
    while !rest.is_empty() {
        let request = line(&mut rest);
        assert!(request.ends_with(b" HTTP/1.1") || request.ends_with(b" HTTP/1.0"));
        let head = fields(&mut rest);
        let values = |name: &str| -> Vec<String> {
            let named = head.iter().filter(|(have, _)| have == name);
            named.map(|(_, value)| value.clone()).collect()
        };
        assert!(
            matches!(&*values("host"), [said] if said.strip_suffix(":80").unwrap_or(said) == host)
        );
        assert!(values("upgrade").is_empty() && values("http2-settings").is_empty());
        match (&*values("content-length"), &*values("transfer-encoding")) {
            ([], []) => {}
            ([length], []) => {
                let length: usize = length.parse().expect("digits");
                rest = &rest[length.min(rest.len())..];
            }
            ([], [coding]) => {
                assert_eq!(coding, "chunked");
                if !chunks(&mut rest) {
                    return;
                }
            }
            _ => panic!("two ways to frame a body"),
        }
    }
}

/// Whether the body ended in what passed.
fn chunks(rest: &mut &[u8]) -> bool {
    while !rest.is_empty() {
        let size = line(rest);
        let digits = size.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let text = std::str::from_utf8(&size[..digits]).expect("digits");
        let size = usize::from_str_radix(text, 16).expect("a size");
        if size == 0 {
            // Trailers pass line by line.
            while !rest.is_empty() {
                if line(rest).is_empty() {
                    return true;
                }
            }
            return false;
        }
        let (chunk, tail) = rest.split_at(size.min(rest.len()));
        let end = &tail[..tail.len().min(2)];
        assert!(chunk.len() < size || b"\r\n".starts_with(end));
        *rest = &tail[end.len()..];
    }
    false
}
