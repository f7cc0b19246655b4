//! Recipes as data: what goes into the machine image and into the runtime bases.
//!
//! The files live in `machine-image/` and are built into the program, so that an installed kiln can bake without a
//! checkout; a directory of the operator's own replaces them as a whole.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_core::Digest;
use serde::Deserialize;

use super::stage::StageKey;

/// Version of the recipe format.
pub const SCHEMA: u32 = 1;
/// Largest recipe file that is read.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Recipe of the machine image.
const IMAGE_FILE: &str = "recipe.toml";
/// Recipe of the runtime bases.
const BASES_FILE: &str = "runtimes.toml";

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// A file is missing or cannot be read.
    #[error("cannot read the recipe file {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not a recipe.
    #[error("{file} is not a recipe")]
    Parse {
        /// The file.
        file: &'static str,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("{file}: {what}")]
    Value {
        /// The file.
        file: &'static str,
        /// What is wrong.
        what: String,
    },
}

/// The files of a recipe directory, by path below it.
#[derive(Clone, Debug)]
pub struct RecipeFiles(BTreeMap<String, Vec<u8>>);

impl RecipeFiles {
    /// The recipe that was built into this program.
    #[must_use]
    pub fn built_in() -> Self {
        let files: [(&str, &[u8]); 5] = [
            (
                IMAGE_FILE,
                include_bytes!("../../../../machine-image/recipe.toml"),
            ),
            (
                BASES_FILE,
                include_bytes!("../../../../machine-image/runtimes.toml"),
            ),
            (
                "buildkit/go.mod",
                include_bytes!("../../../../machine-image/buildkit/go.mod"),
            ),
            (
                "buildkit/go.sum",
                include_bytes!("../../../../machine-image/buildkit/go.sum"),
            ),
            (
                "buildkit/kiln-solve/main.go",
                include_bytes!("../../../../machine-image/buildkit/kiln-solve/main.go"),
            ),
        ];
        Self(
            files
                .into_iter()
                .map(|(name, bytes)| (name.to_owned(), bytes.to_vec()))
                .collect(),
        )
    }

    /// Reads a directory of the operator's own: the same files at the same places.
    ///
    /// # Errors
    /// When one is missing, too large or unreadable.
    pub fn from_directory(directory: &Path) -> Result<Self, RecipeError> {
        let mut files = BTreeMap::new();
        let image_text = read(directory, IMAGE_FILE)?;
        let image: ImageRecipe = parse(IMAGE_FILE, &image_text)?;
        image.buildkit.check().map_err(|what| RecipeError::Value {
            file: IMAGE_FILE,
            what,
        })?;
        let names = image.buildkit.files().map(|file| image.buildkit.path(file));
        for name in names.chain([BASES_FILE.to_owned()]) {
            files.insert(name.clone(), read(directory, &name)?);
        }
        files.insert(IMAGE_FILE.to_owned(), image_text);
        Ok(Self(files))
    }

