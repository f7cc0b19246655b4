//! Where a built image goes besides kiln's own registry: an archive file, a local engine, another registry.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use kiln_core::ImageRef;
use kiln_store::HostRegistry;
use kiln_store::image::{ArchiveFormat, VerifiedImage, Verify, export, verify};
use kiln_store::registry::RepoName;
use kiln_worker::build::BuildReport;
use kiln_worker::failure::Failure;
use tokio_util::sync::CancellationToken;

use super::landing::{Fresh, Landing, LandingError, folder_of, look_at};
use super::operator::Operator;
use crate::args::BuildArgs;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

/// What `--output` says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Output {
    oci: Option<PathBuf>,
}

impl Output {
    /// Parses `registry` or `oci:FILE`.
    ///
    /// # Errors
    /// For anything else, and where no archive or result can lie: before anything is built for it.
    pub(crate) fn parse(args: &BuildArgs) -> Result<Self> {
        look_at_result(args)?;
        match args.output.split_once(':') {
            None if args.output == "registry" => Ok(Self { oci: None }),
            Some(("oci", file)) if !file.is_empty() => {
                let file = PathBuf::from(file);
                look_at(&file).map_err(|error| error.told(&file))?;
                Ok(Self { oci: Some(file) })
            }
            _ => Err(CliError::usage(format!(
                "--output {:?}: write registry or oci:FILE",
                args.output
            ))),
        }
    }

    /// Sends the image wherever the command line says.
    ///
    /// # Errors
    /// When a destination fails; the image stays in kiln's registry.
    pub(crate) async fn deliver(
        &self,
        operator: &Operator,
        report: &BuildReport,
        args: &BuildArgs,
        screen: Screen,
        cancel: &CancellationToken,
    ) -> Result<()> {
        write_result(args, report)?;
        if self.oci.is_none() && !args.load && args.push.is_none() {
            return Ok(());
        }
        let registry = operator.registry().await?;
        let reference: ImageRef = report.reference.parse().or_infrastructure()?;
        let repo: RepoName = reference.repository.parse().or_infrastructure()?;
        let asked = Verify {
            rehash: false,
            ..Verify::image(repo.clone(), report.digest)
        };
        let image = verify(&registry.host, &asked).await.or_infrastructure()?;
        if let Some(path) = &self.oci {
            archive(&registry.host, (&repo, &image, &reference), path, cancel).await?;
            screen.note(&format!("wrote {}", path.shown()));
        }
        if args.load {
            super::load::load(&registry.host, &repo, &image, &reference, screen).await?;
        }
        if let Some(target) = &args.push {
            let push = super::push::push(operator, &registry.host, &repo, &image, target, screen);
            tokio::select! {
                pushed = push => pushed?,
                () = cancel.cancelled() => {
                    return Err(CliError::from_failure(Failure::cancelled())
                        .hint("the image stays in kiln's own registry"));
                }
            }
        }
        Ok(())
    }
}

/// Looks whether what was built can be told at `--result`, before it is built.
///
/// # Errors
/// When the way there leads elsewhere, or no file may lie there.
pub(super) fn look_at_result(args: &BuildArgs) -> Result<()> {
    let Some(file) = args.result.as_ref().filter(|file| !is_stream(file)) else {
        return Ok(());
    };
    let looked = Landing::look(folder_of(file)).and_then(|()| look_at(file));
    looked.map_err(|error| error.told(file))
}

/// Tells at `--result` what was built: in a file, whole or not at all, or in a stream.
///
/// # Errors
/// As [`look_at_result`], and when it cannot be written.
pub(super) fn write_result(args: &BuildArgs, report: &BuildReport) -> Result<()> {
    let Some(file) = &args.result else {
        return Ok(());
    };
    let text = serde_json::to_vec_pretty(report).or_infrastructure()?;
    put(file, &text).map_err(|error| error.told(file))
}

fn put(file: &Path, text: &[u8]) -> Result<(), LandingError> {
    if is_stream(file) {
        return std::fs::write(file, text).map_err(LandingError::Io);
    }
    let mut fresh = Fresh::begin(file)?;
    fresh.file.write_all(text)?;
    fresh.finish()
}

