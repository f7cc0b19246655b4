//! Policy files of both formats: bounded, no panic, and what is legal has a canonical form that means the same.
#![no_main]

use kiln_policy::{DIAGNOSTICS_MAX, Format, Phase, PhaseNetwork, compile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for format in [Format::Kiln, Format::Cleanroom] {
        let compiled = match compile(format, "f", text) {
            Ok(compiled) => compiled,
            Err(wrong) => {
                assert!(!wrong.list.is_empty() && wrong.list.len() <= DIAGNOSTICS_MAX);
                // Nothing of the file drives a terminal.
                assert!(!wrong.to_string().chars().any(|c| c.is_control() && c != '\n'));
                continue;
            }
        };
        let policy = compiled.policy();
        let canonical = policy.canonical();
        let again = compile(Format::Kiln, "f", &canonical).expect("a canonical form is legal");
        assert_eq!(again.policy(), policy);
        assert_eq!(again.hash(), compiled.hash());
        // A secret's phase, and every later one, reaches nothing beyond its hosts.
        for secret in &policy.secrets {
            for phase in Phase::ALL.into_iter().filter(|phase| *phase >= secret.phase) {
                match policy.network(phase) {
                    PhaseNetwork::Isolated => {}
                    PhaseNetwork::Egress(rules) => {
                        assert!(rules.iter().all(|rule| secret.hosts.iter().any(|host| host.covers(rule))));
                    }
                    wide => panic!("{} beside a secret", wide.mode()),
                }
            }
        }
    }
});
