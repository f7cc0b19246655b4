//! The command line that asks for a job again, as a person types it.

use kiln_core::job::{RunCommand, Source, SourceBuild};
use kiln_core::{JobKind, JobRequest, NetworkPolicy};

/// Longest line that is worth typing.
const LINE_MAX: usize = 4_000;

/// The command line for the same work. Values of the environment, of build arguments and of secrets are not in it: the names take them from
/// wherever the command is typed.
#[must_use]
pub fn command_line(request: &JobRequest) -> String {
    let mut words = vec!["kiln".to_owned()];
    match &request.kind {
        JobKind::Run(run) => {
            words.push("run".to_owned());
            options_of_run(run, &mut words);
            rules(&request.network, &mut words);
            words.push("--".to_owned());
            // Its policy puts the commands of its run phase before it again.
            let own = kiln_core::run_script::own(&run.argv);
            words.extend(own.iter().map(|word| quoted(word)));
        }
        JobKind::SourceBuild(build) => {
            words.push("build".to_owned());
            options_of_build(build, &mut words);
            rules(&request.network, &mut words);
        }
        // Never asked for as such.
        JobKind::ImageBuild(_) => words.push("build".to_owned()),
    }
    let line = words.join(" ");
    match line.char_indices().nth(LINE_MAX) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

fn options_of_run(run: &RunCommand, words: &mut Vec<String>) {
    if let Some(image) = &run.image {
        words.extend(["--image".to_owned(), quoted(&image.to_string())]);
    }
    for (flag, file) in [("--kernel", &run.kernel), ("--root-disk", &run.root_disk)] {
        if let Some(file) = file {
            words.extend([flag.to_owned(), quoted(&file.name)]);
        }
    }
    for name in run.env.keys() {
        words.extend(["-e".to_owned(), quoted(name)]);
    }
    for (host, guest) in &run.ports {
        words.extend(["-p".to_owned(), format!("{host}:{guest}")]);
    }
    for port in run.attend.iter().flat_map(|attend| &attend.ports) {
        words.extend(["-p".to_owned(), format!("{port}:{port}")]);
    }
    for path in &run.artifacts {
        words.extend(["--artifact".to_owned(), quoted(&path.to_string())]);
    }
    if run.tty {
        words.push("-t".to_owned());
    } else if run.stdin {
        words.push("-i".to_owned());
    }
}

fn options_of_build(build: &SourceBuild, words: &mut Vec<String>) {
    words.push(match &build.source {
        Source::Folder { path } => quoted(path),
        Source::Git { url, reference } if reference == "HEAD" => quoted(url),
        Source::Git { url, reference } => quoted(&format!("{url}#{reference}")),
        Source::Tree { .. } => ".".to_owned(),
    });
    if let (Some(path), None) = (&build.dockerfile, &build.dockerfile_text) {
        words.extend(["--file".to_owned(), quoted(path)]);
    }
    if let Some(target) = &build.target {
        words.extend(["--target".to_owned(), quoted(target)]);
    }
    for tag in &build.tags {
        words.extend(["--tag".to_owned(), quoted(&tag.to_string())]);
    }
    for name in build.build_args.keys() {
        words.extend(["--build-arg".to_owned(), quoted(name)]);
    }
    for name in &build.secrets {
        words.extend(["--secret".to_owned(), quoted(&format!("id={name},env=..."))]);
    }
    if build.no_cache {
        words.push("--no-cache".to_owned());
    }
}

fn rules(network: &NetworkPolicy, words: &mut Vec<String>) {
    let NetworkPolicy::Egress { allow } = network else {
        return;
    };
    for rule in allow {
        words.extend(["--allow".to_owned(), quoted(&rule.to_string())]);
    }
}

/// As a shell reads it back; control characters are not for typing.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./:=,@%+#".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    let shown = word
        .chars()
        .map(|c| if kiln_policy::unseen(c) { '?' } else { c });
    format!("'{}'", shown.collect::<String>().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(kind: &serde_json::Value) -> String {
        let request = json!({
            "id": "r1m7z7g68prr466fez", "tenant": "local", "kind": kind, "network": {"mode": "isolated"},
            "limits": {"cpus": 1, "memory": 1 << 29, "disk": 1 << 30, "timeout_ms": 1000}, "trust": "untrusted",
        });
        command_line(&serde_json::from_value(request).expect("a request"))
    }

    #[test]
    fn a_line_asks_for_the_same_and_tells_no_values() {
        let run = line(&json!({
            "kind": "run", "image": "shop:1.4", "argv": ["sh", "-c", "echo it's; \u{1b}[2J"], "env": {"TOKEN": "hush"},
            "ports": [[8080, 3000]], "tty": false, "stdin": false, "artifacts": ["out/*.xml"],
        }));
        assert_eq!(
            run,
            "kiln run --image shop:1.4 -e TOKEN -p 8080:3000 --artifact 'out/*.xml' -- sh -c 'echo it'\\''s; ?[2J'"
        );
        let given = line(&json!({
            "kind": "run", "image": null, "argv": ["true"], "env": {}, "ports": [], "tty": false, "stdin": false,
            "kernel": {"name": "vmlinuz", "digest": kiln_core::Digest::of(b"k")},
            "root_disk": {"name": "my disk.img", "digest": kiln_core::Digest::of(b"d")},
        }));
        assert_eq!(
            given,
            "kiln run --kernel vmlinuz --root-disk 'my disk.img' -- true"
        );
        let build = line(&json!({
            "kind": "source_build", "source": {"from": "folder", "path": "/home/me/my app"}, "name": "app",
            "tags": ["app:v1"], "build_args": {"A": "hush"}, "secrets": ["token"], "no_cache": true,
        }));
        assert_eq!(
            build,
            "kiln build '/home/me/my app' --tag app:v1 --build-arg A --secret id=token,env=... --no-cache"
        );
        let git = line(&json!({
            "kind": "source_build", "name": "app",
            "source": {"from": "git", "url": "https://git.example.org/app.git", "reference": "v2"},
        }));
        assert_eq!(git, "kiln build https://git.example.org/app.git#v2");
    }
}
