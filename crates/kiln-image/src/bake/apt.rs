//! Where Debian packages come from: asked of the host's own apt settings, never written in the project.
//!
//! Formats: sources.list(5), one-line style and deb822 style; apt.conf(5). Entries of other vendors
//! and of other releases than the host's own are left out. Read next: [`super::root`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{Program, RunContext, RunError};

/// Largest apt settings file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How long one of apt's own helpers may take.
const HELPER_DEADLINE: Duration = Duration::from_secs(120);
/// apt's downloader: speaks every transport and proxy the host's apt is configured for.
const APT_HELPER: &str = "/usr/lib/apt/apt-helper";

/// Options of the host's apt that also hold for a bake.
const OPTION_PREFIXES: [&str; 8] = [
    "Acquire::http::",
    "Acquire::https::",
    "Acquire::Check-",
    "Acquire::Retries",
    "Acquire::ForceIPv",
    "Acquire::Queue-Mode",
    "Acquire::Max-",
    "Acquire::proxy",
];

/// Why the host's apt settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AptError {
    /// A settings file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A settings file is larger than any real one.
    #[error("{} is larger than {FILE_BYTES_MAX} bytes", .0.display())]
    TooLarge(PathBuf),
    /// No entry for Debian's main archive was found.
    #[error(
        "no Debian mirror in {}: kiln asks the host's apt for one; add an entry for Debian's main component",
        .0.display()
    )]
    NoMirror(PathBuf),
    /// One of apt's programs failed.
    #[error("cannot ask apt")]
    Ask(#[source] RunError),
}

/// Which part of Debian's archive an entry serves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pocket {
    /// The release itself.
    Release,
    /// Updates between point releases.
    Updates,
    /// Security updates.
    Security,
}

impl Pocket {
    /// Name of this pocket of a release, as archives call it.
    #[must_use]
    pub fn suite(self, release: &str) -> String {
        match self {
            Self::Release => release.to_owned(),
            Self::Updates => format!("{release}-updates"),
            Self::Security => format!("{release}-security"),
        }
    }
}

/// One archive of the host.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct AptSource {
    /// Which pocket it serves.
    pub pocket: Pocket,
    /// Base address as the host writes it, which may hold a password.
    pub uri: String,
    /// Keyring file, or the key itself in ASCII armour.
    pub signed_by: Option<String>,
}

impl AptSource {
    /// The address without user and password: what may be kept in an image.
    #[must_use]
    pub fn public_uri(&self) -> String {
        let Some((scheme, rest)) = self.uri.split_once("://") else {
            return self.uri.clone();
        };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        format!("{scheme}://{host}/{path}")
    }

    /// The entry for one release, in one-line style.
    #[must_use]
    pub fn line(&self, release: &str) -> String {
        let suite = self.pocket.suite(release);
        let options = match &self.signed_by {
            Some(path) if path.starts_with('/') => format!("[signed-by={path}] "),
            _ => String::new(),
        };
        format!("deb {options}{} {suite} main", self.uri)
    }
}

/// What a bake needs to know of the host's apt.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostApt {
    /// Archives, the release first.
    pub sources: Vec<AptSource>,
    /// Lines of apt.conf: proxies, certificates, checks of dates.
    pub options: Vec<String>,
}

impl HostApt {
    /// Reads the host's settings (`root` is `/` except in tests) and asks apt for its options.
    ///
    /// # Errors
    /// See [`AptError`].
    pub fn read(root: &Path, context: &RunContext<'_>) -> Result<Self, AptError> {
        let sources = read_sources(root)?;
        let dump = Program::new("apt-config", HELPER_DEADLINE)
            .args(["dump", "--no-empty", "--format", "%F \"%v\";%n", "Acquire"])
            .capture(context)
            .map_err(AptError::Ask)?;
        let mut options = kept_options(&String::from_utf8_lossy(&dump));
        for (name, file) in [
            ("Dir::Etc::netrc", "auth.conf"),
            ("Dir::Etc::netrcparts", "auth.conf.d"),
        ] {
            let path = root.join("etc/apt").join(file);
            if path.exists() {
                options.push(format!("{name} \"{}\";", path.display()));
            }
        }
        Ok(Self { sources, options })
    }

    /// Bytes that change when packages of `release` changed: what the index files of its archives say of them now.
    ///
    /// # Errors
    /// When an index of the release or of its security updates cannot be fetched into `scratch`.
    pub fn state(
        &self,
        release: &str,
        architecture: &str,
        scratch: &Path,
        context: &RunContext<'_>,
    ) -> Result<Vec<u8>, AptError> {
        let mut state = Vec::new();
        let path = scratch.join("apt-state");
        for source in &self.sources {
            let suite = source.pocket.suite(release);
            let uri = format!(
                "{}/dists/{suite}/InRelease",
                source.uri.trim_end_matches('/')
            );
            download(&uri, &path, None, context)?;
            state.extend(package_lists(&read_bounded(&path)?, architecture).into_bytes());
        }
        // It is scratch: the next download or the end of the stage removes it.
        let _ = fs::remove_file(&path);
        Ok(state)
    }

