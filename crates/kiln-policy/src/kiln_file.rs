//! `kiln.yaml`: how it is compiled. Its keys are in `kiln_keys`.

use std::collections::BTreeMap;

use kiln_core::AllowRule;
use kiln_core::access::{DISK_MIN, MEMORY_MIN, TIMEOUT_MIN_MS};
use kiln_core::network::Protocol;
use kiln_core::secret::Repository;

use crate::compiled::{Draft, Origin};
use crate::diagnostic::{Diagnostic, Place, shown};
use crate::policy::{
    Health, Limits, Phase, PhaseNetwork, PhasePolicy, Policy, Resources, SOURCE_NONE, Secret,
    SecretPlace, Service,
};
use crate::read::{Reader, Sited};
use crate::yaml::Node;

/// Compiles a checked `kiln.yaml`.
pub(crate) fn compile(root: &Node, reader: &mut Reader) -> Draft {
    let mut draft = Draft::default();
    let phases = phases(root, reader, &mut draft);
    let limits = root.get("limits");
    let limit = |name| limits.and_then(|limits| limits.get(name));
    let resources = root.get("resources");
    let resource = |name| resources.and_then(|resources| resources.get(name));
    draft.policy = Policy {
        image: reader.image(root.get("image")),
        no_source: root.get("source").and_then(Node::text) == Some(SOURCE_NONE),
        resources: Resources {
            cpus: reader.number(resource("cpus")),
            memory: reader.size_from(resource("memory"), MEMORY_MIN),
            timeout_ms: reader.time_ms_from(resource("timeout"), TIMEOUT_MIN_MS),
        },
        phases,
        secrets: Vec::new(),
        services: services(root, reader),
        limits: Limits {
            upload_bits: reader.rate_bits(limit("upload")),
            download_bits: reader.rate_bits(limit("download")),
            connections: reader.number(limit("connections")),
            disk: reader.size_from(limit("disk"), DISK_MIN),
            disk_rate: reader.size(limit("disk_rate")),
            processes: reader.number(limit("processes")),
            open_files: reader.number(limit("open_files")),
            output: reader.size(limit("output")),
        },
        artifacts: reader.paths(root.get("artifacts")),
    };
    draft.amounts_at([
        ("image", root.get("image")),
        ("resources.cpus", resource("cpus")),
        ("resources.memory", resource("memory")),
        ("resources.timeout", resource("timeout")),
        ("limits.upload", limit("upload")),
        ("limits.download", limit("download")),
        ("limits.connections", limit("connections")),
        ("limits.disk", limit("disk")),
        ("limits.processes", limit("processes")),
        ("limits.output", limit("output")),
    ]);
    draft.check_git(reader);
    draft.policy.secrets = secrets(root, reader, &draft);
    draft
}

fn phases(root: &Node, reader: &mut Reader, draft: &mut Draft) -> BTreeMap<Phase, PhasePolicy> {
    let mut phases = BTreeMap::new();
    let listed = root.get("phases");
    if let Some(network) = root.get("network") {
        if let Some(phases) = listed {
            let wrong = Diagnostic::at(
                network.place,
                "a file with `phases` has no `network` of its own: no phase would inherit it",
            );
            reader.refuse(
                wrong
                    .also(phases.place, "the phases")
                    .hint("move it into the phases that need it"),
            );
        }
        let (network, git) = draft.network(Phase::Run, network, reader);
        let policy = PhasePolicy {
            network,
            git,
            ..PhasePolicy::default()
        };
        phases.insert(Phase::Run, policy);
    }
    for (key, node) in listed.map(Node::entries).unwrap_or_default() {
        let Some(phase) = Phase::named(&key.name) else {
            continue;
        };
        let (network, git) = match node.get("network") {
            Some(network) => draft.network(phase, network, reader),
            None => {
                draft.origins.insert(
                    phase,
                    Origin {
                        place: key.place,
                        rules: Vec::new(),
                        git: Vec::new(),
                    },
                );
                (PhaseNetwork::Isolated, Vec::new())
            }
        };
        let policy = PhasePolicy {
            network,
            git,
            commands: reader.commands(node.get("commands")),
            key: reader.paths(node.get("key")),
        };
        phases.insert(phase, policy);
    }
    phases.retain(|_, policy| *policy != PhasePolicy::default());
    phases
}

impl Draft {
    fn network(
        &mut self,
        phase: Phase,
        node: &Node,
        reader: &mut Reader,
    ) -> (PhaseNetwork, Vec<Repository>) {
        let (network, rules) = reader.network(node);
        let git = reader.repositories(node.get("git"));
        let place = node.get("mode").map_or(node.place, |mode| mode.place);
        let mut repositories: Vec<Repository> =
            git.iter().map(|one| one.repository.clone()).collect();
        repositories.sort();
        repositories.dedup();
        self.origins.insert(phase, Origin { place, rules, git });
        (network, repositories)
    }

