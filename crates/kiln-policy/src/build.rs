//! What a build is held to: of a project's file what means something for one, AND the operator's grant, narrowed by the request.
//!
//! A build installs what a project needs, so it is the file's phase `dependencies`: its network, its secrets; and `resources` and `limits`.
//! Commands, services, artifacts, the image and the other phases are a run's: what is built is the Dockerfile's to say. What a file asks of a
//! build and a build cannot honour is refused by name.

use kiln_core::job::AppliedPolicy;
use kiln_core::network::AllowRule;
use kiln_core::{ByteSize, FailureClass, NetworkPolicy, TenantName};

use crate::compiled::Compiled;
use crate::effective::{Removed, effective};
use crate::grant::{Grants, Maxima};
use crate::honoured::{elsewhere_than_secrets, too_slow_a_disk};
use crate::policy::{Limits, Phase, PhaseNetwork, PhasePolicy, Policy, Resources, SecretPlace};
use crate::run::{
    OPERATORS, Refusal, applied, at_most, narrowed, nothing_removed, of_network, resources,
};

/// What a request says of a build itself: beside a file it only takes away.
#[derive(Clone, Copy, Debug)]
pub struct BuildAsked<'a> {
    /// Destinations.
    pub allow: &'a [AllowRule],
    /// CPUs, memory and time.
    pub resources: Resources,
    /// Disk.
    pub disk: Option<ByteSize>,
    /// Names of secrets.
    pub secrets: &'a [String],
    /// Most connections at once that this kiln can hold a machine to.
    pub connections_most: u32,
}

/// What a build is held to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldBuild {
    /// What it reaches.
    pub network: NetworkPolicy,
    /// It reaches nothing else: not the registries of its runtime either.
    pub only: bool,
    /// What it may use: asked for, else the file's.
    pub resources: Resources,
    /// The operator's maxima, for what a default decides.
    pub max: Maxima,
    /// Disk: asked for, else the file's.
    pub disk: Option<ByteSize>,
    /// What the job's record keeps of it.
    pub applied: Option<AppliedPolicy>,
    /// What the operator's grant took away.
    pub removed: Vec<Removed>,
}

/// What a build is held to under a file, if there is one.
///
/// # Errors
/// Policy when something asked for is not granted, or a build cannot honour it; usage when the request asks for more than the file.
pub fn hold_build(
    compiled: Option<&Compiled>,
    grants: &Grants,
    tenant: &TenantName,
    asked: &BuildAsked<'_>,
) -> Result<HeldBuild, Refusal> {
    match compiled {
        Some(compiled) => by_file(compiled, grants, tenant, asked),
        None => by_request(grants, tenant, asked),
    }
}

/// What an untrusted build may reach of the policy in its own commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Narrowed {
    /// What the file and the grant leave of everything else that it may reach.
    pub within: NetworkPolicy,
    /// What the file names and the request does not.
    pub beyond: Vec<Beyond>,
}

/// A destination that a file names and nobody else.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Beyond {
    /// Which.
    pub rule: AllowRule,
    /// Line of the file.
    pub line: u32,
}

/// What an untrusted build is held to by the policy in its own commit, whose author may be anybody: the file takes away of what the request
/// names and of the registries of the runtime, and gives nothing. Without a part for builds it takes nothing away.
///
/// # Errors
/// As [`hold_build`].
pub fn hold_untrusted_build(
    compiled: &Compiled,
    grants: &Grants,
    tenant: &TenantName,
    asked: &BuildAsked<'_>,
) -> Result<(HeldBuild, Option<Narrowed>), Refusal> {
    let held = hold_build(Some(compiled), grants, tenant, asked)?;
    if !held.only {
        return Ok((held, None));
    }
    let unasked = BuildAsked {
        allow: &[],
        ..*asked
    };
    let file = hold_build(Some(compiled), grants, tenant, &unasked)?.network;
    let network = match asked.allow.is_empty() {
        true => NetworkPolicy::Isolated,
        false => held.network.clone(),
    };
    let sites = compiled.origin(Phase::Dependencies);
    let sites = sites.map(|origin| &origin.rules[..]).unwrap_or_default();
    let beyond = file.rules().iter();
    let beyond = beyond.filter(|rule| !network.covers_rule(rule));
    let beyond = beyond.map(|rule| {
        let site = sites.iter().find(|sited| sited.rule.covers(rule));
        Beyond {
            rule: rule.clone(),
            line: site.map_or(1, |sited| sited.place.line),
        }
    });
    let narrowed = Narrowed {
        beyond: beyond.collect(),
        within: file,
    };
    Ok((HeldBuild { network, ..held }, Some(narrowed)))
}

