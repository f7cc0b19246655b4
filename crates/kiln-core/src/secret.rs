//! Secrets that a tenant keeps: their names, who may have them, and how a command is given one. Never a value.
//!
//! The rule of access is [`decide`]: pure, so that submission, the worker's door and a person who asks get one answer. Where values lie
//! and how they are sealed is `kiln-controller`'s.

mod repository;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::TenantName;
use crate::job::{JobKind, JobRequest, Source, TrustClass};

pub use repository::{REPOSITORY_MAX, Repository, RepositoryPattern};

/// Longest name, bytes: as the guest takes them.
pub const SECRET_NAME_MAX: usize = 128;
/// Largest value, bytes. One environment variable of Linux has at most 128 KiB.
pub const SECRET_VALUE_MAX: usize = 64 * 1024;
/// Most secrets of one tenant.
pub const SECRETS_MAX: u32 = 500;
/// Most secrets one job asks for.
pub const JOB_SECRETS_MAX: usize = 100;
/// Most repository patterns of one scope.
pub const PATTERNS_MAX: usize = 64;

/// Why a text is not what it should be.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {what}: {rule}")]
pub struct ParseSecretError {
    text: String,
    what: &'static str,
    rule: &'static str,
}

fn wrong(text: &str, what: &'static str, rule: &'static str) -> ParseSecretError {
    ParseSecretError {
        text: text.chars().take(80).collect(),
        what,
        rule,
    }
}

/// A secret's name within its tenant: letters, digits, `-`, `_` and `.`, not at the start a dot. It is a file name in a machine.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretName(String);

impl SecretName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SecretName {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let length = (1..=SECRET_NAME_MAX).contains(&text.len());
        if !length || text.starts_with('.') || !text.bytes().all(legal) {
            let rule = "use 1 to 128 letters, digits, '-', '_' and '.', no dot first";
            return Err(wrong(text, "the name of a secret", rule));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for SecretName {
    type Error = ParseSecretError;

    fn try_from(text: String) -> Result<Self, ParseSecretError> {
        text.parse()
    }
}

impl From<SecretName> for String {
    fn from(name: SecretName) -> Self {
        name.0
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a job does with a secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretUse {
    /// Steps of an image build mount it.
    Build,
    /// A command has it.
    Run,
    /// The host shows it to a git server. No machine has it.
    Git,
}

impl SecretUse {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Build, Self::Run, Self::Git];

    /// Stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Run => "run",
            Self::Git => "git",
        }
    }
}

impl fmt::Display for SecretUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SecretUse {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        let found = Self::ALL.into_iter().find(|one| one.name() == text);
        found.ok_or_else(|| wrong(text, "a use of a secret", "it is build, run or git"))
    }
}

/// Which jobs of its tenant may have a secret. Trusted ones alone, whatever stands here.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SecretScope {
    /// Jobs whose source was fetched from one of these; empty means any job, also one without a repository.
    pub repositories: BTreeSet<RepositoryPattern>,
    /// For these uses; empty means every use.
    pub uses: BTreeSet<SecretUse>,
}

/// A job as far as secrets are concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SecretJob {
    /// Whose it is.
    pub tenant: TenantName,
    /// How far it is trusted.
    pub trust: TrustClass,
    /// What it would do with a secret.
    pub used: SecretUse,
    /// Where its source comes from, when a host fetches it and proves where from.
    pub repository: Option<Repository>,
}

impl SecretJob {
    /// Of a request.
    #[must_use]
    pub fn of(request: &JobRequest) -> Self {
        let (used, repository) = match &request.kind {
            JobKind::SourceBuild(build) => {
                let repository = match &build.source {
                    Source::Git { url, .. } => Repository::of_url(url),
                    // What somebody uploaded or pointed at proves nothing about where it came from.
                    Source::Tree { .. } | Source::Folder { .. } => None,
                };
                (SecretUse::Build, repository)
            }
            JobKind::ImageBuild(_) => (SecretUse::Build, None),
            JobKind::Run(_) => (SecretUse::Run, None),
        };
        Self {
            tenant: request.tenant.clone(),
            trust: request.trust,
            used,
            repository,
        }
    }

