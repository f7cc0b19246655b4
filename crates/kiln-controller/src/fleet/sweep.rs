//! What time takes away: leases nobody renewed, workers that fell silent, logs and sources whose jobs are over.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_core::job::Source;
use kiln_core::{AttemptId, Digest, TenantName};
use kiln_db::{Database, DbError, Hold, JobFilter, PAGE_MAX, Retention, Sweep};
use kiln_store::logs::{LogError, LogName, RetentionClass};
use kiln_store::registry::RepoName;
use tokio_util::sync::CancellationToken;

use crate::peers::Home;
use crate::state::Controller;

/// Time between two looks at leases.
pub const EVERY: Duration = Duration::from_secs(1);
/// Time between two looks at what has grown old.
const RETAIN_EVERY: Duration = Duration::from_secs(3600);
/// Where attempts push to.
const QUARANTINE: &str = "quarantine";
/// How long an upload is kept after it came, at least: its job may be repeated.
const SOURCE_AGE: Duration = Duration::from_secs(24 * 3600);
/// A controller that is silent for this long does not come back, as far as the logs it kept are concerned.
const KEEPER_GONE: Duration = Duration::from_secs(24 * 3600);
/// Looks at leases between two rounds of tidying.
const TIDY_EVERY: u32 = 10;

/// Sweeps until `stop`.
pub async fn run(controller: Controller, stop: CancellationToken) {
    let mut not_before = None;
    let mut round: u32 = 0;
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = expire(&controller, &mut not_before).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "leases were not swept"
            );
            continue;
        }
        // At once after a start: an earlier life may have left something.
        let tidies = round.is_multiple_of(TIDY_EVERY);
        round = round.wrapping_add(1);
        if tidies && let Err(error) = tidy(&controller).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "not everything was tidied"
            );
        }
    }
}

/// Lets finished jobs grow old, until `stop`.
pub async fn retain(controller: Controller, retention: Retention, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(RETAIN_EVERY) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = forget_sources(&controller).await {
            tracing::warn!(error, "old sources stay for now");
        }
        if let Err(error) = empty_quarantines(&controller).await {
            tracing::warn!(error, "old quarantines stay for now");
        }
        loop {
            let (db, logs) = (&controller.db, &controller.logs);
            let swept = crate::retention::sweep(db, logs, &controller.artifacts, retention, false);
            match swept.await {
                Ok(aged) if aged.is_empty() => break,
                Ok(aged) => tracing::info!(jobs = aged.len(), "finished jobs grew older"),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "not swept");
                    break;
                }
            }
        }
    }
}

