//! The conversation with a `git cat-file --batch`: asks for a commit, its trees and its blobs, checks the id of each, and
//! writes the files.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{BufReader, Read, Write};
use std::path::Path;

use super::error::GitTreeError;
use super::layout::{Layout, Node, NodeKind, Trees, shown};
use super::object::{
    EntryMode, IdHasher, ObjectId, ObjectKind, TreeEntry, parse_tree, tree_of_commit,
};
use super::write::Folder;
use crate::context::Limits;

/// Most bytes of a commit.
pub const COMMIT_BYTES_MAX: u64 = 4 << 20;
/// Most bytes of one tree.
pub const TREE_BYTES_MAX: u64 = 64 << 20;
/// Longest target of a symbolic link (Linux's limit, without the closing zero).
const LINK_BYTES_MAX: u64 = 4095;
/// Most objects asked for and not yet received. Their questions fit any pipe: asking never blocks.
const ASKED_MAX: usize = 256;
/// Longest first line of an answer.
const HEADER_BYTES_MAX: usize = 128;
/// Buffer for reading, bytes.
const BUFFER_BYTES: usize = 256 * 1024;
/// Most paths that a remark names.
const NAMED_MAX: usize = 5;
/// First bytes of a pointer that Git LFS leaves in place of a file.
const LFS_MARK: &[u8] = b"version https://git-lfs.github.com/spec/";
/// Longest such pointer (Git LFS's own limit).
const LFS_BYTES_MAX: u64 = 1024;

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Blobs received.
    pub blobs: u64,
    /// Blobs in all.
    pub blobs_all: u64,
    /// Bytes received.
    pub bytes: u64,
}

/// What was received and written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// The commit asked for.
    pub commit: ObjectId,
    /// Its tree.
    pub tree: ObjectId,
    /// Files and links written.
    pub files: u64,
    /// Bytes of files written.
    pub bytes: u64,
    /// Folders left empty because another repository belongs there: how many, and the first few.
    pub submodules: (u64, Vec<String>),
    /// Files that are only pointers to what Git LFS keeps: how many, and the first few.
    pub lfs_pointers: (u64, Vec<String>),
}

/// Takes the files of `commit` into the empty folder `dir`. `answers` and `questions` are standard output and input of
/// `git cat-file --batch`, unbuffered on git's side. Blocks.
///
/// # Errors
/// See [`GitTreeError`]; the folder is then not to be used.
pub fn receive(
    answers: impl Read,
    questions: impl Write,
    commit: ObjectId,
    dir: &Path,
    limits: Limits,
    progress: &mut dyn FnMut(Progress),
) -> Result<Received, GitTreeError> {
    let mut folder = Folder::open(dir)?;
    let mut batch = Batch {
        answers: BufReader::with_capacity(BUFFER_BYTES, answers),
        questions,
    };
    batch.ask(commit)?;
    let bytes = batch.whole(commit, ObjectKind::Commit, COMMIT_BYTES_MAX)?;
    let tree = tree_of_commit(commit, &bytes)?;
    let layout = batch.trees(tree, limits)?;
    let mut job = Job {
        folder: &mut folder,
        limits,
        received: Received::new(commit, tree),
        links: Vec::new(),
    };
    job.folders(&layout)?;
    job.blobs(&mut batch, &layout, progress)?;
    // Last, when nothing more is written: no path can lead through them.
    for (path, target) in std::mem::take(&mut job.links) {
        job.folder.link(path, &target)?;
    }
    Ok(job.received)
}

