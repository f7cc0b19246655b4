//! What a caller asks for, and how it becomes a `JobRequest`: everything is checked here, everything of the token's wins.

use std::collections::{BTreeMap, BTreeSet};

use http::HeaderMap;
use kiln_core::access::{Asked, Granted};
use kiln_core::artifact::ARTIFACT_PATHS_MAX;
use kiln_core::dispatch::{LABELS_MAX, RESERVED_PREFIX, Requirements, TAGS_MAX};
use kiln_core::job::{RunAttend, RunCommand, RunKeep, RunSource, Source, SourceBuild};
use kiln_core::secret::JOB_SECRETS_MAX;
use kiln_core::{
    AllowRule, ByteSize, Digest, Dispatch, ImageRef, JobId, JobKind, JobRequest, Label, Priority,
    QueueName, RunSecret, TenantName,
};
use kiln_db::{Idempotency, NewJob};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::caller::Caller;
use super::limits::{ApiConfig, KeptBounds};
use super::policy::{PolicyAsk, Rule};
use super::problem::Problem;
use super::trust::{Ready, may_learn, settle, trust_of};
use crate::webhooks::Destination;

/// Longest `Idempotency-Key`.
const KEY_MAX: usize = 128;
/// Most build arguments, environment variables or arguments of a command.
const ENTRIES_MAX: usize = 1000;
/// Longest single text of a request.
const TEXT_MAX: usize = 128 * 1024;
/// Longest URL.
const URL_MAX: usize = 2048;
/// Most destinations of one job.
const RULES_MAX: usize = 256;

/// What every submission may say.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Common {
    /// For which tenant: the token's own unless it is an operator's.
    pub tenant: Option<String>,
    /// Queue to wait in.
    pub queue: Option<String>,
    /// Order there, -100 to 100; at most what the token allows.
    #[schema(minimum = -100, maximum = 100)]
    pub priority: Option<i16>,
    /// At most one job of this group of the tenant runs at a time.
    pub concurrency_group: Option<String>,
    /// CPU architecture (`amd64`, `arm64`).
    pub arch: Option<String>,
    /// Language runtime the host must have (`node`, `python`).
    pub runtime: Option<String>,
    /// Labels the worker must have.
    pub require: BTreeMap<String, String>,
    /// Whole CPUs of the host.
    pub pinned_cpus: bool,
    /// Words for lists and filters.
    pub tags: Vec<String>,
    /// Labels for lists and filters.
    pub labels: BTreeMap<String, String>,
    /// Virtual CPUs.
    #[schema(minimum = 1)]
    pub cpus: Option<u32>,
    /// Memory: `512M`, `2G`.
    pub memory: Option<String>,
    /// Disk: `10G`.
    pub disk: Option<String>,
    /// Wall time in seconds.
    #[schema(minimum = 1)]
    pub timeout_seconds: Option<u64>,
    /// Most bits per second to and from the network, each way.
    #[schema(minimum = 1)]
    pub network_rate: Option<u64>,
    /// Destinations `host[:ports]`; none means no network.
    pub allow: Vec<String>,
    /// `trusted` or `untrusted`; at most what the token, and the operator for its source, allow.
    pub trust: Option<String>,
    /// Most attempts, the first included.
    #[schema(minimum = 1)]
    pub attempts_max: Option<u32>,
    /// Where webhooks about this job go.
    pub notify_url: Option<String>,
    /// From the header `traceparent`, never from the body.
    #[serde(skip)]
    pub traceparent: Option<String>,
}

