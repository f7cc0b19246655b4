//! `cleanroom.yaml`, version 1: a format of another tool, read by its own keys and compiled to the same policy.
//!
//! What it means there holds here: everything is denied but the listed hosts and ports, in every phase alike. kiln is stricter in one way:
//! a destination on port 443 must be TLS to that name, one on port 80 HTTP to it. What kiln has no counterpart for is refused, not dropped.

use kiln_core::access::{DISK_MIN, MEMORY_MIN};
use kiln_core::{AllowRule, ByteSize};

use crate::compiled::{Draft, Origin};
use crate::diagnostic::{Diagnostic, Place, shown};
use crate::kiln_keys::RULES_MAX;
use crate::policy::{Command, Image, Phase, PhaseNetwork, PhasePolicy};
use crate::read::{Reader, Sited};
use crate::shape::{Field, Shape};
use crate::yaml::{Node, ScalarKind, Value};

const TEXT: Shape = Shape::Text {
    what: "a text",
    pattern: "",
    len_max: 8_000,
    unit: None,
};
const WORDS: Shape = Shape::List {
    of: &TEXT,
    least: 0,
    most: 200,
};
const SCRIPT_OR_WORDS: Shape = Shape::Either(&TEXT, &WORDS);
const ALLOW: Shape = Shape::Either(
    &Shape::Text {
        what: "host:port",
        pattern: "^[^:]+:[0-9]{1,5}$",
        len_max: 300,
        unit: None,
    },
    &Shape::Fields(&[
        Field::required(
            "host",
            "A host name; `*.host` is every name below it.",
            Shape::Text {
                what: "a host name",
                pattern: "^(\\*\\.)?[A-Za-z0-9_.-]+$",
                len_max: 300,
                unit: None,
            },
        ),
        Field::required(
            "ports",
            "Its ports.",
            Shape::List {
                of: &Shape::Integer {
                    least: 1,
                    most: 65_535,
                },
                least: 1,
                most: 16,
            },
        ),
    ]),
);

/// The keys of `cleanroom.yaml`.
pub(crate) const FILE: Shape = Shape::Fields(&[
    Field::required(
        "version",
        "The version of the format: 1.",
        Shape::Integer { least: 1, most: 1 },
    ),
    Field::optional(
        "repository",
        "Where the source lies.",
        Shape::Fields(&[
            Field::optional(
                "enabled",
                "Whether the repository is in the sandbox.",
                Shape::Flag,
            ),
            Field::optional(
                "mode",
                "current-repo or none.",
                Shape::Word(&[
                    ("current-repo", "the repository of the folder"),
                    ("none", "no repository"),
                ]),
            ),
            Field::optional("remote", "Its remote.", TEXT),
            Field::optional("path", "Where it lies in the machine: /work.", TEXT),
            Field::optional("submodules", "Whether submodules are fetched.", Shape::Flag),
        ]),
    ),
    Field::required(
        "sandbox",
        "The sandbox.",
        Shape::Fields(&[
            Field::required(
                "image",
                "Its image.",
                Shape::Fields(&[Field::required(
                    "ref",
                    "The image by digest.",
                    Shape::Text {
                        what: "an image by digest",
                        pattern: "^.+@sha256:[0-9a-f]{64}$",
                        len_max: 500,
                        unit: None,
                    },
                )]),
            ),
            Field::optional(
                "network",
                "What it may reach.",
                Shape::Fields(&[
                    Field::optional(
                        "default",
                        "It must be deny.",
                        Shape::Word(&[("deny", "nothing but the list")]),
                    ),
                    Field::optional(
                        "allow",
                        "The list.",
                        Shape::List {
                            of: &ALLOW,
                            least: 0,
                            most: RULES_MAX,
                        },
                    ),
                ]),
            ),
            Field::optional(
                "resources",
                "What the machine may use.",
                Shape::Fields(&[
                    Field::optional(
                        "vcpus",
                        "Virtual CPUs.",
                        Shape::Integer {
                            least: 1,
                            most: 1024,
                        },
                    ),
                    Field::optional(
                        "memory",
                        "Memory.",
                        Shape::Either(
                            &TEXT,
                            &Shape::Integer {
                                least: 1,
                                most: 1 << 50,
                            },
                        ),
                    ),
                    Field::optional(
                        "disk",
                        "Disk.",
                        Shape::Either(
                            &TEXT,
                            &Shape::Integer {
                                least: 1,
                                most: 1 << 60,
                            },
                        ),
                    ),
                ]),
            ),
            Field::optional(
                "dependencies",
                "What installs the project's dependencies.",
                Shape::Fields(&[
                    Field::optional("command", "A program and its arguments.", WORDS),
                    Field::optional(
                        "key",
                        "What the result depends on: a part of the hash. No result is used again today.",
                        Shape::Fields(&[Field::optional(
                            "files",
                            "Files by their content.",
                            WORDS,
                        )]),
                    ),
                    Field::optional(
                        "reuse",
                        "How far.",
                        Shape::Word(&[
                            ("exact", "only where every key is the same"),
                            ("portable", "elsewhere, too"),
                        ]),
                    ),
                ]),
            ),
            Field::optional(
                "services",
                "Services.",
                Shape::Fields(&[
                    Field::optional(
                        "docker",
                        "A Docker daemon.",
                        Shape::Fields(&[Field::optional(
                            "required",
                            "Whether one is needed.",
                            Shape::Flag,
                        )]),
                    ),
                    Field::optional("command", "What starts them.", SCRIPT_OR_WORDS),
                ]),
            ),
            Field::optional(
                "run",
                "The job's own command.",
                Shape::Fields(&[Field::optional(
                    "before",
                    "A line for the shell that runs before it.",
                    TEXT,
                )]),
            ),
        ]),
    ),
]);

