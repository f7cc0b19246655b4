//! `kiln bases`: which images a `FROM` may mean, the runtime bases made here, and those pulled from other registries.

mod pull;

use std::fs;
use std::io;
use std::path::Path;

use kiln_core::ImageRef;
use kiln_image::bake::Updates;
use kiln_image::bases::{Base, Bases, PinnedImage, is_own};
use kiln_worker::event::Events;
use kiln_worker::setup::{generated_bases, operator_bases};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::replace::replace;
use super::setup;
use super::table::{Table, left, wide};
use crate::args::BasesCommand;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::{Screen, ShownPath as _};

pub(super) async fn run(
    verb: BasesCommand,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let operator = Operator::load()?;
    match verb {
        BasesCommand::List => list(&operator, screen)?,
        BasesCommand::Add {
            name,
            reference,
            run,
        } => {
            let addition = add(&operator, &name, reference, run).await?;
            let path = operator_bases(&operator.home);
            let existing = read(&path)?;
            let text = added(existing.as_deref(), &addition, &path)?;
            write(&path, &text)?;
            let value = json!({ "name": addition.name(), "path": path });
            screen.data(&value, || {
                format!("{} is in {}", addition.name(), path.shown())
            });
            if let Some(note) = addition.note() {
                screen.note(note);
            }
        }
        BasesCommand::Rm { name } => {
            let path = operator_bases(&operator.home);
            let text = removed(&read(&path)?.unwrap_or_default(), &name, &path)?;
            write(&path, &text)?;
            let value = json!({ "name": name, "path": path });
            screen.data(&value, || {
                format!("{name} is no longer in {}", path.shown())
            });
        }
        BasesCommand::Pull | BasesCommand::Bake { .. } => {
            let (events, receiver) = Events::channel();
            let follow = tokio::spawn(screen.follow(receiver));
            let done = match verb {
                BasesCommand::Bake { recipe } => bake(&operator, &recipe, &events, &cancel).await,
                _ => pull::all(&operator, &pull::own(&operator)?, &events, &cancel).await,
            };
            drop(events);
            let _screen_ended = follow.await;
            done?;
            list(&Operator::load()?, screen)?;
        }
    }
    Ok(0)
}

