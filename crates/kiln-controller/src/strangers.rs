//! Those who are turned away before anybody knows who they are: counted each, and kept in the audit trail as far as its room for them goes.
//! Nobody without a proof decides how fast the database grows.

use std::time::Instant;

use kiln_db::NewAudit;

use crate::access::Door;
use crate::api::limits::Rates;
use crate::state::Controller;

/// Audit rows about strangers per second, in the long run.
const ROWS_PER_S: u32 = 5;
/// And at once.
const ROWS_BURST: u32 = 100;
/// Longest target of a row, in characters.
const TARGET_MAX: usize = 200;

/// Room in the audit trail for strangers.
pub(crate) fn rows() -> Rates {
    Rates::new(ROWS_PER_S, ROWS_BURST)
}

impl Controller {
    /// Notes that somebody was turned away at a door. Never fails: nothing was opened.
    pub(crate) async fn turned_away(
        &self,
        door: Door,
        action: &'static str,
        target: &str,
        why: &str,
    ) {
        self.metrics.access(door.name(), false);
        if !self.strangers().take(door.name(), Instant::now()) {
            return;
        }
        let plain = target.chars().filter(|c| !kiln_policy::unseen(*c));
        let row = NewAudit {
            actor: "stranger".to_owned(),
            tenant: None,
            action: action.to_owned(),
            target: plain.take(TARGET_MAX).collect(),
            allowed: false,
            reason: Some(why.to_owned()),
            detail: None,
        };
        if let Err(error) = self.db.audit(row).await {
            tracing::warn!(%error, "a refusal could not be written to the audit trail");
        }
    }
}
