//! One HTTP exchange with a registry: TLS roots, proxy, deadlines, bounded answers, and no redirect that was not asked for.

use std::fmt;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE};
use ureq::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector as _, TcpConnector};
use ureq::{Agent, Proxy, ProxyProtocol, SendBody};

use super::error::RemoteError;
use super::offering::Offering;

/// How long a connection may take to open, name included.
pub(super) const CONNECT_WAIT: Duration = Duration::from_secs(20);
/// How long the connection may stand still while bytes are sent.
const STALL_WAIT: Duration = Duration::from_secs(60);
/// How long a registry may think about an ordinary request.
const ANSWER_WAIT: Duration = Duration::from_secs(60);
/// How long it may think about a blob it was sent: it hashes and stores it first.
const COMMIT_WAIT: Duration = Duration::from_secs(600);
/// How long an answer's body may take.
const BODY_WAIT: Duration = Duration::from_secs(60);
/// Most bytes of an answer that are read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// Buffer for sending, bytes.
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Most redirects of one look.
const REDIRECTS_MAX: u32 = 5;

/// An HTTP proxy of the host.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyServer {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// User and password it wants.
    pub login: Option<(String, String)>,
}

impl fmt::Debug for ProxyServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

/// Which proxy leads to a host and port.
type ProxyChoice = dyn Fn(&str, u16) -> Option<ProxyServer> + Send + Sync;

/// How this host reaches other registries.
#[derive(Clone, Default)]
pub struct RemoteConfig {
    /// Certificates (PEM) to trust besides those of the system.
    pub ca_bundle: Option<Vec<u8>>,
    /// Chooses the proxy for a host and port. `None` dials directly. Loopback is always dialled directly.
    pub proxy: Option<Arc<ProxyChoice>>,
    /// A protocol to offer in the handshake besides HTTP/1.1 (ALPN), by which a registry tells its clients apart; then nothing but TLS 1.3
    /// and the certificates of `ca_bundle` and the system are taken, and no proxy is used.
    pub offers: Option<Vec<u8>>,
}

impl fmt::Debug for RemoteConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ca_bytes = self.ca_bundle.as_ref().map(Vec::len);
        f.debug_struct("RemoteConfig")
            .field("ca_bytes", &ca_bytes)
            .finish_non_exhaustive()
    }
}

/// What is asked.
pub(super) struct Ask<'a> {
    pub(super) what: &'static str,
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) authorization: Option<&'a HeaderValue>,
    /// Follow redirects, without the authorization. Only for requests without a body.
    pub(super) follow: bool,
}

/// A request's body.
pub(super) enum Sent<'a> {
    Nothing,
    Bytes(&'a [u8]),
    Stream { size: u64, reader: &'a mut dyn Read },
}

/// What differs from exchange to exchange besides the request.
struct Options {
    proxy: Option<Proxy>,
    plain: bool,
    follow: bool,
    answer_wait: Duration,
}

/// A registry's answer, its body read and bounded.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// An answer whose body is still to be read.
pub(super) struct Fetched {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Box<dyn Read + Send>,
}

impl Fetched {
    /// Reads the body, bounded; what cannot be read is left out.
    pub(super) fn into_answer(self) -> Answer {
        let mut body = Vec::new();
        let _cut = self.body.take(ANSWER_BYTES_MAX).read_to_end(&mut body);
        Answer {
            status: self.status,
            headers: self.headers,
            body,
        }
    }
}

/// The way to one registry.
#[derive(Clone)]
pub(super) struct Http {
    agent: Agent,
    proxy: Option<Arc<ProxyChoice>>,
    registry: String,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("registry", &self.registry)
            .finish_non_exhaustive()
    }
}

impl Http {
    pub(super) fn new(config: &RemoteConfig, registry: &str) -> Result<Self, RemoteError> {
        let roots = match &config.ca_bundle {
            None => RootCerts::PlatformVerifier,
            Some(bundle) => roots(bundle)?,
        };
        let offering = config.offers.as_deref().map(|protocol| {
            let offering = Offering::new(protocol, &roots);
            offering.map_err(|error| RemoteError::Ca {
                why: error.to_string(),
            })
        });
        let offering = offering.transpose()?;
        let built = Agent::config_builder()
            .timeout_connect(Some(CONNECT_WAIT))
            .timeout_resolve(Some(CONNECT_WAIT))
            .timeout_per_write(Some(STALL_WAIT))
            .timeout_recv_body(Some(BODY_WAIT))
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .proxy(None)
            .user_agent("kiln")
            .output_buffer_size(SEND_BUFFER_BYTES)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .build();
        let (agent, proxy) = match offering {
            None => (built.new_agent(), config.proxy.clone()),
            Some(offering) => {
                let connector = ().chain(TcpConnector::default()).chain(offering);
                let resolver = DefaultResolver::default();
                (Agent::with_parts(built, connector, resolver), None)
            }
        };
        Ok(Self {
            agent,
            proxy,
            registry: registry.to_owned(),
        })
    }

