//! `kiln bases`: which images a `FROM` may mean, and the runtime bases made here.

use std::fs;
use std::io;
use std::path::Path;

use kiln_core::ImageRef;
use kiln_core::network::REGISTRY_HOST;
use kiln_image::bases::{Base, Bases, PinnedImage};
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
use crate::show::Screen;

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
            let addition = Addition::of(&name, reference.as_ref(), run.as_ref())?;
            let path = operator_bases(&operator.home);
            let existing = read(&path)?;
            let text = added(existing.as_deref(), &addition, &path)?;
            write(&path, &text)?;
            let value = json!({ "name": addition.name(), "path": path });
            screen.data(&value, || {
                format!("{} is in {}", addition.name(), path.display())
            });
            for note in addition.notes() {
                screen.note(&note);
            }
        }
        BasesCommand::Bake { recipe } => {
            let (events, receiver) = Events::channel();
            let follow = tokio::spawn(screen.follow(receiver));
            let done = bake(&operator, &recipe, &events, &cancel).await;
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
    setup::bases(operator, recipe, events, cancel).await?;
    setup::shared_head_and_templates(operator, events, cancel).await
}

fn list(operator: &Operator, screen: Screen) -> Result<()> {
    let all = operator.bases()?;
    let path = operator_bases(&operator.home);
    let own = match read(&path)? {
        Some(text) => {
            Bases::parse_toml(&text, &path).map_err(|error| CliError::usage(chain(&error)))?
        }
        None => Bases::default(),
    };
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
            screen.data(&json!({ "image": image, "operator": true }), String::new);
        }
        return Ok(());
    }
    screen.text(&tables(&all, written));
    if !all.bases.iter().all(is_ready) {
        screen.note(&format!(
            "`kiln setup` makes those that are missing ({})",
            generated_bases(&operator.home).display()
        ));
    }
    Ok(())
}

fn is_ready(base: &Base) -> bool {
    base.build.digest.is_some() && base.run.digest.is_some()
}

