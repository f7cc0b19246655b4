//! What a run gets: the folder's policy, the operator's grant and the command line, each of which only takes away.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::job::{AppliedPolicy, RunPhase, RunService};
use kiln_core::network::AllowRule;
use kiln_core::{
    ArtifactPath, ByteSize, DiskRole, FailureClass, ImageRef, NetworkPolicy, RunSecret,
};
use kiln_image::bases::{BaseKind, Bases};
use kiln_policy::policy::{PhasePolicy, Resources, SecretPlace};
use kiln_policy::{Compiled, Effective, Grants, Image, Maxima, Phase, PhaseNetwork, Policy};

use super::learn;
use super::operator::Operator;
use super::policy::tell;
use super::run_phases;
use crate::args::{LimitArgs, NetArg, RunArgs};
use crate::error::{CliError, Result};
use crate::policy_file::{self, Found};
use crate::show::Screen;

/// Where a machine has the files of secrets.
const SECRETS: &str = "/run/secrets";

/// What the request is made of.
#[derive(Debug)]
pub(super) struct Ruled {
    /// Top of the project that a policy found here belongs to.
    pub(super) top: Option<PathBuf>,
    pub(super) image: Option<ImageRef>,
    pub(super) argv: Vec<String>,
    pub(super) network: NetworkPolicy,
    /// As if the command line had said it.
    pub(super) limits: LimitArgs,
    /// The operator's maxima, for what a default decides.
    pub(super) max: Maxima,
    pub(super) artifacts: Vec<ArtifactPath>,
    /// What comes before the command.
    pub(super) phases: Vec<RunPhase>,
    pub(super) services: Vec<RunService>,
    /// Secrets of the command itself.
    pub(super) secrets: Vec<RunSecret>,
    /// Size of its disk, where the policy says one.
    pub(super) disk: Option<ByteSize>,
    pub(super) applied: Option<AppliedPolicy>,
}

/// The policy that a run is held to, if there is one.
///
/// # Errors
/// When it cannot be used.
pub(super) fn found(args: &RunArgs) -> Result<Option<Found>> {
    match (&args.policy, args.no_policy) {
        (Some(file), _) => policy_file::read(file).map(Some),
        (None, true) => Ok(None),
        (None, false) => policy_file::of_here(),
    }
}

/// What holds of a run on this host.
///
/// # Errors
/// Policy when something asked for is not granted, or cannot be enforced yet; usage when the command line asks for more than the policy.
pub(super) fn rule(args: &RunArgs, operator: &Operator, screen: Screen) -> Result<Ruled> {
    let grants = policy_file::grants(&operator.home.config)?;
    let Some(found) = found(args)? else {
        return by_flags(args, &grants);
    };
    let learns = args.net == Some(NetArg::Learn);
    let opened = match learns {
        true => Some(learning(found.compiled.policy())),
        false => None,
    };
    let holds = policy_file::holds(opened.as_ref().unwrap_or(&found.compiled), &grants)?;
    if learns {
        learn::without_secrets(&holds.policy, args.secrets.len())?;
    }
    tell(&found, &holds, screen);
    let file = found.compiled.file();
    enforceable(&holds.policy, file, learns)?;
    let network = holds.policy.network(Phase::Run).effect();
    let asked = asked_network(args, Some(&network))?;
    let network = narrowed(network, asked.as_ref(), file)?;
    let secrets = run_phases::secrets(&holds.policy, &args.secrets, file)?;
    let phases = run_phases::phases(&holds.policy, asked.as_ref(), &secrets);
    let resources = holds.policy.resources;
    let limits = LimitArgs {
        cpus: at_most("--cpus", args.limits.cpus, resources.cpus, file)?,
        memory: at_most("--memory", args.limits.memory, resources.memory, file)?,
        timeout: timeout(args.limits.timeout, resources.timeout_ms, file)?,
    };
    screen.note(&format!("policy: {file}, {}", summary(&holds, &network)));
    Ok(Ruled {
        top: args.policy.is_none().then(|| found.top()).flatten(),
        image: image(args, holds.policy.image.as_ref(), file, || operator.bases())?,
        argv: argv(holds.policy.phases.get(&Phase::Run), &args.command),
        network,
        limits,
        max: holds.max,
        artifacts: artifacts(&holds.policy.artifacts)?,
        phases,
        services: run_phases::services(&holds.policy),
        secrets: secrets.of(Phase::Run),
        disk: holds.policy.limits.disk,
        applied: Some(AppliedPolicy {
            file: holds.file_hash,
            hash: holds.hash,
            upload_bits: holds.policy.limits.upload_bits,
            download_bits: holds.policy.limits.download_bits,
            connections_max: holds.policy.limits.connections,
            output_bytes_max: holds.policy.limits.output.map(|size| size.0),
            processes_max: holds.policy.limits.processes,
        }),
    })
}

