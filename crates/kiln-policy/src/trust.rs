//! Which sources of a tenant's jobs the operator trusts: `trusted_refs` and `trusted_uploads` of the grant.
//!
//! A server's job is trusted only when its token is and its source is one of these. A ref is granted by its full name, and what is granted
//! is what the host then asks the server of the repository for: a tag that is named as a branch is another ref.

use std::str::FromStr;

use kiln_core::TenantName;
use kiln_core::job::{JobKind, Source};
use kiln_core::secret::Repository;

use crate::grant::{Grant, Grants};

/// Longest ref, bytes.
const REF_MAX: usize = 255;
/// Below this, every ref has its full name.
const REFS: &str = "refs/";
/// What a name alone means.
const BRANCHES: &str = "refs/heads/";
/// What a URL without a ref means: the branch that the server calls its default one.
const DEFAULT: &str = "HEAD";
/// Ends an entry for all refs below.
const ALL_BELOW: &str = "/*";

/// One entry of `trusted_refs`: `HOST/PATH@REF`, where `REF` is `HEAD`, a full name, or a full name that ends with `/*`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustedRef {
    repository: Repository,
    reference: String,
}

impl FromStr for TrustedRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // No repository has an @.
        let (repository, reference) = text
            .split_once('@')
            .ok_or("it names no ref: write HOST/PATH@refs/heads/NAME")?;
        let repository: Repository = repository
            .parse()
            .map_err(|error: kiln_core::secret::ParseSecretError| error.to_string())?;
        let full = reference.strip_prefix(REFS).is_some_and(|rest| {
            let rest = rest.strip_suffix(ALL_BELOW).unwrap_or(rest);
            rest.split('/').all(|part| !part.is_empty()) && !rest.contains('*')
        });
        if reference.len() > REF_MAX || (!full && reference != DEFAULT) {
            return Err(
                "a ref is written in full: refs/heads/NAME, refs/tags/NAME, refs/heads/* or HEAD"
                    .to_owned(),
            );
        }
        Ok(Self {
            repository,
            reference: reference.to_owned(),
        })
    }
}

impl TrustedRef {
    fn names(&self, repository: &Repository, reference: &str) -> bool {
        let fits = match self.reference.strip_suffix('*') {
            Some(below) => reference
                .strip_prefix(below)
                .is_some_and(|rest| !rest.is_empty()),
            None => self.reference == reference,
        };
        fits && self.repository == *repository
    }
}

/// Why the source of a job makes it untrusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UntrustedSource {
    /// It was uploaded.
    #[error("its source is an upload, and {by} has no `trusted_uploads = true` for {tenant}")]
    Upload {
        /// Whose job.
        tenant: TenantName,
        /// The operator's file.
        by: String,
    },
    /// There is none: all that it does came with the request.
    #[error(
        "all it does came with the request, and {by} has no `trusted_uploads = true` for {tenant}"
    )]
    Request {
        /// Whose job.
        tenant: TenantName,
        /// The operator's file.
        by: String,
    },
    /// Its Dockerfile came with the request.
    #[error(
        "its Dockerfile came with the request, and {by} has no `trusted_uploads = true` for {tenant}"
    )]
    Dockerfile {
        /// Whose job.
        tenant: TenantName,
        /// The operator's file.
        by: String,
    },
    /// A commit says nothing of the ref that leads to it: whoever may push anything can have one.
    #[error("its source is a commit by its id, and only a ref can be trusted")]
    Commit,
    /// The URL can be understood in more ways than one, or proves no host.
    #[error("the address of its source does not name one repository over https")]
    Address,
    /// The ref is not among those that the operator trusts.
    #[error("{by} does not name {repository}@{reference} in `trusted_refs` for {tenant}")]
    Ref {
        /// Whose job.
        tenant: TenantName,
        /// The operator's file.
        by: String,
        /// Where it comes from.
        repository: Repository,
        /// The full name of its ref.
        reference: String,
    },
}

impl UntrustedSource {
    /// What to do.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Upload { tenant, .. }
            | Self::Request { tenant, .. }
            | Self::Dockerfile { tenant, .. } => {
                format!(
                    "the operator writes `trusted_uploads = true` below [tenant.{tenant}] in policy.toml, or build a trusted ref of a git URL"
                )
            }
            Self::Commit => "name the branch that it is on, as in URL#refs/heads/main".to_owned(),
            Self::Address => "write it as https://HOST/PATH".to_owned(),
            Self::Ref {
                tenant,
                repository,
                reference,
                ..
            } => format!(
                "the operator writes `trusted_refs = [\"{repository}@{reference}\"]` below [tenant.{tenant}] in policy.toml"
            ),
        }
    }
}

