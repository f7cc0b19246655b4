//! What holds for every policy.

use kiln_core::TenantName;
use kiln_core::network::NameVerdict;
use kiln_policy::{
    Compiled, Format, Grants, Phase, StarterFacts, choose, compile, effective, starter,
};
use proptest::prelude::*;
use serde_json::Value;

fn compiled(text: &str) -> Compiled {
    compile(Format::Kiln, "kiln.yaml", text).unwrap_or_else(|wrong| panic!("{wrong}\n{text}"))
}

/// Hosts that neither overlap with each other nor repeat.
fn hosts() -> impl Strategy<Value = Vec<String>> {
    let one = (
        "[a-f]",
        prop::sample::select(vec!["", ":443", ":443/raw", ":22", ":8443/tls", ":80/http"]),
    );
    prop::collection::btree_map("[a-f]", one, 0..5).prop_map(|hosts| {
        let host = |(name, (kind, rest)): (String, (String, &str))| match kind.as_str() {
            "a" | "b" => format!("*.{name}.example.org{rest}"),
            _ => format!("{name}.example.net{rest}"),
        };
        hosts.into_iter().map(host).collect()
    })
}

/// A policy as the lines of its parts, which may stand in any order.
fn parts() -> impl Strategy<Value = Vec<String>> {
    let phases = (hosts(), hosts(), any::<bool>());
    (
        phases,
        1_u32..9,
        prop::option::of(1_u64..99),
        prop::option::of("[a-z]{1,5}\\.xml"),
    )
        .prop_map(|((deps, run, commands), cpus, mbit, artifact)| {
            let network = |hosts: &[String]| match hosts.is_empty() {
                true => "{mode: isolated}".to_owned(),
                false => format!(
                    "{{allow: [{}]}}",
                    hosts
                        .iter()
                        .map(|host| format!("\"{host}\""))
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            };
            let commands = if commands {
                "\n    commands: [\"npm ci\", [npm, test]]"
            } else {
                ""
            };
            let mut parts = vec![
                "version: 1".to_owned(),
                format!(
                    "phases:\n  dependencies:\n    network: {}{commands}\n  run:\n    network: {}",
                    network(&deps),
                    network(&run)
                ),
                format!("resources:\n  cpus: {cpus}\n  memory: {cpus}G"),
            ];
            parts.extend(mbit.map(|mbit| format!("limits:\n  upload: {mbit}Mbit")));
            parts.extend(artifact.map(|path| format!("artifacts: [{path}]")));
            parts
        })
}

proptest! {
    #[test]
    fn the_canonical_form_is_a_policy_with_the_same_hash(parts in parts()) {
        let policy = compiled(&parts.join("\n"));
        let again = compiled(&policy.policy().canonical());
        prop_assert_eq!(again.policy(), policy.policy());
        prop_assert_eq!(again.hash(), policy.hash());
        let shown = compiled(&serde_json::to_string_pretty(&policy.policy().as_file()).expect("json"));
        prop_assert_eq!(shown.hash(), policy.hash());
    }

    #[test]
    fn order_comments_and_blank_lines_do_not_change_the_hash(parts in parts().prop_flat_map(|parts| (Just(parts.clone()), Just(parts).prop_shuffle()))) {
        let (first, other) = parts;
        let spaced = other.join("\n\n# a comment\n");
        prop_assert_eq!(compiled(&first.join("\n")).hash(), compiled(&spaced).hash());
    }

    #[test]
    fn what_holds_is_never_more_than_the_file_or_the_grant(parts in parts(), granted in hosts(), name in "([x]\\.)?[a-f]\\.example\\.(org|net)", port in prop::sample::select(vec![22_u16, 80, 443, 8443])) {
        let file = compiled(&parts.join("\n"));
        let list: Vec<Value> = granted.iter().map(|host| Value::from(host.clone())).collect();
        let grants = Grants::parse("policy.toml", &format!("[tenant.local]\nhosts = {}\n", Value::from(list))).expect("grants");
        let open = Grants::parse("policy.toml", "[tenant.local]\nopen = true\n").expect("grants");
        let tenant = TenantName::local();
        let holds = effective(&file, &grants, &tenant).expect("names only");
        for phase in Phase::ALL {
            let (narrow, wide) = (holds.policy.network(phase).effect(), file.policy().network(phase).effect());
            prop_assert!(wide.covers(&narrow));
            if let NameVerdict::Allowed(rule) = narrow.decide(&name, port) {
                prop_assert!(granted.iter().any(|host| {
                    let grant: kiln_core::AllowRule = host.parse().expect("rule");
                    grant.matches(&name) && (!host.contains(':') || grant.ports().contains(&port))
                }), "{name} {port} {rule}");
            }
        }
        prop_assert_eq!(effective(&file, &open, &tenant).expect("open").policy, file.policy().clone());
    }

    #[test]
    fn no_text_makes_the_compiler_panic(text in "[-a-z0-9:*&!{}\\[\\],#'\"|> \n\t.%@/]{0,200}") {
        for format in [Format::Kiln, Format::Cleanroom] {
            if let Err(wrong) = compile(format, "f", &text) {
                prop_assert!(!wrong.to_string().is_empty());
            }
        }
    }
}

#[test]
fn starters_are_legal_policies() {
    let full = StarterFacts {
        runtime: Some("node".to_owned()),
        evidence: Some("package.json".to_owned()),
        hosts: vec!["packages.example.org:443".to_owned()],
    };
    for facts in [StarterFacts::default(), full] {
        let text = starter(&facts);
        let policy = compiled(&text);
        assert_eq!(policy.policy().image.is_some(), facts.runtime.is_some());
        // What is commented out below the text is legal as well: lines that begin with `# ` and a key.
        let keys = [
            "limits:",
            "  upload:",
            "  download:",
            "  connections:",
            "  output:",
            "artifacts:",
            "  - ",
        ];
        let all: String = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if keys.iter().any(|key| rest.starts_with(key)) => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        // And so is the list in the place of the active line.
        let listed: String = text
            .replacen("  mode: isolated\n", "", 1)
            .lines()
            .map(|line| match line.strip_prefix("  # ") {
                Some(rest) if rest.starts_with("allow:") || rest.starts_with("  - ") => {
                    format!("  {rest}\n")
                }
                _ => format!("{line}\n"),
            })
            .collect();
        let network = compiled(&listed).policy().network(Phase::Run).clone();
        assert_eq!(network.rules().len(), 1, "{listed}");
        let policy = compiled(&all);
        assert_eq!(policy.policy().limits.connections, Some(64));
        assert_eq!(policy.policy().artifacts, ["report.xml"]);
    }
}

#[test]
fn a_folder_has_one_policy() {
    let folder = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        choose(move |name: &str| names.iter().any(|there| there == name))
    };
    assert_eq!(folder(&[]), Ok(None));
    assert_eq!(
        folder(&["kiln.yaml"]).expect("one").map(|c| c.name),
        Some("kiln.yaml")
    );
    assert!(folder(&["kiln.yaml", "cleanroom.yaml"]).is_err());
    assert!(folder(&["kiln.yaml", ".buildkite/cleanroom.yaml"]).is_err());
    let choice = folder(&["cleanroom.yaml", ".buildkite/cleanroom.yaml"])
        .expect("one")
        .expect("one");
    assert_eq!(
        (choice.name, choice.unread),
        ("cleanroom.yaml", Some(".buildkite/cleanroom.yaml"))
    );
    assert!(folder(&["kiln.yml"]).is_err());
}
