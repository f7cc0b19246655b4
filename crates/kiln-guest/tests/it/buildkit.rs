//! BuildKit, its steps, and containers.

use std::time::Instant;

use kiln_proto::msg::{
    BuildkitConfig, ContainerSpec, ExecRequest, GuestEvent, Identity, Mount, Order, OrderReply,
    Place, Signal, TtySize, chunk,
};
use kiln_proto::session::Session;

use crate::host::{Ran, call, exec, exec_until, put_file, request, sh, try_call};
use crate::trees::mount;
use crate::vm::{Spec, Vm, long};

/// Puts a small root filesystem together from the machine's own programs.
const SMALL_ROOT: &str = r"
set -e; umask 022; for d in bin etc tmp lib64 dev proc sys; do mkdir -p $1/$d; done; cd $1
for tool in bash cat env ls head tail sleep mkdir id stat chmod od; do
  cp -L $(command -v $tool) bin/
  ldd bin/$tool | grep -o '/[^ ]*' | while read lib; do mkdir -p .$(dirname $lib); cp -nL $lib .$lib; done
done
ln -sf bash bin/sh
echo 'root:x:0:0::/root:/bin/sh
app:x:1001:1002::/home/app:/bin/sh' > etc/passwd
echo 'extra:x:77:app' > etc/group
";

async fn build(session: &Session, dockerfile: &str, output: &str) -> Ran {
    let script = format!(
        "mkdir -p /tmp/df && cat > /tmp/df/Dockerfile && buildctl build --progress=plain --frontend dockerfile.v0 \
         --local context=/tmp/ctx --local dockerfile=/tmp/df --output {output} 2>&1"
    );
    let trusted = ExecRequest {
        stdin: true,
        trusted: true,
        ..request(&["sh", "-c", &script])
    };
    exec(
        session,
        &trusted,
        &[
            (chunk::STDIN, dockerfile.as_bytes()),
            (chunk::STDIN_EOF, b""),
        ],
    )
    .await
}

/// Steps that take all memory, or start all processes. In the everyday suite `kiln build` meets both, through the whole of kiln.
async fn survives_its_steps(session: &Session, first: &str) {
    let hungry = "FROM scratch\nCOPY root/ /\nRUN head -c 2000000000 /dev/zero | tail -c 2000000000 > /dev/null && echo not reached\n";
    let begun = Instant::now();
    let ran = build(session, hungry, "type=oci,dest=/tmp/out.tar").await;
    println!("hungry {:?}: {}", begun.elapsed(), ran.out);
    assert_ne!(ran.exit.unwrap().code, Some(0));
    let bomb = "FROM scratch\nCOPY root/ /\nRUN sleep 0; bomb() { bomb | bomb & }; bomb; sleep 3; exit 3\n";
    let begun = Instant::now();
    let ran = build(session, bomb, "type=oci,dest=/tmp/out.tar").await;
    println!(
        "bomb {:?}: ...{:?} {}",
        begun.elapsed(),
        ran.exit,
        ran.out
            .chars()
            .rev()
            .take(600)
            .collect::<String>()
            .chars()
            .rev()
            .collect::<String>()
    );
    build(session, first, "type=oci,dest=/tmp/out.tar")
        .await
        .ok();
}

