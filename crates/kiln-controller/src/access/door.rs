//! The doors: each with its own key, audience and token type (DESIGN rule 13).

use super::jwt::Kind;

/// A place where a proof of identity is shown.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Door {
    /// `/v1` and `/builds`: people and services.
    User,
    /// `/worker/v1`: workers, by certificate.
    Worker,
    /// `/v2`: the registry.
    Registry,
    /// Webhooks out.
    Webhook,
    /// `/peer/v1`: other controllers of the same database.
    Controller,
}

impl Door {
    /// Every door.
    pub const ALL: [Self; 5] = [
        Self::User,
        Self::Worker,
        Self::Registry,
        Self::Webhook,
        Self::Controller,
    ];

    /// Stable name: folder of its keys, label of its metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Worker => "worker",
            Self::Registry => "registry",
            Self::Webhook => "webhook",
            Self::Controller => "controller",
        }
    }
}

/// Longest life of a token of the user door.
pub const USER_LIFE_MAX_S: u64 = 3600;
/// Longest life of a token of the registry door.
pub const REGISTRY_LIFE_MAX_S: u64 = 300;
/// Longest life of a token of the controllers' door.
pub const CONTROLLER_LIFE_MAX_S: u64 = 120;

/// Tokens of the user door.
pub(crate) const USER: Kind = Kind {
    typ: "kiln-user+jwt",
    audience: "kiln:user",
    life_max_s: USER_LIFE_MAX_S,
};

/// Tokens of the registry door.
pub(crate) const REGISTRY: Kind = Kind {
    typ: "kiln-registry+jwt",
    audience: "kiln:registry",
    life_max_s: REGISTRY_LIFE_MAX_S,
};

/// Tokens of the controllers' door.
pub(crate) const CONTROLLER: Kind = Kind {
    typ: "kiln-controller+jwt",
    audience: "kiln:controller",
    life_max_s: CONTROLLER_LIFE_MAX_S,
};
