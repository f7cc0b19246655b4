//! Two whole controllers on one PostgreSQL and one bucket: what one takes the other sees, either may go at any moment, and what must be
//! agreed on is.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use kiln_controller::access::shown::IdentityFiles;
use kiln_controller::peers::Home;
use kiln_controller::server::{Running, ServeConfig, SharedError, StartError, Tls, start_with};
use kiln_core::{AttemptId, JobId, PoolName, TenantName};
use kiln_db::{GlobalLimits, OpenOptions};
use kiln_store::logs::{LogName, S3Credentials, S3Target};
use kiln_testkit::{postgres, seaweed};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fleet_line::{Line, send};
use crate::fleet_server::{
    BEAT, Fleet, PATIENCE, SHORT, Served, config, socket, times, until_killed,
};
use crate::fleet_worker::{Ledger, SimWorker, text};

/// What two controllers have in common.
pub(crate) struct Common {
    pub(crate) database: String,
    pub(crate) store: String,
}

/// A certificate of nobody's authority, as the operator's own.
fn certificate(folder: &Path) -> IdentityFiles {
    let made = rcgen::generate_simple_self_signed(vec!["ci.kiln.test".to_owned()]);
    let made = made.expect("a certificate");
    let files = IdentityFiles {
        chain: folder.join("people.pem"),
        key: folder.join("people.key"),
    };
    std::fs::write(&files.chain, made.cert.pem()).expect("writes");
    std::fs::write(&files.key, made.signing_key.serialize_pem()).expect("writes");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&files.key, mode).expect("chmod");
    files
}

impl Common {
    /// A new database and an empty folder of the bucket; none without the S3 server.
    pub(crate) fn new() -> Option<Self> {
        Self::on(postgres::server())
    }

    /// The same on a server of one's own.
    pub(crate) fn on(server: &postgres::Postgres) -> Option<Self> {
        let store = seaweed::server()?.url();
        let database = server.url(&server.database());
        Some(Self { database, store })
    }

    pub(crate) fn bucket(&self) -> S3Target {
        let key = S3Credentials {
            access_key_id: "key".to_owned(),
            secret_access_key: "secret".to_owned(),
            session_token: None,
        };
        S3Target::from_url(&self.store, Some(key)).expect("a bucket")
    }

    /// A controller in a folder, which other controllers reach.
    pub(crate) async fn config(&self, folder: &Path) -> ServeConfig {
        let mut config = config(folder).await;
        config.database = Some(self.database.parse().expect("a URL"));
        config.sharing.store = Some(self.bucket());
        config.listen = vec!["127.0.0.1:0".parse().expect("an address")];
        // For people of another name than the one by which controllers reach each other.
        config.tls = Tls::Given {
            files: certificate(folder),
            names: vec!["127.0.0.1".to_owned()],
        };
        config
    }

    pub(crate) async fn start(&self, folder: &Path) -> Fleet {
        let config = self.config(folder).await;
        Fleet::of(start_with(config, times(SHORT)).await.expect("starts"))
    }

    /// Two of them, the second with a copy of the first one's keys.
    pub(crate) async fn two(&self, a: &Path, b: &Path) -> [Fleet; 2] {
        let first = self.start(a).await;
        copy_keys(a, b);
        let second = self.start(b).await;
        // Each meets the other at its own next sign of life; here at once.
        first.running.controller.meet().await.expect("meets");
        [first, second]
    }
}

pub(crate) fn copy_keys(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.join("controller")).expect("folder");
    let done = std::process::Command::new("cp")
        .arg("-a")
        .arg(from.join("controller/keys"))
        .arg(to.join("controller/keys"))
        .status();
    assert!(done.expect("runs").success(), "keys are copied");
}

pub(crate) fn worker(
    own: &Fleet,
    others: &[&Fleet],
    name: &str,
    ledger: &Arc<Ledger>,
) -> SimWorker {
    let mut line = Line::new(&own.socket, name);
    line.others = others.iter().map(|other| other.socket.clone()).collect();
    SimWorker::start(line, 4, BEAT, ledger)
}

