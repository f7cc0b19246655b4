//! Which template a machine starts from, and how templates are prepared.
//!
//! Three kinds: *run* (guest ready), *plain build* (BuildKit has run once, and another waits for the head that is plugged in later),
//! and *build on a head* (that head mounted, BuildKit running on it). A template of a tenant's head serves that tenant alone.

use std::time::Duration;

use kiln_core::{ByteSize, DiskRole, FailureClass, MachineSpec};
use kiln_image::heads::Head;
use kiln_machine::bring_up::{self, BringUpError, Deadlines};
use kiln_machine::driver::{SpecRefused, Start, TemplateRef};
use kiln_machine::template::{
    Held, MakeError, Progress, Purpose as Kind, TemplateError, TemplateKey,
};
use kiln_proto::Session;
use kiln_proto::msg::{Mount, Order, Place};

use crate::attempt::{self, MOUNT_TIMEOUT, Wanted};
use crate::buildkit;
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::given::GivenBoot;
use crate::host::Host;
use crate::orders;

/// Sizes of machines. A template exists per size, so there are few.
pub const SIZE_CLASSES: [ByteSize; 6] = [
    ByteSize::mib(512),
    ByteSize::gib(1),
    ByteSize::gib(2),
    ByteSize::gib(4),
    ByteSize::gib(8),
    ByteSize::gib(16),
];
/// Longest preparation of a template, boot included.
pub const PREPARE_TIMEOUT: Duration = Duration::from_secs(180);
/// Templates in a row that are removed because they do not fit the host: one of an earlier place, and the one made then.
const STALE_MAX: u32 = 2;
/// Version of what the preparations below do: part of every key.
const PREPARATION: &str = "4";

/// What this build prepares templates as, on a machine image with this BuildKit. A template that was prepared as anything else is
/// used by nothing any more.
#[must_use]
pub fn preparations(buildkit: &str) -> [String; 3] {
    [
        format!("run {PREPARATION}"),
        format!("plain {PREPARATION} {buildkit}"),
        format!("head {PREPARATION} {buildkit}"),
    ]
}

/// What a machine is for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose<'a> {
    /// A command or a container image.
    Run,
    /// The same, on files that somebody gives: booted, and no template is made.
    Given(&'a GivenBoot),
    /// An image build on this head.
    Build {
        /// The head to fork.
        head: &'a Head,
    },
}

/// How a machine will start.
#[derive(Debug)]
pub struct Chosen {
    /// The template, or `None` for a cold boot.
    pub template: Option<Held>,
    /// Whether the template was taken with the head mounted and BuildKit running.
    pub holds_head: bool,
}

/// The smallest class that holds this much.
#[must_use]
pub fn size_class(memory: ByteSize) -> ByteSize {
    SIZE_CLASSES
        .into_iter()
        .find(|class| *class >= memory)
        .unwrap_or(memory)
}

/// The kinds of template.
#[derive(Clone, Copy, Debug)]
enum Variant<'a> {
    Run,
    PlainBuild,
    OnHead(&'a Head),
}

impl Variant<'_> {
    fn words(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::PlainBuild => "build",
            Self::OnHead(_) => "build on a cache head",
        }
    }

    async fn key(self, host: &Host, spec: &MachineSpec) -> TemplateKey {
        let [run, plain, on_head] = preparations(&host.image.buildkit);
        let (kind, preparation, heads) = match self {
            Self::Run => (Kind::Run, run, Vec::new()),
            Self::PlainBuild => (Kind::Build, plain, Vec::new()),
            Self::OnHead(head) => (
                Kind::Build,
                on_head,
                vec![(DiskRole::State, head.id.clone())],
            ),
        };
        TemplateKey::of(
            kind,
            &preparation,
            spec,
            host.driver.template_facts().await,
            heads,
        )
    }

    fn spec(self, host: &Host, cpus: u32, memory: ByteSize) -> Result<MachineSpec, Failure> {
        let mut disks = vec![attempt::root_disk(host)];
        if let Self::OnHead(head) = self {
            disks.push(attempt::state_disk(host, head));
        }
        let name = format!("template-{}-{}", std::process::id(), unique());
        let name = name
            .parse()
            .map_err(|error| Failure::infrastructure(&error))?;
        Ok(attempt::spec(host, name, cpus, memory, disks))
    }
}

