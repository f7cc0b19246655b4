//! Tests of the lockfile readers.

use super::*;
use proptest::prelude::*;

fn hosts(kind: LockfileKind, text: &str) -> Vec<(usize, String, u16)> {
    let found = lockfile_hosts(kind, text.as_bytes()).expect("legal");
    found
        .into_iter()
        .map(|found| (found.line, found.host, found.port))
        .collect()
}

fn want(list: &[(usize, &str, u16)]) -> Vec<(usize, String, u16)> {
    list.iter()
        .map(|(line, host, port)| (*line, (*host).to_owned(), *port))
        .collect()
}

#[test]
fn npm() {
    let text = r#"{
  "lockfileVersion": 3,
  "packages": {
    "": {"name": "x"},
    "node_modules/a": {
      "resolved": "https://user:token@mirror.example.org/a/-/a-1.tgz",
      "deprecated": "see https://elsewhere.example.org",
      "funding": {"url": "https://funding.example.org"}
    },
    "node_modules/b": {
      "resolved": "https://mirror.example.org/b/-/b-1.tgz"
    },
    "node_modules/c": {"resolved": "packages/c", "link": true},
    "node_modules/d": {
      "resolved": "git+ssh://git@code.example.org/u/d.git#abc"
    }
  },
  "dependencies": {"e": {"version": "https://old.example.org:8443/e.tgz"}}
}"#;
    assert_eq!(
        hosts(LockfileKind::Npm, text),
        want(&[
            (6, "mirror.example.org", 443),
            (15, "code.example.org", 22),
            (18, "old.example.org", 8443)
        ])
    );
    assert!(lockfile_hosts(LockfileKind::Npm, b"{").is_err());
    let none = r#"{"packages": {"node_modules/a": {"version": "1.0.0", "integrity": "sha512-x"}}}"#;
    assert_eq!(hosts(LockfileKind::Npm, none), []);
}

#[test]
fn pnpm_and_yarn() {
    let pnpm = "packages:\n\
        \x20 a@1.0.0:\n\
        \x20   resolution: {integrity: sha512-x, tarball: https://mirror.example.org/a.tgz}\n\
        \x20   deprecated: see https://elsewhere.example.org\n\
        \x20 b@1:\n\
        \x20   resolution: {commit: abc, repo: 'git@code.example.org:u/b.git', type: git}\n\
        \x20 c@1:\n\
        \x20   resolution:\n\
        \x20     tarball: 'http://plain.example.org/c.tgz'\n";
    assert_eq!(
        hosts(LockfileKind::Pnpm, pnpm),
        want(&[
            (3, "mirror.example.org", 443),
            (6, "code.example.org", 22),
            (9, "plain.example.org", 80)
        ])
    );
    let yarn = "# yarn lockfile v1\n\n\"@s/a@^1\":\n  version \"1.0.0\"\n\
        \x20 resolved \"https://mirror.example.org/a.tgz#sha\"\n  integrity sha512-x\n";
    assert_eq!(
        hosts(LockfileKind::Yarn, yarn),
        want(&[(5, "mirror.example.org", 443)])
    );
    let berry = "__metadata:\n  version: 8\n\n\"a@npm:^1\":\n  resolution: \"a@npm:1.0.0\"\n\
        \x20 resolution: \"@s/b@npm:1.0.0::__archiveUrl=https%3A%2F%2Fmirror.example.org%2Fb.tgz\"\n\
        \x20 resolution: \"c@https://code.example.org/u/c.git#commit=1\"\n\
        \x20 resolution: \"@s/d@git@ssh.example.org:u/d.git#commit=1\"\n\
        \x20 resolution: \"x@workspace:.\"\n";
    assert_eq!(
        hosts(LockfileKind::Berry, berry),
        want(&[
            (6, "mirror.example.org", 443),
            (7, "code.example.org", 443),
            (8, "ssh.example.org", 22)
        ])
    );
}

