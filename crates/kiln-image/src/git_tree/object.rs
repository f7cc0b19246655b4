//! Git objects: their ids (SHA-1 over kind, size and bytes), and what commits and trees say.

use std::fmt;
use std::str::FromStr;

use sha1_checked::{Digest as _, Sha1};

use super::error::GitTreeError;

/// Bytes of an id.
const ID_BYTES: usize = 20;

/// Id of an object: its SHA-1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId([u8; ID_BYTES]);

/// A text that is no id.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not a git object id (40 hexadecimal digits)")]
pub struct ParseIdError(String);

impl ObjectId {
    /// From its 20 bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }
}

impl FromStr for ObjectId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; ID_BYTES];
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) => Ok(Self(bytes)),
            Err(_) => Err(ParseIdError(text.chars().take(64).collect())),
        }
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Kinds of object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ObjectKind {
    /// A commit.
    Commit,
    /// A folder.
    Tree,
    /// A file's bytes.
    Blob,
    /// An annotated tag.
    Tag,
}

impl ObjectKind {
    /// As git writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Tree => "tree",
            Self::Blob => "blob",
            Self::Tag => "tag",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        [Self::Commit, Self::Tree, Self::Blob, Self::Tag]
            .into_iter()
            .find(|kind| kind.name() == text)
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An id in the making.
#[derive(Clone)]
pub struct IdHasher {
    hasher: Sha1,
}

impl fmt::Debug for IdHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdHasher")
    }
}

impl IdHasher {
    /// Begins an object of this kind and size in bytes.
    #[must_use]
    pub fn new(kind: ObjectKind, size: u64) -> Self {
        let mut hasher = Sha1::new();
        hasher.update(format!("{kind} {size}\0"));
        Self { hasher }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// The id; `Err` with it when the bytes bear the marks of a collision attack.
    ///
    /// # Errors
    /// See above.
    pub fn finish(self) -> Result<ObjectId, ObjectId> {
        let result = self.hasher.try_finalize();
        let id = ObjectId((*result.hash()).into());
        if result.has_collision() {
            Err(id)
        } else {
            Ok(id)
        }
    }

    /// Whether the object has the id it was asked by.
    pub(super) fn expect(self, asked: ObjectId) -> Result<(), GitTreeError> {
        match self.finish() {
            Err(_) => Err(GitTreeError::Collision { id: asked }),
            Ok(found) if found != asked => Err(GitTreeError::Mismatch { asked, found }),
            Ok(_) => Ok(()),
        }
    }
}

/// The id of a whole object.
///
/// # Errors
/// As [`IdHasher::finish`].
pub fn id_of(kind: ObjectKind, bytes: &[u8]) -> Result<ObjectId, ObjectId> {
    let mut hasher = IdHasher::new(kind, bytes.len() as u64);
    hasher.update(bytes);
    hasher.finish()
}

/// The tree a commit names. `id` is for the error.
///
/// # Errors
/// When its first line is not `tree <id>`.
pub fn tree_of_commit(id: ObjectId, bytes: &[u8]) -> Result<ObjectId, GitTreeError> {
    let malformed = GitTreeError::Malformed {
        id,
        kind: ObjectKind::Commit,
        why: "its first line names no tree",
    };
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let text = line
        .strip_prefix(b"tree ")
        .and_then(|rest| std::str::from_utf8(rest).ok());
    // Git writes ids in lower case; another spelling is another commit's text, but never another tree.
    text.and_then(|text| text.parse().ok()).ok_or(malformed)
}

/// What an entry of a tree is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryMode {
    /// A file.
    File,
    /// A file that may be executed.
    Executable,
    /// A symbolic link; its blob is the target.
    Link,
    /// A folder.
    Tree,
    /// A commit of another repository.
    Submodule,
}

impl EntryMode {
    /// From the octal digits of a tree. Old programs wrote other permission bits: only the owner's `x` counts.
    fn parse(digits: &[u8]) -> Option<Self> {
        if !(5..=7).contains(&digits.len())
            || !digits.iter().all(|digit| (b'0'..=b'7').contains(digit))
        {
            return None;
        }
        let mode = digits
            .iter()
            .fold(0_u32, |mode, digit| mode * 8 + u32::from(digit - b'0'));
        match mode & 0o170_000 {
            0o100_000 if mode & 0o100 != 0 => Some(Self::Executable),
            0o100_000 => Some(Self::File),
            0o120_000 => Some(Self::Link),
            0o040_000 => Some(Self::Tree),
            0o160_000 => Some(Self::Submodule),
            _ => None,
        }
    }
}

/// One entry of a tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TreeEntry {
    /// Its name: not empty, no `/`, no zero byte. Not yet checked for `..` and the like.
    pub name: Box<[u8]>,
    /// What it is.
    pub mode: EntryMode,
    /// The object.
    pub id: ObjectId,
}

