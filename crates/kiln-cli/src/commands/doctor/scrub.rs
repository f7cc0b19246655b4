//! `kiln doctor --scrub`: reads every stored byte again and compares digests. What is corrupt is set aside, so that it is made
//! again or refused, never used.

use std::fs;
use std::path::Path;

use kiln_controller::api::{JobLine, List};
use kiln_core::ByteSize;
use kiln_image::bake::{MachineImages, VerifyDepth};
use kiln_image::heads::{HeadError, HeadStore};
use kiln_machine::driver::Check;
use kiln_worker::home::Home;

use super::super::cache::unpacked;
use super::super::home_queue::HomeQueue;
use super::super::operator::Operator;
use super::super::template;
use super::{Report, fail, pass};
use crate::error::chain;

/// Reads one kind of thing again.
type Scrub = fn(&Home) -> Vec<Check>;

pub(super) async fn run(operator: &Operator, report: &mut Report) {
    let parts: [(&str, Scrub); 4] = [
        ("scrub-images", images),
        ("scrub-heads", heads),
        ("scrub-templates", templates),
        ("scrub-unpacked", unpacked_images),
    ];
    for (name, scrub) in parts {
        report.screen.note(&format!("{name}: reading ..."));
        let home = operator.home.clone();
        let checks = tokio::task::spawn_blocking(move || scrub(&home)).await;
        report.all(checks.unwrap_or_else(|error| vec![fail(name, error.to_string(), "try again")]));
    }
    report.screen.note("scrub-jobs: reading ...");
    report.all(queue(&operator.home).await);
    report.screen.note("scrub-registry: reading ...");
    report.all(registry(operator).await);
}

fn images(home: &Home) -> Vec<Check> {
    let name = "scrub-images";
    let images = MachineImages::new(home.images());
    let all = match images.list() {
        Ok(all) => all,
        Err(error) => {
            return vec![fail(
                name,
                chain(&error),
                "look at the directory's permissions",
            )];
        }
    };
    let mut checks = Vec::new();
    let bytes: u64 = all.iter().map(|image| image.bytes.0).sum();
    for image in &all {
        if let Err(error) = images.verify(&image.manifest.name, VerifyDepth::Full) {
            touch(&image.directory);
            let found = format!("{}: {}", image.manifest.name, chain(&error));
            checks.push(fail(
                name,
                found,
                "it is refused from now on; `kiln machine-image bake` makes it again",
            ));
        }
    }
    sound(checks, name, all.len(), "machine images", bytes)
}

/// A new change time makes the next use read an image in full again, and so refuse it; until then its verification in this boot
/// of the host would still count.
fn touch(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if let Ok(meta) = entry.metadata() {
            let _unreadable_anyway = fs::set_permissions(entry.path(), meta.permissions());
        }
    }
}

fn heads(home: &Home) -> Vec<Check> {
    let name = "scrub-heads";
    if !home.heads().is_dir() {
        return vec![pass(name, "no cache heads")];
    }
    let store = match HeadStore::open(&home.heads()) {
        Ok(store) => store,
        Err(error) => {
            return vec![fail(
                name,
                chain(&error),
                "look at the directory's permissions",
            )];
        }
    };
    let scopes: Vec<String> = fs::read_dir(home.heads())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let (mut checks, mut count, mut bytes) = (Vec::new(), 0, 0);
    for scope in scopes {
        match scrub_scope(&store, &scope) {
            Ok((heads, read)) => {
                count += heads;
                bytes += read;
            }
            Err(error) => {
                let hint = match store.forget(&scope) {
                    Ok(()) if scope == kiln_image::heads::SHARED => {
                        "set aside: `kiln bases bake` makes the shared head again, builds need it"
                            .to_owned()
                    }
                    Ok(()) => "set aside: the next build starts from the shared head".to_owned(),
                    Err(error) => format!("it could not be set aside: {}", chain(&error)),
                };
                checks.push(fail(
                    name,
                    format!("cache head of {scope}: {}", chain(&error)),
                    hint,
                ));
            }
        }
    }
    sound(checks, name, count, "cache heads", bytes)
}