    /// The gateway reads what it was named, and writes nothing. A host that could be reached beside it would make that mean nothing: so
    /// none can, in whatever phase.
    fn check_git(&self, reader: &mut Reader) {
        let origins = || self.origins.values();
        for one in origins().flat_map(|origin| &origin.git) {
            let host = one.repository.host();
            let plain = origins().flat_map(|origin| &origin.rules);
            let Some(rule) = plain.into_iter().find(|sited| sited.rule.matches(host)) else {
                continue;
            };
            if reader
                .wrong
                .iter()
                .any(|wrong| wrong.place == Some(rule.place))
            {
                continue;
            }
            let message = format!(
                "{host} is served by the git gateway, so {} cannot be reached beside it",
                rule.rule
            );
            let hint = match rule.rule.is_wildcard() {
                true => "name the hosts below it that are needed, without this one",
                false => "remove it from `allow`, or the repository from `git`",
            };
            let wrong = Diagnostic::at(rule.place, message).also(one.place, "its repository");
            reader.refuse(wrong.hint(hint));
        }
    }
}

fn secrets(root: &Node, reader: &mut Reader, draft: &Draft) -> Vec<Secret> {
    let mut found: Vec<(Secret, Place)> = Vec::new();
    for node in root.get("secrets").map(Node::items).unwrap_or_default() {
        let Some(secret) = secret(node, reader) else {
            continue;
        };
        if let Some((_, first)) = found
            .iter()
            .find(|(other, _)| other.name == secret.name || other.place == secret.place)
        {
            let message = format!(
                "the secret {:?} is here twice, or its place is taken",
                shown(&secret.name)
            );
            reader.refuse(Diagnostic::at(node.place, message).also(*first, "first here"));
        }
        check_secret(&secret, node, reader, draft);
        check_phase(&secret, node, reader, &draft.policy);
        found.push((secret, node.place));
    }
    let mut secrets: Vec<Secret> = found.into_iter().map(|(secret, _)| secret).collect();
    secrets.sort_by(|a, b| a.name.cmp(&b.name));
    secrets
}

fn secret(node: &Node, reader: &mut Reader) -> Option<Secret> {
    let text = |name: &str| node.get(name).and_then(Node::text).map(str::to_owned);
    let place = match (text("env"), text("file")) {
        (Some(name), None) => {
            if !is_env_name(&name) {
                let place = node.get("env").map_or(node.place, |env| env.place);
                reader.refuse(Diagnostic::at(
                    place,
                    format!("{:?} is not the name of a variable", shown(&name)),
                ));
            }
            SecretPlace::Env(name)
        }
        (None, Some(path)) => {
            let good = path.starts_with('/')
                && path
                    .split('/')
                    .skip(1)
                    .all(|part| !matches!(part, "" | "." | ".."))
                && !path.chars().any(char::is_control);
            if !good {
                let place = node.get("file").map_or(node.place, |file| file.place);
                reader.refuse(Diagnostic::at(
                    place,
                    format!("{:?} is not an absolute path", shown(&path)),
                ));
            }
            SecretPlace::File(path)
        }
        (Some(_), Some(_)) | (None, None) => {
            let wrong = Diagnostic::at(
                node.place,
                "a secret is given as `env` or as `file`: exactly one of them",
            );
            reader.refuse(wrong.hint("write env: VARIABLE, or file: /run/secrets/NAME"));
            return None;
        }
    };
    let name = text("name")?;
    let plain = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if !plain {
        let at = node.get("name").map_or(node.place, |name| name.place);
        reader.refuse(
            Diagnostic::at(
                at,
                format!("{:?} is not the name of a secret", shown(&name)),
            )
            .hint("write letters, digits and . _ -"),
        );
    }
    let mut hosts: Vec<AllowRule> = match node.get("hosts") {
        Some(list) => reader
            .rules(list)
            .into_iter()
            .map(|sited| sited.rule)
            .collect(),
        None => Vec::new(),
    };
    hosts.sort();
    hosts.dedup();
    Some(Secret {
        name,
        place,
        phase: Phase::named(&text("phase")?)?,
        hosts,
    })
}

/// "Only for these hosts" holds only where nothing else can be reached, then and later.
fn check_secret(secret: &Secret, node: &Node, reader: &mut Reader, draft: &Draft) {
    for phase in Phase::ALL
        .into_iter()
        .filter(|phase| *phase >= secret.phase)
    {
        let Some(policy) = draft.policy.phases.get(&phase) else {
            continue;
        };
        let origin = draft.origins.get(&phase);
        let beyond = match &policy.network {
            PhaseNetwork::Isolated => continue,
            PhaseNetwork::Open | PhaseNetwork::Learn => origin.map(|origin| {
                (
                    origin.place,
                    format!("its network is {}", policy.network.mode()),
                )
            }),
            PhaseNetwork::Egress(_) => {
                origin.and_then(|origin| first_beyond(origin, &secret.hosts))
            }
        };
        let Some((place, why)) = beyond else {
            continue;
        };
        let message = match phase == secret.phase {
            true => format!(
                "the secret {:?} is for its hosts alone, but the phase {phase} reaches more: {why}",
                shown(&secret.name)
            ),
            false => format!(
                "the secret {:?} is in the machine since the phase {}, and the phase {phase} reaches more than its hosts: {why}",
                shown(&secret.name),
                secret.phase
            ),
        };
        let hint = "add the destination to the secret's `hosts`, or take it out of the phase: what can be reached can be told the secret";
        reader.refuse(
            Diagnostic::at(node.place, message)
                .also(place, "reached here")
                .hint(hint),
        );
        return;
    }
}

