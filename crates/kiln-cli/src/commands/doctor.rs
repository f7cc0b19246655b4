//! `kiln doctor`: what this host offers, what is ready, and how to mend what is missing. With `--scrub` everything stored is read
//! again.
//!
//! Read next: `doctor::host` (the computer), `doctor::ready` (what set-up made), `doctor::reach` (package registries), `doctor::git` (credentials of repositories), `doctor::rights` (who may do what),
//! `doctor::scrub`.

mod git;
mod host;
mod reach;
mod ready;
mod rights;
mod scrub;

use kiln_machine::driver::{Check, CheckLevel};
use kiln_worker::home::Home;

use super::operator::Operator;
use super::table::{WIDTH, wrap};
use crate::args::DoctorArgs;
use crate::config::Config;
use crate::error::{CliError, Result, chain};
use crate::show::{Screen, ShownPath as _, printable};

/// Exit code when something does not work.
const NOT_WELL: u8 = 3;
/// Column where what was found begins.
const FOUND_AT: usize = 24;

pub(super) async fn run(args: &DoctorArgs, screen: Screen) -> Result<u8> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    let mut report = Report {
        screen,
        worst: CheckLevel::Pass,
        counts: [0; 3],
    };
    let (operator, check) = settings(&home);
    report.add(&check);
    let prepared = home.prepare();
    report.add(&match &prepared {
        Ok(()) => pass("home", home.data.shown()),
        Err(error) => fail(
            "home",
            chain(error),
            "make the directory writable, or set KILN_HOME to another",
        ),
    });
    report.all(rights::checks(&home));
    if prepared.is_ok() {
        report.all(host::machines(&home).await);
    }
    report.all(host::computer(&home).await);
    report.all(host::tools());
    report.all(ready::checks(&operator).await);
    report.all(reach::checks(&operator).await);
    report.all(git::checks(&home).await);
    if args.scrub && prepared.is_ok() {
        scrub::run(&operator, &mut report).await;
    }
    let [well, warnings, failures] = report.counts;
    screen.note(&format!(
        "{well} well, {warnings} could be better, {failures} must be mended"
    ));
    Ok(if report.worst == CheckLevel::Fail {
        NOT_WELL
    } else {
        0
    })
}

/// The operator's files; defaults where one is wrong, and the words for it.
fn settings(home: &Home) -> (Operator, Check) {
    match Operator::load() {
        Ok(operator) => {
            let found = format!("{} is in order", home.config.shown());
            (operator, pass("settings", found))
        }
        Err(error) => {
            let operator = Operator {
                home: home.clone(),
                config: Config::default(),
                registries: None,
            };
            (
                operator,
                // As the verbs that need the file say it.
                fail("settings", error.message, settings_hint(&error.hints)),
            )
        }
    }
}

fn settings_hint(hints: &[String]) -> String {
    match hints.is_empty() {
        true => "correct the file, or move it away".to_owned(),
        false => hints.join("; "),
    }
}

/// Shows checks as they are made, and remembers the worst.
struct Report {
    screen: Screen,
    worst: CheckLevel,
    counts: [u32; 3],
}

impl Report {
    fn add(&mut self, check: &Check) {
        self.screen.data(check, || line(check));
        self.worst = self.worst.max(check.level);
        self.counts[check.level as usize] += 1;
    }

    fn all(&mut self, checks: Vec<Check>) {
        for check in checks {
            self.add(&check);
        }
    }
}

fn pass(name: &str, found: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        level: CheckLevel::Pass,
        found: found.into(),
        hint: None,
    }
}

fn warn(name: &str, found: impl Into<String>, hint: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        level: CheckLevel::Warn,
        found: found.into(),
        hint: Some(hint.into()),
    }
}

fn fail(name: &str, found: impl Into<String>, hint: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        level: CheckLevel::Fail,
        found: found.into(),
        hint: Some(hint.into()),
    }
}

/// One check as text: what was found, and below it what to do.
fn line(check: &Check) -> String {
    let word = match check.level {
        CheckLevel::Pass => "ok",
        CheckLevel::Warn => "warn",
        CheckLevel::Fail => "FAIL",
    };
    let mut start = format!("{word:<5} {:<17} ", printable(&check.name));
    let mut text = String::new();
    let width = WIDTH - FOUND_AT;
    let hint = check
        .hint
        .iter()
        .flat_map(|hint| wrap(&format!("-> {}", printable(hint)), width));
    for part in wrap(&printable(&check.found), width)
        .into_iter()
        .chain(hint)
    {
        text.push_str(&format!("{start:<FOUND_AT$}{part}\n"));
        start.clear();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_wrap_and_hints_stand_below() {
        let check = warn(
            "accelerator",
            "KVM is there but does not boot guests, so emulation is used",
            "use another host",
        );
        let want = "\
warn  accelerator       KVM is there but does not boot guests, so emulation is
                        used
                        -> use another host
";
        assert_eq!(line(&check), want);
        assert_eq!(
            line(&pass("qemu", "10.0.2")),
            "ok    qemu              10.0.2\n"
        );
    }

    #[test]
    fn the_worst_check_decides() {
        let mut report = Report {
            screen: Screen::new(true),
            worst: CheckLevel::Pass,
            counts: [0; 3],
        };
        report.all(vec![warn("a", "b", "c"), pass("d", "e")]);
        assert_eq!(report.worst, CheckLevel::Warn);
        report.add(&fail("f", "g", "h"));
        report.add(&pass("i", "j"));
        assert_eq!((report.worst, report.counts), (CheckLevel::Fail, [2, 1, 1]));
    }
}