    /// Content of one file.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<&[u8], RecipeError> {
        let bytes = self.0.get(name).map(Vec::as_slice);
        bytes.ok_or_else(|| RecipeError::Read {
            path: name.into(),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    /// Digest over the files that decide what the machine image is.
    ///
    /// # Errors
    /// When the recipe is not one.
    pub fn image_digest(&self) -> Result<Digest, RecipeError> {
        let buildkit = self.image()?.buildkit;
        let mut key = StageKey::new(SCHEMA).with(IMAGE_FILE, self.get(IMAGE_FILE)?);
        for file in buildkit.files() {
            let name = buildkit.path(file);
            key = key.with(&name, self.get(&name)?);
        }
        Ok(key.digest())
    }

    /// Digest over the file that decides what the runtime bases are.
    ///
    /// # Errors
    /// When it is missing.
    pub fn bases_digest(&self) -> Result<Digest, RecipeError> {
        Ok(Digest::of(self.get(BASES_FILE)?))
    }

    /// The recipe of the machine image.
    ///
    /// # Errors
    /// When it is not one.
    pub fn image(&self) -> Result<ImageRecipe, RecipeError> {
        let recipe: ImageRecipe = parse(IMAGE_FILE, self.get(IMAGE_FILE)?)?;
        recipe.check().map_err(|what| RecipeError::Value {
            file: IMAGE_FILE,
            what,
        })?;
        Ok(recipe)
    }

    /// The recipe of the runtime bases.
    ///
    /// # Errors
    /// When it is not one.
    pub fn bases(&self) -> Result<BasesRecipe, RecipeError> {
        let recipe: BasesRecipe = parse(BASES_FILE, self.get(BASES_FILE)?)?;
        recipe.check().map_err(|what| RecipeError::Value {
            file: BASES_FILE,
            what,
        })?;
        Ok(recipe)
    }
}

fn read(directory: &Path, name: &str) -> Result<Vec<u8>, RecipeError> {
    let path = directory.join(name);
    let fail = |source| RecipeError::Read {
        path: path.clone(),
        source,
    };
    if fs::metadata(&path).map_err(fail)?.len() > FILE_BYTES_MAX {
        return Err(fail(io::Error::other("larger than 4 MiB")));
    }
    fs::read(&path).map_err(fail)
}

fn parse<T: for<'de> Deserialize<'de>>(file: &'static str, bytes: &[u8]) -> Result<T, RecipeError> {
    toml::from_str(&String::from_utf8_lossy(bytes)).map_err(|source| RecipeError::Parse {
        file,
        source: Box::new(source),
    })
}

/// `recipe.toml`: what every machine boots.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRecipe {
    /// Version of the format.
    pub schema: u32,
    /// First part of the image's name.
    pub name: String,
    /// Debian release.
    pub suite: String,
    /// Debian architecture.
    pub architecture: String,
    /// The root disk.
    pub root: RootRecipe,
    /// Kernel and modules.
    pub kernel: KernelRecipe,
    /// BuildKit.
    pub buildkit: BuildkitRecipe,
}

/// `[root]` of `recipe.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootRecipe {
    /// Packages besides the essential ones.
    pub packages: Vec<String>,
    /// Patterns of paths left out.
    pub exclude: Vec<String>,
    /// Patterns of paths kept although excluded.
    pub keep: Vec<String>,
    /// Directories made empty.
    pub directories: Vec<String>,
    /// Small files of our own.
    #[serde(default, rename = "file")]
    pub files: Vec<FileRecipe>,
}

/// A small file of our own.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecipe {
    /// Path without leading slash.
    pub path: String,
    /// Text of the file; mode 0644, owned by root.
    #[serde(default)]
    pub content: String,
    /// Mode 0755 instead.
    #[serde(default)]
    pub executable: bool,
    /// A symbolic link to this instead of a file.
    #[serde(default)]
    pub link: Option<String>,
}

impl FileRecipe {
    /// As it stands in the tree.
    pub(super) fn node(&self) -> super::tree::Node {
        let text = super::tree::Node::text(&self.content);
        match (&self.link, self.executable) {
            (Some(target), _) => super::tree::Node::symlink(target),
            (None, true) => super::tree::Node {
                mode: 0o755,
                ..text
            },
            (None, false) => text,
        }
    }
}

/// `[kernel]` of `recipe.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelRecipe {
    /// Metapackage that depends on the kernel of the day.
    pub package: String,
    /// Modules loaded first in every machine.
    pub modules: Vec<String>,
}

/// `[buildkit]` of `recipe.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildkitRecipe {
    /// Directory with go.mod and go.sum.
    pub module: String,
    /// Files of that directory with programs of our own, which are part of the module.
    #[serde(default)]
    pub sources: Vec<String>,
    /// Go packages built into programs.
    pub packages: Vec<String>,
    /// Directory of the root disk they go to.
    pub directory: String,
}

impl BuildkitRecipe {
    /// Every file of the module, by its path below the module's directory.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        ["go.mod", "go.sum"]
            .into_iter()
            .chain(self.sources.iter().map(String::as_str))
    }

    /// Where a file of the module lies below the recipe's directory.
    #[must_use]
    pub fn path(&self, file: &str) -> String {
        format!("{}/{file}", self.module)
    }

    fn check(&self) -> Result<(), String> {
        check_word("module", &self.module)?;
        let plain = |path: &String| {
            path.ends_with(".go")
                && path
                    .split('/')
                    .all(|part| !part.is_empty() && !part.starts_with('.'))
        };
        match self.sources.iter().find(|path| !plain(path)) {
            Some(path) => Err(format!(
                "sources: {path:?} is not a Go file below the module's directory"
            )),
            None => Ok(()),
        }
    }
}

impl ImageRecipe {
    fn check(&self) -> Result<(), String> {
        check_head(self.schema, &self.suite, &self.architecture)?;
        check_word("name", &self.name)?;
        self.buildkit.check()?;
        let packages = self.root.packages.iter().chain([&self.kernel.package]);
        packages
            .chain(&self.kernel.modules)
            .try_for_each(|name| check_word("package or module", name))?;
        let files = self.root.files.iter().map(|file| &file.path);
        files
            .chain(&self.root.directories)
            .chain([&self.buildkit.directory])
            .try_for_each(check_path)
    }
}

