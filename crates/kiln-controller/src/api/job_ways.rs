//! `GET /v1/jobs/{id}/ways/{verb}`: a connection to a command while it runs, for whoever submitted its job to be attended.
//!
//! It is a way as those into kept machines are ([`super::machine_ways`]), with two differences. What authorises it is the live lease of the running
//! attempt; and from the first one that attends on, no other attempt follows, because what the command is given is given once. The worker lets one
//! attend, and connects to the ports that the job names.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use http::StatusCode;
use hyper::upgrade::OnUpgrade;
use kiln_core::{Action, JobState, Lease};
use kiln_db::{DoorError, Job};

use super::Api;
use super::caller::Caller;
use super::machine_ways::{End, Joined, Verb, entry};
use super::problem::{Problem, ProblemBody};
use crate::fleet::machines::{NoWay, switching};

/// Opens a connection to a command that is attended (HTTP/1.1 `Upgrade: kiln-machine`). What is said on it afterwards is the protocol of kiln's own
/// commands.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/ways/{verb}", tag = "jobs",
    params(
        ("id" = String, Path),
        ("verb" = String, Path, description = "`attend`: its streams, for one; the command begins then, and ends with the connection. `forward`: a port that the job names."),
        ("Upgrade" = String, Header, description = "`kiln-machine`"),
    ),
    responses(
        (status = 101, description = "The connection is a way to the command from here on"),
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
    let verb = match verb.as_str() {
        "attend" => Verb::Attend,
        "forward" => Verb::Forward,
        other => return Err(Problem::not_found("way", other)),
    };
    let job = caller.job(&api, &id, Action::MachineUse).await?;
    let lease = running(&caller, &job)?;
    let (upgrade, slot) = entry(&api, upgrade, &id)?;
    let way = api.backend().way_to_attempt(lease).await.map_err(no_way)?;
    // Only now: one whose worker is not reached was given nothing, and its job is tried again as any. Nothing goes over the way before.
    if verb == Verb::Attend {
        begins(&api, lease).await?;
    }
    let end = End::Running(lease.clone());
    let joined = Joined::new((api, caller), end, verb, slot);
    tokio::spawn(joined.run(upgrade, way));
    Ok(switching())
}

/// The lease of the attempt that runs, for whoever may attend it.
fn running<'a>(caller: &Caller, job: &'a Job) -> Result<&'a Lease, Problem> {
    if job.request.attend().is_none() {
        return Err(
            Problem::conflict("not_attended", "nobody attends the command of this job")
                .hint("ask for that when it is submitted: `attend`"),
        );
    }
    if job.submitted_by != caller.subject() {
        return Err(
            Problem::forbidden("only who submitted a job holds its command's streams")
                .hint("`kiln job logs` shows what it prints"),
        );
    }
    match (&job.state, &job.lease) {
        (JobState::Running { .. }, Some(lease)) => Ok(lease),
        (JobState::Finished { .. }, _) => {
            Err(Problem::conflict("finished", "the job is over already"))
        }
        _ => Err(not_ready()),
    }
}

fn not_ready() -> Problem {
    Problem::conflict("not_ready", "the job's machine is not ready yet")
        .hint("wait for the event `phase` with the phase `attend`")
}

/// From here on this attempt is the last one.
async fn begins(api: &Api, lease: &Lease) -> Result<(), Problem> {
    match api.db().attend(lease).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(not_ready()),
        Err(DoorError::Database(error)) => Err(error.into()),
        Err(refused) => Err(Problem::conflict("lease", refused.to_string())),
    }
}

/// Why a command is not reached.
fn no_way(why: NoWay) -> Problem {
    let why = match why {
        NoWay::Silent => "the worker that runs this command does not answer",
        NoWay::TooMany => "too many wait to reach commands of this worker",
        NoWay::Away => "the controller that leads to this command is away",
    };
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "job_unreachable", why).retry_after(1)
}
