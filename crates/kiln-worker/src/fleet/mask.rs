//! Secrets never leave the host in a log: every value is replaced as output passes through, also where pieces of output cut it.
//!
//! A guard against accidents, not against code that wants to give a secret away: what could be the beginning of a secret waits for the rest, but never
//! longer than [`HELD_MAX`]. Whoever writes a value with pauses in it shows what came before the last pause.

mod forms;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// What stands in the place of a secret.
pub const MASK: &[u8] = b"***";
/// Shorter values are not replaced: they would hit half the log.
pub const SECRET_BYTES_MIN: usize = 4;
/// Longest time for which output is held back because it could be the beginning of a secret: a prompt that ends like one begins must be seen.
pub const HELD_MAX: Duration = Duration::from_millis(50);

/// The values to replace, in every form they are likely printed in. Cheap to clone.
#[derive(Clone, Default)]
pub struct Mask {
    forms: Arc<Forms>,
    /// The same in small letters: resolvers and gateways write names so.
    lower: Arc<Forms>,
}

#[derive(Default)]
struct Forms {
    /// In the order of their bytes; no pattern is longer than twice [`forms::PIECE_BYTES`].
    patterns: Vec<Vec<u8>>,
    /// Whether a pattern begins with this byte; empty when there is none.
    first: Vec<bool>,
}

/// What the patterns say of the bytes at one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Look {
    /// Length of the longest pattern that stands there.
    found: Option<usize>,
    /// Whether more bytes could make a longer one of it.
    may_grow: bool,
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({} patterns)", self.forms.patterns.len())
    }
}

impl Mask {
    /// Of these secret values: as they are, without white space around them, each line of a longer one, in base 64 (also in the middle of
    /// something longer), in hexadecimal, and as JSON and URLs write them.
    #[must_use]
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let patterns = forms::of(secrets);
        let lower = patterns.iter().map(|pattern| pattern.to_ascii_lowercase());
        let mut lower: Vec<Vec<u8>> = lower.collect();
        lower.sort_unstable();
        lower.dedup();
        Self {
            forms: Arc::new(Forms::new(patterns)),
            lower: Arc::new(Forms::new(lower)),
        }
    }

    /// Whether it masks nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.forms.patterns.is_empty()
    }

    /// Begins one stream of output.
    #[must_use]
    pub fn stream(&self) -> MaskedStream {
        MaskedStream {
            forms: Arc::clone(&self.forms),
            kept: Vec::new(),
            told: 0,
            since: None,
            in_long: false,
        }
    }

    /// Masks a whole text.
    #[must_use]
    pub fn text(&self, text: &str) -> String {
        if self.forms.patterns.is_empty() {
            return text.to_owned();
        }
        let mut stream = self.stream();
        stream.kept = text.as_bytes().to_vec();
        String::from_utf8_lossy(&stream.finish()).into_owned()
    }

    /// Masks a whole text in which names stand: in whatever case a secret was asked for, and also one in whose middle a record cut the text off.
    #[must_use]
    pub fn name(&self, text: &str) -> String {
        if self.forms.patterns.is_empty() {
            return text.to_owned();
        }
        let mut out = Vec::with_capacity(text.len());
        let mut pieces = text.split(kiln_network::record::CUT).peekable();
        while let Some(piece) = pieces.next() {
            let cut = pieces.peek().is_some();
            let lower = piece.to_ascii_lowercase();
            let mut at = 0;
            while let Some(rest) = lower.as_bytes().get(at..).filter(|rest| !rest.is_empty()) {
                let look = match self.lower.begins_with(rest[0]) {
                    true => self.lower.look(rest),
                    false => Look::default(),
                };
                let length = match cut && look.may_grow {
                    true => Some(rest.len()),
                    false => look.found,
                };
                match length {
                    Some(_) => out.extend_from_slice(MASK),
                    None => out.push(piece.as_bytes()[at]),
                }
                at += length.unwrap_or(1);
            }
            if cut {
                out.extend_from_slice(kiln_network::record::CUT.as_bytes());
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    }
}

impl Forms {
    /// Of patterns in the order of their bytes, none twice.
    fn new(patterns: Vec<Vec<u8>>) -> Self {
        let mut first = vec![false; 256];
        for byte in patterns.iter().filter_map(|pattern| pattern.first()) {
            first[usize::from(*byte)] = true;
        }
        Self { patterns, first }
    }

    /// Looks at the beginning of these bytes. A step for each byte that some pattern goes on with, so what it costs is bounded by the longest
    /// pattern and grows with the logarithm of their number, whatever a tenant chose them to be.
    fn look(&self, bytes: &[u8]) -> Look {
        let mut found = None;
        let mut left = self.patterns.as_slice();
        for (depth, byte) in bytes.iter().enumerate() {
            if left.first().is_some_and(|pattern| pattern.len() == depth) {
                found = Some(depth);
                left = &left[1..];
            }
            let (Some(first), Some(last)) = (left.first(), left.last()) else {
                break;
            };
            // Most often all of them go on in the same way.
            if first[depth] != *byte || last[depth] != *byte {
                let begin = left.partition_point(|pattern| pattern[depth] < *byte);
                let end = left.partition_point(|pattern| pattern[depth] <= *byte);
                left = &left[begin..end];
            }
        }
        let whole = |pattern: &Vec<u8>| pattern.len() == bytes.len();
        if left.first().is_some_and(whole) {
            found = Some(bytes.len());
            left = &left[1..];
        }
        Look {
            // Nothing stands where no byte is.
            found: found.filter(|length| *length > 0),
            may_grow: !left.is_empty(),
        }
    }

    fn begins_with(&self, byte: u8) -> bool {
        self.first.get(usize::from(byte)).copied().unwrap_or(false)
    }
}

/// One stream of output on its way out. What could be the beginning of a secret is held back until it is known, at most the length of the longest
/// and at most [`HELD_MAX`]: whoever holds a stream calls [`MaskedStream::let_go`] when [`MaskedStream::held_until`] says so.
pub struct MaskedStream {
    forms: Arc<Forms>,
    /// The tail that could begin a secret.
    kept: Vec<u8>,
    /// How much of the tail's front was let go: it is out, and may still turn out to be the beginning of a secret, whose rest is masked.
    told: usize,
    /// When the oldest byte came that is held back.
    since: Option<Instant>,
    /// Whether the last thing that went out stands for a piece of a long value: the next piece needs no word of its own.
    in_long: bool,
}

impl std::fmt::Debug for MaskedStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not what it holds: that is the beginning of a secret.
        let held = self.kept.len().saturating_sub(self.told);
        write!(f, "MaskedStream({held} bytes held)")
    }
}