/// `runtimes.toml`: the images builds stand on.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BasesRecipe {
    /// Version of the format.
    pub schema: u32,
    /// Debian release.
    pub suite: String,
    /// Debian architecture.
    pub architecture: String,
    /// Patterns left out of every layer.
    pub exclude: Vec<String>,
    /// Patterns kept although excluded.
    pub keep: Vec<String>,
    /// The user that run images run as.
    pub user: UserRecipe,
    /// The layer under everything.
    pub common: CommonRecipe,
    /// What build images have besides the runtimes.
    pub build: BuildRecipe,
    /// The runtimes.
    #[serde(rename = "runtime")]
    pub runtimes: Vec<RuntimeRecipe>,
}

/// `[user]` of `runtimes.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserRecipe {
    /// Name of user and group.
    pub name: String,
    /// Other names of the same user and group: those that Dockerfiles written for public images use.
    #[serde(default)]
    pub also: Vec<String>,
    /// Number of user and group.
    pub id: u32,
    /// Working directory of run images, owned by the user.
    pub directory: String,
}

impl UserRecipe {
    /// All its names, the first one first.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        [&self.name].into_iter().chain(&self.also)
    }

    /// The lines that make it known, by the file they belong to.
    pub(super) fn accounts(&self) -> [(&'static str, String); 4] {
        let (id, home) = (self.id, &self.name);
        let each = |line: &dyn Fn(&String) -> String| self.names().map(line).collect::<String>();
        [
            (
                "etc/passwd",
                each(&|name| format!("{name}:x:{id}:{id}::/home/{home}:/bin/sh\n")),
            ),
            ("etc/group", each(&|name| format!("{name}:x:{id}:\n"))),
            ("etc/shadow", each(&|name| format!("{name}:!::::::\n"))),
            ("etc/gshadow", each(&|name| format!("{name}:!::\n"))),
        ]
    }
}

/// `[common]` of `runtimes.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommonRecipe {
    /// Packages, taken with everything they need.
    pub packages: Vec<String>,
    /// Packages that no run image has, not even when something needs them.
    pub without: Vec<String>,
    /// Patterns of files that belong to no chosen package but are needed (generated ones).
    pub extra: Vec<String>,
    /// Patterns of files of chosen packages that a run image does without.
    pub exclude: Vec<String>,
    /// Environment of every image, `NAME=value`.
    pub env: Vec<String>,
}

/// `[build]` of `runtimes.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildRecipe {
    /// Packages of the build images.
    pub packages: Vec<String>,
    /// Environment of build images, besides the common one.
    pub env: Vec<String>,
    /// Small files of our own.
    #[serde(default, rename = "file")]
    pub files: Vec<FileRecipe>,
    /// Programs from the npm registry.
    #[serde(default)]
    pub npm: Vec<NpmRecipe>,
}

/// `[[build.npm]]`: a program that comes as one tarball without dependencies.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NpmRecipe {
    /// Package.
    pub name: String,
    /// Exact version.
    pub version: String,
    /// What the registry calls `integrity`: `sha512-<base64>` of the tarball.
    pub integrity: String,
}

/// `[[runtime]]` of `runtimes.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeRecipe {
    /// `node`, `python`.
    pub name: String,
    /// Package whose version is the runtime's version.
    pub version_package: String,
    /// How many numbers of it people choose by: 1 for `20`, 2 for `3.13`.
    pub version_parts: usize,
    /// Packages of the run image, taken with everything they need.
    pub packages: Vec<String>,
    /// Packages only build images have.
    pub build_packages: Vec<String>,
    /// Patterns of files of chosen packages that the run image does without.
    pub exclude: Vec<String>,
    /// Patterns of generated files that the run image needs.
    pub extra: Vec<String>,
    /// Directories of byte code to compile, so that a start does not.
    #[serde(default)]
    pub byte_compile: Vec<String>,
    /// Environment of both images, besides the common one.
    pub env: Vec<String>,
    /// Names in a Dockerfile's FROM that mean the build image; `{version}` stands for the version line.
    pub aliases: Vec<String>,
    /// Tools of the build image whose Debian packages tell their version: tool to package.
    #[serde(default)]
    pub tools: BTreeMap<String, String>,
}

