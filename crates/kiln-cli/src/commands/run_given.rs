//! Files of this host of which the machine of a run is made: `--kernel` and `--root-disk`.

use std::path::Path;

use kiln_core::{ByteSize, FailureClass};
use kiln_worker::given::Given;
use kiln_worker::home::Home;
use tokio_util::sync::CancellationToken;

use super::run_policy::Ruled;
use crate::args::RunArgs;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

/// Folder below the cache that remembers digests of disks.
const NOTES: &str = "given";
/// From this size on it takes a moment to read a file, and that is said.
const LARGE: ByteSize = ByteSize::gib(1);

/// Opens the files that were named and looks at them. Nothing has started yet.
///
/// # Errors
/// Usage, for a file that no machine can be made of, and beside a policy that needs another root.
pub(super) async fn open(
    args: &RunArgs,
    (ruled, home): (&Ruled, &Home),
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<Given> {
    let (kernel, root_disk) = (args.kernel.clone(), args.root_disk.clone());
    if root_disk.is_some() {
        alone(ruled)?;
    }
    if let Some(path) = &root_disk {
        tell_large(path, screen);
    }
    let notes = home.cache.join(NOTES);
    let opening = tokio::task::spawn_blocking(move || {
        Given::open(kernel.as_deref(), root_disk.as_deref(), &notes)
    });
    tokio::select! {
        opened = opening => opened.or_infrastructure()?.map_err(CliError::from_failure),
        () = cancel.cancelled() => Err(CliError::new(FailureClass::Cancelled, "cancelled")),
    }
}

fn tell_large(path: &Path, screen: Screen) {
    let size = std::fs::metadata(path).map_or(0, |meta| meta.len());
    if size >= LARGE.0 {
        screen.note(&format!(
            "looking at {} ({}): its digest takes a moment when it is new or has changed",
            path.shown(),
            ByteSize(size)
        ));
    }
}

/// Images run under runc, which is on kiln's own root.
fn alone(ruled: &Ruled) -> Result<()> {
    let applied = ruled.applied.as_ref();
    let file = applied.and_then(|applied| applied.name.as_deref());
    let file = file.unwrap_or("the policy");
    let needs = match (&ruled.image, ruled.services.is_empty()) {
        (Some(image), _) => format!("{file} runs the command in the image {image}"),
        (None, false) => format!("{file} runs services beside the command"),
        (None, true) => return Ok(()),
    };
    Err(CliError::usage(format!(
        "--root-disk: {needs}, and images need kiln's own root disk"
    ))
    .hint("--no-policy leaves the policy out: the command line alone decides then"))
}
