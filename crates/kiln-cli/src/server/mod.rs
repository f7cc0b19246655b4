//! The way from a command to a server: where it is ([`place`]), one request and its answer (here), a job followed to its end
//! ([`follow`]), a source sent ([`upload`]), what a job left fetched ([`download`]), and what is said of its answers ([`words`]).
//!
//! Not here: what a verb asks for; see `commands`.

pub(crate) mod download;
pub(crate) mod follow;
mod place;
mod sse;
pub(crate) mod upload;
pub(crate) mod words;

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderName, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use kiln_controller::api::{JobLine, JobView, List};
use kiln_core::FailureClass;
use kiln_proto::fleet::MACHINE_UPGRADE;
use kiln_worker::fleet::http::{Body, Http, Upgraded};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(crate) use place::{configured, named};
pub(crate) use sse::Frames;

use crate::error::{CliError, Result, chain};

/// Longest wait for a short answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest short answer, bytes.
const ANSWER_MAX: usize = 16 << 20;
/// Jobs that an abbreviated id is looked for in.
const RECENT_MAX: u32 = 500;
/// Most ids that an ambiguous beginning lists.
const IDS_SHOWN_MAX: usize = 8;

/// A refusal as a server tells it: a problem document (RFC 9457), as far as a person reads it.
#[derive(Deserialize, Debug)]
struct Problem {
    #[serde(default)]
    code: String,
    detail: String,
    #[serde(default)]
    hint: Option<String>,
    #[serde(default)]
    field: Option<String>,
}

/// A server. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    http: Http,
    token: Option<String>,
    /// For messages.
    name: String,
}

impl Server {
    /// Reads something.
    ///
    /// # Errors
    /// What the server says, or that it does not answer.
    pub(crate) async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A> {
        self.answer(Method::GET, path, empty(), &[]).await
    }

