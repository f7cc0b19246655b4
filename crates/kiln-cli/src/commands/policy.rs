//! `kiln policy`: reads a policy and says what it means. Starts nothing.

use kiln_core::secret::{ParseSecretError, Repository};
use kiln_core::{FailureClass, TenantName};
use kiln_image::bases::NoBase;
use kiln_policy::{
    Compiled, Effective, Explanation, Format, Image, Phase, PhaseNetwork, Policy, Removed, explain,
    explain_git, json_schema,
};
use kiln_worker::home::Home;
use serde::Serialize;
use serde_json::{Value, json};

use super::operator::Operator;
use super::{run_bounds, run_policy};
use crate::args::{LimitArgs, PhaseArg, PolicyCommand, ServerArgs};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::policy_file::{self, Found};
use crate::show::{Screen, printable};

pub(super) fn run(verb: PolicyCommand, server: &ServerArgs, screen: Screen) -> Result<u8> {
    match verb {
        PolicyCommand::Check { at } => {
            let read = policy_file::holding(&at)?;
            let (found, holds) = both(&read, screen)?;
            // What nobody could run is no policy to be content with.
            kiln_policy::runnable(&read.compiled, &holds, kiln_proto::msg::CONNECTIONS_MOST)
                .map_err(run_policy::refused)?;
            // A server's machines are not this host's.
            if crate::server::named(server)?.is_none() {
                fits_here(&read.compiled, &holds, screen)?;
            }
            let hash = holds.file_hash;
            let answer = json!({ "file": found, "hash": hash.to_string(), "ok": true, "removed": holds.removed });
            screen.data(&beside(answer, server, screen)?, || {
                format!(
                    "{} is a policy\n{}\n{hash}",
                    printable(&found),
                    summary(&holds.policy)
                )
            });
        }
        PolicyCommand::Show { at } => {
            let (file, holds) = both(&policy_file::holding(&at)?, screen)?;
            let policy = holds.policy.as_file();
            let shown = json!({
                "file": file, "file_hash": holds.file_hash.to_string(), "hash": holds.hash.to_string(),
                "removed": holds.removed, "policy": policy,
            });
            screen.data(&beside(shown, server, screen)?, || {
                let text = serde_json::to_string_pretty(&policy).unwrap_or_default();
                format!(
                    "# what holds of {}: {}\n{text}",
                    printable(&file),
                    holds.hash
                )
            });
        }
        PolicyCommand::Explain {
            destination,
            phase,
            from,
        } => return explained(&destination, phase, &from, server, screen),
        PolicyCommand::Learn(_) => {
            return Err(CliError::usage("learning is another verb's business"));
        }
        PolicyCommand::Schema { cleanroom } => {
            let format = if cleanroom {
                Format::Cleanroom
            } else {
                Format::Kiln
            };
            let schema: Value = json_schema(format);
            screen.text(&serde_json::to_string_pretty(&schema).unwrap_or_default());
        }
    }
    Ok(0)
}

/// The file's name and what holds of it; what the grant takes away is told.
fn both(found: &Found, screen: Screen) -> Result<(String, Effective)> {
    let holds = policy_file::holds(&found.compiled, &grants()?)?;
    tell(found, &holds, screen);
    Ok((found.compiled.file().to_owned(), holds))
}

/// An answer, which the grants of this host decided: where a server's would decide of a job, that is told beside it.
fn beside(answer: impl Serialize, server: &ServerArgs, screen: Screen) -> Result<Value> {
    let mut answer = serde_json::to_value(answer).or_infrastructure()?;
    if let Some(name) = crate::server::named(server)? {
        screen.note(&format!(
            "the operator's part of this answer is this host's policy.toml: the server at {name} has its own, and decides of jobs sent there"
        ));
        if let Value::Object(fields) = &mut answer {
            fields.insert("server".to_owned(), Value::String(name));
        }
    }
    Ok(answer)
}

/// What a run here would refuse for this host's sake: more than its machines have, or a runtime that it has no base of.
fn fits_here(compiled: &Compiled, holds: &Effective, screen: Screen) -> Result<()> {
    let operator = Operator::load()?;
    let nothing = LimitArgs {
        cpus: None,
        memory: None,
        timeout: None,
    };
    run_bounds::given(compiled, &nothing, &operator.config)?;
    if let Some(less) = run_bounds::less_disk(compiled, &operator.config) {
        screen.note(&less);
    }
    let Some(Image::Runtime(name)) = &holds.policy.image else {
        return Ok(());
    };
    let (file, line) = (compiled.file(), compiled.line_of_amount("image"));
    match operator.bases()?.named(name) {
        Ok(_) => Ok(()),
        // Nothing is wrong with the file: this host is not set up.
        Err(none @ NoBase::Unmade(_)) => {
            screen.note(&format!("{file}:{line}: {none}: {}", none.hint()));
            Ok(())
        }
        Err(none) => {
            let message = printable(&format!("{file}:{line}: {none}"));
            Err(CliError::new(FailureClass::Policy, message).hint(none.hint()))
        }
    }
}

