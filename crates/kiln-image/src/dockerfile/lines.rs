//! Lines to instructions: comments, continuations, the escape directive, here-documents.
//!
//! Follows `frontend/dockerfile/parser/parser.go` of BuildKit 0.33 rule by rule, because what counts is how
//! BuildKit will read the file, not what the reference manual says.

use super::DockerfileError;
use super::spelled::Spelled;

/// One instruction: its logical line and the here-documents that follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// First line, from 1.
    pub line: u32,
    /// Lower-case keyword (`from`, `run`).
    pub keyword: String,
    /// Everything after the keyword, continuations joined.
    pub rest: Spelled,
    /// Bodies that follow.
    pub heredocs: Vec<Heredoc>,
    /// Escape character in force: `\` or a backtick.
    pub escape: char,
}

/// A here-document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    /// The word that ends it.
    pub name: String,
    /// Leading tabs are dropped (`<<-`).
    pub chomp: bool,
    /// Its lines, as they stand in the file.
    pub body: String,
}

const KEYWORDS: [&str; 18] = [
    "add",
    "arg",
    "cmd",
    "copy",
    "entrypoint",
    "env",
    "expose",
    "from",
    "healthcheck",
    "label",
    "maintainer",
    "onbuild",
    "run",
    "shell",
    "stopsignal",
    "user",
    "volume",
    "workdir",
];

/// Directives that may stand at the top of the file as `# name=value`.
const DIRECTIVES: [&str; 3] = ["syntax", "escape", "check"];

struct Reader<'a> {
    lines: std::vec::IntoIter<(usize, &'a str)>,
    line: u32,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Option<(usize, &'a str)> {
        let next = self.lines.next()?;
        self.line += 1;
        Some(next)
    }
}

/// Splits a file into instructions.
///
/// # Errors
/// [`DockerfileError::Syntax`] for what BuildKit's parser refuses: an unknown keyword, an unterminated
/// here-document, a bad escape directive.
pub fn split(text: &str) -> Result<Vec<Instruction>, DockerfileError> {
    let mut offset = 0;
    let mut lines = Vec::new();
    for line in text.split_inclusive('\n') {
        lines.push((offset, line));
        offset += line.len();
    }
    if let Some((offset, line)) = lines.first_mut()
        && let Some(rest) = line.strip_prefix('\u{feff}')
    {
        *offset += line.len() - rest.len();
        *line = rest;
    }
    let mut reader = Reader {
        lines: lines.into_iter(),
        line: 0,
    };
    let mut directives = Directives::new();
    let mut found = Vec::new();
    while let Some((offset, raw)) = reader.next() {
        directives.line(raw, reader.line)?;
        let start = reader.line;
        let logical = logical_line(&mut reader, offset, raw, directives.escape);
        if logical.text().is_empty() {
            continue;
        }
        found.push(instruction(
            &mut reader,
            start,
            &logical,
            directives.escape,
        )?);
    }
    Ok(found)
}

struct Directives {
    escape: char,
    done: bool,
    seen: Vec<String>,
}

impl Directives {
    fn new() -> Self {
        Self {
            escape: '\\',
            done: false,
            seen: Vec::new(),
        }
    }

    fn line(&mut self, raw: &str, line: u32) -> Result<(), DockerfileError> {
        if self.done {
            return Ok(());
        }
        let Some((name, value)) = directive(raw, "#") else {
            self.done = true;
            return Ok(());
        };
        if !DIRECTIVES.contains(&name.as_str()) {
            return Ok(());
        }
        let error = |what: String| DockerfileError::Syntax { line, what };
        if self.seen.contains(&name) {
            return Err(error(format!("the directive {name} stands here twice")));
        }
        if name == "escape" {
            self.escape = match value {
                "\\" => '\\',
                "`" => '`',
                other => {
                    return Err(error(format!("escape must be \\ or `, not {other:?}")));
                }
            };
        }
        self.seen.push(name);
        Ok(())
    }
}

/// `<comment> name = value`, the name in lower case.
pub(super) fn directive<'a>(raw: &'a str, comment: &str) -> Option<(String, &'a str)> {
    let rest = raw.trim_end_matches(['\r', '\n']).strip_prefix(comment)?;
    let (name, value) = rest.trim_start().split_once('=')?;
    let name = name.trim_end();
    let legal = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric());
    let value = value.trim();
    (legal && !value.is_empty()).then(|| (name.to_ascii_lowercase(), value))
}

