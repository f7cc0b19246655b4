//! The keys of `kiln.yaml`: what may stand where, as data. The compiler is `kiln_file`.

use kiln_core::git_gateway::REPOSITORIES_MAX;
use kiln_core::secret::REPOSITORY_MAX;

use crate::policy::SOURCE_NONE;
use crate::shape::{Field, Shape};

/// Most destinations of one list.
pub const RULES_MAX: usize = 500;
/// Most commands of one phase.
const COMMANDS_MAX: usize = 100;
/// Most secrets, services, artifacts or key files.
const ENTRIES_MAX: usize = 64;

const SIZE: Shape = Shape::Text {
    what: "a size such as 512M",
    pattern: "^[0-9]+ ?([kKmMgGtT]([iI]?[bB])?|[bB])?$",
    len_max: 24,
    unit: Some("G"),
};
const TIME: Shape = Shape::Text {
    what: "a time such as 10m",
    pattern: "^[0-9]+(ms|s|m|h)$",
    len_max: 24,
    unit: Some("s"),
};
const RATE: Shape = Shape::Text {
    what: "a rate such as 10Mbit",
    pattern: "^[0-9]+(k|M|G)?bit$",
    len_max: 24,
    unit: Some("Mbit"),
};
const DESTINATION: Shape = Shape::Text {
    what: "a destination host[:port[/tls|http|raw]]",
    pattern: "^(\\*\\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?(:[0-9]{1,5}(/(tls|http|raw))?)?$",
    len_max: 300,
    unit: None,
};
const DESTINATIONS: Shape = Shape::List {
    of: &DESTINATION,
    least: 0,
    most: RULES_MAX,
};
const REPOSITORIES: Shape = Shape::List {
    of: &Shape::Text {
        what: "a repository host[:port]/path",
        pattern: "^(https://)?[A-Za-z0-9_.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._+~-]+)+/?$",
        len_max: REPOSITORY_MAX,
        unit: None,
    },
    least: 0,
    most: REPOSITORIES_MAX,
};
const IMAGE: Shape = Shape::Text {
    what: "an image by digest, or a runtime's name",
    pattern: "^([a-z][a-z0-9.-]*|.+@sha256:[0-9a-f]{64})$",
    len_max: 500,
    unit: None,
};
const PINNED: Shape = Shape::Text {
    what: "an image by digest",
    pattern: "^.+@sha256:[0-9a-f]{64}$",
    len_max: 500,
    unit: None,
};
const PATHS: Shape = Shape::List {
    of: &Shape::Text {
        what: "a path",
        pattern: "^[A-Za-z0-9._+@=,~/*?-]+$",
        len_max: 200,
        unit: None,
    },
    least: 0,
    most: ENTRIES_MAX,
};
const COMMAND: Shape = Shape::Either(
    &Shape::Text {
        what: "a line for the shell",
        pattern: "\\S",
        len_max: 8_000,
        unit: None,
    },
    &Shape::List {
        of: &Shape::Text {
            what: "a word",
            pattern: "",
            len_max: 8_000,
            unit: None,
        },
        least: 1,
        most: 200,
    },
);
const MODES: Shape = Shape::Word(&[
    ("isolated", "nothing but kiln's own services"),
    (
        "egress",
        "the destinations in `allow`, the repositories in `git`, and nothing else",
    ),
    (
        "open",
        "every name above the floor of addresses; needs the operator's grant",
    ),
    (
        "learn",
        "as open, and what is reached is written down; needs the operator's grant",
    ),
]);
const PHASE_NAMES: Shape = Shape::Word(&[
    ("checkout", "the source is fetched"),
    ("dependencies", "what the project needs is installed"),
    ("services", "services of the job are started"),
    ("run", "the job's own command"),
]);
const NETWORK: Shape = Shape::Fields(&[
    Field::optional(
        "mode",
        "What may be reached. Without it: egress when `allow` or `git` has entries, else isolated.",
        MODES,
    ),
    Field::optional(
        "allow",
        "Destinations host[:port[/tls|http|raw]]. Without a port: 443 and 80. Without a protocol: tls on 443, http on 80, raw elsewhere. `*.host` is every name below host, never host itself.",
        DESTINATIONS,
    ),
    Field::optional(
        "git",
        "Repositories host[:port]/path that git may clone and fetch over https, with the operator's credential where there is one; never push. Their hosts cannot stand in `allow`.",
        REPOSITORIES,
    ),
]);
const PHASE: Shape = Shape::Fields(&[
    Field::optional(
        "network",
        "What this phase may reach. Without it: nothing.",
        NETWORK,
    ),
    Field::optional(
        "commands",
        "What the phase does, in order: a line for the shell, or a list of words.",
        Shape::List {
            of: &COMMAND,
            least: 0,
            most: COMMANDS_MAX,
        },
    ),
    Field::optional(
        "key",
        "Files that the phase's result depends on: a part of the hash. No result of a phase is used again today.",
        PATHS,
    ),
]);
const SERVICE: Shape = Shape::Fields(&[
    Field::required("image", "Its image, by digest.", PINNED),
    Field::required(
        "port",
        "The port it serves.",
        Shape::Integer {
            least: 1,
            most: 65_535,
        },
    ),
    Field::optional(
        "env",
        "Its environment.",
        Shape::Named {
            pattern: ENV_NAME,
            of: &Shape::Text {
                what: "a value",
                pattern: "",
                len_max: 8_000,
                unit: None,
            },
            most: ENTRIES_MAX,
        },
    ),
    Field::optional(
        "health",
        "How it tells that it is ready. Without it: its port accepts connections.",
        Shape::Fields(&[
            Field::optional(
                "http",
                "A path that answers a GET with success.",
                Shape::Text {
                    what: "a path",
                    pattern: "^/",
                    len_max: 500,
                    unit: None,
                },
            ),
            Field::optional(
                "command",
                "A command in its container that succeeds.",
                COMMAND,
            ),
            Field::optional("timeout", "How long it may take.", TIME),
        ]),
    ),
]);
const ENV_NAME: &str = "^[A-Za-z_][A-Za-z0-9_]*$";
const NAME: &str = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$";
const SECRET: Shape = Shape::Fields(&[
    Field::required(
        "name",
        "Its name in the secret store.",
        Shape::Text {
            what: "a name",
            pattern: "^[A-Za-z0-9][A-Za-z0-9._-]*$",
            len_max: 64,
            unit: None,
        },
    ),
    Field::optional(
        "env",
        "The environment variable that holds it; or `file`.",
        Shape::Text {
            what: "the name of a variable",
            pattern: ENV_NAME,
            len_max: 200,
            unit: None,
        },
    ),
    Field::optional(
        "file",
        "The file in memory that holds it; or `env`.",
        Shape::Text {
            what: "an absolute path",
            pattern: "^/",
            len_max: 200,
            unit: None,
        },
    ),
    Field::required("phase", "The only phase that gets it.", PHASE_NAMES),
    Field::required(
        "hosts",
        "The hosts it is for: its phase may reach nothing else.",
        DESTINATIONS,
    ),
]);

