//! Deliveries to real local receivers, and to made-up networks.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures_util::future::BoxFuture;
use kiln_core::network::RangeException;
use kiln_db::{DbError, Message};
use kiln_telemetry::metrics::{Metrics, Prefix};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::*;

/// An outbox in memory.
#[derive(Clone, Default)]
struct Box_(Arc<BoxState>);

#[derive(Default)]
struct BoxState {
    waiting: Mutex<Vec<(Instant, Message)>>,
    sent: Mutex<Vec<String>>,
    failed: Mutex<Vec<(String, String, Option<u64>)>>,
    changed: Notify,
}

impl Box_ {
    fn add(&self, id: &str, tenant: &str, url: &str) {
        let message = Message {
            id: id.to_owned(),
            job: "b1".parse().unwrap(),
            tenant: tenant.parse().unwrap(),
            webhook: None,
            secret: Some("hook-1".to_owned()),
            old_secret: None,
            url: url.to_owned(),
            seq: 1,
            kind: "finished".to_owned(),
            body: r#"{"type":"job.finished","data":{"phases_ms":[["build",5]]}}"#.to_owned(),
            created_unix_ms: 0,
            tries: 0,
            dead_unix_ms: None,
            last_error: None,
        };
        self.0
            .waiting
            .lock()
            .unwrap()
            .push((Instant::now(), message));
    }

    fn sent(&self) -> Vec<String> {
        self.0.sent.lock().unwrap().clone()
    }

    fn failed(&self) -> Vec<(String, String, Option<u64>)> {
        self.0.failed.lock().unwrap().clone()
    }

    /// Waits until this holds.
    async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let wait = async {
            loop {
                let changed = self.0.changed.notified();
                if holds(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(200_000), wait)
            .await
            .expect("in time");
    }
}

impl Outbox for Box_ {
    async fn take(&self, limit: u32, lease_ms: u64) -> Result<Vec<Message>, DbError> {
        let now = Instant::now();
        let mut taken = Vec::new();
        for (due, message) in self.0.waiting.lock().unwrap().iter_mut() {
            if *due <= now && taken.len() < limit as usize {
                taken.push(message.clone());
                *due = now + Duration::from_millis(lease_ms);
                message.tries += 1;
            }
        }
        Ok(taken)
    }

    async fn due_in(&self) -> Result<Option<Duration>, DbError> {
        let waiting = self.0.waiting.lock().unwrap();
        let first = waiting.iter().map(|(due, _)| *due).min();
        Ok(first.map(|due| due.saturating_duration_since(Instant::now())))
    }

    async fn sent(&self, id: &str) -> Result<(), DbError> {
        self.0.waiting.lock().unwrap().retain(|(_, m)| m.id != id);
        self.0.sent.lock().unwrap().push(id.to_owned());
        self.0.changed.notify_waiters();
        Ok(())
    }

    async fn failed(&self, id: &str, error: &str, wait_ms: Option<u64>) -> Result<(), DbError> {
        let mut waiting = self.0.waiting.lock().unwrap();
        match wait_ms {
            None => waiting.retain(|(_, m)| m.id != id),
            Some(wait) => {
                for (due, message) in waiting.iter_mut() {
                    if message.id == id {
                        *due = Instant::now() + Duration::from_millis(wait);
                    }
                }
            }
        }
        let noted = (id.to_owned(), error.to_owned(), wait_ms);
        self.0.failed.lock().unwrap().push(noted);
        self.0.changed.notify_waiters();
        Ok(())
    }

