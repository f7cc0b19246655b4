//! `kiln completions`, `kiln man`: the command line describes itself.

use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Cli;
use crate::error::{OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

pub(super) fn completions(shell: Shell, screen: Screen) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kiln", &mut script);
    screen.text(&String::from_utf8_lossy(&script));
    Ok(0)
}

/// Writes the page of a command and of those below it. The synopsis is the usage line of the help text, with the names of values.
fn pages(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
    for below in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        pages(below, dir)?;
    }
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let source = format!("kiln {}", env!("CARGO_PKG_VERSION"));
    clap_mangen::Man::new(command.clone().override_usage(usage))
        .source(source)
        .generate_to(dir)
        .map(drop)
}

pub(super) fn man(dir: &Path, screen: Screen) -> Result<u8> {
    std::fs::create_dir_all(dir).or_infrastructure()?;
    let mut all = Cli::command();
    all.build();
    pages(&all, dir).or_infrastructure()?;
    screen.note(&format!("wrote man pages to {}", dir.shown()));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synopsis_is_the_usage_line() {
        let dir = tempfile::tempdir().expect("temp dir");
        man(dir.path(), Screen::new(true)).expect("pages");
        for (page, line) in [
            ("kiln.1", "\\fBkiln\\fR [OPTIONS] <COMMAND>"),
            ("kiln-build.1", "\\fBkiln build\\fR [OPTIONS] [SOURCE]"),
            (
                "kiln-run.1",
                "\\fBkiln run\\fR [OPTIONS] [\\-\\- <COMMAND>...]",
            ),
            ("kiln-job-logs.1", "\\fBkiln job logs\\fR [OPTIONS] [ID]"),
            (
                "kiln-registry-rm.1",
                "\\fBkiln registry rm\\fR [OPTIONS] <NAME[:TAG]>...",
            ),
        ] {
            let text = std::fs::read_to_string(dir.path().join(page)).expect(page);
            let mut lines = text.lines().skip_while(|one| *one != ".SH SYNOPSIS");
            assert_eq!(lines.nth(1), Some(line), "{page}");
        }
    }
}
