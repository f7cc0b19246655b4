//! Secrets never leave the host in a log: every value is replaced as output passes through, also where pieces of output cut it.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};

/// What stands in the place of a secret.
pub const MASK: &[u8] = b"***";
/// Shorter values are not replaced: they would hit half the log.
pub const SECRET_BYTES_MIN: usize = 4;

/// The values to replace, in every form they are likely printed in.
#[derive(Clone, Default)]
pub struct Mask {
    patterns: Vec<Vec<u8>>,
    /// Whether a pattern begins with this byte; empty when there is none.
    first: Vec<bool>,
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({} patterns)", self.patterns.len())
    }
}

impl Mask {
    /// Of these secret values: as they are, without white space around them, each line of a longer one, in base 64, in hexadecimal, and as
    /// JSON and URLs write them.
    #[must_use]
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut patterns: Vec<Vec<u8>> = Vec::new();
        for secret in secrets {
            let trimmed = secret.trim_ascii();
            for value in [secret, trimmed] {
                patterns.push(value.to_vec());
                for engine in [&STANDARD, &STANDARD_NO_PAD, &URL_SAFE, &URL_SAFE_NO_PAD] {
                    patterns.push(engine.encode(value).into_bytes());
                }
                let hexadecimal = hex::encode(value);
                patterns.push(hexadecimal.to_uppercase().into_bytes());
                patterns.push(hexadecimal.into_bytes());
                patterns.push(percent_encoded(value));
                if let Ok(text) = std::str::from_utf8(value)
                    && let Ok(json) = serde_json::to_string(text)
                {
                    patterns.push(json.trim_matches('"').as_bytes().to_vec());
                }
            }
            // Logs are read line by line: a key of many lines is printed line by line.
            let lines = trimmed.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
            patterns.extend(lines.filter(|line| line.len() >= 12).map(<[u8]>::to_vec));
        }
        patterns.retain(|pattern| pattern.len() >= SECRET_BYTES_MIN);
        // The longest first: it may hold another.
        patterns.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        patterns.dedup();
        let mut first = vec![false; 256];
        for byte in patterns.iter().filter_map(|pattern| pattern.first()) {
            first[usize::from(*byte)] = true;
        }
        Self { patterns, first }
    }

    /// Begins one stream of output.
    #[must_use]
    pub fn stream(&self) -> MaskedStream {
        MaskedStream {
            mask: self.clone(),
            kept: Vec::new(),
        }
    }

    /// Masks a whole text.
    #[must_use]
    pub fn text(&self, text: &str) -> String {
        if self.patterns.is_empty() {
            return text.to_owned();
        }
        let mut stream = self.stream();
        let mut out = stream.push(text.as_bytes());
        out.extend(stream.finish());
        String::from_utf8_lossy(&out).into_owned()
    }

    fn at(&self, bytes: &[u8]) -> Option<usize> {
        let found = self.patterns.iter().find(|p| bytes.starts_with(p));
        found.map(Vec::len)
    }

    /// Whether more bytes could make this beginning a secret.
    fn may_begin(&self, bytes: &[u8]) -> bool {
        self.patterns
            .iter()
            .any(|p| p.len() > bytes.len() && p.starts_with(bytes))
    }

    fn begins_with(&self, byte: u8) -> bool {
        self.first.get(usize::from(byte)).copied().unwrap_or(false)
    }
}

fn percent_encoded(value: &[u8]) -> Vec<u8> {
    let mut out = String::new();
    for byte in value {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(byte) {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out.into_bytes()
}

/// One stream of output on its way out. What could be the beginning of a secret is held back until it is known; at most the length of the longest.
#[derive(Debug)]
pub struct MaskedStream {
    mask: Mask,
    kept: Vec<u8>,
}

impl MaskedStream {
    /// Takes output, gives what may go out.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.mask.patterns.is_empty() {
            return bytes.to_vec();
        }
        self.kept.extend_from_slice(bytes);
        self.take(false)
    }

    /// The rest.
    pub fn finish(&mut self) -> Vec<u8> {
        self.take(true)
    }

    fn take(&mut self, last: bool) -> Vec<u8> {
        let kept = std::mem::take(&mut self.kept);
        let mut out = Vec::with_capacity(kept.len());
        let mut at = 0;
        while at < kept.len() {
            let rest = &kept[at..];
            if !self.mask.begins_with(rest[0]) {
                out.push(rest[0]);
                at += 1;
            } else if !last && self.mask.may_begin(rest) {
                // The longest that could still match is waited for, even when a shorter one matches already.
                self.kept = rest.to_vec();
                return out;
            } else if let Some(length) = self.mask.at(rest) {
                out.extend_from_slice(MASK);
                at += length;
            } else {
                out.push(rest[0]);
                at += 1;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn masked(mask: &Mask, pieces: &[&[u8]]) -> Vec<u8> {
        let mut stream = mask.stream();
        let mut out: Vec<u8> = pieces.iter().flat_map(|piece| stream.push(piece)).collect();
        out.extend(stream.finish());
        out
    }

    #[test]
    fn secrets_are_replaced_in_every_form_and_across_pieces() {
        let mask = Mask::new([&b"hunter2\n"[..], b"abcdefgh"]);
        assert_eq!(masked(&mask, &[b"x hun", b"ter", b"2 y"]), b"x *** y");
        let encoded = STANDARD.encode("hunter2");
        assert_eq!(mask.text(&format!("basic {encoded}")), "basic ***");
        assert_eq!(mask.text("6162636465666768 abcdefg"), "*** abcdefg");
        assert_eq!(masked(&mask, &[b"hunte"]), b"hunte");
        let json = Mask::new([&b"a\"b\\c"[..]]);
        assert_eq!(json.text(r#"{"p":"a\"b\\c"}"#), r#"{"p":"***"}"#);
    }

    #[test]
    fn a_key_of_many_lines_is_masked_line_by_line() {
        let mask = Mask::new([&b"-----BEGIN-----\nAAAABBBBCCCCDDDD\n-----END-----\n"[..]]);
        assert!(!mask.text("| AAAABBBBCCCCDDDD |").contains("AAAA"));
    }

    #[test]
    fn short_values_and_none_change_nothing() {
        assert_eq!(Mask::new([&b"abc"[..]]).text("abc abc"), "abc abc");
        assert_eq!(Mask::default().text("x"), "x");
    }

    proptest! {
        #[test]
        fn no_cut_lets_a_secret_through(
            cuts in prop::collection::vec(1_usize..9, 0..20),
            before in "[a-d]{0,12}", after in "[a-d]{0,12}", secret in "[a-d]{4,10}",
        ) {
            let mask = Mask::new([secret.as_bytes()]);
            let text = format!("{before}{secret}{after}");
            let mut stream = mask.stream();
            let (mut rest, mut out) = (text.as_bytes(), Vec::new());
            for cut in cuts {
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                out.extend(stream.push(piece));
                rest = more;
            }
            out.extend(stream.push(rest));
            out.extend(stream.finish());
            let out = String::from_utf8(out).expect("text");
            prop_assert!(!out.contains(&secret), "{out}");
        }
    }
}
