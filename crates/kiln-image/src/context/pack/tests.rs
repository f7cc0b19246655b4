//! Order, digest, refusals and limits on real folders.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::*;
use crate::context::{Limits, Refused};

fn tree(dir: &Path, dockerfile: Option<&str>) -> Tree {
    Tree::open(dir, dockerfile, &[], Limits::default()).expect("a folder")
}

fn write(dir: &Path, path: &str, text: &str) {
    let path = dir.join(path);
    fs::create_dir_all(path.parent().expect("inside")).expect("folders");
    fs::write(&path, text).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("mode");
}

fn names(tar: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().expect("a tar");
    entries
        .map(|e| {
            let e = e.expect("an entry");
            String::from_utf8(e.path_bytes().into_owned()).expect("UTF-8")
        })
        .collect()
}

fn packed(tree: &Tree) -> (Packed, Vec<String>) {
    let mut out = Vec::new();
    let packed = pack(tree, &mut out).expect("packs");
    (packed, names(&out))
}

#[test]
fn order_and_digest_do_not_depend_on_the_disk() {
    let files = ["b/z", "b/a", "a.txt", "b.txt", "B", "a/x\ny"];
    let mut found = Vec::new();
    for reverse in [false, true] {
        let dir = tempfile::tempdir().expect("a folder");
        let mut files = files.to_vec();
        if reverse {
            files.reverse();
        }
        for file in files {
            write(dir.path(), file, file);
        }
        symlink("../a.txt", dir.path().join("b/link")).expect("a link");
        let (packed, names) = packed(&tree(dir.path(), None));
        assert_eq!(
            names,
            [
                "B", "a/", "a/x\ny", "a.txt", "b/", "b/a", "b/link", "b/z", "b.txt"
            ]
        );
        assert_eq!(digest(&tree(dir.path(), None)).expect("digest"), packed);
        found.push(packed);
    }
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0].entries, 9);
}

#[test]
fn the_digest_sees_content_mode_names_and_targets_but_no_times() {
    let dir = tempfile::tempdir().expect("a folder");
    let of = || digest(&tree(dir.path(), None)).expect("digest").digest;
    write(dir.path(), "ab", "c");
    let first = of();
    let file = fs::File::options().append(true).open(dir.path().join("ab"));
    let old = std::time::SystemTime::UNIX_EPOCH;
    file.expect("opens").set_modified(old).expect("time");
    assert_eq!(of(), first);
    let mut seen = vec![first];
    write(dir.path(), "ab", "d");
    seen.push(of());
    fs::set_permissions(dir.path().join("ab"), fs::Permissions::from_mode(0o755)).expect("mode");
    seen.push(of());
    fs::rename(dir.path().join("ab"), dir.path().join("a")).expect("rename");
    seen.push(of());
    symlink("a", dir.path().join("l")).expect("a link");
    seen.push(of());
    fs::remove_file(dir.path().join("l")).expect("remove");
    symlink("b", dir.path().join("l")).expect("a link");
    seen.push(of());
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 6);
}