impl MaskedStream {
    /// Takes output that came now, gives what may go out.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.forms.patterns.is_empty() {
            return bytes.to_vec();
        }
        self.kept.extend_from_slice(bytes);
        let out = self.take(false);
        let held = self.kept.len().saturating_sub(self.told);
        if held == 0 {
            self.since = None;
        } else if held <= bytes.len() {
            // All of what is held came with these.
            self.since = Some(Instant::now());
        }
        out
    }

    /// When what is held must go out; `None` while nothing is held.
    #[must_use]
    pub fn held_until(&self) -> Option<Instant> {
        self.since.map(|since| since + HELD_MAX)
    }

    /// Gives what has been held for [`HELD_MAX`] by now, as it is: it was not the whole of a secret. Should it have been the beginning of one, the rest
    /// is still replaced.
    pub fn let_go(&mut self) -> Vec<u8> {
        if self.held_until().is_none_or(|until| until > Instant::now()) {
            return Vec::new();
        }
        let (kept, in_long) = (self.kept.clone(), self.in_long);
        let out = self.take(true);
        self.told = kept.len();
        (self.kept, self.in_long) = (kept, in_long);
        self.since = None;
        out
    }

    /// The rest.
    pub fn finish(&mut self) -> Vec<u8> {
        self.since = None;
        self.take(true)
    }

    fn take(&mut self, last: bool) -> Vec<u8> {
        let kept = std::mem::take(&mut self.kept);
        let told = std::mem::take(&mut self.told);
        let mut out = Vec::with_capacity(kept.len());
        let mut at = 0;
        while at < kept.len() {
            let rest = &kept[at..];
            let look = match self.forms.begins_with(rest[0]) {
                true => self.forms.look(rest),
                false => Look::default(),
            };
            if look.may_grow && !last {
                // The longest that could still match is waited for, even when a shorter one matches already.
                self.told = told.saturating_sub(at);
                self.kept = rest.to_vec();
                return out;
            }
            if let Some(length) = look.found {
                // One that was let go as a whole was replaced then.
                if at + length > told && !self.in_long {
                    out.extend_from_slice(MASK);
                }
                self.in_long = length >= forms::PIECE_BYTES;
                at += length;
                continue;
            }
            self.in_long = false;
            if at >= told {
                out.push(rest[0]);
            }
            at += 1;
        }
        out
    }
}

#[cfg(test)]
mod tests;
