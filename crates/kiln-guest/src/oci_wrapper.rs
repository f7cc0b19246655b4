//! Stands between BuildKit and runc: what every RUN step gets besides what its Dockerfile says.
//!
//! BuildKit calls `kiln-runc run --bundle DIR ...`; this program adds to `DIR/config.json` (OCI runtime specification,
//! `config.md`) the operator's certificates, the environment the host ordered, and a bound on memory, and takes away
//! BuildKit's own telemetry; then it becomes runc. Certificates appear at a path below `/dev`, a tmpfs that is in no layer: the layer's diff shows nothing of them.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Context, SysError, chain};
use crate::{log, tree};

/// The name under which this program is the wrapper.
pub(crate) const NAME: &str = "kiln-runc";
/// Where BuildKit finds it.
pub(crate) const PATH: &str = "/run/kiln/kiln-runc";
/// What the guest tells the wrapper.
pub(crate) const SETTINGS: &str = "/run/kiln/steps.json";
/// Where programs in steps and containers find certificates.
pub(crate) const CA_INSIDE: &str = "/dev/kiln-ca.pem";
/// Exit code when the step cannot be set up.
const FAILED: u8 = 125;
/// Most bytes of a `config.json`.
const CONFIG_MAX: u64 = 4 * 1024 * 1024;
/// Variables by which common programs are told of certificates.
const CA_VARIABLES: [&str; 7] = [
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
];

/// BuildKit's own telemetry as it shows in every step. No Dockerfile asks for it, and nobody listens.
const TELEMETRY_SOCKET: &str = "/dev/otel-grpc.sock";
/// Variables that come with that socket, with the values that are BuildKit's.
const TELEMETRY: [&str; 3] = [
    "OTEL_TRACES_EXPORTER=otlp",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=unix:///dev/otel-grpc.sock",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc",
];
/// Variables that name the step in BuildKit's traces, anew each time.
const TRACE_CONTEXT: [&str; 2] = ["TRACEPARENT=", "TRACESTATE="];

/// What every step gets.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Variables that a step gets unless it has them.
    pub(crate) env: Vec<(String, String)>,
}

impl Settings {
    /// Reads them; none were written when there is no file.
    pub(crate) fn load() -> Result<Self, SysError> {
        match fs::read(SETTINGS) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            other => {
                let bytes = other.context(|| format!("read {SETTINGS}"))?;
                serde_json::from_slice(&bytes).map_err(|error| {
                    SysError::other(format!("read {SETTINGS}"), &error.to_string())
                })
            }
        }
    }

    /// Writes them for the steps to come.
    pub(crate) fn store(&self) -> Result<(), SysError> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        tree::write_file(Path::new(SETTINGS), 0o755, 0o644, &bytes)
    }
}

