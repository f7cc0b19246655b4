//! Debian packages that `kiln.toml` asks for, in a run base that has no package manager.
//!
//! A stage on the build base finds out what the run base lacks, downloads and unpacks it; the final stage copies the files.
//! Maintainer scripts do not run: libraries and programs work, services and users of packages are not set up.

use super::write::{Text, cache};

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

/// Which packages the run base has, for apt: its own package database, else those whose programs and libraries are all
/// there. Run bases of kiln carry no database.
const STATUS: &str = r#"import os, shutil
run, dpkg = "/run-base", "/var/lib/dpkg"
if os.path.exists(run + dpkg + "/status"):
    shutil.copy(run + dpkg + "/status", "/tmp/status")
else:
    skipped = tuple("/usr/share/" + name for name in ("doc", "man", "info", "locale", "lintian", "bug", "gdb"))
    def there(package, arch):
        for name in (package, package + ":" + arch):
            try:
                files = open(f"{dpkg}/info/{name}.list").read().split("\n")
            except FileNotFoundError:
                continue
            files = [f for f in files if f.startswith("/usr/") and not f.startswith(skipped)]
            files = [f for f in files if not os.path.isdir(f)]
            return bool(files) and all(os.path.lexists(run + f) for f in files)
        return False
    kept = ("Package", "Status", "Architecture", "Multi-Arch", "Version", "Provides")
    with open("/tmp/status", "w") as out:
        for entry in open(dpkg + "/status").read().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in entry.split("\n") if ": " in line and line[0] != " ")
            if fields.get("Package") and there(fields["Package"], fields.get("Architecture", "")):
                out.write("".join(f"{name}: {fields[name]}\n" for name in kept if name in fields) + "\n")
"#;

/// Downloads what is missing, unpacks it, and moves files to where the merged `/usr` has them.
const UNPACK: &str = r#"mkdir -p /system/usr
for package in /packages/*.deb; do dpkg -x "$package" /system; done
for dir in bin sbin lib lib64; do
  if [ -d /system/$dir ]; then mkdir -p /system/usr/$dir; cp -a /system/$dir/. /system/usr/$dir/; rm -rf /system/$dir; fi
done
rm -rf /system/usr/share/doc /system/usr/share/man /system/usr/share/lintian
"#;

/// Ends a script in the Dockerfile.
const HEREDOC: &str = "KILN_END_OF_FILE";

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
    text.stage(build, Some("system"));
    let run_base = format!("type=bind,from={run},target=/run-base");
    text.run(&[run_base], &format!("python3 - <<'{HEREDOC}'"));
    text.line(STATUS.trim_end()).line(HEREDOC);
    let download = format!(
        "apt-get -o Dir::State::status=/tmp/status -o Dir::Cache::archives=/packages --download-only --yes --no-install-recommends install {}",
        packages.join(" ")
    );
    text.run(&mounts(), &format!("<<'{HEREDOC}'"));
    text.line("set -eu")
        .line("apt-get update")
        .line("mkdir -p /packages/partial");
    text.line(download).line(UNPACK.trim_end()).line(HEREDOC);
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
