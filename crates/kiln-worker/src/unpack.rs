//! Container images as disks: unpacked inside a machine, once per manifest digest, onto a sealed disk that runs attach read-only.
//!
//! The host never parses a layer's tar: it streams the (decompressed, bounded) bytes into a machine that does, and never mounts what came out.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::{ByteSize, Digest, DiskRole, DiskSlot, FailureClass, JobId};
use kiln_image::sealed;
use kiln_network::gateway::{Gateway, GatewayConfig};
use kiln_network::record::EgressLog;
use kiln_proto::msg::{Order, Place, PutTree};
use kiln_store::image::VerifiedImage;
use kiln_store::registry::RepoName;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::attempt::{Attempt, STOP_TIMEOUT, Wanted};
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::host::Host;
use crate::orders;
use crate::registry::RegistryAccess;
use crate::templates::Purpose;

/// Most bytes of one image's unpacked layers together.
pub const UNPACKED_BYTES_MAX: u64 = 20 << 30;
/// Most entries of one layer.
pub const LAYER_ENTRIES_MAX: u64 = 1_000_000;
/// Virtual size of an image disk; only what is written takes space.
const DISK_SIZE: ByteSize = ByteSize::gib(24);
/// Name of the note of what was seen of a disk.
const NOTE: &str = "seen.json";
/// Version of `meta.json` beside a disk.
const SCHEMA: u32 = 1;

/// An image that is ready to be attached.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The sealed disk.
    pub disk: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Meta {
    schema: u32,
    manifest: Digest,
    disk: Digest,
    bytes: u64,
}

/// Gives the disk of an image; makes it first when it is missing.
///
/// # Errors
/// When a layer cannot be read or unpacked.
pub async fn ensure(
    host: &Host,
    registry: &RegistryAccess,
    repo: &RepoName,
    image: &VerifiedImage,
    job: &JobId,
    events: &Events,
) -> Result<Unpacked, Failure> {
    let dir = host.home.unpacked().join(image.manifest.hex());
    let io = |error: std::io::Error| Failure::infrastructure(&error);
    fs::create_dir_all(host.home.unpacked()).map_err(io)?;
    let lock_path = host
        .home
        .unpacked()
        .join(format!("{}.lock", image.manifest.short(32)));
    let _lock = tokio::task::spawn_blocking(move || -> std::io::Result<File> {
        let file = File::create(lock_path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    })
    .await
    .map_err(|error| Failure::infrastructure(&error))?
    .map_err(io)?;
    let (looked, manifest) = (dir.clone(), image.manifest);
    let sound = tokio::task::spawn_blocking(move || sound(&looked, manifest)).await;
    if let Some(disk) = sound.map_err(|error| Failure::infrastructure(&error))? {
        // The time of the last use, for pruning; a store that cannot be written still serves.
        let _read_only = File::open(dir.join("meta.json"))
            .and_then(|file| file.set_modified(std::time::SystemTime::now()));
        return Ok(Unpacked { disk });
    }
    let what = format!(
        "unpacking {} ({} layers)",
        image.manifest.short(12),
        image.layers.len()
    );
    events
        .tell(Event::Progress {
            what,
            detail: String::new(),
        })
        .await;
    let made = make(host, registry, repo, image, job, events).await?;
    let bytes = fs::metadata(&made).map_err(io)?.len();
    let file = File::open(&made).map_err(io)?;
    file.sync_all().map_err(io)?;
    let (disk, _) = tokio::task::spawn_blocking(move || Digest::of_reader(file))
        .await
        .map_err(|error| Failure::infrastructure(&error))?
        .map_err(io)?;
    let meta = Meta {
        schema: SCHEMA,
        manifest: image.manifest,
        disk,
        bytes,
    };
    let partial = dir.with_extension(format!("partial-{}", std::process::id()));
    fs::create_dir_all(&partial).map_err(io)?;
    let place = || -> std::io::Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        fs::rename(&made, partial.join("disk"))?;
        fs::set_permissions(partial.join("disk"), fs::Permissions::from_mode(0o444))?;
        fs::write(partial.join("meta.json"), serde_json::to_vec(&meta)?)?;
        sealed::remember(&partial.join("disk"), meta.disk, &partial.join(NOTE));
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::rename(&partial, &dir)
    };
    place().map_err(io)?;
    Ok(Unpacked {
        disk: dir.join("disk"),
    })
}

/// The disk, when it is what its record says: read in full at the first use after the host booted. One that is not is made again.
fn sound(dir: &std::path::Path, manifest: Digest) -> Option<PathBuf> {
    let meta: Meta = serde_json::from_slice(&fs::read(dir.join("meta.json")).ok()?).ok()?;
    let disk = dir.join("disk");
    let bytes = fs::metadata(&disk).ok()?.len();
    if meta.schema != SCHEMA || meta.manifest != manifest || meta.bytes != bytes {
        return None;
    }
    match sealed::check(&disk, meta.disk, &dir.join(NOTE)) {
        Ok(()) => Some(disk),
        Err(error) => {
            tracing::warn!(disk = %disk.display(), %error, "an unpacked image is damaged and is made again");
            None
        }
    }
}

