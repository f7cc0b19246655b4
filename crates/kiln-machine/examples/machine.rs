//! Starts machines by hand and prints what each step takes: `machine DIR HOME [probe|reap|cold|full|clones|many|fault] [COUNT] [QEMU]`.
//!
//! DIR holds `kernel`, `initrd` and `root.img`; HOME is a kiln home for the machines and templates of this run.

#![expect(clippy::print_stdout, reason = "it is a program for people")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kiln_core::machine::{BootSource, DiskAccess, DiskFormat};
use kiln_core::{ByteSize, Digest, DiskRole, DiskSlot, MachineSpec};
use kiln_machine::bring_up::{self, Deadlines, Ready};
use kiln_machine::driver::{Driver, Start};
use kiln_machine::qemu::{QemuConfig, QemuDriver};
use kiln_machine::template::{Purpose, TemplateKey, TemplateStore};
use kiln_proto::msg::{Mount, Order};

fn spec(dir: &Path, name: &str) -> Result<MachineSpec> {
    let root = DiskSlot {
        role: DiskRole::Root,
        backing: Some(dir.join("root.img")),
        format: DiskFormat::Raw,
        access: DiskAccess::ReadOnly,
    };
    Ok(MachineSpec {
        name: name.parse()?,
        cpus: 1,
        memory: ByteSize::mib(512),
        boot: BootSource {
            kernel: dir.join("kernel"),
            initrd: dir.join("initrd"),
            args: Vec::new(),
            image: Digest::of(dir.as_os_str().as_encoded_bytes()),
        },
        disks: vec![root],
        boot_timeout_ms: 30_000,
        keepable: false,
        host_cpus: Vec::new(),
        disk_bytes_per_second: None,
    })
}

fn say(what: &str, ready: &Ready) {
    let t = ready.timings;
    println!(
        "{what}: total {:?} (launch {:?}, hello {:?}, identity {:?}, thaw {:?}, retries {})",
        t.total(),
        t.launch,
        t.hello,
        t.identity,
        t.thaw,
        t.retries
    );
}

async fn end(ready: Ready) -> Result<()> {
    let began = Instant::now();
    drop(ready.session);
    let leaks = ready.machine.destroy().await;
    println!("  destroyed in {:?}", began.elapsed());
    match leaks.leaks.is_empty() {
        true => Ok(()),
        false => bail!("leaks: {:?}", leaks.leaks),
    }
}

/// Formats a new disk on a home that lies on a small filesystem: the host's full disk must end the machine, with its reason.
async fn fill(driver: &dyn Driver, mut spec: MachineSpec) -> Result<()> {
    spec.disks.push(DiskSlot {
        role: DiskRole::Scratch,
        backing: None,
        format: DiskFormat::Raw,
        access: DiskAccess::New {
            size: ByteSize::gib(8),
        },
    });
    let ready = bring_up::start(driver, &spec, &Start::Cold, Deadlines::default()).await?;
    say("cold", &ready);
    let mount = Order::Mount(Mount {
        serial: DiskRole::Scratch.serial().to_owned(),
        read_only: false,
        format_blank: true,
        memory_bytes: 0,
        timeout_ms: 20_000,
    });
    let answer = bring_up::call(&ready.session, &mount, Duration::from_secs(60)).await;
    let state = tokio::time::timeout(Duration::from_secs(5), ready.machine.stopped()).await;
    println!("mount: {answer:?}, machine: {state:?}");
    end(ready).await
}

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, home, rest @ ..] = &args[..] else {
        bail!("usage: machine DIR HOME [probe|reap|cold|full|clones|many|fault] [COUNT] [QEMU]");
    };
    let dir = std::fs::canonicalize(dir)?;
    std::fs::create_dir_all(home)?;
    let home: PathBuf = std::fs::canonicalize(home)?;
    let mode = rest.first().map_or("clones", String::as_str);
    let count: usize = rest.get(1).map_or(Ok(10), |n| n.parse())?;
    let mut config = QemuConfig::new(&home);
    config.program = rest.get(2).map(PathBuf::from);
    config.probe_boot = Some(spec(&dir, "probe")?.boot);
    if mode == "probe" {
        config.probe_boot = None;
    }
    let driver: Arc<dyn Driver> = Arc::new(QemuDriver::new(config)?);
    println!("{:#?}", driver.probe().await);
    if mode == "cold" {
        for n in 0..count {
            let spec = spec(&dir, &format!("cold-{n}"))?;
            let ready =
                bring_up::start(&*driver, &spec, &Start::Cold, Deadlines::default()).await?;
            say("cold", &ready);
            println!("  {:?}", ready.machine.stats().await?);
            end(ready).await?;
        }
        return Ok(());
    }
    if mode == "probe" || mode == "reap" {
        println!("{:?}", driver.reap().await);
        return Ok(());
    }
    if mode == "full" {
        return fill(&*driver, spec(&dir, "full")?).await;
    }
    let store = TemplateStore::open(&home.join("templates"))?;
    let mould = spec(&dir, "mould")?;
    let key = TemplateKey::of(
        Purpose::Run,
        "",
        &mould,
        driver.template_facts().await,
        vec![],
    );
    let began = Instant::now();
    let make = |target| {
        let (driver, mould) = (&driver, &mould);
        async move {
            let nothing = |_| async { Ok::<(), anyhow::Error>(()) };
            bring_up::make_template(&**driver, mould, &target, Deadlines::default(), nothing).await
        }
    };
    let held = store
        .get_or_make(&key, &|p| println!("  template: {p:?}"), make)
        .await
        .context("no template")?;
    println!("template {} in {:?}", held.template.key, began.elapsed());
    let start = Start::Template(held.template.clone());
    if mode == "clones" {
        return clones(&*driver, &dir, &start, count).await;
    }
    many(&driver, &dir, &start, count, mode == "fault").await
}

async fn clones(driver: &dyn Driver, dir: &Path, start: &Start, count: usize) -> Result<()> {
    let mut totals = Vec::new();
    let mut cpu_ms = 0;
    for n in 0..count {
        let spec = spec(dir, &format!("clone-{n}"))?;
        let ready = bring_up::start(driver, &spec, start, Deadlines::default()).await?;
        say("clone", &ready);
        totals.push(ready.timings.total());
        cpu_ms += ready.machine.stats().await?.cpu_ms;
        end(ready).await?;
    }
    println!(
        "CPU of the VMM up to ready, mean: {} ms",
        cpu_ms / count as u64
    );
    totals.sort();
    println!(
        "p50 {:?}, max {:?}",
        totals[totals.len() / 2],
        totals[totals.len() - 1]
    );
    Ok(())
}

async fn many(
    driver: &Arc<dyn Driver>,
    dir: &Path,
    start: &Start,
    count: usize,
    die: bool,
) -> Result<()> {
    let began = Instant::now();
    let mut tasks = Vec::new();
    for n in 0..count {
        let (driver, start, spec) = (
            driver.clone(),
            start.clone(),
            spec(dir, &format!("many-{n}"))?,
        );
        tasks.push(tokio::spawn(async move {
            bring_up::start(&*driver, &spec, &start, Deadlines::default()).await
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await??);
    }
    println!("{count} clones ready in {:?}", began.elapsed());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut pss = 0;
    for ready in &all {
        pss += ready.machine.stats().await?.pss.0;
    }
    println!("proportional memory each: {}", ByteSize(pss / count as u64));
    if die {
        std::process::abort();
    }
    for ready in all {
        end(ready).await?;
    }
    Ok(())
}
