//! Tables and lists of facts as text that fits the terminal, or 80 columns. Nothing is cut where no terminal reads it.

use crate::show::printable;

/// Widest line.
pub(crate) const WIDTH: usize = 80;
/// Between two columns.
const GAP: &str = "  ";
/// Narrowest the wide column becomes.
const WIDE_MIN: usize = 8;
/// What stands for text that was cut.
const CUT: char = '…';

/// How a column behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Left,
    Right,
    Wide,
}

/// A column's heading and behaviour.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column(&'static str, Kind);

/// Text, never cut.
pub(crate) const fn left(heading: &'static str) -> Column {
    Column(heading, Kind::Left)
}

/// Numbers, never cut.
pub(crate) const fn right(heading: &'static str) -> Column {
    Column(heading, Kind::Right)
}

/// Text that gives way when the line is too long. One per table.
pub(crate) const fn wide(heading: &'static str) -> Column {
    Column(heading, Kind::Wide)
}

/// `1 blob`, `2 blobs`.
pub(crate) fn counted(count: u64, one: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        _ => format!("{count} {one}s"),
    }
}

/// Rows under headings.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
    /// Widest line; none when nothing is to be cut.
    limit: Option<usize>,
}

impl Table {
    /// No rows yet.
    pub(crate) fn new(columns: &[Column]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
            limit: Some(WIDTH),
        }
    }

    /// For lines of at most this many columns; without, nothing is cut.
    pub(crate) fn within(mut self, limit: Option<usize>) -> Self {
        self.limit = limit;
        self
    }

    /// Adds a row: one cell per column. Cells are untrusted text.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let line = |cell: String| printable(&cell.replace(['\n', '\t'], " "));
        self.rows.push(cells.into_iter().map(line).collect());
    }

    /// As text, one line per row, with a line end.
    pub(crate) fn render(&self) -> String {
        let widths = self.widths();
        let mut out = String::new();
        let headings: Vec<String> = self
            .columns
            .iter()
            .map(|column| column.0.to_owned())
            .collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let cells = self.columns.iter().zip(&widths).zip(row);
            let line: Vec<String> = cells
                .map(|((column, width), cell)| match column.1 {
                    Kind::Right => format!("{cell:>width$}"),
                    _ => format!("{:<width$}", cut(cell, *width)),
                })
                .collect();
            out.push_str(line.join(GAP).trim_end());
            out.push('\n');
        }
        out
    }

    fn widths(&self) -> Vec<usize> {
        let width_of = |index: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(index));
            let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
            widest.max(self.columns[index].0.chars().count())
        };
        let mut widths: Vec<usize> = (0..self.columns.len()).map(width_of).collect();
        let total = widths.iter().sum::<usize>() + GAP.len() * widths.len().saturating_sub(1);
        let flexible = self
            .columns
            .iter()
            .position(|column| column.1 == Kind::Wide);
        if let (Some(index), Some(limit)) = (flexible, self.limit)
            && total > limit
        {
            widths[index] = widths[index].saturating_sub(total - limit).max(WIDE_MIN);
        }
        widths
    }
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push(CUT);
    short
}

/// Lines `name   value`, values aligned.
#[derive(Debug, Default)]
pub(crate) struct Facts(Vec<(String, String)>);

impl Facts {
    /// Adds a line. Values are untrusted text.
    pub(crate) fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.push((printable(name), printable(&value.into())));
    }

    /// As text, with a line end.
    pub(crate) fn render(&self) -> String {
        let width = self
            .0
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0);
        let mut out = String::new();
        for (name, value) in &self.0 {
            for (index, line) in value.lines().enumerate() {
                let name = if index == 0 { name.as_str() } else { "" };
                out.push_str(format!("{name:<width$}{GAP}{line}").trim_end());
                out.push('\n');
            }
        }
        out
    }
}

/// Breaks text at spaces into lines of at most `width` characters; a longer word stays whole.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut line = lines.pop().unwrap_or_default();
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(line);
            line = String::new();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wide_column_gives_way_and_lines_fit() {
        let mut table = Table::new(&[left("ID"), wide("WHAT"), right("SIZE")]);
        table.row(["a1".to_owned(), "x".repeat(100), "1.0 GiB".to_owned()]);
        table.row(["b".to_owned(), "a\nb\x1b[2J".to_owned(), "2 B".to_owned()]);
        let text = table.render();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], format!("ID  WHAT{}SIZE", " ".repeat(68)));
        assert_eq!(lines[1], format!("a1  {}…  1.0 GiB", "x".repeat(66)));
        assert!(lines[2].starts_with("b   a b\u{fffd}[2J ") && lines[2].ends_with("    2 B"));
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH));
        let text = table.within(None).render();
        assert!(text.contains(&"x".repeat(100)), "{text}");
    }

    #[test]
    fn one_thing_is_no_plural() {
        assert_eq!(
            (counted(1, "blob"), counted(0, "blob")),
            ("1 blob".to_owned(), "0 blobs".to_owned())
        );
    }

    #[test]
    fn facts_align_and_keep_lines() {
        let mut facts = Facts::default();
        facts.add("id", "b1");
        facts.add("phases", "one\ntwo");
        assert_eq!(facts.render(), "id      b1\nphases  one\n        two\n");
    }

    #[test]
    fn words_are_never_split() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij k", 4), ["abcdefghij", "k"]);
    }
}
