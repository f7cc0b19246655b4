//! Budgets and bans that no compiler keeps: file and function length, module headers, names, registry hosts.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::run;

const FILE_LINES_SOFT: usize = 600;
const FILE_LINES_HARD: usize = 1000;
const FUNCTION_LINES_SOFT: usize = 60;
const FUNCTION_LINES_HARD: usize = 100;
const BANNED_FILES: &[&str] = &[
    "utils.rs",
    "util.rs",
    "helpers.rs",
    "common.rs",
    "manager.rs",
    "misc.rs",
];

/// Files that may be longer or hold longer functions, each with its reason.
const EXCEPTIONS: &[(&str, &str)] = &[("crates/kiln-cli/src/args.rs", "a table of alike entries")];

/// What a piece of text in a comment may be.
const OTHER_LANGUAGES: [&str; 2] = ["text", "toml"];

/// Files whose name is right although it is on the list: they are about package managers.
const NAMED_RIGHT: &[&str] = &[
    "crates/kiln-image/src/plan/node/manager.rs",
    "crates/kiln-image/src/plan/python/manager.rs",
];

/// Checks every tracked file.
pub(crate) fn check() -> Result<()> {
    let files = run::output(Command::new("git").args(["ls-files", "-z"]))?;
    let files: Vec<&str> = files.split('\0').filter(|path| !path.is_empty()).collect();
    let mut wrong = Vec::new();
    let mut long = Vec::new();
    for path in files.iter().filter(|path| path.ends_with(".rs")) {
        let Ok(text) = fs::read_to_string(path) else {
            continue;
        };
        source(path, &text, &mut wrong, &mut long);
    }
    hosts(&files, &mut wrong);
    for line in &long {
        run::say(&format!("tidy: over the soft budget: {line}"));
    }
    if !wrong.is_empty() {
        bail!("tidy:\n  {}", wrong.join("\n  "));
    }
    run::say(&format!("tidy: {} files", files.len()));
    Ok(())
}

fn source(path: &str, text: &str, wrong: &mut Vec<String>, long: &mut Vec<String>) {
    let name = Path::new(path)
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    if BANNED_FILES.contains(&name) && !NAMED_RIGHT.contains(&path) {
        wrong.push(format!(
            "{path}: the name says nothing about what is inside"
        ));
    }
    let is_test = path.contains("/tests/") || name == "tests.rs" || name.ends_with("_tests.rs");
    let header = text
        .lines()
        .find(|line| !line.trim().is_empty())
        .is_some_and(|line| line.starts_with("//!"));
    if !header && !is_test {
        wrong.push(format!(
            "{path}: starts without a `//!` header that says what it is"
        ));
    }
    for line in examples(text) {
        wrong.push(format!(
            "{path}:{line}: code in a comment is compiled by no test: name its language, or write a test"
        ));
    }
    if EXCEPTIONS.iter().any(|(exempt, _)| *exempt == path) {
        return;
    }
    let production = production_lines(text);
    if !is_test {
        budget(
            path,
            production.len(),
            FILE_LINES_SOFT,
            FILE_LINES_HARD,
            "lines",
            wrong,
            long,
        );
        for (line, length) in functions(&production) {
            let place = format!("{path}:{line}");
            budget(
                &place,
                length,
                FUNCTION_LINES_SOFT,
                FUNCTION_LINES_HARD,
                "lines in a function",
                wrong,
                long,
            );
        }
    }
}

/// Lines where a comment begins a piece of Rust. `make test` runs no documentation tests: they would compile everything once more.
fn examples(text: &str) -> Vec<usize> {
    let mut inside = false;
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim_start();
        let comment = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"));
        let Some(language) = comment.and_then(|line| line.trim().strip_prefix("```")) else {
            continue;
        };
        inside = !inside;
        if inside && !OTHER_LANGUAGES.contains(&language) {
            found.push(at + 1);
        }
    }
    found
}

fn budget(
    place: &str,
    count: usize,
    soft: usize,
    hard: usize,
    what: &str,
    wrong: &mut Vec<String>,
    long: &mut Vec<String>,
) {
    if count > hard {
        wrong.push(format!("{place}: {count} {what}, at most {hard}"));
    } else if count > soft {
        long.push(format!("{place}: {count} {what}"));
    }
}

