//! The operator's own HTTP proxy, as `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` name it.
//!
//! Port 80 is forwarded (absolute request targets, RFC 9112 §3.2.2) when there is an HTTP proxy; everything else
//! goes through a `CONNECT` tunnel (RFC 9110 §9.3.6). TLS to the proxy and SOCKS are refused with a clear error.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use base64::Engine as _;
use kiln_core::network::normal_host;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::dial::BoxedDuplex;
use crate::origin::{host_and_port, split};

/// Most bytes of a proxy's answer to `CONNECT`.
pub const ANSWER_BYTES_MAX: usize = 16 * 1024;
/// Most entries of `NO_PROXY` that are looked at.
const NO_PROXY_MAX: usize = 256;

/// Why a proxy setting cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProxyError {
    /// Not `http://[user:password@]host[:port]`.
    #[error("the proxy of {variable} is not of the form http://[user:password@]host[:port]")]
    Url {
        /// Which setting.
        variable: &'static str,
    },
    /// TLS or SOCKS to the proxy.
    #[error("the proxy of {variable} uses {scheme}: only http:// proxies are supported")]
    Scheme {
        /// Which setting.
        variable: &'static str,
        /// What it asks for.
        scheme: String,
    },
}

/// Where a proxy listens, and what it wants to see.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    host: String,
    port: u16,
    authorization: Option<String>,
    /// With credentials; never shown.
    written: String,
}

impl ProxyUrl {
    fn parse(variable: &'static str, text: &str) -> Result<Self, ProxyError> {
        let text = text.trim();
        let with_scheme = match text.split_once("://") {
            None => format!("http://{text}"),
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("http") => text.to_owned(),
            Some((scheme, _)) => {
                return Err(ProxyError::Scheme {
                    variable,
                    scheme: scheme.chars().take(20).collect(),
                });
            }
        };
        let url = split(&with_scheme).ok_or(ProxyError::Url { variable })?;
        let authorization = url.userinfo.map(|userinfo| {
            let (user, password) = userinfo.split_once(':').unwrap_or((&userinfo, ""));
            let mut plain = percent_decoded(user);
            plain.push(b':');
            plain.extend(percent_decoded(password));
            let encoded = base64::engine::general_purpose::STANDARD.encode(plain);
            format!("Basic {encoded}")
        });
        Ok(Self {
            host: url.origin.host,
            port: url.origin.port,
            authorization,
            written: with_scheme,
        })
    }

    /// Host name or address of the proxy.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The whole URL, credentials included.
    pub(crate) fn as_written(&self) -> &str {
        &self.written
    }

    /// Value of `Proxy-Authorization`, if it wants one.
    #[must_use]
    pub fn authorization(&self) -> Option<&str> {
        self.authorization.as_deref()
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| bytes.get(at + 1..at + 3))
            .flatten()
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        out.push(hex.unwrap_or(bytes[at]));
        at += if hex.is_some() { 3 } else { 1 };
    }
    out
}

/// The next hop of one connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hop {
    /// The proxy.
    pub url: ProxyUrl,
    /// Forwarded HTTP instead of a tunnel.
    pub forward: bool,
}

/// The operator's proxy settings. The default is no proxy.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxyConfig {
    http: Option<ProxyUrl>,
    https: Option<ProxyUrl>,
    direct: Vec<Direct>,
}

/// One entry of `NO_PROXY`.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Direct {
    All,
    /// The name itself and everything below it, on this port or any.
    Suffix(String, Option<u16>),
}

impl ProxyConfig {
    /// Settings as the three variables hold them; empty texts mean unset.
    ///
    /// # Errors
    /// When a proxy cannot be used as written.
    pub fn new(
        http: Option<&str>,
        https: Option<&str>,
        no_proxy: Option<&str>,
    ) -> Result<Self, ProxyError> {
        let parse = |variable, text: Option<&str>| {
            text.filter(|text| !text.trim().is_empty())
                .map(|text| ProxyUrl::parse(variable, text))
                .transpose()
        };
        Ok(Self {
            http: parse("HTTP_PROXY", http)?,
            https: parse("HTTPS_PROXY", https)?,
            direct: no_proxy_entries(no_proxy.unwrap_or_default()),
        })
    }

    /// Settings of an environment, lower-case names first as curl does; `ALL_PROXY` fills what is missing.
    ///
    /// # Errors
    /// As [`ProxyConfig::new`].
    pub fn from_env(env: &BTreeMap<String, String>) -> Result<Self, ProxyError> {
        let get = |name: &str| {
            let set = |name: &str| env.get(name).map(String::as_str).filter(|v| !v.is_empty());
            set(&name.to_ascii_lowercase()).or_else(|| set(name))
        };
        let all = get("ALL_PROXY");
        Self::new(
            get("HTTP_PROXY").or(all),
            get("HTTPS_PROXY").or(all),
            get("NO_PROXY"),
        )
    }

