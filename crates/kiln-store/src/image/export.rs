//! Writes an image as one tar stream: an OCI layout (`oci-archive`) or what `docker load` and
//! `podman load` read (`docker-archive`). The same image gives the same bytes.
//!
//! Formats: OCI image-spec v1.1.1, image-layout.md; Docker's "Image Tarball Format Specification"
//! v1.2 (`manifest.json`); tar headers: POSIX.1-1988 ustar, sizes over 8 GiB as GNU tar writes them.

use std::collections::HashSet;
use std::io;

use kiln_core::{Digest, ImageRef};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::verify::VerifiedImage;
use crate::host::{HostError, HostRegistry};
use crate::registry::manifest::OCI_INDEX;
use crate::registry::{Reference, RepoName};

/// Bytes of a tar block.
const BLOCK: usize = 512;
/// Largest size that fits a header's eleven octal digits.
const OCTAL_MAX: u64 = 0o777_7777_7777;
/// Buffer for copying, bytes.
const COPY_BUFFER_BYTES: usize = 256 << 10;

/// Kinds of archive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ArchiveFormat {
    /// OCI layout in a tar stream.
    Oci,
    /// Docker's image tarball.
    Docker,
}

/// Why an export failed. What was written is then no archive.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Part of the image cannot be read.
    #[error("cannot read {digest} of the image")]
    Read {
        /// The part.
        digest: Digest,
        /// What failed.
        #[source]
        source: HostError,
    },
    /// A part ended early or did not have its size.
    #[error("{digest} of the image broke off")]
    Stream {
        /// The part.
        digest: Digest,
        /// What the stream said.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be written.
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
}

/// Writes a verified image of `repo`, under the given names, to `out`.
///
/// # Errors
/// See [`ExportError`].
pub async fn export(
    host: &HostRegistry,
    repo: &RepoName,
    image: &VerifiedImage,
    names: &[ImageRef],
    format: ArchiveFormat,
    mut out: impl AsyncWrite + Unpin,
) -> Result<(), ExportError> {
    match format {
        ArchiveFormat::Oci => {
            let layout = json!({"imageLayoutVersion": "1.0.0"});
            put_json(&mut out, "oci-layout", &layout).await?;
            put_json(&mut out, "index.json", &index(image, names)).await?;
            let digest = image.manifest;
            let stored = host
                .get_manifest(repo, &Reference::Digest(digest))
                .await
                .map_err(|source| ExportError::Read { digest, source })?;
            put(&mut out, &blob_path(&digest), &stored.bytes).await?;
        }
        ArchiveFormat::Docker => {
            put_json(&mut out, "manifest.json", &docker_manifest(image, names)).await?;
        }
    }
    let layers = image.layers.iter().map(|layer| (layer.digest, layer.size));
    let mut written = HashSet::new();
    for (digest, size) in std::iter::once(image.config_blob).chain(layers) {
        if written.insert(digest) {
            put_blob(&mut out, host, repo, digest, size).await?;
        }
    }
    // Two empty blocks end a tar stream.
    write(&mut out, &[0; 2 * BLOCK]).await?;
    out.flush().await.map_err(ExportError::Write)
}

fn index(image: &VerifiedImage, names: &[ImageRef]) -> Value {
    let entry = |name: Option<&ImageRef>| {
        let mut entry = json!({
            "mediaType": image.media_type,
            "digest": image.manifest,
            "size": image.manifest_size,
            "platform": {"architecture": "amd64", "os": "linux"},
        });
        if let Some(name) = name {
            entry["annotations"] = json!({
                "io.containerd.image.name": name.to_string(),
                "org.opencontainers.image.ref.name": name.tag.as_deref().unwrap_or("latest"),
            });
        }
        entry
    };
    let entries: Vec<Value> = match names {
        [] => vec![entry(None)],
        names => names.iter().map(|name| entry(Some(name))).collect(),
    };
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
}