/// Whether a path is the system's name for something that this process has open: `/dev/stdout`, `/dev/fd/3`. No project can put that elsewhere.
fn is_stream(path: &Path) -> bool {
    let Some(path) = path.to_str() else {
        return false;
    };
    let number = ["/dev/fd/", "/proc/self/fd/"]
        .iter()
        .find_map(|folder| path.strip_prefix(*folder));
    match number {
        Some(number) => !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()),
        None => matches!(path, "/dev/stdout" | "/dev/stderr"),
    }
}

/// Writes an image into an archive file, whole or not at all.
async fn archive(
    registry: &HostRegistry,
    (repo, image, reference): (&RepoName, &VerifiedImage, &ImageRef),
    path: &Path,
    cancel: &CancellationToken,
) -> Result<()> {
    let fresh = Fresh::begin(path).map_err(|error| error.told(path))?;
    let file = fresh.file.try_clone().or_infrastructure()?;
    let mut file = tokio::fs::File::from_std(file);
    let written = export(
        registry,
        repo,
        image,
        std::slice::from_ref(reference),
        ArchiveFormat::Oci,
        &mut file,
    );
    tokio::select! {
        written = written => written.or_infrastructure()?,
        () = cancel.cancelled() => {
            return Err(CliError::from_failure(Failure::cancelled())
                .hint("the image stays in kiln's own registry"));
        }
    }
    file.sync_all().await.or_infrastructure()?;
    fresh.finish().map_err(|error| error.told(path))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn parsed(output: &str) -> Result<Output> {
        let words = ["kiln", "build", "--output", output, "."];
        match Cli::try_parse_from(words).expect("legal").command {
            Command::Build(args) => Output::parse(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_result_goes_through_no_link_and_over_no_device() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        let read = |name: &str| std::fs::read_to_string(at(name)).expect("reads");
        std::fs::write(at("theirs"), "precious").expect("write");
        std::fs::create_dir(at("real")).expect("folder");
        for (to, name) in [("theirs", "link"), ("real", "way")] {
            std::os::unix::fs::symlink(to, at(name)).expect("link");
        }
        for text in ["{}", "[]"] {
            put(&at("link"), text.as_bytes()).expect("in place of the link");
            assert_eq!(read("link"), text);
        }
        assert_eq!(read("theirs"), "precious");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), mode).expect("fifo");
        for bad in [at("way/x"), at("fifo"), at("real"), "/dev/null".into()] {
            assert!(put(&bad, b"x").is_err(), "{bad:?}");
        }
        assert_eq!(std::fs::read_dir(at("real")).expect("list").count(), 0);
        // Told before anything is built.
        for (result, fine) in [("/dev/null", false), ("/dev/stdout", true), ("new", true)] {
            let words = ["kiln", "build", "--result", result, "."];
            match Cli::try_parse_from(words).expect("legal").command {
                Command::Build(args) => {
                    assert_eq!(Output::parse(&args).is_ok(), fine, "{result}");
                    assert_eq!(look_at_result(&args).is_ok(), fine, "{result}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_result_goes_into_what_this_process_has_open() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let stream = format!("/proc/self/fd/{}", file.as_file().as_raw_fd());
        put(Path::new(&stream), b"{}").expect("written");
        assert_eq!(std::fs::read(file.path()).expect("reads"), b"{}");
        for stream in ["/dev/stdout", "/dev/stderr", "/dev/fd/63"] {
            assert!(is_stream(Path::new(stream)), "{stream}");
        }
        for file in ["dev/stdout", "/dev/fd/", "/dev/fd/3/x", "/dev/fd/..", "-"] {
            assert!(!is_stream(Path::new(file)), "{file}");
        }
    }

    #[test]
    fn an_archive_is_refused_where_it_would_replace_more_than_a_file() {
        let dir = tempfile::tempdir().expect("dir");
        let spec = format!("oci:{}", dir.path().join("new.tar").display());
        assert!(parsed(&spec).expect("free").oci.is_some());
        assert!(parsed("registry").expect("legal").oci.is_none());
        assert!(parsed("oci:").is_err());
        let error = parsed("oci:/dev/null").expect_err("a device");
        assert_eq!((error.exit_code(), error.hints.len()), (2, 1));
        assert!(error.message.contains("is a device, not a file"), "{error}");
    }
}
