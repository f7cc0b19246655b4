//! The file that `kiln init` writes: legal as it stands, and a place to learn the keys.

use std::fmt::Write as _;

/// What is known of a folder.
#[derive(Clone, Debug, Default)]
pub struct StarterFacts {
    /// The base of its runtime: a name that `image` takes.
    pub runtime: Option<String>,
    /// What was seen, for the reader.
    pub evidence: Option<String>,
    /// Destinations that its package manager uses.
    pub hosts: Vec<String>,
}

/// A commented policy for a folder.
#[must_use]
pub fn starter(facts: &StarterFacts) -> String {
    let mut text = String::from(
        "# What a command of this project may use and reach: `kiln run` holds it to this file.\n\
         # `kiln policy check` reads it, `kiln policy explain HOST` says what a line means.\n\
         version: 1\n\n",
    );
    match (&facts.runtime, &facts.evidence) {
        (Some(runtime), evidence) => {
            let seen = evidence.as_deref().map(|seen| format!(" ({seen})")).unwrap_or_default();
            let _ = write!(
                text,
                "# What it runs in: the base of a runtime, or an image by digest (name@sha256:...).\nimage: {runtime}{}\n\n",
                if seen.is_empty() { String::new() } else { format!("  #{seen}") }
            );
        }
        (None, _) => text.push_str(
            "# What it runs in: the base of a runtime, or an image by digest.\n# Without it: the base that fits the runtime of the folder, else the machine image itself.\n# image: node\n\n",
        ),
    }
    text.push_str("resources:\n  cpus: 1\n  memory: 512M\n  timeout: 10m\n\n");
    text.push_str(
        "# What it may reach: host[:port[/tls|http|raw]]. Without a port 443 and 80; `*.host` is every name below host.\n",
    );
    text.push_str(
        "network:\n  mode: isolated\n  # Or, in place of that line, what it reaches:\n  # allow:\n",
    );
    match facts.hosts.is_empty() {
        true => text.push_str("  #   - api.example.org:443\n\n"),
        false => {
            for host in &facts.hosts {
                let _ = writeln!(text, "  #   - \"{host}\"");
            }
            text.push('\n');
        }
    }
    text.push_str("# limits:\n#   upload: 10Mbit\n#   download: 50Mbit\n#   connections: 64\n#   output: 10M\n\n");
    text.push_str("# Files that are kept.\n# artifacts:\n#   - report.xml\n");
    text
}
