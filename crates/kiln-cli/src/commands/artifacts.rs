//! What a job left: listed, fetched, and copied to where `--copy-out` wants it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use kiln_controller::api::{ArtifactView, JobView, List};
use kiln_core::artifact::ARTIFACT_PATHS_MAX;
use kiln_core::{ArtifactName, ArtifactPath, ByteSize, Digest, FailureClass};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::landing::{Landing, folder_of, look_at};
use super::table::{Table, counted, right, wide};
use crate::error::{CliError, Result};
use crate::server::Server;
use crate::server::download;
use crate::show::{Screen, ShownPath as _};

/// `PATH[:DEST]` of `--copy-out`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CopyOut {
    /// File, folder or pattern in the machine.
    pub(crate) from: ArtifactPath,
    /// Where it goes here.
    to: Option<PathBuf>,
}

impl FromStr for CopyOut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, to) = match text.split_once(':') {
            Some((_, "")) => return Err("there is nothing after the colon".to_owned()),
            Some((from, to)) => (from, Some(PathBuf::from(to))),
            None => (text, None),
        };
        let parsed = from.parse();
        let from =
            parsed.map_err(|error: kiln_core::artifact::ParseArtifactError| error.to_string())?;
        Ok(Self { from, to })
    }
}

impl fmt::Display for CopyOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.from.fmt(f)
    }
}

impl CopyOut {
    /// The folder it goes to, and each file's path below that; no file when none is meant.
    fn places(&self, kept: &[ArtifactView]) -> (PathBuf, Vec<(ArtifactView, PathBuf)>) {
        let stem = self.from.stem();
        let meant = || kept.iter().filter(|file| self.from.means(&file.name));
        let last = stem.rsplit('/').next().unwrap_or(stem);
        let here = || PathBuf::from(".");
        let below = |file: &ArtifactView| match stem.is_empty() {
            true => PathBuf::from(&file.name),
            false => PathBuf::from(file.name[stem.len()..].trim_start_matches('/')),
        };
        if self.from.is_pattern() {
            let to = self.to.clone().unwrap_or_else(here);
            let files = meant().map(|file| (file.clone(), below(file)));
            return (to, files.collect());
        }
        let Some(single) = meant().find(|file| file.name == stem) else {
            let to = self.to.clone().unwrap_or_else(|| PathBuf::from(last));
            let files = meant().map(|file| (file.clone(), below(file)));
            return (to, files.collect());
        };
        let (folder, name) = match &self.to {
            None => (here(), PathBuf::from(last)),
            Some(to) if is_folder(to) => (to.clone(), PathBuf::from(last)),
            Some(to) => {
                let name = to.file_name().map(PathBuf::from).unwrap_or_default();
                (folder_of(to).to_owned(), name)
            }
        };
        (folder, vec![(single.clone(), name)])
    }

    /// Looks at its place before a command runs for nothing. Where files land it is looked at again: only then is known what they are.
    fn look(&self) -> Result<()> {
        let stem = self.from.stem();
        let (to, looked) = match &self.to {
            None if self.from.is_pattern() => return Ok(()),
            None => {
                let name = PathBuf::from(stem.rsplit('/').next().unwrap_or(stem));
                let looked = look_at(&name);
                (name, looked)
            }
            Some(to) if is_folder(to) => (to.clone(), Landing::look(to)),
            Some(to) => {
                let looked = Landing::look(folder_of(to)).and_then(|()| look_at(to));
                (to.clone(), looked)
            }
        };
        looked.map_err(|error| {
            let mut error = error.told(&to);
            error.message = format!("--copy-out {self}: {}", error.message);
            error
        })
    }
}

/// What is a folder, or is meant to be one.
fn is_folder(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/")
        || path.file_name().is_none()
        || path.is_dir()
}

/// What is to be kept of a run: what `--artifact` names, and what `--copy-out` needs.
///
/// # Errors
/// When that is too much, or a copy cannot lie where it is to go.
pub(crate) fn wanted(artifacts: &[ArtifactPath], copies: &[CopyOut]) -> Result<Vec<ArtifactPath>> {
    let mut all = artifacts.to_vec();
    for copy in copies {
        copy.look()?;
        if !all.contains(&copy.from) {
            all.push(copy.from.clone());
        }
    }
    if all.len() > ARTIFACT_PATHS_MAX {
        return Err(CliError::usage(format!(
            "--artifact and --copy-out: at most {ARTIFACT_PATHS_MAX} in all"
        )));
    }
    Ok(all)
}

