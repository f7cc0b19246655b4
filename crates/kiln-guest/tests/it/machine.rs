//! What a machine without disks and one with its root disk must do.

use kiln_proto::msg::{GuestErrorCode, Identity, Order, OrderReply, Signal, TtySize, chunk};

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
    assert!(begun.elapsed() < Duration::from_secs(5));
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
