//! `/v1/tokens`: made once, shown once, never giving more than their maker has. Short-lived ones are [`super::sessions`]'.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::access::{ParseAccessError, Principal, Target, sees_every_tenant};
use kiln_core::job::TrustClass;
use kiln_core::{Action, PoolName, Priority, Role, TenantName, TokenId};
use kiln_db::{NewJoinToken, NewToken, Placement, Token};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::ask::{labels, parsed};
use super::caller::Caller;
use super::extract::{Answer, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::view::{List, TokenView};
use crate::access::door::USER_LIFE_MAX_S;
use crate::access::secret_token;

/// Life of a service token unless asked otherwise: 90 days.
const SERVICE_LIFE_S: u64 = 90 * 86_400;
/// And at most: a year.
const SERVICE_LIFE_MAX_S: u64 = 366 * 86_400;
/// Life of a join token unless asked otherwise: an hour.
const JOIN_LIFE_S: u64 = 3600;
/// And at most: a week.
const JOIN_LIFE_MAX_S: u64 = 7 * 86_400;
/// Longest description.
const DESCRIPTION_MAX: usize = 200;

/// What a service token carries beside tenant, role and scopes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenClaims {
    /// Whether its role reaches beyond the tenant.
    #[serde(default)]
    pub operator: bool,
    /// Highest priority it may ask for.
    #[serde(default)]
    pub priority_max: Priority,
    /// The best trust its jobs can have.
    pub trust: TrustClass,
}

/// Who a kept token speaks for.
pub(crate) fn principal(token: &Token) -> Result<Principal, ParseAccessError> {
    let claims: TokenClaims = serde_json::from_value(token.claims.clone()).unwrap_or(TokenClaims {
        operator: false,
        priority_max: Priority::default(),
        trust: TrustClass::Untrusted,
    });
    let scopes: BTreeSet<Action> = token
        .scopes
        .iter()
        .map(|scope| scope.parse())
        .collect::<Result<_, _>>()?;
    Ok(Principal {
        subject: format!("token {}", token.id),
        token: Some(token.id.clone()),
        tenant: token.tenant.clone(),
        role: token.role.parse()?,
        operator: claims.operator,
        scopes: Some(scopes).filter(|scopes| !scopes.is_empty()),
        priority_max: claims.priority_max,
        trust: claims.trust,
        expires_unix_ms: token.expires_unix_ms,
        gives_until_unix_ms: token.expires_unix_ms,
    })
}

/// Lists tokens: every tenant's and workers' join tokens for operators, else the caller's tenant's.
#[utoipa::path(
    get, path = "/v1/tokens", tag = "tokens",
    responses(
        (status = 200, description = "All that the caller may see", body = List<TokenView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
) -> Result<Answer<List<TokenView>>, Problem> {
    let own = caller
        .acting_for(&api, None, Action::TokenRead, "tokens")
        .await?;
    let all = sees_every_tenant(&caller.principal, Action::TokenRead);
    let tokens = api.db().tokens(Some(&own).filter(|_| !all)).await?;
    let mut items: Vec<TokenView> = tokens.iter().map(TokenView::of).collect();
    if all {
        items.extend(api.db().join_tokens().await?.iter().map(TokenView::of_join));
    }
    Ok(Answer(StatusCode::OK, List { items, next: None }))
}

/// A new service token.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewService {
    /// `admin`, `build-engineer`, `security`, `developer` or `read-only`.
    role: String,
    /// For which tenant; the caller's own unless it is an operator.
    #[serde(default)]
    tenant: Option<String>,
    /// The only actions it is good for; all of its role when empty.
    #[serde(default)]
    scopes: Vec<String>,
    /// Whether its role reaches beyond the tenant.
    #[serde(default)]
    operator: bool,
    /// Highest priority its jobs may have.
    #[serde(default)]
    #[schema(minimum = -100, maximum = 100)]
    priority_max: i16,
    /// Whether its jobs may be trusted.
    #[serde(default)]
    trusted: bool,
    /// For people.
    #[serde(default)]
    description: String,
    /// Seconds it lives; 90 days unless named, a year at most.
    #[serde(default)]
    expires_in: Option<u64>,
}

