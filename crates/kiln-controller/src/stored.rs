//! Secrets of the store on their way to a job: what is asked for at submission, and what a worker is given under its lease.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_core::{JobRequest, Lease, SecretName};
use kiln_db::{NewAudit, NewJob, Opened, SECRET_READ, Secret, SecretFrom, SecretValue};
use kiln_proto::fleet::Secrets;

use crate::access::SealedAs;
use crate::fleet::refusal::Refused;
use crate::fleet::secrets::{JOB_BYTES_MAX, SecretsRefused};
use crate::secret_stores::{FetchError, SecretSource, SourceError};
use crate::state::Controller;

/// The audit row of a submission that named a secret it cannot have.
pub(crate) fn refusal(new: &NewJob, name: &SecretName, opened: &Opened) -> NewAudit {
    NewAudit {
        actor: format!("user:{}", new.submitted_by),
        tenant: Some(new.request.tenant.clone()),
        action: SECRET_READ.to_owned(),
        target: name.to_string(),
        allowed: false,
        reason: opened.refused().map(str::to_owned),
        detail: Some(serde_json::json!({ "job": new.request.id, "at": "submission" })),
    }
}

impl Controller {
    /// What a worker gets that asks for these secrets of its job.
    ///
    /// # Errors
    /// When the lease is not the live one, the job names no such secret, or a value cannot be had now.
    pub(crate) async fn secrets_for(
        &self,
        lease: &Lease,
        request: &JobRequest,
        names: Vec<String>,
    ) -> Result<Secrets, Refused> {
        let mut answer = Secrets::default();
        let named = request.secret_names();
        let stored = request.stored_secrets();
        let mut bytes = 0;
        for name in names {
            if !named.contains(&name.as_str()) {
                return Err(Refused::missing("the job names no such secret"));
            }
            let of_store = stored.iter().any(|one| one.as_str() == name);
            // Whose value came with the request never falls back on the store: it may be another value.
            let held = match of_store {
                true => None,
                false => self.secret_of(&lease.attempt.job, &name).await,
            };
            let (place, from) = match of_store {
                true => (SecretFrom::Store, "store"),
                false => {
                    let here = held.is_some();
                    (SecretFrom::Request { here }, "request")
                }
            };
            let opened = self.db.open_secret(lease, request, &name, place).await?;
            self.metrics.secret_read(from, opened.refused().is_none());
            match (opened, held) {
                (Opened::Given, Some(value)) => {
                    answer.values.insert(name, STANDARD.encode(value));
                }
                (Opened::Allowed(secret), _) => {
                    let value = match self.value_of(lease, &secret).await? {
                        Ok(value) => value,
                        Err(why) => {
                            answer.refused.insert(name, why.to_string());
                            continue;
                        }
                    };
                    bytes += name.len() + value.len();
                    if bytes > JOB_BYTES_MAX {
                        // One answer holds them all: a larger one would be no worker's to read.
                        let why = SecretsRefused::JobTooLarge.to_string();
                        answer.refused.insert(name, why);
                        continue;
                    }
                    answer.values.insert(name, STANDARD.encode(value));
                }
                (Opened::Refused(why), _) => {
                    answer.refused.insert(name, why.to_string());
                }
                (Opened::Given | Opened::Missing, _) => {}
            }
        }
        Ok(answer)
    }

    /// The value of a secret that a job may have; the inner error is for good, the outer one for now.
    async fn value_of(
        &self,
        lease: &Lease,
        secret: &Secret,
    ) -> Result<Result<Vec<u8>, FetchError>, Refused> {
        let about = SealedAs {
            tenant: &secret.tenant,
            name: &secret.name,
            version: secret.version,
        };
        let unopened = |error: &dyn std::fmt::Display| {
            tracing::error!(tenant = %secret.tenant, secret = %secret.name, %error, "a stored secret cannot be opened");
            Refused::unavailable(format!(
                "the secret {} cannot be opened: {error}",
                secret.name
            ))
        };
        let source = match &secret.value {
            SecretValue::Sealed(sealed) => {
                let opened = self.access.open_secret(about, sealed);
                return opened.map(Ok).map_err(|error| unopened(&error));
            }
            SecretValue::Source(source) => source,
        };
        let source: SecretSource = source
            .parse()
            .map_err(|error: SourceError| unopened(&error))?;
        let (stores, tenant) = (self.secret_stores.clone(), secret.tenant.clone());
        let fetched = tokio::task::spawn_blocking(move || stores.fetch(&tenant, &source));
        let fetched = fetched.await.map_err(|error| unopened(&error))?;
        let Err(error) = fetched else {
            return Ok(fetched);
        };
        // The row of the decision says that the job may have it; this one that it did not get it.
        let row = NewAudit {
            actor: format!("worker:{}", lease.worker),
            tenant: Some(secret.tenant.clone()),
            action: SECRET_READ.to_owned(),
            target: secret.name.to_string(),
            allowed: false,
            reason: Some(error.code().to_owned()),
            detail: Some(serde_json::json!({ "job": lease.attempt.job, "at": "source" })),
        };
        self.db.audit(row).await?;
        match error {
            FetchError::Unavailable { .. } => Err(unopened(&error)),
            error => Ok(Err(error)),
        }
    }
}
