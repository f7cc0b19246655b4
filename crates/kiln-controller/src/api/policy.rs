//! The policy of a request: compiled here, bounded by what the operator grants the tenant, narrowed by the request. `kiln-policy` decides, as it
//! does for a command without a server; here are its words for HTTP.
//!
//! The operator's grants are `policy.toml` beside the controller's `kiln.toml`. It is read for each request, so that what is withdrawn
//! counts from then on; one that cannot be used grants nothing.

use std::fs::Metadata;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use http::StatusCode;
use kiln_core::command_line::CommandTooLong;
use kiln_core::git_gateway::REPOSITORIES_MAX;
use kiln_core::job::{AppliedPolicy, RunPhase};
use kiln_core::secret::{ParseSecretError, Repository};
use kiln_core::{
    ByteSize, FailureClass, GitAccess, ImageRef, JobKind, JobRequest, NetworkPolicy, RunSecret,
    TenantName,
};
use kiln_policy::policy::Resources;
use kiln_policy::{
    BuildAsked, Compiled, Diagnostics, Format, GRANT_BYTES_MAX, Grants, Held, HeldBuild, Image,
    Maxima, Mode, Refusal, Removed, Standing, UntrustedSource, compile, hold_build, hold_run,
    other_image, policy_ref, stands, trusted_source, unseen,
};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Api;
use super::ask::{BuildAsk, Common, RunAsk};
use super::problem::{Fault, Problem};

/// Longest name of a policy file.
const FILE_NAME_MAX: usize = 200;
/// The bit of a file's mode by which whoever has a login may write it.
const ANYBODY_WRITES: u32 = 0o002;

/// A policy file. Its name says which it is: one that ends with `cleanroom.yaml` is read by that format's keys, any other as `kiln.yaml`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyAsk {
    /// Its name, as messages show it: `kiln.yaml`, `.buildkite/cleanroom.yaml`.
    #[schema(max_length = 200, example = "kiln.yaml")]
    pub file: String,
    /// Its text, at most 256 KiB.
    #[schema(max_length = 262_144)]
    pub text: String,
}

impl PolicyAsk {
    fn compiled(&self) -> Result<Compiled, Problem> {
        let name = &self.file;
        if name.is_empty() || name.len() > FILE_NAME_MAX || name.chars().any(unseen) {
            return Err(Problem::invalid(
                "policy.file",
                format!("it is a name of 1 to {FILE_NAME_MAX} bytes that can be seen"),
            ));
        }
        compile(Format::of_name(name), name, &self.text).map_err(|wrong| faulty(&wrong))
    }
}

/// A file that cannot be used: the same text that the command shows, and its places for programs.
fn faulty(wrong: &Diagnostics) -> Problem {
    let count = wrong.list.len();
    let what = match (count, wrong.more) {
        (1, _) => "one thing is wrong".to_owned(),
        (count, false) => format!("{count} things are wrong"),
        (count, true) => format!("more than {count} things are wrong"),
    };
    let text = format!("{what} in {}\n\n{}", wrong.file, wrong);
    let faults = wrong.list.iter().map(|one| Fault {
        file: wrong.file.clone(),
        line: one.place.map(|place| place.line),
        column: one.place.map(|place| place.column),
        message: one.message.clone(),
        hint: one.hint.clone(),
    });
    let code = "policy_invalid";
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, code, text.trim_end())
        .field("policy")
        .faults(faults.collect())
}

/// A request that its policy, or the operator, does not allow.
fn refused(refusal: Refusal) -> Problem {
    let field = match refusal.field {
        "timeout" => "timeout_seconds",
        field => field,
    };
    let detail = match &refusal.said {
        Some(said) => format!("{said}: {}", refusal.message),
        None => refusal.message,
    };
    let problem = match refusal.class {
        FailureClass::Policy => Problem::new(StatusCode::FORBIDDEN, "policy_refused", detail),
        _ => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "policy_narrows", detail),
    };
    let problem = problem.field(field);
    match refusal.hints.is_empty() {
        true => problem,
        false => problem.hint(refusal.hints.join("; ")),
    }
}

