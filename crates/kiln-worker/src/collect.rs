//! Files that a run asked to keep: read out of its machine when its command has ended, before the machine goes.
//!
//! What comes is a tar stream of a hostile guest: only plain files count, names are checked, sizes, numbers and time are bounded, nothing is
//! followed. What a pattern means is decided here, on the names that come; a guest's own idea of it counts for nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::artifact::{ARTIFACT_BYTES_MAX, ARTIFACTS_BYTES_MAX, ARTIFACTS_MAX};
use kiln_core::{ArtifactName, ArtifactPath};
use kiln_proto::Session;
use kiln_proto::msg::GetTree;
use tar::{Archive, Entry, EntryType};
use tokio::time::Instant;
use tokio_util::io::SyncIoBridge;
use tokio_util::sync::CancellationToken;

use crate::orders;

/// Where the guest puts a container's files together (`BUNDLE` of the guest's `container`).
pub(crate) const CONTAINER_ROOT: &str = "/run/kiln/container/rootfs";
/// Most entries of one tree, folders and links included.
const ENTRIES_MAX: u64 = 20_000;
/// Most entries of a tree that patterns are looked for in.
const PATTERN_ENTRIES_MAX: u64 = 200_000;
/// Most bytes of files in a tree that patterns are looked for in.
const PATTERN_BYTES_MAX: u64 = 8 << 30;
/// Room for the heads of a tar's entries and long names.
const HEADS_MAX: u64 = 256 << 20;
/// Most bytes of a long name that are read: more than any legal one has.
const LONG_NAME_MAX: u64 = 4096;
/// Longest time for all files of a run.
pub(crate) const COLLECT_TIMEOUT: Duration = Duration::from_secs(600);
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
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    pub(crate) files: Vec<Collected>,
    /// What was not kept and why, one line each.
    pub(crate) left_out: Vec<String>,
    /// Remarks that did not fit.
    unsaid: u64,
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
        } else {
            self.unsaid += 1;
        }
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    fn said(mut self) -> Self {
        if self.unsaid > 0 {
            let text = format!("{} more are not kept", self.unsaid);
            self.left_out.push(text);
        }
        self
    }
}

/// What is looked for in one tree of the machine.
#[derive(Clone, Debug)]
struct Wanted {
    /// Where it lies in the machine.
    place: String,
    /// What the names of its files begin with.
    stem: String,
    paths: Vec<ArtifactPath>,
}

impl Wanted {
    /// One for each place: a tree is read once, however many patterns are looked for in it.
    fn all(paths: &[ArtifactPath], (root, cwd): (&str, &str)) -> Vec<Self> {
        let mut places: BTreeMap<String, Self> = BTreeMap::new();
        for path in paths {
            let place = format!("{root}{}", path.below(cwd));
            let wanted = places.entry(place.clone()).or_insert_with(|| Self {
                place,
                stem: path.stem().to_owned(),
                paths: Vec::new(),
            });
            wanted.paths.push(path.clone());
        }
        places.into_values().collect()
    }

    fn has_patterns(&self) -> bool {
        self.paths.iter().any(ArtifactPath::is_pattern)
    }

    fn has_plain_paths(&self) -> bool {
        self.paths.iter().any(|path| !path.is_pattern())
    }

    fn order(&self, found: &Found) -> GetTree {
        let left = ARTIFACTS_BYTES_MAX.saturating_sub(found.bytes());
        let (bytes_max, entries_max) = match self.has_patterns() {
            true => (PATTERN_BYTES_MAX, PATTERN_ENTRIES_MAX),
            false => (left, ENTRIES_MAX),
        };
        GetTree {
            path: self.place.clone(),
            bytes_max,
            entries_max,
        }
    }

    fn means(&self, name: &str) -> bool {
        self.paths.iter().any(|path| path.means(name))
    }

    fn leave_out(&self, found: &mut Found, why: &str) {
        for path in &self.paths {
            found.leave_out(&path.to_string(), why);
        }
    }
}

