//! `GET /v2/token`: a person's or service's token for a short-lived one of the registry (the distribution project's "Token Authentication
//! Specification"). The token is the password of a login; its name is not looked at.
//!
//! A scope that the caller may not have is left out, in the very way of one that never was.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use kiln_core::access::{Principal, Target, decide};
use kiln_core::{Action, TenantName};
use kiln_db::NewAudit;
use kiln_store::registry::RepoName;

use super::registry_door::{self, refuse};
use super::shield::DoorLimits;
use super::who::now_unix_ms;
use crate::access::registry_token::REPOSITORIES_MAX;
use crate::access::{Door, Peer, RegistryAction, RepositoryGrant, secret_token};
use crate::api::caller::{Unproven, authenticate};
use crate::state::Controller;

/// Name of this service in challenges and scopes.
pub(super) const SERVICE: &str = "kiln";
/// Repositories that everybody who may pull may read.
const SHARED: &str = "shared";

/// Gives a token for the scopes that were asked for and are the caller's to have.
pub(super) async fn token(
    State(controller): State<Controller>,
    Extension(limits): Extension<Arc<DoorLimits>>,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Response {
    let challenge = registry_door::challenge(peer.as_deref(), &headers, None);
    let Some(shown) = registry_door::token(&headers) else {
        controller.metrics.access(Door::Registry.name(), false);
        return refuse("log in with a token as the password", &challenge);
    };
    let now = now_unix_ms();
    let principal = match authenticate(&controller.access, &controller.db, &shown, now).await {
        Ok(principal) => principal,
        Err(Unproven::Refused(why)) => {
            controller
                .turned_away(Door::Registry, "registry:login", "", why.code())
                .await;
            return refuse(&format!("the token was refused: {why}"), &challenge);
        }
        Err(Unproven::Unavailable(_)) => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
    };
    // Each scope is a row of the audit trail.
    if !limits.may_log_in(&principal.subject) {
        return registry_door::too_many("this token asks for too many tokens at once");
    }
    // What a session was exchanged for: when that is called back, so is what comes of it.
    let parent = match secret_token::is_secret(&shown) {
        true => None,
        false => controller
            .access
            .verify_user(&shown, now)
            .ok()
            .and_then(|verified| verified.revocable.into_iter().nth(1)),
    };
    let asked = scopes(query.as_deref().unwrap_or_default());
    let mut access = Vec::new();
    for (repo, actions) in asked {
        match granted(&controller, &principal, &repo, &actions).await {
            Ok(actions) if actions.is_empty() => {}
            Ok(actions) => access.push(RepositoryGrant {
                name: repo.as_str().to_owned(),
                actions,
            }),
            // Nothing is given that could not be noted.
            Err(_) => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        }
    }
    let tenant = principal.tenant.clone();
    let issued = controller
        .access
        .issue_for_person(&principal, parent, &tenant, access, now);
    let Ok(issued) = issued else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let answer = serde_json::json!({
        "token": issued.text,
        "access_token": issued.text,
        "expires_in": issued.expires_unix_ms.saturating_sub(now) / 1000,
    });
    let mut response = Json(answer).into_response();
    let no_store = HeaderValue::from_static("no-store");
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, no_store);
    response
}

/// Repositories and actions of a query; what cannot be read is left out.
fn scopes(query: &str) -> Vec<(RepoName, Vec<RegistryAction>)> {
    let mut found: Vec<(RepoName, Vec<RegistryAction>)> = Vec::new();
    for pair in query.split('&') {
        let Some(("scope", value)) = pair.split_once('=') else {
            continue;
        };
        for scope in unescaped(value).split(' ') {
            let mut parts = scope.rsplitn(2, ':');
            let (Some(actions), Some(rest)) = (parts.next(), parts.next()) else {
                continue;
            };
            let repo = rest.strip_prefix("repository:").map(str::parse::<RepoName>);
            let Some(Ok(repo)) = repo else { continue };
            let actions = actions.split(',').filter_map(|action| match action {
                "pull" => Some(RegistryAction::Pull),
                "push" => Some(RegistryAction::Push),
                _ => None,
            });
            let known = match found.iter().position(|(name, _)| *name == repo) {
                Some(at) => at,
                None if found.len() >= REPOSITORIES_MAX => continue,
                None => {
                    found.push((repo, Vec::new()));
                    found.len() - 1
                }
            };
            for action in actions {
                if !found[known].1.contains(&action) {
                    found[known].1.push(action);
                }
            }
        }
    }
    found
}

