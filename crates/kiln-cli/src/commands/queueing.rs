//! What a submission to a server says besides its work: queue, order, labels, limits.

use std::collections::BTreeMap;

use kiln_controller::api::Common;
use kiln_core::AllowRule;

use crate::args::{LimitArgs, QueueingArgs};
use crate::error::{CliError, Result};

/// From the command line.
///
/// # Errors
/// When a word is malformed.
pub(super) fn common(
    said: &QueueingArgs,
    limits: &LimitArgs,
    allow: &[AllowRule],
) -> Result<Common> {
    Ok(Common {
        tenant: said.tenant.clone(),
        queue: said.queue.clone(),
        priority: said.priority,
        concurrency_group: said.group.clone(),
        require: labels(&said.require, "--require")?,
        labels: labels(&said.labels, "--label")?,
        cpus: limits.cpus,
        memory: limits.memory.map(|memory| memory.0.to_string()),
        disk: said.disk.map(|disk| disk.0.to_string()),
        timeout_seconds: limits.timeout.map(|timeout| timeout.as_secs()),
        allow: allow.iter().map(ToString::to_string).collect(),
        notify_url: said.notify_url.clone(),
        ..Common::default()
    })
}

/// `LABEL=VALUE` words.
///
/// # Errors
/// When a word is malformed.
pub(super) fn labels(words: &[String], flag: &str) -> Result<BTreeMap<String, String>> {
    let mut map = BTreeMap::new();
    for word in words {
        let pair = word
            .split_once('=')
            .filter(|(name, value)| !name.is_empty() && !value.is_empty());
        let (name, value) = pair.ok_or_else(|| {
            CliError::usage(format!(
                "{flag} {word:?}: write LABEL=VALUE, for example zone=a"
            ))
        })?;
        if map.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(CliError::usage(format!("{flag}: {name} is given twice")));
        }
    }
    Ok(map)
}

/// Without a server there is no queue.
///
/// # Errors
/// When something was said about it all the same.
pub(super) fn refuse(said: &QueueingArgs) -> Result<()> {
    let flags = [
        ("--detach", said.detach),
        ("--disk", said.disk.is_some()),
        ("--queue", said.queue.is_some()),
        ("--priority", said.priority.is_some()),
        ("--require", !said.require.is_empty()),
        ("--group", said.group.is_some()),
        ("--label", !said.labels.is_empty()),
        ("--tenant", said.tenant.is_some()),
        ("--notify-url", said.notify_url.is_some()),
    ];
    match flags.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(
            CliError::usage(format!("{flag} means nothing without a server"))
                .hint("name one with --server URL, KILN_SERVER or [server] in kiln.toml"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_pairs() {
        let given = ["zone=a".to_owned(), "gpu=a100".to_owned()];
        assert_eq!(labels(&given, "--label").expect("legal").len(), 2);
        for bad in ["zone", "=a", "zone="] {
            assert_eq!(
                labels(&[bad.to_owned()], "--label")
                    .expect_err(bad)
                    .exit_code(),
                2
            );
        }
        assert!(labels(&["a=1".to_owned(), "a=2".to_owned()], "--label").is_err());
    }

    #[test]
    fn queueing_needs_a_server() {
        assert!(refuse(&QueueingArgs::default()).is_ok());
        let said = QueueingArgs {
            priority: Some(1),
            ..QueueingArgs::default()
        };
        assert!(
            refuse(&said)
                .expect_err("no server")
                .message
                .contains("--priority")
        );
    }
}
