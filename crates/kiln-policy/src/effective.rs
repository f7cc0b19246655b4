//! What holds: the file AND the operator's grant. And why, for one name.

use std::collections::BTreeMap;
use std::fmt;

use kiln_core::git_gateway::{GitAccess, GitCredential};
use kiln_core::network::{NameVerdict, Protocol, normal_host};
use kiln_core::secret::Repository;
use kiln_core::{AllowRule, Digest, TenantName};
use serde::Serialize;

use crate::compiled::Compiled;
use crate::grant::{Grant, Grants, Maxima};
use crate::policy::{Phase, PhaseNetwork, Policy};

/// A destination of the file that the operator's grant takes away.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Removed {
    /// Of which phase.
    pub phase: String,
    /// As the file says it.
    pub rule: String,
    /// Line of the file.
    pub line: u32,
    /// What is left of it, if anything.
    pub left: Vec<String>,
    /// Where the operator says so.
    pub by: String,
}

/// Something that the file asks for and the operator did not grant.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct NotGranted {
    /// The file that asks.
    pub file: String,
    /// Its line; 0 where no line says it.
    pub line: u32,
    /// What is not granted.
    pub message: String,
    /// What to do.
    pub hint: String,
}

impl fmt::Display for NotGranted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}: {}", self.file, self.message),
        }
    }
}

impl std::error::Error for NotGranted {}

/// What holds for a job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Effective {
    /// The narrowed policy.
    pub policy: Policy,
    /// Hash of the file's own policy.
    pub file_hash: Digest,
    /// Hash of what holds.
    pub hash: Digest,
    /// What the grant took away.
    pub removed: Vec<Removed>,
    /// The most of everything countable, for what the file does not say and a default decides.
    pub max: Maxima,
    /// What the host shows the servers of repositories, as the grant says it.
    pub credentials: BTreeMap<Repository, GitCredential>,
}

impl Effective {
    /// The repositories of a phase, each with what the host shows its server.
    #[must_use]
    pub fn git(&self, phase: Phase) -> Vec<GitAccess> {
        let access = |repository: &Repository| GitAccess {
            repository: repository.clone(),
            credential: self.credentials.get(repository).cloned(),
        };
        self.policy.git(phase).iter().map(access).collect()
    }
}

/// The file AND the grant.
///
/// # Errors
/// Everything that the file asks for and that only a grant gives: an open network, learning, more than the maxima.
pub fn effective(
    compiled: &Compiled,
    grants: &Grants,
    tenant: &TenantName,
) -> Result<Effective, Vec<NotGranted>> {
    let grant = grants.of(tenant);
    let source = grants.file.as_deref().unwrap_or("kiln's defaults");
    let mut policy = compiled.policy().clone();
    let mut refused = Vec::new();
    let mut removed = Vec::new();
    let mut credentials = BTreeMap::new();
    beside_the_gateway(compiled, &grant, source, &mut refused);
    for (phase, part) in &mut policy.phases {
        let line = compiled
            .origin(*phase)
            .map_or(0, |origin| origin.place.line);
        let mut not_granted = |word: &str, key: &str| {
            refused.push(NotGranted {
                file: compiled.file().to_owned(),
                line,
                message: format!("the phase {phase} asks for `{word}`, which {tenant} is not granted ({source})"),
                hint: format!("name what it may reach in `allow`; or the operator writes `{key} = true` below [tenant.{tenant}] in policy.toml"),
            });
        };
        match &part.network {
            PhaseNetwork::Open if !grant.open => not_granted("open", "open"),
            PhaseNetwork::Learn if !grant.learn => not_granted("learn", "learn"),
            _ => {}
        }
        if let PhaseNetwork::Egress(rules) = &part.network
            && grant.hosts.is_some()
        {
            let mut left = Vec::new();
            for rule in rules {
                let kept = granted(rule, &grant);
                if kept != [rule.clone()] {
                    removed.push(Removed {
                        phase: phase.name().to_owned(),
                        rule: rule.to_string(),
                        line: line_of(compiled, *phase, rule),
                        left: kept.iter().map(ToString::to_string).collect(),
                        by: format!("{source}:{}", grant.hosts_line.unwrap_or(1)),
                    });
                }
                left.extend(kept);
            }
            left.sort();
            left.dedup();
            part.network = PhaseNetwork::Egress(left);
        }
        part.git
            .retain(|repository| match grant.repository(repository) {
                Some((_, credential)) => {
                    let known = credential.map(|known| (repository.clone(), known.clone()));
                    credentials.extend(known);
                    true
                }
                None => {
                    let line = grant.git_line.or(grant.hosts_line).unwrap_or(1);
                    removed.push(Removed {
                        phase: phase.name().to_owned(),
                        rule: format!("git {repository}"),
                        line: line_of_git(compiled, *phase, repository),
                        left: Vec::new(),
                        by: format!("{source}:{line}"),
                    });
                    false
                }
            });
        if part.git.is_empty()
            && matches!(&part.network, PhaseNetwork::Egress(rules) if rules.is_empty())
        {
            part.network = PhaseNetwork::Isolated;
        }
    }
    bound_all(&mut policy, &grant, compiled, source, &mut refused);
    policy
        .phases
        .retain(|_, part| *part != crate::policy::PhasePolicy::default());
    if !refused.is_empty() {
        return Err(refused);
    }
    Ok(Effective {
        file_hash: compiled.hash(),
        hash: policy.hash(),
        policy,
        removed,
        max: grant.max,
        credentials,
    })
}

