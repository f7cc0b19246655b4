//! Further commands beside a container that has ended: its files and its user once more, in a container of their own.
//!
//! The first container's configuration is read out of the machine, changed where the new command differs, and written back there. It never
//! leaves the machine for good and nothing on the host follows it: a guest that wrote it otherwise fools itself alone.

use std::io::Read as _;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_proto::Session;
use kiln_proto::msg::GetTree;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use super::ask::{ExecAsk, Refused};
use crate::orders;

/// Configuration of the first container (`BUNDLE` of the guest's `container`).
pub(crate) const CONFIG: &str = "/run/kiln/container/config.json";
/// Where runc keeps its state (`RUNC_ROOT` of the guest's `container`).
const RUNC_ROOT: &str = "/run/kiln/runc";
/// What a container's command is started by (`INSIDE` of the guest's `container_init`).
const INIT: &str = "/dev/kiln-init";
/// Most bytes of a configuration.
const CONFIG_BYTES_MAX: u64 = 512 * 1024;
/// Room for the heads of its tar stream.
const HEADS_MAX: u64 = 16 * 1024;
/// Folders for configurations; each is read once, when its container starts.
const BUNDLES: u64 = 64;

/// How commands run beside a container.
#[derive(Debug)]
pub(super) struct Beside {
    runc: String,
    config: Value,
    next: AtomicU64,
}

impl Beside {
    /// Reads how the first container was. Its variables of these names are secrets: they stay neither in the machine nor here.
    pub(super) async fn read(
        session: &Session,
        runc: String,
        secret_env: &[String],
    ) -> Result<Self, Refused> {
        let order = GetTree {
            path: CONFIG.to_owned(),
            bytes_max: CONFIG_BYTES_MAX,
            entries_max: 1,
        };
        let failed = |error: &dyn std::error::Error| Refused::failed(orders::chain(error));
        let stream = orders::get_tree(session, "say how its container was", &order).await;
        let stream = stream.map_err(|error| failed(&error))?;
        let mut bytes = Vec::new();
        let mut stream = stream.take(CONFIG_BYTES_MAX + HEADS_MAX);
        let read = tokio::time::timeout(orders::ORDER_TIMEOUT, stream.read_to_end(&mut bytes));
        match read.await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(failed(&error)),
            Err(_) => {
                return Err(Refused::failed(
                    "the machine does not say how its container was",
                ));
            }
        }
        let mut config = config_in(&bytes).map_err(|error| failed(&error))?;
        if !secret_env.is_empty() {
            forget(&mut config, secret_env);
            write(session, CONFIG, &config).await?;
        }
        let next = AtomicU64::new(1);
        Ok(Self { runc, config, next })
    }

    /// Puts a further container together; gives what starts it.
    pub(super) async fn prepare(
        &self,
        session: &Session,
        ask: &ExecAsk,
    ) -> Result<Vec<String>, Refused> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let bundle = format!("/run/kiln/kept-{}", number % BUNDLES);
        write(
            session,
            &format!("{bundle}/config.json"),
            &changed(&self.config, ask),
        )
        .await?;
        let id = format!("kept-{number}");
        let words = ["--root", RUNC_ROOT, "run", "--bundle", &bundle, &id];
        let mut argv = vec![self.runc.clone()];
        argv.extend(words.map(str::to_owned));
        Ok(argv)
    }
}

/// Writes a configuration into the machine.
async fn write(session: &Session, path: &str, config: &Value) -> Result<(), Refused> {
    let script = "umask 077; mkdir -p \"${0%/*}\" && cat > \"$0\"";
    let words = ["/bin/sh", "-c", script, path];
    let text = config.to_string().into_bytes();
    let written = orders::exec_quiet(session, "prepare a container", &words, Some(text));
    match written.await {
        Ok(exit) if exit.code == Some(0) => Ok(()),
        Ok(_) => Err(Refused::failed(
            "the machine has no room for another container",
        )),
        Err(error) => Err(Refused::failed(orders::chain(&error))),
    }
}

/// Takes variables out.
fn forget(config: &mut Value, names: &[String]) {
    let Some(env) = config["process"]["env"].as_array_mut() else {
        return;
    };
    env.retain(|item| {
        let key = item.as_str().and_then(|item| item.split_once('='));
        !key.is_some_and(|(key, _)| names.iter().any(|name| name == key))
    });
}

