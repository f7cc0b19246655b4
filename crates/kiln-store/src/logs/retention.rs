//! How long ended logs are kept, and what would go today.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::TryStreamExt as _;
use kiln_core::{JobId, TenantName};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _};
use serde::{Deserialize, Serialize};

use super::archive::{self, DAY_MS};
use super::{LogError, LogName, LogStore};

/// Most logs one plan names as going, and most as held; the next plan goes on.
const PLAN_MAX: usize = 10_000;

/// How long a log is kept.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum RetentionClass {
    /// 30 days, unless the operator says otherwise.
    #[default]
    Hot,
    /// One year.
    Warm,
    /// Seven years.
    Cold,
}

impl RetentionClass {
    /// Every class.
    pub const ALL: [Self; 3] = [Self::Hot, Self::Warm, Self::Cold];

    /// Stable short name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// Days that each class is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Periods {
    /// [`RetentionClass::Hot`].
    pub hot_days: u32,
    /// [`RetentionClass::Warm`].
    pub warm_days: u32,
    /// [`RetentionClass::Cold`].
    pub cold_days: u32,
}

impl Default for Periods {
    fn default() -> Self {
        Self {
            hot_days: 30,
            warm_days: 365,
            cold_days: 7 * 365 + 2,
        }
    }
}

impl Periods {
    /// Days that this class is kept.
    #[must_use]
    pub fn days(&self, class: RetentionClass) -> u32 {
        match class {
            RetentionClass::Hot => self.hot_days,
            RetentionClass::Warm => self.warm_days,
            RetentionClass::Cold => self.cold_days,
        }
    }
}

/// Periods for everybody, and for some tenants their own.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionPolicy {
    /// Unless the tenant has its own.
    pub default: Periods,
    /// Of these tenants.
    pub tenants: BTreeMap<TenantName, Periods>,
}

impl RetentionPolicy {
    fn days(&self, tenant: &TenantName, class: RetentionClass) -> u64 {
        let periods = self.tenants.get(tenant).unwrap_or(&self.default);
        u64::from(periods.days(class))
    }

    fn least_days(&self, class: RetentionClass) -> u64 {
        std::iter::once(&self.default)
            .chain(self.tenants.values())
            .map(|periods| u64::from(periods.days(class)))
            .min()
            .unwrap_or(u64::MAX)
    }
}

/// What may not go, whatever its age: legal hold.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Holds {
    /// Everything of these tenants.
    pub tenants: BTreeSet<TenantName>,
    /// These jobs.
    pub jobs: BTreeSet<JobId>,
}

impl Holds {
    /// Whether this log may not go.
    #[must_use]
    pub fn covers(&self, name: &LogName) -> bool {
        self.tenants.contains(&name.tenant) || self.jobs.contains(&name.attempt.job)
    }
}

/// A log whose time is over.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Doomed {
    /// Which.
    pub name: LogName,
    /// Its class.
    pub class: RetentionClass,
    /// The day it ended, in days since 1970.
    pub ended_day: u64,
}

/// What would go.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RetentionPlan {
    /// These logs.
    pub go: Vec<Doomed>,
    /// Their time is over as well, but a hold keeps them.
    pub held: Vec<Doomed>,
    /// There is more than one plan takes.
    pub more: bool,
}

/// What went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Swept {
    /// Logs that were removed.
    pub removed: u64,
    /// Logs that a hold took out of the plan since it was made.
    pub held: u64,
}

impl LogStore {
    /// Dry run: which ended logs are older than the policy keeps them at `now_unix_ms`. Changes nothing.
    ///
    /// # Errors
    /// When the object store cannot be listed.
    pub async fn retention_plan(
        &self,
        policy: &RetentionPolicy,
        holds: &Holds,
        now_unix_ms: u64,
    ) -> Result<RetentionPlan, LogError> {
        let today = now_unix_ms / DAY_MS;
        let mut plan = RetentionPlan::default();
        for class in RetentionClass::ALL {
            let Some(upto) = today.checked_sub(policy.least_days(class)) else {
                continue;
            };
            for day in self.days_of(class).await? {
                // A log of that day is a full period old at the latest one day later.
                if day < upto {
                    self.plan_day(policy, holds, (class, day, today), &mut plan)
                        .await?;
                }
            }
        }
        Ok(plan)
    }

    /// The days on which logs of this class ended.
    async fn days_of(&self, class: RetentionClass) -> Result<Vec<u64>, LogError> {
        let prefix = Key::from(format!("expire/{}", class.name()));
        let listed = self
            .objects()
            .list_with_delimiter(Some(&prefix))
            .await
            .map_err(LogError::objects("list"))?;
        let day = |key: &Key| key.filename()?.parse().ok();
        Ok(listed.common_prefixes.iter().filter_map(day).collect())
    }

    async fn plan_day(
        &self,
        policy: &RetentionPolicy,
        holds: &Holds,
        (class, day, today): (RetentionClass, u64, u64),
        plan: &mut RetentionPlan,
    ) -> Result<(), LogError> {
        let prefix = Key::from(format!("expire/{}/{day:06}", class.name()));
        let mut listed = self.objects().list(Some(&prefix));
        while let Some(object) = listed.try_next().await.map_err(LogError::objects("list"))? {
            let Some(name) = name_of(&object.location) else {
                continue;
            };
            if today - day <= policy.days(&name.tenant, class) {
                continue;
            }
            let list = if holds.covers(&name) {
                &mut plan.held
            } else {
                &mut plan.go
            };
            if list.len() < PLAN_MAX {
                list.push(Doomed {
                    name,
                    class,
                    ended_day: day,
                });
            } else {
                plan.more = true;
            }
            if plan.go.len() >= PLAN_MAX {
                plan.more = true;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Removes what a plan names, unless a hold came since. Can be cut short and done again.
    ///
    /// # Errors
    /// When the object store refuses; what went before is gone.
    pub async fn retention_apply(
        &self,
        plan: &RetentionPlan,
        holds: &Holds,
    ) -> Result<Swept, LogError> {
        let mut swept = Swept::default();
        for doomed in &plan.go {
            if holds.covers(&doomed.name) {
                swept.held += 1;
                continue;
            }
            self.remove(&doomed.name).await?;
            let marker = archive::expiry_key(&doomed.name, doomed.class, doomed.ended_day * DAY_MS);
            match self.objects().delete(&marker).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => swept.removed += 1,
                Err(error) => return Err(LogError::objects("delete")(error)),
            }
        }
        Ok(swept)
    }
}

/// The log an expiry key speaks of: `expire/CLASS/DAY/TENANT/JOB/ATTEMPT`.
fn name_of(key: &Key) -> Option<LogName> {
    let parts: Vec<_> = key.parts().collect();
    let [_, _, _, tenant, job, attempt] = &parts[..] else {
        return None;
    };
    Some(LogName::new(
        tenant.as_ref().parse().ok()?,
        job.as_ref().parse().ok()?,
        attempt.as_ref().parse().ok()?,
    ))
}
