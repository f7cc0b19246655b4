//! `[controller]` of `kiln.toml`: what the operator of a home decides for its controller, whichever process has it. A flag of `kiln serve` goes
//! before.
//!
//! Raw here, resolved by [`ControllerConfig::api`] and its neighbours. The CPUs, memory and disk that one job may ask for are `[limits]`, on a
//! server as on a laptop.

use std::time::Duration;

use kiln_controller::access::TrustedIssuer;
use kiln_controller::api::{ApiConfig, KeptBounds};
use kiln_controller::secret_stores::{SecretStores, StoreConfig};
use kiln_controller::webhooks::ReceiverPolicy;
use kiln_core::job::Limits;
use kiln_core::network::RangeException;
use kiln_db::Retention;
use serde::Deserialize;

use super::{ByteText, LimitConfig};
use crate::error::{CliError, Result};

/// `[controller]`
#[derive(Deserialize, Debug, Default, Clone)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ControllerConfig {
    /// Logs and artifacts are encrypted where they lie.
    pub encrypt_logs: bool,
    /// The collector that spans of jobs go to.
    pub otlp: Option<CollectorUrl>,
    /// Longest time of one job.
    pub timeout_max: Option<LifeText>,
    /// Most bits per second of one job, each way.
    pub network_rate_max: Option<u64>,
    /// What a job gets that asks for nothing.
    pub defaults: DefaultsConfig,
    /// How long finished jobs are kept.
    pub retention: RetentionConfig,
    /// Machines that stay when their jobs are over.
    pub keep: KeepConfig,
    /// Where webhooks may go.
    pub webhooks: WebhooksConfig,
    /// Whose identity tokens are exchanged for sessions.
    pub issuers: Vec<TrustedIssuer>,
    /// Stores of other makers that hold secrets.
    pub secret_stores: Vec<StoreConfig>,
}

/// Address of a collector, checked.
#[derive(Deserialize, Debug, Clone)]
#[serde(try_from = "String")]
pub(crate) struct CollectorUrl(pub String);

impl TryFrom<String> for CollectorUrl {
    type Error = kiln_telemetry::otlp::TracerError;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        kiln_telemetry::otlp::check(&text)?;
        Ok(Self(text))
    }
}

/// `[controller.defaults]`
#[derive(Deserialize, Debug, Default, Clone)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DefaultsConfig {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<ByteText>,
    /// Disk.
    pub disk: Option<ByteText>,
    /// Time.
    pub timeout: Option<LifeText>,
}

/// `[controller.retention]`
#[derive(Deserialize, Debug, Default, Clone)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RetentionConfig {
    /// Until then a finished job is at hand.
    pub hot: Option<LifeText>,
    /// Until then its log and artifacts are kept.
    pub warm: Option<LifeText>,
    /// Until then its record is kept.
    pub cold: Option<LifeText>,
}

/// `[controller.keep]`
#[derive(Deserialize, Debug, Default, Clone)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct KeepConfig {
    /// Longest time for which a machine may stay.
    pub max: Option<LifeText>,
    /// How long one stays whose run does not say.
    pub usual: Option<LifeText>,
    /// Machines that one tenant may keep at a time; 0: none.
    pub per_tenant: Option<u32>,
}

impl KeepConfig {
    fn bounds(&self) -> Result<KeptBounds> {
        let usual = KeptBounds::default();
        let most = usual.stays_max_ms;
        let stays_max_ms = self.max.map_or(most, LifeText::ms);
        let stays_default_ms = self
            .usual
            .map_or(usual.stays_default_ms.min(stays_max_ms), LifeText::ms);
        if stays_max_ms > most || stays_default_ms > stays_max_ms {
            return Err(CliError::usage(
                "controller.keep in kiln.toml: usual is at most max, and max at most 24h",
            ));
        }
        Ok(KeptBounds {
            stays_default_ms,
            stays_max_ms,
            tenant_max: self.per_tenant.unwrap_or(usual.tenant_max),
            ..usual
        })
    }
}

/// `[controller.webhooks]`
#[derive(Deserialize, Debug, Default, Clone)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct WebhooksConfig {
    /// `http://` receivers, too, where anybody on the way can read.
    pub allow_http: bool,
    /// Hosts whose addresses may lie in a special-purpose range.
    pub exceptions: Vec<RangeException>,
}

/// A time written as text (`90s`, `30m`, `12h`, `30d`).
#[derive(Deserialize, Debug, Clone, Copy)]
#[serde(try_from = "String")]
pub(crate) struct LifeText(pub Duration);

impl TryFrom<String> for LifeText {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        crate::args::parse_life(&text).map(Self)
    }
}

