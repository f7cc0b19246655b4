//! `kiln cache`: what kiln keeps on this disk, and keeping it within the operator's budget.

mod prune;
pub(super) mod unpacked;

use std::fs;
use std::path::Path;

use kiln_core::ByteSize;
use kiln_image::bake::MachineImages;
use kiln_image::heads::HeadStore;
use serde::Serialize;
use serde_json::json;

use super::operator::Operator;
use super::table::{Table, left, right};
use super::{disk_use, template};
use crate::args::CacheCommand;
use crate::error::{OrInfrastructure as _, Result};
use crate::show::Screen;

pub(super) async fn run(verb: CacheCommand, screen: Screen) -> Result<u8> {
    let operator = Operator::load()?;
    match verb {
        CacheCommand::Show => show(&operator, screen).await?,
        CacheCommand::Prune { heads } => prune::prune(&operator, heads, screen).await?,
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
    let templates = match template::open(home)? {
        Some(store) => store.list().or_infrastructure()?.len(),
        None => 0,
    };
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
    let part = |what, count: usize, path: &Path, budgeted| {
        let bytes = disk_use::of(path);
        Part {
            what,
            count: count as u64,
            bytes,
            budgeted,
        }
    };
    let blobs = usize::try_from(contents).unwrap_or(usize::MAX);
    let (bake, machines) = (home.cache.join("bake"), home.data.join("machines"));
    let queue = home.controller();
    Ok(vec![
        part("templates", templates, &home.data.join("templates"), true),
        part("cache heads", heads, &home.heads(), true),
        part("unpacked images", unpacked, &home.unpacked(), true),
        part("registry blobs", blobs, &home.registry(), true),
        part("machine images", images, &home.images(), false),
        part("bake stages", names(&bake), &bake, false),
        part("jobs and logs", usize::from(queue.is_dir()), &queue, false),
        part("machines", names(&machines), &machines, false),
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

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_worker::home::Home;

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
        prune::prune(&operator, true, Screen::new(true))
            .await
            .expect("prunes nothing");
        assert!(!operator.home.data.exists());
    }
}
