//! Where a command's server is, and what proves who asks: the command line, the environment, `kiln.toml`, or this home's own socket.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_worker::fleet::http::{Http, Target};
use kiln_worker::home::Home;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

use super::Server;
use crate::args::ServerArgs;
use crate::config::Config;
use crate::environment;
use crate::error::{CliError, Result};
use crate::show::ShownPath as _;

/// Name of the file with the token, in the configuration directory.
const TOKEN_FILE: &str = "token";
/// Longest token, bytes.
const TOKEN_MAX: usize = 16 * 1024;

/// What somebody said about where the server is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// `unix:PATH`: a private socket; the kernel proves who asks.
    Socket(PathBuf),
    /// `http://` on loopback.
    Plain {
        /// Address or `localhost`.
        host: String,
        /// Port.
        port: u16,
    },
    /// `https://`.
    Tls {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

impl std::str::FromStr for Place {
    type Err = CliError;

    fn from_str(text: &str) -> Result<Self> {
        let shown: String = text.chars().take(200).collect();
        let wrong = || {
            CliError::usage(format!("{shown:?} is not the address of a server"))
                .hint("write https://HOST:PORT, or unix:PATH for the private socket of a home")
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return path
                .is_absolute()
                .then_some(Self::Socket(path))
                .ok_or_else(wrong);
        }
        let uri: http::Uri = text.parse().map_err(|_| wrong())?;
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(wrong)?;
        let host = host.trim_matches(['[', ']']).to_owned();
        let account = uri
            .authority()
            .is_some_and(|part| part.as_str().contains('@'));
        if account || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong());
        }
        match uri.scheme_str() {
            Some("https") => Ok(Self::Tls {
                port: uri.port_u16().unwrap_or(443),
                host,
            }),
            Some("http") if is_loopback(&host) => Ok(Self::Plain {
                port: uri.port_u16().unwrap_or(80),
                host,
            }),
            Some("http") => Err(CliError::usage(format!(
                "{shown}: tokens and sources are not sent unencrypted to another host"
            ))
            .hint("use https://")),
            _ => Err(wrong()),
        }
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// The server that somebody named: `--server`, `KILN_SERVER`, or `[server]` of `kiln.toml`.
///
/// # Errors
/// When what they named cannot be used.
pub(crate) fn configured(said: &ServerArgs) -> Result<Option<Server>> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    let config = Config::load(&home.config.join("kiln.toml"))?.server;
    let Some(text) = address(said, config.url) else {
        return Ok(None);
    };
    let given = said.ca.clone().filter(|path| !path.as_os_str().is_empty());
    let ca = given.or(config.ca);
    let target = match text.parse()? {
        Place::Socket(path) => Target::Socket(path),
        Place::Plain { host, port } => Target::Tcp { host, port },
        Place::Tls { host, port } => {
            let config = Arc::new(tls(ca.as_deref())?);
            Target::Tls { host, port, config }
        }
    };
    let token = match target {
        Target::Socket(_) => None,
        _ => token(&home.config.join(TOKEN_FILE))?,
    };
    Ok(Some(Server {
        http: Http::new(target),
        token,
        name: format!("the server at {text}"),
    }))
}

fn address(said: &ServerArgs, configured: Option<String>) -> Option<String> {
    let said = said.server.clone().filter(|text| !text.is_empty());
    said.or(configured)
}

/// What the server is called that jobs would go to, if there is one. Nothing is asked of it.
///
/// # Errors
/// When the configuration cannot be read, or the address is none.
pub(crate) fn named(said: &ServerArgs) -> Result<Option<String>> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    let config = Config::load(&home.config.join("kiln.toml"))?.server;
    let Some(text) = address(said, config.url) else {
        return Ok(None);
    };
    let _legal: Place = text.parse()?;
    Ok(Some(text))
}

impl Server {
    /// The controller of this home, at its private socket.
    pub(crate) fn of_home(socket: PathBuf) -> Self {
        Self {
            http: Http::new(Target::Socket(socket)),
            token: None,
            name: "the controller of this home".to_owned(),
        }
    }
}

/// The token: `KILN_TOKEN`, else the file, which nobody else may read.
fn token(path: &Path) -> Result<Option<String>> {
    let text = match environment::var("KILN_TOKEN").filter(|text| !text.is_empty()) {
        Some(text) => text,
        None => {
            let meta = match fs::metadata(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => {
                    return Err(CliError::usage(format!(
                        "could not read {}: {error}",
                        path.shown()
                    )));
                }
                Ok(meta) => meta,
            };
            if meta.mode() & 0o077 != 0 {
                return Err(CliError::usage(format!(
                    "others may read the token in {}",
                    path.shown()
                ))
                .hint(format!("run chmod 600 {}", path.shown())));
            }
            fs::read_to_string(path).map_err(|error| {
                CliError::usage(format!("could not read {}: {error}", path.shown()))
            })?
        }
    };
    let text = text.trim();
    if text.len() > TOKEN_MAX || text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(
            CliError::usage("the token is none: it is one line without spaces").hint(
                "`kiln token create` makes one; it goes into KILN_TOKEN or ~/.config/kiln/token",
            ),
        );
    }
    Ok(Some(text.to_owned()))
}

/// TLS that trusts what this host trusts, and an authority of its user's choice.
fn tls(ca: Option<&Path>) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    // What cannot be read is not trusted; a host without any may still have an authority of its own.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca {
        let wrong = |why: String| CliError::usage(format!("--ca {}: {why}", path.shown()));
        let pem = fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots
                .add(certificate)
                .map_err(|error| wrong(error.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(wrong("there is no certificate in it".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| CliError::infrastructure(&error))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn addresses() {
        let tls = |host: &str, port| Place::Tls {
            host: host.to_owned(),
            port,
        };
        for (text, want) in [
            ("https://ci.example.org:8443", tls("ci.example.org", 8443)),
            ("https://ci.example.org/", tls("ci.example.org", 443)),
            ("https://[::1]:1", tls("::1", 1)),
            (
                "unix:/run/kiln.sock",
                Place::Socket("/run/kiln.sock".into()),
            ),
            (
                "http://127.0.0.1:8080",
                Place::Plain {
                    host: "127.0.0.1".to_owned(),
                    port: 8080,
                },
            ),
        ] {
            assert_eq!(text.parse::<Place>().expect(text), want);
        }
        for bad in [
            "",
            "ci.example.org",
            "http://ci.example.org",
            "https://a@b",
            "https://a/b",
            "unix:x",
            "ftp://x",
            "https://",
        ] {
            let error = bad.parse::<Place>().expect_err(bad);
            assert_eq!(error.exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn a_token_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("token");
        assert_eq!(token(&path).expect("none"), None);
        fs::write(&path, "kst_1_2\n").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("mode");
        let error = token(&path).expect_err("readable");
        assert!(error.hints[0].contains("chmod 600"), "{error:?}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
        assert_eq!(token(&path).expect("there").as_deref(), Some("kst_1_2"));
        fs::write(&path, "a\nb").expect("write");
        assert!(token(&path).is_err());
    }
}
