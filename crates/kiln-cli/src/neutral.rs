//! What a guest says, shown on a terminal: text, and nothing that drives it.
//!
//! A pipe or a file gets the bytes as they are, and so does a terminal that was asked for (`-t`): whoever wants the guest's own screen
//! has it. Escape sequences could otherwise set titles, answer as if they were typed, or hide what was printed before.

/// One stream of bytes whose characters may be split between pieces.
#[derive(Debug, Default)]
pub(crate) struct Neutral {
    /// The beginning of a character, at most three bytes.
    begun: Vec<u8>,
}

impl Neutral {
    /// The text of this piece, with what was begun before it. Control characters but tab and newline, and what is not UTF-8, become
    /// U+FFFD; a return before a newline goes.
    pub(crate) fn text(&mut self, piece: &[u8]) -> String {
        let mut bytes = std::mem::take(&mut self.begun);
        bytes.extend_from_slice(piece);
        let mut text = String::with_capacity(bytes.len());
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(wrong) = error.error_len() else {
                        self.begun = after.to_vec();
                        break;
                    };
                    text.push('\u{fffd}');
                    rest = &after[wrong..];
                }
            }
        }
        if text.ends_with('\r') && self.begun.is_empty() {
            text.pop();
            self.begun.push(b'\r');
        }
        crate::show::printable(&text.replace("\r\n", "\n"))
    }

    /// What was begun and never ended.
    pub(crate) fn rest(&mut self) -> String {
        if self.begun.is_empty() {
            return String::new();
        }
        self.begun.clear();
        "\u{fffd}".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(pieces: &[&[u8]]) -> String {
        let mut neutral = Neutral::default();
        let mut text: String = pieces.iter().map(|piece| neutral.text(piece)).collect();
        text.push_str(&neutral.rest());
        text
    }

    #[test]
    fn text_stays_and_what_drives_a_terminal_goes() {
        assert_eq!(
            whole(&[b"a\tb\r\n", "\u{fc}\n".as_bytes()]),
            "a\tb\n\u{fc}\n"
        );
        let title = whole(&[b"a\x1b]0;evil\x07b\x1b[2J"]);
        assert_eq!(title, "a\u{fffd}]0;evil\u{fffd}b\u{fffd}[2J");
        // C1 controls, as one byte and as a character.
        assert_eq!(
            whole(&[b"\x9b2J", "\u{9b}2J".as_bytes()]),
            "\u{fffd}2J\u{fffd}2J"
        );
        assert_eq!(whole(&[b"over\rwritten\r"]), "over\u{fffd}written\u{fffd}");
        assert_eq!(whole(&[b"\xff\xfe"]), "\u{fffd}\u{fffd}");
    }

    #[test]
    fn pieces_may_end_anywhere() {
        let text = "z\u{fc}rich \u{20ac} \u{1f525}\r\n\x1b[1mx\r\n\u{85}".repeat(3);
        let at_once = whole(&[text.as_bytes()]);
        for size in 1..text.len() {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            assert_eq!(whole(&pieces), at_once, "{size}");
        }
        assert_eq!(whole(&[b"\xe2\x82"]), "\u{fffd}");
    }
}
