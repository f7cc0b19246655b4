//! The file AND the operator's grant.

use kiln_core::TenantName;
use kiln_policy::{
    Compiled, Format, Grants, Phase, PhaseNetwork, compile, effective, explain, explain_git,
};

const POLICY: &str = "\
version: 1
network:
  allow:
    - \"*.example.org:443\"
    - db.example.net:5432
resources: {cpus: 2}
";

fn policy(text: &str) -> Compiled {
    compile(Format::Kiln, "kiln.yaml", text).unwrap_or_else(|wrong| panic!("{wrong}"))
}

fn grants(text: &str) -> Grants {
    Grants::parse("policy.toml", text).unwrap_or_else(|wrong| panic!("{wrong}"))
}

fn local() -> TenantName {
    TenantName::local()
}

#[test]
fn a_grant_takes_away_and_never_adds() {
    let grants = grants(
        "[tenant.local]\nhosts = [\n  \"a.example.org\",\n  \"x.example.com\",\n]\nmax = { upload = \"1Mbit\" }\n",
    );
    let file = policy(POLICY);
    let holds = effective(&file, &grants, &local()).expect("granted");
    let PhaseNetwork::Egress(rules) = holds.policy.network(Phase::Run) else {
        panic!("not egress");
    };
    let rules: Vec<String> = rules.iter().map(ToString::to_string).collect();
    assert_eq!(rules, ["a.example.org:443/tls"]);
    assert_eq!(holds.policy.limits.upload_bits, Some(1_000_000));
    assert_eq!(holds.removed.len(), 2);
    assert_eq!((holds.removed[0].line, holds.removed[0].left.len()), (4, 1));
    assert_eq!((holds.removed[1].line, holds.removed[1].left.len()), (5, 0));
    assert_ne!(holds.hash, holds.file_hash);
    assert_eq!(holds.file_hash, file.hash());
}

#[test]
fn no_file_of_the_operator_grants_names_and_nothing_wide() {
    let none = Grants::default();
    let holds = effective(&policy(POLICY), &none, &local()).expect("granted");
    assert_eq!(holds.hash, holds.file_hash);
    for mode in ["open", "learn"] {
        let wide = policy(&format!("version: 1\nnetwork:\n  mode: {mode}\n"));
        let refused = effective(&wide, &none, &local()).expect_err("wide");
        assert!(refused[0].message.contains(mode), "{refused:?}");
        assert_eq!(refused[0].line, 3);
        let granted = grants(&format!("[tenant.\"*\"]\n{mode} = true\n"));
        assert!(effective(&wide, &granted, &local()).is_ok());
        // A table of its own holds instead of the one for anybody.
        let own = grants(&format!("[tenant.\"*\"]\n{mode} = true\n[tenant.local]\n"));
        assert!(effective(&wide, &own, &local()).is_err());
    }
}

#[test]
fn more_than_the_maximum_is_refused() {
    let grants = grants("[tenant.local.max]\ncpus = 1\n");
    let refused = effective(&policy(POLICY), &grants, &local()).expect_err("too many");
    assert!(refused[0].message.contains("resources.cpus"), "{refused:?}");
    assert_eq!(refused[0].line, 6, "the line of the amount");
    let sandbox = format!(
        "version: 1\nsandbox:\n  image: {{ref: a@sha256:{}}}\n  resources:\n    vcpus: 2\n",
        "a".repeat(64)
    );
    let file = compile(Format::Cleanroom, "cleanroom.yaml", &sandbox).expect("legal");
    let refused = effective(&file, &grants, &local()).expect_err("too many");
    assert_eq!(refused[0].line, 5, "{refused:?}");
}

#[test]
fn what_is_explained_is_what_a_run_would_do() {
    let file = policy(
        "version: 1\nnetwork:\n  allow:\n    - git.example.org:443\n    - b.example.org:443\n",
    );
    let gateway = grants("[tenant.local]\ngit = [\n  \"git.example.org/**\",\n]\n");
    assert!(effective(&file, &gateway, &local()).is_err());
    for host in ["git.example.org", "b.example.org"] {
        let answer = explain(&file, &gateway, &local(), Phase::Run, (host, 443)).expect("a name");
        let last = answer.said.last().expect("somebody said it");
        assert!(!answer.allowed && answer.protocol.is_none(), "{answer:?}");
        assert_eq!(
            (last.by, last.at.as_deref()),
            ("operator", Some("policy.toml"))
        );
        assert!(
            last.says.contains("kiln.yaml:4") && last.says.contains("policy.toml:3"),
            "{last:?}"
        );
        let alone = explain(&file, &Grants::default(), &local(), Phase::Run, (host, 443));
        assert!(alone.expect("a name").allowed);
    }
}

