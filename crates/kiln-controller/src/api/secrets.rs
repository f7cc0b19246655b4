//! `/v1/secrets`: what a tenant keeps, who may have it, who had it. No route ever answers a value.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use kiln_core::access::Target;
use kiln_core::secret::{PATTERNS_MAX, SECRET_VALUE_MAX, SECRETS_MAX, SecretScope};
use kiln_core::{Action, SecretName, TenantName};
use kiln_db::{NewValue, Secret, SecretValue, Written};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::parsed;
use super::audit::AuditView;
use super::caller::{Caller, TenantAsked};
use super::extract::{Answer, Asked, Body, Named, removed};
use super::problem::{Problem, ProblemBody};
use super::view::List;
use crate::access::SealedAs;
use crate::secret_stores::{SecretSource, SourceError};

/// How often a value is sealed again because somebody else changed the secret meanwhile.
const WRITES_MAX: usize = 5;
/// Rows of a page of accesses.
const PAGE: u32 = 100;

/// Whose, and from where on.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct AccessesAsked {
    /// The token's own unless it is an operator's.
    tenant: Option<String>,
    /// After the row of this number.
    after: u64,
}

/// Which jobs may have a secret, of those that are trusted.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ScopeView {
    /// Jobs whose source a host fetched from one of these: `host/team/app`, `*` for any name, `**` for any names. Empty: any job.
    pub repositories: Vec<String>,
    /// `build`, `run`, `git` (the host itself, as a git server's login); empty means all.
    pub uses: Vec<String>,
}

impl ScopeView {
    fn of(scope: &SecretScope) -> Self {
        Self {
            repositories: scope.repositories.iter().map(ToString::to_string).collect(),
            uses: scope.uses.iter().map(ToString::to_string).collect(),
        }
    }

    fn read(&self) -> Result<SecretScope, Problem> {
        if self.repositories.len() > PATTERNS_MAX {
            let text = format!("at most {PATTERNS_MAX} patterns");
            return Err(Problem::invalid("repositories", text));
        }
        let repositories = self.repositories.iter();
        let uses = self.uses.iter();
        Ok(SecretScope {
            repositories: repositories
                .map(|one| parsed("repositories", one))
                .collect::<Result<BTreeSet<_>, _>>()?,
            uses: uses
                .map(|one| parsed("uses", one))
                .collect::<Result<BTreeSet<_>, _>>()?,
        })
    }
}

/// A secret, without its value.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct SecretView {
    /// Whose.
    pub tenant: String,
    /// Its name.
    pub name: String,
    /// Counts the values it had, from 1.
    pub version: u64,
    /// Where its value is fetched from when a job needs it; none when kiln keeps it.
    pub source: Option<String>,
    /// Which jobs may have it.
    pub scope: ScopeView,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Who made it.
    pub created_by: String,
    /// When it got its present value, if not when it was made.
    pub rotated_unix_ms: Option<u64>,
    /// Who gave it.
    pub rotated_by: Option<String>,
}

impl SecretView {
    fn of(secret: Secret) -> Self {
        Self {
            tenant: secret.tenant.into(),
            name: secret.name.into(),
            version: secret.version,
            source: match secret.value {
                SecretValue::Sealed(_) => None,
                SecretValue::Source(source) => Some(source),
            },
            scope: ScopeView::of(&secret.scope),
            created_unix_ms: secret.created_unix_ms,
            created_by: secret.created_by,
            rotated_unix_ms: secret.rotated_unix_ms,
            rotated_by: secret.rotated_by,
        }
    }
}

/// A text that is never printed, not even when it is wrong.
#[derive(ToSchema)]
#[schema(value_type = String)]
pub(crate) struct Hidden(String);

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // A parser's own words would show what it found instead.
        match serde_json::Value::deserialize(from) {
            Ok(serde_json::Value::String(text)) => Ok(Self(text)),
            _ => Err(serde::de::Error::custom("a value must be a text")),
        }
    }
}

/// A value for a secret: a text, or any bytes in base 64.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ValueAsk {
    /// As text. 1 byte to 64 KiB.
    value: Option<Hidden>,
    /// As bytes in base 64, instead of `value`.
    value_base64: Option<Hidden>,
    /// Where it is fetched each time a job needs it, instead of a value: `STORE:PATH#FIELD`, of a store that the operator grants the tenant.
    source: Option<String>,
    /// Which jobs may have it. None keeps the scope it has; a new secret is then for all trusted jobs of its tenant.
    scope: Option<ScopeView>,
}

