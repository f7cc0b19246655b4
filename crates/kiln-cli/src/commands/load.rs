//! `kiln build --load`: into the Docker or Podman of this host.
//!
//! An engine counts when it answers: Docker's client without a daemon behind it is passed over for Podman.
//! The archive is Docker's (`docker save`), which both read from standard input.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use kiln_core::{FailureClass, ImageRef};
use kiln_store::HostRegistry;
use kiln_store::image::{ArchiveFormat, VerifiedImage, export};
use kiln_store::registry::RepoName;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;

/// In the order they are asked.
const ENGINES: [&str; 2] = ["docker", "podman"];
/// Longest wait for an engine to say its version: the daemon may be behind a connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Most of an engine's words that are shown.
const WORDS_CHARS_MAX: usize = 500;

/// Streams the image into the first engine that answers, under its short name.
///
/// # Errors
/// When there is none, or it does not take the image; the image stays in kiln's registry.
pub(super) async fn load(
    registry: &HostRegistry,
    repo: &RepoName,
    image: &VerifiedImage,
    reference: &ImageRef,
    screen: Screen,
) -> Result<()> {
    let mut silent = Vec::new();
    for engine in ENGINES {
        match answers(engine).await {
            Ok(()) => {
                let short = short(reference);
                let sent = send(engine, registry, repo, image, &short).await;
                return sent.map(|()| screen.note(&format!("loaded {short} into {engine}")));
            }
            Err(Silent::Missing) => {}
            Err(Silent::Says(words)) => silent.push(format!("{engine}: {words}")),
        }
    }
    match silent.is_empty() {
        true => Err(CliError::usage(
            "--load: neither docker nor podman is installed",
        )),
        false => Err(CliError::new(
            FailureClass::Infrastructure,
            format!("--load: no engine answers\n  {}", silent.join("\n  ")),
        )
        .hint("start it; the image is in kiln's own registry")),
    }
}

/// `t/local/shop:1.4` is `shop:1.4` to an engine, which keeps it as `localhost/shop:1.4` or `docker.io/library/shop:1.4`.
fn short(reference: &ImageRef) -> ImageRef {
    let repository = &reference.repository;
    ImageRef {
        registry: None,
        repository: repository
            .strip_prefix("t/local/")
            .unwrap_or(repository)
            .to_owned(),
        digest: None,
        ..reference.clone()
    }
}

/// Why an engine is passed over.
enum Silent {
    Missing,
    Says(String),
}

async fn answers(engine: &str) -> std::result::Result<(), Silent> {
    let asked = Command::new(engine)
        .arg("version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(Silent::Says(words(&output.stderr))),
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Err(Silent::Missing),
        Ok(Err(error)) => Err(Silent::Says(error.to_string())),
        Err(_) => Err(Silent::Says(format!("no answer in {ANSWER_TIMEOUT:?}"))),
    }
}

async fn send(
    engine: &str,
    registry: &HostRegistry,
    repo: &RepoName,
    image: &VerifiedImage,
    name: &ImageRef,
) -> Result<()> {
    let mut child = Command::new(engine)
        .arg("load")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .or_infrastructure()?;
    let stdin = child.stdin.take();
    let names = std::slice::from_ref(name);
    let write = async {
        let mut stdin = stdin.ok_or_else(|| io::Error::other("no pipe"))?;
        let sent = export(
            registry,
            repo,
            image,
            names,
            ArchiveFormat::Docker,
            &mut stdin,
        )
        .await;
        sent.map_err(io::Error::other)?;
        stdin.shutdown().await
    };
    // Both at once: an engine that says much must not wait for us while we wait for it.
    let (sent, output) = tokio::join!(write, child.wait_with_output());
    let output = output.or_infrastructure()?;
    match (output.status.success(), sent) {
        (true, Ok(())) => Ok(()),
        // The registry's side broke, and the engine took what it had for the whole.
        (true, Err(error)) => Err(CliError::infrastructure(&error)),
        (false, _) => Err(CliError::new(
            FailureClass::Infrastructure,
            format!("{engine} load failed: {}", words(&output.stderr)),
        )
        .hint("the image is in kiln's own registry")),
    }
}

fn words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().take(WORDS_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_know_images_by_their_short_name() {
        let of = |text: &str| {
            let reference: ImageRef = text.parse().expect("a reference");
            short(&reference).to_string()
        };
        assert_eq!(of("t/local/shop:1.4"), "shop:1.4");
        assert_eq!(of("t/local/team/shop:1.4"), "team/shop:1.4");
    }
}
