//! `kiln setup`: everything that is made once per host and needs no root: machine image, registries, bases, shared head, templates.

use std::path::{Path, PathBuf};

use kiln_core::{ByteSize, FailureClass};
use kiln_image::bake::{MachineImages, Updates};
use kiln_network::registries::Runtime;
use kiln_worker::event::{Event, Events};
use kiln_worker::home::Home;
use kiln_worker::setup;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use crate::args::{SetupArgs, SetupPart};
use crate::error::{CliError, Result};
use crate::show::Screen;

/// Where `make guest` leaves the guest, below the folder that cargo builds into.
const GUEST_BUILT: &str = "guest/x86_64-unknown-linux-gnu/guest/kiln-guest";

pub(super) async fn run(args: SetupArgs, screen: Screen, cancel: CancellationToken) -> Result<u8> {
    if let Some(SetupPart::Host(host)) = &args.part {
        return super::setup_host::run(host, screen).await;
    }
    let (events, receiver) = Events::channel();
    let follow = tokio::spawn(screen.follow(receiver));
    let done = tokio::select! {
        done = all(&args, &events, &cancel) => done,
        () = stopped(&cancel) => Err(cancelled()),
    };
    drop(events);
    let _screen_ended = follow.await;
    match done {
        Ok(()) => Ok(0),
        Err(error) if error.class == FailureClass::Cancelled => Err(cancelled()),
        Err(error) => Err(error.hint("what is finished is kept: run it again to go on")),
    }
}

/// What a person who pressed Ctrl-C wants to know.
fn cancelled() -> CliError {
    CliError::new(
        FailureClass::Cancelled,
        "cancelled; what is finished is kept: run it again to go on",
    )
}

/// A bake ends its programs first; this is the last word when something does not.
async fn stopped(cancel: &CancellationToken) {
    cancel.cancelled().await;
    tokio::time::sleep(crate::interrupt::CANCEL_DEADLINE).await;
}

async fn all(args: &SetupArgs, events: &Events, cancel: &CancellationToken) -> Result<()> {
    let mut operator = Operator::load()?;
    machine_image(
        &operator,
        &args.recipe,
        args.guest.as_deref(),
        Updates::Leave,
        events,
        cancel,
    )
    .await?;
    let first = operator.registries.is_none();
    if first {
        events
            .tell(Event::Progress {
                what: "asking this host's package managers which registries they use".to_owned(),
                detail: String::new(),
            })
            .await;
        // What nobody on this host knows is asked of the bases below.
        super::registries::discover_and_write(&operator.home, None).await?;
        operator = Operator::load()?;
    }
    bases(&operator, &args.recipe, Updates::Leave, events, cancel).await?;
    shared_head_and_templates(&operator, events, cancel).await?;
    // A host without npm or pip knows its registries only by what the tools in the bases say.
    let operator = Operator::load()?;
    let known = operator
        .registries
        .as_ref()
        .is_some_and(|registries| registries.needing_base().is_empty());
    if first || !known {
        super::registries::ask_bases(&operator, events).await?;
    }
    Ok(())
}

