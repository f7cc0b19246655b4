//! What is wrong with a file, where, and what to write instead.

use std::fmt;

use serde::Serialize;

/// Most diagnostics of one file: a reader mends the first ones first.
pub const DIAGNOSTICS_MAX: usize = 20;
/// Most characters of a line that are shown.
const EXCERPT_MAX: usize = 100;
/// Longest text of a file that a message repeats, in characters.
const QUOTE_MAX: usize = 80;

/// A place in a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Place {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// Characters on that line.
    #[serde(skip)]
    pub len: u32,
}

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Diagnostic {
    /// One sentence.
    pub message: String,
    /// Where, unless it is about the whole file.
    #[serde(flatten)]
    pub place: Option<Place>,
    /// Another place that belongs to it, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub also: Option<(Place, String)>,
    /// What to write instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Diagnostic {
    /// Something wrong at a place.
    #[must_use]
    pub fn at(place: Place, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            place: Some(place),
            also: None,
            hint: None,
        }
    }

    /// Something wrong with the file as a whole.
    #[must_use]
    pub fn of_file(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            place: None,
            also: None,
            hint: None,
        }
    }

    /// Adds what to write instead.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the other place.
    #[must_use]
    pub fn also(mut self, place: Place, why: impl Into<String>) -> Self {
        self.also = Some((place, why.into()));
        self
    }
}

/// Everything that is wrong with one file. Its text form shows the lines.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct Diagnostics {
    /// The file's name, as people know it.
    pub file: String,
    /// What is wrong: at least one, at most [`DIAGNOSTICS_MAX`], by place.
    pub list: Vec<Diagnostic>,
    /// Whether there is more than the list holds.
    pub more: bool,
    lines: Vec<(u32, String)>,
}

impl Diagnostics {
    /// Keeps the lines of `text` that are shown.
    pub(crate) fn new(file: &str, text: &str, mut list: Vec<Diagnostic>) -> Self {
        list.sort_by_key(|one| one.place);
        let more = list.len() > DIAGNOSTICS_MAX;
        list.truncate(DIAGNOSTICS_MAX);
        let mut wanted: Vec<u32> = list
            .iter()
            .flat_map(|one| [one.place, one.also.as_ref().map(|(place, _)| *place)])
            .flatten()
            .map(|place| place.line)
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let lines = (1..)
            .zip(text.lines())
            .filter(|(number, _)| wanted.binary_search(number).is_ok())
            .map(|(number, line)| (number, line.to_owned()))
            .collect();
        Self {
            file: shown(file),
            list,
            more,
            lines,
        }
    }

    fn excerpt(&self, f: &mut fmt::Formatter<'_>, place: Place, mark: char) -> fmt::Result {
        let Some((number, line)) = self.lines.iter().find(|(number, _)| *number == place.line)
        else {
            return Ok(());
        };
        let column = place.column.saturating_sub(1) as usize;
        let total = line.chars().count();
        // A long line is shown around the place.
        let from = match column > EXCERPT_MAX / 2 && total > EXCERPT_MAX {
            true => column - EXCERPT_MAX / 2,
            false => 0,
        };
        let part: String = line
            .chars()
            .skip(from)
            .take(EXCERPT_MAX)
            .map(seen)
            .collect();
        let shown = part.chars().count();
        let len = (place.len as usize).clamp(1, shown.saturating_sub(column - from).max(1));
        writeln!(f, "{:>4} |", "")?;
        writeln!(f, "{number:>4} | {}", part.trim_end())?;
        writeln!(
            f,
            "{:>4} | {}{}",
            "",
            " ".repeat(column - from),
            mark.to_string().repeat(len)
        )
    }
}

/// A character that drives a terminal, turns the direction of writing, or is not seen: Unicode's controls, its characters of formatting
/// (general category `Cf`, UAX 9) and its separators of lines. A text with one reads otherwise than it is.
#[must_use]
pub fn unseen(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// One column for each character, whatever it is.
fn seen(c: char) -> char {
    match unseen(c) {
        true => '\u{fffd}',
        false => c,
    }
}

/// A text of a file as a message may repeat it: short, without what is [`unseen`].
pub(crate) fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(QUOTE_MAX).map(seen).collect();
    if text.chars().count() > QUOTE_MAX {
        out.push_str("...");
    }
    out
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, one) in self.list.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            writeln!(f, "{}", one.message)?;
            match one.place {
                Some(place) => {
                    writeln!(f, "  --> {}:{}:{}", self.file, place.line, place.column)?;
                    self.excerpt(f, place, '^')?;
                }
                None => writeln!(f, "  --> {}", self.file)?,
            }
            if let Some((place, why)) = &one.also {
                writeln!(
                    f,
                    "  ::: {}:{}:{}: {why}",
                    self.file, place.line, place.column
                )?;
                self.excerpt(f, *place, '-')?;
            }
            if let Some(hint) = &one.hint {
                writeln!(f, "   = hint: {hint}")?;
            }
        }
        if self.more {
            writeln!(f, "\nand more: mend these first")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_file_turns_what_is_read() {
        let text = "version: 1\nnetwork: {alow: [x]} # \u{202e}gro\u{2066}\u{200b}\u{1b}[2J\n";
        let name = "ki\u{202e}ln.yaml";
        let wrong = crate::compile(crate::Format::Kiln, name, text).expect_err("not legal");
        let told = wrong.to_string();
        let hidden: Vec<char> = told.chars().filter(|c| *c != '\n' && unseen(*c)).collect();
        assert!(told.contains("alow") && hidden.is_empty(), "{told:?}");
        assert!(!"Grüße, 世界 \u{1f9f1}".chars().any(unseen));
    }
}
