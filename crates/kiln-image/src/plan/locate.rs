//! On which line a key of a JSON or TOML document stands.

use toml::de::{DeTable, DeValue};

use crate::bases::line_of;

/// Line of the key at `path` in a TOML document.
pub(crate) fn toml_line(text: &str, path: &[&str]) -> Option<u32> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut found = None;
    for (depth, name) in path.iter().enumerate() {
        let (key, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
        found = Some(line_of(text, key.span().start) as u32);
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ if depth + 1 == path.len() => {}
            _ => return None,
        }
    }
    found
}

/// Line of the key at `path` in a JSON document that serde accepted.
pub(super) fn json_line(text: &str, path: &[&str]) -> Option<u32> {
    let mut scan = JsonScan {
        bytes: text.as_bytes(),
        at: 0,
    };
    let offset = scan.find(path)?;
    Some(line_of(text, offset) as u32)
}

struct JsonScan<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl JsonScan<'_> {
    /// At a value: looks for `path` in it, leaves it behind otherwise.
    fn find(&mut self, path: &[&str]) -> Option<usize> {
        self.space();
        if self.bytes.get(self.at) != Some(&b'{') {
            self.skip_value();
            return None;
        }
        self.at += 1;
        loop {
            self.space();
            match *self.bytes.get(self.at)? {
                b'"' => {}
                b',' => {
                    self.at += 1;
                    continue;
                }
                _ => {
                    self.at += 1;
                    return None;
                }
            }
            let start = self.at;
            self.skip_string();
            let key: String = serde_json::from_slice(self.bytes.get(start..self.at)?).ok()?;
            self.space();
            self.at += 1;
            match path {
                [last] if *last == key => return Some(start),
                [first, rest @ ..] if *first == key => return self.find(rest),
                _ => self.skip_value(),
            }
        }
    }

    fn space(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    fn skip_string(&mut self) {
        self.at += 1;
        while let Some(&b) = self.bytes.get(self.at) {
            self.at += match b {
                b'\\' => 2,
                _ => 1,
            };
            if b == b'"' {
                return;
            }
        }
    }

    fn skip_value(&mut self) {
        self.space();
        let mut depth = 0_u32;
        while let Some(&b) = self.bytes.get(self.at) {
            match b {
                b'"' => {
                    self.skip_string();
                    if depth == 0 {
                        return;
                    }
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' if depth == 0 => return,
                b'}' | b']' => {
                    depth -= 1;
                    if depth == 0 {
                        self.at += 1;
                        return;
                    }
                }
                b',' if depth == 0 => return,
                _ => {}
            }
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_lines() {
        let text = "{\n \"a\": {\"x\": [1, {\"node\": 2}], \"s\": \"}\\\"\"},\n \"engines\": {\n  \"npm\": \"1\",\n  \"node\": \">=18\"\n }, \"n\": -1.5e3,\n \"z\": null\n}";
        assert_eq!(json_line(text, &["engines", "node"]), Some(5));
        assert_eq!(json_line(text, &["z"]), Some(7));
        assert_eq!(json_line(text, &["a", "s"]), Some(2));
        assert_eq!(json_line(text, &["node"]), None);
        assert_eq!(json_line("[]", &["a"]), None);
        assert_eq!(json_line("{\"a\"", &["b"]), None);
        let text = "[project]\nname = \"x\"\n\n[tool.poetry]\n[tool.poetry.dependencies]\npython = \"^3.11\"\n";
        let path = ["tool", "poetry", "dependencies", "python"];
        assert_eq!(toml_line(text, &path), Some(6));
        assert_eq!(toml_line(text, &["project", "name"]), Some(2));
        assert_eq!(toml_line(text, &["project", "name", "x"]), None);
    }

    proptest::proptest! {
        #[test]
        fn scanning_never_panics(text in r#"[{}\[\]",:a\\ \n]{0,40}"#) {
            json_line(&text, &["a", "a"]);
            toml_line(&text, &["a", "a"]);
        }
    }
}
