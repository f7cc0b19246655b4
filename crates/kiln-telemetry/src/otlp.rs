//! Spans to a collector: OTLP over HTTP with JSON (OpenTelemetry Protocol 1.x, `POST /v1/traces`; ids in hex, times as texts of nanoseconds).
//!
//! One thread sends; whoever makes spans never waits: what finds no room in the queue, or no collector, is dropped and counted.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Uri;

use crate::trace::TraceContext;

/// Spans that may wait to be sent.
const QUEUE_MAX: usize = 4_096;
/// Most spans of one request.
const BATCH_MAX: usize = 512;
/// Longest time a span waits for others to go with.
const GATHER: Duration = Duration::from_secs(2);
/// How often it is seen whether somebody waits for what is gathered.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time for one request.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Tries to send one batch.
const TRIES_MAX: u32 = 3;
/// Wait before the next try.
const RETRY: Duration = Duration::from_millis(500);
/// Longest URL.
const URL_MAX: usize = 2_048;
/// Longest attribute value, in characters.
const VALUE_MAX: usize = 256;

/// One finished piece of work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    /// Its place: trace and own id.
    pub context: TraceContext,
    /// Id of the span above it, 16 hex digits; none at the top of a trace.
    pub parent: Option<String>,
    /// What it was.
    pub name: String,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// Whether it went well.
    pub ok: bool,
    /// More about it.
    pub attributes: Vec<(&'static str, String)>,
}

/// Why there is no exporter.
#[derive(Debug, thiserror::Error)]
pub enum TracerError {
    /// Not the address of a collector.
    #[error("{0:?} is not a collector's address: write http://HOST:4318 or https://HOST[:PORT]")]
    Url(String),
    /// The thread that sends could not start.
    #[error("the thread that sends spans could not start")]
    Thread(#[source] std::io::Error),
}

/// Hears how many spans were dropped, each time some are.
pub type Dropped = Arc<dyn Fn(u64) + Send + Sync>;

/// Takes spans. Cheap to clone; one that is off takes nothing.
#[derive(Clone, Default)]
pub struct Tracer {
    sending: Option<Sending>,
}

#[derive(Clone)]
struct Sending {
    queue: SyncSender<Span>,
    dropped: Dropped,
    unsent: Arc<Unsent>,
}

/// Spans that were taken, and neither sent nor dropped yet.
#[derive(Default)]
struct Unsent {
    count: Mutex<u64>,
    fewer: Condvar,
    /// Somebody waits for them: nothing more is gathered.
    hurry: AtomicBool,
}

impl Unsent {
    fn more(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn less(&self, by: usize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_sub(u64::try_from(by).unwrap_or(u64::MAX));
        drop(count);
        self.fewer.notify_all();
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer")
            .field("on", &self.sending.is_some())
            .finish()
    }
}

impl Tracer {
    /// Takes nothing.
    #[must_use]
    pub fn off() -> Self {
        Self::default()
    }

    /// Sends to the collector at `url`, as `service`. The thread ends when the last clone is gone and what waits was sent or dropped.
    ///
    /// # Errors
    /// When the address is none, or the thread does not start.
    pub fn start(url: &str, service: &'static str, dropped: Dropped) -> Result<Self, TracerError> {
        let endpoint =
            endpoint(url).ok_or_else(|| TracerError::Url(url.chars().take(200).collect()))?;
        let (queue, waiting) = sync_channel(QUEUE_MAX);
        let heard = Arc::clone(&dropped);
        let unsent = Arc::new(Unsent::default());
        let left = Arc::clone(&unsent);
        std::thread::Builder::new()
            .name("otlp".to_owned())
            .spawn(move || send_all(&waiting, &endpoint, service, &heard, &left))
            .map_err(TracerError::Thread)?;
        let sending = Some(Sending {
            queue,
            dropped,
            unsent,
        });
        Ok(Self { sending })
    }

    /// Waits until what was taken so far is sent or dropped, at most this long: for a process that is about to end. What is taken later is no
    /// longer gathered, but sent at once.
    pub fn flush(&self, patience: Duration) {
        let Some(Sending { unsent, .. }) = &self.sending else {
            return;
        };
        unsent.hurry.store(true, Ordering::Relaxed);
        let count = unsent.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = unsent
            .fewer
            .wait_timeout_while(count, patience, |count| *count > 0);
        drop(waited);
    }

    /// Gives the spans to whoever holds the other end, instead of to a collector.
    #[must_use]
    pub fn to_queue(dropped: Dropped) -> (Self, Receiver<Span>) {
        let (queue, taken) = sync_channel(QUEUE_MAX);
        let sending = Some(Sending {
            queue,
            dropped,
            unsent: Arc::default(),
        });
        (Self { sending }, taken)
    }

    /// Whether spans go anywhere.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.sending.is_some()
    }

