//! Other real clients against the real door. podman, a client of docker's kind: login, pull by tag and by digest, anonymous
//! pull. crane, where it is installed (Debian does not have it): push, pull, list, validate.

use std::path::Path;

use anyhow::{Context as _, Result};
use kiln_core::Digest;
use kiln_store::registry::Reference;
use kiln_store::registry::manifest::OCI_MANIFEST;
use serde_json::json;
use tokio::process::Command;

use crate::client::manifest;
use crate::loopback::Door;
use crate::remote::program;

/// An empty tar: two blocks of zeros.
const TAR: [u8; 1024] = [0; 1024];
const NAME: &str = "t/local/app";

async fn put_image(door: &Door) -> Result<Digest> {
    let repo = NAME.parse()?;
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/hello"]},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&TAR)]}
    }))?;
    for bytes in [&TAR[..], &config] {
        let content = std::io::Cursor::new(bytes.to_vec());
        door.host.put_blob(&repo, content, None).await?;
    }
    let bytes = serde_json::to_vec(&manifest(&config, &[&TAR]))?;
    let tag = Reference::Tag("v1".to_owned());
    Ok(door
        .host
        .put_manifest(&repo, &tag, OCI_MANIFEST, bytes)
        .await?)
}

/// podman with everything it writes below `dir`.
struct Podman<'a>(&'a Path, std::path::PathBuf);

impl Podman<'_> {
    async fn run(&self, args: &[&str]) -> Result<(bool, String)> {
        let dir = |name: &str| self.0.join(name);
        let output = Command::new(&self.1)
            .arg("--root")
            .arg(dir("root"))
            .arg("--runroot")
            .arg(dir("run"))
            .args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"])
            .args(args)
            .env("REGISTRY_AUTH_FILE", dir("auth.json"))
            .env("HOME", self.0)
            .env("XDG_RUNTIME_DIR", self.0)
            .output()
            .await?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok((output.status.success(), text))
    }
}

/// Whether podman can keep images at all on this host, apart from kiln.
async fn works(podman: &Podman<'_>) -> Result<bool> {
    let (works, text) = podman.run(&["images"]).await?;
    if !works {
        eprintln!(
            "SKIPPED: podman does not work on this host: {}",
            text.trim()
        );
    }
    Ok(works)
}

#[tokio::test]
async fn podman_pulls() -> Result<()> {
    let Some(program) = program("podman")? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("auth.json"), "{}")?;
    let podman = Podman(dir.path(), program);
    if !works(&podman).await? {
        return Ok(());
    }
    let door = Door::open(&[]).await?;
    let digest = put_image(&door).await?;
    let name = format!("{}/{NAME}", door.address);
    let pull = ["pull", "--tls-verify=false"];
    let by_tag = format!("{name}:v1");
    let (pulled, text) = podman.run(&[&pull[..], &[&by_tag]].concat()).await?;
    assert!(!pulled && text.contains("unauthorized"), "{text}");
    let (user, secret) = door.host.credentials()?;
    let address = door.address.to_string();
    let login = [
        "login",
        "--tls-verify=false",
        "-u",
        user,
        "-p",
        secret.reveal(),
        &address,
    ];
    let (logged_in, text) = podman.run(&login).await?;
    assert!(logged_in, "{text}");
    for reference in [by_tag.clone(), format!("{name}@{digest}")] {
        let (pulled, text) = podman.run(&[&pull[..], &[&reference]].concat()).await?;
        assert!(pulled, "{text}");
    }
    let inspect = ["inspect", "--format", "{{.Digest}}", &by_tag];
    let (_, text) = podman.run(&inspect).await?;
    assert_eq!(text.trim(), digest.to_string());

    let open = Door::open(&["t/local"]).await?;
    put_image(&open).await.context("image")?;
    let reference = format!("{}/{NAME}:v1", open.address);
    let (pulled, text) = podman.run(&[&pull[..], &[&reference]].concat()).await?;
    assert!(pulled, "anonymous: {text}");
    Ok(())
}

#[tokio::test]
async fn crane_pushes_pulls_and_validates() -> Result<()> {
    let Ok(version) = Command::new("crane").arg("version").output().await else {
        eprintln!("SKIPPED: crane is not installed");
        return Ok(());
    };
    assert!(version.status.success());
    let dir = tempfile::tempdir()?;
    let door = Door::open(&[]).await?;
    let digest = put_image(&door).await?;
    let crane = async |args: &[&str]| -> Result<(bool, String)> {
        let output = Command::new("crane")
            .args(args)
            .arg("--insecure")
            .env("DOCKER_CONFIG", dir.path())
            .output()
            .await?;
        let text = [output.stdout, output.stderr].concat();
        Ok((
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        ))
    };
    let (name, address) = (format!("{}/{NAME}", door.address), door.address.to_string());
    let (asked, _) = crane(&["digest", &format!("{name}:v1")]).await?;
    assert!(!asked, "without a login");
    let (user, secret) = door.host.credentials()?;
    let login = ["auth", "login", &address, "-u", user, "-p", secret.reveal()];
    let (done, text) = crane(&login).await?;
    assert!(done, "{text}");
    let (_, text) = crane(&["digest", &format!("{name}:v1")]).await?;
    assert_eq!(text.trim(), digest.to_string());
    let archive = dir.path().join("image.tar");
    let archive = archive.to_str().context("path")?;
    let copy = format!("{}/t/local/copy", door.address);
    for args in [
        &["pull", &format!("{name}:v1"), archive][..],
        &["push", archive, &format!("{copy}:v2")],
        &["copy", &format!("{name}:v1"), &format!("{copy}:v3")],
        &["tag", &format!("{copy}:v3"), "v4"],
        // It takes compressed layers for granted here; what it pushed itself has them.
        &["validate", "--remote", &format!("{copy}:v2")],
    ] {
        let (done, text) = crane(args).await?;
        assert!(done, "{args:?}: {text}");
    }
    let (_, text) = crane(&["ls", &copy]).await?;
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["v2", "v3", "v4"]
    );
    let (done, text) = crane(&["delete", &format!("{copy}@{digest}")]).await?;
    assert!(done, "{text}");
    Ok(())
}
