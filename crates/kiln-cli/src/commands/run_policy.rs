//! What a run gets: the folder's policy, the operator's grant and the command line, each of which only takes away. `kiln-policy` decides; here
//! are the files of this host, and its words.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kiln_controller::api::PolicyAsk;
use kiln_core::job::{AppliedPolicy, RunPhase, RunService};
use kiln_core::{
    ArtifactPath, ByteSize, GitAccess, ImageRef, NetworkPolicy, RunSecret, TenantName,
};
use kiln_image::bases::Bases;
use kiln_policy::policy::Resources;
use kiln_policy::{Asked, Compiled, Held, Image, Maxima, Mode, Refusal, hold_run, other_image};

use super::operator::Operator;
use super::policy::tell_removed;
use super::run_bounds::{self, Bounds};
use super::run_folder::Project;
use crate::args::{LimitArgs, NetArg, RunArgs};
use crate::error::{CliError, Result};
use crate::policy_file::{self, Found};
use crate::show::{Screen, printable};

/// What the request is made of.
#[derive(Debug)]
pub(super) struct Ruled {
    /// Top of the project that a policy found here belongs to.
    pub(super) top: Option<PathBuf>,
    /// The policy says that nothing of the folder is copied in.
    pub(super) no_source: bool,
    /// The policy's name, if there is one.
    pub(super) file: Option<String>,
    pub(super) image: Option<ImageRef>,
    pub(super) argv: Vec<String>,
    pub(super) network: NetworkPolicy,
    /// As if the command line had said it.
    pub(super) limits: LimitArgs,
    /// The operator's maxima, for what a default decides.
    pub(super) max: Maxima,
    pub(super) artifacts: Vec<ArtifactPath>,
    /// What comes before the command.
    pub(super) phases: Vec<RunPhase>,
    pub(super) services: Vec<RunService>,
    /// Repositories that the command itself reads.
    pub(super) git: Vec<GitAccess>,
    /// Secrets of the command itself.
    pub(super) secrets: Vec<RunSecret>,
    /// Most disk, of the policy or the operator.
    pub(super) disk: Option<ByteSize>,
    /// The policy itself says it.
    pub(super) disk_said: bool,
    pub(super) applied: Option<AppliedPolicy>,
    /// Which of its bounds are the policy's own.
    pub(super) bounds: Bounds,
}

impl Ruled {
    /// The policy that says how much disk there is, where it is not the operator alone.
    pub(super) fn says_disk(&self) -> Option<&str> {
        self.file.as_deref().filter(|_| self.disk_said)
    }

    /// What it says of the folder that is copied in.
    pub(super) fn project(&self) -> Project<'_> {
        Project {
            top: self.top.as_deref(),
            without: self.file.as_deref().filter(|_| self.no_source),
        }
    }
}

/// The policy that a run is held to, if there is one.
///
/// # Errors
/// When it cannot be used.
pub(super) fn found(args: &RunArgs) -> Result<Option<Found>> {
    policy_file::timed(|| match (&args.policy, args.no_policy) {
        (Some(file), _) => policy_file::read(file).map(Some),
        (None, true) => Ok(None),
        (None, false) => policy_file::of_here(),
    })
}

