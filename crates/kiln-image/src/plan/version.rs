//! Which base fits what the folder asks for.

use super::PlanError;
use super::ranges::{Ranges, Version};
use super::types::{Evidence, RuntimeKind, VersionChoice};
use crate::bases::{Base, Bases};

/// A range and who asks for it.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) text: String,
    pub(super) ranges: Ranges,
    pub(super) why: Evidence,
}

/// The newest base that fits. What is known of its exact version counts; a full version in a file
/// (`20.11.1`) asks for its line, because bases follow Debian's patches.
pub(super) fn choose(
    runtime: RuntimeKind,
    wanted: Option<Wanted>,
    bases: &Bases,
    notes: &mut Vec<Evidence>,
) -> Result<(Base, VersionChoice), PlanError> {
    let mut all: Vec<&Base> = bases.of_runtime(runtime.name()).collect();
    all.sort_by_key(|base| std::cmp::Reverse(numbers(&base.version)));
    let found = all
        .iter()
        .find(|base| wanted.as_ref().is_none_or(|w| fits(base, &w.ranges)));
    let Some(base) = found else {
        let (text, place) = match &wanted {
            Some(wanted) => (wanted.text.clone(), wanted.why.place()),
            None => ("any version".to_owned(), "the app".to_owned()),
        };
        return Err(PlanError::Version {
            runtime: runtime.name(),
            wanted: text,
            place,
            available: match all.is_empty() {
                true => vec!["none".to_owned()],
                false => all.iter().map(|base| describe(base)).collect(),
            },
        });
    };
    let exact = base.exact_version().map(str::to_owned);
    if let Some(wanted) = &wanted
        && let Some(version) = wanted.ranges.exact()
        && exact.as_deref().and_then(numbers) != Some(version)
    {
        let what = format!(
            "{} asks for exactly {}; the base follows Debian's patches of {}",
            wanted.why.place(),
            wanted.text,
            base.version
        );
        notes.push(Evidence::kiln(what));
    }
    let why = match &wanted {
        Some(wanted) => wanted.why.clone(),
        None => Evidence::kiln("no file asks for a version: the newest base"),
    };
    let choice = VersionChoice {
        version: base.version.clone(),
        exact,
        wanted: wanted.map(|wanted| wanted.text),
        why,
    };
    Ok(((*base).clone(), choice))
}

fn describe(base: &Base) -> String {
    match base.exact_version() {
        Some(exact) => format!("{} ({exact})", base.version),
        None => base.version.clone(),
    }
}

fn numbers(text: &str) -> Option<Version> {
    let mut parts = text.split('.').map(str::parse::<u64>);
    let mut next = || parts.next().unwrap_or(Ok(0)).ok();
    Some([next()?, next()?, next()?])
}

fn fits(base: &Base, wanted: &Ranges) -> bool {
    let Some(line) = Ranges::beginning_with(&base.version) else {
        return false;
    };
    if let Some(exact) = wanted.exact() {
        return line.contains(exact);
    }
    match base.exact_version().and_then(numbers) {
        Some(exact) => wanted.contains(exact),
        None => wanted.meets(&line),
    }
}
