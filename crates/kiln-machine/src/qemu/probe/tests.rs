//! Probes with made-up QEMU programs and devices, and the payload under emulation.

use super::*;

#[tokio::test]
async fn the_payload_leaves_with_its_number_under_emulation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("payload");
    fs::write(&path, payload()).unwrap();
    let Ok(program) = Program::find(None) else {
        return;
    };
    let status = Command::new(program.path)
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-accel",
            "tcg",
            "-M",
            "pc",
        ])
        .args([
            "-m",
            "16M",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04",
            "-bios",
        ])
        .arg(&path)
        .kill_on_drop(true)
        .status();
    let status = tokio::time::timeout(Duration::from_secs(30), status).await;
    assert_eq!(status.expect("in time").unwrap().code(), Some(PAYLOAD_EXIT));
}

#[tokio::test]
async fn a_verdict_is_kept_only_for_its_subject() {
    let dir = tempfile::tempdir().unwrap();
    let program = Program {
        path: "/nonexistent".into(),
        version: "10.0.0".into(),
        number: (10, 0),
        identity: "i".into(),
    };
    let boot = BootSource {
        kernel: "/k".into(),
        initrd: "/i".into(),
        args: vec![],
        image: kiln_core::Digest::of(b""),
    };
    let kept = Verdict::of(Accelerator::Kvm, "kept");
    let remembered = Remembered {
        schema: SCHEMA,
        program: program.clone(),
        subject: Some(subject(Path::new(DEVICE), &program, &boot)),
        verdict: Some(kept.clone()),
    };
    write(dir.path(), &remembered);
    let config = QemuConfig::new(dir.path());
    assert_eq!(verdict(&config, &program, Some(&boot)).await, kept);
    assert_eq!(remembered_program(dir.path()), Some(program.clone()));
    let mut other = program;
    other.identity = "j".into();
    assert_ne!(
        verdict(&config, &other, Some(&boot)).await.accelerator,
        Accelerator::Kvm
    );
}

/// A home with a device that opens, a boot source, and a QEMU that does what this script says.
struct Made {
    dir: tempfile::TempDir,
    config: QemuConfig,
    program: Program,
    boot: BootSource,
}

fn made(script: &str) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["kvm", "kernel", "initrd"] {
        fs::write(at(name), name).unwrap();
    }
    // Written by another process: a child that this one forks meanwhile must not hold it open for writing ("text file busy").
    let text = format!("#!/bin/sh\necho run >> $0.runs\n{script}\n");
    let status = std::process::Command::new("sh")
        .args([
            "-c",
            "printf %s \"$1\" > \"$2\" && chmod 755 \"$2\"",
            "sh",
            &text,
        ])
        .arg(at("qemu"))
        .status();
    assert!(status.unwrap().success());
    let mut config = QemuConfig::new(&at("home"));
    config.kvm = at("kvm");
    let program = Program {
        path: at("qemu"),
        version: "10.0.0".into(),
        number: (10, 0),
        identity: "i".into(),
    };
    let boot = BootSource {
        kernel: at("kernel"),
        initrd: at("initrd"),
        args: vec![],
        image: kiln_core::Digest::of(b""),
    };
    Made {
        dir,
        config,
        program,
        boot,
    }
}

const SHORT: Deadlines = Deadlines {
    open: Duration::from_millis(500),
    boot: Duration::from_millis(500),
    payload: Duration::from_millis(500),
};

impl Made {
    async fn ask(&self, boot: bool) -> Verdict {
        let device = self.config.kvm.clone();
        let open = move || open_device(&device);
        let boot = boot.then_some(&self.boot);
        verdict_within(&self.config, &self.program, boot, open, SHORT).await
    }

    fn runs(&self) -> usize {
        let runs = fs::read_to_string(self.dir.path().join("qemu.runs"));
        runs.map_or(0, |text| text.lines().count())
    }
}

const BOOTS: &str = "echo 'Run /init as init process'; exec sleep 60";

#[tokio::test]
async fn kvm_that_boots_a_kernel_is_used_and_remembered() {
    let made = made(BOOTS);
    for _ in 0..3 {
        let verdict = made.ask(true).await;
        assert_eq!(verdict.accelerator, Accelerator::Kvm, "{verdict:?}");
        assert!(!verdict.preliminary && verdict.boot_ms.is_some());
        assert_eq!(verdict.check().level, CheckLevel::Pass);
    }
    assert_eq!(made.runs(), 1, "remembered");
    // Another guest kernel, QEMU or host boot: asked anew.
    fs::write(&made.boot.kernel, "another kernel").unwrap();
    made.ask(true).await;
    assert_eq!(made.runs(), 2, "another guest kernel");
    let path = made.config.home.join(FILE);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace(&proc::boot_id(), "another boot")).unwrap();
    made.ask(true).await;
    assert_eq!(made.runs(), 3, "another boot of the host");
    let text = fs::read_to_string(&path).unwrap();
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    fs::write(&path, text.replace(&release, "1.0")).unwrap();
    made.ask(true).await;
    assert_eq!(made.runs(), 4, "another kernel of the host");
    // A damaged note is no verdict.
    fs::write(&path, "{").unwrap();
    assert_eq!(made.ask(true).await.accelerator, Accelerator::Kvm);
    assert_eq!(made.runs(), 5);
}

