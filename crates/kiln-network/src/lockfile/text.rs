//! Lockfiles that are read line by line: YAML without a YAML parser, yarn 1's own format, requirements.
//!
//! Each reader looks for the few keys that carry addresses; the formats are machine-written, one per line.

use super::{Found, LockfileError};

fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line))
}

/// The scalar at the start of `text`: quoted, or up to a separator.
fn scalar(text: &str) -> &str {
    let text = text.trim_start();
    match text.chars().next() {
        Some(quote @ ('"' | '\'')) => {
            let inner = &text[1..];
            inner.split(quote).next().unwrap_or(inner)
        }
        _ => text.split([',', '}', ' ', '\t']).next().unwrap_or(text),
    }
}

/// `tarball:` and `repo:` of a resolution, in flow or block style.
pub(super) fn pnpm(text: &str, found: &mut Found<'_>) -> Result<(), LockfileError> {
    for (number, line) in lines(text) {
        for key in ["tarball:", "repo:"] {
            let mut rest = line;
            while let Some(at) = rest.find(key) {
                let before = rest[..at].chars().next_back();
                rest = &rest[at + key.len()..];
                if before.is_none_or(|c| matches!(c, ' ' | '{' | ',' | '\t')) {
                    found.at(number, scalar(rest))?;
                }
            }
        }
    }
    Ok(())
}

/// `resolved "URL"`.
pub(super) fn yarn(text: &str, found: &mut Found<'_>) -> Result<(), LockfileError> {
    for (number, line) in lines(text) {
        if let Some(value) = line.trim_start().strip_prefix("resolved ") {
            found.at(number, scalar(value))?;
        }
    }
    Ok(())
}

/// `resolution: "name@RANGE"` where the range is an address, or an npm one with its archive elsewhere.
pub(super) fn berry(text: &str, found: &mut Found<'_>) -> Result<(), LockfileError> {
    for (number, line) in lines(text) {
        let Some(value) = line.trim_start().strip_prefix("resolution:") else {
            continue;
        };
        let value = scalar(value);
        if let Some((_, archive)) = value.split_once("__archiveUrl=") {
            let archive = archive.split('&').next().unwrap_or(archive);
            found.at(number, &unescaped(archive))?;
        }
        // The name may begin with "@scope/".
        let range = value.get(1..).and_then(|rest| rest.split_once('@'));
        if let Some((_, range)) = range
            && !range.starts_with("npm:")
            && !range.starts_with("workspace:")
        {
            found.at(number, range)?;
        }
    }
    Ok(())
}

/// Just what `encodeURIComponent` makes of a URL's beginning.
fn unescaped(text: &str) -> String {
    let replace = |text: String, (code, plain): &(&str, &str)| {
        text.replace(code, plain)
            .replace(&code.to_ascii_lowercase(), plain)
    };
    [("%3A", ":"), ("%2F", "/"), ("%40", "@")]
        .iter()
        .fold(text.to_owned(), replace)
}

/// Index options, `name @ URL`, bare URLs and version-control URLs.
pub(super) fn requirements(text: &str, found: &mut Found<'_>) -> Result<(), LockfileError> {
    for (number, line) in lines(text) {
        let line = line.trim();
        if line.starts_with('#') {
            continue;
        }
        let end = line.find(" #").unwrap_or(line.len());
        for word in line[..end].split([' ', '\t', '\'', '"']) {
            let word = word.rsplit_once('=').map_or(word, |(option, value)| {
                if option.starts_with("--") {
                    value
                } else {
                    word
                }
            });
            let word = word.trim_start_matches("-i").trim_start_matches("-f");
            // PEP 508 allows "name@https://…" and "name[extra]@https://…".
            let at = word.find("://").map(|at| {
                let scheme = word[..at]
                    .rfind(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)))
                    .map_or(0, |at| at + 1);
                &word[scheme..]
            });
            if let Some(url) = at {
                found.at(number, url)?;
            }
        }
    }
    Ok(())
}