/// Reads a job's log over HTTP until it ends; gives it, and how long each piece took to come.
async fn followed(socket: &Path, job: &JobId) -> String {
    let mut line = tokio::net::UnixStream::connect(socket)
        .await
        .expect("connects");
    let head = format!(
        "GET /v1/jobs/{job}/logs?follow=true HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    );
    line.write_all(head.as_bytes()).await.expect("asks");
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, line.read_to_end(&mut answer));
    read.await.expect("in time").expect("reads");
    let got = crate::server::parse(&answer);
    assert_eq!(got.status, 200, "{}", got.text());
    got.text()
}

fn whole(job: &JobId, number: u32, lines: u64) -> String {
    let attempt = AttemptId {
        job: job.clone(),
        number,
    };
    (0..lines).map(|line| text(&attempt, line)).collect()
}

pub(crate) async fn running(fleet: &Fleet, job: &JobId) {
    let began = async {
        while fleet
            .db()
            .job(job)
            .await
            .expect("reads")
            .expect("is there")
            .started_unix_ms
            .is_none()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, began)
        .await
        .expect("it begins");
}

/// A job that came in at one controller runs on a worker of the other; its log is followed at both while it is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_takes_the_other_runs_and_both_show() {
    let Some(common) = Common::new() else { return };
    let (a, b) = (folder(), folder());
    let [first, second] = common.two(a.path(), b.path()).await;
    let ledger = Arc::new(Ledger::default());
    let beside = worker(&second, &[], "w-b", &ledger);
    let job = first.submit("j1", 30, 40).await;
    running(&first, &job).await;
    let followers: Vec<_> = [&first, &first, &first, &second]
        .iter()
        .map(|fleet| {
            let (socket, job) = (fleet.socket.clone(), job.clone());
            tokio::spawn(async move { followed(&socket, &job).await })
        })
        .collect();
    // The one that has no stream of the worker knows who has.
    let attempt = AttemptId {
        job: job.clone(),
        number: 1,
    };
    let asked = &first.running.controller;
    let found = async {
        while !matches!(asked.home_now(&attempt).await, Ok(Home::At(_))) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, found)
        .await
        .expect("the keeper is known");
    for follower in followers {
        assert_eq!(follower.await.expect("follows"), whole(&job, 1, 30));
    }
    first.all_over(std::slice::from_ref(&job)).await;
    // Put away in the bucket, it is read by both without the other.
    put_away(&first, std::slice::from_ref(&job)).await;
    for fleet in [&first, &second] {
        fleet
            .count(std::slice::from_ref(&job))
            .await
            .check("at either", 1);
    }
    assert_secret_is_found(&first, &second).await;
    assert_artifact_is_found(&first, &second).await;
    assert_strangers_are_refused(&first).await;
    drop(beside);
    first.stop().await;
    second.stop().await;
}

/// A secret stays with the controller that took the job; the one that has the worker asks for it.
async fn assert_secret_is_found(holder: &Fleet, asker: &Fleet) {
    let job: JobId = "with-secret".parse().expect("name");
    let values = [("to ken/é".to_owned(), b"hush".to_vec())].into();
    holder
        .running
        .controller
        .secrets
        .hold(&TenantName::local(), job.clone(), values)
        .expect("held");
    let asked = &asker.running.controller;
    let ledger = asked.secret_of(&job, "to ken/é").await;
    assert_eq!(ledger.as_deref(), Some(&b"hush"[..]));
    assert_eq!(asked.secret_of(&job, "other").await, None);
}

