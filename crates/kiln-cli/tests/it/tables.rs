//! The tables of faults and threats: every row names a test that is there, in the crate and module that it says, or says why it has none.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::root;

/// Where the tables are.
const DOCUMENTS: [&str; 3] = [
    "docs/design/faults.md",
    "docs/design/faults-control-plane.md",
    "SECURITY.md",
];
/// What a row may say instead of a name: nothing to test, or the test of the row above.
const INSTEAD: [&str; 3] = ["none: ", "the same", "as above"];

/// A file of Rust below `crates`.
struct Source {
    krate: String,
    /// Names of its folders and its own, which are those of its modules.
    modules: Vec<String>,
    text: String,
}

fn sources() -> Vec<Source> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let crates = root().join("crates");
    let mut found = Vec::new();
    walk(&crates, &mut found);
    let source = |path: PathBuf| {
        let inside = path.strip_prefix(&crates).expect("below crates");
        let inside = inside.with_extension("");
        let mut words = inside
            .iter()
            .map(|word| word.to_string_lossy().into_owned());
        Source {
            krate: words.next().expect("a crate"),
            modules: words.collect(),
            text: fs::read_to_string(&path).expect("a source"),
        }
    };
    found.into_iter().map(source).collect()
}

impl Source {
    /// Whether it is, or has, this module.
    fn is_in(&self, module: &str) -> bool {
        self.modules.iter().any(|name| name == module)
            || self.text.contains(&format!("mod {module} {{"))
    }

    fn has(&self, function: &str) -> bool {
        match function.strip_suffix('*') {
            Some(start) => self.text.contains(&format!("fn {start}")),
            None => self.text.contains(&format!("fn {function}(")),
        }
    }
}

/// A test as a row names it: its crate, if that is said, and the path of the function, or a module alone.
fn exists(sources: &[Source], krate: Option<&str>, name: &str) -> bool {
    if name.contains('/') {
        return root().join(name).is_file();
    }
    let words: Vec<&str> = name.split("::").collect();
    let (function, modules) = words.split_last().expect("a word");
    let mut sources = sources.iter();
    sources.any(|source| {
        if krate.is_some_and(|krate| source.krate != krate) {
            return false;
        }
        let inside = modules.iter().all(|module| source.is_in(module));
        let whole = modules.is_empty() && source.modules.last().is_some_and(|own| own == function);
        (inside && (*function == "*" || source.has(function)))
            || (whole && source.text.contains("test]"))
    })
}

/// The last crate that a text names; `e2e` is kiln-cli's suite.
fn crate_of(text: &str) -> Option<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
    words
        .filter_map(|word| match word {
            "e2e" => Some("kiln-cli"),
            word if word.starts_with("kiln-") => Some(word),
            _ => None,
        })
        .next_back()
}

/// What is wrong with the cell of a row that names its tests.
fn wrong(sources: &[Source], cell: &str) -> Vec<String> {
    let (mut krate, mut count, mut found) = (None, 0, Vec::new());
    for (place, part) in cell.split('`').enumerate() {
        if place % 2 == 0 {
            krate = crate_of(part).or(krate);
            continue;
        }
        // How a test is made longer.
        if part.starts_with("KILN_") {
            continue;
        }
        count += 1;
        if !exists(sources, krate, part) {
            found.push(format!(
                "no test {part} in {}",
                krate.unwrap_or("any crate")
            ));
        }
    }
    if count == 0 && !INSTEAD.iter().any(|word| cell.starts_with(word)) {
        found.push(format!("no test named: {cell:?}"));
    }
    found
}

/// The cells of a row; a `|` that is part of one is written `\\|`.
fn cells(line: &str) -> Option<Vec<String>> {
    let line = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    let line = line.replace("\\|", "\u{1}");
    let cells = line.split('|');
    Some(cells.map(|cell| cell.trim().to_owned()).collect())
}

/// Each row of a table with a column of tests: its line, and that cell.
fn rows(text: &str) -> Vec<(usize, String)> {
    let mut column = None;
    let mut head: Option<Vec<String>> = None;
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let Some(cells) = cells(line) else {
            (column, head) = (None, None);
            continue;
        };
        let rule = cells
            .iter()
            .all(|cell| !cell.is_empty() && cell.chars().all(|c| c == '-'));
        if rule {
            let head = head.take().unwrap_or_default();
            column = head
                .iter()
                .position(|name| name.eq_ignore_ascii_case("test"));
        } else if let Some(column) = column {
            // A row that is too short names none.
            found.push((number + 1, cells.get(column).cloned().unwrap_or_default()));
        } else {
            head = Some(cells);
        }
    }
    found
}

#[test]
fn every_row_of_faults_and_threats_names_tests_that_exist() {
    let sources = sources();
    let mut found = Vec::new();
    let mut count = 0;
    for name in DOCUMENTS {
        let text = fs::read_to_string(root().join(name)).expect("the table");
        for (line, cell) in rows(&text) {
            count += 1;
            let wrong = wrong(&sources, &cell);
            found.extend(wrong.into_iter().map(|why| format!("{name}:{line}: {why}")));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(count > 150, "only {count} rows");
}

#[test]
fn what_a_row_must_not_say_is_found() {
    let sources = sources();
    let good = [
        "e2e `tables::every_row_of_faults_and_threats_names_tests_that_exist`",
        "sim, kiln-cli `tables::every_row_*`; kiln-core `parse_and_show`",
        "none: not kiln's",
    ];
    for cell in good {
        assert_eq!(wrong(&sources, cell), Vec::<String>::new(), "{cell}");
    }
    let bad = [
        "",
        "somebody looked",
        "e2e `tables::no_such_test`",
        // Of another module, of another crate, and a short name.
        "e2e `faults::every_row_of_faults_and_threats_names_tests_that_exist`",
        "kiln-core `every_row_of_faults_and_threats_names_tests_that_exist`",
        "e2e `nothing`",
        "kiln-core `parse_and_show`, `nor_this`",
    ];
    for cell in bad {
        assert_eq!(wrong(&sources, cell).len(), 1, "{cell}");
    }
    let table = "| a | Test |\n|---|---|\n| x \\| y | one |\n| z |\n\n| b | c |\n|---|---|\n| no | test |\n";
    assert_eq!(rows(table), [(3, "one".to_owned()), (4, String::new())]);
}
