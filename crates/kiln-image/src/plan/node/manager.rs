//! Which package manager, in which version, and its commands.

use super::manifest::{FILE, Manifest};
use crate::bases::Base;
use crate::plan::PlanError;
use crate::plan::detect::Request;
use crate::plan::types::Evidence;
use crate::plan::write::cache;

/// The package managers of Node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Npm,
    Pnpm,
    /// Yarn 1, "classic".
    Yarn1,
    /// Yarn 2 and later.
    Berry,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Npm => "npm",
            Self::Pnpm => "pnpm",
            Self::Yarn1 | Self::Berry => "yarn",
        }
    }

    fn how_to_lock(self) -> &'static str {
        match self {
            Self::Npm => "run `npm install --package-lock-only` and keep package-lock.json",
            Self::Pnpm => "run `pnpm install --lockfile-only` and keep pnpm-lock.yaml",
            Self::Yarn1 | Self::Berry => "run `yarn install` and keep yarn.lock",
        }
    }
}

/// Versions for lockfiles of folders that name none, by lockfile format: (format, version).
const PNPM_DEFAULTS: [(&str, &str); 3] = [("9", "10.34.9"), ("6", "8.15.9"), ("5.4", "7.33.7")];
const BERRY_DEFAULTS: [(u32, &str); 3] = [(8, "4.18.1"), (6, "3.8.7"), (4, "2.4.2")];
const YARN1_DEFAULT: &str = "1.22.22";

/// A package manager as this folder uses it.
#[derive(Clone, Debug)]
pub(super) struct Manager {
    pub(super) kind: Kind,
    /// Exact version, where it matters.
    pub(super) version: Option<String>,
    /// Path of the lockfile; `None` when there is nothing to install.
    pub(super) lockfile: Option<&'static str>,
    pub(super) why: Evidence,
    /// `.yarn/releases/yarn-….cjs` kept in the folder.
    release: Option<String>,
    /// Command that puts it on the PATH of the build stage; `None` when the base has it.
    pub(super) setup: Option<String>,
    /// `yarn workspaces focus` exists (Yarn 4, or 2 and 3 with the plugin).
    focuses: bool,
}

/// `packageManager` of package.json: `pnpm@9.15.4+sha512.abc…`.
struct Declared {
    kind: Kind,
    version: String,
    hash: Option<(String, String)>,
}

impl Manager {
    pub(super) fn find(
        request: &Request<'_>,
        manifest: &Manifest,
        base: &Base,
        members: &[String],
        notes: &mut Vec<Evidence>,
    ) -> Result<Self, PlanError> {
        let declared = declared(manifest)?;
        let locks = lockfiles(request)?;
        let (kind, lockfile) = pick(request, manifest, declared.as_ref(), &locks, notes)?;
        let why = match (lockfile, &declared) {
            (Some(lock), _) => {
                Evidence::at(format!("{} freezes the dependencies", lock), lock, None)
            }
            (None, Some(declared)) => Evidence::at(
                format!("packageManager: {}", declared.kind.name()),
                FILE,
                manifest.line(&["packageManager"]),
            ),
            (None, None) => Evidence::at("no dependencies", FILE, None),
        };
        if lockfile.is_none() && (manifest.has_dependencies() || !members.is_empty()) {
            return Err(PlanError::NoLockfile {
                manifest: FILE.to_owned(),
                hint: kind.how_to_lock().to_owned(),
            });
        }
        let mut manager = Self {
            kind,
            version: None,
            lockfile,
            why,
            release: None,
            setup: None,
            focuses: true,
        };
        if lockfile.is_some() {
            manager.version(request, base, declared)?;
        }
        Ok(manager)
    }

