//! Who calls, and whether they may: every attempt, allowed or refused, is an audit row and a count.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::FromRequestParts;
use http::request::Parts;
use http::{StatusCode, header};
use kiln_core::access::{Action, Principal, Refused, Target, decide};
use kiln_core::job::TrustClass;
use kiln_core::{Role, TenantName};
use kiln_db::{Database, NewAudit};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Api;
use super::ask::parsed;
use super::limits::Slot;
use super::problem::Problem;
use crate::access::secret_token::{self, SecretKind};
use crate::access::{Access, Door, Peer, TokenRefused, owner};

/// Whose thing is meant.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct TenantAsked {
    /// The token's own unless it is an operator's.
    pub(crate) tenant: Option<String>,
}

impl TenantAsked {
    /// The tenant, once the caller may do this there.
    pub(crate) async fn allowed(
        &self,
        api: &Api,
        caller: &Caller,
        action: Action,
        name: &str,
    ) -> Result<TenantName, Problem> {
        let named = self.tenant.as_deref();
        let named: Option<TenantName> = named.map(|text| parsed("tenant", text)).transpose()?;
        caller.acting_for(api, named.as_ref(), action, name).await
    }
}

/// A proven caller of one request.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) principal: Principal,
    /// What it showed, to be looked at again while an answer goes on for long. Never printed.
    proof: Proof,
    /// Its place among the open requests of its token.
    _open: Option<Arc<Slot>>,
}

#[derive(Clone)]
enum Proof {
    Socket,
    /// Proved on the way, for one audit row.
    Passing,
    Token(Arc<str>),
}

impl std::fmt::Debug for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Socket => "Socket",
            Self::Passing => "Passing",
            Self::Token(_) => "Token",
        })
    }
}

impl FromRequestParts<Arc<Api>> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Problem> {
        let mut shown = parts.headers.get_all(header::AUTHORIZATION).iter();
        let first = shown.next();
        if shown.next().is_some() {
            return Err(Problem::bad_request("there are two Authorization headers"));
        }
        let Some(value) = first else {
            if parts.extensions.get::<Peer>().is_some_and(Peer::is_owner) {
                return Ok(Self {
                    principal: owner(),
                    proof: Proof::Socket,
                    _open: None,
                });
            }
            api.refuse_stranger("authenticate", "none", parts.uri.path())
                .await;
            return Err(Problem::unauthenticated("this request carries no token"));
        };
        let token = value
            .to_str()
            .ok()
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim());
        let Some(token) = token else {
            api.refuse_stranger("authenticate", "malformed", parts.uri.path())
                .await;
            return Err(Problem::unauthenticated(
                "the Authorization header is not `Bearer TOKEN`",
            ));
        };
        let principal = match api.authenticate(token).await {
            Ok(principal) => principal,
            Err(Unproven::Refused(why)) => {
                api.refuse_stranger("authenticate", why.code(), parts.uri.path())
                    .await;
                return Err(Problem::unauthenticated(format!(
                    "the token was refused: {why}"
                )));
            }
            Err(Unproven::Unavailable(problem)) => return Err(problem),
        };
        // A token and the sessions exchanged for it are one subject.
        let name = principal.subject.as_str();
        if !api.rates.take(name, Instant::now()) {
            api.backend().count(Door::User, "rate", Some("rate"));
            return Err(Problem::too_many(
                "rate",
                "this token makes too many requests",
            ));
        }
        let Some(open) = api.open.take(name) else {
            api.backend().count(Door::User, "rate", Some("open"));
            return Err(Problem::too_many(
                "open",
                "this token has too many requests open at once",
            ));
        };
        Ok(Self {
            principal,
            proof: Proof::Token(token.into()),
            _open: Some(Arc::new(open)),
        })
    }
}

/// Why a token proves nothing.
pub(crate) enum Unproven {
    Refused(TokenRefused),
    Unavailable(Problem),
}

/// Who a token of the user door speaks for, at `now_ms` (milliseconds since the Unix epoch).
pub(crate) async fn authenticate(
    access: &Access,
    db: &Database,
    token: &str,
    now_ms: u64,
) -> Result<Principal, Unproven> {
    if secret_token::is_secret(token) {
        return authenticate_service(db, token).await;
    }
    let verified = access
        .verify_user(token, now_ms)
        .map_err(Unproven::Refused)?;
    for id in &verified.revocable {
        match db.session_revoked(id.as_str()).await {
            Ok(false) => {}
            Ok(true) => return Err(Unproven::Refused(TokenRefused::Revoked)),
            Err(error) => return Err(Unproven::Unavailable(error.into())),
        }
    }
    Ok(verified.principal)
}

