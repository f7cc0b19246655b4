//! Requests to repositories of tenants where images are shared: names from the database, contents from this host's registry or the bucket.
//!
//! What is not answered here goes on to the registry of this host: uploads, quarantines, and what it has from before images were shared.

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, Method, StatusCode, header};
use kiln_core::Digest;
use kiln_db::{DbError, ImageManifest, ImageTag, NewImages};
use kiln_store::registry::http::route::{Route, percent_encoded, query_value};
use kiln_store::registry::http::store_error;
use kiln_store::registry::manifest::{Descriptor, MANIFEST_BYTES_MAX, Manifest, OCI_INDEX};
use kiln_store::registry::{Action, Authority, Reference, RepoName, StoreError};
use tokio::io::AsyncReadExt as _;

use super::publish::{Part, row};
use super::{Images, ImagesError, TREE};
use crate::peers::Relayed;
use crate::state::Controller;

/// Names of one page.
const PAGE_MAX: usize = 1000;
/// Referrers of one page.
const REFERRERS_PAGE: usize = 100;
/// Longest time for the body of a manifest to come.
const BODY_TIME: std::time::Duration = std::time::Duration::from_secs(60);

/// Answers a request; gives back one that is not answered here.
pub(crate) async fn answer(
    controller: &Controller,
    authority: &Authority,
    request: Request,
) -> Result<Response, Request> {
    let Some(images) = &controller.images else {
        return Err(request);
    };
    let Ok(route) = Route::parse(request.uri().path()) else {
        return Err(request);
    };
    let Some(repo) = route.repo().filter(|repo| repo.is_under(TREE)).cloned() else {
        return Err(request);
    };
    let asks = Asks {
        controller,
        images,
        repo: &repo,
    };
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let action = if reads { Action::Pull } else { Action::Push };
    // Refusals are the registry's to say; attempts write to their quarantine alone.
    if !authority.allows(action, &repo) || (!reads && matches!(authority, Authority::Attempt(_))) {
        return Err(request);
    }
    let answered = match (&route, request.method().clone()) {
        (Route::Manifest(_, what), Method::GET | Method::HEAD) => {
            asks.manifest(what, *request.method() == Method::HEAD).await
        }
        (Route::Blob(_, digest), Method::GET | Method::HEAD) => asks.blob(digest).await,
        (Route::Tags(_), Method::GET) => asks.tags(request.uri().query()).await,
        (Route::Referrers(_, subject), Method::GET) => {
            asks.referrers(subject, request.uri().query()).await
        }
        (Route::Manifest(_, what), Method::PUT) => {
            let what = what.clone();
            return Ok(asks
                .put(&what, request)
                .await
                .unwrap_or_else(|error| failed(&error)));
        }
        _ => Ok(None),
    };
    match answered {
        Ok(None) => Err(request),
        Ok(Some(response)) => Ok(response),
        Err(error) => Ok(failed(&error)),
    }
}

/// A failure in the words of the registry.
fn failed(error: &ImagesError) -> Response {
    if let ImagesError::Refused(refused) = error {
        return store_error(refused);
    }
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "an image was not served"
    );
    let body = serde_json::json!({
        "errors": [{ "code": "UNAVAILABLE", "message": "images cannot be read or written now" }]
    });
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::RETRY_AFTER, "1"),
    ];
    (StatusCode::SERVICE_UNAVAILABLE, headers, body.to_string()).into_response()
}

/// One request to a repository.
struct Asks<'a> {
    controller: &'a Controller,
    images: &'a Images,
    repo: &'a RepoName,
}

type Answered = Result<Option<Response>, ImagesError>;

