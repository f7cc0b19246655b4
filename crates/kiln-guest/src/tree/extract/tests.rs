use super::*;
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use tar::{Builder, Header};
use tempfile::TempDir;

const PLAIN: Rules = Rules {
    content: Content::Plain,
    bytes_max: 1 << 20,
    entries_max: 1000,
};
const LAYER: Rules = Rules {
    content: Content::Layer,
    ..PLAIN
};

fn header(kind: EntryType, size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_mtime(1_000_000_000);
    // Whoever runs the tests may own files only as themselves.
    header.set_uid(u64::from(rustix::process::getuid().as_raw()));
    header.set_gid(u64::from(rustix::process::getgid().as_raw()));
    header
}

/// A tar whose names are written as they are, however bad.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn raw(mut self, mut header: Header, name: &[u8], link: &[u8], data: &[u8]) -> Self {
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.raw(
            header(EntryType::Regular, data.len(), 0o644),
            name.as_bytes(),
            b"",
            data.as_bytes(),
        )
    }

    fn dir(self, name: &str) -> Self {
        self.raw(
            header(EntryType::Directory, 0, 0o755),
            name.as_bytes(),
            b"",
            b"",
        )
    }

    fn link(self, kind: EntryType, name: &str, target: &str) -> Self {
        self.raw(
            header(kind, 0, 0o777),
            name.as_bytes(),
            target.as_bytes(),
            b"",
        )
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn unpack(dir: &TempDir, tar: &[u8], rules: Rules) -> Result<Counts, GuestError> {
    let root = openat(
        rustix::fs::CWD,
        dir.path(),
        OFlags::PATH | OFlags::DIRECTORY,
        Mode::empty(),
    );
    extract(tar, root.unwrap(), rules)
}

fn code(result: Result<Counts, GuestError>) -> GuestErrorCode {
    result.expect_err("refused").code
}

#[test]
fn a_plain_tree_arrives_whole() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default()
        .dir("./")
        .dir("src")
        .raw(
            header(EntryType::Regular, 2, 0o755),
            b"src/run.sh",
            b"",
            b"hi",
        )
        .file("deep/er/new\nline", "x")
        .link(EntryType::Symlink, "link", "/etc/passwd")
        .link(EntryType::Link, "hard", "src/run.sh")
        .end();
    let counts = unpack(&dir, &tar, PLAIN).unwrap();
    assert_eq!(
        counts,
        Counts {
            entries: 6,
            bytes: 3
        }
    );
    let run = fs::metadata(dir.path().join("src/run.sh")).unwrap();
    assert_eq!(
        (run.permissions().mode() & 0o7777, run.mtime(), run.nlink()),
        (0o755, 1_000_000_000, 2)
    );
    assert_eq!(
        fs::metadata(dir.path().join("src")).unwrap().mtime(),
        1_000_000_000
    );
    assert_eq!(
        fs::read_link(dir.path().join("link")).unwrap().to_str(),
        Some("/etc/passwd")
    );
    assert!(dir.path().join("deep/er/new\nline").is_file());
}

#[test]
fn paths_of_four_kilobytes_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let part = "d".repeat(200);
    let path = format!("{}/leaf", vec![part; 20].join("/"));
    let mut builder = Builder::new(Vec::new());
    builder
        .append_data(&mut header(EntryType::Regular, 1, 0o644), &path, &b"x"[..])
        .unwrap();
    let counts = unpack(&dir, &builder.into_inner().unwrap(), PLAIN).unwrap();
    assert_eq!(counts.entries, 1);
    assert!(path.len() > 4000 && fs::metadata(dir.path().join(&path)).is_ok());
}

