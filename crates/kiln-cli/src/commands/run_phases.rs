//! Phases, services and secrets of a policy, as a request has them.

use std::collections::BTreeMap;

use kiln_core::job::{RunHealth, RunPhase, RunPhaseName, RunService};
use kiln_core::{FailureClass, NetworkPolicy, RunSecret, SecretName, SecretPlace as Place};
use kiln_policy::policy::{Command, Health, SecretPlace};
use kiln_policy::{Phase, Policy};

use crate::error::{CliError, Result};

/// How long a service may take to be ready that does not say, milliseconds.
const READY_MS: u64 = 60_000;

/// A command as words.
pub(super) fn words(command: &Command) -> Vec<String> {
    match command {
        Command::Shell(line) => ["/bin/sh", "-ec", line].map(str::to_owned).to_vec(),
        Command::Words(words) => words.clone(),
    }
}

/// Secrets by the phase that has them.
#[derive(Debug, Default)]
pub(super) struct Secrets(BTreeMap<Phase, Vec<RunSecret>>);

impl Secrets {
    /// Those of one phase.
    pub(super) fn of(&self, phase: Phase) -> Vec<RunSecret> {
        self.0.get(&phase).cloned().unwrap_or_default()
    }
}

/// The secrets of a policy, and those of the command line that it says nothing of: they are the command's. A policy comes with a project, and
/// secrets are their owner's: one that the policy asks for is given only to whoever names it, too.
///
/// # Errors
/// Policy, for a secret that the policy asks for and nobody named.
pub(super) fn secrets(policy: &Policy, named: &[RunSecret], file: &str) -> Result<Secrets> {
    let mut found: BTreeMap<Phase, Vec<RunSecret>> = BTreeMap::new();
    for secret in &policy.secrets {
        let refuse = |message: String| CliError::new(FailureClass::Policy, message);
        let name: SecretName = secret
            .name
            .parse()
            .map_err(|error| refuse(format!("{file}: the secret {}: {error}", secret.name)))?;
        if !named.iter().any(|one| one.name == name) {
            let message = format!(
                "{file} asks for the secret {name} in the phase {}",
                secret.phase
            );
            let word = match kiln_core::secret::is_variable(name.as_str()) {
                true => name.to_string(),
                false => format!("{name}:file"),
            };
            return Err(refuse(message).hint(format!(
                "if this project may have it, say so with --secret {word}; it goes where the policy says and to no other phase"
            )));
        }
        let place = match &secret.place {
            SecretPlace::Env(variable) => Place::Env(variable.clone()),
            SecretPlace::File(_) => Place::File,
        };
        found
            .entry(secret.phase)
            .or_default()
            .push(RunSecret { name, place });
    }
    let of_policy = |one: &&RunSecret| {
        policy
            .secrets
            .iter()
            .any(|known| known.name == one.name.as_str())
    };
    let others = named.iter().filter(|one| !of_policy(one)).cloned();
    found.entry(Phase::Run).or_default().extend(others);
    Ok(Secrets(found))
}

/// What comes before the command. A flag that narrows the network narrows that of every phase.
pub(super) fn phases(
    policy: &Policy,
    asked: Option<&NetworkPolicy>,
    secrets: &Secrets,
) -> Vec<RunPhase> {
    let all = [
        (Phase::Checkout, RunPhaseName::Checkout),
        (Phase::Dependencies, RunPhaseName::Dependencies),
        (Phase::Services, RunPhaseName::Services),
    ];
    let mut found = Vec::new();
    for (phase, name) in all {
        let part = policy.phases.get(&phase);
        let commands: Vec<_> = part
            .map(|part| part.commands.iter().map(words).collect())
            .unwrap_or_default();
        let serves = phase == Phase::Services && !policy.services.is_empty();
        if commands.is_empty() && !serves {
            continue;
        }
        let network = policy.network(phase).effect();
        found.push(RunPhase {
            name,
            network: match asked {
                None => network,
                Some(asked) => network.and(asked),
            },
            commands,
            secrets: secrets.of(phase),
        });
    }
    found
}

/// What runs beside the command.
pub(super) fn services(policy: &Policy) -> Vec<RunService> {
    let services = policy.services.iter();
    services
        .map(|(name, service)| RunService {
            name: name.clone(),
            image: service.image.clone(),
            port: service.port,
            env: service.env.clone(),
            health: match &service.health {
                Health::Port => RunHealth::Port,
                Health::Http(path) => RunHealth::Http(path.clone()),
                Health::Command(command) => RunHealth::Command(words(command)),
            },
            ready_ms: service.ready_ms.unwrap_or(READY_MS),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Policy {
        let compiled = kiln_policy::compile(kiln_policy::Format::Kiln, "kiln.yaml", text);
        compiled.expect("legal").policy().clone()
    }

    const PHASES: &str = "\
version: 1
phases:
  dependencies: {network: {allow: [a.example.org:443]}, commands: [npm ci]}
  run: {}
secrets:
  - {name: token, env: TOKEN, phase: dependencies, hosts: [\"a.example.org:443\"]}
";

    #[test]
    fn a_policys_secret_needs_its_owners_word() {
        let policy = policy(PHASES);
        let refused = secrets(&policy, &[], "kiln.yaml").expect_err("nobody named it");
        assert_eq!(refused.class, FailureClass::Policy);
        let named: Vec<RunSecret> = ["token=OTHER", "mine"]
            .map(|word| word.parse().expect(word))
            .to_vec();
        let found = secrets(&policy, &named, "kiln.yaml").expect("named");
        let shown = |phase| {
            found
                .of(phase)
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            shown(Phase::Dependencies),
            ["token=TOKEN"],
            "the policy's place"
        );
        assert_eq!(shown(Phase::Run), ["mine=mine"]);
    }

    #[test]
    fn a_phase_inherits_nothing_and_a_flag_narrows_all_of_them() {
        let policy = policy(PHASES);
        let before = phases(&policy, None, &Secrets::default());
        assert_eq!(before.len(), 1);
        assert_eq!(before[0].name, RunPhaseName::Dependencies);
        assert_eq!(before[0].commands, [["/bin/sh", "-ec", "npm ci"]]);
        assert_eq!(before[0].network.rules().len(), 1);
        let isolated = phases(&policy, Some(&NetworkPolicy::Isolated), &Secrets::default());
        assert_eq!(isolated[0].network, NetworkPolicy::Isolated);
    }
}
