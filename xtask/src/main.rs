//! Project automation: `cargo xtask <verb>`. Nothing here ships.

mod demo;
mod demo_learn;
mod docs;
mod lanes;
mod layers;
mod run;
mod test;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const HELP: &str = "cargo xtask <verb>

  tidy      file and function budgets, module headers, banned names, registry hosts
  layers    dependency arrows between the rooms
  docs      generated reference is fresh (--write makes it so)
  test      every check and test; --guest PATH names the built guest
  e2e       the end-to-end tests of `kiln` alone; --guest PATH
  hostile   tests with a hostile guest alone, in their long form; --guest PATH
  demo      two apps from source to answering HTTP; --kiln PATH --guest PATH

test, e2e and hostile use the `kiln` that cargo builds with the tests.
";

/// Exit code after Ctrl-C.
const STOPPED: u8 = 130;

fn main() -> ExitCode {
    match verb() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<run::Interrupted>() => {
            run::say(&format!("\n{error}"));
            ExitCode::from(STOPPED)
        }
        Err(error) => {
            run::say(&format!("error: {error:?}"));
            ExitCode::FAILURE
        }
    }
}

fn verb() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    std::env::set_current_dir(root())?;
    match verb.as_str() {
        "tidy" => tidy::check(),
        "layers" => layers::check(),
        "docs" => docs::check(
            &Binaries::from_args(&rest)?,
            rest.iter().any(|arg| arg == "--write"),
        ),
        "test" => test::all(&guest(&rest)?),
        "e2e" => test::end_to_end(&guest(&rest)?),
        "hostile" => test::hostile(&guest(&rest)?),
        "demo" => demo::run(&Binaries::from_args(&rest)?),
        "" | "help" | "--help" => {
            run::say(HELP);
            Ok(())
        }
        other => bail!("unknown verb {other:?}\n\n{HELP}"),
    }
}

/// The repository's root.
fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// The binaries that were built before.
struct Binaries {
    kiln: PathBuf,
    guest: PathBuf,
}

impl Binaries {
    fn from_args(args: &[String]) -> Result<Self> {
        Ok(Self {
            kiln: built(args, "--kiln", "target/release/kiln")?,
            guest: guest(args)?,
        })
    }
}

fn guest(args: &[String]) -> Result<PathBuf> {
    let fallback = "target/guest/x86_64-unknown-linux-gnu/guest/kiln-guest";
    built(args, "--guest", fallback)
}

fn built(args: &[String], flag: &str, fallback: &str) -> Result<PathBuf> {
    let given = args
        .iter()
        .position(|arg| arg == flag)
        .and_then(|at| args.get(at + 1));
    let path = given.map_or_else(|| root().join(fallback), PathBuf::from);
    path.canonicalize()
        .with_context(|| format!("{} is missing: run `make build` first", path.display()))
}
