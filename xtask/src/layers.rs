//! Dependency arrows: which room may know which. ARCHITECTURE.md draws the same picture.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::run;

/// What each room may know. A stage room never knows another stage room.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("kiln-core", &[]),
    ("kiln-proto", &["kiln-core"]),
    ("kiln-machine", &["kiln-core", "kiln-proto"]),
    ("kiln-network", &["kiln-core", "kiln-proto"]),
    ("kiln-image", &["kiln-core"]),
    ("kiln-store", &["kiln-core"]),
    ("kiln-telemetry", &["kiln-core"]),
    ("kiln-db", &["kiln-core"]),
    ("kiln-scheduler", &["kiln-core"]),
    ("kiln-policy", &["kiln-core"]),
    (
        "kiln-controller",
        &[
            "kiln-core",
            "kiln-proto",
            "kiln-db",
            "kiln-scheduler",
            "kiln-policy",
            "kiln-store",
            "kiln-telemetry",
        ],
    ),
    ("kiln-guest", &["kiln-core", "kiln-proto"]),
    (
        "kiln-worker",
        &[
            "kiln-core",
            "kiln-proto",
            "kiln-machine",
            "kiln-network",
            "kiln-image",
            "kiln-store",
            "kiln-telemetry",
        ],
    ),
    (
        "kiln-cli",
        &[
            "kiln-core",
            "kiln-proto",
            "kiln-machine",
            "kiln-network",
            "kiln-image",
            "kiln-store",
            "kiln-telemetry",
            "kiln-worker",
            "kiln-controller",
            "kiln-db",
            "kiln-scheduler",
            "kiln-policy",
        ],
    ),
    ("kiln-testkit", &["kiln-core", "kiln-proto"]),
    ("xtask", &[]),
];

/// Crates a room must never link: purity that the compiler then keeps.
const MUST_NOT_LINK: &[(&str, &[&str])] = &[
    ("kiln-core", &["tokio", "rustix", "libc", "getrandom"]),
    ("kiln-scheduler", &["tokio", "rustix", "libc", "getrandom"]),
    ("kiln-policy", &["tokio", "rustix", "libc", "getrandom"]),
    ("kiln-guest", &["axum", "ureq", "rustls"]),
];

/// Fails when an arrow points where none may.
pub(crate) fn check() -> Result<()> {
    let text = run::output(run::cargo().args([
        "metadata",
        "--format-version",
        "1",
        "--no-deps",
        "--locked",
    ]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let rules: BTreeMap<&str, &[&str]> = MAY_KNOW.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(may) = rules.get(name) else {
            wrong.push(format!(
                "{name} is a room without a rule: add it to xtask/src/layers.rs and ARCHITECTURE.md"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let known = dependency["name"].as_str().unwrap_or_default();
            let development = dependency["kind"].as_str() == Some("dev");
            let ours = rules.contains_key(known);
            if ours
                && !may.contains(&known)
                && !(development && known == "kiln-testkit")
                && known != name
            {
                wrong.push(format!("{name} must not know {known}"));
            }
            let banned = MUST_NOT_LINK
                .iter()
                .find(|(room, _)| *room == name)
                .map_or(&[][..], |(_, list)| list);
            if !development && banned.contains(&known) {
                wrong.push(format!("{name} must not link {known}"));
            }
        }
    }
    if !wrong.is_empty() {
        bail!("dependency arrows:\n  {}", wrong.join("\n  "));
    }
    run::say(&format!(
        "layers: {} rooms, every arrow allowed",
        packages.len()
    ));
    Ok(())
}
