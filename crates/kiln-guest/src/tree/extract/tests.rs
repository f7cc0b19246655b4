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
