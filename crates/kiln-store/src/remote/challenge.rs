//! How a registry asks for a login: the `WWW-Authenticate` header (RFC 9110 §11.6.1) with `Bearer` challenges as the
//! distribution project's token specification defines them, or `Basic` (RFC 7617).

/// Most bytes of one header that are looked at.
const HEADER_BYTES_MAX: usize = 8 * 1024;
/// Most challenges of one header.
const CHALLENGES_MAX: usize = 16;

/// What a registry asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Challenge {
    /// A token from the server at `realm`.
    Bearer {
        /// URL of the token server.
        realm: String,
        /// Name of the registry there.
        service: Option<String>,
        /// What the refused request needs.
        scope: Option<String>,
    },
    /// User and password with each request.
    Basic,
}

/// The strongest challenge known here among the headers' values.
pub(super) fn choose<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        for (scheme, params) in parse(header) {
            let get = |name: &str| {
                params
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = get("realm")
            {
                return Some(Challenge::Bearer {
                    realm,
                    service: get("service"),
                    scope: get("scope"),
                });
            }
            if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

type Params = Vec<(String, String)>;

/// Challenges of one header, with their parameters. What does not follow the grammar ends the list.
fn parse(header: &str) -> Vec<(String, Params)> {
    let mut found: Vec<(String, Params)> = Vec::new();
    if header.len() > HEADER_BYTES_MAX {
        return found;
    }
    let mut rest = header;
    while found.len() < CHALLENGES_MAX {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let word = token(rest);
        if word.is_empty() {
            break;
        }
        let after = &rest[word.len()..];
        let value = after.trim_start_matches([' ', '\t']).strip_prefix('=');
        match (value, found.last_mut()) {
            (Some(value), Some((_, params))) => {
                let Some((text, tail)) = value_of(value.trim_start_matches([' ', '\t'])) else {
                    break;
                };
                params.push((word.to_owned(), text));
                rest = tail;
            }
            (Some(_), None) => break,
            (None, _) => {
                found.push((word.to_owned(), Vec::new()));
                rest = after;
            }
        }
    }
    found
}

fn token(text: &str) -> &str {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(&b);
    let end = text.bytes().position(|b| !legal(b)).unwrap_or(text.len());
    &text[..end]
}

/// A token or a quoted string, and what follows.
fn value_of(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let word = token(text);
        return (!word.is_empty()).then(|| (word.to_owned(), &text[word.len()..]));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bearer_is_preferred() {
        let headers = [
            "Basic realm=\"x\"",
            "Negotiate, Bearer realm=\"https://auth.example.org/token\",service=\"reg, one\" , scope=\"repository:a/b:pull,push\"",
        ];
        let chosen = choose(headers.into_iter());
        let expected = Challenge::Bearer {
            realm: "https://auth.example.org/token".to_owned(),
            service: Some("reg, one".to_owned()),
            scope: Some("repository:a/b:pull,push".to_owned()),
        };
        assert_eq!(chosen, Some(expected));
        assert_eq!(
            choose(["basic realm=x"].into_iter()),
            Some(Challenge::Basic)
        );
        for none in [
            "",
            "Bearer",
            "Negotiate",
            "realm=\"x\"",
            "Bearer realm=\"open",
            "Bearer realm=",
        ] {
            assert_eq!(choose([none].into_iter()), None, "{none}");
        }
        let escaped = choose(["Bearer realm=\"a\\\"b\""].into_iter());
        assert!(matches!(escaped, Some(Challenge::Bearer { realm, .. }) if realm == "a\"b"));
    }

    proptest! {
        #[test]
        fn any_header_is_survived(text in ".*") {
            let _any = choose([text.as_str()].into_iter());
        }

        #[test]
        fn what_is_written_is_read(realm in "[ -~&&[^\"\\\\]]{1,60}", scope in "[a-z:/,]{1,60}") {
            let header = format!("Bearer realm=\"{realm}\", scope=\"{scope}\"");
            let expected = Challenge::Bearer { realm, service: None, scope: Some(scope) };
            prop_assert_eq!(choose([header.as_str()].into_iter()), Some(expected));
        }
    }
}
