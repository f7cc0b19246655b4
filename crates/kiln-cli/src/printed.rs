//! What a command prints, as events: with `--json` every line of standard output is one JSON value, the command's own output included.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// One stream of a command, piece by piece. The texts of its events, one after the other, are what the command printed.
#[derive(Debug, Default)]
pub(crate) struct Printed {
    /// `stdout` or `stderr`; none where both are one, as in a job's log.
    stream: Option<&'static str>,
    /// The beginning of a character whose end has not come yet, at most three bytes.
    begun: Vec<u8>,
}

impl Printed {
    /// Of a stream with this name.
    pub(crate) fn of(stream: &'static str) -> Self {
        Self {
            stream: Some(stream),
            begun: Vec::new(),
        }
    }

    /// The event for these bytes; none while there is only the beginning of a character.
    pub(crate) fn event(&mut self, piece: &[u8]) -> Option<Value> {
        let mut bytes = std::mem::take(&mut self.begun);
        bytes.extend_from_slice(piece);
        self.begun = cut_character(&mut bytes);
        (!bytes.is_empty()).then(|| self.told(bytes))
    }

    /// The event for what was begun and never ended.
    pub(crate) fn rest(&mut self) -> Option<Value> {
        let bytes = std::mem::take(&mut self.begun);
        (!bytes.is_empty()).then(|| self.told(bytes))
    }

    fn told(&self, bytes: Vec<u8>) -> Value {
        let mut event = json!({ "event": "output" });
        if let Some(stream) = self.stream {
            event["stream"] = stream.into();
        }
        match String::from_utf8(bytes) {
            Ok(text) => event["text"] = text.into(),
            Err(error) => event["base64"] = STANDARD.encode(error.as_bytes()).into(),
        }
        event
    }
}

/// Takes the beginning of a character off the end of a piece: the rest comes with the next one.
pub(crate) fn cut_character(piece: &mut Vec<u8>) -> Vec<u8> {
    let last = piece.utf8_chunks().last();
    let begun = last.map_or(&[][..], |last| last.invalid());
    let begins = begun.first().is_some_and(|byte| *byte >= 0xc0) && piece.ends_with(begun);
    match begins {
        true => piece.split_off(piece.len() - begun.len()),
        false => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_that_comes_in_two_pieces_is_whole() {
        let text = "a\u{e9}\u{20ac}\u{1f600}z".as_bytes();
        for at in 0..text.len() {
            let mut first = text[..at].to_vec();
            let mut second = cut_character(&mut first);
            assert!(std::str::from_utf8(&first).is_ok(), "{at}");
            second.extend_from_slice(&text[at..]);
            assert!(std::str::from_utf8(&second).is_ok(), "{at}");
        }
        // What is no beginning of one is shown as what it is.
        assert!(cut_character(&mut b"a\x80".to_vec()).is_empty());
    }

    #[test]
    fn the_events_together_are_what_was_printed() {
        let mut told = Vec::new();
        let mut printed = Printed::of("stdout");
        for piece in [&b"one\ntw\xe2\x82"[..], b"\xac", b"\xff\x00", b"", b"\xc3"] {
            told.extend(printed.event(piece));
        }
        told.extend(printed.rest());
        assert_eq!(printed.rest(), None);
        let want = [
            json!({"event": "output", "stream": "stdout", "text": "one\ntw"}),
            json!({"event": "output", "stream": "stdout", "text": "\u{20ac}"}),
            json!({"event": "output", "stream": "stdout", "base64": "/wA="}),
            json!({"event": "output", "stream": "stdout", "base64": "ww=="}),
        ];
        assert_eq!(told, want);
        let both = Printed::default().event(b"x");
        assert_eq!(both, Some(json!({"event": "output", "text": "x"})));
    }
}