#[tokio::test]
async fn buildkit_builds_and_survives_its_steps() {
    let disks = vec![("kiln-state", 2 << 30), ("kiln-scratch", 1 << 30)];
    let Some(vm) = Vm::start(&Spec {
        root: true,
        disks,
        memory_mib: 1024,
    }) else {
        return;
    };
    let (session, _, mut incoming) = vm.session().await;
    tokio::spawn(async move {
        let mut events = incoming.next().await.unwrap().stream;
        while let Ok(event) =
            kiln_proto::codec::read_msg::<GuestEvent, _>(&mut events, 1 << 16).await
        {
            println!("{event:?}");
        }
    });
    mount(&session, "kiln-scratch").await;
    let refused = try_call(&session, &Order::StartBuildkit(BuildkitConfig::default())).await;
    println!("{}", refused.unwrap_err());
    mount(&session, "kiln-state").await;
    let begun = Instant::now();
    call(&session, &Order::StartBuildkit(BuildkitConfig::default())).await;
    println!("BuildKit ready in {:?}", begun.elapsed());
    sh(&session, &format!("set -- /tmp/ctx/root; {SMALL_ROOT}"))
        .await
        .ok();
    put_file(
        &session,
        Place::CaBundle,
        b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n",
    )
    .await
    .unwrap();
    let env = vec![("KILN_REGISTRY".to_owned(), "http://x.example".to_owned())];
    call(&session, &Order::SetStepEnv { env }).await;

    let begun = Instant::now();
    let first = "FROM scratch\nCOPY root/ /\nENV PIP_CERT=/mine\nRUN env && cat /proc/self/cgroup && head -c 30 /dev/kiln-ca.pem; ls -la / /dev /etc; cat /etc/resolv.conf /proc/self/oom_score_adj /proc/sys/kernel/random/boot_id; cat /sys/fs/cgroup/memory.oom.group; echo hi > /made\n";
    let ran = build(&session, first, "type=oci,dest=/tmp/out.tar").await;
    println!("first build {:?}\n{}", begun.elapsed(), ran.ok());
    for wanted in [
        "KILN_REGISTRY=http://x.example",
        "PIP_CERT=/mine",
        "SSL_CERT_FILE=/dev/kiln-ca.pem",
        "nameserver 198.18.0.1",
    ] {
        assert!(ran.out.contains(wanted), "{wanted}");
    }
    let layers = sh(&session, "mkdir -p /tmp/oci && cd /tmp/oci && tar xf /tmp/out.tar && for b in blobs/sha256/*; do tar tzf $b 2>/dev/null; done | sort -u").await;
    println!("in the layers:\n{}", layers.out);
    assert!(
        layers.out.contains("made") && !layers.out.contains("dev/k") && !layers.out.contains("run")
    );

    let begun = Instant::now();
    build(&session, first, "type=oci,dest=/tmp/out.tar")
        .await
        .ok();
    println!("same build again {:?}", begun.elapsed());

    if long() {
        survives_its_steps(&session, first).await;
    }
    println!("{:?}", call(&session, &Order::Stats).await);

    // A template is taken with BuildKit running, and its clones go on with it.
    let OrderReply::Quiesced(state) = call(&session, &Order::Quiesce).await else {
        panic!()
    };
    assert!(state.frozen && state.open_streams == 0, "{state:?}");
    let identity = Identity {
        seed: "00".repeat(32),
        wall_unix_ns: 2_000_000_000_000_000_000,
        boot_id: "01234567-89ab-cdef-0123-456789abcdef".to_owned(),
        machine_id: "0f".repeat(16),
        hostname: "clone".to_owned(),
    };
    let OrderReply::Reidentified(now) = call(&session, &Order::Reidentify(identity)).await else {
        panic!()
    };
    assert_eq!(now.workload_ran, 0);
    call(&session, &Order::Thaw).await;
    build(&session, first, "type=oci,dest=/tmp/out.tar")
        .await
        .ok();

    let begun = Instant::now();
    call(&session, &Order::StopBuildkit).await;
    call(
        &session,
        &Order::Unmount {
            serial: "kiln-state".to_owned(),
        },
    )
    .await;
    println!("stopped and unmounted in {:?}", begun.elapsed());
    mount(&session, "kiln-state").await;
    let begun = Instant::now();
    call(&session, &Order::StartBuildkit(BuildkitConfig::default())).await;
    println!("BuildKit again ready in {:?}", begun.elapsed());
    let ran = build(&session, first, "type=oci,dest=/tmp/out.tar").await;
    assert!(ran.ok().contains("CACHED"));
    println!("{}", vm.console());
    call(&session, &Order::Shutdown).await;
}

