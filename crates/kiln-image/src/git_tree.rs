//! A git commit's files, taken from raw objects that are all checked: nothing about a tree is believed, everything is
//! hashed again (DESIGN rule 10).
//!
//! The host asks a `git cat-file --batch` somewhere else, object by object, starting with one commit id: that commit
//! names a tree, trees name trees and blobs, and each object must have the id it was asked by. So whoever answers can
//! only send what the commit holds, or nothing. No git runs here; attributes, filters and line-ending rules of the
//! repository have no effect: files hold exactly the bytes of their blobs.
//! Format: git's `Documentation/gitformat-pack`, `git-cat-file` (batch output) and `gitglossary` (object names).
//! Read next: [`object`] (ids and parsing), [`layout`] (where everything goes), [`receive()`] (the conversation).

mod error;
mod layout;
mod object;
mod receive;
mod write;

pub use error::{GitTreeError, Whose};
pub use layout::{Layout, Node, NodeKind, Trees};
pub use object::{
    EntryMode, IdHasher, ObjectId, ObjectKind, ParseIdError, TreeEntry, id_of, parse_tree,
    tree_of_commit,
};
pub use receive::{COMMIT_BYTES_MAX, Progress, Received, TREE_BYTES_MAX, read_files, receive};