#[test]
fn nothing_leaves_the_tree() {
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    for tar in [
        Tar::default().file("../x", "bad"),
        Tar::default().file("a/../../x", "bad"),
        Tar::default().file("/x", "bad"),
        Tar::default()
            .link(EntryType::Symlink, "a", out)
            .file("a/x", "bad"),
        Tar::default()
            .link(EntryType::Symlink, "a", ".")
            .file("a/x", "bad"),
        Tar::default().link(EntryType::Symlink, "a", out).dir("a"),
        Tar::default().file("a", "").file("a/x", "bad"),
        Tar::default().link(EntryType::Link, "h", "../x"),
        Tar::default().link(EntryType::Link, "h", "/etc/passwd"),
        Tar::default()
            .link(EntryType::Symlink, "a", out)
            .link(EntryType::Link, "h", "a"),
        Tar::default()
            .link(EntryType::Symlink, "a", out)
            .link(EntryType::Link, "h", "a/x"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            code(unpack(&dir, &tar.end(), PLAIN)),
            GuestErrorCode::UnsafePath
        );
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo] {
        let dir = tempfile::tempdir().unwrap();
        let tar = Tar::default().link(kind, "node", "").end();
        assert_eq!(code(unpack(&dir, &tar, PLAIN)), GuestErrorCode::Invalid);
    }
}

#[test]
fn a_symlink_is_replaced_and_never_written_through() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let tar = Tar::default()
        .link(EntryType::Symlink, "a", victim.to_str().unwrap())
        .file("a", "new")
        .end();
    unpack(&dir, &tar, PLAIN).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "new");
}

#[test]
fn caps_hold() {
    let dir = tempfile::tempdir().unwrap();
    let two = Tar::default().file("a", "12345").file("b", "12345").end();
    let bytes = Rules {
        bytes_max: 9,
        ..PLAIN
    };
    assert_eq!(
        code(unpack(&dir, &two, bytes)),
        GuestErrorCode::LimitExceeded
    );
    let entries = Rules {
        entries_max: 1,
        ..PLAIN
    };
    assert_eq!(
        code(unpack(&dir, &two, entries)),
        GuestErrorCode::LimitExceeded
    );
    assert!(
        unpack(
            &dir,
            &two,
            Rules {
                bytes_max: 10,
                entries_max: 2,
                ..PLAIN
            }
        )
        .is_ok()
    );
    assert!(unpack(&dir, &two[..700], PLAIN).is_err(), "a cut archive");
}

#[test]
fn layers_follow_links_inside_their_root_only() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
    symlink("usr/bin", dir.path().join("bin")).unwrap();
    symlink("/usr", dir.path().join("absolute")).unwrap();
    symlink("../../../../usr", dir.path().join("up")).unwrap();
    let tar = Tar::default()
        .file("bin/tool", "1")
        .file("/absolute/two", "2")
        .file("up/three", "3")
        .end();
    unpack(&dir, &tar, LAYER).unwrap();
    for (file, text) in [("usr/bin/tool", "1"), ("usr/two", "2"), ("usr/three", "3")] {
        assert_eq!(fs::read_to_string(dir.path().join(file)).unwrap(), text);
    }
    assert!(dir.path().join("bin").is_symlink());
}

#[test]
fn whiteouts_remove_what_lower_layers_had() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["a/one", "a/two", "b/old", "b/deep/old", "c"] {
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let tar = Tar::default()
        .file("a/.wh.one", "")
        .file("b/new", "")
        .file("b/.wh..wh..opq", "")
        .file(".wh.c", "")
        .file(".wh...", "")
        .file("a/.wh.", "")
        .end();
    unpack(&dir, &tar, LAYER).unwrap();
    let there = |path: &str| dir.path().join(path).exists();
    assert!(
        !there("a/one")
            && there("a/two")
            && !there("b/old")
            && !there("b/deep")
            && there("b/new")
            && !there("c")
    );
    assert!(!there("a/.wh.one"));
}

#[test]
fn layers_keep_modes_and_replace_kinds() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("was-dir/x")).unwrap();
    fs::write(dir.path().join("was-file"), "").unwrap();
    let tar = Tar::default()
        .raw(header(EntryType::Regular, 0, 0o4755), b"su", b"", b"")
        .raw(header(EntryType::Fifo, 0, 0o600), b"pipe", b"", b"")
        .file("was-dir", "now a file")
        .dir("was-file")
        .end();
    unpack(&dir, &tar, LAYER).unwrap();
    let mode = |path: &str| fs::symlink_metadata(dir.path().join(path)).unwrap().mode();
    assert_eq!(mode("su") & 0o7777, 0o4755);
    assert_eq!(mode("pipe") & 0o170_000, 0o010_000);
    assert!(dir.path().join("was-dir").is_file() && dir.path().join("was-file").is_dir());
}

