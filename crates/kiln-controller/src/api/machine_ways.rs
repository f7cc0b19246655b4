//! `GET /v1/machines/{id}/ways/{verb}`: a connection into a kept machine, for one command, copy or port.
//!
//! The person's connection and the one that the worker opens for it are joined, byte for byte, after the first message was read and judged: the role
//! decides on the verb, so nobody asks for another thing than that. While both are open, the person's proof, the machine's row and the time without
//! a byte are looked at again and again, and each of them ends both.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use http::StatusCode;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use kiln_core::{Action, JobId, Lease};
use kiln_db::{DbError, Kept};
use kiln_proto::codec;
use kiln_proto::fleet::MACHINE_UPGRADE;
use kiln_proto::kept::{Answer, Ask, MESSAGE_BYTES_MAX, Refused};
use kiln_proto::relay;
use tokio::time::Instant;

use super::Api;
use super::caller::Caller;
use super::limits::Slot;
use super::machines::no_way;
use super::problem::{Problem, ProblemBody};
use crate::fleet::machines::{Way, switching};

/// How long a person's question may take to arrive.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last of what a command said may take to arrive when its attempt is over.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// What a way is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verb {
    Exec,
    Tree,
    Forward,
    Show,
    Attend,
}

/// Where a way leads.
#[derive(Debug)]
pub(super) enum End {
    /// Into a machine that is kept.
    Kept(Box<Kept>),
    /// To a command that runs, under the lease of its attempt.
    Running(Lease),
}

/// How a way ends whose two ends are still open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Over {
    /// The attempt is over: its worker said everything before it said so, and closes the way.
    Said,
    /// At once, for this reason.
    Cut(&'static str),
}

impl End {
    fn job(&self) -> &JobId {
        match self {
            Self::Kept(kept) => &kept.attempt.job,
            Self::Running(lease) => &lease.attempt.job,
        }
    }

    /// Why it is there no more, if so.
    async fn over(&self, api: &Api) -> Result<Option<Over>, DbError> {
        Ok(match self {
            Self::Kept(kept) => {
                let row = api.db().kept(&kept.attempt.job).await?;
                let over = row.is_none_or(|row| row.epoch != kept.epoch);
                over.then_some(Over::Cut("the machine is not kept any more"))
            }
            Self::Running(lease) => {
                let job = api.db().job(&lease.attempt.job).await?;
                let live = job.and_then(|job| job.lease);
                let over = live.is_none_or(|live| live.epoch != lease.epoch);
                over.then_some(Over::Said)
            }
        })
    }
}

impl Verb {
    fn named(text: &str) -> Option<Self> {
        match text {
            "exec" => Some(Self::Exec),
            "tree" => Some(Self::Tree),
            "forward" => Some(Self::Forward),
            "show" => Some(Self::Show),
            _ => None,
        }
    }

    /// Whether this question is what the way is for.
    fn asks(self, ask: &Ask) -> bool {
        matches!(
            (self, ask),
            (Self::Exec, Ask::Exec(_))
                | (Self::Tree, Ask::Tree { .. })
                | (Self::Forward, Ask::Forward { .. })
                | (Self::Show, Ask::Show)
                | (Self::Attend, Ask::Attend { .. })
        )
    }
}

