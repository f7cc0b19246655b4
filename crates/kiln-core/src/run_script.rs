//! The one shell that runs the commands of a policy's run phase and the request's own after them: how it is put together, and read back for people,
//! who asked for something else.

use std::borrow::Cow;

/// Before the script.
const SHELL: [&str; 2] = ["/bin/sh", "-ec"];
/// What the shell calls itself.
const NAME: &str = "kiln";
/// Between a command and what is told when it fails.
const FAILED: &str = " || { c=$?; printf '%s\\n' ";
/// After that.
const ENDS: &str = " >&2; exit $c; }\n";
/// Around the command in what is told.
const TOLD: (&str, &str) = ("kiln: the phase run failed: `", "`");
/// A quote inside a word, as a shell reads it back.
const QUOTE: &str = "'\\''";
/// The request's own command takes the shell's place.
const OWN: &str = "exec \"$@\"\n";

/// The request's command after others, each as its words and as people know it; each must succeed.
#[must_use]
pub fn after(before: &[(Vec<String>, String)], command: &[String]) -> Vec<String> {
    if before.is_empty() {
        return command.to_vec();
    }
    let mut script = String::new();
    for (words, shown) in before {
        // A process of its own: what it sets does not reach the next one. The job's code is all that its end tells.
        let told = [format!("{}{shown}{}", TOLD.0, TOLD.1)];
        script.push_str(&[&quoted(words), FAILED, &quoted(&told), ENDS].concat());
    }
    if !command.is_empty() {
        script.push_str(OWN);
    }
    let [shell, flag] = SHELL;
    let mut argv = [shell, flag, &script, NAME].map(str::to_owned).to_vec();
    argv.extend_from_slice(command);
    argv
}

/// A command line as people know it: of one that [`after`] made the request's own command, or without one the policy's. For display alone.
#[must_use]
pub fn shown(argv: &[String]) -> Cow<'_, [String]> {
    match parts(argv) {
        None => Cow::Borrowed(argv),
        Some((before, [])) => Cow::Owned(vec![before.join(" && ").replace(QUOTE, "'")]),
        Some((_, command)) => Cow::Borrowed(command),
    }
}

/// What the request itself asked to run; nothing where that was left to its policy.
#[must_use]
pub fn own(argv: &[String]) -> &[String] {
    parts(argv).map_or(argv, |(_, command)| command)
}

/// The commands before, as people know them but still quoted, and the request's own; none when [`after`] did not make it.
fn parts(argv: &[String]) -> Option<(Vec<&str>, &[String])> {
    let [shell, flag, script, name, command @ ..] = argv else {
        return None;
    };
    if [shell, flag] != SHELL || name != NAME {
        return None;
    }
    let mut rest = match command {
        [] => script.as_str(),
        _ => script.strip_suffix(OWN)?,
    };
    let mut before = Vec::new();
    while !rest.is_empty() || before.is_empty() {
        let (shown, more) = line(rest)?;
        before.push(shown);
        rest = more;
    }
    Some((before, command))
}

/// One command of the script, as people know it but still quoted, and what follows.
fn line(mut rest: &str) -> Option<(&str, &str)> {
    let rest = loop {
        let after = word(rest)?;
        match after.strip_prefix(FAILED) {
            Some(after) => break after,
            None => rest = after.strip_prefix(' ')?,
        }
    };
    let after = word(rest)?;
    let told = rest.strip_suffix(after)?;
    let told = told.strip_prefix('\'')?.strip_suffix('\'')?;
    let shown = told.strip_prefix(TOLD.0)?.strip_suffix(TOLD.1)?;
    Some((shown, after.strip_prefix(ENDS)?))
}

/// What follows a word as [`quoted`] writes it.
fn word(rest: &str) -> Option<&str> {
    let mut rest = rest.strip_prefix('\'')?;
    loop {
        let (_, after) = rest.split_once('\'')?;
        match after.strip_prefix(&QUOTE[1..]) {
            Some(more) => rest = more,
            None => return Some(after),
        }
    }
}

/// Words as a shell reads them back.
fn quoted(words: &[String]) -> String {
    let quoted = words
        .iter()
        .map(|word| format!("'{}'", word.replace('\'', QUOTE)));
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn before() -> Vec<(Vec<String>, String)> {
        let line = "echo \"it's\" ||\n { c=$?; }";
        vec![
            (words(&["npm", "ci"]), "npm ci".to_owned()),
            (words(&["/bin/sh", "-ec", line]), line.replace('\n', " ")),
        ]
    }

    #[test]
    fn people_see_what_they_asked_for() {
        let typed = words(&["npm", "test", "--", "it's"]);
        let argv = after(&before(), &typed);
        assert_eq!((&*shown(&argv), own(&argv)), (&typed[..], &typed[..]));
        let argv = after(&before(), &[]);
        assert_eq!(
            shown(&argv).join(" "),
            "npm ci && echo \"it's\" ||  { c=$?; }"
        );
        assert!(own(&argv).is_empty());
        assert_eq!(after(&[], &typed), typed);
    }

    #[test]
    fn what_only_looks_like_it_is_shown_as_it_is() {
        let mut other = after(&before(), &words(&["true"]));
        other[2].push_str("echo more\n");
        let mut nameless = after(&before(), &words(&["true"]));
        nameless[3] = "sh".to_owned();
        for argv in [
            other,
            nameless,
            words(&["/bin/sh", "-ec", "", "kiln"]),
            words(&["/bin/sh", "-ec", "exec \"$@\"\n", "kiln", "true"]),
            words(&["/bin/sh", "-ec", "'a", "kiln"]),
            words(&["sh", "-c", "make"]),
            Vec::new(),
        ] {
            assert_eq!((&*shown(&argv), own(&argv)), (&argv[..], &argv[..]));
        }
    }
}
