//! Commands that are attended, through a controller: real leases, real connections, simulated machines. No baked home is needed.

use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use http::{Method, StatusCode};
use kiln_proto::codec;
use kiln_proto::kept::attend::{STDIN, STDIN_ROOM};
use kiln_proto::kept::{Answer, Ask, MESSAGE_BYTES_MAX};
use kiln_worker::attend::client::{self as attend, HoldError};
use kiln_worker::kept::client::{self, AskError, Line, Reach};
use kiln_worker::orders::ExecIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

use crate::fleet_sim::PATIENCE;
use crate::kept_server::{Fleet, LOOK, Person, ends};

/// Somebody in front of a command.
struct At {
    person: Person,
    id: String,
}

impl Reach for At {
    fn id(&self) -> &str {
        &self.id
    }

    fn dial<'a>(&'a self, ask: &'a Ask) -> BoxFuture<'a, Result<Box<dyn Line>, AskError>> {
        let verb = match ask {
            Ask::Forward { .. } => "forward",
            _ => "attend",
        };
        Box::pin(async move {
            let way = self.person.upgrade(&path(&self.id, verb)).await;
            way.map_err(|(status, problem)| AskError::NoWay(format!("{status} {problem}").into()))
        })
    }
}

fn path(id: &str, verb: &str) -> String {
    format!("/v1/jobs/{id}/ways/{verb}")
}

impl At {
    /// Why there is no way.
    async fn refused(&self, verb: &str) -> (StatusCode, Value) {
        let way = self.person.upgrade(&path(&self.id, verb)).await;
        way.err().expect("refused")
    }

    async fn open(&self) -> Box<dyn Line> {
        attend::open(self, None).await.expect("attends")
    }
}

/// Queues a command that is attended, and waits until it may be.
async fn ready(person: &Person, argv: &[&str], asked: &Value) -> At {
    let at = queued(person, argv, asked).await;
    until(person, &at.id, |job| job["phase"] == "attend").await;
    at
}

async fn queued(person: &Person, argv: &[&str], asked: &Value) -> At {
    let asked = json!({ "argv": argv, "cpus": 1, "memory": "512M", "attend": asked });
    let (status, job) = person.post("/v1/runs", &asked).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{job}");
    At {
        person: person.clone(),
        id: job["id"].as_str().expect("an id").to_owned(),
    }
}