impl ValueAsk {
    fn bytes(&self) -> Result<Vec<u8>, Problem> {
        let bytes = match (&self.value, &self.value_base64, &self.source) {
            (Some(text), None, None) => text.0.as_bytes().to_vec(),
            (None, Some(text), None) => STANDARD
                .decode(&text.0)
                .map_err(|_| Problem::invalid("value_base64", "it is not base 64"))?,
            _ => {
                let text = "name one of `value`, `value_base64` and `source`";
                return Err(Problem::invalid("value", text));
            }
        };
        if bytes.is_empty() || bytes.len() > SECRET_VALUE_MAX {
            let text = format!("a value has 1 to {SECRET_VALUE_MAX} bytes");
            return Err(Problem::invalid("value", text));
        }
        Ok(bytes)
    }

    /// The source that is named instead of a value.
    fn granted_source(&self, api: &Api, tenant: &TenantName) -> Result<Option<String>, Problem> {
        let (Some(text), None, None) = (&self.source, &self.value, &self.value_base64) else {
            return Ok(None);
        };
        let source: SecretSource = text
            .parse()
            .map_err(|error: SourceError| Problem::invalid("source", error.to_string()))?;
        let granted = api.config.secret_stores.granted(tenant, &source);
        granted.map_err(|error| {
            Problem::invalid("source", error.to_string())
                .hint("the operator names stores and what tenants may name in them in kiln.toml: [[controller.secret_stores]]")
        })?;
        Ok(Some(source.to_string()))
    }
}

fn missing(name: &str) -> Problem {
    Problem::not_found("secret", name)
}

fn name_of(text: &str) -> Result<SecretName, Problem> {
    parsed("name", text)
}

/// Lists a tenant's secrets, without their values.
#[utoipa::path(
    get, path = "/v1/secrets", tag = "secrets", params(TenantAsked),
    responses(
        (status = 200, description = "All of them", body = List<SecretView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Asked(asked): Asked<TenantAsked>,
) -> Result<Answer<List<SecretView>>, Problem> {
    let tenant = asked
        .allowed(&api, &caller, Action::SecretRead, "secrets")
        .await?;
    let found = api.db().secrets(&tenant).await?;
    let items = found.into_iter().map(SecretView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next: None }))
}

