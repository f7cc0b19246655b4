//! A build that repeats an earlier one exactly: the host knows it by one hash over everything that decides the result, and gives the
//! earlier image its names again instead of starting a machine (DESIGN, promises: "dedup on a host hash").
//!
//! The hash covers what the host computed or chose itself, never a word of the guest: source tree, Dockerfile with every FROM as a
//! digest, target, build arguments, network policy, environment of RUN steps, CA bundle, machine image, BuildKit, tenant and trust.
//! A build that is given a secret, or whose Dockerfile adds something from a remote address, is never a repetition. The image is read
//! back and every digest recomputed before it is named: a record without its image, or with a damaged one, means a build.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kiln_core::job::TrustClass;
use kiln_core::{AttemptId, Digest, JobKind, JobRequest};
use kiln_store::registry::RepoName;
use serde::{Deserialize, Serialize};

/// Version of the hash and of the files below: part of every hash.
pub const SCHEMA: u32 = 1;
/// Results remembered at most; the ones not used for longest go first.
pub const RESULTS_MAX: usize = 4096;
/// Largest file of one result, bytes.
const RESULT_BYTES_MAX: u64 = 64 * 1024;

/// What an earlier build gave.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EarlierResult {
    /// Version of this file.
    pub schema: u32,
    /// Repository that holds the image.
    pub repository: RepoName,
    /// The image manifest.
    pub manifest: Digest,
    /// The attempt that built it.
    pub attempt: AttemptId,
    /// Host's time when it was built, milliseconds since the Unix epoch.
    pub built_unix_ms: u64,
}

/// What decides a build's result and is not part of its request.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Name of the machine image.
    pub machine_image: &'a str,
    /// Version and digest of BuildKit.
    pub buildkit: &'a str,
    /// The CA bundle builds get.
    pub ca_bundle: Option<&'a [u8]>,
    /// Environment of RUN steps.
    pub step_env: &'a [(String, String)],
}

/// The hash by which a repetition is known; `None` for a build whose result something else can change.
#[must_use]
pub fn key(request: &JobRequest, around: &Surroundings<'_>) -> Option<Digest> {
    let JobKind::ImageBuild(build) = &request.kind else {
        return None;
    };
    if !build.secrets.is_empty()
        || request.trust != TrustClass::Trusted
        || adds_from_elsewhere(&build.dockerfile)
    {
        return None;
    }
    let parts = serde_json::json!({
        "schema": SCHEMA,
        "tenant": request.tenant,
        "source": build.source,
        "dockerfile": build.dockerfile,
        "target": build.target,
        "build_args": build.build_args,
        "bases": build.bases,
        "network": request.network,
        "machine_image": around.machine_image,
        "buildkit": around.buildkit,
        "ca_bundle": around.ca_bundle.map(Digest::of),
        "step_env": around.step_env,
    });
    Some(Digest::of(parts.to_string().as_bytes()))
}

/// Whether an ADD takes something that is not in the source: BuildKit asks its address anew on every build, and so must we. Anything that
/// only the frontend can tell (a variable) counts as remote.
fn adds_from_elsewhere(dockerfile: &str) -> bool {
    dockerfile.lines().any(|line| {
        let line = line.trim_start();
        // ONBUILD ADD belongs to a later build. A heredoc's text may look like an instruction: then a machine is started in vain, no more.
        let word = line.split_ascii_whitespace().next().unwrap_or_default();
        word.eq_ignore_ascii_case("add")
            && ["://", "git@", "$", "\\", "`"]
                .iter()
                .any(|mark| line.contains(mark))
    })
}

/// The results of one host, one small file each.
#[derive(Clone, Debug)]
pub struct Results {
    dir: PathBuf,
}

impl Results {
    /// The results below a home's data directory.
    #[must_use]
    pub fn below(data: &Path) -> Self {
        Self {
            dir: data.join("results"),
        }
    }

    /// What an earlier build with this hash gave. A file that cannot be understood is removed and counts as none.
    #[must_use]
    pub fn find(&self, key: &Digest) -> Option<EarlierResult> {
        let path = self.path(key);
        let size = fs::symlink_metadata(&path).ok()?.len();
        let read = if size > RESULT_BYTES_MAX {
            None
        } else {
            fs::read(&path).ok()
        };
        let found = read
            .and_then(|bytes| serde_json::from_slice::<EarlierResult>(&bytes).ok())
            .filter(|result| result.schema == SCHEMA);
        match &found {
            None => self.forget(key),
            // The time of use decides which results go first; one that cannot be set only makes it go sooner.
            Some(_) => {
                let _kept_anyway = fs::File::options()
                    .append(true)
                    .open(&path)
                    .and_then(|file| file.set_modified(SystemTime::now()));
            }
        }
        found
    }

