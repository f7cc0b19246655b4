//! A compiled policy: what a file means, without its layout, comments and order. Never changed once compiled.
//!
//! The canonical form is a policy file itself, written as JSON: keys sorted by their bytes, no spaces, lists that are sets sorted, sizes in
//! bytes, times in milliseconds written with their unit, what is not said left out. Its SHA-256 is the policy's hash. Compiling the
//! canonical form gives the same policy and so the same hash.

use std::collections::BTreeMap;
use std::fmt;

use kiln_core::secret::Repository;
use kiln_core::{AllowRule, ByteSize, Digest, ImageRef, NetworkPolicy};
use serde_json::{Map, Value, json};

/// What `source` says where nothing of the folder is copied in.
pub(crate) const SOURCE_NONE: &str = "none";

/// A part of a job's life that the host drives, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// The source is fetched.
    Checkout,
    /// What the project needs is installed.
    Dependencies,
    /// Services of the job are started.
    Services,
    /// The job's own command.
    Run,
}

impl Phase {
    /// All, in order.
    pub const ALL: [Self; 4] = [
        Self::Checkout,
        Self::Dependencies,
        Self::Services,
        Self::Run,
    ];

    /// The word for it in a file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Checkout => "checkout",
            Self::Dependencies => "dependencies",
            Self::Services => "services",
            Self::Run => "run",
        }
    }

    /// The phase of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == name)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a job runs in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Image {
    /// The base of a runtime, by its name.
    Runtime(String),
    /// An image, by digest.
    Pinned(ImageRef),
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runtime(name) => f.write_str(name),
            Self::Pinned(image) => image.fmt(f),
        }
    }
}

/// What a phase may reach.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum PhaseNetwork {
    /// Nothing.
    #[default]
    Isolated,
    /// These and nothing else; each rule has one port and a protocol. None at all in a phase that reads repositories alone.
    Egress(Vec<AllowRule>),
    /// Every name above the floor of addresses.
    Open,
    /// As open, while what is reached is written down.
    Learn,
}

impl PhaseNetwork {
    /// The word for it in a file.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Egress(_) => "egress",
            Self::Open => "open",
            Self::Learn => "learn",
        }
    }

    /// The rules, empty unless the mode is egress.
    #[must_use]
    pub fn rules(&self) -> &[AllowRule] {
        match self {
            Self::Egress(rules) => rules,
            _ => &[],
        }
    }

    /// As a gateway applies it.
    #[must_use]
    pub fn effect(&self) -> NetworkPolicy {
        match self {
            Self::Isolated => NetworkPolicy::Isolated,
            Self::Egress(rules) => NetworkPolicy::from_rules(rules.iter().cloned()),
            Self::Open | Self::Learn => NetworkPolicy::Open,
        }
    }
}

/// A command of a phase.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// A line for the shell.
    Shell(String),
    /// A program and its arguments.
    Words(Vec<String>),
}

/// One phase.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PhasePolicy {
    /// What it may reach.
    pub network: PhaseNetwork,
    /// Repositories that it reads through the git gateway, sorted.
    pub git: Vec<Repository>,
    /// What it does, in order.
    pub commands: Vec<Command>,
    /// Files that its result depends on. A part of what the file means, and so of its hash; no result of a phase is used again today.
    pub key: Vec<String>,
}

/// What a machine may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Resources {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// Wall time in milliseconds.
    pub timeout_ms: Option<u64>,
}

/// What a job may do to its surroundings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Bits per second from the machine.
    pub upload_bits: Option<u64>,
    /// Bits per second to the machine.
    pub download_bits: Option<u64>,
    /// Connections at once.
    pub connections: Option<u32>,
    /// Size of its disk.
    pub disk: Option<ByteSize>,
    /// Bytes per second, read and written, of the disks that it may write, together.
    pub disk_rate: Option<ByteSize>,
    /// Processes at once.
    pub processes: Option<u32>,
    /// Files that one process has open at once.
    pub open_files: Option<u32>,
    /// Bytes of output.
    pub output: Option<ByteSize>,
}

