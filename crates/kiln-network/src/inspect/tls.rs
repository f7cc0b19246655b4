//! The server name in a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3).
//!
//! Not a TLS implementation: it reads exactly one message, possibly spread over several records, and refuses
//! what two readers could read differently (two names, two `server_name` extensions, trailing bytes).
//!
//! Encrypted ClientHello hides the name that the server will go by, so a hello that carries it is refused, whatever its outer name:
//! one that merely pretends (GREASE) cannot be told from one that means it, which is what GREASE is for. The hello that follows a
//! HelloRetryRequest is not read: it comes after the first one was sent on.

use std::fmt;

/// Most bytes, record headers included, a ClientHello may take.
pub const HELLO_BYTES_MAX: usize = 16 * 1024;
/// Most records a ClientHello may be cut into.
pub const HELLO_RECORDS_MAX: usize = 64;

/// `encrypted_client_hello` (RFC 9849), its drafts, and `encrypted_server_name` of the drafts before them.
fn hides_the_name(extension: u16) -> bool {
    matches!(extension, 0xfe08..=0xfe0d | 0xffce)
}

/// What a ClientHello says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hello {
    /// Not complete yet.
    NeedMore,
    /// It asks for this name (as written).
    Name(String),
    /// It names nothing.
    NoName,
    /// Its name, or what stands for it, is encrypted.
    Encrypted,
}

/// Why bytes are not an acceptable ClientHello.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HelloError {
    /// Longer than [`HELLO_BYTES_MAX`] or cut into more than [`HELLO_RECORDS_MAX`] records.
    #[error(
        "the TLS ClientHello is longer than {HELLO_BYTES_MAX} bytes or {HELLO_RECORDS_MAX} records"
    )]
    TooLong,
    /// Broken, or ambiguous; the text says where.
    #[error("the TLS ClientHello is malformed: {0}")]
    Malformed(&'static str),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], HelloError> {
        let (head, tail) = self
            .0
            .split_at_checked(len)
            .ok_or(HelloError::Malformed(what))?;
        self.0 = tail;
        Ok(head)
    }

    /// A vector with a length prefix of one or two bytes.
    fn vector(&mut self, prefix: usize, what: &'static str) -> Result<&'a [u8], HelloError> {
        let len = self
            .take(prefix, what)?
            .iter()
            .fold(0_usize, |len, byte| (len << 8) | usize::from(*byte));
        self.take(len, what)
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, HelloError> {
        let bytes = self.take(2, what)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }
}

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// Reads the server name from the first bytes a TLS client sent.
///
/// # Errors
/// When the bytes are not the beginning of a well-formed, unambiguous ClientHello within the bounds.
pub fn client_hello(bytes: &[u8]) -> Result<Hello, HelloError> {
    let mut message = Vec::new();
    let mut records = 0;
    let mut rest = bytes;
    loop {
        if let Some(len) = message_len(&message)?
            && message.len() >= len
        {
            return server_name(&message[4..len]);
        }
        let seen = bytes.len() - rest.len();
        if records == HELLO_RECORDS_MAX || seen >= HELLO_BYTES_MAX {
            return Err(HelloError::TooLong);
        }
        let Some((fragment, tail)) = record(rest)? else {
            return if bytes.len() >= HELLO_BYTES_MAX {
                Err(HelloError::TooLong)
            } else {
                Ok(Hello::NeedMore)
            };
        };
        message.extend_from_slice(fragment);
        records += 1;
        rest = tail;
    }
}

/// Length of the handshake message with its header, once its header is there.
fn message_len(message: &[u8]) -> Result<Option<usize>, HelloError> {
    match message {
        [] => Ok(None),
        [kind, ..] if *kind != 1 => Err(HelloError::Malformed("not a ClientHello")),
        [_, a, b, c, ..] => {
            let len = 4 + u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if len > HELLO_BYTES_MAX {
                Err(HelloError::TooLong)
            } else {
                Ok(Some(len))
            }
        }
        _ => Ok(None),
    }
}

/// The fragment of one record, and what lies behind the record.
type Record<'a> = (&'a [u8], &'a [u8]);

/// One whole record at the front, its header checked as early as possible.
fn record(bytes: &[u8]) -> Result<Option<Record<'_>>, HelloError> {
    if bytes.first().is_some_and(|kind| *kind != 0x16) {
        return Err(HelloError::Malformed("not a handshake record"));
    }
    if bytes.get(1).is_some_and(|major| *major != 3) {
        return Err(HelloError::Malformed("record version"));
    }
    let Some((head, rest)) = bytes.split_at_checked(5) else {
        return Ok(None);
    };
    let len = usize::from(u16::from_be_bytes([head[3], head[4]]));
    if len == 0 || len > 1 << 14 {
        return Err(HelloError::Malformed("record length"));
    }
    Ok(rest.split_at_checked(len))
}

