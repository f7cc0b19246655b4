//! Phases, services, secrets and command line of a policy, as a request has them.

use std::collections::BTreeMap;

use kiln_core::job::{RunHealth, RunPhase, RunPhaseName, RunService};
use kiln_core::{
    FailureClass, NetworkPolicy, RunSecret, SecretName, SecretPlace as Place, run_script,
};

use crate::policy::{Command, Health, Phase, PhasePolicy, Policy, SecretPlace};
use crate::run::Refusal;
use crate::run_git::Repositories;

/// How long a service may take to be ready that does not say, milliseconds.
const READY_MS: u64 = 60_000;

/// Most of a command that its failure shows, characters.
const LINE_SHOWN_MAX: usize = 200;

/// A command as words.
pub(crate) fn words(command: &Command) -> Vec<String> {
    match command {
        Command::Shell(line) => ["/bin/sh", "-ec", line].map(str::to_owned).to_vec(),
        Command::Words(words) => words.clone(),
    }
}

/// Secrets by the phase that has them.
#[derive(Debug, Default)]
pub(crate) struct Secrets(BTreeMap<Phase, Vec<RunSecret>>);

impl Secrets {
    /// Those of one phase.
    pub(crate) fn of(&self, phase: Phase) -> Vec<RunSecret> {
        self.0.get(&phase).cloned().unwrap_or_default()
    }
}