/// A secret that its phase cannot use would be asked of its owner and given to nobody. What `dependencies` has is a build's, too, which has no
/// commands: a run refuses it there, when it is named.
fn check_phase(secret: &Secret, node: &Node, reader: &mut Reader, policy: &Policy) {
    let phase = secret.phase;
    let part = policy.phases.get(&phase);
    let does = part.is_some_and(|part| !part.commands.is_empty())
        || (phase == Phase::Services && !policy.services.is_empty());
    if does || matches!(phase, Phase::Run | Phase::Dependencies) {
        return;
    }
    let place = node.get("phase").map_or(node.place, |phase| phase.place);
    let message = format!(
        "nothing would get the secret {:?}: the phase {phase} has no commands",
        shown(&secret.name)
    );
    let hint = match phase {
        Phase::Services => {
            "give the phase commands or the file `services`, or name the phase that uses it"
        }
        _ => "give the phase commands, or name the phase that uses it",
    };
    reader.refuse(Diagnostic::at(place, message).hint(hint));
}

fn first_beyond(origin: &Origin, hosts: &[AllowRule]) -> Option<(Place, String)> {
    // What git asks a server is bytes of the machine's own as well.
    let git = origin.git.iter().filter_map(|one| {
        let rule = AllowRule::new(one.repository.host(), &[one.repository.port()]).ok()?;
        let rule = rule.with_protocol(Protocol::Tls);
        Some(Sited {
            rule,
            place: one.place,
        })
    });
    let all = origin.rules.iter().cloned().chain(git);
    let mut beyond = all.filter(|sited| !hosts.iter().any(|host| host.covers(&sited.rule)));
    beyond
        .next()
        .map(|sited| (sited.place, format!("{} is not among them", sited.rule)))
}

fn services(root: &Node, reader: &mut Reader) -> BTreeMap<String, Service> {
    let mut services = BTreeMap::new();
    for (key, node) in root.get("services").map(Node::entries).unwrap_or_default() {
        let name = &key.name;
        let plain = !name.is_empty()
            && name.len() <= 63
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !plain || name == "localhost" {
            let wrong = Diagnostic::at(
                key.place,
                format!("{:?} cannot be the name of a service", shown(name)),
            );
            reader.refuse(
                wrong.hint(
                    "write lower-case letters, digits and -: it is a host name in the machine",
                ),
            );
        }
        let mut env = BTreeMap::new();
        for (key, value) in node.get("env").map(Node::entries).unwrap_or_default() {
            if !is_env_name(&key.name) {
                reader.refuse(Diagnostic::at(
                    key.place,
                    format!("{:?} is not the name of a variable", shown(&key.name)),
                ));
            }
            env.insert(
                key.name.clone(),
                value.text().unwrap_or_default().to_owned(),
            );
        }
        let health = health(node.get("health"), reader);
        let ready_ms = reader.time_ms(node.get("health").and_then(|health| health.get("timeout")));
        let image = reader.pinned(node.get("image"));
        let port = reader.number(node.get("port"));
        if let (Some(image), Some(port)) = (image, port) {
            services.insert(
                name.clone(),
                Service {
                    image,
                    port,
                    env,
                    health,
                    ready_ms,
                },
            );
        }
    }
    services
}

fn health(node: Option<&Node>, reader: &mut Reader) -> Health {
    let Some(node) = node else {
        return Health::Port;
    };
    let http = node.get("http").and_then(Node::text);
    let command = node
        .get("command")
        .and_then(|command| reader.command(command));
    match (http, command) {
        (Some(_), Some(_)) => {
            reader.refuse(Diagnostic::at(
                node.place,
                "a health check is `http` or `command`, not both",
            ));
            Health::Port
        }
        (Some(path), None) => {
            if !path.starts_with('/') || path.chars().any(|c| c.is_whitespace() || c.is_control()) {
                reader.refuse(Diagnostic::at(
                    node.place,
                    format!("{:?} is not the path of a request", shown(path)),
                ));
            }
            Health::Http(path.to_owned())
        }
        (None, Some(command)) => Health::Command(command),
        (None, None) => Health::Port,
    }
}

fn is_env_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
