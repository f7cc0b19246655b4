//! The command line, word for word, for both accelerators.

use super::*;

fn machine(wake: Wake) -> Machine {
    Machine {
        name: "kiln-x-token".into(),
        accel: Accel::Tcg,
        cpus: 2,
        memory: ByteSize::mib(512),
        ram: 10,
        ram_shared: true,
        control: 11,
        channel: 12,
        console: 13,
        kept: false,
        disks: vec![DiskNodes {
            role: DiskRole::State,
            files: vec![
                (DiskFormat::Qcow2, 1),
                (DiskFormat::Qcow2, 2),
                (DiskFormat::Raw, 3),
            ],
            writable: true,
            rated: false,
        }],
        disk_rate: None,
        sets: vec![(14, 1), (15, 2), (16, 3)],
        wake,
    }
}

fn text(machine: &Machine) -> String {
    let args = arguments(machine);
    args.iter()
        .map(|a| a.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn only_the_top_of_a_chain_is_writable_and_every_format_is_explicit() {
    let disk = &machine(Wake::Incoming).disks[0];
    let nodes = block_nodes(disk);
    assert_eq!(nodes.len(), 6);
    assert_eq!(nodes[1]["driver"], "raw");
    assert_eq!(nodes[3]["backing"], "state2");
    assert_eq!(nodes[5]["backing"], "state1");
    let writable: Vec<_> = nodes.iter().map(|n| n["read-only"] == false).collect();
    assert_eq!(writable, [false, false, false, false, true, true]);
    assert_eq!(block_device(disk)["serial"], "kiln-state");
}

#[test]
fn a_clone_has_the_devices_of_its_template_and_private_memory() {
    let cold = machine(Wake::Boot {
        kernel: 20,
        initrd: 21,
        args: vec!["maxcpus=1".into()],
    });
    let mut clone = machine(Wake::Incoming);
    clone.ram_shared = false;
    let (cold, clone) = (text(&cold), text(&clone));
    let devices = |text: &str| {
        text.split(" -")
            .filter(|part| part.starts_with("device "))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(devices(&cold), devices(&clone));
    assert!(cold.contains("maxcpus=1 console=ttyS0") && cold.contains("share=on"));
    assert!(clone.contains("share=off,readonly=on") && !clone.contains("-kernel"));
    for part in [
        "-nodefaults",
        "-no-user-config",
        "-sandbox on,",
        "dump-guest-core=off",
    ] {
        assert!(clone.contains(part), "{part}");
    }
}

/// Every argument of a machine without disks of its own, one line per flag.
fn lines(machine: &Machine) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for argument in arguments(machine) {
        let argument = argument.to_string_lossy().into_owned();
        match lines.last_mut() {
            Some(line) if !argument.starts_with('-') => {
                line.push(' ');
                line.push_str(&argument);
            }
            _ => lines.push(argument),
        }
    }
    lines
}

fn small(accel: Accel, wake: Wake) -> Machine {
    let ram_shared = wake != Wake::Incoming;
    Machine {
        accel,
        disks: Vec::new(),
        sets: vec![(14, 1)],
        ram_shared,
        ..machine(wake)
    }
}

/// What is the same for every machine; `accel`, `cpu` and `memory` are lines.
fn expected(accel: &str, cpu: &str, memory: &str) -> Vec<String> {
    let text = format!(
        "-name kiln-x-token
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-display none
-M pc,usb=off,smbus=off,vmport=off,hpet=off,dump-guest-core=off,memory-backend=ram
-add-fd fd=14,set=1
-accel {accel}
-cpu {cpu}
-smp 2
-m 512M
-object {memory}
-chardev socket,id=control,fd=11
-mon chardev=control,mode=control
-chardev socket,id=console,fd=13
-serial chardev:console
-chardev socket,id=channel,fd=12,server=on,wait=off
-device virtio-serial-pci,id=ports,addr=3,max_ports=2
-device virtserialport,bus=ports.0,chardev=channel,name=kiln.channel,nr=1"
    );
    text.lines().map(str::to_owned).collect()
}

const END: [&str; 4] = [
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-no-shutdown",
];
const PRIVATE: &str = "memory-backend-file,id=ram,size=536870912,mem-path=/proc/self/fd/10,share=off,readonly=on,rom=off";
const SHARED: &str = "memory-backend-file,id=ram,size=536870912,mem-path=/proc/self/fd/10,share=on";

/// The CPU of a guest whose code is translated.
const TRANSLATED: &str = "max,la57=off,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off";

#[test]
fn a_clone_word_for_word() {
    let tcg = lines(&small(Accel::Tcg, Wake::Incoming));
    let mut want = expected("tcg,thread=multi,tb-size=256", TRANSLATED, PRIVATE);
    want.push("-incoming defer".to_owned());
    want.extend(END.map(str::to_owned));
    assert_eq!(tcg, want);
    // With hardware: the host's CPU, the device by descriptor, and the kernel is told that it was cloned.
    let kvm = lines(&small(Accel::Kvm { set: Some(7) }, Wake::Incoming));
    let mut want = expected("kvm,device=/dev/fdset/7", "host", PRIVATE);
    want.push("-device vmgenid,guid=auto".to_owned());
    want.push("-incoming defer".to_owned());
    want.extend(END.map(str::to_owned));
    assert_eq!(kvm, want);
}

#[test]
fn a_cold_boot_word_for_word() {
    let boot = || Wake::Boot {
        kernel: 20,
        initrd: 21,
        args: vec!["quiet".into()],
    };
    let append = format!("-append quiet {KERNEL_ARGS}");
    assert!(
        append.contains("loglevel=1") && append.contains("panic=-1"),
        "{append}"
    );
    let boots = [
        "-kernel /proc/self/fd/20",
        "-initrd /proc/self/fd/21",
        &append,
    ];
    let mut want = expected("tcg,thread=multi,tb-size=256", TRANSLATED, SHARED);
    want.extend(boots.iter().chain(&END).map(|line| (*line).to_owned()));
    assert_eq!(lines(&small(Accel::Tcg, boot())), want);
    // An older QEMU opens the device itself.
    let mut want = expected("kvm", "host", SHARED);
    want.push("-device vmgenid,guid=auto".to_owned());
    want.extend(boots.iter().chain(&END).map(|line| (*line).to_owned()));
    assert_eq!(lines(&small(Accel::Kvm { set: None }, boot())), want);
}

#[test]
fn a_disk_is_at_the_same_address_cold_and_plugged_and_stops_on_errors() {
    let roles = [
        DiskRole::Root,
        DiskRole::State,
        DiskRole::Scratch,
        DiskRole::Source,
        DiskRole::Image,
        DiskRole::Service1,
        DiskRole::Service4,
    ];
    let mut addresses = std::collections::BTreeSet::new();
    for role in roles {
        let disk = DiskNodes {
            role,
            files: vec![(DiskFormat::Raw, 1)],
            writable: false,
            rated: false,
        };
        let device = block_device(&disk);
        assert_eq!(
            (&device["werror"], &device["rerror"]),
            (&json!("stop"), &json!("stop")),
            "an error of the host's disk never reaches the guest"
        );
        assert!(addresses.insert(device["addr"].to_string()), "{device}");
        let mut cold = small(Accel::Tcg, Wake::Incoming);
        cold.disks = vec![disk];
        assert!(lines(&cold).contains(&format!("-device {device}")));
    }
}

#[test]
fn what_is_written_to_has_one_rate_together() {
    let rate = NonZeroU64::new(50_000_000);
    let mut cold = small(Accel::Tcg, Wake::Incoming);
    cold.disk_rate = rate;
    cold.disks = machine(Wake::Incoming).disks;
    cold.disks[0].rated = true;
    let group = json!({
        "qom-type": "throttle-group",
        "id": "disks",
        "limits": { "bps-total": 50_000_000, "bps-total-max": 100_000_000, "bps-total-max-length": 1 },
    });
    let all = lines(&cold);
    let at = |line: &str| all.iter().position(|one| one == line).expect(line);
    let nodes = block_nodes(&cold.disks[0]);
    let top = nodes.last().expect("nodes");
    assert_eq!(
        (&top["driver"], &top["file"], &top["throttle-group"]),
        (&json!("throttle"), &json!("state0"), &json!("disks"))
    );
    // Each stands before what names it.
    let object = at(&format!("-object {group}"));
    let node = at(&format!("-blockdev {top}"));
    let device = block_device(&cold.disks[0]);
    assert!(object < node && node < at(&format!("-device {device}")));
    assert_eq!(device["drive"], "staterated");
    // More than QEMU counts is as much as it counts.
    let most = rate_group(NonZeroU64::MAX);
    assert_eq!(most["limits"]["bps-total-max"], RATE_MOST);
    // Without a rate there is neither.
    cold.disk_rate = None;
    cold.disks[0].rated = false;
    assert!(!lines(&cold).join(" ").contains("throttle"));
}
