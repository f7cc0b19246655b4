//! `/v1/images`: the names of a tenant's images, and how one is taken away. Images themselves go through the registry's own door.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use kiln_core::{Action, ImageRef, TenantName};
use kiln_db::{NamedImage, PAGE_MAX};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::ask::parsed;
use super::caller::{Caller, TenantAsked};
use super::extract::{Answer, Asked, Named, removed};
use super::problem::{Problem, ProblemBody, is_disk_full};
use super::tenants::known;
use super::view::List;

/// Names of a page, unless asked otherwise.
const PAGE: u32 = 100;
/// Longest name that is taken for one.
const NAME_MAX: usize = 512;

/// A name of an image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageView {
    /// Its repository: `t/TENANT/...`.
    pub repository: String,
    /// Its tag there.
    pub tag: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Bytes of the manifest and of what it names, compressed as they are pulled.
    pub bytes: u64,
    /// When it was named so, milliseconds since the Unix epoch, where that is known.
    pub named_unix_ms: Option<u64>,
}

impl ImageView {
    fn of(image: NamedImage) -> Self {
        Self {
            repository: image.repo,
            tag: image.tag,
            digest: image.digest.to_string(),
            bytes: image.bytes,
            named_unix_ms: image.named_unix_ms,
        }
    }
}

/// Which images.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ImagesAsked {
    /// The token's own unless it is an operator's.
    tenant: Option<String>,
    /// After the image of this name, `REPOSITORY:TAG`.
    after: Option<String>,
    /// Names of a page: 100 unless named, at most 500.
    limit: Option<u32>,
}

fn failed(error: &(dyn std::error::Error + 'static)) -> Problem {
    match is_disk_full(error) {
        true => Problem::disk_full(error),
        false => Problem::unavailable(error),
    }
}

/// Lists the names of a tenant's images.
#[utoipa::path(
    get, path = "/v1/images", tag = "images", params(ImagesAsked),
    responses(
        (status = 200, description = "A page, by name; `next` is the `after` of the next one", body = List<ImageView>),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Asked(asked): Asked<ImagesAsked>,
) -> Result<Answer<List<ImageView>>, Problem> {
    let limit = asked.limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        let text = format!("it is 1 to {PAGE_MAX}");
        return Err(Problem::invalid("limit", text));
    }
    let after = match asked.after.as_deref() {
        None => Some((String::new(), String::new())),
        Some(text) if text.len() > NAME_MAX => None,
        Some(text) => text
            .rsplit_once(':')
            .map(|(repo, tag)| (repo.to_owned(), tag.to_owned())),
    };
    let after = after.ok_or_else(|| Problem::invalid("after", "it is REPOSITORY:TAG"))?;
    let whose = TenantAsked {
        tenant: asked.tenant,
    };
    let tenant = whose.allowed(&api, &caller, Action::ImagePull, "images");
    let tenant = tenant.await?;
    let named = api.backend().images(&tenant, after, limit).await;
    let named = named.map_err(|error| failed(&*error))?;
    let full = named.len() >= limit as usize;
    let next = named.last().filter(|_| full);
    let next = next.map(|last| format!("{}:{}", last.repo, last.tag));
    let items = named.into_iter().map(ImageView::of).collect();
    Ok(Answer(StatusCode::OK, List { items, next }))
}

/// The repository and tag that a name means within a tenant.
fn place(tenant: &TenantName, text: &str) -> Result<(String, String), Problem> {
    let wrong = |why: &str| Problem::invalid("name", why.to_owned());
    let named: ImageRef = parsed("name", text)?;
    if named.digest.is_some() || named.registry.is_some() {
        return Err(wrong("it is NAME:TAG, within the tenant"));
    }
    let own = format!("t/{tenant}/");
    let repo = match named.repository.strip_prefix("t/") {
        None => format!("{own}{}", named.repository),
        Some(_) if named.repository.starts_with(&own) => named.repository,
        Some(_) => return Err(Problem::not_found("image", text)),
    };
    Ok((repo, named.tag.unwrap_or_else(|| "latest".to_owned())))
}

/// Takes the name of an image away, and the image with its last name. Its bytes go with the next collection.
#[utoipa::path(
    delete, path = "/v1/images/{name}", tag = "images",
    params(("name" = String, Path, description = "`NAME:TAG` within the tenant, or `t/TENANT/NAME:TAG`; slashes as `%2F`"), TenantAsked),
    responses(
        (status = 204, description = "It is gone"),
        (status = "4XX", description = "Refused", body = ProblemBody, content_type = "application/problem+json"),
        (status = "5XX", description = "Not now", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn remove(
    State(api): State<Arc<Api>>,
    caller: Caller,
    Named(text): Named,
    Asked(asked): Asked<TenantAsked>,
) -> Result<StatusCode, Problem> {
    let tenant = asked.allowed(&api, &caller, Action::ImageRemove, &text);
    let tenant = tenant.await?;
    let (repo, tag) = place(&tenant, &text)?;
    if known(&api, tenant.as_str()).await?.hold {
        let text = "this tenant is on hold: nothing of it goes";
        return Err(Problem::conflict("on_hold", text).hint("`kiln hold list` says why"));
    }
    let gone = api.backend().withdraw_image(&repo, &tag).await;
    let gone = gone.map_err(|error| failed(&*error))?;
    removed(gone, "image", &format!("{repo}:{tag}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_something_of_its_tenant() {
        let acme: TenantName = "acme".parse().expect("name");
        let place = |text: &str| place(&acme, text).ok();
        let pair = |repo: &str, tag: &str| Some((repo.to_owned(), tag.to_owned()));
        assert_eq!(place("shop"), pair("t/acme/shop", "latest"));
        assert_eq!(place("web/shop:1.4"), pair("t/acme/web/shop", "1.4"));
        assert_eq!(place("t/acme/shop:1"), pair("t/acme/shop", "1"));
        for bad in [
            "t/rival/shop:1",
            "t/acme",
            "../rival/shop",
            "example.org/shop:1",
            "shop@sha256:0000000000000000000000000000000000000000000000000000000000000000",
            "",
            "Shop",
        ] {
            assert_eq!(place(bad), None, "{bad}");
        }
    }
}