async fn until(person: &Person, id: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, job) = person.get(&format!("/v1/jobs/{id}")).await;
        if is_so(&job) {
            return job;
        }
        assert!(Instant::now() < deadline, "{job}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How a job ended: its class, or `passed`, and its one attempt's message.
async fn ended(at: &At) -> (String, String) {
    let job = until(&at.person, &at.id, |job| job["state"] == "finished").await;
    assert_eq!(job["attempts"].as_array().map(Vec::len), Some(1), "{job}");
    let text = |name: &str| job["outcome"][name].as_str().unwrap_or_default().to_owned();
    let class = match text("verdict").as_str() {
        "passed" => "passed".to_owned(),
        _ => text("class"),
    };
    (class, text("message"))
}

/// Holds a command with this input to its end; gives its output.
async fn held(line: Box<dyn Line>, input: &[u8]) -> Result<Vec<u8>, HoldError> {
    let (output, mut said) = mpsc::channel(16);
    let (_nobody, control) = mpsc::channel(1);
    let io = ExecIo {
        stdin: Some(Box::new(std::io::Cursor::new(input.to_vec()))),
        output,
        control,
    };
    let collect = async {
        let mut all = Vec::new();
        while let Some((_, bytes)) = said.recv().await {
            all.extend(bytes);
        }
        all
    };
    let both = async { tokio::join!(attend::hold(line, io), collect) };
    let (held, all) = tokio::time::timeout(PATIENCE, both).await.expect("in time");
    held.map(|()| all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_held_by_who_submitted_it_alone() {
    let fleet = Fleet::open().await;
    let (dev, _) = fleet.owner.token("acme", "developer").await;
    let (colleague, _) = fleet.owner.token("acme", "developer").await;
    let (other, _) = fleet.owner.token("other", "admin").await;
    let (looks, _) = fleet.owner.token("acme", "read-only").await;
    let at = ready(&dev, &["cat"], &json!({ "stdin": true, "ports": [7] })).await;
    let as_if = |person: &Person| At {
        person: person.clone(),
        id: at.id.clone(),
    };
    for verb in ["attend", "forward"] {
        for person in [&colleague, &looks] {
            let (status, said) = as_if(person).refused(verb).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{said}");
        }
        for person in [&other, &fleet.owner] {
            let (status, said) = as_if(person).refused(verb).await;
            assert_eq!(status, StatusCode::NOT_FOUND, "{said}");
        }
        let plain = dev.get(&path(&at.id, verb)).await;
        assert_eq!(plain.0, StatusCode::UPGRADE_REQUIRED, "{}", plain.1);
    }
    assert_eq!(at.refused("exec").await.0, StatusCode::NOT_FOUND);
    // The way is for what its name says.
    let mut line = dev.upgrade(&path(&at.id, "attend")).await.expect("a way");
    codec::write_msg(&mut line, &Ask::Remove)
        .await
        .expect("sent");
    ends(&mut line).await;

    let line = at.open().await;
    let Err(AskError::Refused(refused)) = attend::open(&at, None).await else {
        panic!("two attend");
    };
    assert!(refused.usage && refused.message.contains("already"));
    // Ports that the job names, and no others.
    let ask = Ask::Forward { port: 7 };
    let (_begins, mut port) = client::ask(&at, &ask).await.expect("connects");
    port.write_all(b"knock").await.expect("says");
    let mut back = [0; 5];
    port.read_exact(&mut back).await.expect("answers");
    assert_eq!(&back, b"knock");
    let Err(AskError::Refused(refused)) = client::ask(&at, &Ask::Forward { port: 8 }).await else {
        panic!("a port that nobody named");
    };
    assert!(refused.message.contains("no port 8"), "{refused}");
    // A megabyte of any bytes, more than is on its way at a time.
    let byte = |n: u32| (n.wrapping_mul(n) >> 7) as u8;
    let input: Vec<u8> = (0..1_000_000).map(byte).collect();
    assert!(input.len() > STDIN_ROOM * 3);
    let said = held(line, &input).await.expect("held");
    assert!(said == input, "{} bytes", said.len());
    assert_eq!(ended(&at).await.0, "passed");
    ends(&mut port).await;
    let (status, said) = at.refused("attend").await;
    assert_eq!(
        (status, &said["code"]),
        (StatusCode::CONFLICT, &json!("finished"))
    );
    let (status, said) = dev
        .post(&format!("/v1/jobs/{}/retry", at.id), &json!({}))
        .await;
    assert_eq!(
        (status, &said["code"]),
        (StatusCode::CONFLICT, &json!("attended"))
    );

    // One that nobody is to attend; one that asks too much; one who may not.
    let (_, plain) = dev.post("/v1/runs", &json!({ "argv": ["true"] })).await;
    let plain = At {
        person: dev.clone(),
        id: plain["id"].as_str().expect("an id").to_owned(),
    };
    assert_eq!(plain.refused("attend").await.1["code"], "not_attended");
    let ports: Vec<u16> = (1..=17).collect();
    for ports in [json!(ports), json!([0])] {
        let asked = json!({ "argv": ["true"], "attend": { "ports": ports } });
        let (status, said) = dev.post("/v1/runs", &asked).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{said}");
    }
    let asked = json!({ "argv": ["true"], "tenant": "acme", "attend": {} });
    let (status, said) = fleet.owner.post("/v1/runs", &asked).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{said}");
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_ends_with_whoever_attends_it() {
    let fleet = Fleet::open().await;
    let (dev, _) = fleet.owner.token("acme", "developer").await;
    let wants = json!({ "stdin": true });
    let gone = |(class, message): (String, String)| {
        assert_eq!(class, "cancelled", "{message}");
        assert!(message.contains("is gone"), "{message}");
        message
    };
    // In the middle of his input, which has no end then.
    let at = ready(&dev, &["cat"], &wants).await;
    let mut line = at.open().await;
    codec::write_chunk(&mut line, STDIN, b"half")
        .await
        .expect("says");
    line.flush().await.expect("says");
    drop(line);
    gone(ended(&at).await);
    // While the command reads nothing, and as much is on its way as may be.
    let at = ready(&dev, &["sleep", "100000"], &wants).await;
    let mut line = at.open().await;
    for _ in 0..8 {
        let sent = codec::write_chunk(&mut line, STDIN, &vec![1; STDIN_ROOM / 8]).await;
        sent.expect("says");
    }
    line.flush().await.expect("says");
    drop(line);
    gone(ended(&at).await);
    // One who sends more than he was given room for.
    let at = ready(&dev, &["sleep", "100000"], &wants).await;
    let mut line = at.open().await;
    let piece = vec![1; STDIN_ROOM / 8];
    let floods = async { while codec::write_chunk(&mut line, STDIN, &piece).await.is_ok() {} };
    let cut_off = tokio::time::timeout(PATIENCE, floods).await;
    cut_off.expect("it is ended");
    assert!(gone(ended(&at).await).contains("protocol"));
    // One whose token is revoked.
    let (leaves, token) = fleet.owner.token("acme", "developer").await;
    let at = ready(&leaves, &["sleep", "100000"], &wants).await;
    let mut line = at.open().await;
    let revoke = format!("/v1/tokens/{token}");
    let (status, said) = fleet.owner.ask(Method::DELETE, &revoke, &Value::Null).await;
    assert!(status.is_success(), "{said}");
    ends(&mut line).await;
    let at = At {
        person: dev.clone(),
        ..at
    };
    gone(ended(&at).await);
    // One who never reads holds up his command, and nothing else: it is cancelled as any.
    let at = ready(&dev, &["head", "-c", "50000000", "/dev/zero"], &wants).await;
    let line = at.open().await;
    until(&dev, &at.id, |job| job["phase"] == "run").await;
    // What ends a way that may not be open would have looked by then.
    tokio::time::sleep(LOOK * 5).await;
    let job = until(&dev, &at.id, |_| true).await;
    assert_eq!(job["state"], "running", "{job}");
    let (status, said) = dev
        .ask(Method::DELETE, &format!("/v1/jobs/{}", at.id), &Value::Null)
        .await;
    assert!(status.is_success(), "{said}");
    let (class, message) = ended(&at).await;
    assert_eq!(class, "cancelled", "{message}");
    drop(line);
    fleet.no_machines().await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_was_attended_is_never_tried_again() {
    let fleet = Fleet::open().await;
    let (dev, _) = fleet.owner.token("acme", "developer").await;
    let at = ready(&dev, &["sleep", "100000"], &json!({ "stdin": true })).await;
    let mut line = at.open().await;
    let waits = ready(&dev, &["true"], &json!({})).await;
    // Its worker goes, as a host does that is switched off.
    fleet.stop.cancel();
    ends(&mut line).await;
    // One that nobody attended yet has lost nothing, and who came to its worker when that was gone has not attended it.
    let (status, said) = waits.refused("attend").await;
    assert_eq!(
        (status, &said["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("job_unreachable"))
    );
    let (class, message) = ended(&at).await;
    assert_eq!(class, "lost", "{message}");
    until(&dev, &waits.id, |job| job["state"] == "queued").await;
    let (status, said) = waits.refused("attend").await;
    assert_eq!(
        (status, &said["code"]),
        (StatusCode::CONFLICT, &json!("not_ready"))
    );
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_that_never_comes_takes_no_place() {
    let fleet = Fleet::open().await;
    let (dev, _) = fleet.owner.token("acme", "developer").await;
    let at = ready(&dev, &["cat"], &json!({ "stdin": true })).await;
    // A way on which nothing is asked, and one that asks and is gone at once.
    let silent = dev.upgrade(&path(&at.id, "attend")).await.expect("a way");
    let line = at.open().await;
    drop(silent);
    let mut late = dev.upgrade(&path(&at.id, "attend")).await.expect("a way");
    codec::write_msg(&mut late, &Ask::Attend { tty: None })
        .await
        .expect("sent");
    let answer = codec::read_msg::<Answer, _>(&mut late, MESSAGE_BYTES_MAX).await;
    assert!(
        answer.expect("answers").is_err(),
        "somebody attends already"
    );
    assert_eq!(held(line, b"all of it").await.expect("held"), b"all of it");
    assert_eq!(ended(&at).await.0, "passed");
    fleet.close().await;
}
