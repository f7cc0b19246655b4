//! HashiCorp Vault's HTTP API: KV version 2, logins by token, AppRole and JWT, renewal (developer.hashicorp.com/vault/api-docs).

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{ANSWER_MAX, Failed, agent, is_absolute, is_path, login, of_json, safe_url};

/// A token with a longer life is asked for again after this.
const LIFE_MAX: Duration = Duration::from_secs(24 * 3600);

/// How a Vault is reached.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaultConfig {
    /// `https://HOST:PORT`.
    pub url: String,
    /// Certificates (PEM) of an authority of the operator's own.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Where the engine is mounted.
    #[serde(default = "default_mount")]
    pub mount: String,
    /// A namespace of Vault Enterprise.
    #[serde(default)]
    pub namespace: Option<String>,
    /// How kiln logs in.
    pub auth: VaultAuth,
}

fn default_mount() -> String {
    "secret".to_owned()
}

/// A login.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase", deny_unknown_fields)]
pub enum VaultAuth {
    /// A token that somebody else keeps alive.
    Token {
        /// Its file, read each time.
        file: PathBuf,
    },
    /// AppRole.
    AppRole {
        /// The role's id.
        role_id: String,
        /// The file of the secret id.
        secret_id_file: PathBuf,
        /// Where the method is mounted.
        #[serde(default = "default_approle")]
        mount: String,
    },
    /// A signed token of another issuer.
    Jwt {
        /// The role.
        role: String,
        /// The file of the signed token.
        file: PathBuf,
        /// Where the method is mounted.
        #[serde(default = "default_jwt")]
        mount: String,
    },
}

fn default_approle() -> String {
    "approle".to_owned()
}

fn default_jwt() -> String {
    "jwt".to_owned()
}

#[derive(Debug)]
pub(super) struct Vault {
    config: VaultConfig,
    url: String,
    agent: ureq::Agent,
    session: Mutex<Option<Session>>,
}

/// A token that Vault gave for a login.
#[derive(Clone)]
struct Session {
    token: String,
    renewable: bool,
    /// Half of its life: from then on it is renewed, or made anew.
    half: Instant,
    end: Instant,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session")
    }
}

#[derive(Deserialize)]
struct LoggedIn {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    client_token: String,
    lease_duration: u64,
    #[serde(default)]
    renewable: bool,
}

impl Session {
    fn of(auth: Auth) -> Self {
        let now = Instant::now();
        // A token without an end has the duration 0.
        let life = match auth.lease_duration {
            0 => LIFE_MAX,
            seconds => Duration::from_secs(seconds).min(LIFE_MAX),
        };
        Self {
            token: auth.client_token,
            renewable: auth.renewable,
            half: now + life / 2,
            end: now + life,
        }
    }
}

impl Vault {
    pub(super) fn new(config: &VaultConfig) -> Result<Self, String> {
        let mounts = match &config.auth {
            VaultAuth::Token { file } => is_absolute(file).map(|()| None),
            VaultAuth::AppRole {
                secret_id_file: file,
                mount,
                ..
            }
            | VaultAuth::Jwt { file, mount, .. } => is_absolute(file).map(|()| Some(mount)),
        };
        for mount in mounts?.into_iter().chain([&config.mount]) {
            if !is_path(mount) {
                return Err(format!("{mount:?} is no mount"));
            }
        }
        Ok(Self {
            url: safe_url(&config.url)?,
            agent: agent(config.ca.as_deref())?,
            config: config.clone(),
            session: Mutex::default(),
        })
    }

    /// The newest version of what lies at this path.
    pub(super) fn read(&self, path: &str, field: Option<&str>) -> Result<Vec<u8>, Failed> {
        let at = format!("{}/v1/{}/data/{path}", self.url, self.config.mount);
        let mut answer = self.get(&at, &self.token()?)?;
        // A token may have been revoked before its time.
        if answer.0 == 403 && !matches!(self.config.auth, VaultAuth::Token { .. }) {
            self.lock().take();
            answer = self.get(&at, &self.token()?)?;
        }
        match answer {
            // A deleted version is a 404 with an envelope.
            (404, _) => Err(Failed::Missing),
            (200, body) => {
                let mut body: Value = serde_json::from_slice(&body).map_err(|_| unreadable())?;
                let data = body["data"]["data"].take();
                if !data.is_object() {
                    return Err(Failed::Missing);
                }
                of_json(data.to_string().as_bytes(), field)
            }
            (status, _) => Err(Failed::Unavailable(format!("it answered {status}"))),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token to ask with: the operator's, or that of a login, renewed after half of its life. Others wait meanwhile, so that one logs in.
    fn token(&self) -> Result<String, Failed> {
        let (mount, mut ask, key, file) = match &self.config.auth {
            VaultAuth::Token { file } => return login(file).map_err(Failed::Unavailable),
            VaultAuth::AppRole {
                role_id,
                secret_id_file,
                mount,
            } => (
                mount,
                json!({ "role_id": role_id }),
                "secret_id",
                secret_id_file,
            ),
            VaultAuth::Jwt { role, file, mount } => (mount, json!({ "role": role }), "jwt", file),
        };
        let mut session = self.lock();
        let now = Instant::now();
        if let Some(it) = session.as_ref().filter(|it| now < it.half) {
            return Ok(it.token.clone());
        }
        if let Some(it) = session.take().filter(|it| it.renewable && now < it.end)
            && let Ok(auth) = self.post("auth/token/renew-self", Some(&it.token), &json!({}))
        {
            let renewed = Session::of(auth);
            let token = renewed.token.clone();
            // One that may not be renewed for long any more is made anew the next time.
            *session = Some(renewed);
            return Ok(token);
        }
        ask[key] = login(file).map_err(Failed::Unavailable)?.into();
        let fresh = Session::of(self.post(&format!("auth/{mount}/login"), None, &ask)?);
        let token = fresh.token.clone();
        *session = Some(fresh);
        Ok(token)
    }

    fn post(&self, path: &str, token: Option<&str>, body: &Value) -> Result<Auth, Failed> {
        let mut request = self.agent.post(format!("{}/v1/{path}", self.url));
        if let Some(token) = token {
            request = request.header("x-vault-token", token);
        }
        if let Some(namespace) = &self.config.namespace {
            request = request.header("x-vault-namespace", namespace);
        }
        let body = body.to_string();
        let request = request.header("content-type", "application/json");
        let (status, bytes) = taken(request.send(body.as_bytes()))?;
        if status != 200 {
            return Err(Failed::Unavailable(format!("its login answered {status}")));
        }
        let read: LoggedIn = serde_json::from_slice(&bytes).map_err(|_| unreadable())?;
        Ok(read.auth)
    }

    fn get(&self, url: &str, token: &str) -> Result<(u16, Vec<u8>), Failed> {
        let mut request = self.agent.get(url).header("x-vault-token", token);
        if let Some(namespace) = &self.config.namespace {
            request = request.header("x-vault-namespace", namespace);
        }
        taken(request.call())
    }
}

fn unreadable() -> Failed {
    Failed::Unavailable("its answer is not readable".to_owned())
}

/// Status and body, bounded.
pub(super) fn taken(
    answer: Result<http::Response<ureq::Body>, ureq::Error>,
) -> Result<(u16, Vec<u8>), Failed> {
    let mut answer = answer.map_err(|error| Failed::Unavailable(error.to_string()))?;
    let status = answer.status().as_u16();
    let body = answer
        .body_mut()
        .with_config()
        .limit(ANSWER_MAX)
        .read_to_vec();
    let body = body.map_err(|error| Failed::Unavailable(error.to_string()))?;
    Ok((status, body))
}
