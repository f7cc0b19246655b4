//! The guest's introduction and the choice of a generation.

use crate::frame::HELLO_LEN_MAX;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Lowest generation of the wire this crate speaks.
pub const GENERATION_MIN: u32 = 1;
/// Highest generation of the wire this crate speaks.
pub const GENERATION_MAX: u32 = crate::msg::GENERATION;
/// Most bytes of [`Hello::guest_version`] and [`Hello::boot_id`] each.
pub const HELLO_TEXT_MAX: usize = 128;
/// Most entries of [`Hello::features`].
pub const FEATURES_MAX: usize = 64;
/// Most bytes of one feature's name.
pub const FEATURE_LEN_MAX: usize = 64;

/// The guest's first frame: a claim, like everything from a guest. JSON; unknown fields are
/// ignored, so that a newer guest can say more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Lowest generation the guest speaks.
    pub generation_min: u32,
    /// Highest generation the guest speaks.
    pub generation_max: u32,
    /// Version of the guest program, for people.
    pub guest_version: String,
    /// The guest kernel's boot id, empty where it has none.
    #[serde(default)]
    pub boot_id: String,
    /// What this guest can do, by name. The host assumes nothing that is not listed.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Why a Hello was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HelloError {
    /// Not JSON, or not of the expected shape.
    #[error("the hello is not what a guest says: {detail}")]
    Json {
        /// The parser's words, without the guest's text.
        detail: String,
    },
    /// A field is longer than its bound.
    #[error("field {field} of the hello is too long")]
    TooLong {
        /// Name of the field.
        field: &'static str,
    },
    /// The lowest generation is above the highest.
    #[error("the hello offers generations {min}..={max}")]
    EmptyRange {
        /// Lowest offered.
        min: u32,
        /// Highest offered.
        max: u32,
    },
}

/// A [`Hello`] in the form in which it is sent. A guest that was just cloned has it ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedHello {
    pub(crate) body: Vec<u8>,
    /// Lowest and highest generation.
    pub(crate) generations: (u32, u32),
}

impl Hello {
    /// A Hello of this crate's generations.
    pub fn new(guest_version: &str, boot_id: &str, features: &[&str]) -> Self {
        Self {
            generation_min: GENERATION_MIN,
            generation_max: GENERATION_MAX,
            guest_version: guest_version.to_owned(),
            boot_id: boot_id.to_owned(),
            features: features.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// True if the guest lists `feature`.
    pub fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|name| name == feature)
    }

    /// Reads and checks the body of a Hello frame.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn parse(body: &[u8]) -> Result<Self, HelloError> {
        let hello: Self = serde_json::from_slice(body).map_err(|error| HelloError::Json {
            detail: format!("{:?} at column {}", error.classify(), error.column()),
        })?;
        hello.check()?;
        Ok(hello)
    }

    /// The body of a Hello frame.
    ///
    /// # Errors
    /// [`HelloError`] if a bound is exceeded, so that a guest finds out at home.
    pub fn to_body(&self) -> Result<Vec<u8>, HelloError> {
        self.check()?;
        let body = serde_json::to_vec(self).map_err(|error| HelloError::Json {
            detail: error.to_string(),
        })?;
        if body.len() > HELLO_LEN_MAX {
            return Err(HelloError::TooLong { field: "features" });
        }
        Ok(body)
    }

    /// Makes it ready for [`crate::Session::accept_prepared`].
    ///
    /// # Errors
    /// As [`Self::to_body`].
    pub fn prepare(&self) -> Result<PreparedHello, HelloError> {
        Ok(PreparedHello {
            body: self.to_body()?,
            generations: (self.generation_min, self.generation_max),
        })
    }

    fn check(&self) -> Result<(), HelloError> {
        let too_long = |field| Err(HelloError::TooLong { field });
        if self.guest_version.len() > HELLO_TEXT_MAX {
            return too_long("guest_version");
        }
        if self.boot_id.len() > HELLO_TEXT_MAX {
            return too_long("boot_id");
        }
        if self.features.len() > FEATURES_MAX
            || self
                .features
                .iter()
                .any(|name| name.len() > FEATURE_LEN_MAX)
        {
            return too_long("features");
        }
        if self.generation_min > self.generation_max {
            let (min, max) = (self.generation_min, self.generation_max);
            return Err(HelloError::EmptyRange { min, max });
        }
        Ok(())
    }
}

/// The generation two sides use: the lower of both maxima, `None` if their ranges do not meet.
pub fn negotiate(ours: (u32, u32), theirs: (u32, u32)) -> Option<u32> {
    let generation = ours.1.min(theirs.1);
    (generation >= ours.0.max(theirs.0)).then_some(generation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unknown_fields_are_ignored_and_missing_lists_are_empty() {
        let body = br#"{"generation_min":1,"generation_max":9,"guest_version":"2","novel":[1]}"#;
        let hello = Hello::parse(body).unwrap();
        assert_eq!(hello.generation_max, 9);
        assert!(!hello.has("exec"));
        let hello = Hello::new("1.0", "b", &["exec", "tree"]);
        assert!(hello.has("tree"));
        assert_eq!(Hello::parse(&hello.to_body().unwrap()), Ok(hello));
    }

    #[test]
    fn every_bound_is_kept_in_both_directions() {
        let long = "x".repeat(HELLO_TEXT_MAX + 1);
        let many = vec!["f"; FEATURES_MAX + 1];
        let wide = "f".repeat(FEATURE_LEN_MAX + 1);
        let mut upside_down = Hello::new("", "", &[]);
        upside_down.generation_min = GENERATION_MAX + 1;
        for hello in [
            Hello::new(&long, "", &[]),
            Hello::new("", &long, &[]),
            Hello::new("", "", &many),
            Hello::new("", "", &[&wide]),
            upside_down,
        ] {
            assert!(hello.to_body().is_err());
            assert!(Hello::parse(&serde_json::to_vec(&hello).unwrap()).is_err());
        }
        assert!(matches!(Hello::parse(b"{"), Err(HelloError::Json { .. })));
    }

    #[test]
    fn the_lower_maximum_wins_if_both_can() {
        assert_eq!(negotiate((1, 3), (2, 9)), Some(3));
        assert_eq!(negotiate((1, 9), (2, 4)), Some(4));
        assert_eq!(negotiate((5, 9), (1, 4)), None);
        assert_eq!(negotiate((1, 4), (5, 9)), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Hello::parse(&body);
        }
    }
}