/// A build from source. With an uploaded tree, or a git URL.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BuildAsk {
    /// Short name; the image's name when no image is named.
    pub name: Option<String>,
    /// Git repository instead of an upload.
    pub git_url: Option<String>,
    /// Branch, tag or commit of it.
    pub git_ref: Option<String>,
    /// Path of the Dockerfile in the source.
    pub dockerfile: Option<String>,
    /// The Dockerfile itself, instead of one in the source.
    pub dockerfile_text: Option<String>,
    /// Stage to build.
    pub target: Option<String>,
    /// Build arguments.
    pub build_args: BTreeMap<String, String>,
    /// Names of secrets: of the tenant's store, unless their values come with the request.
    pub secrets: Vec<String>,
    /// Names of the image, within the tenant.
    pub images: Vec<String>,
    /// Neither use nor feed the cache.
    pub no_cache: bool,
    /// The project's policy file: of it, its phase `dependencies`, `resources` and `limits` hold for a build.
    pub policy: Option<PolicyAsk>,
    /// Leave out the policy file in the commit of `git_url`. Without this, and without a `policy`, the file there holds.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_policy: bool,
    /// What every submission may say.
    #[serde(flatten)]
    pub common: Common,
}

/// That a machine stays when its command is over.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KeepAsk {
    /// For how long, from the command's end; none: the operator's usual time.
    #[schema(minimum = 1)]
    pub seconds: Option<u64>,
    /// Only when the command failed.
    pub on_failure_only: bool,
}

impl KeepAsk {
    /// As it is queued.
    pub(crate) fn keep(&self, bounds: KeptBounds) -> Result<RunKeep, Problem> {
        let asked = self.seconds.map(|seconds| seconds.saturating_mul(1000));
        let most = bounds.stays_max_ms;
        if asked.is_some_and(|asked| asked == 0 || asked > most) {
            let text = format!("a machine stays for 1 to {} seconds", most / 1000);
            return Err(Problem::invalid("keep", text)
                .hint("the operator's most is controller.keep.max of the server's kiln.toml"));
        }
        Ok(RunKeep {
            stays_ms: asked.unwrap_or(bounds.stays_default_ms.min(most)),
            on_failure_only: self.on_failure_only,
        })
    }
}

/// That whoever submits a command holds its streams while it runs: see `/v1/jobs/{id}/ways/{verb}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AttendAsk {
    /// Give it a terminal.
    pub tty: bool,
    /// Connect its standard input.
    pub stdin: bool,
    /// Ports of the machine that may be connected to. At most 16.
    #[schema(max_items = 16)]
    pub ports: Vec<u16>,
}

impl AttendAsk {
    fn attend(&self) -> Result<RunAttend, Problem> {
        if self.ports.len() > RunAttend::PORTS_MAX || self.ports.contains(&0) {
            let most = RunAttend::PORTS_MAX;
            let text = format!("at most {most} ports, from 1 to 65535");
            return Err(Problem::invalid("attend", text));
        }
        Ok(RunAttend {
            ports: self.ports.clone(),
        })
    }
}

/// A command in a fresh machine. With an uploaded tree it begins there.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunAsk {
    /// Container image; none means what the policy says, else the base that fits the uploaded tree's runtime, else the machine image itself.
    pub image: Option<String>,
    /// Folder of the uploaded tree in which the command begins; none means the topmost.
    pub folder: Option<String>,
    /// Command line.
    pub argv: Vec<String>,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Files and folders of the machine that are kept as artifacts when the command has ended, however it did, or patterns of them (`*` and
    /// `?` within a part, `**` for any number of parts); relative to its working directory. At most 64.
    #[schema(max_items = 64)]
    pub artifacts: Vec<String>,
    /// Secrets of the tenant's store: `NAME` or `NAME=VARIABLE` for a variable of its environment, `NAME:file` for the file
    /// `/run/secrets/NAME`.
    pub secrets: Vec<String>,
    /// Repositories `host[:port]/path` that its git may clone and fetch, with the operator's credential where there is one: without a policy
    /// what it reads, beside one what it may read with a credential. At most 64.
    #[schema(max_items = 64)]
    pub git: Vec<String>,
    /// The project's policy file: what it says holds, and the rest of the request only takes away.
    pub policy: Option<PolicyAsk>,
    /// `isolated`, `egress`, `open` or `learn`; without it what `allow` or the policy says. `open` and `learn` need the operator's grant, and
    /// `learn` no secrets: what it reached is in the job's report.
    pub net: Option<String>,
    /// Its machine stays on its worker when it is over: see `/v1/machines`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<KeepAsk>,
    /// It does not begin before whoever submits it holds its streams, and ends with that connection. Given to workers that can do that alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attend: Option<AttendAsk>,
    /// What every submission may say.
    #[serde(flatten)]
    pub common: Common,
}

