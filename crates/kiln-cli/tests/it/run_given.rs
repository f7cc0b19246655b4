//! `kiln run --root-disk` and `--kernel`: machines made of the caller's own files, and files of which no machine is made.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Kiln, kiln, path};

/// What the program of the root disk prints, and the code it ends with.
const WORDS: &str = "made of its own root disk\n";
const CODE: u8 = 7;

/// A static program for x86-64 that prints [`WORDS`] and ends with [`CODE`]: nothing of a distribution is needed to run it.
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: usize = 64 + 56;
    let len = u8::try_from(WORDS.len()).expect("short");
    #[rustfmt::skip]
    let code = [
        0xb8, 1, 0, 0, 0,                // mov eax, 1 (write)
        0xbf, 1, 0, 0, 0,                // mov edi, 1
        0x48, 0x8d, 0x35, 19, 0, 0, 0,   // lea rsi, [rip + 19]
        0xba, len, 0, 0, 0,              // mov edx, len
        0x0f, 0x05,                      // syscall
        0xb8, 60, 0, 0, 0,               // mov eax, 60 (exit)
        0xbf, CODE, 0, 0, 0,             // mov edi, CODE
        0x0f, 0x05,                      // syscall
    ];
    let size = (HEADERS + code.len() + WORDS.len()) as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend((BASE + HEADERS as u64).to_le_bytes());
    elf.extend(64_u64.to_le_bytes());
    elf.extend([0; 12]);
    elf.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for field in [0, BASE, BASE, size, size, 4096] {
        elf.extend(field.to_le_bytes());
    }
    assert_eq!(elf.len(), HEADERS);
    elf.extend(code);
    elf.extend(WORDS.as_bytes());
    elf
}

/// A root disk of that program and a file, in `dir`.
fn root_disk(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("bin")).expect("folder");
    fs::write(tree.join("bin/hello"), program()).expect("write");
    fs::write(tree.join("made-of"), "a tree\n").expect("write");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(tree.join("bin/hello"), mode).expect("mode");
    let disk = dir.join("disk.img");
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&tree, &disk])
        .arg("16M")
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .status()
        .expect("mke2fs starts");
    assert!(made.success());
    disk
}

/// Folder of the home's current machine image.
fn current_image(kiln: &Kiln) -> PathBuf {
    let images = kiln.home.join("images");
    let name = fs::read_to_string(images.join("current")).expect("a current image");
    images.join(name.trim())
}

/// Templates of the home, by name.
fn templates(kiln: &Kiln) -> Vec<std::ffi::OsString> {
    let entries = fs::read_dir(kiln.home.join("templates"))
        .into_iter()
        .flatten();
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    names
}

#[test]
fn a_command_runs_on_a_root_disk_and_leaves_it_as_it_was() {
    let Some(kiln) = kiln() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let disk = root_disk(dir.path());
    let before = kiln_core::Digest::of(&fs::read(&disk).expect("readable"));
    let had = templates(&kiln);
    let out = dir.path().join("out");
    let copy = format!("/made-of:{}", path(&out));
    let run = ["run", "--no-source", "--root-disk", path(&disk)];
    let said = kiln
        .run(&[&run[..], &["--copy-out", &copy, "--", "hello"]].concat())
        .exits(i32::from(CODE));
    assert_eq!(said.out, WORDS);
    assert_eq!(fs::read_to_string(&out).expect("copied"), "a tree\n");
    let after = kiln_core::Digest::of(&fs::read(&disk).expect("readable"));
    assert_eq!(before, after, "nothing writes to it");
    assert_eq!(templates(&kiln), had, "no template is made of it");
    // Nothing of kiln's own root is there.
    kiln.run(&[&run[..], &["--", "git", "--version"]].concat())
        .exits(127);
    // The record names the file by name and digest, and it is not run again without it.
    let list = kiln.run(&["job", "list", "--json"]).exits(0).out;
    let id = list
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find(|job| job["name"] == "git --version")
        .and_then(|job| job["id"].as_str().map(str::to_owned))
        .expect("the job");
    let shown = kiln.run(&["job", "show", &id, "--json"]).exits(0).out;
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["root_disk"]["name"], "disk.img");
    assert_eq!(shown["root_disk"]["digest"], before.to_string());
    assert!(!shown.to_string().contains(path(dir.path())), "path-free");
    kiln.run(&["job", "show", &id]).exits(0);
    kiln.run(&["job", "retry", &id])
        .exits(2)
        .says("--root-disk disk.img");
}