#[test]
fn python() {
    let requirements = "# https://comment.example.org\n\
        --index-url https://user:word@mirror.example.org/simple\n\
        --extra-index-url=https://more.example.org:8443/simple  # https://no.example.org\n\
        -f http://links.example.org/\n\
        six==1.16 --hash=sha256:abc\n\
        a @ https://files.example.org/a.whl ; python_version > '3'\n\
        b[x]@git+https://code.example.org/u/b@v1#egg=b\n\
        git+ssh://git@ssh.example.org/u/c.git\n\
        -ihttps://short.example.org/simple\n";
    assert_eq!(
        hosts(LockfileKind::Requirements, requirements),
        want(&[
            (2, "mirror.example.org", 443),
            (3, "more.example.org", 8443),
            (4, "links.example.org", 80),
            (6, "files.example.org", 443),
            (7, "code.example.org", 443),
            (8, "ssh.example.org", 22),
            (9, "short.example.org", 443)
        ])
    );
    let uv = "version = 1\n[[package]]\nname = \"a\"\nsource = { registry = \"https://mirror.example.org/simple\" }\n\
        sdist = { url = \"https://files.example.org/a.tar.gz\", hash = \"x\" }\n\
        [[package]]\nname = \"b\"\nsource = { git = \"https://code.example.org/u/b?rev=1#2\" }\n\
        [[package]]\nname = \"c\"\nsource = { registry = \"../wheels\" }\n";
    assert_eq!(
        hosts(LockfileKind::Uv, uv),
        want(&[
            (4, "mirror.example.org", 443),
            (5, "files.example.org", 443),
            (8, "code.example.org", 443)
        ])
    );
    let poetry = "[[package]]\nname = \"a\"\ndescription = \"see https://elsewhere.example.org\"\n\
        [package.source]\ntype = \"legacy\"\nurl = \"https://mirror.example.org/simple\"\n";
    assert_eq!(
        hosts(LockfileKind::Poetry, poetry),
        want(&[(6, "mirror.example.org", 443)])
    );
    let pdm = "[[package]]\nname = \"a\"\nfiles = [\n    {url = \"https://files.example.org/a.whl\", hash = \"x\"},\n]\n";
    assert_eq!(
        hosts(LockfileKind::Pdm, pdm),
        want(&[(4, "files.example.org", 443)])
    );
    let pipenv = "{\"_meta\": {\n\"sources\": [{\"url\": \"https://mirror.example.org/simple\"}]},\n\
        \"default\": {\"a\": {\"git\": \"ssh://git@code.example.org:u/a.git\"}}}";
    assert_eq!(
        hosts(LockfileKind::Pipenv, pipenv),
        want(&[(2, "mirror.example.org", 443), (3, "code.example.org", 22)])
    );
}

#[test]
fn escapes_and_odd_hosts_cannot_hide() {
    let escaped = r#"{"packages": {"a": {"resolved": "https:\/\/evil.example.org\/a.tgz"}}}"#;
    assert_eq!(
        hosts(LockfileKind::Npm, escaped),
        want(&[(1, "evil.example.org", 443)])
    );
    let odd = r#"{"packages": {"a": {"resolved": "https://evil_é.example.org/a.tgz"}, "b": {"resolved": "https://10.0.0.1/x"}}}"#;
    let found = hosts(LockfileKind::Npm, odd);
    assert_eq!(found.len(), 2, "{found:?}");
    let many: String = (0..=HOSTS_MAX)
        .map(|at| format!("  resolved \"https://h{at}.example.org/x\"\n"))
        .collect();
    assert!(matches!(
        lockfile_hosts(LockfileKind::Yarn, many.as_bytes()),
        Err(LockfileError::TooManyHosts(_))
    ));
    assert!(matches!(
        lockfile_hosts(LockfileKind::Yarn, b"\xff"),
        Err(LockfileError::NotText(_))
    ));
}

#[test]
fn hosts_outside_a_policy_are_listed() {
    let yarn = "  resolved \"https://a.example.org/x\"\n  resolved \"https://b.example.org/x\"\n  resolved \"http://a.example.org:81/x\"\n";
    let found = lockfile_hosts(LockfileKind::Yarn, yarn.as_bytes()).expect("legal");
    let policy = NetworkPolicy::from_rules(["a.example.org".parse().expect("rule")]);
    let lines: Vec<usize> = not_allowed(&found, &policy)
        .iter()
        .map(|locked| locked.line)
        .collect();
    assert_eq!(lines, [2, 3]);
}

#[test]
fn kinds_by_name_and_content() {
    let of = |name: &str, text: &str| LockfileKind::of(name, text.as_bytes());
    assert_eq!(
        of("yarn.lock", "# yarn lockfile v1\n"),
        Some(LockfileKind::Yarn)
    );
    assert_eq!(
        of("yarn.lock", "\n__metadata:\n"),
        Some(LockfileKind::Berry)
    );
    assert_eq!(
        of("requirements-dev.txt", ""),
        Some(LockfileKind::Requirements)
    );
    assert_eq!(of("package.json", ""), None);
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "(resolved |tarball: |resolution: |[ -~\n\"'@:/é]){0,30}") {
        for kind in [
            LockfileKind::Npm, LockfileKind::Pnpm, LockfileKind::Yarn, LockfileKind::Berry,
            LockfileKind::Requirements, LockfileKind::Uv, LockfileKind::Pipenv,
        ] {
            let _ = lockfile_hosts(kind, text.as_bytes());
        }
    }

    #[test]
    fn every_resolved_host_of_an_npm_lockfile_is_listed(names in proptest::collection::hash_set("[a-z]{1,8}", 1..20)) {
        let packages: Vec<String> = names
            .iter()
            .map(|name| format!("\"node_modules/{name}\": {{\"resolved\": \"https://{name}.example.org/x.tgz\"}}"))
            .collect();
        let text = format!("{{\"packages\": {{\n{}\n}}}}", packages.join(",\n"));
        let found = hosts(LockfileKind::Npm, &text);
        prop_assert_eq!(found.len(), names.len());
        for (line, host, _) in found {
            prop_assert!(text.lines().nth(line - 1).is_some_and(|text| text.contains(&host)));
        }
    }
}
