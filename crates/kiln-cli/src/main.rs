//! The `kiln` command: parses words, runs one verb, shows the result, and ends with the exit code that says whose fault it was.

mod args;
mod bench;
mod commands;
mod config;
mod environment;
mod error;
mod interrupt;
mod show;
mod terminal;

use std::process::ExitCode;

use clap::Parser as _;
use clap::error::{ContextKind, ContextValue};
use kiln_telemetry::LogFormat;

fn main() -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refused_words(&error),
    };
    let screen = show::Screen::new(cli.json);
    let format = if cli.json {
        LogFormat::Json
    } else {
        LogFormat::Text
    };
    kiln_telemetry::init_logs(format, cli.verbose);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            screen.error(&error::CliError::infrastructure(&error));
            return ExitCode::from(3);
        }
    };
    let result = runtime.block_on(async {
        let cancel = interrupt::watch(screen);
        commands::run(cli.command, screen, cancel).await
    });
    // Blocking reads of standard input cannot be cancelled; they must not keep a finished command alive.
    runtime.shutdown_background();
    match result {
        Ok(code) => match show::lost_output() {
            Some(lost) if code == 0 => {
                let error = lost_output(lost);
                screen.error(&error);
                ExitCode::from(error.exit_code())
            }
            _ => ExitCode::from(code),
        },
        Err(error) => {
            screen.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

fn lost_output(error: &std::io::Error) -> error::CliError {
    let message = format!("the output could not be written: {error}");
    error::CliError::new(kiln_core::FailureClass::Infrastructure, message)
}

/// What clap says of words it does not know, and the usual mistake: `kiln run npm test` means `kiln run -- npm test`.
fn refused_words(error: &clap::Error) -> ExitCode {
    // Whoever closed the output does not want to read it.
    let _written = error.print();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let run = words.iter().position(|word| word == "run");
    if error.kind() == clap::error::ErrorKind::UnknownArgument
        && let Some(at) = run
        && let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg)
        && !unknown.starts_with('-')
        && let Some(command) = words.iter().position(|word| word == unknown)
        && command > at
    {
        let (before, after) = words.split_at(command);
        let words = format!("kiln {} -- {}", before.join(" "), after.join(" "));
        show::Screen::new(false).note(&format!("hint: put `--` before the command: {words}"));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}
