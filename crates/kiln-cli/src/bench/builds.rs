//! Benchmarks of whole commands: `kiln run -- true`, and builds of the two example apps.
//!
//! A *first* build is made with `--no-cache`: the bases are there, nothing of the app is. An unmeasured build of another line then fills the cache; after it
//! one line of the source changes (*changed*), nothing does (*unchanged*: the host knows it by its hash), nothing but a build argument that no step
//! reads (*all cached*: a machine finds every step in its cache), and one line again after `kiln template prepare` (*changed, ready*).
//! The last build gets a Dockerfile with a RUN step of its own, for the time from submission to it when the head's template is ready.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_worker::host::now_unix_ms;
use serde::Deserialize;

use super::report::Report;
use super::series::{Promise, Unit};
use super::{Bench, child};
use crate::error::{OrInfrastructure as _, Result};

/// One file of an app: its name and text.
type SourceFile = (&'static str, &'static str);

/// An example app.
struct App {
    /// In the table and as the image's name.
    name: &'static str,
    files: &'static [SourceFile],
    /// The file that gets another line.
    source: &'static str,
    /// What begins a comment in it.
    comment: &'static str,
    /// Most bytes of its compressed image.
    image_max: f64,
    /// A public name of its runtime's base.
    base: &'static str,
}

/// The examples of this repository, as they were when kiln was compiled.
const APPS: [App; 2] = [
    App {
        name: "node",
        files: &[
            (
                "package.json",
                include_str!("../../../../examples/node-express/package.json"),
            ),
            (
                "package-lock.json",
                include_str!("../../../../examples/node-express/package-lock.json"),
            ),
            (
                "server.js",
                include_str!("../../../../examples/node-express/server.js"),
            ),
        ],
        source: "server.js",
        comment: "//",
        image_max: 70e6,
        base: "node:20",
    },
    App {
        name: "python",
        files: &[
            (
                ".python-version",
                include_str!("../../../../examples/python-flask/.python-version"),
            ),
            (
                "requirements.txt",
                include_str!("../../../../examples/python-flask/requirements.txt"),
            ),
            (
                "app.py",
                include_str!("../../../../examples/python-flask/app.py"),
            ),
        ],
        source: "app.py",
        comment: "#",
        image_max: 50e6,
        base: "python:3.13",
    },
];

/// `run`: `kiln run -- true`, process start to process end.
pub(super) async fn run(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    for _ in 0..bench.samples {
        let took =
            child::kiln(bench, &["run", "--no-source", "--", "true"].map(OsStr::new)).await?;
        report.time("kiln run -- true", Some(Promise::MedianAtMost(500.0)), took);
    }
    Ok(())
}

/// `build`: each app from nothing, changed and unchanged.
pub(super) async fn build(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let mut done = Ok(());
    'all: for sample in 0..bench.samples {
        for app in &APPS {
            bench.screen.note(&format!(
                "builds of {}: sample {} of {}",
                app.name,
                sample + 1,
                bench.samples
            ));
            done = Building::new(bench, app)?.sample(report).await;
            if done.is_err() {
                break 'all;
            }
        }
    }
    if bench.cancel.is_cancelled() {
        return done;
    }
    for app in &APPS {
        let image = image(app);
        let removed = child::kiln(bench, &["registry", "rm", &image].map(OsStr::new)).await;
        if let (Err(error), Ok(())) = (removed, &done) {
            bench
                .screen
                .note(&format!("the image {image} stays: {error}"));
        }
    }
    done
}

fn image(app: &App) -> String {
    format!("kiln-bench-{}:latest", app.name)
}

/// What `kiln build --result` says, as far as it is needed here.
#[derive(Deserialize)]
struct Built {
    size: u64,
    buildkit_seconds: f64,
    first_run_ms: Option<u64>,
}

/// An app's folder while it is measured.
struct Building<'a> {
    bench: &'a Bench<'a>,
    app: &'a App,
    dir: PathBuf,
}

impl<'a> Building<'a> {
    fn new(bench: &'a Bench<'a>, app: &'a App) -> Result<Self> {
        let dir = bench.work.join(app.name);
        fs::create_dir_all(&dir).or_infrastructure()?;
        for (name, text) in app.files {
            fs::write(dir.join(name), text).or_infrastructure()?;
        }
        Ok(Self { bench, app, dir })
    }

