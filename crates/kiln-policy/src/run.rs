//! What a run is held to: the project's file AND the operator's grant, narrowed by what the request says. The same for a command of this host
//! and for a request that came to a controller, so that both are held to the same.
//!
//! It decides; it finds no base on a host, reads no secret and starts nothing.

use std::collections::BTreeMap;

use kiln_core::command_line::{self, CommandTooLong};
use kiln_core::job::{AppliedPolicy, RunPhase, RunService};
use kiln_core::network::AllowRule;
use kiln_core::secret::Repository;
use kiln_core::{
    ArtifactPath, ByteSize, FailureClass, GitAccess, ImageRef, NetworkPolicy, RunSecret, TenantName,
};

use crate::compiled::Compiled;
use crate::effective::{Effective, NotGranted, Removed, effective};
use crate::grant::{Grants, Maxima};
use crate::honoured::{ELSEWHERE, ELSEWHERE_HINT, enforceable, other_image};
use crate::policy::{Image, Limits, Phase, PhaseNetwork, PhasePolicy, Policy, Resources};
use crate::{run_git, run_parts};

/// Without a file of its own, what is refused is the operator's.
pub(crate) const OPERATORS: &str = "the operator's policy.toml";

/// A mode of network that a request names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Nothing.
    Isolated,
    /// What is listed.
    Egress,
    /// Every name above the floor of addresses.
    Open,
    /// As open, while what is reached is written down.
    Learn,
}

impl Mode {
    /// The mode of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "isolated" => Some(Self::Isolated),
            "egress" => Some(Self::Egress),
            "open" => Some(Self::Open),
            "learn" => Some(Self::Learn),
            _ => None,
        }
    }
}

/// What a request says of a run itself: beside a file it only takes away.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Mode of the network.
    pub mode: Option<Mode>,
    /// Destinations.
    pub allow: &'a [AllowRule],
    /// Repositories: without a file what it reads, beside one what its owner lets it read with a credential.
    pub git: &'a [Repository],
    /// CPUs, memory and time.
    pub resources: Resources,
    /// Image.
    pub image: Option<&'a ImageRef>,
    /// Secrets.
    pub secrets: &'a [RunSecret],
    /// Command line; it comes after the commands of the file's run phase.
    pub command: &'a [String],
    /// Most connections at once that this kiln can hold a machine to.
    pub connections_most: u32,
}

/// Why a run cannot begin.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Usage when the request contradicts itself or the file, policy when something is not granted.
    pub class: FailureClass,
    /// What of the request it is about: `net`, `allow`, `git`, `cpus`, `memory`, `timeout`, `image`, `secret`, `secrets`, `argv`
    /// or `policy`.
    pub field: &'static str,
    /// The value it is about, where there is one.
    pub said: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to do, each on its own.
    pub hints: Vec<String>,
}

impl Refusal {
    pub(crate) fn new(
        class: FailureClass,
        field: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            class,
            field,
            said: None,
            message: message.into(),
            hints: Vec::new(),
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// A request that would widen a file.
    fn wider(field: &'static str, said: String, file: &str, allows: &str) -> Self {
        let message = format!("{file} allows {allows}, and a flag can only narrow a policy");
        Self {
            said: Some(said),
            ..Self::new(FailureClass::Usage, field, message)
        }
        .hint(format!("write it into {file}, or take the flag away"))
    }
}

impl From<Vec<NotGranted>> for Refusal {
    fn from(refused: Vec<NotGranted>) -> Self {
        let lines: Vec<String> = refused.iter().map(ToString::to_string).collect();
        Self {
            hints: refused.into_iter().map(|one| one.hint).collect(),
            ..Self::new(FailureClass::Policy, "policy", lines.join("\n"))
        }
    }
}

/// What a run is held to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// What it runs in, where a file says so.
    pub image: Option<Image>,
    /// The file says that nothing of the folder is copied in.
    pub no_source: bool,
    /// The commands of the file's run phase and the request's own.
    pub argv: Vec<String>,
    /// What its own command reaches.
    pub network: NetworkPolicy,
    /// What it may use: asked for, else the file's.
    pub resources: Resources,
    /// The operator's maxima, for what a default decides.
    pub max: Maxima,
    /// Most disk, of the file or the operator.
    pub disk: Option<ByteSize>,
    /// The file itself says how much disk.
    pub disk_said: bool,
    /// Files that are kept, of the file.
    pub artifacts: Vec<ArtifactPath>,
    /// What comes before the command.
    pub phases: Vec<RunPhase>,
    /// What runs beside it.
    pub services: Vec<RunService>,
    /// Repositories that the command itself reads.
    pub git: Vec<GitAccess>,
    /// Secrets of the command itself.
    pub secrets: Vec<RunSecret>,
    /// What the job's record keeps of it.
    pub applied: Option<AppliedPolicy>,
    /// What the operator's grant took away.
    pub removed: Vec<Removed>,
}

