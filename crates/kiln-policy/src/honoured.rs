//! What a policy asks for and this kiln cannot hold a run to: refused by name before anything starts, never passed over.

use kiln_core::{ByteSize, DiskRole, FailureClass, ImageRef};

use crate::compiled::Compiled;
use crate::effective::Effective;
use crate::policy::{Image, Limits, PhaseNetwork, Policy, Secret, SecretPlace};
use crate::run::Refusal;

/// Where a machine has the files of secrets, and a RUN step those that it mounts.
const SECRETS: &str = "/run/secrets";
/// Of an image whose name begins with a registry's host.
pub(crate) const ELSEWHERE: &str = "only images in kiln's own registry can be run";
pub(crate) const ELSEWHERE_HINT: &str = "images of other registries are not fetched for a run: build one `FROM` it with `kiln build`, and name that; `kiln registry list --json` has digests";
/// Least rate of a machine's disks, bytes per second: with less it is not ready in the time that it has for that.
const DISK_RATE_LEAST: ByteSize = ByteSize::mib(1);
/// Fewest open files: what puts a container together has some itself.
const OPEN_FILES_LEAST: u32 = 64;

/// Another image than the file's is another job, not a narrower one.
#[must_use]
pub fn other_image(other: &ImageRef, own: &str, file: &str) -> Refusal {
    let message = format!("{file} names {own}, and a flag can only narrow a policy");
    Refusal {
        said: Some(other.to_string()),
        ..Refusal::new(FailureClass::Usage, "image", message)
    }
    .hint("take the flag away, or name another policy with --policy")
}

/// Whether a run of this host could be held to what holds of a file, learning set aside.
///
/// # Errors
/// Policy, as [`hold_run`] says it.
pub fn runnable(
    compiled: &Compiled,
    holds: &Effective,
    connections_most: u32,
) -> Result<(), Refusal> {
    let named = (compiled.file(), compiled.line_of_amount("image"));
    enforceable(&holds.policy, named, true, connections_most)
}

/// A secret as a file that no machine would have there.
pub(crate) fn elsewhere_than_secrets(secret: &Secret) -> Option<String> {
    match &secret.place {
        SecretPlace::File(path) if *path != format!("{SECRETS}/{}", secret.name) => Some(format!(
            "the secret {} elsewhere than at {SECRETS}/{0}",
            secret.name
        )),
        SecretPlace::File(_) | SecretPlace::Env(_) => None,
    }
}

/// What the policy asks for and this kiln cannot hold a run to. Nothing of it is passed over.
pub(crate) fn enforceable(
    policy: &Policy,
    (file, image_line): (&str, u32),
    learns: bool,
    connections_most: u32,
) -> Result<(), Refusal> {
    let mut missing = Vec::new();
    let mut elsewhere = false;
    let of_image = match &policy.image {
        Some(Image::Pinned(image)) => Some((image, format!("the image (line {image_line})"))),
        _ => None,
    };
    let services = policy.services.iter();
    let services =
        services.map(|(name, one)| (&one.image, format!("the image of the service {name}")));
    for (image, whose) in of_image.into_iter().chain(services) {
        if image.registry.is_some() {
            elsewhere = true;
            missing.push(format!("{whose} {image}: {ELSEWHERE}"));
        }
    }
    for (phase, part) in &policy.phases {
        if part.network == PhaseNetwork::Learn && !learns {
            missing.push(format!(
                "the mode learn of the phase {phase} without `kiln policy learn`"
            ));
        }
    }
    if policy.services.len() > DiskRole::SERVICES.len() {
        missing.push(format!("more than {} services", DiskRole::SERVICES.len()));
    }
    missing.extend(policy.secrets.iter().filter_map(elsewhere_than_secrets));
    let connections = policy.limits.connections;
    if connections.is_some_and(|count| count > connections_most) {
        missing.push(format!("limits.connections above {connections_most}"));
    }
    missing.extend(too_slow_a_disk(&policy.limits));
    if let Some(few) = policy
        .limits
        .open_files
        .filter(|few| *few < OPEN_FILES_LEAST)
    {
        missing.push(format!(
            "limits.open_files of {few}, less than {OPEN_FILES_LEAST}"
        ));
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(Refusal::new(
            FailureClass::Policy,
            "policy",
            format!(
                "{file} asks for what `kiln run` cannot hold a command to yet: {}",
                missing.join(", ")
            ),
        )
        .hint(match elsewhere {
            true => ELSEWHERE_HINT,
            false => "nothing was started; take it out of the file, or write less",
        })),
    }
}

/// A rate with which a machine would not get its disk ready in the time that it has for it.
pub(crate) fn too_slow_a_disk(limits: &Limits) -> Option<String> {
    let slow = limits.disk_rate.filter(|rate| *rate < DISK_RATE_LEAST)?;
    Some(format!(
        "limits.disk_rate of {slow}, less than {DISK_RATE_LEAST}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grant::Grants;

    fn refused(text: &str) -> Option<String> {
        let compiled = crate::compile(crate::Format::Kiln, "kiln.yaml", text).expect("legal");
        let tenant = "acme".parse().expect("tenant");
        let holds = crate::effective(&compiled, &Grants::default(), &tenant).expect("granted");
        runnable(&compiled, &holds, 128)
            .err()
            .map(|refusal| refusal.message)
    }

    #[test]
    fn what_cannot_be_honoured_is_named_and_all_of_it() {
        let service = |n: usize| {
            let image = format!("app@sha256:{}", "a".repeat(64));
            format!("  s{n}: {{image: \"{image}\", port: 80}}\n")
        };
        let services = |count: usize| -> String { (0..count).map(service).collect() };
        assert_eq!(
            refused(&format!("version: 1\nservices:\n{}", services(4))),
            None
        );
        let five = format!("version: 1\nservices:\n{}", services(5));
        let five = refused(&five).expect("refused");
        assert!(
            five.ends_with("cannot hold a command to yet: more than 4 services"),
            "{five}"
        );
        let all = format!(
            "version: 1\nlimits: {{connections: 129, disk_rate: 1K}}\nsecrets:\n  - {{name: t, file: /etc/t, phase: run, hosts: []}}\nservices:\n{}",
            services(5)
        );
        let all = refused(&all).expect("refused");
        for one in [
            "more than 4 services",
            "the secret t elsewhere than at /run/secrets/t",
            "limits.connections above 128",
            "limits.disk_rate of",
        ] {
            assert!(all.contains(one), "{one}: {all}");
        }
    }
}
