//! Golden files: what a user sees, kept beside the test and compared byte for byte after redaction.
//!
//! `KILN_GOLDEN=update cargo test` writes what is different. A reviewer then sees the change as a diff.

use std::fs;
use std::path::{Path, PathBuf};

/// Names the variable that lets golden files be rewritten.
const UPDATE: &str = "KILN_GOLDEN";

/// Lines around a difference that are shown.
const CONTEXT: usize = 2;

/// One golden file.
#[derive(Debug)]
pub struct Golden {
    path: PathBuf,
    replace: Vec<(String, String)>,
}

impl Golden {
    /// The golden file at a path; relative to the package's directory, as `cargo test` runs there.
    #[must_use]
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            replace: Vec::new(),
        }
    }

    /// Replaces a text that differs from run to run before comparing: a temporary directory, a port.
    #[must_use]
    pub fn redact(mut self, text: impl Into<String>, by: &str) -> Self {
        let text = text.into();
        if !text.is_empty() {
            self.replace.push((text, by.to_owned()));
        }
        self
    }

    /// Compares; times, digests and ids are redacted by [`redact`].
    ///
    /// # Panics
    /// When the text is another one, or there is no golden file yet.
    pub fn check(&self, actual: &str) {
        let mut text = actual.to_owned();
        for (what, by) in &self.replace {
            text = text.replace(what, by);
        }
        let text = redact(&text);
        if wants_update() {
            if let Some(parent) = self.path.parent() {
                fs::create_dir_all(parent).expect("directories");
            }
            fs::write(&self.path, &text).expect("the golden file");
            return;
        }
        let golden = match fs::read_to_string(&self.path) {
            Ok(golden) => golden,
            Err(error) => panic!(
                "{:?}: {error}; {UPDATE}=update writes it:\n{text}",
                self.path
            ),
        };
        if golden != text {
            panic!(
                "{:?} differs; {UPDATE}=update rewrites it:\n{}",
                self.path,
                difference(&golden, &text)
            );
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "how a developer asks for new golden files"
)]
fn wants_update() -> bool {
    std::env::var_os(UPDATE).is_some_and(|value| value == "update")
}

/// The lines from the first to the last difference, with a little around them.
fn difference(golden: &str, actual: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (golden.lines().collect(), actual.lines().collect());
    let same = |pair: &(&&str, &&str)| pair.0 == pair.1;
    let head = old.iter().zip(&new).take_while(same).count();
    let most = old.len().min(new.len()) - head;
    let tail = old
        .iter()
        .rev()
        .zip(new.iter().rev())
        .take(most)
        .take_while(same)
        .count();
    let mut out = String::new();
    let mut put = |mark: &str, lines: &[&str]| {
        for line in lines {
            out.push_str(mark);
            out.push_str(line);
            out.push('\n');
        }
    };
    put("  ", &old[head.saturating_sub(CONTEXT)..head]);
    put("- ", &old[head..old.len() - tail]);
    put("+ ", &new[head..new.len() - tail]);
    let end = (old.len() - tail + CONTEXT).min(old.len());
    put("  ", &old[old.len() - tail..end]);
    if out.is_empty() {
        out.push_str("only the line ends differ\n");
    }
    out
}

/// Replaces what differs from run to run: durations, digests, UUIDs and other long hexadecimal numbers.
///
/// ```text
/// built in 12.3 s  ->  built in [time]        sha256:3b2c...  ->  sha256:[hex]
/// ```
#[must_use]
pub fn redact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let at_word = !out.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_');
        let taken = match at_word {
            true => duration_len(rest)
                .map(|len| (len, "[time]"))
                .or_else(|| hex_len(rest).map(|len| (len, "[hex]"))),
            false => None,
        };
        let len = match taken {
            Some((len, by)) => {
                out.push_str(by);
                len
            }
            None => {
                out.push(first);
                first.len_utf8()
            }
        };
        rest = &rest[len..];
    }
    out
}

/// Length of `12`, `1.5` and so on followed by a unit of time and no further letter.
fn duration_len(text: &str) -> Option<usize> {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let whole = digits(text);
    if whole == 0 {
        return None;
    }
    let mut len = whole;
    if let Some(fraction) = text[len..].strip_prefix('.').map(digits).filter(|n| *n > 0) {
        len += 1 + fraction;
    }
    if text[len..].starts_with(' ') {
        len += 1;
    }
    let unit = ["ms", "µs", "ns", "s"]
        .into_iter()
        .find(|unit| text[len..].starts_with(unit))?;
    len += unit.len();
    let next = text[len..].chars().next();
    next.is_none_or(|c| !c.is_alphanumeric()).then_some(len)
}

/// Length of a run of at least 16 hexadecimal digits, hyphens of a UUID included, with at least one digit in it.
fn hex_len(text: &str) -> Option<usize> {
    let hex = |byte: &u8| byte.is_ascii_hexdigit() || *byte == b'-';
    let run: Vec<u8> = text.bytes().take_while(hex).collect();
    let digits = run.iter().filter(|byte| **byte != b'-').count();
    let len = run.iter().rposition(|byte| *byte != b'-')? + 1;
    let next = text[len..].chars().next();
    let ends = next.is_none_or(|c| !c.is_ascii_alphanumeric());
    (digits >= 16 && run.iter().any(u8::is_ascii_digit) && ends).then_some(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TempHome;

    #[test]
    fn what_differs_from_run_to_run_is_redacted_and_nothing_else() {
        let hex = "0123456789abcdef".repeat(4);
        for (text, redacted) in [
            ("built in 12.3 s.", "built in [time]."),
            ("took 5ms, 80 µs", "took [time], [time]"),
            ("python3.13 slim", "python3.13 slim"),
            ("2 steps, v1.2 s3", "2 steps, v1.2 s3"),
            ("20 seconds", "20 seconds"),
            (&format!("sha256:{hex} x"), "sha256:[hex] x"),
            ("6ba7b810-9dad-11d1-80b4-00c04fd430c8", "[hex]"),
            ("deadbeef", "deadbeef"),
            ("facadefacadefacade", "facadefacadefacade"),
        ] {
            assert_eq!(redact(text), redacted);
        }
    }

    #[test]
    fn a_golden_file_is_compared_after_redaction() {
        let home = TempHome::new();
        let path = home.write("g.txt", "in [home] for [time]\n");
        let golden = Golden::new(&path).redact(home.path().display().to_string(), "[home]");
        golden.check(&format!("in {} for 3 s\n", home.path().display()));
        let wrong = std::panic::catch_unwind(|| golden.check("in [home] forever\n"));
        let message = *wrong
            .expect_err("it differs")
            .downcast::<String>()
            .expect("text");
        assert!(
            message.contains("- in [home] for [time]\n+ in [home] forever"),
            "{message}"
        );
        let missing = Golden::new(home.join("none"));
        assert!(std::panic::catch_unwind(|| missing.check("x")).is_err());
    }
}