/// Without a file the command line is the policy; the operator's grant bounds it all the same.
fn by_flags(args: &RunArgs, grants: &Grants) -> Result<Ruled> {
    let network = asked_network(args, None)?.unwrap_or_default();
    let as_phase = match &network {
        _ if args.net == Some(NetArg::Learn) => PhaseNetwork::Learn,
        NetworkPolicy::Isolated => PhaseNetwork::Isolated,
        NetworkPolicy::Open => PhaseNetwork::Open,
        NetworkPolicy::Egress { allow } => {
            PhaseNetwork::Egress(allow.iter().flat_map(AllowRule::spelled_out).collect())
        }
    };
    if args.net == Some(NetArg::Learn) {
        learn::without_secrets(&Policy::default(), args.secrets.len())?;
    }
    let run = PhasePolicy {
        network: as_phase,
        ..PhasePolicy::default()
    };
    let policy = Policy {
        phases: [(Phase::Run, run)].into(),
        resources: Resources {
            cpus: args.limits.cpus,
            memory: args.limits.memory,
            timeout_ms: args
                .limits
                .timeout
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        },
        ..Policy::default()
    };
    let holds = policy_file::holds(&Compiled::of_command_line(policy), grants)?;
    if let Some(gone) = holds.removed.first() {
        let message = format!(
            "--allow {}: the operator does not grant it ({})",
            gone.rule, gone.by
        );
        return Err(CliError::new(FailureClass::Policy, message));
    }
    let learns = args.net == Some(NetArg::Learn);
    enforceable(&holds.policy, "the operator's policy.toml", learns)?;
    let limits = holds.policy.limits;
    let bounded = limits != kiln_policy::policy::Limits::default();
    Ok(Ruled {
        top: None,
        image: args.image.clone(),
        argv: args.command.clone(),
        network,
        limits: args.limits.clone(),
        max: holds.max,
        artifacts: Vec::new(),
        phases: Vec::new(),
        services: Vec::new(),
        secrets: args.secrets.clone(),
        disk: limits.disk,
        applied: bounded.then_some(AppliedPolicy {
            file: holds.file_hash,
            hash: holds.hash,
            upload_bits: limits.upload_bits,
            download_bits: limits.download_bits,
            connections_max: limits.connections,
            output_bytes_max: limits.output.map(|size| size.0),
            processes_max: limits.processes,
        }),
    })
}

/// The policy, with every phase that reaches anything, and the command's own, learning.
fn learning(policy: &Policy) -> Compiled {
    let mut policy = policy.clone();
    policy.phases.entry(Phase::Run).or_default().network = PhaseNetwork::Learn;
    for part in policy.phases.values_mut() {
        if part.network != PhaseNetwork::Isolated {
            part.network = PhaseNetwork::Learn;
        }
    }
    Compiled::of_command_line(policy)
}

/// What the command line says of the network; none when it says nothing, or leaves it to the policy's own list.
fn asked_network(args: &RunArgs, policy: Option<&NetworkPolicy>) -> Result<Option<NetworkPolicy>> {
    let contradiction = |what: &str| CliError::usage(what).hint("leave one of them out");
    let named = !args.allow.is_empty();
    match args.net {
        None if !named => Ok(None),
        None => Ok(Some(NetworkPolicy::from_rules(args.allow.iter().cloned()))),
        Some(NetArg::Egress) if named => {
            Ok(Some(NetworkPolicy::from_rules(args.allow.iter().cloned())))
        }
        Some(NetArg::Egress) if matches!(policy, Some(NetworkPolicy::Egress { .. })) => Ok(None),
        Some(NetArg::Egress) => Err(CliError::usage(
            "--net egress reaches what --allow names, and nothing is named",
        )
        .hint("add --allow HOST[:PORT], or write --net isolated")),
        Some(NetArg::Isolated) if named => Err(contradiction(
            "--net isolated reaches nothing: --allow contradicts it",
        )),
        Some(NetArg::Isolated) => Ok(Some(NetworkPolicy::Isolated)),
        Some(NetArg::Open | NetArg::Learn) if named => Err(contradiction(
            "--net open and --net learn reach every name: --allow adds nothing",
        )),
        Some(NetArg::Open | NetArg::Learn) => Ok(Some(NetworkPolicy::Open)),
    }
}

