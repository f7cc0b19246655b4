//! The line between controller and workers is cut, in both directions or in one: real network namespaces, mutual TLS, the real worker.
//!
//! A cut is a wrong link-layer address for the other end: packets leave, arrive at nobody, and nobody is told.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_controller::server::Running;
use kiln_core::JobId;
use kiln_core::dispatch::WorkerState;
use kiln_worker::fleet::client::Client;
use kiln_worker::fleet::daemon::{self, Offer};
use kiln_worker::fleet::http::Target;
use kiln_worker::fleet::identity::{ControllerUrl, Identity};
use kiln_worker::fleet::job::Workshop;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

use crate::fleet_sim::{
    self, ANSWER, LEASE, Ledgered, PATIENCE, Pace, Ran, all_over, count, facts, job, machines,
    until, work_near,
};

/// An address that no network card here has.
const NOBODY: &str = "02:00:00:00:00:99";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cut {
    Both,
    /// What the worker says is lost.
    ToController,
    /// What the controller answers is lost: the line is half open.
    ToWorker,
}

/// A network namespace with one cable to this one.
struct Cable {
    space: String,
    here: String,
    controller: Ipv4Addr,
    worker: Ipv4Addr,
}

#[expect(
    clippy::print_stdout,
    reason = "why there is no network shows in the test's output"
)]
fn ip(arguments: &[&str]) -> bool {
    let output = Command::new("ip").args(arguments).output();
    match output {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            println!(
                "ip {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            false
        }
        Err(error) => {
            println!("ip {arguments:?}: {error}");
            false
        }
    }
}

impl Cable {
    /// `None` where this user may not.
    fn lay(number: u8) -> Option<Self> {
        let pid = std::process::id();
        let [_, _, high, low] = pid.to_be_bytes();
        let base = number * 4;
        let cable = Self {
            space: format!("kiln-it-{pid}-{number}"),
            here: format!("kt{pid}-{number}"),
            controller: Ipv4Addr::new(10, 192 | (high & 63), low, base + 1),
            worker: Ipv4Addr::new(10, 192 | (high & 63), low, base + 2),
        };
        let (space, here) = (cable.space.as_str(), cable.here.as_str());
        if !ip(&["netns", "add", space]) {
            return None;
        }
        let own = |address: Ipv4Addr| format!("{address}/30");
        let made = ip(&[
            "link", "add", here, "type", "veth", "peer", "name", "wire", "netns", space,
        ]) && ip(&["addr", "add", &own(cable.controller), "dev", here])
            && ip(&["link", "set", here, "up"])
            && ip(&[
                "-n",
                space,
                "addr",
                "add",
                &own(cable.worker),
                "dev",
                "wire",
            ])
            && ip(&["-n", space, "link", "set", "wire", "up"])
            && ip(&["-n", space, "link", "set", "lo", "up"]);
        assert!(made, "no cable");
        Some(cable)
    }

    fn cut(&self, cut: Cut) {
        let (controller, worker) = (self.controller.to_string(), self.worker.to_string());
        if cut != Cut::ToWorker {
            let there = ["-n", &self.space, "neigh", "replace", &controller];
            assert!(ip(
                &[&there[..], &["lladdr", NOBODY, "dev", "wire"]].concat()
            ));
        }
        if cut != Cut::ToController {
            let here = ["neigh", "replace", &worker, "lladdr", NOBODY];
            assert!(ip(&[&here[..], &["dev", &self.here]].concat()));
        }
    }

    fn heal(&self, cut: Cut) {
        let (controller, worker) = (self.controller.to_string(), self.worker.to_string());
        if cut != Cut::ToWorker {
            assert!(ip(&[
                "-n",
                &self.space,
                "neigh",
                "del",
                &controller,
                "dev",
                "wire"
            ]));
        }
        if cut != Cut::ToController {
            assert!(ip(&["neigh", "del", &worker, "dev", &self.here]));
        }
    }

    /// Threads that see this namespace's network and nothing else.
    fn runtime(&self) -> Runtime {
        let space = File::open(format!("/run/netns/{}", self.space)).expect("it is there");
        Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(move || {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(space.as_fd(), network).expect("enters");
            })
            .build()
            .expect("a runtime")
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // A namespace outlives its name for as long as a connection of it waits for an answer.
        ip(&["link", "del", &self.here]);
        ip(&["netns", "del", &self.space]);
    }
}

