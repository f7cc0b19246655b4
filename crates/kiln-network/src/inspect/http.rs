//! Checks every HTTP/1 request a guest sends on one connection (RFC 9112), and only then lets it through.
//!
//! A push parser without I/O: bytes go in, checked bytes come out, in order. It follows bodies by
//! `Content-Length` and chunks so that a second, pipelined or kept-alive request is checked like the first.
//! It is strict on purpose: whatever two servers could frame differently (both length headers, folded lines,
//! bare line feeds, two hosts) is refused, because that is how requests are smuggled.
//!
//! A request that asks for another protocol (`Upgrade`, `HTTP2-Settings`, HTTP/2's own first line) is refused: once the
//! server agreed, nothing on the connection could be checked any more. WebSockets therefore need TLS or a rule that says `raw`.

use std::fmt::Write as _;

use crate::origin::{host_and_port, split};

/// Most bytes of one request head, and of the trailers of one body.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most bytes of the line before each chunk.
pub const CHUNK_LINE_BYTES_MAX: usize = 1024;
/// Most characters kept of a name the client said.
const SAID_CHARS_MAX: usize = 260;

/// Why a request is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HttpRefusal {
    /// It names another host, or none.
    #[error("the HTTP request names {}", said.as_deref().unwrap_or("no host"))]
    WrongHost {
        /// What it named.
        said: Option<String>,
    },
    /// A `CONNECT` request: it would open a tunnel that cannot be checked.
    #[error("the HTTP request is a CONNECT to {said}")]
    Tunnel {
        /// Its target.
        said: String,
    },
    /// It asks to speak another protocol on the connection: after that nothing could be checked.
    #[error(
        "the HTTP request asks for another protocol ({said}), which only a rule with /raw admits"
    )]
    Upgrade {
        /// What it asked for.
        said: String,
    },
    /// A head, chunk line or trailer section beyond its bound.
    #[error("an HTTP {0} is longer than allowed")]
    TooLong(&'static str),
    /// Not HTTP/1 as the RFC writes it.
    #[error("the HTTP request is malformed: {0}")]
    Malformed(&'static str),
}

impl HttpRefusal {
    /// The name the client said, if the refusal is about one.
    #[must_use]
    pub fn said(&self) -> Option<&str> {
        match self {
            Self::WrongHost { said } => said.as_deref(),
            Self::Tunnel { said } => Some(said),
            Self::Upgrade { .. } | Self::TooLong(_) | Self::Malformed(_) => None,
        }
    }
}

/// How requests are written to the next hop.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Form {
    /// As they came: the next hop is the server itself.
    #[default]
    Origin,
    /// With an absolute target: the next hop is the operator's HTTP proxy.
    Proxy {
        /// Value of a `Proxy-Authorization` header to add, if the proxy wants one.
        authorization: Option<String>,
    },
}

/// The checker of one connection.
#[derive(Debug)]
pub struct HttpChecker {
    host: String,
    port: u16,
    form: Form,
    state: State,
    /// Bytes of an unfinished head, chunk line or trailer section.
    held: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Head,
    /// This many bytes of a body with a known length.
    Body(u64),
    ChunkLine,
    /// This many bytes of a chunk, its closing CRLF included.
    Chunk(u64),
    /// Trailer lines, of which this many bytes may still come.
    Trailers(usize),
}

#[derive(Clone, Copy)]
struct Framing {
    length: Option<u64>,
    chunked: bool,
}

impl HttpChecker {
    /// A checker for one connection to `host:port`; `host` is already lower case.
    #[must_use]
    pub fn new(host: &str, port: u16, form: Form) -> Self {
        Self {
            host: host.to_owned(),
            port,
            form,
            state: State::Head,
            held: Vec::new(),
        }
    }

    /// Whether the connection may end here: between two requests.
    #[must_use]
    pub fn at_rest(&self) -> bool {
        self.state == State::Head && self.held.is_empty()
    }

