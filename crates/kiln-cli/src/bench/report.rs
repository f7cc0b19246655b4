//! One run's samples: the file they are kept in and the table that is printed.

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;

use kiln_machine::driver::HostProbe;
use kiln_worker::home::Home;
use kiln_worker::host::now_unix_ms;
use serde::Serialize;

use super::series::{Promise, Series, Unit};
use crate::commands::table::{Table, right, wide};
use crate::show::Screen;

/// Version of the file.
const SCHEMA: u32 = 1;

/// What a run has measured so far.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    kiln: &'static str,
    debug_build: bool,
    started_unix_s: u64,
    cpus: usize,
    samples_asked: usize,
    /// What machines ran on, when a benchmark started one itself.
    host: Option<HostProbe>,
    series: Vec<Series>,
    #[serde(skip)]
    path: PathBuf,
}

impl Report {
    /// An empty report with a file of its own.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(super) fn begin(home: &Home, samples: usize) -> io::Result<Self> {
        let dir = super::samples_dir(home);
        fs::create_dir_all(&dir)?;
        let started = now_unix_ms() / 1000;
        let mut number = started;
        // Two runs in one second get two names: each name is claimed by making the file.
        let path = loop {
            let path = dir.join(format!("{number}.json"));
            match fs::File::create_new(&path) {
                Ok(_) => break path,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error),
            }
        };
        let report = Self {
            schema: SCHEMA,
            kiln: env!("CARGO_PKG_VERSION"),
            debug_build: cfg!(debug_assertions),
            started_unix_s: started,
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            samples_asked: samples,
            host: None,
            series: Vec::new(),
            path,
        };
        report.save()?;
        Ok(report)
    }

    /// Notes what machines run on.
    pub(super) fn set_host(&mut self, probe: HostProbe) {
        self.host = Some(probe);
    }

    /// Adds a sample to the series of this name.
    pub(super) fn add(&mut self, name: &str, unit: Unit, promise: Option<Promise>, value: f64) {
        if let Some(series) = self.series.iter_mut().find(|series| series.name == name) {
            series.samples.push(value);
            return;
        }
        self.series.push(Series {
            name: name.to_owned(),
            unit,
            promise,
            samples: vec![value],
        });
    }

    /// Adds a time.
    pub(super) fn time(&mut self, name: &str, promise: Option<Promise>, time: std::time::Duration) {
        self.add(name, Unit::Milliseconds, promise, time.as_secs_f64() * 1e3);
    }

    /// Writes the file, whole.
    ///
    /// # Errors
    /// The filesystem's.
    pub(super) fn save(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        let partial = self.path.with_extension("json.partial");
        let mut file = fs::File::create(&partial)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&partial, &self.path)
    }

    /// Prints the table; with `--json` one object per series.
    pub(super) fn show(&self, screen: Screen) {
        if screen.json() {
            for series in &self.series {
                let value = serde_json::json!({
                    "event": "series", "series": series, "statistics": series.statistics(), "kept": series.kept(),
                });
                screen.data(&value, String::new);
            }
            let value = serde_json::json!({ "event": "samples", "file": self.path });
            screen.data(&value, String::new);
            return;
        }
        let mut table = Table::new(&[
            wide("NAME"),
            right("N"),
            right("P50"),
            right("P95"),
            right("MIN"),
            right("MAX"),
            right("PROMISE"),
        ]);
        for series in &self.series {
            let Some(numbers) = series.statistics() else {
                continue;
            };
            table.row([
                series.name.clone(),
                series.samples.len().to_string(),
                series.unit.text(numbers.p50),
                series.unit.text(numbers.p95),
                series.unit.text(numbers.min),
                series.unit.text(numbers.max),
                series.promise_text(),
            ]);
        }
        if !self.series.is_empty() {
            screen.text(&table.render());
        }
        screen.note(&format!("raw samples: {}", self.path.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_has_its_own_file_with_raw_samples() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::below(dir.path());
        let mut first = Report::begin(&home, 2).unwrap();
        let second = Report::begin(&home, 2).unwrap();
        assert_ne!(first.path, second.path);
        first.add("clone", Unit::Milliseconds, None, 2.5);
        first.add("clone", Unit::Milliseconds, None, 1.5);
        first.save().unwrap();
        let text = fs::read(&first.path).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["series"][0]["samples"], serde_json::json!([2.5, 1.5]));
        assert_eq!(value["schema"], 1);
    }
}