/// The part of a policy that means something for a build.
fn of_a_build(policy: &Policy) -> Policy {
    let part = policy.phases.get(&Phase::Dependencies);
    let said = part.map(|part| (part.network.clone(), part.git.clone()));
    let part = said.map(|(network, git)| {
        let part = PhasePolicy {
            network,
            git,
            ..PhasePolicy::default()
        };
        (Phase::Dependencies, part)
    });
    let secrets = policy.secrets.iter();
    let secrets = secrets.filter(|secret| secret.phase == Phase::Dependencies);
    Policy {
        resources: policy.resources,
        limits: policy.limits,
        phases: part.into_iter().collect(),
        secrets: secrets.cloned().collect(),
        ..Policy::default()
    }
}

fn by_file(
    compiled: &Compiled,
    grants: &Grants,
    tenant: &TenantName,
    asked: &BuildAsked<'_>,
) -> Result<HeldBuild, Refusal> {
    let file = compiled.file();
    let wanted = of_a_build(compiled.policy());
    honoured(&wanted, file, asked.connections_most)?;
    // Without such a phase the file says nothing of what a build reaches; a secret of one is told to nobody all the same.
    let only = wanted.phases.contains_key(&Phase::Dependencies) || !wanted.secrets.is_empty();
    let holds = effective(&compiled.with(wanted), grants, tenant)?;
    let listed = listed(asked);
    let narrower = (!asked.allow.is_empty()).then_some(&listed);
    let network = match only {
        true => {
            let network = holds.policy.network(Phase::Dependencies).effect();
            narrowed(network, narrower, file)?
        }
        false => by_request(grants, tenant, asked)?.network,
    };
    for secret in &holds.policy.secrets {
        if !asked.secrets.contains(&secret.name) {
            let message = format!("{file} asks for the secret {} in a build", secret.name);
            return Err(
                Refusal::new(FailureClass::Policy, "secrets", message).hint(format!(
                    "if this project may have it, say so with --secret id={}",
                    secret.name
                )),
            );
        }
    }
    let said = compiled.policy().limits.disk;
    let _within = at_most("disk", asked.disk, holds.policy.limits.disk, file)?;
    let applied = AppliedPolicy {
        name: Some(compiled.name()),
        file: compiled.hash(),
        ..applied(&bounds(&holds.policy.limits), &holds, false)
    };
    Ok(HeldBuild {
        network,
        only,
        resources: resources(asked.resources, holds.policy.resources, file)?,
        max: holds.max,
        disk: asked.disk.or(said),
        applied: Some(applied),
        removed: holds.removed,
    })
}

/// What a request names; where it does not say what a port speaks, that is the port's default, as it is in a file.
fn listed(asked: &BuildAsked<'_>) -> NetworkPolicy {
    NetworkPolicy::from_rules(asked.allow.iter().flat_map(AllowRule::spelled_out))
}

/// Of a grant's maxima those that a build is held to.
fn bounds(limits: &Limits) -> Limits {
    Limits {
        output: None,
        processes: None,
        open_files: None,
        ..*limits
    }
}

fn by_request(
    grants: &Grants,
    tenant: &TenantName,
    asked: &BuildAsked<'_>,
) -> Result<HeldBuild, Refusal> {
    let network = listed(asked);
    let part = PhasePolicy {
        network: of_network(&network),
        ..PhasePolicy::default()
    };
    let policy = Policy {
        phases: [(Phase::Dependencies, part)].into(),
        resources: asked.resources,
        ..Policy::default()
    };
    let holds = effective(&Compiled::of_command_line(policy), grants, tenant)?;
    nothing_removed(&holds, "allow")?;
    let _within = at_most("disk", asked.disk, holds.max.disk, OPERATORS)?;
    let limits = bounds(&holds.policy.limits);
    let bounded = limits.upload_bits.is_some()
        || limits.download_bits.is_some()
        || limits.connections.is_some()
        || limits.disk_rate.is_some();
    if let Some(slow) = too_slow_a_disk(&limits) {
        let message = format!("{OPERATORS} grants too little: {slow}");
        return Err(Refusal::new(FailureClass::Policy, "policy", message));
    }
    Ok(HeldBuild {
        network,
        only: false,
        resources: asked.resources,
        max: holds.max,
        disk: asked.disk,
        applied: bounded.then(|| applied(&limits, &holds, false)),
        removed: Vec::new(),
    })
}