/// Plain rules for hosts that the gateway serves: of the policy, which a file has said already and a command line has not, or of the operator.
fn beside_the_gateway(
    compiled: &Compiled,
    grant: &Grant,
    source: &str,
    refused: &mut Vec<NotGranted>,
) {
    let policy = compiled.policy();
    let named = || policy.phases.values().flat_map(|part| &part.git);
    for (phase, part) in &policy.phases {
        for rule in part.network.rules() {
            let by = match named().find(|one| rule.matches(one.host())) {
                Some(repository) => format!("it reads {repository}"),
                None => match grant.gateway_serves(rule) {
                    Some(entry) => format!("{source}:{}", entry.line),
                    None => continue,
                },
            };
            refused.push(NotGranted {
                file: compiled.file().to_owned(),
                line: line_of(compiled, *phase, rule),
                message: format!(
                    "{rule} cannot be reached plainly: its host is served by the git gateway ({by})"
                ),
                hint: "name its repositories in `git` of the phase, or with --git HOST/PATH"
                    .to_owned(),
            });
        }
    }
}

/// What a grant leaves of a rule of one port.
fn granted(rule: &AllowRule, grant: &Grant) -> Vec<AllowRule> {
    let Some(hosts) = &grant.hosts else {
        return vec![rule.clone()];
    };
    let mut left: Vec<AllowRule> = hosts.iter().filter_map(|host| host.and(rule)).collect();
    left.sort();
    left.dedup();
    // A part that another part covers says nothing new.
    let all = left.clone();
    left.retain(|one| !all.iter().any(|other| other != one && other.covers(one)));
    left
}

fn line_of(compiled: &Compiled, phase: Phase, rule: &AllowRule) -> u32 {
    let origin = compiled.origin(phase);
    let sited = origin.and_then(|origin| origin.rules.iter().find(|sited| sited.rule == *rule));
    sited.map_or(1, |sited| sited.place.line)
}

fn line_of_git(compiled: &Compiled, phase: Phase, repository: &Repository) -> u32 {
    let origin = compiled.origin(phase);
    let sited =
        origin.and_then(|origin| origin.git.iter().find(|one| one.repository == *repository));
    sited.map_or(1, |sited| sited.place.line)
}

fn bound_all(
    policy: &mut Policy,
    grant: &Grant,
    compiled: &Compiled,
    source: &str,
    refused: &mut Vec<NotGranted>,
) {
    let mut refuse = |what: &str, asked: String, most: String| {
        refused.push(NotGranted {
            file: compiled.file().to_owned(),
            line: compiled.line_of_amount(what),
            message: format!("`{what}` is {asked}: at most {most} is granted ({source})"),
            hint: format!("ask for at most {most}"),
        });
    };
    let (max, limits) = (&grant.max, &mut policy.limits);
    let resources = policy.resources;
    // What is not asked for is a default's business, which then stays below the maximum.
    bound("resources.cpus", resources.cpus, max.cpus, &mut refuse);
    bound(
        "resources.memory",
        resources.memory,
        max.memory,
        &mut refuse,
    );
    bound(
        "resources.timeout",
        resources.timeout_ms.map(Millis),
        max.timeout_ms.map(Millis),
        &mut refuse,
    );
    // What is not asked for here has no other bound.
    limits.disk = bound("limits.disk", limits.disk, max.disk, &mut refuse);
    limits.connections = bound(
        "limits.connections",
        limits.connections,
        max.connections,
        &mut refuse,
    );
    limits.processes = bound(
        "limits.processes",
        limits.processes,
        max.processes,
        &mut refuse,
    );
    limits.disk_rate = bound(
        "limits.disk_rate",
        limits.disk_rate,
        max.disk_rate,
        &mut refuse,
    );
    limits.open_files = bound(
        "limits.open_files",
        limits.open_files,
        max.open_files,
        &mut refuse,
    );
    limits.output = bound("limits.output", limits.output, max.output, &mut refuse);
    let rates = [
        ("limits.upload", &mut limits.upload_bits, max.upload_bits),
        (
            "limits.download",
            &mut limits.download_bits,
            max.download_bits,
        ),
    ];
    for (what, asked, most) in rates {
        *asked = bound(what, asked.map(Bits), most.map(Bits), &mut refuse).map(|bits| bits.0);
    }
}

