//! Benchmarks of machines alone: clone, cold boot, many clones at once. Times end when the guest has proved its new identity and was thawed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_core::{ByteSize, FailureClass, MachineName};
use kiln_machine::bring_up::{self, Deadlines, Ready, Timings};
use kiln_machine::driver::{Machine, Start};
use kiln_machine::ledger::{Need, Ticket};
use kiln_machine::template::Held;
use kiln_proto::Session;
use kiln_proto::msg::ExecRequest;
use kiln_worker::attempt::{self, Wanted};
use kiln_worker::event::Events;
use kiln_worker::failure::Failure;
use kiln_worker::host::{Host, QUEUE_TIMEOUT};
use kiln_worker::orders::{self, ExecIo};
use kiln_worker::templates::{self, Purpose};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::Bench;
use super::report::Report;
use super::series::{Promise, Unit};
use crate::args::LimitArgs;
use crate::error::{CliError, OrInfrastructure as _, Result};

/// Clones that are started at once.
const MANY: u32 = 32;
/// What an idle clone is reckoned to take while many run; they are given nothing to do.
const IDLE_MEMORY: ByteSize = ByteSize::mib(128);
/// For each step of a start among many.
const MANY_STEP_MAX: Duration = Duration::from_secs(120);
/// How a machine's samples are named in the ledger.
const WHO: &str = "bench";

/// The host with the template of the default run size.
pub(super) struct Machines {
    host: Host,
    cpus: u32,
    memory: ByteSize,
    template: Held,
    events: Events,
    follow: JoinHandle<()>,
}

impl Machines {
    pub(super) async fn open(bench: &Bench<'_>, report: &mut Report) -> Result<Self> {
        let host = bench.operator.host().await?;
        report.set_host(host.driver.probe().await);
        let nothing = LimitArgs {
            cpus: None,
            memory: None,
            timeout: None,
        };
        let limits = bench.operator.config.limits(&nothing, false, 1)?;
        let memory = templates::size_class(limits.memory);
        let (events, receiver) = Events::channel();
        let follow = tokio::spawn(bench.screen.follow_quietly(receiver));
        let wanted = Wanted {
            name: name("template")?,
            cpus: limits.cpus,
            memory,
            purpose: Purpose::Run,
            make_template: true,
            may_stay: false,
            disk_bytes_per_second: None,
        };
        let chosen = templates::choose(&host, &wanted, memory, &events)
            .await
            .map_err(CliError::from_failure)?;
        let template = chosen.template.ok_or_else(|| {
            CliError::usage(
                "machines of this host cannot be cloned, so there is nothing to measure",
            )
        })?;
        Ok(Self {
            host,
            cpus: limits.cpus,
            memory,
            template,
            events,
            follow,
        })
    }

    pub(super) async fn ticket(&self) -> Result<Ticket> {
        self.host
            .admit(self.cpus, self.memory, WHO, &self.events)
            .await
            .map_err(CliError::from_failure)
    }

    /// One start and its end.
    async fn time(&self, start: &Start) -> Result<Timings> {
        let ready = self.start(start).await?;
        let timings = ready.timings;
        self.end(ready).await;
        Ok(timings)
    }

    pub(super) async fn start(&self, start: &Start) -> Result<Ready> {
        let disks = vec![attempt::root_disk(&self.host)];
        let spec = attempt::spec(&self.host, name("one")?, self.cpus, self.memory, disks);
        bring_up::start(&*self.host.driver, &spec, start, Deadlines::default())
            .await
            .map_err(|error| CliError::from_failure(templates::bring_up_failure(error)))
    }

    async fn end(&self, ready: Ready) {
        self.put_away(&*ready.machine, &ready.session).await;
    }

    /// Ends a machine that was taken apart.
    pub(super) async fn put_away(&self, machine: &dyn Machine, session: &Session) {
        session.close(0, "measured");
        for leak in machine.destroy().await.leaks {
            self.events.warn(format!("left behind: {leak}")).await;
        }
    }

    /// Where a machine's own services tell what happens.
    pub(super) fn events(&self) -> Events {
        self.events.clone()
    }

    pub(super) fn clone(&self) -> Start {
        Start::Template(self.template.template.clone())
    }

    pub(super) async fn close(self) {
        drop(self.events);
        let _screen_ended = self.follow.await;
    }
}

fn name(what: &str) -> Result<MachineName> {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    format!("bench-{what}-{}-{number}", std::process::id())
        .parse()
        .or_infrastructure()
}

