//! `/v1/webhooks` and `/v1/deliveries`: who is told of changes, what waits to be told, and what was given up.
//!
//! A secret is shown when it is made, and never again: it is derived from a key outside the database (`crate::webhooks::Signer`).

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::access::{Target, sees_every_tenant};
use kiln_core::{Action, TenantName, TokenId};
use kiln_db::{Message, MessageFilter, Rotated, WEBHOOKS_MAX, Webhook};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::parsed;
use super::caller::Caller;
use super::extract::{Answer, Asked, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::view::List;
use crate::webhooks::{Destination, Signer};

/// States that a webhook may be told of.
const KINDS: [&str; 4] = ["queued", "leased", "running", "finished"];
/// Deliveries of one page.
const PAGE: u32 = 100;
/// How long the secret before a new one signs too, unless said otherwise: a day.
const OVERLAP_DEFAULT_S: u64 = 24 * 3600;
/// The longest it may: a week.
const OVERLAP_MAX_S: u64 = 7 * 24 * 3600;
/// Longest name of a delivery.
const DELIVERY_ID_MAX: usize = 200;

/// Somebody who is told of changes; never the secret.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct WebhookView {
    /// Its name.
    pub id: String,
    /// Told of this tenant's jobs; null means of all.
    pub tenant: Option<String>,
    /// Where to.
    pub url: String,
    /// Told of these states; empty means of all.
    pub kinds: Vec<String>,
    /// Whether it is told at all.
    pub enabled: bool,
    /// Who made it.
    pub created_by: String,
    /// The secret before the present one signs too until then, milliseconds since the Unix epoch; null when there is one alone.
    #[serde(default)]
    pub overlap_until_unix_ms: Option<u64>,
}

impl WebhookView {
    fn of(webhook: &Webhook) -> Self {
        Self {
            id: webhook.id.to_string(),
            tenant: webhook.tenant.as_ref().map(ToString::to_string),
            url: webhook.url.clone(),
            kinds: webhook.kinds.iter().cloned().collect(),
            enabled: webhook.enabled,
            created_by: webhook.created_by.clone(),
            overlap_until_unix_ms: webhook.old.as_ref().map(|old| old.until_unix_ms),
        }
    }
}

/// A webhook with its secret: the only time it is shown.
#[derive(Serialize, Deserialize, ToSchema)]
pub(crate) struct MadeWebhook {
    /// The webhook.
    webhook: WebhookView,
    /// What its messages are signed with (Standard Webhooks). Keep it: it is never shown again.
    secret: String,
}

/// A message that waits to be sent, or was given up.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeliveryView {
    /// Its name, the header `webhook-id` of every try.
    pub id: String,
    /// Which job it tells of.
    pub job: String,
    /// Whose.
    pub tenant: String,
    /// The webhook it is for; null for a job's own `notify_url`.
    pub webhook: Option<String>,
    /// The state it tells of.
    pub kind: String,
    /// `waiting` or `dead`.
    pub state: String,
    /// When the change happened, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Tries so far.
    pub tries: u32,
    /// When it was given up.
    pub dead_unix_ms: Option<u64>,
    /// How the last try failed; nothing of the receiver's answer but its status.
    pub last_error: Option<String>,
}

impl DeliveryView {
    fn of(message: Message) -> Self {
        let state = match message.dead_unix_ms {
            Some(_) => "dead",
            None => "waiting",
        };
        Self {
            id: message.id,
            job: message.job.to_string(),
            tenant: message.tenant.to_string(),
            webhook: message.webhook.as_ref().map(ToString::to_string),
            kind: message.kind,
            state: state.to_owned(),
            created_unix_ms: message.created_unix_ms,
            tries: message.tries,
            dead_unix_ms: message.dead_unix_ms,
            last_error: message.last_error,
        }
    }
}

/// Lists webhooks: every tenant's for operators, else the caller's tenant's.
#[utoipa::path(
    get, path = "/v1/webhooks", tag = "webhooks",
    responses(
        (status = 200, description = "All that the caller may see", body = List<WebhookView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
) -> Result<Answer<List<WebhookView>>, Problem> {
    let own = caller
        .acting_for(&api, None, Action::WebhookRead, "webhooks")
        .await?;
    let all = sees_every_tenant(&caller.principal, Action::WebhookRead);
    let webhooks = api.db().webhooks(Some(&own).filter(|_| !all)).await?;
    let items = webhooks.iter().map(WebhookView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next: None }))
}