    fn version(
        &mut self,
        request: &Request<'_>,
        base: &Base,
        declared: Option<Declared>,
    ) -> Result<(), PlanError> {
        let in_base = base.tools.get(self.kind.name());
        let (version, hash) = match declared {
            Some(declared) => (Some(declared.version), declared.hash),
            None => (None, None),
        };
        match self.kind {
            // Every npm reads every package-lock.json the same way: the base's own is taken.
            Kind::Npm => return Ok(()),
            Kind::Pnpm => {
                let line = pnpm_default(request)?;
                let same_line = |v: &&String| v.split('.').next() == line.split('.').next();
                let fallback = in_base.filter(same_line).map_or(line, String::as_str);
                self.version = Some(version.unwrap_or_else(|| fallback.to_owned()));
            }
            Kind::Yarn1 => {
                let fallback = in_base.filter(|v| v.starts_with("1."));
                let fallback = fallback.map_or(YARN1_DEFAULT, String::as_str);
                self.version = Some(version.unwrap_or_else(|| fallback.to_owned()));
            }
            Kind::Berry => {
                let settings = request.folder.read(".yarnrc.yml")?.unwrap_or_default();
                self.release = yarn_path(request, &settings)?;
                self.version = Some(match version {
                    Some(version) => version,
                    None => berry_default(request)?.to_owned(),
                });
                let major = self.major();
                self.focuses = major >= 4 || settings.contains("plugin-workspace-tools");
                if !self.focuses {
                    return Err(PlanError::Unsupported {
                        file: ".yarnrc.yml".to_owned(),
                        line: None,
                        what: format!("Yarn {major} cannot leave out development dependencies"),
                        hint: "run `yarn plugin import workspace-tools`, or move to Yarn 4: yarn set version stable"
                            .to_owned(),
                    });
                }
            }
        }
        let version = self.version.clone().unwrap_or_default();
        if self.release.is_none() && in_base != Some(&version) {
            self.setup = Some(setup(self.kind, &version, hash.as_ref()));
        }
        Ok(())
    }

    fn major(&self) -> u32 {
        let version = self.version.as_deref().unwrap_or_default();
        version
            .split('.')
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    }

    /// For people: `pnpm 9.15.4`.
    pub(super) fn describe(&self) -> String {
        match &self.version {
            Some(version) => format!("{} {version}", self.kind.name()),
            None => self.kind.name().to_owned(),
        }
    }

    /// How it is called.
    fn program(&self) -> String {
        match &self.release {
            Some(release) => format!("node {release}"),
            None => self.kind.name().to_owned(),
        }
    }

    /// Runs a script of package.json.
    pub(super) fn run_script(&self, name: &str) -> String {
        format!("{} run {name}", self.program())
    }

    /// Installs from the lockfile, with or without development dependencies.
    pub(super) fn install(&self, production: bool) -> String {
        let extra = match (self.kind, production) {
            (_, false) => "",
            (Kind::Npm, true) => " --omit=dev",
            (Kind::Pnpm, true) => " --prod",
            (Kind::Yarn1, true) => " --production=true",
            (Kind::Berry, true) => "",
        };
        let program = self.program();
        let install = match self.kind {
            Kind::Npm => "npm ci --no-audit --no-fund".to_owned(),
            Kind::Pnpm => format!("pnpm install --frozen-lockfile --store-dir={PNPM_STORE}"),
            Kind::Yarn1 => format!(
                "yarn install --frozen-lockfile --non-interactive --cache-folder={YARN1_CACHE}"
            ),
            Kind::Berry => format!("{program} install --immutable"),
        };
        install + extra
    }

    /// Takes development dependencies away again, without the network and without any script.
    pub(super) fn prune(&self) -> String {
        match self.kind {
            Kind::Npm => "npm prune --omit=dev --ignore-scripts --no-audit --no-fund".to_owned(),
            // `pnpm prune` knows no workspaces; without an age of 0, what is left over stays for a week.
            Kind::Pnpm => format!(
                "CI=true npm_config_modules_cache_max_age=0 pnpm install --prod --frozen-lockfile --offline --ignore-scripts --store-dir={PNPM_STORE}"
            ),
            Kind::Yarn1 => format!(
                "yarn install --production=true --frozen-lockfile --offline --ignore-scripts --non-interactive --cache-folder={YARN1_CACHE}"
            ),
            Kind::Berry => format!("{} workspaces focus --all --production", self.program()),
        }
    }