/// Shows a secret, without its value.
#[utoipa::path(
    get, path = "/v1/secrets/{name}", tag = "secrets", params(("name" = String, Path), TenantAsked),
    responses(
        (status = 200, description = "The secret", body = SecretView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<TenantAsked>,
) -> Result<Answer<SecretView>, Problem> {
    let tenant = asked
        .allowed(&api, &caller, Action::SecretRead, &text)
        .await?;
    let view = one(&api, &tenant, &text).await?;
    Ok(Answer(StatusCode::OK, view))
}

async fn one(api: &Api, tenant: &TenantName, text: &str) -> Result<SecretView, Problem> {
    let name = text.parse().map_err(|_| missing(text))?;
    let found = api.db().secret(tenant, &name).await?;
    found.map(SecretView::of).ok_or_else(|| missing(text))
}

/// Keeps a value: of a new secret, or in the place of the one it had.
#[utoipa::path(
    put, path = "/v1/secrets/{name}", tag = "secrets", params(("name" = String, Path), TenantAsked),
    request_body = ValueAsk,
    responses(
        (status = 200, description = "The secret, which was there", body = SecretView),
        (status = 201, description = "The new secret", body = SecretView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn set(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<TenantAsked>,
    Body(body): Body<ValueAsk>,
) -> Result<Answer<SecretView>, Problem> {
    let tenant = asked
        .allowed(&api, &caller, Action::SecretWrite, &text)
        .await?;
    keep(&api, &caller, &tenant, &text, &body, true).await
}

/// Gives a secret that is there a new value.
#[utoipa::path(
    post, path = "/v1/secrets/{name}/rotate", tag = "secrets", params(("name" = String, Path), TenantAsked),
    request_body = ValueAsk,
    responses(
        (status = 200, description = "The secret", body = SecretView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn rotate(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<TenantAsked>,
    Body(body): Body<ValueAsk>,
) -> Result<Answer<SecretView>, Problem> {
    let tenant = asked
        .allowed(&api, &caller, Action::SecretWrite, &text)
        .await?;
    keep(&api, &caller, &tenant, &text, &body, false).await
}

async fn keep(
    api: &Api,
    caller: &Caller,
    tenant: &TenantName,
    text: &str,
    body: &ValueAsk,
    may_be_new: bool,
) -> Result<Answer<SecretView>, Problem> {
    let name = name_of(text)?;
    let scope = body.scope.as_ref().map(ScopeView::read).transpose()?;
    let source = body.granted_source(api, tenant)?;
    let bytes = match source {
        Some(_) => Vec::new(),
        None => body.bytes()?,
    };
    for _ in 0..WRITES_MAX {
        let before = api.db().secret(tenant, &name).await?;
        if before.is_none() && !may_be_new {
            return Err(missing(text));
        }
        let version = before.map_or(1, |secret| secret.version + 1);
        let about = SealedAs {
            tenant,
            name: &name,
            version,
        };
        let value = match &source {
            Some(source) => SecretValue::Source(source.clone()),
            None => {
                let sealed = api.access().seal_secret(about, &bytes);
                SecretValue::Sealed(sealed.map_err(|error| Problem::unavailable(&error))?)
            }
        };
        let new = NewValue {
            tenant: tenant.clone(),
            name: name.clone(),
            version,
            value,
            scope: scope.clone(),
            by: caller.subject().to_owned(),
        };
        match api.db().write_secret(new).await? {
            Written::Kept => {
                let status = match version {
                    1 => StatusCode::CREATED,
                    _ => StatusCode::OK,
                };
                return Ok(Answer(status, one(api, tenant, text).await?));
            }
            Written::Changed => {}
            Written::TooMany => {
                let text = format!("a tenant keeps at most {SECRETS_MAX} secrets");
                return Err(Problem::conflict("too_many_secrets", text)
                    .hint("remove those that nothing needs: `kiln secret delete NAME`"));
            }
        }
    }
    let text = "others change this secret at the same time";
    Err(Problem::conflict("changed", text).hint("try again"))
}

/// Changes which jobs may have a secret, from their next question on.
#[utoipa::path(
    post, path = "/v1/secrets/{name}/scope", tag = "secrets", params(("name" = String, Path), TenantAsked),
    request_body = ScopeView,
    responses(
        (status = 200, description = "The secret", body = SecretView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn scope(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<TenantAsked>,
    Body(body): Body<ScopeView>,
) -> Result<Answer<SecretView>, Problem> {
    let tenant = asked
        .allowed(&api, &caller, Action::SecretWrite, &text)
        .await?;
    let name = name_of(&text)?;
    let scope = body.read()?;
    if !api.db().set_secret_scope(&tenant, &name, &scope).await? {
        return Err(missing(&text));
    }
    Ok(Answer(StatusCode::OK, one(&api, &tenant, &text).await?))
}

/// Forgets a secret and its value.
#[utoipa::path(
    delete, path = "/v1/secrets/{name}", tag = "secrets", params(("name" = String, Path), TenantAsked),
    responses(
        (status = 204, description = "It is gone"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn remove(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<TenantAsked>,
) -> Result<StatusCode, Problem> {
    let tenant = asked
        .allowed(&api, &caller, Action::SecretRemove, &text)
        .await?;
    let name = text.parse().map_err(|_| missing(&text))?;
    let gone = api.db().remove_secret(&tenant, &name).await?;
    removed(gone, "secret", &text)
}

/// Who had a secret, was refused it, or changed it, oldest first; `next` is the `after` of the next page. Also of one that is gone.
#[utoipa::path(
    get, path = "/v1/secrets/{name}/accesses", tag = "secrets", params(("name" = String, Path), AccessesAsked),
    responses(
        (status = 200, description = "A page of audit rows", body = List<AuditView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn accesses(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<AccessesAsked>,
) -> Result<Answer<List<AuditView>>, Problem> {
    if asked.after > i64::MAX as u64 {
        return Err(Problem::invalid("after", "there is no row of this number"));
    }
    let named = asked.tenant.as_deref();
    let named = named.map(|one| parsed("tenant", one)).transpose()?;
    let tenant: &TenantName = named.as_ref().unwrap_or(caller.tenant());
    let target = Target::Tenant(tenant);
    caller.may(&api, Action::AuditRead, target, &text).await?;
    let name = text.parse().map_err(|_| missing(&text))?;
    let rows = api.db().secret_accesses(tenant, &name, asked.after, PAGE);
    let rows = rows.await?;
    let full = rows.len() >= PAGE as usize;
    let next = rows.last().filter(|_| full).map(|row| row.seq.to_string());
    let items = rows.into_iter().map(AuditView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next }))
}