/// Whether the operator trusts where a job's work comes from. Of a git source the full name of the ref that is trusted: that one, and no
/// other that its short name could mean, is to be fetched.
///
/// # Errors
/// Why not.
pub fn trusted_source(
    kind: &JobKind,
    grants: &Grants,
    tenant: &TenantName,
) -> Result<Option<String>, UntrustedSource> {
    let grant = grants.of(tenant);
    let (tenant, by) = (
        tenant.clone(),
        grants.file.as_deref().unwrap_or("policy.toml").to_owned(),
    );
    let brought = |why: UntrustedSource| match grant.trusted_uploads {
        true => Ok(None),
        false => Err(why),
    };
    match kind.source() {
        Some(Source::Git { url, reference }) => {
            let fetched = trusted_ref(url, reference, &grant, (&tenant, &by))?;
            if matches!(kind, JobKind::SourceBuild(build) if build.dockerfile_text.is_some()) {
                brought(UntrustedSource::Dockerfile { tenant, by })?;
            }
            Ok(Some(fetched))
        }
        Some(Source::Tree { .. } | Source::Folder { .. }) => {
            brought(UntrustedSource::Upload { tenant, by })
        }
        None => brought(UntrustedSource::Request { tenant, by }),
    }
}

/// The ref whose policy holds an untrusted job of a repository: the first entry of `trusted_refs` that names one ref of it, and not all
/// below one. None where the operator trusts no such ref: what the job's own commit says then only takes away.
#[must_use]
pub fn policy_ref(kind: &JobKind, grants: &Grants, tenant: &TenantName) -> Option<String> {
    let Some(Source::Git { url, .. }) = kind.source() else {
        return None;
    };
    let repository = Repository::of_url(url)?;
    let refs = grants.of(tenant).trusted_refs;
    let mut single = refs
        .into_iter()
        .filter(|one| !one.reference.ends_with(ALL_BELOW));
    single
        .find(|one| one.repository == repository)
        .map(|one| one.reference)
}

/// As git takes it: an id, whatever branch is called so.
fn is_commit(reference: &str) -> bool {
    matches!(reference.len(), 40 | 64) && reference.bytes().all(|b| b.is_ascii_hexdigit())
}