    /// Takes a span, if its trace is recorded. Never waits.
    pub fn record(&self, span: Span) {
        let Some(sending) = &self.sending else { return };
        if !span.context.is_sampled() {
            return;
        }
        // Before it can be sent.
        sending.unsent.more();
        if sending.queue.try_send(span).is_err() {
            sending.unsent.less(1);
            (sending.dropped)(1);
        }
    }
}

/// Whether a text is the address of a collector.
///
/// # Errors
/// When it is none.
pub fn check(url: &str) -> Result<(), TracerError> {
    let known = endpoint(url).map(drop);
    known.ok_or_else(|| TracerError::Url(url.chars().take(200).collect()))
}

/// The address that batches go to: as it is when it has a path, else `/v1/traces` there.
fn endpoint(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok().filter(|_| url.len() <= URL_MAX)?;
    let legal = matches!(uri.scheme_str(), Some("http" | "https"));
    let host = uri.host().is_some_and(|host| !host.is_empty());
    let account = uri
        .authority()
        .is_some_and(|all| all.as_str().contains('@'));
    if !legal || !host || account {
        return None;
    }
    match uri.path() {
        "/" | "" => Some(format!("{}/v1/traces", url.trim_end_matches('/'))),
        _ => Some(url.to_owned()),
    }
}

fn send_all(
    waiting: &Receiver<Span>,
    endpoint: &str,
    service: &str,
    dropped: &Dropped,
    unsent: &Unsent,
) {
    // Neither proxies of the environment nor redirects: spans go where the operator said.
    let agent: Agent = Agent::config_builder()
        .timeout_global(Some(SEND_TIMEOUT))
        .max_redirects(0)
        .proxy(None)
        .build()
        .into();
    while let Ok(first) = waiting.recv() {
        let mut batch = vec![first];
        let until = Instant::now() + GATHER;
        let mut over = false;
        while batch.len() < BATCH_MAX && !over {
            let left = until.saturating_duration_since(Instant::now());
            match waiting.recv_timeout(left.min(LOOK)) {
                Ok(span) => batch.push(span),
                Err(RecvTimeoutError::Timeout) => {
                    over = left <= LOOK || unsent.hurry.load(Ordering::Relaxed);
                }
                Err(RecvTimeoutError::Disconnected) => over = true,
            }
        }
        if let Err(why) = send(&agent, endpoint, &body(service, &batch)) {
            tracing::warn!(why, spans = batch.len(), "spans were dropped");
            dropped(u64::try_from(batch.len()).unwrap_or(u64::MAX));
        }
        unsent.less(batch.len());
    }
}

fn send(agent: &Agent, endpoint: &str, body: &Value) -> Result<(), String> {
    let text = body.to_string();
    let mut tries = 1;
    loop {
        let sent = agent
            .post(endpoint)
            .header("content-type", "application/json")
            .send(text.as_str());
        let why = match sent {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            Ok(answer) => format!("the collector said {}", answer.status()),
            // 429 and what a collector says while it starts are worth another try, and so is silence.
            Err(ureq::Error::StatusCode(status)) if status == 429 || status >= 500 => {
                format!("the collector said {status}")
            }
            Err(ureq::Error::StatusCode(status)) => {
                return Err(format!("the collector said {status}"));
            }
            Err(error) => error.to_string(),
        };
        if tries == TRIES_MAX {
            return Err(why);
        }
        tries += 1;
        std::thread::sleep(RETRY);
    }
}

fn body(service: &str, spans: &[Span]) -> Value {
    let spans: Vec<Value> = spans.iter().map(span).collect();
    json!({ "resourceSpans": [{
        "resource": { "attributes": [attribute("service.name", service)] },
        "scopeSpans": [{ "scope": { "name": "kiln" }, "spans": spans }],
    }] })
}

fn span(span: &Span) -> Value {
    let attributes = span.attributes.iter();
    let attributes: Vec<Value> = attributes
        .map(|(key, value)| attribute(key, value))
        .collect();
    // Kind 1 is internal work; status 1 is ok, 2 an error.
    json!({
        "traceId": span.context.trace_id(),
        "spanId": span.context.span_id(),
        "parentSpanId": span.parent.clone().unwrap_or_default(),
        "name": span.name,
        "kind": 1,
        "startTimeUnixNano": nanos(span.start),
        "endTimeUnixNano": nanos(span.end.max(span.start)),
        "attributes": attributes,
        "status": { "code": if span.ok { 1 } else { 2 } },
    })
}

fn attribute(key: &str, value: &str) -> Value {
    let value: String = value.chars().take(VALUE_MAX).collect();
    json!({ "key": key, "value": { "stringValue": value } })
}

fn nanos(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().to_string()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn a_process_that_ends_sends_what_it_gathered() {
        let (port, bodies) = fake_collector(&[200]);
        let (_, dropped) = counter();
        let tracer =
            Tracer::start(&format!("http://127.0.0.1:{port}"), "test", dropped).expect("starts");
        tracer.record(made("run", true));
        tracer.flush(Duration::from_secs(60));
        let body = bodies
            .try_recv()
            .expect("it was sent before flush came back");
        assert!(body.to_string().contains("\"run\""), "{body}");
        Tracer::off().flush(Duration::from_secs(60));
        let (queued, _spans) = Tracer::to_queue(Arc::new(|_| {}));
        queued.record(made("run", false));
        queued.flush(Duration::from_secs(60));
    }

    fn made(name: &str, sampled: bool) -> Span {
        let start = UNIX_EPOCH + Duration::from_millis(1_500);
        Span {
            context: TraceContext::root([1; 16], [2; 8], sampled).expect("not zero"),
            parent: Some("0303030303030303".to_owned()),
            name: name.to_owned(),
            start,
            end: start + Duration::from_millis(250),
            ok: true,
            attributes: vec![("kiln.job", "b1".to_owned())],
        }
    }

    /// A fake collector: answers with these statuses, one a connection, and gives the bodies it got.
    fn fake_collector(statuses: &'static [u16]) -> (u16, std::sync::mpsc::Receiver<Value>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let port = listener.local_addr().expect("address").port();
        let (sender, bodies) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for status in statuses {
                let (mut line, _) = listener.accept().expect("accepts");
                let mut bytes = Vec::new();
                let mut piece = [0; 4096];
                let body = loop {
                    let count = line.read(&mut piece).expect("reads");
                    bytes.extend_from_slice(&piece[..count]);
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else {
                        continue;
                    };
                    assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
                    let length = head.to_ascii_lowercase();
                    let length = length.split("content-length: ").nth(1).expect("a length");
                    let length: usize = length
                        .lines()
                        .next()
                        .expect("line")
                        .trim()
                        .parse()
                        .expect("number");
                    if body.len() >= length {
                        break body.to_owned();
                    }
                };
                sender
                    .send(serde_json::from_str(&body).expect("JSON"))
                    .expect("is read");
                let answer = format!(
                    "HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                );
                line.write_all(answer.as_bytes()).expect("writes");
            }
        });
        (port, bodies)
    }