/// Reads the files that `paths` mean into `dir`, an empty folder. Relative paths are below `cwd`; `root` is where the command's own root lies
/// in the machine. What was read before the deadline or a cancel is kept.
pub(crate) async fn collect(
    session: &Session,
    paths: &[ArtifactPath],
    place: (&str, &str),
    dir: &Path,
    (within, cancel): (Duration, &CancellationToken),
) -> Found {
    let mut found = Found::default();
    let end = Instant::now() + within;
    for wanted in Wanted::all(paths, place) {
        let tree = one_tree(session, &wanted, dir, &found);
        let (read, failed) = tokio::select! {
            read = tree => read,
            () = cancel.cancelled() => (None, Some("somebody stopped the run".to_owned())),
            () = tokio::time::sleep_until(end) => {
                (None, Some(format!("reading it took longer than {within:?}")))
            }
        };
        found = read.unwrap_or(found);
        if let Some(why) = failed {
            wanted.leave_out(&mut found, &why);
        }
    }
    found.said()
}

/// What there is after one more tree, and why it is not all of it.
async fn one_tree(
    session: &Session,
    wanted: &Wanted,
    dir: &Path,
    found: &Found,
) -> (Option<Found>, Option<String>) {
    let order = wanted.order(found);
    let stream = match orders::get_tree(session, "give its files", &order).await {
        Ok(stream) => stream,
        Err(error) => return (None, Some(orders::chain(&error))),
    };
    let bytes_max = order.bytes_max.saturating_add(HEADS_MAX);
    let reader = SyncIoBridge::new(stream).take(bytes_max);
    let (wanted, dir, mut found) = (wanted.clone(), dir.to_owned(), found.clone());
    let work = tokio::task::spawn_blocking(move || {
        let taken = take(reader, &wanted, order.entries_max, &dir, &mut found);
        (Some(found), taken.err().map(|error| why(&error)))
    });
    work.await
        .unwrap_or_else(|error| (None, Some(error.to_string())))
}

/// Why a tree did not come, in words: a guest that has none says so with a code.
fn why(error: &io::Error) -> String {
    let text = orders::chain(error);
    match text.contains("not_found") {
        true => "there is no such file or folder".to_owned(),
        false => text,
    }
}

/// Takes the plain files that are wanted of a tar stream.
fn take(
    reader: impl Read,
    wanted: &Wanted,
    entries_max: u64,
    dir: &Path,
    found: &mut Found,
) -> io::Result<()> {
    let mut archive = Archive::new(reader);
    let mut long = None;
    let mut number = 0_u64;
    // As they come: what describes an entry is read here, where it is bounded.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind == EntryType::GNULongName {
            long = Some(long_name(&mut entry)?);
            continue;
        }
        number += 1;
        if number > entries_max {
            return Err(io::Error::other("there are too many files"));
        }
        let inner = long
            .take()
            .unwrap_or_else(|| entry.header().path_bytes().into_owned());
        let inner = String::from_utf8_lossy(&inner).into_owned();
        let name = named(wanted, &inner, number == 1);
        if !wanted.means(&name) || kind == EntryType::Directory {
            continue;
        }
        match kind {
            EntryType::Regular => one_file(&mut entry, &name, dir, found)?,
            EntryType::Symlink | EntryType::Link => found.leave_out(&name, "it is a link"),
            EntryType::XHeader | EntryType::GNULongLink | EntryType::XGlobalHeader => {}
            _ => found.leave_out(&name, "it is no plain file"),
        }
    }
    for path in &wanted.paths {
        if !found
            .files
            .iter()
            .any(|file| path.means(file.name.as_str()))
        {
            let why = match path.is_pattern() {
                true => "no file fits it",
                false => "there is no file in it",
            };
            found.leave_out(&path.to_string(), why);
        }
    }
    Ok(())
}