/// The policy's network, or the narrower one of the command line.
fn narrowed(
    policy: NetworkPolicy,
    asked: Option<&NetworkPolicy>,
    file: &str,
) -> Result<NetworkPolicy> {
    let refuse = |what: String| {
        CliError::usage(format!("{what}: {file} does not allow it, and a flag can only narrow a policy"))
            .hint(format!("write it into {file}, or take the flag away; `kiln policy explain HOST` says what holds"))
    };
    match asked {
        None => Ok(policy),
        Some(NetworkPolicy::Isolated) => Ok(NetworkPolicy::Isolated),
        Some(NetworkPolicy::Open) if policy == NetworkPolicy::Open => Ok(policy),
        Some(NetworkPolicy::Open) => Err(refuse("--net open".to_owned())),
        Some(NetworkPolicy::Egress { allow }) => {
            // A flag without a protocol means what the port speaks by default, as it does in a file.
            let rules: Vec<AllowRule> = allow.iter().flat_map(AllowRule::spelled_out).collect();
            match rules.iter().find(|rule| !policy.covers_rule(rule)) {
                Some(rule) => Err(refuse(format!("--allow {rule}"))),
                None => Ok(NetworkPolicy::from_rules(rules)),
            }
        }
    }
}

fn at_most<T: Ord + Copy + std::fmt::Display>(
    flag: &str,
    asked: Option<T>,
    most: Option<T>,
    file: &str,
) -> Result<Option<T>> {
    match (asked, most) {
        (Some(asked), Some(most)) if asked > most => Err(CliError::usage(format!(
            "{flag} {asked}: {file} allows {most}, and a flag can only narrow a policy"
        ))
        .hint(format!("write it into {file}, or take the flag away"))),
        (asked, most) => Ok(asked.or(most)),
    }
}

fn timeout(asked: Option<Duration>, most_ms: Option<u64>, file: &str) -> Result<Option<Duration>> {
    let most = most_ms.map(Duration::from_millis);
    match (asked, most) {
        (Some(asked), Some(most)) if asked > most => Err(CliError::usage(format!(
            "--timeout {}s: {file} allows {}s, and a flag can only narrow a policy",
            asked.as_secs(),
            most.as_secs()
        ))),
        (asked, most) => Ok(asked.or(most)),
    }
}

/// The image of the policy. Another one on the command line is another job, not a narrower one.
fn image(
    args: &RunArgs,
    image: Option<&Image>,
    file: &str,
    bases: impl FnOnce() -> Result<Bases>,
) -> Result<Option<ImageRef>> {
    let of_policy = match image {
        None => return Ok(args.image.clone()),
        Some(Image::Pinned(image)) => image.clone(),
        Some(Image::Runtime(name)) => runtime(name, &bases()?, file)?,
    };
    match &args.image {
        Some(other) if *other != of_policy => Err(CliError::usage(format!(
            "--image {other}: {file} names {of_policy}, and a flag can only narrow a policy"
        ))
        .hint("take the flag away, or name another policy with --policy")),
        _ => Ok(Some(of_policy)),
    }
}

/// The build image of a runtime's base, as this host has it: `node`, `node20`, `python3.13`.
fn runtime(name: &str, bases: &Bases, file: &str) -> Result<ImageRef> {
    let at = name
        .find(|c: char| c.is_ascii_digit())
        .unwrap_or(name.len());
    let (runtime, version) = name.split_at(at);
    let runtime = runtime.trim_end_matches('-');
    let numbers = |version: &str| -> Vec<u64> {
        version
            .split('.')
            .map(|part| part.parse().unwrap_or(0))
            .collect()
    };
    let found = bases
        .of_runtime(runtime)
        .filter(|base| version.is_empty() || base.version == version)
        .max_by_key(|base| numbers(&base.version));
    let image = found
        .map(|base| base.image(BaseKind::Build))
        .ok_or_else(|| {
            CliError::usage(format!(
                "{file} names the runtime {name}, of which this host has no base"
            ))
            .hint("`kiln bases list` shows what there is")
        })?;
    if image.digest.is_none() {
        return Err(
            CliError::usage(format!("the base of {name} is not made yet"))
                .hint("run `kiln setup` once"),
        );
    }
    // A command line's names are those of kiln's own registry.
    Ok(ImageRef {
        registry: None,
        ..image.clone()
    })
}

