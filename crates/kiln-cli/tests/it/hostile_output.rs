//! What a guest prints cannot drive the terminal of whoever looks on, unless it was given that terminal.

use std::process::{Command, Stdio};

use crate::support::{Said, kiln, path, said};

/// A title, a clear screen, a question that the terminal would answer as if it were typed, and a line that hides itself.
const EVIL: &str =
    r"printf 'a\033]0;evil\007b\033[2J\033[6nc\rd\302\2330m\n'; printf 'e\033[2Jf\n' >&2";

/// Runs kiln on a terminal of its own (script(1)).
pub(crate) fn on_a_terminal(home: &std::path::Path, program: &std::path::Path, args: &str) -> Said {
    let mut command = Command::new("script");
    let line = format!("{} {args}", path(program));
    command
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("KILN_HOME", home)
        .env("NO_COLOR", "1")
        .env("EVIL", EVIL)
        .stdin(Stdio::null());
    said(command)
}

#[test]
fn escapes_are_shown_as_text_and_kept_as_they_were() {
    let Some(kiln) = kiln() else { return };
    let args = r#"run --no-source -- bash -c "$EVIL""#;
    let shown = on_a_terminal(&kiln.home, &kiln.program, args).exits(0).out;
    for text in [
        "a\u{fffd}]0;evil\u{fffd}b\u{fffd}[2J\u{fffd}[6nc\u{fffd}d\u{fffd}0m",
        "e\u{fffd}[2Jf",
    ] {
        assert!(shown.contains(text), "{shown:?}");
    }
    for evil in ["\x1b]0;", "\x1b[2J", "\x1b[6n", "\u{9b}"] {
        assert!(!shown.contains(evil), "{shown:?}");
    }
    // Whoever reads a pipe gets the bytes, and whoever gives a terminal away has given it away.
    let piped = kiln
        .run(&["run", "--no-source", "--", "bash", "-c", EVIL])
        .exits(0);
    assert!(piped.out.contains("\x1b]0;evil\x07b\x1b[2J"), "{piped:?}");
    let logs = kiln.run(&["job", "logs"]).exits(0).out;
    assert!(logs.contains("\x1b]0;evil\x07b\x1b[2J"), "{logs:?}");
    let given = r#"run --no-source -t -- bash -c "$EVIL""#;
    let given = on_a_terminal(&kiln.home, &kiln.program, given).exits(0).out;
    assert!(given.contains("\x1b]0;evil\x07"), "{given:?}");
}