/// The secrets of a policy, and those of the command line that it says nothing of: they are the command's. A policy comes with a project, and
/// secrets are their owner's: one that the policy asks for is given only to whoever names it, too.
///
/// # Errors
/// Policy, for a secret that the policy asks for and nobody named.
pub(crate) fn secrets(
    policy: &Policy,
    named: &[RunSecret],
    file: &str,
) -> Result<Secrets, Refusal> {
    let mut found: BTreeMap<Phase, Vec<RunSecret>> = BTreeMap::new();
    for secret in &policy.secrets {
        let refuse = |message: String| Refusal::new(FailureClass::Policy, "secrets", message);
        let name: SecretName = secret
            .name
            .parse()
            .map_err(|error| refuse(format!("{file}: the secret {}: {error}", secret.name)))?;
        let is_named = named.iter().any(|one| one.name == name);
        // Of a phase that a build alone has a use for: not asked for, and not dropped without a word.
        if !does_something(policy, secret.phase) {
            if is_named {
                let message = format!(
                    "{file} gives the secret {name} to the phase {}, which has no commands: nothing of a run would get it",
                    secret.phase
                );
                return Err(refuse(message).hint(format!(
                    "leave --secret {name} out, or give the phase commands; `kiln build` uses it as it is"
                )));
            }
            continue;
        }
        if !is_named {
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

/// Whether a run has anything that could use what a phase is given. Its own command always can.
fn does_something(policy: &Policy, phase: Phase) -> bool {
    let commands = policy.phases.get(&phase).map(|part| part.commands.len());
    phase == Phase::Run
        || commands.is_some_and(|count| count > 0)
        || (phase == Phase::Services && !policy.services.is_empty())
}

/// What comes before the command. A flag that narrows the network narrows that of every phase.
pub(crate) fn phases(
    policy: &Policy,
    asked: Option<&NetworkPolicy>,
    secrets: &Secrets,
    git: &Repositories,
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
        if !does_something(policy, phase) {
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
            git: git.of(phase),
        });
    }
    found
}

/// What runs beside the command.
pub(crate) fn services(policy: &Policy) -> Vec<RunService> {
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

/// The request's command after those of the file's run phase, in one shell; each must succeed.
pub(crate) fn argv(run: Option<&PhasePolicy>, command: &[String]) -> Vec<String> {
    let commands = run.map(|run| run.commands.as_slice()).unwrap_or_default();
    let before: Vec<_> = commands
        .iter()
        .map(|one| (words(one), shown(one)))
        .collect();
    run_script::after(&before, command)
}

/// A command as it was written, in one line.
fn shown(command: &Command) -> String {
    let line = match command {
        Command::Shell(line) => line.clone(),
        Command::Words(words) => words.join(" "),
    };
    let line = line.chars().map(|c| if c.is_control() { ' ' } else { c });
    line.take(LINE_SHOWN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Policy {
        let compiled = crate::compile(crate::Format::Kiln, "kiln.yaml", text);
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
    fn a_secret_that_nothing_would_get_is_neither_asked_for_nor_dropped() {
        let policy = policy(
            "version: 1\nphases: {dependencies: {}}\nsecrets: [{name: a, file: /run/secrets/a, phase: dependencies, hosts: []}]\n",
        );
        assert!(secrets(&policy, &[], "kiln.yaml").is_ok());
        let named: Vec<RunSecret> = vec!["a".parse().expect("secret")];
        let refused = secrets(&policy, &named, "kiln.yaml").expect_err("it would go nowhere");
        assert!(refused.message.contains("no commands"), "{refused:?}");
        for (phase, more) in [("checkout", ""), ("services", "")] {
            let text = format!(
                "version: 1\nphases: {{{phase}: {{network: {{mode: isolated}}}}}}\n{more}secrets:\n  - {{name: a, env: A, phase: {phase}, hosts: []}}\n"
            );
            let wrong = crate::compile(crate::Format::Kiln, "kiln.yaml", &text);
            let told = wrong.expect_err("nothing uses it").to_string();
            assert!(
                told.contains("kiln.yaml:4") && told.contains("hint"),
                "{told}"
            );
        }
    }

    #[test]
    fn a_phase_inherits_nothing_and_a_flag_narrows_all_of_them() {
        let policy = policy(PHASES);
        let git = Repositories::default();
        let before = phases(&policy, None, &Secrets::default(), &git);
        assert_eq!(before.len(), 1);
        assert_eq!(before[0].name, RunPhaseName::Dependencies);
        assert_eq!(before[0].commands, [["/bin/sh", "-ec", "npm ci"]]);
        assert_eq!(before[0].network.rules().len(), 1);
        let isolated = Some(&NetworkPolicy::Isolated);
        let isolated = phases(&policy, isolated, &Secrets::default(), &git);
        assert_eq!(isolated[0].network, NetworkPolicy::Isolated);
    }

    #[test]
    fn commands_of_a_policy_come_first_and_words_stay_words() {
        let run = PhasePolicy {
            commands: vec![
                Command::Shell("echo 'one two'; false || true".to_owned()),
                Command::Words(vec![
                    "printf".to_owned(),
                    "%s\n".to_owned(),
                    "it's".to_owned(),
                ]),
            ],
            ..PhasePolicy::default()
        };
        let argv = argv(
            Some(&run),
            &["printf".to_owned(), "<%s>".to_owned(), "a b".to_owned()],
        );
        let said = std::process::Command::new(&argv[0])
            .args(&argv[1..])
            .output()
            .expect("sh");
        assert_eq!(
            String::from_utf8_lossy(&said.stdout),
            "one two\nit's\n<a b>"
        );
        assert!(said.stderr.is_empty(), "{said:?}");
        assert_eq!(super::argv(None, &["true".to_owned()]), ["true"]);
    }

    #[test]
    fn the_command_of_the_run_phase_that_failed_is_named() {
        let run = PhasePolicy {
            commands: vec![
                Command::Shell("true".to_owned()),
                Command::Shell(r#"echo "it's"; exit 7"#.to_owned()),
                Command::Shell("echo never".to_owned()),
            ],
            ..PhasePolicy::default()
        };
        let argv = argv(Some(&run), &["echo".to_owned(), "never".to_owned()]);
        let said = std::process::Command::new(&argv[0])
            .args(&argv[1..])
            .output()
            .expect("sh");
        assert_eq!(said.status.code(), Some(7));
        assert_eq!(String::from_utf8_lossy(&said.stdout), "it's\n");
        assert_eq!(
            String::from_utf8_lossy(&said.stderr),
            "kiln: the phase run failed: `echo \"it's\"; exit 7`\n"
        );
    }
}
