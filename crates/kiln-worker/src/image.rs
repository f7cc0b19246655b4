//! The machine image machines of this host are started from.

use std::path::{Path, PathBuf};

use kiln_core::FailureClass;
use kiln_core::machine::BootSource;
use kiln_image::bake::{MachineImageManifest, MachineImages, VerifyDepth};

use crate::failure::Failure;
use crate::home::Home;

/// The current machine image, its files verified once per host boot.
#[derive(Clone, Debug)]
pub struct CurrentImage {
    /// `ci-<16 hex>`.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// What to boot.
    pub boot: BootSource,
    /// Its root disk, read-only and shared.
    pub root: PathBuf,
    /// Release of its kernel.
    pub kernel_release: String,
    /// Version of BuildKit inside.
    pub buildkit: String,
}

impl CurrentImage {
    /// Opens the current image of a home.
    ///
    /// # Errors
    /// When there is none, or its files are not what its manifest says.
    pub fn open(home: &Home) -> Result<Self, Failure> {
        let images = MachineImages::new(home.images());
        let current = images.current().map_err(|error| {
            Failure::new(FailureClass::Usage, crate::orders::chain(&error))
                .hint("run `kiln setup` once (`make demo` does it)")
        })?;
        let manifest = images
            .verify(&current.name, VerifyDepth::OncePerBoot)
            .map_err(|error| {
                Failure::infrastructure(&error).hint("`kiln machine-image bake` makes it again")
            })?;
        let dir = images
            .path(&manifest.name)
            .map_err(|error| Failure::infrastructure(&error))?;
        Ok(Self {
            boot: boot_source(&dir, &manifest),
            root: dir.join("root.img"),
            kernel_release: manifest.kernel_release,
            buildkit: manifest.buildkit_version,
            name: manifest.name,
            dir,
        })
    }
}

fn boot_source(dir: &Path, manifest: &MachineImageManifest) -> BootSource {
    let args = manifest.kernel_args.split_ascii_whitespace();
    BootSource {
        kernel: dir.join("kernel"),
        initrd: dir.join("initrd"),
        args: args.map(str::to_owned).collect(),
        image: manifest.content,
    }
}