async fn make(
    host: &Host,
    registry: &RegistryAccess,
    repo: &RepoName,
    image: &VerifiedImage,
    job: &JobId,
    events: &Events,
) -> Result<PathBuf, Failure> {
    let memory = ByteSize::mib(512);
    let ticket = host.admit(1, memory, job.as_str(), events).await?;
    let name = format!("{job}-1-unpack")
        .parse()
        .map_err(|error| Failure::infrastructure(&error))?;
    let wanted = Wanted {
        name,
        cpus: 1,
        memory,
        purpose: Purpose::Run,
        make_template: true,
        may_stay: false,
        disk_bytes_per_second: None,
    };
    // No network at all: unpacking needs none.
    let gateway = Gateway::new(GatewayConfig::new(
        kiln_core::NetworkPolicy::Isolated,
        std::sync::Arc::new(EgressLog::new()) as _,
    ));
    let attempt = Attempt::start(host, wanted, ticket, gateway, events).await?;
    let done = fill(host, &attempt, registry, repo, image).await;
    let done = match done {
        Ok(disk) => Ok(disk),
        Err(failure) => Err(attempt.explain(failure).await),
    };
    attempt.destroy(events).await;
    done
}

async fn fill(
    host: &Host,
    attempt: &Attempt,
    registry: &RegistryAccess,
    repo: &RepoName,
    image: &VerifiedImage,
) -> Result<PathBuf, Failure> {
    let disk = DiskSlot {
        role: DiskRole::Image,
        backing: None,
        format: DiskFormat::Qcow2,
        access: DiskAccess::New { size: DISK_SIZE },
    };
    attempt.machine.attach_disk(&disk).await?;
    attempt.mount(DiskRole::Image, false, true).await?;
    let mut left = UNPACKED_BYTES_MAX;
    for (index, layer) in image.layers.iter().enumerate() {
        left = send_layer(
            attempt,
            registry,
            repo,
            index,
            layer.digest,
            &layer.media_type,
            left,
        )
        .await?;
    }
    let unmount = Order::Unmount {
        serial: DiskRole::Image.serial().to_owned(),
    };
    orders::call_done(
        &attempt.session,
        "unmount the image",
        &unmount,
        STOP_TIMEOUT,
    )
    .await?;
    attempt.power_off().await?;
    let made = attempt.machine.take_disk(DiskRole::Image)?;
    let to = host.home.unpacked().join(format!(
        "{}.disk-{}",
        image.manifest.short(32),
        std::process::id()
    ));
    fs::rename(made, &to).map_err(|error| Failure::infrastructure(&error))?;
    Ok(to)
}

async fn send_layer(
    attempt: &Attempt,
    registry: &RegistryAccess,
    repo: &RepoName,
    index: usize,
    digest: Digest,
    media_type: &str,
    left: u64,
) -> Result<u64, Failure> {
    let blob = registry
        .host
        .open_blob(repo, &digest)
        .await
        .map_err(|error| Failure::infrastructure(&error))?;
    let reader = tokio_util::io::SyncIoBridge::new(Box::pin(blob.into_reader()));
    let place = Place::ImageLayer {
        index: u32::try_from(index).unwrap_or(u32::MAX),
    };
    let order = PutTree {
        place,
        bytes_max: left,
        entries_max: LAYER_ENTRIES_MAX,
    };
    let compression = Compression::of(media_type).ok_or_else(|| {
        Failure::new(
            FailureClass::User,
            format!("layers of type {media_type} cannot be unpacked"),
        )
    })?;
    let report = orders::put_tree(
        &attempt.session,
        "unpack a layer",
        &order,
        crate::build::SOURCE_TIMEOUT,
        move |out| {
            // Twice the bound: tar headers and padding count here, file bytes in the guest.
            let mut plain = compression.reader(reader)?.take(left.saturating_mul(2));
            std::io::copy(&mut plain, out).map(|_| ())
        },
    )
    .await?;
    Ok(left.saturating_sub(report.bytes))
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By the layer's media type, OCI or Docker.
    fn of(media_type: &str) -> Option<Self> {
        if media_type.ends_with("+zstd") {
            Some(Self::Zstd)
        } else if media_type.ends_with("+gzip") || media_type.ends_with(".gzip") {
            Some(Self::Gzip)
        } else if media_type.ends_with(".tar") {
            Some(Self::None)
        } else {
            None
        }
    }

    fn reader(self, inner: impl Read + Send + 'static) -> std::io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::None => Box::new(inner),
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(inner)),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(inner)?;
                // 128 MiB of window: what every zstd accepts; a layer that asks for more is refused.
                decoder.window_log_max(27)?;
                Box::new(decoder)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_of_both_families() {
        assert_eq!(
            Compression::of("application/vnd.oci.image.layer.v1.tar"),
            Some(Compression::None)
        );
        assert_eq!(
            Compression::of("application/vnd.oci.image.layer.v1.tar+gzip"),
            Some(Compression::Gzip)
        );
        assert_eq!(
            Compression::of("application/vnd.docker.image.rootfs.diff.tar.gzip"),
            Some(Compression::Gzip)
        );
        assert_eq!(
            Compression::of("application/vnd.oci.image.layer.v1.tar+zstd"),
            Some(Compression::Zstd)
        );
        assert_eq!(Compression::of("text/plain"), None);
    }
}