/// `clone` and `cold`, interleaved when both are asked for.
pub(super) async fn starts(
    bench: &Bench<'_>,
    clone: bool,
    cold: bool,
    report: &mut Report,
) -> Result<()> {
    let machines = bench
        .unless_cancelled(Machines::open(bench, report))
        .await?;
    let ticket = bench.unless_cancelled(machines.ticket()).await?;
    for _ in 0..bench.samples {
        let mut cloned = None;
        if clone {
            let timings = bench
                .unless_cancelled(machines.time(&machines.clone()))
                .await?;
            let promise = Some(Promise::MedianAtMost(150.0));
            report.time("clone to ready", promise, timings.total());
            report.time("  clone: launch", None, timings.launch);
            report.time("  clone: hello", None, timings.hello);
            report.time("  clone: identity", None, timings.identity);
            report.time("  clone: thaw", None, timings.thaw);
            cloned = Some(timings.total());
        }
        if cold {
            let booted = bench
                .unless_cancelled(machines.time(&Start::Cold))
                .await?
                .total();
            report.time("cold boot to ready", None, booted);
            if let Some(cloned) = cloned {
                let ratio = booted.as_secs_f64() / cloned.as_secs_f64();
                let promise = Some(Promise::MedianAtLeast(15.0));
                report.add("cold boot / clone", Unit::Ratio, promise, ratio);
            }
        }
    }
    drop(ticket);
    machines.close().await;
    Ok(())
}

/// Of `room`: from a guest that is ready to the first byte that a command in it says.
pub(super) async fn first_bytes(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let machines = bench
        .unless_cancelled(Machines::open(bench, report))
        .await?;
    let ticket = bench.unless_cancelled(machines.ticket()).await?;
    for _ in 0..bench.samples {
        let ready = bench
            .unless_cancelled(machines.start(&machines.clone()))
            .await?;
        let took = bench.unless_cancelled(first_byte(&ready)).await;
        machines.end(ready).await;
        let promise = Some(Promise::MedianAtMost(30.0));
        report.time("guest ready to first byte of output", promise, took?);
    }
    drop(ticket);
    machines.close().await;
    Ok(())
}

async fn first_byte(ready: &Ready) -> Result<Duration> {
    let (output, mut chunks) = mpsc::channel(4);
    let (_open, control) = mpsc::channel(1);
    let request = ExecRequest {
        argv: ["echo", "here"].map(str::to_owned).to_vec(),
        env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        ..ExecRequest::default()
    };
    let io = ExecIo {
        stdin: None,
        output,
        control,
    };
    let began = Instant::now();
    let running = orders::exec(&ready.session, "measure", &request, io);
    let said = async { chunks.recv().await.map(|_| began.elapsed()) };
    let (ended, said) = tokio::join!(running, said);
    ended.or_infrastructure()?;
    said.ok_or_else(|| CliError::new(FailureClass::Infrastructure, "the command said nothing"))
}

/// `many`: one round of [`MANY`] clones, all alive when their memory is read.
pub(super) async fn many(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let machines = bench
        .unless_cancelled(Machines::open(bench, report))
        .await?;
    let need = Need {
        cpu_milli: 1000,
        memory: ByteSize(IDLE_MEMORY.0 * u64::from(MANY)),
        whole_cpus: 0,
    };
    let room = async {
        let wait = machines
            .host
            .ledger
            .acquire(need, WHO, QUEUE_TIMEOUT, |_| {});
        wait.await.or_infrastructure()
    };
    let ticket = bench.unless_cancelled(room).await?;
    let began = Instant::now();
    let ready = bench.unless_cancelled(start_many(&machines)).await?;
    report.time("32 clones: all ready", None, began.elapsed());
    for one in &ready {
        report.time("32 clones: each", None, one.timings.total());
        let stats = one.machine.stats().await.or_infrastructure()?;
        let promise = Some(Promise::EachAtMost(40e6));
        report.add(
            "32 clones: memory (PSS)",
            Unit::Bytes,
            promise,
            float(stats.pss.0),
        );
    }
    let promise = Some(Promise::MedianAtLeast(f64::from(MANY)));
    let count = float(ready.len() as u64);
    report.add("32 clones: ready", Unit::Count, promise, count);
    for one in ready {
        machines.end(one).await;
    }
    drop(ticket);
    machines.close().await;
    Ok(())
}

async fn start_many(machines: &Machines) -> Result<Vec<Ready>> {
    let mut starting = JoinSet::new();
    let deadlines = Deadlines {
        clone_hello: MANY_STEP_MAX,
        order: MANY_STEP_MAX,
    };
    for _ in 0..MANY {
        let disks = vec![attempt::root_disk(&machines.host)];
        let (cpus, memory) = (machines.cpus, machines.memory);
        let spec = attempt::spec(&machines.host, name("many")?, cpus, memory, disks);
        let driver = Arc::clone(&machines.host.driver);
        let start = machines.clone();
        starting.spawn(async move { bring_up::start(&*driver, &spec, &start, deadlines).await });
    }
    let mut ready = Vec::new();
    while let Some(joined) = starting.join_next().await {
        let started = joined.or_infrastructure()?;
        let failed = |error| -> Failure { templates::bring_up_failure(error) };
        ready.push(started.map_err(|error| CliError::from_failure(failed(error)))?);
    }
    Ok(ready)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of a machine fit a double"
)]
fn float(value: u64) -> f64 {
    value as f64
}
