//! What set-up made: machine image, bases, shared cache head, templates, registry.

use kiln_image::bake::{MachineImages, VerifyDepth};
use kiln_image::heads::{HeadStore, SHARED};
use kiln_machine::driver::Check;
use kiln_worker::home::Home;

use super::super::operator::Operator;
use super::super::registry::port_holder;
use super::super::template;
use super::{fail, pass, warn};
use crate::error::chain;

/// Where `kiln registry serve` listens unless told otherwise.
const REGISTRY_DEFAULT: &str = "127.0.0.1:5080";

pub(super) async fn checks(operator: &Operator) -> Vec<Check> {
    let home = operator.home.clone();
    let image = tokio::task::spawn_blocking(move || machine_image(&home)).await;
    let mut checks =
        vec![image.unwrap_or_else(|error| fail("machine-image", error.to_string(), "try again"))];
    checks.push(bases(operator));
    checks.push(shared_head(&operator.home));
    checks.push(templates(&operator.home));
    checks.push(registry_port());
    checks
}

fn machine_image(home: &Home) -> Check {
    let name = "machine-image";
    let images = MachineImages::new(home.images());
    let current = match images.current() {
        Ok(current) => current,
        Err(error) => return fail(name, chain(&error), "run `kiln setup` once"),
    };
    match images.verify(&current.name, VerifyDepth::OncePerBoot) {
        Ok(image) if super::super::setup::is_of_another_guest(home) => warn(
            name,
            format!("{} has another guest than this kiln", image.name),
            "`kiln setup` makes a new one; until then what is new in this kiln may fail",
        ),
        Ok(image) => pass(
            name,
            format!(
                "{} (kernel {}, BuildKit {})",
                image.name, image.kernel_release, image.buildkit_version
            ),
        ),
        Err(error) => fail(
            name,
            chain(&error),
            "`kiln machine-image bake` makes it again",
        ),
    }
}

fn bases(operator: &Operator) -> Check {
    let all = match operator.bases() {
        Ok(all) => all,
        Err(error) => {
            return fail(
                "bases",
                error.message,
                "correct bases.toml, or run `kiln bases bake`",
            );
        }
    };
    let ready = |base: &&kiln_image::bases::Base| {
        kiln_image::bases::is_own(&base.build) && kiln_image::bases::is_own(&base.run)
    };
    let (there, missing): (Vec<_>, Vec<_>) = all.bases.iter().partition(ready);
    let words = |bases: &[&kiln_image::bases::Base]| {
        bases
            .iter()
            .map(|base| format!("{} {}", base.name, base.version))
            .collect::<Vec<_>>()
            .join(", ")
    };
    match missing.is_empty() {
        true => pass("bases", words(&there)),
        false => fail(
            "bases",
            format!("not made yet: {}", words(&missing)),
            "run `kiln setup` once; builds need them (`kiln bases pull`: those of other registries)",
        ),
    }
}

fn shared_head(home: &Home) -> Check {
    let name = "shared-head";
    let hint = "run `kiln setup` once; builds start from it";
    if !home.heads().is_dir() {
        return fail(name, "there is none", hint);
    }
    match HeadStore::open(&home.heads()).and_then(|store| store.current(SHARED)) {
        Ok(Some(head)) => pass(
            name,
            format!("{} ({})", &head.id, kiln_core::ByteSize(head.bytes)),
        ),
        Ok(None) => fail(name, "there is none", hint),
        Err(error) => fail(name, chain(&error), "`kiln bases bake` makes it again"),
    }
}

fn templates(home: &Home) -> Check {
    let name = "templates";
    let hint = "`kiln template prepare` makes them; without, the first job does and takes longer";
    match template::open(home).map(|store| store.map(|store| store.list())) {
        Ok(Some(Ok(all))) if !all.is_empty() => pass(name, format!("{} made", all.len())),
        Ok(Some(Err(error))) => warn(name, chain(&error), hint),
        Err(error) => warn(name, error.message, hint),
        Ok(_) => warn(name, "none yet", hint),
    }
}

fn registry_port() -> Check {
    let name = "registry-port";
    let Ok(address) = REGISTRY_DEFAULT.parse() else {
        return pass(name, "not checked");
    };
    match port_holder(address) {
        None => pass(
            name,
            format!("{REGISTRY_DEFAULT} is free for `kiln registry serve`"),
        ),
        Some(holder) if holder.starts_with("kiln ") => {
            pass(name, format!("{REGISTRY_DEFAULT} is served by {holder}"))
        }
        Some(holder) => warn(
            name,
            format!("{REGISTRY_DEFAULT} is taken by {holder}"),
            "only `kiln registry serve` needs a port: give it another with --listen",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_machine::driver::CheckLevel;

    #[tokio::test]
    async fn an_empty_home_says_what_to_run() {
        let dir = tempfile::tempdir().expect("temp dir");
        let operator = Operator {
            home: Home::below(&dir.path().join("none")),
            config: crate::config::Config::default(),
            registries: None,
        };
        let checks = checks(&operator).await;
        let failing: Vec<_> = checks
            .iter()
            .filter(|check| check.level == CheckLevel::Fail)
            .collect();
        let names: Vec<&str> = failing.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names, ["machine-image", "bases", "shared-head"]);
        assert!(failing.iter().all(|check| {
            check
                .hint
                .as_deref()
                .is_some_and(|hint| hint.contains("kiln setup"))
        }));
        assert!(!operator.home.data.exists());
    }
}
