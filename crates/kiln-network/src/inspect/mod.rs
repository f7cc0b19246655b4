//! Pure parsers of what a guest sends first: which protocol it is, and which name it asks for.
//!
//! Nothing here does I/O, waits or allocates beyond its named bounds. Every function takes bytes of a hostile
//! guest and must answer for all of them; a shorter prefix answers "need more", never something else.
//! Read next: [`classify`], [`tls`], [`http`].

pub mod http;
pub mod tls;

/// Most bytes of a first line that are held while the protocol is unknown.
pub const FIRST_LINE_BYTES_MAX: usize = 16 * 1024;

/// What the first bytes of a connection are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// Not decided by these bytes: more are needed.
    NeedMore,
    /// A TLS record.
    Tls,
    /// An HTTP/1 request line, or something a lenient server could take for one.
    Http,
    /// Neither.
    Other,
}

/// Methods that make a line HTTP even without a version (HTTP/0.9) or with rubbish in it.
const METHODS: &[&[u8]] = &[
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"DELETE ",
    b"CONNECT ",
    b"OPTIONS ",
    b"TRACE ",
    b"PATCH ",
    b"PRI ",
];

/// Tells TLS, HTTP and the rest apart by the first bytes. `eof`: no more bytes will come.
///
/// Text is HTTP when its first line names `HTTP/` or starts with a known method; leading empty lines and
/// blanks are skipped as lenient servers do, so that they cannot hide a request.
#[must_use]
pub fn classify(first: &[u8], eof: bool) -> Protocol {
    let undecided = if eof {
        Protocol::Other
    } else {
        Protocol::NeedMore
    };
    match first {
        [] | [0x16] => return undecided,
        [0x16, 0x03, ..] => return Protocol::Tls,
        _ => {}
    }
    let blank = |b: &u8| matches!(b, b'\r' | b'\n' | b' ' | b'\t');
    let Some(start) = first.iter().position(|b| !blank(b)) else {
        return undecided;
    };
    let text = &first[start..];
    if METHODS.iter().any(|method| text.starts_with(method)) {
        return Protocol::Http;
    }
    let line = text.split(|b| *b == b'\n').next().unwrap_or_default();
    let names_http = line
        .windows(5)
        .any(|part| part.eq_ignore_ascii_case(b"HTTP/"));
    if names_http {
        return Protocol::Http;
    }
    let ended = line.len() < text.len();
    let control = |b: &u8| (*b < 0x20 && !matches!(b, b'\t' | b'\r')) || *b == 0x7f;
    if ended || line.iter().any(control) {
        Protocol::Other
    } else {
        undecided
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn protocols_by_their_first_bytes() {
        use Protocol::*;
        let cases: &[(&[u8], Protocol)] = &[
            (b"", NeedMore),
            (b"\x16", NeedMore),
            (b"\x16\x03\x01", Tls),
            (b"\x16\x02", Other),
            (b"GE", NeedMore),
            (b"GET ", Http),
            (b"\r\n", NeedMore),
            (b"\r\n\r\nGET /", Http),
            (b" \tpropfind / http/1.1\r\n", Http),
            (b"PRI * HTTP/2.0\r\n", Http),
            (b"SSH-2.0-x y\r\n", Other),
            (b"SSH-2.0-x y", NeedMore),
            (b"\x00\x00\x00\x08\x04\xd2", Other),
            (b"*1\r\n$4\r\nPING\r\n", Other),
            (b"GET /\x00 HTTP/1.1\r\n", Http),
            (b"AMQP\x00\x00\x09\x01", Other),
        ];
        for (bytes, want) in cases {
            assert_eq!(classify(bytes, false), *want, "{bytes:?}");
        }
        assert_eq!(classify(b"foo", true), Other);
        assert_eq!(classify(b"GET /", true), Http);
    }

    proptest! {
        #[test]
        fn an_answer_never_changes_to_one_that_checks_less(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            more in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let early = classify(&bytes, false);
            let mut all = bytes.clone();
            all.extend(&more);
            if matches!(early, Protocol::Tls | Protocol::Http) {
                prop_assert_eq!(classify(&all, false), early);
            }
        }
    }
}
