//! The policy in the commit that a build is made from: read from the tree that this host proved and wrote, judged by the controller, applied
//! before the build's machine starts. Nothing that ran in a machine has a say in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use kiln_core::job::{POLICY_BYTES_MAX, POLICY_NAMES, SourceBuild};
use kiln_core::{FailureClass, JobRequest};
use kiln_proto::fleet::{AskPolicy, PolicyAnswer};

use super::client::{REQUEST_TIMEOUT, job_path};
use super::job::Work;
use super::source::Here;
use crate::failure::Failure;

impl Work<'_> {
    /// What a build is held to: by its request, and by the policy in its commit where that counts.
    ///
    /// # Errors
    /// What the controller refuses; a policy that cannot be read.
    pub(super) async fn ruled(
        &self,
        here: &Here,
        mut request: JobRequest,
        mut wanted: SourceBuild,
    ) -> Result<(JobRequest, SourceBuild), Failure> {
        let Some(commit) = here.git.as_ref().filter(|_| wanted.repository_policy) else {
            return Ok((request, wanted));
        };
        let dir = here.dir.clone();
        let files = tokio::task::spawn_blocking(move || policies(&dir)).await;
        let files = files.map_err(|error| Failure::infrastructure(&error))??;
        if files.is_empty() {
            return Ok((request, wanted));
        }
        let path = job_path(&request.id, "policy");
        let ask = AskPolicy { files };
        let client = &self.shop.client;
        let answer = client.call::<_, PolicyAnswer>(&path, Some(self.lease), &ask, REQUEST_TIMEOUT);
        let answer = answer
            .await
            .map_err(|error| Failure::infrastructure(&error))?;
        match answer {
            PolicyAnswer::None => {}
            PolicyAnswer::Refused {
                class,
                message,
                hint,
            } => {
                return Err(Failure {
                    hint,
                    ..Failure::new(class, message)
                });
            }
            PolicyAnswer::Held(held) => {
                for note in held.notes {
                    self.events.note(note).await;
                }
                let name = held.applied.name.as_deref().unwrap_or("its policy");
                let reaches = match held.only_network {
                    true => "what its phase dependencies names",
                    false => "the registries of its runtime: it has no phase dependencies",
                };
                let text = format!(
                    "policy: {name} of commit {}, the build reaches {reaches}",
                    commit.commit
                );
                self.events.note(text).await;
                request.network = held.network;
                request.limits = held.limits;
                request.policy = Some(held.applied);
                wanted.only_network = held.only_network;
            }
        }
        Ok((request, wanted))
    }
}

/// Every file at the top of a tree whose name counts.
fn policies(dir: &Path) -> Result<BTreeMap<String, String>, Failure> {
    let mut found = BTreeMap::new();
    for name in POLICY_NAMES {
        if let Some(text) = text_of(dir, name)? {
            found.insert(name.to_owned(), text);
        }
    }
    Ok(found)
}

/// The text of a file of the tree. Nobody but this process writes there; a link of it may lead anywhere, and none is followed.
fn text_of(dir: &Path, name: &str) -> Result<Option<String>, Failure> {
    let usage = |why: &str| {
        let message = format!("{name} of the commit: {why}");
        Err(Failure::new(FailureClass::Usage, message))
    };
    let mut at = dir.to_owned();
    for part in name.split('/') {
        at.push(part);
        match at.symlink_metadata() {
            Ok(meta) if meta.is_symlink() => {
                return usage("it is a symbolic link, and those are not followed");
            }
            Ok(_) => {}
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(Failure::infrastructure(&error)),
        }
    }
    if !at.is_file() {
        return usage("it is not a file");
    }
    let file = File::open(&at).map_err(|error| Failure::infrastructure(&error))?;
    let mut bytes = Vec::new();
    // One byte more than is taken, so that a longer file is refused and not cut.
    file.take(POLICY_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::infrastructure(&error))?;
    if bytes.len() > POLICY_BYTES_MAX {
        return usage(&format!("it has more than {POLICY_BYTES_MAX} bytes"));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(_) => usage("it is not UTF-8 text"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_tree_are_read_and_links_are_not() {
        let dir = tempfile::tempdir().expect("temp dir");
        let at = |name: &str| dir.path().join(name);
        assert!(policies(dir.path()).expect("reads").is_empty());
        std::fs::write(at("kiln.yaml"), "version: 1\n").expect("write");
        // A file where others have a folder.
        std::fs::write(at(".buildkite"), "").expect("write");
        let found = policies(dir.path()).expect("reads");
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [("kiln.yaml".to_owned(), "version: 1\n".to_owned())]
        );
        for wrong in [vec![0xff], vec![b' '; POLICY_BYTES_MAX + 1]] {
            std::fs::write(at("kiln.yaml"), wrong).expect("write");
            let failure = policies(dir.path()).expect_err("refused");
            assert_eq!(failure.class, FailureClass::Usage, "{failure}");
        }
        std::fs::remove_file(at("kiln.yaml")).expect("remove");
        std::fs::remove_file(at(".buildkite")).expect("remove");
        let outer = tempfile::tempdir().expect("temp dir");
        std::fs::write(outer.path().join("cleanroom.yaml"), "version: 1\n").expect("write");
        std::os::unix::fs::symlink(outer.path(), at(".buildkite")).expect("link");
        let failure = policies(dir.path()).expect_err("refused");
        assert!(failure.message.contains("symbolic link"), "{failure}");
    }
}