    /// Takes bytes of the client and appends what may be sent on to `out`.
    ///
    /// # Errors
    /// The first thing that is refused; what was appended are requests, and bodies of them, that may go to this server. The connection must then end.
    pub fn push(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Result<(), HttpRefusal> {
        while !input.is_empty() {
            match self.state {
                State::Head => self.head_bytes(&mut input, out)?,
                State::Body(left) => {
                    let left = pass(&mut input, left, out);
                    self.state = if left == 0 {
                        State::Head
                    } else {
                        State::Body(left)
                    };
                }
                State::ChunkLine => {
                    if self.hold(&mut input, b"\r\n", CHUNK_LINE_BYTES_MAX, "chunk line")? {
                        let size = chunk_size(&self.held)?;
                        out.append(&mut self.held);
                        self.state = match size {
                            0 => State::Trailers(HEAD_BYTES_MAX),
                            _ => State::Chunk(size + 2),
                        };
                    }
                }
                State::Chunk(left) => self.chunk(left, &mut input, out)?,
                State::Trailers(left) => self.trailer(left, &mut input, out)?,
            }
        }
        Ok(())
    }

    /// Moves input into `held` until `end` is there. `Ok(true)` when it is.
    fn hold(
        &mut self,
        input: &mut &[u8],
        end: &[u8],
        bytes_max: usize,
        what: &'static str,
    ) -> Result<bool, HttpRefusal> {
        let from = self.held.len().saturating_sub(end.len() - 1);
        let room = (bytes_max - self.held.len()).min(input.len());
        let before = self.held.len();
        self.held.extend_from_slice(&input[..room]);
        let found = self.held[from..]
            .windows(end.len())
            .position(|part| part == end)
            .map(|at| from + at + end.len());
        let keep = found.unwrap_or(self.held.len());
        self.held.truncate(keep);
        *input = &input[keep - before..];
        if found.is_none() && self.held.len() >= bytes_max {
            return Err(HttpRefusal::TooLong(what));
        }
        Ok(found.is_some())
    }

    /// Bytes of a head. Empty lines before it are ignored (RFC 9112 §2.2) and not sent on.
    fn head_bytes(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<(), HttpRefusal> {
        let first = input[0];
        if self.held == b"\r" || (self.held.is_empty() && first == b'\r') {
            *input = &input[1..];
            match (self.held.is_empty(), first) {
                (true, _) => self.held.push(first),
                (false, b'\n') => self.held.clear(),
                (false, _) => return Err(HttpRefusal::Malformed("a bare line end")),
            }
            return Ok(());
        }
        if self.hold(input, b"\r\n\r\n", HEAD_BYTES_MAX, "request head")? {
            self.head(out)?;
        }
        Ok(())
    }

    /// A complete head is held: checks it and sends it on.
    fn head(&mut self, out: &mut Vec<u8>) -> Result<(), HttpRefusal> {
        let held = std::mem::take(&mut self.held);
        let (head, framing) = self.checked_head(&held)?;
        out.extend_from_slice(&head);
        self.state = match framing {
            Framing { chunked: true, .. } => State::ChunkLine,
            Framing {
                length: Some(length @ 1..),
                ..
            } => State::Body(length),
            Framing { .. } => State::Head,
        };
        Ok(())
    }

    fn checked_head(&self, head: &[u8]) -> Result<(Vec<u8>, Framing), HttpRefusal> {
        let head = &head[..head.len() - 4];
        if head
            .windows(2)
            .any(|two| two[1] == b'\n' && two[0] != b'\r')
            || head
                .windows(2)
                .any(|two| two[0] == b'\r' && two[1] != b'\n')
            || head.last() == Some(&b'\r')
        {
            return Err(HttpRefusal::Malformed("a bare line end"));
        }
        let mut lines = head
            .split(|b| *b == b'\n')
            .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        let line = lines.next().unwrap_or_default();
        let mut out = self.request_line(line)?;
        let mut host: Option<&[u8]> = None;
        let mut framing = Framing {
            length: None,
            chunked: false,
        };
        for line in lines {
            let (name, value) = field(line)?;
            let name_is = |text: &str| name.eq_ignore_ascii_case(text.as_bytes());
            if name_is("host") {
                if host.replace(value).is_some() {
                    return Err(HttpRefusal::Malformed("two Host headers"));
                }
            } else if name_is("content-length") {
                let length = decimal(value).ok_or(HttpRefusal::Malformed("Content-Length"))?;
                if framing.length.replace(length).is_some() {
                    return Err(HttpRefusal::Malformed("two Content-Length headers"));
                }
            } else if name_is("transfer-encoding") {
                if !value.eq_ignore_ascii_case(b"chunked") || framing.chunked {
                    return Err(HttpRefusal::Malformed("Transfer-Encoding"));
                }
                framing.chunked = true;
            } else if upgrades(name, value) {
                return Err(HttpRefusal::Upgrade { said: shown(value) });
            }
            let proxied = matches!(self.form, Form::Proxy { .. });
            let dropped =
                proxied && (name_is("proxy-authorization") || name_is("proxy-connection"));
            if !dropped {
                out.extend_from_slice(line);
                out.extend_from_slice(b"\r\n");
            }
        }
        self.check_host(host)?;
        if framing.chunked && (framing.length.is_some() || line.ends_with(b"1.0")) {
            return Err(HttpRefusal::Malformed("two ways to frame the body"));
        }
        if let Form::Proxy {
            authorization: Some(value),
        } = &self.form
        {
            out.extend_from_slice(format!("Proxy-Authorization: {value}\r\n").as_bytes());
        }
        out.extend_from_slice(b"\r\n");
        Ok((out, framing))
    }

    /// Checks a request line and writes it for the next hop.
    fn request_line(&self, line: &[u8]) -> Result<Vec<u8>, HttpRefusal> {
        let bad = HttpRefusal::Malformed("request line");
        let line = std::str::from_utf8(line).map_err(|_| bad.clone())?;
        let mut parts = line.split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad);
        };
        if method == "PRI" && version.starts_with("HTTP/2") {
            return Err(HttpRefusal::Upgrade {
                said: "HTTP/2".to_owned(),
            });
        }
        let target_legal = !target.is_empty() && target.bytes().all(|b| b > 0x20 && b != 0x7f);
        if method.is_empty()
            || !method.bytes().all(is_token)
            || !target_legal
            || !matches!(version, "HTTP/1.1" | "HTTP/1.0")
        {
            return Err(bad);
        }
        if method.eq_ignore_ascii_case("CONNECT") {
            return Err(HttpRefusal::Tunnel {
                said: shown(target.as_bytes()),
            });
        }
        let path = if target.starts_with('/') {
            target
        } else if target == "*" && method == "OPTIONS" {
            ""
        } else {
            let url = split(target)
                .filter(|url| url.userinfo.is_none() && !url.origin.tls)
                .ok_or(HttpRefusal::Malformed("request target"))?;
            if url.origin.host != self.host || url.origin.port != self.port {
                return Err(HttpRefusal::WrongHost {
                    said: Some(shown(target.as_bytes())),
                });
            }
            return Ok(format!("{method} {target} {version}\r\n").into_bytes());
        };
        let mut out = String::with_capacity(line.len() + 2);
        // Writing to a String cannot fail.
        let _ = match &self.form {
            Form::Origin => write!(out, "{line}\r\n"),
            Form::Proxy { .. } if self.port == 80 => {
                write!(out, "{method} http://{}{path} {version}\r\n", self.host)
            }
            Form::Proxy { .. } => write!(
                out,
                "{method} http://{}:{}{path} {version}\r\n",
                self.host, self.port
            ),
        };
        Ok(out.into_bytes())
    }

