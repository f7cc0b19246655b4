//! The host's look at images, honest and lying ones, and the archives it writes.

use anyhow::Result;
use kiln_core::{Digest, ImageRef};
use kiln_store::HostRegistry;
use kiln_store::host::HostConfig;
use kiln_store::image::{ArchiveFormat, ExpectedBase, Select, Verify, export, verify};
use kiln_store::registry::manifest::{OCI_INDEX, OCI_MANIFEST};
use kiln_store::registry::{Reference, RepoName};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{descriptor, digest_of, manifest};
use crate::skopeo::{skopeo, skopeo_is_here};

struct Rig {
    host: HostRegistry,
    dir: TempDir,
    repo: RepoName,
}

fn config(layers: &[&[u8]]) -> Value {
    let diff_ids: Vec<Digest> = layers.iter().map(|bytes| Digest::of(bytes)).collect();
    json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PORT=3000"], "Cmd": ["node", "server.js"], "User": "1000",
            "WorkingDir": "/app", "ExposedPorts": {"3000/tcp": {}}, "Labels": {"a": "b"}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

impl Rig {
    async fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let host =
            HostRegistry::open_or_attach(&dir.path().join("r"), HostConfig::default()).await?;
        let repo = "quarantine/b1/1".parse()?;
        Ok(Self { host, dir, repo })
    }

    async fn push(&self, manifest: &Value) -> Result<Digest> {
        let media_type = manifest["mediaType"].as_str().unwrap_or(OCI_MANIFEST);
        let reference = Reference::Digest(digest_of(manifest));
        let bytes = serde_json::to_vec(manifest)?;
        Ok(self
            .host
            .put_manifest(&self.repo, &reference, media_type, bytes)
            .await?)
    }

    /// Pushes an image with this configuration and these layers, `change` made to its manifest.
    async fn image(
        &self,
        config: &Value,
        layers: &[&[u8]],
        change: impl FnOnce(&mut Value),
    ) -> Result<Digest> {
        let config = serde_json::to_vec(config)?;
        for bytes in [layers, &[config.as_slice()]].concat() {
            self.host
                .put_blob(&self.repo, std::io::Cursor::new(bytes.to_vec()), None)
                .await?;
        }
        let mut manifest = manifest(&config, layers);
        change(&mut manifest);
        self.push(&manifest).await
    }

    /// The words of the refusal.
    async fn refusal(&self, asked: &Verify) -> String {
        match verify(&self.host, asked).await {
            Ok(image) => panic!("accepted: {image:?}"),
            Err(error) => {
                assert!(error.is_images_fault(), "{error}");
                error.to_string()
            }
        }
    }

    fn asked(&self, manifest: Digest) -> Verify {
        Verify::image(self.repo.clone(), manifest)
    }
}

const TAR: [u8; 1024] = [0; 1024];
const TAR2: [u8; 1536] = [0; 1536];

#[tokio::test]
async fn an_honest_image_is_read_in_full() -> Result<()> {
    let rig = Rig::new().await?;
    let layers: [&[u8]; 2] = [&TAR, &TAR2];
    let digest = rig.image(&config(&layers), &layers, |_| {}).await?;
    let mut asked = rig.asked(digest);
    asked.base = Some(ExpectedBase {
        diff_ids: vec![Digest::of(&TAR)],
        layers: vec![Digest::of(&TAR)],
    });
    let image = verify(&rig.host, &asked).await?;
    assert_eq!(image.config.cmd, ["node", "server.js"]);
    assert_eq!(
        (image.config.user.as_str(), image.config.workdir.as_str()),
        ("1000", "/app")
    );
    assert_eq!(image.config.exposed_ports, ["3000/tcp"]);
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.layers[1].diff_id, Digest::of(&TAR2));
    assert_eq!(image.total_size, 1024 + 1536 + image.config_blob.1);
    Ok(())
}