/// The name that a file of a tree has as an artifact.
fn named(wanted: &Wanted, inner: &str, first: bool) -> String {
    let stem = wanted.stem.as_str();
    let last = stem.rsplit('/').next().unwrap_or(stem);
    match stem.is_empty() {
        true => inner.to_owned(),
        // A path that names a file comes as this one file.
        false if first && inner == last && wanted.has_plain_paths() => stem.to_owned(),
        false => format!("{stem}/{inner}"),
    }
}

/// The name of the next entry, where a head has no room for it. One that is too long stays so: it is refused as a name.
fn long_name(entry: &mut Entry<'_, impl Read>) -> io::Result<Vec<u8>> {
    let mut name = Vec::new();
    entry.take(LONG_NAME_MAX).read_to_end(&mut name)?;
    while name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

fn one_file(
    entry: &mut Entry<'_, impl Read>,
    name: &str,
    dir: &Path,
    found: &mut Found,
) -> io::Result<()> {
    let size = entry.size();
    let name: ArtifactName = match name.parse() {
        Ok(name) => name,
        Err(error) => {
            let error: kiln_core::artifact::ParseArtifactError = error;
            found.leave_out(name, &error.to_string());
            return Ok(());
        }
    };
    if size > ARTIFACT_BYTES_MAX || size > ARTIFACTS_BYTES_MAX.saturating_sub(found.bytes()) {
        found.leave_out(name.as_str(), "it is too large");
        return Ok(());
    }
    if u32::try_from(found.files.len()).is_ok_and(|count| count >= ARTIFACTS_MAX) {
        return Err(io::Error::other(format!(
            "there are {ARTIFACTS_MAX} files already"
        )));
    }
    if found.files.iter().any(|file| file.name == name) {
        return Ok(());
    }
    let path = dir.join(found.files.len().to_string());
    let mut file = File::options();
    let mut file = file.write(true).create_new(true).mode(0o600).open(&path)?;
    let written = io::copy(&mut entry.take(size), &mut file)?;
    if written != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    found.files.push(Collected { name, path, size });
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

    fn wanted(paths: &[&str]) -> Wanted {
        let paths: Vec<_> = paths.iter().map(|path| path.parse().expect(path)).collect();
        let mut all = Wanted::all(&paths, ("", "/work"));
        assert_eq!(all.len(), 1, "one tree");
        all.remove(0)
    }

    fn taken(tar: &[u8], paths: &[&str], dir: &Path, found: &mut Found) -> io::Result<()> {
        take(tar, &wanted(paths), ENTRIES_MAX, dir, found)
    }

    fn names(found: &Found) -> Vec<&str> {
        found.files.iter().map(|file| file.name.as_str()).collect()
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
        taken(&all, &["out/dist"], dir.path(), &mut found).expect("taken");
        assert_eq!(names(&found), ["out/dist/a.txt", "out/dist/sub/b.bin"]);
        assert_eq!(std::fs::read(&found.files[0].path).expect("reads"), b"one");
        assert_eq!(found.left_out.len(), 4, "{:?}", found.left_out);
        assert!(found.left_out[3].contains("link is not kept: it is a link"));
        assert!(!found.left_out.concat().contains('\n'));
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 2);
    }

    #[test]
    fn a_single_file_keeps_its_path_and_a_cut_stream_is_told() {
        let dir = tempfile::tempdir().expect("dir");
        let mut found = Found::default();
        let one = tar(&[("report.xml", b"<x/>")]);
        taken(&one, &["out/report.xml"], dir.path(), &mut found).expect("taken");
        assert_eq!(found.files[0].name.as_str(), "out/report.xml");
        let whole = tar(&[("long", &[7; 5000])]);
        let cut = taken(&whole[..2000], &["d"], dir.path(), &mut found);
        assert!(cut.is_err());
        assert_eq!(found.files.len(), 1);
        taken(&tar(&[]), &["empty"], dir.path(), &mut found).expect("taken");
        assert!(found.left_out.concat().contains("no file"));
    }

    #[test]
    fn patterns_are_judged_by_the_names_that_come() {
        let dir = tempfile::tempdir().expect("dir");
        let mut found = Found::default();
        let all = tar(&[
            ("a.xml", b"1"),
            ("sub/b.xml", b"2"),
            ("sub/c.log", b"3"),
            ("core", b"4"),
        ]);
        let paths = ["out/**/*.xml", "out/*/c.*", "out/*.none"];
        taken(&all, &paths, dir.path(), &mut found).expect("taken");
        assert_eq!(
            names(&found),
            ["out/a.xml", "out/sub/b.xml", "out/sub/c.log"]
        );
        assert_eq!(found.left_out, ["out/*.none is not kept: no file fits it"]);
        // Below the working directory itself.
        let mut found = Found::default();
        let dir = tempfile::tempdir().expect("dir");
        taken(&all, &["*.xml"], dir.path(), &mut found).expect("taken");
        assert_eq!(names(&found), ["a.xml"]);
        // A tree is read once for all its patterns, and by itself for a path.
        let paths = ["out/*.a", "out/*.b", "out"].map(|path| path.parse().expect("path"));
        assert_eq!(Wanted::all(&paths, ("", "/")).len(), 1);
        let paths = ["out/*.a", "*.b"].map(|path| path.parse().expect("path"));
        assert_eq!(Wanted::all(&paths, ("", "/")).len(), 2);
    }

    /// A tar whose next entry's name is said to have so many bytes, all of them there.
    fn long_named(bytes: u64) -> impl Read {
        let mut long = tar::Header::new_gnu();
        long.set_entry_type(EntryType::GNULongName);
        long.set_size(bytes);
        long.set_cksum();
        let mut file = tar::Header::new_gnu();
        file.set_path("short").expect("a name");
        file.set_size(1);
        file.set_cksum();
        let rest = [file.as_bytes().to_vec(), vec![b'x'; 512], vec![0; 1024]].concat();
        let padded = bytes.next_multiple_of(512);
        let head = io::Cursor::new(long.as_bytes().to_vec());
        head.chain(io::repeat(b'n').take(padded))
            .chain(io::Cursor::new(rest))
    }

    #[test]
    fn a_name_of_a_gigabyte_is_not_kept_in_memory() {
        let dir = tempfile::tempdir().expect("dir");
        let mut found = Found::default();
        let tar = long_named(1 << 30);
        take(tar, &wanted(&["d"]), ENTRIES_MAX, dir.path(), &mut found).expect("skipped");
        assert!(found.files.is_empty());
        assert!(found.left_out[0].contains("is not the name of an artifact"));
        assert!(found.left_out.concat().len() < 1000, "{:?}", found.left_out);
        let tar = long_named(120);
        take(tar, &wanted(&["d"]), ENTRIES_MAX, dir.path(), &mut found).expect("taken");
        assert_eq!(names(&found), [format!("d/{}", "n".repeat(120))]);
    }

    #[test]
    fn what_comes_is_bounded_in_number_and_remarks() {
        let dir = tempfile::tempdir().expect("dir");
        let mut found = Found::default();
        let files: Vec<String> = (0..50).map(|at| format!("f {at}")).collect();
        let files: Vec<(&str, &[u8])> =
            files.iter().map(|name| (name.as_str(), &b""[..])).collect();
        let tar = tar(&files);
        let few = take(&tar[..], &wanted(&["d"]), 10, dir.path(), &mut found);
        assert!(few.expect_err("too many").to_string().contains("too many"));
        taken(&tar, &["d"], dir.path(), &mut found).expect("taken");
        let found = found.said();
        assert_eq!(found.left_out.len(), REMARKS_MAX + 1);
        assert!(found.left_out[REMARKS_MAX].ends_with("more are not kept"));
    }

    #[test]
    fn the_guests_folder_of_containers_is_this_one() {
        let guest = include_str!("../../kiln-guest/src/container.rs");
        let bundle = CONTAINER_ROOT.strip_suffix("/rootfs").expect("a folder");
        assert!(guest.contains(&format!("const BUNDLE: &str = \"{bundle}\";")));
    }
}