    /// As it uses one of the secrets it asks for: what no command has is used by the git gateway alone.
    #[must_use]
    pub fn using(mut self, request: &JobRequest, name: &str) -> Self {
        if request.is_for_git_alone(name) {
            self.used = SecretUse::Git;
        }
        self
    }
}

/// Why a job does not get a secret.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq, Hash)]
pub enum SecretRefused {
    /// It belongs to another tenant.
    #[error("it belongs to another tenant")]
    Tenant,
    /// The job is untrusted.
    #[error("untrusted jobs get no stored secrets")]
    Untrusted,
    /// It is not for this use.
    #[error("it is not for this kind of job")]
    Use,
    /// The job's repository is none of those it is for.
    #[error("it is not for the repository of this job")]
    Repository,
    /// It is for some repositories, and the job's source proves none.
    #[error("it is for some repositories alone, and the source of this job proves none")]
    NoRepository,
}

impl SecretRefused {
    /// Every reason.
    pub const ALL: [Self; 5] = [
        Self::Tenant,
        Self::Untrusted,
        Self::Use,
        Self::Repository,
        Self::NoRepository,
    ];

    /// Stable short name, for audit rows and metrics.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Untrusted => "untrusted",
            Self::Use => "use",
            Self::Repository => "repository",
            Self::NoRepository => "no_repository",
        }
    }

    /// The reason of this name.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.code() == code)
    }
}

/// Whether a job gets a secret of `owner` with this scope.
///
/// # Errors
/// Why not.
pub fn decide(
    owner: &TenantName,
    scope: &SecretScope,
    job: &SecretJob,
) -> Result<(), SecretRefused> {
    if *owner != job.tenant {
        return Err(SecretRefused::Tenant);
    }
    if job.trust != TrustClass::Trusted {
        return Err(SecretRefused::Untrusted);
    }
    if !scope.uses.is_empty() && !scope.uses.contains(&job.used) {
        return Err(SecretRefused::Use);
    }
    if scope.repositories.is_empty() {
        return Ok(());
    }
    let Some(repository) = &job.repository else {
        return Err(SecretRefused::NoRepository);
    };
    match scope.repositories.iter().any(|one| one.matches(repository)) {
        true => Ok(()),
        false => Err(SecretRefused::Repository),
    }
}

/// How a command has a secret.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretPlace {
    /// As a variable of its environment.
    Env(String),
    /// As the file `/run/secrets/NAME`, in memory, for its user alone.
    File,
}

/// A stored secret that a command asks for. As text: `NAME` (a variable of that name), `NAME=VARIABLE`, `NAME:file`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunSecret {
    /// Which.
    pub name: SecretName,
    /// As what.
    pub place: SecretPlace,
}

/// Two secrets, or a secret and a variable, want one place.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{0} is given twice")]
pub struct GivenTwice(String);

/// Whether every secret of a command has a place of its own, beside the variables that it has already.
///
/// # Errors
/// When two want one.
pub fn check_places(
    secrets: &[RunSecret],
    has_variable: impl Fn(&str) -> bool,
) -> Result<(), GivenTwice> {
    let mut seen = BTreeSet::new();
    for secret in secrets {
        let (place, taken) = match &secret.place {
            SecretPlace::Env(variable) => {
                (format!("the variable {variable}"), has_variable(variable))
            }
            SecretPlace::File => (format!("the file {}", secret.name), false),
        };
        if taken || !seen.insert(place.clone()) {
            return Err(GivenTwice(place));
        }
    }
    Ok(())
}

/// Whether a text is the name of a variable that every shell has: letters, digits and `_`, no digit first.
#[must_use]
pub fn is_variable(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let first = text.bytes().next().is_some_and(|b| !b.is_ascii_digit());
    first && text.len() <= 200 && text.bytes().all(legal)
}

impl FromStr for RunSecret {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, ParseSecretError> {
        if let Some(name) = text.strip_suffix(":file") {
            return Ok(Self {
                name: name.parse()?,
                place: SecretPlace::File,
            });
        }
        let (name, variable) = text.split_once('=').unwrap_or((text, text));
        let name: SecretName = name.parse()?;
        if !is_variable(variable) {
            let rule = "write NAME=VARIABLE (letters, digits and _) or NAME:file";
            return Err(wrong(variable, "the name of a variable", rule));
        }
        Ok(Self {
            name,
            place: SecretPlace::Env(variable.to_owned()),
        })
    }
}

