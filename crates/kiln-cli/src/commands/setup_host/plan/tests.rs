use super::super::facts::free_sub_ids;
use super::*;

fn wanted(mode: HostMode, user: &str) -> Wanted {
    Wanted {
        mode,
        user: user.to_owned(),
        state: "/var/lib/kiln".into(),
        operators: "kiln-operators".to_owned(),
        program: "/usr/local/bin/kiln".into(),
    }
}

fn facts() -> Facts {
    Facts {
        user_exists: true,
        systemctl: "/usr/bin/systemctl".into(),
        ..Facts::default()
    }
}

#[test]
fn only_a_service_gets_a_sudoers_file() {
    let full = Facts {
        kvm_group: Some("kvm".to_owned()),
        sub_ids_first: Some(100_000),
        ..facts()
    };
    for mode in [HostMode::User, HostMode::Agent] {
        let steps = steps(&wanted(mode, "ada"), &full).expect("steps");
        assert!(
            !steps.iter().any(|step| matches!(step, Step::File { .. })),
            "{steps:?}"
        );
        assert!(!script(&wanted(mode, "ada"), &steps).contains("sudoers"));
    }
    assert_eq!(
        steps(&wanted(HostMode::User, "ada"), &facts()).expect("steps"),
        []
    );
    let none = Facts {
        user_exists: false,
        ..facts()
    };
    assert!(steps(&wanted(HostMode::Agent, "buildkite-agent"), &none).is_err());
}

#[test]
fn the_service_as_a_script() {
    let fresh = Facts {
        user_exists: false,
        kvm_group: Some("kvm".to_owned()),
        sub_ids_first: Some(100_000),
        ..facts()
    };
    let wanted = wanted(HostMode::Service, "kiln");
    let text = script(&wanted, &steps(&wanted, &fresh).expect("steps"));
    assert_eq!(text, include_str!("service.sh").trim_end());
    let sudoers = super::sudoers(&wanted, Path::new("/usr/bin/systemctl"));
    for forbidden in ["*", "?", "[", "sh ", "ALL, ", "status", "edit", "SETENV"] {
        assert!(!sudoers.contains(forbidden), "{forbidden}: {sudoers}");
    }
}

#[test]
fn nothing_that_a_file_could_misread_is_taken() {
    let args = |user: &str, state: &str, operators: &str| HostArgs {
        print: true,
        apply: false,
        mode: HostMode::Agent,
        user: Some(user.to_owned()),
        state: state.into(),
        operators: operators.to_owned(),
    };
    let taken = |user, state, operators| Wanted::of(&args(user, state, operators), None).is_ok();
    assert!(taken("buildkite-agent", "/srv/kiln_1.2/", "ops"));
    let long = "a".repeat(33);
    for user in [
        "", "a b", "Root", "1a", "a\nb", "a;id", "$(id)", "a%", "ü", &long,
    ] {
        assert!(!taken(user, "/var/lib/kiln", "ops"), "{user:?}");
        assert!(!taken("ada", "/var/lib/kiln", user), "{user:?}");
    }
    for state in [
        "",
        "/",
        "kiln",
        "/a b",
        "/a/../etc",
        "/a//b",
        "/a\nUser=root",
        "/%h",
        "/a:b",
        "/a/.",
    ] {
        assert!(!taken("ada", state, "ops"), "{state:?}");
    }
}

#[test]
fn free_ids_meet_nobody_elses() {
    assert_eq!(free_sub_ids("", "", "ada", None), Some(100_000));
    assert_eq!(
        free_sub_ids("bob:100000:65536\n", "", "ada", None),
        Some(165_536)
    );
    assert_eq!(
        free_sub_ids("bob:165536:65536\n", "eve:100000:65536", "ada", None),
        Some(231_072)
    );
    assert_eq!(
        free_sub_ids("bob:300000:65536\n", "", "ada", None),
        Some(100_000)
    );
    let own = "ada:100000:65536\n";
    assert_eq!(free_sub_ids(own, own, "ada", None), None);
    assert_eq!(
        free_sub_ids("1000:1:65536", "ada:1:65536", "ada", Some("1000")),
        None
    );
    assert_eq!(free_sub_ids(own, "", "ada", None), Some(165_536));
    assert_eq!(free_sub_ids("bob:100000:4294867295", "", "ada", None), None);
    assert_eq!(
        free_sub_ids("x:y:z\n::\nbob:1", "a:1:2:3\n", "ada", None),
        Some(100_000)
    );
}
