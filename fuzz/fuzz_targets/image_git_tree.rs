//! Git objects of a checkout machine: what is written is inside the folder, and is what the commit says.
//! An even first byte makes the rest a repository with right ids and any names; an odd one makes it a guest's raw answers.
#![no_main]

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::path::Path;
use std::rc::Rc;

use kiln_image::context::Limits;
use kiln_image::git_tree::{ObjectId, ObjectKind, id_of, parse_tree, receive, tree_of_commit};
use libfuzzer_sys::fuzz_target;

/// Modes of tree entries as git and others write them.
const MODES: [&str; 8] = ["100644", "100755", "120000", "40000", "160000", "100664", "040000", "777"];
/// Contents of the blobs that every repository has.
const BLOBS: [&[u8]; 4] = [b"", b"hello", b"../outside", b"/etc/passwd"];

type Objects = HashMap<String, (ObjectKind, Vec<u8>)>;

/// A `git cat-file --batch` over these objects.
#[derive(Clone)]
struct Git {
    objects: Rc<Objects>,
    asked: Rc<RefCell<Vec<u8>>>,
    answers: Rc<RefCell<VecDeque<u8>>>,
}

impl Write for Git {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut asked = self.asked.borrow_mut();
        for byte in bytes {
            if *byte != b'\n' {
                asked.push(*byte);
                continue;
            }
            let id = String::from_utf8(std::mem::take(&mut *asked)).expect("an id is text");
            let mut answers = self.answers.borrow_mut();
            match self.objects.get(&id) {
                Some((kind, content)) => {
                    answers.extend(format!("{id} {kind} {}\n", content.len()).bytes());
                    answers.extend(content.iter().copied().chain([b'\n']));
                }
                None => answers.extend(format!("{id} missing\n").bytes()),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Git {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut answers = self.answers.borrow_mut();
        let count = into.len().min(answers.len());
        for (place, byte) in into.iter_mut().zip(answers.drain(..count)) {
            *place = byte;
        }
        Ok(count)
    }
}

fn add(objects: &mut Objects, kind: ObjectKind, content: Vec<u8>) -> ObjectId {
    let id = id_of(kind, &content).unwrap_or_else(|id| id);
    objects.insert(id.to_string(), (kind, content));
    id
}

/// Trees of any entries over each other; the last one is the commit's.
fn repository(mut bytes: impl Iterator<Item = u8>) -> (Objects, ObjectId) {
    let mut objects = Objects::new();
    let mut ids: Vec<ObjectId> = Vec::new();
    for blob in BLOBS {
        ids.push(add(&mut objects, ObjectKind::Blob, blob.to_vec()));
    }
    let mut root = add(&mut objects, ObjectKind::Tree, Vec::new());
    ids.push(root);
    while let Some(count) = bytes.next() {
        let mut tree = Vec::new();
        for _ in 0..count % 8 {
            let mode = MODES[usize::from(bytes.next().unwrap_or(0)) % MODES.len()];
            let target = ids[usize::from(bytes.next().unwrap_or(0)) % ids.len()];
            let length = usize::from(bytes.next().unwrap_or(0) % 12);
            let name: Vec<u8> = bytes.by_ref().take(length).collect();
            tree.extend(format!("{mode} ").bytes().chain(name).chain([0]));
            tree.extend(hex::decode(target.to_string()).expect("an id"));
        }
        root = add(&mut objects, ObjectKind::Tree, tree);
        ids.push(root);
    }
    let commit = add(&mut objects, ObjectKind::Commit, format!("tree {root}\n\nwords\n").into_bytes());
    (objects, commit)
}

fn limits() -> Limits {
    Limits {
        entries_max: 2000,
        ..Limits::default()
    }
}

fn taken(answers: impl Read, questions: impl Write, commit: ObjectId) {
    let memory = Path::new("/dev/shm");
    let outer = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    let outer = outer.expect("a folder");
    let dir = outer.path().join("commit");
    std::fs::create_dir(&dir).expect("a folder");
    let _result = receive(answers, questions, commit, &dir, limits(), &mut |_| ());
    let around: Vec<_> = std::fs::read_dir(outer.path()).expect("lists").collect();
    assert_eq!(around.len(), 1, "something was written beside the folder: {around:?}");
    assert!(!dir.join(".git").exists());
}

fuzz_target!(|input: &[u8]| {
    let Some((first, rest)) = input.split_first() else {
        return;
    };
    if first % 2 == 0 {
        let (objects, commit) = repository(rest.iter().copied());
        let git = Git {
            objects: Rc::new(objects),
            asked: Rc::default(),
            answers: Rc::default(),
        };
        taken(git.clone(), git, commit);
        return;
    }
    let id = ObjectId::from_bytes([7; 20]);
    if let Ok(entries) = parse_tree(id, rest) {
        for entry in entries {
            assert!(!entry.name.is_empty() && !entry.name.contains(&b'/') && !entry.name.contains(&0));
        }
    }
    let _tree = tree_of_commit(id, rest);
    let commit = format!("tree {id}\n\nx\n");
    let commit_id = id_of(ObjectKind::Commit, commit.as_bytes()).expect("no collision");
    let mut answers = format!("{commit_id} commit {}\n{commit}\n", commit.len()).into_bytes();
    answers.extend_from_slice(rest);
    taken(&answers[..], io::sink(), commit_id);
    taken(rest, io::sink(), commit_id);
});
