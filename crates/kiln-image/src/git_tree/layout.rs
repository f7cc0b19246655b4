//! From verified trees to paths: which folders, files and links a commit holds, within limits, with names that are safe
//! to make.
//!
//! One tree may stand in many places, so a few small trees can name more paths than any disk has room for: paths are
//! counted as they come up, never first collected.

use std::collections::HashMap;

use super::error::GitTreeError;
use super::object::{EntryMode, ObjectId, TreeEntry, parse_tree};
use crate::context::Limits;

/// Most bytes of all paths together.
const ALL_PATHS_BYTES_MAX: usize = 256 << 20;

/// The trees of a commit, as far as they are known.
#[derive(Debug)]
pub struct Trees {
    root: ObjectId,
    known: HashMap<ObjectId, Vec<TreeEntry>>,
    wanted: Vec<ObjectId>,
    entries: u64,
    limits: Limits,
}

/// What is made at a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeKind {
    /// A folder.
    Folder,
    /// A file of a blob's bytes.
    File {
        /// The blob.
        blob: ObjectId,
        /// Whether it may be executed.
        executable: bool,
    },
    /// A symbolic link to what a blob says.
    Link {
        /// The blob.
        blob: ObjectId,
    },
    /// A commit of another repository: an empty folder, as git leaves it.
    Submodule,
}

/// One path of a commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// From the commit's root, `/` between names; every name is safe.
    pub path: Box<[u8]>,
    /// What is there.
    pub kind: NodeKind,
}

/// All paths of a commit, a folder before what is in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// The paths.
    pub nodes: Vec<Node>,
}

impl Trees {
    /// None known yet but the root's id.
    #[must_use]
    pub fn new(root: ObjectId, limits: Limits) -> Self {
        Self {
            root,
            known: HashMap::new(),
            wanted: vec![root],
            entries: 0,
            limits,
        }
    }

    /// Trees that are named and not known; each is given out once.
    pub fn take_wanted(&mut self) -> Vec<ObjectId> {
        std::mem::take(&mut self.wanted)
    }

    /// Adds a tree whose bytes were found to have this id.
    ///
    /// # Errors
    /// When it is malformed, or there are too many entries.
    pub fn add(&mut self, id: ObjectId, bytes: &[u8]) -> Result<(), GitTreeError> {
        let entries = parse_tree(id, bytes)?;
        self.entries += entries.len() as u64;
        if self.entries > self.limits.entries_max {
            return Err(self.too_many());
        }
        for entry in entries.iter().filter(|entry| entry.mode == EntryMode::Tree) {
            // An empty list marks what was asked for: no tree is asked for twice.
            if entry.id != id && !self.known.contains_key(&entry.id) {
                self.known.insert(entry.id, Vec::new());
                self.wanted.push(entry.id);
            }
        }
        self.known.insert(id, entries);
        Ok(())
    }

    fn too_many(&self) -> GitTreeError {
        GitTreeError::Limit {
            what: "files and folders",
            limit: self.limits.entries_max,
        }
    }

    /// All paths.
    ///
    /// # Errors
    /// Unsafe names, or more of them than the limits allow.
    pub fn layout(self) -> Result<Layout, GitTreeError> {
        let mut nodes = Vec::new();
        let mut paths_bytes = 0;
        // Folders whose entries are still to come: the tree, the next entry, the length of its path.
        let mut open: Vec<(ObjectId, usize, usize)> = vec![(self.root, 0, 0)];
        let mut path: Vec<u8> = Vec::new();
        while let Some((id, at, length)) = open.pop() {
            path.truncate(length);
            let Some(entry) = self.known.get(&id).and_then(|entries| entries.get(at)) else {
                continue;
            };
            open.push((id, at + 1, length));
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&entry.name);
            check_name(&entry.name, &path)?;
            if path.len() > self.limits.path_bytes_max {
                let limit = self.limits.path_bytes_max as u64;
                return Err(GitTreeError::Limit {
                    what: "bytes in one path",
                    limit,
                });
            }
            paths_bytes += path.len();
            if paths_bytes > ALL_PATHS_BYTES_MAX {
                return Err(GitTreeError::Limit {
                    what: "bytes in all paths",
                    limit: ALL_PATHS_BYTES_MAX as u64,
                });
            }
            if nodes.len() as u64 >= self.limits.entries_max {
                return Err(self.too_many());
            }
            let kind = match entry.mode {
                EntryMode::File => NodeKind::File {
                    blob: entry.id,
                    executable: false,
                },
                EntryMode::Executable => NodeKind::File {
                    blob: entry.id,
                    executable: true,
                },
                EntryMode::Link => NodeKind::Link { blob: entry.id },
                EntryMode::Submodule => NodeKind::Submodule,
                EntryMode::Tree => {
                    open.push((entry.id, 0, path.len()));
                    NodeKind::Folder
                }
            };
            nodes.push(Node {
                path: path.clone().into(),
                kind,
            });
        }
        Ok(Layout { nodes })
    }
}