/// What a job is held to besides its work.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) network: NetworkPolicy,
    /// Networks of its earlier phases: the installation bounds them, too.
    pub(crate) phases: Vec<NetworkPolicy>,
    pub(crate) resources: Resources,
    pub(crate) disk: Option<ByteSize>,
    /// For what a default decides.
    pub(crate) max: Maxima,
    pub(crate) applied: Option<AppliedPolicy>,
    /// What the grant took away of a file, in words.
    pub(crate) notes: Vec<String>,
    /// Whether the operator trusts its source; of git the ref that is trusted, in full.
    pub(crate) source: Result<Option<String>, UntrustedSource>,
    /// Where its policy is read if it is not.
    pub(crate) policy_ref: Option<String>,
}

/// What the grant took away of a file, in words.
pub(crate) fn policy_notes(file: &Compiled, removed: &[Removed]) -> Vec<String> {
    notes(Some(file), removed)
}

fn notes(file: Option<&Compiled>, removed: &[Removed]) -> Vec<String> {
    let file = file.map(Compiled::file).unwrap_or_default();
    let told = removed.iter().map(|gone| {
        let left = match gone.left.is_empty() {
            true => "nothing is left of it".to_owned(),
            false => format!("left of it: {}", gone.left.join(", ")),
        };
        let (line, rule) = (gone.line, &gone.rule);
        format!("{file}:{line}: {rule} is not granted: {left}")
    });
    told.collect()
}

impl Api {
    /// What the operator grants now.
    ///
    /// # Errors
    /// When the file cannot be used: nothing is granted then. Its words go to the log alone.
    pub(crate) async fn grants(&self) -> Result<Grants, Problem> {
        let Some(path) = self.config.grants.clone() else {
            return Ok(Grants::default());
        };
        let read = tokio::task::spawn_blocking(move || read_grants(&path));
        let read = read.await.map_err(|error| Problem::unavailable(&error))?;
        let grants = read.map_err(|error| Problem::unavailable(&error))?;
        let there = grants.file.is_some();
        if self.grants_there.swap(there, Ordering::Relaxed) && !there {
            tracing::warn!(
                path = ?self.config.grants,
                "the operator's grants are gone: kiln's defaults hold from now on"
            );
        }
        Ok(grants)
    }
}

/// Why the operator's grants cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GrantsError {
    /// The file cannot be read.
    #[error("read {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It is no file that only the operator can change.
    #[error("{path} is not used: {why}")]
    Unfit {
        /// Which file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// It says nothing that is meant.
    #[error("{path} cannot be used")]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Diagnostics,
    },
}

/// Reads the operator's grants; without a file there are none. A link is followed: one that leads nowhere is a file that cannot be read.
/// Messages to tenants name the file without its folder.
///
/// # Errors
/// When the file is there and cannot be used: it is no regular file, another than root and this process's user owns it, anybody may write
/// it, or it is not legal.
pub fn read_grants(path: &Path) -> Result<Grants, GrantsError> {
    let io = |source| GrantsError::Io {
        path: path.to_owned(),
        source,
    };
    match path.symlink_metadata() {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Grants::default()),
        Err(error) => return Err(io(error)),
    }
    // A pipe that nobody writes to would hold whoever opens it.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let mut open = std::fs::OpenOptions::new();
    let file = open.read(true).custom_flags(flags).open(path);
    let file = file.map_err(io)?;
    if let Some(why) = unfit(&file.metadata().map_err(io)?) {
        let path = path.to_owned();
        return Err(GrantsError::Unfit { path, why });
    }
    let mut text = String::new();
    // One byte more than is taken, so that a longer file is refused and not cut.
    let mut bounded = file.take(GRANT_BYTES_MAX as u64 + 1);
    bounded.read_to_string(&mut text).map_err(io)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Grants::parse(&name, &text).map_err(|source| GrantsError::Wrong {
        path: path.to_owned(),
        source,
    })
}

