//! The part of `make demo` that learns: a real install runs open once, what it reached becomes the folder's policy, and the same install passes under it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{Binaries, root, run};

/// The operator's word for it, which the demonstration takes back when it is done.
const GRANT: &str =
    "# written by the demonstration, which removes it at its end\n[tenant.local]\nlearn = true\n";
/// A small package without others.
const PACKAGE: &str = "six";

/// Learns and enforces; says why not where the operator has decided something already.
pub(crate) fn run(binaries: &Binaries) -> Result<()> {
    run::heading("learn -> enforce: an install tells what it needs, and then gets nothing else");
    let config = config()?;
    let Some(grant) = Grant::give(&config.join("policy.toml"))? else {
        run::say(
            "   left out: this host has a policy.toml, and what it grants is the operator's to say",
        );
        return Ok(());
    };
    let folder = root().join("target/demo/learn");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let policy = folder.join("kiln.yaml");
    fs::write(&policy, "version: 1\nimage: python\n")?;
    let index = index(&config)?;
    let install = format!(
        "pip install -q --no-cache-dir --target /tmp/x --index-url {index} {PACKAGE} && ls /tmp/x"
    );
    let kiln = |words: &[&str]| {
        let mut command = Command::new(&binaries.kiln);
        command
            .args(words)
            .args(["--", "sh", "-c"])
            .current_dir(&folder);
        command
    };
    run::must(kiln(&["policy", "learn", "--write", "--yes"]).arg(&install))?;
    drop(grant);
    run::say(&format!("   {}:", policy.display()));
    run::say(&fs::read_to_string(&policy)?);
    run::must(kiln(&["run"]).arg(&install))?;
    let elsewhere = kiln(&["run"])
        .arg("getent hosts elsewhere.example.org")
        .status()
        .context("could not start kiln run")?;
    if elsewhere.success() {
        bail!("the policy let the machine know a name that it does not list");
    }
    run::say("   the same install passes, and any other name is not even known");
    Ok(())
}

/// The grant while it is there.
struct Grant(PathBuf);

impl Grant {
    /// None when the operator has a file.
    fn give(path: &Path) -> Result<Option<Self>> {
        if path.exists() && fs::read_to_string(path)? != GRANT {
            return Ok(None);
        }
        fs::write(path, GRANT).with_context(|| format!("could not write {}", path.display()))?;
        Ok(Some(Self(path.to_owned())))
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if fs::read_to_string(&self.0).is_ok_and(|text| text == GRANT) {
            let _gone_already = fs::remove_file(&self.0);
        }
    }
}

/// The folder of the operator's files, as kiln finds it.
#[expect(
    clippy::disallowed_methods,
    reason = "where kiln's files are is said by the environment, and kiln's own rooms are not linked here"
)]
fn config() -> Result<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(home) = set("KILN_HOME") {
        return Ok(home.join("config"));
    }
    let base = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
    Ok(base
        .context("neither KILN_HOME nor HOME is set")?
        .join("kiln"))
}

/// Where this host's Python packages come from: set-up wrote it down.
fn index(config: &Path) -> Result<String> {
    let file = config.join("registries.toml");
    let text =
        fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
    index_in(&text).with_context(|| format!("{} names no index for Python", file.display()))
}

fn index_in(text: &str) -> Option<String> {
    let section = text
        .split("\n[")
        .find(|section| section.starts_with("runtime.python]"))?;
    let line = section.lines().find(|line| line.starts_with("index = "))?;
    Some(line.split('"').nth(1)?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_of_python_is_found() {
        let text = "version = 1\n\n[runtime.node]\nindex = \"https://a/\"\n\n[runtime.python]\nhosts = []\nindex = \"https://b/simple\"\n";
        assert_eq!(index_in(text).as_deref(), Some("https://b/simple"));
        assert_eq!(index_in("[runtime.node]\n"), None);
    }

    #[test]
    fn an_operators_file_is_left_alone() {
        let dir = std::env::temp_dir().join(format!("kiln-grant-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("folder");
        let file = dir.join("policy.toml");
        fs::write(&file, "[tenant.local]\n").expect("file");
        assert!(Grant::give(&file).expect("looked at").is_none());
        fs::remove_file(&file).expect("removed");
        drop(Grant::give(&file).expect("written").expect("given"));
        assert!(!file.exists());
        fs::remove_dir_all(&dir).expect("removed");
    }
}
