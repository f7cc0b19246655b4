//! Bakes the runtime bases: one Debian root, split into layers that all of them share, as OCI images.
//!
//! See `machine-image/runtimes.toml` for what goes where. Run images have no package manager and no
//! compiler; what is in them is listed in `/var/lib/dpkg/status.d`, where scanners look.
//! Read next: [`super::oci`]; [`crate::bases`], which says what a name in FROM means.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use kiln_core::{Digest, ImageRef};
use serde::{Deserialize, Serialize};

use super::apt::HostApt;
use super::archives::{Updates, root_key};
use super::dpkg::{PackageVersion, Packages};
use super::machine_image::{BakeError, write_json};
use super::npm;
use super::oci::{
    BlobSink, Compression, ImageSettings, LayerBlob, OciImage, make_image, put_image, write_layer,
};
use super::process::RunContext;
use super::progress::{BakeProgress, Cancel};
use super::recipe::{BasesRecipe, RecipeFiles, RuntimeRecipe};
use super::root::{self, RootSpec, make_root};
use super::stage::{StageCache, StageKey, stage_digest};
use super::tree::{Body, Node, Tree, patterns};
use crate::bases::{Base, Bases};

/// Finished stages of each kind that are kept.
const STAGES_KEPT: usize = 2;
/// File with the result in the directory of the last stage.
const RESULT: &str = "bases.json";
/// Layer under every image.
const COMMON: &str = "common";
/// Layer that only build images have.
const BUILD: &str = "build";
/// Registry that machines know the bases by.
const REGISTRY: &str = "registry.kiln.internal";

/// What a bake of the bases needs.
#[derive(Clone, Copy)]
pub struct BasesBake<'a> {
    /// The recipe.
    pub files: &'a RecipeFiles,
    /// Directory of cached stages and packages.
    pub cache: &'a Path,
    /// npm registry of the host's settings, when the caller found one.
    pub npm_registry: Option<&'a str>,
    /// What to do about updated packages.
    pub updates: Updates,
    /// Told what happens.
    pub progress: &'a dyn BakeProgress,
    /// Stops it.
    pub cancel: &'a Cancel,
}

impl std::fmt::Debug for BasesBake<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BasesBake")
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

/// The two images of one runtime version.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BakedBase {
    /// Runtime.
    pub name: String,
    /// Version line, such as `20` or `3.13`.
    pub version: String,
    /// Other names of the build image.
    pub aliases: Vec<String>,
    /// Exact versions of the runtimes and tools of the build image.
    pub tools: BTreeMap<String, String>,
    /// Image that builds run in.
    pub build: OciImage,
    /// Image that apps run in.
    pub run: OciImage,
    /// Packages of the run image.
    pub run_packages: Vec<PackageVersion>,
}

/// Everything one bake made. Layers are files of `directory`, which a later bake may remove: publish first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BakedBases {
    /// Digest of the recipe file.
    pub recipe: Digest,
    /// The bases.
    pub bases: Vec<BakedBase>,
    /// Packages of every build image.
    pub build_packages: Vec<PackageVersion>,
    /// Where the layers are.
    #[serde(skip)]
    pub directory: PathBuf,
}

impl BakedBases {
    /// Puts every image into a place: repositories `shared/<runtime>`, tags `<version>-build` and `<version>-run`.
    ///
    /// # Errors
    /// When a layer cannot be read or the place refuses one.
    pub fn publish(&self, sink: &mut dyn BlobSink) -> Result<(), BakeError> {
        for base in &self.bases {
            let repository = format!("shared/{}", base.name);
            for image in [&base.build, &base.run] {
                put_image(image, &self.directory, &repository, sink)?;
            }
        }
        Ok(())
    }

    /// What names in FROM mean with these bases, digests included.
    #[must_use]
    pub fn to_bases(&self) -> Bases {
        let reference = |base: &BakedBase, image: &OciImage| ImageRef {
            registry: Some(REGISTRY.to_owned()),
            repository: format!("shared/{}", base.name),
            tag: Some(image.tag.clone()),
            digest: Some(image.digest),
        };
        let base = |base: &BakedBase| Base {
            name: base.name.clone(),
            version: base.version.clone(),
            build: reference(base, &base.build),
            run: reference(base, &base.run),
            aliases: base.aliases.clone(),
            tools: base.tools.clone(),
        };
        Bases {
            bases: self.bases.iter().map(base).collect(),
            ..Bases::default()
        }
    }
}

