//! Where a built image goes besides kiln's own registry: an archive file, a local engine, another registry.

use std::path::PathBuf;

use kiln_core::ImageRef;
use kiln_store::image::{ArchiveFormat, Verify, export, verify};
use kiln_store::registry::RepoName;
use kiln_worker::build::BuildReport;
use kiln_worker::failure::Failure;
use tokio_util::sync::CancellationToken;

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
    /// For anything else.
    pub(crate) fn parse(args: &BuildArgs) -> Result<Self> {
        match args.output.split_once(':') {
            None if args.output == "registry" => Ok(Self { oci: None }),
            Some(("oci", file)) if !file.is_empty() => Ok(Self {
                oci: Some(PathBuf::from(file)),
            }),
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
            let partial = path.with_extension(format!("partial-{}", std::process::id()));
            let mut file = tokio::fs::File::create(&partial).await.map_err(|error| {
                CliError::usage(format!("could not write {}: {error}", partial.shown()))
            })?;
            let written = export(
                &registry.host,
                &repo,
                &image,
                std::slice::from_ref(&reference),
                ArchiveFormat::Oci,
                &mut file,
            )
            .await;
            let written = match written {
                Ok(()) => file.sync_all().await.or_infrastructure(),
                Err(error) => Err(CliError::infrastructure(&error)),
            };
            if let Err(error) = written {
                let _already_gone = tokio::fs::remove_file(&partial).await;
                return Err(error);
            }
            tokio::fs::rename(&partial, path)
                .await
                .or_infrastructure()?;
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