fn label(field: &str, text: &str) -> Result<Label, Problem> {
    text.parse()
        .map_err(|error: kiln_core::dispatch::ParseLabelError| {
            Problem::invalid(field, error.to_string())
        })
}

/// Reads labels of a request.
pub(crate) fn labels(
    field: &str,
    map: &BTreeMap<String, String>,
) -> Result<BTreeMap<Label, Label>, Problem> {
    if map.keys().any(|name| name.starts_with(RESERVED_PREFIX)) {
        return Err(Problem::invalid(
            field,
            format!("labels that begin with {RESERVED_PREFIX} are kiln's own"),
        ));
    }
    if map.len() > LABELS_MAX {
        return Err(Problem::invalid(
            field,
            format!("at most {LABELS_MAX} labels"),
        ));
    }
    map.iter()
        .map(|(name, value)| Ok((label(field, name)?, label(field, value)?)))
        .collect()
}

/// Reads a field of a request.
pub(crate) fn parsed<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, Problem>
where
    T::Err: std::fmt::Display,
{
    text.parse()
        .map_err(|error: T::Err| Problem::invalid(field, error.to_string()))
}

fn bounded(field: &str, text: &str) -> Result<(), Problem> {
    if text.len() > TEXT_MAX || text.contains('\0') {
        return Err(Problem::invalid(field, "it is too long, or holds a NUL"));
    }
    Ok(())
}

fn entries(field: &str, map: &BTreeMap<String, String>) -> Result<(), Problem> {
    if map.len() > ENTRIES_MAX {
        return Err(Problem::invalid(
            field,
            format!("at most {ENTRIES_MAX} entries"),
        ));
    }
    for (name, value) in map {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        if name.is_empty() || name.len() > 200 || !name.bytes().all(legal) {
            return Err(Problem::invalid(field, "names are letters, digits and _"));
        }
        bounded(field, value)?;
    }
    Ok(())
}

/// A path inside the source: relative, without `..`, printable.
fn inner_path(field: &str, text: &str) -> Result<(), Problem> {
    let bad = text.is_empty()
        || text.len() > 1024
        || text.starts_with('/')
        || text.contains('\\')
        || text.chars().any(char::is_control)
        || text.split('/').any(|part| part == "..");
    if bad {
        return Err(Problem::invalid(
            field,
            "it must be a path inside the source",
        ));
    }
    Ok(())
}

fn url(field: &str, text: &str, schemes: &[&str]) -> Result<(), Problem> {
    let wrong = || {
        Problem::invalid(
            field,
            format!("it must be an address: {}", schemes.join(" or ")),
        )
    };
    if text.len() > URL_MAX || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(wrong());
    }
    let uri: http::Uri = text.parse().map_err(|_| wrong())?;
    let known = uri
        .scheme_str()
        .is_some_and(|scheme| schemes.contains(&scheme));
    let host = uri.host().is_some_and(|host| !host.is_empty());
    let account = uri.authority().is_some_and(|a| a.as_str().contains('@'));
    if !known || !host {
        return Err(wrong());
    }
    if account {
        return Err(
            Problem::invalid(field, "it must hold no user name or password")
                .hint("give credentials as secrets"),
        );
    }
    Ok(())
}

impl Common {
    /// A size that was asked for.
    pub(crate) fn size(
        &self,
        field: &str,
        text: Option<&String>,
    ) -> Result<Option<ByteSize>, Problem> {
        text.map(|text| parsed::<ByteSize>(field, text)).transpose()
    }

    /// The time that was asked for.
    pub(crate) fn timeout_ms(&self) -> Option<u64> {
        self.timeout_seconds.map(|s| s.saturating_mul(1000))
    }