/// How a secret's value reaches the phase.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SecretPlace {
    /// As this environment variable.
    Env(String),
    /// As this file in memory.
    File(String),
}

/// A secret by name; values are never in a policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Secret {
    /// Its name in the secret store.
    pub name: String,
    /// How it is given.
    pub place: SecretPlace,
    /// The only phase that gets it.
    pub phase: Phase,
    /// All that this phase may reach, sorted.
    pub hosts: Vec<AllowRule>,
}

/// How a service tells that it is ready.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Health {
    /// Its port accepts connections.
    Port,
    /// A GET of this path answers with success.
    Http(String),
    /// This command succeeds.
    Command(Command),
}

/// Something that runs beside the command, reachable by its name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Its image, by digest.
    pub image: ImageRef,
    /// Its port.
    pub port: u16,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// How it is ready.
    pub health: Health,
    /// How long it may take to be ready, milliseconds.
    pub ready_ms: Option<u64>,
}

/// What a file means.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// What the job runs in; none means the base that fits the runtime of the folder, else the machine image itself.
    pub image: Option<Image>,
    /// Nothing of the project's folder is in the machine.
    pub no_source: bool,
    /// What it may use.
    pub resources: Resources,
    /// Its phases; one that is not here has no network and no commands.
    pub phases: BTreeMap<Phase, PhasePolicy>,
    /// Secrets by name, sorted.
    pub secrets: Vec<Secret>,
    /// Services by name.
    pub services: BTreeMap<String, Service>,
    /// What it may do.
    pub limits: Limits,
    /// Files that are kept, sorted.
    pub artifacts: Vec<String>,
}

impl Policy {
    /// What a phase may reach.
    #[must_use]
    pub fn network(&self, phase: Phase) -> &PhaseNetwork {
        const NONE: &PhaseNetwork = &PhaseNetwork::Isolated;
        self.phases.get(&phase).map_or(NONE, |phase| &phase.network)
    }

    /// Repositories that a phase reads through the git gateway.
    #[must_use]
    pub fn git(&self, phase: Phase) -> &[Repository] {
        self.phases.get(&phase).map_or(&[], |phase| &phase.git)
    }

    /// SHA-256 of the canonical form.
    #[must_use]
    pub fn hash(&self) -> Digest {
        Digest::of(self.canonical().as_bytes())
    }

    /// The canonical form: see the module.
    #[must_use]
    pub fn canonical(&self) -> String {
        sorted(self.as_file()).to_string()
    }

    /// As a policy file, in a reader's order.
    #[must_use]
    pub fn as_file(&self) -> Value {
        let mut file = Map::new();
        file.insert("version".to_owned(), json!(1));
        put(
            &mut file,
            "image",
            self.image.as_ref().map(|image| json!(image.to_string())),
        );
        put(
            &mut file,
            "source",
            self.no_source.then(|| json!(SOURCE_NONE)),
        );
        put(&mut file, "resources", self.resources.json());
        let phases: Map<String, Value> = self
            .phases
            .iter()
            .map(|(phase, policy)| (phase.name().to_owned(), policy.json()))
            .collect();
        put(&mut file, "phases", filled(phases));
        let secrets: Vec<Value> = self.secrets.iter().map(Secret::json).collect();
        put(&mut file, "secrets", list(secrets));
        let services: Map<String, Value> = self
            .services
            .iter()
            .map(|(name, service)| (name.clone(), service.json()))
            .collect();
        put(&mut file, "services", filled(services));
        put(&mut file, "limits", self.limits.json());
        put(
            &mut file,
            "artifacts",
            list(self.artifacts.iter().map(|path| json!(path)).collect()),
        );
        Value::Object(file)
    }
}

fn put(map: &mut Map<String, Value>, name: &str, value: Option<Value>) {
    if let Some(value) = value {
        map.insert(name.to_owned(), value);
    }
}

