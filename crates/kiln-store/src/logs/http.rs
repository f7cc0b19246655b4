//! How the object store reaches a bucket: hyper over rustls with ring, the host's certificates, no proxy and no redirects.
//!
//! `object_store` brings a client of its own only together with another crypto library; this one uses what kiln links anyway.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpResponseBody, HttpService,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::time::{Instant, Sleep};

use super::LogError;
use crate::dial::Dial;

/// Time for the connection to a bucket, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time until a bucket's answer has begun.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest silence within a bucket's answer.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Most connections that are kept for the next request.
const IDLE_MAX: usize = 8;
/// How long they are kept.
const IDLE_FOR: Duration = Duration::from_secs(60);

/// Makes the client.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    client: S3Client,
}

impl Connector {
    /// Trusts the host's certificates and these (PEM).
    pub(super) fn new(extra_roots: Option<&[u8]>) -> Result<Self, LogError> {
        let unusable = |why: String| LogError::Target { why };
        let mut roots = rustls::RootCertStore::empty();
        // A broken certificate of the host is its operator's matter; without any, TLS says so.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        for cert in extra_roots
            .into_iter()
            .flat_map(CertificateDer::pem_slice_iter)
        {
            let cert = cert.map_err(|error| unusable(format!("its certificates: {error}")))?;
            roots
                .add(cert)
                .map_err(|error| unusable(format!("its certificates: {error}")))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let dial = Dial::new(Arc::new(config), CONNECT_TIMEOUT);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(IDLE_MAX)
            .pool_idle_timeout(IDLE_FOR)
            .pool_timer(TokioTimer::new())
            .build(dial);
        Ok(Self {
            client: S3Client { client },
        })
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.client.clone()))
    }
}

#[derive(Clone, Debug)]
struct S3Client {
    client: Client<Dial, HttpRequestBody>,
}

impl HttpService for S3Client {
    fn call<'life, 'out>(
        &'life self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'out>>
    where
        'life: 'out,
        Self: 'out,
    {
        Box::pin(async move {
            let asked = self.client.request(request);
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, asked)
                .await
                .map_err(|late| HttpError::new(HttpErrorKind::Timeout, late))?
                .map_err(|error| {
                    let kind = if error.is_connect() {
                        HttpErrorKind::Connect
                    } else {
                        HttpErrorKind::Request
                    };
                    HttpError::new(kind, error)
                })?;
            let (parts, body) = answer.into_parts();
            let body = HttpResponseBody::new(Patient::new(body));
            Ok(HttpResponse::from_parts(parts, body))
        })
    }
}

/// An answer's body that fails when it is silent for too long.
struct Patient<B> {
    body: B,
    silence: Pin<Box<Sleep>>,
}

impl<B> Patient<B> {
    fn new(body: B) -> Self {
        Self {
            body,
            silence: Box::pin(tokio::time::sleep(SILENCE_MAX)),
        }
    }
}

impl<B> Body for Patient<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            let until = Instant::now() + SILENCE_MAX;
            self.silence.as_mut().reset(until);
            let failed = |error| HttpError::new(HttpErrorKind::Interrupted, error);
            return Poll::Ready(frame.map(|frame| frame.map_err(failed)));
        }
        self.silence.as_mut().poll(cx).map(|()| {
            let silent = io::Error::from(io::ErrorKind::TimedOut);
            Some(Err(HttpError::new(HttpErrorKind::Timeout, silent)))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use futures_util::stream;
    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_that_falls_silent_is_an_error_and_a_slow_one_is_not() {
        let slow = stream::iter(0..5_u8).then(async |n| {
            tokio::time::sleep(SILENCE_MAX * 3 / 4).await;
            Ok::<_, io::Error>(Frame::data(Bytes::copy_from_slice(&[n])))
        });
        let silent = stream::pending::<io::Result<Frame<Bytes>>>();
        let whole = Patient::new(StreamBody::new(Box::pin(slow)))
            .collect()
            .await
            .expect("slow is fine")
            .to_bytes();
        assert_eq!(whole, [0, 1, 2, 3, 4][..]);
        let began = Instant::now();
        let failed = Patient::new(StreamBody::new(silent)).collect().await;
        let error = failed.expect_err("silent");
        assert_eq!(error.kind(), HttpErrorKind::Timeout);
        assert_eq!(began.elapsed().as_secs(), SILENCE_MAX.as_secs());
    }
}