/// An artifact lies in the bucket: what one takes, in several parts, the other reads and removes.
async fn assert_artifact_is_found(taker: &Fleet, reader: &Fleet) {
    let job: JobId = "with-artifact".parse().expect("name");
    let tenant = TenantName::local();
    let piece = bytes::Bytes::from(vec![7_u8; 1 << 20]);
    let whole = bytes::Bytes::from(piece.repeat(20));
    let (near, far) = (&taker.running.controller, &reader.running.controller);
    for _repeated in 0..2 {
        let pieces = whole.chunks(1 << 20).map(bytes::Bytes::copy_from_slice);
        let pieces: Vec<_> = pieces.map(Ok::<_, std::io::Error>).collect();
        let stream = futures_util::stream::iter(pieces);
        let stored = near.artifacts.put(&tenant, &job, stream, 20 << 20).await;
        let stored = stored.expect("stored");
        let range = (19 << 20) + 5..20 << 20;
        let read = far.artifacts.read(&tenant, &job, stored, range).await;
        let read: Vec<bytes::Bytes> = read.expect("found").try_collect().await.expect("whole");
        assert_eq!(read.concat(), piece[5..]);
    }
    far.artifacts
        .remove_job(&tenant, &job)
        .await
        .expect("removed");
    let stored = kiln_store::artifacts::Stored {
        digest: kiln_core::Digest::of(&whole),
        size: 20 << 20,
    };
    let gone = near
        .artifacts
        .read(&tenant, &job, stored, 0..1)
        .await
        .map(drop);
    let absent = matches!(gone, Err(kiln_store::artifacts::ArtifactError::NotFound));
    assert!(absent, "{gone:?}");
}

/// What controllers ask each other is nobody else's: not the owner's without a token, not a user's with one.
async fn assert_strangers_are_refused(fleet: &Fleet) {
    let access = &fleet.running.controller.access;
    let now_ms = now_ms();
    let user = access
        .issue_user(&kiln_controller::access::owner(), 60, now_ms)
        .expect("made")
        .text;
    let old = access
        .issue_controller("c-1", now_ms - 600_000)
        .expect("made");
    let bearer = |token: &str| format!("Bearer {token}");
    for (what, header) in [
        ("none", String::new()),
        ("a user's", bearer(&user)),
        ("an old one", bearer(&old)),
        ("garbage", bearer("a.b.c")),
    ] {
        let headers = [("authorization", header.as_str())];
        let headers = if header.is_empty() {
            &headers[..0]
        } else {
            &headers[..]
        };
        for path in [
            "/peer/v1/logs/local/j1/1?offset=0&max=9&wait_ms=0",
            "/peer/v1/secrets/j1/61",
        ] {
            let got = send(&fleet.socket, "GET", path, headers, b"")
                .await
                .expect("answers");
            assert_eq!(got.status, 401, "{what} at {path}: {}", got.text());
        }
    }
}

pub(crate) fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.expect("clock").as_millis()).expect("clock")
}

pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("folder")
}

