//! What a machine without disks and one with its root disk must do.

use kiln_proto::msg::{
    GuestErrorCode, GuestEvent, Identity, Order, OrderReply, Signal, TtySize, chunk,
};

use crate::host::{call, exec, request, sh, shell};
use crate::vm::{Spec, Vm};
use std::time::{Duration, Instant};

#[tokio::test]
async fn a_machine_without_disks_says_hello() {
    let Some(vm) = Vm::start(&Spec::default()) else {
        return;
    };
    let (session, hello, _incoming) = vm.session().await;
    println!("hello after {:?}: {hello:?}\n{}", vm.age(), vm.console());
    assert!(hello.has("exec"));
    let ran = exec(&session, &request(&["/nonexistent"]), &[]).await;
    assert_eq!(ran.exit.unwrap_err().code, GuestErrorCode::NotFound);
}

#[tokio::test]
async fn commands_run_and_end() {
    let Some(mut vm) = Vm::start(&Spec {
        root: true,
        memory_mib: 512,
        ..Spec::default()
    }) else {
        return;
    };
    let (session, hello, _incoming) = vm.session().await;
    println!("hello after {:?}: {hello:?}\n{}", vm.age(), vm.console());
    for _ in 0..5 {
        let begun = Instant::now();
        sh(&session, "exit 0").await.ok();
        println!("exec took {:?}", begun.elapsed());
    }
    assert!(
        exec(&session, &request(&["uname", "-a"]), &[])
            .await
            .ok()
            .starts_with("Linux kiln")
    );
    println!(
        "{}",
        sh(
            &session,
            "cat /proc/mounts; nproc; cat /proc/self/cgroup; ls -la /"
        )
        .await
        .ok()
    );

    // A command inherits three descriptors (and `ls` opens one), no blocked and no ignored signal.
    let clean = sh(
        &session,
        "ls /proc/self/fd; grep -E 'SigBlk|SigIgn' /proc/self/status",
    )
    .await;
    let zero = "0000000000000000";
    assert_eq!(
        clean.ok(),
        format!("0\n1\n2\n3\nSigBlk:\t{zero}\nSigIgn:\t{zero}\n")
    );

    let ran = sh(&session, "echo out; echo err >&2; exit 7").await;
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("out\n", "err\n"));
    assert_eq!(ran.exit.unwrap().code, Some(7));

    let mut cat = request(&["cat"]);
    cat.stdin = true;
    let input: &[(u8, &[u8])] = &[
        (chunk::STDIN, b"hello "),
        (chunk::STDIN, b"there"),
        (chunk::STDIN_EOF, b""),
    ];
    assert_eq!(exec(&session, &cat, input).await.ok(), "hello there");

    // What a command leaves behind dies with it.
    let begun = Instant::now();
    sh(&session, "sleep 1000 & setsid sleep 1000 & exit 0")
        .await
        .ok();
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert_eq!(
        sh(&session, "cat /proc/[0-9]*/comm | grep -c sleep")
            .await
            .out
            .trim(),
        "0"
    );

    let mut late = shell("trap '' TERM; sleep 1000");
    late.timeout_ms = 300;
    let exit = exec(&session, &late, &[]).await.exit.unwrap();
    assert!(exit.timed_out);
    assert_eq!(exit.signal, Some(9));

    let signal = serde_json::to_vec(&Signal { number: 15 }).unwrap();
    let exit = exec(
        &session,
        &request(&["sleep", "1000"]),
        &[(chunk::SIGNAL, &signal)],
    )
    .await
    .exit
    .unwrap();
    assert_eq!(exit.signal, Some(15));

    let mut loud = shell("head -c 3000000 /dev/zero");
    loud.output_bytes_max = 1_000_000;
    let ran = exec(&session, &loud, &[]).await;
    assert_eq!(
        (ran.out.len(), ran.exit.unwrap().output_dropped),
        (1_000_000, 2_000_000)
    );

    let mut tty = shell("stty size; tty; read line; echo got $line");
    tty.tty = Some(TtySize { rows: 33, cols: 99 });
    let ran = exec(&session, &tty, &[(chunk::STDIN, b"word\n")]).await;
    assert!(ran.ok().contains("33 99"), "{ran:?}");
    assert!(
        ran.out.contains("/dev/pts/0") && ran.out.contains("got word"),
        "{ran:?}"
    );

    let mut hungry = shell("x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}");
    hungry.memory_max = 50 << 20;
    let exit = exec(&session, &hungry, &[]).await.exit.unwrap();
    assert!(exit.oom, "{exit:?}");
    let bomb = {
        let mut bomb = shell(":(){ :|:& };:; sleep 2");
        bomb.pids_max = 100;
        bomb.timeout_ms = 3000;
        bomb
    };
    println!("{:?}", exec(&session, &bomb, &[]).await.exit);
    let mut other = shell("id -u; id -g; pwd; touch /etc/x");
    other.user = Some(kiln_proto::msg::ExecUser {
        uid: 1234,
        gid: 4321,
    });
    other.cwd = "/tmp".to_owned();
    let ran = exec(&session, &other, &[]).await;
    assert_eq!(ran.out, "1234\n4321\n/tmp\n");
    assert!(ran.err.contains("Permission denied"));

    println!("{:?}", call(&session, &Order::Stats).await);
    assert_eq!(call(&session, &Order::Shutdown).await, OrderReply::Done);
    vm.ended(Duration::from_secs(20)).await;
}

