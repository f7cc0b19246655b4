//! Amounts that a policy names: beyond what this host gives, and as the bound that a command ran into. A flag cannot help there, so none is named.

use std::fmt::Display;
use std::time::Duration;

use kiln_core::access::{MEMORY_MIN, TIMEOUT_MIN_MS};
use kiln_core::{ByteSize, FailureClass};
use kiln_policy::{Compiled, NotGranted};

use crate::args::LimitArgs;
use crate::config::Config;
use crate::error::{CliError, Result};
use crate::policy_file::not_granted;

/// Whether this host gives what the file asks for. What a flag says is narrower, and is judged as a flag.
///
/// # Errors
/// Policy, with everything that it does not give.
pub(super) fn given(compiled: &Compiled, said: &LimitArgs, config: &Config) -> Result<()> {
    let (asked, most) = (&compiled.policy().resources, &config.limits);
    let mut refused = Vec::new();
    if let (None, Some(cpus)) = (said.cpus, asked.cpus) {
        let most = most.cpus_max.max(1);
        refused.extend(beyond(compiled, "cpus", cpus, 1, Some(most)));
    }
    if let (None, Some(memory)) = (said.memory, asked.memory) {
        let most = Some(most.memory_max.0);
        refused.extend(beyond(compiled, "memory", memory, MEMORY_MIN, most));
    }
    if let (None, Some(ms)) = (said.timeout, asked.timeout_ms)
        && ms < TIMEOUT_MIN_MS
    {
        let [ms, least] = [ms, TIMEOUT_MIN_MS].map(|ms| format!("{:?}", Duration::from_millis(ms)));
        refused.push(outside(
            compiled,
            "timeout",
            &ms,
            &format!("at least {least}"),
            None,
        ));
    }
    match refused.is_empty() {
        true => Ok(()),
        false => Err(not_granted(&refused)),
    }
}

fn beyond<T: Ord + Copy + Display>(
    compiled: &Compiled,
    name: &str,
    asked: T,
    least: T,
    most: Option<T>,
) -> Option<NotGranted> {
    let above = most.filter(|most| asked > *most);
    let bound = match above {
        Some(most) => format!("at most {most}"),
        None if asked < least => format!("at least {least}"),
        None => return None,
    };
    let key = above.map(|_| format!("limits.{name}_max"));
    Some(outside(
        compiled,
        name,
        &asked.to_string(),
        &bound,
        key.as_deref(),
    ))
}

fn outside(
    compiled: &Compiled,
    name: &str,
    asked: &str,
    bound: &str,
    operators: Option<&str>,
) -> NotGranted {
    let key = format!("resources.{name}");
    NotGranted {
        file: compiled.file().to_owned(),
        line: compiled.line_of_amount(&key),
        message: format!("`{key}` is {asked}: a machine here has {bound}"),
        hint: match operators {
            Some(set) => {
                format!("ask for {bound}; the operator's maximum is {set} in kiln.toml")
            }
            None => format!("ask for {bound}"),
        },
    }
}

/// A disk of which this host gives only a part, as a person is told.
pub(super) fn less_disk(compiled: &Compiled, config: &Config) -> Option<String> {
    let (asked, most) = (compiled.policy().limits.disk?, config.limits.disk_max.0);
    let line = compiled.line_of_amount("limits.disk");
    (asked > most).then(|| {
        format!(
            "{}:{line}: `limits.disk` is {asked}: a machine here gets {most} (limits.disk_max in kiln.toml)",
            compiled.file()
        )
    })
}

/// Which bounds of a command are its policy's: more than those no flag gives.
#[derive(Clone, Default, Debug)]
pub(super) struct Bounds {
    time: Option<String>,
    memory: Option<String>,
}

