//! `kiln cache`: what kiln keeps on this disk, and keeping it within the operator's budget.

pub(super) mod unpacked;

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use kiln_core::{ByteSize, JobId};
use kiln_image::bake::images::KEEP;
use kiln_image::bake::stage::{StageCache, StageError};
use kiln_image::bake::{BakeEvent, Cancel, MachineImages};
use kiln_image::heads::{HeadStore, SHARED};
use kiln_machine::reap::sweep_partial;
use kiln_machine::template::PrunePolicy;
use kiln_store::host::HostRegistry;
use kiln_store::records::{KEEP_DEFAULT, RecordState, Records};
use kiln_store::registry::{GRACE_DEFAULT, Reference, RepoName};
use kiln_worker::home::Home;
use serde::Serialize;
use serde_json::{Value, json};

use super::operator::Operator;
use super::table::{Table, left, right};
use super::{disk_use, template};
use crate::args::CacheCommand;
use crate::error::{OrInfrastructure as _, Result};
use crate::show::Screen;

/// Bake stages of each kind that stay: the present one, and the one before for a way back.
const STAGES_KEPT: usize = 2;

pub(super) async fn run(verb: CacheCommand, screen: Screen) -> Result<u8> {
    let operator = Operator::load()?;
    match verb {
        CacheCommand::Show => show(&operator, screen).await?,
        CacheCommand::Prune { heads } => prune(&operator, heads, screen).await?,
    }
    Ok(0)
}

/// One kind of thing that is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Part {
    what: &'static str,
    count: u64,
    bytes: u64,
    /// Whether it counts against the budget.
    budgeted: bool,
}

/// What there is. Looks at files only, apart from the registry's own count.
async fn survey(operator: &Operator) -> Result<Vec<Part>> {
    let home = &operator.home;
    let images = MachineImages::new(home.images())
        .list()
        .or_infrastructure()?
        .len();
    let templates = template::open(home)?
        .map(|store| store.list())
        .transpose()
        .or_infrastructure()?
        .unwrap_or_default();
    let heads = match home.heads().is_dir() {
        true => HeadStore::open(&home.heads())
            .and_then(|store| store.list())
            .or_infrastructure()?
            .len(),
        false => 0,
    };
    let unpacked = unpacked::list(&home.unpacked()).or_infrastructure()?.len();
    let contents = match home.registry().is_dir() {
        true => {
            operator
                .registry()
                .await?
                .host
                .stats()
                .await
                .or_infrastructure()?
                .contents
        }
        false => 0,
    };
    let jobs = match home.jobs().is_dir() {
        true => Records::open(&home.jobs())
            .and_then(|records| records.list(0, 0))
            .or_infrastructure()
            .map(|_| names(&home.jobs()))?,
        false => 0,
    };
    let part = |what, count: usize, path: &Path, budgeted| Part {
        what,
        count: count as u64,
        bytes: disk_use::of(path),
        budgeted,
    };
    let data = |name: &str| home.data.join(name);
    Ok(vec![
        part("templates", templates.len(), &data("templates"), true),
        part("cache heads", heads, &home.heads(), true),
        part("unpacked images", unpacked, &home.unpacked(), true),
        part(
            "registry blobs",
            usize::try_from(contents).unwrap_or(usize::MAX),
            &home.registry(),
            true,
        ),
        part("machine images", images, &home.images(), false),
        part(
            "bake stages",
            names(&home.cache.join("bake")),
            &home.cache.join("bake"),
            false,
        ),
        part("job records", jobs, &home.jobs(), false),
        part(
            "machines",
            names(&data("machines")),
            &data("machines"),
            false,
        ),
    ])
}

/// Visible directories in a directory.
fn names(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let visible = |entry: &fs::DirEntry| !entry.file_name().to_string_lossy().starts_with('.');
    entries
        .filter(|entry| visible(entry) && entry.path().is_dir())
        .count()
}

fn budgeted(parts: &[Part]) -> u64 {
    parts
        .iter()
        .filter(|part| part.budgeted)
        .map(|part| part.bytes)
        .sum()
}

