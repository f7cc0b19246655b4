//! Reads the package database of a root tree: what is installed, what needs what, whose file is whose.
//!
//! Formats: `/var/lib/dpkg/status` (deb822), `/var/lib/dpkg/info/<package>.list`. Nothing is executed.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::apt::deb822_fields;
use super::tree::Tree;

/// Where the database keeps its stanzas.
const STATUS: &str = "var/lib/dpkg/status";
/// Where it keeps file lists.
const INFO: &str = "var/lib/dpkg/info";
/// Largest database that is read.
const STATUS_BYTES_MAX: u64 = 32 << 20;

/// Why a package database cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DpkgError {
    /// There is none, or it is not text of a sensible size.
    #[error("the root tree has no readable package database")]
    NoStatus,
    /// A package that a recipe names is not installed.
    #[error("the package {0:?} of the recipe is not in the root tree")]
    NotInstalled(String),
    /// The file list of a package is missing.
    #[error("the package database has no file list of {0:?}")]
    NoList(String),
}

/// A package and its version, as manifests and locks list it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct PackageVersion {
    /// Name, without architecture.
    pub name: String,
    /// Version as Debian writes it.
    pub version: String,
    /// `amd64` or `all`.
    pub architecture: String,
}

/// One installed package.
#[derive(Clone, Debug)]
pub struct Package {
    /// Name, version, architecture.
    pub id: PackageVersion,
    /// Its stanza, as found.
    pub stanza: String,
    multi_arch_same: bool,
    depends: Vec<Vec<String>>,
    provides: Vec<String>,
}

/// All installed packages of a root tree.
#[derive(Clone, Debug, Default)]
pub struct Packages {
    by_name: BTreeMap<String, Package>,
    providers: BTreeMap<String, String>,
}

impl Packages {
    /// Reads the database of a tree.
    ///
    /// # Errors
    /// When the tree has none.
    pub fn of_tree(tree: &Tree) -> Result<Self, DpkgError> {
        let content = tree
            .content(STATUS)
            .filter(|content| content.len() <= STATUS_BYTES_MAX);
        let bytes = content
            .and_then(|content| content.bytes().ok())
            .ok_or(DpkgError::NoStatus)?;
        let packages = Self::parse(&String::from_utf8_lossy(&bytes));
        if packages.by_name.is_empty() {
            Err(DpkgError::NoStatus)
        } else {
            Ok(packages)
        }
    }

    /// Reads the text of a database.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut packages = Self::default();
        for stanza in text
            .split("\n\n")
            .filter(|stanza| !stanza.trim().is_empty())
        {
            let fields: BTreeMap<_, _> = deb822_fields(stanza).into_iter().collect();
            let field = |name: &str| fields.get(name).cloned().unwrap_or_default();
            if !field("Status").ends_with(" installed") {
                continue;
            }
            let mut depends = relations(&field("Pre-Depends"));
            depends.extend(relations(&field("Depends")));
            let provides: Vec<_> = relations(&field("Provides")).concat();
            let id = PackageVersion {
                name: field("Package"),
                version: field("Version"),
                architecture: field("Architecture"),
            };
            for provided in &provides {
                packages.providers.insert(provided.clone(), id.name.clone());
            }
            let package = Package {
                multi_arch_same: field("Multi-Arch") == "same",
                stanza: stanza.trim_matches('\n').to_owned() + "\n",
                id,
                depends,
                provides,
            };
            packages.by_name.insert(package.id.name.clone(), package);
        }
        packages
    }

    /// Every package, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Package> {
        self.by_name.values()
    }

    /// Name and version of each package.
    #[must_use]
    pub fn versions(&self) -> Vec<PackageVersion> {
        self.iter().map(|package| package.id.clone()).collect()
    }

    /// A package by name.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn get(&self, name: &str) -> Result<&Package, DpkgError> {
        self.by_name
            .get(name)
            .ok_or_else(|| DpkgError::NotInstalled(name.to_owned()))
    }

    /// The packages named and everything they need, without following (or taking) those in `without`.
    ///
    /// # Errors
    /// When a package named is not installed.
    pub fn closure(
        &self,
        roots: &[String],
        without: &[String],
    ) -> Result<BTreeSet<String>, DpkgError> {
        let mut found = BTreeSet::new();
        let mut open: Vec<String> = Vec::new();
        for root in roots {
            open.push(self.get(root)?.id.name.clone());
        }
        while let Some(name) = open.pop() {
            if without.contains(&name) || !found.insert(name.clone()) {
                continue;
            }
            for alternatives in self
                .by_name
                .get(&name)
                .map_or(&[][..], |package| &package.depends)
            {
                let chosen = alternatives
                    .iter()
                    .find_map(|wanted| self.installed(wanted));
                open.extend(chosen.map(str::to_owned));
            }
        }
        Ok(found)
    }

    /// The installed package that is or provides `wanted`.
    fn installed(&self, wanted: &str) -> Option<&str> {
        match self.by_name.get_key_value(wanted) {
            Some((name, _)) => Some(name),
            None => self.providers.get(wanted).map(String::as_str),
        }
    }

    /// Paths of a package in a tree: its files and links, not its directories.
    ///
    /// # Errors
    /// When its list is missing.
    pub fn files(&self, tree: &Tree, name: &str) -> Result<Vec<String>, DpkgError> {
        let package = self.get(name)?;
        let list = if package.multi_arch_same {
            format!("{INFO}/{name}:{}.list", package.id.architecture)
        } else {
            format!("{INFO}/{name}.list")
        };
        let content = tree.content(&list).and_then(|content| content.bytes().ok());
        let bytes = content.ok_or_else(|| DpkgError::NoList(name.to_owned()))?;
        let text = String::from_utf8_lossy(&bytes);
        let paths = text.lines().map(|line| tree.real_path(line));
        let is_file = |path: &String| {
            tree.get(path)
                .is_some_and(|node| !matches!(node.body, super::tree::Body::Directory))
        };
        Ok(paths.filter(is_file).collect())
    }

    /// Names this package provides besides its own.
    #[must_use]
    pub fn provided_by(&self, name: &str) -> &[String] {
        self.by_name
            .get(name)
            .map_or(&[], |package| &package.provides)
    }
}