/// Tells several templates made by one process apart.
fn unique() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Chooses how to start a machine; makes a missing plain template when the caller wants that.
///
/// # Errors
/// When a template could not be made.
pub async fn choose(
    host: &Host,
    wanted: &Wanted<'_>,
    memory: ByteSize,
    events: &Events,
) -> Result<Chosen, Failure> {
    let given = matches!(wanted.purpose, Purpose::Given(_));
    if given || !host.driver.capabilities().templates {
        return Ok(Chosen {
            template: None,
            holds_head: false,
        });
    }
    let plain = match wanted.purpose {
        Purpose::Run | Purpose::Given(_) => Variant::Run,
        Purpose::Build { head } => {
            let variant = Variant::OnHead(head);
            // The shared head's template serves everybody and is worth making on demand; a tenant's own is made ahead of time.
            let make = wanted.make_template && head.scope == kiln_image::heads::SHARED;
            if let Some(held) =
                find_or_make(host, variant, wanted.cpus, memory, make, events).await?
            {
                return Ok(Chosen {
                    template: Some(held),
                    holds_head: true,
                });
            }
            Variant::PlainBuild
        }
    };
    let template = find_or_make(
        host,
        plain,
        wanted.cpus,
        memory,
        wanted.make_template,
        events,
    )
    .await?;
    Ok(Chosen {
        template,
        holds_head: false,
    })
}

/// Makes the templates that runs and builds start from; a head's own when it is given.
///
/// # Errors
/// When one could not be made.
pub async fn prepare_all(
    host: &Host,
    sizes: &[(bool, u32, ByteSize)],
    heads: &[Head],
    events: &Events,
) -> Result<(), Failure> {
    for (build, cpus, memory) in sizes {
        let memory = size_class(*memory);
        if !build {
            find_or_make(host, Variant::Run, *cpus, memory, true, events).await?;
            continue;
        }
        find_or_make(host, Variant::PlainBuild, *cpus, memory, true, events).await?;
        for head in heads {
            find_or_make(host, Variant::OnHead(head), *cpus, memory, true, events).await?;
        }
    }
    Ok(())
}

/// Whether the template of this head is there, in this size.
///
/// # Errors
/// When it cannot be looked for.
pub async fn has_head(
    host: &Host,
    head: &Head,
    cpus: u32,
    memory: ByteSize,
    events: &Events,
) -> Result<bool, Failure> {
    let variant = Variant::OnHead(head);
    let found = find_or_make(host, variant, cpus, memory, false, events).await?;
    Ok(found.is_some())
}

/// Makes the template of this head, in this size, unless it is there.
///
/// # Errors
/// When it could not be made.
pub async fn prepare_head(
    host: &Host,
    head: &Head,
    cpus: u32,
    memory: ByteSize,
    events: &Events,
) -> Result<(), Failure> {
    let variant = Variant::OnHead(head);
    let made = find_or_make(host, variant, cpus, memory, true, events).await;
    made.map(drop)
}

/// A template that fits this host now. One whose files are whole but that its driver refuses (the home was moved or copied) is removed
/// and, where that is wanted, made again.
async fn find_or_make(
    host: &Host,
    variant: Variant<'_>,
    cpus: u32,
    memory: ByteSize,
    make: bool,
    events: &Events,
) -> Result<Option<Held>, Failure> {
    let spec = variant.spec(host, cpus, memory)?;
    let key = variant.key(host, &spec).await;
    let tell = teller(variant, cpus, memory, events);
    let store_failed = |error: &TemplateError| Failure::infrastructure(error);
    for _ in 0..STALE_MAX {
        let held = match make {
            true => Some(made(host, variant, &spec, &key, &tell).await?),
            false => host
                .templates
                .find(&key, &tell)
                .map_err(|error| store_failed(&error))?,
        };
        let Some(held) = held else {
            return Ok(None);
        };
        let start = Start::Template(held.template.clone());
        match host.driver.validate(&spec, &start) {
            Err(SpecRefused::Stale(why)) => {
                host.templates
                    .discard(&held)
                    .map_err(|error| store_failed(&error))?;
                tell(Progress::RemovedStale(why));
            }
            // Anything else is said by the launch, whatever it starts from.
            Ok(()) | Err(_) => return Ok(Some(held)),
        }
    }
    // A host whose files never look the same twice: machines are booted.
    Ok(None)
}

/// Removes a template that a launch refused, and says so: it is not tried again.
///
/// # Errors
/// When it cannot be removed.
pub async fn give_up(host: &Host, held: &Held, why: &str, events: &Events) -> Result<(), Failure> {
    let text = format!("a template could not be used and was removed: {why}");
    events.warn(text).await;
    let discarded = host.templates.discard(held);
    discarded.map_err(|error| Failure::infrastructure(&error))
}

