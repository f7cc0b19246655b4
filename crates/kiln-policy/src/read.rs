//! From checked nodes to typed values: what is wrong is collected, not returned at the first.

use std::fmt;
use std::str::FromStr;

use kiln_core::network::{AllowRule, ParseRuleError};
use kiln_core::secret::Repository;
use kiln_core::{ArtifactPath, ByteSize, ImageRef};

use crate::diagnostic::{Diagnostic, Place, shown, unseen};
use crate::policy::{Command, Image, PhaseNetwork};
use crate::yaml::{Node, ScalarKind, Value};

/// Longest time a policy may name: thirty days.
const TIMEOUT_MS_MAX: u64 = 30 * 24 * 3_600_000;
/// Highest rate a policy may name, bits per second: 1 Tbit.
const RATE_BITS_MAX: u64 = 1_000_000_000_000;

/// A rule of a file and where it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Sited {
    pub(crate) rule: AllowRule,
    pub(crate) place: Place,
}

/// A repository of a file and where it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SitedRepository {
    pub(crate) repository: Repository,
    pub(crate) place: Place,
}

/// Collects what is wrong.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    pub(crate) wrong: Vec<Diagnostic>,
}

impl Reader {
    pub(crate) fn refuse(&mut self, diagnostic: Diagnostic) {
        self.wrong.push(diagnostic);
    }

