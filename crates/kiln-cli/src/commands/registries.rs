//! `kiln registries`: which hosts builds may reach for packages, asked of this host and kept in `registries.toml`.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_network::registries::file::{read_text, write_text};
use kiln_network::registries::probe::HostProbe;
use kiln_network::registries::{
    Discovery, MergeError, Registries, Runtime, ask_argv, discover, merge,
};
use kiln_worker::ask::ask_base;
use kiln_worker::event::{Event, Events};
use kiln_worker::home::Home;
use serde::Serialize;

use super::operator::{Operator, registries_path};
use super::setup;
use super::table::{Table, left, wide};
use crate::args::RegistriesCommand;
use crate::environment;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::{Screen, ShownPath as _};

pub(super) async fn run(verb: RegistriesCommand, screen: Screen) -> Result<u8> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    match verb {
        RegistriesCommand::Discover { dry_run: true } => {
            let (text, found) = discovered(&registries_path(&home), Answers::new()).await?;
            let registries = Registries::parse(&text).or_infrastructure()?;
            tell(&found.notes, screen);
            screen.data(&registries, || text);
        }
        RegistriesCommand::Discover { dry_run: false } => {
            let mut registries = discover_and_write(&home, Some(screen)).await?;
            if !registries.needing_base().is_empty() {
                let (events, receiver) = Events::channel();
                let follow = tokio::spawn(screen.follow(receiver));
                let asked = ask_bases(&Operator::load()?, &events).await;
                drop(events);
                let _screen_ended = follow.await;
                match asked {
                    Ok(asked) => registries = asked,
                    Err(error) => {
                        screen.note(&format!("base images cannot be asked: {}", error.message))
                    }
                }
                tell_unknown(&registries, &registries_path(&home), screen);
            }
            let path = registries_path(&home);
            let shown = Shown {
                path: &path,
                registries: &registries,
            };
            screen.data(&shown, || {
                format!(
                    "{}wrote {}; you may edit it",
                    table(&registries, screen.width()),
                    path.shown()
                )
            });
        }
        RegistriesCommand::Show => show(screen)?,
    }
    Ok(0)
}

#[derive(Serialize)]
struct Shown<'a> {
    path: &'a Path,
    #[serde(flatten)]
    registries: &'a Registries,
}

fn show(screen: Screen) -> Result<()> {
    let operator = Operator::load()?;
    let path = registries_path(&operator.home);
    let Some(registries) = &operator.registries else {
        screen.note("no registries.toml yet; `kiln registries discover` makes one");
        return Ok(());
    };
    // Its own text, so that the operator sees the comments too.
    let text = read_text(&path).or_infrastructure()?.unwrap_or_default();
    screen.data(
        &Shown {
            path: &path,
            registries,
        },
        || format!("# {}\n{text}", path.shown()),
    );
    Ok(())
}

/// What tools in base images answered, by runtime.
type Answers = BTreeMap<Runtime, String>;

/// Asks this host's package managers, joins the answer with what the operator has, writes `registries.toml`. Runtimes that
/// nothing on this host knows stay open: see [`ask_bases`]; with a screen they are told.
///
/// # Errors
/// When the present file is not legal or cannot be written; it is unchanged then.
pub(super) async fn discover_and_write(home: &Home, screen: Option<Screen>) -> Result<Registries> {
    let (registries, notes) = write_discovered(home, Answers::new()).await?;
    if let Some(screen) = screen {
        tell(&notes, screen);
    }
    Ok(registries)
}

