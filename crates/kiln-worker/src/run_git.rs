//! The git gateway of a run: what the host shows the servers of its repositories. Values stay in this process.

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_core::job::RunCommand;
use kiln_core::secret::Repository;
use kiln_core::{FailureClass, GitAccess};
use kiln_network::GitUpstreams;

use crate::failure::Failure;
use crate::orders::chain;

/// The gateway's part of the host, where the run reads any repository.
///
/// # Errors
/// Usage, for a value that is no password; policy for one that is not there.
pub(crate) fn upstreams(
    command: &RunCommand,
    authorities: Option<&[u8]>,
    values: &[(String, Vec<u8>)],
) -> Result<Option<Arc<GitUpstreams>>, Failure> {
    let mut all = command.all_git().peekable();
    if all.peek().is_none() {
        return Ok(None);
    }
    let mut upstreams = GitUpstreams::new(authorities)
        .map_err(|error| Failure::new(FailureClass::Infrastructure, chain(&error)))?;
    for GitAccess {
        repository,
        credential,
    } in all
    {
        let Some(credential) = credential else {
            continue;
        };
        let name = credential.secret.as_str();
        let value = values.iter().find(|(have, _)| have == name);
        let Some((_, value)) = value else {
            let message = format!("there is no secret {name} for {repository}");
            return Err(Failure::new(FailureClass::Policy, message).hint(
                "`kiln secret set` keeps one; policy.toml says which repositories it is for",
            ));
        };
        upstreams = upstreams
            .with(repository, &credential.user, value)
            .map_err(|error| Failure::new(FailureClass::Usage, error.to_string()))?;
    }
    Ok(Some(Arc::new(upstreams)))
}

/// As the rules of a phase have them.
pub(crate) fn named(git: &[GitAccess]) -> BTreeSet<Repository> {
    git.iter().map(|one| one.repository.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_needs_its_value_and_is_not_printed() {
        let access = |text: &str| serde_json::from_str::<GitAccess>(text).expect(text);
        let run = RunCommand {
            git: vec![
                access(r#"{"repository":"h.example.org/open"}"#),
                access(
                    r#"{"repository":"h.example.org/own","credential":{"secret":"T","user":"me"}}"#,
                ),
            ],
            ..RunCommand::default()
        };
        let missing = upstreams(&run, None, &[]).expect_err("no value");
        assert_eq!(missing.class, FailureClass::Policy);
        let values = |value: &[u8]| [("T".to_owned(), value.to_vec())];
        let wrong = upstreams(&run, None, &values(b"a\nb")).expect_err("two lines");
        assert_eq!(wrong.class, FailureClass::Usage);
        assert!(!wrong.message.contains("a\nb"));
        let made = upstreams(&run, None, &values(b"hunter2")).expect("made");
        assert!(!format!("{made:?}").contains("hunter2"));
        assert!(
            upstreams(&RunCommand::default(), None, &[])
                .expect("none")
                .is_none()
        );
    }
}