/// `a (>= 1) | b:any, c` as `[[a, b], [c]]`.
fn relations(text: &str) -> Vec<Vec<String>> {
    let name = |part: &str| {
        let word = part
            .split(['(', '[', '<'])
            .next()
            .unwrap_or_default()
            .trim();
        word.split(':').next().unwrap_or_default().to_owned()
    };
    text.split(',')
        .filter(|relation| !relation.trim().is_empty())
        .map(|relation| relation.split('|').map(name).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tree::Node;
    use super::*;

    const DATABASE: &str = "Package: app\nStatus: install ok installed\nVersion: 1:2-3\nArchitecture: amd64\n\
        Depends: lib (>= 2) | other, tool:any,\n mail-agent\n\nPackage: lib\nStatus: install ok installed\n\
        Version: 2\nArchitecture: amd64\nMulti-Arch: same\nPre-Depends: base\n\nPackage: tool\n\
        Status: install ok installed\nVersion: 1\nArchitecture: all\n\nPackage: post\n\
        Status: install ok installed\nVersion: 1\nArchitecture: all\nProvides: mail-agent (= 1)\n\n\
        Package: base\nStatus: install ok installed\nVersion: 1\nArchitecture: all\n\nPackage: gone\n\
        Status: deinstall ok config-files\nVersion: 1\nArchitecture: all\n";

    fn names(set: &BTreeSet<String>) -> Vec<&str> {
        set.iter().map(String::as_str).collect()
    }

    #[test]
    fn a_closure_follows_alternatives_and_provided_names() {
        let packages = Packages::parse(DATABASE);
        let app = ["app".to_owned()];
        let all = packages.closure(&app, &[]).expect("installed");
        assert_eq!(names(&all), ["app", "base", "lib", "post", "tool"]);
        let some = packages
            .closure(&app, &["lib".to_owned()])
            .expect("installed");
        assert_eq!(names(&some), ["app", "post", "tool"]);
        let gone = packages.closure(&["gone".to_owned()], &[]);
        assert_eq!(gone, Err(DpkgError::NotInstalled("gone".to_owned())));
    }

    #[test]
    fn files_are_found_behind_merged_directories_and_directories_are_not_files() {
        let packages = Packages::parse(DATABASE);
        let mut tree = Tree::default();
        tree.insert("lib", Node::symlink("usr/lib"));
        tree.insert("usr/lib/x.so", Node::text("x"));
        let list = "/.\n/lib\n/lib/x.so\n/usr\n/usr/share/doc/removed\n";
        tree.insert("var/lib/dpkg/info/lib:amd64.list", Node::text(list));
        assert_eq!(
            packages.files(&tree, "lib").expect("a list"),
            ["lib", "usr/lib/x.so"]
        );
        assert_eq!(
            packages.files(&tree, "tool"),
            Err(DpkgError::NoList("tool".to_owned()))
        );
    }
}
