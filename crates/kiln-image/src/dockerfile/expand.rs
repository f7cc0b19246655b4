//! `$NAME` and `${NAME…}` in FROM and ARG, as BuildKit's shell lexer expands them.

/// Deepest nesting of `${A:-${B:-…}}`.
const DEPTH_MAX: usize = 16;
/// Longest result, bytes: a value that doubles itself over many ARG lines must not eat the host's memory.
const EXPANDED_BYTES_MAX: usize = 64 * 1024;

/// Why a text cannot be expanded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExpandError {
    /// A brace or quote stays open.
    #[error("{0:?} has an unterminated substitution or quote")]
    Unterminated(String),
    /// `${NAME…}` with an operator kiln does not expand here.
    #[error("kiln does not expand ${{{0}}} in an image name; use :-, -, :+, +, :? or ?")]
    Operator(String),
    /// `${NAME:?message}` and NAME is not set.
    #[error("{name} is required: {message}")]
    Required {
        /// The variable.
        name: String,
        /// The message in the Dockerfile.
        message: String,
    },
    /// Too long or too deeply nested.
    #[error("the substitution is too large")]
    TooLarge,
}

/// Expands variables and removes quotes. `get` gives a variable's value; unset ones are empty.
///
/// # Errors
/// See [`ExpandError`].
pub fn expand(
    text: &str,
    escape: char,
    get: &dyn Fn(&str) -> Option<String>,
) -> Result<String, ExpandError> {
    let lexer = Lexer { escape, get };
    lexer.text(text, 0)
}

struct Lexer<'a> {
    escape: char,
    get: &'a dyn Fn(&str) -> Option<String>,
}

impl Lexer<'_> {
    fn text(&self, text: &str, depth: usize) -> Result<String, ExpandError> {
        if depth > DEPTH_MAX {
            return Err(ExpandError::TooLarge);
        }
        let open = || ExpandError::Unterminated(text.chars().take(100).collect());
        let mut out = String::new();
        let mut double = false;
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            rest = &rest[c.len_utf8()..];
            match c {
                '\'' if !double => {
                    let (inner, after) = rest.split_once('\'').ok_or_else(open)?;
                    out.push_str(inner);
                    rest = after;
                }
                '"' => double = !double,
                '$' => rest = self.variable(rest, depth, &mut out)?,
                c if c == self.escape => {
                    let Some(next) = rest.chars().next() else {
                        out.push(c);
                        break;
                    };
                    if double && !matches!(next, '"' | '$') && next != self.escape {
                        out.push(c);
                    }
                    out.push(next);
                    rest = &rest[next.len_utf8()..];
                }
                c => out.push(c),
            }
            if out.len() > EXPANDED_BYTES_MAX {
                return Err(ExpandError::TooLarge);
            }
        }
        if double { Err(open()) } else { Ok(out) }
    }

    /// `rest` stands after the dollar sign; returns what follows the variable.
    fn variable<'t>(
        &self,
        rest: &'t str,
        depth: usize,
        out: &mut String,
    ) -> Result<&'t str, ExpandError> {
        if let Some(braced) = rest.strip_prefix('{') {
            let end = closing(braced, self.escape)
                .ok_or_else(|| ExpandError::Unterminated(rest.chars().take(100).collect()))?;
            out.push_str(&self.braced(&braced[..end], depth)?);
            return Ok(&braced[end + 1..]);
        }
        let end = name_end(rest);
        if end == 0 {
            out.push('$');
        } else {
            out.push_str(&(self.get)(&rest[..end]).unwrap_or_default());
        }
        Ok(&rest[end..])
    }

    fn braced(&self, inner: &str, depth: usize) -> Result<String, ExpandError> {
        let end = name_end(inner);
        let (name, operator) = inner.split_at(end);
        let unknown = || ExpandError::Operator(inner.chars().take(100).collect());
        if name.is_empty() {
            return Err(unknown());
        }
        let value = (self.get)(name);
        let (colon, operator) = match operator.strip_prefix(':') {
            Some(rest) => (true, rest),
            None => (false, operator),
        };
        let set = value.as_ref().is_some_and(|v| !colon || !v.is_empty());
        let Some(kind) = operator.chars().next() else {
            return if colon {
                Err(unknown())
            } else {
                Ok(value.unwrap_or_default())
            };
        };
        let word = &operator[kind.len_utf8()..];
        match kind {
            '-' if set => Ok(value.unwrap_or_default()),
            '-' => self.text(word, depth + 1),
            '+' if set => self.text(word, depth + 1),
            '+' => Ok(String::new()),
            '?' if set => Ok(value.unwrap_or_default()),
            '?' => Err(ExpandError::Required {
                name: name.to_owned(),
                message: match self.text(word, depth + 1)? {
                    empty if empty.is_empty() => "is not set".to_owned(),
                    message => message,
                },
            }),
            _ => Err(unknown()),
        }
    }
}

/// Length of the variable name at the front: `[A-Za-z_][A-Za-z0-9_]*` or digits or one special character.
fn name_end(text: &str) -> usize {
    let first = text.chars().next();
    match first {
        Some(c) if c.is_ascii_alphabetic() || c == '_' => text
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(text.len()),
        Some(c) if c.is_ascii_digit() => text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
        Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => 1,
        _ => 0,
    }
}

/// Offset of the brace that closes an already opened one.
fn closing(text: &str, escape: char) -> Option<usize> {
    let mut depth = 0_usize;
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            c if c == escape => {
                chars.next();
            }
            '{' => depth += 1,
            '}' if depth == 0 => return Some(i),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}
