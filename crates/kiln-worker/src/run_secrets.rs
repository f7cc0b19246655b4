//! The secrets of one command: variables of its own process, and files in the memory of its machine. They are never a part of its request.

use std::collections::BTreeMap;

use kiln_core::{FailureClass, RunSecret, SecretPlace};
use kiln_proto::Session;
use kiln_proto::msg::Place;

use crate::failure::Failure;
use crate::orders;

/// Values by where the command finds them.
#[derive(Default)]
pub struct RunSecrets {
    env: BTreeMap<String, String>,
    files: BTreeMap<String, Vec<u8>>,
}

impl std::fmt::Debug for RunSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (env, files) = (self.env.keys(), self.files.keys());
        f.debug_list().entries(env).entries(files).finish()
    }
}

impl RunSecrets {
    /// Puts every value where its command wants it.
    ///
    /// # Errors
    /// Usage, for a value that cannot be a variable.
    pub fn new(wanted: &[RunSecret], values: &[(String, Vec<u8>)]) -> Result<Self, Failure> {
        let usage = |message: String| Failure::new(FailureClass::Usage, message);
        let mut found = Self::default();
        for secret in wanted {
            let name = secret.name.as_str();
            let value = values.iter().find(|(have, _)| have == name);
            let Some((_, value)) = value else {
                return Err(usage(format!("there is no secret {name} for this job")));
            };
            match &secret.place {
                SecretPlace::File => {
                    found.files.insert(name.to_owned(), value.clone());
                }
                SecretPlace::Env(variable) => {
                    let text = String::from_utf8(value.clone()).ok();
                    let text = text.filter(|text| !text.contains('\0'));
                    let text = text.ok_or_else(|| {
                        usage(format!(
                            "the secret {name} is no text, and cannot be a variable"
                        ))
                        .hint(format!("take it as a file: --secret {name}:file"))
                    })?;
                    found.env.insert(variable.clone(), text);
                }
            }
        }
        Ok(found)
    }

    /// The variables, with those that are no secret.
    #[must_use]
    pub fn joined(&self, env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut all = env.clone();
        all.extend(self.env.clone());
        all
    }

    /// The variables.
    #[must_use]
    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.env.is_empty() && self.files.is_empty()
    }

    /// Names of the files.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    /// Puts the files into the machine's memory.
    ///
    /// # Errors
    /// When the guest does not take one.
    pub async fn put(&self, session: &Session) -> Result<(), Failure> {
        for (id, value) in &self.files {
            let place = Place::Secret { id: id.clone() };
            orders::put_file(session, "take a secret", place, value).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(words: &[&str]) -> Vec<RunSecret> {
        words.iter().map(|word| word.parse().expect(word)).collect()
    }

    #[test]
    fn values_go_where_they_are_wanted_and_are_not_printed() {
        let values = [
            ("A".to_owned(), b"one".to_vec()),
            ("key".to_owned(), vec![0, 159]),
        ];
        let found = RunSecrets::new(&wanted(&["A=TOKEN", "A", "key:file"]), &values);
        let found = found.expect("fits");
        let shown = format!("{found:?}");
        assert_eq!(shown, r#"["A", "TOKEN", "key"]"#);
        let plain = BTreeMap::from([("X".to_owned(), "y".to_owned())]);
        let all = found.joined(&plain);
        assert_eq!(all.len(), 3);
        assert_eq!(all["TOKEN"], "one");
        assert_eq!(found.files(), ["key"]);
    }

    #[test]
    fn what_cannot_be_a_variable_is_told_before_anything_starts() {
        for value in [&[0xff_u8][..], b"a\0b"] {
            let values = [("A".to_owned(), value.to_vec())];
            let error = RunSecrets::new(&wanted(&["A"]), &values).expect_err("refused");
            assert_eq!(error.class, FailureClass::Usage);
            assert!(RunSecrets::new(&wanted(&["A:file"]), &values).is_ok());
        }
        assert!(RunSecrets::new(&wanted(&["A"]), &[]).is_err());
    }
}
