//! Asks a program in a base image one question: which registry does this npm use by default? One RUN step on a fork of the shared
//! head, in a machine that reaches nothing; nothing of it is kept.

use std::sync::Arc;

use kiln_core::{ByteSize, FailureClass, ImageRef, NetworkPolicy};
use kiln_image::heads::SHARED;
use kiln_network::gateway::{Gateway, GatewayConfig};
use kiln_network::record::EgressLog;
use kiln_proto::Session;
use kiln_store::registry::Authority;

use crate::attempt::{Attempt, Wanted};
use crate::buildkit;
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::host::{Host, new_job_id};
use crate::registry::RegistryAccess;
use crate::templates::Purpose;

/// Longest answer that is kept, bytes.
pub const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Longest time an answer may take, once the machine is there, milliseconds.
const ANSWER_TIMEOUT_MS: u64 = 120_000;

/// Runs a command in a base image; gives what it printed. The answer is the base image's word: check it before use.
///
/// # Errors
/// When there is no shared head, no machine, or the command fails.
pub async fn ask_base(
    host: &Host,
    registry: &RegistryAccess,
    base: &ImageRef,
    argv: &[&str],
    size: (u32, ByteSize),
    events: &Events,
) -> Result<String, Failure> {
    let infrastructure = |error: &dyn std::error::Error| Failure::infrastructure(error);
    let head = host
        .heads
        .current(SHARED)
        .map_err(|error| infrastructure(&error))?
        .ok_or_else(|| {
            Failure::new(FailureClass::Usage, "there are no runtime bases yet")
                .hint("run `kiln setup` once")
        })?;
    let pin = host
        .heads
        .pin(&head)
        .map_err(|error| infrastructure(&error))?;
    let job = new_job_id('q')?;
    let (cpus, memory) = size;
    let ticket = host
        .admit(
            cpus,
            crate::templates::size_class(memory),
            job.as_str(),
            events,
        )
        .await?;
    let mut config = GatewayConfig::new(NetworkPolicy::Isolated, Arc::new(EgressLog::new()) as _);
    config.services = registry.services_as(Authority::Anonymous {
        pull: vec!["shared".to_owned()],
    });
    let name = format!("{job}-1-ask")
        .parse()
        .map_err(|error| infrastructure(&error))?;
    let wanted = Wanted {
        name,
        cpus,
        memory,
        purpose: Purpose::Build { head: &head },
        make_template: true,
        may_stay: false,
        disk_bytes_per_second: None,
    };
    let attempt = Attempt::start(host, wanted, ticket, Gateway::new(config), events).await?;
    let answer = match in_machine(&attempt, base, argv).await {
        Ok(answer) => Ok(answer),
        Err(failure) => Err(attempt.explain(failure).await),
    };
    attempt.destroy(events).await;
    drop(pin);
    answer
}

async fn in_machine(attempt: &Attempt, base: &ImageRef, argv: &[&str]) -> Result<String, Failure> {
    if !attempt.build_ready {
        buildkit::start(&attempt.session).await?;
    }
    run_step(&attempt.session, base, argv).await
}

async fn run_step(session: &Session, base: &ImageRef, argv: &[&str]) -> Result<String, Failure> {
    let path = buildkit::send_dockerfile(session, "ask", dockerfile(base, argv)?).await?;
    let mut answer = Answer::default();
    let take = async |event: Event| answer.take(event);
    let (exit, solve) = buildkit::solve(
        session,
        &buildkit::request(&path, &path),
        ANSWER_TIMEOUT_MS,
        take,
    )
    .await?;
    if exit.code == Some(0) {
        return Ok(answer.text);
    }
    let words = solve.failed().map_or_else(
        || solve.other_lines.join("\n"),
        |(_, step)| step.error.clone(),
    );
    let words: String = words.chars().take(400).collect();
    Err(Failure::new(
        FailureClass::Infrastructure,
        format!("{} in {base} failed: {words}", argv.join(" ")),
    ))
}

/// The command in its exec form: no shell of the image has a say.
fn dockerfile(base: &ImageRef, argv: &[&str]) -> Result<String, Failure> {
    let argv = serde_json::to_string(argv).map_err(|error| Failure::infrastructure(&error))?;
    Ok(format!("FROM {base}\nRUN {argv}\n"))
}

/// Standard output of the step, bounded.
#[derive(Default)]
struct Answer {
    text: String,
}

impl Answer {
    fn take(&mut self, event: Event) {
        if let Event::Log {
            stream: 1, text, ..
        } = event
            && self.text.len() + text.len() < ANSWER_BYTES_MAX
        {
            self.text.push_str(&text);
            self.text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_and_answers_bounded() {
        let base = "registry.kiln.internal/shared/node:20-build"
            .parse()
            .expect("legal");
        let text = dockerfile(&base, &["sh", "-c", "echo \"a\" 'b'"]).expect("text");
        assert_eq!(
            text,
            format!("FROM {base}\nRUN [\"sh\",\"-c\",\"echo \\\"a\\\" 'b'\"]\n")
        );
        let mut answer = Answer::default();
        let log = |stream, text: &str| Event::Log {
            step: 2,
            stream,
            text: text.to_owned(),
        };
        answer.take(log(2, "npm warn"));
        answer.take(log(1, "https://npm.example.org/"));
        answer.take(log(1, &"x".repeat(ANSWER_BYTES_MAX)));
        assert_eq!(answer.text, "https://npm.example.org/\n");
    }
}