/// What a run is held to under a file, if there is one.
///
/// # Errors
/// Policy when something asked for is not granted, or cannot be enforced; usage when the request asks for more than the file, or its command
/// line can be sent to no machine.
pub fn hold_run(
    compiled: Option<&Compiled>,
    grants: &Grants,
    tenant: &TenantName,
    asked: &Asked<'_>,
) -> Result<Held, Refusal> {
    run_git::fits(asked)?;
    if let Some(image) = asked.image.filter(|image| image.registry.is_some()) {
        return Err(Refusal {
            said: Some(image.to_string()),
            ..Refusal::new(FailureClass::Usage, "image", ELSEWHERE)
        }
        .hint(ELSEWHERE_HINT));
    }
    let held = match compiled {
        Some(compiled) => by_file(compiled, grants, tenant, asked)?,
        None => by_request(grants, tenant, asked)?,
    };
    run_git::stay_outside(&held.git, &held.phases, &held.secrets)?;
    // Its variables, which are not known here, come on top.
    command_line::fits(&held.argv, &BTreeMap::new()).map_err(|long| {
        Refusal::new(FailureClass::Usage, "argv", long.to_string()).hint(CommandTooLong::HINT)
    })?;
    Ok(held)
}

fn by_file(
    compiled: &Compiled,
    grants: &Grants,
    tenant: &TenantName,
    asked: &Asked<'_>,
) -> Result<Held, Refusal> {
    let learns = asked.mode == Some(Mode::Learn);
    let opened = learns.then(|| learning(compiled));
    if learns {
        may_learn(compiled, grants, tenant)?;
    }
    let holds = effective(opened.as_ref().unwrap_or(compiled), grants, tenant)?;
    if learns {
        without_secrets(&holds.policy, asked.secrets)?;
    }
    let file = compiled.file();
    let named = (file, compiled.line_of_amount("image"));
    enforceable(&holds.policy, named, learns, asked.connections_most)?;
    let network = holds.policy.network(Phase::Run).effect();
    let narrower = asked_network(asked, Some(&network))?;
    let network = narrowed(network, narrower.as_ref(), file)?;
    let secrets = run_parts::secrets(&holds.policy, asked.secrets, file)?;
    let git = run_git::of_policy(&holds, asked, file)?;
    let phases = run_parts::phases(&holds.policy, narrower.as_ref(), &secrets, &git);
    let resources = resources(asked.resources, holds.policy.resources, file)?;
    if let (Some(Image::Pinned(own)), Some(other)) = (&holds.policy.image, asked.image)
        && own != other
    {
        return Err(other_image(other, &own.to_string(), file));
    }
    let run = holds.policy.phases.get(&Phase::Run);
    Ok(Held {
        argv: run_parts::argv(run, asked.command),
        network,
        resources,
        max: holds.max,
        disk: holds.policy.limits.disk,
        disk_said: compiled.policy().limits.disk.is_some(),
        artifacts: artifacts(&holds.policy.artifacts)?,
        phases,
        services: run_parts::services(&holds.policy),
        git: git.of(Phase::Run),
        secrets: secrets.of(Phase::Run),
        applied: Some(AppliedPolicy {
            name: Some(compiled.name()),
            // Of what the file means, whatever a request made of it.
            file: compiled.hash(),
            ..applied(&holds.policy.limits, &holds, learns)
        }),
        no_source: holds.policy.no_source,
        image: holds.policy.image,
        removed: holds.removed,
    })
}