/// What holds of a run on this host.
///
/// # Errors
/// Policy when something asked for is not granted, or cannot be enforced yet; usage when the command line asks for more than the policy.
pub(super) fn rule(args: &RunArgs, operator: &Operator, screen: Screen) -> Result<Ruled> {
    let found = found(args)?;
    let since = Instant::now();
    let grants = policy_file::grants(&operator.home.config)?;
    let compiled = found.as_ref().map(|found| &found.compiled);
    let held = hold_run(compiled, &grants, &TenantName::local(), &asked(args));
    let mut held = held.map_err(refused)?;
    if let Some(applied) = &mut held.applied {
        let found = found.as_ref().map(|found| found.took);
        applied.took(found.unwrap_or_default() + since.elapsed());
    }
    if let Some(found) = &found {
        for note in &found.notes {
            screen.note(note);
        }
        tell_removed(found.compiled.file(), &held.removed, screen);
        run_bounds::given(&found.compiled, &args.limits, &operator.config)?;
        // A flag says how much of it is wanted, and is judged as such.
        let less = run_bounds::less_disk(&found.compiled, &operator.config);
        if let Some(less) = less.filter(|_| args.queueing.disk.is_none()) {
            screen.note(&less);
        }
        screen.note(&summary(found.compiled.file(), &held));
    }
    Ok(Ruled {
        bounds: Bounds::of(compiled, &args.limits),
        top: top(args, found.as_ref()),
        no_source: held.no_source,
        file: compiled.map(|compiled| compiled.file().to_owned()),
        image: image(args, compiled, held.image.as_ref(), || operator.bases())?,
        argv: held.argv,
        network: held.network,
        limits: LimitArgs {
            cpus: held.resources.cpus,
            memory: held.resources.memory,
            timeout: held.resources.timeout_ms.map(Duration::from_millis),
        },
        max: held.max,
        artifacts: held.artifacts,
        phases: held.phases,
        services: held.services,
        git: held.git,
        secrets: held.secrets,
        disk: held.disk,
        disk_said: held.disk_said,
        applied: held.applied,
    })
}

/// Top of the project that a policy found here belongs to.
pub(super) fn top(args: &RunArgs, found: Option<&Found>) -> Option<PathBuf> {
    found.filter(|_| args.policy.is_none()).and_then(Found::top)
}

/// What the command line says.
fn asked(args: &RunArgs) -> Asked<'_> {
    let timeout = args.limits.timeout;
    Asked {
        mode: args.net.map(mode),
        allow: &args.allow,
        git: &args.git,
        resources: Resources {
            cpus: args.limits.cpus,
            memory: args.limits.memory,
            timeout_ms: timeout
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        },
        image: args.image.as_ref(),
        secrets: &args.secrets,
        command: &args.command,
        connections_most: kiln_proto::msg::CONNECTIONS_MOST,
    }
}

fn mode(net: NetArg) -> Mode {
    match net {
        NetArg::Isolated => Mode::Isolated,
        NetArg::Egress => Mode::Egress,
        NetArg::Open => Mode::Open,
        NetArg::Learn => Mode::Learn,
    }
}

/// The word for it in a request.
pub(super) fn mode_word(net: NetArg) -> &'static str {
    match net {
        NetArg::Isolated => "isolated",
        NetArg::Egress => "egress",
        NetArg::Open => "open",
        NetArg::Learn => "learn",
    }
}

/// A file as a request has it. It is compiled here as well, so that most mistakes are told at once; the server decides.
pub(super) fn sent(found: &Found) -> PolicyAsk {
    PolicyAsk {
        file: found.compiled.file().to_owned(),
        text: found.text.clone(),
    }
}

/// In the words of the command line.
pub(super) fn refused(refusal: Refusal) -> CliError {
    let flag = match (refusal.field, &refusal.said) {
        (_, None) => String::new(),
        (field, Some(said)) => format!("--{field} {said}: "),
    };
    let message: Vec<String> = refusal.message.lines().map(printable).collect();
    let error = CliError::new(refusal.class, format!("{flag}{}", message.join("\n")));
    refusal
        .hints
        .into_iter()
        .fold(error, |error, hint| error.hint(hint))
}