    /// Whether pruning leaves what native modules have compiled. Yarn 1 may not: it installs a second time.
    pub(super) fn prunes_well(&self) -> bool {
        self.kind != Kind::Yarn1
    }

    /// Whether production dependencies can be made in a stage that has no source.
    pub(super) fn installs_apart(&self) -> bool {
        self.kind != Kind::Berry
    }

    /// Its cache, as a mount.
    pub(super) fn cache(&self) -> String {
        match self.kind {
            Kind::Npm => npm_cache(),
            Kind::Pnpm => cache("pnpm", PNPM_STORE),
            // Two installs at a time break each other's cache.
            Kind::Yarn1 => cache("yarn1", YARN1_CACHE) + ",sharing=locked",
            Kind::Berry => cache("yarn", "/root/.yarn/berry"),
        }
    }

    /// Environment of the install and build stages.
    pub(super) fn environment(&self) -> Vec<(&'static str, &'static str)> {
        match self.kind {
            Kind::Berry => vec![
                ("YARN_ENABLE_GLOBAL_CACHE", "true"),
                ("YARN_ENABLE_TELEMETRY", "0"),
                ("YARN_GLOBAL_FOLDER", "/root/.yarn/berry"),
                // Plain node_modules, so that the image needs no Yarn to start.
                ("YARN_NODE_LINKER", "node-modules"),
            ],
            // The version is the right one: it must not fetch another.
            Kind::Pnpm => vec![("npm_config_manage_package_manager_versions", "false")],
            _ => Vec::new(),
        }
    }

    /// Files and folders of the root that the install step reads.
    pub(super) fn inputs(&self, request: &Request<'_>) -> Result<Vec<String>, PlanError> {
        let mut inputs = vec![FILE.to_owned()];
        inputs.extend(self.lockfile.map(str::to_owned));
        let (files, folders): (&[&str], &[&str]) = match self.kind {
            Kind::Npm => (&[".npmrc"], &["patches"]),
            Kind::Pnpm => (
                &[".npmrc", "pnpm-workspace.yaml", ".pnpmfile.cjs"],
                &["patches"],
            ),
            Kind::Yarn1 => (&[".npmrc", ".yarnrc"], &["patches"]),
            Kind::Berry => (
                &[".yarnrc.yml"],
                &[
                    ".yarn/releases",
                    ".yarn/plugins",
                    ".yarn/patches",
                    ".yarn/cache",
                ],
            ),
        };
        let files = files.iter().filter(|file| request.has(file));
        inputs.extend(files.map(|file| (*file).to_owned()));
        let folders = folders.iter().filter(|f| request.folder.has_folder(f));
        inputs.extend(folders.map(|folder| format!("{folder}/")));
        Ok(inputs)
    }
}

const PNPM_STORE: &str = "/root/.local/share/pnpm/store";
const YARN1_CACHE: &str = "/root/.cache/yarn";

/// npm's own cache, which also serves the install of other package managers.
pub(super) fn npm_cache() -> String {
    cache("npm", "/root/.npm")
}

/// Lockfiles that are there: (file, whose).
fn lockfiles(request: &Request<'_>) -> Result<Vec<(&'static str, Kind)>, PlanError> {
    let mut found = Vec::new();
    if request.has("npm-shrinkwrap.json") {
        found.push(("npm-shrinkwrap.json", Kind::Npm));
    } else if request.has("package-lock.json") {
        found.push(("package-lock.json", Kind::Npm));
    }
    if request.has("pnpm-lock.yaml") {
        found.push(("pnpm-lock.yaml", Kind::Pnpm));
    }
    if request.has("yarn.lock") {
        let berry = lock_text(request, "yarn.lock")?.contains("__metadata:");
        found.push(("yarn.lock", if berry { Kind::Berry } else { Kind::Yarn1 }));
    }
    Ok(found)
}