    /// Asks for something with a JSON document.
    ///
    /// # Errors
    /// As [`Server::get`].
    pub(crate) async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        asked: &impl Serialize,
    ) -> Result<A> {
        self.with_document(Method::POST, path, asked).await
    }

    async fn with_document<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        asked: &impl Serialize,
    ) -> Result<A> {
        let bytes = serde_json::to_vec(asked).map_err(|error| CliError::infrastructure(&error))?;
        let body = Full::new(Bytes::from(bytes))
            .map_err(|never| match never {})
            .boxed();
        let kind = (CONTENT_TYPE, "application/json".to_owned());
        self.answer(method, path, body, &[kind]).await
    }

    /// Puts something in its place with a JSON document.
    ///
    /// # Errors
    /// As [`Server::get`].
    pub(crate) async fn put<A: DeserializeOwned>(
        &self,
        path: &str,
        asked: &impl Serialize,
    ) -> Result<A> {
        self.with_document(Method::PUT, path, asked).await
    }

    /// Removes or stops something.
    ///
    /// # Errors
    /// As [`Server::get`].
    pub(crate) async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A> {
        self.answer(Method::DELETE, path, empty(), &[]).await
    }

    async fn answer<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body,
        headers: &[(HeaderName, String)],
    ) -> Result<A> {
        let asked = async {
            let response = self.send(method, path, body, headers).await?;
            self.read(response).await
        };
        tokio::time::timeout(ANSWER_TIMEOUT, asked)
            .await
            .unwrap_or_else(|_| Err(self.silent(&format!("no answer within {ANSWER_TIMEOUT:?}"))))
    }

    /// Reads a JSON answer.
    ///
    /// # Errors
    /// When it breaks off or is none.
    pub(crate) async fn read<A: DeserializeOwned>(
        &self,
        response: Response<Incoming>,
    ) -> Result<A> {
        let limited = Limited::new(response.into_body(), ANSWER_MAX);
        let bytes = limited
            .collect()
            .await
            .map_err(|error| self.silent(&chain(&*error)))?;
        let bytes = bytes.to_bytes();
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(|error| {
            CliError::new(
                FailureClass::Infrastructure,
                format!("the answer of {} could not be read: {error}", self.name),
            )
            .hint("is it a kiln server, and of about this version?")
        })
    }

    /// Sends a request; its answer is a success.
    ///
    /// # Errors
    /// As [`Server::get`].
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Body,
        headers: &[(HeaderName, String)],
    ) -> Result<Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(self.http.uri(path));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request
            .body(body)
            .map_err(|error| CliError::usage(chain(&error)))?;
        let response = self.http.request(request).await;
        let response = response.map_err(|error| self.silent(&chain(&error)))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let limited = Limited::new(response.into_body(), ANSWER_MAX);
        let bytes = limited
            .collect()
            .await
            .map(|read| read.to_bytes())
            .unwrap_or_default();
        Err(self.refusal(status, &bytes))
    }

    /// Turns a connection into a way to a kept machine.
    ///
    /// # Errors
    /// As [`Server::get`].
    pub(crate) async fn upgrade(&self, path: &str) -> Result<Upgraded> {
        let mut request = Request::get(self.http.uri(path))
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, MACHINE_UPGRADE);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request
            .body(empty())
            .map_err(|error| CliError::usage(chain(&error)))?;
        let opened = async {
            let response = self.http.request(request).await;
            let response = response.map_err(|error| self.silent(&chain(&error)))?;
            let status = response.status();
            if status == StatusCode::SWITCHING_PROTOCOLS {
                let upgraded = kiln_worker::fleet::http::upgraded(response).await;
                return upgraded.map_err(|error| self.silent(&chain(&error)));
            }
            let limited = Limited::new(response.into_body(), ANSWER_MAX);
            let bytes = limited.collect().await;
            let bytes = bytes.map(|read| read.to_bytes()).unwrap_or_default();
            Err(self.refusal(status, &bytes))
        };
        tokio::time::timeout(ANSWER_TIMEOUT, opened)
            .await
            .unwrap_or_else(|_| Err(self.silent(&format!("no answer within {ANSWER_TIMEOUT:?}"))))
    }

    /// Nobody answers, or what answers breaks off.
    fn silent(&self, why: &str) -> CliError {
        let distrusted = |hint: &str| {
            // The server is there: what is wrong is how it was named, or whom this side trusts.
            CliError::usage(format!("{} is not trusted: {why}", self.name)).hint(hint)
        };
        if why.contains("not valid for name") {
            return distrusted(
                "its certificate is for other names: use one of them, or start `kiln serve` with `--name` and this one",
            );
        }
        if why.contains("invalid peer certificate") {
            return distrusted(
                "name the authority that signed its certificate with --ca FILE, KILN_CA or [server] ca (`kiln serve` writes its own to controller/authority.pem)",
            );
        }
        let told = CliError::new(
            FailureClass::Infrastructure,
            format!("{} does not answer: {why}", self.name),
        );
        told.hint(match why.contains("invalid HTTP version") {
            true => "does it speak TLS? then its address begins with https://",
            false => "is the server running, and is its address right?",
        })
    }

    fn refusal(&self, status: StatusCode, bytes: &[u8]) -> CliError {
        let problem: Option<Problem> = serde_json::from_slice(bytes).ok();
        let class = class_of(status);
        let Some(problem) = problem else {
            let text: String = String::from_utf8_lossy(bytes).chars().take(200).collect();
            return CliError::new(class, format!("{} answers {status}: {text}", self.name));
        };
        // A bound of the tenant is the operator's word, not a trouble that passes by itself.
        let class = match problem.code.as_str() {
            "pending_quota" | "stored_quota" => FailureClass::Policy,
            _ => class,
        };
        let policys = problem.code.starts_with("policy_");
        let message = match &problem.field {
            // In the words of a command without a server: a file's own place, or the flag.
            Some(field) if policys && (field == "policy" || field == "secrets") => {
                problem.detail.clone()
            }
            Some(field) if policys => {
                format!(
                    "--{}: {}",
                    field.trim_end_matches("_seconds"),
                    problem.detail
                )
            }
            // The only flag whose name is another than the field's and that a server bounds.
            Some(field) if field == "timeout_seconds" => format!("--timeout: {}", problem.detail),
            Some(field) => format!("{field}: {}", problem.detail),
            None => problem.detail.clone(),
        };
        let told = CliError::new(class, message);
        if status == StatusCode::UNAUTHORIZED {
            return told.hint(match self.token {
                Some(_) => "the token is not good here any more; `kiln token create` makes one",
                None => {
                    "put a token into KILN_TOKEN or ~/.config/kiln/token; `kiln token create` makes one"
                }
            });
        }
        match problem.hint {
            Some(hint) => told.hint(hint),
            None => told,
        }
    }

    /// The job whose id is, or begins, so; the newest without.
    ///
    /// # Errors
    /// When there is none, or several.
    pub(crate) async fn job(&self, start: Option<&str>) -> Result<JobView> {
        if let Some(id) = start
            && id.parse::<kiln_core::JobId>().is_ok()
        {
            match self.get(&format!("/v1/jobs/{id}")).await {
                Err(error) if error.class == FailureClass::Usage => {}
                answered => return answered,
            }
        }
        let limit = if start.is_some() { RECENT_MAX } else { 1 };
        let recent: List<JobLine> = self.get(&format!("/v1/jobs?limit={limit}")).await?;
        let start = start.unwrap_or_default();
        let fitting: Vec<&str> = recent
            .items
            .iter()
            .map(|job| job.id.as_str())
            .filter(|id| id.starts_with(start))
            .collect();
        match fitting.as_slice() {
            [] if start.is_empty() => {
                Err(CliError::usage("there are no jobs yet").hint("try `kiln build`"))
            }
            [] => Err(CliError::usage(format!("there is no job {start:?}"))
                .hint("`kiln job list` shows the jobs there are")),
            [id] => self.get(&format!("/v1/jobs/{id}")).await,
            several => Err(CliError::usage(format!(
                "{} jobs begin with {start:?}: {}",
                several.len(),
                several
                    .iter()
                    .take(IDS_SHOWN_MAX)
                    .copied()
                    .collect::<Vec<_>>()
                    .join(", ")
            ))
            .hint("write more of the id")),
        }
    }
}