/// Everything before the inline test module.
fn production_lines(text: &str) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().collect();
    let tests = lines
        .windows(2)
        .position(|pair| pair[0].trim() == "#[cfg(test)]" && pair[1].starts_with("mod "));
    lines[..tests.unwrap_or(lines.len())].to_vec()
}

/// Line and length of each function, by indentation.
fn functions(lines: &[&str]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let starts = [
            "fn ",
            "pub fn ",
            "pub(crate) fn ",
            "pub(super) fn ",
            "async fn ",
            "pub async fn ",
            "pub(crate) async fn ",
            "pub(super) async fn ",
            "const fn ",
            "pub const fn ",
            "unsafe fn ",
        ]
        .iter()
        .any(|word| trimmed.starts_with(word));
        if !starts || trimmed.ends_with(';') {
            continue;
        }
        let indent = line.len() - trimmed.len();
        let close = format!("{}}}", " ".repeat(indent));
        // A declaration in a trait has no body: its signature ends with a semicolon at its own indentation.
        let declared =
            |line: &str| line.ends_with(';') && line.len() - line.trim_start().len() == indent;
        let end = lines[start..]
            .iter()
            .position(|line| *line == close || declared(line));
        if let Some(length) = end.filter(|length| lines[start + length] == close) {
            found.push((start + 1, length + 1));
        }
    }
    found
}

/// Package-registry hosts, as this machine's own tools report them, must stand in no tracked file.
fn hosts(files: &[&str], wrong: &mut Vec<String>) {
    let hosts = registry_hosts();
    for path in files {
        let Ok(text) = fs::read_to_string(path) else {
            continue;
        };
        for host in hosts.iter().filter(|host| text.contains(host.as_str())) {
            let masked: String = host.chars().take(4).collect();
            wrong.push(format!(
                "{path}: names a package-registry host ({masked}...); ask the tool at run time"
            ));
        }
    }
}

fn registry_hosts() -> BTreeSet<String> {
    let ask = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().ok()?;
        String::from_utf8(output.stdout).ok()
    };
    let mut text = String::new();
    for answer in [
        ask("npm", &["config", "get", "registry"]),
        ask("go", &["env", "GOPROXY"]),
    ] {
        text.push_str(&answer.unwrap_or_default().replace(',', "\n"));
        text.push('\n');
    }
    for dir in ["/etc/apt/sources.list.d", "/etc/apt"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|ext| ext == "list" || ext == "sources")
            {
                text.push_str(&fs::read_to_string(path).unwrap_or_default());
            }
        }
    }
    let mut hosts = BTreeSet::new();
    for part in text.split("://").skip(1) {
        let host: String = part
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'))
            .collect();
        if host.contains('.') {
            hosts.insert(host);
        }
    }
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_in_a_trait_have_no_length() {
        let text = "trait A {\n    fn a(\n        b: u8,\n    ) -> u8;\n\n    fn c() {\n        d();\n    }\n}\n";
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(functions(&lines), [(6, 3)]);
    }

    #[test]
    fn functions_are_measured_and_tests_are_not() {
        let text = "//! x\nfn a() {\n    b();\n}\n\n#[cfg(test)]\nmod tests {\n    fn long() {\n    }\n}\n";
        let lines = production_lines(text);
        assert_eq!(functions(&lines), [(2, 3)]);
    }

    #[test]
    fn code_in_a_comment_has_a_language() {
        let text =
            "//! ```text\n//! a\n//! ```\n/// ```\n/// b();\n/// ```\n/// ```rust\n/// ```\n";
        assert_eq!(examples(text), [4, 7]);
    }

    #[test]
    fn a_file_without_a_header_or_with_an_empty_name_is_found() {
        let (mut wrong, mut long) = (Vec::new(), Vec::new());
        source(
            "crates/x/src/utils.rs",
            "fn a() {}\n",
            &mut wrong,
            &mut long,
        );
        assert_eq!(wrong.len(), 2);
    }
}
