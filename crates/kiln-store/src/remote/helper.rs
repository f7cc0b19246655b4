//! Credential helpers: `docker-credential-NAME get`, with the registry on standard input and a JSON object on
//! standard output (docker-credential-helpers' protocol).

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::credentials::{Credential, CredentialsError};

/// How long a helper may take; it may ask its user for a key.
pub(super) const HELPER_WAIT: Duration = Duration::from_secs(60);
/// Most bytes of a helper's answer.
const ANSWER_BYTES_MAX: u64 = 256 * 1024;
/// Longest name of a helper.
const NAME_MAX: usize = 64;
/// What helpers say when they keep nothing for a registry.
const NOTHING_KEPT: &str = "credentials not found";
/// User name that marks the secret as an identity token.
const TOKEN_USER: &str = "<token>";

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Asks a helper; `None` when it keeps nothing for the registry.
pub(super) async fn ask(
    name: &str,
    registry: &str,
    env: &BTreeMap<String, String>,
) -> Result<Option<Credential>, CredentialsError> {
    let fail = |why: &str| CredentialsError::Helper {
        name: name.chars().take(NAME_MAX).collect(),
        why: why.to_owned(),
    };
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > NAME_MAX || !name.bytes().all(legal) {
        return Err(fail("this is not a helper's name"));
    }
    let mut child = tokio::process::Command::new(format!("docker-credential-{name}"))
        .arg("get")
        .env_clear()
        .envs(env)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| fail(&format!("it could not be started: {error}")))?;
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(fail("it has no pipes"));
    };
    let talk = async {
        // A helper that answers without reading is fine; its answer counts.
        let _unread = stdin.write_all(format!("{registry}\n").as_bytes()).await;
        drop(stdin);
        let mut answer = Vec::new();
        stdout
            .take(ANSWER_BYTES_MAX)
            .read_to_end(&mut answer)
            .await?;
        Ok::<_, std::io::Error>((answer, child.wait().await?))
    };
    let (answer, status) = match tokio::time::timeout(HELPER_WAIT, talk).await {
        Err(_) => return Err(fail(&format!("it did not answer within {HELPER_WAIT:?}"))),
        Ok(Err(error)) => return Err(fail(&format!("its answer could not be read: {error}"))),
        Ok(Ok(done)) => done,
    };
    if !status.success() {
        let words = String::from_utf8_lossy(&answer);
        if words.contains(NOTHING_KEPT) {
            return Ok(None);
        }
        // Its words are for its user, and a failing helper has no secret to tell.
        let words: String = words
            .trim()
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        return Err(fail(&format!("it failed ({status}) {words}")));
    }
    let answer: Answer =
        serde_json::from_slice(&answer).map_err(|_| fail("its answer is not the helpers' JSON"))?;
    Ok(Some(match answer.username.as_str() {
        TOKEN_USER => Credential::IdentityToken(answer.secret),
        _ => Credential::Basic {
            user: answer.username,
            password: answer.secret,
        },
    }))
}
