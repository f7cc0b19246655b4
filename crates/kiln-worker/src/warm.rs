//! The shared cache head: a BuildKit state disk on which the runtime bases lie unpacked, made once per set of bases in a machine.
//!
//! A base is never pulled by a build: unpacking one in a machine without KVM costs a minute, forking this disk a hundredth of a second.

use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::{ByteSize, DiskRole, DiskSlot, FailureClass, ImageRef};
use kiln_image::heads::{Candidate, Head};
use kiln_network::gateway::{Gateway, GatewayConfig};
use kiln_network::record::EgressLog;
use kiln_proto::Session;
use kiln_proto::msg::{Order, Place};
use kiln_store::registry::Authority;

use crate::attempt::{Attempt, Wanted};
use crate::buildkit;
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::host::{Host, new_job_id, now_unix_ms};
use crate::orders;
use crate::registry::RegistryAccess;
use crate::templates::Purpose;

/// Virtual size of a state disk; only what is written takes space.
pub const STATE_DISK_SIZE: ByteSize = ByteSize::gib(50);
/// Memory of the machine that unpacks.
const MEMORY: ByteSize = ByteSize::gib(2);
/// Longest time to unpack one base.
const BASE_TIMEOUT_MS: u64 = 600_000;

/// Repositories of images that were pulled from other registries.
pub const PULLED_TREE: &str = "shared/from/";

/// Makes the shared head from these bases.
///
/// # Errors
/// When a base cannot be pulled or unpacked; the old head stays.
pub async fn make_shared_head(
    host: &Host,
    registry: &RegistryAccess,
    bases: &[ImageRef],
    events: &Events,
) -> Result<Head, Failure> {
    let job = new_job_id('w')?;
    let ticket = host.admit(2, MEMORY, job.as_str(), events).await?;
    let mut config = GatewayConfig::new(
        kiln_core::NetworkPolicy::Isolated,
        std::sync::Arc::new(EgressLog::new()) as _,
    );
    config.services = registry.services_as(Authority::Anonymous {
        pull: vec!["shared".to_owned()],
    });
    let name = format!("{job}-1-warm")
        .parse()
        .map_err(|error| Failure::infrastructure(&error))?;
    let wanted = Wanted {
        name,
        cpus: 2,
        memory: MEMORY,
        purpose: Purpose::Run,
        make_template: true,
        may_stay: false,
        disk_bytes_per_second: None,
    };
    let attempt = Attempt::start(host, wanted, ticket, Gateway::new(config), events).await?;
    let done = fill(host, &attempt, bases, events).await;
    let done = match done {
        Ok(head) => Ok(head),
        Err(failure) => Err(attempt.explain(failure).await),
    };
    attempt.destroy(events).await;
    done
}

async fn fill(
    host: &Host,
    attempt: &Attempt,
    bases: &[ImageRef],
    events: &Events,
) -> Result<Head, Failure> {
    let disk = DiskSlot {
        role: DiskRole::State,
        backing: None,
        format: DiskFormat::Qcow2,
        access: DiskAccess::New {
            size: STATE_DISK_SIZE,
        },
    };
    attempt.machine.attach_disk(&disk).await?;
    attempt.mount(DiskRole::State, false, true).await?;
    buildkit::start(&attempt.session).await?;
    for (index, base) in bases.iter().enumerate() {
        let what = format!("unpacking base {} of {}", index + 1, bases.len());
        events
            .tell(Event::Progress {
                what,
                detail: base.repository.clone(),
            })
            .await;
        unpack(&attempt.session, base).await?;
    }
    crate::commit::seal(attempt).await?;
    let file = attempt.machine.take_disk(DiskRole::State)?;
    let (heads, buildkit) = (host.heads.clone(), host.image.buildkit.clone());
    tokio::task::spawn_blocking(move || {
        let candidate = Candidate {
            file: &file,
            stands_on: None,
            written_by: "bake".to_owned(),
            buildkit,
            now_unix_ms: now_unix_ms(),
        };
        heads.seal_shared(&candidate)
    })
    .await
    .map_err(|error| Failure::infrastructure(&error))?
    .map_err(|error| Failure::infrastructure(&error))
}

/// A build of one step on the base, whose result nobody wants: BuildKit pulls and unpacks it for that. The step runs no
/// program, because an image of another registry may have none.
async fn unpack(session: &Session, base: &ImageRef) -> Result<(), Failure> {
    const NAME: &str = "warm";
    let step = match base.repository.starts_with(PULLED_TREE) {
        true => "WORKDIR /.kiln",
        false => "RUN [\"/bin/sh\", \"-c\", \":\"]",
    };
    let text = format!("FROM {base}\n{step}\n");
    let path = buildkit::send_dockerfile(session, NAME, text).await?;
    let request = buildkit::request(&path, &path);
    let (exit, solve) = buildkit::solve(session, &request, BASE_TIMEOUT_MS, async |_| {}).await?;
    if exit.code != Some(0) {
        let words = solve.failed().map_or_else(
            || solve.other_lines.join("\n"),
            |(_, step)| step.error.clone(),
        );
        return Err(Failure::new(
            FailureClass::Infrastructure,
            format!("base {base} could not be unpacked: {words}"),
        ));
    }
    let order = Order::RemoveTree {
        place: Place::Dockerfile {
            name: NAME.to_owned(),
        },
    };
    orders::call_done(session, "tidy up", &order, orders::ORDER_TIMEOUT).await?;
    Ok(())
}

/// Fingerprint of a set of bases: the shared head is made again when it changes.
#[must_use]
pub fn fingerprint(bases: &[ImageRef], buildkit: &str) -> kiln_core::Digest {
    let mut names: Vec<String> = bases.iter().map(ToString::to_string).collect();
    names.sort();
    kiln_core::Digest::of(format!("{buildkit}\n{}", names.join("\n")).as_bytes())
}
