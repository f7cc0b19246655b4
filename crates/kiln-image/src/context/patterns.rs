//! `.dockerignore` patterns, with Docker's meaning (`github.com/moby/patternmatcher`).
//!
//! A pattern matches a path or any folder above it; the last pattern that matches decides; `!` takes back.
//! Matching costs at most pattern length times path length, whatever the pattern.

/// Longest pattern, characters.
const PATTERN_CHARS_MAX: usize = 4096;
/// Most patterns in one file.
pub(super) const PATTERNS_MAX: usize = 10_000;

/// Why a pattern is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// `!` with nothing behind it.
    #[error("`!` needs a pattern behind it")]
    EmptyException,
    /// `[` without `]`, or `\` at the end.
    #[error("{0:?} is no pattern: a `[` or `\\` stays open")]
    Open(String),
    /// Too long or too many.
    #[error(
        "a pattern has at most {PATTERN_CHARS_MAX} characters, a file at most {PATTERNS_MAX} patterns"
    )]
    TooLarge,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`: one character, not `/`.
    One,
    /// `*`: any characters but `/`.
    Star,
    /// `**/`: nothing, or anything up to and with a `/`.
    Folders,
    /// `**` at the end: anything.
    Rest,
    /// `[…]`.
    Class(Vec<(char, char)>, bool),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    tokens: Vec<Token>,
    takes_back: bool,
}

/// The patterns of one file, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patterns {
    patterns: Vec<Pattern>,
}

impl Patterns {
    /// Reads a `.dockerignore`.
    ///
    /// # Errors
    /// The line, from 1, and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, (usize, PatternError)> {
        let mut all = Self::default();
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        for (index, line) in text.lines().enumerate() {
            if line.starts_with('#') {
                continue;
            }
            all.add(line.trim()).map_err(|e| (index + 1, e))?;
        }
        Ok(all)
    }

    /// Adds one pattern; an empty one is skipped.
    ///
    /// # Errors
    /// See [`PatternError`].
    pub fn add(&mut self, line: &str) -> Result<(), PatternError> {
        let (takes_back, text) = match line.strip_prefix('!') {
            Some(rest) => (true, rest.trim()),
            None => (false, line),
        };
        if text.is_empty() {
            return match takes_back {
                true => Err(PatternError::EmptyException),
                false => Ok(()),
            };
        }
        if text.chars().count() > PATTERN_CHARS_MAX || self.patterns.len() >= PATTERNS_MAX {
            return Err(PatternError::TooLarge);
        }
        let clean = clean(text);
        if clean == "." {
            // Docker drops a pattern for the folder itself.
            return Ok(());
        }
        let tokens = tokens(&clean).ok_or_else(|| PatternError::Open(clean.clone()))?;
        self.patterns.push(Pattern { tokens, takes_back });
        Ok(())
    }

    /// Whether anything may be taken back below an ignored folder, so that it must be entered.
    #[must_use]
    pub fn take_back(&self) -> bool {
        self.patterns.iter().any(|pattern| pattern.takes_back)
    }

    /// Whether `path` (relative, `/` between names) is ignored.
    #[must_use]
    pub fn is_ignored(&self, path: &str) -> bool {
        let parents: Vec<&str> = path
            .match_indices('/')
            .map(|(i, _)| &path[..i])
            .chain([path])
            .collect();
        let mut ignored = false;
        for pattern in &self.patterns {
            if pattern.takes_back != ignored {
                continue;
            }
            if parents.iter().any(|path| matches(&pattern.tokens, path)) {
                ignored = !pattern.takes_back;
            }
        }
        ignored
    }
}

/// Go's `filepath.Clean`, then without a slash in front.
fn clean(text: &str) -> String {
    let rooted = text.starts_with('/');
    let mut names: Vec<&str> = Vec::new();
    for name in text.split('/') {
        match name {
            "" | "." => {}
            ".." if names.last().is_some_and(|last| *last != "..") => {
                names.pop();
            }
            ".." if rooted => {}
            name => names.push(name),
        }
    }
    if names.is_empty() {
        return ".".to_owned();
    }
    names.join("/")
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        tokens.push(match c {
            '*' if chars.peek() == Some(&'*') => {
                chars.next();
                if chars.peek() == Some(&'/') {
                    chars.next();
                }
                match chars.peek() {
                    Some(_) => Token::Folders,
                    None => Token::Rest,
                }
            }
            '*' => Token::Star,
            '?' => Token::One,
            '\\' => Token::Char(chars.next()?),
            '[' => class(&mut chars)?,
            c => Token::Char(c),
        });
    }
    Some(tokens)
}

fn class(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<Token> {
    let negated = chars.next_if(|&c| c == '^').is_some();
    let mut ranges = Vec::new();
    loop {
        let mut low = chars.next()?;
        match low {
            ']' if !ranges.is_empty() => return Some(Token::Class(ranges, negated)),
            '\\' => low = chars.next()?,
            _ => {}
        }
        let mut high = low;
        let mut ahead = chars.clone();
        if ahead.next() == Some('-') && ahead.peek().is_some_and(|&c| c != ']') {
            chars.next();
            high = chars.next()?;
            if high == '\\' {
                high = chars.next()?;
            }
        }
        ranges.push((low, high));
    }
}

/// Where the match may stand: before token `i`, or inside the `**/` at `i`, which has then read something.
struct States {
    before: Vec<bool>,
    inside: Vec<bool>,
}

impl States {
    fn none(tokens: usize) -> Self {
        Self {
            before: vec![false; tokens + 1],
            inside: vec![false; tokens + 1],
        }
    }

    /// Tokens that can match nothing may be skipped; a `**/` that has begun may not.
    fn skip_empty(&mut self, tokens: &[Token]) {
        for (i, token) in tokens.iter().enumerate() {
            let empty = matches!(token, Token::Star | Token::Rest | Token::Folders);
            self.before[i + 1] |= self.before[i] && empty;
        }
    }
}

/// Runs all ways through the pattern at once.
fn matches(tokens: &[Token], path: &str) -> bool {
    let mut now = States::none(tokens.len());
    now.before[0] = true;
    now.skip_empty(tokens);
    for c in path.chars() {
        let mut next = States::none(tokens.len());
        for (i, token) in tokens.iter().enumerate() {
            if now.before[i] || now.inside[i] {
                step(token, c, i, &mut next);
            }
        }
        next.skip_empty(tokens);
        now = next;
    }
    now.before[tokens.len()]
}

fn step(token: &Token, c: char, i: usize, next: &mut States) {
    match token {
        Token::Char(wanted) => next.before[i + 1] |= c == *wanted,
        Token::One => next.before[i + 1] |= c != '/',
        Token::Star => next.before[i] |= c != '/',
        Token::Rest => next.before[i] = true,
        Token::Folders => {
            next.inside[i] = true;
            next.before[i + 1] |= c == '/';
        }
        Token::Class(ranges, negated) => {
            let inside = ranges.iter().any(|&(low, high)| low <= c && c <= high);
            next.before[i + 1] |= inside != *negated;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ignored(file: &str, path: &str) -> bool {
        Patterns::parse(file).expect("legal").is_ignored(path)
    }

    #[test]
    fn patterns_mean_what_docker_means() {
        for (file, path, want) in [
            ("*", "a", true),
            ("*", "a/b", true),
            ("*.md\n!README.md", "README.md", false),
            ("*.md\n!README.md", "x.md", true),
            ("!README.md\n*.md", "README.md", true),
            ("*.md", "docs/x.md", false),
            ("**/*.md", "docs/x.md", true),
            ("**/*.md", "x.md", true),
            ("docs/**", "docs/a/b", true),
            ("docs/**/b", "docs/b", true),
            ("docs/**/b", "docs/x/y/b", true),
            ("docs/**/b", "docs/xb", false),
            ("a/**/b/c", "a/xb/c", false),
            ("node_modules", "node_modules/x/index.js", true),
            ("node_modules", "sub/node_modules/x", false),
            ("**/node_modules", "sub/node_modules/x", true),
            ("/build", "build", true),
            ("build/", "build/x", true),
            ("./build/../dist", "dist", true),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("a?c", "aéc", true),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("# comment", "# comment", false),
            ("build\n!build/keep", "build/keep/x", false),
            ("build\n!build/keep", "build/other", true),
            (".", "a", false),
        ] {
            assert_eq!(ignored(file, path), want, "{file:?} {path:?}");
        }
    }

    #[test]
    fn broken_patterns_name_their_line() {
        assert_eq!(
            Patterns::parse("a\n!"),
            Err((2, PatternError::EmptyException))
        );
        assert!(matches!(
            Patterns::parse("a\n\n[x"),
            Err((3, PatternError::Open(_)))
        ));
    }

    /// The slow and obvious meaning.
    fn naive(tokens: &[Token], path: &[char]) -> bool {
        let Some(token) = tokens.first() else {
            return path.is_empty();
        };
        let rest = &tokens[1..];
        let one = |ok: bool| ok && naive(rest, &path[1..]);
        match token {
            Token::Char(c) => !path.is_empty() && one(path[0] == *c),
            Token::One => !path.is_empty() && one(path[0] != '/'),
            Token::Class(ranges, negated) => {
                !path.is_empty()
                    && one(ranges.iter().any(|r| r.0 <= path[0] && path[0] <= r.1) != *negated)
            }
            Token::Star => {
                naive(rest, path)
                    || (!path.is_empty() && path[0] != '/' && naive(tokens, &path[1..]))
            }
            Token::Rest => true,
            Token::Folders => {
                naive(rest, path)
                    || (0..path.len()).any(|i| path[i] == '/' && naive(rest, &path[i + 1..]))
            }
        }
    }

    proptest! {
        #[test]
        fn all_ways_at_once_is_the_obvious_meaning(
            pattern in r"[ab/*?\[\]^-]{0,8}",
            path in r"[ab/]{0,8}",
        ) {
            if let Some(tokens) = tokens(&pattern)
                && tokens.iter().rev().skip(1).all(|t| *t != Token::Rest)
            {
                let chars: Vec<char> = path.chars().collect();
                prop_assert_eq!(matches(&tokens, &path), naive(&tokens, &chars));
            }
        }

        #[test]
        fn any_text_parses_or_fails(text in r"\PC{0,60}(\n\PC{0,60}){0,3}", path in r"\PC{0,60}") {
            if let Ok(patterns) = Patterns::parse(&text) {
                let _ = patterns.is_ignored(&path);
            }
        }
    }
}
