//! Benchmarks behind `kiln bench`: the numbers of PROMISES.md, measured side by side in one run on this host.
//!
//! Every raw sample is kept in `<data>/bench/<unix time>.json`; the table is only a view of it. Nothing is warmed up in secret and no sample
//! is dropped. Builds run as the user's own tenant, so its build cache moves on; their images are removed again. Read next:
//! [`series`] (samples and promises), [`machines`] (clone, cold, many), [`room`], [`egress`], [`builds`] (run, build), [`registry`], [`bake`]; of a controller:
//! [`decisions`] (decision, claims), [`queue`] (serve, lease, dead, soak), [`beside`] (cancel, through).

mod bake;
mod beside;
mod builds;
mod child;
mod decisions;
mod egress;
mod machines;
mod postgres;
mod queue;
mod registry;
mod report;
mod room;
mod series;
mod serving;
mod stand_in;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_core::FailureClass;
use kiln_worker::home::Home;
use tokio_util::sync::CancellationToken;

use crate::args::BenchArgs;
use crate::commands::operator::Operator;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;
use report::Report;

/// A benchmark by the name a person gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Name {
    Clone,
    Cold,
    Run,
    Many,
    Room,
    Egress,
    Build,
    Registry,
    Bake,
    Decision,
    Claims,
    Serve,
    Lease,
    Dead,
    Cancel,
    Through,
    Soak,
}

impl Name {
    const ALL: [(Self, &str); 17] = [
        (Self::Clone, "clone"),
        (Self::Cold, "cold"),
        (Self::Run, "run"),
        (Self::Many, "many"),
        (Self::Room, "room"),
        (Self::Egress, "egress"),
        (Self::Build, "build"),
        (Self::Registry, "registry"),
        (Self::Bake, "bake"),
        (Self::Decision, "decision"),
        (Self::Claims, "claims"),
        (Self::Serve, "serve"),
        (Self::Lease, "lease"),
        (Self::Dead, "dead"),
        (Self::Cancel, "cancel"),
        (Self::Through, "through"),
        (Self::Soak, "soak"),
    ];

    fn parse(word: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .find(|(_, name)| *name == word)
            .map(|(name, _)| *name)
            .ok_or_else(|| {
                let names: Vec<&str> = Self::ALL.iter().map(|(_, name)| *name).collect();
                CliError::usage(format!("there is no benchmark {word:?}"))
                    .hint(format!("there are {}", names.join(", ")))
            })
    }

    fn chosen(words: &[String]) -> Result<Vec<Self>> {
        if words.is_empty() {
            return Ok(Self::ALL.iter().map(|(name, _)| *name).collect());
        }
        words.iter().map(|word| Self::parse(word)).collect()
    }
}

/// What every benchmark gets.
#[derive(Debug)]
struct Bench<'a> {
    operator: &'a Operator,
    samples: usize,
    /// What `bake` bakes.
    recipe: &'a Path,
    /// The guest that `bake` puts into its image; else the one beside this program.
    guest: Option<&'a Path>,
    /// How long `soak` goes on for each database.
    soak: Duration,
    work: &'a Path,
    screen: Screen,
    cancel: &'a CancellationToken,
}

impl Bench<'_> {
    /// The future's result, or the error of a cancelled command. Dropping the future kills what it started.
    async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(cancelled()),
            done = work => done,
        }
    }
}

fn cancelled() -> CliError {
    CliError::new(
        FailureClass::Cancelled,
        "cancelled; the samples so far are kept",
    )
}

/// Runs the named benchmarks.
///
/// # Errors
/// When one cannot be set up or fails; what was measured before is kept and shown.
pub(crate) async fn run(
    args: &BenchArgs,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<u8> {
    let names = Name::chosen(&args.names)?;
    if args.samples == 0 {
        return Err(CliError::usage("--samples 0: at least 1"));
    }
    let operator = Operator::load()?;
    operator.home.prepare().or_infrastructure()?;
    let work = Work::make(&operator.home)?;
    let mut report = Report::begin(&operator.home, args.samples).or_infrastructure()?;
    let bench = Bench {
        operator: &operator,
        samples: args.samples,
        recipe: &args.recipe,
        guest: args.guest.as_deref(),
        soak: Duration::from_secs(args.soak),
        work: &work.dir,
        screen,
        cancel,
    };
    if cfg!(debug_assertions) {
        screen.note("this kiln is a debug build: it is slower than a release build");
    }
    let done = all(&bench, &names, &mut report).await;
    report.save().or_infrastructure()?;
    report.show(screen);
    done.map(|()| 0)
}

async fn all(bench: &Bench<'_>, names: &[Name], report: &mut Report) -> Result<()> {
    let (clone, cold) = (names.contains(&Name::Clone), names.contains(&Name::Cold));
    if clone || cold {
        machines::starts(bench, clone, cold, report).await?;
        report.save().or_infrastructure()?;
    }
    for (name, _) in Name::ALL.iter().filter(|(name, _)| names.contains(name)) {
        match name {
            Name::Clone | Name::Cold => continue,
            Name::Run => builds::run(bench, report).await?,
            Name::Many => machines::many(bench, report).await?,
            Name::Room => {
                machines::first_bytes(bench, report).await?;
                room::room(bench, report).await?;
            }
            Name::Egress => egress::egress(bench, report).await?,
            Name::Build => builds::build(bench, report).await?,
            Name::Registry => registry::registry(bench, report).await?,
            Name::Bake => bake::from_nothing(bench, report).await?,
            Name::Decision => decisions::decision(bench, report)?,
            Name::Claims => decisions::claims(bench, report).await?,
            Name::Serve => queue::serve(bench, report).await?,
            Name::Lease => queue::lease(bench, report).await?,
            Name::Dead => queue::dead(bench, report).await?,
            Name::Cancel => beside::cancel(bench, report).await?,
            Name::Through => beside::through(bench, report).await?,
            Name::Soak => queue::soak(bench, report).await?,
        }
        report.save().or_infrastructure()?;
    }
    Ok(())
}

/// Where the raw samples of all runs are.
fn samples_dir(home: &Home) -> PathBuf {
    home.data.join("bench")
}

/// A directory of this process, removed at the end; one whose process was killed is removed by the next run.
#[derive(Debug)]
struct Work {
    dir: PathBuf,
}

impl Work {
    const PREFIX: &str = "work-";

    fn make(home: &Home) -> Result<Self> {
        let root = samples_dir(home);
        std::fs::create_dir_all(&root).or_infrastructure()?;
        for entry in std::fs::read_dir(&root).or_infrastructure()? {
            let entry = entry.or_infrastructure()?;
            let name = entry.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.strip_prefix(Self::PREFIX));
            let dead =
                |pid: &str| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists();
            if owner.is_some_and(dead) {
                std::fs::remove_dir_all(entry.path()).or_infrastructure()?;
            }
        }
        let dir = root.join(format!("{}{}", Self::PREFIX, std::process::id()));
        std::fs::create_dir_all(&dir).or_infrastructure()?;
        Ok(Self { dir })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What stays is removed by the next run, see `make`.
        let _stays = std::fs::remove_dir_all(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_none_means_all() {
        assert_eq!(Name::chosen(&[]).unwrap().len(), Name::ALL.len());
        let one = Name::chosen(&["many".to_owned()]).unwrap();
        assert_eq!(one, [Name::Many]);
        let error = Name::chosen(&["cloen".to_owned()]).unwrap_err();
        assert_eq!(error.class, FailureClass::Usage);
        assert!(error.hints[0].contains("registry"));
    }
}