/// Opens a connection into a kept machine (HTTP/1.1 `Upgrade: kiln-machine`). What is said on it afterwards is the protocol of kiln's own commands.
#[utoipa::path(
    get, path = "/v1/machines/{id}/ways/{verb}", tag = "machines",
    params(
        ("id" = String, Path),
        ("verb" = String, Path, description = "`exec`: a command; `tree`: a file or folder of it; `forward`: a port of it; `show`: how it stands."),
        ("Upgrade" = String, Header, description = "`kiln-machine`"),
    ),
    responses(
        (status = 101, description = "The connection is a way into the machine from here on"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn open(
    State(api): State<Arc<Api>>,
    caller: Caller,
    path: Result<Path<(String, String)>, PathRejection>,
    upgrade: Option<Extension<OnUpgrade>>,
) -> Result<Response, Problem> {
    let Path((id, verb)) = path.map_err(|_| Problem::not_found("thing", "of this name"))?;
    let verb = Verb::named(&verb).ok_or_else(|| Problem::not_found("way", &verb))?;
    let kept = caller.machine(&api, &id, Action::MachineUse).await?;
    caller.trusted_as(&api, &kept).await?;
    let (upgrade, slot) = entry(&api, upgrade, &id)?;
    let way = api.backend().way_to(&kept).await.map_err(no_way)?;
    let joined = Joined::new((api, caller), End::Kept(Box::new(kept)), verb, slot);
    tokio::spawn(joined.run(upgrade, way));
    Ok(switching())
}

/// What whoever opens a way has to bring, and a place among the ways to that job's machine.
pub(super) fn entry(
    api: &Api,
    upgrade: Option<Extension<OnUpgrade>>,
    job: &str,
) -> Result<(OnUpgrade, Slot), Problem> {
    let Some(Extension(upgrade)) = upgrade else {
        return Err(Problem::new(
            StatusCode::UPGRADE_REQUIRED,
            "upgrade",
            format!("a way into a machine is an upgraded connection: `Upgrade: {MACHINE_UPGRADE}`"),
        ));
    };
    let Some(slot) = api.machine_ways.take(job) else {
        let most = api.config.kept.ways_max;
        return Err(Problem::too_many(
            "machine_ways",
            format!("{most} commands, copies and connections use this machine already"),
        ));
    };
    Ok((upgrade, slot))
}

/// A person's connection and a worker's, joined.
pub(super) struct Joined {
    api: Arc<Api>,
    caller: Caller,
    end: End,
    verb: Verb,
    began: Instant,
    /// When a byte went either way, milliseconds from `began`.
    moved_ms: AtomicU64,
    _slot: Slot,
}

impl Joined {
    pub(super) fn new((api, caller): (Arc<Api>, Caller), end: End, verb: Verb, slot: Slot) -> Self {
        Self {
            api,
            caller,
            end,
            verb,
            began: Instant::now(),
            moved_ms: AtomicU64::new(0),
            _slot: slot,
        }
    }

    /// Until either is over, or may not be open any more.
    pub(super) async fn run(self, upgrade: OnUpgrade, mut way: Way) {
        let Ok(Ok(person)) = tokio::time::timeout(ASK_TIMEOUT, upgrade).await else {
            return;
        };
        let mut person = TokioIo::new(person);
        let asked = codec::read_msg::<Ask, _>(&mut person, MESSAGE_BYTES_MAX);
        let Ok(Ok(ask)) = tokio::time::timeout(ASK_TIMEOUT, asked).await else {
            return;
        };
        if !self.verb.asks(&ask) {
            let refused = Refused::usage("this way into the machine is for something else");
            let answer: Answer = Err(refused);
            let said = codec::write_msg(&mut person, &answer);
            let _person_gone = tokio::time::timeout(ASK_TIMEOUT, said).await;
            return;
        }
        let told = codec::write_msg(&mut way, &ask);
        let Ok(Ok(())) = tokio::time::timeout(ASK_TIMEOUT, told).await else {
            return;
        };
        let pass = self.pass(person, way);
        tokio::pin!(pass);
        let why = tokio::select! {
            () = &mut pass => return,
            why = self.over() => why,
        };
        match why {
            // What is still between us arrives.
            Over::Said => {
                let _cut_off = tokio::time::timeout(LAST_WORDS, pass).await;
            }
            Over::Cut(why) => {
                tracing::info!(machine = %self.end.job(), who = self.caller.actor(), why, "a way into a machine is closed");
            }
        }
    }

    /// Until both have said everything, or one broke.
    async fn pass(&self, mut person: TokioIo<Upgraded>, mut way: Way) {
        let moved = || {
            let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.moved_ms.store(now, Ordering::Relaxed);
        };
        // A broken connection is its two ends' to see.
        let _ended = relay::join(&mut person, &mut way, moved).await;
    }

    /// Completes when the way must end, with the reason.
    async fn over(&self) -> Over {
        let closing = self.api.backend().closing();
        tokio::pin!(closing);
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.api.config.heartbeat) => {}
                () = &mut closing => return Over::Cut("this controller stops"),
            }
            let moved = Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
            if self.began.elapsed().saturating_sub(moved) > self.api.config.kept.idle {
                return Over::Cut("nothing was said for too long");
            }
            let _turn = self.api.look().await;
            if !self.caller.is_still_good(&self.api).await {
                return Over::Cut("the token is not good any more");
            }
            // A database that does not answer for a moment ends nothing: the machine's worker ends it when that lasts.
            if let Ok(Some(why)) = self.end.over(&self.api).await {
                return why;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kiln_proto::kept::ExecAsk;

    use super::*;

    #[test]
    fn a_way_is_for_what_its_name_says() {
        let exec = Ask::Exec(ExecAsk::default());
        assert!(Verb::named("exec").is_some_and(|verb| verb.asks(&exec)));
        for verb in ["tree", "forward", "show"] {
            let verb = Verb::named(verb).expect("known");
            assert!(!verb.asks(&exec) && !verb.asks(&Ask::Remove), "{verb:?}");
        }
        for verb in [
            "stop", "remove", "incident", "console", "stats", "attend", "", "Exec",
        ] {
            assert_eq!(Verb::named(verb), None, "{verb}");
        }
    }
}