/// Percent signs and plus signs of a query.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        let byte = match byte {
            b'+' => b' ',
            b'%' => match (hex(rest.next()), hex(rest.next())) {
                (Some(high), Some(low)) => u8::try_from(high * 16 + low).unwrap_or(b'?'),
                _ => b'?',
            },
            byte => byte,
        };
        bytes.push(byte);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What of some actions in a repository a caller may have. Each attempt is an audit row and a count.
async fn granted(
    controller: &Controller,
    principal: &Principal,
    repo: &RepoName,
    asked: &[RegistryAction],
) -> Result<Vec<RegistryAction>, kiln_db::DbError> {
    let mut granted = Vec::new();
    for wanted in asked {
        let action = match wanted {
            RegistryAction::Pull => Action::ImagePull,
            RegistryAction::Push => Action::ImagePush,
        };
        let owner = owner_of(repo);
        let decided = match (&owner, wanted) {
            (Some(tenant), _) => decide(principal, action, Target::Tenant(tenant)),
            (None, RegistryAction::Pull) if repo.is_under(SHARED) => {
                decide(principal, action, Target::Tenant(&principal.tenant))
            }
            // Quarantines, and what the host alone writes.
            (None, _) => Err(kiln_core::access::Refused::ForeignTenant),
        };
        let refused = decided.err().map(|why| why.code().to_owned());
        controller
            .metrics
            .access(Door::Registry.name(), refused.is_none());
        if refused.is_none() {
            granted.push(*wanted);
        }
        let row = NewAudit {
            actor: match &principal.token {
                Some(token) => format!("token:{token} ({})", principal.subject),
                None => format!("user:{}", principal.subject),
            },
            tenant: Some(principal.tenant.clone()),
            action: action.name().to_owned(),
            target: repo.as_str().to_owned(),
            allowed: refused.is_none(),
            reason: refused,
            detail: None,
        };
        controller.db.audit(row).await?;
    }
    Ok(granted)
}

/// The tenant in whose tree a repository is.
fn owner_of(repo: &RepoName) -> Option<TenantName> {
    let (tenant, _) = repo.as_str().strip_prefix("t/")?.split_once('/')?;
    tenant.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_read_as_far_as_they_make_sense() {
        use RegistryAction::{Pull, Push};
        let repo = |text: &str| text.parse::<RepoName>().expect("a repository");
        let read = scopes(
            "service=kiln&scope=repository%3At%2Facme%2Fapp%3Apull%2Cpush&scope=repository:shared/node:pull+repository:t/acme/app:pull,delete&account=x",
        );
        let want = [
            (repo("t/acme/app"), vec![Pull, Push]),
            (repo("shared/node"), vec![Pull]),
        ];
        assert_eq!(read, want);
        for nothing in [
            "",
            "scope=",
            "scope=registry:catalog:*",
            "scope=repository:../x:pull",
            "scope=%",
            "scope=%zz:pull",
            "scope=repository:a",
        ] {
            assert!(scopes(nothing).is_empty(), "{nothing}");
        }
        let many: Vec<String> = (0..40)
            .map(|n| format!("scope=repository:t/acme/a{n}:pull"))
            .collect();
        assert_eq!(scopes(&many.join("&")).len(), REPOSITORIES_MAX);
        assert_eq!(
            owner_of(&repo("t/acme/app")),
            Some("acme".parse().expect("name"))
        );
        assert!(owner_of(&repo("quarantine/b1/1")).is_none());
    }
}