impl Bounds {
    /// Those of a run with these flags. One that is narrower than the file is a bound of its own, until it is as wide.
    pub(super) fn of(compiled: Option<&Compiled>, said: &LimitArgs) -> Self {
        let Some(compiled) = compiled else {
            return Self::default();
        };
        let resources = &compiled.policy().resources;
        let named = |key: &str| format!("{key} of {}", compiled.file());
        let time = resources.timeout_ms.map(Duration::from_millis);
        let memory: Option<ByteSize> = resources.memory;
        Self {
            time: time
                .filter(|most| said.timeout.is_none_or(|said| said >= *most))
                .map(|_| named("resources.timeout")),
            memory: memory
                .filter(|most| said.memory.is_none_or(|said| said >= *most))
                .map(|_| named("resources.memory")),
        }
    }

    /// What a worker says of a bound names the flag; where the flag could not help, the policy is named.
    pub(super) fn hinted(&self, mut error: CliError) -> CliError {
        let (flag, key) = match error.class {
            FailureClass::Timeout => ("--timeout", &self.time),
            FailureClass::OutOfMemory => ("--memory", &self.memory),
            _ => return error,
        };
        let Some(key) = key else {
            return error;
        };
        let by_flag = error.hints.iter_mut().filter(|hint| hint.ends_with(flag));
        by_flag.for_each(|hint| *hint = format!("write more into {key}: a flag only narrows it"));
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: LimitArgs = LimitArgs {
        cpus: None,
        memory: None,
        timeout: None,
    };

    fn policy(text: &str) -> Compiled {
        let text = format!("version: 1\n{text}\n");
        kiln_policy::compile(kiln_policy::Format::Kiln, "kiln.yaml", &text).expect("legal")
    }

    #[test]
    fn what_this_host_does_not_give_is_told_by_line_and_key() {
        let config = Config::default();
        let file = policy("resources: {cpus: 64, memory: 100G}");
        let error = given(&file, &NOTHING, &config).expect_err("too much");
        assert_eq!(error.exit_code(), 4);
        assert_eq!(
            error.message,
            "kiln.yaml:2: `resources.cpus` is 64: a machine here has at most 4\n\
             kiln.yaml:2: `resources.memory` is 100.0 GiB: a machine here has at most 8.0 GiB"
        );
        assert!(error.hints[0].contains("limits.cpus_max"), "{error:?}");
        // Flags that narrow it are what counts.
        let narrow = LimitArgs {
            cpus: Some(2),
            memory: Some(ByteSize::gib(1)),
            timeout: None,
        };
        assert!(given(&file, &narrow, &config).is_ok());
        let fits = policy("resources: {cpus: 4, memory: 8G, timeout: 3s}");
        assert!(given(&fits, &NOTHING, &config).is_ok());
        assert_eq!(less_disk(&fits, &config), None);
        let disk = policy("limits: {disk: 900G}");
        let told = less_disk(&disk, &config).expect("cut");
        assert!(told.starts_with("kiln.yaml:2: `limits.disk` is"), "{told}");
    }

    #[test]
    fn a_bound_of_the_policy_is_not_blamed_on_a_flag() {
        let file = policy("resources: {timeout: 3s}");
        let hint = |bounds: Bounds, class, flag: &str| {
            let error = CliError::new(class, "over").hint(format!("give it more with {flag}"));
            bounds.hinted(error).hints.remove(0)
        };
        let said = |seconds| LimitArgs {
            timeout: Some(Duration::from_secs(seconds)),
            ..NOTHING
        };
        for said in [&NOTHING, &said(3)] {
            let told = hint(
                Bounds::of(Some(&file), said),
                FailureClass::Timeout,
                "--timeout",
            );
            assert!(told.contains("resources.timeout of kiln.yaml"), "{told}");
        }
        let by_flag = "give it more with --timeout";
        for bounds in [
            Bounds::of(Some(&file), &said(1)),
            Bounds::of(None, &NOTHING),
        ] {
            assert_eq!(hint(bounds, FailureClass::Timeout, "--timeout"), by_flag);
        }
        let memory = Bounds::of(Some(&file), &NOTHING);
        let told = hint(memory, FailureClass::OutOfMemory, "--memory");
        assert_eq!(told, "give it more with --memory");
    }
}
