//! A filesystem tree as an index over a tar file: filter it, add to it, split it, write it normalised.
//!
//! Normalised means: sorted by path, one fixed time, numeric owners only, no device nodes, hard links kept. Two trees
//! with the same content give the same bytes. Contents stay in the tar on disk; memory holds only the index.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

/// Time of every entry: 2025-01-01, after 1980 so that zip tools accept it, before any clock that matters.
pub const MTIME: u64 = 1_735_689_600;
/// Most entries a tree may have.
const ENTRIES_MAX: usize = 500_000;

/// Why a tree cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The tar file cannot be read.
    #[error("cannot read the tree {}", .path.display())]
    Read {
        /// The tar file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tar file has something a root tree does not have.
    #[error("the tree {} has {what}", .path.display())]
    Content {
        /// The tar file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A pattern of a recipe is not a glob.
    #[error("the pattern {0:?} of the recipe is not valid")]
    Pattern(String, #[source] globset::Error),
    /// The output cannot be written.
    #[error("cannot write the tree entry {path:?}")]
    Write {
        /// Path of the entry.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Content of a file of the tree.
#[derive(Clone, Debug)]
pub enum Content {
    /// In memory.
    Bytes(Arc<[u8]>),
    /// A part of an open file.
    Slice {
        /// The file.
        file: Arc<File>,
        /// Where the content starts; with the file it identifies the inode for hard links.
        offset: u64,
        /// How long it is.
        len: u64,
    },
}

impl Content {
    /// The whole of a file on disk.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok(Self::Slice {
            file: Arc::new(file),
            offset: 0,
            len,
        })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Slice { len, .. } => *len,
        }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads all of it.
    ///
    /// # Errors
    /// When the underlying file cannot be read.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader().read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn reader(&self) -> ContentReader<'_> {
        ContentReader {
            content: self,
            at: 0,
        }
    }

    fn identity(&self) -> Option<(usize, u64)> {
        match self {
            Self::Slice { file, offset, len } if *len > 0 => {
                Some((Arc::as_ptr(file) as usize, *offset))
            }
            _ => None,
        }
    }
}

struct ContentReader<'a> {
    content: &'a Content,
    at: u64,
}

impl Read for ContentReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.content.len() - self.at).unwrap_or(usize::MAX);
        let want = left.min(buffer.len());
        let got = match self.content {
            Content::Bytes(bytes) => {
                let start = usize::try_from(self.at).map_err(io::Error::other)?;
                buffer[..want].copy_from_slice(&bytes[start..start + want]);
                want
            }
            Content::Slice { file, offset, .. } => {
                file.read_at(&mut buffer[..want], offset + self.at)?
            }
        };
        if got == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += got as u64;
        Ok(got)
    }
}

/// What an entry is.
#[derive(Clone, Debug)]
pub enum Body {
    /// A directory.
    Directory,
    /// A symbolic link and where it points.
    Symlink(String),
    /// A regular file.
    File(Content),
}

/// One entry.
#[derive(Clone, Debug)]
pub struct Node {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// What it is.
    pub body: Body,
}

impl Node {
    /// A directory of root's with mode 0755.
    #[must_use]
    pub fn directory() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            body: Body::Directory,
        }
    }

    /// A file of root's.
    #[must_use]
    pub fn file(mode: u32, content: Content) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            body: Body::File(content),
        }
    }

    /// A small file of root's with mode 0644.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self::file(0o644, Content::Bytes(text.as_bytes().into()))
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(target: &str) -> Self {
        Self {
            mode: 0o777,
            uid: 0,
            gid: 0,
            body: Body::Symlink(target.to_owned()),
        }
    }
}