/// Walks the body of a ClientHello.
fn server_name(body: &[u8]) -> Result<Hello, HelloError> {
    let mut body = Reader(body);
    body.take(2, "version")?;
    body.take(32, "random")?;
    if body.vector(1, "session id")?.len() > 32 {
        return Err(HelloError::Malformed("session id"));
    }
    let suites = body.vector(2, "cipher suites")?;
    if suites.is_empty() || suites.len() % 2 != 0 {
        return Err(HelloError::Malformed("cipher suites"));
    }
    if body.vector(1, "compression methods")?.is_empty() {
        return Err(HelloError::Malformed("compression methods"));
    }
    if body.0.is_empty() {
        return Ok(Hello::NoName);
    }
    let mut extensions = Reader(body.vector(2, "extensions")?);
    if !body.0.is_empty() {
        return Err(HelloError::Malformed("bytes after the extensions"));
    }
    let mut found = None;
    let mut encrypted = false;
    while !extensions.0.is_empty() {
        let kind = extensions.u16("extension type")?;
        let data = extensions.vector(2, "extension")?;
        if kind == 0 && found.replace(data).is_some() {
            return Err(HelloError::Malformed("two server_name extensions"));
        }
        encrypted |= hides_the_name(kind);
    }
    if encrypted {
        return Ok(Hello::Encrypted);
    }
    found.map_or(Ok(Hello::NoName), one_name)
}

