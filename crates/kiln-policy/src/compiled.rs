//! From the text of a file to a compiled policy, and which file of a folder that is.

use std::collections::BTreeMap;

use kiln_core::Digest;
use serde_json::{Value, json};

use crate::diagnostic::{Diagnostic, Diagnostics, Place};
use crate::policy::{Phase, Policy};
use crate::read::{Reader, Sited, SitedRepository};
use crate::yaml::Node;
use crate::{cleanroom_file, kiln_file, kiln_keys, yaml};

/// kiln's own file.
pub const KILN_FILE: &str = "kiln.yaml";
/// The other format's file.
pub const CLEANROOM_FILE: &str = "cleanroom.yaml";
/// Where the other format's file is looked for last.
pub const CLEANROOM_FALLBACK: &str = ".buildkite/cleanroom.yaml";
/// Names that people try and that would else be ignored without a word.
pub const NEAR_MISSES: [&str; 4] = [
    "kiln.yml",
    "cleanroom.yml",
    ".kiln.yaml",
    ".buildkite/cleanroom.yml",
];
/// Those of [`KILN_FILE`].
const OWN_NEAR_MISSES: [&str; 2] = ["kiln.yml", ".kiln.yaml"];

/// Longest name that a job's record keeps of its policy, characters.
const NAME_CHARS_MAX: usize = 200;

/// The language of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// `kiln.yaml`.
    Kiln,
    /// `cleanroom.yaml`, version 1.
    Cleanroom,
}

impl Format {
    /// The format of a file of this name: what is not called cleanroom is kiln's.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        match name.ends_with(CLEANROOM_FILE) {
            true => Self::Cleanroom,
            false => Self::Kiln,
        }
    }
}

/// Which file of a folder is its policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Its path below the folder.
    pub name: &'static str,
    /// Its format.
    pub format: Format,
    /// A file that is there as well and is not read.
    pub unread: Option<&'static str>,
}

/// Why a folder has no policy that can be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChoiceError {
    /// Two policies.
    #[error("both {KILN_FILE} and {other} are here: which one holds cannot be a guess")]
    Both {
        /// The other one.
        other: &'static str,
    },
    /// A file whose name is nearly right.
    #[error("{name} is not read: a policy is called {KILN_FILE}")]
    NearMiss {
        /// Its name.
        name: &'static str,
    },
}

/// Chooses among the files of a folder.
///
/// # Errors
/// When two policies are there, or one with a name that is nearly right.
pub fn choose(exists: impl Fn(&str) -> bool) -> Result<Option<Choice>, ChoiceError> {
    let cleanroom: Vec<&'static str> = [CLEANROOM_FILE, CLEANROOM_FALLBACK]
        .into_iter()
        .filter(|name| exists(name))
        .collect();
    let holds_own = exists(KILN_FILE);
    if let (true, Some(other)) = (holds_own, cleanroom.first()) {
        return Err(ChoiceError::Both { other });
    }
    // Meant as kiln's own: also beside a policy that would hold without it.
    if let Some(name) = OWN_NEAR_MISSES.into_iter().find(|name| exists(name)) {
        return Err(ChoiceError::NearMiss { name });
    }
    let missed = NEAR_MISSES.into_iter().find(|name| exists(name));
    match (holds_own, cleanroom.first(), missed) {
        (true, _, missed) => Ok(Some(Choice {
            name: KILN_FILE,
            format: Format::Kiln,
            unread: missed,
        })),
        (false, Some(name), missed) => Ok(Some(Choice {
            name,
            format: Format::Cleanroom,
            unread: cleanroom.get(1).copied().or(missed),
        })),
        (false, None, Some(name)) => Err(ChoiceError::NearMiss { name }),
        (false, None, None) => Ok(None),
    }
}

/// Where the network of a phase is said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Origin {
    pub(crate) place: Place,
    pub(crate) rules: Vec<Sited>,
    pub(crate) git: Vec<SitedRepository>,
}

/// A policy while it is compiled.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    pub(crate) policy: Policy,
    pub(crate) origins: BTreeMap<Phase, Origin>,
    /// Where what a grant bounds is said, by the name that kiln's own file has for it.
    pub(crate) amounts: BTreeMap<&'static str, Place>,
}

impl Draft {
    /// Keeps where amounts are said: each by its name, with the value that says it.
    pub(crate) fn amounts_at<'a>(
        &mut self,
        said: impl IntoIterator<Item = (&'static str, Option<&'a Node>)>,
    ) {
        let said = said.into_iter();
        self.amounts
            .extend(said.filter_map(|(name, node)| Some((name, node?.place))));
    }
}

/// A compiled policy, and which line says what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Compiled {
    policy: Policy,
    file: String,
    format: Format,
    origins: BTreeMap<Phase, Origin>,
    amounts: BTreeMap<&'static str, Place>,
}

