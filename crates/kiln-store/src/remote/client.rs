//! A conversation with one registry: finding its door, logging in when asked to, refusals in clear words.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::http::header::{AUTHORIZATION, CONTENT_TYPE, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use ureq::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};

use super::challenge::{Challenge, choose};
use super::credentials::Credential;
use super::error::RemoteError;
use super::http::{Answer, Ask, Fetched, Http, Sent, located, same_origin};
use super::target::{Target, is_loopback};

/// How long a token is trusted to live when its server does not say (the token specification's default).
const TOKEN_LIFE_DEFAULT_S: u64 = 60;
/// Longest token or password.
const TOKEN_BYTES_MAX: usize = 64 * 1024;
/// Most characters of a registry's own words.
const DETAIL_CHARS_MAX: usize = 300;
/// Longest wait a registry may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(15);

/// Sends a request that is ready but for its body.
pub(super) type Exchange<'a> = dyn Fn(Sent<'_>) -> Result<Answer, RemoteError> + 'a;

/// Most redirects of one download.
const REDIRECTS_MAX: u32 = 5;

/// What a conversation is for: the rights that are asked for, and the words of refusals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    Push,
    Pull,
}

impl Purpose {
    fn actions(self) -> &'static str {
        match self {
            Self::Push => "pull,push",
            Self::Pull => "pull",
        }
    }

    fn doing(self) -> &'static str {
        match self {
            Self::Push => "pushing to",
            Self::Pull => "pulling from",
        }
    }
}

/// One registry, its door found.
#[derive(Debug)]
pub(super) struct Client {
    purpose: Purpose,
    http: Http,
    target: Target,
    credential: Option<Credential>,
    root: Uri,
    session: Option<Session>,
}

struct Session {
    authorization: HeaderValue,
    /// When to ask for a new token without being told.
    stale: Option<Instant>,
    /// A token server has accepted the login.
    accepted: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session(..)")
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Client {
    /// Finds the registry's door and logs in when it asks.
    pub(super) fn open(
        http: &Http,
        target: &Target,
        credential: Option<&Credential>,
        purpose: Purpose,
    ) -> Result<Self, RemoteError> {
        let mut failure: Option<RemoteError> = None;
        for root in target.roots() {
            let Ok(root) = format!("{root}/v2/").parse::<Uri>() else {
                continue;
            };
            let ask = ask("reach the registry", Method::GET, root.clone());
            let answer = match http.exchange(ask, Sent::Nothing) {
                Ok(answer) => answer,
                Err(error) => {
                    // A door that answers plain HTTP with 400 wants TLS; then the trouble with TLS is what counts.
                    let wants_tls =
                        matches!(failure, Some(RemoteError::Status { status: 400, .. }));
                    failure = if wants_tls {
                        Some(error)
                    } else {
                        failure.or(Some(error))
                    };
                    continue;
                }
            };
            let mut client = Self {
                purpose,
                http: http.clone(),
                target: target.clone(),
                credential: credential.cloned(),
                root,
                session: None,
            };
            match answer.status {
                StatusCode::UNAUTHORIZED => client.log_in(&answer)?,
                status if status.is_success() => {}
                _ => {
                    let error = client.refusal("reach the registry", &answer);
                    failure = failure.or(Some(error));
                    continue;
                }
            }
            return Ok(client);
        }
        Err(failure.unwrap_or_else(|| RemoteError::Protocol {
            registry: target.registry().to_owned(),
            why: "its name makes no URL".to_owned(),
        }))
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    /// URI of something in the target's repository, such as `blobs/uploads/`.
    pub(super) fn uri(&self, path: &str) -> Result<Uri, RemoteError> {
        let text = format!("{}{}/{path}", self.root, self.target.repository());
        text.parse()
            .map_err(|_| self.protocol("its name makes no URL"))
    }

    pub(super) fn protocol(&self, why: impl Into<String>) -> RemoteError {
        RemoteError::Protocol {
            registry: self.target.registry().to_owned(),
            why: why.into(),
        }
    }

    /// One exchange; when the registry asks for a (new) login, once more with it. `body` is made anew for each.
    pub(super) fn send(
        &mut self,
        what: &'static str,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        body: &mut dyn FnMut(&Exchange<'_>) -> Result<Answer, RemoteError>,
    ) -> Result<Answer, RemoteError> {
        self.renew()?;
        let mut again = false;
        loop {
            // Storage that a registry sends us to elsewhere has its own keys in the URL.
            let ours = same_origin(uri, &self.root);
            let authorization = self
                .session
                .as_ref()
                .filter(|_| ours)
                .map(|session| &session.authorization);
            let http = &self.http;
            let answer = body(&|sent| {
                let ask = Ask {
                    headers: headers.clone(),
                    authorization,
                    follow: *method == Method::HEAD,
                    ..ask(what, method.clone(), uri.clone())
                };
                http.exchange(ask, sent)
            })?;
            if answer.status != StatusCode::UNAUTHORIZED || again || !ours {
                return Ok(answer);
            }
            self.log_in(&answer)?;
            again = true;
        }
    }

    /// Gets a new token when the present one is nearly over.
    fn renew(&mut self) -> Result<(), RemoteError> {
        let stale = self.session.as_ref().and_then(|session| session.stale);
        if stale.is_none_or(|stale| Instant::now() < stale) {
            return Ok(());
        }
        self.session = None;
        let probe = self.http.exchange(
            ask("reach the registry", Method::GET, self.root.clone()),
            Sent::Nothing,
        )?;
        if probe.status == StatusCode::UNAUTHORIZED {
            self.log_in(&probe)?;
        }
        Ok(())
    }

    /// Opens a download, through redirects to where the registry keeps its content; the login goes to the registry alone.
    pub(super) fn fetch(
        &mut self,
        what: &'static str,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Fetched, RemoteError> {
        self.renew()?;
        let (mut at, mut redirects, mut again) = (uri.clone(), 0, false);
        loop {
            let ours = same_origin(&at, &self.root);
            let authorization = self.session.as_ref().filter(|_| ours);
            let ask = Ask {
                headers: headers.clone(),
                authorization: authorization.map(|session| &session.authorization),
                ..ask(what, Method::GET, at.clone())
            };
            let fetched = self.http.fetch(ask)?;
            if fetched.status.is_redirection() {
                let to = fetched.headers.get(LOCATION);
                let to = to.and_then(|to| located(&at, to.to_str().ok()?));
                redirects += 1;
                at = to
                    .filter(|_| redirects <= REDIRECTS_MAX)
                    .ok_or_else(|| self.protocol("it redirects to where kiln does not go"))?;
                continue;
            }
            if fetched.status.is_success() {
                return Ok(fetched);
            }
            let answer = fetched.into_answer();
            if answer.status != StatusCode::UNAUTHORIZED || again || !ours {
                return Err(self.refusal(what, &answer));
            }
            self.log_in(&answer)?;
            again = true;
        }
    }

    /// Answers a registry's challenge.
    fn log_in(&mut self, challenged: &Answer) -> Result<(), RemoteError> {
        let headers = challenged
            .headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok());
        let session = match (choose(headers), &self.credential) {
            (_, Some(Credential::RegistryToken(token))) => self.bearer(token, None)?,
            (Some(Challenge::Bearer { realm, service, .. }), _) => {
                self.token(&realm, service.as_deref())?
            }
            (Some(Challenge::Basic), Some(Credential::Basic { user, password })) => Session {
                authorization: self.secret(&basic(user, password))?,
                stale: None,
                accepted: false,
            },
            (Some(Challenge::Basic), _) => return Err(self.unauthorized(challenged)),
            (None, _) => return Err(self.protocol("it asks for a login and does not say which")),
        };
        self.session = Some(session);
        Ok(())
    }

