//! A command that is root in its machine and means harm: the host sees an end, a fault or silence, in bounded time, and what can
//! go on goes on.

use std::time::{Duration, Instant};

use kiln_proto::msg::{Order, OrderReply, chunk, kind};
use kiln_proto::session::Session;

use crate::host::{call, exec, sh, shell};
use crate::vm::{Spec, Vm};

/// For each attack, without hardware to run it on.
const ATTACK_MAX: Duration = Duration::from_secs(60);

fn start() -> Option<Vm> {
    Vm::start(&Spec {
        root: true,
        memory_mib: 512,
        ..Spec::default()
    })
}

async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let done = tokio::time::timeout(ATTACK_MAX, work).await;
    println!("{what}: {:?}", begun.elapsed());
    done.unwrap_or_else(|_| panic!("{what}: no end"))
}

async fn still_works(session: &Session) {
    let ran = in_time("still works", sh(session, "echo $((6 * 7))")).await;
    assert_eq!(ran.ok(), "42\n");
}

#[tokio::test]
async fn attacks_on_the_guest_end_with_their_command() {
    let Some(vm) = start() else { return };
    let (session, _, _incoming) = vm.session().await;
    // Everything but the guest itself is killed; the shell as well.
    let ran = in_time("kill -9 -1", sh(&session, "kill -9 -1; exit 0")).await;
    assert!(ran.exit.is_ok(), "{ran:?}");
    still_works(&session).await;
    // PID 1 takes no signal that it did not ask for.
    let killer = "for s in 1 2 3 6 9 11 15 19; do kill -$s 1; done; echo alive";
    let ran = in_time("signals to PID 1", sh(&session, killer)).await;
    assert_eq!(ran.ok(), "alive\n");
    still_works(&session).await;
    let mut bomb = shell("i=0; while [ $i -lt 10000 ]; do sleep 1000 & i=$((i+1)); done; echo $i");
    bomb.timeout_ms = 3_000;
    let ran = in_time("10,000 processes", exec(&session, &bomb, &[])).await;
    println!("{:?}", ran.exit);
    assert!(ran.exit.is_ok());
    still_works(&session).await;
    let files = "perl -e 'for (1..100000) { open($f{$_}, q(<), q(/dev/null)) or do { delete $f{$_}; last } } print scalar(keys %f), qq(\\n)'";
    let mut all = shell(files);
    all.timeout_ms = 3_000;
    let ran = in_time("100,000 files", exec(&session, &all, &[])).await;
    let ended = ran.exit.as_ref().expect("its end");
    // On a slow host its time is up before it has them all; nothing else ends it.
    assert!(ended.timed_out || ran.out == "100000\n", "{ran:?}");
    still_works(&session).await;
    let bound = Order::SetLimits {
        memory_max: 0,
        pids_max: 0,
        disk_bytes_max: 0,
        open_files_max: 1_000,
    };
    assert_eq!(call(&session, &bound).await, OrderReply::Done);
    let ran = in_time("1,000 files", sh(&session, files)).await;
    // Three of them are its streams.
    assert!(
        ran.ok()
            .trim()
            .parse::<u32>()
            .is_ok_and(|count| (990..1_000).contains(&count)),
        "{ran:?}"
    );
    still_works(&session).await;
    let fill = "for d in /tmp /run /dev/shm; do head -c 400000000 /dev/zero > $d/full; done; rm -f /tmp/full /run/full /dev/shm/full; echo done";
    let mut fill = shell(fill);
    fill.timeout_ms = 3_000;
    let ran = in_time("full tmpfs", exec(&session, &fill, &[])).await;
    println!("{:?} {} {}", ran.exit, ran.out, ran.err);
    assert!(ran.exit.is_ok());
    in_time(
        "tidy",
        sh(&session, "rm -f /tmp/full /run/full /dev/shm/full"),
    )
    .await
    .ok();
    still_works(&session).await;
    // What stays behind neither keeps the command alive nor holds its output.
    let daemon = "setsid sh -c 'trap \"\" TERM HUP INT; while :; do echo still here; sleep 0.1; done' & echo $!";
    let begun = Instant::now();
    let ran = in_time("daemon left behind", sh(&session, daemon)).await;
    assert_eq!(ran.exit.as_ref().unwrap().code, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(60), "{ran:?}");
    let quiet = "exec > /dev/null 2>&1; exec 1>&- 2>&-; sleep 1; exit 3";
    let ran = in_time("closed output", sh(&session, quiet)).await;
    assert_eq!(ran.exit.unwrap().code, Some(3));
    // Out of its cgroup, and all cgroups it can reach frozen or bounded to nothing.
    let escape = "echo $$ > /sys/fs/cgroup/cgroup.procs; echo $$ > /sys/fs/cgroup/workload/cgroup.procs; sleep 1000 & \
        echo 1 > /sys/fs/cgroup/workload/memory.high; exit 0";
    let ran = in_time("escape of a cgroup", sh(&session, escape)).await;
    println!("{ran:?}");
    assert!(ran.exit.is_ok());
}