/// A new webhook.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewWebhook {
    /// Where to: `https://`, no user name, not into special-purpose ranges.
    url: String,
    /// Told of these states: `queued`, `leased`, `running`, `finished`; of all when empty.
    #[serde(default)]
    kinds: Vec<String>,
    /// Of this tenant's jobs; the caller's own unless it is an operator.
    #[serde(default)]
    tenant: Option<String>,
    /// Of every tenant's jobs: for operators.
    #[serde(default)]
    all_tenants: bool,
}

/// Makes a webhook.
#[utoipa::path(
    post, path = "/v1/webhooks", tag = "webhooks", request_body = NewWebhook,
    responses(
        (status = 201, description = "The webhook and its secret, shown this once", body = MadeWebhook),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Body(asked): Body<NewWebhook>,
) -> Result<Answer<MadeWebhook>, Problem> {
    let named: Option<TenantName> = asked
        .tenant
        .as_deref()
        .map(|tenant| parsed("tenant", tenant))
        .transpose()?;
    let tenant = match (asked.all_tenants, named) {
        (true, Some(_)) => {
            let text = "it is told of every tenant's jobs, or of one's";
            return Err(Problem::invalid("tenant", text));
        }
        (true, None) => {
            let target = Target::Installation;
            caller
                .may(&api, Action::WebhookControl, target, "webhook")
                .await?;
            None
        }
        (false, named) => {
            let asked = caller.acting_for(&api, named.as_ref(), Action::WebhookControl, "webhook");
            Some(asked.await?)
        }
    };
    if let Some(tenant) = &tenant
        && !api
            .db()
            .tenants()
            .await?
            .iter()
            .any(|known| known.name == *tenant)
    {
        let text = format!("there is no tenant {tenant}");
        return Err(Problem::invalid("tenant", text));
    }
    let id: TokenId = crate::access::secret_token::new_webhook_id();
    let webhook = Webhook {
        secret: key_name(&id),
        old: None,
        id,
        tenant,
        url: receiver(&api, asked.url)?,
        kinds: kinds(asked.kinds)?,
        enabled: true,
        created_by: caller.subject().to_owned(),
    };
    if !api.db().create_webhook(webhook.clone()).await? {
        let text = format!("there are {WEBHOOKS_MAX} webhooks already");
        return Err(Problem::conflict("too_many", text).hint("remove one first"));
    }
    Ok(Answer(StatusCode::CREATED, made(&api, &webhook)))
}

fn made(api: &Api, webhook: &Webhook) -> MadeWebhook {
    let signer = Signer::new(api.access().webhook_master());
    MadeWebhook {
        webhook: WebhookView::of(webhook),
        secret: signer.webhook(&webhook.secret).reveal(),
    }
}

/// Name of a new key: another name is another secret.
fn key_name(id: &TokenId) -> String {
    format!("{id}/{}", hex::encode(crate::access::random::<8>()))
}

fn receiver(api: &Api, url: String) -> Result<String, Problem> {
    match Destination::accept(&url, &api.config.receivers) {
        Ok(_) => Ok(url),
        Err(why) => Err(Problem::invalid("url", why.to_string())),
    }
}

fn kinds(asked: Vec<String>) -> Result<BTreeSet<String>, Problem> {
    match asked.iter().find(|kind| !KINDS.contains(&kind.as_str())) {
        None => Ok(asked.into_iter().collect()),
        Some(_) => {
            let text = format!("there are: {}", KINDS.join(", "));
            Err(Problem::invalid("kinds", text))
        }
    }
}

