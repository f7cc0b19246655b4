//! Whether a bake takes what is new in Debian's archives, or stays with what it made last from the same recipe.
//!
//! The state of the archives is an input of a root stage. It is kept beside the stages, so that a set-up that only looks whether
//! everything is there neither asks the network nor bakes anew because an archive was updated since.

use std::fs;
use std::path::PathBuf;

use super::apt::AptError;
use super::machine_image::BakeError;
use super::stage::{StageCache, StageKey};

/// What to do about packages that were updated since the last bake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Updates {
    /// Ask the archives; bake anew when they changed.
    Take,
    /// Use what was baked from the same recipe, however long ago; ask only when there is nothing.
    Leave,
}

/// The key of a root stage: `inputs` and the state of the archives, which `ask` fetches.
///
/// # Errors
/// What `ask` returns, or when its answer cannot be kept.
pub(super) fn root_key(
    updates: Updates,
    stage: &str,
    inputs: &StageKey,
    cache: &StageCache<'_>,
    ask: impl FnOnce() -> Result<Vec<u8>, AptError>,
) -> Result<kiln_core::Digest, BakeError> {
    let with = |state: &[u8]| inputs.clone().with("archives", state).digest();
    let kept = kept_at(stage, inputs, cache);
    if updates == Updates::Leave
        && let Ok(state) = fs::read(&kept)
        && cache.path(stage, &with(&state)).is_dir()
    {
        return Ok(with(&state));
    }
    let state = ask()?;
    fs::write(&kept, &state).map_err(BakeError::io("write", &kept))?;
    Ok(with(&state))
}

fn kept_at(stage: &str, inputs: &StageKey, cache: &StageCache<'_>) -> PathBuf {
    let of = inputs.clone().digest().short(16);
    cache.directory().join(format!(".archives-{stage}-{of}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bake::progress::{BakeEvent, Cancel};

    #[test]
    fn a_finished_root_is_left_alone_until_updates_are_wanted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (quiet, cancel) = (|_: &BakeEvent<'_>| {}, Cancel::new());
        let cache = StageCache::open(dir.path(), &quiet, &cancel).expect("it opens");
        let inputs = StageKey::new(1).with("packages", b"git");
        let key = |updates, inputs: &StageKey, state: &str| {
            let mut asked = false;
            let ask = || {
                asked = true;
                Ok(state.as_bytes().to_vec())
            };
            let key = root_key(updates, "root", inputs, &cache, ask).expect("a key");
            (key, asked)
        };
        let (first, asked) = key(Updates::Leave, &inputs, "monday");
        assert!(asked, "nothing was baked yet");
        assert!(
            key(Updates::Leave, &inputs, "monday").1,
            "a bake that did not finish counts for nothing"
        );
        cache
            .stage("root", &first, |_, _| Ok::<_, BakeError>(()))
            .expect("it works");
        assert_eq!(key(Updates::Leave, &inputs, "tuesday"), (first, false));
        let other = StageKey::new(1).with("packages", b"git runc");
        assert!(key(Updates::Leave, &other, "tuesday").1, "another recipe");
        let (second, asked) = key(Updates::Take, &inputs, "tuesday");
        assert!(asked && second != first);
        assert_eq!(key(Updates::Take, &inputs, "tuesday"), (second, true));
    }
}