/// The beginning of a lockfile, where its format stands.
fn lock_text(request: &Request<'_>, file: &str) -> Result<String, PlanError> {
    let max = crate::plan::folder::LOCKFILE_BYTES_MAX;
    let bytes = request.folder.bytes(file, max)?.unwrap_or_default();
    let start = &bytes[..bytes.len().min(4096)];
    Ok(String::from_utf8_lossy(start).into_owned())
}

fn declared(manifest: &Manifest) -> Result<Option<Declared>, PlanError> {
    let Some(text) = manifest.text("packageManager") else {
        return Ok(None);
    };
    let line = manifest.line(&["packageManager"]);
    let broken = || PlanError::Broken {
        file: FILE.to_owned(),
        line,
        what: format!("packageManager {text:?} is not of the form name@1.2.3"),
    };
    let (name, version) = text.split_once('@').ok_or_else(broken)?;
    let (version, hash) = match version.split_once('+') {
        Some((version, hash)) => (version, Some(hash)),
        None => (version, None),
    };
    if semver::Version::parse(version).is_err() {
        return Err(broken());
    }
    let kind = match name {
        "npm" => Kind::Npm,
        "pnpm" => Kind::Pnpm,
        "yarn" if version.starts_with("1.") || version.starts_with("0.") => Kind::Yarn1,
        "yarn" => Kind::Berry,
        other => {
            return Err(PlanError::Unsupported {
                file: FILE.to_owned(),
                line,
                what: format!("the package manager {other} is not supported"),
                hint: "use npm, pnpm or yarn, or write a Dockerfile".to_owned(),
            });
        }
    };
    let hash = match hash {
        None => None,
        Some(hash) => {
            let (algorithm, hex) = hash.split_once('.').ok_or_else(broken)?;
            let known = ["sha1", "sha224", "sha256", "sha384", "sha512"].contains(&algorithm);
            let legal = hex.len() <= 128 && hex.bytes().all(|b| b.is_ascii_hexdigit());
            if !known || !legal {
                return Err(broken());
            }
            Some((algorithm.to_owned(), hex.to_owned()))
        }
    };
    Ok(Some(Declared {
        kind,
        version: version.to_owned(),
        hash,
    }))
}

