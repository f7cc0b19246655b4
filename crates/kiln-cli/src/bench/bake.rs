//! `bake`: everything that is made once per host, from nothing: machine image, BuildKit, bases, shared head, templates.
//!
//! One sample: a `kiln setup` on an empty home with empty caches of the Go tool. What the network gives in that time is measured with it.

use std::ffi::OsStr;

use super::report::Report;
use super::series::Promise;
use super::{Bench, child};
use crate::error::Result;

/// What is promised, milliseconds.
const AT_MOST: f64 = 600_000.0;

pub(super) async fn from_nothing(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    bench
        .screen
        .note("bake: a whole set-up on an empty home; this takes minutes");
    let home = bench.work.join("home");
    let go = |name: &str| bench.work.join(name).into_os_string();
    let env = [
        ("KILN_HOME", home.clone().into_os_string()),
        ("GOPATH", go("go-path")),
        ("GOCACHE", go("go-cache")),
        // Modules that can be removed again by who is not root.
        ("GOFLAGS", "-modcacherw".into()),
    ];
    let mut words: Vec<&OsStr> = vec!["setup".as_ref(), "--recipe".as_ref(), bench.recipe.as_ref()];
    if let Some(guest) = bench.guest {
        words.extend([OsStr::new("--guest"), guest.as_ref()]);
    }
    let took = child::kiln_with(bench, &words, &env).await?;
    let promise = Some(Promise::MedianAtMost(AT_MOST));
    report.time("bake of everything from nothing", promise, took);
    Ok(())
}