/// Bakes every base of the recipe.
///
/// # Errors
/// See [`BakeError`].
pub fn bake_bases(bake: &BasesBake<'_>) -> Result<BakedBases, BakeError> {
    let recipe = bake.files.bases()?;
    let recipe_digest = bake.files.bases_digest()?;
    let cache = StageCache::open(bake.cache, bake.progress, bake.cancel)?;
    let context = cache.context("bases-root");
    let apt = HostApt::read(Path::new("/"), &context)?;
    let root = root_stage(bake, &recipe, &apt, &cache)?;
    let tools = tools_stage(bake, &recipe, &cache)?;
    let key = StageKey::new(1)
        .with("root", stage_digest(&root)?.bytes())
        .with("tools", stage_digest(&tools)?.bytes())
        .with("recipe", recipe_digest.bytes())
        .with("sources", apt.sources_file(&recipe.suite).as_bytes())
        .with("options", apt.date_options().as_bytes())
        .digest();
    let directory = cache.stage("bases", &key, |work, _| {
        let tree = Tree::from_tar(&root.join(root::TAR))?;
        let packages = Packages::of_tree(&tree)?;
        let tree = complete(&recipe, tree, &tools, &apt)?;
        let bases = write_images(&recipe, recipe_digest, tree, &packages, work)?;
        write_json(&work.join(RESULT), &bases)
    })?;
    let result = directory.join(RESULT);
    let bytes = fs::read(&result).map_err(BakeError::io("read", &result))?;
    let bases: BakedBases = serde_json::from_slice(&bytes)
        .map_err(|error| BakeError::io("parse", &result)(error.into()))?;
    cache.prune(STAGES_KEPT)?;
    Ok(BakedBases { directory, ..bases })
}

fn root_stage(
    bake: &BasesBake<'_>,
    recipe: &BasesRecipe,
    apt: &HostApt,
    cache: &StageCache<'_>,
) -> Result<PathBuf, BakeError> {
    let packages = recipe.packages();
    let byte_compile: Vec<_> = recipe
        .runtimes
        .iter()
        .flat_map(|runtime| runtime.byte_compile.iter().cloned())
        .collect();
    let context = cache.context("bases-root");
    let inputs = StageKey::new(1)
        .with("suite", recipe.suite.as_bytes())
        .with("packages", packages.join(" ").as_bytes())
        .with("byte code", byte_compile.join(" ").as_bytes());
    let key = root_key(bake.updates, "bases-root", &inputs, cache, || {
        apt.state(
            &recipe.suite,
            &recipe.architecture,
            cache.directory(),
            &context,
        )
    })?;
    let debs = bake.cache.join("debs-bases");
    let spec = RootSpec {
        suite: &recipe.suite,
        architecture: &recipe.architecture,
        variant: "apt",
        packages: &packages,
        kernel: None,
        byte_compile: &byte_compile,
        debs: &debs,
    };
    cache.stage("bases-root", &key, |work, context| {
        make_root(&spec, apt, work, context)?;
        let packages = Packages::of_tree(&Tree::from_tar(&work.join(root::TAR))?)?;
        root::prune_debs(&debs, &packages.versions(), "-")?;
        Ok(())
    })
}

/// The tarballs of the npm tools. Pinned by their digests, so the registry is no part of the key.
fn tools_stage(
    bake: &BasesBake<'_>,
    recipe: &BasesRecipe,
    cache: &StageCache<'_>,
) -> Result<PathBuf, BakeError> {
    let mut key = StageKey::new(1);
    for tool in &recipe.build.npm {
        key = key.with(&tool.name, tool.integrity.as_bytes());
    }
    cache.stage(
        "bases-tools",
        &key.digest(),
        |work, context: &RunContext<'_>| {
            let registry = npm::registry(bake.npm_registry, work, context)?;
            for tool in &recipe.build.npm {
                npm::fetch(tool, &registry, work, context)?;
            }
            Ok(())
        },
    )
}