fn grants() -> Result<kiln_policy::Grants> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    policy_file::grants(&home.config)
}

/// What a person should know of a policy before it is used.
pub(super) fn tell(found: &Found, holds: &Effective, screen: Screen) {
    for note in &found.notes {
        screen.note(note);
    }
    tell_removed(found.compiled.file(), &holds.removed, screen);
}

/// What the operator's grant took away of a file.
pub(super) fn tell_removed(file: &str, removed: &[Removed], screen: Screen) {
    for gone in removed {
        let left = match gone.left.is_empty() {
            true => "nothing is left of it".to_owned(),
            false => format!("left of it: {}", gone.left.join(", ")),
        };
        screen.note(&format!(
            "{}:{}: {} is not granted ({}): {left}",
            file, gone.line, gone.rule, gone.by
        ));
    }
}

/// One line for each phase that has something to say.
fn summary(policy: &Policy) -> String {
    let image = policy.image.as_ref().map_or(
        "the base that fits the runtime of the folder, else the machine image itself".to_owned(),
        ToString::to_string,
    );
    let mut lines = vec![format!("runs in {image}")];
    for phase in Phase::ALL {
        let part = policy.phases.get(&phase);
        if part.is_none() && phase != Phase::Run {
            continue;
        }
        let network = match policy.network(phase) {
            PhaseNetwork::Egress(rules) => rules
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", "),
            PhaseNetwork::Isolated => "nothing".to_owned(),
            wide => format!("every name ({})", wide.mode()),
        };
        let git: Vec<&str> = policy.git(phase).iter().map(Repository::as_str).collect();
        let network = match (git.is_empty(), network.is_empty()) {
            (true, _) => network,
            (false, true) => format!("git {}", git.join(", git ")),
            (false, false) => format!("{network}, git {}", git.join(", git ")),
        };
        let commands = part.map_or(0, |part| part.commands.len());
        let commands = match commands {
            0 => String::new(),
            1 => "; 1 command".to_owned(),
            count => format!("; {count} commands"),
        };
        lines.push(format!("{phase} reaches {network}{commands}"));
    }
    lines.join("\n")
}

/// What a person asks about: a host, a repository, or a URL that can be either.
#[derive(Debug, PartialEq, Eq)]
struct Subject {
    host: Option<(String, u16)>,
    repository: Option<Repository>,
    /// With a scheme, as programs name what they fetch from a host.
    url: bool,
}

impl Subject {
    /// # Errors
    /// When it is neither.
    fn of(text: &str) -> Result<Self> {
        let url = text.split_once("://");
        let (port, rest) = match url {
            None => (443, text),
            Some(("https", rest)) => (443, rest),
            Some(("http", rest)) => (80, rest),
            Some(_) => {
                return Err(CliError::usage(format!("{text:?} is no http or https URL"))
                    .hint("ask for HOST[:PORT], or for a repository HOST/PATH"));
            }
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = host_port(authority, port);
        if url.is_none() && !text.contains('/') {
            return Ok(Self {
                host: Some(host?),
                repository: None,
                url: false,
            });
        }
        let repository: std::result::Result<Repository, ParseSecretError> = text.parse();
        if url.is_none() {
            let wrong = |error: ParseSecretError| CliError::usage(error.to_string());
            return Ok(Self {
                host: host.ok(),
                repository: Some(repository.map_err(wrong)?),
                url: false,
            });
        }
        Ok(Self {
            host: Some(host?),
            repository: repository.ok().filter(|_| port == 443),
            url: true,
        })
    }
}

fn host_port(text: &str, port: u16) -> Result<(String, u16)> {
    let Some((host, said)) = text.rsplit_once(':') else {
        return Ok((text.to_owned(), port));
    };
    let port = said.parse::<u16>().ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| {
        CliError::usage(format!("{text:?} is not HOST[:PORT]"))
            .hint("for example api.example.org:443")
    })?;
    Ok((host.to_owned(), port))
}