#[tokio::test]
async fn lies_are_found() -> Result<()> {
    let rig = Rig::new().await?;
    let layers: [&[u8]; 2] = [&TAR, &TAR2];
    let honest = config(&layers);
    let fewer = rig.image(&config(&[&TAR]), &layers, |_| {}).await?;
    assert!(rig.refusal(&rig.asked(fewer)).await.contains("2 layers"));
    let mut arm = honest.clone();
    arm["architecture"] = json!("arm64");
    let arm = rig.image(&arm, &layers, |_| {}).await?;
    assert!(rig.refusal(&rig.asked(arm)).await.contains("linux/arm64"));
    let strange = |manifest: &mut Value| manifest["layers"][0]["mediaType"] = json!("text/html");
    let strange = rig.image(&honest, &layers, strange).await?;
    assert!(rig.refusal(&rig.asked(strange)).await.contains("text/html"));
    let foreign = |manifest: &mut Value| {
        manifest["layers"][0]["mediaType"] =
            json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
    };
    let foreign = rig.image(&honest, &layers, foreign).await?;
    assert!(rig.refusal(&rig.asked(foreign)).await.contains("foreign"));
    let artifact = |manifest: &mut Value| {
        manifest["config"]["mediaType"] = json!("application/vnd.oci.empty.v1+json");
    };
    let artifact = rig.image(&honest, &layers, artifact).await?;
    assert!(
        rig.refusal(&rig.asked(artifact))
            .await
            .contains("no image configuration")
    );
    let many = vec![&TAR[..]; 128];
    let many = rig.image(&config(&many), &many, |_| {}).await?;
    assert!(rig.refusal(&rig.asked(many)).await.contains("128 layers"));
    let good = rig.image(&honest, &layers, |_| {}).await?;
    let mut asked = rig.asked(good);
    asked.base = Some(ExpectedBase {
        diff_ids: vec![Digest::of(&TAR2)],
        layers: Vec::new(),
    });
    assert!(rig.refusal(&asked).await.contains("base"));
    asked.base = Some(ExpectedBase {
        diff_ids: Vec::new(),
        layers: vec![Digest::of(&TAR2)],
    });
    assert!(rig.refusal(&asked).await.contains("base"));
    let absent = rig.asked(Digest::of(b"absent"));
    assert!(rig.refusal(&absent).await.contains("manifest"));
    Ok(())
}

#[tokio::test]
async fn an_index_is_taken_only_when_its_choice_is_clear() -> Result<()> {
    let rig = Rig::new().await?;
    let layers: [&[u8]; 1] = [&TAR];
    let image = rig.image(&config(&layers), &layers, |_| {}).await?;
    let stored = rig
        .host
        .get_manifest(&rig.repo, &Reference::Digest(image))
        .await?;
    let entry = |os: &str| {
        let mut entry = descriptor(OCI_MANIFEST, &stored.bytes);
        entry["platform"] = json!({"os": os, "architecture": "amd64"});
        entry
    };
    let index = |entries: Vec<Value>| json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
    let one = rig
        .push(&index(vec![entry("linux"), entry("unknown")]))
        .await?;
    assert!(rig.refusal(&rig.asked(one)).await.contains("index"));
    let select = |manifest| Verify {
        select: Select::LinuxAmd64,
        ..rig.asked(manifest)
    };
    assert_eq!(verify(&rig.host, &select(one)).await?.manifest, image);
    let two = rig
        .push(&index(vec![entry("linux"), entry("linux")]))
        .await?;
    assert!(rig.refusal(&select(two)).await.contains("several"));
    let none = rig.push(&index(vec![entry("windows")])).await?;
    assert!(rig.refusal(&select(none)).await.contains("no image"));
    Ok(())
}

#[tokio::test]
async fn archives_are_read_by_others_and_are_the_same_each_time() -> Result<()> {
    let rig = Rig::new().await?;
    let layers: [&[u8]; 3] = [&TAR, &TAR2, &TAR];
    let digest = rig.image(&config(&layers), &layers, |_| {}).await?;
    let image = verify(&rig.host, &rig.asked(digest)).await?;
    let name: ImageRef = "t/local/app:v1".parse()?;
    for (format, scheme) in [
        (ArchiveFormat::Oci, "oci-archive"),
        (ArchiveFormat::Docker, "docker-archive"),
    ] {
        let mut bytes = Vec::new();
        let names = [name.clone()];
        export(&rig.host, &rig.repo, &image, &names, format, &mut bytes).await?;
        let mut again = Vec::new();
        export(&rig.host, &rig.repo, &image, &names, format, &mut again).await?;
        assert_eq!(bytes, again);
        let mut archive = tar::Archive::new(&bytes[..]);
        let blobs = archive
            .entries()?
            .filter_map(|entry| Some(entry.ok()?.path().ok()?.starts_with("blobs")))
            .filter(|is_blob| *is_blob)
            .count();
        // Two distinct layers, the configuration, and for OCI the manifest.
        assert_eq!(blobs, if format == ArchiveFormat::Oci { 4 } else { 3 });
        if skopeo_is_here()? {
            let path = rig.dir.path().join(scheme);
            std::fs::write(&path, &bytes)?;
            let text = skopeo(&["inspect", &format!("{scheme}:{}", path.display())]).await?;
            let inspected: Value = serde_json::from_str(&text)?;
            assert_eq!(inspected["Env"], json!(["PORT=3000"]), "{scheme}");
            if format == ArchiveFormat::Oci {
                assert_eq!(inspected["Digest"], json!(digest));
            }
        }
    }
    Ok(())
}
