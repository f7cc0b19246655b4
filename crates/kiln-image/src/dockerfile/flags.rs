//! The `--name=value` words between a keyword and its arguments.

use super::spelled::Spelled;

/// A flag of an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flag {
    /// Name without dashes.
    pub(super) name: String,
    /// Value, quotes and escapes removed; `None` without `=`.
    pub(super) value: Option<String>,
    /// The whole word as it stands in the file.
    pub(super) word: Spelled,
}

impl Flag {
    /// The value as it stands in the file, if it holds no quote and no escape.
    pub(super) fn plain_value(&self) -> Option<Spelled> {
        let value = self.value.as_deref()?;
        let start = self.word.text().find('=')? + 1;
        let raw = self.word.slice(start..self.word.text().len());
        (raw.text() == value).then_some(raw)
    }
}

/// Takes the flags off the front (BuildKit's `extractBuilderFlags`): what is left are the arguments.
pub(super) fn take_flags(rest: &Spelled, escape: char) -> (Vec<Flag>, Spelled) {
    let text = rest.text();
    let mut flags = Vec::new();
    let mut at = 0;
    loop {
        at += text[at..].len() - text[at..].trim_start().len();
        if !text[at..].starts_with("--") {
            break;
        }
        let (word, end) = one_word(text, at, escape);
        if word == "--" {
            at = end;
            break;
        }
        let (name, value) = match word[2..].split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word[2..].to_owned(), None),
        };
        flags.push(Flag {
            name,
            value,
            word: rest.slice(at..end),
        });
        at = end;
    }
    (flags, rest.slice(at..text.len()).trim())
}

/// The word at `start`, quotes and escapes removed, and where it ends.
fn one_word(text: &str, start: usize, escape: char) -> (String, usize) {
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text[start..].char_indices();
    while let Some((i, c)) = chars.next() {
        match quote {
            Some(open) if c == open => quote = None,
            None if c.is_whitespace() => return (word, start + i),
            None if c == '\'' || c == '"' => quote = Some(c),
            _ if c == escape => word.extend(chars.next().map(|(_, c)| c)),
            _ => word.push(c),
        }
    }
    (word, text.len())
}
