//! kill -9 of `kiln serve`, `kiln worker`, and both, at random moments of real builds in real machines.
//!
//! One build with both killed in the suite; `KILN_KILL_BUILDS=10` is the long version, `KILN_FAULT_SEED` repeats one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::annex::Annex;
use crate::support::{Said, Started, app, free_port, path, until};

/// Longest time for one build, its kills included.
const PATIENCE: Duration = Duration::from_secs(400);
/// Builds that run at a time.
const PAIR: usize = 2;

/// A number of the environment.
#[expect(
    clippy::disallowed_methods,
    reason = "whoever starts the long version talks to it this way"
)]
pub(crate) fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// SplitMix64: what is drawn follows from the seed alone.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// A server and a worker of another home, each a process that may be killed.
struct Fleet {
    server_home: Annex,
    worker_home: Annex,
    listen: String,
    server: Option<Started>,
    worker: Option<Started>,
    kills: BTreeMap<&'static str, usize>,
}

impl Fleet {
    fn start() -> Option<Self> {
        let mut server_home = Annex::open()?;
        // A registry of its own: what the worker builds has to travel.
        server_home.without("registry");
        let worker_home = Annex::open()?;
        let mut fleet = Self {
            server_home,
            worker_home,
            listen: format!("127.0.0.1:{}", free_port()),
            server: None,
            worker: None,
            kills: BTreeMap::new(),
        };
        fleet.serve();
        let token = fleet.asks(&["token", "create", "--join"]).exits(0);
        let url = format!("https://{}", fleet.listen);
        let join = [
            "worker",
            "--controller",
            &url,
            "--join",
            token.out.trim(),
            "--name",
            "w1",
            "--machines",
            "2",
        ];
        fleet.worker = Some(fleet.worker_home.start(&join));
        fleet.wait_for_worker();
        Some(fleet)
    }

    fn serve(&mut self) {
        let serve = ["serve", "--listen", self.listen.as_str()];
        let mut server = self.server_home.start(&serve);
        server.until_it_prints("private socket");
        self.server = Some(server);
    }

    fn work(&mut self) {
        self.worker = Some(self.worker_home.start(&["worker", "--machines", "2"]));
    }

    fn wait_for_worker(&self) {
        until("a worker", || {
            let listed = self.asks(&["worker", "list", "--json"]);
            listed.out.contains("\"active\"").then_some(())
        });
    }

    /// A command of the server's own home.
    fn asks(&self, args: &[&str]) -> Said {
        self.server_home.run(args)
    }

    /// Kills one or both and starts them again.
    fn kill(&mut self, which: &'static str) {
        for (name, process) in [("server", &mut self.server), ("worker", &mut self.worker)] {
            if which != "both" && which != name {
                continue;
            }
            let process = process.take().expect("it runs");
            process.signal("KILL");
            process.end();
        }
        if self.server.is_none() {
            self.serve();
        }
        if self.worker.is_none() {
            self.work();
        }
        *self.kills.entry(which).or_default() += 1;
    }

    /// Queues a build of something that was never built before.
    fn build(&self, number: usize, kept: &mut Vec<tempfile::TempDir>) -> String {
        let text = "FROM registry.kiln.internal/shared/python:3.13-run\nUSER root\nCOPY own /own\nRUN sleep 3; cat /own > /built\n";
        let own = format!("{number} {}", self.server_home.home.display());
        let dir = app(&[("Dockerfile", text), ("own", &own)]);
        let socket = format!(
            "unix:{}",
            path(&self.server_home.home.join("controller/controller.sock"))
        );
        let tag = format!("it-kill:{number}");
        let args = [
            "--server",
            &socket,
            "build",
            path(dir.path()),
            "--tag",
            &tag,
            "--detach",
            "--cpus",
            "1",
            "--memory",
            "512M",
            "--disk",
            "2G",
        ];
        let said = self.asks(&args).exits(0);
        kept.push(dir);
        said.out.trim().to_owned()
    }

    fn show(&self, job: &str) -> Value {
        let said = self.asks(&["job", "show", job, "--json"]).exits(0);
        serde_json::from_str(said.out.trim()).expect("JSON")
    }