/// Without a file the request is the policy; the operator's grant bounds it all the same.
fn by_request(grants: &Grants, tenant: &TenantName, asked: &Asked<'_>) -> Result<Held, Refusal> {
    let learns = asked.mode == Some(Mode::Learn);
    let network = asked_network(asked, None)?.unwrap_or_default();
    if learns {
        without_secrets(&Policy::default(), asked.secrets)?;
    }
    let run = PhasePolicy {
        network: match learns {
            true => PhaseNetwork::Learn,
            // Nothing but repositories.
            false if network == NetworkPolicy::Isolated && !asked.git.is_empty() => {
                PhaseNetwork::Egress(Vec::new())
            }
            false => of_network(&network),
        },
        git: asked.git.to_vec(),
        ..PhasePolicy::default()
    };
    let policy = Policy {
        phases: [(Phase::Run, run)].into(),
        resources: asked.resources,
        ..Policy::default()
    };
    let holds = effective(&Compiled::of_command_line(policy), grants, tenant)?;
    nothing_removed(&holds, "allow")?;
    enforceable(
        &holds.policy,
        (OPERATORS, 0),
        learns,
        asked.connections_most,
    )?;
    let limits = holds.policy.limits;
    let bounded = limits != Limits::default() || learns;
    Ok(Held {
        image: None,
        no_source: false,
        argv: asked.command.to_vec(),
        network,
        resources: asked.resources,
        max: holds.max,
        disk: limits.disk,
        disk_said: false,
        artifacts: Vec::new(),
        phases: Vec::new(),
        services: Vec::new(),
        git: holds.git(Phase::Run),
        secrets: asked.secrets.to_vec(),
        applied: bounded.then(|| applied(&limits, &holds, learns)),
        removed: Vec::new(),
    })
}

/// What of the request is at most the file's.
pub(crate) fn resources(
    asked: Resources,
    most: Resources,
    file: &str,
) -> Result<Resources, Refusal> {
    let time = at_most(
        "timeout",
        asked.timeout_ms.map(Seconds),
        most.timeout_ms.map(Seconds),
        file,
    )?;
    Ok(Resources {
        cpus: at_most("cpus", asked.cpus, most.cpus, file)?,
        memory: at_most("memory", asked.memory, most.memory, file)?,
        timeout_ms: time.map(|time| time.0),
    })
}

/// What a job's record keeps of what holds.
pub(crate) fn applied(limits: &Limits, holds: &Effective, learns: bool) -> AppliedPolicy {
    AppliedPolicy {
        name: None,
        file: holds.file_hash,
        hash: holds.hash,
        upload_bits: limits.upload_bits,
        download_bits: limits.download_bits,
        connections_max: limits.connections,
        output_bytes_max: limits.output.map(|size| size.0),
        processes_max: limits.processes,
        disk_bytes_per_second: limits.disk_rate.map(|size| size.0),
        open_files_max: limits.open_files,
        learn: learns,
        decided_us: None,
    }
}

/// A network, spelled out, as a policy says it.
pub(crate) fn of_network(network: &NetworkPolicy) -> PhaseNetwork {
    match network {
        NetworkPolicy::Isolated => PhaseNetwork::Isolated,
        NetworkPolicy::Open => PhaseNetwork::Open,
        NetworkPolicy::Egress { allow } => PhaseNetwork::Egress(allow.clone()),
    }
}

/// What a request itself names is not narrowed without a word: it is refused.
pub(crate) fn nothing_removed(holds: &Effective, field: &'static str) -> Result<(), Refusal> {
    let Some(gone) = holds.removed.first() else {
        return Ok(());
    };
    let message = format!("the operator does not grant it ({})", gone.by);
    let (field, said) = match gone.rule.strip_prefix("git ") {
        Some(repository) if field == "allow" => ("git", repository),
        _ => (field, gone.rule.as_str()),
    };
    Err(Refusal {
        said: Some(said.to_owned()),
        ..Refusal::new(FailureClass::Policy, field, message)
    })
}

/// The policy, with every phase that reaches anything, and the command's own, learning.
fn learning(compiled: &Compiled) -> Compiled {
    let mut policy = compiled.policy().clone();
    policy.phases.entry(Phase::Run).or_default().network = PhaseNetwork::Learn;
    for part in policy.phases.values_mut() {
        if part.network != PhaseNetwork::Isolated {
            part.network = PhaseNetwork::Learn;
        }
    }
    compiled.with(policy)
}