/// Why what is in such a file is not surely the operator's word.
fn unfit(meta: &Metadata) -> Option<&'static str> {
    let own = rustix::process::geteuid().as_raw();
    match meta {
        meta if !meta.is_file() => Some("it is not a regular file"),
        meta if meta.uid() != 0 && meta.uid() != own => {
            Some("neither root nor the server's user owns it")
        }
        meta if meta.mode() & ANYBODY_WRITES != 0 => Some("anybody may write it"),
        _ => None,
    }
}

fn connections_most() -> u32 {
    kiln_proto::msg::CONNECTIONS_MOST
}

fn resources(common: &Common) -> Result<Resources, Problem> {
    Ok(Resources {
        cpus: common.cpus,
        memory: common.size("memory", common.memory.as_ref())?,
        timeout_ms: common.timeout_ms(),
    })
}

impl RunAsk {
    /// What the run is held to, and its work as that says.
    pub(crate) fn rule(
        &self,
        kind: &mut JobKind,
        grants: &Grants,
        tenant: &TenantName,
    ) -> Result<Rule, Problem> {
        let JobKind::Run(run) = kind else {
            return Err(Problem::bad_request("this is not a run"));
        };
        let since = Instant::now();
        let compiled = self.policy.as_ref().map(PolicyAsk::compiled).transpose()?;
        let allow = self.common.rules()?;
        let git = self.repositories()?;
        let named: Vec<RunSecret> = std::mem::take(&mut run.secrets);
        let asked = kiln_policy::Asked {
            mode: self.mode()?,
            allow: &allow,
            git: &git,
            resources: resources(&self.common)?,
            image: run.image.as_ref(),
            secrets: &named,
            command: &self.argv,
            connections_most: connections_most(),
        };
        let mut held = hold_run(compiled.as_ref(), grants, tenant, &asked).map_err(refused)?;
        if let Some(applied) = &mut held.applied {
            applied.took(since.elapsed());
        }
        let notes = notes(compiled.as_ref(), &held.removed);
        let Held {
            image,
            no_source,
            argv,
            network,
            resources,
            max,
            disk,
            disk_said,
            artifacts,
            phases,
            services,
            git,
            secrets,
            applied,
            removed: _,
        } = held;
        runs_in(run, image, compiled.as_ref())?;
        if no_source && run.source.is_some() {
            let detail = "files were sent, and the policy wants none in the machine";
            return Err(Problem::invalid("source", detail));
        }
        if argv.is_empty() && run.image.is_none() {
            return Err(Problem::invalid("argv", "there is no command"));
        }
        let fits = kiln_core::command_line::fits(&argv, &run.env);
        fits.map_err(|long| Problem::invalid("argv", long.to_string()).hint(CommandTooLong::HINT))?;
        run.argv = argv;
        let own = std::mem::take(&mut run.artifacts);
        run.artifacts = [artifacts, own].concat();
        if run.artifacts.len() > kiln_core::artifact::ARTIFACT_PATHS_MAX {
            return Err(Problem::invalid("artifacts", "too many, with the policy's"));
        }
        run.secrets = secrets;
        run.services = services;
        run.git = git;
        run.phases = phases;
        self.places(&run.secrets)?;
        for phase in &run.phases {
            self.places(&phase.secrets)?;
        }
        let asked = self.common.size("disk", self.common.disk.as_ref())?;
        if let (Some(asked), Some(most)) = (asked, disk)
            && asked > most
        {
            let detail = format!("{asked} is more than the policy allows: {most}");
            return Err(Problem::invalid("disk", detail));
        }
        run.disk |= disk_said;
        Ok(Rule {
            network,
            phases: phase_networks(&run.phases),
            resources,
            disk: asked.or(disk.filter(|_| disk_said)),
            max: Maxima { disk, ..max },
            applied,
            notes,
            source: trusted_source(kind, grants, tenant),
            policy_ref: policy_ref(kind, grants, tenant),
        })
    }