/// What is asked, which stays below the maximum, else the maximum.
fn bound<T: Ord + Copy + fmt::Display>(
    what: &str,
    asked: Option<T>,
    most: Option<T>,
    refuse: &mut impl FnMut(&str, String, String),
) -> Option<T> {
    if let (Some(asked), Some(most)) = (asked, most)
        && asked > most
    {
        refuse(what, asked.to_string(), most.to_string());
    }
    asked.or(most)
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Millis(u64);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 % 1000 {
            0 => write!(f, "{}s", self.0 / 1000),
            _ => write!(f, "{}ms", self.0),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Bits(u64);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}bit", self.0)
    }
}

/// One line that had a say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Say {
    /// `file`, `operator` or `kiln`.
    pub by: &'static str,
    /// The file and line, unless it is kiln itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// What it says.
    pub says: String,
}

/// Whether a destination may be reached in a phase, and who decided.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Explanation {
    /// As asked, in lower case.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The phase.
    pub phase: String,
    /// The answer.
    pub allowed: bool,
    /// What it must speak, when allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Who said what, the decisive one last.
    pub said: Vec<Say>,
}

/// Why a destination is allowed or refused.
///
/// # Errors
/// When `host` can never be a destination: the text says why.
pub fn explain(
    compiled: &Compiled,
    grants: &Grants,
    tenant: &TenantName,
    phase: Phase,
    (host, port): (&str, u16),
) -> Result<Explanation, String> {
    // Says well what is wrong with an address or a name of kiln's own.
    AllowRule::new(host, &[port]).map_err(|error| error.to_string())?;
    let host = normal_host(host).ok_or_else(|| "that is not a host name".to_owned())?;
    let grant = grants.of(tenant);
    let mut answer = Explanation {
        phase: phase.name().to_owned(),
        allowed: false,
        protocol: None,
        said: Vec::new(),
        host,
        port,
    };
    match compiled.policy().network(phase) {
        PhaseNetwork::Isolated => answer.isolated(compiled, phase),
        network @ (PhaseNetwork::Open | PhaseNetwork::Learn) => {
            answer.open(compiled, phase, network.mode(), grants, &grant)
        }
        PhaseNetwork::Egress(_) => answer.egress(compiled, phase, grants, &grant),
    }
    answer.unless_refused(compiled, grants, tenant);
    Ok(answer)
}

/// Why a repository may be read through the git gateway, or not: its name is the explanation's host.
#[must_use]
pub fn explain_git(
    compiled: &Compiled,
    grants: &Grants,
    tenant: &TenantName,
    phase: Phase,
    repository: &Repository,
) -> Explanation {
    let grant = grants.of(tenant);
    let mut answer = Explanation {
        host: repository.to_string(),
        port: repository.port(),
        phase: phase.name().to_owned(),
        allowed: false,
        protocol: None,
        said: Vec::new(),
    };
    if !compiled.policy().git(phase).contains(repository) {
        let line = compiled.origin(phase).map_or(1, |origin| origin.place.line);
        let says = format!("`git` of the phase {phase} does not name it");
        answer.file_says(compiled, line, says);
        return answer;
    }
    let line = line_of_git(compiled, phase, repository);
    answer.file_says(
        compiled,
        line,
        "`git` names it: clone and fetch, never push".to_owned(),
    );
    let granted = grant.repository(repository);
    let wide = grant.git.is_none() && grant.hosts.is_none();
    let at = grants.file.as_ref().map(|file| match granted {
        _ if wide => file.clone(),
        Some((line, _)) => format!("{file}:{line}"),
        None => format!(
            "{file}:{}",
            grant.git_line.or(grant.hosts_line).unwrap_or(1)
        ),
    });
    let says = match granted {
        None => "no granted repository is this one".to_owned(),
        Some((_, None)) => "it is granted, without a credential".to_owned(),
        Some((_, Some(credential))) => format!(
            "it is granted; the host logs in as {} with the secret {}",
            credential.user, credential.secret
        ),
    };
    answer.allowed = granted.is_some();
    answer.protocol = answer.allowed.then_some(Protocol::Tls);
    answer.said.push(Say {
        by: "operator",
        at,
        says,
    });
    answer.unless_refused(compiled, grants, tenant);
    answer
}