/// Heads of a scope and their bytes, all of them read.
fn scrub_scope(store: &HeadStore, scope: &str) -> Result<(usize, u64), HeadError> {
    let Some(head) = store.current(scope)? else {
        return Ok((0, 0));
    };
    let (mut count, mut bytes) = (0, 0);
    for member in store.chain(&head)? {
        store.verify(&member)?;
        count += 1;
        bytes += member.bytes;
    }
    Ok((count, bytes))
}

fn templates(home: &Home) -> Vec<Check> {
    let name = "scrub-templates";
    let store = match template::open(home) {
        Ok(Some(store)) => store,
        Ok(None) => return vec![pass(name, "no templates")],
        Err(error) => {
            return vec![fail(
                name,
                error.message,
                "look at the directory's permissions",
            )];
        }
    };
    let scrubbed = store.list().and_then(|all| Ok((all, store.scrub()?)));
    let (all, damaged) = match scrubbed {
        Ok(found) => found,
        Err(error) => {
            return vec![fail(
                name,
                chain(&error),
                "look at the directory's permissions",
            )];
        }
    };
    let mut checks = Vec::new();
    for (id, why) in damaged {
        let hint = match store.remove_unused(std::slice::from_ref(&id)) {
            Ok(report) if report.removed.is_empty() => {
                "a machine uses it now: run this again later"
            }
            Ok(_) => "removed; it is made again when it is needed",
            Err(_) => "it could not be removed: `kiln template prune --all`",
        };
        checks.push(fail(name, format!("template {id}: {why}"), hint));
    }
    let bytes = all.iter().map(|one| one.bytes).sum();
    sound(checks, name, all.len(), "templates", bytes)
}

fn unpacked_images(home: &Home) -> Vec<Check> {
    let name = "scrub-unpacked";
    let all = match unpacked::list(&home.unpacked()) {
        Ok(all) => all,
        Err(error) => {
            return vec![fail(
                name,
                error.to_string(),
                "look at the directory's permissions",
            )];
        }
    };
    let mut checks = Vec::new();
    for one in &all {
        if let Err(why) = one.verify() {
            let hint = match one.remove() {
                Ok(true) => "removed; it is unpacked again when it is needed",
                _ => "it could not be removed: another kiln process uses it",
            };
            checks.push(fail(
                name,
                format!("unpacked image {}: {why}", &one.manifest[..12]),
                hint,
            ));
        }
    }
    let bytes = all.iter().map(|one| one.bytes).sum();
    sound(checks, name, all.len(), "unpacked images", bytes)
}

/// Its database is read whole when it is opened, and what it holds is asked for once.
async fn queue(home: &Home) -> Vec<Check> {
    let name = "scrub-jobs";
    if !home.controller().is_dir() {
        return vec![pass(name, "no jobs yet")];
    }
    let asked = async {
        let queue = HomeQueue::open(home).await?;
        let jobs = queue
            .server()
            .get::<List<JobLine>>("/v1/jobs?limit=1")
            .await;
        queue.close().await;
        jobs
    };
    vec![match asked.await {
        Ok(_) => pass(name, "the queue's database is sound"),
        Err(error) => fail(
            name,
            error.message,
            format!(
                "restore a backup, or move {} away: its jobs and logs are gone then",
                home.controller().display()
            ),
        ),
    }]
}

async fn registry(operator: &Operator) -> Vec<Check> {
    let name = "scrub-registry";
    if !operator.home.registry().is_dir() {
        return vec![pass(name, "no registry")];
    }
    let scrubbed = match operator.registry().await {
        Ok(access) => access.host.scrub().await.map_err(|error| chain(&error)),
        Err(error) => Err(error.message),
    };
    let report = match scrubbed {
        Ok(report) => report,
        Err(why) => return vec![fail(name, why, "try again")],
    };
    let mut checks = Vec::new();
    for digest in &report.corrupt {
        checks.push(fail(
            name,
            format!("{digest} is corrupt"),
            "set aside in the registry's corrupt/; build or push the image again",
        ));
    }
    for (repository, manifest) in &report.broken {
        checks.push(fail(
            name,
            format!("{repository}@{manifest} lacks content"),
            "build or push it again, or remove it (`kiln registry rm`); for a base, `kiln bases bake`",
        ));
    }
    sound(
        checks,
        name,
        usize::try_from(report.contents).unwrap_or(usize::MAX),
        "registry blobs",
        report.bytes,
    )
}

