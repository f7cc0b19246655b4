//! Bakes a machine image: root tree, BuildKit, kernel, root disk and initrd, one cached stage each.
//!
//! The result appears by a rename when every file is there and was read back; until then the current image stays
//! what it was. Read next: [`super::images`], where results live.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::apt::{AptError, HostApt};
use super::archives::{Updates, root_key};
use super::buildkit::{self, BuildkitError};
use super::disk::{DiskError, make_disk};
use super::dpkg::{DpkgError, PackageVersion, Packages};
use super::images::{self, ImagesError, KEEP, MachineImages, VerifyDepth, digest_file};
use super::initrd::{InitrdError, read_guest, write_initrd};
use super::kernel::{KernelError, ModuleIndex, elf_of_bzimage};
use super::manifest::{self, FileDigest, MachineImageManifest};
use super::process::{Program, RunContext, RunError};
use super::progress::{BakeProgress, Cancel};
use super::recipe::{ImageRecipe, RecipeError, RecipeFiles};
use super::root::{self, KERNEL_DIRECTORY, RootError, RootSpec, make_root};
use super::stage::{StageCache, StageError, StageKey, stage_digest};
use super::tree::{Content, Node, Tree, TreeError, patterns};

/// Finished stages of each kind that are kept.
const STAGES_KEPT: usize = 2;
/// How long decompressing one module may take.
const XZ_DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);
/// What every machine boots with: no crypto self tests (-0.45 s under emulation), no patching of SMP
/// instructions (-0.15 s), and a panic ends the machine, with its words on the console (level 0 would hide them).
pub(super) const KERNEL_ARGS: &str = "panic=-1 quiet loglevel=1 cryptomgr.notests noreplace-smp";

