//! `kiln policy`: reads a policy and says what it means. Starts nothing.

use kiln_core::TenantName;
use kiln_core::secret::{ParseSecretError, Repository};
use kiln_policy::{
    Effective, Explanation, Format, Phase, PhaseNetwork, Policy, Removed, explain, explain_git,
    json_schema,
};
use kiln_worker::home::Home;
use serde_json::{Value, json};

use crate::args::{PhaseArg, PolicyCommand};
use crate::error::{CliError, Result};
use crate::policy_file::{self, Found};
use crate::show::{Screen, printable};

pub(super) fn run(verb: PolicyCommand, screen: Screen) -> Result<u8> {
    match verb {
        PolicyCommand::Check { at } => {
            let (found, holds) = both(&policy_file::read(&at)?, screen)?;
            let hash = holds.file_hash;
            screen.data(&json!({ "file": found, "hash": hash.to_string(), "ok": true, "removed": holds.removed }), || {
                format!("{} is a policy\n{}\n{hash}", printable(&found), summary(&holds.policy))
            });
        }
        PolicyCommand::Show { at } => {
            let (file, holds) = both(&policy_file::read(&at)?, screen)?;
            let policy = holds.policy.as_file();
            let shown = json!({
                "file": file, "file_hash": holds.file_hash.to_string(), "hash": holds.hash.to_string(),
                "removed": holds.removed, "policy": policy,
            });
            screen.data(&shown, || {
                let text = serde_json::to_string_pretty(&policy).unwrap_or_default();
                format!(
                    "# what holds of {}: {}\n{text}",
                    printable(&file),
                    holds.hash
                )
            });
        }
        PolicyCommand::Explain {
            destination,
            phase,
            from,
        } => return explained(&destination, phase, &from, screen),
        PolicyCommand::Learn(_) => {
            return Err(CliError::usage("learning is another verb's business"));
        }
        PolicyCommand::Schema { cleanroom } => {
            let format = if cleanroom {
                Format::Cleanroom
            } else {
                Format::Kiln
            };
            let schema: Value = json_schema(format);
            screen.text(&serde_json::to_string_pretty(&schema).unwrap_or_default());
        }
    }
    Ok(0)
}

/// The file's name and what holds of it; what the grant takes away is told.
fn both(found: &Found, screen: Screen) -> Result<(String, Effective)> {
    let holds = policy_file::holds(&found.compiled, &grants()?)?;
    tell(found, &holds, screen);
    Ok((found.compiled.file().to_owned(), holds))
}

fn grants() -> Result<kiln_policy::Grants> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    policy_file::grants(&home.config)
}

/// What a person should know of a policy before it is used.
pub(super) fn tell(found: &Found, holds: &Effective, screen: Screen) {
    for note in &found.notes {
        screen.note(note);
    }
    tell_removed(found.compiled.file(), &holds.removed, screen);
}

/// What the operator's grant took away of a file.
pub(super) fn tell_removed(file: &str, removed: &[Removed], screen: Screen) {
    for gone in removed {
        let left = match gone.left.is_empty() {
            true => "nothing is left of it".to_owned(),
            false => format!("left of it: {}", gone.left.join(", ")),
        };
        screen.note(&format!(
            "{}:{}: {} is not granted ({}): {left}",
            file, gone.line, gone.rule, gone.by
        ));
    }
}

/// One line for each phase that has something to say.
fn summary(policy: &Policy) -> String {
    let image = policy
        .image
        .as_ref()
        .map_or("the machine image itself".to_owned(), ToString::to_string);
    let mut lines = vec![format!("runs in {image}")];
    for phase in Phase::ALL {
        let part = policy.phases.get(&phase);
        if part.is_none() && phase != Phase::Run {
            continue;
        }
        let network = match policy.network(phase) {
            PhaseNetwork::Egress(rules) => rules
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", "),
            PhaseNetwork::Isolated => "nothing".to_owned(),
            wide => format!("every name ({})", wide.mode()),
        };
        let git: Vec<&str> = policy.git(phase).iter().map(Repository::as_str).collect();
        let network = match (git.is_empty(), network.is_empty()) {
            (true, _) => network,
            (false, true) => format!("git {}", git.join(", git ")),
            (false, false) => format!("{network}, git {}", git.join(", git ")),
        };
        let commands = part.map_or(0, |part| part.commands.len());
        let commands = match commands {
            0 => String::new(),
            1 => "; 1 command".to_owned(),
            count => format!("; {count} commands"),
        };
        lines.push(format!("{phase} reaches {network}{commands}"));
    }
    lines.join("\n")
}

fn explained(
    destination: &str,
    phase: PhaseArg,
    from: &std::path::Path,
    screen: Screen,
) -> Result<u8> {
    let phase = match phase {
        PhaseArg::Checkout => Phase::Checkout,
        PhaseArg::Dependencies => Phase::Dependencies,
        PhaseArg::Services => Phase::Services,
        PhaseArg::Run => Phase::Run,
    };
    if destination.contains('/') {
        let repository: Repository = destination
            .parse()
            .map_err(|error: ParseSecretError| CliError::usage(error.to_string()))?;
        let found = policy_file::read(from)?;
        let grants = grants()?;
        let tenant = TenantName::local();
        let answer = explain_git(&found.compiled, &grants, &tenant, phase, &repository);
        screen.data(&answer, || git_text(&answer));
        return Ok(if answer.allowed { 0 } else { 4 });
    }
    let (host, port) = match destination.rsplit_once(':') {
        Some((host, port)) => (
            host,
            port.parse::<u16>()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| {
                    CliError::usage(format!("{destination:?} is not HOST[:PORT]"))
                        .hint("for example api.example.org:443")
                })?,
        ),
        None => (destination, 443),
    };
    let found = policy_file::read(from)?;
    let grants = grants()?;
    let answer = explain(
        &found.compiled,
        &grants,
        &TenantName::local(),
        phase,
        (host, port),
    )
    .map_err(CliError::usage)?;
    screen.data(&answer, || text(&answer));
    Ok(if answer.allowed { 0 } else { 4 })
}

fn text(answer: &Explanation) -> String {
    let verdict = if answer.allowed { "allowed" } else { "refused" };
    let speaks = answer
        .protocol
        .map(|protocol| format!(", speaking {}", protocol.name()))
        .unwrap_or_default();
    let head = format!(
        "{}:{} in the phase {}: {verdict}{speaks}",
        answer.host, answer.port, answer.phase
    );
    said(head, answer)
}

/// Of a repository.
fn git_text(answer: &Explanation) -> String {
    let verdict = if answer.allowed { "allowed" } else { "refused" };
    let head = format!(
        "git {} in the phase {}: {verdict}",
        answer.host, answer.phase
    );
    said(head, answer)
}

fn said(head: String, answer: &Explanation) -> String {
    let mut lines = vec![head];
    for say in &answer.said {
        let at = say
            .at
            .as_deref()
            .map(|at| format!(" ({at})"))
            .unwrap_or_default();
        lines.push(printable(&format!("  {}{at}: {}", say.by, say.says)));
    }
    lines.join("\n")
}
