//! Everything that is made once per host: machine image, runtime bases, shared cache head, templates. Each step skips what is there.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kiln_core::{ByteSize, Digest, FailureClass, ImageRef};
use kiln_image::bake::{
    BakeError, BakeEvent, BakedBases, BasesBake, BlobSink, Cancel, MachineImageBake,
    MachineImageManifest, MachineImages, RecipeFiles, Updates, bake_bases, bake_machine_image,
};
use kiln_image::bases::Bases;
use kiln_image::heads::{Head, SHARED};
use kiln_store::host::HostRegistry;
use kiln_store::registry::RepoName;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::home::Home;
use crate::host::Host;
use crate::registry::RegistryAccess;
use crate::{templates, warm};

/// The generated half of `bases.toml`.
#[must_use]
pub fn generated_bases(home: &Home) -> PathBuf {
    home.data.join("bases.json")
}

/// The operator's half.
#[must_use]
pub fn operator_bases(home: &Home) -> PathBuf {
    home.config.join("bases.toml")
}

/// The bases Dockerfiles may stand on.
///
/// # Errors
/// When one of the files is damaged.
pub fn load_bases(home: &Home) -> Result<Bases, Failure> {
    let (generated, operator) = (generated_bases(home), operator_bases(home));
    Bases::load(&generated, &operator).map_err(|error| {
        let failure = Failure {
            class: FailureClass::Usage,
            ..Failure::infrastructure(&error)
        };
        let path = error.path();
        failure.hint(if path == operator {
            "correct it; docs/guides/operate.md says what may stand there".to_owned()
        } else if path == generated {
            format!("`kiln bases bake` writes it again: remove {path:?} first")
        } else {
            format!("`kiln bases pull` writes it again: remove {path:?} first")
        })
    })
}

