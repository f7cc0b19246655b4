//! `kiln completions`, `kiln man`: the command line describes itself.

use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Cli;
use crate::error::{OrInfrastructure as _, Result};
use crate::show::Screen;

pub(super) fn completions(shell: Shell, screen: Screen) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kiln", &mut script);
    screen.text(&String::from_utf8_lossy(&script));
    Ok(0)
}

pub(super) fn man(dir: &Path, screen: Screen) -> Result<u8> {
    std::fs::create_dir_all(dir).or_infrastructure()?;
    clap_mangen::generate_to(Cli::command(), dir).or_infrastructure()?;
    screen.note(&format!("wrote man pages to {}", dir.display()));
    Ok(0)
}
