//! Disks by role.

use std::fs;
use std::path::Path;

use kiln_core::machine::DiskAccess;
use kiln_core::{DiskRole, DiskSlot};
use kiln_proto::msg::Order;

use super::under_test::UnderTest;
use crate::host::{Host, request};

fn content(path: &Path) -> Vec<u8> {
    fs::read(path).expect("read")
}

async fn write(host: &Host, path: &str, text: &str) -> Option<i32> {
    let ran = host.exec_with(request(&["tee", path]), text.as_bytes());
    ran.await.expect("ran").exit.code
}

async fn read(host: &Host, path: &str) -> Option<String> {
    let ran = host.exec(&["cat", path]).await.expect("ran");
    (ran.exit.code == Some(0)).then(|| String::from_utf8_lossy(&ran.stdout).into_owned())
}

pub(crate) async fn root_is_read_only_and_shared(test: &UnderTest) {
    let before = fs::metadata(test.root()).expect("root");
    let first_bytes = content(test.root());
    let (first, a) = test.boot("a").await;
    let (second, b) = test.boot("b").await;
    // Whether the guest lays something writable over it is its own affair: it must not be seen elsewhere.
    let _ = write(&a, "/usr/kiln-was-here", "a").await;
    assert_eq!(read(&b, "/usr/kiln-was-here").await, None);
    test.destroy(&*first).await;
    test.destroy(&*second).await;
    let after = fs::metadata(test.root()).expect("root");
    assert_eq!(before.modified().ok(), after.modified().ok());
    assert!(first_bytes == content(test.root()), "the root disk changed");
}

pub(crate) async fn fork_persists_nothing_unless_taken(test: &UnderTest) {
    let slot = test.fork_of(DiskRole::State, "base.img");
    let base = slot.backing.clone().expect("a base");
    let blank = content(&base);
    let mut taken = None;
    for round in 0..2 {
        let mut spec = test.spec("fork");
        spec.disks.push(slot.clone());
        let (machine, host) = test.boot_spec(&spec).await;
        let path = host.mount("kiln-state", false).await.expect("mounted");
        let file = format!("{path}/mark");
        assert_eq!(read(&host, &file).await, None, "round {round}");
        assert_eq!(write(&host, &file, "x").await, Some(0));
        assert_eq!(read(&host, &file).await.as_deref(), Some("x"));
        assert!(
            machine.take_disk(DiskRole::State).is_err(),
            "not while it runs"
        );
        let serial = "kiln-state".to_owned();
        host.call(&Order::Unmount { serial })
            .await
            .expect("flushed");
        let _ = host.call(&Order::Shutdown).await;
        machine.stop(test.deadline).await;
        let own = machine.take_disk(DiskRole::State).expect("its writes");
        assert!(own.starts_with(test.machine_dir(machine.name())));
        if round == 1 {
            let kept = test.home.join("taken");
            fs::rename(&own, &kept).expect("moved away");
            taken = Some(kept);
        }
        test.destroy(&*machine).await;
    }
    assert!(blank == content(&base), "the base changed");
    assert!(fs::metadata(taken.expect("taken")).expect("kept").len() > 0);
}

pub(crate) async fn scratch_is_new_each_time(test: &UnderTest) {
    for _ in 0..2 {
        let mut spec = test.spec("scratch");
        spec.disks.push(UnderTest::new_disk(DiskRole::Scratch));
        let (machine, host) = test.boot_spec(&spec).await;
        let path = host.mount("kiln-scratch", false).await.expect("mounted");
        let file = format!("{path}/mark");
        assert_eq!(read(&host, &file).await, None);
        assert_eq!(write(&host, &file, "x").await, Some(0));
        let missing = host.mount("kiln-image", true);
        let refused = tokio::time::timeout(std::time::Duration::from_millis(500), missing).await;
        assert!(!matches!(refused, Ok(Ok(_))), "there is no such disk");
        test.destroy(&*machine).await;
    }
}

pub(crate) async fn hot_plug(test: &UnderTest) {
    let (machine, host) = test.boot("plug").await;
    let fork = test.fork_of(DiskRole::State, "plug.img");
    let plugged = machine.attach_disk(&fork).await;
    if !test.driver.capabilities().hotplug_disk {
        assert!(plugged.is_err(), "it said that it cannot");
        test.destroy(&*machine).await;
        return;
    }
    plugged.expect("plugged");
    assert!(machine.attach_disk(&fork).await.is_err(), "twice");
    let path = host.mount("kiln-state", false).await.expect("mounted");
    let file = format!("{path}/mark");
    assert_eq!(write(&host, &file, "x").await, Some(0));
    let serial = "kiln-state".to_owned();
    host.call(&Order::Unmount { serial })
        .await
        .expect("flushed");
    let _ = host.call(&Order::Shutdown).await;
    machine.stop(test.deadline).await;
    let own = machine.take_disk(DiskRole::State).expect("its writes");
    // What one machine wrote, the next reads, from a read-only disk.
    let kept = test.home.join("kept-disk");
    fs::rename(own, &kept).expect("moved away");
    test.destroy(&*machine).await;
    let (machine, host) = test.boot("plug").await;
    let format = match test.kind {
        "qemu" => kiln_core::machine::DiskFormat::Qcow2,
        _ => kiln_core::machine::DiskFormat::Raw,
    };
    let sealed = DiskSlot {
        role: DiskRole::Source,
        backing: Some(kept),
        format,
        access: DiskAccess::ReadOnly,
    };
    machine.attach_disk(&sealed).await.expect("plugged");
    let path = host.mount("kiln-source", true).await.expect("mounted");
    let file = format!("{path}/mark");
    assert_eq!(read(&host, &file).await.as_deref(), Some("x"));
    assert_ne!(write(&host, &file, "y").await, Some(0), "it is read-only");
    assert_eq!(read(&host, &file).await.as_deref(), Some("x"));
    test.destroy(&*machine).await;
}
