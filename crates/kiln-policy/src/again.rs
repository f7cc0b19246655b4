//! A job that is asked for again: what it was granted then is granted still, or it is not run.

use kiln_core::job::{AppliedPolicy, RunPhase, RunPhaseName};
use kiln_core::{ByteSize, FailureClass, GitAccess, NetworkPolicy, TenantName};

use crate::compiled::Compiled;
use crate::effective::effective;
use crate::grant::{Grants, Maxima};
use crate::policy::{Phase, PhaseNetwork, PhasePolicy, Policy};
use crate::run::{Refusal, nothing_removed, of_network};

/// What a job was granted when it was asked for first.
#[derive(Clone, Debug)]
pub struct Standing<'a> {
    /// What its command, or the build, reaches.
    pub network: &'a NetworkPolicy,
    /// What came before the command.
    pub phases: &'a [RunPhase],
    /// Repositories that its command reads.
    pub git: &'a [GitAccess],
    /// The policy it was held to.
    pub applied: Option<AppliedPolicy>,
}

/// Judges what a job was granted by what is granted now; gives the maxima of now, and what it is held to: the lower of both.
///
/// # Errors
/// Policy, with what was withdrawn.
pub fn stands(
    job: &Standing<'_>,
    grants: &Grants,
    tenant: &TenantName,
) -> Result<(Maxima, Option<AppliedPolicy>), Refusal> {
    let learns = job.applied.as_ref().is_some_and(|applied| applied.learn);
    let part = |network: &NetworkPolicy, git: &[GitAccess]| PhasePolicy {
        git: git.iter().map(|one| one.repository.clone()).collect(),
        network: match (network, learns) {
            (NetworkPolicy::Open, true) => PhaseNetwork::Learn,
            _ => of_network(network),
        },
        ..PhasePolicy::default()
    };
    let before = job.phases.iter().map(|phase| {
        let name = match phase.name {
            RunPhaseName::Checkout => Phase::Checkout,
            RunPhaseName::Dependencies => Phase::Dependencies,
            RunPhaseName::Services => Phase::Services,
        };
        (name, part(&phase.network, &phase.git))
    });
    let phases = before.chain([(Phase::Run, part(job.network, job.git))]);
    let policy = Policy {
        phases: phases.collect(),
        ..Policy::default()
    };
    let holds = effective(&Compiled::of_command_line(policy), grants, tenant)?;
    nothing_removed(&holds, "policy")?;
    let git = job.phases.iter().flat_map(|phase| &phase.git);
    let changed = |one: &&GitAccess| {
        let now = holds.credentials.get(&one.repository);
        one.credential.is_some() && one.credential.as_ref() != now
    };
    if let Some(changed) = git.chain(job.git).find(changed) {
        let message = "the operator does not grant its credential any more";
        return Err(Refusal {
            said: Some(changed.repository.to_string()),
            ..Refusal::new(FailureClass::Policy, "policy", message)
        });
    }
    let max = holds.max;
    let now = job.applied.clone().map(|applied| AppliedPolicy {
        upload_bits: lower(applied.upload_bits, max.upload_bits),
        download_bits: lower(applied.download_bits, max.download_bits),
        connections_max: lower(applied.connections_max, max.connections),
        output_bytes_max: lower(applied.output_bytes_max, max.output.map(|ByteSize(n)| n)),
        processes_max: lower(applied.processes_max, max.processes),
        disk_bytes_per_second: lower(
            applied.disk_bytes_per_second,
            max.disk_rate.map(|ByteSize(n)| n),
        ),
        open_files_max: lower(applied.open_files_max, max.open_files),
        ..applied
    });
    Ok((max, now))
}

fn lower<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_withdrawn_is_refused_and_what_is_less_now_is_less() {
        let tenant: TenantName = "acme".parse().expect("tenant");
        let grants = |text: &str| Grants::parse("policy.toml", text).expect("legal");
        let rule = "a.example.org:443/tls".parse().expect("rule");
        let listed = NetworkPolicy::from_rules([rule]);
        let phase = RunPhase {
            name: RunPhaseName::Dependencies,
            network: NetworkPolicy::Open,
            commands: Vec::new(),
            secrets: Vec::new(),
            git: Vec::new(),
        };
        let applied = AppliedPolicy {
            name: Some("kiln.yaml".to_owned()),
            file: kiln_core::Digest::of(b"file"),
            hash: kiln_core::Digest::of(b"hash"),
            upload_bits: Some(10),
            download_bits: None,
            connections_max: Some(3),
            output_bytes_max: None,
            processes_max: None,
            disk_bytes_per_second: None,
            open_files_max: None,
            learn: false,
            decided_us: None,
        };
        let job = Standing {
            network: &listed,
            phases: std::slice::from_ref(&phase),
            git: &[],
            applied: Some(applied.clone()),
        };
        let open = grants("[tenant.acme]\nopen = true\nmax = {connections = 2, cpus = 1}\n");
        let (max, now) = stands(&job, &open, &tenant).expect("granted still");
        let now = now.expect("applied");
        assert_eq!(now.name, applied.name);
        assert_eq!(
            (max.cpus, now.connections_max, now.upload_bits),
            (Some(1), Some(2), Some(10))
        );
        assert!(
            stands(&job, &grants(""), &tenant).is_err(),
            "a phase was open"
        );
        let alone = Standing { phases: &[], ..job };
        assert!(stands(&alone, &grants(""), &tenant).is_ok());
        let reads: GitAccess = serde_json::from_str(
            r#"{"repository":"git.example.org/a","credential":{"secret":"T","user":"ci"}}"#,
        )
        .expect("access");
        let reads = Standing {
            git: std::slice::from_ref(&reads),
            ..alone.clone()
        };
        let git = |entry: &str| grants(&format!("[tenant.acme]\ngit = [{entry}]\n"));
        let own = r#"{ repository = "git.example.org/a", secret = "T", user = "ci" }"#;
        assert!(stands(&reads, &git(own), &tenant).is_ok());
        for withdrawn in ["", "\"git.example.org/a\"", "\"git.example.org/b\""] {
            assert!(
                stands(&reads, &git(withdrawn), &tenant).is_err(),
                "{withdrawn}"
            );
        }
        let others = grants("[tenant.acme]\nhosts = [\"b.example.org\"]\n");
        assert!(stands(&alone, &others, &tenant).is_err());
        let learnt = Standing {
            network: &NetworkPolicy::Open,
            phases: &[],
            git: &[],
            applied: Some(AppliedPolicy {
                learn: true,
                ..applied
            }),
        };
        assert!(
            stands(&learnt, &open, &tenant).is_err(),
            "open is not learn"
        );
        assert!(stands(&learnt, &grants("[tenant.acme]\nlearn = true\n"), &tenant).is_ok());
    }
}
