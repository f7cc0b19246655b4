//! Names and other text of a folder's owner, as a person may see them on a terminal.

/// The text on one line, without anything that drives a terminal or turns the direction of writing: such characters are
/// written as `\n`, `\u{1b}`.
#[must_use]
pub fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() || turns(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// Unicode's bidirectional formatting characters and line separators (UAX 9, UAX 14).
fn turns(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_drives_the_terminal() {
        assert_eq!(
            shown("a\nhint: b\x1b[2Jc\u{202e}d\u{9b}é"),
            "a\\nhint: b\\u{1b}[2Jc\\u{202e}d\\u{9b}é"
        );
    }
}