type Picked = (Kind, Option<&'static str>);

fn pick(
    request: &Request<'_>,
    manifest: &Manifest,
    declared: Option<&Declared>,
    locks: &[(&'static str, Kind)],
    notes: &mut Vec<Evidence>,
) -> Result<Picked, PlanError> {
    if let Some(declared) = declared {
        if let Some((file, kind)) = locks.iter().find(|(_, kind)| *kind == declared.kind) {
            for (other, _) in locks.iter().filter(|(other, _)| other != file) {
                let what = format!("not used: packageManager says {}", declared.kind.name());
                notes.push(Evidence::at(what, other, None));
            }
            return Ok((*kind, Some(file)));
        }
        if let Some((file, _)) = locks.first() {
            return Err(PlanError::Broken {
                file: FILE.to_owned(),
                line: manifest.line(&["packageManager"]),
                what: format!(
                    "packageManager says {} {}, but the lockfile is {file}",
                    declared.kind.name(),
                    declared.version
                ),
            });
        }
        return Ok((declared.kind, None));
    }
    match locks {
        [] => {
            if let Some(bun) = ["bun.lock", "bun.lockb"].into_iter().find(|f| request.has(f)) {
                return Err(PlanError::Unsupported {
                    file: bun.to_owned(),
                    line: None,
                    what: "Bun is not supported".to_owned(),
                    hint: Kind::Npm.how_to_lock().to_owned(),
                });
            }
            Ok((Kind::Npm, None))
        }
        [(file, kind)] => Ok((*kind, Some(file))),
        several => Err(PlanError::SeveralLockfiles {
            files: several.iter().map(|(file, _)| (*file).to_owned()).collect(),
            hint: "remove all but one, or name the package manager in package.json: \"packageManager\": \"npm@10.8.2\""
                .to_owned(),
        }),
    }
}

fn pnpm_default(request: &Request<'_>) -> Result<&'static str, PlanError> {
    let text = lock_text(request, "pnpm-lock.yaml")?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("lockfileVersion:"));
    let format = line.unwrap_or_default().trim().trim_matches(['\'', '"']);
    let found = PNPM_DEFAULTS
        .iter()
        .find(|(known, _)| format == *known || format.starts_with(&format!("{known}.")));
    match found {
        Some((_, version)) => Ok(version),
        None => Err(PlanError::Unsupported {
            file: "pnpm-lock.yaml".to_owned(),
            line: Some(1),
            what: format!("lockfileVersion {format:?} is not known"),
            hint: "name the version in package.json: \"packageManager\": \"pnpm@…\"".to_owned(),
        }),
    }
}

fn berry_default(request: &Request<'_>) -> Result<&'static str, PlanError> {
    let text = lock_text(request, "yarn.lock")?;
    let mut lines = text
        .lines()
        .skip_while(|line| !line.starts_with("__metadata:"));
    let version = lines.find_map(|line| line.trim().strip_prefix("version:"));
    let format: u32 = version.and_then(|v| v.trim().parse().ok()).unwrap_or(8);
    let known = BERRY_DEFAULTS.iter().find(|(known, _)| format >= *known);
    Ok(known.map_or(BERRY_DEFAULTS[2].1, |(_, version)| version))
}

/// `yarnPath: .yarn/releases/yarn-4.5.0.cjs`, when the file is there.
fn yarn_path(request: &Request<'_>, settings: &str) -> Result<Option<String>, PlanError> {
    for (index, line) in settings.lines().enumerate() {
        let Some(path) = line.strip_prefix("yarnPath:") else {
            continue;
        };
        let path = path.trim().trim_matches(['\'', '"']);
        let path = path.strip_prefix("./").unwrap_or(path);
        let legal = path
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
        if legal && path.starts_with(".yarn/releases/") && request.folder.has(path) {
            return Ok(Some(path.to_owned()));
        }
        return Err(PlanError::Broken {
            file: ".yarnrc.yml".to_owned(),
            line: Some(index as u32 + 1),
            what: format!("yarnPath {path:?} is not a file in .yarn/releases"),
        });
    }
    Ok(None)
}

/// Where a package manager that the base lacks is put.
const TOOLS: &str = "/opt/tools";
/// Its programs.
pub(super) const TOOLS_PATH: &str = "/opt/tools/node_modules/.bin";

/// Installs a package manager of an exact version, checked against its hash where one is named.
fn setup(kind: Kind, version: &str, hash: Option<&(String, String)>) -> String {
    let package = match kind {
        Kind::Berry => "@yarnpkg/cli-dist",
        kind => kind.name(),
    };
    let install = format!("npm install --prefix={TOOLS} --no-audit --no-fund");
    match (kind, hash) {
        (_, None) => format!("{install} {package}@{version}"),
        // Here the hash is that of the program itself.
        (Kind::Berry, Some((algorithm, hex))) => format!(
            "{install} {package}@{version} && echo \"{hex}  {TOOLS}/node_modules/{package}/bin/yarn.js\" | {algorithm}sum --check --quiet"
        ),
        (_, Some((algorithm, hex))) => {
            let file = format!("/tmp/{package}-{version}.tgz");
            format!(
                "npm pack --silent --pack-destination=/tmp {package}@{version} && echo \"{hex}  {file}\" | {algorithm}sum --check --quiet && {install} {file}"
            )
        }
    }
}
