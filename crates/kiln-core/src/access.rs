//! Who may do what: the five roles, the actions, the matrix between them, and how far a request may go below what an operator allows.
//!
//! Meaning only. Tokens, keys and certificates are `kiln-controller`'s; this module decides on principals that were already
//! proven. Nothing here comes from a request: tenant, role, highest priority and trust class are the token's (DESIGN rule 9).

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::job::Limits;
use crate::{AllowRule, ByteSize, NetworkPolicy, Priority, TenantName, TokenId, job::TrustClass};

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
    /// Read images.
    ImagePull = "image:pull",
    /// Write images into the tenant's own tree.
    ImagePush = "image:push",
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
            Self::Admin => Some(Everything),
            Self::BuildEngineer => match action {
                A::TenantControl | A::TokenCreate | A::TokenRevoke | A::AuditRead => None,
                A::JobSubmit | A::ImagePush | A::WebhookControl | A::TokenRead => Some(Own),
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
                | A::ImagePull
                | A::ImagePush => Some(Own),
                _ => None,
            },
            Self::ReadOnly => match action {
                A::JobRead | A::QueueRead | A::TenantRead | A::WorkerRead => Some(Everything),
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

/// The widest network a job may ask for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "mode")]
pub enum NetworkCeiling {
    /// None at all.
    Isolated,
    /// These destinations and no others.
    Listed {
        /// Allowed destinations.
        allow: Vec<AllowRule>,
    },
    /// Any named destinations.
    AnyNamed,
}

/// The most that a request may ask for: the operator's, never the request's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ceiling {
    /// CPUs, memory, disk and time.
    pub limits: Limits,
    /// Network rate in bits per second.
    pub network_bits: u64,
    /// Destinations.
    pub network: NetworkCeiling,
}

impl Default for Ceiling {
    /// The `ci` size of the seeds: 4 CPUs, 8 GiB, 50 GiB, 100 Mbit/s; an hour.
    fn default() -> Self {
        Self {
            limits: Limits {
                cpus: 4,
                memory: ByteSize::gib(8),
                disk: ByteSize::gib(50),
                timeout_ms: 3_600_000,
            },
            network_bits: 100_000_000,
            network: NetworkCeiling::AnyNamed,
        }
    }
}

/// What a request asks for; what it leaves out is the default, never more than the ceiling.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// Disk.
    pub disk: Option<ByteSize>,
    /// Wall time in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Network rate in bits per second.
    pub network_bits: Option<u64>,
    /// Network.
    pub network: NetworkPolicy,
    /// Order.
    pub priority: Priority,
}

/// Least memory a machine can start with.
pub const MEMORY_MIN: ByteSize = ByteSize::mib(256);
/// Least disk a machine can work with.
pub const DISK_MIN: ByteSize = ByteSize::mib(256);
/// Shortest wall time.
pub const TIMEOUT_MIN_MS: u64 = 1_000;

/// Why a request was refused: it asks for more than it may, or for nothing at all.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field} {asked} is outside what is allowed: {least} to {most}")]
pub struct OutsideLimits {
    /// Name of the field.
    pub field: &'static str,
    /// What was asked.
    pub asked: String,
    /// The least.
    pub least: String,
    /// The most.
    pub most: String,
}

/// What a request gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Granted {
    /// CPUs, memory, disk and time.
    pub limits: Limits,
    /// Network rate in bits per second.
    pub network_bits: u64,
    /// Network.
    pub network: NetworkPolicy,
    /// Order.
    pub priority: Priority,
}

impl Ceiling {
    /// Grants a request that stays within this ceiling, `default` where it asks for nothing, and the principal's priority.
    ///
    /// # Errors
    /// The first field that is outside.
    pub fn narrow(
        &self,
        asked: &Asked,
        default: &Limits,
        priority_max: Priority,
    ) -> Result<Granted, OutsideLimits> {
        let most = &self.limits;
        let limits = Limits {
            cpus: within("cpus", asked.cpus, default.cpus, 1, most.cpus)?,
            memory: within(
                "memory",
                asked.memory,
                default.memory,
                MEMORY_MIN,
                most.memory,
            )?,
            disk: within("disk", asked.disk, default.disk, DISK_MIN, most.disk)?,
            timeout_ms: within(
                "timeout",
                asked.timeout_ms,
                default.timeout_ms,
                TIMEOUT_MIN_MS,
                most.timeout_ms,
            )?,
        };
        let network_bits = within(
            "network_rate",
            asked.network_bits,
            self.network_bits,
            1,
            self.network_bits,
        )?;
        if asked.priority > priority_max {
            return Err(OutsideLimits {
                field: "priority",
                asked: asked.priority.get().to_string(),
                least: "-100".to_owned(),
                most: priority_max.get().to_string(),
            });
        }
        self.check_network(&asked.network)?;
        Ok(Granted {
            limits,
            network_bits,
            network: asked.network.clone(),
            priority: asked.priority,
        })
    }