#[test]
fn the_digest_is_the_documented_one() {
    let dir = tempfile::tempdir().expect("a folder");
    write(dir.path(), "f", "hello");
    let mut bytes = b"kiln-tree-v1\0".to_vec();
    bytes.push(b'f');
    bytes.extend(0o644_u32.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.push(b'f');
    bytes.extend(5_u64.to_le_bytes());
    bytes.extend(Digest::of(b"hello").bytes());
    let found = digest(&tree(dir.path(), None)).expect("digest");
    assert_eq!(found.digest, Digest::of(&bytes));
}

#[test]
fn a_run_has_rules_of_its_own() {
    let dir = tempfile::tempdir().expect("temp dir");
    let names = || {
        let tree = Tree::open_for_run(dir.path(), Limits::default()).expect("tree");
        let mut names = Vec::new();
        tree.walk(
            &mut |entry| {
                names.push(entry.path.clone());
                Ok(())
            },
            &mut |_| {},
        )
        .expect("walks");
        names
    };
    let write =
        |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("write");
    write("a", "");
    write("b", "");
    write("c", "");
    write("Dockerfile", "FROM scratch");
    write(".gitignore", "c\n");
    assert_eq!(
        names(),
        [".gitignore", "Dockerfile", "a", "b"],
        "whatever is built of it"
    );
    write(".dockerignore", "b\n.*\n");
    assert_eq!(names(), ["Dockerfile", "a", "c"]);
    write(".kilnignore", "a\n.*\n");
    assert_eq!(names(), ["Dockerfile", "b", "c"]);
}

#[test]
fn ignore_files_in_their_order() {
    let dir = tempfile::tempdir().expect("a folder");
    for file in [
        "a.log",
        "sub/b.log",
        "keep.log",
        ".git/config",
        "sub/.git/x",
        "x/y/keep",
        "x/z",
    ] {
        write(dir.path(), file, "");
    }
    write(dir.path(), ".gitignore", "*.log\n!/keep.log\n");
    write(dir.path(), "sub/.gitignore", "!b.log\n");
    let (_, names) = packed(&tree(dir.path(), None));
    assert!(names.contains(&"keep.log".to_owned()) && names.contains(&"sub/b.log".to_owned()));
    assert!(!names.contains(&"a.log".to_owned()));
    assert!(!names.iter().any(|name| name.contains(".git/")));
    // With a Dockerfile, .gitignore says nothing.
    let (_, names) = packed(&tree(dir.path(), Some("Dockerfile")));
    assert!(names.contains(&"a.log".to_owned()));
    assert!(!names.iter().any(|name| name.contains(".git/")));
    let (_, same) = packed(&tree(dir.path(), Some("/elsewhere/Dockerfile")));
    assert_eq!(same, names);
    // .dockerignore wins, and a taken-back entry brings its folders with it.
    write(dir.path(), ".dockerignore", "*\n!x/y/keep\n");
    let (_, names_) = packed(&tree(dir.path(), None));
    assert_eq!(names_, ["x/", "x/y/", "x/y/keep"]);
    // The Dockerfile's own wins over that.
    write(
        dir.path(),
        "Dockerfile.dockerignore",
        "x\n**/*.log\n**/.*\nDockerfile*\n",
    );
    let (_, names) = packed(&tree(dir.path(), Some("Dockerfile")));
    assert_eq!(names, ["sub/"]);
}

#[test]
fn what_cannot_be_sent_is_listed_before_a_byte_is_written() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().expect("a folder");
    write(dir.path(), "a", "x");
    symlink("/etc/passwd", dir.path().join("abs")).expect("a link");
    fs::create_dir(dir.path().join("d")).expect("a folder");
    symlink("../d/../../x", dir.path().join("d/up")).expect("a link");
    symlink("../d/./gone", dir.path().join("d/fine")).expect("a link");
    let bad = std::ffi::OsStr::from_bytes(b"bad\xff");
    fs::write(dir.path().join(bad), "").expect("a file");
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).expect("a socket");
    let mut out = Vec::new();
    let error = pack(&tree(dir.path(), None), &mut out).expect_err("refused");
    assert!(out.is_empty());
    let text = error.to_string();
    let ContextError::Refused { first, total } = error else {
        panic!("{text}");
    };
    assert_eq!(total, 4);
    let escapes = Refused::Escapes("abs".to_owned(), "/etc/passwd".to_owned());
    assert_eq!(first[0], escapes);
    assert!(matches!(first[1], Refused::NotUtf8(_)));
    assert!(matches!(&first[2], Refused::Escapes(path, _) if path == "d/up"));
    assert!(matches!(first[3], Refused::Special(_, "socket")));
    // Ignored entries are nobody's business.
    write(dir.path(), ".dockerignore", "abs\nbad*\nd\ns\n");
    assert_eq!(packed(&tree(dir.path(), None)).1, [".dockerignore", "a"]);
}

