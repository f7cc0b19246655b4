//! The `kiln` command: parses words, runs one verb, shows the result, and ends with the exit code that says whose fault it was.

mod args;
mod bench;
mod commands;
mod config;
mod core_files;
mod environment;
mod error;
mod interrupt;
mod neutral;
mod open_files;
mod policy_file;
mod printed;
mod server;
mod show;
mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory as _, Parser as _};
use kiln_telemetry::LogFormat;

fn main() -> ExitCode {
    let words = helped(std::env::args_os().collect());
    let cli = match args::Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => return refused_words(&error),
    };
    let screen = show::Screen::new(cli.json);
    if let Err(error) = open_files::raise() {
        screen.error(&error);
        return ExitCode::from(error.exit_code());
    }
    core_files::forgo();
    let format = if cli.json {
        LogFormat::Json
    } else {
        LogFormat::Text
    };
    kiln_telemetry::init_logs(format, cli.command.kind(), cli.verbose);
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        usual(panic);
    }));
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
        let cancel = interrupt::watch(screen, cli.command.interrupted());
        commands::run(cli.command, &cli.server, screen, cancel).await
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

/// `kiln help VERB` and `kiln VERB help SUBVERB` mean `--help` of that verb.
fn helped(words: Vec<OsString>) -> Vec<OsString> {
    let group = |verb: &OsString| {
        let known = verb.to_str().and_then(|verb| {
            let cli = args::Cli::command();
            cli.find_subcommand(verb)
                .map(clap::Command::has_subcommands)
        });
        known == Some(true)
    };
    let at = match words.as_slice() {
        [_, first, ..] if first == "help" => 1,
        [_, verb, second, ..] if second == "help" && group(verb) => 2,
        _ => return words,
    };
    let mut words = words;
    words.remove(at);
    words.push("--help".into());
    words
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
        let hint = hint(words.split_at(command));
        show::Screen::new(false).note(&kiln_image::plan::shown(&format!("hint: {hint}")));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// What was meant where the first of `after` is a word that `kiln run` does not know.
fn hint((before, after): (&[String], &[String])) -> String {
    let unknown = after.first().map(String::as_str).unwrap_or_default();
    if let Some((keep, before)) = before.split_last()
        && keep == "--keep"
        && args::machines::parse_stays(unknown).is_ok()
    {
        let keep = format!("--keep={unknown}");
        let words = [&["kiln".to_owned()], before, &[keep], &after[1..]].concat();
        return format!("a time follows `=`: {}", words.join(" "));
    }
    if std::path::Path::new(unknown).is_dir() {
        return format!(
            "{unknown:?} is a folder: `kiln build {unknown} --tag app`, then `kiln run --image app`"
        );
    }
    let words = format!("kiln {} -- {}", before.join(" "), after.join(" "));
    format!("put `--` before the command: {words}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_too_many_is_a_command_or_a_time() {
        let of = |text: &str, at: usize| {
            let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
            hint(words.split_at(at))
        };
        assert_eq!(
            of("run --keep 5m -- true", 2),
            "a time follows `=`: kiln run --keep=5m -- true"
        );
        assert_eq!(
            of("run --keep npm test", 2),
            "put `--` before the command: kiln run --keep -- npm test"
        );
        assert!(of("run /", 1).contains("is a folder"));
    }

    #[test]
    fn help_is_a_word_too() {
        let of = |text: &str| {
            let words = text.split(' ').map(OsString::from).collect();
            helped(words)
                .join(" ".as_ref())
                .into_string()
                .expect("UTF-8")
        };
        for (given, meant) in [
            ("kiln help", "kiln --help"),
            ("kiln help run", "kiln run --help"),
            ("kiln help job list", "kiln job list --help"),
            ("kiln job help list", "kiln job list --help"),
            ("kiln job help", "kiln job --help"),
            ("kiln build help", "kiln build help"),
            ("kiln run -- help", "kiln run -- help"),
            ("kiln", "kiln"),
        ] {
            assert_eq!(of(given), meant);
        }
    }
}