fn explained(
    destination: &str,
    phase: PhaseArg,
    from: &std::path::Path,
    server: &ServerArgs,
    screen: Screen,
) -> Result<u8> {
    let phase = match phase {
        PhaseArg::Checkout => Phase::Checkout,
        PhaseArg::Dependencies => Phase::Dependencies,
        PhaseArg::Services => Phase::Services,
        PhaseArg::Run => Phase::Run,
    };
    let subject = Subject::of(destination)?;
    let found = policy_file::holding(from)?;
    let (grants, tenant) = (grants()?, TenantName::local());
    let repository = subject.repository.as_ref().map(|repository| {
        let answer = explain_git(&found.compiled, &grants, &tenant, phase, repository);
        let told = git_text(&answer);
        (answer, told)
    });
    let host = subject.host.as_ref().map(|(host, port)| {
        let answer = explain(&found.compiled, &grants, &tenant, phase, (host, *port));
        let answer = answer.map_err(CliError::usage)?;
        let told = text(&answer);
        Ok((answer, told))
    });
    // A path alone names a repository. A URL names whichever may be reached.
    let (first, also) = match (repository, host) {
        (None, None) => return Err(CliError::usage("there is nothing to explain")),
        (None, Some(host)) => (host?, None),
        (Some(repository), None) => (repository, None),
        (Some(repository), Some(Err(error))) => match subject.url && !repository.0.allowed {
            true => return Err(error),
            false => (repository, None),
        },
        (Some(repository), Some(Ok(host))) => match subject.url && !repository.0.allowed {
            true => (host, Some(repository)),
            false => (repository, Some(host)),
        },
    };
    let mut answer = serde_json::to_value(&first.0).or_infrastructure()?;
    if let (Some((also, _)), Value::Object(fields)) = (&also, &mut answer) {
        let also = serde_json::to_value(also).or_infrastructure()?;
        fields.insert("also".to_owned(), also);
    }
    screen.data(&beside(answer, server, screen)?, || match &also {
        None => first.1.clone(),
        Some((_, also)) => format!("{}\n{also}", first.1),
    });
    Ok(if first.0.allowed { 0 } else { 4 })
}

fn text(answer: &Explanation) -> String {
    let verdict = if answer.allowed { "allowed" } else { "refused" };
    let speaks = answer
        .protocol
        .map(|protocol| format!(", speaking {}", protocol.name()))
        .unwrap_or_default();
    let head = format!(
        "{}:{} in the phase {}: {verdict}{speaks}",
        answer.host, answer.port, answer.phase
    );
    said(head, answer)
}

/// Of a repository.
fn git_text(answer: &Explanation) -> String {
    let verdict = if answer.allowed { "allowed" } else { "refused" };
    let head = format!(
        "git {} in the phase {}: {verdict}",
        answer.host, answer.phase
    );
    said(head, answer)
}

fn said(head: String, answer: &Explanation) -> String {
    let mut lines = vec![head];
    for say in &answer.said {
        let at = say
            .at
            .as_deref()
            .map(|at| format!(" ({at})"))
            .unwrap_or_default();
        lines.push(printable(&format!("  {}{at}: {}", say.by, say.says)));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_a_host_a_repository_or_a_url_of_either() {
        let of = |text: &str| {
            let subject = Subject::of(text).expect(text);
            let host = subject.host.map(|(host, port)| format!("{host}:{port}"));
            (
                host.unwrap_or_default(),
                subject.repository.map(|repository| repository.to_string()),
                subject.url,
            )
        };
        let here = |host: &str, repository: Option<&str>, url: bool| {
            (host.to_owned(), repository.map(str::to_owned), url)
        };
        assert_eq!(of("a.example.org"), here("a.example.org:443", None, false));
        assert_eq!(
            of("a.example.org:22"),
            here("a.example.org:22", None, false)
        );
        assert_eq!(
            of("a.example.org/x"),
            here("a.example.org:443", Some("a.example.org/x"), false)
        );
        assert_eq!(
            of("https://a.example.org/x"),
            here("a.example.org:443", Some("a.example.org/x"), true)
        );
        assert_eq!(
            of("https://a.example.org/"),
            here("a.example.org:443", None, true)
        );
        assert_eq!(
            of("http://a.example.org/x"),
            here("a.example.org:80", None, true)
        );
        for wrong in [
            "a.example.org:x",
            "ssh://a.example.org/x",
            "a.example.org:0",
        ] {
            assert!(Subject::of(wrong).is_err(), "{wrong}");
        }
    }
}