impl Compiled {
    /// A policy that no file says: what a command line asks for.
    #[must_use]
    pub fn of_command_line(policy: Policy) -> Self {
        Self {
            policy,
            file: "the command line".to_owned(),
            format: Format::Kiln,
            origins: BTreeMap::new(),
            amounts: BTreeMap::new(),
        }
    }

    /// The same file, of which only this holds.
    pub(crate) fn with(&self, policy: Policy) -> Self {
        Self {
            policy,
            ..self.clone()
        }
    }

    /// What the file means.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The file's name, as people know it.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The file's name as a job's record keeps it: without the folders above, which are its owner's business.
    #[must_use]
    pub fn name(&self) -> String {
        let kept = match self.file.ends_with(CLEANROOM_FALLBACK) {
            true => CLEANROOM_FALLBACK,
            false => self.file.rsplit('/').next().unwrap_or_default(),
        };
        kept.chars().take(NAME_CHARS_MAX).collect()
    }

    /// Its format.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// SHA-256 of the policy's canonical form.
    #[must_use]
    pub fn hash(&self) -> Digest {
        self.policy.hash()
    }

    /// The line that says an amount (`resources.cpus`); 0 where none does.
    #[must_use]
    pub fn line_of_amount(&self, name: &str) -> u32 {
        self.amounts.get(name).map_or(0, |place| place.line)
    }

    pub(crate) fn origin(&self, phase: Phase) -> Option<&Origin> {
        self.origins.get(&phase)
    }
}

/// Reads and compiles a policy.
///
/// # Errors
/// Everything that is wrong with it, with lines and hints.
pub fn compile(format: Format, file: &str, text: &str) -> Result<Compiled, Diagnostics> {
    let fail = |wrong: Vec<Diagnostic>| Diagnostics::new(file, text, wrong);
    let root = yaml::parse(text).map_err(|one| fail(vec![one]))?;
    let mut reader = Reader::default();
    let shape = match format {
        Format::Kiln => &kiln_keys::FILE,
        Format::Cleanroom => &cleanroom_file::FILE,
    };
    shape.check(&root, "", &mut reader.wrong);
    if !reader.wrong.is_empty() {
        return Err(fail(reader.wrong));
    }
    let draft = match format {
        Format::Kiln => kiln_file::compile(&root, &mut reader),
        Format::Cleanroom => cleanroom_file::compile(&root, &mut reader),
    };
    if !reader.wrong.is_empty() {
        return Err(fail(reader.wrong));
    }
    Ok(Compiled {
        policy: draft.policy,
        file: file.to_owned(),
        format,
        origins: draft.origins,
        amounts: draft.amounts,
    })
}

/// The JSON Schema of a format, for editors: draft 2020-12.
#[must_use]
pub fn json_schema(format: Format) -> Value {
    let (shape, title) = match format {
        Format::Kiln => (&kiln_keys::FILE, "kiln.yaml: the policy of a project"),
        Format::Cleanroom => (
            &cleanroom_file::FILE,
            "cleanroom.yaml, version 1, as kiln reads it",
        ),
    };
    let mut schema =
        json!({ "$schema": "https://json-schema.org/draft/2020-12/schema", "title": title });
    if let (Value::Object(head), Value::Object(body)) = (&mut schema, shape.json_schema()) {
        head.extend(body);
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_counts_is_looked_for_in_a_commit() {
        let mut counts = vec![KILN_FILE, CLEANROOM_FILE, CLEANROOM_FALLBACK];
        counts.extend(NEAR_MISSES);
        assert_eq!(counts, kiln_core::job::POLICY_NAMES);
        assert_eq!(crate::FILE_BYTES_MAX, kiln_core::job::POLICY_BYTES_MAX);
    }

    #[test]
    fn a_name_that_is_nearly_kilns_own_is_an_error_beside_any_policy() {
        let folder = |names: &[&str]| choose(|name| names.contains(&name));
        for holds in [
            &["kiln.yaml"][..],
            &["cleanroom.yaml"],
            &[CLEANROOM_FALLBACK],
            &[],
        ] {
            for name in OWN_NEAR_MISSES {
                let names = [holds, &[name, "cleanroom.yml"]].concat();
                assert_eq!(
                    folder(&names),
                    Err(ChoiceError::NearMiss { name }),
                    "{names:?}"
                );
            }
        }
        // One of the other format is told, where another policy holds.
        let choice = folder(&["kiln.yaml", "cleanroom.yml"]).expect("legal");
        assert_eq!(choice.expect("one").unread, Some("cleanroom.yml"));
        assert!(folder(&["cleanroom.yml"]).is_err());
    }

    #[test]
    fn a_record_keeps_the_name_alone() {
        let named = |file: &str| {
            let compiled = compile(Format::Kiln, file, "version: 1\n");
            compiled.expect("legal").name()
        };
        assert_eq!(named("/home/somebody/shop/kiln.yaml"), "kiln.yaml");
        assert_eq!(named("ci/shop.yaml"), "shop.yaml");
        assert_eq!(named("../.buildkite/cleanroom.yaml"), CLEANROOM_FALLBACK);
    }
}
