//! Tests of discovery, against a small world.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use super::*;
use crate::registries::merge;

#[derive(Default)]
struct Small {
    env: BTreeMap<String, String>,
    tools: HashMap<String, String>,
    files: BTreeMap<PathBuf, String>,
    pages: HashMap<String, Page>,
    names: HashMap<String, Vec<IpAddr>>,
    fetched: RefCell<Vec<String>>,
}

impl Small {
    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    fn tool(mut self, argv: &[&str], answer: &str) -> Self {
        self.tools.insert(argv.join(" "), answer.to_owned());
        self
    }

    fn file(mut self, path: &str, text: &str) -> Self {
        self.files.insert(path.into(), text.to_owned());
        self
    }

    fn page(mut self, url: &str, body: &str) -> Self {
        let page = Page {
            status: 200,
            location: None,
            body: body.as_bytes().to_vec(),
        };
        self.pages.insert(url.to_owned(), page);
        self
    }

    fn redirect(mut self, url: &str, to: &str) -> Self {
        let page = Page {
            status: 302,
            location: Some(to.to_owned()),
            body: Vec::new(),
        };
        self.pages.insert(url.to_owned(), page);
        self
    }

    fn name(mut self, host: &str, addr: &str) -> Self {
        let addr = addr.parse().expect("address");
        self.names.entry(host.to_owned()).or_default().push(addr);
        self
    }

    fn discover(&self) -> Discovery {
        discover(self, &|_, _| None)
    }
}

impl Probe for Small {
    fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    fn run(&self, argv: &[&str]) -> Option<String> {
        self.tools.get(&argv.join(" ")).cloned()
    }

    fn read(&self, path: &Path) -> Option<String> {
        self.files.get(path).cloned()
    }

    fn list(&self, folder: &Path) -> Vec<PathBuf> {
        let paths = self
            .files
            .keys()
            .filter(|path| path.parent() == Some(folder));
        paths.cloned().collect()
    }

    fn fetch(&self, url: &Origin, _: Option<&str>, _: &Trust) -> Result<Page, String> {
        self.fetched.borrow_mut().push(url.to_string());
        let page = self.pages.get(&url.to_string());
        page.cloned().ok_or_else(|| "no answer".to_owned())
    }

    fn resolve(&self, host: &str) -> Vec<IpAddr> {
        self.names.get(host).cloned().unwrap_or_default()
    }
}

fn hosts(found: &Discovery, runtime: Runtime) -> Vec<String> {
    let rules = found.registries.rules(runtime);
    rules.iter().map(ToString::to_string).collect()
}

#[test]
fn tools_answer_first_and_files_are_followed_to_their_hosts() {
    let world = Small::default()
        .tool(ASK_NPM, "npm notice x\nhttps://npm.example.org/root/\n")
        .tool(ASK_PIP, "https://py.example.org/simple\n")
        .page(
            "https://npm.example.org/root/isarray",
            r#"{"versions": {"1.0.0": {"dist": {"tarball": "https://npm.example.org/f.tgz"}}}}"#,
        )
        .redirect(
            "https://npm.example.org/f.tgz",
            "https://cdn.example.org:8443/f.tgz",
        )
        .page("https://cdn.example.org:8443/f.tgz", "")
        .redirect("https://py.example.org/simple/six/", "/moved/six/")
        .page(
            "https://py.example.org/moved/six/",
            r#"<a href="https://files.example.org/six.whl#x">six</a>"#,
        );
    let found = world.discover();
    assert_eq!(
        hosts(&found, Runtime::Node),
        ["cdn.example.org:8443/tls", "npm.example.org:443/tls"]
    );
    assert_eq!(
        hosts(&found, Runtime::Python),
        ["files.example.org:443/tls", "py.example.org:443/tls"]
    );
    assert_eq!(
        found.registries.index(Runtime::Node),
        Some("https://npm.example.org/root/")
    );
    let node = &found.registries.runtime[&Runtime::Node];
    assert_eq!(node.source, "npm config get registry");
    assert_eq!(found.registries.needing_base(), [Runtime::Debian].into());
    let text = merge(None, &found.registries).expect("new");
    assert_eq!(
        Registries::parse(&text).expect("legal"),
        found.registries.sealed()
    );
}

