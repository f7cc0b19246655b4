//! What goes when `kiln cache prune` runs: first what nothing needs, then the least recently used until the rest fits the
//! budget. Everything removed here can be made again.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use kiln_controller::api::JobView;
use kiln_core::{ByteSize, FailureClass, JobId};
use kiln_image::bake::images::KEEP;
use kiln_image::bake::stage::{StageCache, StageError};
use kiln_image::bake::{BakeEvent, Cancel, MachineImages};
use kiln_image::heads::{HeadStore, SHARED};
use kiln_machine::reap::sweep_partial;
use kiln_machine::template::PrunePolicy;
use kiln_store::host::HostRegistry;
use kiln_store::registry::{GRACE_DEFAULT, Reference, RepoName};
use kiln_worker::home::Home;
use kiln_worker::repeat::Results;
use serde::Serialize;
use serde_json::Value;

use super::super::home_queue::HomeQueue;
use super::super::operator::Operator;
use super::super::table::{Table, left, right};
use super::super::{disk_use, template};
use super::{budgeted, names, survey, unpacked};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::server::Server;
use crate::show::Screen;

/// Bake stages of each kind that stay: the present one, and the one before for a way back.
const STAGES_KEPT: usize = 2;

/// What one step of pruning removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
struct Removed {
    what: &'static str,
    count: u64,
    bytes: u64,
}

impl Removed {
    fn of(what: &'static str, count: usize, bytes: u64) -> Self {
        Self {
            what,
            count: count as u64,
            bytes,
        }
    }
}

/// Removes what nothing needs, then what does not fit the budget; tells what went.
pub(super) async fn prune(operator: &Operator, forget_heads: bool, screen: Screen) -> Result<()> {
    let home = &operator.home;
    let mut removed = Vec::new();
    if home.heads().is_dir() {
        removed.push(prune_heads(&home.heads(), forget_heads)?);
        if forget_heads {
            // Who forgets the cache wants the next build to run, also when nothing changed.
            Results::below(&home.data)
                .forget_all()
                .or_infrastructure()?;
        }
    }
    if let Some(store) = template::open(home)? {
        let report = template::prune(home, &store, false)?;
        removed.push(Removed::of("templates", report.removed.len(), report.bytes));
    }
    if home.registry().is_dir() {
        removed.extend(prune_registry(operator).await?);
    }
    removed.push(measured("machine images", &home.images(), || {
        MachineImages::new(home.images())
            .prune(KEEP, &[])
            .map(|names| names.len())
            .or_infrastructure()
    })?);
    match prune_stages(&home.cache.join("bake"))? {
        Some(bytes) => removed.push(Removed::of("bake stages", usize::from(bytes > 0), bytes)),
        None => screen.note("a bake is running, so its stages are left alone"),
    }
    sweep(home, screen);
    removed.extend(fit(operator, screen).await?);
    tell(&removed, screen);
    Ok(())
}

/// What a step removed, and by how much its directory shrank.
fn measured(
    what: &'static str,
    dir: &Path,
    step: impl FnOnce() -> Result<usize>,
) -> Result<Removed> {
    let before = disk_use::of(dir);
    let count = step()?;
    Ok(Removed::of(
        what,
        count,
        before.saturating_sub(disk_use::of(dir)),
    ))
}

fn prune_heads(dir: &Path, forget: bool) -> Result<Removed> {
    let store = HeadStore::open(dir).or_infrastructure()?;
    let before = names_below(dir);
    if forget {
        forget_all(&store)?;
    }
    let bytes = store.prune().or_infrastructure()?;
    Ok(Removed::of(
        "cache heads",
        before.saturating_sub(names_below(dir)),
        bytes,
    ))
}

