//! The limit on open files: a machine needs many descriptors, and what is missing one fails far from the reason.

use kiln_core::FailureClass;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::CliError;

/// Descriptors that a job takes at its busiest, with room to spare.
const LEAST: u64 = 256;
/// No more is asked for: some programs that kiln starts close every possible descriptor, one by one.
const MOST: u64 = 65_536;

/// Raises the soft limit towards the hard one.
///
/// # Errors
/// When there are still too few; nothing that starts a machine would work.
pub(crate) fn raise() -> Result<(), CliError> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = raised(limit.current, limit.maximum);
    if wanted != limit.current {
        let raised = Rlimit {
            current: wanted,
            maximum: limit.maximum,
        };
        // What is there may be enough; it is looked at below.
        let _refused = setrlimit(Resource::Nofile, raised);
    }
    enough(getrlimit(Resource::Nofile).current)
}

/// The soft limit to have; `None` means no limit.
fn raised(soft: Option<u64>, hard: Option<u64>) -> Option<u64> {
    let reachable = hard.unwrap_or(MOST).min(MOST);
    soft.map(|soft| soft.max(reachable))
}

fn enough(soft: Option<u64>) -> Result<(), CliError> {
    match soft {
        Some(soft) if soft < LEAST => Err(CliError::new(
            FailureClass::Infrastructure,
            format!("this process may open {soft} files at a time, and kiln needs {LEAST}"),
        )
        .hint(
            "raise the limit on file descriptors: `ulimit -n 4096`, or LimitNOFILE= of the service",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_goes_as_far_as_it_may() {
        assert_eq!(raised(Some(1024), Some(4096)), Some(4096));
        assert_eq!(raised(Some(1024), Some(1 << 30)), Some(MOST));
        assert_eq!(raised(Some(1024), None), Some(MOST));
        assert_eq!(raised(Some(1 << 20), Some(1 << 30)), Some(1 << 20));
        assert_eq!(raised(None, None), None);
        assert_eq!(raised(Some(32), Some(32)), Some(32));
    }

    #[test]
    fn too_few_are_said_in_words() {
        let error = enough(Some(32)).expect_err("too few");
        assert_eq!(error.exit_code(), 3);
        assert!(error.message.contains("32 files") && error.hints[0].contains("ulimit -n"));
        assert!(enough(Some(LEAST)).is_ok() && enough(None).is_ok());
    }
}
