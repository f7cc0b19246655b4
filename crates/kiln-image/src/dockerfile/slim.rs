//! Which image a public `-slim` name means.
//!
//! Public slim images have a package manager and run as root, so Dockerfiles install on them: such a name means the *build*
//! base. A last stage that only copies, names its user and starts its runtime needs none of that, and gets the *run* base.
//! The rule is narrow on purpose: what it cannot see through keeps the build base.

use std::ops::Range;

use kiln_core::ImageRef;

use super::lines::Instruction;

/// Programs that a run base, or what was copied onto it, can start without a package manager and without a shell of its own.
const STARTERS: [&str; 12] = [
    "celery",
    "daphne",
    "fastapi",
    "flask",
    "granian",
    "gunicorn",
    "hypercorn",
    "node",
    "python",
    "python3",
    "uvicorn",
    "waitress-serve",
];

/// What is known of one stage.
#[derive(Debug, Default)]
pub(super) struct Stage {
    /// The run base that its slim name could mean.
    run: Option<Slim>,
    /// It runs something while it is built.
    runs: bool,
    user: Option<String>,
    entrypoint: Option<bool>,
    command: Option<bool>,
    healthcheck: Option<bool>,
}

/// A slim name of a Dockerfile.
#[derive(Debug)]
pub(super) struct Slim {
    /// Where it stands in the file; `None` when it cannot be replaced.
    pub(super) span: Option<Range<usize>>,
    /// Its place in the list of images.
    pub(super) image: usize,
    /// The run base.
    pub(super) run: ImageRef,
}

impl Stage {
    /// A stage that stands on a slim name.
    pub(super) fn slim(slim: Slim) -> Self {
        Self {
            run: Some(slim),
            ..Self::default()
        }
    }

    /// One instruction of it.
    pub(super) fn instruction(&mut self, instruction: &Instruction) {
        let text = instruction.rest.text();
        match instruction.keyword.as_str() {
            "run" | "onbuild" | "shell" => self.runs = true,
            "user" => self.user = Some(text.trim().to_owned()),
            "entrypoint" => self.entrypoint = Some(starts_plainly(text)),
            "cmd" => self.command = Some(starts_plainly(text)),
            "healthcheck" => self.healthcheck = Some(check_is_plain(text)),
            _ => {}
        }
    }

    /// The image to use instead, if the stage only starts.
    pub(super) fn only_starts(self) -> Option<Slim> {
        let user = self.user.as_deref().unwrap_or_default();
        let unprivileged = !user.is_empty() && !is_root(user) && !user.contains('$');
        let starts = self.entrypoint.or(self.command).unwrap_or(false);
        let plain = !self.runs && unprivileged && starts && self.healthcheck.unwrap_or(true);
        self.run.filter(|_| plain)
    }
}

/// Whether a name is a slim variant: `node:20-slim`, `python:3.13-slim-trixie`.
pub(super) fn is_slim(name: &str) -> bool {
    let tag = name.split('@').next().unwrap_or(name);
    let tag = tag.rsplit('/').next().and_then(|last| last.split_once(':'));
    tag.is_some_and(|(_, tag)| tag.split('-').any(|part| part == "slim"))
}

fn is_root(user: &str) -> bool {
    matches!(user.split(':').next(), Some("root" | "0"))
}

/// Whether CMD or ENTRYPOINT starts a runtime, and nothing else.
fn starts_plainly(text: &str) -> bool {
    let text = text.trim();
    let words: Vec<String> = match text.starts_with('[') {
        true => serde_json::from_str(text).unwrap_or_default(),
        false if text.contains(['|', '&', ';', '(', '`', '\n']) => return false,
        false => text.split_whitespace().map(str::to_owned).collect(),
    };
    words
        .first()
        .is_some_and(|word| STARTERS.contains(&word.as_str()))
}

fn check_is_plain(text: &str) -> bool {
    let words = text.split_whitespace().collect::<Vec<_>>();
    match words.iter().position(|word| !word.starts_with("--")) {
        Some(at) if words[at].eq_ignore_ascii_case("none") => true,
        Some(at) if words[at].eq_ignore_ascii_case("cmd") => {
            starts_plainly(&words[at + 1..].join(" "))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slim_names() {
        for (name, want) in [
            ("node:20-slim", true),
            ("docker.io/library/python:3.13-slim-trixie", true),
            ("node:20", false),
            ("slim", false),
            ("host:5000/slim/node", false),
            ("node:20-slimmer", false),
        ] {
            assert_eq!(is_slim(name), want, "{name}");
        }
    }

    #[test]
    fn plain_starts() {
        for (text, want) in [
            (r#"["node", "dist/server.js"]"#, true),
            ("node server.js --port $PORT", true),
            (r#"["npm", "start"]"#, false),
            (r#"["/entrypoint.sh"]"#, false),
            ("node migrate.js && node server.js", false),
            (r#"["node""#, false),
            ("", false),
        ] {
            assert_eq!(starts_plainly(text), want, "{text}");
        }
        assert!(check_is_plain("--interval=5s CMD node check.js"));
        assert!(check_is_plain("NONE"));
        assert!(!check_is_plain("CMD curl -f http://localhost/ || exit 1"));
    }
}