#[test]
fn without_tools_variables_and_files_speak() {
    let world = Small::default()
        .env("HOME", "/home/x")
        .file(
            "/home/x/.npmrc",
            "registry=https://u:p@npm.example.org/\n@s:registry=https://scope.example.org/npm/\n",
        )
        .file("/etc/pip.conf", "[global]\nindex-url = http://py.example.org/simple/\n")
        .env("PIP_EXTRA_INDEX_URL", "https://more.example.org/simple")
        .file("/etc/os-release", "ID=debian\nVERSION_CODENAME=trixie\n")
        .file(
            "/etc/apt/sources.list.d/x.sources",
            "Types: deb\nURIs: http://deb.example.org/debian\nSuites: trixie trixie-updates\nComponents: main\n\n\
             Types: deb\nURIs: http://sec.example.org/security\nSuites: trixie-security\nComponents: main\n\n\
             Types: deb\nURIs: https://vendor.example.org/apt\nSuites: stable\nComponents: main\n",
        )
        .file("/etc/apt/sources.list.d/off.sources.bak", "Types: deb\nURIs: http://no.example.org\nSuites: trixie\nComponents: main\n");
    let found = world.discover();
    assert_eq!(
        hosts(&found, Runtime::Node),
        ["npm.example.org:443/tls", "scope.example.org:443/tls"]
    );
    assert_eq!(
        found.registries.index(Runtime::Node),
        Some("https://npm.example.org/")
    );
    assert_eq!(
        hosts(&found, Runtime::Python),
        ["more.example.org:443/tls", "py.example.org:80/http"]
    );
    assert_eq!(
        hosts(&found, Runtime::Debian),
        ["deb.example.org:80/http", "sec.example.org:80/http"]
    );
    assert_eq!(
        found.registries.index(Runtime::Debian),
        Some("http://deb.example.org/debian")
    );
    assert!(
        found.notes.iter().any(|note| note.contains("credentials")),
        "{:?}",
        found.notes
    );
    assert!(!found.registries.render().contains("u:p"));
    assert!(
        world
            .fetched
            .borrow()
            .iter()
            .all(|url| !url.contains("u:p"))
    );
}

#[test]
fn the_base_image_is_asked_last() {
    let world = Small::default();
    let asked = RefCell::new(Vec::new());
    let found = discover(&world, &|runtime, argv| {
        asked.borrow_mut().push((runtime, argv.join(" ")));
        (runtime == Runtime::Node).then(|| "https://npm.example.org/\n".to_owned())
    });
    assert_eq!(asked.borrow().len(), 3);
    assert_eq!(asked.borrow()[0].1, "npm config get registry");
    assert_eq!(
        found.registries.runtime[&Runtime::Node].source,
        "npm in the base image"
    );
    assert_eq!(
        found.registries.needing_base(),
        [Runtime::Python, Runtime::Debian].into()
    );
}

#[test]
fn exceptions_are_proposed_but_never_for_this_host_or_metadata() {
    let world = Small::default()
        .tool(ASK_NPM, "https://npm.example.org/\n")
        .tool(ASK_PIP, "https://py.example.org/simple\n")
        .name("npm.example.org", "192.0.2.7")
        .name("npm.example.org", "192.0.2.8")
        .name("npm.example.org", "2001:db8::1")
        .name("py.example.org", "127.0.0.1")
        .name("py.example.org", "169.254.169.254")
        .name("py.example.org", "8.8.8.8");
    let found = world.discover();
    let proposed: Vec<String> = found
        .registries
        .exception
        .iter()
        .map(|exception| format!("{} {}", exception.host, exception.range))
        .collect();
    assert_eq!(
        proposed,
        [
            "npm.example.org 192.0.2.0/24",
            "npm.example.org 2001:db8::/64"
        ]
    );
    assert_eq!(
        found
            .notes
            .iter()
            .filter(|note| note.contains("never"))
            .count(),
        2
    );
}

#[test]
fn proxies_with_credentials_and_broken_ca_files_are_noted_not_written() {
    let world = Small::default()
        .env("HTTPS_PROXY", "http://u:secret@proxy.example.org:3128")
        .env("SSL_CERT_FILE", "/nonexistent/ca.pem");
    let found = world.discover();
    assert_eq!(
        (
            found.registries.proxy.as_ref(),
            found.registries.ca.as_ref()
        ),
        (None, None)
    );
    assert!(
        found
            .notes
            .iter()
            .any(|note| note.contains("/nonexistent/ca.pem"))
    );
    assert!(!format!("{found:?}").contains("secret"));
    let world = Small::default().env("HTTPS_PROXY", "http://proxy.example.org:3128");
    let proxy = world.discover().registries.proxy.expect("written");
    assert_eq!(
        proxy.https.as_deref(),
        Some("http://proxy.example.org:3128")
    );
    assert_eq!(proxy.http, None);
}

#[test]
fn circles_and_silence_end() {
    let world = Small::default()
        .tool(ASK_NPM, "https://npm.example.org/\n")
        .redirect("https://npm.example.org/isarray", "/isarray");
    let found = world.discover();
    assert_eq!(hosts(&found, Runtime::Node), ["npm.example.org:443/tls"]);
    assert!(
        found.notes.iter().any(|note| note.contains("circles")),
        "{:?}",
        found.notes
    );
    assert_eq!(world.fetched.borrow().len(), REDIRECTS_MAX + 1);
}