    fn counter() -> (Arc<AtomicU64>, Dropped) {
        let count = Arc::new(AtomicU64::new(0));
        let heard = Arc::clone(&count);
        let dropped: Dropped = Arc::new(move |n| {
            let _before = heard.fetch_add(n, Ordering::SeqCst);
        });
        (count, dropped)
    }

    #[test]
    fn a_collector_gets_what_is_recorded_and_once_more_when_it_was_away() {
        let (port, bodies) = fake_collector(&[503, 200]);
        let (count, dropped) = counter();
        let tracer = Tracer::start(&format!("http://127.0.0.1:{port}"), "kiln-worker", dropped);
        let tracer = tracer.expect("starts");
        tracer.record(made("build", true));
        tracer.record(made("nobody records it", false));
        drop(tracer);
        let wait = || bodies.recv_timeout(Duration::from_secs(30)).expect("comes");
        let (first, again) = (wait(), wait());
        assert_eq!(first, again);
        let resource = &first["resourceSpans"][0];
        assert_eq!(
            resource["resource"]["attributes"][0]["value"]["stringValue"],
            "kiln-worker"
        );
        let spans = resource["scopeSpans"][0]["spans"]
            .as_array()
            .expect("spans");
        assert_eq!(spans.len(), 1);
        let want = json!({
            "traceId": "01010101010101010101010101010101", "spanId": "0202020202020202",
            "parentSpanId": "0303030303030303", "name": "build", "kind": 1,
            "startTimeUnixNano": "1500000000", "endTimeUnixNano": "1750000000",
            "attributes": [{ "key": "kiln.job", "value": { "stringValue": "b1" } }],
            "status": { "code": 1 },
        });
        assert_eq!(spans[0], want);
        assert_eq!(count.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_a_collector_refuses_or_finds_no_room_is_counted() {
        let (port, bodies) = fake_collector(&[400]);
        let (count, dropped) = counter();
        let tracer = Tracer::start(&format!("http://127.0.0.1:{port}/"), "kiln", dropped);
        let tracer = tracer.expect("starts");
        // The first batch is refused at once, the second tried again for a second: the queue is full long before.
        for _ in 0..QUEUE_MAX * 3 {
            tracer.record(made("phase", true));
        }
        let full = count.load(Ordering::SeqCst);
        assert!(full >= 100, "{full} found no room");
        drop(bodies.recv_timeout(Duration::from_secs(30)).expect("comes"));
        let end = Instant::now() + Duration::from_secs(30);
        while count.load(Ordering::SeqCst) < full + 100 {
            assert!(Instant::now() < end, "the refused ones are not counted");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn addresses_of_collectors() {
        assert_eq!(
            endpoint("http://a:4318"),
            Some("http://a:4318/v1/traces".to_owned())
        );
        assert_eq!(
            endpoint("https://a/otlp/v1/traces"),
            Some("https://a/otlp/v1/traces".to_owned())
        );
        for bad in [
            "",
            "a:4318",
            "grpc://a",
            "http://",
            "http://u:p@a/",
            "file:///x",
        ] {
            assert!(endpoint(bad).is_none(), "{bad}");
        }
        assert!(!Tracer::off().is_on());
    }
}
