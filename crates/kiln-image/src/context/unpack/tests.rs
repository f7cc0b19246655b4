use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use proptest::prelude::*;

use super::*;
use crate::context::{self, Tree};

fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(1_700_000_000);
    header
}

/// Adds an entry whose name is taken as it is, legal or not.
fn raw(
    out: &mut tar::Builder<Vec<u8>>,
    name: impl AsRef<[u8]>,
    kind: tar::EntryType,
    link: &str,
    body: &[u8],
) {
    let name = name.as_ref();
    let mut header = header(kind, body.len() as u64);
    let field = &mut header.as_old_mut();
    field.name[..name.len()].copy_from_slice(name);
    field.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    out.append(&header, body).expect("append");
}

fn archive(fill: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    fill(&mut out);
    out.into_inner().expect("archive")
}

fn taken(bytes: &[u8]) -> Result<(tempfile::TempDir, Unpacked), UnpackError> {
    let dir = tempfile::tempdir().expect("temp dir");
    unpack(bytes, dir.path(), Limits::default()).map(|done| (dir, done))
}

use tar::EntryType as T;

#[test]
fn what_was_packed_is_unpacked_in_every_compression() {
    let from = tempfile::tempdir().expect("temp dir");
    std::fs::create_dir_all(from.path().join("a/b")).expect("dirs");
    std::fs::write(from.path().join("a/b/run.sh"), "#!/bin/sh\n").expect("write");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(from.path().join("a/b/run.sh"), mode).expect("mode");
    std::fs::write(from.path().join("x"), vec![7; 300_000]).expect("write");
    std::os::unix::fs::symlink("a/b/run.sh", from.path().join("go")).expect("link");
    let tree = Tree::open(from.path(), None, &[], Limits::default()).expect("tree");
    let mut plain = Vec::new();
    let packed = context::pack(&tree, &mut plain).expect("pack");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("gzip");
    let zstd = zstd::encode_all(&plain[..], 1).expect("zstd");
    for bytes in [plain, gzip.finish().expect("gzip"), zstd] {
        let (dir, done) = taken(&bytes).expect("taken");
        assert_eq!((done.entries, done.bytes), (packed.entries, packed.bytes));
        let tree = Tree::open(dir.path(), None, &[], Limits::default()).expect("tree");
        assert_eq!(
            context::digest(&tree).expect("digest").digest,
            packed.digest
        );
        let meta = std::fs::metadata(dir.path().join("a/b/run.sh")).expect("there");
        assert_eq!(meta.mode() & 0o777, 0o755);
    }
}

#[test]
fn an_archive_as_tar_makes_it_of_a_folder() {
    let bytes = archive(|out| {
        raw(out, "./", T::Directory, "", b"");
        raw(out, "./deep/er/file", T::Regular, "", b"x");
        raw(out, "./same", T::Link, "./deep/er/file", b"");
    });
    let (dir, _) = taken(&bytes).expect("taken");
    assert_eq!(
        std::fs::read(dir.path().join("same")).expect("copied"),
        b"x"
    );
    let meta = std::fs::metadata(dir.path().join("deep/er/file")).expect("there");
    assert_eq!(meta.mtime(), 1_700_000_000);
}

#[test]
fn nothing_leaves_the_folder() {
    let outside = tempfile::tempdir().expect("temp dir");
    let target = outside.path().to_str().expect("path");
    let through_link = archive(|out| {
        raw(out, "way", T::Symlink, target, b"");
        raw(out, "way/in", T::Regular, "", b"x");
    });
    let link_over_folder = archive(|out| {
        raw(out, "way/", T::Directory, "", b"");
        raw(out, "way", T::Symlink, target, b"");
        raw(out, "way/in", T::Regular, "", b"x");
    });
    let hard = archive(|out| raw(out, "x", T::Link, "../../etc/passwd", b""));
    let hard_absolute = archive(|out| raw(out, "x", T::Link, "/etc/passwd", b""));
    let hard_through_link = archive(|out| {
        raw(out, "way", T::Symlink, "/etc", b"");
        raw(out, "x", T::Link, "way/passwd", b"");
    });
    for bad in [
        through_link,
        link_over_folder,
        hard,
        hard_absolute,
        hard_through_link,
    ] {
        let refused = taken(&bad).expect_err("refused");
        assert_eq!(refused.class(), kiln_core::FailureClass::Usage, "{refused}");
    }
    for name in ["../x", "/x", "a/../../x", "a/../x"] {
        let bad = archive(|out| raw(out, name, T::Regular, "", b"x"));
        assert!(
            matches!(taken(&bad), Err(UnpackError::Entry { .. })),
            "{name}"
        );
    }
    assert_eq!(std::fs::read_dir(outside.path()).expect("dir").count(), 0);
}

#[test]
fn twice_special_and_cut_are_refused() {
    let twice = archive(|out| {
        raw(out, "x", T::Regular, "", b"1");
        raw(out, "./x", T::Regular, "", b"2");
    });
    assert!(matches!(
        taken(&twice),
        Err(UnpackError::Entry {
            why: "named twice",
            ..
        })
    ));
    for kind in [T::Char, T::Block, T::Fifo] {
        let special = archive(|out| raw(out, "x", kind, "", b""));
        assert!(matches!(taken(&special), Err(UnpackError::Entry { .. })));
    }
    let whole = archive(|out| raw(out, "x", T::Regular, "", &[1; 5000]));
    for cut in [0, 1, 511, 700, 3000] {
        let refused = taken(&whole[..cut]).expect_err("cut");
        assert!(
            matches!(refused, UnpackError::Archive(_)),
            "{cut}: {refused}"
        );
    }
    assert!(matches!(
        taken(b"PK\x03\x04 this is a zip"),
        Err(UnpackError::Archive(_))
    ));
}

