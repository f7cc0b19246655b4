//! `/v1/machines`: machines that workers keep when their jobs are over. Here are lists, what one uses, and its end; commands and copies go through
//! [`super::machine_ways`].

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use http::StatusCode;
use kiln_core::{Action, TenantName};
use kiln_db::Kept;
use kiln_proto::codec;
use kiln_proto::kept::{Answer as Told, Ask, Handover, MESSAGE_BYTES_MAX, Reply};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::parsed;
use super::caller::Caller;
use super::extract::{Answer, Asked, Body, Named};
use super::problem::{Problem, ProblemBody};
use super::view::List;
use crate::fleet::machines::{NoWay, Way};

/// Longest wait for what a keeper answers at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the end of a machine; it goes on ending after that.
const END_TIMEOUT: Duration = Duration::from_secs(12);
/// Most characters of somebody's words about an incident.
const NOTE_CHARS_MAX: usize = 1_000;

/// A machine that a worker keeps.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MachineView {
    /// The job that it was made for: the machine is called so.
    pub id: String,
    /// The attempt of that job.
    pub attempt: u32,
    /// Whose it is.
    pub tenant: String,
    /// Who asked for the job.
    pub owner: String,
    /// The worker that keeps it.
    pub worker: String,
    /// The image that ran in it, if one did.
    pub image: Option<String>,
    /// The command that ran in it.
    pub command: Vec<String>,
    /// How that ended, for a person.
    pub ended: String,
    /// Its exit code, as a shell has it.
    pub exit_code: Option<i32>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory: u64,
    /// Since when it is kept, milliseconds since the Unix epoch.
    pub since_unix_ms: u64,
    /// Until when, milliseconds since the Unix epoch.
    pub until_unix_ms: u64,
    /// Milliseconds that are left, by the server's clock.
    pub left_ms: u64,
    /// Commands, copies and connections in it now; only of one that is shown alone, and while its worker answers.
    pub busy: Option<u64>,
    /// What it reached and was refused since its command ended, in one line; as `busy`.
    pub egress: Option<String>,
}

impl MachineView {
    fn of(kept: &Kept, now_ms: u64) -> Self {
        // Told by a worker when the machine was kept; what cannot be read is left out.
        let told: Option<Handover> = serde_json::from_value(kept.facts.clone()).ok();
        let told = told.as_ref();
        Self {
            id: kept.attempt.job.to_string(),
            attempt: kept.attempt.number,
            tenant: kept.tenant.to_string(),
            owner: kept.owner.clone(),
            worker: kept.worker.to_string(),
            image: told.and_then(|told| Some(told.image.as_ref()?.to_string())),
            command: told.map_or_else(Vec::new, |told| told.command.clone()),
            ended: told.map_or_else(String::new, |told| told.ended.clone()),
            exit_code: told.and_then(|told| told.exit_code),
            cpus: kept.need.cpus,
            memory: kept.need.memory.0,
            since_unix_ms: kept.since_unix_ms,
            until_unix_ms: kept.until_unix_ms,
            left_ms: kept.until_unix_ms.saturating_sub(now_ms),
            busy: None,
            egress: None,
        }
    }
}

/// What a kept machine uses.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StatsView {
    /// Resident bytes of its VMM.
    pub rss: u64,
    /// Proportional bytes of its VMM.
    pub pss: u64,
    /// CPU time of its VMM, milliseconds.
    pub cpu_ms: u64,
    /// What its guest says: a claim.
    pub guest: Option<GuestView>,
}

/// What a guest says that it uses.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GuestView {
    /// Bytes of memory in use.
    pub memory_bytes: u64,
    /// The most it was.
    pub memory_peak: u64,
    /// CPU time, milliseconds.
    pub cpu_ms: u64,
    /// Processes that were killed for memory.
    pub oom_kills: u64,
}

/// What came of a machine's end.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct EndedView {
    /// The machine.
    pub id: String,
    /// `gone`; or `ending`: its worker was not reached, and destroys it with its next heartbeat, or already has.
    pub result: String,
    /// What could not be removed of it, on its worker.
    pub leaks: Vec<String>,
    /// Where its worker keeps what tells of an incident.
    pub incident: Option<String>,
}

