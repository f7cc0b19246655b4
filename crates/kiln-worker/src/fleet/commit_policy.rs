//! The policy in the commit that a build is made from, or, where its author may be anybody, in a trusted ref of the same repository: read from
//! objects that this host proved, judged by the controller, applied before the build's machine starts. Nothing that ran in a machine has a say
//! in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use kiln_core::job::{POLICY_BYTES_MAX, POLICY_NAMES, SourceBuild};
use kiln_core::{FailureClass, JobRequest, NetworkPolicy};
use kiln_proto::fleet::{AskPolicy, BeyondPolicy, PolicyAnswer};

use super::client::{REQUEST_TIMEOUT, job_path};
use super::job::Work;
use super::report::answered;
use super::source::Here;
use crate::checkout::FilesBeside;
use crate::event::Events;
use crate::failure::Failure;

/// Most destinations of an untrusted commit that are told one by one.
const BEYOND_SHOWN: usize = 20;
/// Why.
const NOT_ITS_OWN: &str = "this job is untrusted, and its own commit names no host for it; whoever submits it names one with --allow";

/// A build as its commit's policy leaves it.
pub(super) struct Ruled {
    pub(super) request: JobRequest,
    pub(super) wanted: SourceBuild,
    /// Of an untrusted job.
    pub(super) narrowed: Option<Narrowed>,
}

/// What the policy of an untrusted commit leaves of the registries of its runtime, and what it names for itself.
pub(super) struct Narrowed {
    pub(super) registries: NetworkPolicy,
    beyond: Vec<BeyondPolicy>,
}

impl Narrowed {
    /// Says which destinations a build that reaches `network` does not get, and why.
    pub(super) async fn tell(&self, network: &NetworkPolicy, events: &Events) {
        let refused = |one: &&BeyondPolicy| !network.covers_rule(&one.rule);
        let all: Vec<_> = self.beyond.iter().filter(refused).collect();
        for one in all.iter().take(BEYOND_SHOWN) {
            let (place, rule) = (&one.place, &one.rule);
            let text = format!("{place}: {rule} is not reached: {NOT_ITS_OWN}");
            events.warn(text).await;
        }
        if let Some(more) = all.len().checked_sub(BEYOND_SHOWN).filter(|more| *more > 0) {
            let text = format!("{more} more destinations of it are not reached: {NOT_ITS_OWN}");
            events.warn(text).await;
        }
    }
}

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
    ) -> Result<Ruled, Failure> {
        let mut narrowed = None;
        let Some(commit) = here.git.as_ref().filter(|_| wanted.repository_policy) else {
            return Ok(Ruled {
                request,
                wanted,
                narrowed,
            });
        };
        let read = match &here.beside {
            Some(beside) => of_trusted_ref(beside)?,
            None => None,
        };
        let read = match read {
            Some(read) => read,
            None => {
                let dir = here.dir.clone();
                let files = tokio::task::spawn_blocking(move || policies(&dir)).await;
                Found {
                    ask: AskPolicy {
                        files: files.map_err(|error| Failure::infrastructure(&error))??,
                        reference: None,
                    },
                    place: format!("commit {}", commit.commit),
                }
            }
        };
        let Found { ask, place } = read;
        if ask.files.is_empty() {
            return Ok(Ruled {
                request,
                wanted,
                narrowed,
            });
        }
        let path = job_path(&request.id, "policy");
        let client = &self.shop.client;
        let asked =
            || client.call::<_, PolicyAnswer>(&path, Some(self.lease), &ask, REQUEST_TIMEOUT);
        let answer = answered(&self.to.fenced, asked).await;
        let answer = answer.map_err(|error| Failure::infrastructure(&error))?;
        match answer {
            PolicyAnswer::None => {}
            PolicyAnswer::Refused {
                class,
                message,
                hint,
            } => {
                // A commit's author does not find the line in his own file.
                let message = match ask.reference {
                    Some(_) => format!("{message}\nthis is the policy of {place}"),
                    None => message,
                };
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
                let reaches = match (held.only_network, &held.registries_within) {
                    (true, None) => "what its phase dependencies names",
                    (true, Some(_)) => {
                        "what its phase dependencies leaves of the registries of its runtime and of --allow: the job is untrusted"
                    }
                    (false, _) => "the registries of its runtime: it has no phase dependencies",
                };
                let text = format!("policy: {name} of {place}, the build reaches {reaches}");
                self.events.note(text).await;
                request.network = held.network;
                request.limits = held.limits;
                request.policy = Some(held.applied);
                wanted.only_network = held.only_network;
                let beyond = held.beyond;
                narrowed = held
                    .registries_within
                    .map(|registries| Narrowed { registries, beyond });
            }
        }
        Ok(Ruled {
            request,
            wanted,
            narrowed,
        })
    }
}

/// Policies, and where they were found.
struct Found {
    ask: AskPolicy,
    place: String,
}

/// What the trusted ref says, if it says anything: then the commit's own files are not read at all.
fn of_trusted_ref(beside: &FilesBeside) -> Result<Option<Found>, Failure> {
    let (reference, commit) = (&beside.reference, beside.commit);
    let text = |(name, bytes): (&String, &Vec<u8>)| match String::from_utf8(bytes.clone()) {
        Ok(text) => Ok((name.clone(), text)),
        Err(_) => {
            let message = format!("{name} of {reference}: it is not UTF-8 text");
            Err(Failure::new(FailureClass::Usage, message))
        }
    };
    let files: BTreeMap<_, _> = beside.files.iter().map(text).collect::<Result<_, _>>()?;
    if files.is_empty() {
        return Ok(None);
    }
    Ok(Some(Found {
        ask: AskPolicy {
            files,
            reference: Some(reference.clone()),
        },
        place: format!("{reference} (commit {commit}), which is trusted"),
    }))
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
