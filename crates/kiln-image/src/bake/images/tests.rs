//! Lists, verifies and prunes small images made by hand.

use super::*;

/// An image with one small file, as a bake would leave it.
pub(in crate::bake) fn image(images: &MachineImages, seed: &str, baked_unix_s: u64) -> String {
    let content = Digest::of(seed.as_bytes());
    let name = format!("ci-{}", content.short(16));
    let directory = images.directory().join(&name);
    fs::create_dir_all(&directory).expect("writable");
    fs::write(directory.join("kernel"), seed).expect("writable");
    let files = digest_file(&directory.join("kernel")).expect("readable");
    let manifest = MachineImageManifest {
        schema: SCHEMA,
        name: name.clone(),
        content,
        recipe: Digest::of(b"recipe"),
        guest: Digest::of(seed.as_bytes()),
        root_tree: Digest::of(b"root"),
        kernel_release: "6".to_owned(),
        kernel_args: KERNEL_ARGS.to_owned(),
        modules: Vec::new(),
        buildkit_version: "v0".to_owned(),
        debian: "trixie/amd64".to_owned(),
        baked_unix_s,
        files: [("kernel".to_owned(), files)].into(),
        packages: Vec::new(),
    };
    let text = serde_json::to_vec(&manifest).expect("it is data");
    fs::write(directory.join(FILE), text).expect("writable");
    name
}

fn empty() -> (tempfile::TempDir, MachineImages) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let images = MachineImages::new(dir.path());
    (dir, images)
}

#[test]
fn a_changed_byte_is_found_at_the_next_use() {
    let (_dir, images) = empty();
    let name = image(&images, "one", 1);
    for depth in [
        VerifyDepth::OncePerBoot,
        VerifyDepth::OncePerBoot,
        VerifyDepth::Full,
    ] {
        assert!(images.verify(&name, depth).is_ok());
    }
    let file = images.path(&name).expect("a name").join("kernel");
    fs::write(&file, "onf").expect("writable");
    let result = images.verify(&name, VerifyDepth::OncePerBoot);
    assert!(
        matches!(result, Err(ImagesError::Damaged { .. })),
        "{result:?}"
    );
    fs::remove_file(&file).expect("writable");
    assert!(matches!(
        images.verify(&name, VerifyDepth::Full),
        Err(ImagesError::Io { .. })
    ));
}

#[test]
fn what_was_verified_is_not_read_again_until_the_host_boots() {
    let (_dir, images) = empty();
    let name = image(&images, "one", 1);
    images
        .verify(&name, VerifyDepth::OncePerBoot)
        .expect("good");
    let mut verified = images.read_verified(&name).expect("remembered");
    verified.boot_id = "another boot".to_owned();
    images.write_verified(&name, &verified).expect("writable");
    images
        .verify(&name, VerifyDepth::OncePerBoot)
        .expect("good");
    let again = images.read_verified(&name).expect("remembered");
    assert_eq!(
        again.boot_id,
        boot_id().expect("a boot id"),
        "it was verified in full"
    );
}

#[test]
fn pruning_keeps_the_newest_the_current_and_the_used() {
    let (_dir, images) = empty();
    let names: Vec<_> = (1..=6)
        .map(|age| image(&images, &format!("image {age}"), age))
        .collect();
    images.set_current(&names[0]).expect("it exists");
    let removed = images.prune(2, &[names[1].clone()]).expect("it prunes");
    assert_eq!(removed, [names[3].clone(), names[2].clone()]);
    let left: Vec<_> = images
        .list()
        .expect("listable")
        .into_iter()
        .map(|i| i.manifest.name)
        .collect();
    assert_eq!(
        left,
        [&names[5], &names[4], &names[1], &names[0]].map(Clone::clone)
    );
    assert_eq!(images.current().expect("set").name, names[0]);
}

#[test]
fn names_that_are_none_and_manifests_of_others_are_refused() {
    let (_dir, images) = empty();
    for bad in [
        "",
        "ci",
        "../ci-0011223344556677",
        "ci-001122334455667",
        "-0011223344556677",
    ] {
        assert!(
            matches!(images.show(bad), Err(ImagesError::BadName(_))),
            "{bad:?}"
        );
    }
    let name = image(&images, "one", 1);
    let other = images.directory().join("ci-0011223344556677");
    fs::rename(images.path(&name).expect("a name"), other).expect("writable");
    let result = images.show("ci-0011223344556677");
    assert!(
        matches!(result, Err(ImagesError::ForeignManifest { .. })),
        "{result:?}"
    );
    assert!(matches!(images.current(), Err(ImagesError::NoCurrent)));
}

#[test]
fn an_image_is_found_by_what_it_was_made_from() {
    let (_dir, images) = empty();
    let name = image(&images, "one", 1);
    let found = images
        .find(&Digest::of(b"recipe"), &Digest::of(b"one"))
        .expect("listable");
    assert_eq!(found.expect("found").name, name);
    let other = images
        .find(&Digest::of(b"recipe"), &Digest::of(b"two"))
        .expect("listable");
    assert!(other.is_none());
}
