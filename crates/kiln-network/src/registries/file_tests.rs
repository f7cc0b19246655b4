//! Tests of `registries.toml`.

use super::*;

const TEXT: &str = r#"
version = 1
[ca]
files = ["/etc/ca.pem"]
[runtime.node]
index = "https://mirror.example.org/npm/"
hosts = ["mirror.example.org:443"]
source = "mine"
[[exception]]
host = "mirror.example.org"
range = "10.0.0.0/8"
[[exception]]
host = "mirror.example.org"
range = "192.168.0.0/16"
allow = false
"#;

#[test]
fn the_file_is_read_and_written_back() {
    let file = Registries::parse(TEXT).expect("legal");
    assert_eq!(
        file.index(Runtime::Node),
        Some("https://mirror.example.org/npm/")
    );
    assert_eq!(
        file.rules(Runtime::Node),
        ["mirror.example.org:443/tls".parse().expect("rule")]
    );
    assert_eq!(file.rules(Runtime::Python), []);
    assert_eq!(
        file.exceptions().len(),
        1,
        "the refused one is not in force"
    );
    assert_eq!(Registries::parse(&file.render()).expect("legal"), file);
    let sealed = file.sealed();
    assert!(sealed.runtime[&Runtime::Node].is_untouched());
    let mut changed = Registries::parse(&sealed.render()).expect("legal");
    assert_eq!(changed, sealed);
    changed
        .runtime
        .get_mut(&Runtime::Node)
        .expect("there")
        .hosts
        .clear();
    assert!(!changed.runtime[&Runtime::Node].is_untouched());
}

/// A host speaks what the scheme of its index says, on whatever port; else what it says itself, else what its port does.
#[test]
fn rules_speak_what_their_urls_say() {
    let text = r#"
version = 1
[runtime.node]
index = "https://a.example.org:8443/npm/"
more = ["http://b.example.org:8081/x", "https://c.example.org:80/"]
hosts = ["a.example.org:443,8443", "b.example.org:8081", "c.example.org:80", "d.example.org:9000", "*.e.example.org:8443/tls", "f.example.org"]
"#;
    let file = Registries::parse(text).expect("legal");
    let rules = file.rules(Runtime::Node);
    let rules: Vec<String> = rules.iter().map(ToString::to_string).collect();
    let want = [
        "a.example.org:443/tls",
        "a.example.org:8443/tls",
        "b.example.org:8081/http",
        "c.example.org:80/tls",
        "d.example.org:9000/raw",
        "*.e.example.org:8443/tls",
        "f.example.org:80/http",
        "f.example.org:443/tls",
    ];
    assert_eq!(rules, want);
}

#[test]
fn errors_name_the_line() {
    let cases = [
        ("version = 1\nhost = 1\n", "line 2"),
        ("version = 1\n[runtime.cobol]\n", "line 2"),
        (
            "version = 1\n[runtime.node]\nhosts = [\"10.0.0.1\"]\n",
            "line 3",
        ),
        (
            "version = 1\n\n[runtime.node]\nindex = \"https://u:p@mirror.example.org\"\n",
            "line 4",
        ),
        (
            "version = 1\n[[exception]]\nhost = \"a.example.org\"\nrange = \"10.0.0.0\"\n",
            "line 4",
        ),
    ];
    for (text, line) in cases {
        let Err(RegistriesError::Parse(source)) = Registries::parse(text) else {
            panic!("{text:?} is legal");
        };
        assert!(source.to_string().contains(line), "{text:?}: {source}");
    }
    assert!(matches!(
        Registries::parse("version = 2"),
        Err(RegistriesError::Version { found: 2 })
    ));
    let socks = "version = 1\n[proxy]\nhttps = \"socks5://p:1\"\n";
    assert!(matches!(
        Registries::parse(socks),
        Err(RegistriesError::Proxy(_))
    ));
}

#[test]
fn files_are_replaced_whole() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("deep/registries.toml");
    assert_eq!(Registries::load(&path).expect("none"), None);
    for text in ["version = 1\n", TEXT] {
        write_text(&path, text).expect("written");
        assert_eq!(read_text(&path).expect("read").as_deref(), Some(text));
    }
    assert_eq!(
        fs::read_dir(dir.path().join("deep")).expect("list").count(),
        1
    );
}