    fn check_host(&self, said: Option<&[u8]>) -> Result<(), HttpRefusal> {
        let right = said
            .and_then(|value| std::str::from_utf8(value).ok())
            .and_then(host_and_port)
            .is_some_and(|(host, port)| {
                host == self.host && port.is_none_or(|port| port == self.port)
            });
        if right {
            Ok(())
        } else {
            Err(HttpRefusal::WrongHost {
                said: said.map(shown),
            })
        }
    }

    fn chunk(
        &mut self,
        left: u64,
        input: &mut &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), HttpRefusal> {
        let before = out.len();
        let now = pass(input, left, out);
        // The last two bytes of a chunk are its CRLF.
        let passed = (out.len() - before) as u64;
        for at in left.saturating_sub(2)..passed {
            let want = if left - at == 2 { b'\r' } else { b'\n' };
            if out.get(before + at as usize) != Some(&want) {
                // What came before it went on already if it came by itself.
                out.truncate(before + at as usize);
                return Err(HttpRefusal::Malformed("chunk end"));
            }
        }
        self.state = if now == 0 {
            State::ChunkLine
        } else {
            State::Chunk(now)
        };
        Ok(())
    }

    fn trailer(
        &mut self,
        left: usize,
        input: &mut &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), HttpRefusal> {
        if !self.hold(input, b"\r\n", left, "trailer section")? {
            return Ok(());
        }
        self.state = if self.held == b"\r\n" {
            State::Head
        } else {
            field(&self.held[..self.held.len() - 2])?;
            let left = left - self.held.len();
            if left < 2 {
                return Err(HttpRefusal::TooLong("trailer section"));
            }
            State::Trailers(left)
        };
        out.append(&mut self.held);
        Ok(())
    }
}

