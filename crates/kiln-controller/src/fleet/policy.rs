//! The policy in the commit that a build is made from, or in a trusted ref of its repository. It is known only when a worker has proven the
//! commit: the worker reads the file from the objects that it checked itself, and here it is compiled and bounded by what the operator grants, before the machine of the build starts.

use std::time::Instant;

use axum::Json;
use axum::extract::State;
use kiln_core::access::Ceiling;
use kiln_core::job::{JobRequest, POLICY_BYTES_MAX, POLICY_NAMES, SourceBuild, TrustClass};
use kiln_core::{FailureClass, JobKind};
use kiln_db::DoorKind;
use kiln_policy::policy::Resources;
use kiln_policy::{
    BuildAsked, Compiled, Grants, Narrowed, Refusal, choose, compile, hold_build,
    hold_untrusted_build,
};
use kiln_proto::fleet::{AskPolicy, BeyondPolicy, HeldPolicy, PolicyAnswer};

use super::doors::{Answered, open_door};
use super::refusal::Refused;
use super::who::Live;
use crate::api::{policy_notes, read_grants};
use crate::state::Controller;

pub(super) async fn judge(
    State(controller): State<Controller>,
    held: Live,
    Json(ask): Json<AskPolicy>,
) -> Answered<PolicyAnswer> {
    if ask.files.len() > POLICY_NAMES.len() {
        return Err(Refused::bad("a commit has fewer policies"));
    }
    let job = controller.db.job(&held.lease.attempt.job).await?;
    let request = job.ok_or_else(|| Refused::missing("there is no such job"))?;
    let request = request.request;
    let build = match &request.kind {
        JobKind::SourceBuild(build) if build.repository_policy => build,
        _ => return Err(Refused::bad("no commit says what this job may do")),
    };
    if ask.reference.is_some() && ask.reference != build.policy_ref {
        return Err(Refused::bad("another ref's policy counts for this job"));
    }
    let grants = grants(&controller).await?;
    let answer = match answer(
        &controller.settings.ceiling,
        (&request, build),
        &ask,
        &grants,
    ) {
        Ok(answer) => answer,
        Err(refused) => refused,
    };
    let detail = match &answer {
        PolicyAnswer::None => "none".to_owned(),
        PolicyAnswer::Held(held) => held.applied.hash.to_string(),
        PolicyAnswer::Refused { .. } => "refused".to_owned(),
    };
    open_door(&controller, &held.lease, DoorKind::Policy, detail).await?;
    Ok(Json(answer))
}

/// What the operator grants now. A file that cannot be used grants nothing.
async fn grants(controller: &Controller) -> Result<Grants, Refused> {
    let Some(path) = controller.settings.grants.clone() else {
        return Ok(Grants::default());
    };
    let unusable = |error: &(dyn std::error::Error + 'static)| {
        tracing::warn!(error, "the operator's grants cannot be used");
        Refused::unavailable("what the operator grants cannot be read")
    };
    let read = tokio::task::spawn_blocking(move || read_grants(&path)).await;
    let read = read.map_err(|error| unusable(&error))?;
    read.map_err(|error| unusable(&error))
}

fn no(class: FailureClass, message: impl Into<String>, hint: Option<String>) -> PolicyAnswer {
    PolicyAnswer::Refused {
        class,
        message: message.into(),
        hint,
    }
}