fn logical_line(reader: &mut Reader<'_>, offset: usize, raw: &str, escape: char) -> Spelled {
    let mut logical = Spelled::default();
    let bare = raw.trim_end_matches(['\r', '\n']);
    let body = bare.trim_start();
    if body.starts_with('#') {
        return logical;
    }
    let (piece, mut ended) = without_continuation(body, escape);
    logical.push(piece, offset + bare.len() - body.len());
    while !ended {
        let Some((offset, raw)) = reader.next() else {
            break;
        };
        let bare = raw.trim_end_matches(['\r', '\n']);
        let trimmed = bare.trim_start();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let (piece, end) = without_continuation(bare, escape);
        logical.push(piece, offset);
        ended = end;
    }
    logical.trim()
}

/// The line without its continuation character, and whether the instruction ends with it.
fn without_continuation(line: &str, escape: char) -> (&str, bool) {
    let trimmed = line.trim_end_matches([' ', '\t']);
    match trimmed.strip_suffix(escape) {
        Some(before) if !before.ends_with(escape) => (before, false),
        _ => (line, true),
    }
}

fn instruction(
    reader: &mut Reader<'_>,
    line: u32,
    logical: &Spelled,
    escape: char,
) -> Result<Instruction, DockerfileError> {
    let error = |what: String| DockerfileError::Syntax { line, what };
    let (keyword, rest) = split_keyword(logical);
    if !KEYWORDS.contains(&keyword.as_str()) {
        let shown: String = keyword.chars().take(40).collect();
        return Err(error(format!("unknown instruction {shown:?}")));
    }
    let mut heredocs = Vec::new();
    if may_have_heredoc(&keyword, &rest, escape) && logical.text().contains("<<") {
        for (name, chomp) in heredoc_words(logical.text()) {
            let mut body = String::new();
            let mut terminated = false;
            while let Some((_, raw)) = reader.next() {
                let mut bare = raw.trim_end_matches(['\r', '\n']);
                if chomp {
                    bare = bare.trim_start_matches('\t');
                }
                if bare == name {
                    terminated = true;
                    break;
                }
                body.push_str(raw);
            }
            if !terminated {
                return Err(error(format!("the here-document {name:?} never ends")));
            }
            heredocs.push(Heredoc { name, chomp, body });
        }
    }
    Ok(Instruction {
        line,
        keyword,
        rest,
        heredocs,
        escape,
    })
}

fn split_keyword(logical: &Spelled) -> (String, Spelled) {
    let text = logical.text();
    let space = |c: char| matches!(c, ' ' | '\t' | '\u{b}' | '\u{c}' | '\r');
    let end = text.find(space).unwrap_or(text.len());
    let rest = logical.slice(end..text.len()).trim();
    (text[..end].to_lowercase(), rest)
}

fn may_have_heredoc(keyword: &str, rest: &Spelled, escape: char) -> bool {
    if keyword == "onbuild" {
        let (inner, rest) = split_keyword(rest);
        return inner != "onbuild" && may_have_heredoc(&inner, &rest, escape);
    }
    if !matches!(keyword, "add" | "copy" | "run") {
        return false;
    }
    let (_, body) = super::flags::take_flags(rest, escape);
    serde_json::from_str::<Vec<String>>(body.text()).is_err()
}

/// The here-document words of a line, in order: (terminator, leading tabs are dropped).
fn heredoc_words(line: &str) -> Vec<(String, bool)> {
    let Some(words) = shell_words(line) else {
        return Vec::new();
    };
    words.iter().filter_map(|word| heredoc_word(word)).collect()
}

/// `[fd]<<[-]WORD`, where WORD may be quoted.
fn heredoc_word(word: &str) -> Option<(String, bool)> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit());
    let rest = rest.strip_prefix("<<")?;
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    if rest.is_empty() || rest.contains('<') || shell_words(rest)?.len() != 1 {
        return None;
    }
    Some((unquote(rest), chomp))
}

/// Words as a shell would split them, quotes and escapes kept; `None` when a quote stays open.
fn shell_words(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            '\'' | '"' => {
                word.push(c);
                loop {
                    let inner = chars.next()?;
                    word.push(inner);
                    if inner == c {
                        break;
                    }
                    if inner == '\\' && c == '"' {
                        word.push(chars.next()?);
                    }
                }
            }
            '\\' => {
                word.push(c);
                word.extend(chars.next());
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    Some(words)
}

fn unquote(word: &str) -> String {
    let mut plain = String::new();
    let mut quote = None;
    let mut chars = word.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (Some('"') | None, '\\') => plain.extend(chars.next()),
            (_, c) => plain.push(c),
        }
    }
    plain
}
