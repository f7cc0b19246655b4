//! The forms in which a secret is likely printed: which bytes of a log are taken for one.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};

use super::SECRET_BYTES_MIN;

/// Shorter lines of a longer value are not taken for it: they are likely words.
const LINE_BYTES_MIN: usize = 12;
/// Longer forms are looked for in pieces of this length, the last one up to twice as long: what a look at a log costs does not grow with the value.
pub(super) const PIECE_BYTES: usize = 64;
/// Of longer values only the commonest forms are looked for, so that they take a few times their size and no more.
const EVERY_FORM_MAX: usize = 64 * 1024;
/// Shorter pieces of base 64 are not taken for a value in the middle of something longer.
const INNER_BYTES_MIN: usize = 6;
/// What programs leave as it is when they write a value into a URL, beside letters and digits: RFC 3986 (section 2.3), JavaScript's own function,
/// Python's.
const URL_PLAIN: [&[u8]; 3] = [b"-_.~", b"-_.!~*'()", b"-_.~/"];

/// Every form of these values, in pieces where it is long, in the order of their bytes and none twice.
pub(super) fn of<'a>(secrets: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let mut forms: Vec<Vec<u8>> = Vec::new();
    for secret in secrets {
        let trimmed = secret.trim_ascii();
        for value in [secret, trimmed] {
            written(value, &mut forms);
        }
        // Logs are read line by line: a key of many lines is printed line by line.
        let lines = trimmed.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
        forms.extend(
            lines
                .filter(|line| line.len() >= LINE_BYTES_MIN)
                .map(<[u8]>::to_vec),
        );
    }
    forms.retain(|form| form.len() >= SECRET_BYTES_MIN);
    let mut pieces: Vec<Vec<u8>> = forms.into_iter().flat_map(pieces_of).collect();
    pieces.sort_unstable();
    pieces.dedup();
    pieces
}

/// A form in pieces: all of [`PIECE_BYTES`] but the last, which has what is left too.
fn pieces_of(form: Vec<u8>) -> Vec<Vec<u8>> {
    if form.len() < 2 * PIECE_BYTES {
        return vec![form];
    }
    let count = form.len() / PIECE_BYTES;
    let (even, last) = form.split_at((count - 1) * PIECE_BYTES);
    let mut pieces: Vec<Vec<u8>> = even.chunks(PIECE_BYTES).map(<[u8]>::to_vec).collect();
    pieces.push(last.to_vec());
    pieces
}

fn written(value: &[u8], forms: &mut Vec<Vec<u8>>) {
    // The inner pieces of a short value would hit half the log.
    if value.len() < SECRET_BYTES_MIN {
        return;
    }
    forms.push(value.to_vec());
    if value.len() > EVERY_FORM_MAX {
        forms.push(STANDARD.encode(value).into_bytes());
        forms.push(hex::encode(value).into_bytes());
        return;
    }
    for engine in [&STANDARD, &STANDARD_NO_PAD, &URL_SAFE, &URL_SAFE_NO_PAD] {
        forms.push(engine.encode(value).into_bytes());
    }
    for engine in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
        forms.extend((0..3).filter_map(|before| inner(engine, value, before)));
    }
    let hexadecimal = hex::encode(value);
    forms.push(hexadecimal.to_uppercase().into_bytes());
    forms.push(hexadecimal.into_bytes());
    for plain in URL_PLAIN {
        for (space, upper) in [("%20", true), ("%20", false), ("+", true), ("+", false)] {
            forms.push(percent_encoded(value, plain, space, upper));
        }
    }
    if let Ok(text) = std::str::from_utf8(value)
        && let Ok(json) = serde_json::to_string(text)
        && let Some(inner) = json.get(1..json.len().saturating_sub(1))
    {
        forms.push(inner.as_bytes().to_vec());
    }
}

/// What base 64 makes of a value that has `before` other bytes, modulo three, before it, and any after it: `user:password` of an HTTP header is one.
/// Only characters that no other byte has a part in.
fn inner(engine: &impl base64::Engine, value: &[u8], before: usize) -> Option<Vec<u8>> {
    let mut padded = vec![0; before];
    padded.extend_from_slice(value);
    let encoded = engine.encode(&padded);
    let whole = padded.len() * 8 / 6;
    let begin = (before * 8).div_ceil(6);
    let piece = encoded.as_bytes().get(begin..whole)?;
    (piece.len() >= INNER_BYTES_MIN).then(|| piece.to_vec())
}

fn percent_encoded(value: &[u8], plain: &[u8], space: &str, upper: bool) -> Vec<u8> {
    let mut out = String::new();
    for byte in value {
        if byte.is_ascii_alphanumeric() || plain.contains(byte) {
            out.push(char::from(*byte));
        } else if *byte == b' ' {
            out.push_str(space);
        } else if upper {
            out.push_str(&format!("%{byte:02X}"));
        } else {
            out.push_str(&format!("%{byte:02x}"));
        }
    }
    out.into_bytes()
}