    async fn put_back(&self, id: &str, wait_ms: u64) -> Result<(), DbError> {
        for (due, message) in self.0.waiting.lock().unwrap().iter_mut() {
            if message.id == id {
                *due = Instant::now() + Duration::from_millis(wait_ms);
                message.tries -= 1;
            }
        }
        Ok(())
    }
}

/// A real receiver on loopback that answers what it was told to.
pub(super) struct Receiver {
    addr: SocketAddr,
    pub(super) got: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
}

type Answers = Arc<(
    Mutex<VecDeque<Response>>,
    Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
)>;

async fn receive(State(state): State<Answers>, headers: HeaderMap, body: Bytes) -> Response {
    state.1.lock().unwrap().push((headers, body));
    let next = state.0.lock().unwrap().pop_front();
    next.unwrap_or_else(|| StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn receiver(answers: impl IntoIterator<Item = Response>) -> Receiver {
    let got = Arc::new(Mutex::new(Vec::new()));
    let answers: Answers = Arc::new((Mutex::new(answers.into_iter().collect()), Arc::clone(&got)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let router = Router::new().fallback(receive).with_state(answers);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Receiver { addr, got }
}

impl Receiver {
    pub(super) fn url(&self) -> String {
        format!("http://{}/hook", self.addr)
    }

    pub(super) fn count(&self) -> usize {
        self.got.lock().unwrap().len()
    }
}

pub(super) fn local_allowed() -> CourierOptions {
    CourierOptions {
        policy: ReceiverPolicy {
            exceptions: vec![RangeException {
                host: "127.0.0.1".to_owned(),
                range: "127.0.0.0/8".parse().unwrap(),
            }],
            allow_http: true,
        },
        extra_roots: Vec::new(),
    }
}

/// Runs a courier until the value is dropped.
struct Running(CancellationToken, Metrics);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

fn run<N: Network>(outbox: &Box_, network: N, options: CourierOptions) -> Running {
    let metrics = Metrics::new(Prefix::Kiln, "0");
    let signer = Signer::new(&[7; 32]);
    let courier = Courier::new(outbox.clone(), network, signer, options, metrics.clone()).unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(courier.run(stop.clone()));
    Running(stop, metrics)
}

#[tokio::test]
async fn a_message_arrives_signed() {
    let receiver = receiver([]).await;
    let outbox = Box_::default();
    outbox.add("b1.1.hook", "local", &receiver.url());
    let running = run(&outbox, HostNetwork, local_allowed());
    outbox.until(|outbox| outbox.sent() == ["b1.1.hook"]).await;
    let (headers, body) = receiver.got.lock().unwrap()[0].clone();
    let header = |name: &str| headers[name].to_str().unwrap().to_owned();
    assert_eq!(header("webhook-id"), "b1.1.hook");
    assert_eq!(header("content-type"), "application/json");
    let secret = Signer::new(&[7; 32]).webhook("hook-1");
    let timestamp = header("webhook-timestamp").parse().unwrap();
    assert_eq!(
        header("webhook-signature"),
        secret.sign("b1.1.hook", timestamp, &body)
    );
    assert!(timestamp > 1_700_000_000);
    assert!(body.starts_with(br#"{"type":"job.finished""#));
    let delivered = "kiln_webhook_deliveries_total{result=\"delivered\"} 1";
    assert!(running.1.render().contains(delivered));
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_an_answer_is_not_shown() {
    let other = receiver([]).await;
    let secret = "internal-secret-of-the-receiver";
    let location = [(header::LOCATION, other.url())];
    let receiver = receiver([
        (StatusCode::FOUND, location, secret).into_response(),
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            [("x-secret", secret)],
            secret,
        )
            .into_response(),
        (StatusCode::GONE, secret).into_response(),
    ])
    .await;
    let outbox = Box_::default();
    for id in ["m1", "m2", "m3"] {
        outbox.add(id, "local", &receiver.url());
        let running = run(&outbox, HostNetwork, local_allowed());
        outbox
            .until(|outbox| outbox.failed().iter().any(|(at, ..)| at == id))
            .await;
        drop(running);
    }
    let failed = outbox.failed();
    assert_eq!(failed[0].1, "it answered 302; redirects are not followed");
    assert!(
        (4_000..=5_000).contains(&failed[0].2.unwrap()),
        "{failed:?}"
    );
    assert_eq!(failed[1].1, "it answered 500");
    assert_eq!(
        (failed[2].1.as_str(), failed[2].2),
        ("it answered 410: it wants no more of these", None)
    );
    assert!(!format!("{failed:?}").contains("internal"));
    assert_eq!(other.count(), 0);
}

/// Says whatever the test wants and notes what was dialled.
#[derive(Clone, Default)]
struct MadeUp(Arc<MadeUpState>);

#[derive(Default)]
struct MadeUpState {
    answers: Mutex<VecDeque<Vec<IpAddr>>>,
    asked: Mutex<Vec<String>>,
    dialled: Mutex<Vec<SocketAddr>>,
}

impl Network for MadeUp {
    fn resolve(&self, host: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        self.0.asked.lock().unwrap().push(host.to_owned());
        let answer = self.0.answers.lock().unwrap().pop_front();
        Box::pin(async move { answer.ok_or_else(|| io::ErrorKind::NotFound.into()) })
    }

    fn dial(&self, addr: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Duplex>>> {
        self.0.dialled.lock().unwrap().push(addr);
        Box::pin(async move {
            if addr.ip() == IpAddr::from([9, 9, 9, 9]) {
                // A receiver that takes the connection and never says anything.
                std::future::pending::<()>().await;
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let io = hyper_util::rt::TokioIo::new(theirs);
            let service = hyper::service::service_fn(|_| async {
                let answer = http::Response::new(http_body_util::Empty::<Bytes>::new());
                Ok::<_, std::convert::Infallible>(answer)
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
            Ok(Box::new(ours) as Box<dyn Duplex>)
        })
    }
}

fn http_allowed() -> CourierOptions {
    CourierOptions {
        policy: ReceiverPolicy {
            exceptions: Vec::new(),
            allow_http: true,
        },
        extra_roots: Vec::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_that_changes_its_mind_reaches_nothing_inside() {
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    let network = MadeUp::default();
    network.0.answers.lock().unwrap().extend([
        // What a checker would have been shown, had it asked on its own.
        vec![
            ip("127.0.0.1"),
            ip("169.254.169.254"),
            ip("10.0.0.1"),
            ip("::1"),
            ip("::ffff:7f00:1"),
        ],
        // A mixed answer: only the public one is dialled.
        vec![ip("127.0.0.1"), ip("8.8.8.8")],
        // Asked again it would say this; nobody asks.
        vec![ip("127.0.0.1")],
    ]);
    let outbox = Box_::default();
    outbox.add("m1", "local", "http://rebind.example.org/hook");
    let _running = run(&outbox, network.clone(), http_allowed());
    outbox.until(|outbox| outbox.sent() == ["m1"]).await;
    let failed = outbox.failed();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(failed[0].1.contains("special-purpose range"), "{failed:?}");
    let dialled = network.0.dialled.lock().unwrap().clone();
    assert_eq!(dialled, ["8.8.8.8:80".parse().unwrap()]);
    assert_eq!(network.0.asked.lock().unwrap().len(), 2);
    // An address instead of a name is checked as well.
    for url in [
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest",
        "http://10.1.1.1/",
    ] {
        outbox.add(url, "local", url);
        outbox
            .until(|outbox| outbox.failed().iter().any(|(id, ..)| id == url))
            .await;
    }
    assert_eq!(network.0.dialled.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_is_out_for_a_day_gets_a_dead_letter() {
    let network = MadeUp::default();
    let outbox = Box_::default();
    outbox.add("m1", "local", "http://gone.example.org/hook");
    let start = Instant::now();
    let running = run(&outbox, network.clone(), http_allowed());
    outbox
        .until(|outbox| outbox.failed().iter().any(|(.., wait)| wait.is_none()))
        .await;
    let failed = outbox.failed();
    assert_eq!(failed.len(), BACKOFF_S.len() + 1);
    for (index, (_, error, wait)) in failed.iter().enumerate() {
        let listed = BACKOFF_S.get(index).map(|s| s * 1000);
        match (wait, listed) {
            (Some(wait), Some(listed)) => assert!(*wait <= listed && *wait >= listed * 4 / 5),
            (None, None) => {}
            other => panic!("{index}: {other:?}"),
        }
        assert!(
            error.contains("no address") || error.contains("not tried"),
            "{error}"
        );
    }
    let lasted = start.elapsed();
    assert!(lasted <= Duration::from_secs(24 * 3600) && lasted >= Duration::from_secs(18 * 3600));
    assert!(
        running
            .1
            .render()
            .contains("kiln_webhook_deliveries_total{result=\"dead\"} 1")
    );
}

#[tokio::test(start_paused = true)]
async fn one_tenants_dead_receivers_hold_up_nobody_else() {
    let network = MadeUp::default();
    let outbox = Box_::default();
    for n in 0..300 {
        // Each another receiver, so that none is known to be out.
        outbox.add(
            &format!("slow-{n}"),
            "noisy",
            &format!("http://9.9.9.9:{}/", 1000 + n),
        );
    }
    outbox.add("quick", "quiet", "http://8.8.8.8/");
    let start = Instant::now();
    let _running = run(&outbox, network.clone(), http_allowed());
    outbox.until(|outbox| !outbox.sent().is_empty()).await;
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    let noisy = network.0.dialled.lock().unwrap().len();
    assert!(noisy <= 2 * 4 + 1, "{noisy} dialled at once");
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_is_out_is_left_alone() {
    let network = MadeUp::default();
    let outbox = Box_::default();
    for n in 0..200 {
        outbox.add(&format!("m{n}"), "local", "http://9.9.9.9/");
    }
    let _running = run(&outbox, network.clone(), http_allowed());
    outbox.until(|outbox| outbox.failed().len() >= 40).await;
    let dialled = network.0.dialled.lock().unwrap().len();
    assert!(dialled <= 8, "dialled {dialled} times for 40 messages");
}

/// A receiver behind TLS whose certificate is for `localhost`, of an authority that only the caller knows.
async fn secure_receiver() -> (SocketAddr, rustls::pki_types::CertificateDer<'static>) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = ca.self_signed(&ca_key).unwrap().der().clone();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let cert = names.signed_by(&key, &issuer).unwrap().der().clone();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let service = hyper::service::service_fn(|_| async {
                    let answer = http::Response::new(http_body_util::Empty::<Bytes>::new());
                    Ok::<_, std::convert::Infallible>(answer)
                });
                let _ended = hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    (addr, authority)
}

#[tokio::test]
async fn a_receiver_behind_tls_must_prove_its_name() {
    let (addr, authority) = secure_receiver().await;
    let exceptions = ["localhost", "127.0.0.1"].map(|host| RangeException {
        host: host.to_owned(),
        range: "127.0.0.0/8".parse().unwrap(),
    });
    let options = |roots: &[rustls::pki_types::CertificateDer<'static>]| CourierOptions {
        policy: ReceiverPolicy {
            exceptions: exceptions.to_vec(),
            allow_http: false,
        },
        extra_roots: roots.to_vec(),
    };
    let url = |host: &str| format!("https://{host}:{}/", addr.port());
    let outbox = Box_::default();
    outbox.add("stranger", "local", &url("localhost"));
    let running = run(&outbox, HostNetwork, options(&[]));
    outbox.until(|outbox| outbox.failed().len() == 1).await;
    drop(running);
    outbox.add("other-name", "local", &url("127.0.0.1"));
    outbox.add("right", "local", &url("localhost"));
    outbox.add("plain", "local", &url("localhost").replace("https", "http"));
    let _running = run(&outbox, HostNetwork, options(&[authority]));
    outbox
        .until(|outbox| outbox.failed().len() == 3 && outbox.sent() == ["right"])
        .await;
    let why = |id: &str| {
        let failed = outbox.failed();
        failed
            .iter()
            .find(|(at, ..)| at == id)
            .map(|(_, why, wait)| (why.clone(), *wait))
    };
    assert!(
        why("stranger").unwrap().0.contains("TLS"),
        "{:?}",
        why("stranger")
    );
    assert!(
        why("other-name").unwrap().0.contains("TLS"),
        "{:?}",
        why("other-name")
    );
    assert_eq!(
        why("plain"),
        Some(("the URL is not https".to_owned(), None))
    );
}
