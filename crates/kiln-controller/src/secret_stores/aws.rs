//! AWS Secrets Manager: `GetSecretValue` of its JSON 1.1 protocol, signed with Signature Version 4.
//!
//! Of the whole service kiln needs this one call, so the signature is the library's and the request is ours.

use std::path::PathBuf;
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;

use super::vault::taken;
use super::{Failed, agent, is_absolute, login, of_json, safe_url};

const SERVICE: &str = "secretsmanager";
const TARGET: &str = "secretsmanager.GetSecretValue";
const CONTENT_TYPE: &str = "application/x-amz-json-1.1";

/// How the service is reached.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AwsConfig {
    /// For example `eu-central-1`.
    pub region: String,
    /// Another address of the service than the region's own.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Certificates (PEM) of an authority of the operator's own.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// A file of AWS's shared credentials format, read each time.
    pub credentials: PathBuf,
    /// Its section.
    #[serde(default = "default_profile")]
    pub profile: String,
}

fn default_profile() -> String {
    "default".to_owned()
}

#[derive(Debug)]
pub(super) struct Aws {
    config: AwsConfig,
    url: String,
    agent: ureq::Agent,
}

#[derive(Deserialize)]
struct Found {
    #[serde(rename = "SecretString")]
    text: Option<String>,
    #[serde(rename = "SecretBinary")]
    binary: Option<String>,
}

#[derive(Deserialize)]
struct Wrong {
    #[serde(rename = "__type", default)]
    kind: String,
}

impl Aws {
    pub(super) fn new(config: &AwsConfig) -> Result<Self, String> {
        let region = &config.region;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if region.is_empty() || region.len() > 40 || !region.bytes().all(plain) {
            return Err(format!("{region:?} is no region"));
        }
        is_absolute(&config.credentials)?;
        let usual = format!("https://{SERVICE}.{region}.amazonaws.com");
        Ok(Self {
            url: safe_url(config.endpoint.as_ref().unwrap_or(&usual))?,
            agent: agent(config.ca.as_deref())?,
            config: config.clone(),
        })
    }

    /// The current version of a secret; with a field, that of its JSON.
    pub(super) fn read(&self, id: &str, field: Option<&str>) -> Result<Vec<u8>, Failed> {
        let keys = self.keys().map_err(Failed::Unavailable)?;
        let body = json!({ "SecretId": id }).to_string();
        let url = format!("{}/", self.url);
        let headers = signed(&url, &body, keys, &self.config.region, SystemTime::now());
        let headers = headers.map_err(Failed::Unavailable)?;
        let mut request = self.agent.post(&url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let (status, bytes) = taken(request.send(body.as_bytes()))?;
        let unreadable = || Failed::Unavailable("its answer is not readable".to_owned());
        if status != 200 {
            let wrong: Wrong = serde_json::from_slice(&bytes).map_err(|_| unreadable())?;
            let kind = wrong.kind.rsplit('#').next().unwrap_or_default();
            return match kind {
                "ResourceNotFoundException" => Err(Failed::Missing),
                kind => {
                    let kind: String = kind
                        .chars()
                        .filter(char::is_ascii_alphanumeric)
                        .take(60)
                        .collect();
                    Err(Failed::Unavailable(format!("it answered {status} {kind}")))
                }
            };
        }
        let found: Found = serde_json::from_slice(&bytes).map_err(|_| unreadable())?;
        let value = match found {
            Found {
                text: Some(text), ..
            } => text.into_bytes(),
            Found {
                binary: Some(binary),
                ..
            } => STANDARD.decode(binary).map_err(|_| unreadable())?,
            Found { .. } => return Err(Failed::Missing),
        };
        match field {
            Some(field) => of_json(&value, Some(field)),
            None => Ok(value),
        }
    }

    fn keys(&self) -> Result<Credentials, String> {
        let text = login(&self.config.credentials)?;
        of_profile(&text, &self.config.profile).ok_or_else(|| {
            format!(
                "its credentials have no profile {} with both keys",
                self.config.profile
            )
        })
    }
}

/// The keys of a section (docs.aws.amazon.com, "Configuration and credential file settings").
fn of_profile(text: &str, profile: &str) -> Option<Credentials> {
    let mut inside = false;
    let [mut id, mut secret, mut token] = [None, None, None];
    for line in text.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            inside = name.trim() == profile;
            continue;
        }
        let Some((key, value)) = line.split_once('=').filter(|_| inside) else {
            continue;
        };
        let value = Some(value.trim().to_owned());
        match key.trim() {
            "aws_access_key_id" => id = value,
            "aws_secret_access_key" => secret = value,
            "aws_session_token" => token = value,
            _ => {}
        }
    }
    Some(Credentials::new(id?, secret?, token, None, "kiln"))
}

/// Headers of a signed request.
fn signed(
    url: &str,
    body: &str,
    keys: Credentials,
    region: &str,
    time: SystemTime,
) -> Result<Vec<(String, String)>, String> {
    let identity = keys.into();
    let params = v4::SigningParams::builder()
        .identity(&identity)
        .region(region)
        .name(SERVICE)
        .time(time)
        .settings(SigningSettings::default())
        .build()
        .map_err(|error| error.to_string())?
        .into();
    let mut headers = vec![
        ("content-type".to_owned(), CONTENT_TYPE.to_owned()),
        ("x-amz-target".to_owned(), TARGET.to_owned()),
    ];
    let shown = headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    let request = SignableRequest::new("POST", url, shown, SignableBody::Bytes(body.as_bytes()))
        .map_err(|error| error.to_string())?;
    let (instructions, _) = sign(request, &params)
        .map_err(|error| error.to_string())?
        .into_parts();
    let (added, _) = instructions.into_parts();
    headers.extend(
        added
            .into_iter()
            .map(|header| (header.name().to_owned(), header.value().to_owned())),
    );
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_among_others() {
        let text = "[other]\naws_access_key_id=no\n# [prod]\n[ prod ]\naws_access_key_id = AKID\naws_secret_access_key=S=E\n[last]\n";
        let keys = of_profile(text, "prod").expect("keys");
        assert_eq!(
            (keys.access_key_id(), keys.secret_access_key()),
            ("AKID", "S=E")
        );
        assert!(of_profile(text, "other").is_none());
        assert!(of_profile(text, "last").is_none());
    }

    #[test]
    fn a_request_is_signed_with_what_it_says() {
        let keys = || Credentials::new("AKID", "SECRET", Some("SESSION".to_owned()), None, "test");
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let sign = |body, seconds| {
            let all = signed(
                "https://h.example/",
                body,
                keys(),
                "eu-central-1",
                at(seconds),
            )
            .expect("signed");
            let find = |name: &str| {
                all.iter()
                    .find(|(key, _)| key == name)
                    .map(|(_, value)| value.clone())
            };
            (
                find("authorization").expect("signed"),
                find("x-amz-security-token"),
            )
        };
        let (one, session) = sign("{}", 1_440_938_160);
        assert!(one.starts_with(
            "AWS4-HMAC-SHA256 Credential=AKID/20150830/eu-central-1/secretsmanager/aws4_request, "
        ));
        assert!(
            one.contains("x-amz-target") && !one.contains("SECRET"),
            "{one}"
        );
        assert_eq!(session.as_deref(), Some("SESSION"));
        assert_ne!(one, sign("{ }", 1_440_938_160).0);
        assert_ne!(one, sign("{}", 1_440_938_161).0);
    }
}