async fn show(operator: &Operator, screen: Screen) -> Result<()> {
    let parts = survey(operator).await?;
    let budget = operator.config.cache.budget.0;
    if screen.json() {
        for part in &parts {
            screen.data(part, String::new);
        }
        screen.data(
            &json!({ "budget": budget, "budgeted_bytes": budgeted(&parts) }),
            String::new,
        );
    } else {
        screen.text(&table(&parts, budget));
    }
    if budgeted(&parts) > budget.0 {
        screen.note("over the budget: `kiln cache prune` removes what is not needed");
    }
    Ok(())
}

fn table(parts: &[Part], budget: ByteSize) -> String {
    let mut table = Table::new(&[left("WHAT"), right("COUNT"), right("DISK"), left("BUDGET")]);
    for part in parts {
        let counts = if part.budgeted { "counts" } else { "" };
        table.row([
            part.what.to_owned(),
            part.count.to_string(),
            ByteSize(part.bytes).to_string(),
            counts.to_owned(),
        ]);
    }
    let used = ByteSize(budgeted(parts));
    let all = ByteSize(parts.iter().map(|part| part.bytes).sum());
    format!(
        "{}\n{all} in all; {used} of the budget of {budget} (cache.budget in kiln.toml)\n",
        table.render()
    )
}

/// What one step of pruning removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
struct Removed {
    what: &'static str,
    count: u64,
    bytes: u64,
}

async fn prune(operator: &Operator, forget_heads: bool, screen: Screen) -> Result<()> {
    let home = &operator.home;
    let mut removed = Vec::new();
    let mut done = |what, count: usize, bytes: u64| {
        removed.push(Removed {
            what,
            count: count as u64,
            bytes,
        })
    };
    if home.heads().is_dir() {
        let store = HeadStore::open(&home.heads()).or_infrastructure()?;
        let before = names_below(&home.heads());
        if forget_heads {
            forget_all(&store)?;
        }
        let bytes = store.prune().or_infrastructure()?;
        done(
            "cache heads",
            before.saturating_sub(names_below(&home.heads())),
            bytes,
        );
    }
    if let Some(store) = template::open(home)? {
        let report = template::prune(home, &store, false)?;
        done("templates", report.removed.len(), report.bytes);
    }
    if home.registry().is_dir() {
        let host = operator.registry().await?.host;
        let trees = orphans(home, &host).await?;
        done("quarantines", trees, 0);
        let collected = host.gc(GRACE_DEFAULT).await.or_infrastructure()?;
        done(
            "registry blobs",
            usize::try_from(collected.contents).unwrap_or(usize::MAX),
            collected.bytes,
        );
        let (count, bytes) =
            unpacked::prune_unreferenced(&home.unpacked(), &named_manifests(&host).await?)
                .or_infrastructure()?;
        done("unpacked images", count, bytes);
    }
    let images = MachineImages::new(home.images());
    let before = disk_use::of(&home.images());
    let names = images.prune(KEEP, &[]).or_infrastructure()?;
    done(
        "machine images",
        names.len(),
        before.saturating_sub(disk_use::of(&home.images())),
    );
    match prune_stages(&home.cache.join("bake"))? {
        Some(bytes) => done("bake stages", usize::from(bytes > 0), bytes),
        None => screen.note("a bake is running, so its stages are left alone"),
    }
    if home.jobs().is_dir() {
        let before = disk_use::of(&home.jobs());
        let pruned = Records::open(&home.jobs())
            .and_then(|records| records.prune(KEEP_DEFAULT))
            .or_infrastructure()?;
        done(
            "job records",
            pruned.removed,
            before.saturating_sub(disk_use::of(&home.jobs())),
        );
    }
    sweep(home, screen);
    removed.extend(fit(operator, screen).await?);
    tell(&removed, screen);
    Ok(())
}

fn forget_all(store: &HeadStore) -> Result<()> {
    let mut scopes: Vec<String> = store
        .list()
        .or_infrastructure()?
        .into_iter()
        .map(|head| head.scope)
        .collect();
    scopes.sort();
    scopes.dedup();
    for scope in scopes.iter().filter(|scope| *scope != SHARED) {
        store.forget(scope).or_infrastructure()?;
    }
    Ok(())
}

/// Heads on disk, of all scopes.
fn names_below(heads: &Path) -> usize {
    let scopes = fs::read_dir(heads).into_iter().flatten().flatten();
    scopes.map(|scope| names(&scope.path())).sum()
}