#[test]
fn a_copy_has_names_of_any_bytes_and_a_source_has_not() {
    let bytes = archive(|out| {
        raw(out, b"a\xff/b\xfe", T::Regular, "", b"x");
        raw(out, "l", T::Symlink, "a", b"");
    });
    let refused = taken(&bytes).expect_err("a source");
    assert!(refused.to_string().contains("not UTF-8"), "{refused}");
    let dir = tempfile::tempdir().expect("temp dir");
    let copy = |bytes: &[u8]| {
        let root = File::open(dir.path()).expect("open");
        unpack_copy(bytes, root.into(), Limits::default())
    };
    assert_eq!(copy(&bytes).expect("a copy").entries, 2);
    let name = std::ffi::OsStr::from_bytes(b"a\xff/b\xfe");
    let content = std::fs::read(dir.path().join(name)).expect("there");
    assert_eq!(content, b"x");
    for (before, after) in [("../", ""), ("/", ""), ("", "/../../x")] {
        let name = [before.as_bytes(), b"\xff", after.as_bytes()].concat();
        let bad = archive(|out| raw(out, &name, T::Regular, "", b"x"));
        let refused = copy(&bad).expect_err("leads out");
        assert!(matches!(refused, UnpackError::Entry { .. }), "{refused}");
    }
}

#[test]
fn limits_hold_while_it_is_read() {
    let many = archive(|out| {
        for n in 0..20 {
            raw(out, format!("f{n}"), T::Regular, "", b"1234567890");
        }
    });
    let dir = || tempfile::tempdir().expect("temp dir");
    let entries = Limits {
        entries_max: 19,
        ..Limits::default()
    };
    let bytes = Limits {
        bytes_max: 199,
        ..Limits::default()
    };
    let (one, two) = (dir(), dir());
    let refused = unpack(&many[..], one.path(), entries).expect_err("entries");
    assert!(matches!(refused, UnpackError::TooManyEntries { max: 19 }));
    let refused = unpack(&many[..], two.path(), bytes).expect_err("bytes");
    assert!(matches!(refused, UnpackError::TooLarge { max: 199 }));
    let zeros = vec![0; usize::try_from(RATIO_FREE_BYTES).expect("size") + (8 << 20)];
    let bomb = archive(|out| raw(out, "zeros", T::Regular, "", &zeros));
    let bomb = zstd::encode_all(&bomb[..], 1).expect("zstd");
    assert!(matches!(taken(&bomb), Err(UnpackError::Bomb)));
}

/// An archive of one entry of a kind, whose content is this many zeros, and a file behind it.
fn padded(kind: T, zeros: u64) -> Vec<u8> {
    let mut head = header(kind, zeros);
    head.as_old_mut().name[0] = b'p';
    head.set_cksum();
    let mut out = zstd::stream::write::Encoder::new(Vec::new(), 1).expect("zstd");
    out.write_all(head.as_bytes()).expect("head");
    io::copy(
        &mut io::repeat(0).take(zeros.next_multiple_of(512)),
        &mut out,
    )
    .expect("zeros");
    let rest = archive(|out| raw(out, "x", T::Regular, "", b"1"));
    out.write_all(&rest).expect("rest");
    out.finish().expect("zstd")
}

#[test]
fn what_is_no_content_is_bounded_too() {
    // In memory a long name or an extension would be as large as the archive says, and what is skipped costs time.
    for kind in [
        T::GNULongName,
        T::GNULongLink,
        T::XHeader,
        T::XGlobalHeader,
        T::Directory,
        T::Symlink,
    ] {
        let bomb = padded(kind, 64 << 20);
        assert!(bomb.len() < 64 << 10, "{kind:?}: {} bytes", bomb.len());
        let refused = taken(&bomb).expect_err("refused");
        assert_eq!(refused.class(), kiln_core::FailureClass::Usage, "{kind:?}");
        assert!(
            matches!(&refused, UnpackError::Archive(why) if why.to_string().contains("too long"))
                || kind == T::Symlink,
            "{kind:?}: {refused:?}"
        );
    }
    let mut heads = Vec::new();
    for _ in 0..30 {
        heads.extend_from_slice(header_bytes(T::XGlobalHeader).as_bytes());
    }
    heads.extend(archive(|out| raw(out, "x", T::Regular, "", b"1")));
    let few = Limits {
        entries_max: 20,
        ..Limits::default()
    };
    let dir = tempfile::tempdir().expect("temp dir");
    let refused = unpack(&heads[..], dir.path(), few).expect_err("entries");
    assert!(matches!(refused, UnpackError::TooManyEntries { max: 20 }));
}

fn header_bytes(kind: tar::EntryType) -> tar::Header {
    let mut head = header(kind, 0);
    head.set_cksum();
    head
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_refused_or_taken(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _never_panics = taken(&bytes);
    }

    #[test]
    fn a_damaged_archive_never_writes_outside(at in 0_usize..1500, value in any::<u8>()) {
        let parent = tempfile::tempdir().expect("temp dir");
        let inside = parent.path().join("in");
        std::fs::create_dir(&inside).expect("dir");
        let mut bytes = archive(|out| {
            raw(out, "a/b", T::Regular, "", b"text");
            raw(out, "l", T::Symlink, "..", b"");
        });
        bytes[at] = value;
        let _either = unpack(&bytes[..], &inside, Limits::default());
        prop_assert_eq!(std::fs::read_dir(parent.path()).expect("dir").count(), 1);
    }
}