    fn secret(&self, text: &str) -> Result<HeaderValue, RemoteError> {
        let mut value = HeaderValue::from_str(text)
            .map_err(|_| self.protocol("a login with characters that no header can carry"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn bearer(&self, token: &str, life: Option<Duration>) -> Result<Session, RemoteError> {
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX {
            return Err(self.protocol("its token is empty or far too long"));
        }
        let authorization = self.secret(&format!("Bearer {token}"))?;
        // Two thirds of its life: a request must not outlive the token it came with.
        Ok(Session {
            authorization,
            stale: life.map(|life| Instant::now() + life * 2 / 3),
            accepted: life.is_some(),
        })
    }

    /// Asks the token server. Its URL comes from the registry: TLS, unless everything is this host's own.
    fn token(&self, realm: &str, service: Option<&str>) -> Result<Session, RemoteError> {
        let realm: Uri = realm
            .parse()
            .map_err(|_| self.protocol("its token server has no legal URL"))?;
        let local = realm.authority().is_some_and(|to| is_loopback(to.as_str()));
        let plain_ok = self.root.scheme_str() == Some("http") && local;
        match realm.scheme_str() {
            Some("https") => {}
            Some("http") if plain_ok => {}
            _ => return Err(self.protocol("its token server is not reached by TLS")),
        }
        let actions = self.purpose.actions();
        let scope = format!("repository:{}:{actions}", self.target.repository());
        let mut query = vec![("scope", scope.as_str())];
        query.extend(service.map(|service| ("service", service)));
        let answer = match &self.credential {
            Some(Credential::IdentityToken(token)) => {
                query.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "kiln"),
                    ("refresh_token", token),
                ]);
                let form = encoded(&query);
                let mut ask = ask("get a token", Method::POST, realm);
                let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
                ask.headers.insert(CONTENT_TYPE, form_type);
                self.http.exchange(ask, Sent::Bytes(form.as_bytes()))?
            }
            credential => {
                let joint = if realm.query().is_some() { '&' } else { '?' };
                let uri = format!("{realm}{joint}{}", encoded(&query)).parse();
                let uri = uri.map_err(|_| self.protocol("its token server has no legal URL"))?;
                let mut ask = ask("get a token", Method::GET, uri);
                if let Some(Credential::Basic { user, password }) = credential {
                    ask.headers
                        .insert(AUTHORIZATION, self.secret(&basic(user, password))?);
                }
                self.http.exchange(ask, Sent::Nothing)?
            }
        };
        match answer.status {
            StatusCode::OK => {}
            // A refresh token that is no longer good is a bad request (RFC 6749 §5.2).
            StatusCode::BAD_REQUEST
                if matches!(self.credential, Some(Credential::IdentityToken(_))) =>
            {
                return Err(self.unauthorized(&answer));
            }
            StatusCode::UNAUTHORIZED => return Err(self.unauthorized(&answer)),
            _ => return Err(self.refusal("get a token", &answer)),
        }
        let token: TokenAnswer = serde_json::from_slice(&answer.body)
            .map_err(|_| self.protocol("its token server answers no token"))?;
        let life = Duration::from_secs(
            token
                .expires_in
                .unwrap_or(TOKEN_LIFE_DEFAULT_S)
                .clamp(1, 86_400),
        );
        let text = token
            .token
            .filter(|token| !token.is_empty())
            .or(token.access_token)
            .unwrap_or_default();
        self.bearer(&text, Some(life))
    }

