//! Files that a run asked to keep: read out of its machine when its command has ended, before the machine goes.
//!
//! What comes is a tar stream of a hostile guest: only plain files count, names are checked, sizes and numbers are bounded, nothing is followed.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use kiln_core::artifact::{ARTIFACT_BYTES_MAX, ARTIFACTS_BYTES_MAX, ARTIFACTS_MAX};
use kiln_core::{ArtifactName, ArtifactPath};
use kiln_proto::Session;
use kiln_proto::msg::GetTree;
use tar::{Archive, EntryType};
use tokio_util::io::SyncIoBridge;

use crate::orders;

/// Where the guest puts a container's files together (`BUNDLE` of the guest's `container`).
pub(crate) const CONTAINER_ROOT: &str = "/run/kiln/container/rootfs";
/// Most entries of one tree, folders and links included.
const ENTRIES_MAX: u64 = 20_000;
/// Room for the heads of a tar's entries and long names.
const HEADS_MAX: u64 = 64 << 20;
/// Most remarks about files that are not kept.
const REMARKS_MAX: usize = 20;

/// A file that was kept on this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Collected {
    /// Its name as an artifact.
    pub name: ArtifactName,
    /// Where it lies.
    pub path: PathBuf,
    /// Its bytes.
    pub size: u64,
}

/// What was found in a machine.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) files: Vec<Collected>,
    /// What was not kept and why, one line each.
    pub(crate) left_out: Vec<String>,
}

impl Found {
    fn leave_out(&mut self, what: &str, why: &str) {
        // A guest chose these words.
        let plain = |text: &str| -> String {
            let shown = text.chars().map(|c| if c.is_control() { '?' } else { c });
            shown.take(200).collect()
        };
        if self.left_out.len() < REMARKS_MAX {
            let text = format!("{} is not kept: {}", plain(what), plain(why));
            self.left_out.push(text);
        }
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

/// Reads the files below `paths` into `dir`, an empty folder. Relative paths are below `cwd`; `root` is where the command's own root lies in the
/// machine.
pub(crate) async fn collect(
    session: &Session,
    paths: &[ArtifactPath],
    (root, cwd): (&str, &str),
    dir: &Path,
) -> Found {
    let mut found = Found::default();
    for path in paths {
        let order = GetTree {
            path: format!("{root}{}", path.below(cwd)),
            bytes_max: ARTIFACTS_BYTES_MAX.saturating_sub(found.bytes()),
            entries_max: ENTRIES_MAX,
        };
        let stream = match orders::get_tree(session, "give its files", &order).await {
            Ok(stream) => stream,
            Err(error) => {
                found.leave_out(path.stem(), &orders::chain(&error));
                continue;
            }
        };
        let reader = SyncIoBridge::new(stream);
        let (stem, dir) = (path.stem().to_owned(), dir.to_owned());
        let work = tokio::task::spawn_blocking(move || {
            if let Err(error) = take(reader, &stem, &dir, &mut found) {
                found.leave_out(&stem, &orders::chain(&error));
            }
            found
        });
        found = match work.await {
            Ok(found) => found,
            Err(error) => {
                let mut none = Found::default();
                none.leave_out(path.stem(), &error.to_string());
                return none;
            }
        };
    }
    found
}

/// Takes the plain files of a tar stream.
fn take(reader: impl Read, stem: &str, dir: &Path, found: &mut Found) -> io::Result<()> {
    let reader = reader.take(ARTIFACTS_BYTES_MAX + HEADS_MAX);
    let mut archive = Archive::new(reader);
    let last = stem.rsplit('/').next().unwrap_or(stem);
    let before = found.files.len();
    for (number, entry) in (0..).zip(archive.entries()?) {
        let mut entry = entry?;
        if number >= ENTRIES_MAX {
            return Err(io::Error::other("there are too many files"));
        }
        if entry.header().entry_type() != EntryType::Regular {
            continue;
        }
        let inner = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        // A path that names a file comes as this one file.
        let single = number == 0 && inner == last;
        let name = match single {
            true => stem.to_owned(),
            false => format!("{stem}/{inner}"),
        };
        let size = entry.size();
        let name: ArtifactName = match name.parse() {
            Ok(name) => name,
            Err(error) => {
                found.leave_out(&inner, &error.to_string());
                continue;
            }
        };
        if size > ARTIFACT_BYTES_MAX || size > ARTIFACTS_BYTES_MAX.saturating_sub(found.bytes()) {
            found.leave_out(name.as_str(), "it is too large");
            continue;
        }
        if u32::try_from(found.files.len()).is_ok_and(|count| count >= ARTIFACTS_MAX) {
            return Err(io::Error::other(format!(
                "there are {ARTIFACTS_MAX} files already"
            )));
        }
        if found.files.iter().any(|file| file.name == name) {
            continue;
        }
        let path = dir.join(found.files.len().to_string());
        let mut file = File::options();
        let mut file = file.write(true).create_new(true).mode(0o600).open(&path)?;
        let written = io::copy(&mut (&mut entry).take(size), &mut file)?;
        if written != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        found.files.push(Collected { name, path, size });
    }
    if found.files.len() == before {
        found.leave_out(stem, "there is no file in it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_old();
            // As a hostile guest would write it: the builder itself refuses such names.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append(&header, *content).expect("appended");
        }
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_size(0);
        builder
            .append_link(&mut link, "link", "/etc/passwd")
            .expect("appended");
        builder.into_inner().expect("whole")
    }

    #[test]
    fn plain_files_are_taken_and_nothing_else() {
        let dir = tempfile::tempdir().expect("dir");
        let mut found = Found::default();
        let all = tar(&[
            ("a.txt", b"one"),
            ("sub/b.bin", b"two"),
            ("../up", b"x"),
            ("/etc/cron", b"x"),
            ("new\nline", b"x"),
            ("a.txt", b"twice"),
        ]);
        take(&all[..], "out/dist", dir.path(), &mut found).expect("taken");
        let names: Vec<_> = found.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["out/dist/a.txt", "out/dist/sub/b.bin"]);
        assert_eq!(std::fs::read(&found.files[0].path).expect("reads"), b"one");
        assert_eq!(found.left_out.len(), 3, "{:?}", found.left_out);
        assert!(!found.left_out.concat().contains('\n'));
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 2);
    }

    #[test]
    fn a_single_file_keeps_its_path_and_a_cut_stream_is_told() {
        let dir = tempfile::tempdir().expect("dir");
        let mut found = Found::default();
        take(
            &tar(&[("report.xml", b"<x/>")])[..],
            "out/report.xml",
            dir.path(),
            &mut found,
        )
        .expect("taken");
        assert_eq!(found.files[0].name.as_str(), "out/report.xml");
        let whole = tar(&[("long", &[7; 5000])]);
        let cut = take(&whole[..2000], "d", dir.path(), &mut found);
        assert!(cut.is_err());
        assert_eq!(found.files.len(), 1);
        take(&tar(&[])[..], "empty", dir.path(), &mut found).expect("taken");
        assert!(found.left_out.concat().contains("no file"));
    }

    #[test]
    fn the_guests_folder_of_containers_is_this_one() {
        let guest = include_str!("../../kiln-guest/src/container.rs");
        let bundle = CONTAINER_ROOT.strip_suffix("/rootfs").expect("a folder");
        assert!(guest.contains(&format!("const BUNDLE: &str = \"{bundle}\";")));
    }
}
