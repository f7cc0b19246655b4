use super::*;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use tar::{EntryType, Header};

/// An entry as a hostile guest writes it: no builder checks its name.
fn entry(
    builder: &mut tar::Builder<Vec<u8>>,
    name: &[u8],
    kind: EntryType,
    link: &str,
    content: &[u8],
) {
    let mut header = Header::new_old();
    let raw = header.as_old_mut();
    raw.name[..name.len()].copy_from_slice(name);
    raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o4755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_cksum();
    builder.append(&header, content).expect("appended");
}

fn tar(entries: &[(&str, EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, link, content) in entries {
        entry(&mut builder, name.as_bytes(), *kind, link, content);
    }
    builder.into_inner().expect("whole")
}

fn held(path: &Path) -> Target {
    Target {
        folder: File::open(parent_of(path)).expect("a folder").into(),
        path: path.to_owned(),
    }
}

fn take_out(tar: impl Read, target: &Path, file: Option<&str>) -> Result<Copied, CopyError> {
    super::take_out(tar, &held(target), file)
}

const FILE: EntryType = EntryType::Regular;
const LINK: EntryType = EntryType::Symlink;

#[test]
fn a_folder_appears_whole_without_links_that_lead_out() {
    let dir = tempfile::tempdir().expect("dir");
    let target = place(&dir.path().join("out"), "work").expect("a place");
    let bytes = tar(&[
        ("a/b.txt", FILE, "", b"hello"),
        ("a/in", LINK, "b.txt", b""),
        ("deep/l", LINK, "..", b""),
        ("up", LINK, "../../etc/passwd", b""),
        ("abs", LINK, "/etc/passwd", b""),
        ("via", LINK, "deep/l/../x", b""),
        ("nowhere", LINK, "gone", b""),
    ]);
    let copied = take_out(&bytes[..], &target, None).expect("copied");
    assert_eq!(copied.links_left_out, 4, "{copied:?}");
    assert_eq!(fs::read(target.join("a/in")).expect("inside"), b"hello");
    assert!(target.join("deep/l").is_symlink());
    for gone in ["up", "abs", "via", "nowhere"] {
        assert!(fs::symlink_metadata(target.join(gone)).is_err(), "{gone}");
    }
    let mode = fs::metadata(target.join("a/b.txt"))
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o7000, 0, "no set-user-id bit");
    assert_eq!(
        fs::read_dir(dir.path()).expect("list").count(),
        1,
        "nothing beside it"
    );
    let again = take_out(&bytes[..], &target, None).expect_err("not merged");
    assert!(matches!(again, CopyError::Place { .. }), "{again}");
    let empty = take_out(&tar(&[])[..], &dir.path().join("empty"), None).expect("an empty folder");
    assert_eq!(empty.entries, 0);
}

#[test]
fn what_no_copy_may_hold_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let target = dir.path().join("out");
    for (name, kind, link) in [
        ("../up", FILE, ""),
        ("/etc/cron.d/x", FILE, ""),
        ("a/../../up", FILE, ""),
        ("hard", EntryType::Link, "/etc/passwd"),
        ("hard", EntryType::Link, "../x"),
        ("disk", EntryType::Block, ""),
        ("tty", EntryType::Char, ""),
        ("pipe", EntryType::Fifo, ""),
    ] {
        let bytes = tar(&[(name, kind, link, b"")]);
        let error = take_out(&bytes[..], &target, None).expect_err(name);
        assert!(matches!(error, CopyError::Refused(_)), "{name}: {error}");
    }
    let through = tar(&[("l", LINK, "/tmp", b""), ("l/x", FILE, "", b"x")]);
    assert!(take_out(&through[..], &target, None).is_err());
    let mut bomb = Header::new_gnu();
    bomb.set_size(BYTES_MAX + 1);
    bomb.as_old_mut().name[..1].copy_from_slice(b"b");
    bomb.set_entry_type(FILE);
    bomb.set_mode(0o644);
    bomb.set_cksum();
    let cut = bomb.as_bytes().chain(&[0; 4096][..]);
    assert!(take_out(cut, &target, None).is_err());
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
}

#[test]
fn a_file_replaces_a_link_and_not_what_it_leads_to() {
    let dir = tempfile::tempdir().expect("dir");
    let (theirs, link) = (dir.path().join("theirs"), dir.path().join("link"));
    fs::write(&theirs, b"precious").expect("write");
    symlink(&theirs, &link).expect("link");
    let bytes = tar(&[("report", FILE, "", b"new")]);
    let target = place(&link, "report").expect("a place");
    take_out(&bytes[..], &target, Some("report")).expect("copied");
    assert_eq!(fs::read(&link).expect("reads"), b"new");
    assert_eq!(fs::read(&theirs).expect("reads"), b"precious");
    assert!(!link.is_symlink());
    let inside = place(dir.path(), "report").expect("below the folder");
    assert_eq!(inside, dir.path().join("report"));
    let two = tar(&[("report", FILE, "", b"1"), ("other", FILE, "", b"2")]);
    assert!(take_out(&two[..], &inside, Some("report")).is_err());
    assert!(
        take_out(
            &tar(&[("report", LINK, "/etc/passwd", b"")])[..],
            &inside,
            Some("report")
        )
        .is_err()
    );
    assert!(!inside.exists());
    for (dest, name) in [("no/such/place", "x"), ("missing/", "x"), ("", "..")] {
        assert!(
            place(&dir.path().join(dest), name).is_err(),
            "{dest} {name}"
        );
    }
}

