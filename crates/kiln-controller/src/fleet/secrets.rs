//! Secrets that came with a request. They live in this process's memory and nowhere else: a controller that restarts has lost them, and
//! the job says so.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_core::JobId;

/// Most bytes of all secrets that are held.
pub const BYTES_MAX: usize = 64 << 20;
/// Most bytes of one job's secrets.
pub const JOB_BYTES_MAX: usize = 4 << 20;

/// Why secrets were not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SecretsRefused {
    /// One job's are too large.
    #[error("the secrets of one job have at most {JOB_BYTES_MAX} bytes")]
    JobTooLarge,
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
    jobs: HashMap<JobId, HashMap<String, Vec<u8>>>,
    bytes: usize,
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

impl Secrets {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a job's secrets until [`Secrets::forget`].
    ///
    /// # Errors
    /// When there are too many; nothing is held then.
    pub fn hold(&self, job: JobId, values: HashMap<String, Vec<u8>>) -> Result<(), SecretsRefused> {
        let bytes = size(&values);
        if bytes > JOB_BYTES_MAX {
            return Err(SecretsRefused::JobTooLarge);
        }
        let mut held = self.lock();
        if held.bytes + bytes > BYTES_MAX {
            return Err(SecretsRefused::Full);
        }
        held.bytes += bytes;
        if let Some(old) = held.jobs.insert(job, values) {
            held.bytes -= size(&old);
        }
        Ok(())
    }

    /// One value.
    #[must_use]
    pub fn get(&self, job: &JobId, name: &str) -> Option<Vec<u8>> {
        self.lock().jobs.get(job)?.get(name).cloned()
    }

    /// The job is over.
    pub fn forget(&self, job: &JobId) {
        let mut held = self.lock();
        if let Some(old) = held.jobs.remove(job) {
            held.bytes -= size(&old);
        }
    }

    /// Jobs with secrets, for a sweep that forgets those that are over.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobId> {
        self.lock().jobs.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_bounded_and_forgotten() {
        let secrets = Secrets::default();
        let job: JobId = "b1".parse().expect("name");
        let values = |n: usize| HashMap::from([("a".to_owned(), vec![1; n])]);
        assert_eq!(
            secrets.hold(job.clone(), values(JOB_BYTES_MAX)),
            Err(SecretsRefused::JobTooLarge)
        );
        for n in 0..20 {
            let id: JobId = format!("b{n}").parse().expect("name");
            let _until_full = secrets.hold(id, values(JOB_BYTES_MAX - 1));
        }
        let more = secrets.hold("x".parse().expect("name"), values(JOB_BYTES_MAX - 1));
        assert_eq!(more, Err(SecretsRefused::Full));
        assert!(secrets.get(&job, "a").is_some());
        secrets.forget(&job);
        assert!(secrets.get(&job, "a").is_none() && secrets.get(&job, "b").is_none());
        assert!(secrets.hold(job, values(JOB_BYTES_MAX - 1)).is_ok());
    }
}