/// Removes uploads that no job waits for or runs with, once they are old enough that nobody is about to repeat their job.
async fn forget_sources(controller: &Controller) -> Result<(), String> {
    let old = controller.sources.older_than(SOURCE_AGE).await;
    let old = old.map_err(|error| error.to_string())?;
    if old.is_empty() {
        return Ok(());
    }
    let needed = sources_needed(&controller.db).await;
    let (needed, held) = needed.map_err(|error| error.to_string())?;
    for source in old {
        if !needed.contains(&source) && !held.contains(&source.0) {
            let (tenant, digest) = &source;
            let removed = controller
                .sources
                .remove_old(tenant, digest, SOURCE_AGE)
                .await;
            removed.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

/// Removes what attempts pushed that are over and that nobody named: their workers died in between. Quarantines of builds that this database
/// does not know belong to commands of this home, which remove them themselves.
async fn empty_quarantines(controller: &Controller) -> Result<(), String> {
    let tree: RepoName = QUARANTINE.parse().map_err(|error| format!("{error}"))?;
    let found = controller.registry.list_repositories(Some(&tree)).await;
    for repo in found.map_err(|error| error.to_string())? {
        let Some(attempt) = attempt_of(&repo) else {
            continue;
        };
        let job = controller.db.job(&attempt.job).await;
        let Some(job) = job.map_err(|error| error.to_string())? else {
            continue;
        };
        if job.lease.is_none_or(|lease| lease.attempt != attempt) {
            let removed = controller.registry.delete_tree(&repo).await;
            removed.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

/// The attempt whose quarantine a repository is.
fn attempt_of(repo: &RepoName) -> Option<AttemptId> {
    let (job, number) = repo
        .as_str()
        .strip_prefix(QUARANTINE)?
        .strip_prefix('/')?
        .split_once('/')?;
    Some(AttemptId {
        job: job.parse().ok()?,
        number: number.parse().ok()?,
    })
}

/// What may not go: uploads of jobs that are not over or on hold, and all of the tenants that are on hold.
type Needed = (BTreeSet<(TenantName, Digest)>, BTreeSet<TenantName>);

async fn sources_needed(db: &Database) -> Result<Needed, DbError> {
    let filter = JobFilter {
        states: ["queued", "leased", "running"].map(str::to_owned).into(),
        ..JobFilter::default()
    };
    let (mut jobs, mut tenants, mut after) = (Vec::new(), BTreeSet::new(), None);
    for held in db.holds().await? {
        match held.what {
            Hold::Tenant(tenant) => drop(tenants.insert(tenant)),
            Hold::Job(job) => jobs.push(job),
        }
    }
    loop {
        let page = db.jobs(&filter, after.as_ref(), PAGE_MAX).await?;
        jobs.extend(page.items.into_iter().map(|line| line.id));
        match page.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    let mut needed = BTreeSet::new();
    for job in jobs {
        let request = db.job(&job).await?.map(|job| job.request);
        if let Some(request) = request
            && let Some(Source::Tree { digest, .. }) = request.kind.source()
        {
            needed.insert((request.tenant, *digest));
        }
    }
    Ok((needed, tenants))
}

async fn expire(controller: &Controller, not_before: &mut Option<u64>) -> Result<(), DbError> {
    // Workers get one TTL to report to a controller that has just started.
    let from = match *not_before {
        Some(from) => from,
        None => *not_before.insert(controller.db.sweep_from().await?),
    };
    let grace_ms = controller.db.lease_times().grace_ms;
    for kept in controller.db.expire_kept(from, grace_ms).await? {
        let (attempt, worker) = (&kept.attempt, &kept.worker);
        tracing::info!(%attempt, %worker, "a kept machine is given up");
    }
    loop {
        let swept = controller
            .db
            .expire(Sweep {
                not_before_unix_ms: from,
                grace_ms: controller.db.lease_times().grace_ms,
                jitter: random(),
            })
            .await?;
        for worker in &swept.lost {
            tracing::warn!(%worker, "the worker is silent: it is lost");
        }
        for expired in &swept.expired {
            tracing::warn!(
                attempt = %expired.lease.attempt, worker = %expired.lease.worker,
                now = expired.state.name(), "a lease was not renewed in time"
            );
        }
        if swept.expired.is_empty() {
            return Ok(());
        }
        let count = u64::try_from(swept.expired.len()).unwrap_or(u64::MAX);
        controller.metrics.leases_expired(count);
    }
}

async fn tidy(controller: &Controller) -> Result<(), DbError> {
    crate::pipelines::observe(controller).await?;
    controller.db.forget_lost_own_workers().await?;
    for job in controller.secrets.jobs() {
        let over = controller
            .db
            .job(&job)
            .await?
            .is_none_or(|job| job.state.is_terminal());
        if over {
            controller.secrets.forget(&job);
        }
    }
    let Ok(logs) = controller.logs.unarchived().await else {
        return Ok(());
    };
    for name in logs {
        let job = controller.db.job(&name.attempt.job).await?;
        let ended = job.is_none_or(|job| {
            job.state.is_terminal()
                || job
                    .lease
                    .is_some_and(|lease| lease.attempt.number > name.attempt.number)
        });
        if ended && let Err(error) = put_away(controller, &name).await? {
            tracing::warn!(log = %name, error = &error as &dyn std::error::Error, "a log was not put away");
        }
    }
    Ok(())
}

/// Ends a log that is here. One that another controller keeps is what a worker sent before it moved there: a part, which goes once the
/// whole is where ended logs are, and stands for the whole when that controller does not come back.
async fn put_away(
    controller: &Controller,
    name: &LogName,
) -> Result<Result<(), LogError>, DbError> {
    if controller.home_now(&name.attempt).await? != Home::Here {
        match controller.logs.is_archived(name).await {
            Ok(true) => return Ok(controller.logs.discard(name).await),
            Ok(false) => {}
            Err(error) => return Ok(Err(error)),
        }
        if !controller.home_is_lost(&name.attempt, KEEPER_GONE).await? {
            return Ok(Ok(()));
        }
    }
    let now = controller.db.now().await?;
    let ended = controller.logs.end(name, RetentionClass::Hot, now).await;
    Ok(ended.map(drop))
}

/// A random number, for backoffs and names; 0 without the kernel's help.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kiln_core::JobKind;
    use kiln_core::job::{Limits, SourceBuild, TrustClass};
    use kiln_core::{ByteSize, Dispatch, JobId, JobRequest, NetworkPolicy};
    use kiln_db::{DatabaseUrl, NewJob, OpenOptions};

    use super::*;

    fn build(id: &str, digest: Digest) -> NewJob {
        let source = Source::Tree { digest, size: 1 };
        let kind = JobKind::SourceBuild(SourceBuild {
            source,
            name: "app".to_owned(),
            dockerfile: None,
            dockerfile_text: None,
            target: None,
            build_args: BTreeMap::new(),
            secrets: Vec::new(),
            stored_secrets: Vec::new(),
            tags: Vec::new(),
            no_cache: false,
            only_network: false,
            repository_policy: false,
            policy_ref: None,
        });
        let limits = Limits {
            cpus: 1,
            memory: ByteSize::mib(512),
            disk: ByteSize::mib(512),
            timeout_ms: 1_000,
        };
        let request = JobRequest {
            id: id.parse().expect("name"),
            tenant: TenantName::local(),
            kind,
            network: NetworkPolicy::Isolated,
            limits,
            trust: TrustClass::Untrusted,
            network_bits: None,
            dispatch: Dispatch::default(),
            traceparent: None,
            policy: None,
        };
        NewJob {
            request,
            idempotency: None,
            submitted_by: "test".to_owned(),
            notify_url: None,
            labels: BTreeMap::new(),
        }
    }

    #[tokio::test]
    async fn sources_of_jobs_that_are_not_over_are_needed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let url = DatabaseUrl::Sqlite(dir.path().join("kiln.db"));
        let db = Database::open(&url, OpenOptions::default())
            .await
            .expect("open");
        let (waits, over) = (Digest::of(b"waits"), Digest::of(b"over"));
        db.submit(build("b1", waits)).await.expect("submitted");
        db.submit(build("b2", over)).await.expect("submitted");
        let ended: JobId = "b2".parse().expect("name");
        db.cancel(&ended, "test", None).await.expect("cancelled");
        let needed = sources_needed(&db).await.expect("read");
        let waiting = (TenantName::local(), waits);
        assert_eq!(needed, ([waiting.clone()].into(), BTreeSet::new()));
        for what in [Hold::Job(ended), Hold::Tenant(TenantName::local())] {
            db.hold(what, "test", "a case").await.expect("held");
        }
        let needed = sources_needed(&db).await.expect("read");
        let both = [waiting, (TenantName::local(), over)].into();
        assert_eq!(needed, (both, [TenantName::local()].into()));
        db.close().await;
    }

    #[test]
    fn quarantines_name_their_attempts() {
        let of = |text: &str| attempt_of(&text.parse().expect("a repository"));
        let attempt = of("quarantine/b1/2").expect("an attempt");
        assert_eq!((attempt.job.as_str(), attempt.number), ("b1", 2));
        assert!(of("quarantine/b1").is_none() && of("t/local/quarantine/1").is_none());
    }
}
