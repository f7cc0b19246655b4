//! The real skopeo against the real door: copy in, inspect, copy out.

use std::path::Path;

use anyhow::{Context, Result, bail};
use kiln_core::Digest;
use kiln_store::registry::Reference;
use kiln_store::registry::manifest::OCI_MANIFEST;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::client::descriptor;
use crate::loopback::Door;

/// Whether skopeo is here. Missing, it is said; where tools are required, it fails.
#[expect(
    clippy::disallowed_methods,
    reason = "the test's own switch is read from the environment"
)]
pub(crate) fn skopeo_is_here() -> Result<bool> {
    let found = std::process::Command::new("skopeo")
        .arg("--version")
        .output();
    if found.is_ok_and(|output| output.status.success()) {
        return Ok(true);
    }
    if std::env::var_os("KILN_TEST_REQUIRE_TOOLS").is_some() {
        bail!("skopeo is required and not installed");
    }
    eprintln!("SKIPPED: skopeo is not installed");
    Ok(false)
}

pub(crate) async fn skopeo(args: &[&str]) -> Result<String> {
    let output = Command::new("skopeo").args(args).output().await?;
    if !output.status.success() {
        bail!(
            "skopeo {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// An OCI layout with one image of one (empty tar) layer and one large one.
fn write_layout(dir: &Path) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    let put = |bytes: &[u8]| std::fs::write(blobs.join(Digest::of(bytes).hex()), bytes);
    let mut layer = vec![0_u8; 3 << 20];
    let mut state = 1_u32;
    for byte in &mut layer {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_le_bytes()[3];
    }
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64", "os": "linux", "config": {"Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]}
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    }))?;
    let index = json!({"schemaVersion": 2, "manifests": [descriptor(OCI_MANIFEST, &manifest)]});
    put(&layer)?;
    put(&config)?;
    put(&manifest)?;
    std::fs::write(dir.join("index.json"), serde_json::to_vec(&index)?)?;
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

#[tokio::test]
async fn copy_in_inspect_and_copy_out() -> Result<()> {
    if !skopeo_is_here()? {
        return Ok(());
    }
    let door = Door::open(&[]).await?;
    let layout = door.dir.path().join("layout");
    write_layout(&layout)?;
    let (user, secret) = door.host.credentials()?;
    let creds = format!("{user}:{}", secret.reveal());
    let source = format!("oci:{}", layout.display());
    let target = format!("docker://{}/t/local/app:v1", door.address);
    skopeo(&[
        "copy",
        "--dest-tls-verify=false",
        "--dest-creds",
        &creds,
        &source,
        &target,
    ])
    .await?;
    let inspected = skopeo(&["inspect", "--tls-verify=false", "--creds", &creds, &target]).await?;
    let inspected: Value = serde_json::from_str(&inspected)?;
    assert_eq!(inspected["RepoTags"], json!(["v1"]));
    assert_eq!(inspected["Env"], json!(["A=b"]));
    let repo = "t/local/app".parse()?;
    let stored = door
        .host
        .get_manifest(&repo, &Reference::Tag("v1".to_owned()))
        .await?;
    assert_eq!(inspected["Digest"], json!(stored.digest));

    let second = format!("docker://{}/t/local/copy:v2", door.address);
    let verify = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    let login = ["--src-creds", &creds, "--dest-creds", &creds];
    skopeo(&[&["copy"], &verify[..], &login[..], &[&target, &second]].concat()).await?;
    let out = door.dir.path().join("out");
    let out_ref = format!("oci:{}:v2", out.display());
    skopeo(&[
        "copy",
        "--src-tls-verify=false",
        "--src-creds",
        &creds,
        &second,
        &out_ref,
    ])
    .await?;
    let index: Value = serde_json::from_slice(&std::fs::read(out.join("index.json"))?)?;
    assert_eq!(index["manifests"][0]["digest"], json!(stored.digest));
    let manifest: Value = serde_json::from_slice(&stored.bytes)?;
    let layer: Digest = manifest["layers"][0]["digest"]
        .as_str()
        .context("digest")?
        .parse()?;
    let copied = std::fs::read(out.join("blobs/sha256").join(layer.hex()))?;
    assert_eq!(Digest::of(&copied), layer);

    let denied = skopeo(&["inspect", "--tls-verify=false", "--no-creds", &target]).await;
    assert!(denied.is_err(), "no token, no pull");
    let quarantine = format!("docker://{}/quarantine/b1/1:v1", door.address);
    let copy = [
        "copy",
        "--dest-tls-verify=false",
        "--dest-creds",
        &creds,
        &source,
        &quarantine,
    ];
    assert!(
        skopeo(&copy).await.is_err(),
        "users do not write quarantine"
    );
    skopeo(&["delete", "--tls-verify=false", "--creds", &creds, &target]).await?;
    assert!(door.host.list_tags(&repo).await?.is_empty());
    Ok(())
}
