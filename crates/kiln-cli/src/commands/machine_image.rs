//! `kiln machine-image`: the images that machines boot.

use kiln_core::ByteSize;
use kiln_image::bake::images::{ImagesError, KEEP};
use kiln_image::bake::{ImageSummary, MachineImageManifest, MachineImages, Updates, VerifyDepth};
use kiln_worker::event::Events;
use kiln_worker::host::now_unix_ms;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::table::{Facts, Table, left, right};
use super::{setup, when};
use crate::args::ImageCommand;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::Screen;

pub(super) async fn run(
    verb: ImageCommand,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let operator = Operator::load()?;
    let images = MachineImages::new(operator.home.images());
    match verb {
        ImageCommand::Bake { recipe, guest } => {
            let (events, receiver) = Events::channel();
            let follow = tokio::spawn(screen.follow(receiver));
            let done = setup::machine_image(
                &operator,
                &recipe,
                guest.as_deref(),
                Updates::Take,
                &events,
                &cancel,
            )
            .await;
            drop(events);
            let _screen_ended = follow.await;
            done?;
            let image = images.current().map_err(|error| images_error(&error))?;
            screen.data(&image, || {
                format!("{} is the current machine image", image.name)
            });
        }
        ImageCommand::List => list(&images, screen)?,
        ImageCommand::Show { name, packages } => {
            let image = find(&images, name.as_deref())?;
            screen.data(&image, || show(&image, packages));
        }
        ImageCommand::Verify { name } => verify(images, name.as_deref(), screen).await?,
        ImageCommand::Prune => {
            let removed = images
                .prune(KEEP, &[])
                .map_err(|error| images_error(&error))?;
            let text = match removed.as_slice() {
                [] => format!("nothing to remove: the newest {KEEP} are kept"),
                names => format!("removed {}", names.join(" ")),
            };
            screen.data(&serde_json::json!({ "removed": removed }), || text);
        }
    }
    Ok(0)
}

/// Whose fault an error of the images is.
fn images_error(error: &ImagesError) -> CliError {
    match error {
        ImagesError::NoCurrent => CliError::usage(chain(error)).hint("run `kiln setup` once"),
        ImagesError::NotFound(_) | ImagesError::BadName(_) => {
            CliError::usage(chain(error)).hint("`kiln machine-image list` shows the names")
        }
        ImagesError::Damaged { .. } => {
            CliError::infrastructure(error).hint("`kiln machine-image bake` makes it again")
        }
        _ => CliError::infrastructure(error),
    }
}

fn find(images: &MachineImages, name: Option<&str>) -> Result<MachineImageManifest> {
    let found = match name {
        Some(name) => images.show(name),
        None => images.current(),
    };
    found.map_err(|error| images_error(&error))
}

#[derive(Serialize)]
struct Line<'a> {
    current: bool,
    bytes: u64,
    #[serde(flatten)]
    manifest: &'a MachineImageManifest,
}

fn list(images: &MachineImages, screen: Screen) -> Result<()> {
    let all = images.list().map_err(|error| images_error(&error))?;
    if all.is_empty() {
        screen.note("no machine image yet; `kiln setup` makes one");
        return Ok(());
    }
    if screen.json() {
        for image in &all {
            let line = Line {
                current: image.current,
                bytes: image.bytes.0,
                manifest: &image.manifest,
            };
            screen.data(&line, String::new);
        }
    } else {
        screen.text(&table(&all, now_unix_ms()));
    }
    Ok(())
}

fn table(all: &[ImageSummary], now_unix_ms: u64) -> String {
    let mut table = Table::new(&[
        left("NAME"),
        left("BAKED"),
        right("SIZE"),
        left("KERNEL"),
        left("BUILDKIT"),
        left(""),
    ]);
    for image in all {
        let manifest = &image.manifest;
        table.row([
            manifest.name.clone(),
            when::ago(manifest.baked_unix_s.saturating_mul(1000), now_unix_ms),
            image.bytes.to_string(),
            manifest.kernel_release.chars().take(18).collect(),
            manifest.buildkit_version.chars().take(10).collect(),
            if image.current { "current" } else { "" }.to_owned(),
        ]);
    }
    table.render()
}

fn show(image: &MachineImageManifest, packages: bool) -> String {
    let mut facts = Facts::default();
    facts.add("name", &image.name);
    facts.add(
        "baked",
        when::stamp(image.baked_unix_s.saturating_mul(1000)),
    );
    facts.add("debian", &image.debian);
    facts.add("kernel", &image.kernel_release);
    facts.add(
        "modules",
        super::table::wrap(&image.modules.join(" "), 68).join("\n"),
    );
    facts.add("buildkit", &image.buildkit_version);
    facts.add("content", image.content.to_string());
    facts.add("recipe", image.recipe.to_string());
    facts.add("guest", image.guest.to_string());
    for (name, file) in &image.files {
        facts.add(name, format!("{}, {}", ByteSize(file.bytes), file.digest));
    }
    facts.add("packages", image.packages.len().to_string());
    let mut text = facts.render();
    if packages {
        for package in &image.packages {
            text.push_str(&format!(
                "  {} {} {}\n",
                package.name, package.version, package.architecture
            ));
        }
    }
    text
}

async fn verify(images: MachineImages, name: Option<&str>, screen: Screen) -> Result<()> {
    let name = find(&images, name)?.name;
    screen.note(&format!("reading {name} again ..."));
    let verified = tokio::task::spawn_blocking(move || images.verify(&name, VerifyDepth::Full))
        .await
        .or_infrastructure()?;
    let image = verified.map_err(|error| images_error(&error))?;
    let value =
        serde_json::json!({ "name": image.name, "files": image.files.len(), "sound": true });
    screen.data(&value, || {
        format!(
            "{}: {} read, as the manifest says",
            image.name,
            super::table::counted(image.files.len() as u64, "file")
        )
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::Digest;

    fn manifest() -> MachineImageManifest {
        MachineImageManifest {
            schema: 1,
            name: "ci-0123456789abcdef".to_owned(),
            content: Digest::of(b"c"),
            recipe: Digest::of(b"r"),
            guest: Digest::of(b"g"),
            root_tree: Digest::of(b"t"),
            kernel_release: "6.12.43+deb13-cloud-amd64".to_owned(),
            kernel_args: String::new(),
            modules: vec!["virtio_blk".to_owned()],
            buildkit_version: "v0.33.1".to_owned(),
            debian: "trixie/amd64".to_owned(),
            baked_unix_s: 1_000,
            files: std::collections::BTreeMap::new(),
            packages: Vec::new(),
        }
    }

    #[test]
    fn the_list_fits_and_marks_the_current_one() {
        let image = ImageSummary {
            manifest: manifest(),
            directory: "/x".into(),
            current: true,
            bytes: ByteSize::mib(412),
        };
        let text = table(&[image], 4_600_000);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[1],
            "ci-0123456789abcdef  1 h ago  412.0 MiB  6.12.43+deb13-clou  v0.33.1   current"
        );
        assert!(
            lines
                .iter()
                .all(|line| line.chars().count() <= super::super::table::WIDTH),
            "{text}"
        );
        assert!(show(&manifest(), false).contains("baked     1970-01-01 00:16:40 UTC\n"));
    }

    #[test]
    fn who_is_to_blame() {
        assert_eq!(images_error(&ImagesError::NoCurrent).exit_code(), 2);
        let damaged = ImagesError::Damaged {
            path: "/x".into(),
            expected: Digest::of(b"a"),
            found: Digest::of(b"b"),
        };
        assert_eq!(images_error(&damaged).exit_code(), 3);
    }
}