/// The keys of `kiln.yaml`.
pub(crate) const FILE: Shape = Shape::Fields(&[
    Field::required(
        "version",
        "The version of this format: 1.",
        Shape::Integer { least: 1, most: 1 },
    ),
    Field::optional(
        "image",
        "What the job runs in: a runtime's name, or an image by digest. Without it: the base that fits the runtime of the folder, else the machine image itself.",
        IMAGE,
    ),
    Field::optional(
        "source",
        "Whether the project's folder is copied into the machine of a run. Without it: folder.",
        Shape::Word(&[
            ("folder", "the folder is copied in, as `kiln run` does"),
            (SOURCE_NONE, "nothing is copied in"),
        ]),
    ),
    Field::optional(
        "resources",
        "What the machine may use.",
        Shape::Fields(&[
            Field::optional(
                "cpus",
                "Virtual CPUs.",
                Shape::Integer {
                    least: 1,
                    most: 1024,
                },
            ),
            Field::optional("memory", "Memory, for example 2G.", SIZE),
            Field::optional("timeout", "Wall time, for example 10m.", TIME),
        ]),
    ),
    Field::optional(
        "network",
        "What the run phase may reach, in a file without `phases`.",
        NETWORK,
    ),
    Field::optional(
        "phases",
        "Phases with a network of their own; what is not said here is not reached.",
        Shape::Fields(&[
            Field::optional("checkout", "The source is fetched.", PHASE),
            Field::optional(
                "dependencies",
                "What the project needs is installed.",
                PHASE,
            ),
            Field::optional("services", "Services of the job are started.", PHASE),
            Field::optional(
                "run",
                "The job's own command; `commands` run before it.",
                PHASE,
            ),
        ]),
    ),
    Field::optional(
        "secrets",
        "Secrets by name: values are never in this file.",
        Shape::List {
            of: &SECRET,
            least: 0,
            most: ENTRIES_MAX,
        },
    ),
    Field::optional(
        "services",
        "What runs beside the command, reachable by its name.",
        Shape::Named {
            pattern: NAME,
            of: &SERVICE,
            most: ENTRIES_MAX,
        },
    ),
    Field::optional(
        "limits",
        "What the machine may do.",
        Shape::Fields(&[
            Field::optional("upload", "Bits per second from the machine.", RATE),
            Field::optional("download", "Bits per second to the machine.", RATE),
            Field::optional(
                "connections",
                "Connections at once.",
                Shape::Integer {
                    least: 1,
                    most: 65_535,
                },
            ),
            Field::optional("disk", "Size of its disk.", SIZE),
            Field::optional(
                "disk_rate",
                "Bytes per second that it reads and writes on the disks it may write, together.",
                SIZE,
            ),
            Field::optional(
                "processes",
                "Processes at once.",
                Shape::Integer {
                    least: 1,
                    most: 4_194_304,
                },
            ),
            Field::optional(
                "open_files",
                "Files that one process has open at once.",
                Shape::Integer {
                    least: 64,
                    most: 1_048_576,
                },
            ),
            Field::optional("output", "Bytes of output.", SIZE),
        ]),
    ),
    Field::optional(
        "artifacts",
        "Files that are kept: paths and patterns, relative to the working directory.",
        PATHS,
    ),
]);
