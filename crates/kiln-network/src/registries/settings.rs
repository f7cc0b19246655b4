//! Readers of package managers' own settings files. Pure; files of the host, read with the tolerance of the tools.

/// One `deb` source of apt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct AptSource {
    pub(super) uri: String,
    pub(super) suite: String,
    pub(super) components: Vec<String>,
}

/// `key=value` lines of an `.npmrc`; values with variables in them are passed over.
pub(super) fn npmrc(text: &str) -> Vec<(String, String)> {
    let line = |line: &str| {
        let line = line.trim();
        if line.starts_with(['#', ';', '[']) {
            return None;
        }
        let (key, value) = line.split_once('=')?;
        let value = value.trim().trim_matches(['"', '\'']);
        (!value.contains("${")).then(|| (key.trim().to_owned(), value.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

/// `section.key` and value of a `pip.conf`; a value may go on over indented lines.
pub(super) fn pip_conf(text: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut section = String::new();
    for line in text.lines() {
        let bare = line.trim();
        if bare.is_empty() || bare.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = bare
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            section = name.trim().to_owned();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = found.last_mut() {
                value.push('\n');
                value.push_str(bare);
            }
        } else if let Some((key, value)) = bare.split_once(['=', ':']) {
            let key = key.trim().replace('_', "-").to_ascii_lowercase();
            found.push((format!("{section}.{key}"), value.trim().to_owned()));
        }
    }
    found
}

/// `section.key` and value of `pip config list`, which prints values as Python does.
pub(super) fn pip_list(text: &str) -> Vec<(String, String)> {
    let line = |line: &str| {
        let (key, value) = line.split_once('=')?;
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let value = value.strip_prefix(quote)?.strip_suffix(quote)?;
        Some((key.trim().to_owned(), value.replace("\\n", "\n")))
    };
    text.lines().filter_map(line).collect()
}

/// The sources of a one-line-style `.list` file (sources.list(5)).
pub(super) fn apt_list(text: &str) -> Vec<AptSource> {
    let mut found = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb ") else {
            continue;
        };
        let rest = rest.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']').map_or("", |(_, rest)| rest),
            None => rest,
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            found.push(AptSource {
                uri,
                suite,
                components: words.collect(),
            });
        }
    }
    found
}

/// The sources of a deb822-style `.sources` file.
pub(super) fn apt_sources(text: &str) -> Vec<AptSource> {
    let mut found = Vec::new();
    for stanza in stanzas(text) {
        let words = |key: &str| -> Vec<String> {
            let field = stanza
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(key));
            let value = field.map_or("", |(_, value)| value);
            value.split_whitespace().map(str::to_owned).collect()
        };
        let disabled = words("Enabled").iter().any(|word| word == "no");
        if disabled || !words("Types").iter().any(|word| word == "deb") {
            continue;
        }
        for uri in words("URIs") {
            for suite in words("Suites") {
                found.push(AptSource {
                    uri: uri.clone(),
                    suite,
                    components: words("Components"),
                });
            }
        }
    }
    found
}

fn stanzas(text: &str) -> Vec<Vec<(String, String)>> {
    let mut all = vec![Vec::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let last = all.len() - 1;
        if line.trim().is_empty() {
            all.push(Vec::new());
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = all[last].last_mut() {
                let value: &mut String = value;
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            all[last].push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    all
}

/// `VERSION_CODENAME` of an os-release file, when it is Debian's own.
pub(super) fn debian_codename(os_release: &str) -> Option<String> {
    let get = |key: &str| {
        let find = |line: &str| {
            let value = line.strip_prefix(key)?.strip_prefix('=')?;
            Some(value.trim_matches(['"', '\'']).to_owned())
        };
        os_release.lines().find_map(find)
    };
    (get("ID")? == "debian").then(|| get("VERSION_CODENAME"))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        list.iter().map(own).collect()
    }

    #[test]
    fn settings_of_npm_and_pip() {
        assert_eq!(
            npmrc(
                "; x\nregistry = https://a.example.org/\n@s:registry=\"https://b.example.org/\"\nx=${Y}\n"
            ),
            pairs(&[
                ("registry", "https://a.example.org/"),
                ("@s:registry", "https://b.example.org/")
            ])
        );
        assert_eq!(
            pip_conf(
                "[global]\nindex_url = https://a.example.org/simple\nextra-index-url =\n    https://b.example.org\n    https://c.example.org\n"
            ),
            pairs(&[
                ("global.index-url", "https://a.example.org/simple"),
                (
                    "global.extra-index-url",
                    "\nhttps://b.example.org\nhttps://c.example.org"
                )
            ])
        );
        assert_eq!(
            pip_list(":env:.cert='/ca.pem'\nglobal.extra-index-url='\\nhttps://b.example.org'\n"),
            pairs(&[
                (":env:.cert", "/ca.pem"),
                ("global.extra-index-url", "\nhttps://b.example.org")
            ])
        );
    }

    #[test]
    fn sources_of_apt() {
        let list = apt_list(
            "# deb http://no.example.org x main\ndeb [arch=amd64 signed-by=/k] http://a.example.org/debian trixie main contrib\ndeb-src http://s.example.org x main\n",
        );
        assert_eq!(list.len(), 1);
        assert_eq!(
            (list[0].uri.as_str(), list[0].suite.as_str()),
            ("http://a.example.org/debian", "trixie")
        );
        assert_eq!(list[0].components, ["main", "contrib"]);
        let sources = apt_sources(
            "Types: deb deb-src\n# URIs: http://no.example.org\nURIs: http://a.example.org/debian\n  http://b.example.org/debian\nSuites: trixie trixie-updates\nComponents: main\n\nTypes: deb\nEnabled: no\nURIs: http://c.example.org\nSuites: x\n",
        );
        assert_eq!(sources.len(), 4);
        assert_eq!(sources[3].uri, "http://b.example.org/debian");
        let debian = "ID=debian\nVERSION_CODENAME=\"trixie\"\n";
        assert_eq!(debian_codename(debian).as_deref(), Some("trixie"));
        assert_eq!(debian_codename("ID=other\nVERSION_CODENAME=x\n"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(deb |Types: |\\[|[ -~\n]){0,40}") {
            let _ = (npmrc(&text), pip_conf(&text), pip_list(&text), apt_list(&text), apt_sources(&text));
        }
    }
}