#[tokio::test]
async fn a_container_runs_as_its_image_says() {
    let Some(vm) = Vm::start(&Spec {
        root: true,
        disks: vec![("kiln-image", 512 << 20)],
        memory_mib: 512,
    }) else {
        return;
    };
    let (session, _, _incoming) = vm.session().await;
    mount(&session, "kiln-image").await;
    sh(&session, &format!("set -- /image/rootfs; {SMALL_ROOT}"))
        .await
        .ok();
    call(
        &session,
        &Order::Unmount {
            serial: "kiln-image".to_owned(),
        },
    )
    .await;
    let order = Mount {
        serial: "kiln-image".to_owned(),
        read_only: true,
        format_blank: false,
        memory_bytes: 0,
        timeout_ms: 1000,
    };
    call(&session, &Order::Mount(order)).await;
    let spec = |user: &str, script: &str| ContainerSpec {
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["A=b".to_owned()],
        cwd: "/new/dir".to_owned(),
        user: user.to_owned(),
        tty: false,
        hostname: "boxed".to_owned(),
        ..ContainerSpec::default()
    };
    let run_until = async |spec, request, wanted: &str, input: &[(u8, &[u8])]| {
        let OrderReply::Prepared { argv } =
            call(&session, &Order::PrepareContainer(Box::new(spec))).await
        else {
            panic!()
        };
        exec_until(&session, &ExecRequest { argv, ..request }, wanted, input).await
    };
    let run = async |spec, request| run_until(spec, request, "", &[]).await;
    let begun = Instant::now();
    let script = "id; pwd; env; cat /proc/self/cgroup /etc/resolv.conf /etc/hosts; cat /proc/sys/kernel/hostname; ls / /dev; echo x > /tmp/x; cat /proc/self/status | head -60; exit 5";
    let ran = run(spec("app", script), request(&[])).await;
    println!("{:?} {}{}", begun.elapsed(), ran.out, ran.err);
    assert_eq!(ran.exit.as_ref().unwrap().code, Some(5), "{ran:?}");
    for wanted in [
        "uid=1001",
        "gid=1002",
        "77",
        "/new/dir",
        "HOME=/home/app",
        "A=b",
        "boxed",
        "nameserver",
    ] {
        assert!(ran.out.contains(wanted), "{wanted}");
    }
    // The runtime is killed outright: what it started must not outlive it.
    let kill = serde_json::to_vec(&Signal { number: 9 }).unwrap();
    let input: &[(u8, &[u8])] = &[(chunk::SIGNAL, &kill)];
    let ran = run_until(spec("", "id; sleep 1000"), request(&[]), "uid=0", input).await;
    assert_eq!(ran.exit.as_ref().unwrap().signal, Some(9), "{ran:?}");
    let left = sh(
        &session,
        "cat /proc/[0-9]*/comm | grep -c sleep; ls /sys/fs/cgroup/workload | grep exec",
    )
    .await;
    println!("{left:?}");
    assert!(left.out.starts_with("0\n"), "{left:?}");
    let hungry = spec(
        "",
        "head -c 300000000 /dev/zero | tail -c 300000000 > /dev/null",
    );
    let bounded = ExecRequest {
        memory_max: 100 << 20,
        ..request(&[])
    };
    let ran = run(hungry, bounded).await;
    assert!(ran.exit.as_ref().unwrap().oom, "{ran:?}");
    let tty = ContainerSpec {
        tty: true,
        ..spec("app", "ls -la /dev/pts /proc/self/fd; read x; echo got $x")
    };
    let size = TtySize { rows: 20, cols: 70 };
    let terminal = ExecRequest {
        tty: Some(size),
        ..request(&[])
    };
    let input: &[(u8, &[u8])] = &[(chunk::STDIN, b"word\n")];
    let ran = run_until(tty, terminal, "", input).await;
    println!("{ran:?}");
    assert!(ran.out.contains("got word"), "{ran:?}");
    let trap = spec(
        "",
        "trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.1; done",
    );
    let term = serde_json::to_vec(&Signal { number: 15 }).unwrap();
    let input: &[(u8, &[u8])] = &[(chunk::SIGNAL, &term)];
    let ran = run_until(trap, request(&[]), "up", input).await;
    assert!(ran.out.contains("caught"), "{ran:?}");
    assert_eq!(ran.exit.unwrap().code, Some(9));
    let nobody = try_call(
        &session,
        &Order::PrepareContainer(Box::new(spec("nobody", "true"))),
    )
    .await;
    println!("{}", nobody.unwrap_err());
}