/// The configuration in a tar stream of one file.
fn config_in(bytes: &[u8]) -> std::io::Result<Value> {
    let mut archive = tar::Archive::new(bytes);
    let none = || std::io::Error::other("the machine gives no configuration of its container");
    let entry = archive.entries()?.next().ok_or_else(none)??;
    let mut text = Vec::new();
    entry.take(CONFIG_BYTES_MAX).read_to_end(&mut text)?;
    let config: Value = serde_json::from_slice(&text)?;
    match config["process"].is_object() {
        true => Ok(config),
        false => Err(none()),
    }
}

/// With the command, environment, directory and terminal that are asked.
fn changed(config: &Value, ask: &ExecAsk) -> Value {
    let mut config = config.clone();
    let process = &mut config["process"];
    let before = process["env"].as_array().cloned().unwrap_or_default();
    let replaced = |item: &Value| {
        let key = item
            .as_str()
            .and_then(|item| item.split_once('='))
            .map(|(key, _)| key);
        key.is_some_and(|key| ask.env.iter().any(|(name, _)| name == key))
    };
    let mut env: Vec<Value> = before.into_iter().filter(|item| !replaced(item)).collect();
    env.extend(
        ask.env
            .iter()
            .map(|(key, value)| json!(format!("{key}={value}"))),
    );
    let has_term = env
        .iter()
        .any(|item| item.as_str().is_some_and(|item| item.starts_with("TERM=")));
    if ask.tty.is_some() && !has_term {
        env.push(json!("TERM=xterm"));
    }
    process["env"] = env.into();
    // What is PID 1 there says how its command ended, and that there is none of that name.
    let init = process["args"][0].as_str().filter(|word| *word == INIT);
    let words = init.map(str::to_owned).into_iter();
    process["args"] = words.chain(ask.argv.iter().cloned()).collect();
    process["terminal"] = json!(ask.tty.is_some());
    if !ask.cwd.is_empty() {
        process["cwd"] = json!(ask.cwd);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_proto::msg::TtySize;

    #[test]
    fn a_further_command_has_the_containers_user_and_its_own_words() {
        let first = json!({
            "process": { "terminal": false, "user": { "uid": 1000 }, "args": ["npm", "start"],
                "env": ["PATH=/bin", "MODE=a"], "cwd": "/app" },
            "root": { "path": "/run/kiln/container/rootfs" },
        });
        let ask = ExecAsk {
            argv: vec!["sh".to_owned()],
            env: vec![("MODE".to_owned(), "b=c".to_owned())],
            tty: Some(TtySize { rows: 24, cols: 80 }),
            ..ExecAsk::default()
        };
        let process = &changed(&first, &ask)["process"];
        assert_eq!(process["args"], json!(["sh"]));
        assert_eq!(
            process["env"],
            json!(["PATH=/bin", "MODE=b=c", "TERM=xterm"])
        );
        assert_eq!(
            (&process["cwd"], &process["terminal"]),
            (&json!("/app"), &json!(true))
        );
        assert_eq!(process["user"]["uid"], 1000);
        let there = ExecAsk {
            cwd: "/tmp".to_owned(),
            tty: None,
            ..ask
        };
        assert_eq!(changed(&first, &there)["process"]["cwd"], "/tmp");
        let mut with_init = first;
        with_init["process"]["args"] = json!([INIT, "npm", "start"]);
        let args = &changed(&with_init, &there)["process"]["args"];
        assert_eq!(args, &json!([INIT, "sh"]));
    }

    #[test]
    fn variables_that_are_secrets_are_taken_out() {
        let mut config =
            json!({"process": {"env": ["PATH=/bin", "TOKEN=a=b", "TOKENS=x", "TOKEN"]}});
        forget(&mut config, &["TOKEN".to_owned()]);
        assert_eq!(
            config["process"]["env"],
            json!(["PATH=/bin", "TOKENS=x", "TOKEN"])
        );
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        let tar = |content: &[u8]| {
            let mut builder = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder
                .append_data(&mut header, "config.json", content)
                .expect("appended");
            builder.into_inner().expect("whole")
        };
        assert!(config_in(&tar(b"{\"process\":{}}")).is_ok());
        for bad in [&b"{}"[..], b"[]", b"{", b""] {
            assert!(config_in(&tar(bad)).is_err());
        }
        assert!(config_in(b"").is_err() && config_in(&[7; 700]).is_err());
    }

    #[test]
    fn the_guests_places_are_these() {
        let guest = include_str!("../../../kiln-guest/src/container.rs");
        assert!(guest.contains(&format!("const RUNC_ROOT: &str = \"{RUNC_ROOT}\";")));
        let bundle = CONFIG.strip_suffix("/config.json").expect("a folder");
        assert!(guest.contains(&format!("const BUNDLE: &str = \"{bundle}\";")));
    }
}
