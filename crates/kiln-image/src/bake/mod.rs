//! Bakes what machines boot and what images stand on: the machine image and the runtime bases.
//!
//! Everything here runs on the host, from a recipe (data in `machine-image/`), through programs of the system
//! (`mmdebstrap`, `go`, `mkfs.ext4`, `xz`), as root or as an ordinary user with user namespaces. It is blocking code:
//! run it on a thread of its own. It knows no machine and boots nothing; which bases a build may use is said in
//! [`crate::bases`]'s configuration, not here.
//!
//! A bake is a chain of stages. Each is a directory named after the hash of its inputs, so a bake that was stopped
//! resumes after its last finished stage, and a new guest binary costs one initrd.
//! Read next: [`recipe`] (the inputs), [`stage`] (the cache), [`machine_image`] and [`runtime_bases`] (the two bakes).

pub mod apt;
pub mod archives;
pub mod buildkit;
pub mod cpio;
pub mod disk;
pub mod dpkg;
pub mod images;
pub mod initrd;
pub mod kernel;
pub mod machine_image;
pub mod manifest;
pub mod npm;
pub mod oci;
mod orphan;
pub mod process;
pub mod progress;
pub mod recipe;
pub mod root;
pub mod runtime_bases;
pub mod stage;
pub mod tree;

pub use archives::Updates;
pub use images::{ImageSummary, MachineImages, VerifyDepth};
pub use machine_image::{BakeError, MachineImageBake, bake_machine_image};
pub use manifest::MachineImageManifest;
pub use oci::{BlobSink, OciLayout};
pub use progress::{BakeEvent, BakeProgress, Cancel};
pub use recipe::{BasesRecipe, ImageRecipe, RecipeFiles};
pub use runtime_bases::{BakedBase, BakedBases, BasesBake, bake_bases};
