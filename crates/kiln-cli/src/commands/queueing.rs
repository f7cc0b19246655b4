//! What a submission to a server says besides its work: queue, order, labels, limits.

use std::collections::BTreeMap;

use kiln_controller::api::Common;
use kiln_core::{AllowRule, ByteSize, Dispatch, Label, Priority};

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

/// How a job waits in the queue of this home.
#[derive(Clone, Debug, Default)]
pub(super) struct Own {
    /// Queue, order and group.
    pub(super) dispatch: Dispatch,
    /// For lists and filters.
    pub(super) labels: BTreeMap<Label, Label>,
    /// Disk its machine may fill.
    pub(super) disk: Option<ByteSize>,
}

/// From the command line, without a server: the command itself runs the job, so it can neither go away nor choose a host or a tenant.
///
/// # Errors
/// When a word is malformed, or means nothing here.
pub(super) fn own(said: &QueueingArgs) -> Result<Own> {
    let flags = [
        ("--detach", said.detach),
        ("--require", !said.require.is_empty()),
        ("--tenant", said.tenant.is_some()),
        ("--notify-url", said.notify_url.is_some()),
    ];
    if let Some((flag, _)) = flags.iter().find(|(_, given)| *given) {
        return Err(
            CliError::usage(format!("{flag} means nothing without a server"))
                .hint("name one with --server URL, KILN_SERVER or [server] in kiln.toml"),
        );
    }
    let mut dispatch = Dispatch::default();
    if let Some(queue) = &said.queue {
        dispatch.queue = word("--queue", queue)?;
    }
    if let Some(priority) = said.priority {
        let legal = Priority::try_from(priority);
        dispatch.priority =
            legal.map_err(|error| CliError::usage(format!("--priority: {error}")))?;
    }
    if let Some(group) = &said.group {
        dispatch.concurrency_group = Some(word("--group", group)?);
    }
    let labels = labels(&said.labels, "--label")?;
    let labels = labels
        .iter()
        .map(|(name, value)| Ok((word("--label", name)?, word("--label", value)?)));
    Ok(Own {
        dispatch,
        labels: labels.collect::<Result<_>>()?,
        disk: said.disk,
    })
}

fn word<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    let parsed = text.parse();
    parsed.map_err(|error: T::Err| CliError::usage(format!("{flag}: {error}")))
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
    fn a_homes_own_job_waits_in_a_queue_and_chooses_no_host() {
        let said = QueueingArgs {
            queue: Some("slow".to_owned()),
            priority: Some(-5),
            group: Some("deploy".to_owned()),
            labels: vec!["team=web".to_owned()],
            ..QueueingArgs::default()
        };
        let own = own(&said).expect("legal");
        assert_eq!(own.dispatch.queue.as_str(), "slow");
        assert_eq!(own.dispatch.priority.get(), -5);
        assert_eq!(own.labels.len(), 1);
        let bad = [
            QueueingArgs {
                detach: true,
                ..QueueingArgs::default()
            },
            QueueingArgs {
                priority: Some(101),
                ..QueueingArgs::default()
            },
            QueueingArgs {
                queue: Some("no queue".to_owned()),
                ..QueueingArgs::default()
            },
        ];
        for said in bad {
            assert_eq!(super::own(&said).expect_err("refused").exit_code(), 2);
        }
    }
}