fn filled(map: Map<String, Value>) -> Option<Value> {
    (!map.is_empty()).then_some(Value::Object(map))
}

fn list(items: Vec<Value>) -> Option<Value> {
    (!items.is_empty()).then_some(Value::Array(items))
}

fn bytes(size: Option<ByteSize>) -> Option<Value> {
    size.map(|size| json!(format!("{}B", size.0)))
}

fn millis(ms: Option<u64>) -> Option<Value> {
    ms.map(|ms| json!(format!("{ms}ms")))
}

fn bits(rate: Option<u64>) -> Option<Value> {
    rate.map(|rate| json!(format!("{rate}bit")))
}

fn rules(rules: &[AllowRule]) -> Option<Value> {
    list(rules.iter().map(|rule| json!(rule.to_string())).collect())
}

impl Resources {
    fn json(&self) -> Option<Value> {
        let mut map = Map::new();
        put(&mut map, "cpus", self.cpus.map(|cpus| json!(cpus)));
        put(&mut map, "memory", bytes(self.memory));
        put(&mut map, "timeout", millis(self.timeout_ms));
        filled(map)
    }
}

impl Limits {
    fn json(&self) -> Option<Value> {
        let mut map = Map::new();
        put(&mut map, "upload", bits(self.upload_bits));
        put(&mut map, "download", bits(self.download_bits));
        put(
            &mut map,
            "connections",
            self.connections.map(|count| json!(count)),
        );
        put(&mut map, "disk", bytes(self.disk));
        put(&mut map, "disk_rate", bytes(self.disk_rate));
        put(
            &mut map,
            "processes",
            self.processes.map(|count| json!(count)),
        );
        put(
            &mut map,
            "open_files",
            self.open_files.map(|count| json!(count)),
        );
        put(&mut map, "output", bytes(self.output));
        filled(map)
    }
}

impl Command {
    fn json(&self) -> Value {
        match self {
            Self::Shell(line) => json!(line),
            Self::Words(words) => json!(words),
        }
    }
}

impl PhasePolicy {
    fn json(&self) -> Value {
        let mut network = Map::new();
        network.insert("mode".to_owned(), json!(self.network.mode()));
        put(&mut network, "allow", rules(self.network.rules()));
        let git = self.git.iter().map(|one| json!(one.as_str())).collect();
        put(&mut network, "git", list(git));
        let mut map = Map::new();
        map.insert("network".to_owned(), Value::Object(network));
        put(
            &mut map,
            "commands",
            list(self.commands.iter().map(Command::json).collect()),
        );
        put(
            &mut map,
            "key",
            list(self.key.iter().map(|path| json!(path)).collect()),
        );
        Value::Object(map)
    }
}

impl Secret {
    fn json(&self) -> Value {
        let mut map = Map::new();
        map.insert("name".to_owned(), json!(self.name));
        let (key, text) = match &self.place {
            SecretPlace::Env(name) => ("env", name),
            SecretPlace::File(path) => ("file", path),
        };
        map.insert(key.to_owned(), json!(text));
        map.insert("phase".to_owned(), json!(self.phase.name()));
        put(&mut map, "hosts", rules(&self.hosts));
        Value::Object(map)
    }
}

impl Service {
    fn json(&self) -> Value {
        let mut map = Map::new();
        map.insert("image".to_owned(), json!(self.image.to_string()));
        map.insert("port".to_owned(), json!(self.port));
        let env: Map<String, Value> = self
            .env
            .iter()
            .map(|(key, value)| (key.clone(), json!(value)))
            .collect();
        put(&mut map, "env", filled(env));
        let mut health = Map::new();
        match &self.health {
            Health::Port => {}
            Health::Http(path) => put(&mut health, "http", Some(json!(path))),
            Health::Command(command) => put(&mut health, "command", Some(command.json())),
        }
        put(&mut health, "timeout", millis(self.ready_ms));
        put(&mut map, "health", filled(health));
        Value::Object(map)
    }
}

/// Keys in order of their bytes, at every depth.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map
                .into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}