    fn check_network(&self, asked: &NetworkPolicy) -> Result<(), OutsideLimits> {
        let beyond = |rule: &&AllowRule| match &self.network {
            NetworkCeiling::Isolated => true,
            NetworkCeiling::AnyNamed => false,
            NetworkCeiling::Listed { allow } => !rule.ports().iter().all(|port| {
                allow
                    .iter()
                    .any(|may| may.host() == rule.host() && may.ports().contains(port))
            }),
        };
        match asked.rules().iter().find(beyond) {
            None => Ok(()),
            Some(rule) => Err(OutsideLimits {
                field: "network",
                asked: rule.to_string(),
                least: "isolated".to_owned(),
                most: match &self.network {
                    NetworkCeiling::Listed { .. } => "the operator's list".to_owned(),
                    NetworkCeiling::Isolated | NetworkCeiling::AnyNamed => "isolated".to_owned(),
                },
            }),
        }
    }
}

fn within<T: Ord + Copy + fmt::Display>(
    field: &'static str,
    asked: Option<T>,
    default: T,
    least: T,
    most: T,
) -> Result<T, OutsideLimits> {
    let Some(asked) = asked else {
        return Ok(default.min(most));
    };
    if asked < least || asked > most {
        return Err(OutsideLimits {
            field,
            asked: asked.to_string(),
            least: least.to_string(),
            most: most.to_string(),
        });
    }
    Ok(asked)
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
        assert!(may(Role::ReadOnly, false, Action::JobRead));
        for action in [Action::JobSubmit, Action::JobCancel, Action::LogRead] {
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

    #[test]
    fn a_request_only_narrows() {
        let ceiling = Ceiling::default();
        let default = Limits {
            cpus: 2,
            memory: ByteSize::gib(4),
            disk: ByteSize::gib(10),
            timeout_ms: 600_000,
        };
        let ask = |asked: Asked| ceiling.narrow(&asked, &default, Priority::default());
        assert_eq!(ask(Asked::default()).expect("default").limits, default);
        let over = [
            Asked {
                cpus: Some(5),
                ..Asked::default()
            },
            Asked {
                cpus: Some(0),
                ..Asked::default()
            },
            Asked {
                cpus: Some(u32::MAX),
                ..Asked::default()
            },
            Asked {
                memory: Some(ByteSize::gib(9)),
                ..Asked::default()
            },
            Asked {
                memory: Some(ByteSize(u64::MAX)),
                ..Asked::default()
            },
            Asked {
                disk: Some(ByteSize::gib(51)),
                ..Asked::default()
            },
            Asked {
                timeout_ms: Some(3_600_001),
                ..Asked::default()
            },
            Asked {
                network_bits: Some(100_000_001),
                ..Asked::default()
            },
            Asked {
                priority: 1.try_into().expect("range"),
                ..Asked::default()
            },
        ];
        for asked in over {
            assert!(ask(asked.clone()).is_err(), "{asked:?}");
        }
        let rule = |text: &str| NetworkPolicy::from_rules([text.parse().expect("rule")]);
        let listed = Ceiling {
            network: NetworkCeiling::Listed {
                allow: vec!["a.example:443".parse().expect("rule")],
            },
            ..Ceiling::default()
        };
        let network = |network| Asked {
            network,
            ..Asked::default()
        };
        let narrow = |asked| listed.narrow(&asked, &default, Priority::default());
        assert!(narrow(network(rule("a.example:443"))).is_ok());
        assert!(narrow(network(rule("a.example:80,443"))).is_err());
        assert!(narrow(network(rule("b.example:443"))).is_err());
        let small = Ceiling {
            limits: Limits { cpus: 1, ..default },
            ..Ceiling::default()
        };
        let got = small.narrow(&Asked::default(), &default, Priority::default());
        assert_eq!(
            got.expect("default").limits.cpus,
            1,
            "a default never exceeds the ceiling"
        );
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

        #[test]
        fn what_is_granted_is_never_above_the_ceiling(
            cpus: Option<u32>, memory: Option<u64>, disk: Option<u64>, timeout_ms: Option<u64>,
            network_bits: Option<u64>, default_cpus in 1..100_u32,
        ) {
            let ceiling = Ceiling::default();
            let default = Limits { cpus: default_cpus, ..ceiling.limits };
            let asked = Asked {
                cpus, memory: memory.map(ByteSize), disk: disk.map(ByteSize), timeout_ms, network_bits,
                ..Asked::default()
            };
            if let Ok(granted) = ceiling.narrow(&asked, &default, Priority::default()) {
                prop_assert!((1..=ceiling.limits.cpus).contains(&granted.limits.cpus));
                prop_assert!(granted.limits.memory <= ceiling.limits.memory);
                prop_assert!(granted.limits.disk <= ceiling.limits.disk);
                prop_assert!(granted.limits.timeout_ms <= ceiling.limits.timeout_ms);
                prop_assert!(granted.network_bits <= ceiling.network_bits);
            }
        }
    }
}
