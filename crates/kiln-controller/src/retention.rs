//! What age takes away: the database says which finished jobs leave a tier, here their logs and artifacts go.

use kiln_core::JobId;
use kiln_db::{Aged, Database, DbError, Retention, Tier};
use kiln_store::artifacts::{ArtifactError, ArtifactStore};
use kiln_store::logs::{LogError, LogStore};

/// Why a sweep ended early. What went before is gone; the next sweep goes on.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The database does not answer.
    #[error("finished jobs were not aged")]
    Database(#[source] DbError),
    /// Logs could not be removed.
    #[error("the logs of {job} were not removed")]
    Logs {
        /// Of which job.
        job: JobId,
        /// Why.
        #[source]
        source: LogError,
    },
    /// Artifacts could not be removed.
    #[error("the artifacts of {job} were not removed")]
    Artifacts {
        /// Of which job.
        job: JobId,
        /// Why.
        #[source]
        source: ArtifactError,
    },
}

/// Moves finished jobs to the tier of their age, once: call again while the answer is not empty. Logs and artifacts are kept while a job is hot or warm (ended
/// ones are compressed in the object store already); a cold job has its record alone. With `dry_run` nothing changes.
///
/// # Errors
/// [`SweepError`]. Files of a job whose row went are tried again when it leaves its next tier.
pub async fn sweep(
    db: &Database,
    logs: &LogStore,
    artifacts: &ArtifactStore,
    default: Retention,
    dry_run: bool,
) -> Result<Vec<Aged>, SweepError> {
    let aged = db
        .retention_sweep(default, dry_run)
        .await
        .map_err(SweepError::Database)?;
    if dry_run {
        return Ok(aged);
    }
    // The rows have changed: whatever happens to one job's files, those of the others go.
    let mut failed = None;
    for job in &aged {
        if !matches!(job.to, None | Some(Tier::Cold)) {
            continue;
        }
        if let Err(source) = logs.remove_job(&job.tenant, &job.job).await {
            let job = job.job.clone();
            failed.get_or_insert(SweepError::Logs { job, source });
        }
        if let Err(source) = artifacts.remove_job(&job.tenant, &job.job).await {
            let job = job.job.clone();
            failed.get_or_insert(SweepError::Artifacts { job, source });
        }
    }
    failed.map_or(Ok(aged), Err)
}

#[cfg(test)]
mod tests {
    use kiln_db::{DatabaseUrl, OpenOptions};
    use kiln_store::logs::{LogConfig, LogKeys, LogName, ObjectTarget, RetentionClass};

    use super::*;
    use crate::webhooks::job_for_tests as job;

    #[tokio::test]
    async fn logs_and_artifacts_go_when_their_job_is_cold_and_not_in_a_dry_run() {
        let dir = tempfile::tempdir().unwrap();
        let url = DatabaseUrl::Sqlite(dir.path().join("kiln.db"));
        let db = Database::open(&url, OpenOptions::default()).await.unwrap();
        let logs = LogStore::open(LogConfig::in_folder(dir.path().join("logs")))
            .await
            .unwrap();
        let artifacts = ArtifactStore::open(
            dir.path().join("arriving"),
            &ObjectTarget::Folder(dir.path().to_owned()),
            LogKeys::default(),
        )
        .unwrap();
        let new = job("b1", None);
        let name = LogName::new(new.request.tenant.clone(), new.request.id.clone(), 1);
        db.submit(new).await.unwrap();
        logs.append(&name, 0, "line".into()).await.unwrap();
        let file = futures_util::stream::iter([Ok::<_, std::io::Error>("file".into())]);
        artifacts
            .put(&name.tenant, &name.attempt.job, file, 10)
            .await
            .unwrap();
        db.cancel(&name.attempt.job, "user:tester", None)
            .await
            .unwrap();
        logs.end(&name, RetentionClass::Hot, 0).await.unwrap();
        let at_once = Retention {
            hot_ms: 0,
            warm_ms: 0,
            cold_ms: u64::MAX,
        };
        let mut tiers = Vec::new();
        for dry_run in [true, false, true, false] {
            let aged = sweep(&db, &logs, &artifacts, at_once, dry_run)
                .await
                .unwrap();
            tiers.extend(aged.into_iter().map(|aged| aged.to));
            let there = logs.status(&name).await.unwrap().is_some();
            assert_eq!(there, tiers.len() < 4, "{tiers:?}");
            let file = dir.path().join("artifacts/local/b1");
            assert_eq!(file.exists(), there, "{tiers:?}");
        }
        let (warm, cold) = (Some(Tier::Warm), Some(Tier::Cold));
        assert_eq!(tiers, [warm, warm, cold, cold]);
    }
}
