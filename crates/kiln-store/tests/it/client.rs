//! A small HTTP client over any stream, and pieces of images to push with it.

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use kiln_core::Digest;
use kiln_store::registry::manifest::OCI_MANIFEST;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};

pub(crate) type Answer = Response<Bytes>;

/// One connection.
pub(crate) struct Client {
    sender: hyper::client::conn::http1::SendRequest<Full<Bytes>>,
    host: String,
}

impl Client {
    pub(crate) async fn over(
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self> {
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
        tokio::spawn(connection);
        let host = "registry.kiln.internal".to_owned();
        Ok(Self { sender, host })
    }

    /// Names another host in its requests.
    pub(crate) fn with_host(mut self, host: &str) -> Self {
        host.clone_into(&mut self.host);
        self
    }

    pub(crate) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(body)))?;
        self.sender.ready().await?;
        let (parts, body) = self.sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Response::from_parts(parts, body))
    }

    pub(crate) async fn get(&mut self, path: &str) -> Result<Answer> {
        self.send(Method::GET, path, &[], b"").await
    }

    /// Pushes a blob in one POST.
    pub(crate) async fn push_blob(&mut self, repo: &str, bytes: &[u8]) -> Result<Answer> {
        let path = format!("/v2/{repo}/blobs/uploads/?digest={}", Digest::of(bytes));
        self.send(Method::POST, &path, &[], bytes).await
    }

    pub(crate) async fn push_manifest(
        &mut self,
        repo: &str,
        reference: &str,
        manifest: &Value,
    ) -> Result<Answer> {
        let path = format!("/v2/{repo}/manifests/{reference}");
        let media_type = manifest["mediaType"].as_str().unwrap_or(OCI_MANIFEST);
        let headers = [("content-type", media_type)];
        let bytes = serde_json::to_vec(manifest)?;
        self.send(Method::PUT, &path, &headers, &bytes).await
    }
}

pub(crate) fn header<'a>(answer: &'a Answer, name: &str) -> Result<&'a str> {
    let value = answer.headers().get(name);
    Ok(value
        .with_context(|| format!("no header {name}"))?
        .to_str()?)
}

/// The error code of an answer.
pub(crate) fn code(answer: &Answer) -> String {
    let value: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    value["errors"][0]["code"].as_str().unwrap_or("").to_owned()
}

pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len()})
}

pub(crate) fn manifest(config: &[u8], layers: &[&[u8]]) -> Value {
    let layer = "application/vnd.oci.image.layer.v1.tar";
    json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": layers.iter().map(|bytes| descriptor(layer, bytes)).collect::<Vec<_>>(),
    })
}

pub(crate) fn digest_of(value: &Value) -> Digest {
    Digest::of(&serde_json::to_vec(value).expect("JSON"))
}