    /// Remembers a result. Replaces as a whole; a crash leaves the old one or the new one.
    ///
    /// # Errors
    /// The filesystem failed; the build itself is not touched by that.
    pub fn remember(&self, key: &Digest, result: &EarlierResult) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let path = self.path(key);
        let aside = path.with_extension(format!("new-{}", std::process::id()));
        let mut file = fs::File::create(&aside)?;
        let written = serde_json::to_writer(&file, result)
            .map_err(io::Error::from)
            .and_then(|()| file.flush())
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&aside, &path));
        if written.is_err() {
            let _first_error_counts = fs::remove_file(&aside);
        }
        written?;
        self.prune(RESULTS_MAX)
    }

    /// Forgets a result: its image is gone or damaged.
    pub fn forget(&self, key: &Digest) {
        let _gone_or_not = fs::remove_file(self.path(key));
    }

    /// Forgets every result.
    ///
    /// # Errors
    /// The filesystem failed.
    pub fn forget_all(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn path(&self, key: &Digest) -> PathBuf {
        self.dir.join(format!("{}.json", key.hex()))
    }

    /// Removes the results not used for longest, and what a killed writer left.
    fn prune(&self, keep: usize) -> io::Result<()> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let Ok(used) = entry.metadata().and_then(|meta| meta.modified()) else {
                continue;
            };
            all.push((used, entry.path()));
        }
        if all.len() <= keep {
            return Ok(());
        }
        all.sort();
        for (_, path) in &all[..all.len() - keep] {
            let _another_process_was_first = fs::remove_file(path);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kiln_core::job::{ImageBuild, Limits};
    use kiln_core::{ByteSize, NetworkPolicy, TenantName};

    use super::*;

    fn request() -> JobRequest {
        JobRequest {
            id: "b01jcq2v3w4x5y6z7a8b9c0d1e"
                .parse()
                .unwrap_or_else(|_| kiln_core::JobId::new('b', 1, [0; 5])),
            tenant: TenantName::local(),
            kind: JobKind::ImageBuild(ImageBuild {
                source: Digest::of(b"source"),
                dockerfile: "FROM node@sha256:0\nADD . /app\nRUN make\n".to_owned(),
                target: None,
                build_args: BTreeMap::new(),
                secrets: Vec::new(),
                bases: Vec::new(),
                tags: Vec::new(),
                no_cache: false,
            }),
            network: NetworkPolicy::from_rules(std::iter::empty()),
            limits: Limits {
                cpus: 1,
                memory: ByteSize::gib(1),
                disk: ByteSize::gib(1),
                timeout_ms: 1,
            },
            trust: TrustClass::Trusted,
            network_bits: None,
            dispatch: kiln_core::Dispatch::default(),
            traceparent: None,
            policy: None,
        }
    }

    fn around() -> Surroundings<'static> {
        Surroundings {
            machine_image: "ci-1",
            buildkit: "v1",
            ca_bundle: None,
            step_env: &[],
        }
    }

    fn changed(change: impl FnOnce(&mut ImageBuild)) -> Option<Digest> {
        let mut request = request();
        if let JobKind::ImageBuild(build) = &mut request.kind {
            change(build);
        }
        key(&request, &around())
    }

    #[test]
    fn whatever_decides_the_result_changes_the_hash() {
        let base = key(&request(), &around()).expect("a build that can repeat");
        let others = [
            changed(|build| build.source = Digest::of(b"other")),
            changed(|build| build.dockerfile.push_str("RUN x\n")),
            changed(|build| build.target = Some("t".to_owned())),
            changed(|build| drop(build.build_args.insert("A".to_owned(), "1".to_owned()))),
            key(
                &JobRequest {
                    tenant: "other".parse().expect("a name"),
                    ..request()
                },
                &around(),
            ),
            key(
                &request(),
                &Surroundings {
                    machine_image: "ci-2",
                    ..around()
                },
            ),
            key(
                &request(),
                &Surroundings {
                    buildkit: "v2",
                    ..around()
                },
            ),
            key(
                &request(),
                &Surroundings {
                    ca_bundle: Some(b"x"),
                    ..around()
                },
            ),
            key(
                &request(),
                &Surroundings {
                    step_env: &[("A".to_owned(), "b".to_owned())],
                    ..around()
                },
            ),
        ];
        for other in &others {
            assert!(other.is_some_and(|other| other != base), "{other:?}");
        }
        let named = changed(|build| {
            build
                .tags
                .push("t/local/other:1".parse().expect("a reference"))
        });
        assert_eq!(named, Some(base), "a name does not decide the result");
        assert_eq!(changed(|build| build.no_cache = true), Some(base));
    }

    #[test]
    fn what_something_else_can_change_never_repeats() {
        assert_eq!(changed(|build| build.secrets.push("npm".to_owned())), None);
        assert_eq!(
            changed(|build| build.dockerfile.push_str("add https://h/x /x\n")),
            None
        );
        assert_eq!(
            changed(|build| build.dockerfile.push_str("  ADD git@h:x.git /x\n")),
            None
        );
        assert_eq!(
            changed(|build| build.dockerfile.push_str("ARG U\nADD $U /x\n")),
            None
        );
        assert_eq!(
            changed(|build| build.dockerfile.push_str("ADD \\\n https://h/x /x\n")),
            None
        );
        let untrusted = JobRequest {
            trust: TrustClass::Untrusted,
            dispatch: kiln_core::Dispatch::default(),
            ..request()
        };
        assert_eq!(key(&untrusted, &around()), None);
    }

    #[test]
    fn results_are_kept_found_and_bounded() {
        let dir = tempfile::tempdir().expect("a directory");
        let results = Results::below(dir.path());
        let of = |n: u32| Digest::of(&n.to_le_bytes());
        let result = EarlierResult {
            schema: SCHEMA,
            repository: "t/local/app".parse().expect("a repository"),
            manifest: of(0),
            attempt: AttemptId {
                job: request().id,
                number: 1,
            },
            built_unix_ms: 7,
        };
        assert_eq!(results.find(&of(1)), None);
        results.remember(&of(1), &result).expect("kept");
        assert_eq!(results.find(&of(1)), Some(result.clone()));
        fs::write(results.path(&of(1)), b"{").expect("damaged");
        assert_eq!(results.find(&of(1)), None);
        assert!(!results.path(&of(1)).exists(), "a damaged file goes");
        for n in 2..6 {
            results.remember(&of(n), &result).expect("kept");
        }
        results.prune(2).expect("pruned");
        assert_eq!(
            fs::read_dir(dir.path().join("results"))
                .expect("a directory")
                .count(),
            2
        );
    }
}