    fn repositories(&self) -> Result<Vec<Repository>, Problem> {
        if self.git.len() > REPOSITORIES_MAX {
            let detail = format!("at most {REPOSITORIES_MAX} repositories");
            return Err(Problem::invalid("git", detail));
        }
        let all = self.git.iter().map(|text| text.parse());
        all.collect::<Result<_, _>>()
            .map_err(|error: ParseSecretError| Problem::invalid("git", error.to_string()))
    }

    fn mode(&self) -> Result<Option<Mode>, Problem> {
        let named = self.net.as_deref().map(|name| {
            let detail = "it is `isolated`, `egress`, `open` or `learn`";
            Mode::named(name).ok_or_else(|| Problem::invalid("net", detail))
        });
        named.transpose()
    }
}

/// The image of the policy. Another one of the request is another job, not a narrower one.
fn runs_in(
    run: &mut kiln_core::job::RunCommand,
    image: Option<Image>,
    compiled: Option<&Compiled>,
) -> Result<(), Problem> {
    let file = compiled.map(Compiled::file).unwrap_or_default();
    let other = |other: &ImageRef, own: &str| Err(refused(other_image(other, own, file)));
    match (image, &run.image) {
        (None, _) => Ok(()),
        (Some(Image::Runtime(own)), Some(asked)) => other(asked, &own),
        (Some(Image::Pinned(own)), Some(asked)) if own != *asked => other(asked, &own.to_string()),
        (Some(Image::Pinned(own)), _) => {
            run.image = Some(own);
            Ok(())
        }
        // Which base that is, the host knows that runs it.
        (Some(Image::Runtime(own)), None) => {
            run.runtime = Some(own);
            Ok(())
        }
    }
}

fn phase_networks(phases: &[RunPhase]) -> Vec<NetworkPolicy> {
    phases.iter().map(|phase| phase.network.clone()).collect()
}

impl BuildAsk {
    /// What the build is held to, and its work as that says.
    pub(crate) fn rule(
        &self,
        kind: &mut JobKind,
        grants: &Grants,
        tenant: &TenantName,
    ) -> Result<Rule, Problem> {
        let JobKind::SourceBuild(build) = kind else {
            return Err(Problem::bad_request("this is not a build"));
        };
        let since = Instant::now();
        let compiled = self.policy.as_ref().map(PolicyAsk::compiled).transpose()?;
        let allow = self.common.rules()?;
        let asked = BuildAsked {
            allow: &allow,
            resources: resources(&self.common)?,
            disk: self.common.size("disk", self.common.disk.as_ref())?,
            secrets: &build.secrets,
            connections_most: connections_most(),
        };
        let mut held = hold_build(compiled.as_ref(), grants, tenant, &asked).map_err(refused)?;
        if let Some(applied) = &mut held.applied {
            applied.took(since.elapsed());
        }
        let notes = notes(compiled.as_ref(), &held.removed);
        let HeldBuild {
            network,
            only,
            resources,
            max,
            disk,
            applied,
            removed: _,
        } = held;
        build.only_network = only;
        Ok(Rule {
            network,
            phases: Vec::new(),
            resources,
            disk,
            max,
            applied,
            notes,
            source: trusted_source(kind, grants, tenant),
            policy_ref: policy_ref(kind, grants, tenant),
        })
    }
}

/// Whether what a job was once granted is granted still; with what it is held to now.
///
/// # Errors
/// What was withdrawn.
pub(crate) fn still_stands(
    request: &JobRequest,
    grants: &Grants,
) -> Result<(Maxima, Option<AppliedPolicy>), Problem> {
    let (phases, git): (&[RunPhase], &[GitAccess]) = match &request.kind {
        JobKind::Run(run) => (&run.phases, &run.git),
        _ => (&[], &[]),
    };
    let standing = Standing {
        network: &request.network,
        phases,
        git,
        applied: request.policy.clone(),
    };
    stands(&standing, grants, &request.tenant).map_err(|refusal| {
        let problem = refused(refusal);
        let detail = format!("what the job was granted was withdrawn: {}", problem.detail);
        Problem { detail, ..problem }.field("policy")
    })
}
