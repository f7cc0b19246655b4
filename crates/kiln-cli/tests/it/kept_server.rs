//! Machines that workers keep, reached through the controller: real leases, real connections, simulated machines. No baked home is needed.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use kiln_controller::api::{ApiConfig, KeptBounds};
use kiln_controller::server::Running;
use kiln_core::JobId;
use kiln_proto::fleet::MACHINE_UPGRADE;
use kiln_proto::kept::{Ask, ExecAsk, Reply};
use kiln_worker::fleet::http::{Http, Target, upgraded};
use kiln_worker::kept::client::{self, AskError, Line, Reach};
use kiln_worker::orders::ExecIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::fleet_sim::{self, ANSWER, Ledgered, PATIENCE, Pace, machines, until, work_near};

/// Leases of real life: a heartbeat that a busy host delays by some seconds must not end a machine that is looked at.
const LEASES: kiln_db::LeaseTimes = kiln_db::LeaseTimes {
    ttl_ms: 15_000,
    grace_ms: 5_000,
};
/// Time between two looks whether a way into a machine may stay open.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

/// Somebody with a token.
#[derive(Clone)]
pub(crate) struct Person {
    pub(crate) http: Http,
    pub(crate) token: Option<String>,
}

impl Person {
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> (StatusCode, Value) {
        let mut request = Request::builder()
            .method(method)
            .uri(self.http.uri(path))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = Full::from(body.to_string()).map_err(|never| match never {});
        let request = request.body(body.boxed()).expect("legal");
        let answered = tokio::time::timeout(PATIENCE, self.http.request(request)).await;
        let response = answered.expect("in time").expect("an answer");
        let status = response.status();
        let bytes = response.into_body().collect().await.expect("read");
        let value = serde_json::from_slice(&bytes.to_bytes()).unwrap_or_default();
        (status, value)
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.ask(Method::GET, path, &Value::Null).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.ask(Method::POST, path, body).await
    }

    /// Another one, who has this token.
    fn with(&self, token: &Value) -> Self {
        let token = token["token"].as_str().expect("a token").to_owned();
        Self {
            http: self.http.clone(),
            token: Some(token),
        }
    }

    pub(crate) async fn token(&self, tenant: &str, role: &str) -> (Self, String) {
        let asked = json!({ "role": role, "tenant": tenant });
        let (status, made) = self.post("/v1/tokens", &asked).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        (self.with(&made), made["id"].as_str().expect("an id").into())
    }

    /// Runs `work` in a machine that stays; gives its id when it is over.
    async fn keeps(&self, keep: &Value) -> String {
        let asked = json!({ "argv": ["work", "x"], "cpus": 1, "memory": "512M", "keep": keep });
        let (status, job) = self.post("/v1/runs", &asked).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{job}");
        let id = job["id"].as_str().expect("an id").to_owned();
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let (_, job) = self.get(&format!("/v1/jobs/{id}")).await;
            if job["state"] == "finished" {
                return id;
            }
            assert!(std::time::Instant::now() < deadline, "{job}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Turns a connection into a way.
    pub(crate) async fn upgrade(&self, path: &str) -> Result<Box<dyn Line>, (StatusCode, Value)> {
        let mut request = Request::get(self.http.uri(path))
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, MACHINE_UPGRADE);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let empty = Full::default().map_err(|never| match never {});
        let request = request.body(empty.boxed()).expect("legal");
        let answered = tokio::time::timeout(PATIENCE, self.http.request(request)).await;
        let response = answered.expect("in time").expect("an answer");
        let status = response.status();
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Box::new(upgraded(response).await.expect("upgraded")));
        }
        let bytes = response.into_body().collect().await.expect("read");
        let value = serde_json::from_slice(&bytes.to_bytes()).unwrap_or_default();
        Err((status, value))
    }

    fn at(&self, id: &str) -> At {
        At {
            person: self.clone(),
            id: id.to_owned(),
        }
    }

    async fn machines(&self) -> Vec<String> {
        let (status, list) = self.get("/v1/machines").await;
        assert_eq!(status, StatusCode::OK, "{list}");
        let items = list["items"].as_array().expect("a list").iter();
        items
            .map(|item| item["id"].as_str().expect("an id").to_owned())
            .collect()
    }
}