    /// `debian.sources` for a build base: public addresses, Debian's own keyring.
    #[must_use]
    pub fn sources_file(&self, release: &str) -> String {
        let mut text = String::new();
        for source in &self.sources {
            let suite = source.pocket.suite(release);
            let uri = source.public_uri();
            text.push_str(&format!(
                "Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n\
                 Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
            ));
        }
        text
    }

    /// Options about dates of archives: a mirror that needs them here needs them in a build too.
    #[must_use]
    pub fn date_options(&self) -> String {
        let kept = self
            .options
            .iter()
            .filter(|line| line.starts_with("Acquire::Check-"));
        kept.map(|line| format!("{line}\n")).collect()
    }
}

/// Fetches one file with apt's own downloader. With a digest in hex, the content is checked.
///
/// # Errors
/// When apt cannot fetch it or the digest differs.
pub fn download(
    uri: &str,
    to: &Path,
    sha512_hex: Option<&str>,
    context: &RunContext<'_>,
) -> Result<(), AptError> {
    let mut program = Program::new(APT_HELPER, HELPER_DEADLINE)
        .args(["-oAPT::Sandbox::User=root", "download-file", uri])
        .arg(to);
    if let Some(hex) = sha512_hex {
        program = program.arg(format!("SHA512:{hex}"));
    }
    program.run(context).map_err(AptError::Ask)
}

/// The lines of an `InRelease` with sizes and digests of the package lists of `main`. The rest changes with every signature, several
/// times a day. All of it when there are no such lines.
fn package_lists(text: &str, architecture: &str) -> String {
    let lists = [architecture, "all"].map(|name| format!("main/binary-{name}/Packages"));
    let is_list = |line: &&str| {
        let file = line.split_whitespace().nth(2);
        file.is_some_and(|file| lists.iter().any(|list| file.starts_with(list.as_str())))
    };
    let kept: String = text
        .lines()
        .filter(is_list)
        .map(|line| format!("{line}\n"))
        .collect();
    if kept.is_empty() {
        text.to_owned()
    } else {
        kept
    }
}

fn kept_options(dump: &str) -> Vec<String> {
    let kept = |line: &&str| {
        OPTION_PREFIXES
            .iter()
            .any(|prefix| line.starts_with(prefix))
    };
    dump.lines().filter(kept).map(str::to_owned).collect()
}

fn read_bounded(path: &Path) -> Result<String, AptError> {
    let read = |source| AptError::Read {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(read)?.len() > FILE_BYTES_MAX {
        return Err(AptError::TooLarge(path.to_owned()));
    }
    let bytes = fs::read(path).map_err(read)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// All archives of the host that serve Debian itself.
fn read_sources(root: &Path) -> Result<Vec<AptSource>, AptError> {
    let etc = root.join("etc/apt");
    let mut files = vec![etc.join("sources.list")];
    let parts = etc.join("sources.list.d");
    if let Ok(entries) = fs::read_dir(&parts) {
        let mut found: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        found.sort();
        files.extend(found);
    }
    let release = host_release(root)?;
    let mut sources = Vec::new();
    for file in files.iter().filter(|file| file.is_file()) {
        let text = read_bounded(file)?;
        let entries = match file.extension().and_then(|ext| ext.to_str()) {
            Some("list") => text.lines().filter_map(parse_line).collect(),
            Some("sources") => parse_deb822(&text),
            _ => Vec::new(),
        };
        sources.extend(entries.iter().flat_map(|entry| entry.for_release(&release)));
    }
    sources.sort();
    sources.dedup_by(|a, b| a.pocket == b.pocket);
    if sources
        .first()
        .is_none_or(|source| source.pocket != Pocket::Release)
    {
        return Err(AptError::NoMirror(etc));
    }
    Ok(sources)
}

fn host_release(root: &Path) -> Result<String, AptError> {
    let text = read_bounded(&root.join("etc/os-release"))?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.unwrap_or("stable").trim_matches('"').to_owned())
}

/// One entry of a sources file, before it is decided whether it serves Debian.
#[derive(Debug, Default)]
struct Entry {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

impl Entry {
    fn for_release(&self, release: &str) -> Vec<AptSource> {
        let foreign_key = self
            .signed_by
            .as_deref()
            .is_some_and(|key| key.starts_with('/') && !key.contains("debian-archive"));
        if foreign_key || !self.components.iter().any(|name| name == "main") {
            return Vec::new();
        }
        let pocket = |suite: &String| {
            let suite = suite.trim_end_matches('/');
            let rest = suite
                .strip_prefix(release)
                .or_else(|| suite.strip_prefix("stable"))?;
            match rest {
                "" => Some(Pocket::Release),
                "-updates" => Some(Pocket::Updates),
                "-security" => Some(Pocket::Security),
                _ => None,
            }
        };
        let pockets: Vec<_> = self.suites.iter().filter_map(pocket).collect();
        let each = |pocket: &Pocket| {
            self.uris.first().map(|uri| AptSource {
                pocket: *pocket,
                uri: uri.clone(),
                signed_by: self.signed_by.clone(),
            })
        };
        pockets.iter().filter_map(each).collect()
    }
}

fn parse_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let mut rest = line
        .strip_prefix("deb")?
        .strip_prefix([' ', '\t'])?
        .trim_start();
    let mut signed_by = None;
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        let key = options
            .split_whitespace()
            .find_map(|o| o.strip_prefix("signed-by="));
        signed_by = key.map(str::to_owned);
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Entry {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by,
    })
}