/// The troubles, or one line that all is well.
fn sound(troubles: Vec<Check>, name: &str, count: usize, what: &str, bytes: u64) -> Vec<Check> {
    if !troubles.is_empty() {
        return troubles;
    }
    let size = if bytes > 0 {
        format!(" ({})", ByteSize(bytes))
    } else {
        String::new()
    };
    vec![pass(name, format!("{count} {what}{size} are sound"))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_image::heads::Candidate;
    use kiln_machine::driver::CheckLevel;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_corrupt_head_is_found_and_set_aside() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        home.prepare().expect("home");
        let store = HeadStore::open(&home.heads()).expect("open");
        let disk = dir.path().join("disk");
        fs::write(&disk, "shared").expect("write");
        let candidate = Candidate {
            file: &disk,
            stands_on: None,
            written_by: "t".to_owned(),
            buildkit: "v".to_owned(),
            now_unix_ms: 1,
        };
        let head = store.seal_shared(&candidate).expect("seal");
        let checks = heads(&home);
        assert_eq!(
            (checks.len(), checks[0].level),
            (1, CheckLevel::Pass),
            "{checks:?}"
        );
        let file = store.disk(&head);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
        fs::write(&file, "sHared").expect("write");
        let checks = heads(&home);
        assert_eq!(checks[0].level, CheckLevel::Fail);
        assert!(
            checks[0]
                .hint
                .as_deref()
                .is_some_and(|hint| hint.contains("kiln bases bake")),
            "{checks:?}"
        );
        assert!(
            store.current("shared").expect("reads").is_none(),
            "never used again"
        );
    }

    #[test]
    fn a_corrupt_image_is_refused_at_its_next_use() {
        use kiln_core::Digest;
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        let content = Digest::of(b"content");
        let name = format!("ci-{}", content.short(16));
        let image = home.images().join(&name);
        fs::create_dir_all(&image).expect("make");
        fs::write(image.join("kernel"), "kernel").expect("write");
        let manifest = serde_json::json!({
            "schema": 1, "name": name, "content": content, "recipe": content, "guest": content, "root_tree": content,
            "kernel_release": "6", "kernel_args": "", "modules": [], "buildkit_version": "v", "debian": "trixie/amd64",
            "baked_unix_s": 1, "files": {"kernel": {"bytes": 6, "digest": Digest::of(b"kernel")}}, "packages": [],
        });
        fs::write(image.join("manifest.json"), manifest.to_string()).expect("write");
        let all = MachineImages::new(home.images());
        all.verify(&name, VerifyDepth::OncePerBoot).expect("sound");
        assert_eq!(images(&home)[0].level, CheckLevel::Pass);
        // As a failing disk does it: other bytes, and no time that tells.
        let before = fs::metadata(image.join("kernel"))
            .and_then(|meta| meta.modified())
            .expect("time");
        fs::write(image.join("kernel"), "kErnel").expect("write");
        let file = fs::File::options()
            .write(true)
            .open(image.join("kernel"))
            .expect("open");
        file.set_modified(before).expect("set");
        assert_eq!(images(&home)[0].level, CheckLevel::Fail);
        assert!(all.verify(&name, VerifyDepth::OncePerBoot).is_err());
    }

    #[tokio::test]
    async fn an_empty_home_is_sound() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        home.prepare().expect("home");
        for scrub in [images, heads, templates, unpacked_images] {
            assert!(
                scrub(&home)
                    .iter()
                    .all(|check| check.level == CheckLevel::Pass)
            );
        }
    }
}