    /// Names and events of what is left anywhere.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for home in [&self.server_home, &self.worker_home] {
            let at = |name: &str| entries(&home.home.join(name));
            left.extend(
                at("machines")
                    .into_iter()
                    .filter(|name| !name.ends_with("/.lock")),
            );
            left.extend(at("cache/spool"));
            left.extend(at("cache/checkouts"));
            left.extend(
                at("ledger")
                    .into_iter()
                    .filter(|name| name.contains("lease-") || name.contains("wait-")),
            );
            left.extend(home.vmms().iter().map(|pid| format!("VMM {pid}")));
        }
        left
    }
}

fn entries(dir: &Path) -> Vec<String> {
    let found = fs::read_dir(dir).into_iter().flatten().flatten();
    found
        .map(|entry| entry.path().display().to_string())
        .collect()
}

/// Quarantines of these jobs.
fn quarantines(home: &Path, jobs: &[String]) -> Vec<PathBuf> {
    let quarantine = home.join("registry/repos/quarantine");
    let paths = jobs.iter().map(|job| quarantine.join(job));
    paths.filter(|path| path.exists()).collect()
}

#[test]
fn builds_survive_kill_9_of_server_and_worker() {
    let builds = usize::try_from(asked("KILN_KILL_BUILDS").unwrap_or(1)).expect("small");
    let seed = asked("KILN_FAULT_SEED").unwrap_or(5);
    println!("KILN_FAULT_SEED={seed}");
    let Some(mut fleet) = Fleet::start() else {
        return;
    };
    let (mut rng, began) = (Rng(seed), Instant::now());
    let (mut jobs, mut kept) = (Vec::new(), Vec::new());
    for round in 0..builds.div_ceil(PAIR) {
        let these: Vec<String> = (round * PAIR..builds.min((round + 1) * PAIR))
            .map(|number| fleet.build(number, &mut kept))
            .collect();
        // Two kills at most meet one build: its attempts are bounded.
        let which = match (builds, round % 3) {
            (1, _) | (_, 2) => ["both"].as_slice(),
            (_, 0) => &["server", "worker"],
            _ => &["worker", "server"],
        };
        for which in which {
            sleep(Duration::from_millis(1_000 + rng.below(9_000)));
            fleet.kill(which);
        }
        for job in &these {
            let deadline = Instant::now() + PATIENCE;
            while fleet.show(job)["state"] != "finished" {
                assert!(
                    Instant::now() < deadline,
                    "{job} is not over: {}",
                    fleet.show(job)
                );
                sleep(Duration::from_millis(300));
            }
        }
        jobs.extend(these);
    }
    let (mut lost, mut twice, mut attempts) = (0, 0, 0);
    for (number, job) in jobs.iter().enumerate() {
        let shown = fleet.show(job);
        // Its one name is the image that its receipt tells of.
        let images = fleet.asks(&["registry", "list", "--json"]).exits(0).out;
        let images = images
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"));
        let mut own: Vec<Value> = images.collect();
        let tag = number.to_string();
        own.retain(|image| {
            image["repository"] == "t/local/it-kill" && image["tag"] == tag.as_str()
        });
        let there = own.len() == 1
            && own[0]["digest"] == shown["receipt"]["manifest"]
            && shown["outcome"]["verdict"] == "passed";
        if !there {
            println!("{number}: {shown}\n{own:?}");
        }
        lost += usize::from(!there);
        attempts += shown["attempts"].as_array().map_or(0, Vec::len);
        let timeline = fleet.asks(&["job", "timeline", job]).exits(0).out;
        let ends = timeline
            .lines()
            .filter(|line| line.contains("finished"))
            .count();
        twice += usize::from(ends != 1);
    }
    until("everything to be cleared away", || {
        fleet.left().is_empty().then_some(())
    });
    let left = quarantines(&fleet.worker_home.home, &jobs);
    let stats = fleet.asks(&["worker", "list", "--json"]).exits(0).out;
    println!(
        "{builds} builds, killed {:?}, {attempts} attempts, {:?}: jobs lost {lost}, published twice {twice}, left {left:?}\n{stats}",
        fleet.kills,
        began.elapsed()
    );
    assert_eq!((lost, twice), (0, 0));
    for process in [fleet.worker.take(), fleet.server.take()] {
        let process = process.expect("it runs");
        process.signal("INT");
        process.end();
    }
    assert!(fleet.left().is_empty(), "{:?}", fleet.left());
}