/// What the file asks of a build and a build cannot honour. Nothing of it is passed over.
fn honoured(policy: &Policy, file: &str, connections_most: u32) -> Result<(), Refusal> {
    let mut missing = Vec::new();
    if *policy.network(Phase::Dependencies) == PhaseNetwork::Learn {
        missing.push("the mode learn of the phase dependencies".to_owned());
    }
    if !policy.git(Phase::Dependencies).is_empty() {
        missing.push("repositories in git of the phase dependencies".to_owned());
    }
    if policy.limits.processes.is_some() {
        missing.push("limits.processes".to_owned());
    }
    if policy.limits.open_files.is_some() {
        missing.push("limits.open_files".to_owned());
    }
    missing.extend(too_slow_a_disk(&policy.limits));
    if policy.limits.output.is_some() {
        missing.push("limits.output".to_owned());
    }
    let connections = policy.limits.connections;
    if connections.is_some_and(|count| count > connections_most) {
        missing.push(format!("limits.connections above {connections_most}"));
    }
    for secret in &policy.secrets {
        missing.extend(elsewhere_than_secrets(secret));
        if let SecretPlace::Env(_) = &secret.place {
            missing.push(format!(
                "the secret {} as a variable: a RUN step mounts it",
                secret.name
            ));
        }
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(Refusal::new(
            FailureClass::Policy,
            "policy",
            format!(
                "{file} asks for what `kiln build` cannot hold a build to: {}",
                missing.join(", ")
            ),
        )
        .hint("nothing was started; --no-policy builds without the file")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: BuildAsked<'_> = BuildAsked {
        allow: &[],
        resources: Resources {
            cpus: None,
            memory: None,
            timeout_ms: None,
        },
        disk: None,
        secrets: &[],
        connections_most: 2048,
    };

    fn hold(text: &str, grants: &str, asked: &BuildAsked<'_>) -> Result<HeldBuild, Refusal> {
        let compiled = crate::compile(crate::Format::Kiln, "kiln.yaml", text).expect("legal");
        let grants = Grants::parse("policy.toml", grants).expect("legal");
        hold_build(
            Some(&compiled),
            &grants,
            &"acme".parse().expect("tenant"),
            asked,
        )
    }

    const PHASES: &str = "\
version: 1
resources: {cpus: 2, memory: 1G}
limits: {upload: 1Mbit, connections: 8}
phases:
  dependencies: {network: {allow: [a.example.org:443]}, commands: [npm ci]}
  run: {network: {allow: [b.example.org:443]}}
";

    #[test]
    fn a_build_is_the_phase_dependencies_and_nothing_of_the_others() {
        let held = hold(PHASES, "", &NOTHING).expect("held");
        let rules: Vec<String> = held
            .network
            .rules()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(rules, ["a.example.org:443/tls"]);
        assert!(held.only);
        assert_eq!(held.resources.cpus, Some(2));
        let applied = held.applied.expect("applied");
        assert_eq!(
            (applied.upload_bits, applied.connections_max),
            (Some(1_000_000), Some(8))
        );
        let rule: AllowRule = "b.example.org:443".parse().expect("rule");
        let wider = BuildAsked {
            allow: std::slice::from_ref(&rule),
            ..NOTHING
        };
        assert_eq!(hold(PHASES, "", &wider).expect_err("wider").field, "allow");
        let more = BuildAsked {
            resources: Resources {
                cpus: Some(3),
                ..Resources::default()
            },
            ..NOTHING
        };
        assert_eq!(hold(PHASES, "", &more).expect_err("more").field, "cpus");
        let disk = BuildAsked {
            disk: Some(ByteSize::gib(3)),
            ..NOTHING
        };
        let bounded = "[tenant.acme]\nmax = {disk = \"2G\"}\n";
        assert_eq!(
            hold(PHASES, bounded, &disk).expect_err("disk").field,
            "disk"
        );
        let unasked = hold(PHASES, bounded, &NOTHING).expect("held");
        assert_eq!(
            (unasked.disk, unasked.max.disk),
            (None, Some(ByteSize::gib(2)))
        );
        let none = hold(
            PHASES,
            "[tenant.acme]\nhosts = [\"*.example.net\"]\n",
            &NOTHING,
        );
        let none = none.expect("narrowed to nothing");
        assert_eq!(
            (none.network, none.removed.len()),
            (NetworkPolicy::Isolated, 1)
        );
    }

    fn untrusted(
        text: &str,
        grants: &str,
        allow: &[&str],
    ) -> Result<(HeldBuild, Option<Narrowed>), Refusal> {
        let compiled = crate::compile(crate::Format::Kiln, "kiln.yaml", text).expect("legal");
        let grants = Grants::parse("policy.toml", grants).expect("legal");
        let allow: Vec<AllowRule> = allow
            .iter()
            .map(|rule| rule.parse().expect("rule"))
            .collect();
        let asked = BuildAsked {
            allow: &allow,
            ..NOTHING
        };
        hold_untrusted_build(&compiled, &grants, &"acme".parse().expect("tenant"), &asked)
    }

    #[test]
    fn the_file_of_an_untrusted_commit_takes_away_and_gives_nothing() {
        let file = "version: 1\nphases:\n  dependencies:\n    network:\n      allow:\n        - a.example.org:443\n        - b.example.org:443\n";
        let words = |network: &NetworkPolicy| -> Vec<String> {
            network.rules().iter().map(ToString::to_string).collect()
        };
        let (held, narrowed) = untrusted(file, "", &[]).expect("held");
        let narrowed = narrowed.expect("it has a part for builds");
        assert!(
            held.only && held.network == NetworkPolicy::Isolated,
            "{held:?}"
        );
        let both = ["a.example.org:443/tls", "b.example.org:443/tls"];
        assert_eq!(words(&narrowed.within), both);
        let beyond = narrowed.beyond.iter();
        let beyond: Vec<_> = beyond.map(|one| (one.rule.to_string(), one.line)).collect();
        assert_eq!(beyond, [(both[0].to_owned(), 6), (both[1].to_owned(), 7)]);
        // What its submitter names, where the file does not take it away.
        let (held, narrowed) = untrusted(file, "", &["b.example.org:443"]).expect("held");
        assert_eq!(words(&held.network), both[1..]);
        let beyond = narrowed.expect("narrowed").beyond;
        assert_eq!(beyond.len(), 1, "{beyond:?}");
        let refused = untrusted(file, "", &["c.example.org:443"]).expect_err("taken away");
        assert_eq!(refused.field, "allow");
        // The operator's grant bounds both.
        let grant = "[tenant.acme]\nhosts = [\"a.example.org\"]\n";
        let (_, narrowed) = untrusted(file, grant, &[]).expect("held");
        assert_eq!(words(&narrowed.expect("narrowed").within), both[..1]);
        let open = "version: 1\nphases: {dependencies: {network: {mode: open}}}\n";
        assert!(untrusted(open, "", &[]).is_err());
        let (held, narrowed) = untrusted(open, "[tenant.acme]\nopen = true\n", &[]).expect("held");
        assert_eq!(held.network, NetworkPolicy::Isolated);
        assert_eq!(narrowed.expect("narrowed").within, NetworkPolicy::Open);
        // A file of runs alone is silent, and nothing is taken away.
        let (held, narrowed) = untrusted("version: 1\n", "", &["b.example.org:443"]).expect("held");
        assert!(!held.only && narrowed.is_none() && held.network.rules().len() == 1);
    }

    #[test]
    fn a_file_of_runs_alone_leaves_a_builds_registries_to_the_operator() {
        let run = "version: 1\nnetwork: {mode: isolated}\n";
        let held = hold(run, "", &NOTHING).expect("held");
        assert!(!held.only && held.network == NetworkPolicy::Isolated);
        let rule: AllowRule = "b.example.org:443".parse().expect("rule");
        let asked = BuildAsked {
            allow: std::slice::from_ref(&rule),
            ..NOTHING
        };
        let held = hold(run, "", &asked).expect("granted").network;
        let spelled: AllowRule = "b.example.org:443/tls".parse().expect("rule");
        assert_eq!(held.rules(), [spelled]);
        let refused = hold(run, "[tenant.acme]\nhosts = [\"a.example.org\"]\n", &asked);
        assert_eq!(
            refused.expect_err("not granted").class,
            FailureClass::Policy
        );
    }

    #[test]
    fn what_a_build_cannot_honour_is_refused_by_name() {
        let secret = |place: &str| {
            format!(
                "version: 1\nphases: {{dependencies: {{}}}}\nsecrets: [{{name: a, {place}, phase: dependencies, hosts: []}}]\n"
            )
        };
        for (text, word) in [
            (
                "version: 1\nlimits: {processes: 9}\n".to_owned(),
                "limits.processes",
            ),
            (
                "version: 1\nlimits: {output: 1M}\n".to_owned(),
                "limits.output",
            ),
            (
                "version: 1\nlimits: {open_files: 999}\n".to_owned(),
                "limits.open_files",
            ),
            (
                "version: 1\nlimits: {disk_rate: 99K}\n".to_owned(),
                "limits.disk_rate",
            ),
            (
                "version: 1\nphases: {dependencies: {network: {mode: learn}}}\n".to_owned(),
                "mode learn",
            ),
            (secret("env: A"), "as a variable"),
            (secret("file: /etc/a"), "/run/secrets/a"),
        ] {
            let refused = hold(&text, "[tenant.acme]\nlearn = true\n", &NOTHING).expect_err(word);
            assert!(refused.message.contains(word), "{refused:?}");
            assert_eq!(refused.class, FailureClass::Policy);
        }
        let fine = secret("file: /run/secrets/a");
        assert_eq!(
            hold(&fine, "", &NOTHING).expect_err("unnamed").field,
            "secrets"
        );
        let named = ["a".to_owned()];
        let asked = BuildAsked {
            secrets: &named,
            ..NOTHING
        };
        let held = hold(&fine, "", &asked).expect("named");
        assert!(held.only && held.network == NetworkPolicy::Isolated);
    }
}
