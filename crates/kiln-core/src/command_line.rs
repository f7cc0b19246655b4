//! How long the command line of a machine may be: it goes there in one piece, with its variables. Longer ones are refused before a machine starts,
//! as far as the request alone shows it; what else a machine is told comes on top, and may still be too much.

use std::collections::BTreeMap;

/// Most bytes of a command, its arguments and its variables on their way into a machine, as JSON (`OPEN_PAYLOAD_MAX` of kiln-proto).
pub const COMMAND_BYTES_MAX: usize = 16 * 1024;

/// A command line that cannot be sent to any machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the command, its arguments and its variables take {len} bytes, and at most {COMMAND_BYTES_MAX} can be sent to a machine"
)]
pub struct CommandTooLong {
    /// Its length, as JSON.
    pub len: usize,
}

impl CommandTooLong {
    /// What to do about one.
    pub const HINT: &str = "put what is long into a file of the folder, and name the file";
}

/// Whether a machine can be sent this, as far as it is known.
///
/// # Errors
/// [`CommandTooLong`].
pub fn fits(argv: &[String], env: &BTreeMap<String, String>) -> Result<(), CommandTooLong> {
    let pairs: Vec<String> = env
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    // Words are JSON, whatever is in them.
    let len = serde_json::to_vec(&(argv, pairs)).map_or(0, |text| text.len());
    match len <= COMMAND_BYTES_MAX {
        true => Ok(()),
        false => Err(CommandTooLong { len }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_told_with_its_length_and_the_bound() {
        let words = |last: usize| ["echo".to_owned(), "x".repeat(last)];
        let env = |value: usize| BTreeMap::from([("A".to_owned(), "y".repeat(value))]);
        assert_eq!(fits(&[], &BTreeMap::new()), Ok(()));
        assert_eq!(fits(&words(9_000), &env(7_000)), Ok(()));
        let long = fits(&words(20_000), &BTreeMap::new()).expect_err("an argument");
        assert!(long.len > 20_000, "{long:?}");
        let told = long.to_string();
        assert!(
            told.contains(&format!("take {} bytes", long.len))
                && told.contains("at most 16384 can be sent"),
            "{told}"
        );
        assert!(fits(&words(1), &env(20_000)).is_err(), "a variable");
        assert!(fits(&words(9_000), &env(9_000)).is_err(), "both together");
        // What takes more room on its way counts with that.
        let quotes = ["echo".to_owned(), "\"".repeat(9_000)];
        assert!(fits(&quotes, &BTreeMap::new()).is_err());
    }
}