fn tables(all: &Bases, written: impl Fn(&Base) -> bool) -> String {
    let mut table = Table::new(&[
        left("RUNTIME"),
        left("VERSION"),
        left("EXACT"),
        left("STATE"),
        wide("ALSO IN FROM AS"),
    ]);
    for base in &all.bases {
        let state = match (written(base), is_ready(base)) {
            (true, _) => "bases.toml",
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
        let mut table = Table::new(&[left("FROM"), wide("MEANS"), left("DIGEST")]);
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
            table.row([image.name.clone(), named.to_string(), digest]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

/// What `kiln bases add` was asked for.
#[derive(Debug)]
enum Addition {
    Image(PinnedImage),
    Runtime(Base),
}

impl Addition {
    /// `NAME@DIGEST`, or `NAME REFERENCE`; with a run image, a version of a runtime that plans can choose.
    fn of(name: &str, reference: Option<&ImageRef>, run: Option<&ImageRef>) -> Result<Self> {
        let parsed: ImageRef =
            name.parse()
                .map_err(|error: kiln_core::image_ref::ParseRefError| {
                    CliError::usage(error.to_string())
                })?;
        let reference = match reference {
            Some(reference) => reference.clone(),
            None => parsed.clone(),
        };
        pinned(&reference)?;
        let name = ImageRef {
            digest: None,
            ..parsed
        };
        let Some(run) = run else {
            return Ok(Self::Image(PinnedImage {
                name: name.to_string(),
                reference,
            }));
        };
        pinned(run)?;
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
            run: run.clone(),
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

    /// What is still to be done. Machines reach kiln's own registry and no other.
    fn notes(&self) -> Vec<String> {
        let images = match self {
            Self::Image(image) => vec![&image.reference],
            Self::Runtime(base) => vec![&base.build, &base.run],
        };
        let mut notes = Vec::new();
        for elsewhere in images
            .into_iter()
            .filter(|image| image.registry.as_deref() != Some(REGISTRY_HOST))
        {
            let name = elsewhere.repository.rsplit('/').next().unwrap_or("base");
            let digest = elsewhere
                .digest
                .map(|digest| format!("@{digest}"))
                .unwrap_or_default();
            notes.push(format!(
                "machines pull from kiln's own registry alone. While `kiln registry serve` runs, copy the image there once: \
                 skopeo copy --preserve-digests --dest-tls-verify=false docker://{elsewhere} docker://127.0.0.1:5080/t/local/{name}:base; \
                 then add it as {REGISTRY_HOST}/t/local/{name}{digest}"
            ));
        }
        if let (Self::Runtime(_), true) = (self, notes.is_empty()) {
            notes.push("`kiln bases bake` unpacks it, so that builds need not".to_owned());
        }
        notes
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

fn pinned(reference: &ImageRef) -> Result<()> {
    if reference.digest.is_some() {
        return Ok(());
    }
    Err(CliError::usage(format!("{reference} has no digest, so it could mean another image tomorrow")).hint(format!(
        "add one: {reference}@sha256:...  (`skopeo inspect --format '{{{{.Digest}}}}' docker://{reference}` tells it)"
    )))
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CliError::usage(format!(
            "could not read {}: {error}",
            path.display()
        ))),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| replace(path, text.as_bytes(), 0o644))
        .map_err(|error| CliError::usage(format!("could not write {}: {error}", path.display())))
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
        path.display(),
        addition.name()
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

    fn add(existing: Option<&str>, name: &str, to: &str) -> Result<String> {
        let addition = Addition::of(name, Some(&reference(to)), None)?;
        added(existing, &addition, Path::new("bases.toml"))
    }

    #[test]
    fn additions_keep_comments_and_replace_in_place() {
        let one = add(None, "golang:1.24", &pin("a")).expect("adds");
        assert_eq!(
            one,
            format!(
                "[[image]]\nname = \"golang:1.24\"\nref = \"{}\"\n",
                pin("a")
            )
        );
        let commented = format!("# ours\n{one}# end");
        let two = add(Some(&commented), "golang:1.25", &pin("b")).expect("adds");
        assert!(
            two.starts_with(&commented) && two.contains("golang:1.25"),
            "{two}"
        );
        let changed = add(Some(&two), "golang:1.24", &pin("c")).expect("changes");
        assert_eq!(changed, two.replace(&pin("a"), &pin("c")));
        assert_eq!(
            add(Some(&changed), "golang:1.24", &pin("c")).expect("same"),
            changed
        );
        assert_eq!(
            add(Some("[[imag"), "a:1", &pin("c"))
                .expect_err("broken")
                .exit_code(),
            2
        );
    }

    #[test]
    fn digests_are_needed_and_one_word_is_enough() {
        assert_eq!(
            Addition::of("golang:1.24", None, None)
                .expect_err("no digest")
                .exit_code(),
            2
        );
        let word = format!("golang:1.24@{}", Digest::of(b"x"));
        let Addition::Image(image) = Addition::of(&word, None, None).expect("legal") else {
            panic!("an image")
        };
        assert_eq!(
            (image.name.as_str(), image.reference.to_string()),
            ("golang:1.24", word.clone())
        );
        let run = reference(&pin("run"));
        let Addition::Runtime(base) =
            Addition::of("node:22", Some(&reference(&pin("b"))), Some(&run)).expect("legal")
        else {
            panic!("a runtime")
        };
        assert_eq!((base.name.as_str(), base.version.as_str()), ("node", "22"));
        let text = added(None, &Addition::Runtime(base), Path::new("bases.toml")).expect("adds");
        assert!(
            text.starts_with("[[base]]\nname = \"node\"\nversion = \"22\"\n"),
            "{text}"
        );
        assert!(Addition::of("node", Some(&run), Some(&run)).is_err());
    }

    #[test]
    fn images_of_other_registries_are_to_be_copied_first() {
        let notes = |to: &str| {
            Addition::of("golang:1.24", Some(&reference(to)), None)
                .expect("legal")
                .notes()
        };
        let digest = Digest::of(b"a");
        let far = notes(&pin("a"));
        assert!(
            far[0].ends_with(&format!("registry.kiln.internal/t/local/golang@{digest}")),
            "{far:?}"
        );
        assert!(notes(&format!("registry.kiln.internal/t/local/golang@{digest}")).is_empty());
    }

    #[test]
    fn the_tables_say_what_is_there() {
        let mut all = Bases::builtin();
        all.bases[1].build.digest = Some(Digest::of(b"b"));
        all.bases[1].run.digest = Some(Digest::of(b"r"));
        all.images.push(PinnedImage {
            name: "golang:1.24".to_owned(),
            reference: reference(&pin("a")),
        });
        let text = tables(&all, |_| false);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("node     20       -      not baked  node:20 node:20-slim"),
            "{text}"
        );
        assert!(
            lines[2].starts_with("python   3.13     -      baked "),
            "{text}"
        );
        assert_eq!(lines[4], "FROM         MEANS                     DIGEST");
        assert_eq!(
            lines[5],
            format!(
                "golang:1.24  docker.io/library/golang  {}",
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