/// The root with our user, files and tools, and without what no layer has.
fn complete(
    recipe: &BasesRecipe,
    mut tree: Tree,
    tools: &Path,
    apt: &HostApt,
) -> Result<Tree, BakeError> {
    let (exclude, keep) = (patterns(&recipe.exclude)?, patterns(&recipe.keep)?);
    for tool in &recipe.build.npm {
        npm::install(tool, &tools.join(format!("{}.tgz", tool.name)), &mut tree)?;
    }
    tree.remove_where(|path| exclude.is_match(path) && !keep.is_match(path));
    for file in &recipe.build.files {
        tree.insert(&file.path, file.node());
    }
    tree.insert(
        "etc/apt/sources.list.d/debian.sources",
        Node::text(&apt.sources_file(&recipe.suite)),
    );
    let options = apt.date_options();
    if !options.is_empty() {
        tree.insert("etc/apt/apt.conf.d/90kiln", Node::text(&options));
    }
    let user = &recipe.user;
    for (path, lines) in user.accounts() {
        let Some(node) = tree.get(path).cloned() else {
            continue;
        };
        let Body::File(content) = &node.body else {
            continue;
        };
        let mut bytes = content
            .bytes()
            .map_err(BakeError::io("read", Path::new(path)))?;
        bytes.extend_from_slice(lines.as_bytes());
        let body = Body::File(super::tree::Content::Bytes(bytes.into()));
        tree.insert(path, Node { body, ..node });
    }
    let owned = Node {
        uid: user.id.into(),
        gid: user.id.into(),
        ..Node::directory()
    };
    tree.insert(&format!("home/{}", user.name), owned.clone());
    tree.insert(&user.directory, owned);
    Ok(tree)
}

/// Which packages and paths the common layer or one runtime's layer has.
struct Slice {
    packages: BTreeSet<String>,
    paths: BTreeSet<String>,
}

/// What one slice takes.
struct Choice<'a> {
    roots: &'a [String],
    exclude: Vec<String>,
    extra: &'a [String],
}

fn slice(
    choice: &Choice<'_>,
    below: Option<&Slice>,
    without: &[String],
    tree: &Tree,
    packages: &Packages,
) -> Result<Slice, BakeError> {
    let mut names = packages.closure(choice.roots, without)?;
    if let Some(below) = below {
        names.retain(|name| !below.packages.contains(name));
    }
    let (exclude, extra) = (patterns(&choice.exclude)?, patterns(choice.extra)?);
    let mut paths = BTreeSet::new();
    for name in &names {
        let files = packages.files(tree, name)?;
        paths.extend(files.into_iter().filter(|path| !exclude.is_match(path)));
        paths.insert(status_path(name));
    }
    let generated = tree.iter().map(|(path, _)| path);
    paths.extend(
        generated
            .filter(|path| extra.is_match(path) && !exclude.is_match(path))
            .map(str::to_owned),
    );
    if let Some(below) = below {
        paths.retain(|path| !below.paths.contains(path));
    }
    Ok(Slice {
        packages: names,
        paths,
    })
}

/// Where a run image says that it has a package.
fn status_path(name: &str) -> String {
    format!("var/lib/dpkg/status.d/{name}")
}

fn write_images(
    recipe: &BasesRecipe,
    recipe_digest: Digest,
    mut tree: Tree,
    packages: &Packages,
    work: &Path,
) -> Result<BakedBases, BakeError> {
    let common_choice = Choice {
        roots: &recipe.common.packages,
        exclude: recipe.common.exclude.clone(),
        extra: &recipe.common.extra,
    };
    let without = &recipe.common.without;
    let common = slice(&common_choice, None, without, &tree, packages)?;
    let mut slices = vec![common];
    for runtime in &recipe.runtimes {
        let choice = Choice {
            roots: &runtime.packages,
            exclude: recipe
                .common
                .exclude
                .iter()
                .chain(&runtime.exclude)
                .cloned()
                .collect(),
            extra: &runtime.extra,
        };
        let slice = slice(&choice, slices.first(), without, &tree, packages)?;
        slices.push(slice);
    }
    for name in slices.iter().flat_map(|slice| &slice.packages) {
        tree.insert(&status_path(name), Node::text(&packages.get(name)?.stanza));
    }
    let layers = write_layers(recipe, &tree, &slices, work)?;
    let tools = tool_versions(recipe, packages)?;
    let mut bases = Vec::new();
    for (number, runtime) in recipe.runtimes.iter().enumerate() {
        let run_layers = vec![layers[0].clone(), layers[number + 1].clone()];
        let base = describe(
            recipe,
            runtime,
            packages,
            &tools,
            layers.clone(),
            run_layers,
        )?;
        let mut run_packages = Vec::new();
        for name in slices[0]
            .packages
            .iter()
            .chain(&slices[number + 1].packages)
        {
            run_packages.push(packages.get(name)?.id.clone());
        }
        bases.push(BakedBase {
            run_packages,
            ..base
        });
    }
    Ok(BakedBases {
        recipe: recipe_digest,
        bases,
        build_packages: packages.versions(),
        directory: PathBuf::new(),
    })
}