#[tokio::test]
async fn a_guest_whose_channel_is_written_to_breaks_the_protocol() {
    let Some(vm) = start() else { return };
    let (session, _, _incoming) = vm.session().await;
    // The port opens once: it has to be taken from PID 1 by way of its descriptors.
    let direct = sh(&session, "echo garbage > /dev/vport0p1; ls -l /dev/vport*").await;
    println!("{direct:?}");
    let thief =
        "for f in /proc/1/fd/*; do case $(readlink $f) in /dev/vport*) echo $f;; esac; done";
    println!("{:?}", sh(&session, thief).await);
    let steal = "perl -e 'my $fd = syscall(434, 1, 0); for my $n (0..64) { my $own = syscall(438, $fd, $n, 0); next if $own < 0; \
        next unless readlink(qq(/proc/self/fd/$own)) =~ /vport/; my $junk = qq(\\xff) x 4096; syscall(1, $own, $junk, 4096) for 1..64 }; sleep 1000'";
    let ended = in_time("stolen channel", async {
        let ran = exec_or_end(&session, steal).await;
        (ran, session.closed().await)
    })
    .await;
    println!("{ended:?}");
    assert!(ended.1.is_peer_fault(), "{ended:?}");
}

#[tokio::test]
async fn a_machine_that_is_broken_from_inside_ends() {
    let Some(mut vm) = start() else { return };
    let (session, _, _incoming) = vm.session().await;
    let unmount = "umount -a; umount -l /dev /proc /sys /run /tmp; echo gone";
    let ran = in_time("unmount", exec_or_end(&session, unmount)).await;
    println!("{ran}");
    // Nothing can be started any more, and the answer says so or the session goes on.
    let after = in_time("after unmount", exec_or_end(&session, "true")).await;
    println!("{after}");
    drop(session);
    let Some(mut other) = start() else { return };
    let (session, _, _incoming2) = other.session().await;
    let crash = in_time(
        "panic",
        exec_or_end(&session, "echo c > /proc/sysrq-trigger"),
    )
    .await;
    println!("{crash}");
    other.ended(ATTACK_MAX).await;
    let _silent_or_gone = vm.try_ended();
}

/// Runs a script; gives what was seen of it, be it the session's end.
async fn exec_or_end(session: &Session, script: &str) -> String {
    let payload = serde_json::to_vec(&shell(script)).unwrap();
    let Ok(mut stream) = session.open(kind::EXEC, &payload).await else {
        return "no stream".to_owned();
    };
    loop {
        match kiln_proto::codec::read_chunk(&mut stream).await {
            Ok(Some(part)) if part.tag == chunk::EXIT || part.tag == chunk::FAILED => {
                return String::from_utf8_lossy(&part.body).into_owned();
            }
            Ok(Some(_)) => {}
            Ok(None) => return "no exit".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}