impl BasesRecipe {
    fn check(&self) -> Result<(), String> {
        check_head(self.schema, &self.suite, &self.architecture)?;
        let mut names = self.user.names();
        names.try_for_each(|name| check_word("user", name))?;
        if self.user.id < 1000 {
            return Err("the user's id must be 1000 or more".to_owned());
        }
        let runtimes = self.runtimes.iter();
        let lists =
            runtimes.flat_map(|r| r.packages.iter().chain(&r.build_packages).chain([&r.name]));
        let all = lists
            .chain(&self.common.packages)
            .chain(&self.build.packages);
        all.chain(self.build.npm.iter().map(|tool| &tool.name))
            .try_for_each(|name| check_word("package", name))?;
        let files = self.build.files.iter().map(|file| &file.path);
        files.chain([&self.user.directory]).try_for_each(check_path)
    }

    /// Every Debian package that must be in the root the images are made from.
    #[must_use]
    pub fn packages(&self) -> Vec<String> {
        let runtimes = self.runtimes.iter();
        let lists =
            runtimes.flat_map(|runtime| runtime.packages.iter().chain(&runtime.build_packages));
        let mut all: Vec<_> = lists
            .chain(&self.common.packages)
            .chain(&self.build.packages)
            .cloned()
            .collect();
        all.sort();
        all.dedup();
        all
    }
}

fn check_head(schema: u32, suite: &str, architecture: &str) -> Result<(), String> {
    if schema != SCHEMA {
        return Err(format!(
            "schema {schema} is not known; this kiln knows {SCHEMA}"
        ));
    }
    if architecture != "amd64" {
        return Err(format!(
            "architecture {architecture:?} is not supported; only amd64 is"
        ));
    }
    check_word("suite", suite)
}

/// Words become arguments and file names: nothing that could be an option, a path or shell.
fn check_word(what: &str, word: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"+-._".contains(&b);
    let starts_well = word
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    match starts_well && word.len() <= 80 && word.bytes().all(legal) {
        true => Ok(()),
        false => Err(format!("{what} {word:?}: use letters, digits and + - . _")),
    }
}

fn check_path(path: &String) -> Result<(), String> {
    let bad = path.is_empty() || path.split('/').any(|part| matches!(part, "" | "." | ".."));
    match bad {
        true => Err(format!(
            "path {path:?} must be relative, without `.` and `..`"
        )),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_recipes_are_valid() {
        let files = RecipeFiles::built_in();
        let image = files.image().expect("a recipe");
        assert!(image.root.packages.contains(&"runc".to_owned()));
        let bases = files.bases().expect("a recipe");
        let names: Vec<_> = bases
            .runtimes
            .iter()
            .map(|runtime| runtime.name.as_str())
            .collect();
        assert_eq!(names, ["node", "python"]);
    }

    #[test]
    fn a_directory_of_files_gives_the_same_digest_as_the_built_in_ones() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let built_in = RecipeFiles::built_in();
        for (name, bytes) in &built_in.0 {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("a directory")).expect("writable");
            fs::write(path, bytes).expect("writable");
        }
        let read = RecipeFiles::from_directory(dir.path()).expect("readable");
        let digest = |files: &RecipeFiles| files.image_digest().expect("a recipe");
        assert_eq!(digest(&read), digest(&built_in));
        fs::write(dir.path().join("buildkit/go.sum"), "").expect("writable");
        let changed = RecipeFiles::from_directory(dir.path()).expect("readable");
        assert_ne!(digest(&changed), digest(&built_in));
        fs::write(
            dir.path().join("buildkit/go.sum"),
            built_in.get("buildkit/go.sum").expect("there"),
        )
        .expect("writable");
        fs::write(
            dir.path().join("buildkit/kiln-solve/main.go"),
            "package main",
        )
        .expect("writable");
        let changed = RecipeFiles::from_directory(dir.path()).expect("readable");
        assert_ne!(
            digest(&changed),
            digest(&built_in),
            "our own source decides too"
        );
    }

    #[test]
    fn unknown_fields_and_dangerous_words_are_refused() {
        let text = String::from_utf8_lossy(RecipeFiles::built_in().get(IMAGE_FILE).expect("there"))
            .into_owned();
        let with = |from: &str, to: &str| {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from} is in the recipe");
            RecipeFiles([(IMAGE_FILE.to_owned(), changed.into_bytes())].into()).image()
        };
        assert!(matches!(
            with("[kernel]", "[kernel]\nextra = 1"),
            Err(RecipeError::Parse { .. })
        ));
        assert!(matches!(
            with("\"git\"", "\"-git\""),
            Err(RecipeError::Value { .. })
        ));
        assert!(matches!(
            with("\"work\"", "\"../work\""),
            Err(RecipeError::Value { .. })
        ));
        assert!(matches!(
            with("schema = 1", "schema = 2"),
            Err(RecipeError::Value { .. })
        ));
    }
}