/// No body.
pub(crate) fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

/// Whose fault an answer is: decides the exit code.
fn class_of(status: StatusCode) -> FailureClass {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => FailureClass::Policy,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => FailureClass::Infrastructure,
        status if status.is_client_error() => FailureClass::Usage,
        _ => FailureClass::Infrastructure,
    }
}

/// A text as one part of a path or query (RFC 3986: everything but unreserved characters is escaped).
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_worker::fleet::http::Target;

    fn server(token: Option<&str>) -> Server {
        Server {
            http: Http::new(Target::Socket("/nowhere".into())),
            token: token.map(str::to_owned),
            name: "the server at https://ci.example.org".to_owned(),
        }
    }

    #[test]
    fn problems_become_errors_with_exit_codes() {
        let body = br#"{"type":"urn:kiln:problem:invalid","status":422,"code":"invalid","detail":"at most 4","hint":"ask for less","field":"cpus"}"#;
        let error = server(None).refusal(StatusCode::UNPROCESSABLE_ENTITY, body);
        assert_eq!(
            (error.message.as_str(), error.exit_code()),
            ("cpus: at most 4", 2)
        );
        assert_eq!(error.hints, ["ask for less"]);
        for (status, code) in [
            (401, 4),
            (403, 4),
            (404, 2),
            (409, 2),
            (429, 3),
            (500, 3),
            (503, 3),
        ] {
            let status = StatusCode::from_u16(status).expect("status");
            assert_eq!(
                server(None).refusal(status, b"<html>").exit_code(),
                code,
                "{status}"
            );
        }
        let body = br#"{"code":"pending_quota","detail":"5 jobs wait already","hint":"x"}"#;
        let error = server(None).refusal(StatusCode::TOO_MANY_REQUESTS, body);
        assert_eq!((error.exit_code(), error.hints.len()), (4, 1));
        let body = br#"{"detail":"there is no token","hint":"x"}"#;
        let error = server(None).refusal(StatusCode::UNAUTHORIZED, body);
        assert!(error.hints[0].contains("KILN_TOKEN"), "{error:?}");
    }

    #[test]
    fn a_certificate_for_another_name_is_not_an_unknown_authority() {
        let named = "invalid peer certificate: certificate not valid for name \"127.0.0.1\"";
        let error = server(None).silent(named);
        assert_eq!(error.exit_code(), 2);
        assert!(error.hints[0].contains("--name"), "{error:?}");
        let error = server(None).silent("invalid peer certificate: UnknownIssuer");
        assert_eq!(error.exit_code(), 2);
        assert!(error.hints[0].contains("--ca"), "{error:?}");
        let error = server(None).silent("client error (SendRequest): invalid HTTP version parsed");
        assert_eq!(error.exit_code(), 3);
        assert!(error.hints[0].contains("https://"), "{error:?}");
    }

    #[tokio::test]
    async fn nobody_there_is_infrastructure() {
        let error = server(None)
            .get::<serde_json::Value>("/v1/jobs")
            .await
            .expect_err("nobody");
        assert_eq!(error.exit_code(), 3);
        assert!(
            error
                .message
                .starts_with("the server at https://ci.example.org does not answer"),
            "{error}"
        );
    }

    #[test]
    fn texts_are_escaped() {
        assert_eq!(escaped("a b/c?d&é"), "a%20b%2Fc%3Fd%26%C3%A9");
    }
}
