//! The operator's grants, and whether the secrets that the git gateway would log in with are there.

use std::collections::BTreeSet;

use kiln_controller::api::{List, SecretView};
use kiln_core::{SecretName, TenantName};
use kiln_machine::driver::Check;
use kiln_policy::Grants;
use kiln_worker::home::Home;

use super::super::home_queue::{self, HomeQueue};
use super::{fail, pass, warn};
use crate::error::Result;
use crate::policy_file;

const NAME: &str = "git-credentials";

/// Nothing where the operator names no credential.
pub(super) async fn checks(home: &Home) -> Vec<Check> {
    let grants = match policy_file::grants(&home.config) {
        Ok(grants) => grants,
        Err(error) => {
            let hint = "correct the file; docs/reference/policy.md names its keys";
            return vec![fail("policy", error.message, hint)];
        }
    };
    let named = named(&grants);
    if named.is_empty() {
        return Vec::new();
    }
    let found = match home_queue::is_untouched() {
        Ok(true) => Ok(Vec::new()),
        _ => kept(home).await,
    };
    vec![match found {
        Ok(found) => judged(&named, &found),
        Err(error) => warn(
            NAME,
            format!("which secrets there are is not known: {}", error.message),
            "try again when this home's controller answers",
        ),
    }]
}

/// What the tenant of this host's own commands would log in with.
fn named(grants: &Grants) -> BTreeSet<SecretName> {
    let grant = grants.of(&TenantName::local());
    let credentials = grant.credentials();
    credentials.map(|(_, one)| one.secret.clone()).collect()
}

async fn kept(home: &Home) -> Result<Vec<SecretView>> {
    let queue = HomeQueue::open(home).await?;
    let asked = queue.server().get::<List<SecretView>>("/v1/secrets").await;
    queue.close().await;
    asked.map(|all| all.items)
}

fn judged(named: &BTreeSet<SecretName>, found: &[SecretView]) -> Check {
    let words = |names: &[&SecretName]| -> String {
        let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
        names.join(", ")
    };
    let of = |name: &SecretName| found.iter().find(|one| one.name == name.as_str());
    let missing: Vec<_> = named.iter().filter(|name| of(name).is_none()).collect();
    if let Some(first) = missing.first() {
        return fail(
            NAME,
            format!(
                "policy.toml names secrets that are not there: {}",
                words(&missing)
            ),
            format!("`kiln secret set {first} --for git` keeps one"),
        );
    }
    let not_for_git = |name: &&SecretName| {
        let uses = of(name).map(|one| &one.scope.uses);
        uses.is_some_and(|uses| !uses.is_empty() && !uses.iter().any(|one| one == "git"))
    };
    let closed: Vec<_> = named.iter().filter(not_for_git).collect();
    if let Some(first) = closed.first() {
        return fail(
            NAME,
            format!(
                "secrets that policy.toml names are not for git: {}",
                words(&closed)
            ),
            format!("`kiln secret scope {first} --for git`"),
        );
    }
    let shared = |name: &&SecretName| of(name).is_some_and(|one| one.scope.uses.is_empty());
    let shared: Vec<_> = named.iter().filter(shared).collect();
    match shared.first() {
        None => pass(NAME, format!("{} kept, for git alone", named.len())),
        Some(first) => warn(
            NAME,
            format!(
                "jobs may ask for what git servers are shown: {}",
                words(&shared)
            ),
            format!("`kiln secret scope {first} --for git` leaves it to the host alone"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiln_controller::api::ScopeView;
    use kiln_machine::driver::CheckLevel;

    use super::*;

    #[test]
    fn what_is_missing_or_open_to_jobs_is_told() {
        let text = "[tenant.local]\ngit = [{ repository = \"git.example.org/a\", secret = \"T\" }, \"git.example.org/b\"]\n";
        let grants = Grants::parse("policy.toml", text).expect("legal");
        let named = named(&grants);
        assert_eq!(named.len(), 1);
        let kept = |uses: &[&str]| SecretView {
            tenant: "local".to_owned(),
            name: "T".to_owned(),
            version: 1,
            source: None,
            scope: ScopeView {
                uses: uses.iter().map(|&one| one.to_owned()).collect(),
                ..ScopeView::default()
            },
            created_unix_ms: 0,
            created_by: "owner".to_owned(),
            rotated_unix_ms: None,
            rotated_by: None,
        };
        let level = |found: &[SecretView]| judged(&named, found).level;
        assert_eq!(level(&[]), CheckLevel::Fail);
        assert_eq!(level(&[kept(&["run"])]), CheckLevel::Fail);
        assert_eq!(level(&[kept(&[])]), CheckLevel::Warn);
        assert_eq!(level(&[kept(&["git"])]), CheckLevel::Pass);
    }
}