/// Half-written files whose writer is gone.
fn sweep(home: &Home, screen: Screen) {
    let dirs = [
        home.data.clone(),
        home.data.join("templates"),
        home.unpacked(),
        home.images(),
    ];
    for leak in sweep_partial(&dirs).leaks {
        screen.note(&format!("warning: could not remove {leak}"));
    }
}

/// Removes what jobs that are over left in quarantine; gives how many jobs.
async fn orphans(home: &Home, host: &HostRegistry) -> Result<usize> {
    let records = match home.jobs().is_dir() {
        true => Some(Records::open(&home.jobs()).or_infrastructure()?),
        false => None,
    };
    let mut jobs: Vec<JobId> = Vec::new();
    for repository in host.list_repositories(None).await.or_infrastructure()? {
        let mut parts = repository.as_str().split('/');
        if parts.next() == Some("quarantine")
            && let Some(Ok(job)) = parts.next().map(str::parse::<JobId>)
        {
            jobs.push(job);
        }
    }
    jobs.sort();
    jobs.dedup();
    jobs.retain(|job| {
        let state = records
            .as_ref()
            .and_then(|records| records.show(job).ok())
            .map(|record| record.state);
        state != Some(RecordState::Running)
    });
    for job in &jobs {
        match host.delete_tree(&RepoName::quarantine_of_job(job)).await {
            Err(error) if !error.is_not_found() => {
                return Err(crate::error::CliError::infrastructure(&error));
            }
            _ => {}
        }
    }
    Ok(jobs.len())
}

/// Digests, in hex, of every manifest that a tag names, directly or through an index.
async fn named_manifests(host: &HostRegistry) -> Result<HashSet<String>> {
    let mut named = HashSet::new();
    for repository in host.list_repositories(None).await.or_infrastructure()? {
        // What vanishes in between is not named any more.
        for tag in host.list_tags(&repository).await.unwrap_or_default() {
            let Ok(stored) = host.get_manifest(&repository, &Reference::Tag(tag)).await else {
                continue;
            };
            named.insert(stored.digest.hex());
            let index: Value = serde_json::from_slice(&stored.bytes).unwrap_or_default();
            let children = index["manifests"]
                .as_array()
                .map(Vec::as_slice)
                .unwrap_or_default();
            let digests = children
                .iter()
                .filter_map(|child| child["digest"].as_str()?.strip_prefix("sha256:"));
            named.extend(digests.map(str::to_owned));
        }
    }
    Ok(named)
}

/// Bytes freed; `None` while a bake holds the stages.
fn prune_stages(dir: &Path) -> Result<Option<u64>> {
    if !dir.is_dir() {
        return Ok(Some(0));
    }
    let cancel = Cancel::new();
    let give_up = |event: &BakeEvent<'_>| {
        if matches!(event, BakeEvent::Waiting) {
            cancel.cancel();
        }
    };
    match StageCache::open(dir, &give_up, &cancel) {
        Ok(stages) => stages
            .prune(STAGES_KEPT)
            .map(|bytes| Some(bytes.0))
            .or_infrastructure(),
        Err(StageError::Cancelled) => Ok(None),
        Err(error) => Err(error).or_infrastructure(),
    }
}

/// Removes the least recently used templates, then unpacked images, until the rest fits the budget.
async fn fit(operator: &Operator, screen: Screen) -> Result<Vec<Removed>> {
    let (home, budget) = (&operator.home, operator.config.cache.budget.0.0);
    let mut removed = Vec::new();
    let mut over = budgeted(&survey(operator).await?).saturating_sub(budget);
    if over > 0
        && let Some(store) = template::open(home)?
    {
        let taken: u64 = store
            .list()
            .or_infrastructure()?
            .iter()
            .map(|one| one.bytes)
            .sum();
        let policy = PrunePolicy {
            bytes_max: taken.saturating_sub(over),
            unused_max: template::UNUSED_MAX,
        };
        let report = store.prune(policy).or_infrastructure()?;
        over = over.saturating_sub(report.bytes);
        removed.push(Removed {
            what: "templates over budget",
            count: report.removed.len() as u64,
            bytes: report.bytes,
        });
    }
    if over > 0 {
        let (count, bytes) = unpacked::prune_oldest(&home.unpacked(), over).or_infrastructure()?;
        over = over.saturating_sub(bytes);
        removed.push(Removed {
            what: "unpacked images over budget",
            count: count as u64,
            bytes,
        });
    }
    if over > 0 {
        screen.note(&format!(
            "still {} over the budget of {}: remove images (`kiln registry rm`), forget build caches (`kiln cache prune --heads`), \
             or raise cache.budget in kiln.toml",
            ByteSize(over),
            ByteSize(budget)
        ));
    }
    Ok(removed)
}

