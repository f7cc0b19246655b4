//! Writing Dockerfile text.

use std::collections::BTreeMap;

/// User and group of the app in every run base.
pub(super) const APP_USER: &str = "10001:10001";

/// A Dockerfile in the making.
#[derive(Default)]
pub(super) struct Text {
    text: String,
}

impl Text {
    /// One line.
    pub(super) fn line(&mut self, line: impl AsRef<str>) -> &mut Self {
        self.text.push_str(line.as_ref());
        self.text.push('\n');
        self
    }

    /// An empty line and the start of a stage.
    pub(super) fn stage(&mut self, image: &str, name: Option<&str>) -> &mut Self {
        let name = name.map_or_else(String::new, |name| format!(" AS {name}"));
        self.line("").line(format!("FROM {image}{name}"))
    }

    /// `ENV`, one variable a line of the same instruction.
    pub(super) fn env(&mut self, variables: &BTreeMap<String, String>) -> &mut Self {
        let all: Vec<_> = variables
            .iter()
            .map(|(name, value)| format!("{name}={}", quoted(value)))
            .collect();
        match all.is_empty() {
            true => self,
            false => self.line(format!("ENV {}", all.join(" \\\n    "))),
        }
    }

    /// `RUN` of a command of ours, with cache mounts.
    pub(super) fn run(&mut self, mounts: &[String], command: &str) -> &mut Self {
        let mut line = String::from("RUN ");
        for mount in mounts {
            line.push_str(&format!("--mount={mount} \\\n    "));
        }
        line.push_str(command);
        self.line(line)
    }

    /// `RUN` of somebody else's command: a JSON array, so that nothing in it means anything to the parser.
    pub(super) fn run_given(&mut self, mounts: &[String], command: &str) -> &mut Self {
        let words = ["/bin/sh", "-c", command].map(str::to_owned);
        self.run(mounts, &json(&words))
    }

    /// The text.
    pub(super) fn finish(self) -> String {
        self.text
    }
}

/// A value of `ENV` or an argument of `COPY`, quoted where it must be.
pub(super) fn quoted(value: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-:,@+%".contains(&b);
    if !value.is_empty() && value.bytes().all(plain) {
        return value.to_owned();
    }
    let mut out = String::from("\"");
    for c in value.chars() {
        if matches!(c, '"' | '\\' | '$') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
    out
}

/// `["a", "b"]`.
pub(super) fn json(words: &[String]) -> String {
    let words: Vec<_> = words
        .iter()
        .map(|word| serde_json::Value::from(word.as_str()).to_string())
        .collect();
    format!("[{}]", words.join(", "))
}

/// A cache mount of the tenant's state disk.
pub(super) fn cache(id: &str, target: &str) -> String {
    format!("type=cache,id=kiln-{id},target={target}")
}
