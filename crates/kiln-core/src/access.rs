//! Who may do what: the five roles, the actions, the matrix between them. How far a request may go below what an operator allows is [`Ceiling`].
//!
//! Meaning only. Tokens, keys and certificates are `kiln-controller`'s; this module decides on principals that were already
//! proven. Nothing here comes from a request: tenant, role, highest priority and trust class are the token's (DESIGN rule 9).

mod ceiling;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::job::TrustClass;
use crate::{Priority, TenantName, TokenId};

pub use ceiling::{
    Asked, Ceiling, DISK_MIN, Granted, MEMORY_MIN, NetworkCeiling, OutsideLimits, TIMEOUT_MIN_MS,
};

/// What somebody is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Everything.
    Admin,
    /// Machines, workers, queues, caches.
    BuildEngineer,
    /// Reads everything, the audit trail included; revokes.
    Security,
    /// Builds, runs, cancels.
    Developer,
    /// Looks.
    ReadOnly,
}

/// Why a text is not the name of a role or an action.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {kind}; there are: {known}")]
pub struct ParseAccessError {
    text: String,
    kind: &'static str,
    known: String,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 5] = [
        Self::Admin,
        Self::BuildEngineer,
        Self::Security,
        Self::Developer,
        Self::ReadOnly,
    ];

    /// Stable name, as tokens and tables have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::BuildEngineer => "build-engineer",
            Self::Security => "security",
            Self::Developer => "developer",
            Self::ReadOnly => "read-only",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = ParseAccessError;

    fn from_str(text: &str) -> Result<Self, ParseAccessError> {
        by_name(text, "a role", &Self::ALL, |role| role.name())
    }
}

macro_rules! actions {
    ($($(#[$doc:meta])* $name:ident = $text:literal),+ $(,)?) => {
        /// Something a principal may be allowed to do. Scopes of tokens are sets of these.
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize,
        )]
        pub enum Action {
            $($(#[$doc])* #[serde(rename = $text)] $name),+
        }

        impl Action {
            /// Every action.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Stable name, as scopes, audit rows and metrics have it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text),+
                }
            }
        }
    };
}

actions! {
    /// Submit a build or run, or retry one.
    JobSubmit = "job:submit",
    /// See jobs, their events and timelines.
    JobRead = "job:read",
    /// Cancel a job.
    JobCancel = "job:cancel",
    /// Read a job's log.
    LogRead = "log:read",
    /// Fetch a job's artifacts.
    ArtifactRead = "artifact:read",
    /// See queues.
    QueueRead = "queue:read",
    /// Pause and resume queues, set their limits.
    QueueControl = "queue:control",
    /// See workers.
    WorkerRead = "worker:read",
    /// Drain, cordon and resume workers.
    WorkerControl = "worker:control",
    /// Let a worker join, or remove one.
    WorkerEnrol = "worker:enrol",
    /// See a tenant, its quota and usage.
    TenantRead = "tenant:read",
    /// Create tenants, set quotas and weights.
    TenantControl = "tenant:control",
    /// See what is on hold, put things on hold and let them go.
    HoldControl = "hold:control",
    /// See tokens (never their secret).
    TokenRead = "token:read",
    /// Make tokens.
    TokenCreate = "token:create",
    /// Revoke tokens.
    TokenRevoke = "token:revoke",
    /// See webhooks and their deliveries.
    WebhookRead = "webhook:read",
    /// Make, change, replay and remove webhooks.
    WebhookControl = "webhook:control",
    /// Read the audit trail.
    AuditRead = "audit:read",
    /// See which secrets a tenant keeps, and who may have them: never a value.
    SecretRead = "secret:read",
    /// Give secrets a value and a scope.
    SecretWrite = "secret:write",
    /// Take secrets away.
    SecretRemove = "secret:remove",
    /// Read images.
    ImagePull = "image:pull",
    /// Write images into the tenant's own tree.
    ImagePush = "image:push",
    /// Take the name of an image away.
    ImageRemove = "image:remove",
    /// See machines that are kept and what they use.
    MachineRead = "machine:read",
    /// Be in a kept machine: commands, terminals, copies, connections to its ports.
    MachineUse = "machine:use",
    /// End a kept machine.
    MachineRemove = "machine:remove",
}