#[test]
fn links_to_what_is_not_there_yet_are_followed_inside_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    fs::create_dir(dir.path().join("var")).unwrap();
    symlink("/run", dir.path().join("var/run")).unwrap();
    symlink("../../var/./run/lock", dir.path().join("var/lock")).unwrap();
    symlink(out, dir.path().join("outside")).unwrap();
    let tar = Tar::default()
        .file("var/run/pid", "1")
        .file("var/lock/deep/x", "2")
        .link(EntryType::Symlink, "bin", "usr/bin")
        .file("bin/sh", "3")
        .file("outside/y", "4")
        .file("run/late", "5")
        .end();
    unpack(&dir, &tar, LAYER).unwrap();
    let inside = format!("{}/y", out.trim_start_matches('/'));
    for (file, text) in [
        ("run/pid", "1"),
        ("run/lock/deep/x", "2"),
        ("usr/bin/sh", "3"),
        (inside.as_str(), "4"),
        ("run/late", "5"),
    ] {
        let read = fs::read_to_string(dir.path().join(file));
        assert_eq!(read.ok().as_deref(), Some(text), "{file}");
    }
    for link in ["var/run", "var/lock", "bin", "outside"] {
        assert!(dir.path().join(link).is_symlink(), "{link}");
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn links_that_lead_nowhere_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    symlink("two", dir.path().join("one")).unwrap();
    symlink("one", dir.path().join("two")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    symlink("file", dir.path().join("to-file")).unwrap();
    for name in ["one/x", "to-file/x", "file/x"] {
        let tar = Tar::default().file(name, "").end();
        assert_eq!(
            code(unpack(&dir, &tar, LAYER)),
            GuestErrorCode::UnsafePath,
            "{name}"
        );
    }
    // A hard link's target is looked for and never made.
    symlink("missing", dir.path().join("dangling")).unwrap();
    let tar = Tar::default()
        .link(EntryType::Link, "hard", "dangling/x")
        .end();
    assert_eq!(code(unpack(&dir, &tar, LAYER)), GuestErrorCode::NotFound);
    assert!(!dir.path().join("missing").exists());
}

#[test]
fn hard_links_of_a_merged_directory_keep_their_file() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default()
        .link(EntryType::Symlink, "bin", "usr/bin")
        .file("usr/bin/perl", "x")
        .link(EntryType::Link, "bin/perl5", "usr/bin/perl")
        .link(EntryType::Link, "bin/perl", "usr/bin/perl")
        .link(EntryType::Link, "usr/bin/perl", "bin/perl5")
        .end();
    unpack(&dir, &tar, LAYER).unwrap();
    let perl = fs::metadata(dir.path().join("usr/bin/perl")).unwrap();
    assert_eq!((perl.nlink(), perl.len()), (2, 1));
    // A later layer replaces one name of it, and the other keeps the old content.
    let tar = Tar::default().file("bin/perl", "new").end();
    unpack(&dir, &tar, LAYER).unwrap();
    let read = |name: &str| fs::read_to_string(dir.path().join("usr/bin").join(name)).unwrap();
    assert_eq!(
        (read("perl").as_str(), read("perl5").as_str()),
        ("new", "x")
    );
}