    /// The destinations that were named.
    pub(crate) fn rules(&self) -> Result<Vec<AllowRule>, Problem> {
        if self.allow.len() > RULES_MAX {
            return Err(Problem::invalid(
                "allow",
                format!("at most {RULES_MAX} destinations"),
            ));
        }
        self.allow
            .iter()
            .map(|rule| parsed("allow", rule))
            .collect()
    }

    fn asked(&self, rule: &Rule) -> Result<Asked, Problem> {
        Ok(Asked {
            cpus: rule.resources.cpus,
            memory: rule.resources.memory,
            disk: rule.disk,
            timeout_ms: rule.resources.timeout_ms,
            network_bits: self.network_rate,
            network: rule.network.clone(),
            phases: rule.phases.clone(),
            priority: Priority::try_from(self.priority.unwrap_or(0))
                .map_err(|error| Problem::invalid("priority", error.to_string()))?,
        })
    }

    fn dispatch(&self, priority: Priority) -> Result<Dispatch, Problem> {
        if self.tags.len() > TAGS_MAX {
            return Err(Problem::invalid("tags", format!("at most {TAGS_MAX} tags")));
        }
        let opt = |field: &str, text: &Option<String>| {
            text.as_deref().map(|text| label(field, text)).transpose()
        };
        let attempts_max = self.attempts_max.unwrap_or(Dispatch::ATTEMPTS_MAX);
        if attempts_max == 0 || attempts_max > Dispatch::ATTEMPTS_MAX {
            return Err(Problem::invalid(
                "attempts_max",
                format!("it must be 1 to {}", Dispatch::ATTEMPTS_MAX),
            ));
        }
        Ok(Dispatch {
            queue: match &self.queue {
                Some(queue) => parsed("queue", queue)?,
                None => QueueName::default_queue(),
            },
            priority,
            requires: Requirements {
                arch: opt("arch", &self.arch)?,
                runtime: opt("runtime", &self.runtime)?,
                labels: labels("require", &self.require)?,
                pinned_cpus: self.pinned_cpus,
                generation: 0,
            },
            concurrency_group: opt("concurrency_group", &self.concurrency_group)?,
            tags: self
                .tags
                .iter()
                .map(|tag| label("tags", tag))
                .collect::<Result<BTreeSet<_>, _>>()?,
            attempts_max,
        })
    }

    /// The tenant that was named.
    pub(crate) fn tenant(&self) -> Result<Option<TenantName>, Problem> {
        self.tenant
            .as_deref()
            .map(|name| parsed("tenant", name))
            .transpose()
    }
}

impl BuildAsk {
    /// The work, of a source that was uploaded or of the git URL. Values of the `given` secrets came with the request; the others are of the store.
    pub(crate) fn kind(
        &self,
        uploaded: Option<(Digest, u64)>,
        given: &[&str],
    ) -> Result<JobKind, Problem> {
        let source = match (uploaded, &self.git_url) {
            (Some((digest, size)), None) => Source::Tree { digest, size },
            (None, Some(address)) => {
                url("git_url", address, &["https", "http", "ssh", "git"])?;
                let reference = self.git_ref.clone().unwrap_or_else(|| "HEAD".to_owned());
                git_reference(&reference)?;
                Source::Git {
                    url: address.clone(),
                    reference,
                }
            }
            (Some(_), Some(_)) => {
                return Err(Problem::invalid(
                    "git_url",
                    "there is an uploaded source already",
                ));
            }
            (None, None) => {
                return Err(Problem::invalid("source", "there is no source")
                    .hint("upload a tar archive as the part `source`, or name a `git_url`"));
            }
        };
        let name = self.name.clone().unwrap_or_else(|| "app".to_owned());
        if !kiln_core::image_ref::is_repository(&name) || name.len() > 100 {
            return Err(Problem::invalid(
                "name",
                "it must be a name an image can have",
            ));
        }
        if let Some(path) = &self.dockerfile {
            inner_path("dockerfile", path)?;
        }
        if let Some(text) = &self.dockerfile_text {
            bounded("dockerfile_text", text)?;
            if self.dockerfile.is_some() {
                return Err(Problem::invalid(
                    "dockerfile_text",
                    "there is a `dockerfile` already",
                ));
            }
        }
        if let Some(target) = &self.target {
            label("target", target)?;
        }
        entries("build_args", &self.build_args)?;
        if self.secrets.len() > JOB_SECRETS_MAX || self.images.len() > TAGS_MAX {
            return Err(Problem::invalid("secrets", "too many secrets or images"));
        }
        for secret in &self.secrets {
            label("secrets", secret)?;
        }
        Ok(JobKind::SourceBuild(SourceBuild {
            source,
            name,
            dockerfile: self.dockerfile.clone(),
            dockerfile_text: self.dockerfile_text.clone(),
            target: self.target.clone(),
            build_args: self.build_args.clone(),
            secrets: self.secrets.clone(),
            stored_secrets: self
                .secrets
                .iter()
                .filter(|name| !given.contains(&name.as_str()))
                .map(|name| parsed("secrets", name))
                .collect::<Result<_, _>>()?,
            tags: self
                .images
                .iter()
                .map(|image| image_name(image))
                .collect::<Result<_, _>>()?,
            no_cache: self.no_cache,
            only_network: false,
            repository_policy: self.git_url.is_some() && self.policy.is_none() && !self.no_policy,
            policy_ref: None,
        }))
    }
}