    fn unauthorized(&self, answer: &Answer) -> RemoteError {
        RemoteError::Unauthorized {
            registry: self.target.registry().to_owned(),
            logged_in: self.credential.is_some(),
            detail: detail(&answer.body),
        }
    }

    /// What a refusal means.
    pub(super) fn refusal(&self, what: &'static str, answer: &Answer) -> RemoteError {
        let registry = self.target.registry().to_owned();
        let repository = self.target.repository().to_owned();
        let (detail, doing) = (detail(&answer.body), self.purpose.doing());
        match answer.status {
            StatusCode::UNAUTHORIZED
                if self.credential.is_some()
                    && self
                        .session
                        .as_ref()
                        .is_some_and(|session| session.accepted) =>
            {
                // A token was given, and does not suffice: the login is right, its rights are not.
                RemoteError::Forbidden {
                    doing,
                    registry,
                    repository,
                    detail,
                }
            }
            StatusCode::UNAUTHORIZED => self.unauthorized(answer),
            StatusCode::FORBIDDEN => RemoteError::Forbidden {
                doing,
                registry,
                repository,
                detail,
            },
            StatusCode::NOT_FOUND => RemoteError::NotFound {
                registry,
                repository,
                detail,
            },
            status => {
                let seconds = answer
                    .headers
                    .get(RETRY_AFTER)
                    .and_then(|value| value.to_str().ok()?.parse().ok());
                let retry_after = seconds.map(|s| Duration::from_secs(s).min(RETRY_AFTER_MAX));
                RemoteError::Status {
                    registry,
                    what,
                    status: status.as_u16(),
                    retry_after,
                    detail,
                }
            }
        }
    }
}

fn ask<'a>(what: &'static str, method: Method, uri: Uri) -> Ask<'a> {
    Ask {
        what,
        method,
        uri,
        headers: HeaderMap::new(),
        authorization: None,
        follow: false,
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// `application/x-www-form-urlencoded`.
fn encoded(pairs: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (key, value) in pairs {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(key);
        text.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric()
                || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/' | b':')
            {
                text.push(char::from(byte));
            } else {
                text.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    text
}

/// A registry's own words: `{"errors": [{"code", "message"}]}`, or a token server's `{"details"}`.
fn detail(body: &[u8]) -> String {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) else {
        return String::new();
    };
    let error = &value["errors"][0];
    let words = [
        &error["code"],
        &error["message"],
        &value["details"],
        &value["error_description"],
    ];
    let words: Vec<&str> = words
        .into_iter()
        .filter_map(serde_json::Value::as_str)
        .filter(|text| !text.is_empty())
        .collect();
    words
        .join(": ")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(DETAIL_CHARS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_registry_are_bounded_and_plain() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\u001b[2J way"}]}"#;
        assert_eq!(detail(body), "DENIED: no [2J way");
        assert_eq!(
            detail(br#"{"details":"incorrect username"}"#),
            "incorrect username"
        );
        assert_eq!(detail(b"<html>"), "");
        let long = format!(r#"{{"details":"{}"}}"#, "x".repeat(5000));
        assert_eq!(detail(long.as_bytes()).len(), DETAIL_CHARS_MAX);
    }

    #[test]
    fn forms() {
        assert_eq!(
            encoded(&[("scope", "repository:a/b:pull,push"), ("q", "ä &")]),
            "scope=repository:a/b:pull%2Cpush&q=%C3%A4%20%26"
        );
    }
}