#[test]
fn pax_headers_carry_long_names_times_and_attributes() {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("{}/{}", "n".repeat(150), "m".repeat(200));
    let target = "t".repeat(300);
    let mut builder = Builder::new(Vec::new());
    let mut add = |pax: &[(&str, &[u8])], kind: EntryType| {
        builder.append_pax_extensions(pax.iter().copied()).unwrap();
        let mut plain = header(kind, 0, 0o755);
        plain.set_path("short").unwrap();
        plain.set_cksum();
        builder.append(&plain, &b""[..]).unwrap();
    };
    let xattr = format!("{XATTR}user.kiln");
    let mut pax: Vec<(&str, &[u8])> = vec![
        ("path", name.as_bytes()),
        ("mtime", b"1700000000.25"),
        (&xattr, b"a=\n\0b"),
    ];
    let capability = format!("{XATTR}security.capability");
    // cap_net_bind_service=ep, as setcap(8) writes it.
    let value = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let is_root = rustix::process::getuid().is_root();
    if is_root {
        pax.push((&capability, &value));
    }
    add(&pax, EntryType::Regular);
    add(
        &[("path", b"link"), ("linkpath", target.as_bytes())],
        EntryType::Symlink,
    );
    unpack(&dir, &builder.into_inner().unwrap(), LAYER).unwrap();
    let path = dir.path().join(&name);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(
        (meta.mtime(), meta.mtime_nsec()),
        (1_700_000_000, 250_000_000)
    );
    let link = dir.path().join("link");
    assert_eq!(
        fs::read_link(&link).unwrap().to_str(),
        Some(target.as_str())
    );
    assert_eq!(fs::symlink_metadata(&link).unwrap().mtime(), 1_000_000_000);
    let mut room = [0; 64];
    match rustix::fs::getxattr(&path, "user.kiln", &mut room) {
        Ok(len) => assert_eq!(&room[..len], b"a=\n\0b"),
        Err(error) => assert_eq!(error, Errno::OPNOTSUPP),
    }
    if is_root {
        let len = rustix::fs::getxattr(&path, "security.capability", &mut room).unwrap();
        assert_eq!(room[..len], value);
    }
}

#[test]
fn times_of_pax_are_read_or_left_out() {
    let time = |text: &str| pax_time(text.as_bytes()).map(|t| (t.tv_sec, t.tv_nsec));
    assert_eq!(time("12"), Some((12, 0)));
    assert_eq!(time("12.5"), Some((12, 500_000_000)));
    assert_eq!(time("12.1234567899"), Some((12, 123_456_789)));
    assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
    for bad in ["", ".", "x", "1.x", "1.-5", "1e3", "99999999999999999999"] {
        assert_eq!(time(bad), None, "{bad}");
    }
}

#[test]
fn sparse_files_have_their_holes() {
    let dir = tempfile::tempdir().unwrap();
    let mut sparse = header(EntryType::GNUSparse, 3, 0o644);
    let gnu = sparse.as_gnu_mut().unwrap();
    let octal = |field: &mut [u8; 12], value: u64| {
        field.copy_from_slice(format!("{value:011o}\0").as_bytes());
    };
    octal(&mut gnu.realsize, 1024 + 3);
    octal(&mut gnu.sparse[0].offset, 1024);
    octal(&mut gnu.sparse[0].numbytes, 3);
    let tar = Tar::default().raw(sparse, b"holes", b"", b"end").end();
    unpack(&dir, &tar, LAYER).unwrap();
    let bytes = fs::read(dir.path().join("holes")).unwrap();
    assert_eq!(bytes.len(), 1027);
    assert!(bytes[..1024].iter().all(|byte| *byte == 0) && bytes.ends_with(b"end"));

    let mut builder = Builder::new(Vec::new());
    let pax: [(&str, &[u8]); 1] = [("GNU.sparse.major", b"1")];
    builder.append_pax_extensions(pax).unwrap();
    let mut plain = header(EntryType::Regular, 0, 0o644);
    plain.set_path("x").unwrap();
    plain.set_cksum();
    builder.append(&plain, &b""[..]).unwrap();
    let refused = unpack(&dir, &builder.into_inner().unwrap(), LAYER).unwrap_err();
    assert!(refused.message.contains("sparse"), "{refused:?}");
}