fn tell(removed: &[Removed], screen: Screen) {
    if screen.json() {
        for one in removed {
            screen.data(one, String::new);
        }
    } else {
        screen.text(&summary(removed));
    }
}

fn summary(removed: &[Removed]) -> String {
    let gone: Vec<&Removed> = removed
        .iter()
        .filter(|one| one.count > 0 || one.bytes > 0)
        .collect();
    if gone.is_empty() {
        return "nothing to remove".to_owned();
    }
    let mut table = Table::new(&[left("REMOVED"), right("COUNT"), right("FREED")]);
    for one in &gone {
        table.row([
            one.what.to_owned(),
            one.count.to_string(),
            ByteSize(one.bytes).to_string(),
        ]);
    }
    let all = ByteSize(gone.iter().map(|one| one.bytes).sum());
    format!("{}\n{all} freed\n", table.render())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_image::heads::Candidate;

    fn operator(root: &Path) -> Operator {
        let home = Home::below(root);
        home.prepare().expect("home");
        Operator {
            home,
            config: crate::config::Config::default(),
            registries: None,
        }
    }

    #[test]
    fn the_budget_is_said() {
        let part = |what, bytes, budgeted| Part {
            what,
            count: 2,
            bytes,
            budgeted,
        };
        let parts = [
            part("templates", 3 << 30, true),
            part("machine images", 1 << 30, false),
        ];
        let want = "\
WHAT            COUNT     DISK  BUDGET
templates           2  3.0 GiB  counts
machine images      2  1.0 GiB

4.0 GiB in all; 3.0 GiB of the budget of 60.0 GiB (cache.budget in kiln.toml)
";
        assert_eq!(table(&parts, ByteSize::gib(60)), want);
    }

    #[tokio::test]
    async fn a_home_without_anything_is_all_zero() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(&dir.path().join("none"));
        let operator = Operator {
            home,
            config: crate::config::Config::default(),
            registries: None,
        };
        let parts = survey(&operator).await.expect("surveys");
        assert!(
            parts.iter().all(|part| part.count == 0 && part.bytes == 0),
            "{parts:?}"
        );
        prune(&operator, true, Screen::new(true))
            .await
            .expect("prunes nothing");
        assert!(!operator.home.data.exists());
    }

    #[tokio::test]
    async fn pruning_heads_spares_the_shared_one_and_clears_quarantine() {
        let dir = tempfile::tempdir().expect("temp dir");
        let operator = operator(dir.path());
        let heads = HeadStore::open(&operator.home.heads()).expect("open");
        let disk = dir.path().join("disk");
        let candidate = |stands_on| Candidate {
            file: &disk,
            stands_on,
            written_by: "test".to_owned(),
            buildkit: "v1".to_owned(),
            now_unix_ms: 1,
        };
        fs::write(&disk, "shared").expect("write");
        let shared = heads.seal_shared(&candidate(None)).expect("seal");
        fs::write(&disk, "own").expect("write");
        heads
            .commit("local", Some(&shared), &candidate(Some(&shared)))
            .expect("commit");
        let host = operator.registry().await.expect("registry").host;
        let media = "application/vnd.oci.image.index.v1+json";
        let bytes = json!({"schemaVersion": 2, "mediaType": media, "manifests": []})
            .to_string()
            .into_bytes();
        let repo: RepoName = "quarantine/b00000000100000001/1".parse().expect("name");
        host.put_manifest(&repo, &Reference::Tag("out".to_owned()), media, bytes)
            .await
            .expect("put");
        prune(&operator, false, Screen::new(true))
            .await
            .expect("prunes");
        assert!(heads.current("local").expect("reads").is_some());
        assert!(
            host.list_repositories(None)
                .await
                .expect("lists")
                .is_empty()
        );
        prune(&operator, true, Screen::new(true))
            .await
            .expect("prunes");
        assert!(heads.current("local").expect("reads").is_none());
        assert_eq!(heads.list().expect("lists"), [shared]);
        assert_eq!(names_below(&operator.home.heads()), 1);
    }
}