#[test]
fn names_are_any_bytes() {
    let dir = tempfile::tempdir().expect("dir");
    let mut builder = tar::Builder::new(Vec::new());
    entry(&mut builder, b"caf\xe9/\xff.txt", FILE, "", b"one");
    entry(&mut builder, b"caf\xe9/\xfe", LINK, "../../x", b"");
    entry(&mut builder, b"plain", FILE, "", b"two");
    let bytes = builder.into_inner().expect("whole");
    let target = dir.path().join("out");
    let copied = take_out(&bytes[..], &target, None).expect("copied");
    assert_eq!((copied.entries, copied.links_left_out), (3, 1));
    let name = target.join(OsStr::from_bytes(b"caf\xe9/\xff.txt"));
    assert_eq!(fs::read(name).expect("there"), b"one");
    assert_eq!(fs::read(target.join("plain")).expect("there"), b"two");
    let link = target.join(OsStr::from_bytes(b"caf\xe9/\xfe"));
    assert!(!link.is_symlink());
}

#[test]
fn a_folder_that_is_exchanged_for_a_link_leads_nowhere() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    for name in ["shared", "victim"] {
        fs::create_dir(at(name)).expect("folder");
    }
    let targets = [held(&at("shared/tree")), held(&at("shared/file"))];
    fs::rename(at("shared"), at("moved")).expect("moved");
    symlink("victim", at("shared")).expect("link");
    let bytes = tar(&[("x", FILE, "", b"new")]);
    super::take_out(&bytes[..], &targets[0], None).expect("copied");
    super::take_out(&bytes[..], &targets[1], Some("x")).expect("copied");
    assert_eq!(fs::read(at("moved/tree/x")).expect("there"), b"new");
    assert_eq!(fs::read(at("moved/file")).expect("there"), b"new");
    let count = |name: &str| fs::read_dir(at(name)).expect("list").count();
    assert_eq!((count("moved"), count("victim")), (2, 0));
}

#[test]
fn what_is_no_file_does_not_give_way_to_one() {
    let dir = tempfile::tempdir().expect("dir");
    let bytes = tar(&[("x", FILE, "", b"new")]);
    let pipe = dir.path().join("pipe");
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).expect("fifo");
    fs::create_dir(dir.path().join("folder")).expect("folder");
    for name in ["pipe", "folder"] {
        let error = take_out(&bytes[..], &dir.path().join(name), Some("x")).expect_err(name);
        assert!(matches!(error, CopyError::Place { .. }), "{name}: {error}");
    }
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 2);
}

#[test]
fn a_machine_that_breaks_off_is_told_in_its_words() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("no such file"))
        }
    }
    let dir = tempfile::tempdir().expect("dir");
    let error = take_out(Broken, &dir.path().join("out"), None).expect_err("broken");
    assert_eq!(
        error.to_string(),
        "the machine does not give it: no such file"
    );
}

#[test]
fn what_goes_in_is_what_is_there() {
    let dir = tempfile::tempdir().expect("dir");
    fs::create_dir_all(dir.path().join("src/sub")).expect("dir");
    fs::write(dir.path().join("src/sub/file"), b"content").expect("write");
    symlink("/etc/passwd", dir.path().join("src/link")).expect("link");
    let mut parcel = Vec::new();
    give(&dir.path().join("src"), &mut parcel).expect("given");
    let mut archive = tar::Archive::new(&parcel[..]);
    let mut names = Vec::new();
    for entry in archive.entries().expect("entries") {
        let entry = entry.expect("an entry");
        let name = entry.path().expect("a path").display().to_string();
        names.push((
            name.trim_end_matches('/').to_owned(),
            entry.header().entry_type(),
        ));
    }
    names.sort_by(|a, b| a.0.cmp(&b.0));
    let want = [
        ("x", EntryType::Directory),
        ("x/link", LINK),
        ("x/sub", EntryType::Directory),
        ("x/sub/file", FILE),
    ];
    assert_eq!(
        names
            .iter()
            .map(|(name, kind)| (name.as_str(), *kind))
            .collect::<Vec<_>>(),
        want
    );
    assert!(give(Path::new("/dev/null"), &mut Vec::new()).is_err());
    assert_eq!(
        fs::metadata(dir.path().join("src")).expect("there").nlink(),
        3
    );
}
