//! How far a request may go: below what the operator allows, and not above the principal's priority.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::job::Limits;
use crate::{AllowRule, ByteSize, NetworkPolicy, Priority};

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
    /// Any named destinations, and an open network where the operator's policy grants one.
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
    /// Network. An open one was granted by the operator's policy before.
    pub network: NetworkPolicy,
    /// Networks of the phases before its command.
    pub phases: Vec<NetworkPolicy>,
    /// Order.
    pub priority: Priority,
}

/// Least memory a machine can start with: the same in a policy, on a command line and in a request.
pub const MEMORY_MIN: ByteSize = ByteSize::mib(128);
/// Least disk that has room for a file system: the same in a policy, on a command line and in a request.
pub const DISK_MIN: ByteSize = ByteSize::mib(16);
/// Shortest wall time: the same in a policy, on a command line and in a request.
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

impl OutsideLimits {
    /// Of milliseconds: told in the seconds that a request says.
    fn in_seconds(self) -> Self {
        let told = |ms: &str| match ms.parse::<u64>() {
            Ok(ms) if ms % 1_000 == 0 => format!("{} s", ms / 1_000),
            _ => format!("{ms} ms"),
        };
        Self {
            field: self.field,
            asked: told(&self.asked),
            least: told(&self.least),
            most: told(&self.most),
        }
    }

    /// What was asked and what may be, for where the field is named already.
    #[must_use]
    pub fn bounds(&self) -> String {
        let Self {
            asked, least, most, ..
        } = self;
        format!("{asked} is outside what is allowed: {least} to {most}")
    }
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
            )
            .map_err(|outside| outside.in_seconds())?,
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
        for network in asked.phases.iter().chain([&asked.network]) {
            self.check_network(network)?;
        }
        Ok(Granted {
            limits,
            network_bits,
            network: asked.network.clone(),
            priority: asked.priority,
        })
    }

    /// Whether a job may have this network.
    ///
    /// # Errors
    /// The first destination that is outside.
    pub fn check_network(&self, asked: &NetworkPolicy) -> Result<(), OutsideLimits> {
        let beyond = |rule: &&AllowRule| match &self.network {
            NetworkCeiling::Isolated => true,
            NetworkCeiling::AnyNamed => false,
            NetworkCeiling::Listed { allow } => !rule
                .single_ports()
                .all(|one| allow.iter().any(|may| may.covers(&one))),
        };
        let bounded = self.network != NetworkCeiling::AnyNamed;
        let open = (bounded && *asked == NetworkPolicy::Open).then(|| "open".to_owned());
        let outside = asked.rules().iter().find(beyond).map(ToString::to_string);
        match open.or(outside) {
            None => Ok(()),
            Some(asked) => Err(OutsideLimits {
                field: "network",
                asked,
                least: "isolated".to_owned(),
                most: match &self.network {
                    NetworkCeiling::Listed { .. } => "the operator's list".to_owned(),
                    NetworkCeiling::AnyNamed => "named destinations".to_owned(),
                    NetworkCeiling::Isolated => "isolated".to_owned(),
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