impl LifeText {
    fn ms(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

impl ControllerConfig {
    /// Where spans go.
    pub(crate) fn otlp(&self) -> Option<&str> {
        self.otlp.as_ref().map(|url| url.0.as_str())
    }

    /// Stores of other makers.
    ///
    /// # Errors
    /// When one can never work.
    pub(crate) fn secret_stores(&self) -> Result<SecretStores> {
        SecretStores::new(&self.secret_stores).map_err(|error| {
            CliError::usage(format!("controller.secret_stores in kiln.toml: {error}"))
        })
    }

    /// Bounds of the API: what one job may ask for, and what it gets unasked, never more than that.
    ///
    /// # Errors
    /// When a default that somebody wrote is beyond its maximum.
    pub(crate) fn api(&self, most: &LimitConfig) -> Result<ApiConfig> {
        let mut api = ApiConfig {
            secret_stores: self.secret_stores()?,
            kept: self.keep.bounds()?,
            ..ApiConfig::default()
        };
        let ceiling = &mut api.ceiling;
        ceiling.limits = Limits {
            cpus: most.cpus_max.max(1),
            memory: most.memory_max.0,
            disk: most.disk_max.0,
            timeout_ms: self
                .timeout_max
                .map_or(ceiling.limits.timeout_ms, LifeText::ms),
        };
        ceiling.network_bits = self.network_rate_max.unwrap_or(ceiling.network_bits).max(1);
        let (most, asked, usual) = (&api.ceiling.limits, &self.defaults, &mut api.default_limits);
        let beyond = |name: &str, most: &str| {
            CliError::usage(format!(
                "controller.defaults.{name} in kiln.toml is more than {most}"
            ))
            .hint("lower it, or raise that")
        };
        usual.cpus = bounded(asked.cpus, usual.cpus, most.cpus)
            .ok_or_else(|| beyond("cpus", "limits.cpus_max"))?;
        let memory = asked.memory.map(|text| text.0);
        usual.memory = bounded(memory, usual.memory, most.memory)
            .ok_or_else(|| beyond("memory", "limits.memory_max"))?;
        let disk = asked.disk.map(|text| text.0);
        usual.disk = bounded(disk, usual.disk, most.disk)
            .ok_or_else(|| beyond("disk", "limits.disk_max"))?;
        let timeout = asked.timeout.map(LifeText::ms);
        usual.timeout_ms = bounded(timeout, usual.timeout_ms, most.timeout_ms)
            .ok_or_else(|| beyond("timeout", "controller.timeout_max"))?;
        Ok(api)
    }

    /// How long finished jobs are kept.
    ///
    /// # Errors
    /// When a later tier ends before an earlier one.
    pub(crate) fn retention(&self) -> Result<Retention> {
        let (usual, asked) = (Retention::default(), &self.retention);
        let kept = Retention {
            hot_ms: asked.hot.map_or(usual.hot_ms, LifeText::ms),
            warm_ms: asked.warm.map_or(usual.warm_ms, LifeText::ms),
            cold_ms: asked.cold.map_or(usual.cold_ms, LifeText::ms),
        };
        if kept.hot_ms > kept.warm_ms || kept.warm_ms > kept.cold_ms {
            return Err(CliError::usage(
                "controller.retention in kiln.toml: hot ends before warm, and warm before cold",
            )
            .hint("unset they are 30d, 365d and 2555d, counted from the job's end"));
        }
        Ok(kept)
    }

    /// Where webhooks may go.
    pub(crate) fn receivers(&self) -> ReceiverPolicy {
        ReceiverPolicy {
            exceptions: self.webhooks.exceptions.clone(),
            allow_http: self.webhooks.allow_http,
        }
    }
}

/// What was asked, or the usual as far as it goes; none when more was asked than there may be.
fn bounded<T: Ord>(asked: Option<T>, usual: T, most: T) -> Option<T> {
    match asked {
        Some(asked) => (asked <= most).then_some(asked),
        None => Some(usual.min(most)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use kiln_core::ByteSize;

    fn read(text: &str) -> Config {
        toml::from_str(text).expect("legal")
    }

    #[test]
    fn without_a_word_it_is_what_was_documented() {
        let config = Config::default();
        let api = config.controller.api(&config.limits).expect("legal");
        let usual = ApiConfig::default();
        assert_eq!(api.ceiling, usual.ceiling);
        assert_eq!(api.default_limits, usual.default_limits);
        assert_eq!(
            config.controller.retention().expect("legal"),
            Retention::default()
        );
        assert_eq!(config.controller.receivers(), ReceiverPolicy::default());
    }

    #[test]
    fn an_operator_decides() {
        let config = read(
            r#"
            [limits]
            memory_max = "2G"
            [controller]
            timeout_max = "2h"
            [controller.defaults]
            timeout = "90m"
            [controller.retention]
            hot = "7d"
            [controller.webhooks]
            exceptions = [{ host = "hooks.corp.example.org", range = "10.0.0.0/8" }]
            [[controller.issuers]]
            issuer = "https://ci.example.org"
            audience = "kiln"
            rules = [{ subject = "repo:acme/*", tenant = "acme", role = "developer" }]
            "#,
        );
        let api = config.controller.api(&config.limits).expect("legal");
        assert_eq!(api.ceiling.limits.timeout_ms, 7_200_000);
        assert_eq!(api.default_limits.timeout_ms, 5_400_000);
        // Nobody asked for four gigabytes: the usual gives way.
        assert_eq!(api.default_limits.memory, ByteSize::gib(2));
        assert_eq!(
            config.controller.retention().expect("legal").hot_ms,
            604_800_000
        );
        assert_eq!(config.controller.receivers().exceptions.len(), 1);
        assert_eq!(
            config.controller.issuers[0].rules[0].tenant.as_str(),
            "acme"
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let config = read("[controller.defaults]\ncpus = 5\n");
        let error = config.controller.api(&config.limits).expect_err("beyond");
        assert!(error.message.contains("limits.cpus_max"), "{error}");
        let config = read("[controller.retention]\nwarm = \"1d\"\n");
        assert_eq!(
            config
                .controller
                .retention()
                .expect_err("order")
                .exit_code(),
            2
        );
        for bad in [
            "[controller]\nport = 1\n",
            "[controller.retention]\nhot = \"soon\"\n",
            "[controller.webhooks]\nexceptions = [{ host = \"a\", range = \"b\" }]\n",
            "[[controller.issuers]]\nissuer = \"https://a.example\"\n",
        ] {
            assert!(toml::from_str::<Config>(bad).is_err(), "{bad}");
        }
    }
}