/// Paths (relative, no leading or trailing slash) and their entries, sorted.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Indexes a tar file of a root tree. Device nodes, sockets and pipes are left out.
    ///
    /// # Errors
    /// When it cannot be read, names are not UTF-8 or leave the tree, or a hard link has no target.
    pub fn from_tar(path: &Path) -> Result<Self, TreeError> {
        let read = |source| TreeError::Read {
            path: path.to_owned(),
            source,
        };
        let content = |what: String| TreeError::Content {
            path: path.to_owned(),
            what,
        };
        let file = Arc::new(File::open(path).map_err(read)?);
        let mut archive = tar::Archive::new(io::BufReader::with_capacity(1 << 20, &*file));
        let mut tree = Self::default();
        for entry in archive.entries_with_seek().map_err(read)? {
            let entry = entry.map_err(read)?;
            let raw = String::from_utf8(entry.path_bytes().into_owned());
            let raw = raw.map_err(|_| content("a name that is not UTF-8".to_owned()))?;
            let name = clean(&raw).ok_or_else(|| content(format!("the name {raw:?}")))?;
            if name.is_empty() {
                continue;
            }
            let link = || -> Result<String, TreeError> {
                let bytes = entry.link_name_bytes().unwrap_or_default().into_owned();
                String::from_utf8(bytes).map_err(|_| content(format!("a bad link at {raw:?}")))
            };
            let header = entry.header();
            let kind = header.entry_type();
            let body = if kind.is_dir() {
                Body::Directory
            } else if kind.is_symlink() {
                Body::Symlink(link()?)
            } else if kind.is_hard_link() {
                let target = clean(&link()?).and_then(|target| tree.nodes.get(&target));
                let body = target.map(|node| node.body.clone());
                body.ok_or_else(|| content(format!("a hard link without target at {raw:?}")))?
            } else if kind.is_file() {
                let offset = entry.raw_file_position();
                Body::File(Content::Slice {
                    file: Arc::clone(&file),
                    offset,
                    len: entry.size(),
                })
            } else {
                continue;
            };
            let node = Node {
                mode: header.mode().map_err(read)? & 0o7777,
                uid: header.uid().map_err(read)?,
                gid: header.gid().map_err(read)?,
                body,
            };
            if tree.nodes.len() >= ENTRIES_MAX {
                return Err(content(format!("more than {ENTRIES_MAX} entries")));
            }
            tree.nodes.insert(name, node);
        }
        Ok(tree)
    }

    /// The entry at a path.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// The entry a path leads to, following a symbolic link of its first directory (`lib -> usr/lib`).
    #[must_use]
    pub fn real_path(&self, path: &str) -> String {
        let path = path.trim_matches('/');
        if let Some((first, rest)) = path.split_once('/')
            && let Some(Node {
                body: Body::Symlink(target),
                ..
            }) = self.nodes.get(first)
        {
            return format!("{}/{rest}", target.trim_matches('/'));
        }
        path.to_owned()
    }

    /// Content of the file at a path, when there is one.
    #[must_use]
    pub fn content(&self, path: &str) -> Option<&Content> {
        match self.nodes.get(path).map(|node| &node.body) {
            Some(Body::File(content)) => Some(content),
            _ => None,
        }
    }

    /// Adds or replaces an entry, and directories above it that are missing.
    pub fn insert(&mut self, path: &str, node: Node) {
        let path = path.trim_matches('/');
        for (at, _) in path.match_indices('/') {
            self.nodes
                .entry(path[..at].to_owned())
                .or_insert_with(Node::directory);
        }
        self.nodes.insert(path.to_owned(), node);
    }

    /// All paths and entries, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// How many entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether it has no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Bytes a filesystem with blocks of 4 KiB needs for the contents.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        let mut seen = std::collections::HashSet::new();
        let mut bytes = 0;
        for node in self.nodes.values() {
            bytes += match &node.body {
                Body::File(content) => match content.identity() {
                    Some(identity) if !seen.insert(identity) => 0,
                    _ => content.len().next_multiple_of(4096),
                },
                Body::Directory => 4096,
                Body::Symlink(target) if target.len() > 59 => 4096,
                Body::Symlink(_) => 0,
            };
        }
        bytes
    }

    /// Removes entries for which `drop` says so. Directories whose content is dropped stay.
    pub fn remove_where(&mut self, drop: impl Fn(&str) -> bool) {
        self.nodes.retain(|path, _| !drop(path));
    }

    /// The entries `keep` chooses, with the directories above them.
    #[must_use]
    pub fn subtree(&self, keep: impl Fn(&str) -> bool) -> Self {
        let mut chosen = Self::default();
        for (path, node) in &self.nodes {
            if !keep(path) {
                continue;
            }
            for (at, _) in path.match_indices('/') {
                if let Some(parent) = self.nodes.get(&path[..at])
                    && !chosen.nodes.contains_key(&path[..at])
                {
                    chosen.nodes.insert(path[..at].to_owned(), parent.clone());
                }
            }
            chosen.nodes.insert(path.clone(), node.clone());
        }
        chosen
    }

    /// Writes the tree as a normalised tar.
    ///
    /// # Errors
    /// When a content cannot be read or the output cannot be written.
    pub fn write_tar(&self, out: impl Write) -> Result<(), TreeError> {
        let mut builder = tar::Builder::new(out);
        let mut links: HashMap<(usize, u64), &str> = HashMap::new();
        for (path, node) in &self.nodes {
            let fail = |source| TreeError::Write {
                path: path.clone(),
                source,
            };
            let mut header = tar::Header::new_gnu();
            header.set_mode(node.mode);
            header.set_uid(node.uid);
            header.set_gid(node.gid);
            header.set_mtime(MTIME);
            header.set_size(0);
            match &node.body {
                Body::Directory => {
                    header.set_entry_type(tar::EntryType::Directory);
                    builder
                        .append_data(&mut header, format!("{path}/"), io::empty())
                        .map_err(fail)?;
                }
                Body::Symlink(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    builder
                        .append_link(&mut header, path, target)
                        .map_err(fail)?;
                }
                Body::File(content) => {
                    let first = content.identity().and_then(|identity| {
                        let first = *links.entry(identity).or_insert(path);
                        (first != path).then_some(first)
                    });
                    if let Some(first) = first {
                        header.set_entry_type(tar::EntryType::Link);
                        builder
                            .append_link(&mut header, path, first)
                            .map_err(fail)?;
                    } else {
                        header.set_entry_type(tar::EntryType::Regular);
                        header.set_size(content.len());
                        let reader = content.reader();
                        builder
                            .append_data(&mut header, path, reader)
                            .map_err(fail)?;
                    }
                }
            }
        }
        let fail = |source| TreeError::Write {
            path: "end".to_owned(),
            source,
        };
        builder.into_inner().map_err(fail)?.flush().map_err(fail)
    }
}

