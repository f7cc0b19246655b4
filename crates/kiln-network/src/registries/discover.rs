//! Asks the host, its tools and the base images which registries builds use.
//!
//! For each runtime the first that knows wins: the tool's own answer on the host (it knows variables, files and its
//! default), else variables and settings files without the tool, else the tool in the base image. Then the index
//! is looked at once to see where its files live, and names that resolve into special-purpose ranges get a
//! proposed exception (never for loopback or metadata addresses).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use kiln_core::AllowRule;
use kiln_core::network::{Cidr, SpecialRange, special_range};

use super::file::{
    CaSection, ExceptionSection, IndexUrl, ProxySection, Registries, Runtime, RuntimeSection,
};
use super::probe::{Page, Probe, Trust};
use super::{index, settings};
use crate::ca::{self, CaSetting};
use crate::gateway::proxy::ProxyConfig;
use crate::origin::{Origin, split};

/// Redirects followed from one address.
const REDIRECTS_MAX: usize = 5;
/// Most further indexes of one runtime.
const MORE_MAX: usize = 16;
/// A small, old package that every copy of the public index has.
const NPM_SAMPLE: &str = "isarray";
/// The same for Python.
const PYTHON_SAMPLE: &str = "six";

const ASK_NPM: &[&str] = &["npm", "config", "get", "registry"];
const ASK_PIP: &[&str] = &[
    "python3",
    "-c",
    "from pip._internal.models.index import PyPI; print(PyPI.simple_url)",
];
const ASK_APT: &[&str] = &["apt-get", "indextargets", "--format", "$(REPO_URI)"];

/// Runs a command in the base image of a runtime and returns its standard output; `None` when there is no base
/// image yet or the command failed.
pub type AskBase<'a> = dyn Fn(Runtime, &[&str]) -> Option<String> + 'a;

/// What is run in the base image of a runtime, inside a machine without network. It prints one URL a line.
#[must_use]
pub fn ask_argv(runtime: Runtime) -> &'static [&'static str] {
    match runtime {
        Runtime::Node => ASK_NPM,
        Runtime::Python => ASK_PIP,
        Runtime::Debian => ASK_APT,
    }
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Discovery {
    /// To be merged with the operator's file.
    pub registries: Registries,
    /// Sentences for the operator: what could not be found, what was left out and why.
    pub notes: Vec<String>,
}

/// What a runtime's tool or settings said.
struct Answer {
    index: String,
    more: Vec<String>,
    source: String,
}

impl Answer {
    fn new(index: impl Into<String>, source: impl Into<String>) -> Self {
        Self {
            index: index.into(),
            more: Vec::new(),
            source: source.into(),
        }
    }
}

struct Asking<'a> {
    world: &'a dyn Probe,
    ask_base: &'a AskBase<'a>,
    trust: Trust,
    found: Discovery,
}

/// Asks everybody. Blocking, takes at most a few deadlines of [`super::probe`] per runtime; never fails: what is
/// not known is left out with a note, or marked as needing the base image.
#[must_use]
pub fn discover(world: &dyn Probe, ask_base: &AskBase<'_>) -> Discovery {
    let mut asking = Asking {
        world,
        ask_base,
        trust: Trust::default(),
        found: Discovery::default(),
    };
    asking.proxy();
    asking.ca();
    for runtime in Runtime::ALL {
        asking.runtime(runtime);
    }
    asking.exceptions();
    asking.found
}