/// The runtime of the root disk.
pub(crate) fn runc() -> Option<PathBuf> {
    let places = [
        "/usr/sbin/runc",
        "/usr/bin/runc",
        "/usr/local/sbin/runc",
        "/usr/local/bin/runc",
    ];
    places
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

/// The bundle of a container that is about to be started, if that is what these arguments ask for.
fn bundle(arguments: &[OsString]) -> Option<&OsStr> {
    let starts = |word: &OsString| word == "run" || word == "create";
    let at = arguments.iter().position(starts)?;
    let rest = &arguments[at + 1..];
    let flag = rest
        .iter()
        .position(|word| word == "--bundle" || word == "-b")?;
    rest.get(flag + 1).map(OsString::as_os_str)
}

/// Adds a variable unless the process has it.
fn add_variable(config: &mut Value, name: &str, value: &str) {
    let Some(process) = config.get_mut("process").and_then(Value::as_object_mut) else {
        return;
    };
    let env = process.entry("env").or_insert_with(|| json!([]));
    let Some(env) = env.as_array_mut() else {
        return;
    };
    let has = |item: &Value| {
        item.as_str()
            .and_then(|text| text.split_once('='))
            .is_some_and(|(key, _)| key == name)
    };
    if !env.iter().any(has) {
        env.push(json!(format!("{name}={value}")));
    }
}

/// Makes certificates visible in a container, if it has the tmpfs they can be put in.
pub(crate) fn add_certificates(config: &mut Value, bundle: &str) {
    let mounts = config.get_mut("mounts").and_then(Value::as_array_mut);
    let Some(mounts) = mounts else { return };
    let at =
        |mount: &Value, path: &str| mount.get("destination").and_then(Value::as_str) == Some(path);
    let on_tmpfs = |mount: &Value| at(mount, "/dev") && mount.get("type") == Some(&json!("tmpfs"));
    if !mounts.iter().any(on_tmpfs) || mounts.iter().any(|mount| at(mount, CA_INSIDE)) {
        return;
    }
    mounts.push(json!({
        "destination": CA_INSIDE,
        "type": "bind",
        "source": bundle,
        "options": ["bind", "ro", "nosuid", "nodev", "noexec"],
    }));
    for name in CA_VARIABLES {
        add_variable(config, name, CA_INSIDE);
    }
}

/// Takes away what BuildKit adds for itself, so that a step sees what its Dockerfile says.
fn remove_telemetry(config: &mut Value) {
    let is_socket =
        |mount: &Value| mount.get("destination").and_then(Value::as_str) == Some(TELEMETRY_SOCKET);
    let mounts = config.get_mut("mounts").and_then(Value::as_array_mut);
    let Some(mounts) = mounts.filter(|mounts| mounts.iter().any(is_socket)) else {
        return;
    };
    mounts.retain(|mount| !is_socket(mount));
    let env = config.pointer_mut("/process/env");
    if let Some(env) = env.and_then(Value::as_array_mut) {
        env.retain(|item| {
            let text = item.as_str().unwrap_or_default();
            !TELEMETRY.contains(&text) && !TRACE_CONTEXT.iter().any(|name| text.starts_with(name))
        });
    }
}

/// Changes a step's configuration.
fn edit(config: &mut Value, settings: &Settings, certificates: Option<&str>) {
    remove_telemetry(config);
    if let Some(bundle) = certificates {
        add_certificates(config, bundle);
    }
    for (name, value) in &settings.env {
        add_variable(config, name, value);
    }
    if let Some(process) = config.get_mut("process").and_then(Value::as_object_mut) {
        // BuildKit is protected from the OOM killer; what it starts is not.
        process.entry("oomScoreAdj").or_insert(json!(0));
    }
    if let Some(linux) = config.get_mut("linux").and_then(Value::as_object_mut) {
        let resources = linux.entry("resources").or_insert_with(|| json!({}));
        if let Some(resources) = resources.as_object_mut() {
            let unified = resources.entry("unified").or_insert_with(|| json!({}));
            if let Some(unified) = unified.as_object_mut() {
                // A step that lost one process to the OOM killer fails as a whole.
                unified.entry("memory.oom.group").or_insert(json!("1"));
            }
        }
    }
}

fn edit_bundle(bundle: &Path) -> Result<(), SysError> {
    let path = bundle.join("config.json");
    let what = || format!("change {}", path.display());
    let size = fs::metadata(&path).context(what)?.len();
    if size > CONFIG_MAX {
        return Err(SysError::other(what(), "it is too large"));
    }
    let bytes = fs::read(&path).context(what)?;
    let mut config: Value = serde_json::from_slice(&bytes)
        .map_err(|error| SysError::other(what(), &error.to_string()))?;
    let certificates = Path::new(tree::CA_OPERATOR)
        .exists()
        .then_some(tree::CA_BUNDLE);
    edit(&mut config, &Settings::load()?, certificates);
    let bytes = serde_json::to_vec(&config).unwrap_or_default();
    fs::write(&path, bytes).context(what)
}

/// Does the wrapper's work and becomes runc. Returns only when that fails.
pub(crate) fn main(arguments: &[OsString]) -> ExitCode {
    if let Some(bundle) = bundle(arguments)
        && let Err(error) = edit_bundle(Path::new(bundle))
    {
        log::raw(&format!("{NAME}: {}", chain(&error)));
        return ExitCode::from(FAILED);
    }
    let Some(runc) = runc() else {
        log::raw(&format!("{NAME}: the root disk has no runc"));
        return ExitCode::from(FAILED);
    };
    let error = Command::new(&runc).args(arguments).exec();
    log::raw(&format!("{NAME}: {}: {error}", runc.display()));
    ExitCode::from(FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Value {
        json!({
            "process": { "args": ["sh"], "env": ["PATH=/bin", "PIP_CERT=/own", "A=1"] },
            "mounts": [{ "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }],
            "linux": { "cgroupsPath": "/workload/steps/x", "resources": { "devices": [] } },
        })
    }

    #[test]
    fn a_step_gets_what_it_has_not() {
        let mut config = config();
        let settings = Settings {
            env: vec![("A".into(), "2".into()), ("B".into(), "3".into())],
        };
        edit(&mut config, &settings, Some("/run/ca.pem"));
        let env: Vec<_> = config["process"]["env"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert!(env.contains(&"A=1") && !env.contains(&"A=2") && env.contains(&"B=3"));
        assert!(env.contains(&"PIP_CERT=/own") && env.contains(&"SSL_CERT_FILE=/dev/kiln-ca.pem"));
        assert_eq!(config["mounts"][1]["destination"], CA_INSIDE);
        assert_eq!(
            config["linux"]["resources"]["unified"]["memory.oom.group"],
            "1"
        );
        assert_eq!(config["linux"]["cgroupsPath"], "/workload/steps/x");
        assert_eq!(config["process"]["oomScoreAdj"], 0);
        let once = config.clone();
        edit(&mut config, &settings, Some("/run/ca.pem"));
        assert_eq!(config, once, "twice is once");
    }

    #[test]
    fn a_step_sees_nothing_of_buildkits_telemetry() {
        let mut config = config();
        let plain = config.clone();
        edit(&mut config, &Settings::default(), None);
        let expected = config.clone();
        let mut traced = plain;
        let env = traced["process"]["env"].as_array_mut().unwrap();
        env.extend(TELEMETRY.map(|item| json!(item)));
        env.push(json!("TRACEPARENT=00-1bdc-fed7-01"));
        let mounts = traced["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": TELEMETRY_SOCKET, "type": "bind" }));
        edit(&mut traced, &Settings::default(), None);
        assert_eq!(traced, expected);
        // What an image says of its own telemetry stays.
        let own = json!(["OTEL_TRACES_EXPORTER=otlp", "TRACEPARENT=mine"]);
        traced["process"]["env"] = own.clone();
        edit(&mut traced, &Settings::default(), None);
        assert_eq!(traced["process"]["env"], own);
    }

    #[test]
    fn without_a_tmpfs_at_dev_nothing_is_mounted() {
        let mut config = config();
        config["mounts"][0]["type"] = json!("bind");
        edit(&mut config, &Settings::default(), Some("/run/ca.pem"));
        assert_eq!(config["mounts"].as_array().unwrap().len(), 1);
        assert!(!config["process"]["env"].to_string().contains("kiln-ca"));
        for mut odd in [
            json!(null),
            json!({}),
            json!({ "process": 1, "linux": [], "mounts": {} }),
        ] {
            edit(&mut odd, &Settings::default(), Some("/x"));
        }
    }

    #[test]
    fn the_bundle_is_found_among_the_arguments() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let run = words("--log /l --log-format json run --bundle /b --keep id");
        assert_eq!(bundle(&run), Some(OsStr::new("/b")));
        assert_eq!(bundle(&words("--log /l kill id 9")), None);
        assert_eq!(bundle(&words("run id")), None);
        assert_eq!(bundle(&words("run id --bundle")), None);
    }
}
