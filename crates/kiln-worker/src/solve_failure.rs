//! Why a build that BuildKit ended did end: whose fault it was, in words a user can act on.
//!
//! BuildKit's words come from the guest: they choose between the user's own failures, never a verdict about the host.

use kiln_core::{FailureClass, Overrun};
use kiln_proto::msg::Exit;

use crate::failure::Failure;
use crate::solve::Solve;

/// What a failed build means, from BuildKit's words and the kills the guest's kernel reported.
#[must_use]
pub fn classify(solve: &Solve, exit: &Exit, oom_kills: u64) -> Failure {
    let words = solve.other_lines.join("\n");
    let all = format!(
        "{words}\n{}",
        solve
            .failed()
            .map(|(_, step)| step.error.clone())
            .unwrap_or_default()
    );
    let killed = all.contains("exit code: 137") || all.contains("signal: killed");
    // BuildKit's words for a step whose cgroup had a process killed for memory.
    let said_so = all.contains("did not complete successfully: cannot allocate memory");
    // The guest tells of kills in an event and again at the command's end: the event may come later than the end.
    let was_short = oom_kills > 0 || exit.oom;
    if said_so || (was_short && (killed || exit.signal.is_some())) {
        return Failure::new(
            FailureClass::OutOfMemory,
            step_message(solve, "ran out of memory"),
        )
        .hint("give the build more with --memory");
    }
    let step_said_so = solve.failed().is_some_and(|(_, step)| step.disk_full);
    if all.contains("no space left on device") || step_said_so {
        return Failure::new(
            FailureClass::User,
            step_message(solve, "filled the machine's disk"),
        )
        .because(Overrun::DiskFull)
        .hint(
            "the disk of a build is bounded; the operator's limit is limits.disk_max in kiln.toml",
        );
    }
    if let Some((_, step)) = solve.failed() {
        let why = step.error.lines().next().unwrap_or("it failed");
        return Failure::new(
            FailureClass::User,
            step_message(solve, without_command(why)),
        );
    }
    let last = solve
        .other_lines
        .iter()
        .rev()
        .find(|line| line.contains("error"))
        .cloned();
    Failure::new(
        FailureClass::User,
        last.unwrap_or_else(|| format!("BuildKit ended with {:?}", exit.code)),
    )
}

/// BuildKit repeats the command that the step's name tells already.
fn without_command(why: &str) -> &str {
    const BETWEEN: &str = "\" did not complete successfully: ";
    match why.split_once(BETWEEN) {
        Some((before, rest)) if before.starts_with("process \"") && !rest.is_empty() => rest,
        _ => why,
    }
}

fn step_message(solve: &Solve, what: &str) -> String {
    match solve.failed() {
        Some((number, step)) => format!(
            "step #{number} {}: {what}",
            step.name.lines().next().unwrap_or_default()
        ),
        None => format!("the build {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_not_told_twice() {
        let why = "process \"/bin/sh -c echo \\\"a\\\" && false\" did not complete successfully: exit code: 1";
        assert_eq!(without_command(why), "exit code: 1");
        assert_eq!(
            without_command("failed to compute cache key"),
            "failed to compute cache key"
        );
    }
}