    fn proxy_for(&self, uri: &Uri) -> Result<Option<Proxy>, ureq::Error> {
        let (Some(choose), Some(host)) = (&self.proxy, uri.host()) else {
            return Ok(None);
        };
        let default = if uri.scheme_str() == Some("http") {
            80
        } else {
            443
        };
        if super::target::is_loopback(host) {
            return Ok(None);
        }
        let Some(server) = choose(host, uri.port_u16().unwrap_or(default)) else {
            return Ok(None);
        };
        let mut proxy = Proxy::builder(ProxyProtocol::Http)
            .host(&server.host)
            .port(server.port);
        if let Some((user, password)) = &server.login {
            proxy = proxy.username(user).password(password);
        }
        proxy.build().map(Some)
    }

    /// One exchange.
    pub(super) fn exchange(&self, ask: Ask<'_>, body: Sent<'_>) -> Result<Answer, RemoteError> {
        let what = ask.what;
        let network = |source| RemoteError::Network {
            registry: self.registry.clone(),
            what,
            source: Box::new(source),
        };
        let plain = ask.uri.scheme_str() == Some("http");
        let proxy = self.proxy_for(&ask.uri).map_err(network)?;
        let answer_wait = if matches!(body, Sent::Stream { .. }) {
            COMMIT_WAIT
        } else {
            ANSWER_WAIT
        };
        let mut request = Request::new(());
        *request.method_mut() = ask.method;
        *request.uri_mut() = ask.uri;
        *request.headers_mut() = ask.headers;
        if let Some(value) = ask.authorization {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        let options = Options {
            proxy,
            plain,
            follow: ask.follow,
            answer_wait,
        };
        match body {
            Sent::Nothing => self.finish(request, options, network),
            Sent::Bytes(bytes) => self.finish(request.map(|()| bytes), options, network),
            Sent::Stream { size, reader } => {
                request
                    .headers_mut()
                    .insert(CONTENT_LENGTH, HeaderValue::from(size));
                self.finish(
                    request.map(|()| SendBody::from_reader(reader)),
                    options,
                    network,
                )
            }
        }
    }

    /// A GET whose body is streamed: no bound on its length or whole time here, but one on every standstill.
    pub(super) fn fetch(&self, ask: Ask<'_>) -> Result<Fetched, RemoteError> {
        let what = ask.what;
        let network = |source| RemoteError::Network {
            registry: self.registry.clone(),
            what,
            source: Box::new(source),
        };
        let plain = ask.uri.scheme_str() == Some("http");
        let proxy = self.proxy_for(&ask.uri).map_err(network)?;
        let mut request = Request::new(());
        *request.uri_mut() = ask.uri;
        *request.headers_mut() = ask.headers;
        if let Some(value) = ask.authorization {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        let request = self
            .agent
            .configure_request(request)
            .proxy(proxy)
            .https_only(!plain)
            .max_redirects(0)
            .timeout_recv_response(Some(ANSWER_WAIT))
            .timeout_recv_body(None)
            .timeout_per_read(Some(STALL_WAIT))
            .build();
        let response: Response<ureq::Body> = self.agent.run(request).map_err(network)?;
        let (parts, body) = response.into_parts();
        Ok(Fetched {
            status: parts.status,
            headers: parts.headers,
            body: Box::new(body.into_reader()),
        })
    }

    fn finish<B: ureq::AsSendBody>(
        &self,
        request: Request<B>,
        options: Options,
        network: impl Fn(ureq::Error) -> RemoteError,
    ) -> Result<Answer, RemoteError> {
        let request = self
            .agent
            .configure_request(request)
            .proxy(options.proxy)
            .https_only(!options.plain)
            .max_redirects(if options.follow { REDIRECTS_MAX } else { 0 })
            .timeout_recv_response(Some(options.answer_wait))
            .build();
        let response: Response<ureq::Body> = self.agent.run(request).map_err(&network)?;
        let (parts, body) = response.into_parts();
        let mut bytes = Vec::new();
        let read = body
            .into_reader()
            .take(ANSWER_BYTES_MAX)
            .read_to_end(&mut bytes);
        read.map_err(|error| network(ureq::Error::Io(error)))?;
        Ok(Answer {
            status: parts.status,
            headers: parts.headers,
            body: bytes,
        })
    }
}

/// The system's certificates and those of the bundle.
fn roots(bundle: &[u8]) -> Result<RootCerts, RemoteError> {
    let fail = |why: String| RemoteError::Ca { why };
    let mut certificates = Vec::new();
    for item in parse_pem(bundle) {
        match item.map_err(|error| fail(error.to_string()))? {
            PemItem::Certificate(certificate) => certificates.push(certificate),
            _ => return Err(fail("it holds something else than certificates".to_owned())),
        }
    }
    if certificates.is_empty() {
        return Err(fail("it holds no certificate".to_owned()));
    }
    // What cannot be loaded of the system's own is simply not trusted.
    let system = rustls_native_certs::load_native_certs().certs;
    certificates.extend(
        system
            .iter()
            .map(|der| Certificate::from_der(der).to_owned()),
    );
    Ok(RootCerts::from(certificates))
}

/// A header with this text as content type.
pub(super) fn content_type(media_type: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(media_type) {
        headers.insert(CONTENT_TYPE, value);
    }
    headers
}

/// Whether two URIs have one scheme, host and port.
pub(super) fn same_origin(one: &Uri, other: &Uri) -> bool {
    let port = |uri: &Uri| {
        uri.port_u16().or(if uri.scheme_str() == Some("http") {
            Some(80)
        } else {
            Some(443)
        })
    };
    one.scheme_str() == other.scheme_str()
        && one.host().map(str::to_ascii_lowercase) == other.host().map(str::to_ascii_lowercase)
        && port(one) == port(other)
}

/// A `Location` as seen from the request's URI (RFC 3986 §5.2, without dot segments). Never from TLS to plain HTTP.
pub(super) fn located(from: &Uri, location: &str) -> Option<Uri> {
    let scheme = from.scheme_str()?;
    let authority = from.authority()?;
    let text = if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", from.path())
    } else {
        let (folder, _) = from.path().rsplit_once('/')?;
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let uri: Uri = text.parse().ok()?;
    let plain_ok = scheme == "http"
        && uri
            .authority()
            .is_some_and(|to| super::target::is_loopback(to.as_str()));
    match uri.scheme_str() {
        Some("https") => Some(uri),
        Some("http") if plain_ok => Some(uri),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_seen_from_the_request() {
        let from: Uri = "https://r.example.org:8443/v2/a/blobs/uploads/"
            .parse()
            .expect("uri");
        let at = |location: &str| located(&from, location).map(|uri| uri.to_string());
        assert_eq!(
            at("/v2/x?_state=1").as_deref(),
            Some("https://r.example.org:8443/v2/x?_state=1")
        );
        assert_eq!(
            at("id-1").as_deref(),
            Some("https://r.example.org:8443/v2/a/blobs/uploads/id-1")
        );
        assert_eq!(
            at("//s.example.org/u").as_deref(),
            Some("https://s.example.org/u")
        );
        assert_eq!(
            at("https://s.example.org/u?a=b").as_deref(),
            Some("https://s.example.org/u?a=b")
        );
        for bad in [
            "http://r.example.org/u",
            "http://127.0.0.1/u",
            "ftp://x/y",
            "https://",
            "/a b",
        ] {
            assert_eq!(at(bad), None, "{bad}");
        }
        let plain: Uri = "http://127.0.0.1:5000/v2/".parse().expect("uri");
        assert!(located(&plain, "http://127.0.0.1:5001/u").is_some());
        assert!(located(&plain, "http://r.example.org/u").is_none());
    }

    #[test]
    fn origins() {
        let uri = |text: &str| text.parse::<Uri>().expect("uri");
        assert!(same_origin(
            &uri("https://A.example.org/x"),
            &uri("https://a.example.org:443/y")
        ));
        for other in [
            "http://a.example.org/x",
            "https://a.example.org:444/",
            "https://b.example.org/",
        ] {
            assert!(
                !same_origin(&uri("https://a.example.org/"), &uri(other)),
                "{other}"
            );
        }
    }

    #[test]
    fn a_bundle_must_be_certificates() {
        for bad in [
            &b""[..],
            b"nothing here",
            b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n",
        ] {
            assert!(roots(bad).is_err());
        }
    }
}