/// What a job left, by name; names that no artifact may have are left out.
async fn kept(server: &Server, job: &str) -> Result<Vec<ArtifactView>> {
    let path = format!("/v1/jobs/{job}/artifacts");
    let list: List<ArtifactView> = server.get(&path).await?;
    let legal = |file: &ArtifactView| {
        file.name.parse::<ArtifactName>().is_ok() && file.digest.parse::<Digest>().is_ok()
    };
    Ok(list.items.into_iter().filter(legal).collect())
}

/// `kiln job artifacts ID`
pub(crate) async fn list(server: &Server, job: &JobView, screen: Screen) -> Result<()> {
    let kept = kept(server, &job.line.id).await?;
    if screen.json() {
        for file in &kept {
            screen.data(file, String::new);
        }
        return Ok(());
    }
    if kept.is_empty() {
        screen.note("the job left no artifacts; `kiln run --artifact GLOB` keeps files");
        return Ok(());
    }
    screen.text(&table(&kept, screen.width()));
    Ok(())
}

fn table(kept: &[ArtifactView], width: Option<usize>) -> String {
    let mut table = Table::new(&[right("SIZE"), wide("NAME")]).within(width);
    for file in kept {
        table.row([ByteSize(file.size).to_string(), file.name.clone()]);
    }
    table.render()
}

/// `kiln job artifacts ID NAME... [-o DIR]`; without names all of them.
pub(crate) async fn fetch(
    server: &Server,
    job: &JobView,
    names: &[String],
    to: &Path,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    let id = &job.line.id;
    let kept = kept(server, id).await?;
    let mut files = Vec::new();
    for name in names {
        let Some(file) = kept.iter().find(|file| file.name == *name) else {
            return Err(
                CliError::usage(format!("job {id} has no artifact {name:?}"))
                    .hint(format!("`kiln job artifacts {id}` lists what it left")),
            );
        };
        files.push(file.clone());
    }
    if names.is_empty() {
        files = kept;
    }
    if files.is_empty() {
        return Err(CliError::usage(format!("job {id} left no artifacts")));
    }
    let files = files.into_iter().map(|file| {
        let place = PathBuf::from(&file.name);
        (file, place)
    });
    let fetched = land(server, id, to, files.collect(), cancel).await?;
    for (file, path) in &fetched {
        let value = json!({
            "event": "fetched", "job": id, "name": file.name, "digest": file.digest,
            "size": file.size, "path": path,
        });
        screen.data(&value, || path.shown().to_string());
    }
    Ok(())
}

/// Fetches files to their places below a folder; gives where they lie.
async fn land(
    server: &Server,
    job: &str,
    folder: &Path,
    files: Vec<(ArtifactView, PathBuf)>,
    cancel: &CancellationToken,
) -> Result<Vec<(ArtifactView, PathBuf)>> {
    let landing = Landing::open(folder).map_err(|error| error.told(folder))?;
    let mut fetched = Vec::new();
    for (file, inner) in files {
        download::artifact(server, job, &file, (&landing, &inner), cancel).await?;
        let path = landing.path(&inner);
        fetched.push((file, path));
    }
    Ok(fetched)
}

/// What a run's end brings of its files: the copies that were asked for are made, the rest is told.
///
/// # Errors
/// When a copy has nothing to copy, or cannot be made; the others are made all the same.
pub(crate) async fn after_run(
    server: &Server,
    job: &str,
    copies: &[CopyOut],
    screen: Screen,
) -> Result<()> {
    let kept = kept(server, job).await?;
    // A first Ctrl-C has ended the run; its files still come.
    let cancel = CancellationToken::new();
    let mut failed = None;
    for copy in copies {
        if let Err(mut error) = copied(server, job, copy, &kept, screen, &cancel).await {
            error.message = format!("--copy-out {copy}: {}", error.message);
            failed.get_or_insert(error);
        }
    }
    let rest = kept.iter().filter(|file| {
        let name = file.name.as_str();
        !copies.iter().any(|copy| copy.from.means(name))
    });
    let count = rest.count() as u64;
    if count > 0 {
        let files = counted(count, "file");
        screen.note(&format!(
            "kiln: {files} kept; `kiln job artifacts {job} --all` fetches them"
        ));
    }
    failed.map_or(Ok(()), Err)
}