/// Names that would leave the folder, or make it look like a repository. The parser has refused `/` and empty ones.
fn check_name(name: &[u8], path: &[u8]) -> Result<(), GitTreeError> {
    let refuse = |why| {
        Err(GitTreeError::Name {
            path: shown(path),
            why,
        })
    };
    match name {
        b"." | b".." => refuse("it would leave the folder"),
        name if name.eq_ignore_ascii_case(b".git") => refuse("git keeps its own files there"),
        name if name.len() > 255 => refuse("a name has at most 255 bytes"),
        _ => Ok(()),
    }
}

/// A path for people.
pub(super) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(400)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::object::{ObjectKind, id_of};
    use super::*;

    fn tree(entries: &[(&str, &[u8], ObjectId)]) -> (ObjectId, Vec<u8>) {
        let mut bytes = Vec::new();
        for (mode, name, id) in entries {
            bytes.extend(mode.bytes());
            bytes.push(b' ');
            bytes.extend_from_slice(name);
            bytes.push(0);
            bytes.extend(hex::decode(id.to_string()).expect("hex"));
        }
        (
            id_of(ObjectKind::Tree, &bytes).expect("no collision"),
            bytes,
        )
    }

    fn blob() -> ObjectId {
        ObjectId::from_bytes([3; 20])
    }

    fn layout(trees: &[(ObjectId, Vec<u8>)], limits: Limits) -> Result<Vec<String>, GitTreeError> {
        let (root, _) = trees[0];
        let mut walk = Trees::new(root, limits);
        loop {
            let wanted = walk.take_wanted();
            if wanted.is_empty() {
                break;
            }
            for id in wanted {
                let (_, bytes) = trees.iter().find(|(known, _)| *known == id).expect("known");
                walk.add(id, bytes)?;
            }
        }
        Ok(walk
            .layout()?
            .nodes
            .iter()
            .map(|node| String::from_utf8_lossy(&node.path).into_owned())
            .collect())
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let inner = tree(&[("100644", b"x", blob())]);
        let outer = tree(&[
            ("100644", b"a", blob()),
            ("40000", b"d", inner.0),
            ("40000", b"e", inner.0),
            ("160000", b"s", blob()),
        ]);
        let paths = layout(&[outer, inner], Limits::default()).expect("legal");
        assert_eq!(paths, ["a", "d", "d/x", "e", "e/x", "s"]);
    }

    #[test]
    fn unsafe_names_are_refused() {
        for name in [&b".."[..], b".", b".git", b".GIT", b".gIt", &[b'n'; 256]] {
            let root = tree(&[("100644", name, blob())]);
            let error = layout(&[root], Limits::default()).expect_err("unsafe");
            assert!(matches!(error, GitTreeError::Name { .. }), "{error}");
        }
        let fine = tree(&[
            ("100644", b".gitignore", blob()),
            ("100644", b"new\nline", blob()),
            ("100644", b"\xff", blob()),
        ]);
        assert_eq!(layout(&[fine], Limits::default()).expect("legal").len(), 3);
    }

    #[test]
    fn a_few_trees_with_endless_paths_are_limited() {
        let mut trees = vec![tree(&[("100644", b"f", blob())])];
        for _ in 0..40 {
            let below = trees[0].0;
            trees.insert(0, tree(&[("40000", b"a", below), ("40000", b"b", below)]));
        }
        let error = layout(
            &trees,
            Limits {
                entries_max: 5000,
                ..Limits::default()
            },
        )
        .expect_err("2^40 files");
        assert!(
            matches!(error, GitTreeError::Limit { limit: 5000, .. }),
            "{error}"
        );
    }

    #[test]
    fn deep_folders_end_at_the_longest_path() {
        let mut trees = vec![tree(&[("100644", b"f", blob())])];
        for _ in 0..3000 {
            let below = trees[0].0;
            trees.insert(0, tree(&[("40000", b"d", below)]));
        }
        let error = layout(&trees, Limits::default()).expect_err("6 KB");
        assert!(
            matches!(error, GitTreeError::Limit { limit: 4096, .. }),
            "{error}"
        );
    }
}