/// A worker at the far end of a cable.
struct Far {
    name: String,
    cut: Cut,
    home: tempfile::TempDir,
    pace: Pace,
    stop: CancellationToken,
    runtime: Option<Runtime>,
    cable: Cable,
}

impl Far {
    fn start(
        cable: Cable,
        cut: Cut,
        url: ControllerUrl,
        token: &str,
        ledger: &Arc<Ledgered>,
    ) -> Self {
        let far = Self {
            name: format!("far-{cut:?}").to_lowercase(),
            cut,
            home: tempfile::tempdir().expect("folder"),
            pace: Arc::new(Mutex::new(PATIENCE)),
            stop: CancellationToken::new(),
            runtime: Some(cable.runtime()),
            cable,
        };
        let (home, name) = (far.home.path().to_owned(), far.name.clone());
        let (pace, ledger) = (Arc::clone(&far.pace), Arc::clone(ledger));
        let (token, stop) = (token.to_owned(), far.stop.clone());
        let work = async move {
            let worker = name.parse().expect("a name");
            let folder = home.join("worker");
            let joined = Identity::join(&folder, url, &token, worker, facts(1)).await;
            let identity = joined.expect("joins");
            let target = identity.target().expect("a target");
            let shop = fleet_sim::workshop(&home, &name, target.clone(), &ledger, &pace).await;
            let shop = Workshop {
                client: Client::new(target, identity.worker()),
                authority: Some(identity.authority_pem().expect("authority")),
                ..shop
            };
            let offer = Offer {
                facts: facts(1),
                takes_jobs: true,
                own: false,
            };
            daemon::serve(Arc::new(shop), offer, stop)
                .await
                .expect("works to its end");
        };
        far.runtime.as_ref().expect("runs").spawn(work);
        far
    }

    fn set_pace(&self, pace: Duration) {
        *self.pace.lock().expect("lock") = pace;
    }

    /// Stops it; gives what is left of its machines.
    fn end(mut self) -> usize {
        self.stop.cancel();
        let home = self.home.path().to_owned();
        let deadline = Instant::now() + ANSWER;
        while !machines(&home).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(ANSWER);
        }
        machines(&home).len()
    }
}

async fn join_token(running: &Running) -> String {
    let client = Client::new(
        Target::Socket(running.socket.clone()),
        "test".parse().expect("name"),
    );
    let asked = serde_json::json!({});
    let made = client.call::<_, serde_json::Value>("/v1/tokens/join", None, &asked, ANSWER);
    made.await.expect("a token")["token"]
        .as_str()
        .expect("a token")
        .to_owned()
}

/// The commands of a job, in order.
fn of(ledger: &Ledgered, job: &JobId) -> Vec<Ran> {
    let mut all = ledger.all();
    all.retain(|ran| ran.job == job.as_str());
    all
}

