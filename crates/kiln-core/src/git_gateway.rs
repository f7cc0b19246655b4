//! The git gateway of a machine: which repositories it serves, with which credential of the host, and how the machine's git finds it.
//!
//! Meaning only: `kiln-network` speaks to both sides, `kiln-policy` says which repositories a job has.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::SecretName;
use crate::network::INTERNAL_SUFFIX;
use crate::secret::Repository;

/// The gateway as a guest names it.
pub const GIT_HOST: &str = "git.kiln.internal";
/// Its port: plain HTTP, because the channel is the identity.
pub const GIT_PORT: u16 = 80;
/// Most repositories of one phase.
pub const REPOSITORIES_MAX: usize = 64;
/// Who logs in where nobody says otherwise: servers that take a token as a password do not look at the name.
pub const GIT_USER: &str = "x-access-token";
/// Longest user name of a credential, bytes.
pub const GIT_USER_MAX: usize = 128;

const _: () = assert!(GIT_HOST.len() > INTERNAL_SUFFIX.len());

/// A credential of the host for a repository: never a machine's.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct GitCredential {
    /// The tenant's secret that is the password.
    pub secret: SecretName,
    /// The user, [`GIT_USER`] where nobody says otherwise.
    pub user: String,
}

/// A repository that a job may read through the gateway.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct GitAccess {
    /// Which.
    pub repository: Repository,
    /// What the host shows its server; none: it is read as anybody reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<GitCredential>,
}

/// Whether a text can be the user of a credential: printable, and nothing that ends it.
#[must_use]
pub fn is_git_user(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_graphic() && b != b':';
    (1..=GIT_USER_MAX).contains(&text.len()) && text.bytes().all(legal)
}

/// Why the gateway refuses a request of a machine's git.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GitRefused {
    /// The policy does not name the repository.
    Repository,
    /// It would write.
    Push,
    /// Not git's smart HTTP protocol: dumb files, other paths, or a server that does not speak it.
    Protocol,
    /// Not a request that git makes.
    Request,
    /// The server leads elsewhere, and that is no repository the policy names.
    Redirect,
    /// The server wants another credential than the host's, or one where the host has none.
    Credential,
}

impl GitRefused {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Repository,
        Self::Push,
        Self::Protocol,
        Self::Request,
        Self::Redirect,
        Self::Credential,
    ];

    /// As scripts may rely on it.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Repository => "git_repository_not_allowed",
            Self::Push => "git_push_refused",
            Self::Protocol => "git_protocol_refused",
            Self::Request => "git_request_refused",
            Self::Redirect => "git_redirect_refused",
            Self::Credential => "git_credential_refused",
        }
    }

    /// For a person.
    #[must_use]
    pub fn why(self) -> &'static str {
        match self {
            Self::Repository => "the policy does not name this repository",
            Self::Push => "the gateway only reads: no push",
            Self::Protocol => "this is not git's smart HTTP protocol",
            Self::Request => "this is not a request that git makes",
            Self::Redirect => "the server leads to what the policy does not name",
            Self::Credential => "the server does not take the credential of the host",
        }
    }
}

/// Adds to a command's environment what leads its git to the gateway for the hosts of these repositories, behind what the environment says
/// to git already (`git help config`, GIT_CONFIG_COUNT).
///
/// A host that the gateway serves can be reached in no other way, so its ssh forms (`git@HOST:`, `ssh://git@HOST/`) lead there as well.
pub fn steer<'a>(
    env: &mut BTreeMap<String, String>,
    repositories: impl IntoIterator<Item = &'a Repository>,
) {
    const COUNT: &str = "GIT_CONFIG_COUNT";
    let authorities: BTreeSet<&str> = repositories
        .into_iter()
        .map(Repository::authority)
        .collect();
    if authorities.is_empty() {
        return;
    }
    let mut count: usize = env
        .get(COUNT)
        .and_then(|count| count.parse().ok())
        .unwrap_or(0);
    let mut put = |key: String, value: String| {
        env.insert(format!("GIT_CONFIG_KEY_{count}"), key);
        env.insert(format!("GIT_CONFIG_VALUE_{count}"), value);
        count += 1;
    };
    for authority in authorities {
        let key = format!("url.http://{GIT_HOST}/{authority}/.insteadOf");
        put(key.clone(), format!("https://{authority}/"));
        if !authority.contains(':') {
            put(key.clone(), format!("git@{authority}:"));
            put(key, format!("ssh://git@{authority}/"));
        }
    }
    env.insert(COUNT.to_owned(), count.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_environment_says_to_git_stays() {
        let repositories: Vec<Repository> = [
            "h.example.org/a/b",
            "h.example.org/c",
            "g.example.org:8443/d",
        ]
        .map(|text| text.parse().expect(text))
        .to_vec();
        let mut env = BTreeMap::from([
            ("GIT_CONFIG_COUNT".to_owned(), "1".to_owned()),
            ("GIT_CONFIG_KEY_0".to_owned(), "user.name".to_owned()),
            ("GIT_CONFIG_VALUE_0".to_owned(), "me".to_owned()),
        ]);
        steer(&mut env, &repositories);
        assert_eq!(env["GIT_CONFIG_COUNT"], "5");
        assert_eq!(env["GIT_CONFIG_VALUE_0"], "me");
        assert_eq!(
            env["GIT_CONFIG_KEY_1"],
            "url.http://git.kiln.internal/g.example.org:8443/.insteadOf"
        );
        assert_eq!(env["GIT_CONFIG_VALUE_1"], "https://g.example.org:8443/");
        let values: Vec<&str> = (2..5)
            .map(|at| env[&format!("GIT_CONFIG_VALUE_{at}")].as_str())
            .collect();
        assert_eq!(
            values,
            [
                "https://h.example.org/",
                "git@h.example.org:",
                "ssh://git@h.example.org/"
            ]
        );
        let mut none = BTreeMap::new();
        steer(&mut none, []);
        assert!(none.is_empty());
    }

    #[test]
    fn users_cannot_end_their_name() {
        for good in ["oauth2", GIT_USER, "me@example.org"] {
            assert!(is_git_user(good), "{good}");
        }
        for bad in ["", "a:b", "a b", "a\n", "\u{e9}"] {
            assert!(!is_git_user(bad), "{bad}");
        }
    }
}