    /// A text that another room's type reads.
    pub(crate) fn parsed<T>(&mut self, node: Option<&Node>) -> Option<T>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        let node = node?;
        match node.text()?.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.refuse(Diagnostic::at(node.place, shown_error(&error)));
                None
            }
        }
    }

    pub(crate) fn number<T: TryFrom<u64>>(&mut self, node: Option<&Node>) -> Option<T> {
        match node?.scalar_kind()? {
            ScalarKind::Integer(number) => T::try_from(number).ok(),
            _ => None,
        }
    }

    pub(crate) fn size(&mut self, node: Option<&Node>) -> Option<ByteSize> {
        let place = node?.place;
        let size: ByteSize = self.parsed(node)?;
        if size.0 == 0 {
            self.refuse(
                Diagnostic::at(place, "a size of nothing").hint("leave it out for no bound"),
            );
            return None;
        }
        Some(size)
    }

    /// A size of at least so much.
    pub(crate) fn size_from(&mut self, node: Option<&Node>, least: ByteSize) -> Option<ByteSize> {
        let size = self.size(node)?;
        if size < least {
            let message = format!("{size} is too little: at least {least}");
            let hint = format!("write {}M or more", least.0 >> 20);
            self.refuse(Diagnostic::at(node?.place, message).hint(hint));
            return None;
        }
        Some(size)
    }

    /// Milliseconds, at least so many.
    pub(crate) fn time_ms_from(&mut self, node: Option<&Node>, least: u64) -> Option<u64> {
        let ms = self.time_ms(node)?;
        if ms < least {
            let message = format!("{ms}ms is too short: at least {least}ms");
            self.refuse(
                Diagnostic::at(node?.place, message).hint(format!("write {least}ms or more")),
            );
            return None;
        }
        Some(ms)
    }

    /// Milliseconds of `90s`, `10m`, `2h`, `500ms`.
    pub(crate) fn time_ms(&mut self, node: Option<&Node>) -> Option<u64> {
        let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
        self.with_unit(
            node?,
            &units,
            (TIMEOUT_MS_MAX, "too long: at most 720h"),
            "a time: write for example 90s, 10m or 1h",
        )
    }

    /// Bits per second of `500kbit`, `10Mbit`, `1Gbit`.
    pub(crate) fn rate_bits(&mut self, node: Option<&Node>) -> Option<u64> {
        let units = [
            ("bit", 1),
            ("kbit", 1_000),
            ("Mbit", 1_000_000),
            ("Gbit", 1_000_000_000),
        ];
        self.with_unit(
            node?,
            &units,
            (RATE_BITS_MAX, "too high: at most 1000Gbit"),
            "a rate: write bits per second, for example 500kbit or 10Mbit",
        )
    }

    fn with_unit(
        &mut self,
        node: &Node,
        units: &[(&str, u64)],
        (most, too_much): (u64, &str),
        what: &str,
    ) -> Option<u64> {
        let text = node.text()?;
        let why = match with_unit(text, units) {
            Some(value) if (1..=most).contains(&value) => return Some(value),
            Some(0) => "nothing at all: leave it out, or write more".to_owned(),
            Some(_) => too_much.to_owned(),
            None => format!("not {what}"),
        };
        let message = format!("{:?} is {why}", shown(text));
        self.refuse(Diagnostic::at(node.place, message));
        None
    }

    /// A runtime's name, or an image by digest.
    pub(crate) fn image(&mut self, node: Option<&Node>) -> Option<Image> {
        let text = node?.text()?;
        let runtime = text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-');
        if runtime && text.len() <= 40 && text.starts_with(|c: char| c.is_ascii_lowercase()) {
            return Some(Image::Runtime(text.to_owned()));
        }
        self.pinned(node).map(Image::Pinned)
    }

    /// An image by digest.
    pub(crate) fn pinned(&mut self, node: Option<&Node>) -> Option<ImageRef> {
        let place = node?.place;
        let image: ImageRef = self.parsed(node)?;
        if image.digest.is_none() {
            let message = format!(
                "{:?} can mean another image tomorrow: a policy names images by digest",
                shown(&image.to_string())
            );
            self.refuse(Diagnostic::at(place, message).hint(format!(
                "write {}@sha256:<64 hex digits>",
                shown(&image.to_string())
            )));
            return None;
        }
        Some(image)
    }

    /// Rules of a list of destinations `host[:port[/protocol]]`, each with one port and a protocol.
    pub(crate) fn rules(&mut self, list: &Node) -> Vec<Sited> {
        let mut found = Vec::new();
        for item in list.items() {
            let Some(rule) = self.destination(item) else {
                continue;
            };
            let place = item.place;
            found.extend(rule.spelled_out().map(|rule| Sited { rule, place }));
        }
        self.overlaps(&found);
        found
    }

    fn destination(&mut self, item: &Node) -> Option<AllowRule> {
        let text = item.text()?;
        if text.contains(',') {
            let wrong = Diagnostic::at(
                item.place,
                format!("{:?} names more than one port", shown(text)),
            );
            self.refuse(wrong.hint("write an entry for each port"));
            return None;
        }
        match text.parse::<AllowRule>() {
            Ok(rule) => Some(rule),
            Err(error) => {
                let wrong = Diagnostic::at(item.place, shown_error(&error));
                self.refuse(match error {
                    ParseRuleError::Address(_) => wrong.hint(
                        "name the host; the host of the machine looks its address up and checks it",
                    ),
                    ParseRuleError::Host(ref text) if text.contains('/') => wrong.hint(
                        "a destination is host[:port[/tls|http|raw]]: without a scheme and a path",
                    ),
                    _ => wrong,
                });
                None
            }
        }
    }

    /// Two entries for the same destination: one would be read and the other would decide.
    pub(crate) fn overlaps(&mut self, rules: &[Sited]) {
        for (at, later) in rules.iter().enumerate() {
            let first = rules[..at].iter().find(|earlier| {
                let ports = earlier.rule.ports() == later.rule.ports();
                let hosts =
                    earlier.rule.covers_host(&later.rule) || later.rule.covers_host(&earlier.rule);
                ports && hosts && earlier.place != later.place
            });
            let Some(first) = first else {
                continue;
            };
            let message = format!("{} and {} overlap", first.rule, later.rule);
            let hint = match first.rule.host() == later.rule.host() {
                true => "keep one of them",
                false => "remove the narrower entry, or the wildcard and name each host",
            };
            // One report for an entry is enough, though it may stand for two ports.
            if !self.wrong.iter().any(|one| one.place == Some(later.place)) {
                self.refuse(
                    Diagnostic::at(later.place, message)
                        .also(first.place, "the other one")
                        .hint(hint),
                );
            }
        }
    }

    /// Repositories of a list, each once.
    pub(crate) fn repositories(&mut self, list: Option<&Node>) -> Vec<SitedRepository> {
        let mut found: Vec<SitedRepository> = Vec::new();
        for item in list.map(Node::items).unwrap_or_default() {
            let Some(repository) = self.parsed::<Repository>(Some(item)) else {
                continue;
            };
            let one = SitedRepository {
                repository,
                place: item.place,
            };
            if let Some(first) = found
                .iter()
                .find(|first| first.repository == one.repository)
            {
                let wrong = Diagnostic::at(one.place, format!("{} is here twice", one.repository));
                self.refuse(
                    wrong
                        .also(first.place, "first here")
                        .hint("keep one of them"),
                );
            }
            found.push(one);
        }
        found
    }

    /// A map with `mode`, `allow` and `git`.
    pub(crate) fn network(&mut self, node: &Node) -> (PhaseNetwork, Vec<Sited>) {
        let mode = node.get("mode");
        let allow = node.get("allow");
        let rules = allow.map(|list| self.rules(list)).unwrap_or_default();
        let word = mode.and_then(Node::text);
        let listed = allow.is_some_and(|list| !list.items().is_empty());
        let git = node.get("git").filter(|list| !list.items().is_empty());
        let network = match word {
            Some("egress") | None if listed || git.is_some() => {
                let mut sorted: Vec<AllowRule> =
                    rules.iter().map(|sited| sited.rule.clone()).collect();
                sorted.sort();
                sorted.dedup();
                PhaseNetwork::Egress(sorted)
            }
            Some("egress") => {
                let place = mode.map_or(node.place, |mode| mode.place);
                let wrong = Diagnostic::at(place, "`egress` without destinations reaches nothing");
                self.refuse(wrong.hint("name them in `allow` or `git`, or write isolated"));
                PhaseNetwork::Isolated
            }
            Some(word @ ("isolated" | "open" | "learn")) => {
                if let Some(allow) = allow.filter(|_| listed) {
                    let wrong = Diagnostic::at(
                        allow.place,
                        format!("`allow` means nothing where the mode is {word}"),
                    );
                    self.refuse(wrong.hint("write `mode: egress`, or remove `allow`"));
                }
                if let Some(git) = git {
                    let wrong = Diagnostic::at(
                        git.place,
                        format!("`git` means nothing where the mode is {word}"),
                    );
                    self.refuse(wrong.hint("write `mode: egress`, or remove `git`"));
                }
                match word {
                    "open" => PhaseNetwork::Open,
                    "learn" => PhaseNetwork::Learn,
                    _ => PhaseNetwork::Isolated,
                }
            }
            _ => PhaseNetwork::Isolated,
        };
        (network, rules)
    }

    /// A list of commands.
    pub(crate) fn commands(&mut self, node: Option<&Node>) -> Vec<Command> {
        let items = node.map(Node::items).unwrap_or_default();
        items.iter().filter_map(|item| self.command(item)).collect()
    }

    /// A line for the shell, or a list of words.
    pub(crate) fn command(&mut self, node: &Node) -> Option<Command> {
        match &node.value {
            Value::Scalar { text, .. } if text.contains('\0') || text.trim().is_empty() => {
                self.refuse(Diagnostic::at(node.place, "this is no command"));
                None
            }
            Value::Scalar { text, .. } => Some(Command::Shell(text.trim().to_owned())),
            Value::List(words) => {
                let words: Vec<String> = words
                    .iter()
                    .filter_map(|word| word.text().map(str::to_owned))
                    .collect();
                if words.iter().any(|word| word.contains('\0')) {
                    self.refuse(Diagnostic::at(
                        node.place,
                        "a word of a command cannot hold a zero byte",
                    ));
                    return None;
                }
                Some(Command::Words(words))
            }
            Value::Map(_) => None,
        }
    }

    /// Paths or patterns of files, as artifacts have them, sorted.
    pub(crate) fn paths(&mut self, node: Option<&Node>) -> Vec<String> {
        let mut paths = Vec::new();
        for item in node.map(Node::items).unwrap_or_default() {
            let path: Option<ArtifactPath> = self.parsed(Some(item));
            paths.extend(path.map(String::from));
        }
        paths.sort();
        paths.dedup();
        paths
    }
}

/// A number and its unit, as a number of the smallest unit.
pub(crate) fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(at);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

fn shown_error(error: &impl fmt::Display) -> String {
    error
        .to_string()
        .chars()
        .filter(|c| !unseen(*c))
        .take(300)
        .collect()
}
