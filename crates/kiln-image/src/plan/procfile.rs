//! `Procfile`: the line `web: command` names the start command of any runtime.

use super::PlanError;
use super::folder::Folder;
use super::types::{Command, Evidence};

const FILE: &str = "Procfile";

/// The `web:` command, if there is a Procfile.
pub(super) fn web(folder: &Folder) -> Result<Option<Command>, PlanError> {
    let Some(text) = folder.read(FILE)? else {
        return Ok(None);
    };
    let mut others = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let number = Some(index as u32 + 1);
        let broken = |what: &str| PlanError::Broken {
            file: FILE.to_owned(),
            line: number,
            what: what.to_owned(),
        };
        let (name, command) = line
            .split_once(':')
            .ok_or_else(|| broken("a line is written `name: command`"))?;
        let command = command.trim();
        if name.trim() != "web" {
            others.push(name.trim().to_owned());
            continue;
        }
        if command.is_empty() {
            return Err(broken("web: needs a command"));
        }
        return Ok(Some(Command {
            line: command.to_owned(),
            why: Evidence::at("Procfile web:", FILE, number),
        }));
    }
    if others.is_empty() {
        return Ok(None);
    }
    Err(PlanError::Broken {
        file: FILE.to_owned(),
        line: None,
        what: format!("no `web:` line (there is {})", others.join(", ")),
    })
}