async fn authenticate_service(db: &Database, token: &str) -> Result<Principal, Unproven> {
    let shown = secret_token::parse(SecretKind::Service, token).map_err(Unproven::Refused)?;
    let kept = match db.use_token(&shown.hash).await {
        Ok(kept) => kept,
        Err(error) => {
            return Err(match error {
                kiln_db::TokenRefused::Unknown => Unproven::Refused(TokenRefused::Unknown),
                kiln_db::TokenRefused::Expired(_) => Unproven::Refused(TokenRefused::Expired),
                kiln_db::TokenRefused::Revoked(_) => Unproven::Refused(TokenRefused::Revoked),
                kiln_db::TokenRefused::Database(error) => Unproven::Unavailable(error.into()),
            });
        }
    };
    if kept.id != shown.id {
        return Err(Unproven::Refused(TokenRefused::Unknown));
    }
    super::tokens::principal(&kept).map_err(|_| Unproven::Refused(TokenRefused::Malformed))
}

impl Api {
    /// Who a token of the user door speaks for, now.
    pub(crate) async fn authenticate(&self, token: &str) -> Result<Principal, Unproven> {
        authenticate(self.access(), self.db(), token, self.now_ms()).await
    }

    /// Notes that somebody without a good proof was turned away. Rows are bounded, counts are not.
    pub(crate) async fn refuse_stranger(
        &self,
        action: &'static str,
        why: &'static str,
        path: &str,
    ) {
        self.backend().count(Door::User, action, Some(why));
        if !self.strangers.take("", Instant::now()) {
            return;
        }
        let entry = NewAudit {
            actor: "stranger".to_owned(),
            tenant: None,
            action: action.to_owned(),
            target: path
                .chars()
                .filter(|c| !kiln_policy::unseen(*c))
                .take(200)
                .collect(),
            allowed: false,
            reason: Some(why.to_owned()),
            detail: None,
        };
        if let Err(error) = self.db().audit(entry).await {
            tracing::warn!(%error, "a refusal could not be written to the audit trail");
        }
    }
}

impl Caller {
    /// Somebody who proved who they are on the way, for one audit row.
    pub(crate) fn of(principal: Principal) -> Self {
        Self {
            principal,
            proof: Proof::Passing,
            _open: None,
        }
    }

    /// Whether it is the owner of the installation, on the private socket.
    pub(crate) fn is_on_the_socket(&self) -> bool {
        matches!(self.proof, Proof::Socket)
    }

    /// Notes that a short-lived token was made.
    pub(crate) async fn note_exchange(
        &self,
        api: &Api,
        tenant: Option<TenantName>,
        made: &str,
    ) -> Result<(), Problem> {
        let entry = NewAudit {
            actor: self.actor(),
            tenant,
            action: "token:exchange".to_owned(),
            target: made.to_owned(),
            allowed: true,
            reason: None,
            detail: None,
        };
        api.db().audit(entry).await.map_err(Problem::from)
    }

    pub(crate) fn tenant(&self) -> &TenantName {
        &self.principal.tenant
    }

    /// As audit rows name it.
    pub(crate) fn actor(&self) -> String {
        match &self.principal.token {
            Some(token) => format!("token:{token} ({})", self.principal.subject),
            None => format!("user:{}", self.principal.subject),
        }
    }

    /// Name of the bearer for lists and events: no secret, no internal id.
    pub(crate) fn subject(&self) -> &str {
        &self.principal.subject
    }

    /// Whether its proof is still good, asked again while an answer goes on.
    pub(crate) async fn is_still_good(&self, api: &Api) -> bool {
        match &self.proof {
            Proof::Socket | Proof::Passing => true,
            Proof::Token(token) => api.authenticate(token).await.is_ok(),
        }
    }

    /// Decides, counts, and writes the audit row, before anything is done.
    pub(crate) async fn may(
        &self,
        api: &Api,
        action: Action,
        target: Target<'_>,
        name: &str,
    ) -> Result<(), Problem> {
        let decided = decide(&self.principal, action, target);
        let refused = decided.as_ref().err().map(Refused::code);
        api.backend().count(Door::User, action.name(), refused);
        let tenant = match target {
            Target::Tenant(tenant) => Some(tenant.clone()),
            Target::Installation => None,
        };
        self.note(api, action, tenant, name, refused).await?;
        match decided {
            Ok(()) => Ok(()),
            Err(Refused::ForeignTenant) => Err(Problem::not_found("thing", name)),
            Err(why @ Refused::OperatorsOnly { .. }) => Err(Problem::forbidden(why.to_string())
                .hint("an operator's admin makes one: `kiln token create --role ROLE --operator`")),
            Err(why) => Err(Problem::forbidden(why.to_string())
                .hint("ask an admin for a token with the role and scopes for this")),
        }
    }

