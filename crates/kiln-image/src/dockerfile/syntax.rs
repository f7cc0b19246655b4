//! `# syntax=`: which frontend a Dockerfile asks for.
//!
//! BuildKit finds the line after a shebang, behind `#` or `//`, or as a JSON member (`parser/directives.go`).
//! The worker also sets the frontend option `cmdline`, so that BuildKit forwards to no other frontend whatever it reads.

use super::DockerfileError;
use super::lines::directive;

/// The frontend that BuildKit itself contains.
pub const BUILTIN_FRONTEND: &str = "docker/dockerfile";

/// The build argument that overrides the syntax line.
pub(super) const SYNTAX_ARGUMENT: &str = "BUILDKIT_SYNTAX";

/// Whether a frontend reference means the built-in one: `docker/dockerfile`, any `1…` tag or `latest`, also with
/// a digest behind it. The labs channel is another frontend.
#[must_use]
pub fn is_builtin_frontend(reference: &str) -> bool {
    let name = reference.strip_prefix("docker.io/").unwrap_or(reference);
    let name = match name.split_once('@') {
        Some((name, digest)) if digest.parse::<kiln_core::Digest>().is_ok() => name,
        _ => name,
    };
    match name.strip_prefix(BUILTIN_FRONTEND) {
        Some("" | ":latest" | ":1") => true,
        Some(tag) => tag
            .strip_prefix(":1.")
            .is_some_and(|rest| !rest.contains("labs") && kiln_core::image_ref::is_tag(rest)),
        None => false,
    }
}

/// Checks the syntax line, if there is one.
///
/// # Errors
/// [`DockerfileError::Frontend`] for anything but the built-in frontend.
pub fn check_frontend(text: &str) -> Result<(), DockerfileError> {
    let text = text.trim_start_matches('\u{feff}');
    let mut lines: Vec<&str> = text.lines().collect();
    let shebang = lines.first().is_some_and(|line| line.starts_with("#!"));
    if shebang {
        lines.remove(0);
    }
    for comment in ["#", "//"] {
        for (index, line) in lines.iter().enumerate() {
            let Some((name, value)) = directive(line, comment) else {
                break;
            };
            if name == "syntax" {
                let line = index + 1 + usize::from(shebang);
                return one(value, format!("Dockerfile line {line}"));
            }
        }
    }
    let json = serde_json::from_str::<serde_json::Value>(text).ok();
    match json.as_ref().and_then(|json| json.get("syntax")?.as_str()) {
        Some(value) => one(value, "the Dockerfile".to_owned()),
        None => Ok(()),
    }
}

/// Checks a frontend reference; arguments after it are not part of the name.
pub(super) fn one(value: &str, place: String) -> Result<(), DockerfileError> {
    let reference = value.split_whitespace().next().unwrap_or_default();
    if is_builtin_frontend(reference) {
        return Ok(());
    }
    Err(DockerfileError::Frontend {
        place,
        frontend: reference.chars().take(200).collect(),
    })
}
