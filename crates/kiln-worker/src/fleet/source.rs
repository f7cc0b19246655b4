//! The source of a job, brought to this host: a folder of the command that asks, an upload, or a commit fetched in a checkout machine.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::digest::Hasher;
use kiln_core::job::{
    JobKind, POLICY_BYTES_MAX, POLICY_NAMES, RunSource, Source, SourceBuild, TrustClass,
};
use kiln_core::{Digest, FailureClass, GitCommit, ImageRef, JobId, JobRequest};
use kiln_image::context::{self, Limits, Tree};
use kiln_image::plan::Suited;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::client::{LinkError, job_path};
use super::job::Work;
use super::local::LocalFolder;
use crate::checkout::{self, Address, Beside, Checkout, CheckoutDir, CheckoutInput, FilesBeside};
use crate::event::Event;
use crate::failure::Failure;
use crate::prepare;
use crate::run_files::RunFiles;

/// A source that lies on this host as long as this lives.
pub(super) struct Here {
    pub(super) dir: PathBuf,
    pub(super) git: Option<GitCommit>,
    /// The policies of the trusted ref beside it.
    pub(super) beside: Option<FilesBeside>,
    /// What stays behind of it was left out before it came here.
    pub(super) whole: bool,
    _upload: Option<CheckoutDir>,
    _checkout: Option<Checkout>,
}

/// What a command works on, and the base that fits it.
pub(super) struct Worked {
    pub(super) files: RunFiles,
    /// None: nothing in it asks for a base, or there is none of its runtime.
    pub(super) base: Option<ImageRef>,
    pub(super) _here: Here,
}

impl Work<'_> {
    /// Brings the files of a command here. `find_base` looks for a base that fits them.
    pub(super) async fn worked(
        &self,
        request: &JobRequest,
        wanted: &RunSource,
        local: Option<LocalFolder>,
        find_base: bool,
    ) -> Result<Worked, Failure> {
        let here = self.source(request, &wanted.source, local).await?;
        let (dir, whole) = (here.dir.clone(), here.whole);
        let opened = tokio::task::spawn_blocking(move || match whole {
            true => Tree::open_whole(&dir, Limits::default()),
            false => Tree::open_for_run(&dir, Limits::default()),
        });
        let opened = opened
            .await
            .map_err(|error| Failure::infrastructure(&error))?;
        let tree = opened.map_err(|error| prepare::folder_failure(&error))?;
        let files = RunFiles::new(tree, &wanted.folder)?;
        let base = match find_base {
            true => self.base(&here.dir).await?,
            false => None,
        };
        Ok(Worked {
            files,
            base,
            _here: here,
        })
    }

    /// The build image of the base that a runtime's name means here.
    pub(super) fn named(&self, runtime: &str) -> Result<ImageRef, Failure> {
        let found = self.shop.site.bases.named(runtime);
        found.map_err(|none| Failure::new(FailureClass::Usage, none.to_string()).hint(none.hint()))
    }

    /// The build image of the base that fits a folder's runtime.
    async fn base(&self, dir: &Path) -> Result<Option<ImageRef>, Failure> {
        let (dir, bases) = (dir.to_owned(), self.shop.site.bases.clone());
        let found = tokio::task::spawn_blocking(move || kiln_image::plan::suited(&dir, &bases));
        let found = found
            .await
            .map_err(|error| Failure::infrastructure(&error))?;
        match found.map_err(|error| prepare::plan_failure(&error))? {
            Suited::Base { name, image } if image.digest.is_some() => {
                self.events
                    .note(format!("runs in the base of {name}"))
                    .await;
                // In kiln's own registry, whatever it is called there.
                Ok(Some(ImageRef {
                    registry: None,
                    ..image
                }))
            }
            Suited::Base { name, .. } => {
                let message = format!("the base of {name} is not there yet");
                Err(Failure::new(FailureClass::Usage, message).hint("run `kiln setup` once"))
            }
            Suited::None { file, runtime } => {
                let text = format!(
                    "{file} is of a {runtime} project, for which there is no base: the command runs in the machine image; --image names one that has its tools"
                );
                self.events.warn(text).await;
                Ok(None)
            }
            Suited::Any => Ok(None),
        }
    }

    pub(super) async fn source(
        &self,
        request: &JobRequest,
        source: &Source,
        local: Option<LocalFolder>,
    ) -> Result<Here, Failure> {
        if let Some(folder) = local {
            return Ok(Here {
                dir: folder.dir,
                git: folder.git,
                beside: None,
                whole: false,
                _upload: None,
                _checkout: None,
            });
        }
        match source {
            Source::Folder { path } => {
                let message = format!("the folder {path} belongs to another command");
                Err(Failure::new(FailureClass::Usage, message).hint("type the command again"))
            }
            Source::Tree { digest, size } => self.upload(&request.id, *digest, *size).await,
            Source::Git { url, reference } => {
                let asked = Some(reference.as_str()).filter(|name| *name != "HEAD");
                let site = &self.shop.site;
                let input = CheckoutInput {
                    job: request.id.clone(),
                    address: Address::new(url, asked)?,
                    ca_bundle: site.ca_bundle.clone(),
                    exceptions: site.exceptions(),
                    proxy: site.proxy.clone(),
                    exact: is_exact(request),
                    beside: policy_beside(request)?,
                    limits: Limits::default(),
                    timeout: Duration::from_millis(request.limits.timeout_ms),
                    bytes_per_second: request.network_bytes_per_second(),
                };
                let checked =
                    checkout::checkout(&self.shop.host, input, self.events, &self.cancel).await?;
                Ok(Here {
                    dir: checked.dir.path().to_owned(),
                    git: Some(checked.git.clone()),
                    beside: checked.beside.clone(),
                    whole: true,
                    _upload: None,
                    _checkout: Some(checked),
                })
            }
        }
    }

    /// Fetches an uploaded tree, checks its digest, and writes it into a folder of this host.
    async fn upload(&self, job: &JobId, digest: Digest, size: u64) -> Result<Here, Failure> {
        self.events.tell(Event::Phase { name: "checkout" }).await;
        let infrastructure = |error: &dyn std::error::Error| Failure::infrastructure(error);
        let path = job_path(job, "source");
        let body = self.shop.client.get(&path, Some(self.lease));
        let body = body.await.map_err(|error| no_source(&error))?;
        let stream = http_body_util::BodyDataStream::new(body);
        let stream = futures_util::TryStreamExt::map_err(stream, io::Error::other);
        let reader = SyncIoBridge::new(StreamReader::new(stream));
        let parent = self.shop.host.home.cache.join("checkouts");
        let name = format!("{job}-source");
        let unpacked = tokio::task::spawn_blocking(move || {
            let dir = CheckoutDir::fresh(&parent, &name).map_err(|e| infrastructure(&e))?;
            let mut hashed = Hashed {
                inner: reader.take(size.saturating_add(1)),
                hasher: Hasher::default(),
            };
            let done = context::unpack(&mut hashed, dir.path(), Limits::default());
            // A tar ends before its stream does: the rest belongs to the digest.
            io::copy(&mut hashed, &mut io::sink()).map_err(|e| infrastructure(&e))?;
            if hashed.hasher.finish().0 != digest {
                let message = "the source that arrived is not the one that was uploaded";
                return Err(Failure::new(FailureClass::Infrastructure, message));
            }
            done.map_err(|error| Failure::new(error.class(), crate::orders::chain(&error)))?;
            Ok(dir)
        });
        let dir = unpacked
            .await
            .map_err(|error| Failure::infrastructure(&error))??;
        Ok(Here {
            dir: dir.path().to_owned(),
            git: None,
            beside: None,
            whole: true,
            _upload: Some(dir),
            _checkout: None,
        })
    }
}