async fn copied(
    server: &Server,
    job: &str,
    copy: &CopyOut,
    kept: &[ArtifactView],
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    let (folder, files) = copy.places(kept);
    if files.is_empty() {
        return Err(CliError::new(
            FailureClass::User,
            "the command left no such file",
        ));
    }
    let fetched = land(server, job, &folder, files, cancel).await?;
    let bytes = ByteSize(fetched.iter().map(|(file, _)| file.size).sum());
    let what = match fetched.as_slice() {
        [(_, path)] => path.shown().to_string(),
        files => format!(
            "{} below {}",
            counted(files.len() as u64, "file"),
            folder.shown()
        ),
    };
    screen.note(&format!("kiln: copied {what} ({bytes})"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(names: &[&str]) -> Vec<ArtifactView> {
        let file = |name: &&str| ArtifactView {
            name: (*name).to_owned(),
            digest: Digest::of(name.as_bytes()).to_string(),
            size: 1024,
            media_type: "application/octet-stream".to_owned(),
        };
        names.iter().map(file).collect()
    }

    fn places(word: &str, names: &[&str]) -> (String, Vec<String>) {
        let copy: CopyOut = word.parse().expect(word);
        let (folder, files) = copy.places(&kept(names));
        let files = files.iter().map(|(_, path)| path.display().to_string());
        (folder.display().to_string(), files.collect())
    }

    #[test]
    fn a_copy_goes_where_it_is_told() {
        let names = ["out/a.txt", "out/sub/b.txt", "report.xml"];
        for (word, folder, files) in [
            ("report.xml", ".", vec!["report.xml"]),
            ("/report.xml:x/y.xml", "x", vec!["y.xml"]),
            ("report.xml:y.xml", ".", vec!["y.xml"]),
            ("report.xml:/", "/", vec!["report.xml"]),
            ("report.xml:new/", "new/", vec!["report.xml"]),
            ("out", "out", vec!["a.txt", "sub/b.txt"]),
            ("out:here", "here", vec!["a.txt", "sub/b.txt"]),
            ("out/*.txt", ".", vec!["a.txt"]),
            ("**/b*:x", "x", vec!["out/sub/b.txt"]),
            ("none", "none", vec![]),
        ] {
            let (to, got) = places(word, &names);
            assert_eq!(
                (to.as_str(), got),
                (folder, files.iter().map(ToString::to_string).collect()),
                "{word}"
            );
        }
        let (folder, files) = places("deep/er/x.bin", &["deep/er/x.bin"]);
        assert_eq!((folder.as_str(), files), (".", vec!["x.bin".to_owned()]));
        for bad in ["", ":x", "a:", "../a", "a b"] {
            assert!(bad.parse::<CopyOut>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_place_is_looked_at_before_the_command_runs() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| format!("x:{}/{name}", dir.path().display());
        std::fs::create_dir(dir.path().join("real")).expect("folder");
        std::fs::write(dir.path().join("file"), "").expect("write");
        for (to, name) in [("real", "link"), ("file", "to-file")] {
            std::os::unix::fs::symlink(to, dir.path().join(name)).expect("link");
        }
        let looked = |word: &str| wanted(&[], &[word.parse().expect(word)]);
        for good in ["real", "real/new", "new/", "new/x", "file", "to-file"] {
            assert_eq!(looked(&at(good)).expect(good).len(), 1);
        }
        for bad in ["link", "link/", "link/x", "file/"] {
            let error = looked(&at(bad)).expect_err(bad);
            assert_eq!((error.exit_code(), error.hints.len()), (2, 1), "{bad}");
            assert!(error.message.contains("is a link or no folder"), "{error}");
        }
        let error = looked("out/*.txt:/dev/null").expect_err("a device");
        assert_eq!(
            error.message,
            "--copy-out out/*.txt: could not write /dev/null: /dev/null is a device, not a file"
        );
    }

    #[test]
    fn the_list_has_sizes_and_names() {
        assert_eq!(
            table(&kept(&["out/a.txt"]), Some(80)),
            "   SIZE  NAME\n1.0 KiB  out/a.txt\n"
        );
        let copies = ["out".parse().expect("a copy")];
        let paths = ["out".parse().expect("a path")];
        assert_eq!(wanted(&paths, &copies).expect("few").len(), 1);
    }
}