/// Compiles a checked `cleanroom.yaml`.
pub(crate) fn compile(root: &Node, reader: &mut Reader) -> Draft {
    let mut draft = Draft::default();
    refuse_what_has_no_counterpart(root, reader);
    let Some(sandbox) = root.get("sandbox") else {
        return draft;
    };
    let image = sandbox.get("image").and_then(|image| image.get("ref"));
    draft.policy.image = reader.pinned(image).map(Image::Pinned);
    let resource = |name| sandbox.get("resources").and_then(|r| r.get(name));
    draft.policy.resources.cpus = reader.number(resource("vcpus"));
    draft.policy.resources.memory = size(resource("memory"), MEMORY_MIN, reader);
    draft.policy.limits.disk = size(resource("disk"), DISK_MIN, reader);
    draft.policy.no_source = has_no_repository(root);
    draft.amounts_at([
        ("image", image),
        ("resources.cpus", resource("vcpus")),
        ("resources.memory", resource("memory")),
        ("limits.disk", resource("disk")),
    ]);
    let network = sandbox.get("network");
    let allow = network.and_then(|network| network.get("allow"));
    let rules = allow.map(|list| rules(list, reader)).unwrap_or_default();
    let place = network.map_or(sandbox.place, |network| network.place);
    let dependencies = sandbox.get("dependencies");
    let before = sandbox.get("run").and_then(|run| run.get("before"));
    let services = sandbox
        .get("services")
        .and_then(|services| services.get("command"));
    let mut phase = |phase: Phase, commands: Vec<Command>, key: Vec<String>| {
        let origin = Origin {
            place,
            rules: rules.clone(),
            git: Vec::new(),
        };
        draft.origins.insert(phase, origin);
        let policy = PhasePolicy {
            network: of_rules(&rules),
            git: Vec::new(),
            commands,
            key,
        };
        if policy != PhasePolicy::default() {
            draft.policy.phases.insert(phase, policy);
        }
    };
    if let Some(command) = dependencies
        .and_then(|d| d.get("command"))
        .filter(|c| !c.items().is_empty())
    {
        let files = dependencies
            .and_then(|d| d.get("key"))
            .and_then(|key| key.get("files"));
        let key = reader.paths(files);
        phase(
            Phase::Dependencies,
            reader.command(command).into_iter().collect(),
            key,
        );
    }
    if let Some(command) = services {
        phase(Phase::Services, script(command, reader), Vec::new());
    }
    phase(
        Phase::Run,
        before.map(|node| script(node, reader)).unwrap_or_default(),
        Vec::new(),
    );
    draft
}

fn of_rules(rules: &[Sited]) -> PhaseNetwork {
    let mut allow: Vec<AllowRule> = rules.iter().map(|sited| sited.rule.clone()).collect();
    allow.sort();
    allow.dedup();
    match allow.is_empty() {
        true => PhaseNetwork::Isolated,
        false => PhaseNetwork::Egress(allow),
    }
}