    async fn sample(&self, report: &mut Report) -> Result<()> {
        let most = |seconds: f64| Some(Promise::MedianAtMost(seconds * 1e3));
        // Never the same source as in an earlier run, whose result may still be in the cache.
        self.change()?;
        let first = self
            .build(report, "first", most(45.0), &["--no-cache"])
            .await?;
        if let Some(ms) = first.first_run_ms {
            let name = format!("{}: to first RUN", self.app.name);
            report.time(&name, most(1.5), Duration::from_millis(ms));
        }
        let name = format!("{}: image", self.app.name);
        let promise = Some(Promise::EachAtMost(self.app.image_max));
        #[expect(clippy::cast_precision_loss, reason = "an image's bytes fit a double")]
        report.add(&name, Unit::Bytes, promise, first.size as f64);
        // The first build's result is known to the host; another line makes this one start a machine and keep its cache.
        self.change()?;
        self.command(&[]).await?;
        self.change()?;
        self.build(report, "changed", most(6.0), &[]).await?;
        let again = self.command(&[]).await?;
        report.time(&format!("{}: unchanged", self.app.name), most(2.0), again);
        let unread = format!("--build-arg=KILN_BENCH_{}=1", now_unix_ms());
        self.build(report, "all cached", most(4.0), &[&unread])
            .await?;
        self.prepare_template().await?;
        self.change()?;
        self.build(report, "changed, ready", most(3.0), &[]).await?;
        self.prepare_template().await?;
        self.run_step(report).await
    }

    async fn prepare_template(&self) -> Result<()> {
        child::kiln(self.bench, &["template", "prepare"].map(OsStr::new)).await?;
        Ok(())
    }

    /// From submission to a RUN step that no cache holds, with the head's template ready.
    async fn run_step(&self, report: &mut Report) -> Result<()> {
        let dockerfile = self.dir.join("Dockerfile");
        let text = format!("FROM {}\nRUN echo {}\n", self.app.base, now_unix_ms());
        fs::write(&dockerfile, text).or_infrastructure()?;
        let done = self.command(&[]).await;
        // The next sample is planned from the app's own files again.
        fs::remove_file(&dockerfile).or_infrastructure()?;
        done?;
        if let Some(ms) = self.built()?.first_run_ms {
            let name = format!("{}: to first RUN, ready", self.app.name);
            let promise = Some(Promise::MedianAtMost(500.0));
            report.time(&name, promise, Duration::from_millis(ms));
        }
        Ok(())
    }

    fn built(&self) -> Result<Built> {
        let text = fs::read(self.result()).or_infrastructure()?;
        serde_json::from_slice(&text).or_infrastructure()
    }

    /// Another comment line at the end of the source.
    fn change(&self) -> Result<()> {
        let (source, comment) = (self.app.source, self.app.comment);
        let text = self
            .app
            .files
            .iter()
            .find(|(name, _)| *name == source)
            .map_or("", |(_, text)| text);
        let text = format!("{text}\n{comment} {}\n", now_unix_ms());
        fs::write(self.dir.join(source), text).or_infrastructure()
    }

    async fn build(
        &self,
        report: &mut Report,
        what: &str,
        promise: Option<Promise>,
        options: &[&str],
    ) -> Result<Built> {
        let took = self.command(options).await?;
        report.time(&format!("{}: {what}", self.app.name), promise, took);
        let built = self.built()?;
        let beyond = (took.as_secs_f64() - 1.3 * built.buildkit_seconds) * 1e3;
        let promise = Some(Promise::MedianAtMost(1500.0));
        report.add("over 1.3 x BuildKit", Unit::Milliseconds, promise, beyond);
        Ok(built)
    }

    fn result(&self) -> PathBuf {
        self.bench.work.join(format!("{}.json", self.app.name))
    }

    async fn command(&self, options: &[&str]) -> Result<Duration> {
        let (image, result) = (image(self.app), self.result());
        let path: &Path = &self.dir;
        let mut words = vec![
            OsStr::new("build"),
            path.as_os_str(),
            OsStr::new("--tag"),
            OsStr::new(&image),
            OsStr::new("--result"),
            result.as_os_str(),
        ];
        words.extend(options.iter().map(OsStr::new));
        child::kiln(self.bench, &words).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_app_is_whole_and_has_the_file_that_changes() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
        for (app, folder) in APPS.iter().zip(["node-express", "python-flask"]) {
            assert!(app.files.iter().any(|(name, _)| *name == app.source));
            let mut there: Vec<String> = fs::read_dir(examples.join(folder))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name != ".gitignore")
                .collect();
            there.sort();
            let mut ours: Vec<&str> = app.files.iter().map(|(name, _)| *name).collect();
            ours.sort_unstable();
            assert_eq!(there, ours, "files of {folder}");
        }
    }
}