/// Asks the tools in the base images about runtimes that nothing on this host knows, and writes `registries.toml` again. Each
/// question is a step in a machine that reaches nothing.
///
/// # Errors
/// As [`discover_and_write`]; a base that cannot be asked is only told.
pub(super) async fn ask_bases(operator: &Operator, events: &Events) -> Result<Registries> {
    let Some(registries) = &operator.registries else {
        return Err(CliError::usage("there is no registries.toml yet")
            .hint("run `kiln registries discover`"));
    };
    let bases = operator.bases()?;
    let (host, access) = (operator.host().await?, operator.registry().await?);
    let (_, size) = setup::sizes(operator)?;
    let mut answers = Answers::new();
    for runtime in registries.needing_base() {
        let of = bases
            .bases
            .iter()
            .filter(|base| base.build.digest.is_some());
        // Every build base has apt.
        let mut of = of.filter(|base| runtime == Runtime::Debian || base.name == runtime.name());
        let Some(base) = of.next() else { continue };
        events
            .tell(Event::Progress {
                what: format!("asking the {} base which registry it uses", base.name),
                detail: String::new(),
            })
            .await;
        match ask_base(&host, &access, &base.build, ask_argv(runtime), size, events).await {
            Ok(answer) => drop(answers.insert(runtime, answer)),
            Err(failure) => events.warn(failure.to_string()).await,
        }
    }
    let (registries, notes) = write_discovered(&operator.home, answers).await?;
    for note in notes {
        events.note(note).await;
    }
    Ok(registries)
}

async fn write_discovered(home: &Home, answers: Answers) -> Result<(Registries, Vec<String>)> {
    let path = registries_path(home);
    let (text, found) = discovered(&path, answers).await?;
    let registries = Registries::parse(&text).or_infrastructure()?;
    tokio::task::spawn_blocking(move || write_text(&path, &text))
        .await
        .or_infrastructure()?
        .or_infrastructure()?;
    Ok((registries, found.notes))
}

/// The new text of the file, and what was found.
async fn discovered(path: &Path, answers: Answers) -> Result<(String, Discovery)> {
    let env: BTreeMap<String, String> = environment::all().into_iter().collect();
    let path = path.to_owned();
    let work = move || -> Result<(String, Discovery)> {
        let existing = read_text(&path).map_err(|error| CliError::usage(chain(&error)))?;
        let found = discover(&HostProbe::new(env), &|runtime, _| {
            answers.get(&runtime).cloned()
        });
        let text = merge(existing.as_deref(), &found.registries)
            .map_err(|error| merge_error(&error, &path))?;
        Ok((text, found))
    };
    tokio::task::spawn_blocking(work)
        .await
        .or_infrastructure()?
}

fn tell_unknown(registries: &Registries, path: &Path, screen: Screen) {
    for runtime in registries.needing_base() {
        screen.note(&format!(
            "the {} registry is not known: neither this host nor a base image names one; write it into {}",
            runtime.name(),
            path.shown()
        ));
    }
}

fn merge_error(error: &MergeError, path: &Path) -> CliError {
    CliError::usage(chain(error)).hint(format!("the file is {}", path.shown()))
}

fn tell(notes: &[String], screen: Screen) {
    for note in notes {
        screen.note(note);
    }
}

fn table(registries: &Registries, width: Option<usize>) -> String {
    let mut table = Table::new(&[left("RUNTIME"), wide("HOSTS"), left("ASKED OF")]).within(width);
    for runtime in Runtime::ALL {
        let Some(section) = registries.runtime.get(&runtime) else {
            continue;
        };
        let hosts: Vec<String> = section.hosts.iter().map(ToString::to_string).collect();
        let hosts = if hosts.is_empty() {
            "not known".to_owned()
        } else {
            hosts.join(" ")
        };
        let mut source: String = section.source.chars().take(28).collect();
        if source.len() < section.source.len() {
            source.push('…');
        }
        table.row([runtime.name().to_owned(), hosts, source]);
    }
    let mut text = table.render();
    for exception in registries
        .exception
        .iter()
        .filter(|exception| exception.allow)
    {
        text.push_str(&format!(
            "exception: {} may resolve into {}\n",
            exception.host, exception.range
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_hosts_and_who_said_so() {
        let text = "version = 1\n[runtime.node]\nindex = \"https://npm.example.org/\"\nhosts = [\"npm.example.org\"]\nsource = \"npm config\"\n\
                    [[exception]]\nhost = \"npm.example.org\"\nrange = \"10.0.0.0/8\"\n";
        let shown = table(&Registries::parse(text).expect("legal"), Some(80));
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "RUNTIME  HOSTS                   ASKED OF");
        assert!(
            lines[1].starts_with("node     npm.example.org:80,443")
                && lines[1].ends_with("npm config"),
            "{shown}"
        );
        assert_eq!(
            lines[2],
            "exception: npm.example.org may resolve into 10.0.0.0/8"
        );
    }
}