impl Action {
    /// Whether it is about the whole installation and no tenant.
    #[must_use]
    pub fn is_of_installation(self) -> bool {
        matches!(
            self,
            Self::WorkerControl
                | Self::WorkerEnrol
                | Self::WorkerRead
                | Self::QueueControl
                | Self::TenantControl
                | Self::HoldControl
        )
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Action {
    type Err = ParseAccessError;

    fn from_str(text: &str) -> Result<Self, ParseAccessError> {
        by_name(text, "an action", Self::ALL, |action| action.name())
    }
}

fn by_name<T: Copy>(
    text: &str,
    kind: &'static str,
    all: &[T],
    name: fn(T) -> &'static str,
) -> Result<T, ParseAccessError> {
    all.iter()
        .copied()
        .find(|one| name(*one) == text)
        .ok_or_else(|| ParseAccessError {
            text: text.chars().take(80).collect(),
            kind,
            known: all
                .iter()
                .map(|one| name(*one))
                .collect::<Vec<_>>()
                .join(", "),
        })
}

/// Whose things a role's action reaches when the principal is an operator. A member's reach always ends at its own tenant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Its own tenant's, operator or not.
    Own,
    /// Every tenant's and the installation's, for operators.
    Everything,
}

impl Role {
    /// The matrix: how far this role's action reaches, or `None` when the role may not do it at all.
    #[must_use]
    pub fn reach(self, action: Action) -> Option<Reach> {
        use Action as A;
        use Reach::{Everything, Own};
        match self {
            // Nobody stands in another tenant's machine, whatever they are.
            _ if action == A::MachineUse => match self {
                Self::Admin | Self::BuildEngineer | Self::Developer => Some(Own),
                Self::Security | Self::ReadOnly => None,
            },
            Self::Admin => Some(Everything),
            Self::BuildEngineer => match action {
                A::TenantControl
                | A::HoldControl
                | A::TokenCreate
                | A::TokenRevoke
                | A::AuditRead => None,
                A::JobSubmit
                | A::ImagePush
                | A::ImageRemove
                | A::WebhookControl
                | A::TokenRead
                | A::SecretRead
                | A::SecretWrite
                | A::SecretRemove => Some(Own),
                _ => Some(Everything),
            },
            Self::Security => match action {
                A::JobSubmit
                | A::QueueControl
                | A::WorkerControl
                | A::WorkerEnrol
                | A::TenantControl
                | A::TokenCreate
                | A::WebhookControl
                | A::SecretWrite
                | A::ImagePush => None,
                _ => Some(Everything),
            },
            Self::Developer => match action {
                A::JobSubmit
                | A::JobRead
                | A::JobCancel
                | A::LogRead
                | A::ArtifactRead
                | A::QueueRead
                | A::TenantRead
                | A::WebhookRead
                | A::SecretRead
                | A::ImagePull
                | A::ImagePush
                | A::ImageRemove
                | A::MachineRead
                | A::MachineRemove => Some(Own),
                _ => None,
            },
            Self::ReadOnly => match action {
                A::JobRead | A::QueueRead | A::TenantRead | A::WorkerRead | A::MachineRead => {
                    Some(Everything)
                }
                _ => None,
            },
        }
    }
}

/// Somebody whose identity was proven at a door.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Principal {
    /// Who, for audit rows and messages.
    pub subject: String,
    /// The token that proved it; none on the private socket.
    pub token: Option<TokenId>,
    /// Home tenant: whose jobs it submits.
    pub tenant: TenantName,
    /// What it is.
    pub role: Role,
    /// Whether its role reaches beyond its tenant.
    pub operator: bool,
    /// The only actions its token is good for; none means all of its role.
    pub scopes: Option<BTreeSet<Action>>,
    /// The highest priority it may ask for.
    pub priority_max: Priority,
    /// The best trust its jobs can have.
    pub trust: TrustClass,
    /// When its proof ends, milliseconds since the Unix epoch; long answers end then. None on the private socket.
    pub expires_unix_ms: Option<u64>,
    /// What it gives others ends then at the latest: the end of the lasting token behind it. None: no token is behind it.
    pub gives_until_unix_ms: Option<u64>,
}

/// What an action is done to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target<'a> {
    /// Something of a tenant.
    Tenant(&'a TenantName),
    /// Something of the installation: workers, queues, tenants.
    Installation,
}

/// Why a principal may not.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// The role never may.
    #[error("the role {role} may not {action}")]
    Role {
        /// The role.
        role: Role,
        /// What was tried.
        action: Action,
    },
    /// The token is for other actions.
    #[error("the token's scopes do not include {action}")]
    Scope {
        /// What was tried.
        action: Action,
    },
    /// The thing belongs to another tenant. Told to a caller as if there were no such thing.
    #[error("it belongs to another tenant")]
    ForeignTenant,
    /// Only operators may.
    #[error("only an operator's token may {action}")]
    OperatorsOnly {
        /// What was tried.
        action: Action,
    },
}

impl Refused {
    /// Stable short name, for problem documents, audit rows and metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Role { .. } => "role",
            Self::Scope { .. } => "scope",
            Self::ForeignTenant => "foreign_tenant",
            Self::OperatorsOnly { .. } => "operators_only",
        }
    }
}