fn trusted_ref(
    url: &str,
    reference: &str,
    grant: &Grant,
    (tenant, by): (&TenantName, &str),
) -> Result<String, UntrustedSource> {
    if is_commit(reference) {
        return Err(UntrustedSource::Commit);
    }
    let repository = Repository::of_url(url).ok_or(UntrustedSource::Address)?;
    let reference = match reference {
        DEFAULT => DEFAULT.to_owned(),
        full if full.starts_with(REFS) => full.to_owned(),
        name => format!("{BRANCHES}{name}"),
    };
    let mut granted = grant.trusted_refs.iter();
    match granted.any(|one| one.names(&repository, &reference)) {
        true => Ok(reference),
        false => Err(UntrustedSource::Ref {
            tenant: tenant.clone(),
            by: by.to_owned(),
            repository,
            reference,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANTS: &str = r#"
[tenant.acme]
trusted_refs = ["git.example.org/team/app@refs/heads/main", "https://git.example.org/team/lib.git@refs/tags/v/*", "git.example.org/team/lib@HEAD"]
[tenant.both]
trusted_refs = ["git.example.org/team/app@refs/heads/*"]
trusted_uploads = true
"#;

    fn git(url: &str, reference: &str, text: Option<&str>) -> JobKind {
        serde_json::from_value(serde_json::json!({
            "kind": "source_build", "name": "a", "dockerfile_text": text,
            "source": {"from": "git", "url": url, "reference": reference},
        }))
        .expect("a build")
    }

    fn of(tenant: &str, kind: &JobKind) -> Result<Option<String>, UntrustedSource> {
        let grants = Grants::parse("policy.toml", GRANTS).expect("legal");
        trusted_source(kind, &grants, &tenant.parse().expect("tenant"))
    }

    #[test]
    fn a_ref_is_trusted_by_its_full_name_and_no_other() {
        let app = "https://git.example.org/team/app";
        let main = Ok(Some("refs/heads/main".to_owned()));
        for (url, reference) in [
            (app, "main"),
            (app, "refs/heads/main"),
            ("https://GIT.example.org:443/team/app.git", "main"),
        ] {
            assert_eq!(
                of("acme", &git(url, reference, None)),
                main,
                "{url} {reference}"
            );
        }
        let lib = "https://git.example.org/team/lib";
        let head = of("acme", &git(lib, "HEAD", None));
        assert_eq!(head, Ok(Some("HEAD".to_owned())));
        let tag = of("acme", &git(lib, "refs/tags/v/1", None));
        assert_eq!(tag, Ok(Some("refs/tags/v/1".to_owned())));
        for (url, reference) in [
            (app, "HEAD"),
            (app, "other"),
            (app, "heads/main"),
            (app, "refs/heads/main2"),
            (app, "refs/tags/main"),
            (app, "refs/pull/1/head"),
            (lib, "v/1"),
            (lib, "refs/tags/v/"),
            (lib, "refs/tags/v"),
            ("https://git.example.org/team/app/", "refs/heads/mai"),
            ("https://git.example.org:8443/team/app", "main"),
            ("https://git.example.org/Team/app", "main"),
        ] {
            let why = of("acme", &git(url, reference, None)).expect_err(reference);
            assert!(matches!(why, UntrustedSource::Ref { .. }), "{why:?}");
            assert!(
                why.to_string()
                    .starts_with("policy.toml does not name git."),
                "{why}"
            );
            assert!(why.hint().contains("[tenant.acme]"), "{}", why.hint());
        }
        for (url, why) in [
            ("http://git.example.org/team/app", UntrustedSource::Address),
            (
                "https://git.example.org/team/../team/app",
                UntrustedSource::Address,
            ),
            (
                "https://git.example.org/team%2fapp",
                UntrustedSource::Address,
            ),
        ] {
            assert_eq!(of("acme", &git(url, "main", None)), Err(why), "{url}");
        }
        for digits in [40, 64] {
            let id = "a".repeat(digits);
            let commit = of("both", &git(app, &id, None));
            assert_eq!(commit, Err(UntrustedSource::Commit));
        }
    }

    #[test]
    fn a_policy_is_read_at_the_first_single_ref_of_the_repository() {
        let grants = Grants::parse("policy.toml", GRANTS).expect("legal");
        let at = |tenant: &str, url: &str| {
            let tenant = tenant.parse().expect("tenant");
            policy_ref(&git(url, "feature", None), &grants, &tenant)
        };
        let (app, lib) = (
            "https://git.example.org/team/app",
            "https://git.example.org/team/lib",
        );
        assert_eq!(at("acme", app).as_deref(), Some("refs/heads/main"));
        assert_eq!(at("acme", lib).as_deref(), Some("HEAD"));
        assert_eq!(at("both", app), None, "all branches are not one");
        assert_eq!(at("acme", "https://git.example.org/fork/app"), None);
        assert_eq!(at("other", app), None);
    }

    #[test]
    fn what_came_with_the_request_is_trusted_by_a_word_of_its_own() {
        let app = "https://git.example.org/team/app";
        let texts = git(app, "main", Some("FROM scratch\n"));
        let why = of("acme", &texts).expect_err("its Dockerfile");
        assert!(why.to_string().contains("its Dockerfile"), "{why}");
        assert_eq!(of("both", &texts), Ok(Some("refs/heads/main".to_owned())));
        // The word for uploads says nothing of refs.
        assert!(
            of(
                "both",
                &git("https://git.example.org/team/lib", "main", None)
            )
            .is_err()
        );
        let run: JobKind = serde_json::from_value(serde_json::json!({
            "kind": "run", "image": null, "argv": ["true"], "env": {}, "ports": [], "tty": false, "stdin": false,
        }))
        .expect("a run");
        let upload: JobKind = serde_json::from_value(serde_json::json!({
            "kind": "source_build", "name": "a",
            "source": {"from": "tree", "digest": kiln_core::Digest::of(b""), "size": 1},
        }))
        .expect("a build");
        for (kind, word) in [(run, "came with the request"), (upload, "an upload")] {
            assert_eq!(of("both", &kind), Ok(None));
            for tenant in ["acme", "nobody"] {
                let why = of(tenant, &kind).expect_err("not said");
                assert!(why.to_string().contains(word), "{why}");
                assert!(
                    why.hint().contains("trusted_uploads = true"),
                    "{}",
                    why.hint()
                );
            }
        }
    }

    #[test]
    fn an_entry_that_could_mean_more_than_it_says_is_refused_with_its_line() {
        for wrong in [
            "git.example.org/team/app",
            "git.example.org/team/app@main",
            "git.example.org/team/app@heads/main",
            "git.example.org/team/app@refs/*",
            "git.example.org/team/app@refs/heads/*/x",
            "git.example.org/team/app@refs/heads/ma*",
            "git.example.org/team/app@refs/heads//main",
            "git.example.org/team/*@refs/heads/main",
            "git.example.org@refs/heads/main",
            "http://git.example.org/team/app@refs/heads/main",
        ] {
            let text = format!("[tenant.acme]\ntrusted_refs = [\n  {wrong:?},\n]\n");
            let error = Grants::parse("policy.toml", &text).expect_err(wrong);
            assert!(error.to_string().contains("policy.toml:3"), "{error}");
        }
    }
}