/// A text there is a script of a login shell.
fn script(node: &Node, reader: &mut Reader) -> Vec<Command> {
    match reader.command(node) {
        Some(Command::Shell(line)) => vec![Command::Words(vec![
            "sh".to_owned(),
            "-lc".to_owned(),
            line,
        ])],
        other => other.into_iter().collect(),
    }
}

/// Mebibytes as a number, or a text with a unit.
fn size(node: Option<&Node>, least: ByteSize, reader: &mut Reader) -> Option<ByteSize> {
    match node?.scalar_kind()? {
        ScalarKind::Integer(_) => {
            let place = node?.place;
            reader.refuse(
                Diagnostic::at(place, "a size without a unit")
                    .hint("write its unit, for example 2G"),
            );
            None
        }
        _ => reader.size_from(node, least),
    }
}

fn rules(list: &Node, reader: &mut Reader) -> Vec<Sited> {
    let mut found = Vec::new();
    for item in list.items() {
        let place = item.place;
        let texts: Vec<(Place, String)> = match &item.value {
            Value::Scalar { text, .. } => vec![(place, text.clone())],
            _ => {
                let host = item.get("host").and_then(Node::text).unwrap_or_default();
                let ports = item.get("ports").map(Node::items).unwrap_or_default();
                let port =
                    |port: &Node| (place, format!("{host}:{}", port.text().unwrap_or_default()));
                ports.iter().map(port).collect()
            }
        };
        for (place, text) in texts {
            let (host, port) = text.rsplit_once(':').unwrap_or((&text, ""));
            let parsed: Result<AllowRule, String> = match port.parse::<u16>() {
                Ok(port) => {
                    AllowRule::of_pattern(host.trim(), &[port]).map_err(|error| error.to_string())
                }
                Err(_) => Err(format!("{:?} is not host:port", shown(&text))),
            };
            match parsed {
                Ok(rule) => found.extend(rule.spelled_out().map(|rule| Sited { rule, place })),
                Err(error) => reader.refuse(Diagnostic::at(place, error)),
            }
        }
    }
    // Here, the same destination twice and a host below a wildcard are legal: what is listed is a set.
    found
}

/// No repository is in the sandbox.
fn has_no_repository(root: &Node) -> bool {
    let said = |name| root.get("repository").and_then(|said| said.get(name));
    said("mode").and_then(Node::text) == Some("none")
        || said("enabled").and_then(Node::scalar_kind) == Some(ScalarKind::Flag(false))
}

fn refuse_what_has_no_counterpart(root: &Node, reader: &mut Reader) {
    let flag =
        |node: Option<&Node>| node.and_then(Node::scalar_kind) == Some(ScalarKind::Flag(true));
    let sandbox = root.get("sandbox");
    let docker = sandbox
        .and_then(|s| s.get("services"))
        .and_then(|s| s.get("docker"));
    if let Some(docker) = docker.filter(|docker| flag(docker.get("required"))) {
        let wrong = Diagnostic::at(docker.place, "kiln has no Docker daemon for a run");
        reader.refuse(wrong.hint("name what it would run in `services` of a kiln.yaml"));
    }
    let dependencies = sandbox.and_then(|s| s.get("dependencies"));
    let reuse = dependencies.and_then(|d| d.get("reuse"));
    if let Some(reuse) = reuse.filter(|reuse| reuse.text() == Some("portable")) {
        let wrong = Diagnostic::at(reuse.place, "kiln takes no phase's result to another host");
        reader.refuse(wrong.hint("write reuse: exact, or leave it out"));
    }
    let Some(repository) = root.get("repository").filter(|_| !has_no_repository(root)) else {
        return;
    };
    for (name, usual, hint) in [
        ("remote", "origin", "leave it out"),
        (
            "path",
            "/work",
            "leave it out: the folder lies at /work, and every command begins in it, so name files relative to it",
        ),
    ] {
        if let Some(node) = repository
            .get(name)
            .filter(|node| node.text() != Some(usual))
        {
            let wrong = Diagnostic::at(
                node.place,
                format!("kiln has no other `{name}` than {usual}"),
            );
            reader.refuse(wrong.hint(hint));
        }
    }
    if let Some(node) = repository.get("submodules").filter(|node| flag(Some(node))) {
        reader.refuse(Diagnostic::at(
            node.place,
            "kiln does not fetch submodules for a run",
        ));
    }
}