/// A token that was made: the only time its text is shown.
#[derive(Serialize, Deserialize, ToSchema)]
pub(crate) struct MadeToken {
    /// Public name.
    id: String,
    /// The token. Keep it: it is never shown again.
    token: String,
    /// Not good from then on, milliseconds since the Unix epoch.
    expires_unix_ms: u64,
}

fn beyond(what: &str) -> Problem {
    Problem::forbidden(format!("a token cannot give {what} than its maker has"))
}

/// Makes a service token. It never gives more than its maker has.
#[utoipa::path(
    post, path = "/v1/tokens", tag = "tokens", request_body = NewService,
    responses(
        (status = 201, description = "The token, shown this once", body = MadeToken),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Body(asked): Body<NewService>,
) -> Result<Answer<MadeToken>, Problem> {
    let named: Option<TenantName> = asked
        .tenant
        .as_deref()
        .map(|tenant| parsed("tenant", tenant))
        .transpose()?;
    let tenant = caller
        .acting_for(&api, named.as_ref(), Action::TokenCreate, "token")
        .await?;
    let Given {
        role,
        scopes,
        claims,
    } = given(&caller, &asked)?;
    let description = description(&asked.description)?;
    let expires_unix_ms = life(
        &api,
        &caller,
        asked.expires_in,
        SERVICE_LIFE_S,
        SERVICE_LIFE_MAX_S,
    )?;
    if !api
        .db()
        .tenants()
        .await?
        .iter()
        .any(|known| known.name == tenant)
    {
        return Err(Problem::invalid(
            "tenant",
            format!("there is no tenant {tenant}"),
        ));
    }
    let made = secret_token::new_service();
    let new = NewToken {
        id: made.id.clone(),
        hash: made.hash,
        tenant,
        role: role.name().to_owned(),
        scopes: scopes.iter().map(|scope| scope.name().to_owned()).collect(),
        claims: serde_json::to_value(claims).unwrap_or_default(),
        description,
        expires_unix_ms: Some(expires_unix_ms),
        created_by: caller.subject().to_owned(),
    };
    if !api.db().create_token(new).await? {
        return Err(Problem::conflict("exists", "try again"));
    }
    Ok(made_token(made, expires_unix_ms))
}

/// What a new token will be good for.
struct Given {
    role: Role,
    scopes: BTreeSet<Action>,
    claims: TokenClaims,
}

/// Checks that a maker gives no more than it has.
fn given(caller: &Caller, asked: &NewService) -> Result<Given, Problem> {
    let wrong = |field: &'static str| {
        move |error: ParseAccessError| Problem::invalid(field, error.to_string())
    };
    let role: Role = asked.role.parse().map_err(wrong("role"))?;
    if !caller.may_give(role, asked.operator) {
        return Err(beyond("a higher role"));
    }
    let mut scopes: BTreeSet<Action> = asked
        .scopes
        .iter()
        .map(|scope| scope.parse())
        .collect::<Result<_, _>>()
        .map_err(wrong("scopes"))?;
    if let Some(own) = &caller.principal.scopes {
        if scopes.is_empty() {
            scopes.clone_from(own);
        }
        if !scopes.is_subset(own) {
            return Err(beyond("wider scopes"));
        }
    }
    let priority_max = Priority::try_from(asked.priority_max)
        .map_err(|error| Problem::invalid("priority_max", error.to_string()))?;
    if priority_max > caller.principal.priority_max {
        return Err(beyond("a higher priority"));
    }
    if asked.trusted && caller.principal.trust != TrustClass::Trusted {
        return Err(beyond("more trust"));
    }
    Ok(Given {
        role,
        scopes,
        claims: TokenClaims {
            operator: asked.operator,
            priority_max,
            trust: if asked.trusted {
                TrustClass::Trusted
            } else {
                TrustClass::Untrusted
            },
        },
    })
}

fn made_token(made: secret_token::NewSecret, expires_unix_ms: u64) -> Answer<MadeToken> {
    Answer(
        StatusCode::CREATED,
        MadeToken {
            id: made.id.to_string(),
            token: made.text,
            expires_unix_ms,
        },
    )
}

fn description(text: &str) -> Result<String, Problem> {
    if text.len() > DESCRIPTION_MAX || text.chars().any(char::is_control) {
        return Err(Problem::invalid(
            "description",
            format!("it is one line of at most {DESCRIPTION_MAX} bytes"),
        ));
    }
    Ok(text.to_owned())
}