impl Explanation {
    /// What is allowed by itself is reached by nobody where the whole file is refused.
    fn unless_refused(&mut self, compiled: &Compiled, grants: &Grants, tenant: &TenantName) {
        if !self.allowed {
            return;
        }
        let Err(refused) = effective(compiled, grants, tenant) else {
            return self.public_address();
        };
        self.allowed = false;
        self.protocol = None;
        let at = grants.file.clone();
        self.said.extend(refused.into_iter().map(|one| Say {
            by: "operator",
            at: at.clone(),
            says: format!("nothing runs with this file: {one}"),
        }));
    }

    fn public_address(&mut self) {
        self.said.push(Say {
            by: "kiln",
            at: None,
            says: "the address must be an ordinary public one, checked when it is dialled"
                .to_owned(),
        });
    }

    fn file_says(&mut self, compiled: &Compiled, line: u32, says: String) {
        let at = Some(format!("{}:{line}", compiled.file()));
        self.said.push(Say {
            by: "file",
            at,
            says,
        });
    }

    fn isolated(&mut self, compiled: &Compiled, phase: Phase) {
        match compiled.origin(phase) {
            Some(origin) => self.file_says(
                compiled,
                origin.place.line,
                format!("the phase {phase} reaches nothing"),
            ),
            None => self.said.push(Say {
                by: "kiln",
                at: None,
                says: format!(
                    "{} gives the phase {phase} no network, and none is inherited",
                    compiled.file()
                ),
            }),
        }
    }

    fn open(
        &mut self,
        compiled: &Compiled,
        phase: Phase,
        mode: &str,
        grants: &Grants,
        grant: &Grant,
    ) {
        let line = compiled.origin(phase).map_or(1, |origin| origin.place.line);
        self.file_says(compiled, line, format!("the phase {phase} is `{mode}`"));
        let (given, line) = match mode {
            "learn" => (grant.learn, grant.learn_line),
            _ => (grant.open, grant.open_line),
        };
        let at = grants.file.as_ref().map(|file| match line {
            Some(line) => format!("{file}:{line}"),
            None => file.clone(),
        });
        let says = match given {
            true => format!("`{mode}` is granted"),
            false => format!("`{mode}` is not granted"),
        };
        self.said.push(Say {
            by: "operator",
            at,
            says,
        });
        self.allowed = given;
        self.protocol = given.then(|| Protocol::of_port(self.port));
    }

    fn egress(&mut self, compiled: &Compiled, phase: Phase, grants: &Grants, grant: &Grant) {
        let effect = compiled.policy().network(phase).effect();
        let rule = match effect.decide(&self.host, self.port) {
            NameVerdict::Allowed(rule) => rule,
            NameVerdict::PortRefused => {
                let near = effect.rules().iter().find(|rule| rule.matches(&self.host));
                let line = near.map_or(1, |rule| line_of(compiled, phase, rule));
                let says = format!(
                    "{} is named, with other ports than {}",
                    self.host, self.port
                );
                return self.file_says(compiled, line, says);
            }
            NameVerdict::HostRefused => {
                let line = compiled.origin(phase).map_or(1, |origin| origin.place.line);
                let git = compiled.policy().git(phase).iter();
                let git = git.filter(|one| one.host() == self.host).count();
                let says = match git {
                    0 => format!("no entry of the phase {phase} names {}", self.host),
                    1 => format!(
                        "{} is served by the git gateway alone, 1 repository of it",
                        self.host
                    ),
                    count => format!(
                        "{} is served by the git gateway alone, {count} repositories of it",
                        self.host
                    ),
                };
                return self.file_says(compiled, line, says);
            }
        };
        self.file_says(
            compiled,
            line_of(compiled, phase, &rule),
            format!("{rule} allows it"),
        );
        let Some(hosts) = &grant.hosts else {
            self.allowed = true;
            self.protocol = rule.protocol();
            let at = grants.file.clone();
            let says = "any named host is granted".to_owned();
            return self.said.push(Say {
                by: "operator",
                at,
                says,
            });
        };
        let file = grants.file.as_deref().unwrap_or_default();
        let given = hosts.iter().find_map(|granted| {
            let both = granted.and(&rule)?;
            (both.matches(&self.host) && both.ports().contains(&self.port))
                .then_some((granted, both))
        });
        match given {
            Some((granted, both)) => {
                self.allowed = true;
                self.protocol = both.protocol();
                let at = Some(format!("{file}:{}", granted.line));
                let says = format!("{} is granted", granted.text());
                self.said.push(Say {
                    by: "operator",
                    at,
                    says,
                });
            }
            None => {
                let at = Some(format!("{file}:{}", grant.hosts_line.unwrap_or(1)));
                let says = format!("no granted host is {}:{}", self.host, self.port);
                self.said.push(Say {
                    by: "operator",
                    at,
                    says,
                });
            }
        }
    }
}