/// The end of a machine's console.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ConsoleView {
    /// Hostile text.
    pub console: String,
}

/// Whose machines.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct MachinesAsked {
    /// The token's own unless it is an operator's.
    tenant: Option<String>,
}

/// Lists kept machines, oldest job first; at most 1,000.
#[utoipa::path(
    get, path = "/v1/machines", tag = "machines", params(MachinesAsked),
    responses(
        (status = 200, description = "All of them", body = List<MachineView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Asked(asked): Asked<MachinesAsked>,
) -> Result<Answer<List<MachineView>>, Problem> {
    let named = asked.tenant.as_deref();
    let named: Option<TenantName> = named.map(|name| parsed("tenant", name)).transpose()?;
    let tenant = caller
        .acting_for(&api, named.as_ref(), Action::MachineRead, "machines")
        .await?;
    let now = api.db().now().await?;
    let kept = api.db().kept_machines(Some(&tenant)).await?;
    let items = kept.iter().map(|kept| MachineView::of(kept, now));
    let list = List {
        items: items.collect(),
        next: None,
    };
    Ok(Answer(StatusCode::OK, list))
}

/// Shows a kept machine.
#[utoipa::path(
    get, path = "/v1/machines/{id}", tag = "machines", params(("id" = String, Path)),
    responses(
        (status = 200, description = "It", body = MachineView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<Answer<MachineView>, Problem> {
    let kept = caller.machine(&api, &id, Action::MachineRead).await?;
    let mut view = MachineView::of(&kept, api.db().now().await?);
    // What is known here is shown also while its worker is silent.
    if let Ok(Reply::Shown(status)) = ask(&api, &kept, &Ask::Show, ANSWER_TIMEOUT).await {
        view.busy = Some(status.busy as u64);
        view.egress = Some(status.egress);
    }
    Ok(Answer(StatusCode::OK, view))
}

/// Shows what a kept machine uses.
#[utoipa::path(
    get, path = "/v1/machines/{id}/stats", tag = "machines", params(("id" = String, Path)),
    responses(
        (status = 200, description = "Memory and time", body = StatsView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn stats(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<Answer<StatsView>, Problem> {
    let kept = caller.machine(&api, &id, Action::MachineRead).await?;
    let Reply::Used(used) = ask(&api, &kept, &Ask::Stats, ANSWER_TIMEOUT).await? else {
        return Err(surprised());
    };
    let guest = used.guest.map(|guest| GuestView {
        memory_bytes: guest.memory_bytes,
        memory_peak: guest.memory_peak,
        cpu_ms: guest.cpu_ms,
        oom_kills: guest.oom_kills,
    });
    let view = StatsView {
        rss: used.rss,
        pss: used.pss,
        cpu_ms: used.cpu_ms,
        guest,
    };
    Ok(Answer(StatusCode::OK, view))
}

/// Shows the end of a kept machine's console: text of whatever ran in it.
#[utoipa::path(
    get, path = "/v1/machines/{id}/console", tag = "machines", params(("id" = String, Path)),
    responses(
        (status = 200, description = "Its last lines", body = ConsoleView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn console(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
) -> Result<Answer<ConsoleView>, Problem> {
    let kept = caller.machine(&api, &id, Action::LogRead).await?;
    let Reply::Text { text } = ask(&api, &kept, &Ask::Console, ANSWER_TIMEOUT).await? else {
        return Err(surprised());
    };
    Ok(Answer(StatusCode::OK, ConsoleView { console: text }))
}

/// How a machine ends.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct RemoveAsked {
    /// Let its guest power off first.
    stop: bool,
}

/// Ends a kept machine: at once, or after its guest has powered off.
#[utoipa::path(
    delete, path = "/v1/machines/{id}", tag = "machines", params(("id" = String, Path), RemoveAsked),
    responses(
        (status = 200, description = "It is gone", body = EndedView),
        (status = 202, description = "Its worker ends it", body = EndedView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn remove(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Asked(asked): Asked<RemoveAsked>,
) -> Result<Answer<EndedView>, Problem> {
    let kept = caller.machine(&api, &id, Action::MachineRemove).await?;
    let how = match asked.stop {
        true => Ask::Stop,
        false => Ask::Remove,
    };
    let ended = ask(&api, &kept, &how, END_TIMEOUT).await;
    let told = matches!(&ended, Err(problem) if problem.code == "machine_ending");
    if !(asked.stop && told) {
        // A worker that was not reached is told so by the answer to its next heartbeat.
        let (worker, attempt) = (&kept.worker, &kept.attempt);
        let _known = api.db().forget_kept(worker, attempt, kept.epoch).await?;
    }
    let (status, view) = match ended {
        Ok(reply) => (StatusCode::OK, gone(id, reply)?),
        Err(_) => (
            StatusCode::ACCEPTED,
            EndedView {
                id,
                result: "ending".to_owned(),
                leaks: Vec::new(),
                incident: None,
            },
        ),
    };
    Ok(Answer(status, view))
}

/// Somebody's words about an incident.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct IncidentAsk {
    /// Why, in a few words.
    note: String,
}

/// Ends a kept machine at once because of what it did. Its worker keeps what tells of it; everything that the machine could act with ends.
#[utoipa::path(
    post, path = "/v1/machines/{id}/incident", tag = "machines", params(("id" = String, Path)), request_body = IncidentAsk,
    responses(
        (status = 200, description = "It is gone", body = EndedView),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Its worker was not reached: nothing was changed", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn incident(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(id): Named,
    Body(asked): Body<IncidentAsk>,
) -> Result<Answer<EndedView>, Problem> {
    let kept = caller.machine(&api, &id, Action::MachineRemove).await?;
    let note = asked.note.chars().take(NOTE_CHARS_MAX).collect();
    let reply = ask(&api, &kept, &Ask::Incident { note }, END_TIMEOUT).await?;
    let view = gone(id, reply)?;
    let (worker, attempt) = (&kept.worker, &kept.attempt);
    let _known = api.db().forget_kept(worker, attempt, kept.epoch).await?;
    Ok(Answer(StatusCode::OK, view))
}

fn gone(id: String, reply: Reply) -> Result<EndedView, Problem> {
    let Reply::Gone { leaks, incident } = reply else {
        return Err(surprised());
    };
    Ok(EndedView {
        id,
        result: "gone".to_owned(),
        leaks,
        incident: incident.map(|path| path.to_string_lossy().into_owned()),
    })
}

fn surprised() -> Problem {
    Problem::new(
        StatusCode::BAD_GATEWAY,
        "machine",
        "the worker gives another answer than was asked for",
    )
    .hint("it may be of another version of kiln")
}

/// Why a machine is not reached.
pub(super) fn no_way(why: NoWay) -> Problem {
    Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "machine_unreachable",
        why.to_string(),
    )
    .hint("`kiln machine show` says which worker keeps it, `kiln worker list` how that is")
    .retry_after(5)
}

/// Asks for something that is answered at once.
async fn ask(api: &Api, kept: &Kept, what: &Ask, most: Duration) -> Result<Reply, Problem> {
    let mut way: Way = api.backend().way_to(kept).await.map_err(no_way)?;
    let asked = async {
        codec::write_msg(&mut way, what).await?;
        codec::read_msg::<Told, _>(&mut way, MESSAGE_BYTES_MAX).await
    };
    match tokio::time::timeout(most, asked).await {
        Ok(Ok(Ok(reply))) => Ok(reply),
        Ok(Ok(Err(refused))) if refused.usage => Err(Problem::bad_request(refused.message)),
        Ok(Ok(Err(refused))) => Err(Problem::new(
            StatusCode::BAD_GATEWAY,
            "machine",
            refused.message,
        )),
        Ok(Err(_)) => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "machine_unreachable",
            "the machine ended while it was asked",
        )),
        Err(_) => Err(Problem::new(
            StatusCode::GATEWAY_TIMEOUT,
            "machine_ending",
            "the machine's worker has not answered yet",
        )),
    }
}