/// Waits until the logs of jobs that are over are in the bucket: a controller that was away puts its own away when it is back.
pub(crate) async fn put_away(fleet: &Fleet, jobs: &[JobId]) {
    let all = async {
        for job in jobs {
            let attempts = fleet.db().attempts(job).await.expect("reads");
            let last = attempts.last().expect("one").id.number;
            let name = LogName::new(TenantName::local(), job.clone(), last);
            let logs = &fleet.running.controller.logs;
            while !logs.is_archived(&name).await.expect("reads") {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    };
    tokio::time::timeout(PATIENCE, all).await.expect("put away");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which starts it"]
async fn controller_child() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("is told");
    let words: Vec<&str> = line.trim().split('\t').collect();
    let [folder, database, store] = words[..] else {
        return;
    };
    let common = Common {
        database: database.to_owned(),
        store: store.to_owned(),
    };
    until_killed(common.start(Path::new(folder)).await.running).await;
}

/// The controller that schedules and keeps the worker's stream is killed by signal 9; the other one does both from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_is_killed_and_the_other_one_goes_on() {
    let Some(common) = Common::new() else { return };
    let (a, b) = (folder(), folder());
    let line = format!(
        "{}\t{}\t{}",
        a.path().display(),
        common.database,
        common.store
    );
    let start = || Served::spawn("fleet_shared::controller_child", &line);
    let killed = tokio::task::block_in_place(start);
    copy_keys(a.path(), b.path());
    let second = common.start(b.path()).await;
    let ledger = Arc::new(Ledger::default());
    let workers: Vec<_> = (0..3)
        .map(|n| {
            let mut line = Line::new(&socket(a.path()), &format!("w{n}"));
            line.others = vec![second.socket.clone()];
            SimWorker::start(line, 4, BEAT, &ledger)
        })
        .collect();
    let long = second.submit("long", 80, 100).await;
    running(&second, &long).await;
    let follower = {
        let (socket, long) = (second.socket.clone(), long.clone());
        tokio::spawn(async move { followed(&socket, &long).await })
    };
    let mut jobs = vec![long.clone()];
    for n in 0..40 {
        jobs.push(second.submit(&format!("j{n}"), 5, 60).await);
    }
    tokio::time::sleep(Duration::from_millis(600)).await;
    killed.kill();
    let at = Instant::now();
    for n in 40..50 {
        jobs.push(second.submit(&format!("j{n}"), 3, 20).await);
    }
    let last = jobs.last().cloned().expect("one");
    running(&second, &last).await;
    println!(
        "killed -> the other one has scheduled everything in {:?}",
        at.elapsed()
    );
    second.all_over(&jobs).await;
    let shown = follower.await.expect("follows");
    let attempts = second.db().attempts(&long).await.expect("reads").len();
    if attempts == 1 {
        assert_eq!(shown, whole(&long, 1, 80), "followed over the kill");
    }
    // What it kept and nobody else has comes with it.
    let again = tokio::task::block_in_place(start);
    put_away(&second, &jobs).await;
    let counts = second.count(&jobs).await;
    counts.check("one controller killed", jobs.len());
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    drop(workers);
    again.kill();
    second.stop().await;
}

/// One controller stops in good order and comes back, as for an upgrade.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_controller_goes_and_no_job_is_lost() {
    let Some(common) = Common::new() else { return };
    let (a, b) = (folder(), folder());
    let [first, second] = common.two(a.path(), b.path()).await;
    let limits = GlobalLimits {
        running_max: Some(6),
        ..GlobalLimits::default()
    };
    first.db().set_global_limits(limits).await.expect("set");
    let ledger = Arc::new(Ledger::default());
    let workers = [
        worker(&first, &[&second], "w0", &ledger),
        worker(&first, &[&second], "w1", &ledger),
        worker(&second, &[&first], "w2", &ledger),
    ];
    let mut jobs = Vec::new();
    for n in 0..60 {
        let fleet = if n % 2 == 0 { &first } else { &second };
        jobs.push(fleet.submit(&format!("j{n}"), 6, 50).await);
    }
    let long = second.submit("long", 120, 50).await;
    running(&second, &long).await;
    let follower = {
        let (socket, long) = (second.socket.clone(), long.clone());
        tokio::spawn(async move { followed(&socket, &long).await })
    };
    let watched = second.db().clone();
    let most = tokio::spawn(async move {
        let mut most = 0;
        while !watched
            .job(&"long".parse().expect("name"))
            .await
            .expect("reads")
            .expect("there")
            .state
            .is_terminal()
        {
            let rows = watched
                .pool_view(&PoolName::default_pool(), 1)
                .await
                .expect("reads");
            most = most.max(rows.held.len());
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
        most
    });
    tokio::time::sleep(Duration::from_millis(900)).await;
    let stopped = Instant::now();
    let stopping = tokio::spawn(first.stop());
    for n in 60..70 {
        jobs.push(second.submit(&format!("j{n}"), 2, 20).await);
    }
    let last = jobs.last().cloned().expect("one");
    running(&second, &last).await;
    println!(
        "the other one schedules {:?} after the stop began",
        stopped.elapsed()
    );
    stopping.await.expect("stops");
    // It comes back, as after an upgrade.
    let first = common.start(a.path()).await;
    jobs.push(long.clone());
    second.all_over(&jobs).await;
    let wanted = second.db().attempts(&long).await.expect("reads");
    let last = wanted.last().expect("one").id.number;
    let shown = follower.await.expect("follows");
    assert!(
        shown.ends_with(&format!("line {}\n", 119)),
        "{last} {shown}"
    );
    put_away(&second, &jobs).await;
    let counts = second.count(&jobs).await;
    counts.check("one controller stopped", jobs.len());
    assert_eq!(ledger.twice.load(Ordering::SeqCst), 0, "two at once");
    let most = most.await.expect("watches");
    assert!((1..=6).contains(&most), "{most} at once");
    drop(workers);
    first.stop().await;
    second.stop().await;
}

/// Keys, store and folder are the others', or a controller does not start; what is refused leaves the others alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_does_not_fit_is_refused() {
    let Some(common) = Common::new() else { return };
    let folders = [folder(), folder(), folder()];
    let [a, b, c] = [0, 1, 2].map(|n| folders[n].path());
    let start = async |config: ServeConfig| -> Result<Running, StartError> {
        start_with(config, OpenOptions::default()).await
    };
    // The first one keeps everything in its folder.
    let alone = async |folder: &Path| {
        let mut config = common.config(folder).await;
        config.sharing.store = None;
        config
    };
    let first = start(alone(a).await).await.expect("starts");
    let refused = start(alone(b).await).await.map(drop);
    assert!(
        matches!(&refused, Err(StartError::Shared(SharedError::NoKeys(_)))),
        "{refused:?}"
    );
    assert!(
        !b.join("controller/keys").exists(),
        "no keys are made that nobody may use"
    );
    copy_keys(a, b);
    for config in [alone(b).await, common.config(b).await] {
        let refused = start(config).await.map(drop);
        assert!(
            matches!(
                &refused,
                Err(StartError::Shared(SharedError::FileStore { .. }))
            ),
            "{refused:?}"
        );
    }
    let mut greedy = common.config(b).await;
    greedy.sharing.adopt = true;
    let refused = start(greedy).await.map(drop);
    assert!(
        matches!(&refused, Err(StartError::Shared(SharedError::InUse(_)))),
        "{refused:?}"
    );
    first.stop().await;
    // The same one again is fine; with a bucket it says what it does.
    start(alone(a).await)
        .await
        .expect("starts again")
        .stop()
        .await;
    let refused = start(common.config(a).await).await.map(drop);
    assert!(
        matches!(
            &refused,
            Err(StartError::Shared(SharedError::FileStore { .. }))
        ),
        "{refused:?}"
    );
    let mut moved = common.config(a).await;
    moved.sharing.adopt = true;
    let first = start(moved).await.expect("starts with a bucket");
    let second = start(common.config(b).await)
        .await
        .expect("the second one starts");
    // Another bucket, and keys of its own.
    let other = Common {
        database: common.database.clone(),
        store: seaweed::server().expect("runs").url(),
    };
    copy_keys(a, c);
    let refused = start(other.config(c).await).await.map(drop);
    assert!(
        matches!(
            &refused,
            Err(StartError::Shared(SharedError::OtherStore { .. }))
        ),
        "{refused:?}"
    );
    std::fs::remove_dir_all(c.join("controller/keys")).expect("removed");
    std::fs::create_dir(c.join("controller/keys")).expect("made");
    use std::os::unix::fs::PermissionsExt as _;
    let own = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(c.join("controller/keys"), own).expect("chmod");
    let refused = start(common.config(c).await).await.map(drop);
    assert!(
        matches!(&refused, Err(StartError::Shared(SharedError::OtherKeys(_)))),
        "{refused:?}"
    );
    // A name of its own changes nothing: tokens name the first one.
    assert_eq!(
        first.controller.access.issuer(),
        second.controller.access.issuer()
    );
    second.stop().await;
    first.stop().await;
}