/// Takes these files of `commit` alone, each of at most `bytes_max` bytes; names that it does not have are left out. `answers` and `questions`
/// as in [`receive`]. Blocks.
///
/// # Errors
/// See [`GitTreeError`]; a name that is a link or a folder is refused, not left out.
pub fn read_files(
    answers: impl Read,
    questions: impl Write,
    commit: ObjectId,
    names: &[&str],
    bytes_max: u64,
) -> Result<BTreeMap<String, Vec<u8>>, GitTreeError> {
    let mut batch = Batch {
        answers: BufReader::with_capacity(BUFFER_BYTES, answers),
        questions,
    };
    batch.ask(commit)?;
    let bytes = batch.whole(commit, ObjectKind::Commit, COMMIT_BYTES_MAX)?;
    let root = batch.tree(tree_of_commit(commit, &bytes)?)?;
    let mut files = BTreeMap::new();
    for name in names {
        if let Some(bytes) = batch.file(&root, name, bytes_max)? {
            files.insert((*name).to_owned(), bytes);
        }
    }
    Ok(files)
}

impl Received {
    fn new(commit: ObjectId, tree: ObjectId) -> Self {
        Self {
            commit,
            tree,
            files: 0,
            bytes: 0,
            submodules: (0, Vec::new()),
            lfs_pointers: (0, Vec::new()),
        }
    }
}

fn note(list: &mut (u64, Vec<String>), path: &[u8]) {
    list.0 += 1;
    if list.1.len() < NAMED_MAX {
        list.1.push(shown(path));
    }
}

/// Both ends of a `git cat-file --batch`.
struct Batch<R, W> {
    answers: BufReader<R>,
    questions: W,
}

impl<R: Read, W: Write> Batch<R, W> {
    fn ask(&mut self, id: ObjectId) -> Result<(), GitTreeError> {
        let asked = self
            .questions
            .write_all(format!("{id}\n").as_bytes())
            .and_then(|()| self.questions.flush());
        asked.map_err(GitTreeError::Ask)
    }

