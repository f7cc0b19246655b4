//! Short-lived tokens: the exchange of a service token, or of another issuer's identity token, for one; who a token speaks for; and the keys
//! that others verify ours by.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode, header};
use kiln_core::Action;
use kiln_core::access::Principal;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::caller::{Caller, Unproven};
use super::extract::{Answer, Body};
use super::problem::{Problem, ProblemBody};
use crate::access::door::USER_LIFE_MAX_S;
use crate::access::peer::network_of;
use crate::access::user_token::USER_LIFE_S;
use crate::access::{Door, ExchangeRefused, Peer, secret_token};

/// What is exchanged.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Exchange {
    /// An identity token of a trusted issuer. Left out: the token in the Authorization header.
    subject_token: Option<String>,
    /// Seconds the new token lives; 15 minutes unless named, an hour at most.
    expires_in: Option<u64>,
}

/// A short-lived token.
#[derive(Serialize, Deserialize, ToSchema)]
pub(crate) struct Exchanged {
    /// The token.
    access_token: String,
    /// `Bearer`.
    token_type: String,
    /// Seconds it lives.
    expires_in: u64,
    /// Its id, to revoke it by.
    id: String,
}

/// Exchanges a service token, or an identity token of a trusted issuer, for a short-lived token of this server.
#[utoipa::path(
    post, path = "/v1/token/exchange", tag = "tokens", request_body = Exchange,
    responses(
        (status = 200, description = "The token", body = Exchanged),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn exchange(
    State(api): State<Arc<Api>>,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    Body(asked): Body<Exchange>,
) -> Result<Answer<Exchanged>, Problem> {
    // Nobody is known yet: strangers are told apart by where they come from, for this bound alone.
    let from = match peer.as_deref() {
        Some(Peer::Tls { address, .. } | Peer::Plain { address }) => {
            network_of(address.ip()).to_string()
        }
        Some(Peer::Local { .. }) | None => "here".to_owned(),
    };
    if !api.rates.take(&format!("exchange {from}"), Instant::now()) {
        return Err(Problem::too_many(
            "rate",
            "too many tokens are exchanged at once",
        ));
    }
    let seconds = asked.expires_in.unwrap_or(USER_LIFE_S);
    if !(1..=USER_LIFE_MAX_S).contains(&seconds) {
        return Err(Problem::invalid(
            "expires_in",
            format!("it is 1 to {USER_LIFE_MAX_S} seconds"),
        ));
    }
    let principal = match asked.subject_token {
        Some(token) => foreign(&api, token).await?,
        None => own(&api, &headers).await?,
    };
    let now = api.now_ms();
    let made = api.access().issue_user(&principal, seconds, now);
    let made = made.map_err(|error| Problem::unavailable(&error))?;
    api.backend().count(Door::User, "token:exchange", None);
    let caller = Caller::of(principal);
    let tenant = Some(caller.tenant().clone());
    caller.note_exchange(&api, tenant, made.id.as_str()).await?;
    Ok(Answer(
        StatusCode::OK,
        Exchanged {
            access_token: made.text,
            token_type: "Bearer".to_owned(),
            expires_in: made.expires_unix_ms.saturating_sub(now) / 1000,
            id: made.id.to_string(),
        },
    ))
}

async fn refused(api: &Api, code: &'static str, why: &str) -> Problem {
    api.refuse_stranger("token:exchange", code, "").await;
    Problem::unauthenticated(format!("the token was refused: {why}"))
}

/// The bearer of a service token. A session cannot be exchanged for another: it ends with what it was made from.
async fn own(api: &Api, headers: &HeaderMap) -> Result<Principal, Problem> {
    let shown = headers.get(header::AUTHORIZATION);
    let shown = shown.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let Some(shown) = shown.map(str::trim) else {
        return Err(refused(api, "none", "there is none").await);
    };
    if !secret_token::is_secret(shown) {
        return Err(refused(api, "kind", "only service tokens are exchanged").await);
    }
    match api.authenticate(shown).await {
        Ok(principal) => Ok(principal),
        Err(Unproven::Refused(why)) => Err(refused(api, why.code(), &why.to_string()).await),
        Err(Unproven::Unavailable(problem)) => Err(problem),
    }
}

/// For those whose identity token was refused.
const WHOSE: &str = "the server's operator says in [[controller.issuers]] whose identity tokens, for which audience and which subjects, are exchanged";

async fn foreign(api: &Arc<Api>, token: String) -> Result<Principal, Problem> {
    let worker = Arc::clone(api);
    let exchanged = tokio::task::spawn_blocking(move || {
        worker.access().issuers().exchange(&token, worker.now_ms())
    });
    let exchanged = exchanged.await;
    let exchanged = exchanged.map_err(|error| Problem::unavailable(&error))?;
    let error = match exchanged {
        Ok(principal) => return Ok(principal),
        Err(error) => error,
    };
    Err(match &error {
        ExchangeRefused::Token(why) => refused(api, why.code(), &why.to_string()).await.hint(WHOSE),
        ExchangeRefused::NoRule => refused(api, "no_rule", &error.to_string())
            .await
            .hint(WHOSE),
        ExchangeRefused::Busy => Problem::too_many("busy", error.to_string()).retry_after(1),
        ExchangeRefused::Fetch(_) => {
            tracing::warn!(%error, "an identity token could not be checked");
            Problem::new(
                StatusCode::BAD_GATEWAY,
                "issuer_unavailable",
                "the issuer's keys cannot be fetched at the moment",
            )
        }
    })
}

/// Who the caller is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct WhoAmI {
    /// Who.
    subject: String,
    /// Tenant.
    tenant: String,
    /// Role.
    role: String,
    /// Whether the role reaches beyond the tenant.
    operator: bool,
    /// The only actions the token is good for.
    scopes: Option<Vec<String>>,
    /// Highest priority it may ask for.
    priority_max: i16,
    /// When its proof ends, milliseconds since the Unix epoch.
    expires_unix_ms: Option<u64>,
}

/// Says who the token speaks for.
#[utoipa::path(
    get, path = "/v1/whoami", tag = "tokens",
    responses(
        (status = 200, description = "Who", body = WhoAmI),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn who_am_i(caller: Caller) -> Answer<WhoAmI> {
    let who = caller.principal;
    let names = |set: BTreeSet<Action>| set.iter().map(|a| a.name().to_owned()).collect();
    Answer(
        StatusCode::OK,
        WhoAmI {
            subject: who.subject,
            tenant: who.tenant.to_string(),
            role: who.role.name().to_owned(),
            operator: who.operator,
            scopes: who.scopes.map(names),
            priority_max: who.priority_max.get(),
            expires_unix_ms: who.expires_unix_ms,
        },
    )
}

/// The public keys of the user door, RFC 7517.
pub(crate) async fn jwks(State(api): State<Arc<Api>>) -> Response {
    Answer(StatusCode::OK, api.access().jwks()).into_response()
}