/// Common layer, one layer per runtime, build layer: in this order, each written on a thread of its own.
fn write_layers(
    recipe: &BasesRecipe,
    tree: &Tree,
    slices: &[Slice],
    work: &Path,
) -> Result<Vec<LayerBlob>, BakeError> {
    let names = recipe.runtimes.iter().map(|runtime| runtime.name.as_str());
    let named: Vec<_> = [COMMON].into_iter().chain(names).zip(slices).collect();
    let taken = |path: &str| slices.iter().any(|slice| slice.paths.contains(path));
    let rest = tree.subtree(|path| !taken(path));
    std::thread::scope(|scope| {
        let mut writers = Vec::new();
        for (name, slice) in named {
            let part = tree.subtree(|path| slice.paths.contains(path));
            writers.push(scope.spawn(move || write_layer(name, &part, Compression::Gzip, work)));
        }
        writers.push(scope.spawn(|| write_layer(BUILD, &rest, Compression::None, work)));
        let mut layers = Vec::new();
        for writer in writers {
            match writer.join() {
                Ok(layer) => layers.push(layer?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(layers)
    })
}

/// Exact versions of everything people ask a build image for.
fn tool_versions(
    recipe: &BasesRecipe,
    packages: &Packages,
) -> Result<BTreeMap<String, String>, BakeError> {
    let mut tools = BTreeMap::new();
    for tool in &recipe.build.npm {
        tools.insert(tool.name.clone(), tool.version.clone());
    }
    for runtime in &recipe.runtimes {
        let of_runtime = [(&runtime.name, &runtime.version_package)];
        for (tool, package) in of_runtime.into_iter().chain(&runtime.tools) {
            tools.insert(
                tool.clone(),
                upstream_version(&packages.get(package)?.id.version).to_owned(),
            );
        }
    }
    Ok(tools)
}

/// `1:20.19.2+dfsg-1` as `20.19.2`.
fn upstream_version(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let end = version
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(version.len());
    version[..end].trim_end_matches('.')
}

fn describe(
    recipe: &BasesRecipe,
    runtime: &RuntimeRecipe,
    packages: &Packages,
    tools: &BTreeMap<String, String>,
    build_layers: Vec<LayerBlob>,
    run_layers: Vec<LayerBlob>,
) -> Result<BakedBase, BakeError> {
    let exact = upstream_version(&packages.get(&runtime.version_package)?.id.version);
    let line: Vec<_> = exact.split('.').take(runtime.version_parts).collect();
    let version = line.join(".");
    let id = recipe.user.id;
    let annotations = vec![
        (
            "org.opencontainers.image.title".to_owned(),
            runtime.name.clone(),
        ),
        (
            "org.opencontainers.image.version".to_owned(),
            exact.to_owned(),
        ),
    ];
    let env: Vec<_> = recipe
        .common
        .env
        .iter()
        .chain(&runtime.env)
        .cloned()
        .collect();
    let run = ImageSettings {
        env: env.clone(),
        user: format!("{id}:{id}"),
        directory: recipe.user.directory.clone(),
        annotations: annotations.clone(),
    };
    let build = ImageSettings {
        env: env.iter().chain(&recipe.build.env).cloned().collect(),
        user: String::new(),
        directory: String::new(),
        annotations,
    };
    let alias = |alias: &String| alias.replace("{version}", &version);
    Ok(BakedBase {
        name: runtime.name.clone(),
        aliases: runtime.aliases.iter().map(alias).collect(),
        tools: tools.clone(),
        build: make_image(&format!("{version}-build"), build_layers, &build),
        run: make_image(&format!("{version}-run"), run_layers, &run),
        run_packages: Vec::new(),
        version,
    })
}

#[cfg(test)]
mod tests;