    /// First line of the answer to the oldest question: the object's size.
    fn header(&mut self, id: ObjectId, expected: ObjectKind) -> Result<u64, GitTreeError> {
        let batch = |why| GitTreeError::Batch { id, why };
        let mut line = Vec::with_capacity(HEADER_BYTES_MAX);
        loop {
            let mut byte = [0];
            self.answers
                .read_exact(&mut byte)
                .map_err(GitTreeError::Read)?;
            if byte[0] == b'\n' {
                break;
            }
            if line.len() == HEADER_BYTES_MAX {
                return Err(batch("a first line without end"));
            }
            line.push(byte[0]);
        }
        let line = std::str::from_utf8(&line).map_err(|_| batch("a first line that is no text"))?;
        let rest = line
            .strip_prefix(&id.to_string())
            .ok_or_else(|| batch("an answer about something else"))?;
        let rest = rest
            .strip_prefix(' ')
            .ok_or_else(|| batch("a first line without a kind"))?;
        if rest == "missing" {
            return Err(GitTreeError::Missing { id });
        }
        let (kind, size) = rest
            .split_once(' ')
            .ok_or_else(|| batch("a first line without a size"))?;
        let found = ObjectKind::parse(kind).ok_or_else(|| batch("an unknown kind"))?;
        if found != expected {
            return Err(GitTreeError::Kind {
                id,
                expected,
                found,
            });
        }
        let digits = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_digit());
        size.parse()
            .ok()
            .filter(|_| digits)
            .ok_or_else(|| batch("a size that is no number"))
    }

    /// The object's bytes, piece by piece, hashed on the way; gives an error unless they have the id.
    fn body(
        &mut self,
        id: ObjectId,
        kind: ObjectKind,
        size: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<(), GitTreeError>,
    ) -> Result<(), GitTreeError> {
        let mut hasher = IdHasher::new(kind, size);
        let mut buffer =
            vec![0; usize::try_from(size.min(BUFFER_BYTES as u64)).unwrap_or(BUFFER_BYTES)];
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            let piece = &mut buffer[..most];
            self.answers.read_exact(piece).map_err(GitTreeError::Read)?;
            hasher.update(piece);
            take(piece)?;
            left -= most as u64;
        }
        let mut end = [0];
        self.answers
            .read_exact(&mut end)
            .map_err(GitTreeError::Read)?;
        if end != *b"\n" {
            return Err(GitTreeError::Batch {
                id,
                why: "an object that does not end where it should",
            });
        }
        hasher.expect(id)
    }

    /// A whole object, of at most this many bytes.
    fn whole(&mut self, id: ObjectId, kind: ObjectKind, max: u64) -> Result<Vec<u8>, GitTreeError> {
        let size = self.header(id, kind)?;
        if size > max {
            let what = match kind {
                ObjectKind::Tree => "bytes in one folder's list",
                ObjectKind::Blob => "bytes in one symbolic link",
                _ => "bytes in the commit itself",
            };
            return Err(GitTreeError::Limit { what, limit: max });
        }
        let mut bytes = Vec::new();
        self.body(id, kind, size, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }

    fn tree(&mut self, id: ObjectId) -> Result<Vec<TreeEntry>, GitTreeError> {
        self.ask(id)?;
        let bytes = self.whole(id, ObjectKind::Tree, TREE_BYTES_MAX)?;
        parse_tree(id, &bytes)
    }

    /// The file of this name below a tree, if there is one.
    fn file(
        &mut self,
        root: &[TreeEntry],
        name: &str,
        bytes_max: u64,
    ) -> Result<Option<Vec<u8>>, GitTreeError> {
        let refuse = |why| GitTreeError::Name {
            path: name.to_owned(),
            why,
        };
        let mut below;
        let mut entries = root;
        let mut parts = name.split('/').peekable();
        while let Some(part) = parts.next() {
            let found = entries.iter().find(|entry| *entry.name == *part.as_bytes());
            let Some(entry) = found else { return Ok(None) };
            match (entry.mode, parts.peek().is_none()) {
                (EntryMode::Link, _) => {
                    return Err(refuse("it is a symbolic link, and those are not followed"));
                }
                (EntryMode::Tree, false) => {
                    below = self.tree(entry.id)?;
                    entries = &below;
                }
                (EntryMode::File | EntryMode::Executable, true) => {
                    self.ask(entry.id)?;
                    let size = self.header(entry.id, ObjectKind::Blob)?;
                    if size > bytes_max {
                        return Err(refuse("it is too large"));
                    }
                    let mut bytes = Vec::new();
                    self.body(entry.id, ObjectKind::Blob, size, &mut |piece| {
                        bytes.extend_from_slice(piece);
                        Ok(())
                    })?;
                    return Ok(Some(bytes));
                }
                (EntryMode::Tree | EntryMode::Submodule, true) => {
                    return Err(refuse("it is not a file"));
                }
                (EntryMode::File | EntryMode::Executable | EntryMode::Submodule, false) => {
                    return Ok(None);
                }
            }
        }
        Ok(None)
    }

    /// All trees below a root, as paths.
    fn trees(&mut self, root: ObjectId, limits: Limits) -> Result<Layout, GitTreeError> {
        let mut trees = Trees::new(root, limits);
        let mut to_ask = VecDeque::new();
        let mut asked = VecDeque::new();
        loop {
            to_ask.extend(trees.take_wanted());
            while asked.len() < ASKED_MAX
                && let Some(id) = to_ask.pop_front()
            {
                self.ask(id)?;
                asked.push_back(id);
            }
            let Some(id) = asked.pop_front() else { break };
            let bytes = self.whole(id, ObjectKind::Tree, TREE_BYTES_MAX)?;
            trees.add(id, &bytes)?;
        }
        trees.layout()
    }
}

/// Where one blob goes.
#[derive(Default)]
struct Places<'a> {
    files: Vec<(&'a [u8], bool)>,
    links: Vec<&'a [u8]>,
}

struct Job<'a, 'l> {
    folder: &'a mut Folder,
    limits: Limits,
    received: Received,
    links: Vec<(&'l [u8], Vec<u8>)>,
}

impl<'l> Job<'_, 'l> {
    fn folders(&mut self, layout: &'l Layout) -> Result<(), GitTreeError> {
        for Node { path, kind } in &layout.nodes {
            match kind {
                NodeKind::Folder => self.folder.folder(path)?,
                NodeKind::Submodule => {
                    self.folder.folder(path)?;
                    note(&mut self.received.submodules, path);
                }
                NodeKind::File { .. } | NodeKind::Link { .. } => {}
            }
        }
        Ok(())
    }

