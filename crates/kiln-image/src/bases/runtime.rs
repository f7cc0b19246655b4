//! The base that a runtime's name means on this host: `node`, `node20`, `python3.13`.

use kiln_core::ImageRef;

use super::{BaseKind, Bases};

/// Longest name that a message repeats, characters.
const SHOWN_MAX: usize = 80;

/// Why a runtime's name means no base.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoBase {
    /// Nothing here is called so.
    #[error("this host has no base of the runtime {0}")]
    Unknown(String),
    /// It is known, and has not been made.
    #[error("the base of {0} is not made yet")]
    Unmade(String),
}

impl NoBase {
    /// What to do.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "`kiln bases list` shows what there is",
            Self::Unmade(_) => "run `kiln setup` once",
        }
    }
}

impl Bases {
    /// The build image of a runtime's base, of the newest version unless the name says one.
    ///
    /// # Errors
    /// When there is none, or it is not made yet.
    pub fn named(&self, name: &str) -> Result<ImageRef, NoBase> {
        let at = name
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(name.len());
        let (runtime, version) = name.split_at(at);
        let runtime = runtime.trim_end_matches('-');
        let numbers = |version: &str| -> Vec<u64> {
            version
                .split('.')
                .map(|part| part.parse().unwrap_or(0))
                .collect()
        };
        let shown = || name.chars().take(SHOWN_MAX).collect::<String>();
        let found = self
            .of_runtime(runtime)
            .filter(|base| version.is_empty() || base.version == version)
            .max_by_key(|base| numbers(&base.version));
        let image = found
            .map(|base| base.image(BaseKind::Build))
            .ok_or_else(|| NoBase::Unknown(shown()))?;
        if image.digest.is_none() {
            return Err(NoBase::Unmade(shown()));
        }
        // In kiln's own registry, whatever it is called there.
        Ok(ImageRef {
            registry: None,
            ..image.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_the_newest_base_that_is_made() {
        let mut bases = Bases::builtin();
        assert!(matches!(bases.named("node"), Err(NoBase::Unmade(_))));
        assert!(matches!(bases.named("ruby"), Err(NoBase::Unknown(_))));
        let digest = kiln_core::Digest::of(b"base");
        for base in &mut bases.bases {
            base.build.digest = Some(digest);
        }
        for name in ["node", "node20", "node-20", "python3.13"] {
            let image = bases.named(name).expect(name);
            assert_eq!((image.registry, image.digest), (None, Some(digest)));
        }
        assert!(matches!(bases.named("node21"), Err(NoBase::Unknown(_))));
    }
}