/// Somebody in front of a machine.
struct At {
    person: Person,
    id: String,
}

impl At {
    async fn way(&self, verb: &str) -> Result<Box<dyn Line>, (StatusCode, Value)> {
        let path = format!("/v1/machines/{}/ways/{verb}", self.id);
        self.person.upgrade(&path).await
    }

    /// Runs a command to its end; gives its code and output.
    async fn exec(&self, argv: &[&str], input: &[u8]) -> Result<(Option<i32>, Vec<u8>), AskError> {
        let ask = ExecAsk {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            stdin: true,
            ..ExecAsk::default()
        };
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
        let never = CancellationToken::new();
        let run = client::exec(self, ask, io, &never);
        let ran = tokio::time::timeout(PATIENCE, async { tokio::join!(run, collect) }).await;
        let (exit, output) = ran.expect("in time");
        Ok((exit?.and_then(|exit| exit.code), output))
    }

    /// Starts a command that never ends; the way to it.
    async fn waits(&self) -> Box<dyn Line> {
        let ask = Ask::Exec(ExecAsk {
            argv: ["sleep", "100000"].map(str::to_owned).to_vec(),
            ..ExecAsk::default()
        });
        let (begins, line) = client::ask(self, &ask).await.expect("begins");
        assert_eq!(begins, Reply::Begins);
        line
    }
}

impl Reach for At {
    fn id(&self) -> &str {
        &self.id
    }

    fn dial<'a>(&'a self, ask: &'a Ask) -> BoxFuture<'a, Result<Box<dyn Line>, AskError>> {
        let verb = match ask {
            Ask::Exec(_) => "exec",
            Ask::Forward { .. } => "forward",
            _ => "show",
        };
        Box::pin(async move {
            let way = self.way(verb).await;
            way.map_err(|(status, problem)| AskError::NoWay(format!("{status} {problem}").into()))
        })
    }
}

/// Waits for the end of a way, which must come without being asked for.
pub(crate) async fn ends(line: &mut Box<dyn Line>) {
    let mut all = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, line.read_to_end(&mut all)).await;
    let _how = ended.expect("the way ends");
}

/// A controller with a worker that has room for eight machines.
pub(crate) struct Fleet {
    pub(crate) running: Running,
    pub(crate) owner: Person,
    pub(crate) stop: CancellationToken,
    folder: tempfile::TempDir,
    home: tempfile::TempDir,
}

fn bounds() -> KeptBounds {
    KeptBounds {
        tenant_max: 2,
        ways_max: 4,
        ..KeptBounds::default()
    }
}

async fn controller(folder: &Path) -> Running {
    let api = ApiConfig {
        heartbeat: LOOK,
        kept: bounds(),
        ..ApiConfig::default()
    };
    fleet_sim::controller_with(folder, Vec::new(), Vec::new(), LEASES, api).await
}

async fn worker(running: &Running, home: &Path) -> CancellationToken {
    let ledger = Arc::new(Ledgered::default());
    let pace: Pace = Arc::new(Mutex::new(Duration::from_millis(1)));
    let target = Target::Socket(running.socket.clone());
    let shop = fleet_sim::workshop(home, "w1", target, &ledger, &pace).await;
    let stop = CancellationToken::new();
    work_near(shop, "w1", 8, stop.clone()).await;
    stop
}

impl Fleet {
    pub(crate) async fn open() -> Self {
        let (folder, home) = (
            tempfile::tempdir().expect("folder"),
            tempfile::tempdir().expect("folder"),
        );
        let running = controller(folder.path()).await;
        let stop = worker(&running, home.path()).await;
        let owner = Person {
            http: Http::new(Target::Socket(running.socket.clone())),
            token: None,
        };
        for tenant in ["acme", "other"] {
            let asked = json!({ "name": tenant });
            let (status, said) = owner.post("/v1/tenants", &asked).await;
            assert_eq!(status, StatusCode::CREATED, "{said}");
        }
        Self {
            running,
            owner,
            stop,
            folder,
            home,
        }
    }