async fn prune_registry(operator: &Operator) -> Result<[Removed; 3]> {
    let home = &operator.home;
    let queue = HomeQueue::open(home).await?;
    let host = queue.registry().host.clone();
    let quarantines = orphans(&queue.server(), &host).await;
    queue.close().await;
    let quarantines = quarantines?;
    let collected = host.gc(GRACE_DEFAULT).await.or_infrastructure()?;
    let named = named_manifests(&host).await?;
    let (count, bytes) =
        unpacked::prune_unreferenced(&home.unpacked(), &named).or_infrastructure()?;
    Ok([
        Removed::of("quarantines", quarantines, 0),
        Removed {
            what: "registry blobs",
            count: collected.contents,
            bytes: collected.bytes,
        },
        Removed::of("unpacked images", count, bytes),
    ])
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
async fn orphans(server: &Server, host: &HostRegistry) -> Result<usize> {
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
    let mut over = Vec::new();
    for job in jobs {
        let asked = server.get::<JobView>(&format!("/v1/jobs/{job}")).await;
        match asked {
            Ok(job) if job.line.state != "finished" => continue,
            Ok(_) => {}
            // Nobody knows it: what pushed there is gone with its home's queue.
            Err(error) if error.class == FailureClass::Usage => {}
            Err(error) => return Err(error),
        }
        over.push(job);
    }
    for job in &over {
        match host.delete_tree(&RepoName::quarantine_of_job(job)).await {
            Err(error) if !error.is_not_found() => {
                return Err(CliError::infrastructure(&error));
            }
            _ => {}
        }
    }
    Ok(over.len())
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
    use kiln_core::Digest;
    use kiln_image::heads::Candidate;
    use kiln_machine::driver::TemplateRef;
    use kiln_machine::template::{Held, Purpose, TEMPLATE_FORMAT, TemplateKey, TemplateStore};
    use serde_json::json;

    fn operator(root: &Path) -> Operator {
        let home = Home::below(root);
        home.prepare().expect("home");
        Operator {
            home,
            config: crate::config::Config::default(),
            registries: None,
        }
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

    /// A template of a megabyte.
    async fn template(store: &TemplateStore, name: &str) -> Held {
        let key = TemplateKey {
            format: TEMPLATE_FORMAT,
            purpose: Purpose::Run,
            preparation: name.to_owned(),
            machine_image: Digest::of(b"image"),
            boot_args: Vec::new(),
            host: Vec::new(),
            cpus: 1,
            memory: ByteSize::mib(512),
            disks: Vec::new(),
            heads: Vec::new(),
        };
        let fill = |at: TemplateRef| async move { fs::write(at.dir.join("ram"), vec![7; 1 << 20]) };
        store.get_or_make(&key, &|_| {}, fill).await.expect("made")
    }

    #[tokio::test]
    async fn over_the_budget_the_least_recently_used_templates_go_unless_they_are_used() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut operator = operator(dir.path());
        let root = operator.home.data.join("templates");
        let store = TemplateStore::open(&root).expect("open");
        let ids = |store: &TemplateStore| -> Vec<String> {
            let listed = store.list().expect("list").into_iter();
            listed.map(|one| one.id).collect()
        };
        let old = template(&store, "old").await;
        let new = template(&store, "new").await;
        let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        fs::File::open(old.template.dir.join("lock"))
            .and_then(|lock| lock.set_modified(hour_ago))
            .expect("older");
        drop(old);
        let all = budgeted(&survey(&operator).await.expect("looks"));
        assert!(all > 2 << 20, "{all}");
        operator.config.cache.budget.0 = ByteSize(all);
        let quiet = Screen::new(true);
        assert!(fit(&operator, quiet).await.expect("fits").is_empty());
        operator.config.cache.budget.0 = ByteSize(all - 1);
        let removed = fit(&operator, quiet).await.expect("fits");
        assert_eq!(
            (removed[0].what, removed[0].count),
            ("templates over budget", 1)
        );
        assert!(removed[0].bytes >= 1 << 20);
        assert_eq!(ids(&store), std::slice::from_ref(&new.template.key));
        // What a machine uses stays, however small the budget is.
        operator.config.cache.budget.0 = ByteSize(0);
        fit(&operator, quiet).await.expect("fits");
        assert_eq!(ids(&store).len(), 1);
        drop(new);
        fit(&operator, quiet).await.expect("fits");
        assert_eq!(ids(&store), [""; 0]);
    }
}