/// Where the file does not ask to learn itself, the request does, and no line of the file is to blame.
fn may_learn(compiled: &Compiled, grants: &Grants, tenant: &TenantName) -> Result<(), Refusal> {
    let of_file = compiled.policy().network(Phase::Run) == &PhaseNetwork::Learn;
    if of_file || grants.of(tenant).learn {
        return Ok(());
    }
    let run = PhasePolicy {
        network: PhaseNetwork::Learn,
        ..PhasePolicy::default()
    };
    let asked = Policy {
        phases: [(Phase::Run, run)].into(),
        ..Policy::default()
    };
    effective(&Compiled::of_command_line(asked), grants, tenant)?;
    Ok(())
}

/// An open machine could tell a secret to anybody.
fn without_secrets(policy: &Policy, named: &[RunSecret]) -> Result<(), Refusal> {
    match policy.secrets.is_empty() && named.is_empty() {
        true => Ok(()),
        false => Err(Refusal::new(
            FailureClass::Policy,
            "secrets",
            "a machine that learns gets no secrets: it could tell them to any host",
        )
        .hint("learn with --no-policy and without --secret, or name the hosts in `allow` by hand")),
    }
}

/// What the request says of the network; none when it says nothing, or leaves it to the file's own list.
fn asked_network(
    asked: &Asked<'_>,
    policy: Option<&NetworkPolicy>,
) -> Result<Option<NetworkPolicy>, Refusal> {
    let contradiction =
        |what: &str| Refusal::new(FailureClass::Usage, "net", what).hint("leave one of them out");
    // A flag without a protocol means what the port speaks by default, as it does in a file.
    let listed = || NetworkPolicy::from_rules(asked.allow.iter().flat_map(AllowRule::spelled_out));
    let named = !asked.allow.is_empty();
    match asked.mode {
        None if !named => Ok(None),
        None => Ok(Some(listed())),
        Some(Mode::Egress) if named => Ok(Some(listed())),
        Some(Mode::Egress) if matches!(policy, Some(NetworkPolicy::Egress { .. })) => Ok(None),
        Some(Mode::Egress) if !asked.git.is_empty() => Ok(None),
        Some(Mode::Egress) => Err(Refusal::new(
            FailureClass::Usage,
            "net",
            "--net egress reaches what --allow names, and nothing is named",
        )
        .hint("add --allow HOST[:PORT], or write --net isolated")),
        Some(Mode::Isolated) if named => Err(contradiction(
            "--net isolated reaches nothing: --allow contradicts it",
        )),
        Some(Mode::Isolated) => Ok(Some(NetworkPolicy::Isolated)),
        Some(Mode::Open | Mode::Learn) if named => Err(contradiction(
            "--net open and --net learn reach every name: --allow adds nothing",
        )),
        Some(Mode::Open | Mode::Learn) => Ok(Some(NetworkPolicy::Open)),
    }
}

/// The file's network, or the narrower one of the request.
pub(crate) fn narrowed(
    policy: NetworkPolicy,
    asked: Option<&NetworkPolicy>,
    file: &str,
) -> Result<NetworkPolicy, Refusal> {
    let refuse = |field: &'static str, said: String| {
        let message = format!("{file} does not allow it, and a flag can only narrow a policy");
        Refusal {
            said: Some(said),
            ..Refusal::new(FailureClass::Usage, field, message)
        }
        .hint(format!("write it into {file}, or take the flag away; `kiln policy explain HOST` says what holds"))
    };
    match asked {
        None => Ok(policy),
        Some(NetworkPolicy::Isolated) => Ok(NetworkPolicy::Isolated),
        Some(NetworkPolicy::Open) if policy == NetworkPolicy::Open => Ok(policy),
        Some(NetworkPolicy::Open) => Err(refuse("net", "open".to_owned())),
        Some(listed @ NetworkPolicy::Egress { allow }) => {
            match allow.iter().find(|rule| !policy.covers_rule(rule)) {
                Some(rule) => Err(refuse("allow", rule.to_string())),
                None => Ok(listed.spelled_out()),
            }
        }
    }
}

/// Milliseconds as people read them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}s", self.0 / 1000)
    }
}