/// The controller trusted one ref, by its full name; a command's own user asks for what he means.
fn is_exact(request: &JobRequest) -> bool {
    request.trust == TrustClass::Trusted && request.dispatch.requires.own().is_none()
}

/// The trusted ref whose policy holds an untrusted build.
fn policy_beside(request: &JobRequest) -> Result<Option<Beside>, Failure> {
    let JobKind::SourceBuild(SourceBuild {
        source: Source::Git { url, .. },
        policy_ref: Some(reference),
        ..
    }) = &request.kind
    else {
        return Ok(None);
    };
    let named = Some(reference.as_str()).filter(|name| *name != "HEAD");
    Ok(Some(Beside {
        reference: Address::new(url, named)?.reference,
        names: &POLICY_NAMES,
        bytes_max: POLICY_BYTES_MAX as u64,
    }))
}

/// Why an uploaded source did not come.
fn no_source(error: &LinkError) -> Failure {
    match error {
        // No host has it, and trying others would look as if each of them were broken.
        LinkError::Refused { status: 404, .. } => Failure::new(
            FailureClass::Usage,
            "the controller does not keep the uploaded source any more",
        )
        .hint("send the build again"),
        error => Failure::infrastructure(error),
    }
}

struct Hashed<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..got]);
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_gone_is_no_fault_of_a_host() {
        let refused = |status| LinkError::Refused {
            status,
            code: "not_found".to_owned(),
            message: "the source is gone".to_owned(),
        };
        let gone = no_source(&refused(404));
        assert!(!gone.class.is_retried(), "{gone:?}");
        assert!(no_source(&refused(400)).class.is_retried());
    }
}
