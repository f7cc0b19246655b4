//! Files for tests: copies of fixtures, what a directory holds, ports nobody uses.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::Path;

/// Copies a directory with everything in it; symlinks stay symlinks. `target` may exist.
///
/// # Errors
/// What the file system says.
pub fn copy_tree(source: &Path, target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let to = target.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&entry.path(), &to)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, &to)?;
        } else {
            fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}

/// Everything below a directory: relative path to content, or to `-> target` for symlinks. For comparing trees.
///
/// # Errors
/// What the file system says; a name that is not UTF-8.
pub fn tree_of(dir: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut tree = BTreeMap::new();
    walk(dir, "", &mut tree)?;
    Ok(tree)
}

fn walk(dir: &Path, prefix: &str, tree: &mut BTreeMap<String, Vec<u8>>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry
            .file_name()
            .into_string()
            .map_err(|name| io::Error::other(format!("{name:?} is not UTF-8")))?;
        let path = format!("{prefix}{name}");
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), &format!("{path}/"), tree)?;
        } else if kind.is_symlink() {
            let target = fs::read_link(entry.path())?;
            tree.insert(path, format!("-> {}", target.display()).into_bytes());
        } else {
            tree.insert(path, fs::read(entry.path())?);
        }
    }
    Ok(())
}

/// A TCP port of loopback that was free a moment ago. Prefer port 0 where the code under test can say which one it got.
///
/// # Panics
/// When loopback has no free port.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TempHome;

    #[test]
    fn a_copy_is_the_same_tree() {
        let home = TempHome::new();
        home.write("a/b/c", "1");
        home.write("a/d", "2");
        symlink("d", home.join("a/link")).expect("symlink");
        copy_tree(&home.join("a"), &home.join("copy")).expect("copied");
        let tree = tree_of(&home.join("copy")).expect("read");
        assert_eq!(tree, tree_of(&home.join("a")).expect("read"));
        assert_eq!(tree["link"], b"-> d");
        assert_eq!(tree.len(), 3);
    }

    #[test]
    fn a_free_port_can_be_bound() {
        let port = free_port();
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("free");
    }
}
