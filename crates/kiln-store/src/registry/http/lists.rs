//! Lists, in pages: tags, referrers, and the repositories the caller may read.

use http::StatusCode;
use http::header::LINK;
use kiln_core::Digest;
use serde_json::json;

use super::answer::{Answer, FILTERS_APPLIED};
use super::route::percent_encoded;
use super::transfer::blocking;
use super::{Asked, Handled};
use crate::registry::authority::Action;
use crate::registry::manifest::OCI_INDEX;
use crate::registry::name::RepoName;

/// Most names in one page, and how many when the client does not say.
const PAGE_MAX: usize = 1000;
/// Referrers in one page.
const REFERRERS_PAGE: usize = 100;

/// One page of sorted names.
struct Page {
    names: Vec<String>,
    more: bool,
}

/// Cuts the page that follows `last` out of sorted names; `n` is what the client asked for.
fn page(names: Vec<String>, n: Option<usize>, last: Option<&str>) -> Page {
    let start = last.map_or(0, |last| {
        names.partition_point(|name| name.as_str() <= last)
    });
    let max = n.unwrap_or(PAGE_MAX).min(PAGE_MAX);
    let more = max > 0 && names.len() - start > max;
    let names = names.into_iter().skip(start).take(max).collect();
    Page { names, more }
}

/// What the client asked for; a text that is no number counts as absent, as the spec allows.
fn n_of(asked: &Asked) -> Option<usize> {
    asked.query("n")?.parse().ok()
}

fn paged(path: &str, n: Option<usize>, page: &Page) -> Answer {
    let answer = Answer::new(StatusCode::OK);
    match page.names.last().filter(|_| page.more) {
        Some(last) => {
            let n = n.map_or(PAGE_MAX, |n| n.min(PAGE_MAX));
            answer.header(LINK, format!("<{path}?n={n}&last={last}>; rel=\"next\""))
        }
        None => answer,
    }
}

pub(super) async fn tags(asked: Asked, repo: RepoName) -> Handled {
    asked.authority.check(Action::Pull, &repo)?;
    let n = n_of(&asked);
    let (store, name) = (asked.store.clone(), repo.clone());
    let tags = blocking(move || store.tags(&name)).await?;
    let page = page(tags, n, asked.query("last").as_deref());
    let path = format!("/v2/{repo}/tags/list");
    Ok(paged(&path, n, &page).json(&json!({"name": repo, "tags": page.names})))
}

pub(super) async fn catalog(asked: Asked) -> Handled {
    let n = n_of(&asked);
    let store = asked.store.clone();
    let repos = blocking(move || store.repositories(None)).await?;
    let readable = repos
        .into_iter()
        .filter(|repo| asked.authority.allows(Action::Pull, repo))
        .map(|repo| repo.as_str().to_owned())
        .collect();
    let page = page(readable, n, asked.query("last").as_deref());
    Ok(paged("/v2/_catalog", n, &page).json(&json!({"repositories": page.names})))
}

pub(super) async fn referrers(asked: Asked, repo: RepoName, subject: Digest) -> Handled {
    asked.authority.check(Action::Pull, &repo)?;
    let wanted = asked.query("artifactType");
    let last = asked.query("last").and_then(|text| text.parse().ok());
    let (store, name, filter) = (asked.store.clone(), repo.clone(), wanted.clone());
    let (found, more) = blocking(move || {
        let filter = filter.as_deref();
        store.referrers(&name, &subject, filter, last.as_ref(), REFERRERS_PAGE)
    })
    .await?;
    let mut answer = Answer::new(StatusCode::OK);
    let mut next = format!("/v2/{repo}/referrers/{subject}?");
    if let Some(wanted) = &wanted {
        answer = answer.header(FILTERS_APPLIED, "artifactType");
        next.push_str(&format!("artifactType={}&", percent_encoded(wanted)));
    }
    if let Some(last) = found.last().filter(|_| more) {
        let link = format!("<{next}last={}>; rel=\"next\"", last.digest);
        answer = answer.header(LINK, link);
    }
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found});
    Ok(answer.json_as(OCI_INDEX, &index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn pages_follow_one_another_without_gap() {
        let all = names("a b c d e");
        let first = page(all.clone(), Some(2), None);
        assert_eq!((first.names, first.more), (names("a b"), true));
        let second = page(all.clone(), Some(2), Some("b"));
        assert_eq!((second.names, second.more), (names("c d"), true));
        let gone = page(all.clone(), Some(2), Some("cc"));
        assert_eq!((gone.names, gone.more), (names("d e"), false));
        assert_eq!(page(all.clone(), Some(0), None).names, names(""));
        assert_eq!(page(all, None, Some("z")).names, names(""));
    }

    #[test]
    fn encoded_text_decodes_back() {
        let text = "application/vnd.x+json; a=\"b\"&c";
        let decoded = super::super::route::percent_decoded(&percent_encoded(text));
        assert_eq!(decoded.as_deref(), Some(text));
    }
}