/// The image of the policy. Another one on the command line is another job, not a narrower one.
fn image(
    args: &RunArgs,
    compiled: Option<&Compiled>,
    image: Option<&Image>,
    bases: impl FnOnce() -> Result<Bases>,
) -> Result<Option<ImageRef>> {
    let file = compiled.map(Compiled::file).unwrap_or_default();
    let of_policy = match image {
        None => return Ok(args.image.clone()),
        Some(Image::Pinned(image)) => image.clone(),
        Some(Image::Runtime(name)) => bases()?
            .named(name)
            .map_err(|none| CliError::usage(format!("{file}: {none}")).hint(none.hint()))?,
    };
    match &args.image {
        Some(other) if *other != of_policy => {
            Err(refused(other_image(other, &of_policy.to_string(), file)))
        }
        _ => Ok(Some(of_policy)),
    }
}

/// What a run reaches, in each of its phases where there are several.
fn summary(file: &str, held: &Held) -> String {
    let mut parts: Vec<String> = held
        .phases
        .iter()
        .map(|phase| {
            format!(
                "{} {}",
                phase.name.as_str(),
                reaches(&phase.network, &phase.git)
            )
        })
        .collect();
    let own = reaches(&held.network, &held.git);
    parts.push(match parts.is_empty() {
        true => own,
        false => format!("run {own}"),
    });
    let hash = held.applied.as_ref().map(|applied| applied.hash);
    let hash = hash.map(|hash| format!(" ({hash})")).unwrap_or_default();
    format!("policy: {file}, {}{hash}", parts.join(", "))
}

fn reaches(network: &NetworkPolicy, git: &[GitAccess]) -> String {
    let repositories = match git.len() {
        0 => None,
        1 => Some("1 repository".to_owned()),
        count => Some(format!("{count} repositories")),
    };
    let plain = match network {
        NetworkPolicy::Isolated => "nothing".to_owned(),
        NetworkPolicy::Open => "every name".to_owned(),
        NetworkPolicy::Egress { allow } if allow.is_empty() => "nothing".to_owned(),
        NetworkPolicy::Egress { allow } if allow.len() == 1 => "1 destination".to_owned(),
        NetworkPolicy::Egress { allow } => format!("{} destinations", allow.len()),
    };
    match repositories {
        None => format!("reaches {plain}"),
        Some(repositories) if plain == "nothing" => format!("reaches {repositories}"),
        Some(repositories) => format!("reaches {plain} and {repositories}"),
    }
}

#[cfg(test)]
mod tests {
    use kiln_core::FailureClass;

    use super::*;

    #[test]
    fn every_phase_that_reaches_something_is_told() {
        let told = |text: &str| {
            let compiled = kiln_policy::compile(kiln_policy::Format::Kiln, "kiln.yaml", text);
            let compiled = compiled.expect("legal");
            let words = ["true".to_owned()];
            let asked = Asked {
                mode: None,
                allow: &[],
                git: &[],
                resources: Resources::default(),
                image: None,
                secrets: &[],
                command: &words,
                connections_most: kiln_proto::msg::CONNECTIONS_MOST,
            };
            let grants = kiln_policy::Grants::default();
            let held = hold_run(Some(&compiled), &grants, &TenantName::local(), &asked);
            let text = summary("kiln.yaml", &held.expect("granted"));
            text.split(" (").next().unwrap_or_default().to_owned()
        };
        assert_eq!(told("version: 1\n"), "policy: kiln.yaml, reaches nothing");
        assert_eq!(
            told(
                "version: 1\nphases:\n  dependencies: {network: {allow: [a.example.org:443]}, commands: [npm ci]}\n"
            ),
            "policy: kiln.yaml, dependencies reaches 1 destination, run reaches nothing"
        );
    }

    #[test]
    fn a_refusal_names_the_flag() {
        let refusal = |said: Option<&str>| Refusal {
            class: FailureClass::Usage,
            field: "allow",
            said: said.map(str::to_owned),
            message: "no".to_owned(),
            hints: vec!["do".to_owned()],
        };
        let told = refused(refusal(Some("a.example.org")));
        assert_eq!(told.message, "--allow a.example.org: no");
        assert_eq!(told.hints, ["do"]);
        assert_eq!(refused(refusal(None)).message, "no");
    }
}