/// The policy of the commit, if it has one.
fn of_commit(ask: &AskPolicy) -> Result<Option<Compiled>, PolicyAnswer> {
    let usage = |message: String, hint| no(FailureClass::Usage, message, hint);
    let place = ask.reference.as_deref().unwrap_or("the commit");
    let choice = choose(|name| ask.files.contains_key(name)).map_err(|error| {
        let hint = "keep one policy, called kiln.yaml or cleanroom.yaml";
        usage(format!("in {place}: {error}"), Some(hint.to_owned()))
    })?;
    let Some(choice) = choice else {
        return Ok(None);
    };
    let text = ask.files.get(choice.name).map(String::as_str);
    let text = text.unwrap_or_default();
    if text.len() > POLICY_BYTES_MAX {
        let message = format!("{}: it has more than {POLICY_BYTES_MAX} bytes", choice.name);
        return Err(usage(message, None));
    }
    let compiled = compile(choice.format, choice.name, text);
    let compiled = compiled.map_err(|wrong| {
        let text = wrong.to_string();
        usage(
            format!("the policy in {place} is wrong\n\n{}", text.trim_end()),
            None,
        )
    })?;
    Ok(Some(compiled))
}

fn answer(
    ceiling: &Ceiling,
    (request, build): (&JobRequest, &SourceBuild),
    ask: &AskPolicy,
    grants: &Grants,
) -> Result<PolicyAnswer, PolicyAnswer> {
    let since = Instant::now();
    let Some(compiled) = of_commit(ask)? else {
        return Ok(PolicyAnswer::None);
    };
    let asked = BuildAsked {
        allow: request.network.rules(),
        // What the job may use was decided when it was asked for, and its worker chosen by that: here it only becomes less.
        resources: Resources::default(),
        disk: None,
        secrets: &build.secrets,
        connections_most: kiln_proto::msg::CONNECTIONS_MOST,
    };
    let (tenant, file) = (&request.tenant, &compiled);
    let held = match request.trust {
        TrustClass::Trusted => {
            hold_build(Some(file), grants, tenant, &asked).map(|held| (held, None))
        }
        // Whoever wrote the commit may be anybody; whoever wrote this file is trusted.
        TrustClass::Untrusted if ask.reference.is_some() => {
            hold_build(Some(file), grants, tenant, &asked).map(|held| (held, None))
        }
        // Whoever wrote the commit may be anybody: what it says takes away, and gives nothing.
        TrustClass::Untrusted => hold_untrusted_build(file, grants, tenant, &asked),
    };
    let (held, narrowed) = held.map_err(of_refusal)?;
    if let Err(outside) = ceiling.check_network(&held.network) {
        let message = format!("{}: {}", compiled.file(), outside.bounds());
        return Err(no(FailureClass::Policy, message, None));
    }
    let notes = policy_notes(&compiled, &held.removed);
    let mut limits = request.limits;
    let file = held.resources;
    limits.cpus = file.cpus.map_or(limits.cpus, |most| most.min(limits.cpus));
    limits.memory = file
        .memory
        .map_or(limits.memory, |most| most.min(limits.memory));
    limits.disk = held.disk.map_or(limits.disk, |most| most.min(limits.disk));
    let timeout = file.timeout_ms.unwrap_or(limits.timeout_ms);
    limits.timeout_ms = limits.timeout_ms.min(timeout);
    kiln_policy::below(&mut limits, &held.max);
    let Some(mut applied) = held.applied else {
        return Ok(PolicyAnswer::None);
    };
    applied.took(since.elapsed());
    Ok(PolicyAnswer::Held(Box::new(HeldPolicy {
        network: held.network,
        only_network: held.only,
        limits,
        applied,
        notes,
        beyond: narrowed
            .iter()
            .flat_map(|one| beyond(&compiled, one))
            .collect(),
        registries_within: narrowed.map(|one| one.within),
    })))
}

fn beyond(file: &Compiled, narrowed: &Narrowed) -> Vec<BeyondPolicy> {
    let all = narrowed.beyond.iter().map(|one| BeyondPolicy {
        rule: one.rule.clone(),
        place: format!("{}:{}", file.file(), one.line),
    });
    all.collect()
}