impl Asking<'_> {
    fn note(&mut self, text: impl Into<String>) {
        self.found.notes.push(text.into());
    }

    fn env(&self, name: &str) -> Option<&str> {
        let value = self.world.env().get(name)?;
        (!value.is_empty()).then_some(value.as_str())
    }

    /// The environment's proxy. Its credentials are never written down: then the environment goes on deciding.
    fn proxy(&mut self) {
        match ProxyConfig::from_env(self.world.env()) {
            Ok(config) => self.trust.proxy = config,
            Err(error) => {
                return self.note(format!("the host's proxy setting is not used: {error}"));
            }
        }
        if !self.trust.proxy.is_set() {
            return;
        }
        let get = |name: &str| {
            let lower = name.to_ascii_lowercase();
            let value = self.env(&lower).or_else(|| self.env(name));
            value.map(str::to_owned)
        };
        let (http, https) = (
            get("HTTP_PROXY").or_else(|| get("ALL_PROXY")),
            get("HTTPS_PROXY").or_else(|| get("ALL_PROXY")),
        );
        let no_proxy = get("NO_PROXY");
        if [&http, &https]
            .iter()
            .any(|url| url.as_deref().is_some_and(|url| url.contains('@')))
        {
            return self.note(
                "the host's proxy needs credentials: they are taken from the environment each time and not written to registries.toml",
            );
        }
        self.found.registries.proxy = Some(ProxySection {
            http,
            https,
            no_proxy,
            source: "environment of the host".to_owned(),
            seal: None,
        });
    }

    fn ca(&mut self) {
        let mut tools = Vec::new();
        let mut name = |setting: &str, path: Option<String>| {
            if let Some(path) = path.filter(|path| path.starts_with('/')) {
                tools.push(CaSetting {
                    setting: setting.to_owned(),
                    path: PathBuf::from(path),
                });
            }
        };
        let npm = self.npm_settings();
        let cafile = npm.iter().find(|(key, _)| key == "cafile");
        name("npm cafile", cafile.map(|(_, value)| value.clone()));
        let pip = self.pip_settings();
        let cert = pip.iter().find(|(key, _)| key == "global.cert");
        name("pip cert", cert.map(|(_, value)| value.clone()));
        let git = self
            .world
            .run(&["git", "config", "--global", "--get", "http.sslCAInfo"]);
        name("git http.sslCAInfo", git.map(|path| path.trim().to_owned()));
        let named = ca::named_by(self.world.env(), &tools);
        match ca::load(&named) {
            Ok(None) => {}
            Ok(Some(bundle)) => {
                let mut files: Vec<PathBuf> = Vec::new();
                let mut names: Vec<&str> = Vec::new();
                for source in &bundle.sources {
                    names.push(&source.setting);
                    if !files.contains(&source.path) {
                        files.push(source.path.clone());
                    }
                }
                self.found.registries.ca = Some(CaSection {
                    files,
                    source: names.join(", "),
                    seal: None,
                });
                self.trust.ca = Some(bundle);
            }
            Err(error) => {
                let cause = std::error::Error::source(&error);
                let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
                self.note(format!("no CA bundle is taken over: {error}{cause}"));
            }
        }
    }

    fn runtime(&mut self, runtime: Runtime) {
        let host = match runtime {
            Runtime::Node => self.node(),
            Runtime::Python => self.python(),
            Runtime::Debian => self.debian(),
        };
        let answer = host.or_else(|| self.base(runtime));
        let section = match answer {
            Some(answer) => self.section(runtime, answer),
            None => {
                self.note(format!(
                    "neither this host nor a base image could say which registry {} uses: discover again after the bases are baked",
                    runtime.name()
                ));
                RuntimeSection {
                    needs_base: true,
                    source: "nobody yet: the tool in the base image must be asked".to_owned(),
                    ..RuntimeSection::default()
                }
            }
        };
        self.found.registries.runtime.insert(runtime, section);
    }

    fn base(&self, runtime: Runtime) -> Option<Answer> {
        let argv = ask_argv(runtime);
        let text = (self.ask_base)(runtime, argv)?;
        let mut urls = urls(&text);
        let index = (!urls.is_empty()).then(|| urls.remove(0))?;
        let mut answer = Answer::new(index, format!("{} in the base image", argv[0]));
        answer.more = urls;
        Some(answer)
    }

    fn home(&self, path: &str) -> Option<PathBuf> {
        Some(Path::new(self.env("HOME")?).join(path))
    }

    /// Lines of the host's `.npmrc` files, the user's first.
    fn npm_settings(&self) -> Vec<(String, String)> {
        let user = self.env("npm_config_userconfig").map(PathBuf::from);
        let files = [
            user.or_else(|| self.home(".npmrc")),
            self.env("npm_config_globalconfig").map(PathBuf::from),
            Some("/etc/npmrc".into()),
            Some("/usr/local/etc/npmrc".into()),
        ];
        let texts = files
            .into_iter()
            .flatten()
            .filter_map(|path| self.world.read(&path));
        texts.flat_map(|text| settings::npmrc(&text)).collect()
    }

    fn node(&self) -> Option<Answer> {
        let lines = self.npm_settings();
        let asked = self.world.run(ASK_NPM).and_then(|text| urls(&text).pop());
        let of_env = || {
            let names = ["npm_config_registry", "NPM_CONFIG_REGISTRY"];
            names
                .iter()
                .find_map(|name| Some((self.env(name)?.to_owned(), *name)))
        };
        let of_file = || {
            lines
                .iter()
                .find(|(key, _)| key == "registry")
                .map(|(_, url)| url.clone())
        };
        let mut answer = match (asked, of_env()) {
            (Some(url), _) => Answer::new(url, "npm config get registry"),
            (None, Some((url, name))) => Answer::new(url, name),
            (None, None) => Answer::new(of_file()?, "npmrc files of the host"),
        };
        let scopes = lines
            .iter()
            .filter(|(key, _)| key.starts_with('@') && key.ends_with(":registry"));
        answer.more = scopes.map(|(_, url)| url.clone()).collect();
        Some(answer)
    }

    /// `section.key` lines of pip, from pip itself when the host has it.
    fn pip_settings(&self) -> Vec<(String, String)> {
        let asked = self.world.run(&["pip", "config", "list"]);
        let asked = asked.or_else(|| self.world.run(&["python3", "-m", "pip", "config", "list"]));
        if let Some(text) = asked {
            return settings::pip_list(&text);
        }
        let files = [
            self.env("PIP_CONFIG_FILE").map(PathBuf::from),
            self.home(".config/pip/pip.conf"),
            self.home(".pip/pip.conf"),
            Some("/etc/pip.conf".into()),
        ];
        let texts = files
            .into_iter()
            .flatten()
            .filter_map(|path| self.world.read(&path));
        texts.flat_map(|text| settings::pip_conf(&text)).collect()
    }

    fn python(&self) -> Option<Answer> {
        let lines = self.pip_settings();
        let get = |key: &str| {
            let sections = [":env:", "install", "global", "download"];
            sections.iter().find_map(|section| {
                let key = format!("{section}.{key}");
                let line = lines.iter().find(|(name, _)| *name == key)?;
                Some(line.1.clone())
            })
        };
        let set = ["PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"]
            .iter()
            .find_map(|name| Some(Answer::new(self.env(name)?, *name)));
        let set =
            set.or_else(|| Some(Answer::new(get("index-url")?, "pip's settings on the host")));
        let mut answer = set.or_else(|| {
            let url = urls(&self.world.run(ASK_PIP)?).pop()?;
            Some(Answer::new(url, "pip's own default on the host"))
        })?;
        let env_more = self.env("PIP_EXTRA_INDEX_URL").unwrap_or_default();
        answer.more = urls(env_more);
        answer
            .more
            .extend(urls(&get("extra-index-url").unwrap_or_default()));
        Some(answer)
    }

    /// Debian's own archives among apt's sources, when the host is Debian.
    fn debian(&self) -> Option<Answer> {
        let codename = settings::debian_codename(&self.world.read(Path::new("/etc/os-release"))?)?;
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        files.extend(self.world.list(Path::new("/etc/apt/sources.list.d")));
        let mut sources = Vec::new();
        for path in files {
            let extension = path
                .extension()
                .and_then(|ext| ext.to_str())
                .unwrap_or_default();
            let text = || self.world.read(&path).unwrap_or_default();
            match extension {
                "list" => sources.extend(settings::apt_list(&text())),
                "sources" => sources.extend(settings::apt_sources(&text())),
                _ => {}
            }
        }
        let own = |suite: &str| {
            let rest = suite.strip_prefix(&codename);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '/']))
        };
        sources
            .retain(|source| own(&source.suite) && source.components.iter().any(|c| c == "main"));
        let main = sources.iter().find(|source| source.suite == codename)?;
        let mut answer = Answer::new(main.uri.clone(), "apt's sources on the host");
        for source in &sources {
            if source.uri != main.uri && !answer.more.contains(&source.uri) {
                answer.more.push(source.uri.clone());
            }
        }
        Some(answer)
    }

    /// Makes a section of an answer: URLs without credentials, and every host on the way to a file.
    fn section(&mut self, runtime: Runtime, answer: Answer) -> RuntimeSection {
        let mut section = RuntimeSection {
            source: answer.source,
            ..RuntimeSection::default()
        };
        let mut hosts = BTreeSet::new();
        let all = std::iter::once(&answer.index).chain(answer.more.iter().take(MORE_MAX));
        for (at, text) in all.enumerate() {
            let Some(url) = split(text) else {
                self.note(format!(
                    "an index URL of {} is no http(s) URL and is left out",
                    runtime.name()
                ));
                continue;
            };
            if url.userinfo.is_some() {
                self.note(format!(
                    "the index of {} on {} has credentials in its URL; they are left out, because builds would keep them",
                    runtime.name(),
                    url.origin.host
                ));
            }
            self.add_host(&mut hosts, &url.origin);
            let sample = match runtime {
                Runtime::Node => Some((NPM_SAMPLE, index::NPM_ACCEPT)),
                Runtime::Python => Some((PYTHON_SAMPLE, index::SIMPLE_ACCEPT)),
                Runtime::Debian => None,
            };
            // Private scopes and extra indexes rarely hold the sample.
            if let Some((sample, accept)) = sample.filter(|_| at == 0) {
                self.follow(runtime, &url.origin, sample, accept, &mut hosts);
            }
            let Ok(clean) = IndexUrl::try_from(url.origin.to_string()) else {
                continue;
            };
            if at == 0 {
                section.index = Some(clean);
            } else if !section.more.contains(&clean) {
                section.more.push(clean);
            }
        }
        section.hosts = hosts.into_iter().collect();
        section
    }

    fn add_host(&mut self, hosts: &mut BTreeSet<AllowRule>, url: &Origin) {
        match AllowRule::new(&url.host, &[url.port]) {
            // Said only where the port alone would say another thing.
            Ok(rule) if rule.speaks(url.port) == url.protocol() => {
                hosts.insert(rule);
            }
            Ok(rule) => {
                hosts.insert(rule.with_protocol(url.protocol()));
            }
            Err(error) => self.note(format!("builds cannot reach this registry: {error}")),
        }
    }

    /// Asks the index for one small package and follows one of its files.
    fn follow(
        &mut self,
        runtime: Runtime,
        origin: &Origin,
        sample: &str,
        accept: &str,
        hosts: &mut BTreeSet<AllowRule>,
    ) {
        let end = if runtime == Runtime::Python { "/" } else { "" };
        let path = origin.rest.split(['?', '#']).next().unwrap_or_default();
        let page = Origin {
            rest: format!("{}/{sample}{end}", path.trim_end_matches('/')),
            ..origin.clone()
        };
        let (at, page) = match self.walk(page, Some(accept), hosts) {
            Ok(found) => found,
            Err(error) => {
                return self.note(format!(
                    "the index of {} did not answer ({error}): the hosts of its files are unknown",
                    runtime.name()
                ));
            }
        };
        let file = match runtime {
            Runtime::Python => index::simple_file(&at, &page.body),
            _ => index::npm_file(&at, &page.body),
        };
        let Some(file) = file else {
            return self.note(format!(
                "the index of {} answered with status {} and no list of files: their hosts are unknown",
                runtime.name(),
                page.status
            ));
        };
        // A file's address may redirect once more; that it does not answer to HEAD says nothing.
        let _ = self.walk(file, None, hosts);
    }

    /// Follows redirects and notes every host on the way.
    fn walk(
        &mut self,
        mut at: Origin,
        accept: Option<&str>,
        hosts: &mut BTreeSet<AllowRule>,
    ) -> Result<(Origin, Page), String> {
        for _ in 0..=REDIRECTS_MAX {
            self.add_host(hosts, &at);
            let page = self.world.fetch(&at, accept, &self.trust)?;
            match page.location.as_deref().and_then(|to| at.join(to)) {
                Some(next) if (300..400).contains(&page.status) => at = next,
                _ => return Ok((at, page)),
            }
        }
        Err("it redirects in circles".to_owned())
    }

    /// Proposes an exception for every host that resolves into a special-purpose range.
    fn exceptions(&mut self) {
        let sections = self.found.registries.runtime.values();
        let hosts: BTreeSet<String> = sections
            .flat_map(|section| section.hosts.iter().map(|rule| rule.host().to_owned()))
            .collect();
        for host in hosts {
            let mut ranges: Vec<Cidr> = Vec::new();
            for addr in self.world.resolve(&host) {
                match special_range(addr) {
                    None => {}
                    Some(range) if range.may_be_excepted() => {
                        if let Some(net) = network_of(addr)
                            && !ranges.contains(&net)
                        {
                            ranges.push(net);
                        }
                    }
                    Some(range) => self.note(never(&host, range)),
                }
            }
            let proposed = ranges.into_iter().map(|range| ExceptionSection {
                host: host.clone(),
                range,
                allow: true,
                source: "this host resolves the name to such an address".to_owned(),
            });
            self.found.registries.exception.extend(proposed);
        }
    }
}

fn never(host: &str, range: SpecialRange) -> String {
    let what = match range {
        SpecialRange::Loopback => "this host itself",
        SpecialRange::LinkLocal | SpecialRange::Metadata => "a link-local or metadata address",
        _ => "no single host",
    };
    format!("{host} resolves to {what}: machines can never reach it there")
}

/// The network an address lies in: mirrors move within theirs.
fn network_of(addr: IpAddr) -> Option<Cidr> {
    let text = match addr {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            format!("{a}.{b}.{c}.0/24")
        }
        IpAddr::V6(v6) => {
            let net = u128::from(v6) & !u128::from(u64::MAX);
            format!("{}/64", std::net::Ipv6Addr::from(net))
        }
    };
    text.parse().ok()
}

/// Every `http(s)` URL in a text of words.
fn urls(text: &str) -> Vec<String> {
    let words = text.split_whitespace().filter(|word| split(word).is_some());
    let mut found: Vec<String> = Vec::new();
    for word in words {
        if !found.iter().any(|known| known == word) {
            found.push(word.to_owned());
        }
    }
    found
}

#[cfg(test)]
#[path = "discover_tests.rs"]
mod tests;