#[test]
fn long_paths_and_odd_names_arrive() {
    let dir = tempfile::tempdir().expect("a folder");
    let name = "n".repeat(200);
    let mut at = fs::File::open(dir.path()).expect("opens");
    let mut path = String::new();
    for _ in 0..19 {
        rustix::fs::mkdirat(&at, &name, rustix::fs::Mode::from(0o755)).expect("mkdir");
        let flags = rustix::fs::OFlags::DIRECTORY;
        let next = rustix::fs::openat(&at, &name, flags, rustix::fs::Mode::empty());
        at = fs::File::from(next.expect("opens"));
        path.push_str(&name);
        path.push('/');
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let last = format!("{}\n", "x".repeat(240));
    let file = rustix::fs::openat(&at, &last, flags, rustix::fs::Mode::from(0o600));
    fs::File::from(file.expect("opens"))
        .write_all(b"deep")
        .expect("writes");
    path.push_str(&last);
    assert!(
        path.len() > 4000,
        "longer than the kernel takes with the folder in front"
    );
    let (_, names) = packed(&tree(dir.path(), None));
    assert_eq!(names.last(), Some(&path));
}

#[test]
fn limits_have_names() {
    let dir = tempfile::tempdir().expect("a folder");
    for i in 0..5 {
        write(dir.path(), &format!("f{i}"), "12345");
    }
    let with = |limits| {
        let tree = Tree::open(dir.path(), None, &[], limits).expect("a folder");
        digest(&tree).expect_err("over the limit")
    };
    let entries = Limits {
        entries_max: 4,
        ..Limits::default()
    };
    assert!(matches!(
        with(entries),
        ContextError::TooManyEntries { max: 4 }
    ));
    let bytes = Limits {
        bytes_max: 24,
        ..Limits::default()
    };
    assert!(matches!(with(bytes), ContextError::TooLarge { max: 24 }));
}

#[test]
fn what_a_plan_needs_is_kept_whatever_the_rules_say() {
    let dir = tempfile::tempdir().expect("a folder");
    for file in [
        "Dockerfile",
        "deploy/Dockerfile",
        "deploy/secret",
        "src/a",
        ".git/x",
        ".env",
    ] {
        write(dir.path(), file, "x");
    }
    write(dir.path(), ".dockerignore", "*\n!src\n");
    let kept = [
        "Dockerfile",
        ".dockerignore",
        "deploy/Dockerfile",
        ".git/x",
        "none",
    ];
    let tree = tree(dir.path(), None).keeping(kept.map(str::to_owned));
    assert_eq!(
        packed(&tree).1,
        [
            ".dockerignore",
            "Dockerfile",
            "deploy/",
            "deploy/Dockerfile",
            "src/",
            "src/a"
        ]
    );
}

#[test]
fn a_file_that_changes_while_it_is_read_ends_the_stream() {
    struct Grow<'a>(&'a Path);
    impl Write for Grow<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            fs::write(self.0.join("z"), "more than before")?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let dir = tempfile::tempdir().expect("a folder");
    write(dir.path(), "a", "x");
    write(dir.path(), "z", "short");
    let error = pack(&tree(dir.path(), None), &mut Grow(dir.path())).expect_err("changed");
    assert!(matches!(error, ContextError::Changed { path } if path == "z"));
}

/// The most memory this process ever took, in KiB.
fn high_water() -> u64 {
    let text = fs::read_to_string("/proc/self/status").expect("status");
    let line = text.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.and_then(|line| line.split_ascii_whitespace().nth(1));
    number
        .and_then(|number| number.parse().ok())
        .expect("VmHWM")
}

#[test]
fn gigabytes_and_hundreds_of_thousands_of_files_stream_in_constant_memory() {
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("temp dir");
    let one = dir.path().join("one");
    fs::write(&one, "x").expect("write");
    for number in 0..400_000 {
        let folder = dir.path().join(format!("d{}", number / 1000));
        if number % 1000 == 0 {
            fs::create_dir(&folder).expect("folder");
        }
        fs::hard_link(&one, folder.join(number.to_string())).expect("link");
    }
    let large = fs::File::create(dir.path().join("large")).expect("create");
    large.set_len(3 << 30).expect("holes");
    let before = high_water();
    let packed = pack(&tree(dir.path(), None), &mut std::io::sink()).expect("packed");
    assert_eq!(
        (packed.entries, packed.bytes),
        (400_402, (3 << 30) + 400_001)
    );
    // The kernel adds up what its processors counted from time to time: a later look may even see a little less.
    let grown = high_water().saturating_sub(before);
    assert!(grown < 64 * 1024, "{grown} KiB");
}
