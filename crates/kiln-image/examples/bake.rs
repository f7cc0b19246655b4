//! Bakes by hand, for people who work on the bake itself: `bake machine DIR GUEST` or `bake bases DIR`.

#![expect(clippy::print_stdout, reason = "an example talks to its terminal")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use kiln_image::bake::{
    BakeEvent, BasesBake, Cancel, MachineImageBake, MachineImages, OciLayout, RecipeFiles, Updates,
    bake_bases, bake_machine_image,
};

fn show(event: &BakeEvent<'_>) {
    match event {
        BakeEvent::Waiting => println!("waiting for another bake"),
        BakeEvent::Started { stage } => println!("{stage} ..."),
        BakeEvent::Reused { stage } => println!("{stage} reused"),
        BakeEvent::Finished { stage, took, bytes } => {
            println!(
                "{stage} done in {:.1} s, {} MiB",
                took.as_secs_f64(),
                bytes >> 20
            );
        }
        BakeEvent::Line { stage, line } => println!("  {stage}: {}", line.escape_debug()),
        _ => {}
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let (files, cancel, started) = (RecipeFiles::built_in(), Cancel::new(), Instant::now());
    match words[..] {
        ["machine", directory, guest] => {
            let images = MachineImages::new(PathBuf::from(directory).join("images"));
            let bake = MachineImageBake {
                files: &files,
                guest: Path::new(guest),
                cache: &Path::new(directory).join("cache"),
                images: &images,
                used: &[],
                updates: Updates::Take,
                progress: &show,
                cancel: &cancel,
            };
            let manifest = bake_machine_image(&bake)?;
            println!("{}", images.path(&manifest.name)?.display());
        }
        ["bases", directory] => {
            let bake = BasesBake {
                files: &files,
                cache: &Path::new(directory).join("cache"),
                npm_registry: None,
                updates: Updates::Take,
                progress: &show,
                cancel: &cancel,
            };
            let baked = bake_bases(&bake)?;
            let to = Path::new(directory).join("layout");
            let mut layout = OciLayout::create(&to)?;
            baked.publish(&mut layout)?;
            layout.finish()?;
            baked
                .to_bases()
                .save_generated(&Path::new(directory).join("bases.lock.json"))?;
            for base in &baked.bases {
                for image in [&base.build, &base.run] {
                    let sizes = image
                        .layers
                        .iter()
                        .map(|layer| format!("{} {}", layer.name, layer.bytes));
                    println!(
                        "{} {}: {}",
                        base.name,
                        image.tag,
                        sizes.collect::<Vec<_>>().join(", ")
                    );
                }
            }
        }
        _ => return Err("usage: bake machine DIR GUEST | bake bases DIR".into()),
    }
    println!("{:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}
