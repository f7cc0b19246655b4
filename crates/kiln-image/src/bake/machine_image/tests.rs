//! What a bake does before its first stage. Baking itself needs archives: the end-to-end tests do it.

use super::super::initrd::tests::elf;
use super::*;
use kiln_core::Digest;

/// A bake that may start no program: anything beyond looking ends it.
struct Fixture {
    dir: tempfile::TempDir,
    images: MachineImages,
    files: RecipeFiles,
    cancel: Cancel,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join("guest"), elf(1)).expect("writable");
        let cancel = Cancel::new();
        cancel.cancel();
        Self {
            images: MachineImages::new(dir.path().join("images")),
            files: RecipeFiles::built_in(),
            dir,
            cancel,
        }
    }

    fn bake(&self, updates: Updates) -> Result<MachineImageManifest, BakeError> {
        bake_machine_image(&MachineImageBake {
            files: &self.files,
            guest: &self.dir.path().join("guest"),
            cache: &self.dir.path().join("cache"),
            images: &self.images,
            used: &[],
            updates,
            progress: &|_: &super::super::BakeEvent<'_>| {},
            cancel: &self.cancel,
        })
    }

    /// An image as an earlier bake of the same inputs left it.
    fn image(&self, seed: &str, kernel_args: &str) -> String {
        let name = images::tests::image(&self.images, seed, 1);
        let mut manifest = self.images.show(&name).expect("there");
        manifest.recipe = self.files.image_digest().expect("readable");
        manifest.guest = Digest::of(&elf(1));
        manifest.kernel_args = kernel_args.to_owned();
        let path = self
            .images
            .path(&name)
            .expect("a name")
            .join(manifest::FILE);
        write_json(&path, &manifest).expect("writable");
        name
    }

    fn is_cancelled(&self, updates: Updates) -> bool {
        self.bake(updates).expect_err("stopped").is_cancelled()
    }
}

#[test]
fn unchanged_inputs_need_no_bake_unless_updates_are_wanted() {
    let f = Fixture::new();
    assert!(f.is_cancelled(Updates::Leave), "there is none yet");
    f.image("older words", "panic=-1 quiet loglevel=0");
    assert!(f.is_cancelled(Updates::Leave), "it boots otherwise");
    let name = f.image("same", KERNEL_ARGS);
    let other = images::tests::image(&f.images, "another recipe", 9);
    f.images.set_current(&other).expect("it exists");
    assert_eq!(f.bake(Updates::Leave).expect("nothing to do").name, name);
    assert_eq!(f.images.current().expect("set").name, name);
    assert!(f.is_cancelled(Updates::Take));
    fs::write(f.dir.path().join("guest"), [elf(1), vec![0]].concat()).expect("writable");
    assert!(f.is_cancelled(Updates::Leave), "another guest");
}

#[test]
fn a_damaged_image_is_baked_again_and_a_failed_bake_keeps_the_old_one() {
    let f = Fixture::new();
    let name = f.image("same", KERNEL_ARGS);
    f.images.set_current(&name).expect("it exists");
    let kernel = f.images.path(&name).expect("a name").join("kernel");
    let sound = fs::read(&kernel).expect("readable");
    for damage in [&b"samf"[..], b"", b"longer than it was"] {
        fs::write(&kernel, damage).expect("writable");
        assert!(f.is_cancelled(Updates::Leave), "{damage:?} was used");
    }
    fs::write(&kernel, sound).expect("writable");
    assert_eq!(f.images.current().expect("kept").name, name);
    assert_eq!(f.bake(Updates::Leave).expect("whole again").name, name);
    let left = fs::read_dir(f.images.directory()).expect("listable");
    let left: Vec<_> = left.flatten().map(|entry| entry.file_name()).collect();
    assert!(
        !left
            .iter()
            .any(|name| name.to_string_lossy().starts_with(images::UNFINISHED)),
        "{left:?}"
    );
}