    /// Whether any proxy is set.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.http.is_some() || self.https.is_some()
    }

    /// The proxy for `host:port`, or `None` when it is dialled directly.
    #[must_use]
    pub fn hop(&self, host: &str, port: u16) -> Option<Hop> {
        if self.direct.iter().any(|entry| entry.matches(host, port)) {
            return None;
        }
        let forwarded = self.http.as_ref().filter(|_| port == 80).map(|url| Hop {
            url: url.clone(),
            forward: true,
        });
        let tunnel = || {
            self.https.as_ref().map(|url| Hop {
                url: url.clone(),
                forward: false,
            })
        };
        match port {
            80 => forwarded,
            _ => tunnel(),
        }
    }
}

impl Direct {
    fn matches(&self, host: &str, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Suffix(name, only) => {
                let below = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|head| head.is_empty() || head.ends_with('.'));
                below && only.is_none_or(|only| only == port)
            }
        }
    }
}

/// Addresses and ranges in `NO_PROXY` are passed over: a machine connects to names only.
fn no_proxy_entries(text: &str) -> Vec<Direct> {
    let entry = |item: &str| {
        if item == "*" {
            return Some(Direct::All);
        }
        let item = item.trim_start_matches("*.").trim_start_matches('.');
        let (host, port) = host_and_port(item)?;
        normal_host(&host).map(|host| Direct::Suffix(host, port))
    };
    text.split([',', ' '])
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .take(NO_PROXY_MAX)
        .filter_map(entry)
        .collect()
}

/// Opens a tunnel to `host:port` and returns what the server sent behind the proxy's answer.
pub(super) async fn open_tunnel(
    stream: &mut BoxedDuplex,
    proxy: &ProxyUrl,
    host: &str,
    port: u16,
) -> io::Result<Vec<u8>> {
    let mut ask = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n");
    if let Some(value) = proxy.authorization() {
        ask.push_str(&format!("Proxy-Authorization: {value}\r\n"));
    }
    ask.push_str("\r\n");
    stream.write_all(ask.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = Vec::with_capacity(1024);
    loop {
        if let Some(at) = answer.windows(4).position(|part| part == b"\r\n\r\n") {
            check_answer(&answer[..at])?;
            return Ok(answer.split_off(at + 4));
        }
        if answer.len() >= ANSWER_BYTES_MAX {
            return Err(io::Error::other("the proxy's answer is too long"));
        }
        let mut part = [0; 1024];
        let len = stream.read(&mut part).await?;
        if len == 0 {
            return Err(io::Error::other("the proxy closed the connection"));
        }
        answer.extend_from_slice(&part[..len]);
    }
}

fn check_answer(head: &[u8]) -> io::Result<()> {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let status = line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1));
    match status.and_then(|status| status.parse::<u16>().ok()) {
        Some(200..=299) => Ok(()),
        Some(status) => Err(io::Error::other(format!(
            "the proxy refused with status {status}"
        ))),
        None => Err(io::Error::other("the proxy did not answer in HTTP")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_an_environment() {
        let env = |pairs: &[(&str, &str)]| {
            let pairs = pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            ProxyConfig::from_env(&pairs.collect())
        };
        let config = env(&[
            ("HTTP_PROXY", "proxy.example.org:3128"),
            ("https_proxy", "http://u:p%3A@proxy.example.org"),
            ("HTTPS_PROXY", "http://other.example.org"),
            (
                "NO_PROXY",
                "localhost, .corp.example.org,one.example.org:8443,10.0.0.0/8",
            ),
        ])
        .expect("legal");
        let http = config.hop("a.example.org", 80).expect("proxied");
        assert!(http.forward);
        assert_eq!(
            (http.url.host(), http.url.port()),
            ("proxy.example.org", 3128)
        );
        let https = config.hop("a.example.org", 443).expect("proxied");
        assert!(!https.forward);
        assert_eq!(https.url.port(), 80);
        assert_eq!(https.url.authorization(), Some("Basic dTpwOg=="));
        assert!(!format!("{config:?}").contains("dTpw"));
        for (host, port, direct) in [
            ("corp.example.org", 443, true),
            ("x.corp.example.org", 443, true),
            ("xcorp.example.org", 443, false),
            ("one.example.org", 8443, true),
            ("one.example.org", 443, false),
        ] {
            assert_eq!(config.hop(host, port).is_none(), direct, "{host}:{port}");
        }
        assert!(!env(&[("HTTP_PROXY", "")]).expect("legal").is_set());
        assert_eq!(
            env(&[("no_proxy", "*"), ("ALL_PROXY", "p:1")])
                .expect("legal")
                .hop("a.example.org", 443),
            None
        );
        assert!(matches!(
            env(&[("ALL_PROXY", "socks5://p:1")]),
            Err(ProxyError::Scheme { .. })
        ));
        assert!(matches!(
            env(&[("HTTP_PROXY", "http://")]),
            Err(ProxyError::Url { .. })
        ));
    }
}