/// The entries of a tree, in its order. `id` is for the error.
///
/// # Errors
/// When it is not `<mode> <name>\0<20 bytes>` again and again, or names something twice.
pub fn parse_tree(id: ObjectId, bytes: &[u8]) -> Result<Vec<TreeEntry>, GitTreeError> {
    let malformed = |why| GitTreeError::Malformed {
        id,
        kind: ObjectKind::Tree,
        why,
    };
    let mut entries = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let space = rest
            .iter()
            .take(8)
            .position(|byte| *byte == b' ')
            .ok_or_else(|| malformed("an entry without mode"))?;
        let mode = EntryMode::parse(&rest[..space])
            .ok_or_else(|| malformed("an entry of unknown mode"))?;
        rest = &rest[space + 1..];
        let end = rest
            .iter()
            .position(|byte| *byte == 0)
            .ok_or_else(|| malformed("an entry without end"))?;
        let name = &rest[..end];
        if name.is_empty() || name.contains(&b'/') {
            return Err(malformed("an entry whose name is no name"));
        }
        rest = &rest[end + 1..];
        let (object, tail) = rest
            .split_first_chunk()
            .ok_or_else(|| malformed("an entry without id"))?;
        entries.push(TreeEntry {
            name: name.into(),
            mode,
            id: ObjectId(*object),
        });
        rest = tail;
    }
    let mut names: Vec<&[u8]> = entries.iter().map(|entry| &*entry.name).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(malformed("two entries of one name"));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(text: &str) -> ObjectId {
        text.parse().expect("an id")
    }

    fn some_id() -> ObjectId {
        ObjectId([7; ID_BYTES])
    }

    #[test]
    fn ids_are_those_of_git() {
        let empty_blob = id("e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        let empty_tree = id("4b825dc642cb6eb9a060e54bf8d69288fbee4904");
        assert_eq!(id_of(ObjectKind::Blob, b""), Ok(empty_blob));
        assert_eq!(id_of(ObjectKind::Tree, b""), Ok(empty_tree));
        assert_eq!(
            id_of(ObjectKind::Blob, b"hello\n"),
            Ok(id("ce013625030ba8dba906f756967f9e9ca394464a"))
        );
        for bad in [
            "",
            "e69de29",
            "g69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
            "e69de29bb2d1d6434b8b29ae775ad8c2e48c53910",
        ] {
            assert!(bad.parse::<ObjectId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn commits_name_their_tree() {
        let text = b"tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nparent x\n\nwords\n";
        assert_eq!(
            tree_of_commit(some_id(), text).expect("legal"),
            id("4b825dc642cb6eb9a060e54bf8d69288fbee4904")
        );
        for bad in [
            &b""[..],
            b"tree 4b82\n",
            b"parent 4b825dc642cb6eb9a060e54bf8d69288fbee4904\n",
            b"tree \xff",
        ] {
            assert!(tree_of_commit(some_id(), bad).is_err());
        }
    }

    fn tree(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (mode, name) in entries {
            bytes.extend(format!("{mode} {name}\0").bytes());
            bytes.extend([9; ID_BYTES]);
        }
        bytes
    }

    #[test]
    fn trees_of_every_mode() {
        let bytes = tree(&[
            ("100644", "a"),
            ("100755", "b"),
            ("120000", "c"),
            ("40000", "d"),
            ("160000", "e"),
            ("100664", "f"),
        ]);
        let modes: Vec<EntryMode> = parse_tree(some_id(), &bytes)
            .expect("legal")
            .iter()
            .map(|entry| entry.mode)
            .collect();
        let expected = [
            EntryMode::File,
            EntryMode::Executable,
            EntryMode::Link,
            EntryMode::Tree,
            EntryMode::Submodule,
            EntryMode::File,
        ];
        assert_eq!(modes, expected);
    }

    #[test]
    fn trees_that_are_none() {
        let good = tree(&[("100644", "a")]);
        for bad in [
            good[..good.len() - 1].to_vec(),
            good[..8].to_vec(),
            tree(&[("100644", "")]),
            tree(&[("100644", "a/b")]),
            tree(&[("020000", "dev")]),
            tree(&[("8", "x")]),
            tree(&[("100644", "a"), ("40000", "a")]),
            tree(&[("100644", "a"), ("100644", "a.b"), ("40000", "a")]),
        ] {
            assert!(parse_tree(some_id(), &bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _tree = parse_tree(some_id(), &bytes);
            let _commit = tree_of_commit(some_id(), &bytes);
        }

        #[test]
        fn what_is_written_is_read(names in prop::collection::btree_set("[a-zA-Z0-9._ -]{1,20}", 0..20)) {
            let entries: Vec<(&str, &str)> = names.iter().map(|name| ("100644", name.as_str())).collect();
            let read = parse_tree(some_id(), &tree(&entries)).expect("legal");
            let read: Vec<&[u8]> = read.iter().map(|entry| &*entry.name).collect();
            let written: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
            prop_assert_eq!(read, written);
        }
    }
}
