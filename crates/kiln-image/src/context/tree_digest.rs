//! The digest of a source tree.
//!
//! Canonical form, version 1: the 13 bytes `kiln-tree-v1\0`, then one record for each entry in the order of
//! [`super::walk`]. Integers are little-endian, every variable part has its length in front:
//!
//! ```text
//! record := kind:u8 mode:u32 path_len:u32 path body
//! kind   := 'd' | 'f' | 'l'
//! mode   := the 12 permission bits of a file or folder; 0o777 for a link
//! body   := nothing for a folder
//!         | size:u64 sha256:[u8; 32] for a file
//!         | target_len:u32 target for a link
//! ```
//!
//! Times, owners and the numbers of links are not part of it. The root folder itself has no record.

use kiln_core::Digest;
use kiln_core::digest::Hasher;

/// What an entry is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EntryKind {
    /// A folder.
    Folder,
    /// A regular file of that many bytes.
    File(u64),
    /// A symbolic link and its target.
    Link(String),
}

/// Digest in the making.
#[derive(Clone, Debug)]
pub struct TreeDigest {
    hasher: Hasher,
}

impl Default for TreeDigest {
    fn default() -> Self {
        let mut hasher = Hasher::default();
        hasher.update(b"kiln-tree-v1\0");
        Self { hasher }
    }
}

impl TreeDigest {
    /// Adds a folder.
    pub fn folder(&mut self, path: &str, mode: u32) {
        self.head(b'd', path, mode);
    }

    /// Adds a file by size and content digest.
    pub fn file(&mut self, path: &str, mode: u32, size: u64, content: &Digest) {
        self.head(b'f', path, mode);
        self.hasher.update(&size.to_le_bytes());
        self.hasher.update(content.bytes());
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.head(b'l', path, 0o777);
        self.text(target);
    }

    /// The digest.
    #[must_use]
    pub fn finish(self) -> Digest {
        self.hasher.finish().0
    }

    fn head(&mut self, kind: u8, path: &str, mode: u32) {
        self.hasher.update(&[kind]);
        self.hasher.update(&mode.to_le_bytes());
        self.text(path);
    }

    fn text(&mut self, text: &str) {
        // Paths and targets are at most 4096 bytes.
        self.hasher.update(&(text.len() as u32).to_le_bytes());
        self.hasher.update(text.as_bytes());
    }
}
