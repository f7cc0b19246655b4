//! Trees, files and disks.

use kiln_proto::msg::{GuestErrorCode, Mount, Mounted, Order, OrderReply, Place, PutTree};
use kiln_proto::session::Session;

use crate::host::{call, get_tree, put_file, put_tree, sh, try_call};
use crate::vm::{Spec, Vm};

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_234_567_890);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

fn put(place: Place) -> PutTree {
    PutTree {
        place,
        bytes_max: 100 << 20,
        entries_max: 1000,
    }
}

pub(crate) async fn mount(session: &Session, serial: &str) -> Mounted {
    let order = Mount {
        serial: serial.to_owned(),
        read_only: false,
        format_blank: true,
        memory_bytes: 0,
        timeout_ms: 5000,
    };
    match call(session, &Order::Mount(order)).await {
        OrderReply::Mounted(mounted) => mounted,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn trees_and_disks() {
    let disks = vec![("kiln-scratch", 256 << 20), ("kiln-state", 256 << 20)];
    let Some(vm) = Vm::start(&Spec {
        root: true,
        disks,
        ..Spec::default()
    }) else {
        return;
    };
    let (session, _, _incoming) = vm.session().await;
    let context = || Place::Context {
        name: "app".to_owned(),
    };

    let small = tar(&[("a.txt", b"hello"), ("new\nline/b", b"x")]);
    let report = put_tree(&session, &put(context()), &small).await.unwrap();
    assert_eq!(
        (report.path.as_str(), report.entries, report.bytes),
        ("/run/kiln/ctx/app", 2, 6)
    );
    call(&session, &Order::RemoveTree { place: context() }).await;

    let begun = std::time::Instant::now();
    println!(
        "{:?} after {:?}",
        mount(&session, "kiln-scratch").await,
        begun.elapsed()
    );
    let begun = std::time::Instant::now();
    println!(
        "{:?} after {:?}",
        mount(&session, "kiln-state").await,
        begun.elapsed()
    );
    let big = vec![7_u8; 60 << 20];
    let big = tar(&[("big", &big)]);
    let begun = std::time::Instant::now();
    let report = put_tree(&session, &put(context()), &big).await.unwrap();
    println!("60 MiB in: {:?} {report:?}", begun.elapsed());
    assert_eq!(report.path, "/scratch/ctx/app");
    let begun = std::time::Instant::now();
    let back = get_tree(&session, "/scratch/ctx/app", 100 << 20)
        .await
        .unwrap();
    println!("60 MiB out: {:?}", begun.elapsed());
    assert_eq!(back.len(), big.len());
    let refused = get_tree(&session, "/scratch/ctx/app", 10)
        .await
        .unwrap_err();
    println!("{refused}: {:?}", refused.get_ref());

    let many: Vec<(String, &[u8])> = (0..5000)
        .map(|n| (format!("dir{}/file{n}", n / 100), &b"some text"[..]))
        .collect();
    let many: Vec<(&str, &[u8])> = many
        .iter()
        .map(|(name, data)| (name.as_str(), *data))
        .collect();
    let many = tar(&many);
    let order = PutTree {
        entries_max: 10_000,
        ..put(context())
    };
    let begun = std::time::Instant::now();
    put_tree(&session, &order, &many).await.unwrap();
    println!("5000 files in: {:?}", begun.elapsed());
    let begun = std::time::Instant::now();
    get_tree(&session, "/scratch/ctx/app", 100 << 20)
        .await
        .unwrap();
    println!("5000 files out: {:?}", begun.elapsed());
    println!(
        "{}",
        sh(&session, "grep -E 'VmRSS|RssAnon|Threads' /proc/1/status")
            .await
            .ok()
    );
    let full = vec![7_u8; 300 << 20];
    let full = tar(&[("full", &full)]);
    let order = PutTree {
        bytes_max: 1 << 30,
        ..put(Place::Work)
    };
    let refused = put_tree(&session, &order, &full).await.unwrap_err();
    assert_eq!(refused.code, GuestErrorCode::DiskFull, "{refused}");
    let order = PutTree {
        bytes_max: 1000,
        ..put(Place::Work)
    };
    let refused = put_tree(&session, &order, &full).await.unwrap_err();
    assert_eq!(refused.code, GuestErrorCode::LimitExceeded, "{refused}");
    call(&session, &Order::RemoveTree { place: Place::Work }).await;

    let report = put_file(
        &session,
        Place::Secret {
            id: "token".to_owned(),
        },
        b"s3cret",
    )
    .await
    .unwrap();
    assert_eq!(report.path, "/run/kiln/secrets/token");
    let seen = sh(
        &session,
        "stat -c '%a %U' /run/kiln/secrets/token; cat /run/kiln/secrets/token; grep vd /proc/mounts",
    )
    .await;
    assert!(seen.ok().starts_with("400 root\ns3cret"), "{seen:?}");
    println!("{}", seen.out);
    let evil = Place::Secret {
        id: "../x".to_owned(),
    };
    assert_eq!(
        put_file(&session, evil, b"").await.unwrap_err().code,
        GuestErrorCode::Invalid
    );
    let report = put_file(&session, Place::CaBundle, b"-----BEGIN CERTIFICATE-----\n")
        .await
        .unwrap();
    println!("{report:?}");
    let OrderReply::Quiesced(state) = call(&session, &Order::Quiesce).await else {
        panic!()
    };
    assert!(state.secret_issued && state.job_ran);
    call(&session, &Order::Thaw).await;

    sh(
        &session,
        "echo kept > /var/lib/buildkit/file; mkdir -p /var/lib/buildkit/.kiln/ctx/x",
    )
    .await
    .ok();
    let begun = std::time::Instant::now();
    call(
        &session,
        &Order::Unmount {
            serial: "kiln-state".to_owned(),
        },
    )
    .await;
    println!("unmounted in {:?}", begun.elapsed());
    let image = std::fs::read(vm.dir.path().join("kiln-state")).unwrap();
    // The superblock says: clean, and no journal to replay.
    assert_eq!(image[1024 + 58], 1, "not unmounted cleanly");
    assert_eq!(image[1024 + 0x60] & 4, 0, "the journal needs recovery");
    mount(&session, "kiln-state").await;
    let seen = sh(
        &session,
        "cat /var/lib/buildkit/file; ls -a /var/lib/buildkit",
    )
    .await;
    assert!(seen.ok().starts_with("kept\n") && !seen.out.contains(".kiln"));
    let again = Mount {
        serial: "kiln-scratch".to_owned(),
        read_only: false,
        format_blank: true,
        memory_bytes: 0,
        timeout_ms: 50,
    };
    assert_eq!(
        try_call(&session, &Order::Mount(again))
            .await
            .unwrap_err()
            .code,
        GuestErrorCode::Invalid
    );
    let none = Mount {
        serial: "kiln-image".to_owned(),
        read_only: true,
        format_blank: false,
        memory_bytes: 0,
        timeout_ms: 50,
    };
    assert_eq!(
        try_call(&session, &Order::Mount(none))
            .await
            .unwrap_err()
            .code,
        GuestErrorCode::Timeout
    );
    // A busy disk is not let go of half-way.
    call(
        &session,
        &Order::Unmount {
            serial: "kiln-scratch".to_owned(),
        },
    )
    .await;
    call(&session, &Order::Shutdown).await;
}