#[test]
fn a_kernel_is_booted_and_one_that_does_not_come_up_is_at_fault() {
    let Some(kiln) = kiln() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let kernel = dir.path().join("vmlinux-copy");
    let image = current_image(&kiln);
    fs::copy(image.join("kernel"), &kernel).expect("copied");
    let said = kiln
        .run(&["run", "--kernel", path(&kernel), "--", "uname", "-r"])
        .exits(0);
    let manifest = fs::read(image.join("manifest.json")).expect("readable");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("JSON");
    let release = manifest["kernel_release"].as_str().expect("a release");
    assert_eq!(said.out.trim(), release);
    // The beginning of its code is gone: what is there instead (ud2) resets it at once.
    let bytes = fs::read(&kernel).expect("readable");
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a number"));
    let first_segment = usize::try_from(long(32)).expect("small");
    let file = fs::File::options().write(true).open(&kernel).expect("open");
    let broken = [0x0f, 0x0b].repeat(32 << 10);
    file.write_all_at(&broken, long(first_segment + 8))
        .expect("write");
    let said = kiln.run(&["run", "--kernel", path(&kernel), "--", "true"]);
    assert_eq!(said.code, 2, "{said:?}");
    let at_fault = "no machine comes up on the kernel vmlinux-copy";
    assert!(said.err.contains(at_fault), "{said:?}");
}

#[test]
fn files_of_which_no_machine_is_made_are_refused_before_anything_starts() {
    let Some(kiln) = kiln() else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let disk = root_disk(dir.path());
    let whole = fs::read(&disk).expect("readable");
    let file = |name: &str, bytes: &[u8]| {
        let file = dir.path().join(name);
        fs::write(&file, bytes).expect("write");
        file
    };
    let changed = |name: &str, at: usize, bytes: &[u8]| {
        let mut disk = whole.clone();
        disk[at..at + bytes.len()].copy_from_slice(bytes);
        file(name, &disk)
    };
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).expect("a pipe");
    let cases: &[(&str, PathBuf, &str)] = &[
        ("--root-disk", dir.path().join("nothing"), "No such file"),
        ("--root-disk", dir.path().to_owned(), "not a regular file"),
        ("--root-disk", pipe, "not a regular file"),
        ("--root-disk", "/dev/null".into(), "not a regular file"),
        ("--root-disk", file("empty", b""), "not an ext4"),
        ("--root-disk", file("cow", b"QFI\xfb\0\0\0\x03"), "qcow2"),
        ("--root-disk", file("cut", &whole[..8 << 20]), "cut off"),
        (
            "--root-disk",
            file("odd", &whole[..(16 << 20) - 1]),
            "sectors",
        ),
        // The first byte of the incompatible features, and the state.
        (
            "--root-disk",
            changed("dirty", 1024 + 0x60, &[whole[1024 + 0x60] | 4]),
            "e2fsck",
        ),
        (
            "--root-disk",
            changed("state", 1024 + 0x3a, &[0]),
            "cleanly",
        ),
        ("--kernel", disk.clone(), "neither a bzImage nor an ELF"),
        ("--kernel", kiln.program.clone(), "does not boot by PVH"),
        ("--kernel", file("gz", b"\x1f\x8b\x08\0"), "gzip"),
    ];
    let queued = || {
        kiln.run(&["job", "list", "--json"])
            .exits(0)
            .out
            .lines()
            .count()
    };
    let before = queued();
    for (flag, file, why) in cases {
        let said = kiln.run(&["run", flag, path(file), "--", "true"]);
        assert_eq!(said.code, 2, "{file:?}\n{said:?}");
        assert!(said.err.contains(why), "{file:?} lacks {why:?}\n{said:?}");
        assert!(said.err.contains("hint:"), "{said:?}");
    }
    let run = ["run", "--root-disk", path(&disk)];
    kiln.run(&[&run[..], &["--image", "a", "--", "x"]].concat())
        .exits(2)
        .says("--image");
    let server = ["--server", "http://127.0.0.1:1", "--", "x"];
    kiln.run(&[&run[..], &server[..]].concat())
        .exits(2)
        .says("--root-disk does not work through a server");
    assert_eq!(queued(), before, "nothing of it was queued");
    let app = crate::support::app(&[(
        "kiln.yaml",
        "version: 1\nimage: shared/node:20-build@sha256:0000000000000000000000000000000000000000000000000000000000000000\n",
    )]);
    let mut command = kiln.command(&[&run[..], &["--", "x"]].concat());
    command.current_dir(app.path());
    crate::support::said(command)
        .exits(2)
        .says("--root-disk: kiln.yaml");
}