fn parse_deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for stanza in text.split("\n\n") {
        let (mut entry, mut is_deb, mut enabled) = (Entry::default(), false, true);
        for (name, value) in deb822_fields(stanza) {
            let words = || {
                value
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            match name.to_ascii_lowercase().as_str() {
                "types" => is_deb = words().iter().any(|word| word == "deb"),
                "uris" => entry.uris = words(),
                "suites" => entry.suites = words(),
                "components" => entry.components = words(),
                "enabled" => enabled = !matches!(value.trim(), "no" | "false" | "0"),
                "signed-by" => entry.signed_by = Some(value.trim().to_owned()),
                _ => {}
            }
        }
        if is_deb && enabled && !entry.uris.is_empty() {
            entries.push(entry);
        }
    }
    entries
}

/// Fields of one deb822 stanza; continuation lines are joined with line ends, comments left out.
pub(super) fn deb822_fields(stanza: &str) -> Vec<(String, String)> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in stanza.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.to_owned(), value.trim().to_owned()));
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let etc = dir.path().join("etc/apt/sources.list.d");
        fs::create_dir_all(&etc).expect("writable");
        let release = "ID=debian\nVERSION_CODENAME=bookworm\n";
        fs::write(dir.path().join("etc/os-release"), release).expect("writable");
        for (name, text) in files {
            fs::write(dir.path().join("etc/apt").join(name), text).expect("writable");
        }
        dir
    }

    #[test]
    fn only_changed_packages_change_the_state() {
        let release = |date: &str, digest: &str| {
            format!(
                "Date: {date}\nSHA256:\n {digest} 120 main/binary-amd64/Packages.xz\n aa 5 main/binary-arm64/Packages.xz\n \
                 bb 7 contrib/binary-amd64/Packages\n cc 9 main/binary-all/Packages\n"
            )
        };
        let monday = package_lists(&release("Monday", "d1"), "amd64");
        assert_eq!(monday.lines().count(), 2);
        assert_eq!(monday, package_lists(&release("Tuesday", "d1"), "amd64"));
        assert_ne!(monday, package_lists(&release("Monday", "d2"), "amd64"));
        assert_eq!(package_lists("flat", "amd64"), "flat");
    }

    #[test]
    fn deb822_of_the_host_is_moved_to_another_release() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://mirror.test/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main contrib\n\
                    Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                    Types: deb\nURIs: http://mirror.test/security\nSuites: bookworm-security\n\
                    Components: main\n";
        let dir = host(&[("sources.list.d/debian.sources", text)]);
        let sources = read_sources(dir.path()).expect("a mirror");
        let lines: Vec<_> = sources.iter().map(|source| source.line("trixie")).collect();
        assert_eq!(
            lines,
            [
                "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.test/debian trixie main",
                "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.test/debian trixie-updates main",
                "deb http://mirror.test/security trixie-security main",
            ]
        );
    }

    #[test]
    fn other_vendors_other_releases_and_disabled_entries_are_left_out() {
        let list = "deb http://mirror.test/debian bookworm-backports main\n\
                    deb [arch=amd64 signed-by=/usr/share/keyrings/vendor.gpg] http://vendor.test bookworm main\n\
                    deb-src http://src.test bookworm main\n# deb http://old.test bookworm main\n\
                    deb http://user:secret@mirror.test/debian/ bookworm main non-free\n";
        let off =
            "Enabled: no\nTypes: deb\nURIs: http://off.test\nSuites: bookworm\nComponents: main\n";
        let dir = host(&[("sources.list", list), ("sources.list.d/off.sources", off)]);
        let sources = read_sources(dir.path()).expect("a mirror");
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].public_uri(), "http://mirror.test/debian/");
        assert!(sources[0].line("trixie").contains("user:secret@"));
    }

    #[test]
    fn a_host_without_a_debian_mirror_is_an_error() {
        let dir = host(&[(
            "sources.list",
            "deb http://vendor.test cloud-bookworm main\n",
        )]);
        assert!(matches!(
            read_sources(dir.path()),
            Err(AptError::NoMirror(_))
        ));
    }

    #[test]
    fn only_options_about_transport_and_dates_are_kept() {
        let dump = "Acquire::Languages:: \"none\";\nAcquire::http::Proxy \"http://p.test:1\";\n\
                    Acquire::Check-Valid-Until \"false\";\n";
        let kept = kept_options(dump);
        assert_eq!(kept.len(), 2);
        let apt = HostApt {
            sources: Vec::new(),
            options: kept,
        };
        assert_eq!(
            apt.date_options(),
            "Acquire::Check-Valid-Until \"false\";\n"
        );
    }
}
