//! Git sources of `kiln build`: fetched in a checkout machine, proven on this host, then a folder like any other.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::GitCommit;
use kiln_image::context::{Limits, open_beneath};
use kiln_worker::checkout::{Address, CheckoutInput};
use kiln_worker::event::Events;
use kiln_worker::host::new_job_id;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::source::Source;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

/// Where a build's source lies on this host.
#[derive(Debug)]
pub(super) struct Local {
    /// The folder.
    pub(super) dir: PathBuf,
    /// What an image of it is called when nobody says.
    pub(super) name: String,
    /// Keeps a checkout's folder until the build has read it.
    checkout: Option<kiln_worker::checkout::Checkout>,
}

impl Local {
    /// The commit, when it was checked out.
    pub(super) fn git(&self) -> Option<GitCommit> {
        self.checkout.as_ref().map(|checkout| checkout.git.clone())
    }
}

/// Brings a source to this host.
///
/// # Errors
/// What the checkout says.
pub(super) async fn local(
    operator: &Operator,
    source: Source,
    file: Option<&Path>,
    timeout_ms: u64,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<Local> {
    let (url, reference) = match source {
        Source::Folder(dir) => {
            let canonical = dir.canonicalize().or_infrastructure()?;
            let name = canonical
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or("app")
                .to_owned();
            return Ok(Local {
                dir,
                name,
                checkout: None,
            });
        }
        Source::Git { url, reference } => (url, reference),
    };
    let address = Address::new(&url, reference.as_deref()).map_err(CliError::from_failure)?;
    let input = CheckoutInput {
        job: new_job_id('c').map_err(CliError::from_failure)?,
        address,
        ca_bundle: operator.ca_bundle()?,
        exceptions: operator.exceptions(),
        proxy: operator.proxy()?,
        limits: Limits::default(),
        timeout: Duration::from_millis(timeout_ms),
        bytes_per_second: None,
    };
    let host = operator.host().await?;
    let (events, receiver) = Events::channel();
    let follow = tokio::spawn(screen.follow(receiver));
    let checkout = kiln_worker::checkout::checkout(&host, input, &events, cancel).await;
    drop(events);
    let _screen_ended = follow.await;
    let checkout = checkout.map_err(CliError::from_failure)?;
    let dir = checkout.dir.path().to_owned();
    if let Some(file) = file {
        check_file(&dir, file)?;
    }
    Ok(Local {
        dir,
        name: name_of(&url),
        checkout: Some(checkout),
    })
}

/// `--file` names a file of the user's, or one of the repository: never something of this host through a link in the
/// repository.
fn check_file(dir: &Path, file: &Path) -> Result<()> {
    use std::os::fd::AsFd as _;
    use std::os::unix::ffi::OsStrExt as _;
    if file.is_file() {
        return Ok(());
    }
    let root = std::fs::File::open(dir).or_infrastructure()?;
    let opened = open_beneath(root.as_fd(), file.as_os_str().as_bytes(), false);
    opened.map(drop).map_err(|error| {
        CliError::usage(format!(
            "--file {}: not a file of the repository: {error}",
            file.shown()
        ))
    })
}

/// The repository's own name: the last part of its URL.
fn name_of(url: &str) -> String {
    let last = url
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or_default();
    last.strip_suffix(".git").unwrap_or(last).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_have_names() {
        assert_eq!(name_of("https://git.example.org/team/shop.git"), "shop");
        assert_eq!(name_of("https://git.example.org/team/shop/"), "shop");
    }

    #[test]
    fn a_link_in_a_repository_leads_nowhere() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("Dockerfile.evil"))
            .expect("link");
        std::fs::write(dir.path().join("Dockerfile.good"), "FROM x\n").expect("write");
        assert!(check_file(dir.path(), Path::new("Dockerfile.good")).is_ok());
        for bad in ["Dockerfile.evil", "../x", "nowhere"] {
            assert!(check_file(dir.path(), Path::new(bad)).is_err(), "{bad}");
        }
    }
}
