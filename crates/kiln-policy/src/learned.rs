//! What was learned, written into a policy file: the destinations of a phase are added and everything else of the text stays as its
//! author wrote it, comments included. A text that cannot be changed so, and understood again as exactly that change, is left alone.

use kiln_core::AllowRule;

use crate::compiled::{Compiled, Format, compile};
use crate::policy::{Phase, PhaseNetwork};
use crate::yaml::{self, Node};

/// Why a file is not changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CannotWrite {
    /// The file that is there is not a policy.
    #[error("the file is not a policy that can be read")]
    Unreadable,
    /// The file says it in a way that is not changed by a program.
    #[error(
        "the phase {phase} is written in a way that is not changed here: add to its `allow` yourself: {lines}"
    )]
    Place {
        /// Which phase.
        phase: Phase,
        /// What to add.
        lines: String,
    },
    /// What it would come to would mean something else.
    #[error("the changed file would mean more than what was learned: add it yourself: {lines}")]
    Meaning {
        /// What to add.
        lines: String,
    },
}

/// The text of a policy file, with these destinations of one phase added; without a text a new file. A phase that was open, learning or
/// isolated names them alone from then on.
///
/// # Errors
/// [`CannotWrite`]; nothing is lost then.
pub fn with_learned(
    text: Option<&str>,
    phase: Phase,
    rules: &[AllowRule],
) -> Result<String, CannotWrite> {
    let lines = || {
        rules
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let Some(text) = text else {
        let head =
            "# Written from what a command reached: read it before you rely on it.\nversion: 1\n";
        let text = format!("{head}{}", block("", rules));
        return checked(&text, None, phase, rules)
            .ok_or_else(|| CannotWrite::Meaning { lines: lines() });
    };
    let before = compile(Format::Kiln, "kiln.yaml", text).map_err(|_| CannotWrite::Unreadable)?;
    let old = before.policy().network(phase).rules().to_vec();
    let new: Vec<AllowRule> = rules
        .iter()
        .flat_map(AllowRule::spelled_out)
        .filter(|rule| !old.iter().any(|old| old.covers(rule)))
        .collect();
    if new.is_empty() && matches!(before.policy().network(phase), PhaseNetwork::Egress(_)) {
        return Ok(text.to_owned());
    }
    let root = yaml::parse(text).map_err(|_| CannotWrite::Unreadable)?;
    let changed = insert(text, &root, phase, &new).ok_or_else(|| CannotWrite::Place {
        phase,
        lines: lines(),
    })?;
    checked(&changed, Some(&before), phase, &new)
        .ok_or_else(|| CannotWrite::Meaning { lines: lines() })
}

/// The text, when it means what it should and nothing else changed.
fn checked(
    text: &str,
    before: Option<&Compiled>,
    phase: Phase,
    new: &[AllowRule],
) -> Option<String> {
    let after = compile(Format::Kiln, "kiln.yaml", text).ok()?;
    let mut want = before
        .map(|before| before.policy().clone())
        .unwrap_or_default();
    let mut rules = want.network(phase).rules().to_vec();
    rules.extend(new.iter().flat_map(AllowRule::spelled_out));
    rules.sort();
    rules.dedup();
    let network = match rules.is_empty() && want.git(phase).is_empty() {
        true => PhaseNetwork::Isolated,
        false => PhaseNetwork::Egress(rules),
    };
    want.phases.entry(phase).or_default().network = network;
    let sorted = |network: &PhaseNetwork| {
        let mut rules = network.rules().to_vec();
        rules.sort();
        (network.mode(), rules)
    };
    let (got, expected) = (
        after.policy().network(phase).clone(),
        want.network(phase).clone(),
    );
    let mut rest = after.policy().clone();
    for policy in [&mut rest, &mut want] {
        policy.phases.entry(phase).or_default().network = PhaseNetwork::Isolated;
    }
    (sorted(&got) == sorted(&expected) && rest == want).then(|| text.to_owned())
}

/// A whole `network` section.
fn block(indent: &str, rules: &[AllowRule]) -> String {
    match rules.is_empty() {
        true => format!("{indent}network:\n{indent}  mode: isolated\n"),
        false => format!(
            "{indent}network:\n{indent}  mode: egress\n{indent}  allow:\n{}",
            items(&format!("{indent}    "), rules)
        ),
    }
}

fn items(indent: &str, rules: &[AllowRule]) -> String {
    let items = rules.iter().map(|rule| format!("{indent}- \"{rule}\"\n"));
    items.collect()
}

fn insert(text: &str, root: &Node, phase: Phase, rules: &[AllowRule]) -> Option<String> {
    let mut lines: Vec<String> = text.split_inclusive('\n').map(str::to_owned).collect();
    if let Some(last) = lines.last_mut()
        && !last.ends_with('\n')
    {
        last.push('\n');
    }
    let holder = match root.get("phases") {
        Some(phases) => phases.get(phase.name())?,
        None if phase == Phase::Run => root,
        None => return None,
    };
    let Some(network) = holder.get("network") else {
        let (first, _) = holder.entries().first()?;
        let indent = indent_of(lines.get(index(first.place.line))?, first.place.column)?;
        let section = block(&indent, rules);
        match root.get("phases") {
            Some(_) => lines.insert(index(first.place.line), section),
            None => lines.push(format!("\n{section}")),
        }
        return Some(lines.concat());
    };
    let (first, _) = network.entries().first()?;
    let indent = indent_of(lines.get(index(first.place.line))?, first.place.column)?;
    let allow = network
        .entries()
        .iter()
        .find(|(key, _)| key.name == "allow");
    match allow {
        None => {
            let more = format!("{indent}allow:\n{}", items(&format!("{indent}  "), rules));
            let at = index(first.place.line);
            let add = if rules.is_empty() {
                String::new()
            } else {
                more
            };
            lines.insert(at, add);
        }
        Some((_, list)) => {
            let last = list.items().last()?;
            let line = lines.get(index(last.place.line))?;
            // A list with one destination on each line.
            let front: String = line.chars().take(index(last.place.column)).collect();
            let dash = front.trim_end().strip_suffix('-')?;
            if !dash.trim().is_empty() {
                return None;
            }
            let more = items(dash, rules);
            lines.insert(index(last.place.line) + 1, more);
        }
    }
    let mode = network.entries().iter().find(|(key, _)| key.name == "mode");
    if let Some((key, mode)) = mode
        && mode.text() != Some("egress")
    {
        let at = lines.iter().position(|line| {
            let line = line.trim_start();
            line.starts_with("mode:") && line.contains(mode.text().unwrap_or_default())
        })?;
        let line = lines.get(at)?;
        // The one of this section: its key stands where the reader saw it, but for what was put in before.
        (line.len() - line.trim_start().len() == index(key.place.column)).then_some(())?;
        let word = if rules.is_empty() {
            "isolated"
        } else {
            "egress"
        };
        let changed = line.replacen(mode.text()?, word, 1);
        lines[at] = changed;
    }
    Some(lines.concat())
}

fn index(from_one: u32) -> usize {
    usize::try_from(from_one).unwrap_or(1).saturating_sub(1)
}

/// What stands before a column, when that is nothing but spaces.
fn indent_of(line: &str, column: u32) -> Option<String> {
    let front: String = line.chars().take(index(column)).collect();
    front.chars().all(|c| c == ' ').then_some(front)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(rules: &[&str]) -> Vec<AllowRule> {
        rules
            .iter()
            .map(|rule| rule.parse().expect("rule"))
            .collect()
    }

    fn learn(text: &str, learned: &[&str]) -> String {
        with_learned(Some(text), Phase::Run, &rules(learned)).expect(text)
    }

    #[test]
    fn a_new_file_names_what_was_learned() {
        let text = with_learned(
            None,
            Phase::Run,
            &rules(&["a.example.org:443/tls", "db.example.org:5432/raw"]),
        );
        assert_eq!(
            text.expect("written"),
            "# Written from what a command reached: read it before you rely on it.\nversion: 1\nnetwork:\n  mode: egress\n  allow:\n    \
             - \"a.example.org:443/tls\"\n    - \"db.example.org:5432/raw\"\n"
        );
        let nothing = with_learned(None, Phase::Run, &[]).expect("written");
        assert!(
            nothing.ends_with("network:\n  mode: isolated\n"),
            "{nothing}"
        );
    }

    #[test]
    fn a_list_grows_and_everything_else_stays() {
        let text = "version: 1 # one\n# why\nnetwork:\n  allow:\n    - a.example.org # kept\n    - 'b.example.org:443'\n\nlimits: {connections: 9}\n";
        let got = learn(text, &["a.example.org:443/tls", "c.example.org:443/tls"]);
        assert_eq!(
            got,
            text.replace(
                "'b.example.org:443'\n",
                "'b.example.org:443'\n    - \"c.example.org:443/tls\"\n"
            )
        );
        assert_eq!(learn(&got, &["c.example.org:443/tls"]), got, "nothing new");
    }

    #[test]
    fn modes_give_way_to_a_list() {
        for mode in ["learn", "isolated", "open"] {
            let text = format!("version: 1\nnetwork:\n  mode: {mode} # see\n  # more\n");
            let got = learn(&text, &["a.example.org:443/tls"]);
            assert!(got.contains("mode: egress # see"), "{got}");
            assert!(
                got.contains("\n  allow:\n    - \"a.example.org:443/tls\"\n"),
                "{got}"
            );
        }
        let got = learn("version: 1\nimage: node", &["a.example.org:443/tls"]);
        assert!(
            got.starts_with("version: 1\nimage: node\n\nnetwork:\n"),
            "{got}"
        );
    }

    #[test]
    fn a_phase_of_its_own_gets_its_own() {
        let text = "version: 1\nphases:\n  dependencies:\n    network:\n      allow:\n        - x.example.org\n  run:\n    commands:\n      - make test\n";
        let one = rules(&["a.example.org:443/tls"]);
        let got = with_learned(Some(text), Phase::Run, &one).expect("run");
        assert!(got.contains("  run:\n    network:\n      mode: egress\n      allow:\n        - \"a.example.org:443/tls\"\n    commands:"), "{got}");
        let got = with_learned(Some(text), Phase::Dependencies, &one).expect("dependencies");
        assert!(
            got.contains("- x.example.org\n        - \"a.example.org:443/tls\"\n  run:"),
            "{got}"
        );
    }

    #[test]
    fn what_a_program_should_not_touch_is_told() {
        let one = rules(&["a.example.org:443/tls"]);
        for text in [
            "version: 1\nnetwork: {allow: [b.example.org]}\n",
            "version: 1\nphases:\n  dependencies: {commands: [x]}\n",
        ] {
            let error = with_learned(Some(text), Phase::Run, &one).expect_err(text);
            assert!(
                error.to_string().contains("a.example.org:443/tls"),
                "{error}"
            );
        }
        let error = with_learned(Some("version: 7"), Phase::Run, &one).expect_err("none");
        assert_eq!(error, CannotWrite::Unreadable);
    }
}