    pub(crate) async fn no_machines(&self) {
        let home = self.home.path();
        until("no machine", || machines(home).is_empty()).await;
    }

    pub(crate) async fn close(self) {
        self.stop.cancel();
        self.no_machines().await;
        self.running.stop().await;
        drop(self.folder);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trusted_jobs_machine_is_not_for_untrusted_tokens() {
    let fleet = Fleet::open().await;
    // What the owner asks on the socket is trusted; a plain token's jobs are not.
    let trusted = fleet.owner.keeps(&json!({ "seconds": 600 })).await;
    let asked = json!({ "role": "developer", "tenant": "local" });
    let (status, made) = fleet.owner.post("/v1/tokens", &asked).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let plain = fleet.owner.with(&made);
    let asked = json!({ "role": "developer", "tenant": "local", "trusted": true });
    let (status, made) = fleet.owner.post("/v1/tokens", &asked).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let with_trust = fleet.owner.with(&made);
    for verb in ["exec", "tree", "forward", "show"] {
        let refused = plain.at(&trusted).way(verb).await.err().expect("refused");
        assert_eq!(refused.0, StatusCode::FORBIDDEN, "{verb}: {}", refused.1);
        assert!(
            refused.1["detail"].to_string().contains("trusted job"),
            "{}",
            refused.1
        );
    }
    // It is seen, and can be ended, as any of the tenant.
    assert_eq!(plain.machines().await, std::slice::from_ref(&trusted));
    let (code, _) = with_trust
        .at(&trusted)
        .exec(&["cat"], b"in")
        .await
        .expect("runs");
    assert_eq!(code, Some(0));
    let own = plain.keeps(&json!({ "seconds": 600 })).await;
    // Commands that are over before their input comes: how they ended arrives all the same.
    for _ in 0..20 {
        let (code, _) = plain.at(&own).exec(&["true"], b"").await.expect("runs");
        assert_eq!(code, Some(0));
    }
    // Its console may tell as much as its log, and whoever may read no log reads none.
    let asked = json!({ "role": "read-only", "tenant": "local" });
    let (status, made) = fleet.owner.post("/v1/tokens", &asked).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let (status, said) = fleet
        .owner
        .with(&made)
        .get(&format!("/v1/machines/{own}/console"))
        .await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{said}");
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_machine_is_its_tenants_alone() {
    let fleet = Fleet::open().await;
    let (dev, _) = fleet.owner.token("acme", "developer").await;
    let id = dev.keeps(&json!({ "seconds": 600 })).await;
    assert_eq!(dev.machines().await, std::slice::from_ref(&id));
    let path = format!("/v1/machines/{id}");
    let (status, shown) = dev.get(&path).await;
    assert_eq!(status, StatusCode::OK, "{shown}");
    assert_eq!(
        (&shown["worker"], &shown["tenant"]),
        (&json!("w1"), &json!("acme"))
    );
    assert!(
        shown["left_ms"]
            .as_u64()
            .is_some_and(|left| left <= 600_000 && left > 0)
    );
    assert_eq!(shown["busy"], 0, "{shown}");
    let at = dev.at(&id);
    let (code, said) = at
        .exec(&["tee", "/root/f"], b"into it")
        .await
        .expect("runs");
    assert_eq!((code, said.as_slice()), (Some(0), &b"into it"[..]));
    let (code, said) = at.exec(&["cat", "/root/f"], b"").await.expect("runs");
    assert_eq!((code, said.as_slice()), (Some(0), &b"into it"[..]));
    assert_eq!(at.exec(&["false"], b"").await.expect("runs").0, Some(1));
    // A megabyte to somebody who reads slowly.
    let (begins, mut line) = {
        let ask = Ask::Exec(ExecAsk {
            argv: ["head", "-c", "1000000", "/dev/zero"]
                .map(str::to_owned)
                .to_vec(),
            ..ExecAsk::default()
        });
        client::ask(&at, &ask).await.expect("begins")
    };
    assert_eq!(begins, Reply::Begins);
    tokio::time::sleep(LOOK * 2).await;
    let mut all = Vec::new();
    let read = tokio::time::timeout(PATIENCE, line.read_to_end(&mut all)).await;
    read.expect("in time").expect("reads");
    assert!(all.len() > 1_000_000, "{}", all.len());

    let (other, _) = fleet.owner.token("other", "admin").await;
    let (looks, _) = fleet.owner.token("acme", "read-only").await;
    assert!(other.machines().await.is_empty());
    for person in [&other, &fleet.owner] {
        let said = person.at(&id).way("exec").await.err();
        let (status, problem) = said.expect("refused");
        assert_eq!(status, StatusCode::NOT_FOUND, "{problem}");
        let nobody = person
            .at("r0nobody")
            .way("exec")
            .await
            .err()
            .expect("refused");
        let text = |value: &Value| value["detail"].as_str().unwrap_or_default().to_owned();
        assert_eq!(
            text(&problem).replace(&id, "ID"),
            text(&nobody.1).replace("r0nobody", "ID"),
            "as one that never was"
        );
    }
    for (method, rest) in [
        (Method::GET, ""),
        (Method::GET, "/stats"),
        (Method::GET, "/console"),
        (Method::DELETE, ""),
        (Method::POST, "/incident"),
    ] {
        let (status, said) = other
            .ask(method, &format!("{path}{rest}"), &json!({}))
            .await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{rest} {said}");
    }
    let (status, _) = looks.at(&id).way("exec").await.err().expect("refused");
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(
        looks.ask(Method::DELETE, &path, &Value::Null).await.0,
        StatusCode::FORBIDDEN
    );
    assert_eq!(looks.get(&path).await.0, StatusCode::OK);
    // The way is for what its name says.
    let mut line = dev.at(&id).way("show").await.expect("a way");
    kiln_proto::write_msg(&mut line, &Ask::Remove)
        .await
        .expect("sent");
    ends(&mut line).await;
    assert_eq!(dev.machines().await.len(), 1);
    let plain = dev.get(&format!("{path}/ways/exec")).await;
    assert_eq!(plain.0, StatusCode::UPGRADE_REQUIRED, "{}", plain.1);
    let tenant = "acme".parse().expect("a name");
    let rows = fleet
        .running
        .controller
        .db
        .audit_rows(Some(&tenant), 0, 500)
        .await
        .expect("rows");
    let used = |allowed: bool| {
        let rows = rows.iter().filter(|row| row.entry.action == "machine:use");
        rows.filter(|row| row.entry.allowed == allowed && row.entry.target == id)
            .count()
    };
    assert!(
        used(true) >= 4 && used(false) >= 3,
        "{} {}",
        used(true),
        used(false)
    );

    let (status, gone) = dev.ask(Method::DELETE, &path, &Value::Null).await;
    // A busy host's worker may not be reached in time: it ends the machine with its next heartbeat.
    let answer = (status, gone["result"].as_str().unwrap_or_default());
    let ended = (StatusCode::OK, "gone");
    assert!(
        answer == ended || answer == (StatusCode::ACCEPTED, "ending"),
        "{gone}"
    );
    assert!(dev.machines().await.is_empty());
    assert_eq!(dev.get(&path).await.0, StatusCode::NOT_FOUND);
    fleet.no_machines().await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_gone_is_out_of_the_machine() {
    let fleet = Fleet::open().await;
    let (dev, token) = fleet.owner.token("acme", "developer").await;
    let (colleague, _) = fleet.owner.token("acme", "developer").await;
    let id = dev.keeps(&json!({ "seconds": 600 })).await;
    // A token that is revoked in the middle.
    let mut stays = colleague.at(&id).waits().await;
    let mut revoked = dev.at(&id).waits().await;
    let path = format!("/v1/tokens/{token}");
    let (status, said) = fleet.owner.ask(Method::DELETE, &path, &Value::Null).await;
    assert!(status.is_success(), "{said}");
    ends(&mut revoked).await;
    assert_eq!(
        colleague.get(&format!("/v1/machines/{id}")).await.1["busy"],
        1
    );
    // Ways to one machine are bounded.
    let more: Vec<_> = {
        let mut more = Vec::new();
        for _ in 1..bounds().ways_max {
            more.push(colleague.at(&id).waits().await);
        }
        more
    };
    let (status, _) = colleague.at(&id).way("exec").await.err().expect("refused");
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    drop(more);
    // Bounds of the tenant: two, then no more; only a failure keeps one that is asked for then.
    let second = colleague.keeps(&json!({ "on_failure_only": true })).await;
    assert_eq!(
        colleague.machines().await,
        std::slice::from_ref(&id),
        "{second} passed"
    );
    let second = colleague.keeps(&json!({})).await;
    let third = colleague.keeps(&json!({})).await;
    assert_eq!(colleague.machines().await, [id.clone(), second]);
    let (_, events) = colleague.get(&format!("/v1/jobs/{third}")).await;
    assert_eq!(events["state"], "finished");
    let (status, said) = colleague
        .post(
            "/v1/runs",
            &json!({ "argv": ["work", "x"], "keep": { "seconds": 90_000 } }),
        )
        .await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{said}");
    // The worker ends: nothing of it stays, and nobody waits for it.
    fleet.stop.cancel();
    ends(&mut stays).await;
    fleet.no_machines().await;
    let db = &fleet.running.controller.db;
    let deadline = std::time::Instant::now() + PATIENCE;
    while !db.kept_machines(None).await.expect("reads").is_empty() {
        assert!(std::time::Instant::now() < deadline, "rows stay");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_ends_without_a_word_and_a_new_controller() {
    let fleet = Fleet::open().await;
    let (dev, _) = fleet.owner.token("acme", "developer").await;
    // Its time is over.
    let short = dev.keeps(&json!({ "seconds": 1 })).await;
    let deadline = std::time::Instant::now() + PATIENCE;
    while dev.machines().await.contains(&short) {
        assert!(std::time::Instant::now() < deadline, "it stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fleet.no_machines().await;
    // The controller forgets one: its worker is told, and destroys it.
    let id = dev.keeps(&json!({})).await;
    let job: JobId = id.parse().expect("an id");
    let db = fleet.running.controller.db.clone();
    let kept = db.kept(&job).await.expect("reads").expect("kept");
    let forgot = db
        .forget_kept(&kept.worker, &kept.attempt, kept.epoch)
        .await;
    assert!(forgot.expect("forgets"));
    fleet.no_machines().await;
    // The controller goes, and another comes in its place: the machine is still there, and reached.
    let id = dev.keeps(&json!({})).await;
    let Fleet {
        running,
        owner: _,
        stop,
        folder,
        home,
    } = fleet;
    running.stop().await;
    let running = controller(folder.path()).await;
    let at = dev.at(&id);
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match at.exec(&["hostname"], b"").await {
            Ok((code, _)) => break assert_eq!(code, Some(0)),
            // The worker has not called yet.
            Err(AskError::NoWay(_)) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(std::time::Instant::now() < deadline, "not reached");
        tokio::time::sleep(ANSWER / 100).await;
    }
    let (_, incident) = dev
        .post(
            &format!("/v1/machines/{id}/incident"),
            &json!({ "note": "it mined" }),
        )
        .await;
    let told = incident["incident"].as_str().expect("a folder");
    let text = std::fs::read_to_string(Path::new(told).join("incident.json")).expect("kept");
    assert!(text.contains("it mined"), "{text}");
    // A port of the machine, each direction to its own end.
    let id = dev.keeps(&json!({})).await;
    let ask = Ask::Forward { port: 7 };
    let (_, mut line) = client::ask(&dev.at(&id), &ask).await.expect("connects");
    line.write_all(b"half").await.expect("sent");
    line.shutdown().await.expect("half-closed");
    let mut back = Vec::new();
    let read = tokio::time::timeout(PATIENCE, line.read_to_end(&mut back)).await;
    read.expect("in time").expect("reads");
    assert_eq!(back, b"half");
    stop.cancel();
    until("no machine", || machines(home.path()).is_empty()).await;
    running.stop().await;
}