/// What the policy asks for and this kiln cannot hold a run to. Nothing of it is passed over.
fn enforceable(policy: &Policy, file: &str, learns: bool) -> Result<()> {
    let mut missing = Vec::new();
    for (phase, part) in &policy.phases {
        if part.network == PhaseNetwork::Learn && !learns {
            missing.push(format!(
                "the mode learn of the phase {phase} without `kiln policy learn`"
            ));
        }
    }
    if policy.services.len() > DiskRole::SERVICES.len() {
        missing.push(format!("more than {} services", DiskRole::SERVICES.len()));
    }
    for secret in &policy.secrets {
        if let SecretPlace::File(path) = &secret.place
            && *path != format!("{SECRETS}/{}", secret.name)
        {
            missing.push(format!(
                "the secret {} elsewhere than at {SECRETS}/{0}",
                secret.name
            ));
        }
    }
    let most = kiln_proto::msg::CONNECTIONS_MOST;
    if policy.limits.connections.is_some_and(|count| count > most) {
        missing.push(format!("limits.connections above {most}"));
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(CliError::new(
            FailureClass::Policy,
            format!(
                "{file} asks for what `kiln run` cannot hold a command to yet: {}",
                missing.join(", ")
            ),
        )
        .hint("nothing was started; `kiln policy check` reads the file all the same")),
    }
}

fn artifacts(paths: &[String]) -> Result<Vec<ArtifactPath>> {
    let parsed = paths.iter().map(|path| path.parse());
    parsed
        .collect::<Result<_, kiln_core::artifact::ParseArtifactError>>()
        .map_err(|error| CliError::usage(error.to_string()))
}

/// The command line's command after those of the policy's run phase, in one shell; each must succeed.
fn argv(run: Option<&PhasePolicy>, command: &[String]) -> Vec<String> {
    let commands = run.map(|run| run.commands.as_slice()).unwrap_or_default();
    if commands.is_empty() {
        return command.to_vec();
    }
    let mut script = String::new();
    for command in commands {
        // A process of its own: what it sets does not reach the next one.
        script.push_str(&quoted(&run_phases::words(command)));
        script.push('\n');
    }
    if !command.is_empty() {
        script.push_str("exec \"$@\"\n");
    }
    let mut argv = ["/bin/sh", "-ec", &script, "kiln"]
        .map(str::to_owned)
        .to_vec();
    argv.extend_from_slice(command);
    argv
}

/// Words as a shell reads them back.
fn quoted(words: &[String]) -> String {
    let quoted: Vec<String> = words
        .iter()
        .map(|word| format!("'{}'", word.replace('\'', "'\\''")))
        .collect();
    quoted.join(" ")
}

fn summary(holds: &Effective, network: &NetworkPolicy) -> String {
    let reaches = match network {
        NetworkPolicy::Isolated => "reaches nothing".to_owned(),
        NetworkPolicy::Open => "reaches every name".to_owned(),
        NetworkPolicy::Egress { allow } if allow.len() == 1 => "reaches 1 destination".to_owned(),
        NetworkPolicy::Egress { allow } => format!("reaches {} destinations", allow.len()),
    };
    format!("{reaches} ({})", holds.hash)
}

/// Never more than the operator's maxima, where a default decided.
pub(super) fn below(limits: &mut kiln_core::job::Limits, max: &Maxima) {
    let least = |now: u64, most: Option<u64>| most.map_or(now, |most| now.min(most));
    limits.cpus = max
        .cpus
        .map_or(limits.cpus, |most| limits.cpus.min(most.max(1)));
    limits.memory = ByteSize(least(limits.memory.0, max.memory.map(|size| size.0)));
    limits.timeout_ms = least(limits.timeout_ms, max.timeout_ms);
}

