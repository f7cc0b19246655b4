//! Against the real git of this host, and against senders that lie.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use proptest::prelude::*;

use super::super::error::Whose;
use super::super::object::id_of;
use super::*;

struct Repo {
    dir: tempfile::TempDir,
}

impl Repo {
    fn new() -> Self {
        let repo = Self {
            dir: tempfile::tempdir().expect("temp dir"),
        };
        repo.git(&["init", "-q", "-b", "main"]);
        repo
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("git");
        command
            .current_dir(self.dir.path())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .args([
                "-c",
                "user.name=t",
                "-c",
                "user.email=t@example.org",
                "-c",
                "core.autocrlf=false",
            ]);
        command
    }

    fn git(&self, args: &[&str]) -> String {
        let output = self.command().args(args).output().expect("git runs");
        assert!(
            output.status.success(),
            "git {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn commit(&self) -> ObjectId {
        self.git(&["add", "-A", "-f"]);
        self.git(&["commit", "-q", "--allow-empty", "-m", "words"]);
        self.git(&["rev-parse", "HEAD"]).parse().expect("an id")
    }

    fn batch(&self) -> Child {
        self.command()
            .args(["cat-file", "--batch"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("git runs")
    }

    fn receive(
        &self,
        commit: ObjectId,
        limits: Limits,
    ) -> Result<(Received, tempfile::TempDir), GitTreeError> {
        let to = tempfile::tempdir().expect("temp dir");
        let mut child = self.batch();
        let (stdin, stdout) = (
            child.stdin.take().expect("pipe"),
            child.stdout.take().expect("pipe"),
        );
        let received = receive(stdout, stdin, commit, to.path(), limits, &mut |_| {});
        child.kill().expect("killed");
        child.wait().expect("waited");
        received.map(|received| (received, to))
    }
}

impl Repo {
    fn read(
        &self,
        commit: ObjectId,
        names: &[&str],
    ) -> Result<BTreeMap<String, Vec<u8>>, GitTreeError> {
        let mut child = self.batch();
        let (stdin, stdout) = (
            child.stdin.take().expect("pipe"),
            child.stdout.take().expect("pipe"),
        );
        let read = read_files(stdout, stdin, commit, names, 16);
        child.kill().expect("killed");
        child.wait().expect("waited");
        read
    }
}

#[test]
fn single_files_are_read_and_nothing_else_is_asked_for() {
    let repo = Repo::new();
    std::fs::create_dir_all(repo.path("sub/folder")).expect("dir");
    std::fs::write(repo.path("a"), "first\n").expect("write");
    std::fs::write(repo.path("sub/b"), "").expect("write");
    std::fs::write(repo.path("sub/folder/c"), "x").expect("write");
    std::fs::write(repo.path("big"), "more than 16 bytes").expect("write");
    std::os::unix::fs::symlink("a", repo.path("link")).expect("link");
    let commit = repo.commit();
    let read = repo.read(commit, &["a", "sub/b", "sub/none", "none/a", "a/b"]);
    let read: Vec<_> = read.expect("read").into_iter().collect();
    assert_eq!(
        read,
        [
            ("a".to_owned(), b"first\n".to_vec()),
            ("sub/b".to_owned(), Vec::new())
        ]
    );
    for (name, why) in [
        ("link", "symbolic link"),
        ("link/a", "symbolic link"),
        ("sub/folder", "not a file"),
        ("big", "too large"),
    ] {
        let error = repo.read(commit, &["a", name]).expect_err(name);
        assert_eq!(error.whose(), Whose::Repository, "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
    // A sender that says another thing than the commit holds.
    let (blob, lie) = (b"words".as_slice(), b"sword".as_slice());
    let id = id_of(ObjectKind::Blob, blob).expect("an id");
    let root = tree(&[("100644", "a", id)]);
    let commit = commit_of(&root);
    let at = id_of(ObjectKind::Commit, &commit).expect("an id");
    let of = |blob: &[u8]| {
        let mut sent = sender(&[(ObjectKind::Commit, &commit), (ObjectKind::Tree, &root)]);
        sent.extend_from_slice(format!("{id} blob {}\n", blob.len()).as_bytes());
        sent.extend_from_slice(blob);
        sent.push(b'\n');
        read_files(Cursor::new(sent), std::io::sink(), at, &["a"], 16)
    };
    assert_eq!(of(blob).expect("read")["a"], blob);
    assert_eq!(of(lie).expect_err("a lie").whose(), Whose::Sender);
}

/// Everything below a folder: path, mode and bytes or target.
fn contents(dir: &Path) -> BTreeMap<Vec<u8>, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).expect("folder") {
            let path = entry.expect("entry").path();
            if path == dir.join(".git") {
                continue;
            }
            let meta = path.symlink_metadata().expect("meta");
            let name = path
                .strip_prefix(dir)
                .expect("below")
                .as_os_str()
                .as_bytes()
                .to_vec();
            let bytes = if meta.is_symlink() {
                std::fs::read_link(&path)
                    .expect("link")
                    .as_os_str()
                    .as_bytes()
                    .to_vec()
            } else if meta.is_dir() {
                open.push(path);
                Vec::new()
            } else {
                std::fs::read(&path).expect("file")
            };
            all.insert(name, (meta.permissions().mode() & 0o777, bytes));
        }
    }
    all
}

#[test]
fn a_real_commit_comes_out_as_it_was() {
    let repo = Repo::new();
    std::fs::create_dir_all(repo.path("src/deep/er")).expect("dir");
    std::fs::write(repo.path("src/deep/er/same"), "twice\n").expect("write");
    std::fs::write(repo.path("same"), "twice\n").expect("write");
    std::fs::write(repo.path("empty"), "").expect("write");
    std::fs::write(repo.path("big"), vec![7; 3 << 20]).expect("write");
    std::fs::write(repo.path("new\nline \u{e4}"), "x\r\n").expect("write");
    // A working tree of git's own would leave this out, and turn line ends.
    std::fs::write(
        repo.path(".gitattributes"),
        "* text eol=crlf\nbig export-ignore\n",
    )
    .expect("write");
    std::fs::write(repo.path("run"), "#!/bin/sh\n").expect("write");
    std::fs::set_permissions(repo.path("run"), std::fs::Permissions::from_mode(0o755))
        .expect("mode");
    std::os::unix::fs::symlink("src/deep", repo.path("link")).expect("link");
    std::os::unix::fs::symlink("../outside", repo.path("src/out")).expect("link");
    for at in 0..700 {
        std::fs::write(repo.path(&format!("src/{at}")), format!("{at}")).expect("write");
    }
    repo.git(&["config", "core.safecrlf", "false"]);
    let commit = repo.commit();
    let (received, to) = repo.receive(commit, Limits::default()).expect("received");
    assert_eq!(
        received.tree.to_string(),
        repo.git(&["rev-parse", "HEAD^{tree}"])
    );
    let mut expected = contents(repo.dir.path());
    // `eol=crlf` normalised this one when it was added; its blob is what counts.
    expected.insert("new\nline \u{e4}".into(), (0o644, b"x\n".to_vec()));
    // This process's umask may have taken rights from what the test wrote.
    for (mode, _) in expected.values_mut().filter(|(mode, _)| *mode != 0o777) {
        *mode = if *mode & 0o100 == 0 { 0o644 } else { 0o755 };
    }
    let found = contents(to.path());
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (path, (mode, bytes)) in &expected {
        let (found_mode, found_bytes) = &found[path];
        let name = String::from_utf8_lossy(path);
        assert_eq!((found_mode, found_bytes == bytes), (mode, true), "{name}");
    }
    assert_eq!(received.files, 709);
}

#[test]
fn what_is_left_out_is_told() {
    let repo = Repo::new();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n";
    std::fs::write(repo.path("model.bin"), pointer).expect("write");
    repo.git(&[
        "update-index",
        "--add",
        "--cacheinfo",
        "160000,1111111111111111111111111111111111111111,vendor/lib",
    ]);
    repo.git(&["add", "model.bin"]);
    repo.git(&["commit", "-q", "-m", "words"]);
    let commit = repo.git(&["rev-parse", "HEAD"]).parse().expect("an id");
    let (received, to) = repo.receive(commit, Limits::default()).expect("received");
    assert_eq!(received.submodules, (1, vec!["vendor/lib".to_owned()]));
    assert_eq!(received.lfs_pointers, (1, vec!["model.bin".to_owned()]));
    assert!(to.path().join("vendor/lib").is_dir());
}

#[test]
fn an_empty_commit_and_a_missing_one() {
    let repo = Repo::new();
    let commit = repo.commit();
    let (received, to) = repo.receive(commit, Limits::default()).expect("received");
    assert_eq!((received.files, contents(to.path()).len()), (0, 0));
    let other = ObjectId::from_bytes([1; 20]);
    let error = repo
        .receive(other, Limits::default())
        .expect_err("not there");
    assert!(matches!(error, GitTreeError::Missing { .. }), "{error}");
    let error = repo
        .receive(received.tree, Limits::default())
        .expect_err("a tree");
    assert!(matches!(error, GitTreeError::Kind { .. }), "{error}");
}

#[test]
fn limits_hold() {
    let repo = Repo::new();
    for name in ["a", "b", "c"] {
        std::fs::write(repo.path(name), [b'x'; 1000]).expect("write");
    }
    let commit = repo.commit();
    let limits = Limits {
        bytes_max: 2999,
        ..Limits::default()
    };
    let error = repo.receive(commit, limits).expect_err("copies count");
    assert!(
        matches!(error, GitTreeError::Limit { limit: 2999, .. }),
        "{error}"
    );
    assert_eq!(error.whose(), Whose::Repository);
    let error = repo
        .receive(
            commit,
            Limits {
                entries_max: 2,
                ..Limits::default()
            },
        )
        .expect_err("three");
    assert!(
        matches!(error, GitTreeError::Limit { limit: 2, .. }),
        "{error}"
    );
}

/// Answers of a sender that has these objects.
fn sender(objects: &[(ObjectKind, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, object) in objects {
        let id = id_of(*kind, object).expect("no collision");
        bytes.extend(format!("{id} {kind} {}\n", object.len()).bytes());
        bytes.extend_from_slice(object);
        bytes.push(b'\n');
    }
    bytes
}

fn tree(entries: &[(&str, &str, ObjectId)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (mode, name, id) in entries {
        bytes.extend(format!("{mode} {name}\0").bytes());
        bytes.extend(hex::decode(id.to_string()).expect("hex"));
    }
    bytes
}

fn commit_of(tree: &[u8]) -> Vec<u8> {
    let id = id_of(ObjectKind::Tree, tree).expect("no collision");
    format!("tree {id}\n\nwords\n").into_bytes()
}

fn take(commit: &[u8], answers: &[u8]) -> Result<tempfile::TempDir, GitTreeError> {
    let to = tempfile::tempdir().expect("temp dir");
    let id = id_of(ObjectKind::Commit, commit).expect("no collision");
    receive(
        Cursor::new(answers),
        std::io::sink(),
        id,
        to.path(),
        Limits::default(),
        &mut |_| {},
    )
    .map(|_| to)
}

#[test]
fn nothing_is_written_through_a_link() {
    let outside = tempfile::tempdir().expect("temp dir");
    let target = outside.path().to_str().expect("text").as_bytes().to_vec();
    let (link, evil) = (
        id_of(ObjectKind::Blob, &target).expect("id"),
        id_of(ObjectKind::Blob, b"evil").expect("id"),
    );
    let inner = tree(&[("100644", "file", evil)]);
    let inner_id = id_of(ObjectKind::Tree, &inner).expect("id");
    // "a" as link and as folder: no legal tree, refused while it is read.
    let root = tree(&[("120000", "a", link), ("40000", "a", inner_id)]);
    let commit = commit_of(&root);
    let answers = sender(&[(ObjectKind::Commit, &commit), (ObjectKind::Tree, &root)]);
    let error = take(&commit, &answers).expect_err("refused");
    assert!(matches!(error, GitTreeError::Malformed { .. }), "{error}");
    assert_eq!(std::fs::read_dir(outside.path()).expect("dir").count(), 0);
}

#[test]
fn lies_are_the_senders_fault() {
    let blob = b"honest";
    let root = tree(&[("100644", "file", id_of(ObjectKind::Blob, blob).expect("id"))]);
    let commit = commit_of(&root);
    let honest = sender(&[
        (ObjectKind::Commit, &commit),
        (ObjectKind::Tree, &root),
        (ObjectKind::Blob, blob),
    ]);
    let to = take(&commit, &honest).expect("honest");
    assert_eq!(std::fs::read(to.path().join("file")).expect("file"), blob);

    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let replaced = |from: &[u8], to: &[u8]| {
        let at = honest
            .windows(from.len())
            .rposition(|window| window == from)
            .expect("there");
        [&honest[..at], to, &honest[at + from.len()..]].concat()
    };
    let lies = [
        replaced(b"honest", b"h0nest"),
        replaced(b"words", b"swords"),
        replaced(b" blob 6\n", b" blob 5\n"),
        replaced(b" blob 6\n", b" blob +6\n"),
        replaced(b" blob 6\n", b" missing\n"),
        replaced(b" blob 6\n", b" tree 6\n"),
        replaced(b" blob 6\n", b" blob 6 and a line that never ends, until it is far too long to be one, and then some more of it, and more\n"),
        replaced(b"honest\n", b"honest!"),
    ];
    for lie in &lies {
        let error = take(&commit, lie).expect_err("a lie");
        assert_eq!(error.whose(), Whose::Sender, "{error}: {}", text(lie));
    }
    let error = take(&commit, &honest[..honest.len() - 3]).expect_err("cut off");
    assert_eq!(error.whose(), Whose::Connection, "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn one_changed_byte_is_never_accepted(at in 0_usize..1000, change in 1_u8..=255) {
        let blob = b"honest";
        let root = tree(&[("100644", "file", id_of(ObjectKind::Blob, blob).expect("id"))]);
        let commit = commit_of(&root);
        let mut answers = sender(&[(ObjectKind::Commit, &commit), (ObjectKind::Tree, &root), (ObjectKind::Blob, blob)]);
        let at = at % answers.len();
        answers[at] ^= change;
        prop_assert!(take(&commit, &answers).is_err());
    }

    #[test]
    fn any_answer_is_survived(answers in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(take(b"tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\n", &answers).is_err());
    }
}
