//! Which cache head a build forks: one that it may read, whose files are what they were when they were sealed.
//!
//! A build commits only to the scope that it forked, so what follows of a build with a secret stays where no untrusted ref reads:
//!
//! | build | forks, and on success commits to |
//! |---|---|
//! | trusted, with a secret, or a command's own | the tenant's own scope |
//! | trusted, without a secret | the tenant's plain scope |
//! | untrusted | the tenant's plain scope, and commits nothing |

use kiln_core::job::TrustClass;
use kiln_core::{FailureClass, JobRequest};
use kiln_image::heads::{Head, SHARED, own_scope, plain_scope};

use crate::event::Events;
use crate::failure::Failure;
use crate::host::Host;
use crate::orders;

/// The scope of a build's cache. `received`: the machine is given a secret, or an agent is lent to it. A command's own builds are this host's
/// user's, who reads all of it: they keep to one scope, with and without secrets.
#[must_use]
pub fn scope(request: &JobRequest, received: bool) -> String {
    let trusted = request.trust == TrustClass::Trusted;
    let own = request.dispatch.requires.own().is_some();
    match trusted && (own || received || !request.secret_names().is_empty()) {
        true => own_scope(&request.tenant),
        false => plain_scope(&request.tenant),
    }
}

/// The head of a scope to fork, its whole chain sound; without the cache the shared one, which holds only bases. A tenant's head that is
/// damaged is left behind, and told.
///
/// # Errors
/// When there is no head, or the shared one is damaged.
pub async fn head(
    host: &Host,
    scope: &str,
    no_cache: bool,
    events: &Events,
) -> Result<Head, Failure> {
    let scope = if no_cache { SHARED } else { scope }.to_owned();
    let (heads, buildkit) = (host.heads.clone(), host.image.buildkit.clone());
    // The first use after the host booted reads every byte.
    let fork = tokio::task::spawn_blocking(move || heads.sound_to_fork(&scope, &buildkit))
        .await
        .map_err(|error| Failure::infrastructure(&error))?;
    let fork = fork.map_err(|error| {
        let failure = Failure::infrastructure(&error);
        if !error.is_damage() {
            return failure;
        }
        failure.hint("it is not used again: `kiln bases bake` makes the shared cache head anew")
    })?;
    if let Some(error) = fork.forgotten {
        let why = orders::chain(&error);
        events
            .warn(format!(
                "the build cache was damaged and is left behind: {why}"
            ))
            .await;
    }
    fork.head.ok_or_else(|| {
        Failure::new(
            FailureClass::Infrastructure,
            "there are no runtime bases yet",
        )
        .hint("run `kiln setup` once")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(trust: &str, secrets: &[&str], labels: &serde_json::Value) -> JobRequest {
        serde_json::from_value(serde_json::json!({
            "id": "b1m7z7g68prr466fez", "tenant": "acme",
            "kind": {"kind": "source_build", "name": "a", "source": {"from": "git", "url": "https://git.example.org/a", "reference": "HEAD"}, "secrets": secrets},
            "network": {"mode": "isolated"}, "dispatch": {"requires": {"labels": labels}},
            "limits": {"cpus": 2, "memory": 1 << 30, "disk": 8_u64 << 30, "timeout_ms": 60_000}, "trust": trust,
        }))
        .expect("a request")
    }

    #[test]
    fn what_a_secret_may_have_touched_is_read_by_trusted_builds_alone() {
        let of = |trust, secrets: &[&str], received| {
            scope(&request(trust, secrets, &serde_json::json!({})), received)
        };
        assert_eq!(of("trusted", &["token"], false), "acme");
        assert_eq!(of("trusted", &[], true), "acme");
        assert_eq!(of("trusted", &[], false), "acme.plain");
        for (secrets, received) in [(&[][..], false), (&["token"], false), (&["token"], true)] {
            assert_eq!(of("untrusted", secrets, received), "acme.plain");
        }
        // This host's user builds on with what is there, with secrets and without.
        let own = serde_json::json!({"kiln/own": "w1"});
        assert_eq!(scope(&request("trusted", &[], &own), false), "acme");
        assert_eq!(scope(&request("untrusted", &[], &own), false), "acme.plain");
    }
}