impl Asks<'_> {
    async fn find(&self, what: &Reference) -> Result<Option<ImageManifest>, DbError> {
        let db = &self.controller.db;
        match what {
            Reference::Tag(tag) => db.image_tagged(self.repo.as_str(), tag).await,
            Reference::Digest(digest) => db.image_manifest(self.repo.as_str(), digest).await,
        }
    }

    async fn manifest(&self, what: &Reference, head: bool) -> Answered {
        let Some(found) = self.find(what).await? else {
            return Ok(None);
        };
        let bytes = match head {
            true => Body::empty(),
            false => {
                let registry = &self.controller.registry;
                let bytes = self.images.manifest_bytes(registry, self.repo, &found);
                Body::from(bytes.await?)
            }
        };
        let mut response = Response::new(bytes);
        let headers = response.headers_mut();
        set(headers, header::CONTENT_TYPE, &found.media_type);
        set(
            headers,
            header::CONTENT_LENGTH,
            &found.content.size.to_string(),
        );
        set(headers, DIGEST, &found.content.digest.to_string());
        Ok(Some(response))
    }

    /// Has a blob here, so that the registry of this host answers.
    async fn blob(&self, digest: &Digest) -> Answered {
        self.bring(digest).await.map(|_| None)
    }

    /// Has a content of the repository here; none when the database knows of none.
    async fn bring(&self, digest: &Digest) -> Result<Option<u64>, ImagesError> {
        let controller = self.controller;
        let known = controller
            .db
            .image_content(self.repo.as_str(), digest)
            .await?;
        let Some(content) = known else {
            return Ok(None);
        };
        self.images
            .bring(&controller.registry, self.repo, &content)
            .await?;
        Ok(Some(content.size))
    }

    async fn tags(&self, query: Option<&str>) -> Answered {
        let n = query_value(query, "n").and_then(|n| n.parse::<usize>().ok());
        let max = n.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        let last = query_value(query, "last").unwrap_or_default();
        let limit = u32::try_from(max + 1).unwrap_or(u32::MAX);
        let found = self
            .controller
            .db
            .image_tags(self.repo.as_str(), &last, limit)
            .await?;
        let Some(mut tags) = found else {
            return Ok(None);
        };
        let more = max > 0 && tags.len() > max;
        tags.truncate(max);
        let next = tags.last().filter(|_| more);
        let next = next.map(|last| {
            format!(
                "</v2/{}/tags/list?n={max}&last={last}>; rel=\"next\"",
                self.repo
            )
        });
        let body = serde_json::json!({ "name": self.repo, "tags": tags });
        Ok(Some(listed("application/json", &body, next)))
    }

    async fn referrers(&self, subject: &Digest, query: Option<&str>) -> Answered {
        let wanted = query_value(query, "artifactType");
        let last: Option<Digest> = query_value(query, "last").and_then(|last| last.parse().ok());
        let db = &self.controller.db;
        // What is here from before images were shared has its referrers here too.
        if db
            .image_manifest(self.repo.as_str(), subject)
            .await?
            .is_none()
        {
            return Ok(None);
        }
        let limit = u32::try_from(REFERRERS_PAGE + 1).unwrap_or(u32::MAX);
        let found = db
            .image_referrers(
                self.repo.as_str(),
                subject,
                wanted.as_deref(),
                last.as_ref(),
                limit,
            )
            .await?;
        let more = found.len() > REFERRERS_PAGE;
        let read = |text: &String| serde_json::from_str::<Descriptor>(text).ok();
        let shown: Vec<Descriptor> = found.iter().take(REFERRERS_PAGE).filter_map(read).collect();
        let next = shown.last().filter(|_| more).map(|last| {
            let kind = wanted.as_deref().map_or(String::new(), |kind| {
                format!("artifactType={}&", percent_encoded(kind))
            });
            let (repo, last) = (self.repo, last.digest);
            format!("</v2/{repo}/referrers/{subject}?{kind}last={last}>; rel=\"next\"")
        });
        let body = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": shown,
        });
        let mut response = listed(OCI_INDEX, &body, next);
        if wanted.is_some() {
            let headers = response.headers_mut();
            set(headers, FILTERS, "artifactType");
        }
        Ok(Some(response))
    }

    /// Takes a manifest: everything it names is in the repository, here or in the bucket, and is in the bucket before it has a name.
    async fn put(&self, what: &Reference, request: Request) -> Result<Response, ImagesError> {
        let kind = request.headers().get(header::CONTENT_TYPE);
        let kind = kind.and_then(|kind| kind.to_str().ok()).map(str::to_owned);
        let proof = request.headers().get(header::AUTHORIZATION).cloned();
        let bytes = body(request.into_body()).await?;
        let digest = Digest::of(&bytes);
        if let Reference::Digest(expected) = what
            && *expected != digest
        {
            let (expected, actual) = (*expected, digest);
            return Err(StoreError::DigestMismatch { expected, actual }.into());
        }
        let essence = kind
            .as_deref()
            .map(|kind| kind.split(';').next().unwrap_or(kind).trim());
        let manifest = Manifest::parse(&bytes, essence)?;
        for blob in manifest.blobs() {
            self.has(blob, proof.as_ref()).await?;
        }
        for child in manifest.manifests() {
            let known = self
                .controller
                .db
                .image_manifest(self.repo.as_str(), &child.digest);
            match known.await? {
                Some(known) => child.check_size(known.content.size)?,
                None => return Err(self.missing(&child.digest).into()),
            }
        }
        let subject = manifest.subject.as_ref().map(|subject| subject.digest);
        let part = Part {
            digest,
            bytes,
            manifest,
        };
        let mut images = NewImages {
            manifests: vec![row(self.repo, &part)],
            ..NewImages::default()
        };
        if let Reference::Tag(tag) = what {
            images.tags.push(ImageTag {
                repo: self.repo.as_str().to_owned(),
                tag: tag.clone(),
                digest,
            });
        }
        let (db, registry) = (&self.controller.db, &self.controller.registry);
        self.images
            .store_and_name(db, registry, self.repo, &[part], images, None)
            .await?;
        let mut response = StatusCode::CREATED.into_response();
        let headers = response.headers_mut();
        set(
            headers,
            header::LOCATION,
            &format!("/v2/{}/manifests/{digest}", self.repo),
        );
        set(headers, DIGEST, &digest.to_string());
        if let Some(subject) = subject {
            set(headers, SUBJECT, &subject.to_string());
        }
        Ok(response)
    }

    /// Has a blob of a manifest here: it was uploaded here, is a part of another manifest of the repository, or was uploaded to another
    /// controller.
    async fn has(&self, blob: &Descriptor, proof: Option<&HeaderValue>) -> Result<(), ImagesError> {
        let (registry, digest) = (&self.controller.registry, &blob.digest);
        match registry.open_blob(self.repo, digest).await {
            Ok(here) => return Ok(blob.check_size(here.size)?),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(size) = self.bring(digest).await? {
            return Ok(blob.check_size(size)?);
        }
        let path = format!("/v2/{}/blobs/{digest}", self.repo);
        let Some(asked) = proof.map(|proof| Relayed::get(path, proof.clone())) else {
            return Err(self.missing(digest).into());
        };
        let elsewhere = self.controller.relayed(&asked).await;
        let Some(found) = elsewhere.filter(|found| found.status().is_success()) else {
            return Err(self.missing(digest).into());
        };
        use futures_util::TryStreamExt as _;
        let stream = found.into_body().into_data_stream();
        let reader = tokio_util::io::StreamReader::new(stream.map_err(std::io::Error::other));
        let reader = reader.take(blob.size.saturating_add(1));
        let (_, size) = registry.put_blob(self.repo, reader, Some(*digest)).await?;
        Ok(blob.check_size(size)?)
    }

    fn missing(&self, digest: &Digest) -> StoreError {
        StoreError::ReferenceMissing {
            repo: self.repo.clone(),
            digest: *digest,
        }
    }
}

const DIGEST: http::HeaderName = http::HeaderName::from_static("docker-content-digest");
const SUBJECT: http::HeaderName = http::HeaderName::from_static("oci-subject");
const FILTERS: http::HeaderName = http::HeaderName::from_static("oci-filters-applied");

fn set(headers: &mut http::HeaderMap, name: http::HeaderName, value: &str) {
    // A media type of a manifest is one of four, all else is digits and names: this cannot fail.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn listed(kind: &str, body: &serde_json::Value, next: Option<String>) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    set(response.headers_mut(), header::CONTENT_TYPE, kind);
    if let Some(next) = next {
        set(response.headers_mut(), header::LINK, &next);
    }
    response
}

async fn body(body: Body) -> Result<Vec<u8>, StoreError> {
    let max = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
    match tokio::time::timeout(BODY_TIME, axum::body::to_bytes(body, max)).await {
        Ok(Ok(bytes)) => Ok(bytes.to_vec()),
        Ok(Err(_)) => Err(StoreError::TooLarge {
            what: "manifest",
            max: MANIFEST_BYTES_MAX,
        }),
        Err(_slow) => Err(StoreError::BodyBroken { source: None }),
    }
}