/// Decides one attempt to do something.
///
/// # Errors
/// Why not.
pub fn decide(principal: &Principal, action: Action, target: Target<'_>) -> Result<(), Refused> {
    let role = principal.role;
    let reach = role.reach(action).ok_or(Refused::Role { role, action })?;
    if let Some(scopes) = &principal.scopes
        && !scopes.contains(&action)
    {
        return Err(Refused::Scope { action });
    }
    let everything = principal.operator && reach == Reach::Everything;
    match target {
        Target::Tenant(tenant) if *tenant == principal.tenant || everything => Ok(()),
        Target::Tenant(_) => Err(Refused::ForeignTenant),
        Target::Installation if everything => Ok(()),
        Target::Installation => Err(Refused::OperatorsOnly { action }),
    }
}

/// Whether a principal sees what every tenant has, for lists.
#[must_use]
pub fn sees_every_tenant(principal: &Principal, action: Action) -> bool {
    principal.operator && principal.role.reach(action) == Some(Reach::Everything)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn principal(role: Role, operator: bool, tenant: &str) -> Principal {
        Principal {
            subject: "someone".to_owned(),
            token: None,
            tenant: tenant.parse().expect("name"),
            role,
            operator,
            scopes: None,
            priority_max: Priority::default(),
            trust: TrustClass::Untrusted,
            expires_unix_ms: None,
            gives_until_unix_ms: None,
        }
    }

    #[test]
    fn the_matrix_as_the_seeds_have_it() {
        let own = "acme".parse().expect("name");
        let may = |role, operator, action: Action| {
            let target = if action.is_of_installation() {
                Target::Installation
            } else {
                Target::Tenant(&own)
            };
            decide(&principal(role, operator, "acme"), action, target).is_ok()
        };
        for action in Action::ALL {
            assert!(may(Role::Admin, true, *action), "admin {action}");
        }
        assert!(may(Role::Developer, false, Action::JobSubmit));
        assert!(!may(Role::Developer, true, Action::WorkerControl));
        assert!(!may(Role::Developer, false, Action::TokenCreate));
        assert!(may(Role::BuildEngineer, true, Action::WorkerControl));
        assert!(!may(Role::BuildEngineer, false, Action::WorkerControl));
        assert!(!may(Role::BuildEngineer, true, Action::AuditRead));
        assert!(may(Role::Security, true, Action::AuditRead));
        assert!(!may(Role::Security, true, Action::JobSubmit));
        assert!(may(Role::BuildEngineer, false, Action::SecretWrite));
        assert!(may(Role::Developer, false, Action::SecretRead));
        assert!(!may(Role::Developer, true, Action::SecretWrite));
        assert!(may(Role::Security, false, Action::SecretRemove));
        assert!(!may(Role::Security, true, Action::SecretWrite));
        assert!(may(Role::Security, true, Action::HoldControl));
        assert!(!may(Role::Security, false, Action::HoldControl));
        assert!(!may(Role::BuildEngineer, true, Action::HoldControl));
        assert!(may(Role::Developer, false, Action::ImageRemove));
        assert!(may(Role::Security, true, Action::ImageRemove));
        assert!(!may(Role::ReadOnly, true, Action::ImageRemove));
        assert!(may(Role::ReadOnly, false, Action::JobRead));
        for action in [
            Action::JobSubmit,
            Action::JobCancel,
            Action::LogRead,
            Action::SecretRead,
        ] {
            assert!(!may(Role::ReadOnly, true, action));
        }
    }

    #[test]
    fn names_read_back() {
        for role in Role::ALL {
            assert_eq!(role.name().parse(), Ok(role));
            let json = serde_json::to_string(&role).expect("json");
            assert_eq!(json, format!("\"{role}\""));
        }
        for action in Action::ALL {
            assert_eq!(action.name().parse(), Ok(*action));
        }
        assert!("Admin".parse::<Role>().is_err());
    }

    proptest! {
        #[test]
        fn a_foreign_tenant_is_for_operators_by_their_roles_grant_only(
            role in proptest::sample::select(&Role::ALL[..]),
            action in proptest::sample::select(Action::ALL),
            operator: bool,
            scoped in proptest::option::of(proptest::collection::btree_set(
                proptest::sample::select(Action::ALL), 0..6)),
        ) {
            let mut who = principal(role, operator, "acme");
            who.scopes = scoped.clone();
            let foreign = "other".parse().expect("name");
            let allowed = decide(&who, action, Target::Tenant(&foreign)).is_ok();
            if allowed {
                prop_assert!(operator);
                prop_assert_eq!(role.reach(action), Some(Reach::Everything));
                prop_assert!(scoped.is_none_or(|scopes| scopes.contains(&action)));
            }
            let installation = decide(&who, action, Target::Installation).is_ok();
            prop_assert!(operator || !installation);
        }
    }
}