/// The machine of the job's first attempt that worked was gone before the controller gave that attempt up, and not only before the next began.
#[expect(clippy::print_stdout, reason = "the times are the result")]
async fn ended_in_time(running: &Running, ledger: &Ledgered, id: &JobId, cut_at: Instant) {
    let ran = of(ledger, id);
    // On a busy host an attempt may have been lost before.
    let at = ran
        .iter()
        .rposition(|ran| ran.began <= cut_at)
        .expect("it ran");
    let (first, second) = (&ran[at], &ran[at + 1]);
    let ended = first.ended.expect("its machine was destroyed");
    println!(
        "{}: machine destroyed {:?} after the cut, {:?} before the job began on {}",
        first.worker,
        ended - cut_at,
        second.began.saturating_duration_since(ended),
        second.worker
    );
    assert!(ended < second.began, "{id}: two at once");
    assert_eq!(second.worker, "near");
    let db = &running.controller.db;
    let attempts = db.attempts(id).await.expect("reads");
    let own = |attempt: &&kiln_db::Attempt| attempt.worker.as_str() == first.worker;
    let attempt = attempts.iter().rfind(own).expect("its attempt");
    let given_up = attempt.ended_unix_ms.expect("given up");
    let since = db
        .now()
        .await
        .expect("tells the time")
        .saturating_sub(given_up);
    let gone = ended.elapsed();
    assert!(
        gone > Duration::from_millis(since),
        "{id}: its machine ended {gone:?} ago, the attempt {since} ms ago: {attempts:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_line_is_cut_ends_its_machine_before_its_job_is_given_away_and_works_again()
{
    let cuts = [Cut::Both, Cut::ToController, Cut::ToWorker];
    let cables: Option<Vec<Cable>> = (0..).zip(cuts).map(|(n, _)| Cable::lay(n)).collect();
    let Some(cables) = cables else {
        assert!(
            !rustix::process::geteuid().is_root(),
            "root may make network namespaces"
        );
        println!("SKIPPED: only root may make network namespaces");
        return;
    };
    let folder = tempfile::tempdir().expect("folder");
    let names = cables
        .iter()
        .map(|cable| cable.controller.to_string())
        .collect();
    let listen: SocketAddr = "0.0.0.0:0".parse().expect("an address");
    let running = fleet_sim::controller(folder.path(), vec![listen], names, LEASE).await;
    let ledger = Arc::new(Ledgered::default());
    let mut far = Vec::new();
    for (cable, cut) in cables.into_iter().zip(cuts) {
        let url = format!(
            "https://{}:{}",
            cable.controller,
            running.addresses[0].port()
        );
        let token = join_token(&running).await;
        far.push(Far::start(
            cable,
            cut,
            url.parse().expect("a URL"),
            &token,
            &ledger,
        ));
    }
    let db = &running.controller.db;
    let mut jobs: Vec<JobId> = Vec::new();
    for n in 0..far.len() {
        jobs.push(
            db.submit(job(&format!("j{n}")))
                .await
                .expect("submits")
                .job
                .request
                .id,
        );
    }
    until("one job on each", || {
        let all = ledger.all();
        let works = |name: &str| {
            all.iter()
                .any(|ran| ran.worker == name && ran.ended.is_none())
        };
        far.iter().all(|far| works(&far.name))
    })
    .await;
    let near_home = tempfile::tempdir().expect("folder");
    let stop_near = CancellationToken::new();
    let target = Target::Socket(running.socket.clone());
    let pace: Pace = Arc::new(Mutex::new(Duration::from_millis(300)));
    let shop = fleet_sim::workshop(near_home.path(), "near", target, &ledger, &pace).await;
    work_near(shop, "near", 3, stop_near.clone()).await;

    let cut_at = Instant::now();
    far.iter().for_each(|far| far.cable.cut(far.cut));
    all_over(&running, &jobs).await;
    for id in &jobs {
        ended_in_time(&running, &ledger, id, cut_at).await;
    }
    far.iter()
        .for_each(|far| far.set_pace(Duration::from_millis(300)));
    stop_near.cancel();
    let healed_at = Instant::now();
    far.iter().for_each(|far| far.cable.heal(far.cut));
    for one in &far {
        let id = one.name.parse().expect("a name");
        while db
            .worker(&id)
            .await
            .expect("reads")
            .expect("is there")
            .state
            != WorkerState::Active
        {
            assert!(
                healed_at.elapsed() < PATIENCE,
                "{} never came back",
                one.name
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let back = healed_at.elapsed();
    // One after the other until each of them has worked again.
    let mut number = far.len();
    let worked = |name: &str| ledger.all().iter().filter(|ran| ran.worker == name).count() > 1;
    while !far.iter().all(|far| worked(&far.name)) {
        assert!(
            healed_at.elapsed() < PATIENCE,
            "not every worker works again"
        );
        let before = jobs.len();
        for _ in 0..far.len() {
            jobs.push(
                db.submit(job(&format!("j{number}")))
                    .await
                    .expect("submits")
                    .job
                    .request
                    .id,
            );
            number += 1;
        }
        all_over(&running, &jobs[before..]).await;
    }
    let working = healed_at.elapsed();
    let [lost, twice, held] = count(&running, &jobs).await;
    let left: usize = far
        .into_iter()
        .map(|far| tokio::task::block_in_place(|| far.end()))
        .sum();
    let left = left + machines(near_home.path()).len();
    println!(
        "line cut three ways: back {back:?} after it was whole again, all working after {working:?}; jobs lost {lost}, finished twice \
         {twice}, two at once {}, leases left {held}, machines left {left}",
        ledger.twice()
    );
    assert_eq!([lost, twice, held, left, ledger.twice()], [0; 5]);
    running.stop().await;
}