#[test]
fn open_and_learn_are_each_told_with_their_own_line() {
    let at = |mode: &str, grants: &Grants| {
        let file = policy(&format!("version: 1\nnetwork: {{mode: {mode}}}\n"));
        let answer = explain(&file, grants, &local(), Phase::Run, ("a.example.org", 443));
        let answer = answer.expect("a name");
        let operator = answer.said.iter().find(|say| say.by == "operator");
        (
            answer.allowed,
            operator.and_then(|say| say.at.clone()).expect("a file"),
        )
    };
    let both = grants("[tenant.local]\nopen = true\nlearn = true\n");
    assert_eq!(at("open", &both), (true, "policy.toml:2".to_owned()));
    assert_eq!(at("learn", &both), (true, "policy.toml:3".to_owned()));
    // What no line says has none.
    let neither = grants("[tenant.local]\nmax = {cpus = 1}\n");
    assert_eq!(at("learn", &neither), (false, "policy.toml".to_owned()));
}

#[test]
fn wrong_grants_are_refused_with_their_line() {
    for (text, want) in [
        ("[tenant.local]\nopne = true\n", "policy.toml:2"),
        (
            "[tenant.local]\nhosts = [\"10.0.0.1\"]\n",
            "policy.toml:2:10",
        ),
        ("[tenant.local]\nopen = true\nhosts = []\n", "policy.toml:3"),
        ("[tenant.local.max]\nmemory = \"lots\"\n", "policy.toml:2"),
        ("[tenant.\"no name\"]\n", "not the name of a tenant"),
    ] {
        let wrong = Grants::parse("policy.toml", text)
            .expect_err(text)
            .to_string();
        assert!(wrong.contains(want), "{text}: {wrong}");
    }
}

#[test]
fn an_answer_names_the_lines_that_decided() {
    let file = policy(POLICY);
    let some = grants("[tenant.local]\nhosts = [\n  \"a.example.org\",\n]\n");
    let none = Grants::default();
    let ask = |grants: &Grants, host: &str, port: u16| {
        let answer = explain(&file, grants, &local(), Phase::Run, (host, port)).expect("a name");
        let said: Vec<String> = answer
            .said
            .iter()
            .map(|say| format!("{} {}", say.by, say.at.as_deref().unwrap_or("-")))
            .collect();
        (answer.allowed, said.join(", "))
    };
    assert_eq!(
        ask(&none, "A.example.org", 443),
        (true, "file kiln.yaml:4, operator -, kiln -".to_owned())
    );
    assert_eq!(
        ask(&some, "a.example.org", 443),
        (
            true,
            "file kiln.yaml:4, operator policy.toml:3, kiln -".to_owned()
        )
    );
    assert_eq!(
        ask(&some, "b.example.org", 443),
        (false, "file kiln.yaml:4, operator policy.toml:2".to_owned())
    );
    assert_eq!(
        ask(&none, "example.org", 443),
        (false, "file kiln.yaml:2".to_owned())
    );
    assert_eq!(
        ask(&none, "db.example.net", 443),
        (false, "file kiln.yaml:5".to_owned())
    );
    let answer = explain(
        &file,
        &none,
        &local(),
        Phase::Dependencies,
        ("a.example.org", 443),
    )
    .expect("a name");
    assert!(!answer.allowed && answer.said[0].by == "kiln");
    for host in ["10.0.0.1", "registry.kiln.internal", "a b"] {
        assert!(
            explain(&file, &none, &local(), Phase::Run, (host, 443)).is_err(),
            "{host}"
        );
    }
}

const GIT: &str = "\
version: 1
network:
  git:
    - git.example.org/team/app
    - git.example.org/other
    - open.example.net/lib
";