/// A webhook for an action. Another tenant's is not there, in the very words of one that never was.
async fn found(api: &Api, caller: &Caller, text: &str, action: Action) -> Result<Webhook, Problem> {
    let nothing = || Problem::not_found("webhook", text);
    let id: Result<TokenId, _> = text.parse();
    let known = match id {
        Ok(id) => api.db().webhook(&id).await?,
        Err(_) => None,
    };
    let Some(webhook) = known else {
        let home = Target::Tenant(caller.tenant());
        caller.may(api, action, home, text).await?;
        return Err(nothing());
    };
    let target = match &webhook.tenant {
        Some(tenant) => Target::Tenant(tenant),
        None => Target::Installation,
    };
    let allowed = caller.may(api, action, target, text).await;
    allowed.map_err(|problem| match (problem.status, &webhook.tenant) {
        // One of the installation is as invisible to a tenant as another tenant's.
        (StatusCode::NOT_FOUND, _) | (StatusCode::FORBIDDEN, None) => nothing(),
        _ => problem,
    })?;
    Ok(webhook)
}

/// Shows one webhook.
#[utoipa::path(
    get, path = "/v1/webhooks/{id}", tag = "webhooks", params(("id" = String, Path)),
    responses(
        (status = 200, description = "The webhook", body = WebhookView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<Answer<WebhookView>, Problem> {
    let webhook = found(&api, &caller, &id, Action::WebhookRead).await?;
    Ok(Answer(StatusCode::OK, WebhookView::of(&webhook)))
}

/// What changes; what is left out stays.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct WebhookChange {
    /// Whether it is told at all.
    enabled: Option<bool>,
    /// Where to, for what happens from now on.
    url: Option<String>,
    /// Told of these states; of all when empty.
    kinds: Option<Vec<String>>,
}

/// Changes a webhook.
#[utoipa::path(
    post, path = "/v1/webhooks/{id}", tag = "webhooks", params(("id" = String, Path)),
    request_body = WebhookChange,
    responses(
        (status = 200, description = "The webhook", body = WebhookView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Body(asked): Body<WebhookChange>,
) -> Result<Answer<WebhookView>, Problem> {
    let mut webhook = found(&api, &caller, &id, Action::WebhookControl).await?;
    if let Some(url) = asked.url {
        webhook.url = receiver(&api, url)?;
    }
    if let Some(asked) = asked.kinds {
        webhook.kinds = kinds(asked)?;
    }
    webhook.enabled = asked.enabled.unwrap_or(webhook.enabled);
    api.db().put_webhook(webhook.clone()).await?;
    Ok(Answer(StatusCode::OK, WebhookView::of(&webhook)))
}

/// Removes a webhook; what waits for it is not sent.
#[utoipa::path(
    delete, path = "/v1/webhooks/{id}", tag = "webhooks", params(("id" = String, Path)),
    responses(
        (status = 204, description = "Removed"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn remove(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<StatusCode, Problem> {
    let webhook = found(&api, &caller, &id, Action::WebhookControl).await?;
    match api.db().remove_webhook(&webhook.id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::not_found("webhook", &id)),
    }
}

/// How a secret is replaced.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Rotation {
    /// For how many seconds the secret before signs too: at most a week, a day when left out, 0 for not at all.
    overlap_s: Option<u64>,
    /// Ends the overlap of an earlier rotation that still runs: without this it is refused with `overlap_runs`.
    end_overlap: bool,
}

/// Gives a webhook another secret; from the next try on, everything is signed with it, and with the one before for a while.
#[utoipa::path(
    post, path = "/v1/webhooks/{id}/rotate", tag = "webhooks", params(("id" = String, Path)),
    request_body = Rotation,
    responses(
        (status = 200, description = "The webhook and its new secret, shown this once", body = MadeWebhook),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn rotate(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Body(asked): Body<Rotation>,
) -> Result<Answer<MadeWebhook>, Problem> {
    let webhook = found(&api, &caller, &id, Action::WebhookControl).await?;
    let overlap_s = asked.overlap_s.unwrap_or(OVERLAP_DEFAULT_S);
    if overlap_s > OVERLAP_MAX_S {
        let text = format!("a secret signs beside its successor for at most {OVERLAP_MAX_S} s");
        return Err(Problem::invalid("overlap_s", text));
    }
    let (key, overlap_ms) = (key_name(&webhook.id), overlap_s * 1000);
    let rotated = api
        .db()
        .rotate_webhook(&webhook.id, &key, overlap_ms, asked.end_overlap)
        .await?;
    match rotated {
        Rotated::Done(webhook) => Ok(Answer(StatusCode::OK, made(&api, &webhook))),
        Rotated::Overlaps { .. } => {
            let text =
                "the secret before the present one is still good: receivers may be changing over";
            let hint = "wait for its end (`overlap_until_unix_ms`), or say `end_overlap` (`--end-overlap`)";
            Err(Problem::conflict("overlap_runs", text).hint(hint))
        }
        Rotated::Absent => Err(Problem::not_found("webhook", &id)),
    }
}

/// The secret of a tenant's `notify_url`s.
#[derive(Serialize, Deserialize, ToSchema)]
pub(crate) struct NotifySecret {
    /// Whose.
    tenant: String,
    /// What messages to `notify_url`s of its jobs are signed with (Standard Webhooks).
    secret: String,
}

/// Shows what messages to the `notify_url`s of the caller's tenant are signed with.
#[utoipa::path(
    get, path = "/v1/notify-secret", tag = "webhooks",
    responses(
        (status = 200, description = "The secret", body = NotifySecret),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn notify_secret(
    State(api): State<Arc<Api>>,
    caller: Caller,
) -> Result<Answer<NotifySecret>, Problem> {
    let tenant = caller
        .acting_for(&api, None, Action::WebhookControl, "notify secret")
        .await?;
    let signer = Signer::new(api.access().webhook_master());
    let secret = signer.tenant(&tenant).reveal();
    let tenant = tenant.to_string();
    Ok(Answer(StatusCode::OK, NotifySecret { tenant, secret }))
}

/// Which deliveries.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct DeliveriesAsked {
    /// `waiting` or `dead`; both when left out.
    state: Option<String>,
    /// Of this webhook alone.
    webhook: Option<String>,
    /// After the delivery of this name.
    after: Option<String>,
}

/// Lists messages that wait to be sent or were given up, by name; `next` is the `after` of the next page. What was delivered is not kept.
#[utoipa::path(
    get, path = "/v1/deliveries", tag = "webhooks", params(DeliveriesAsked),
    responses(
        (status = 200, description = "A page", body = List<DeliveryView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn deliveries(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Asked(asked): Asked<DeliveriesAsked>,
) -> Result<Answer<List<DeliveryView>>, Problem> {
    let dead = match asked.state.as_deref() {
        None => None,
        Some("dead") => Some(true),
        Some("waiting") => Some(false),
        Some(_) => return Err(Problem::invalid("state", "it is `waiting` or `dead`")),
    };
    let after = asked.after.filter(|after| !after.is_empty());
    if after.as_ref().is_some_and(|after| !is_delivery(after)) {
        return Err(Problem::invalid("after", "it is no name of a delivery"));
    }
    let own = caller
        .acting_for(&api, None, Action::WebhookRead, "deliveries")
        .await?;
    let webhook = match &asked.webhook {
        Some(id) => Some(found(&api, &caller, id, Action::WebhookRead).await?.id),
        None => None,
    };
    let all = sees_every_tenant(&caller.principal, Action::WebhookRead);
    let filter = MessageFilter {
        tenant: Some(own).filter(|_| !all),
        webhook,
        dead,
    };
    let messages = api.db().messages(&filter, after.as_deref(), PAGE).await?;
    let full = messages.len() >= PAGE as usize;
    let next = messages.last().filter(|_| full).map(|last| last.id.clone());
    let items = messages.into_iter().map(DeliveryView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next }))
}

fn is_delivery(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    !text.is_empty() && text.len() <= DELIVERY_ID_MAX && text.bytes().all(legal)
}

/// Sends a message that was given up again, from its first try.
#[utoipa::path(
    post, path = "/v1/deliveries/{id}/replay", tag = "webhooks", params(("id" = String, Path)),
    responses(
        (status = 204, description = "It is sent again"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn replay(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<StatusCode, Problem> {
    let own = caller
        .acting_for(&api, None, Action::WebhookControl, &id)
        .await?;
    let all = sees_every_tenant(&caller.principal, Action::WebhookControl);
    let replayed = is_delivery(&id) && {
        let tenant = Some(&own).filter(|_| !all);
        api.db().replay(&id, tenant).await?
    };
    match replayed {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::not_found("dead delivery", &id)),
    }
}