/// A policy cannot be held to where another host's controller decides: that is said, not passed over.
///
/// # Errors
/// Policy, when there is one.
pub(super) fn refuse_on_server(args: &RunArgs) -> Result<()> {
    let Some(found) = found(args)? else {
        return match args.net {
            Some(NetArg::Open | NetArg::Learn) => Err(CliError::usage(
                "--net open and --net learn do not work through a server",
            )),
            _ => asked_network(args, None).map(|_| ()),
        };
    };
    let path: &Path = &found.path;
    Err(CliError::new(
        FailureClass::Policy,
        format!("{}: a policy cannot be held to through a server yet", path.display()),
    )
    .hint("--no-policy runs the command with what the command line says alone; without a server the policy holds"))
}

#[cfg(test)]
mod tests {
    use kiln_policy::policy::Command;

    use super::*;

    fn rules(rules: &[&str]) -> NetworkPolicy {
        NetworkPolicy::from_rules(rules.iter().map(|rule| rule.parse().expect("rule")))
    }

    #[test]
    fn a_flag_narrows_and_never_widens() {
        let policy = rules(&["*.example.org:443/tls", "db.example.org:5432/raw"]);
        let ask = |rule: &str| narrowed(policy.clone(), Some(&rules(&[rule])), "kiln.yaml");
        assert_eq!(
            ask("a.example.org:443").expect("narrower"),
            rules(&["a.example.org:443/tls"])
        );
        assert_eq!(
            ask("db.example.org:5432").expect("narrower"),
            rules(&["db.example.org:5432/raw"])
        );
        for wider in [
            "example.org:443",
            "a.example.org",
            "a.example.org:443/raw",
            "*.org.example:443",
            "other.org:443",
        ] {
            let error = ask(wider).expect_err(wider);
            assert!(error.message.contains("only narrow"), "{error:?}");
        }
        assert!(narrowed(policy.clone(), Some(&NetworkPolicy::Open), "f").is_err());
        assert_eq!(
            narrowed(policy.clone(), Some(&NetworkPolicy::Isolated), "f").expect("narrower"),
            NetworkPolicy::Isolated
        );
        assert_eq!(narrowed(policy.clone(), None, "f").expect("same"), policy);
        assert!(at_most("--cpus", Some(3), Some(2), "f").is_err());
        assert_eq!(
            at_most("--cpus", Some(1), Some(2), "f").expect("less"),
            Some(1)
        );
        assert_eq!(
            at_most("--cpus", None, Some(2), "f").expect("same"),
            Some(2)
        );
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
        assert_eq!(super::argv(None, &["true".to_owned()]), ["true"]);
    }

    #[test]
    fn what_cannot_be_held_to_is_refused() {
        for text in [
            "version: 1\nlimits: {connections: 60000}\n",
            "version: 1\nnetwork: {mode: learn}\n",
            "version: 1\nsecrets: [{name: a, file: /etc/a, phase: run, hosts: []}]\n",
        ] {
            let compiled =
                kiln_policy::compile(kiln_policy::Format::Kiln, "kiln.yaml", text).expect("legal");
            let error = enforceable(compiled.policy(), "kiln.yaml", false).expect_err(text);
            assert_eq!(error.class, FailureClass::Policy);
        }
        let fine = "version: 1\nnetwork: {allow: [a.example.org]}\nlimits: {upload: 1Mbit, output: 1M, connections: 9, processes: 5, disk: 5G}\nartifacts: [\"**/x.xml\"]\n";
        let compiled =
            kiln_policy::compile(kiln_policy::Format::Kiln, "kiln.yaml", fine).expect("legal");
        assert!(enforceable(compiled.policy(), "kiln.yaml", false).is_ok());
    }

    #[test]
    fn a_runtime_is_the_newest_base_of_its_name_by_digest() {
        let mut bases = Bases::builtin();
        assert!(runtime("node", &bases, "f").is_err(), "not baked");
        for base in &mut bases.bases {
            base.build.digest = Some(kiln_core::Digest::of(base.version.as_bytes()));
        }
        for (name, version) in [
            ("node", "20"),
            ("node20", "20"),
            ("python", "3.13"),
            ("python3.13", "3.13"),
            ("python-3.13", "3.13"),
        ] {
            let image = runtime(name, &bases, "f").expect(name);
            assert_eq!(
                image.digest,
                Some(kiln_core::Digest::of(version.as_bytes())),
                "{name}"
            );
            assert!(
                image.registry.is_none() && image.repository.starts_with("shared/"),
                "{image}"
            );
        }
        for none in ["node99", "cobol", "20"] {
            assert!(runtime(none, &bases, "f").is_err(), "{none}");
        }
    }
}
