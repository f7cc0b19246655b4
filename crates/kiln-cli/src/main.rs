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
use kiln_telemetry::LogFormat;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
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
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            screen.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