/// A name within the tenant: no registry, no digest.
fn image_name(text: &str) -> Result<ImageRef, Problem> {
    let image: ImageRef = parsed("images", text)?;
    if image.registry.is_some() || image.digest.is_some() {
        return Err(Problem::invalid(
            "images",
            "name images within the tenant: `app` or `app:v1`",
        ));
    }
    Ok(image)
}

/// What git takes as a reference and cannot take as an option.
fn git_reference(text: &str) -> Result<(), Problem> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
    let bad = text.is_empty()
        || text.len() > 250
        || text.starts_with(['-', '/', '.'])
        || text.contains("..")
        || !text.bytes().all(legal);
    if bad {
        return Err(Problem::invalid(
            "git_ref",
            "it is not a branch, tag or commit",
        ));
    }
    Ok(())
}

impl RunAsk {
    /// The work.
    pub(crate) fn kind(
        &self,
        uploaded: Option<(Digest, u64)>,
        bounds: KeptBounds,
    ) -> Result<JobKind, Problem> {
        let keep = self.keep.as_ref().map(|keep| keep.keep(bounds));
        let keep = keep.transpose()?;
        let attend = self.attend.as_ref();
        if let Some(folder) = &self.folder {
            inner_path("folder", folder)?;
            if uploaded.is_none() {
                return Err(Problem::invalid("folder", "there is no source"));
            }
        }
        let source = uploaded.map(|(digest, size)| RunSource {
            source: Source::Tree { digest, size },
            folder: self.folder.clone().unwrap_or_default(),
        });
        let image: Option<ImageRef> = self
            .image
            .as_deref()
            .map(|image| parsed("image", image))
            .transpose()?;
        if self.argv.len() > ENTRIES_MAX {
            return Err(Problem::invalid(
                "argv",
                format!("at most {ENTRIES_MAX} arguments"),
            ));
        }
        for word in &self.argv {
            bounded("argv", word)?;
        }
        entries("env", &self.env)?;
        if self.artifacts.len() > ARTIFACT_PATHS_MAX {
            let text = format!("at most {ARTIFACT_PATHS_MAX} paths");
            return Err(Problem::invalid("artifacts", text));
        }
        let artifacts = self.artifacts.iter().map(|path| parsed("artifacts", path));
        Ok(JobKind::Run(Box::new(RunCommand {
            secrets: self.run_secrets()?,
            artifacts: artifacts.collect::<Result<_, _>>()?,
            image,
            argv: self.argv.clone(),
            env: self.env.clone(),
            ports: Vec::new(),
            tty: attend.is_some_and(|attend| attend.tty),
            stdin: attend.is_some_and(|attend| attend.stdin || attend.tty),
            source,
            disk: self.common.disk.is_some(),
            keep,
            attend: attend.map(AttendAsk::attend).transpose()?,
            ..RunCommand::default()
        })))
    }
}

