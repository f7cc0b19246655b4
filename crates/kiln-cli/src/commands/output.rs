//! Where a built image goes besides kiln's own registry: an archive file, a local engine, another registry.

use std::path::{Path, PathBuf};

use kiln_core::ImageRef;
use kiln_store::HostRegistry;
use kiln_store::image::{ArchiveFormat, VerifiedImage, Verify, export, verify};
use kiln_store::registry::RepoName;
use kiln_worker::build::BuildReport;
use kiln_worker::failure::Failure;
use tokio_util::sync::CancellationToken;

use super::landing::{Fresh, look_at};
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
    /// For anything else, and where no archive can lie: before anything is built for it.
    pub(crate) fn parse(args: &BuildArgs) -> Result<Self> {
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
        if let Some(file) = &args.result {
            let text = serde_json::to_vec_pretty(report).or_infrastructure()?;
            std::fs::write(file, text).map_err(|error| {
                CliError::usage(format!("could not write {}: {error}", file.shown()))
            })?;
        }
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
