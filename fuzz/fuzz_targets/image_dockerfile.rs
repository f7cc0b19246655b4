//! Dockerfiles: read as BuildKit reads them, every image pinned, nothing else changed.
#![no_main]

use kiln_core::Digest;
use kiln_image::bases::Bases;
use kiln_image::dockerfile::{PinOptions, pin, split};
use libfuzzer_sys::fuzz_target;

fn bases() -> Bases {
    let mut bases = Bases::builtin();
    for base in &mut bases.bases {
        base.build.digest = Some(Digest::of(format!("{}-build", base.name).as_bytes()));
        base.run.digest = Some(Digest::of(format!("{}-run", base.name).as_bytes()));
    }
    bases
}

fuzz_target!(|text: &str| {
    let (bases, options) = (bases(), PinOptions::default());
    let Ok(pinned) = pin(text, &options, &bases) else {
        return;
    };
    for used in &pinned.bases {
        assert!(used.reference.digest.is_some());
    }
    let lines = |text: &str| text.lines().count();
    assert_eq!(lines(text), lines(&pinned.text), "no line appears or goes");
    let before = split(text).expect("it was read");
    let after = split(&pinned.text).expect("it can be read");
    let keywords = |all: &[kiln_image::dockerfile::Instruction]| {
        all.iter().map(|one| (one.line, one.keyword.clone())).collect::<Vec<_>>()
    };
    assert_eq!(keywords(&before), keywords(&after));
    let again = pin(&pinned.text, &options, &bases).expect("a pinned file can be pinned");
    assert_eq!(again.text, pinned.text);
    assert_eq!(again.bases.len(), pinned.bases.len());
});