impl RunAsk {
    fn run_secrets(&self) -> Result<Vec<RunSecret>, Problem> {
        if self.secrets.len() > JOB_SECRETS_MAX {
            let text = format!("at most {JOB_SECRETS_MAX} secrets");
            return Err(Problem::invalid("secrets", text));
        }
        let secrets = self.secrets.iter().map(|word| parsed("secrets", word));
        secrets.collect()
    }

    /// Each secret of a phase has a place of its own.
    pub(crate) fn places(&self, secrets: &[RunSecret]) -> Result<(), Problem> {
        kiln_core::secret::check_places(secrets, |variable| self.env.contains_key(variable))
            .map_err(|twice| Problem::invalid("secrets", twice.to_string()))
    }
}

/// A request as it is queued: limits narrowed, trust and priority bounded by the token, trust by what the operator says of its source as well.
pub(crate) fn new_job(
    config: &ApiConfig,
    caller: &Caller,
    tenant: &TenantName,
    (mut kind, rule): (JobKind, Rule),
    common: &Common,
    key: Option<String>,
    id: JobId,
) -> Result<Ready, Problem> {
    let mut granted: Granted = config
        .ceiling
        .narrow(
            &common.asked(&rule)?,
            &config.defaults(&kind),
            caller.principal.priority_max,
        )
        .map_err(|outside| {
            let field = if outside.field == "timeout" {
                "timeout_seconds"
            } else {
                outside.field
            };
            let hint = match outside.field {
                "priority" => "the most is the token's: `kiln token create --priority-max N`",
                _ => {
                    "the operator's bounds are [limits] and [controller] of the server's kiln.toml"
                }
            };
            Problem::invalid(field, outside.bounds()).hint(hint)
        })?;
    let trust = trust_of(caller, common.trust.as_deref(), rule.source)?;
    let (trust, untrusted) = settle(&mut kind, trust, rule.policy_ref);
    if let Some(address) = &common.notify_url {
        let usable = Destination::accept(address, &config.receivers);
        usable.map_err(|why| Problem::invalid("notify_url", why.to_string()))?;
    }
    kiln_policy::below(&mut granted.limits, &rule.max);
    let mut request = JobRequest {
        id,
        tenant: tenant.clone(),
        kind,
        network: granted.network,
        limits: granted.limits,
        trust,
        network_bits: Some(granted.network_bits),
        dispatch: common.dispatch(granted.priority)?,
        traceparent: common.traceparent.clone(),
        policy: rule.applied,
    };
    may_learn(&request, untrusted.as_ref())?;
    request.needs_its_generation();
    let labels = labels("labels", &common.labels)?;
    let mut body = serde_json::to_vec(&(
        &request.kind,
        &request.network,
        &request.limits,
        request.network_bits,
        request.trust,
        &request.dispatch,
        &labels,
        &common.notify_url,
    ))
    .map_err(|_| Problem::bad_request("the request cannot be kept"))?;
    if let Some(policy) = &request.policy {
        // Beside the rest, so that a request without one has the digest that it had before there were any.
        body.extend(serde_json::to_vec(policy).unwrap_or_default());
    }
    let new = NewJob {
        idempotency: key.map(|key| Idempotency {
            key,
            body: Digest::of(&body),
        }),
        submitted_by: caller.subject().to_owned(),
        notify_url: common.notify_url.clone(),
        labels,
        request,
    };
    Ok(Ready { new, untrusted })
}

/// The `Idempotency-Key`, if one came.
pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut keys = headers.get_all("idempotency-key").iter();
    let Some(key) = keys.next() else {
        return Ok(None);
    };
    let text = key.to_str().unwrap_or_default();
    let legal = text.bytes().all(|b| b.is_ascii_graphic());
    if keys.next().is_some() || text.is_empty() || text.len() > KEY_MAX || !legal {
        return Err(Problem::invalid(
            "Idempotency-Key",
            format!("it is one header of 1 to {KEY_MAX} printable characters"),
        ));
    }
    Ok(Some(text.to_owned()))
}