/// Passes up to `left` bytes on; the rest of `left` comes back.
fn pass(input: &mut &[u8], left: u64, out: &mut Vec<u8>) -> u64 {
    let len = usize::try_from(left).map_or(input.len(), |left| left.min(input.len()));
    out.extend_from_slice(&input[..len]);
    *input = &input[len..];
    left - len as u64
}

/// RFC 9110 §5.6.3.
fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Whether a header asks to leave HTTP/1, or belongs to one that does (RFC 9110 §7.8, RFC 7540 §3.2).
fn upgrades(name: &[u8], value: &[u8]) -> bool {
    let name_is = |text: &str| name.eq_ignore_ascii_case(text.as_bytes());
    let listed = |option: &[u8]| {
        let option = option.trim_ascii();
        option.eq_ignore_ascii_case(b"upgrade") || option.eq_ignore_ascii_case(b"http2-settings")
    };
    name_is("upgrade")
        || name_is("http2-settings")
        || (name_is("connection") && value.split(|b| *b == b',').any(listed))
}

fn field(line: &[u8]) -> Result<(&[u8], &[u8]), HttpRefusal> {
    let at = line
        .iter()
        .position(|b| *b == b':')
        .ok_or(HttpRefusal::Malformed("header without a colon"))?;
    let (name, value) = (&line[..at], &line[at + 1..]);
    if name.is_empty() || !name.iter().copied().all(is_token) {
        return Err(HttpRefusal::Malformed("header name"));
    }
    if value
        .iter()
        .any(|b| (*b < 0x20 && *b != b'\t') || *b == 0x7f)
    {
        return Err(HttpRefusal::Malformed("header value"));
    }
    // Of what `trim_ascii` takes away only blanks are left by now.
    Ok((name, value.trim_ascii()))
}

fn decimal(value: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(value).ok()?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// The size in a chunk line, its CRLF included in `line`.
fn chunk_size(line: &[u8]) -> Result<u64, HttpRefusal> {
    let bad = HttpRefusal::Malformed("chunk line");
    let line = line.strip_suffix(b"\r\n").unwrap_or(line);
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    // Blanks alone: a line end among them is one to a server that takes a bare line feed.
    let blanks = line[digits..].iter().take_while(|b| is_blank(**b)).count();
    let after = &line[digits + blanks..];
    let extension_legal = after.is_empty()
        || (after[0] == b';'
            && after
                .iter()
                .all(|b| is_blank(*b) || (*b > 0x20 && *b != 0x7f)));
    let size = std::str::from_utf8(&line[..digits])
        .ok()
        .filter(|_| (1..=15).contains(&digits))
        .and_then(|digits| u64::from_str_radix(digits, 16).ok());
    size.filter(|_| extension_legal).ok_or(bad)
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|c| !c.is_control())
        .take(SAID_CHARS_MAX)
        .collect()
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
