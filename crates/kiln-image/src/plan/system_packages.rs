//! Debian packages that `kiln.toml` asks for, in a run base that has no package manager.
//!
//! A stage on the build base downloads what the run base lacks (its package database says what it has) and unpacks it;
//! the final stage copies the files. Maintainer scripts do not run.

use super::write::{Text, cache, json};

/// Where the stage unpacks.
const UNPACKED: &str = "/system";

/// Packages that only a build needs.
fn is_for_building(package: &str) -> bool {
    package
        .split('=')
        .next()
        .is_some_and(|name| name.ends_with("-dev"))
}

/// Installs the packages in a build stage.
pub(super) fn install(text: &mut Text, packages: &[String]) {
    if packages.is_empty() {
        return;
    }
    let command = format!(
        "apt-get update && apt-get install --yes --no-install-recommends {}",
        packages.join(" ")
    );
    text.run(&mounts(), &command);
}

/// The stage that unpacks them for the run base; `true` when there is one.
pub(super) fn stage(text: &mut Text, packages: &[String], build: &str, run: &str) -> bool {
    let packages: Vec<_> = packages
        .iter()
        .filter(|package| !is_for_building(package))
        .map(String::as_str)
        .collect();
    if packages.is_empty() {
        return false;
    }
    let script = [
        "set -eu",
        "cp /run-base/status /tmp/status",
        "mkdir -p /packages/partial /system/usr",
        "apt-get update",
        &format!(
            "apt-get -o Dir::State::status=/tmp/status -o Dir::Cache::archives=/packages --download-only --yes --no-install-recommends install {}",
            packages.join(" ")
        ),
        "for package in /packages/*.deb; do dpkg -x \"$package\" /system; done",
        "for dir in bin sbin lib lib64; do if [ -d /system/$dir ]; then mkdir -p /system/usr/$dir; cp -a /system/$dir/. /system/usr/$dir/; rm -rf /system/$dir; fi; done",
    ];
    let words = ["/bin/sh", "-c", &script.join("\n")].map(str::to_owned);
    text.stage(build, Some("system"));
    let mut mounts = mounts();
    mounts.push(format!(
        "type=bind,from={run},source=/var/lib/dpkg,target=/run-base"
    ));
    text.run(&mounts, &json(&words));
    true
}

/// The instruction of the final stage that takes them over.
pub(super) fn copy() -> String {
    format!("COPY --link --from=system {UNPACKED}/ /")
}

fn mounts() -> Vec<String> {
    vec![
        cache("apt-cache", "/var/cache/apt") + ",sharing=locked",
        cache("apt-lists", "/var/lib/apt/lists") + ",sharing=locked",
    ]
}