async fn bake(
    operator: &Operator,
    recipe: &Path,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<()> {
    // First what can fail for reasons of the operator's own.
    pull::all(operator, &pull::own(operator)?, events, cancel).await?;
    setup::bases(operator, recipe, Updates::Take, events, cancel).await?;
    setup::shared_head_and_templates(operator, events, cancel).await
}

fn list(operator: &Operator, screen: Screen) -> Result<()> {
    let all = operator.bases()?;
    let own = pull::own(operator)?;
    let written = |base: &Base| {
        own.bases
            .iter()
            .any(|one| one.name == base.name && one.version == base.version)
    };
    if screen.json() {
        for base in &all.bases {
            screen.data(
                &json!({ "base": base, "ready": is_ready(base), "operator": written(base) }),
                String::new,
            );
        }
        for image in &all.images {
            let ready = is_own(image.image());
            let value =
                json!({ "image": image, "operator": true, "ready": ready, "pulled": image.pulled });
            screen.data(&value, String::new);
        }
        return Ok(());
    }
    screen.text(&tables(&all, written, screen.width()));
    let foreign = all.images.iter().any(|image| !is_own(image.image()))
        || all
            .bases
            .iter()
            .any(|base| written(base) && !is_ready(base));
    if foreign {
        screen.note("`kiln bases pull` fetches those that are not pulled yet");
    } else if !all.bases.iter().all(is_ready) {
        screen.note(&format!(
            "`kiln setup` makes those that are missing ({})",
            generated_bases(&operator.home).shown()
        ));
    }
    Ok(())
}

fn is_ready(base: &Base) -> bool {
    is_own(&base.build) && is_own(&base.run)
}

fn tables(all: &Bases, written: impl Fn(&Base) -> bool, width: Option<usize>) -> String {
    let mut table = Table::new(&[
        left("RUNTIME"),
        left("VERSION"),
        left("EXACT"),
        left("STATE"),
        wide("ALSO IN FROM AS"),
    ])
    .within(width);
    for base in &all.bases {
        let state = match (written(base), is_ready(base)) {
            (true, true) => "bases.toml",
            (true, false) => "not pulled",
            (false, true) => "baked",
            (false, false) => "not baked",
        };
        let exact = base.exact_version().unwrap_or("-").to_owned();
        table.row([
            base.name.clone(),
            base.version.clone(),
            exact,
            state.to_owned(),
            base.aliases.join(" "),
        ]);
    }
    let mut text = table.render();
    if !all.images.is_empty() {
        let mut table =
            Table::new(&[left("FROM"), wide("MEANS"), left("DIGEST"), left("STATE")]).within(width);
        for image in &all.images {
            let digest = image
                .reference
                .digest
                .map(|digest| digest.short(12))
                .unwrap_or_default();
            let named = ImageRef {
                digest: None,
                ..image.reference.clone()
            };
            let state = match (&image.pulled, is_own(&image.reference)) {
                (Some(_), _) => "pulled",
                (None, true) => "here",
                (None, false) => "not pulled",
            };
            table.row([
                image.name.clone(),
                named.to_string(),
                digest,
                state.to_owned(),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

/// The addition, every image of it with its digest: a registry is asked where a tag alone was given.
async fn add(
    operator: &Operator,
    name: &str,
    reference: Option<ImageRef>,
    run: Option<ImageRef>,
) -> Result<Addition> {
    // A name that is not legal is told before any registry is asked.
    let reference = match reference {
        Some(reference) => reference,
        None => parsed(name)?,
    };
    parsed(name)?;
    let reference = pull::pinned(operator, &reference).await?;
    let run = match run {
        Some(run) => Some(pull::pinned(operator, &run).await?),
        None => None,
    };
    Addition::of(name, reference, run)
}

fn parsed(name: &str) -> Result<ImageRef> {
    name.parse()
        .map_err(|error: kiln_core::image_ref::ParseRefError| CliError::usage(error.to_string()))
}

/// What `kiln bases add` was asked for.
#[derive(Debug)]
enum Addition {
    Image(PinnedImage),
    Runtime(Base),
}

impl Addition {
    /// A name for an image; with a run image, a version of a runtime that plans can choose.
    fn of(name: &str, reference: ImageRef, run: Option<ImageRef>) -> Result<Self> {
        let name = ImageRef {
            digest: None,
            ..parsed(name)?
        };
        let Some(run) = run else {
            return Ok(Self::Image(PinnedImage {
                name: name.to_string(),
                reference,
                pulled: None,
            }));
        };
        let (None, Some(version)) = (&name.registry, &name.tag) else {
            return Err(
                CliError::usage(format!("{name} is not a version of a runtime"))
                    .hint("with --run, write RUNTIME:VERSION, for example node:22"),
            );
        };
        Ok(Self::Runtime(Base {
            name: name.repository.clone(),
            version: version.clone(),
            build: reference,
            run,
            aliases: vec![name.to_string()],
            tools: std::collections::BTreeMap::new(),
        }))
    }

    fn name(&self) -> String {
        match self {
            Self::Image(image) => image.name.clone(),
            Self::Runtime(base) => format!("{} {}", base.name, base.version),
        }
    }

    /// What is still to be done.
    fn note(&self) -> Option<&'static str> {
        let here = match self {
            Self::Image(image) => is_own(&image.reference),
            Self::Runtime(base) => is_ready(base),
        };
        match (here, self) {
            (false, _) => Some(
                "`kiln bases pull` fetches it; `kiln bases bake` also unpacks it, so that builds need not",
            ),
            (true, Self::Runtime(_)) => {
                Some("`kiln bases bake` unpacks it, so that builds need not")
            }
            (true, Self::Image(_)) => None,
        }
    }

    fn put_into(&self, bases: &mut Bases) {
        match self {
            Self::Image(image) => {
                match bases.images.iter_mut().find(|old| old.name == image.name) {
                    Some(old) => *old = image.clone(),
                    None => bases.images.push(image.clone()),
                }
            }
            Self::Runtime(base) => {
                let same = |old: &&mut Base| old.name == base.name && old.version == base.version;
                match bases.bases.iter_mut().find(same) {
                    Some(old) => *old = base.clone(),
                    None => bases.bases.push(base.clone()),
                }
            }
        }
    }

    /// As a section of the file.
    fn section(&self) -> Result<String> {
        let mut alone = Bases::default();
        self.put_into(&mut alone);
        let text = toml::to_string(&alone).or_infrastructure()?;
        let at = text.find("[[").unwrap_or(0);
        Ok(text[at..].to_owned())
    }
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CliError::usage(format!(
            "could not read {}: {error}",
            path.shown()
        ))),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| replace(path, text.as_bytes(), 0o644))
        .map_err(|error| CliError::usage(format!("could not write {}: {error}", path.shown())))
}

/// The file's text with the addition. What the operator wrote stays as it is, comments too; a name that is there already gets
/// its new reference in place.
fn added(existing: Option<&str>, addition: &Addition, path: &Path) -> Result<String> {
    let parse =
        |text: &str| Bases::parse_toml(text, path).map_err(|error| CliError::usage(chain(&error)));
    let text = existing.unwrap_or_default();
    let before = parse(text)?;
    let mut after = before.clone();
    addition.put_into(&mut after);
    if after == before {
        return Ok(text.to_owned());
    }
    let mut tries = Vec::new();
    if let Addition::Image(image) = addition
        && let Some(old) = before.images.iter().find(|old| old.name == image.name)
    {
        tries.push(text.replace(&old.reference.to_string(), &image.reference.to_string()));
    } else {
        let gap = if text.is_empty() || text.ends_with("\n\n") {
            ""
        } else if text.ends_with('\n') {
            "\n"
        } else {
            "\n\n"
        };
        tries.push(format!("{text}{gap}{}", addition.section()?));
    }
    for tried in tries {
        if parse(&tried).is_ok_and(|bases| bases == after) {
            return Ok(tried);
        }
    }
    Err(CliError::usage(format!(
        "{} names {} in a way that cannot be changed automatically",
        path.shown(),
        addition.name()
    ))
    .hint("change it with an editor"))
}

/// The file's text without an image, or without a version of a runtime. Comments within its section go with it.
fn removed(text: &str, name: &str, path: &Path) -> Result<String> {
    let parse =
        |text: &str| Bases::parse_toml(text, path).map_err(|error| CliError::usage(chain(&error)));
    let before = parse(text)?;
    let mut after = before.clone();
    after.images.retain(|image| image.name != name);
    after
        .bases
        .retain(|base| format!("{}:{}", base.name, base.version) != name);
    if after == before {
        return Err(
            CliError::usage(format!("{} does not name {name}", path.shown()))
                .hint("`kiln bases list` shows what it names"),
        );
    }
    let mut starts: Vec<usize> = text
        .match_indices("[[")
        .map(|(at, _)| at)
        .filter(|at| *at == 0 || text.as_bytes()[at - 1] == b'\n')
        .collect();
    starts.push(text.len());
    for section in starts.windows(2) {
        let tried = format!("{}{}", &text[..section[0]], &text[section[1]..]);
        if parse(&tried).is_ok_and(|bases| bases == after) {
            return Ok(tried);
        }
    }
    Err(CliError::usage(format!(
        "{} names {name} in a way that cannot be changed automatically",
        path.shown()
    ))
    .hint("change it with an editor"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::Digest;

    fn reference(text: &str) -> ImageRef {
        text.parse().expect("legal")
    }

    fn pin(what: &str) -> String {
        format!("docker.io/library/golang@{}", Digest::of(what.as_bytes()))
    }

    fn put(existing: Option<&str>, name: &str, to: &str) -> Result<String> {
        let addition = Addition::of(name, reference(to), None)?;
        added(existing, &addition, Path::new("bases.toml"))
    }

    #[test]
    fn additions_keep_comments_and_replace_in_place() {
        let one = put(None, "golang:1.24", &pin("a")).expect("adds");
        assert_eq!(
            one,
            format!(
                "[[image]]\nname = \"golang:1.24\"\nref = \"{}\"\n",
                pin("a")
            )
        );
        let commented = format!("# ours\n{one}# end");
        let two = put(Some(&commented), "golang:1.25", &pin("b")).expect("adds");
        assert!(
            two.starts_with(&commented) && two.contains("golang:1.25"),
            "{two}"
        );
        let changed = put(Some(&two), "golang:1.24", &pin("c")).expect("changes");
        assert_eq!(changed, two.replace(&pin("a"), &pin("c")));
        assert_eq!(
            put(Some(&changed), "golang:1.24", &pin("c")).expect("same"),
            changed
        );
        assert_eq!(
            put(Some("[[imag"), "a:1", &pin("c"))
                .expect_err("broken")
                .exit_code(),
            2
        );
    }

    #[test]
    fn what_was_added_is_removed_again() {
        let path = Path::new("bases.toml");
        let one = put(None, "golang:1.24", &pin("a")).expect("adds");
        let two = put(Some(&one), "golang:1.25", &pin("b")).expect("adds");
        assert_eq!(
            removed(&two, "golang:1.25", path).expect("removes").trim(),
            one.trim()
        );
        let rest = removed(&two, "golang:1.24", path).expect("removes");
        assert!(rest.contains("1.25") && !rest.contains("1.24"), "{rest}");
        let error = removed(&one, "golang:1.25", path).expect_err("not there");
        assert_eq!((error.exit_code(), error.hints.len()), (2, 1));
    }

    fn operator() -> (tempfile::TempDir, Operator) {
        let dir = tempfile::tempdir().expect("temp dir");
        let operator = Operator {
            home: kiln_worker::home::Home::below(dir.path()),
            config: crate::config::Config::default(),
            registries: None,
        };
        (dir, operator)
    }

    #[tokio::test]
    async fn one_word_with_a_digest_is_enough() {
        let (_dir, operator) = operator();
        let word = format!("golang:1.24@{}", Digest::of(b"x"));
        let added = add(&operator, &word, None, None).await.expect("legal");
        let Addition::Image(image) = &added else {
            panic!("an image")
        };
        assert_eq!(
            (image.name.as_str(), image.reference.to_string()),
            ("golang:1.24", format!("docker.io/library/{word}"))
        );
        assert!(added.note().is_some_and(|note| note.contains("fetches it")));
        let run = Some(reference(&pin("run")));
        let build = Some(reference(&pin("b")));
        let added = add(&operator, "node:22", build.clone(), run.clone()).await;
        let Addition::Runtime(base) = added.expect("legal") else {
            panic!("a runtime")
        };
        assert_eq!((base.name.as_str(), base.version.as_str()), ("node", "22"));
        let text = super::added(None, &Addition::Runtime(base), Path::new("bases.toml"));
        let text = text.expect("adds");
        assert!(
            text.starts_with("[[base]]\nname = \"node\"\nversion = \"22\"\n"),
            "{text}"
        );
        assert!(add(&operator, "node", build, run).await.is_err());
        let own = format!("registry.kiln.internal/t/local/go@{}", Digest::of(b"x"));
        let own = add(&operator, "go:1", Some(reference(&own)), None).await;
        assert_eq!(own.expect("legal").note(), None);
    }

    #[tokio::test]
    async fn a_tag_that_nobody_knows_is_usage() {
        let (_dir, operator) = operator();
        let absent = Some(reference("registry.kiln.internal/t/local/go:1"));
        let error = add(&operator, "go:1", absent, None).await;
        assert_eq!(error.expect_err("not there").exit_code(), 2);
        assert_eq!(
            add(&operator, "Not:legal", None, None)
                .await
                .expect_err("illegal")
                .exit_code(),
            2
        );
    }

    #[test]
    fn the_tables_say_what_is_there() {
        let mut all = Bases::builtin();
        all.bases[1].build.digest = Some(Digest::of(b"b"));
        all.bases[1].run.digest = Some(Digest::of(b"r"));
        all.images.push(PinnedImage {
            name: "golang:1.24".to_owned(),
            reference: reference(&pin("a")),
            pulled: None,
        });
        let text = tables(&all, |_| false, Some(80));
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("node     20       -      not baked  node:20 node:20-slim"),
            "{text}"
        );
        assert!(
            lines[2].starts_with("python   3.13     -      baked "),
            "{text}"
        );
        assert_eq!(
            lines[4],
            "FROM         MEANS                     DIGEST        STATE"
        );
        assert_eq!(
            lines[5],
            format!(
                "golang:1.24  docker.io/library/golang  {}  not pulled",
                Digest::of(b"a").short(12)
            )
        );
        assert!(
            lines
                .iter()
                .all(|line| line.chars().count() <= super::super::table::WIDTH)
        );
    }
}