fn of_refusal(refusal: Refusal) -> PolicyAnswer {
    let message = match &refusal.said {
        Some(said) => format!("{said}: {}", refusal.message),
        None => refusal.message,
    };
    let hint = Some(refusal.hints.join("; ")).filter(|hint| !hint.is_empty());
    no(refusal.class, message, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(allow: &[&str], trust: TrustClass) -> JobRequest {
        serde_json::from_value(serde_json::json!({
            "id": "b1m7z7g68prr466fez", "tenant": "acme",
            "kind": {"kind": "source_build", "name": "a", "source": {"from": "git", "url": "https://git.example.org/a", "reference": "HEAD"}, "repository_policy": true},
            "network": match allow.is_empty() {
                true => serde_json::json!({"mode": "isolated"}),
                false => serde_json::json!({"mode": "egress", "allow": allow}),
            },
            "limits": {"cpus": 2, "memory": 1 << 30, "disk": 8_u64 << 30, "timeout_ms": 60_000}, "trust": trust,
        }))
        .expect("a request")
    }

    fn judged(file: (&str, &str), grants: &str, allow: &[&str]) -> PolicyAnswer {
        judged_as(TrustClass::Trusted, file, grants, allow)
    }

    fn judged_as(
        trust: TrustClass,
        file: (&str, &str),
        grants: &str,
        allow: &[&str],
    ) -> PolicyAnswer {
        let request = request(allow, trust);
        let JobKind::SourceBuild(build) = &request.kind else {
            panic!("a build");
        };
        let ask = AskPolicy {
            files: [(file.0.to_owned(), file.1.to_owned())].into(),
            reference: None,
        };
        let grants = Grants::parse("policy.toml", grants).expect("legal");
        let ceiling = Ceiling::default();
        let answer = answer(&ceiling, (&request, build), &ask, &grants);
        answer.unwrap_or_else(|refused| refused)
    }

    fn held(answer: PolicyAnswer) -> HeldPolicy {
        match answer {
            PolicyAnswer::Held(held) => *held,
            other => panic!("{other:?}"),
        }
    }

    const FILE: &str = "version: 1\nresources: {cpus: 1, memory: 8G}\nphases:\n  dependencies:\n    network: {allow: [\"a.example.org:443\", \"b.example.org:443\"]}\n";

    #[test]
    fn a_commit_says_what_its_build_reaches_within_the_grant() {
        let all = held(judged(("kiln.yaml", FILE), "", &[]));
        assert_eq!((all.network.rules().len(), all.only_network), (2, true));
        assert_eq!(all.applied.name.as_deref(), Some("kiln.yaml"));
        // It takes away of what the job was given, and adds nothing.
        assert_eq!((all.limits.cpus, all.limits.memory.0), (1, 1 << 30));
        let one = "[tenant.acme]\nhosts = [\"a.example.org\"]\n";
        let one = held(judged(("kiln.yaml", FILE), one, &[]));
        assert_eq!(one.network.rules().len(), 1, "{one:?}");
        assert!(one.notes[0].starts_with("kiln.yaml:5"), "{one:?}");
        let narrowed = held(judged(("kiln.yaml", FILE), "", &["b.example.org:443"]));
        assert_eq!(narrowed.network.rules().len(), 1);
        assert_eq!(judged(("README.md", ""), "", &[]), PolicyAnswer::None);
    }

    #[test]
    fn an_untrusted_commit_names_no_host_for_itself() {
        let of = |allow: &[&str]| {
            held(judged_as(
                TrustClass::Untrusted,
                ("kiln.yaml", FILE),
                "",
                allow,
            ))
        };
        let unasked = of(&[]);
        assert_eq!(unasked.network, kiln_core::NetworkPolicy::Isolated);
        // A worker that does not know the bound of registries gives none.
        assert!(unasked.only_network);
        let within = unasked.registries_within.expect("registries are bounded");
        assert_eq!(within.rules().len(), 2);
        let places: Vec<&str> = unasked
            .beyond
            .iter()
            .map(|one| one.place.as_str())
            .collect();
        assert_eq!(places, ["kiln.yaml:5", "kiln.yaml:5"]);
        assert_eq!((unasked.limits.cpus, unasked.limits.memory.0), (1, 1 << 30));
        let asked = of(&["b.example.org:443"]);
        assert_eq!(asked.network.rules().len(), 1);
        assert_eq!(asked.beyond[0].rule.host(), "a.example.org");
        // A secret of the file opens nothing either.
        let secret = "version: 1\nphases: {dependencies: {network: {allow: [\"x.example.org:443\"]}}}\nsecrets:\n  - {name: token, file: /run/secrets/token, phase: dependencies, hosts: [\"x.example.org:443\"]}\n";
        let mut request = request(&[], TrustClass::Untrusted);
        let JobKind::SourceBuild(build) = &mut request.kind else {
            panic!("a build");
        };
        build.secrets = vec!["token".to_owned()];
        let build = build.clone();
        let ask = AskPolicy {
            files: [("kiln.yaml".to_owned(), secret.to_owned())].into(),
            reference: None,
        };
        let with = |trust| {
            let request = JobRequest {
                trust,
                ..request.clone()
            };
            let answer = answer(
                &Ceiling::default(),
                (&request, &build),
                &ask,
                &Grants::default(),
            );
            held(answer.unwrap_or_else(|refused| refused))
        };
        assert_eq!(with(TrustClass::Trusted).network.rules().len(), 1);
        let untrusted = with(TrustClass::Untrusted);
        assert_eq!(untrusted.network, kiln_core::NetworkPolicy::Isolated);
        assert_eq!(untrusted.beyond.len(), 1);
    }

    #[test]
    fn a_trusted_refs_policy_says_what_an_untrusted_commit_reaches() {
        let mut request = request(&["c.example.org:443"], TrustClass::Untrusted);
        request.network = kiln_core::NetworkPolicy::Isolated;
        let JobKind::SourceBuild(build) = request.kind.clone() else {
            panic!("a build");
        };
        let of = |reference: Option<&str>, grants: &str| {
            let ask = AskPolicy {
                files: [("kiln.yaml".to_owned(), FILE.to_owned())].into(),
                reference: reference.map(str::to_owned),
            };
            let grants = Grants::parse("policy.toml", grants).expect("legal");
            let answer = answer(&Ceiling::default(), (&request, &build), &ask, &grants);
            held(answer.unwrap_or_else(|refused| refused))
        };
        let trusted = of(Some("refs/heads/main"), "");
        assert_eq!(
            (trusted.network.rules().len(), trusted.only_network),
            (2, true)
        );
        assert_eq!(trusted.registries_within, None);
        // The operator's grant bounds it all the same.
        let one = of(
            Some("refs/heads/main"),
            "[tenant.acme]\nhosts = [\"a.example.org\"]\n",
        );
        assert_eq!(one.network.rules().len(), 1);
        let own = of(None, "");
        assert_eq!(own.network, kiln_core::NetworkPolicy::Isolated);
    }

    #[test]
    fn what_a_commit_may_not_have_is_refused() {
        let refused = |answer| match answer {
            PolicyAnswer::Refused { class, message, .. } => (class, message),
            other => panic!("{other:?}"),
        };
        let (class, message) = refused(judged(("kiln.yaml", FILE), "", &["c.example.org:443"]));
        assert_eq!(class, FailureClass::Usage, "{message}");
        let open = "version: 1\nphases:\n  dependencies:\n    network: {mode: open}\n";
        let (class, message) = refused(judged(("kiln.yaml", open), "", &[]));
        assert_eq!(class, FailureClass::Policy, "{message}");
        assert!(message.contains("kiln.yaml:4"), "{message}");
        let (class, message) = refused(judged(("kiln.yaml", "version: 1\nwrong: x\n"), "", &[]));
        assert_eq!(class, FailureClass::Usage);
        assert!(message.contains("kiln.yaml:2"), "{message}");
        let (class, _) = refused(judged(("kiln.yml", FILE), "", &[]));
        assert_eq!(class, FailureClass::Usage, "nearly a policy is none");
    }
}
