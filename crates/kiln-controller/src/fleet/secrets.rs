//! Secrets that came with a request. They live in this process's memory and nowhere else: a controller that restarts has lost them, and
//! the job says so.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_core::{JobId, TenantName};

/// Most bytes of all secrets that are held.
pub const BYTES_MAX: usize = 64 << 20;
/// Most bytes of one tenant's secrets: no tenant takes the room of all.
pub const TENANT_BYTES_MAX: usize = BYTES_MAX / 4;
/// Most bytes of one job's secrets. In base 64 and with their names they fit into one answer to a worker ([`kiln_proto::fleet::BODY_MAX`]): one
/// that could never read its secrets would fail on every host.
pub const JOB_BYTES_MAX: usize = 2 << 20;

/// Why secrets were not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SecretsRefused {
    /// One job's are too large.
    #[error("the secrets of one job have at most {JOB_BYTES_MAX} bytes")]
    JobTooLarge,
    /// Too many of this tenant are held.
    #[error("too many secrets are held for waiting jobs of this tenant: try again later")]
    TenantFull,
    /// Too many are held.
    #[error("too many secrets are held for waiting jobs: try again later")]
    Full,
}

/// Values by job and name.
#[derive(Default)]
pub struct Secrets {
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    jobs: HashMap<JobId, OfJob>,
    tenants: HashMap<TenantName, usize>,
    bytes: usize,
}

struct OfJob {
    tenant: TenantName,
    values: HashMap<String, Vec<u8>>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secrets(of {} jobs)", self.lock().jobs.len())
    }
}

fn size(values: &HashMap<String, Vec<u8>>) -> usize {
    values
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum()
}

impl Held {
    fn forget(&mut self, job: &JobId) {
        let Some(old) = self.jobs.remove(job) else {
            return;
        };
        let bytes = size(&old.values);
        self.bytes -= bytes;
        if let Some(of) = self.tenants.get_mut(&old.tenant) {
            *of -= bytes;
            if *of == 0 {
                self.tenants.remove(&old.tenant);
            }
        }
    }
}

impl Secrets {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the secrets of a tenant's job until [`Secrets::forget`].
    ///
    /// # Errors
    /// When there are too many; nothing is held then.
    pub fn hold(
        &self,
        tenant: &TenantName,
        job: JobId,
        values: HashMap<String, Vec<u8>>,
    ) -> Result<(), SecretsRefused> {
        let bytes = size(&values);
        if bytes > JOB_BYTES_MAX {
            return Err(SecretsRefused::JobTooLarge);
        }
        let mut held = self.lock();
        let of = held.tenants.get(tenant).copied().unwrap_or(0);
        if of + bytes > TENANT_BYTES_MAX {
            return Err(SecretsRefused::TenantFull);
        }
        if held.bytes + bytes > BYTES_MAX {
            return Err(SecretsRefused::Full);
        }
        held.forget(&job);
        held.bytes += bytes;
        *held.tenants.entry(tenant.clone()).or_default() += bytes;
        let tenant = tenant.clone();
        held.jobs.insert(job, OfJob { tenant, values });
        Ok(())
    }

    /// One value.
    #[must_use]
    pub fn get(&self, job: &JobId, name: &str) -> Option<Vec<u8>> {
        self.lock().jobs.get(job)?.values.get(name).cloned()
    }

    /// The job is over.
    pub fn forget(&self, job: &JobId) {
        self.lock().forget(job);
    }

    /// Jobs with secrets, for a sweep that forgets those that are over.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobId> {
        self.lock().jobs.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use kiln_proto::fleet::BODY_MAX;

    use super::*;

    #[test]
    fn what_is_held_is_bounded_by_job_tenant_and_in_all_and_forgotten() {
        let secrets = Secrets::default();
        let tenant = |n: usize| -> TenantName { format!("t{n}").parse().expect("name") };
        let id = |n: usize| -> JobId { format!("b{n}").parse().expect("name") };
        let values = |n: usize| HashMap::from([("a".to_owned(), vec![1; n - 1])]);
        let hold = |of, job, bytes| secrets.hold(&tenant(of), id(job), values(bytes));
        let large = hold(0, 0, JOB_BYTES_MAX + 1);
        assert_eq!(large, Err(SecretsRefused::JobTooLarge));
        let each = TENANT_BYTES_MAX / JOB_BYTES_MAX;
        for job in 0..each {
            assert_eq!(hold(0, job, JOB_BYTES_MAX), Ok(()));
        }
        assert_eq!(hold(0, each, 2), Err(SecretsRefused::TenantFull));
        assert_eq!(hold(1, 100, 2), Ok(()), "others have room");
        for of in 2..4 {
            for job in 0..each {
                assert_eq!(hold(of, 100 * of + job, JOB_BYTES_MAX), Ok(()));
            }
        }
        for job in 0..each - 1 {
            assert_eq!(hold(4, 400 + job, JOB_BYTES_MAX), Ok(()));
        }
        assert_eq!(hold(5, 500, JOB_BYTES_MAX), Err(SecretsRefused::Full));
        assert!(secrets.get(&id(0), "a").is_some());
        for job in secrets.jobs() {
            secrets.forget(&job);
            secrets.forget(&job);
        }
        assert!(secrets.get(&id(0), "a").is_none());
        assert!(secrets.lock().bytes == 0 && secrets.lock().tenants.is_empty());
        assert_eq!(hold(0, 0, JOB_BYTES_MAX), Ok(()));
    }

    #[test]
    fn the_largest_secrets_fit_into_one_answer() {
        let name = "n".repeat(120);
        let value = base64::engine::general_purpose::STANDARD.encode(vec![0xff; JOB_BYTES_MAX]);
        let mut values = std::collections::BTreeMap::from([(name.clone(), value)]);
        for n in 0..1000 {
            values.insert(format!("{name}{n}"), String::new());
        }
        let answer = kiln_proto::fleet::Secrets {
            values,
            ..Default::default()
        };
        let answer = serde_json::to_vec(&answer);
        assert!(answer.expect("written").len() < BODY_MAX);
    }
}