#[tokio::test]
async fn a_frozen_machine_takes_a_new_identity() {
    let Some(vm) = Vm::start(&Spec {
        root: true,
        ..Spec::default()
    }) else {
        return;
    };
    let (session, _, _incoming) = vm.session().await;
    let OrderReply::Quiesced(state) = call(&session, &Order::Quiesce).await else {
        panic!()
    };
    assert!(
        state.frozen && !state.job_ran && !state.secret_issued && state.open_streams == 0,
        "{state:?}"
    );
    let refused = exec(&session, &shell("true"), &[]).await;
    assert_eq!(refused.exit.unwrap_err().code, GuestErrorCode::Invalid);
    let identity = Identity {
        seed: "5a".repeat(32),
        wall_unix_ns: 2_000_000_000_000_000_000,
        boot_id: "01234567-89ab-cdef-0123-456789abcdef".to_owned(),
        machine_id: "0f".repeat(16),
        hostname: "clone-7".to_owned(),
    };
    let begun = Instant::now();
    let OrderReply::Reidentified(now) = call(&session, &Order::Reidentify(identity.clone())).await
    else {
        panic!()
    };
    println!("reidentified in {:?}: {now:?}", begun.elapsed());
    assert!(now.entropy_added && now.reseeded && now.workload_ran == 0);
    assert_eq!(
        (&now.boot_id, &now.machine_id, &now.hostname),
        (&identity.boot_id, &identity.machine_id, &identity.hostname)
    );
    assert!(now.wall_unix_ns.abs_diff(identity.wall_unix_ns) < 5_000_000_000);
    call(&session, &Order::Thaw).await;
    let seen = sh(&session, "cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; date +%Y; getent hosts clone-7").await;
    println!("{seen:?}");
    assert!(
        seen.ok().contains("clone-7")
            && seen.out.contains(&identity.boot_id)
            && seen.out.contains("2033")
    );

    // A host that died is replaced.
    drop((session, _incoming));
    let (session, hello, _incoming) = vm.session().await;
    assert_eq!(hello.boot_id, identity.boot_id);
    sh(&session, "true").await.ok();
}

