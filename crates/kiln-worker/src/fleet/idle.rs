//! What a worker does when it has nothing to run: the template of a head that the next build of a tenant will fork.
//!
//! One at a time, for the tenants that built here last, only with room to spare, and given up at once when a job comes: whoever drops the
//! future ends the machine. Nothing here is needed by any job; without it the next build starts a second later.

use std::collections::VecDeque;
use std::time::Duration;

use kiln_core::ByteSize;
use kiln_core::job::Limits;
use kiln_image::heads::{Head, SHARED};
use kiln_machine::ledger::{LedgerError, Need};

use crate::event::Events;
use crate::failure::Failure;
use crate::host::Host;
use crate::templates;

/// Cache scopes whose last build is remembered.
pub const RECENT_MAX: usize = 4;
/// How long nothing must have run before anything is prepared.
pub const IDLE_AFTER: Duration = Duration::from_secs(5);
/// How long until heads are looked at again that other programs of this home may have moved.
pub const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// Shown as who holds the room.
const WHO: &str = "a template, prepared while idle";

/// Who built here last, and in machines of which size.
#[derive(Clone, Debug, Default)]
pub struct Recent(VecDeque<(String, u32, ByteSize)>);

impl Recent {
    /// A build of this cache scope (`crate::fork::scope`) has begun.
    pub fn built(&mut self, scope: &str, limits: &Limits) {
        self.0.retain(|(other, ..)| other != scope);
        self.0.truncate(RECENT_MAX - 1);
        self.0
            .push_front((scope.to_owned(), limits.cpus, limits.memory));
    }

    /// Whether anybody did.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What came of a look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Done {
    /// A template was made; there may be more to do.
    Made,
    /// All that could be prepared is.
    Nothing,
    /// There is no room for it now.
    NoRoom,
}

/// Makes the first template that is missing, and removes those of heads that nobody forks any more.
///
/// # Errors
/// When heads or templates cannot be read, or the template cannot be made.
pub async fn prepare_next(host: &Host, recent: &Recent, events: &Events) -> Result<Done, Failure> {
    if !host.driver.capabilities().templates {
        return Ok(Done::Nothing);
    }
    for (scope, cpus, memory) in &recent.0 {
        let infrastructure = |error: &dyn std::error::Error| Failure::infrastructure(error);
        let forked = host.heads.to_fork(scope, &host.image.buildkit);
        let forked = forked.map_err(|error| infrastructure(&error))?;
        let Some(head) = forked.filter(|head| head.scope != SHARED) else {
            continue;
        };
        let memory = templates::size_class(*memory);
        if templates::has_head(host, &head, *cpus, memory, events).await? {
            continue;
        }
        let _pin = host
            .heads
            .pin(&head)
            .map_err(|error| infrastructure(&error))?;
        remove_superseded(host, &head)?;
        let need = Need::of(*cpus, memory);
        let room = host.ledger.acquire(need, WHO, Duration::ZERO, |_| {}).await;
        let _ticket = match room {
            Ok(ticket) => ticket,
            Err(LedgerError::Deadline { .. } | LedgerError::NeverFits { .. }) => {
                return Ok(Done::NoRoom);
            }
            Err(error) => return Err(infrastructure(&error)),
        };
        tracing::info!(
            scope,
            head = head.id,
            "idle: preparing the template of a head"
        );
        templates::prepare_head(host, &head, *cpus, memory, events).await?;
        return Ok(Done::Made);
    }
    Ok(Done::Nothing)
}

/// Templates stand on heads, and a head is followed by the next with each build: without this a busy tenant's would pile up.
fn remove_superseded(host: &Host, now: &Head) -> Result<(), Failure> {
    let infrastructure = |error: &dyn std::error::Error| Failure::infrastructure(error);
    // Listed first: a template that another process makes meanwhile is not among them.
    let listed = host.templates.list().map_err(|e| infrastructure(&e))?;
    let heads = host.heads.list().map_err(|e| infrastructure(&e))?;
    let superseded = |id: &String| {
        let known = heads.iter().find(|head| head.id == *id);
        known.is_some_and(|head| head.scope == now.scope && head.id != now.id)
    };
    let old = listed.into_iter().filter(|template| {
        let key = template.key.as_ref();
        key.is_some_and(|key| key.heads.iter().any(|(_, id)| superseded(id)))
    });
    let old: Vec<String> = old.map(|template| template.id).collect();
    let removed = host.templates.remove_unused(&old);
    removed.map(drop).map_err(|error| infrastructure(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_scopes_are_remembered_each_once() {
        let mut recent = Recent::default();
        assert!(recent.is_empty());
        let limits = |cpus| Limits {
            cpus,
            memory: ByteSize::gib(1),
            disk: ByteSize::gib(1),
            timeout_ms: 1,
        };
        for (name, cpus) in [("a", 1), ("b", 1), ("a", 2), ("c", 1), ("d", 1), ("e", 1)] {
            recent.built(name, &limits(cpus));
        }
        let kept: Vec<(&str, u32)> = recent
            .0
            .iter()
            .map(|(scope, cpus, _)| (scope.as_str(), *cpus))
            .collect();
        assert_eq!(kept, [("e", 1), ("d", 1), ("c", 1), ("a", 2)]);
    }
}