/// The only entry of a `server_name` extension.
fn one_name(data: &[u8]) -> Result<Hello, HelloError> {
    let mut data = Reader(data);
    let mut list = Reader(data.vector(2, "server_name list")?);
    if !data.0.is_empty() {
        return Err(HelloError::Malformed("bytes after the server_name list"));
    }
    if list.take(1, "name type")? != [0] {
        return Err(HelloError::Malformed("name type"));
    }
    let name = list.vector(2, "host name")?;
    if !list.0.is_empty() {
        return Err(HelloError::Malformed("two server names"));
    }
    match std::str::from_utf8(name) {
        Ok(name) if !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic()) => {
            Ok(Hello::Name(name.to_owned()))
        }
        _ => Err(HelloError::Malformed("host name is not printable ASCII")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        let mut out = kind.to_be_bytes().to_vec();
        out.extend(u16::try_from(data.len()).expect("short").to_be_bytes());
        out.extend(data);
        out
    }

    fn sni(name: &[u8]) -> Vec<u8> {
        let mut entry = vec![0];
        entry.extend(u16::try_from(name.len()).expect("short").to_be_bytes());
        entry.extend(name);
        let mut list = u16::try_from(entry.len())
            .expect("short")
            .to_be_bytes()
            .to_vec();
        list.extend(entry);
        extension(0, &list)
    }

    fn message(extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 1, 1, 0]);
        body.extend(
            u16::try_from(extensions.len())
                .expect("short")
                .to_be_bytes(),
        );
        body.extend(extensions);
        let mut out = vec![1];
        out.extend(&u32::try_from(body.len()).expect("short").to_be_bytes()[1..]);
        out.extend(body);
        out
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for part in message.chunks(size) {
            out.extend([0x16, 3, 1]);
            out.extend(u16::try_from(part.len()).expect("short").to_be_bytes());
            out.extend(part);
        }
        out
    }

    #[test]
    fn the_name_is_found_whole_and_in_fragments() {
        let mut extensions = extension(0x2a2a, b"");
        extensions.extend(sni(b"a.example.org"));
        let message = message(&extensions);
        let want = Ok(Hello::Name("a.example.org".to_owned()));
        for size in [2, 3, 7, 4096] {
            assert_eq!(client_hello(&records(&message, size)), want, "{size}");
        }
        assert_eq!(
            client_hello(&records(&message, 1)),
            Err(HelloError::TooLong)
        );
    }

    #[test]
    fn ambiguous_and_broken_ones_are_refused() {
        let hello = |extensions: &[u8]| client_hello(&records(&message(extensions), 4096));
        assert_eq!(hello(&[]), Ok(Hello::NoName));
        assert_eq!(hello(&extension(10, &[0, 0])), Ok(Hello::NoName));
        let twice = [sni(b"a.example.org"), sni(b"b.example.org")].concat();
        assert!(hello(&twice).is_err());
        let two_names = extension(0, b"\0\x08\0\0\x01a\0\0\x01b");
        assert!(hello(&two_names).is_err());
        assert!(hello(&sni(b"")).is_err());
        assert!(hello(&sni(b"a\0b")).is_err());
        assert!(hello(&[0, 0, 0, 9, 1]).is_err());
        assert!(client_hello(b"\x16\x03\x01\x00\x00").is_err());
        assert!(client_hello(b"\x17").is_err());
        assert!(client_hello(b"\x16\x03\x01\x00\x01\x02").is_err());
    }

    #[test]
    fn a_hello_that_hides_its_name_is_told_apart_whatever_its_outer_name() {
        // The outer form (RFC 9849 §5): type, cipher suite, configuration id, key, payload.
        let outer = b"\0\0\x01\0\x01\x07\0\x02kk\0\x03ppp";
        for kind in [0xfe0d, 0xfe08, 0xffce] {
            for data in [&outer[..], b"\x01", b""] {
                let before = [extension(kind, data), sni(b"a.example.org")].concat();
                let after = [sni(b"a.example.org"), extension(kind, data)].concat();
                for extensions in [before, after, extension(kind, data)] {
                    let hello = client_hello(&records(&message(&extensions), 50));
                    assert_eq!(hello, Ok(Hello::Encrypted), "{kind:x}");
                }
            }
        }
        let other = [sni(b"a.example.org"), extension(0xfe0e, outer)].concat();
        let name = Ok(Hello::Name("a.example.org".to_owned()));
        assert_eq!(client_hello(&records(&message(&other), 50)), name);
    }

    #[test]
    fn the_bound_holds_for_long_and_for_slow_ones() {
        let long = message(&extension(21, &vec![0; 17_000]));
        assert_eq!(
            client_hello(&records(&long, 9_000)),
            Err(HelloError::TooLong)
        );
        let endless = records(&[&[1, 0, 0x3f, 0][..], &[0; 16_000]].concat(), 16_384);
        assert_eq!(client_hello(&endless[..9_000]), Ok(Hello::NeedMore));
    }

    #[test]
    fn a_real_client_is_understood() {
        let config = rustls::ClientConfig::builder_with_provider(
            rustls::crypto::ring::default_provider().into(),
        )
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
        let name = "mirror.example.org".try_into().expect("name");
        let mut client = rustls::ClientConnection::new(config.into(), name).expect("client");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("hello");
        assert_eq!(
            client_hello(&bytes),
            Ok(Hello::Name("mirror.example.org".to_owned()))
        );
        for cut in 0..bytes.len() {
            assert_eq!(client_hello(&bytes[..cut]), Ok(Hello::NeedMore), "{cut}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = client_hello(&bytes);
            let _ = client_hello(&records(&message(&bytes), 100));
            let mut body = vec![1, 0, 0, u8::try_from(bytes.len().min(255)).expect("short")];
            body.extend(&bytes);
            let _ = client_hello(&records(&body, 64));
        }

        #[test]
        fn any_name_round_trips_and_every_prefix_needs_more(name in "[a-z0-9.-]{1,200}", size in 16_usize..400) {
            let bytes = records(&message(&sni(name.as_bytes())), size);
            prop_assert_eq!(client_hello(&bytes), Ok(Hello::Name(name)));
            for cut in 0..bytes.len() {
                prop_assert_eq!(client_hello(&bytes[..cut]), Ok(Hello::NeedMore));
            }
        }
    }
}