/// A relative path without `.`, `..` and doubled slashes; `None` when it leaves the tree.
fn clean(path: &str) -> Option<String> {
    let parts = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".");
    let parts: Vec<_> = parts.collect();
    (!parts.contains(&"..")).then(|| parts.join("/"))
}

/// A set of path patterns: `*` and `?` stay within a directory, `**` crosses them.
///
/// # Errors
/// When a pattern is not a glob.
pub fn patterns(texts: &[String]) -> Result<GlobSet, TreeError> {
    let mut set = GlobSetBuilder::new();
    for text in texts {
        let glob = GlobBuilder::new(text).literal_separator(true).build();
        set.add(glob.map_err(|source| TreeError::Pattern(text.clone(), source))?);
    }
    set.build()
        .map_err(|source| TreeError::Pattern(texts.join(" "), source))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar in a given order of entries, as a bootstrap tool might write it.
    fn sample(reverse: bool, mtime: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let mut builder = tar::Builder::new(file.reopen().expect("it opens"));
        let mut names = vec!["./b", "./dir/a", "./dir/longer"];
        if reverse {
            names.reverse();
        }
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_mtime(mtime);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(name.len() as u64);
            header.set_entry_type(tar::EntryType::Regular);
            builder
                .append_data(&mut header, name, name.as_bytes())
                .expect("writable");
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(mtime);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Link);
        builder
            .append_link(&mut header, "./z", "./b")
            .expect("writable");
        header.set_entry_type(tar::EntryType::Char);
        builder
            .append_data(&mut header, "./null", io::empty())
            .expect("writable");
        builder.finish().expect("writable");
        file
    }

    fn bytes(tree: &Tree) -> Vec<u8> {
        let mut out = Vec::new();
        tree.write_tar(&mut out).expect("memory takes it");
        out
    }

    #[test]
    fn order_and_times_of_the_input_do_not_matter() {
        let one = Tree::from_tar(sample(false, 5).path()).expect("a tree");
        let two = Tree::from_tar(sample(true, 9).path()).expect("a tree");
        assert_eq!(bytes(&one), bytes(&two));
        assert!(one.get("null").is_none(), "device nodes are left out");
    }

    #[test]
    fn hard_links_stay_links_and_survive_their_first_name() {
        let mut tree = Tree::from_tar(sample(false, 5).path()).expect("a tree");
        let count = |tree: &Tree| {
            let out = bytes(tree);
            let mut archive = tar::Archive::new(&out[..]);
            let entries = archive.entries().expect("a tar");
            entries
                .filter(|e| {
                    e.as_ref()
                        .expect("readable")
                        .header()
                        .entry_type()
                        .is_hard_link()
                })
                .count()
        };
        assert_eq!(count(&tree), 1);
        tree.remove_where(|path| path == "b");
        assert_eq!(count(&tree), 0);
        assert_eq!(
            tree.content("z")
                .expect("still there")
                .bytes()
                .expect("readable"),
            b"./b"
        );
    }

    #[test]
    fn a_subtree_brings_the_directories_above() {
        let mut tree = Tree::default();
        tree.insert("a/b/c", Node::text("x"));
        tree.insert("a/d", Node::text("y"));
        let part = tree.subtree(|path| path == "a/b/c");
        assert_eq!(
            part.iter().map(|(path, _)| path).collect::<Vec<_>>(),
            ["a", "a/b", "a/b/c"]
        );
    }

    #[test]
    fn paths_through_a_merged_usr_are_found() {
        let mut tree = Tree::default();
        tree.insert("lib", Node::symlink("usr/lib"));
        assert_eq!(tree.real_path("/lib/x/y"), "usr/lib/x/y");
        assert_eq!(tree.real_path("/etc/x"), "etc/x");
    }

    #[test]
    fn names_that_leave_the_tree_are_refused() {
        assert_eq!(clean("./a//b/"), Some("a/b".to_owned()));
        assert_eq!(clean("a/../../b"), None);
    }

    #[test]
    fn patterns_cross_directories_only_with_two_stars() {
        let set = patterns(&["a/*".to_owned(), "b/**".to_owned()]).expect("globs");
        assert!(set.is_match("a/x") && !set.is_match("a/x/y") && set.is_match("b/x/y"));
        assert!(patterns(&["[".to_owned()]).is_err());
    }
}