pub(crate) fn at_most<T: Ord + Copy + std::fmt::Display>(
    field: &'static str,
    asked: Option<T>,
    most: Option<T>,
    file: &str,
) -> Result<Option<T>, Refusal> {
    match (asked, most) {
        (Some(asked), Some(most)) if asked > most => Err(Refusal::wider(
            field,
            asked.to_string(),
            file,
            &most.to_string(),
        )),
        (asked, most) => Ok(asked.or(most)),
    }
}

fn artifacts(paths: &[String]) -> Result<Vec<ArtifactPath>, Refusal> {
    let parsed = paths.iter().map(|path| path.parse());
    parsed
        .collect::<Result<_, kiln_core::artifact::ParseArtifactError>>()
        .map_err(|error| Refusal::new(FailureClass::Usage, "policy", error.to_string()))
}

/// Never more than the operator's maxima, where a default decided.
pub fn below(limits: &mut kiln_core::job::Limits, max: &Maxima) {
    let least = |now: u64, most: Option<u64>| most.map_or(now, |most| now.min(most));
    limits.cpus = max
        .cpus
        .map_or(limits.cpus, |most| limits.cpus.min(most.max(1)));
    limits.memory = ByteSize(least(limits.memory.0, max.memory.map(|size| size.0)));
    limits.timeout_ms = least(limits.timeout_ms, max.timeout_ms);
    limits.disk = ByteSize(least(limits.disk.0, max.disk.map(|size| size.0)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::honoured::runnable;

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
            assert_eq!(error.field, "allow");
        }
        assert!(narrowed(policy.clone(), Some(&NetworkPolicy::Open), "f").is_err());
        assert_eq!(
            narrowed(policy.clone(), Some(&NetworkPolicy::Isolated), "f").expect("narrower"),
            NetworkPolicy::Isolated
        );
        assert_eq!(narrowed(policy.clone(), None, "f").expect("same"), policy);
        assert!(at_most("cpus", Some(3), Some(2), "f").is_err());
        assert_eq!(at_most("cpus", Some(1), Some(2), "f"), Ok(Some(1)));
        assert_eq!(at_most("cpus", None, Some(2), "f"), Ok(Some(2)));
    }

    const NOTHING: Asked<'_> = Asked {
        mode: None,
        allow: &[],
        git: &[],
        resources: Resources {
            cpus: None,
            memory: None,
            timeout_ms: None,
        },
        image: None,
        secrets: &[],
        command: &[],
        connections_most: 2048,
    };

    fn hold(text: &str, grants: &str, asked: &Asked<'_>) -> Result<Held, Refusal> {
        let compiled = crate::compile(crate::Format::Kiln, "kiln.yaml", text).expect("legal");
        let grants = Grants::parse("policy.toml", grants).expect("legal");
        hold_run(
            Some(&compiled),
            &grants,
            &"acme".parse().expect("tenant"),
            asked,
        )
    }

    /// Without a file a flag means what it would mean in one, and what is recorded is what is enforced.
    #[test]
    fn without_a_file_a_flag_speaks_what_its_port_does() {
        let by_flags = |flags: &[&str], grants: &str| {
            let allow: Vec<AllowRule> =
                flags.iter().map(|one| one.parse().expect("rule")).collect();
            let asked = Asked {
                allow: &allow,
                ..NOTHING
            };
            let grants = Grants::parse("policy.toml", grants).expect("legal");
            hold_run(None, &grants, &"acme".parse().expect("tenant"), &asked)
        };
        let held = by_flags(
            &[
                "a.example.org",
                "b.example.org:25,8443",
                "c.example.org:80/raw",
            ],
            "",
        );
        let want = [
            "a.example.org:80/http",
            "a.example.org:443/tls",
            "b.example.org:25/raw",
            "b.example.org:8443/raw",
            "c.example.org:80/raw",
        ];
        assert_eq!(held.expect("held").network, rules(&want));
        let grant = "[tenant.acme]\nhosts = [\"a.example.org:443\", \"b.example.org:25\"]\nmax = {connections = 9}\n";
        let held = by_flags(&["a.example.org:443", "b.example.org:25"], grant).expect("granted");
        assert_eq!(
            held.network,
            rules(&["a.example.org:443/tls", "b.example.org:25/raw"])
        );
        let spelled = by_flags(&["a.example.org:443/tls", "b.example.org:25/raw"], grant);
        assert_eq!(held.applied, spelled.expect("granted").applied, "one hash");
        for wider in [
            "a.example.org:443/http",
            "a.example.org:443/raw",
            "a.example.org:80",
            "b.example.org",
        ] {
            let refused = by_flags(&[wider], grant).expect_err(wider);
            assert_eq!(
                (refused.class, refused.field),
                (FailureClass::Policy, "allow"),
                "{wider}"
            );
        }
    }

    #[test]
    fn open_and_learn_are_the_grants_alone_and_another_tenants_is_none() {
        let open = "version: 1\nnetwork: {mode: open}\n";
        let refused = hold(open, "", &NOTHING).expect_err("no grant");
        assert_eq!(refused.class, FailureClass::Policy);
        assert!(refused.message.contains("kiln.yaml:2"), "{refused:?}");
        assert!(hold(open, "[tenant.rival]\nopen = true\n", &NOTHING).is_err());
        let held = hold(open, "[tenant.acme]\nopen = true\n", &NOTHING).expect("granted");
        assert_eq!(held.network, NetworkPolicy::Open);
        let learn = Asked {
            mode: Some(Mode::Learn),
            ..NOTHING
        };
        let listed = "version: 1\nnetwork: {allow: [a.example.org]}\n";
        assert!(hold(listed, "[tenant.acme]\nopen = true\n", &learn).is_err());
        let held = hold(listed, "[tenant.acme]\nlearn = true\n", &learn).expect("granted");
        assert!(held.applied.expect("applied").learn);
        let secret: RunSecret = "token".parse().expect("secret");
        let with = Asked {
            secrets: std::slice::from_ref(&secret),
            ..learn
        };
        let refused = hold(listed, "[tenant.acme]\nlearn = true\n", &with).expect_err("a secret");
        assert_eq!(refused.field, "secrets");
    }

    #[test]
    fn a_repository_with_a_credential_needs_its_owners_word() {
        let file = "version: 1\nphases:\n  dependencies: {network: {git: [git.example.org/lib, open.example.org/a]}, commands: [x]}\n  run: {network: {allow: [b.example.org], git: [git.example.org/app]}}\n";
        let grant = "[tenant.acme]\ngit = [\"open.example.org/*\", {repository = \"git.example.org/*\", secret = \"T\"}]\n";
        let refused = hold(file, grant, &NOTHING).expect_err("nobody named it");
        assert_eq!(
            (refused.class, refused.field),
            (FailureClass::Policy, "git")
        );
        assert!(
            refused.hints[0].contains("--git git.example.org/lib"),
            "{refused:?}"
        );
        let named: Vec<Repository> = ["git.example.org/lib", "git.example.org/app"]
            .map(|text| text.parse().expect("repository"))
            .to_vec();
        let asked = Asked {
            git: &named,
            ..NOTHING
        };
        let held = hold(file, grant, &asked).expect("named");
        assert_eq!((held.git.len(), held.phases[0].git.len()), (1, 2));
        assert!(held.git[0].credential.is_some());
        // As anybody reads them, no word is needed; and a flag that narrows leaves what it names.
        let held = hold(file, "", &NOTHING).expect("no credential");
        assert_eq!((held.git.len(), held.phases[0].git.len()), (1, 2));
        let rule: AllowRule = "b.example.org:443".parse().expect("rule");
        let narrow = Asked {
            allow: std::slice::from_ref(&rule),
            git: &named[1..],
            ..NOTHING
        };
        let held = hold(file, grant, &narrow).expect("narrower");
        assert_eq!((held.git.len(), held.phases[0].git.len()), (1, 0));
        let isolated = Asked {
            mode: Some(Mode::Isolated),
            ..NOTHING
        };
        assert!(
            hold(file, grant, &isolated)
                .expect("nothing")
                .git
                .is_empty()
        );
        let other = ["git.example.org/other".parse().expect("repository")];
        let asked = Asked {
            git: &other,
            ..NOTHING
        };
        assert!(hold(file, "", &asked).is_err(), "the file does not name it");
        // What the host logs in with is no command's.
        let secret: RunSecret = "T".parse().expect("secret");
        let both = Asked {
            git: &named,
            secrets: std::slice::from_ref(&secret),
            ..NOTHING
        };
        assert_eq!(hold(file, grant, &both).expect_err("both").field, "secret");
    }

    #[test]
    fn without_a_file_the_request_names_repositories_within_the_grant() {
        let tenant: TenantName = "acme".parse().expect("tenant");
        let named = ["git.example.org/app".parse().expect("repository")];
        let rule: AllowRule = "*.example.org".parse().expect("rule");
        let hold = |text: &str, asked: &Asked<'_>| {
            let grants = Grants::parse("policy.toml", text).expect("legal");
            hold_run(None, &grants, &tenant, asked)
        };
        let asked = Asked {
            git: &named,
            ..NOTHING
        };
        let held = hold("", &asked).expect("anybody's");
        assert_eq!((held.network, held.git.len()), (NetworkPolicy::Isolated, 1));
        let refused = hold("[tenant.acme]\ngit = []\n", &asked).expect_err("not granted");
        assert_eq!(
            (refused.field, refused.said.as_deref()),
            ("git", Some("git.example.org/app"))
        );
        let beside = Asked {
            allow: std::slice::from_ref(&rule),
            ..asked
        };
        let refused = hold("", &beside).expect_err("beside the gateway");
        assert!(refused.message.contains("git gateway"), "{refused:?}");
        for mode in [Mode::Isolated, Mode::Open, Mode::Learn] {
            let asked = Asked {
                mode: Some(mode),
                ..asked
            };
            assert_eq!(hold("", &asked).expect_err("contradiction").field, "net");
        }
    }

    #[test]
    fn what_cannot_be_held_to_is_refused() {
        for text in [
            "version: 1\nlimits: {connections: 60000}\n",
            "version: 1\nnetwork: {mode: learn}\n",
            "version: 1\nsecrets: [{name: a, file: /etc/a, phase: run, hosts: []}]\n",
        ] {
            let refused = hold(text, "[tenant.acme]\nlearn = true\n", &NOTHING).expect_err(text);
            assert_eq!(refused.class, FailureClass::Policy);
            assert!(refused.message.contains("cannot hold"), "{refused:?}");
        }
        let fine =
            "version: 1\nnetwork: {allow: [a.example.org]}\nlimits: {upload: 1Mbit, output: 1M}\n";
        let held = hold(fine, "", &NOTHING).expect("enforceable");
        let applied = held.applied.expect("applied");
        assert_eq!(applied.upload_bits, Some(1_000_000));
        assert!(!applied.learn);
    }

    #[test]
    fn what_a_learning_run_is_held_to_is_the_files() {
        let learn = Asked {
            mode: Some(Mode::Learn),
            ..NOTHING
        };
        let file = "version: 1\nnetwork: {allow: [a.example.org]}\nresources: {cpus: 3}\n";
        let held = hold(file, "[tenant.acme]\nlearn = true\n", &learn).expect("granted");
        let own = crate::compile(crate::Format::Kiln, "kiln.yaml", file).expect("legal");
        let applied = held.applied.expect("applied");
        assert_eq!(applied.file, own.hash());
        assert_ne!(applied.hash, own.hash(), "what held was open");
        let most = "[tenant.acme]\nlearn = true\nmax = {cpus = 2}\n";
        let refused = hold(file, most, &learn).expect_err("too many");
        assert!(refused.message.starts_with("kiln.yaml:3:"), "{refused:?}");
        // The file does not ask to learn: its lines are not to blame.
        let refused = hold(file, "", &learn).expect_err("not granted");
        assert!(
            refused.message.starts_with("the command line:"),
            "{refused:?}"
        );
        let asks = "version: 1\nnetwork: {mode: learn}\n";
        let refused = hold(asks, "", &learn).expect_err("not granted");
        assert!(refused.message.starts_with("kiln.yaml:2:"), "{refused:?}");
    }

    #[test]
    fn an_image_of_another_registry_is_refused_before_anything_is_asked_for() {
        let pinned = |host: &str| format!("{host}app@sha256:{}", "a".repeat(64));
        let image = |host: &str| format!("version: 1\nimage: {}\n", pinned(host));
        let service = |host: &str| {
            format!(
                "version: 1\nservices: {{db: {{image: \"{}\", port: 5432}}}}\n",
                pinned(host)
            )
        };
        let compiled = |text: &str| crate::compile(crate::Format::Kiln, "kiln.yaml", text);
        for text in [
            image("registry.example.org/"),
            service("registry.example.org/"),
        ] {
            let refused = hold(&text, "", &NOTHING).expect_err(&text);
            assert_eq!(refused.class, FailureClass::Policy);
            assert!(
                refused.message.contains("kiln's own registry"),
                "{refused:?}"
            );
            assert!(refused.hints[0].contains("kiln build"), "{refused:?}");
            let file = compiled(&text).expect("legal");
            let holds = effective(&file, &Grants::default(), &TenantName::local());
            assert_eq!(
                runnable(&file, &holds.expect("granted"), 2048).expect_err("checked, too"),
                refused
            );
        }
        for text in [image(""), service("")] {
            assert!(hold(&text, "", &NOTHING).is_ok(), "{text}");
        }
        let other: ImageRef = "registry.example.org/app:1".parse().expect("image");
        let asked = Asked {
            image: Some(&other),
            ..NOTHING
        };
        let refused = hold("version: 1\n", "", &asked).expect_err("of a flag");
        assert_eq!(
            (refused.class, refused.field),
            (FailureClass::Usage, "image")
        );
    }

    #[test]
    fn a_command_line_that_no_machine_can_be_sent_is_refused_with_a_file_and_without() {
        fn asked(command: &[String]) -> Asked<'_> {
            Asked { command, ..NOTHING }
        }
        let words = |last: usize| ["echo".to_owned(), "x".repeat(last)];
        let (long, half) = (words(20_000), words(9_000));
        let by_request = |command: &[String; 2]| {
            let tenant: TenantName = "acme".parse().expect("tenant");
            hold_run(None, &Grants::default(), &tenant, &asked(command))
        };
        let refused = by_request(&long).expect_err("too long");
        assert_eq!(
            (refused.class, refused.field),
            (FailureClass::Usage, "argv")
        );
        assert!(
            refused.message.contains("at most 16384 can be sent"),
            "{refused:?}"
        );
        assert_eq!(refused.hints, [CommandTooLong::HINT]);
        let file = "version: 1\n";
        assert_eq!(hold(file, "", &asked(&long)).expect_err("as long"), refused);
        assert!(by_request(&half).is_ok() && hold(file, "", &asked(&half)).is_ok());
        // The commands of the file's own run phase are a part of it.
        let line = "y".repeat(7_900);
        let file = format!("version: 1\nphases: {{run: {{commands: [\"echo {line}\"]}}}}\n");
        assert!(hold(&file, "", &NOTHING).is_ok());
        let refused = hold(&file, "", &asked(&half)).expect_err("both together");
        assert_eq!(refused.field, "argv", "{refused:?}");
    }

    #[test]
    fn a_files_word_on_the_folder_is_passed_on() {
        let none = hold("version: 1\nsource: none\n", "", &NOTHING).expect("held");
        assert!(none.no_source);
        assert!(!hold("version: 1\n", "", &NOTHING).expect("held").no_source);
    }

    #[test]
    fn a_grant_takes_away_and_says_so_and_a_request_is_refused_instead() {
        let grants = "[tenant.acme]\nhosts = [\"*.example.org\"]\nmax = {disk = \"2G\"}\n";
        let both = "version: 1\nnetwork: {allow: [a.example.org:443, db.example.net:5432]}\n";
        let held = hold(both, grants, &NOTHING).expect("narrowed");
        assert_eq!(held.network, rules(&["a.example.org:443/tls"]));
        assert_eq!(held.removed.len(), 1);
        assert!(!held.disk_said && held.disk == Some(ByteSize::gib(2)));
        let rule: AllowRule = "db.example.net:5432".parse().expect("rule");
        let asked = Asked {
            allow: std::slice::from_ref(&rule),
            ..NOTHING
        };
        let grants = Grants::parse("policy.toml", grants).expect("legal");
        let refused = hold_run(None, &grants, &"acme".parse().expect("tenant"), &asked);
        let refused = refused.expect_err("not granted");
        assert_eq!(
            (refused.class, refused.field),
            (FailureClass::Policy, "allow")
        );
    }
}