fn teller(
    variant: Variant<'_>,
    cpus: u32,
    memory: ByteSize,
    events: &Events,
) -> impl Fn(Progress) + Send + Sync + use<> {
    let what = format!("template for {} ({cpus} CPUs, {memory})", variant.words());
    let events = events.clone();
    move |progress: Progress| {
        let detail = match progress {
            Progress::WaitingForMaker => "another kiln process makes it; waiting",
            Progress::RemovedDamaged(_) => "the old one was damaged and is made again",
            Progress::RemovedStale(_) => "the old one stood on other files and is made again",
            Progress::Making => "booting and preparing a machine",
            Progress::Sealing => "sealing",
        };
        events.tell_now(Event::Progress {
            what: what.clone(),
            detail: detail.to_owned(),
        });
    }
}

async fn made(
    host: &Host,
    variant: Variant<'_>,
    spec: &MachineSpec,
    key: &TemplateKey,
    tell: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Held, Failure> {
    let making = async |target: TemplateRef| {
        tokio::time::timeout(PREPARE_TIMEOUT, make_one(host, variant, spec, &target))
            .await
            .unwrap_or_else(|_| {
                Err(Failure::new(
                    FailureClass::Infrastructure,
                    format!("preparing took longer than {PREPARE_TIMEOUT:?}"),
                ))
            })
    };
    match host.templates.get_or_make(key, tell, making).await {
        Ok(held) => Ok(held),
        Err(MakeError::Make(failure)) => Err(Failure {
            message: format!(
                "the template for {} could not be made: {}",
                variant.words(),
                failure.message
            ),
            ..failure
        }),
        Err(error) => Err(Failure::infrastructure(&error)),
    }
}

async fn make_one(
    host: &Host,
    variant: Variant<'_>,
    spec: &MachineSpec,
    target: &TemplateRef,
) -> Result<(), Failure> {
    let prepare = async move |session: Session| match variant {
        Variant::Run => Ok(()),
        Variant::PlainBuild => run_buildkit_once(&session).await,
        Variant::OnHead(_) => start_on_head(&session).await,
    };
    bring_up::make_template(&*host.driver, spec, target, Deadlines::default(), prepare)
        .await
        .map_err(bring_up_failure)
}

/// BuildKit runs once on memory and stops, so that its pages are in the template's memory. Then another starts, as far as it goes
/// without a disk.
async fn run_buildkit_once(session: &Session) -> Result<(), Failure> {
    let serial = DiskRole::State.serial().to_owned();
    let memory = Mount {
        memory_bytes: 256 << 20,
        ..mount_state()
    };
    orders::call(
        session,
        "mount memory",
        &Order::Mount(memory),
        MOUNT_TIMEOUT,
    )
    .await?;
    buildkit::start(session).await?;
    tiny_build(session).await?;
    buildkit::stop(session).await?;
    orders::call_done(
        session,
        "unmount memory",
        &Order::Unmount { serial },
        MOUNT_TIMEOUT,
    )
    .await?;
    Ok(buildkit::start_before_disk(session).await?)
}

fn mount_state() -> Mount {
    Mount {
        serial: DiskRole::State.serial().to_owned(),
        read_only: false,
        format_blank: false,
        timeout_ms: u64::try_from(MOUNT_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
        memory_bytes: 0,
    }
}

/// The head is mounted and BuildKit runs on it, its client warm.
async fn start_on_head(session: &Session) -> Result<(), Failure> {
    orders::call(
        session,
        "mount the cache",
        &Order::Mount(mount_state()),
        MOUNT_TIMEOUT * 2,
    )
    .await?;
    buildkit::start(session).await?;
    tiny_build(session).await
}

/// A build without bases, so that client, frontend and solver have run.
async fn tiny_build(session: &Session) -> Result<(), Failure> {
    const NAME: &str = "warm";
    let text = "FROM scratch\nCOPY Dockerfile /warm\n".to_owned();
    let path = buildkit::send_dockerfile(session, NAME, text).await?;
    let request = buildkit::request(&path, &path);
    let (exit, solve) = buildkit::solve(session, &request, 120_000, async |_| {}).await?;
    if exit.code != Some(0) {
        let words = solve.other_lines.join("\n");
        return Err(Failure::new(
            FailureClass::Infrastructure,
            format!("BuildKit does not work in this machine: {words}"),
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

/// What a failed start means.
#[must_use]
pub fn bring_up_failure(error: BringUpError) -> Failure {
    let class = error.class();
    match error {
        BringUpError::Launch(error) => Failure::from(error),
        BringUpError::Prepare(error) => match error.downcast::<Failure>() {
            Ok(failure) => *failure,
            Err(error) => Failure::infrastructure(&*error),
        },
        error => Failure {
            class,
            ..Failure::infrastructure(&error)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_up_to_a_class() {
        assert_eq!(size_class(ByteSize::mib(1)), ByteSize::mib(512));
        assert_eq!(size_class(ByteSize::mib(1025)), ByteSize::gib(2));
        assert_eq!(size_class(ByteSize::gib(32)), ByteSize::gib(32));
    }
}