/// End of a new token: as asked, within bounds, and not after its maker's own proof when that is a short-lived one.
fn life(
    api: &Api,
    caller: &Caller,
    asked: Option<u64>,
    usual: u64,
    most: u64,
) -> Result<u64, Problem> {
    let seconds = asked.unwrap_or(usual);
    if !(1..=most).contains(&seconds) {
        return Err(Problem::invalid(
            "expires_in",
            format!("it is 1 to {most} seconds"),
        ));
    }
    let end = api.now_ms() + seconds * 1000;
    // A lasting token cannot outlive itself by making another, nor can a session that was exchanged for one.
    let own = caller.principal.gives_until_unix_ms;
    Ok(own.map_or(end, |own| end.min(own)))
}

/// What a worker that joins will be.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NewJoin {
    /// Its pool; `default` unless named.
    pool: Option<String>,
    /// Its labels.
    labels: BTreeMap<String, String>,
    /// Tenants whose jobs it may run; all when left out.
    tenants: Option<Vec<String>>,
    /// Seconds the token lives; an hour unless named, a week at most.
    expires_in: Option<u64>,
}

/// Makes a single-use token by which one worker joins; it pins this server's authority.
#[utoipa::path(
    post, path = "/v1/tokens/join", tag = "tokens", request_body = NewJoin,
    responses(
        (status = 201, description = "The token, shown this once", body = MadeToken),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create_join(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Body(asked): Body<NewJoin>,
) -> Result<Answer<MadeToken>, Problem> {
    caller
        .may(
            &api,
            Action::WorkerEnrol,
            Target::Installation,
            "join token",
        )
        .await?;
    let placement = Placement {
        pool: match &asked.pool {
            Some(pool) => parsed("pool", pool)?,
            None => PoolName::default_pool(),
        },
        labels: labels("labels", &asked.labels)?,
        tenants: asked
            .tenants
            .map(|names| {
                names
                    .iter()
                    .map(|name| parsed("tenants", name))
                    .collect::<Result<_, _>>()
            })
            .transpose()?,
    };
    let expires_unix_ms = life(
        &api,
        &caller,
        asked.expires_in,
        JOIN_LIFE_S,
        JOIN_LIFE_MAX_S,
    )?;
    let made = secret_token::new_join(&api.access().authority().fingerprint());
    let new = NewJoinToken {
        id: made.id.clone(),
        hash: made.hash,
        placement,
        expires_unix_ms,
        created_by: caller.subject().to_owned(),
    };
    api.db().create_join_token(new).await?;
    Ok(made_token(made, expires_unix_ms))
}

/// Revokes a token, at once and for ever; with it, everything that was exchanged for it.
#[utoipa::path(
    delete, path = "/v1/tokens/{id}", tag = "tokens", params(("id" = String, Path)),
    responses(
        (status = 204, description = "Revoked"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn revoke(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
) -> Result<StatusCode, Problem> {
    let nothing = || Problem::not_found("token", &text);
    let id: TokenId = text.parse().map_err(|_| nothing())?;
    let is_session = id.as_str().starts_with("jwt-");
    // Sessions live no longer than this, and so does the memory of their end.
    let sessions_end = api.now_ms() + (USER_LIFE_MAX_S + 60) * 1000;
    if is_session && caller.principal.token.as_ref() == Some(&id) {
        // Everybody may end their own.
        let tenant = Some(caller.tenant().clone());
        let action = Action::TokenRevoke;
        caller.note(&api, action, tenant, &text, None).await?;
        api.db().revoke_session(id.as_str(), sessions_end).await?;
        return Ok(StatusCode::NO_CONTENT);
    }
    let own = caller
        .acting_for(&api, None, Action::TokenRevoke, &text)
        .await?;
    let all = sees_every_tenant(&caller.principal, Action::TokenRevoke);
    if is_session && all {
        api.db().revoke_session(id.as_str(), sessions_end).await?;
        return Ok(StatusCode::NO_CONTENT);
    }
    let known = api
        .db()
        .revoke_token(&id, Some(&own).filter(|_| !all))
        .await?;
    if known {
        api.db().revoke_session(id.as_str(), sessions_end).await?;
        return Ok(StatusCode::NO_CONTENT);
    }
    if all && api.db().revoke_join_token(&id).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(nothing())
}