fn docker_manifest(image: &VerifiedImage, names: &[ImageRef]) -> Value {
    let named = |name: &ImageRef| {
        let tag = name.tag.as_deref().unwrap_or("latest");
        match &name.registry {
            Some(registry) => format!("{registry}/{}:{tag}", name.repository),
            None => format!("{}:{tag}", name.repository),
        }
    };
    let layers = image.layers.iter().map(|layer| blob_path(&layer.digest));
    json!([{
        "Config": blob_path(&image.config_blob.0),
        "RepoTags": names.iter().map(named).collect::<Vec<_>>(),
        "Layers": layers.collect::<Vec<_>>(),
    }])
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

async fn put_json(
    out: &mut (impl AsyncWrite + Unpin),
    path: &str,
    value: &Value,
) -> Result<(), ExportError> {
    put(out, path, value.to_string().as_bytes()).await
}

async fn put(
    out: &mut (impl AsyncWrite + Unpin),
    path: &str,
    bytes: &[u8],
) -> Result<(), ExportError> {
    let size = bytes.len() as u64;
    write(out, &tar_header(path, size)).await?;
    write(out, bytes).await?;
    pad(out, size).await
}

async fn put_blob(
    out: &mut (impl AsyncWrite + Unpin),
    host: &HostRegistry,
    repo: &RepoName,
    digest: Digest,
    size: u64,
) -> Result<(), ExportError> {
    let blob = host
        .open_blob(repo, &digest)
        .await
        .map_err(|source| ExportError::Read { digest, source })?;
    let stream = |source| ExportError::Stream { digest, source };
    if blob.size != size {
        return Err(stream(io::Error::other("its size has changed")));
    }
    write(out, &tar_header(&blob_path(&digest), size)).await?;
    let mut reader = blob.into_reader();
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let mut left = size;
    while left > 0 {
        let got = reader.read(&mut buffer).await.map_err(stream)?;
        if got == 0 || got as u64 > left {
            return Err(stream(io::ErrorKind::UnexpectedEof.into()));
        }
        write(out, &buffer[..got]).await?;
        left -= got as u64;
    }
    pad(out, size).await
}

async fn write(out: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), ExportError> {
    out.write_all(bytes).await.map_err(ExportError::Write)
}

async fn pad(out: &mut (impl AsyncWrite + Unpin), size: u64) -> Result<(), ExportError> {
    let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
    match over {
        0 => Ok(()),
        over => write(out, &[0; BLOCK][over..]).await,
    }
}

/// A ustar header of a regular file. Our paths are shorter than a hundred bytes.
fn tar_header(path: &str, size: u64) -> [u8; BLOCK] {
    let mut header = [0_u8; BLOCK];
    let mut set = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, &path.as_bytes()[..path.len().min(100)]);
    set(100, b"0000644\0");
    set(108, b"0000000\0");
    set(116, b"0000000\0");
    if size <= OCTAL_MAX {
        set(124, format!("{size:011o}\0").as_bytes());
    } else {
        // GNU: the top bit set, then the number in big-endian bytes.
        set(124, &[0x80, 0, 0, 0]);
        set(128, &size.to_be_bytes());
    }
    set(136, b"00000000000\0");
    set(148, b"        ");
    set(156, b"0");
    set(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_back_by_tar() {
        for size in [0, 1, 511, OCTAL_MAX, OCTAL_MAX + 1, 1 << 40] {
            let bytes = tar_header("blobs/sha256/abc", size);
            let header = tar::Header::from_byte_slice(&bytes);
            assert_eq!(header.size().expect("size"), size);
            assert_eq!(header.path_bytes().as_ref(), b"blobs/sha256/abc");
            assert_eq!(header.mode().expect("mode"), 0o644);
            let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
            let own: u32 = bytes[148..156].iter().map(|byte| u32::from(*byte)).sum();
            assert_eq!(header.cksum().expect("sum"), sum - own + 8 * 32);
        }
    }
}
