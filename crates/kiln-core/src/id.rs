//! Names and ids as types, so that two kinds cannot be swapped by mistake.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not a valid name of its kind.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{kind} {text:?} is not valid: {rule}")]
pub struct ParseIdError {
    kind: &'static str,
    text: String,
    rule: &'static str,
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The longest accepted name, in bytes.
            pub const LEN_MAX: usize = $max;

            /// The text of the name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                check_name($kind, text, $max).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, ParseIdError> {
                check_name($kind, &text, $max).map(|()| Self(text))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// Lower-case letters, digits and inner hyphens: safe as a path component, an image name and a host label.
fn check_name(kind: &'static str, text: &str, len_max: usize) -> Result<(), ParseIdError> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edge = |b: Option<u8>| b.is_some_and(|b| b != b'-');
    let bytes = text.as_bytes();
    if bytes.len() <= len_max
        && bytes.iter().all(|b| legal(*b))
        && edge(bytes.first().copied())
        && edge(bytes.last().copied())
    {
        return Ok(());
    }
    Err(ParseIdError {
        kind,
        text: text.chars().take(80).collect(),
        rule: "use lower-case letters, digits and inner hyphens, within the length limit",
    })
}

name_type!(
    /// One unit of work that is queued and isolated.
    JobId, "job id", 40
);
name_type!(
    /// Isolation owner: quota, cache scope, secrets, logs. The embedded tenant is [`TenantName::local`].
    TenantName, "tenant", 40
);
name_type!(
    /// The daemon on one host that runs attempts.
    WorkerId, "worker id", 63
);
name_type!(
    /// Name of one microVM, derived from the attempt that owns it.
    MachineName, "machine name", 80
);

name_type!(
    /// Named, ordered waiting place with limits.
    QueueName, "queue", 40
);
name_type!(
    /// A disjoint set of workers that one scheduler decides for.
    PoolName, "pool", 40
);
name_type!(
    /// The public half of a token: names it in lists and audit rows, opens nothing.
    TokenId, "token id", 40
);

impl QueueName {
    /// Where jobs wait that name no queue.
    #[must_use]
    pub fn default_queue() -> Self {
        Self("default".to_owned())
    }
}

impl PoolName {
    /// The only pool unless the operator makes more.
    #[must_use]
    pub fn default_pool() -> Self {
        Self("default".to_owned())
    }
}

impl TenantName {
    /// The only tenant when no server is configured.
    #[must_use]
    pub fn local() -> Self {
        Self("local".to_owned())
    }
}

impl JobId {
    /// A job id from a start time (milliseconds since the Unix epoch) and 5 random bytes, so that
    /// ids sort by time: `b<11 base-32 digits of time><8 of randomness>`.
    #[must_use]
    pub fn new(prefix: char, unix_ms: u64, random: [u8; 5]) -> Self {
        let mut text = String::with_capacity(18);
        text.push(if prefix.is_ascii_lowercase() {
            prefix
        } else {
            'j'
        });
        push_base32(&mut text, unix_ms, 9);
        let tail = random
            .iter()
            .fold(0_u64, |acc, byte| (acc << 8) | u64::from(*byte));
        push_base32(&mut text, tail, 8);
        Self(text)
    }
}

/// Crockford's base 32 in lower case: digits sort in order and no letter is easily misread.
fn push_base32(out: &mut String, value: u64, digits: u32) {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    for place in (0..digits).rev() {
        out.push(char::from(ALPHABET[((value >> (5 * place)) & 31) as usize]));
    }
}

/// One try of a job. Numbers start at 1.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct AttemptId {
    /// The job.
    pub job: JobId,
    /// Which try, from 1.
    pub number: u32,
}

impl AttemptId {
    /// Deterministic name of a machine of this attempt; `role` tells machines of one attempt apart
    /// (`build`, `run`, `checkout`, `unpack`).
    ///
    /// # Errors
    /// When `role` holds characters a name may not have.
    pub fn machine_name(&self, role: &str) -> Result<MachineName, ParseIdError> {
        format!("{}-{}-{role}", self.job, self.number).parse()
    }

    /// The attempt and the role that a machine's name was made of; none when it is no such name.
    #[must_use]
    pub fn of_machine(name: &MachineName) -> Option<(Self, &str)> {
        let (rest, role) = name.as_str().rsplit_once('-')?;
        let (job, number) = rest.rsplit_once('-')?;
        let attempt = Self {
            job: job.parse().ok()?,
            number: number.parse().ok()?,
        };
        Some((attempt, role))
    }
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.job, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_escape_a_path_are_refused() {
        for bad in [
            "",
            "..",
            "a/b",
            "A",
            "a b",
            "-a",
            "a-",
            "a\0",
            "é",
            &"a".repeat(41),
        ] {
            assert!(bad.parse::<JobId>().is_err(), "{bad:?}");
        }
        assert!("b01-x".parse::<JobId>().is_ok());
        assert!(serde_json::from_str::<TenantName>("\"../x\"").is_err());
    }

    #[test]
    fn job_ids_sort_by_time() {
        let early = JobId::new('b', 1_700_000_000_000, [255; 5]);
        let late = JobId::new('b', 1_700_000_000_001, [0; 5]);
        assert!(early < late);
        assert_eq!(early.as_str().len(), 18);
        let attempt = AttemptId {
            job: early,
            number: 1,
        };
        let name = attempt.machine_name("build").expect("a name");
        assert_eq!(AttemptId::of_machine(&name), Some((attempt, "build")));
        for other in ["template", "a-b-run", "x-run"] {
            let other = other.parse().expect("a name");
            assert_eq!(AttemptId::of_machine(&other), None);
        }
    }
}