    /// Writes an audit row; nothing is done that could not be noted.
    pub(crate) async fn note(
        &self,
        api: &Api,
        action: Action,
        tenant: Option<TenantName>,
        name: &str,
        refused: Option<&str>,
    ) -> Result<(), Problem> {
        let entry = NewAudit {
            actor: self.actor(),
            tenant,
            action: action.name().to_owned(),
            target: name.chars().filter(|c| !kiln_policy::unseen(*c)).collect(),
            allowed: refused.is_none(),
            reason: refused.map(str::to_owned),
            detail: None,
        };
        api.db().audit(entry).await.map_err(Problem::from)
    }

    /// Reads a job for an action. Another tenant's is not there, in the very words of one that never was.
    pub(crate) async fn job(
        &self,
        api: &Api,
        id: &str,
        action: Action,
    ) -> Result<kiln_db::Job, Problem> {
        let nothing = || Problem::not_found("job", id);
        let Ok(parsed) = id.parse() else {
            return Err(nothing());
        };
        let Some(job) = api.db().job(&parsed).await? else {
            let home = Target::Tenant(self.tenant());
            self.may(api, action, home, id).await?;
            return Err(nothing());
        };
        let target = Target::Tenant(&job.request.tenant);
        match self.may(api, action, target, id).await {
            Ok(()) => Ok(job),
            Err(problem) if problem.status == StatusCode::NOT_FOUND => Err(nothing()),
            Err(problem) => Err(problem),
        }
    }

    /// Reads a kept machine for an action, as [`Caller::job`] reads a job.
    pub(crate) async fn machine(
        &self,
        api: &Api,
        id: &str,
        action: Action,
    ) -> Result<kiln_db::Kept, Problem> {
        let nothing = || {
            Problem::not_found("kept machine", id)
                .hint("`kiln machine list` shows them; `kiln run --keep` keeps one")
        };
        let Ok(parsed) = id.parse() else {
            return Err(nothing());
        };
        let Some(kept) = api.db().kept(&parsed).await? else {
            let home = Target::Tenant(self.tenant());
            self.may(api, action, home, id).await?;
            return Err(nothing());
        };
        let target = Target::Tenant(&kept.tenant);
        match self.may(api, action, target, id).await {
            Ok(()) => Ok(kept),
            Err(problem) if problem.status == StatusCode::NOT_FOUND => Err(nothing()),
            Err(problem) => Err(problem),
        }
    }

    /// Whether the caller may have what a kept machine of a trusted job has in it: its files, its memory, whatever it was given.
    ///
    /// # Errors
    /// A token whose own jobs are untrusted reaches untrusted jobs' machines alone.
    pub(crate) async fn trusted_as(&self, api: &Api, kept: &kiln_db::Kept) -> Result<(), Problem> {
        if self.principal.trust == TrustClass::Trusted {
            return Ok(());
        }
        let id = &kept.attempt.job;
        let job = api.db().job(id).await?;
        let trusted = job.is_none_or(|job| job.request.trust == TrustClass::Trusted);
        if !trusted {
            return Ok(());
        }
        let why = "this machine is a trusted job's, and the jobs of this token are untrusted";
        let tenant = Some(kept.tenant.clone());
        let refused = Some(why);
        self.note(api, Action::MachineUse, tenant, id.as_str(), refused)
            .await?;
        Err(Problem::forbidden(why).hint(
            "ask an admin for a token whose jobs may be trusted (`kiln token create --trusted`)",
        ))
    }

    /// The tenant that a list or submission is for: the caller's own unless an operator names another.
    pub(crate) async fn acting_for(
        &self,
        api: &Api,
        asked: Option<&TenantName>,
        action: Action,
        name: &str,
    ) -> Result<TenantName, Problem> {
        let tenant = asked.unwrap_or(self.tenant());
        self.may(api, action, Target::Tenant(tenant), name)
            .await
            .map_err(|problem| {
                if problem.code == "not_found" {
                    Problem::not_found("tenant", tenant.as_str())
                } else {
                    problem
                }
            })?;
        Ok(tenant.clone())
    }

    /// Whether it may do something that it does not ask for by itself: no audit row tells of the question.
    pub(crate) fn could(&self, action: Action, target: Target<'_>) -> bool {
        decide(&self.principal, action, target).is_ok()
    }

    /// Whether it may give a role: never more than its own.
    pub(crate) fn may_give(&self, role: Role, operator: bool) -> bool {
        let own = self.principal.role;
        (self.principal.operator || !operator)
            && (own == Role::Admin
                || Action::ALL
                    .iter()
                    .all(|action| role.reach(*action).is_none() || own.reach(*action).is_some()))
    }
}