/// Bakes the machine image with the guest that came with this program, or the one that is named. One of the same recipe and guest is kept unless
/// newer packages are wanted.
pub(super) async fn machine_image(
    operator: &Operator,
    recipe: &Path,
    guest: Option<&Path>,
    updates: Updates,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<()> {
    operator
        .home
        .prepare()
        .map_err(|error| CliError::infrastructure(&error))?;
    let guest = guest
        .map(Path::to_owned)
        .or_else(own_guest)
        .ok_or_else(|| {
            CliError::usage("the guest program is not known").hint(format!(
                "name it with --guest; in a checkout `make guest` builds it as target/{GUEST_BUILT}"
            ))
        })?;
    let image = setup::machine_image(&operator.home, recipe, &guest, updates, events, cancel)
        .await
        .map_err(CliError::from_failure)?;
    events
        .note(format!("machine image {} is ready", image.name))
        .await;
    Ok(())
}

/// Whether the machine image has another guest than the one that came with this program: what is new in this one fails in its machines.
pub(super) fn is_of_another_guest(home: &Home) -> bool {
    let current = MachineImages::new(home.images()).current();
    let own = own_guest().and_then(|path| std::fs::File::open(path).ok());
    match (current, own) {
        (Ok(image), Some(own)) => {
            kiln_core::Digest::of_reader(own).is_ok_and(|(digest, _)| digest != image.guest)
        }
        _ => false,
    }
}

fn own_guest() -> Option<PathBuf> {
    guest_of(&std::env::current_exe().ok()?)
}

/// The guest that came with a program: in a checkout the one of `make guest`, else the one beside it.
fn guest_of(exe: &Path) -> Option<PathBuf> {
    let dir = exe.parent()?;
    let built = dir
        .file_name()
        .is_some_and(|name| name == "release" || name == "debug");
    // Before the one beside it: what cargo leaves there is not static, and boots nowhere.
    let made = built.then(|| dir.with_file_name(GUEST_BUILT));
    let mut places = made.into_iter().chain([dir.join("kiln-guest")]);
    places.find(|place| place.is_file())
}

/// Bakes the bases and puts them into the registry.
pub(super) async fn bases(
    operator: &Operator,
    recipe: &Path,
    updates: Updates,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<()> {
    let registry = operator.registry().await?;
    let npm = operator
        .registries
        .as_ref()
        .and_then(|registries| registries.index(Runtime::Node))
        .map(str::to_owned);
    let bases = setup::bases(
        &operator.home,
        recipe,
        &registry,
        npm,
        updates,
        events,
        cancel,
    )
    .await
    .map_err(CliError::from_failure)?;
    for base in &bases.bases {
        events
            .note(format!("base {} {} is ready", base.name, base.version))
            .await;
    }
    Ok(())
}

/// The shared head and the templates of the default sizes.
pub(super) async fn shared_head_and_templates(
    operator: &Operator,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<()> {
    let work = async {
        let host = operator.host().await?;
        let registry = operator.registry().await?;
        let bases = operator.bases()?;
        let head = setup::shared_head(&host, &registry, &bases, events)
            .await
            .map_err(CliError::from_failure)?;
        let (run, build) = sizes(operator)?;
        setup::templates(&host, run, build, &[head], events)
            .await
            .map_err(CliError::from_failure)?;
        events.note("templates are ready").await;
        Ok(())
    };
    tokio::select! {
        done = work => done,
        () = cancel.cancelled() => Err(cancelled()),
    }
}

/// Default sizes of runs and builds: (CPUs, memory).
pub(super) fn sizes(operator: &Operator) -> Result<((u32, ByteSize), (u32, ByteSize))> {
    let none = crate::args::LimitArgs {
        cpus: None,
        memory: None,
        timeout: None,
    };
    let run = operator.config.limits(&none, false, super::host_cpus())?;
    let build = operator.config.limits(&none, true, super::host_cpus())?;
    Ok(((run.cpus, run.memory), (build.cpus, build.memory)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_of_a_checkout_and_of_an_installation_are_found() {
        let dir = tempfile::tempdir().expect("dir");
        let write = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("folder")).expect("folder");
            std::fs::write(&path, name).expect("written");
            path
        };
        let found = |exe: &str| guest_of(&dir.path().join(exe));
        assert_eq!(found("target/release/kiln"), None);
        let beside = write("target/debug/kiln-guest");
        assert_eq!(found("target/debug/kiln"), Some(beside));
        let built = write("target/guest/x86_64-unknown-linux-gnu/guest/kiln-guest");
        for exe in ["target/debug/kiln", "target/release/kiln"] {
            assert_eq!(found(exe).as_ref(), Some(&built), "{exe}");
        }
        assert_eq!(found("target/bin/kiln"), None, "no folder of cargo's");
        let installed = write("bin/kiln-guest");
        assert_eq!(found("bin/kiln"), Some(installed));
    }
}