#[tokio::test]
async fn kvm_that_boots_nothing_leads_to_emulation_within_the_deadline() {
    let hangs = made("exec sleep 600");
    let began = Instant::now();
    let verdict = hangs.ask(true).await;
    assert_eq!(verdict.accelerator, Accelerator::KvmBroken, "{verdict:?}");
    assert!(began.elapsed() < Duration::from_secs(60));
    assert!(verdict.why.contains("does not boot a guest"), "{verdict:?}");
    assert_eq!(verdict.check().level, CheckLevel::Warn);
    assert_eq!(hangs.ask(true).await, verdict);
    assert_eq!(hangs.runs(), 1, "a hang is not waited for twice");
    let fails = made("echo 'failed to initialize kvm' >&2; exit 1");
    assert_eq!(fails.ask(true).await.accelerator, Accelerator::KvmBroken);
    let talks = made("exec yes");
    let verdict = talks.ask(true).await;
    assert_eq!(verdict.accelerator, Accelerator::KvmBroken);
    assert!(verdict.why.contains("something else") || verdict.why.contains("within"));
}

#[tokio::test]
async fn without_a_kernel_a_few_bytes_decide_for_now() {
    let runs = made(&format!("exit {PAYLOAD_EXIT}"));
    for count in 1..3 {
        let verdict = runs.ask(false).await;
        assert_eq!(verdict.accelerator, Accelerator::Kvm, "{verdict:?}");
        assert!(verdict.preliminary);
        assert_eq!(verdict.check().level, CheckLevel::Warn);
        assert_eq!(runs.runs(), count, "not remembered");
    }
    let hangs = made("exec sleep 600");
    assert_eq!(hangs.ask(false).await.accelerator, Accelerator::KvmBroken);
    let left: Vec<_> = fs::read_dir(&hangs.config.home)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name != FILE)
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_device_that_is_missing_or_never_opens_leads_to_emulation() {
    let missing = made(BOOTS);
    fs::remove_file(&missing.config.kvm).unwrap();
    let verdict = missing.ask(true).await;
    assert_eq!(verdict.accelerator, Accelerator::Emulation, "{verdict:?}");
    assert_eq!(missing.runs(), 0);
    let (_keep, never) = std::sync::mpsc::channel::<()>();
    let open = move || never.recv().map_err(io::Error::other);
    let (config, program) = (&missing.config, &missing.program);
    fs::write(&config.kvm, "").unwrap();
    let verdict = verdict_within(config, program, Some(&missing.boot), open, SHORT).await;
    assert_eq!(verdict.accelerator, Accelerator::KvmBroken, "{verdict:?}");
    assert!(verdict.why.contains("did not open within"), "{verdict:?}");
    assert_eq!(missing.runs(), 0);
}

#[tokio::test]
async fn emulation_that_was_asked_for_tries_nothing() {
    let mut made = made(BOOTS);
    made.config.emulate = true;
    assert_eq!(made.ask(true).await.accelerator, Accelerator::Emulation);
    assert_eq!(made.runs(), 0);
}

#[test]
fn the_probe_s_qemu_has_nothing_but_kvm() {
    let made = made("");
    let command = command(&made.program);
    let text: Vec<_> = command
        .as_std()
        .get_args()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let text = text.join(" ");
    assert!(text.contains("-accel kvm -cpu host"), "{text}");
    assert!(
        text.contains("-nodefaults -no-user-config -display none"),
        "{text}"
    );
    assert!(!text.contains("tcg"), "no silent fallback: {text}");
}

#[test]
fn an_emulated_guest_trusts_the_counter_that_its_host_trusts() {
    assert_eq!(clock_args_on(Accel::Tcg, "tsc"), ["tsc=reliable"]);
    assert_eq!(clock_args_on(Accel::Tcg, "hpet"), [""; 0]);
    assert_eq!(clock_args_on(Accel::Tcg, ""), [""; 0]);
    assert_eq!(clock_args_on(Accel::Kvm { set: None }, "tsc"), [""; 0]);
}
