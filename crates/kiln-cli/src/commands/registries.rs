//! `kiln registries`: which hosts builds may reach for packages, asked of this host and kept in `registries.toml`.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_network::registries::file::{read_text, write_text};
use kiln_network::registries::probe::HostProbe;
use kiln_network::registries::{Discovery, MergeError, Registries, Runtime, discover, merge};
use kiln_worker::home::Home;
use serde::Serialize;

use super::operator::{Operator, registries_path};
use super::table::{Table, left, wide};
use crate::args::RegistriesCommand;
use crate::environment;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::Screen;

pub(super) async fn run(verb: RegistriesCommand, screen: Screen) -> Result<u8> {
    let home = Home::from_env().map_err(|error| CliError::usage(error.to_string()))?;
    match verb {
        RegistriesCommand::Discover { dry_run: true } => {
            let (text, found) = discovered(&registries_path(&home)).await?;
            let registries = Registries::parse(&text).or_infrastructure()?;
            tell(&found.notes, screen);
            screen.data(&registries, || text);
        }
        RegistriesCommand::Discover { dry_run: false } => {
            let registries = discover_and_write(&home, screen).await?;
            let path = registries_path(&home);
            let shown = Shown { path: &path, registries: &registries };
            screen.data(&shown, || format!("{}wrote {}; you may edit it", table(&registries), path.display()));
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
    screen.data(&Shown { path: &path, registries }, || format!("# {}\n{text}", path.display()));
    Ok(())
}

/// Asks this host's package managers, joins the answer with what the operator has, writes `registries.toml`.
///
/// # Errors
/// When the present file is not legal or cannot be written; it is unchanged then.
pub(super) async fn discover_and_write(home: &Home, screen: Screen) -> Result<Registries> {
    let path = registries_path(home);
    let (text, found) = discovered(&path).await?;
    let registries = Registries::parse(&text).or_infrastructure()?;
    let write = path.clone();
    tokio::task::spawn_blocking(move || write_text(&write, &text)).await.or_infrastructure()?.or_infrastructure()?;
    tell(&found.notes, screen);
    for runtime in registries.needing_base() {
        screen.note(&format!(
            "the {} registry is not known: neither settings nor tools of this host name one; write it into {}",
            runtime.name(),
            path.display()
        ));
    }
    Ok(registries)
}

/// The new text of the file, and what was found.
async fn discovered(path: &Path) -> Result<(String, Discovery)> {
    let env: BTreeMap<String, String> = environment::all().into_iter().collect();
    let path = path.to_owned();
    let work = move || -> Result<(String, Discovery)> {
        let existing = read_text(&path).map_err(|error| CliError::usage(chain(&error)))?;
        let found = discover(&HostProbe::new(env), &|_, _| None);
        let text = merge(existing.as_deref(), &found.registries).map_err(|error| merge_error(&error, &path))?;
        Ok((text, found))
    };
    tokio::task::spawn_blocking(work).await.or_infrastructure()?
}

fn merge_error(error: &MergeError, path: &Path) -> CliError {
    CliError::usage(chain(error)).hint(format!("the file is {}", path.display()))
}

fn tell(notes: &[String], screen: Screen) {
    for note in notes {
        screen.note(note);
    }
}

fn table(registries: &Registries) -> String {
    let mut table = Table::new(&[left("RUNTIME"), wide("HOSTS"), left("ASKED OF")]);
    for runtime in Runtime::ALL {
        let Some(section) = registries.runtime.get(&runtime) else { continue };
        let hosts: Vec<String> = section.hosts.iter().map(ToString::to_string).collect();
        let hosts = if hosts.is_empty() { "not known".to_owned() } else { hosts.join(" ") };
        let source: String = section.source.chars().take(28).collect();
        table.row([runtime.name().to_owned(), hosts, source]);
    }
    let mut text = table.render();
    for exception in registries.exception.iter().filter(|exception| exception.allow) {
        text.push_str(&format!("exception: {} may resolve into {}\n", exception.host, exception.range));
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
        let shown = table(&Registries::parse(text).expect("legal"));
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "RUNTIME  HOSTS                   ASKED OF");
        assert!(lines[1].starts_with("node     npm.example.org:80,443") && lines[1].ends_with("npm config"), "{shown}");
        assert_eq!(lines[2], "exception: npm.example.org may resolve into 10.0.0.0/8");
    }
}
