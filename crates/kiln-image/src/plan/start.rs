//! A start command as the image's CMD.

use crate::build_config::Start;

/// How the image starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cmd {
    /// Run as it is.
    Exec(Vec<String>),
    /// Run by `/bin/sh -c`.
    Shell(String),
}

impl Cmd {
    /// From a command line: without a shell where nothing in it needs one, so that signals reach the app.
    pub(super) fn of_line(line: &str) -> Self {
        let line = line.trim();
        let special = |c: char| "|&;<>()$`\\\"'*?[]#~=%!{}\n".contains(c);
        if !line.contains(special) {
            return Self::Exec(line.split_whitespace().map(str::to_owned).collect());
        }
        let compound = line.contains(['|', '&', ';', '(', ')', '`', '\n']);
        let first = line.split_whitespace().next().unwrap_or_default();
        let assigns = first.split_once('=').is_some_and(|(name, _)| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        });
        Self::Shell(match (compound, assigns) {
            _ if first == "exec" => line.to_owned(),
            (true, _) => line.to_owned(),
            (false, true) => format!("exec env {line}"),
            (false, false) => format!("exec {line}"),
        })
    }

    /// From `kiln.toml`.
    pub(super) fn of_config(start: &Start) -> Self {
        match start {
            Start::Shell(line) => Self::of_line(line),
            Start::Exec(words) => Self::Exec(words.clone()),
        }
    }

    /// The words of CMD.
    fn words(&self) -> Vec<String> {
        match self {
            Self::Exec(words) => words.clone(),
            Self::Shell(line) => ["/bin/sh", "-c", line].map(str::to_owned).to_vec(),
        }
    }

    /// `CMD ["node", "server.js"]`.
    pub(super) fn instruction(&self) -> String {
        format!("CMD {}", super::write::json(&self.words()))
    }

    /// For people.
    pub(super) fn line(&self) -> String {
        match self {
            Self::Exec(words) => words.join(" "),
            Self::Shell(line) => line.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_only_where_one_is_needed() {
        for (line, want) in [
            ("node server.js", r#"CMD ["node", "server.js"]"#),
            (
                "gunicorn -b 0.0.0.0:$PORT app:app",
                r#"CMD ["/bin/sh", "-c", "exec gunicorn -b 0.0.0.0:$PORT app:app"]"#,
            ),
            (
                "NODE_ENV=production node .",
                r#"CMD ["/bin/sh", "-c", "exec env NODE_ENV=production node ."]"#,
            ),
            (
                "a && b \"c d\"",
                r#"CMD ["/bin/sh", "-c", "a && b \"c d\""]"#,
            ),
        ] {
            assert_eq!(Cmd::of_line(line).instruction(), want);
        }
    }
}