/// Bakes the machine image, or finds that it is there. Whether updated packages count is for `updates` to say.
///
/// # Errors
/// When a stage fails; the old image stays current.
pub async fn machine_image(
    home: &Home,
    recipe: &Path,
    guest: &Path,
    updates: Updates,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<MachineImageManifest, Failure> {
    let (images, cache) = (MachineImages::new(home.images()), home.cache.join("bake"));
    let (recipe, guest) = (recipe.to_owned(), guest.to_owned());
    blocking(events, cancel, move |progress, stop| {
        let files = recipe_files(&recipe)?;
        bake_machine_image(&MachineImageBake {
            files: &files,
            guest: &guest,
            cache: &cache,
            images: &images,
            used: &[],
            updates,
            progress,
            cancel: stop,
        })
    })
    .await
}

/// Bakes the runtime bases and puts them into the registry's `shared/` tree.
///
/// # Errors
/// When a stage fails; the old bases stay.
pub async fn bases(
    home: &Home,
    recipe: &Path,
    registry: &RegistryAccess,
    npm_registry: Option<String>,
    updates: Updates,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<Bases, Failure> {
    let (recipe, cache) = (recipe.to_owned(), home.cache.join("bake"));
    let mut sink = RegistrySink {
        registry: registry.host.clone(),
        runtime: Handle::current(),
    };
    let baked: BakedBases = blocking(events, cancel, move |progress, stop| {
        let files = recipe_files(&recipe)?;
        let npm_registry = npm_registry.as_deref();
        let baked = bake_bases(&BasesBake {
            files: &files,
            cache: &cache,
            npm_registry,
            updates,
            progress,
            cancel: stop,
        })?;
        baked.publish(&mut sink)?;
        Ok(baked)
    })
    .await?;
    let bases = baked.to_bases();
    bases
        .save_generated(&generated_bases(home))
        .map_err(|error| Failure::infrastructure(&error))?;
    Ok(bases)
}

fn recipe_files(recipe: &Path) -> Result<RecipeFiles, BakeError> {
    // An installed kiln has the recipe built in; a checkout's folder, or the operator's own, wins.
    if recipe.is_dir() {
        Ok(RecipeFiles::from_directory(recipe)?)
    } else {
        Ok(RecipeFiles::built_in())
    }
}

/// Runs a bake on a blocking thread; its lines become events, a cancelled token stops its programs.
async fn blocking<T: Send + 'static>(
    events: &Events,
    cancel: &CancellationToken,
    work: impl FnOnce(&(dyn kiln_image::bake::BakeProgress + '_), &Cancel) -> Result<T, BakeError>
    + Send
    + 'static,
) -> Result<T, Failure> {
    let stop = Cancel::new();
    let stopping = stop.clone();
    let told = events.clone();
    let task = tokio::task::spawn_blocking(move || {
        let progress = move |event: &BakeEvent<'_>| tell(&told, event);
        work(&progress, &stopping)
    });
    tokio::pin!(task);
    let done = tokio::select! {
        done = &mut task => done,
        () = cancel.cancelled() => {
            stop.cancel();
            task.await
        }
    };
    match done.map_err(|error| Failure::infrastructure(&error))? {
        Ok(value) => Ok(value),
        Err(error) if error.is_cancelled() => Err(Failure::cancelled()),
        Err(error) => Err(Failure::infrastructure(&error)),
    }
}

fn tell(events: &Events, event: &BakeEvent<'_>) {
    let event = match event {
        BakeEvent::Waiting => Event::Progress {
            what: "bake".to_owned(),
            detail: "another kiln process bakes; waiting".to_owned(),
        },
        BakeEvent::Started { stage } => Event::Progress {
            what: format!("bake {stage}"),
            detail: String::new(),
        },
        BakeEvent::Line { stage, line } => Event::Progress {
            what: format!("bake {stage}"),
            detail: line.chars().take(160).collect(),
        },
        BakeEvent::Finished { stage, took, bytes } => Event::Note {
            text: format!(
                "baked {stage} in {:.1}s ({})",
                took.as_secs_f64(),
                ByteSize(*bytes)
            ),
        },
        _ => return,
    };
    events.tell_now(event);
}

/// Puts baked bases into the registry, from a blocking thread.
struct RegistrySink {
    registry: HostRegistry,
    runtime: Handle,
}

fn repo(name: &str) -> io::Result<RepoName> {
    name.parse().map_err(io::Error::other)
}

impl BlobSink for RegistrySink {
    fn has_blob(&mut self, repository: &str, digest: &Digest) -> io::Result<bool> {
        let repository = repo(repository)?;
        self.runtime
            .block_on(self.registry.has_blob(&repository, digest))
            .map_err(io::Error::other)
    }

    fn put_blob(
        &mut self,
        repository: &str,
        digest: &Digest,
        bytes: u64,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        let repository = repo(repository)?;
        // The content is borrowed and the upload is not: the bytes pass through a bounded pipe.
        let (mut writer, reader) = tokio::io::duplex(256 * 1024);
        let (registry, digest) = (self.registry.clone(), *digest);
        let upload = self
            .runtime
            .spawn(async move { registry.put_blob(&repository, reader, Some(digest)).await });
        let mut buffer = vec![0; 256 * 1024];
        let mut content = content.take(bytes);
        loop {
            let got = content.read(&mut buffer)?;
            if got == 0 {
                break;
            }
            use tokio::io::AsyncWriteExt as _;
            if self
                .runtime
                .block_on(writer.write_all(&buffer[..got]))
                .is_err()
            {
                break;
            }
        }
        drop(writer);
        self.runtime
            .block_on(upload)
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        Ok(())
    }

    fn put_manifest(
        &mut self,
        repository: &str,
        tag: &str,
        media_type: &str,
        manifest: &[u8],
    ) -> io::Result<()> {
        let repository = repo(repository)?;
        let reference = tag.parse().map_err(io::Error::other)?;
        self.runtime
            .block_on(self.registry.put_manifest(
                &repository,
                &reference,
                media_type,
                manifest.to_vec(),
            ))
            .map(|_| ())
            .map_err(io::Error::other)
    }
}

/// References of all baked and pulled images, to be unpacked on the shared head.
#[must_use]
pub fn images_of(bases: &Bases) -> Vec<ImageRef> {
    bases.shared_images()
}

/// Makes the shared head when there is none for exactly these bases and this BuildKit.
///
/// # Errors
/// When it cannot be made.
pub async fn shared_head(
    host: &Host,
    registry: &RegistryAccess,
    bases: &Bases,
    events: &Events,
) -> Result<Head, Failure> {
    let images = images_of(bases);
    let want = warm::fingerprint(&images, &host.image.buildkit);
    let stamp = host.home.heads().join("shared.bases");
    let same = std::fs::read_to_string(&stamp).is_ok_and(|text| text == want.to_string());
    if same && let Ok(Some(head)) = host.heads.current(SHARED) {
        return Ok(head);
    }
    events
        .note("making the shared cache head: the bases are unpacked once, inside a machine")
        .await;
    let head = warm::make_shared_head(host, registry, &images, events).await?;
    std::fs::write(&stamp, want.to_string()).map_err(|error| Failure::infrastructure(&error))?;
    Ok(head)
}

/// Makes the templates that runs and builds of these sizes start from.
///
/// # Errors
/// When one cannot be made.
pub async fn templates(
    host: &Host,
    run: (u32, ByteSize),
    build: (u32, ByteSize),
    heads: &[Head],
    events: &Events,
) -> Result<(), Failure> {
    let sizes = [(false, run.0, run.1), (true, build.0, build.1)];
    templates::prepare_all(host, &sizes, heads, events).await
}
