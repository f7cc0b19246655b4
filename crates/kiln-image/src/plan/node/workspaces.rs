//! Workspace members: their `package.json` files belong to the install step.

use serde_json::Value;

use super::manifest::{FILE, Manifest};
use crate::plan::PlanError;
use crate::plan::folder::Folder;

/// Deepest folder that is looked into for members.
const DEPTH_MAX: usize = 5;
/// Most members that a message shows.
const STARTS_SHOWN_MAX: usize = 4;
/// Most members.
const MEMBERS_MAX: usize = 500;

/// Folders of the members, sorted; empty when there are no workspaces.
pub(super) fn members(folder: &Folder, manifest: &Manifest) -> Result<Vec<String>, PlanError> {
    let mut patterns = manifest.workspaces()?;
    if let Some(text) = folder.read("pnpm-workspace.yaml")? {
        patterns.extend(pnpm_packages(&text));
    }
    let positive = patterns.iter().any(|p| !p.starts_with('!'));
    if !positive {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let mut stack = vec![(String::new(), 0)];
    while let Some((at, depth)) = stack.pop() {
        for name in folder.names(&at)? {
            let skipped = name.text == "node_modules" || name.text.starts_with('.');
            if !name.is_folder || skipped {
                continue;
            }
            let path = match at.as_str() {
                "" => name.text,
                at => format!("{at}/{}", name.text),
            };
            if is_member(&patterns, &path) && folder.has(&format!("{path}/{FILE}")) {
                found.push(path.clone());
            }
            if depth + 1 < DEPTH_MAX {
                stack.push((path, depth + 1));
            }
        }
        if found.len() > MEMBERS_MAX {
            return Err(unsupported(format!(
                "more than {MEMBERS_MAX} workspace members"
            )));
        }
    }
    found.sort();
    let plain = |path: &String| {
        path.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-/@+".contains(&b))
    };
    match found.iter().find(|path| !plain(path)) {
        Some(path) => Err(unsupported(format!(
            "the workspace folder {path:?} has an odd name"
        ))),
        None => Ok(found),
    }
}

/// Whether a folder is a workspace with a member there.
pub(in crate::plan) fn has_member(folder: &Folder, member: &str) -> bool {
    let found = Manifest::read(folder).and_then(|manifest| members(folder, &manifest));
    found.is_ok_and(|found| found.iter().any(|one| one == member.trim_matches('/')))
}

/// What to write into `kiln.toml` when the root of a workspace says no start and members do; `None` when none does.
pub(super) fn start_hint(folder: &Folder, members: &[String]) -> Result<Option<String>, PlanError> {
    let mut starts = Vec::new();
    for member in members {
        let manifest = Manifest::read(&folder.sub(member)?)?;
        if let Some(script) = manifest.script("start") {
            let line = format!("cd {member} && {script}");
            starts.push(format!("start = {}", Value::from(line)));
        }
    }
    if starts.is_empty() {
        return Ok(None);
    }
    let shown = starts[..starts.len().min(STARTS_SHOWN_MAX)].join(", or ");
    Ok(Some(format!(
        "this is a workspace: say in kiln.toml which member starts, below [build]: {shown} (build = \"npm run build --workspaces --if-present\" builds all members)"
    )))
}

fn unsupported(what: String) -> PlanError {
    PlanError::Unsupported {
        file: FILE.to_owned(),
        line: None,
        what,
        hint: "write a Dockerfile".to_owned(),
    }
}

/// The list under `packages:`.
fn pnpm_packages(text: &str) -> Vec<String> {
    let mut lines = text
        .lines()
        .skip_while(|line| !line.starts_with("packages:"));
    let head = lines.next().unwrap_or_default();
    let bare = |item: &str| item.trim().trim_matches(['\'', '"']).to_owned();
    if let Some(inline) = head.split_once('[') {
        let list = inline.1.split(']').next().unwrap_or_default();
        return list
            .split(',')
            .map(bare)
            .filter(|p| !p.is_empty())
            .collect();
    }
    let mut found = Vec::new();
    for line in lines {
        let line = line.split(" #").next().unwrap_or_default();
        let trimmed = line.trim();
        match trimmed.strip_prefix("- ") {
            Some(item) => found.push(bare(item)),
            None if trimmed.is_empty() || trimmed.starts_with('#') => {}
            None => break,
        }
    }
    found
}

fn is_member(patterns: &[String], path: &str) -> bool {
    let mut member = false;
    for pattern in patterns {
        let (takes_back, pattern) = match pattern.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, pattern.as_str()),
        };
        let pattern = pattern.trim_start_matches("./").trim_end_matches('/');
        let pattern: Vec<_> = pattern.split('/').collect();
        let names: Vec<_> = path.split('/').collect();
        if matches(&pattern, &names) {
            member = !takes_back;
        }
    }
    member
}

fn matches(pattern: &[&str], names: &[&str]) -> bool {
    match (pattern.split_first(), names.split_first()) {
        (None, None) => true,
        (Some((&"**", rest)), _) => {
            matches(rest, names) || (!names.is_empty() && matches(pattern, &names[1..]))
        }
        (Some((one, rest)), Some((name, names))) => matches_name(one, name) && matches(rest, names),
        _ => false,
    }
}

/// One name, with `*` for anything.
fn matches_name(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<_> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_choose_members() {
        let patterns = ["packages/*", "apps/**", "!apps/old", "tools/x-*-y"].map(str::to_owned);
        for (path, want) in [
            ("packages/a", true),
            ("packages/a/b", false),
            ("apps/a/b", true),
            ("apps/old", false),
            ("tools/x-1-y", true),
            ("tools/x-1", false),
        ] {
            assert_eq!(is_member(&patterns, path), want, "{path}");
        }
        let yaml = "packages:\n  # all\n  - 'packages/*'\n  - \"apps/**\" # x\n\nonlyBuiltDependencies:\n  - esbuild\n";
        assert_eq!(pnpm_packages(yaml), ["packages/*", "apps/**"]);
        assert_eq!(pnpm_packages("packages: ['a', \"b/*\"]\n"), ["a", "b/*"]);
        assert!(pnpm_packages("allowBuilds:\n  - x\n").is_empty());
    }
}
