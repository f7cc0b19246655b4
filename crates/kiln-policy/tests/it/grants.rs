//! The file AND the operator's grant.

use kiln_core::TenantName;
use kiln_policy::{Compiled, Format, Grants, Phase, PhaseNetwork, compile, effective, explain};

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