/// Why a machine image was not baked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BakeError {
    /// The recipe.
    #[error("the recipe cannot be used")]
    Recipe(#[from] RecipeError),
    /// The host's apt settings.
    #[error("the host's apt settings cannot be used")]
    Apt(#[from] AptError),
    /// The cache of stages.
    #[error("the bake cache cannot be used")]
    Stage(#[from] StageError),
    /// The root tree.
    #[error("the root tree was not made")]
    Root(#[from] RootError),
    /// The root tree's form.
    #[error("the root tree cannot be used")]
    Tree(#[from] TreeError),
    /// The package database of the root tree.
    #[error("the packages of the root tree cannot be read")]
    Dpkg(#[from] DpkgError),
    /// BuildKit.
    #[error("BuildKit was not built")]
    Buildkit(#[from] BuildkitError),
    /// The kernel.
    #[error("the kernel cannot be used")]
    Kernel(#[from] KernelError),
    /// The root disk.
    #[error("the root disk was not made")]
    Disk(#[from] DiskError),
    /// The initrd.
    #[error("the initrd was not made")]
    Initrd(#[from] InitrdError),
    /// A program.
    #[error("a program of the system failed")]
    Run(#[from] RunError),
    /// The directory of images.
    #[error("the image cannot be put into place")]
    Images(#[from] ImagesError),
    /// Part of an npm registry.
    #[error("a build tool cannot be fetched")]
    Npm(#[from] super::npm::NpmError),
    /// A layer or manifest.
    #[error("an image cannot be written")]
    Oci(#[from] super::oci::OciError),
    /// A file.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BakeError {
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// Whether the bake ended because the caller cancelled it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        let mut error: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(one) = error {
            let run = one.downcast_ref::<RunError>();
            let stage = one.downcast_ref::<StageError>();
            if matches!(run, Some(RunError::Cancelled))
                || matches!(stage, Some(StageError::Cancelled))
            {
                return true;
            }
            error = one.source();
        }
        false
    }
}

/// What a bake needs.
#[derive(Clone, Copy)]
pub struct MachineImageBake<'a> {
    /// The recipe.
    pub files: &'a RecipeFiles,
    /// The guest binary, static.
    pub guest: &'a Path,
    /// Directory of cached stages and packages.
    pub cache: &'a Path,
    /// Where images live.
    pub images: &'a MachineImages,
    /// Images in use by templates or machines, which pruning leaves alone.
    pub used: &'a [String],
    /// What to do about updated packages.
    pub updates: Updates,
    /// Told what happens.
    pub progress: &'a dyn BakeProgress,
    /// Stops it.
    pub cancel: &'a Cancel,
}

impl std::fmt::Debug for MachineImageBake<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineImageBake")
            .field("guest", &self.guest)
            .finish_non_exhaustive()
    }
}

/// Directories of the finished stages of one bake.
struct Stages {
    tree: PathBuf,
    kernel: PathBuf,
    disk: PathBuf,
    initrd: PathBuf,
}

/// Bakes, verifies, makes it current and removes old ones. An image with the same content is used as it is; without
/// [`Updates::Take`] so is a sound one of the same recipe and guest, at once and without asking any archive.
///
/// # Errors
/// See [`BakeError`]; the current image is then what it was.
pub fn bake_machine_image(bake: &MachineImageBake<'_>) -> Result<MachineImageManifest, BakeError> {
    let recipe = bake.files.image()?;
    read_guest(bake.guest)?;
    if bake.updates == Updates::Leave
        && let Some(image) = bake.images.find_for(bake.files, bake.guest)?
        // A damaged one is baked again.
        && let Ok(image) = bake.images.verify(&image.name, VerifyDepth::OncePerBoot)
    {
        bake.images.set_current(&image.name)?;
        return Ok(image);
    }
    let guest = digest_file(bake.guest).map_err(BakeError::io("read", bake.guest))?;
    let cache = StageCache::open(bake.cache, bake.progress, bake.cancel)?;
    let stages = run_stages(bake, &recipe, &guest, &cache)?;
    let manifest = describe(bake, &recipe, &guest, &stages)?;
    let name = manifest.name.clone();
    // A damaged image of the same content is replaced, never used.
    if bake.images.verify(&name, VerifyDepth::Full).is_err() {
        assemble(bake.images, &manifest, &stages)?;
    }
    let manifest = bake.images.verify(&name, VerifyDepth::Full)?;
    bake.images.set_current(&name)?;
    bake.images.prune(KEEP, bake.used)?;
    cache.prune(STAGES_KEPT)?;
    Ok(manifest)
}

fn run_stages(
    bake: &MachineImageBake<'_>,
    recipe: &ImageRecipe,
    guest: &FileDigest,
    cache: &StageCache<'_>,
) -> Result<Stages, BakeError> {
    let root = root_stage(bake, recipe, cache)?;
    let packages = recipe.buildkit.packages.join(" ");
    let mut buildkit_key = StageKey::new(1).with("packages", packages.as_bytes());
    for file in recipe.buildkit.files() {
        buildkit_key = buildkit_key.with(file, bake.files.get(&recipe.buildkit.path(file))?);
    }
    let buildkit_key = buildkit_key.digest();
    let buildkit = cache.stage("buildkit", &buildkit_key, |work, context| {
        Ok::<_, BakeError>(buildkit::build(
            &recipe.buildkit,
            bake.files,
            work,
            context,
        )?)
    })?;
    let raw = root.join(root::TAR);
    let raw_digest = stage_digest(&root)?;
    let tree_key = StageKey::new(1)
        .with("root", raw_digest.bytes())
        .with("buildkit", stage_digest(&buildkit)?.bytes())
        .with("recipe", bake.files.image_digest()?.bytes())
        .digest();
    let tree = cache.stage("tree", &tree_key, |work, _| {
        write_tree(recipe, &raw, &buildkit, work)
    })?;
    let kernel_key = StageKey::new(1)
        .with("root", raw_digest.bytes())
        .with("modules", recipe.kernel.modules.join(" ").as_bytes())
        .digest();
    let kernel = cache.stage("kernel", &kernel_key, |work, context| {
        unpack_kernel(recipe, &raw, work, context)
    })?;
    let normal = tree.join(root::TAR);
    let disk_key = StageKey::new(1)
        .with("tree", stage_digest(&tree)?.bytes())
        .digest();
    let disk = cache.stage("disk", &disk_key, |work, context| {
        let disk = make_disk(&Tree::from_tar(&normal)?, &normal, work, context);
        disk.map(drop).map_err(BakeError::from)
    })?;
    let initrd_key = StageKey::new(1)
        .with("guest", guest.digest.bytes())
        .with("kernel", stage_digest(&kernel)?.bytes())
        .digest();
    let initrd = cache.stage("initrd", &initrd_key, |work, _| {
        let to = work.join(manifest::INITRD);
        write_initrd(bake.guest, &kernel.join("modules"), &to).map_err(BakeError::from)
    })?;
    Ok(Stages {
        tree,
        kernel,
        disk,
        initrd,
    })
}

/// The raw Debian root. Its key has the state of the archives, so that a bake that wants updates takes them.
fn root_stage(
    bake: &MachineImageBake<'_>,
    recipe: &ImageRecipe,
    cache: &StageCache<'_>,
) -> Result<PathBuf, BakeError> {
    let context = cache.context("root");
    let apt = HostApt::read(Path::new("/"), &context)?;
    let inputs = StageKey::new(1)
        .with("suite", recipe.suite.as_bytes())
        .with("packages", recipe.root.packages.join(" ").as_bytes())
        .with("kernel", recipe.kernel.package.as_bytes());
    let key = root_key(bake.updates, "root", &inputs, cache, || {
        apt.state(
            &recipe.suite,
            &recipe.architecture,
            cache.directory(),
            &context,
        )
    })?;
    let debs = bake.cache.join("debs-machine");
    let spec = RootSpec {
        suite: &recipe.suite,
        architecture: &recipe.architecture,
        variant: "essential",
        packages: &recipe.root.packages,
        kernel: Some(&recipe.kernel.package),
        byte_compile: &[],
        debs: &debs,
    };
    cache.stage("root", &key, |work, context| {
        make_root(&spec, &apt, work, context)?;
        let packages = Packages::of_tree(&Tree::from_tar(&work.join(root::TAR))?)?;
        root::prune_debs(&debs, &packages.versions(), "linux-image-")?;
        Ok(())
    })
}

/// Filters the raw root, adds our files and BuildKit, writes the normalised tar and the package list.
fn write_tree(
    recipe: &ImageRecipe,
    raw: &Path,
    buildkit: &Path,
    work: &Path,
) -> Result<(), BakeError> {
    let mut tree = Tree::from_tar(raw)?;
    let packages = Packages::of_tree(&tree)?;
    let (exclude, keep) = (
        patterns(&recipe.root.exclude)?,
        patterns(&recipe.root.keep)?,
    );
    let in_kernel = |path: &str| path == KERNEL_DIRECTORY || path.starts_with("kiln-kernel/");
    let mut versions = packages.versions();
    versions.extend(kernel_package(&tree));
    tree.remove_where(|path| in_kernel(path) || (exclude.is_match(path) && !keep.is_match(path)));
    for directory in &recipe.root.directories {
        if tree.get(directory).is_none() {
            tree.insert(directory, Node::directory());
        }
    }
    for file in &recipe.root.files {
        tree.insert(&file.path, file.node());
    }
    let bin = buildkit.join("bin");
    for entry in fs::read_dir(&bin).map_err(BakeError::io("list", &bin))? {
        let entry = entry.map_err(BakeError::io("list", &bin))?;
        let content =
            Content::of_file(&entry.path()).map_err(BakeError::io("read", &entry.path()))?;
        let path = format!(
            "{}/{}",
            recipe.buildkit.directory,
            entry.file_name().to_string_lossy()
        );
        tree.insert(&path, Node::file(0o755, content));
    }
    let to = work.join(root::TAR);
    let out = fs::File::create(&to).map_err(BakeError::io("write", &to))?;
    tree.write_tar(io::BufWriter::with_capacity(1 << 20, out))?;
    write_json(&work.join("packages.json"), &versions)
}

/// The kernel package as the tree shows it; it is unpacked, so dpkg does not know it.
fn kernel_package(tree: &Tree) -> Option<PackageVersion> {
    let release = kernel_release(tree)?;
    let changelog =
        format!("{KERNEL_DIRECTORY}/usr/share/doc/linux-image-{release}/changelog.Debian.gz");
    let packed = tree.content(&changelog)?.bytes().ok()?;
    let mut head = [0_u8; 256];
    let read = io::Read::read(&mut flate2::read::GzDecoder::new(&packed[..]), &mut head).ok()?;
    let text = String::from_utf8_lossy(&head[..read]);
    let version = text.split_once('(')?.1.split_once(')')?.0.to_owned();
    Some(PackageVersion {
        name: format!("linux-image-{release}"),
        version,
        architecture: "amd64".to_owned(),
    })
}

fn kernel_release(tree: &Tree) -> Option<String> {
    let prefix = format!("{KERNEL_DIRECTORY}/boot/vmlinuz-");
    tree.iter()
        .find_map(|(path, _)| path.strip_prefix(&prefix).map(str::to_owned))
}

/// Writes `kernel`, `release` and `modules/` (with `order`).
fn unpack_kernel(
    recipe: &ImageRecipe,
    raw: &Path,
    work: &Path,
    context: &RunContext<'_>,
) -> Result<(), BakeError> {
    let tree = Tree::from_tar(raw)?;
    let release = kernel_release(&tree).ok_or(KernelError::NotBzImage("the package has none"))?;
    let read = |path: &str| -> Result<Vec<u8>, BakeError> {
        let content = tree
            .content(path)
            .ok_or_else(|| KernelError::NoModule(path.to_owned()))?;
        content.bytes().map_err(BakeError::io("read", raw))
    };
    let write = |name: &str, bytes: &[u8]| {
        let path = work.join(name);
        fs::write(&path, bytes).map_err(BakeError::io("write", &path))
    };
    let elf = elf_of_bzimage(&read(&format!(
        "{KERNEL_DIRECTORY}/boot/vmlinuz-{release}"
    ))?)?;
    write(manifest::KERNEL, &elf)?;
    write("release", release.as_bytes())?;
    let base = format!("{KERNEL_DIRECTORY}/usr/lib/modules/{release}");
    let builtin = read(&format!("{base}/modules.builtin"))?;
    let prefix = format!("{base}/");
    let paths = tree
        .iter()
        .filter_map(|(path, _)| path.strip_prefix(&prefix));
    let index = ModuleIndex::new(paths, &String::from_utf8_lossy(&builtin));
    let packed = work.join("packed");
    let load = |path: &str| -> Result<Vec<u8>, BakeError> {
        let bytes = read(&format!("{base}/{path}"))?;
        if !path.ends_with(".xz") {
            return Ok(bytes);
        }
        fs::write(&packed, bytes).map_err(BakeError::io("write", &packed))?;
        let program = Program::new("xz", XZ_DEADLINE)
            .args(["-d", "-c", "-f", "--"])
            .arg(&packed);
        let module = program.capture(context)?;
        fs::remove_file(&packed).map_err(BakeError::io("remove", &packed))?;
        Ok(module)
    };
    let modules = index.load_order(&recipe.kernel.modules, load)?;
    let directory = work.join("modules");
    fs::create_dir(&directory).map_err(BakeError::io("make", &directory))?;
    let mut order = String::new();
    for module in modules {
        let name = format!("{}.ko", module.name);
        write(&format!("modules/{name}"), &module.bytes)?;
        order.push_str(&name);
        order.push('\n');
    }
    write("modules/order", order.as_bytes())
}

/// The manifest of what the stages made. Its name follows from its content.
fn describe(
    bake: &MachineImageBake<'_>,
    recipe: &ImageRecipe,
    guest: &FileDigest,
    stages: &Stages,
) -> Result<MachineImageManifest, BakeError> {
    let digest = |path: PathBuf| digest_file(&path).map_err(BakeError::io("read", &path));
    let text = |path: PathBuf| fs::read_to_string(&path).map_err(BakeError::io("read", &path));
    let recipe_digest = bake.files.image_digest()?;
    let root_tree = digest(stages.tree.join(root::TAR))?.digest;
    let kernel = digest(stages.kernel.join(manifest::KERNEL))?;
    let initrd = digest(stages.initrd.join(manifest::INITRD))?;
    let content = StageKey::new(manifest::SCHEMA)
        .with("recipe", recipe_digest.bytes())
        .with("root", root_tree.bytes())
        .with("kernel", kernel.digest.bytes())
        .with("initrd", initrd.digest.bytes())
        .with("arguments", KERNEL_ARGS.as_bytes())
        .digest();
    let packages = stages.tree.join("packages.json");
    let packages: Vec<PackageVersion> = serde_json::from_str(&text(packages.clone())?)
        .map_err(|error| BakeError::io("parse", &packages)(error.into()))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(MachineImageManifest {
        schema: manifest::SCHEMA,
        name: format!("{}-{}", recipe.name, content.short(16)),
        content,
        recipe: recipe_digest,
        guest: guest.digest,
        root_tree,
        kernel_release: text(stages.kernel.join("release"))?,
        kernel_args: KERNEL_ARGS.to_owned(),
        modules: text(stages.kernel.join("modules/order"))?
            .lines()
            .map(str::to_owned)
            .collect(),
        buildkit_version: buildkit::version(&recipe.buildkit, bake.files)?,
        debian: format!("{}/{}", recipe.suite, recipe.architecture),
        baked_unix_s: now.as_secs(),
        files: BTreeMap::from([
            (manifest::KERNEL.to_owned(), kernel),
            (manifest::INITRD.to_owned(), initrd),
            (
                manifest::ROOT.to_owned(),
                digest(stages.disk.join(manifest::ROOT))?,
            ),
        ]),
        packages,
    })
}

/// Puts an image together beside its place and renames it there.
fn assemble(
    images: &MachineImages,
    manifest: &MachineImageManifest,
    stages: &Stages,
) -> Result<(), BakeError> {
    let root = images.directory();
    fs::create_dir_all(root).map_err(BakeError::io("make", root))?;
    images.remove_unfinished()?;
    let work = root.join(format!("{}{}", images::UNFINISHED, manifest.name));
    fs::create_dir(&work).map_err(BakeError::io("make", &work))?;
    for (from, name) in [
        (&stages.kernel, manifest::KERNEL),
        (&stages.initrd, manifest::INITRD),
        (&stages.disk, manifest::ROOT),
    ] {
        let (from, to) = (from.join(name), work.join(name));
        // A link where the filesystem allows one: images with the same root share its bytes.
        if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to).map_err(BakeError::io("copy", &from))?;
        }
        let read_only = fs::Permissions::from_mode(0o444);
        fs::set_permissions(&to, read_only).map_err(BakeError::io("chmod", &to))?;
    }
    write_json(&work.join(manifest::FILE), manifest)?;
    super::stage::sync_tree(&work).map_err(BakeError::io("flush", &work))?;
    let to = images.path(&manifest.name)?;
    if to.exists() {
        let old = root.join(format!("{}old-{}", images::UNFINISHED, manifest.name));
        fs::rename(&to, &old).map_err(BakeError::io("rename", &to))?;
    }
    fs::rename(&work, &to).map_err(BakeError::io("rename", &work))?;
    images.remove_unfinished()?;
    fs::File::open(root)
        .and_then(|dir| dir.sync_all())
        .map_err(BakeError::io("flush", root))
}

pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), BakeError> {
    let bytes = serde_json::to_vec_pretty(value).map_err(io::Error::other);
    let written = bytes.and_then(|bytes| fs::write(path, bytes));
    written.map_err(BakeError::io("write", path))
}

#[cfg(test)]
mod tests;