#[test]
fn a_grant_says_which_repositories_and_with_what() {
    let file = policy(GIT);
    let some = grants(
        "[tenant.local]\ngit = [\n  \"open.example.net/*\",\n  { repository = \"git.example.org/team/*\", secret = \"token\", user = \"ci\" },\n]\n",
    );
    let holds = effective(&file, &some, &local()).expect("granted");
    let git = holds.git(Phase::Run);
    let shown: Vec<String> = git
        .iter()
        .map(|one| {
            let login = one.credential.as_ref();
            let login = login.map(|login| format!(" {}:{}", login.user, login.secret));
            format!("{}{}", one.repository, login.unwrap_or_default())
        })
        .collect();
    assert_eq!(
        shown,
        ["git.example.org/team/app ci:token", "open.example.net/lib"]
    );
    assert_eq!((holds.removed.len(), holds.removed[0].line), (1, 5));
    assert_eq!(holds.removed[0].rule, "git git.example.org/other");
    assert_ne!(holds.hash, holds.file_hash);
    // Without a word of the operator's: as anybody reads them, where their hosts may be named.
    let holds = effective(&file, &Grants::default(), &local()).expect("granted");
    assert!(holds.credentials.is_empty() && holds.removed.is_empty());
    let hosts = grants("[tenant.local]\nhosts = [\"open.example.net\", \"git.example.org:80\"]\n");
    let holds = effective(&file, &hosts, &local()).expect("granted");
    let git = holds.git(Phase::Run);
    assert_eq!(
        (git.len(), git[0].repository.host()),
        (1, "open.example.net")
    );
    let none = grants("[tenant.local]\ngit = []\n");
    let holds = effective(&file, &none, &local()).expect("granted");
    assert_eq!(holds.policy.network(Phase::Run), &PhaseNetwork::Isolated);
}

#[test]
fn what_the_gateway_serves_is_reached_in_no_other_way() {
    let plain = policy("version: 1\nnetwork: {allow: [\"*.example.org:443\"]}\n");
    let serves = grants("[tenant.local]\ngit = [\"git.example.org/team/*\"]\n");
    let refused = effective(&plain, &serves, &local()).expect_err("beside the gateway");
    assert!(refused[0].message.contains("policy.toml:2"), "{refused:?}");
    assert_eq!(refused[0].line, 2);
    assert!(effective(&plain, &Grants::default(), &local()).is_ok());
}

#[test]
fn wrong_repositories_of_the_operator_are_refused_with_their_line() {
    for (entry, want) in [
        ("\"git.example.org\"", "is not a pattern"),
        ("\"10.0.0.1/a\"", "is not a repository"),
        (
            "{ repository = \"git.example.org/a\", user = \"x\" }",
            "without a secret",
        ),
        (
            "{ repository = \"git.example.org/a\", secret = \"a b\" }",
            "name of a secret",
        ),
        (
            "{ repository = \"git.example.org/a\", secret = \"a\", user = \"a:b\" }",
            "user of a login",
        ),
        (
            "{ repository = \"git.example.org/a\", token = \"a\" }",
            "token",
        ),
        ("{ secret = \"a\" }", "repository"),
        ("7", "invalid type"),
    ] {
        let text = format!("[tenant.local]\ngit = [\n  {entry},\n]\n");
        let wrong = Grants::parse("policy.toml", &text)
            .expect_err(entry)
            .to_string();
        assert!(
            wrong.contains("policy.toml:3") && wrong.contains(want),
            "{entry}: {wrong}"
        );
    }
}

#[test]
fn why_a_repository_may_be_read() {
    let file = policy(GIT);
    let some = grants(
        "[tenant.local]\ngit = [\n  { repository = \"git.example.org/team/*\", secret = \"token\" },\n]\n",
    );
    let ask = |grants: &Grants, repository: &str| {
        let repository = repository.parse().expect("repository");
        let answer = explain_git(&file, grants, &local(), Phase::Run, &repository);
        let said: Vec<String> = answer
            .said
            .iter()
            .map(|say| format!("{} {}", say.by, say.at.as_deref().unwrap_or("-")))
            .collect();
        (answer.allowed, said.join(", "), answer.said)
    };
    let (allowed, said, words) = ask(&some, "git.example.org/team/app");
    assert_eq!(
        (allowed, said.as_str()),
        (true, "file kiln.yaml:4, operator policy.toml:3, kiln -")
    );
    assert!(words[1].says.contains("secret token"), "{words:?}");
    let (allowed, said, _) = ask(&some, "git.example.org/other");
    assert_eq!(
        (allowed, said.as_str()),
        (false, "file kiln.yaml:5, operator policy.toml:2")
    );
    let (allowed, said, _) = ask(&some, "git.example.org/third");
    assert_eq!((allowed, said.as_str()), (false, "file kiln.yaml:2"));
    assert!(ask(&Grants::default(), "open.example.net/lib").0);
    let plain = explain(&file, &some, &local(), Phase::Run, ("git.example.org", 443));
    let plain = plain.expect("a name");
    assert!(
        !plain.allowed && plain.said[0].says.contains("git gateway"),
        "{plain:?}"
    );
}
