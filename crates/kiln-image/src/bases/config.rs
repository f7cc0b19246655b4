//! The types, and what a name in `FROM` resolves to.

use std::collections::BTreeMap;

use kiln_core::ImageRef;
use serde::{Deserialize, Serialize};

use super::pulled::is_own;

/// Where kiln's own bases live, as machines see it.
pub const SHARED_PREFIX: &str = "registry.kiln.internal/shared";

/// Which of the two images of a runtime.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseKind {
    /// Package manager, compilers, headers.
    Build,
    /// The runtime and what it needs to run, nothing else.
    Run,
}

/// One version of a runtime: a build image and a slim run image.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Runtime: `node`, `python`.
    pub name: String,
    /// Version line people choose: `20` (Node), `3.13` (Python).
    pub version: String,
    /// The build image.
    pub build: ImageRef,
    /// The run image.
    pub run: ImageRef,
    /// Other names that mean the build image when a Dockerfile uses them (`node:20`, `python:3.13-slim`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Exact versions of what is inside, where known: the runtime itself and the tools of the build image
    /// (`node` = `20.19.2`, `pnpm` = `10.34.9`). A tool named here is not installed again by a build.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tools: BTreeMap<String, String>,
}

impl Base {
    /// One of its two images.
    #[must_use]
    pub fn image(&self, kind: BaseKind) -> &ImageRef {
        match kind {
            BaseKind::Build => &self.build,
            BaseKind::Run => &self.run,
        }
    }

    /// Exact version of the runtime, where known.
    #[must_use]
    pub fn exact_version(&self) -> Option<&str> {
        self.tools.get(&self.name).map(String::as_str)
    }
}

/// Any other image that a Dockerfile may name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedImage {
    /// The name in `FROM` (`debian:trixie-slim`).
    pub name: String,
    /// What it means: an image by digest.
    #[serde(rename = "ref")]
    pub reference: ImageRef,
    /// Where it lies in kiln's own registry, when it is another registry's and was pulled.
    #[serde(skip)]
    pub pulled: Option<ImageRef>,
}

impl PinnedImage {
    /// The image that builds stand on, or, not pulled yet, the one of another registry.
    #[must_use]
    pub fn image(&self) -> &ImageRef {
        self.pulled.as_ref().unwrap_or(&self.reference)
    }
}

/// All bases of this host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bases {
    /// Version of the file format.
    #[serde(default = "Bases::schema")]
    pub schema: u32,
    /// Runtimes.
    #[serde(default, rename = "base", skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<Base>,
    /// Other images.
    #[serde(default, rename = "image", skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<PinnedImage>,
}

impl Default for Bases {
    fn default() -> Self {
        Self {
            schema: Self::SCHEMA,
            bases: Vec::new(),
            images: Vec::new(),
        }
    }
}

impl Bases {
    /// The file format this version writes.
    pub const SCHEMA: u32 = 1;

    fn schema() -> u32 {
        Self::SCHEMA
    }

    /// What kiln bakes from Debian 13, before it is baked: names without digests. Planning works with these,
    /// building does not.
    #[must_use]
    pub fn builtin() -> Self {
        let node = [
            "node:20",
            "node:20-slim",
            "node:20-trixie",
            "node:20-trixie-slim",
        ];
        let python = [
            "python:3.13",
            "python:3.13-slim",
            "python:3.13-trixie",
            "python:3.13-slim-trixie",
        ];
        let base = |name: &str, version: &str, aliases: &[&str]| {
            let image = |kind: &str| ImageRef {
                registry: Some("registry.kiln.internal".to_owned()),
                repository: format!("shared/{name}"),
                tag: Some(format!("{version}-{kind}")),
                digest: None,
            };
            Base {
                name: name.to_owned(),
                version: version.to_owned(),
                build: image("build"),
                run: image("run"),
                aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
                tools: BTreeMap::new(),
            }
        };
        Self {
            schema: Self::SCHEMA,
            bases: vec![base("node", "20", &node), base("python", "3.13", &python)],
            images: Vec::new(),
        }
    }