#[test]
fn devices_and_owners_are_for_root_and_arrive() {
    if !rustix::process::getuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut null = header(EntryType::Char, 0, 0o666);
    null.set_device_major(1).unwrap();
    null.set_device_minor(3).unwrap();
    let mut su = header(EntryType::Regular, 0, 0o6755);
    su.set_uid(1234);
    su.set_gid(4321);
    let mut sticky = header(EntryType::Directory, 0, 0o1777);
    sticky.set_uid(7);
    let tar = Tar::default()
        .raw(null, b"dev/null", b"", b"")
        .raw(su, b"su", b"", b"")
        .raw(sticky, b"tmp", b"", b"")
        .file("tmp/in", "")
        .end();
    unpack(&dir, &tar, LAYER).unwrap();
    let meta = |path: &str| fs::symlink_metadata(dir.path().join(path)).unwrap();
    assert_eq!(meta("dev/null").rdev(), makedev(1, 3));
    assert_eq!(meta("dev/null").mode() & 0o170_777, 0o020_666);
    let su = meta("su");
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid()),
        (0o6755, 1234, 4321)
    );
    let tmp = meta("tmp");
    assert_eq!((tmp.mode() & 0o7777, tmp.uid()), (0o1777, 7));
    assert_eq!(
        tmp.mtime(),
        1_000_000_000,
        "what was put into it does not change its time"
    );
}

/// What lies beside the root of a tree: nothing of it may change.
fn beside(dir: &TempDir) -> Vec<(String, u64, u32, String)> {
    let mut found = Vec::new();
    for name in ["", "outside", "outside/victim"] {
        let path = dir.path().join(name);
        let meta = fs::symlink_metadata(&path).unwrap();
        let inside = match meta.is_dir() {
            true => {
                let mut names: Vec<_> = fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name())
                    .collect();
                names.sort();
                format!("{names:?}")
            }
            false => fs::read_to_string(&path).unwrap(),
        };
        found.push((name.to_owned(), meta.nlink(), meta.mode(), inside));
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_archive_leads_out_of_its_root(
        steps in prop::collection::vec((0..7_u8, 0..9_usize, 0..9_usize, any::<bool>()), 1..12),
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("outside")).unwrap();
        fs::create_dir_all(dir.path().join("root")).unwrap();
        fs::write(dir.path().join("outside/victim"), "safe").unwrap();
        let before = beside(&dir);
        let absolute = dir.path().join("outside").to_str().unwrap().to_owned();
        let names = ["a", "b", "c", "a/b", "a/b/c", "b/victim", "b/../../outside/x", "/a/victim", "c/b"];
        let targets = ["..", "../..", "/", "a", "b", "../outside", "/../outside", &absolute, "b/../../outside/victim"];
        for content in [Content::Plain, Content::Layer] {
            // One archive for each step: a refusal of one must not keep the others from being tried.
            for (kind, name, target, plain_whiteout) in &steps {
                let (name, target) = (names[*name], targets[*target]);
                let (parent, last) = name.rsplit_once('/').map_or((".", name), |(parent, last)| (parent, last));
                let tar = match kind {
                    0 | 1 => Tar::default().file(name, "bad"),
                    2 => Tar::default().dir(name),
                    3 | 4 => Tar::default().link(EntryType::Symlink, name, target),
                    5 => Tar::default().link(EntryType::Link, name, target),
                    _ if *plain_whiteout => Tar::default().file(&format!("{parent}/.wh.{last}"), ""),
                    _ => Tar::default().file(&format!("{name}/.wh..wh..opq"), ""),
                };
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                let root = openat(rustix::fs::CWD, dir.path().join("root"), flags, Mode::empty()).unwrap();
                let _either = extract(&tar.end()[..], root, Rules { content, ..PLAIN });
                prop_assert_eq!(&beside(&dir), &before, "{} {} {}", kind, name, target);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn arbitrary_archives_never_panic(
        names in prop::collection::vec("[./a-b]{1,12}", 1..6),
        kinds in prop::collection::vec(0u8..8, 6),
        noise in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut tar = Tar::default();
        for (name, kind) in names.iter().zip(kinds) {
            tar = tar.link(EntryType::new(b'0' + kind), name, "a/b");
        }
        let mut bytes = tar.0;
        bytes.extend(noise);
        let _either = unpack(&dir, &bytes, LAYER);
        let _either = unpack(&dir, &bytes, PLAIN);
    }
}