impl fmt::Display for RunSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            SecretPlace::Env(variable) => write!(f, "{}={variable}", self.name),
            SecretPlace::File => write!(f, "{}:file", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn repository(url: &str) -> Repository {
        Repository::of_url(url).expect(url)
    }

    #[test]
    fn names_and_places_read_back() {
        for text in ["TOKEN=TOKEN", "npm.token=NPM_TOKEN", "key.pem:file"] {
            let one: RunSecret = text.parse().expect(text);
            assert_eq!(one.to_string(), text);
            let json = serde_json::to_string(&one).expect("json");
            assert_eq!(serde_json::from_str::<RunSecret>(&json).expect("json"), one);
        }
        assert_eq!("A".parse::<RunSecret>().expect("short").to_string(), "A=A");
        for bad in [
            "",
            "npm.token",
            "A=",
            "A=1B",
            ".x:file",
            "a/b:file",
            "A=B=C",
        ] {
            assert!(bad.parse::<RunSecret>().is_err(), "{bad}");
        }
        for refused in SecretRefused::ALL {
            assert_eq!(SecretRefused::from_code(refused.code()), Some(refused));
        }
    }

    fn jobs() -> impl Strategy<Value = SecretJob> {
        let trust = prop_oneof![Just(TrustClass::Trusted), Just(TrustClass::Untrusted)];
        let used = prop::sample::select(SecretUse::ALL.to_vec());
        let from = proptest::option::of("[a-c]{1,2}(/[a-c]{1,2}){0,2}");
        ("[ab]", trust, used, from).prop_map(|(tenant, trust, used, path)| SecretJob {
            tenant: tenant.parse().expect("name"),
            trust,
            used,
            repository: path.map(|path| repository(&format!("https://h.example/{path}"))),
        })
    }

    fn scopes() -> impl Strategy<Value = SecretScope> {
        let word = prop_oneof![Just("*".to_owned()), Just("**".to_owned()), "[a-c*]{1,2}"];
        let text = proptest::collection::vec(word, 1..4).prop_filter_map("a pattern", |words| {
            format!("h.example/{}", words.join("/")).parse().ok()
        });
        let uses = prop::sample::select(SecretUse::ALL.to_vec());
        (
            proptest::collection::btree_set(text, 0..3),
            proptest::collection::btree_set(uses, 0..3),
        )
            .prop_map(|(repositories, uses)| SecretScope { repositories, uses })
    }

    proptest! {
        #[test]
        fn what_is_given_is_within_every_bound(job in jobs(), scope in scopes(), owner in "[ab]") {
            let owner: TenantName = owner.parse().expect("name");
            let given = decide(&owner, &scope, &job).is_ok();
            let uses = scope.uses.is_empty() || scope.uses.contains(&job.used);
            let fits = |one: &RepositoryPattern| job.repository.as_ref().is_some_and(|r| one.matches(r));
            let from = scope.repositories.is_empty() || scope.repositories.iter().any(fits);
            let trusted = job.trust == TrustClass::Trusted;
            prop_assert_eq!(given, owner == job.tenant && trusted && uses && from);
        }

        #[test]
        fn an_untrusted_job_gets_none(job in jobs(), scope in scopes()) {
            let job = SecretJob { trust: TrustClass::Untrusted, ..job };
            prop_assert_eq!(decide(&job.tenant, &scope, &job), Err(SecretRefused::Untrusted));
        }

        #[test]
        fn a_narrower_scope_gives_no_more(job in jobs(), scope in scopes()) {
            let all = SecretScope::default();
            if decide(&job.tenant, &scope, &job).is_ok() {
                prop_assert!(decide(&job.tenant, &all, &job).is_ok());
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,80}") {
            let _pattern = text.parse::<RepositoryPattern>();
            let _repository = Repository::of_url(&format!("https://{text}"));
            let _secret = text.parse::<RunSecret>();
        }
    }
}