#[tokio::test]
async fn a_host_that_dies_takes_its_commands_with_it() {
    let Some(vm) = Vm::start(&Spec {
        root: true,
        ..Spec::default()
    }) else {
        return;
    };
    let (session, _, incoming) = vm.session().await;
    let events = tokio::spawn(oom_events(incoming));
    let mut hungry = shell("x=$(head -c 200000000 /dev/zero | tr '\\0' x)");
    hungry.memory_max = 30 << 20;
    assert!(exec(&session, &hungry, &[]).await.exit.unwrap().oom);
    let told = tokio::time::timeout(Duration::from_secs(60), events)
        .await
        .unwrap()
        .unwrap();
    assert!(told.starts_with("exec-1"), "{told}");

    let payload = serde_json::to_vec(&shell("echo up; sleep 1000")).unwrap();
    let mut stream = session
        .open(kiln_proto::msg::kind::EXEC, &payload)
        .await
        .unwrap();
    let first = kiln_proto::codec::read_chunk(&mut stream)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(first.tag, chunk::STDOUT);
    drop((session, stream));
    let (session, _, _incoming) = vm.session().await;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let left = sh(
            &session,
            "cat /proc/[0-9]*/comm | grep -c sleep; ls /sys/fs/cgroup/workload | grep -c exec",
        )
        .await;
        if left.out == "0\n1\n" {
            break;
        }
        assert!(Instant::now() < deadline, "{left:?}");
    }
    // A stream that is dropped ends its command, the session goes on.
    let mut stream = session
        .open(kiln_proto::msg::kind::EXEC, &payload)
        .await
        .unwrap();
    kiln_proto::codec::read_chunk(&mut stream)
        .await
        .unwrap()
        .unwrap();
    drop(stream);
    let deadline = Instant::now() + Duration::from_secs(60);
    while sh(&session, "cat /proc/[0-9]*/comm | grep -c sleep")
        .await
        .out
        != "0\n"
    {
        assert!(Instant::now() < deadline);
    }
}

async fn oom_events(mut incoming: kiln_proto::stream::Incoming) -> String {
    let mut events = incoming.next().await.unwrap().stream;
    loop {
        let event: GuestEvent = kiln_proto::codec::read_msg(&mut events, 65536)
            .await
            .unwrap();
        println!("{event:?}");
        if let GuestEvent::OomKill { cgroup, .. } = event {
            return cgroup;
        }
    }
}

#[tokio::test]
async fn copies_of_a_machine_answer_and_differ() {
    let spec = Spec {
        root: true,
        ..Spec::default()
    };
    let Some(vm) = Vm::start(&spec) else { return };
    let (session, _, incoming) = vm.session().await;
    call(&session, &Order::Quiesce).await;
    drop((session, incoming));
    let state = vm.dir.path().join("state");
    vm.save(&state);
    let mut samples = Vec::new();
    for index in 0..2 {
        let Some(copy) = Vm::restore(&spec, &state) else {
            return;
        };
        let begun = Instant::now();
        let (session, _, _incoming) = copy.session().await;
        println!("copy {index}: session after {:?}", begun.elapsed());
        let identity = Identity {
            seed: format!("{index:064x}"),
            wall_unix_ns: 2_000_000_000_000_000_000,
            boot_id: format!("01234567-89ab-cdef-0123-456789abcde{index}"),
            machine_id: format!("{index:032x}"),
            hostname: format!("clone-{index}"),
        };
        let OrderReply::Reidentified(now) = call(&session, &Order::Reidentify(identity)).await
        else {
            panic!()
        };
        assert!(now.reseeded && now.workload_ran == 0, "{now:?}");
        call(&session, &Order::Thaw).await;
        println!("copy {index}: ready after {:?}", begun.elapsed());
        // A proc of its own shows the kernel's boot id, not the file over it.
        let script = "mkdir /tmp/p && perl -e '$t = \"proc\"; $p = \"/tmp/p\"; syscall(165, $t, $p, $t, 0, 0) and die $!' \
             && cat /tmp/p/sys/kernel/random/boot_id";
        let kernel = sh(&session, script).await.ok().trim().to_owned();
        let exec = Instant::now();
        sh(&session, "true").await.ok();
        println!(
            "copy {index}: exec in {:?}; all after {:?}",
            exec.elapsed(),
            begun.elapsed()
        );
        samples.push((now.sample, kernel));
    }
    println!("{samples:?}");
    assert!(samples[0].0 != samples[1].0 && samples[0].1 != samples[1].1);
}