    /// Puts `over` on top: same runtime and version, or same image name, replaces; aliases and names that `over`
    /// defines are taken away from what is below.
    pub fn merge(&mut self, over: Self) {
        for base in over.bases {
            let same = |old: &Base| old.name == base.name && old.version == base.version;
            for old in self.bases.iter_mut().filter(|old| !same(old)) {
                old.aliases.retain(|alias| !base.aliases.contains(alias));
            }
            match self.bases.iter_mut().find(|old| same(old)) {
                Some(old) => *old = base,
                None => self.bases.push(base),
            }
        }
        for image in over.images {
            match self.images.iter_mut().find(|old| old.name == image.name) {
                Some(old) => *old = image,
                None => self.images.push(image),
            }
        }
    }

    /// The bases of a runtime, in the order of the files.
    pub fn of_runtime<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Base> + 'a {
        self.bases.iter().filter(move |base| base.name == name)
    }

    /// What a name in `FROM` means. `None` when nothing names it, or when what names it is not in kiln's own registry yet.
    #[must_use]
    pub fn resolve_from(&self, name: &str) -> Option<ImageRef> {
        let found = self.find(name)?;
        is_own(found).then(|| found.clone())
    }

    /// The run base of the runtime whose build base a public name means.
    #[must_use]
    pub fn run_of_alias(&self, name: &str) -> Option<ImageRef> {
        let wanted = familiar(name);
        if self
            .images
            .iter()
            .any(|image| familiar(&image.name) == wanted)
        {
            return None;
        }
        let mut bases = self.bases.iter();
        let base = bases.find(|base| base.aliases.iter().any(|alias| familiar(alias) == wanted))?;
        base.run.digest.is_some().then(|| base.run.clone())
    }

    fn find(&self, name: &str) -> Option<&ImageRef> {
        let wanted = familiar(name);
        let image = self.images.iter().find(|i| familiar(&i.name) == wanted);
        if let Some(image) = image {
            return Some(image.image());
        }
        if let Some(base) = self
            .bases
            .iter()
            .find(|base| base.aliases.iter().any(|alias| familiar(alias) == wanted))
        {
            return Some(&base.build);
        }
        let mut own = self.bases.iter().flat_map(|base| [&base.build, &base.run]);
        own.find(|reference| means(reference, &wanted)).or_else(|| {
            let named = |image: &&PinnedImage| {
                means(&image.reference, &wanted) || means(image.image(), &wanted)
            };
            self.images.iter().find(named).map(PinnedImage::image)
        })
    }

    /// The command that would make a name known, or that gives a known one its digest.
    #[must_use]
    pub fn line_to_add(&self, name: &str) -> String {
        match self.find(name) {
            // One of kiln's own, without a digest: not made yet.
            Some(image) if image.digest.is_none() => "kiln bases bake".to_owned(),
            Some(_) => "kiln bases pull".to_owned(),
            None => format!("kiln bases add {name} && kiln bases pull"),
        }
    }
}

/// Whether a text names this image: by digest alone when it has one, because a digest is the content; else by place
/// and tag.
fn means(reference: &ImageRef, wanted: &str) -> bool {
    let Ok(wanted) = wanted.parse::<ImageRef>() else {
        return false;
    };
    match (&wanted.digest, &wanted.tag) {
        (Some(digest), _) => reference.digest.as_ref() == Some(digest),
        (None, tag) => {
            wanted.registry == reference.registry
                && wanted.repository == reference.repository
                && tag.is_some()
                && *tag == reference.tag
        }
    }
}

/// The short form of a name, so that `docker.io/library/node:20`, `library/node:20` and `node:20` are one.
fn familiar(name: &str) -> String {
    let short = name
        .strip_prefix("docker.io/")
        .or_else(|| name.strip_prefix("index.docker.io/"))
        .unwrap_or(name);
    let short = short.strip_prefix("library/").unwrap_or(short);
    let last = short.rsplit('/').next().unwrap_or(short);
    match last.contains([':', '@']) {
        true => short.to_owned(),
        false => format!("{short}:latest"),
    }
}