    fn blobs<R: Read, W: Write>(
        &mut self,
        batch: &mut Batch<R, W>,
        layout: &'l Layout,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), GitTreeError> {
        let mut order = Vec::new();
        let mut places: HashMap<ObjectId, Places<'l>> = HashMap::new();
        for Node { path, kind } in &layout.nodes {
            let (blob, executable) = match *kind {
                NodeKind::File { blob, executable } => (blob, Some(executable)),
                NodeKind::Link { blob } => (blob, None),
                NodeKind::Folder | NodeKind::Submodule => continue,
            };
            let place = places.entry(blob).or_insert_with(|| {
                order.push(blob);
                Places::default()
            });
            match executable {
                Some(executable) => place.files.push((path, executable)),
                None => place.links.push(path),
            }
        }
        let mut now = Progress {
            blobs: 0,
            blobs_all: order.len() as u64,
            bytes: 0,
        };
        let mut asked = 0;
        for (at, blob) in order.iter().enumerate() {
            while asked < order.len() && asked - at < ASKED_MAX {
                batch.ask(order[asked])?;
                asked += 1;
            }
            let place = places.remove(blob).unwrap_or_default();
            self.blob(batch, *blob, &place)?;
            now = Progress {
                blobs: now.blobs + 1,
                bytes: self.received.bytes,
                ..now
            };
            progress(now);
        }
        Ok(())
    }

    /// Receives one blob and puts it where it belongs.
    fn blob<R: Read, W: Write>(
        &mut self,
        batch: &mut Batch<R, W>,
        id: ObjectId,
        place: &Places<'l>,
    ) -> Result<(), GitTreeError> {
        self.received.files += (place.files.len() + place.links.len()) as u64;
        let Some(((path, executable), more)) = place.files.split_first() else {
            let target = batch.whole(id, ObjectKind::Blob, LINK_BYTES_MAX)?;
            return self.link(&place.links, &target);
        };
        let size = batch.header(id, ObjectKind::Blob)?;
        self.received.bytes = self
            .received
            .bytes
            .saturating_add(size.saturating_mul(place.files.len() as u64));
        if self.received.bytes > self.limits.bytes_max {
            return Err(GitTreeError::Limit {
                what: "bytes of files",
                limit: self.limits.bytes_max,
            });
        }
        let mut file = self.folder.file(path, *executable)?;
        // A short blob is kept: it may be a link's target somewhere else, or a pointer of Git LFS.
        let mut short = (size <= LINK_BYTES_MAX).then(Vec::new);
        batch.body(id, ObjectKind::Blob, size, &mut |piece| {
            if let Some(short) = &mut short {
                short.extend_from_slice(piece);
            }
            file.write_all(piece).map_err(|source| GitTreeError::Write {
                path: shown(path),
                source,
            })
        })?;
        for (other, executable) in more {
            self.folder.copy(path, other, *executable)?;
        }
        let short = short.unwrap_or_default();
        if size <= LFS_BYTES_MAX && short.starts_with(LFS_MARK) {
            for (path, _) in &place.files {
                note(&mut self.received.lfs_pointers, path);
            }
        }
        if place.links.is_empty() {
            return Ok(());
        }
        if size > LINK_BYTES_MAX {
            return Err(GitTreeError::Limit {
                what: "bytes in one symbolic link",
                limit: LINK_BYTES_MAX,
            });
        }
        self.link(&place.links, &short)
    }

    fn link(&mut self, paths: &[&'l [u8]], target: &[u8]) -> Result<(), GitTreeError> {
        for path in paths {
            if target.is_empty() || target.contains(&0) {
                return Err(GitTreeError::Name {
                    path: shown(path),
                    why: "it is a symbolic link to nothing",
                });
            }
            self.links.push((path, target.to_vec()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
