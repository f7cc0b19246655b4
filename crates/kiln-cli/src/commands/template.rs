//! `kiln template`: the frozen machines that others are cloned from.

use std::collections::HashSet;
use std::time::Duration;

use kiln_core::{ByteSize, Digest, TenantName};
use kiln_image::bake::MachineImages;
use kiln_image::heads::{Head, HeadStore, SHARED, own_scope};
use kiln_machine::template::{
    Listed, PrunePolicy, PruneReport, Purpose, TEMPLATE_FORMAT, TemplateStore,
};
use kiln_worker::event::Events;
use kiln_worker::home::Home;
use kiln_worker::host::now_unix_ms;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::table::{Table, counted, left, right};
use super::{setup, when};
use crate::args::TemplateCommand;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;

/// A template that nobody used for this long goes.
pub(super) const UNUSED_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

pub(super) async fn run(
    verb: TemplateCommand,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let operator = Operator::load()?;
    match verb {
        TemplateCommand::Prepare => {
            let (events, receiver) = Events::channel();
            let follow = tokio::spawn(screen.follow(receiver));
            let done = tokio::select! {
                done = prepare(&operator, &events) => done,
                () = cancel.cancelled() => Err(CliError::new(kiln_core::FailureClass::Cancelled, "cancelled")),
            };
            drop(events);
            let _screen_ended = follow.await;
            done?;
            list(&operator.home, screen)?;
        }
        TemplateCommand::List => list(&operator.home, screen)?,
        TemplateCommand::Prune { all } => {
            let report = match open(&operator.home)? {
                Some(store) => prune(&operator.home, &store, all)?,
                None => PruneReport::default(),
            };
            screen.data(
                &json!({ "removed": report.removed, "bytes": report.bytes }),
                || match report.removed.len() {
                    0 => "nothing to remove".to_owned(),
                    count => format!("removed {count}, {} freed", ByteSize(report.bytes)),
                },
            );
        }
    }
    Ok(0)
}

/// The default sizes on the shared head, and on this tenant's own head when builds would fork it.
async fn prepare(operator: &Operator, events: &Events) -> Result<()> {
    let host = operator.host().await?;
    let (run, build) = setup::sizes(operator)?;
    let mut heads: Vec<Head> = host
        .heads
        .current(SHARED)
        .or_infrastructure()?
        .into_iter()
        .collect();
    let forked = host
        .heads
        .to_fork(&own_scope(&TenantName::local()), &host.image.buildkit)
        .or_infrastructure()?;
    heads.extend(forked.filter(|head| head.scope != SHARED));
    if heads.is_empty() {
        events
            .warn("there is no cache head yet, so builds start slowly; `kiln setup` makes one")
            .await;
    }
    kiln_worker::setup::templates(&host, run, build, &heads, events)
        .await
        .map_err(CliError::from_failure)
}

/// The store, when there is one: looking makes nothing.
pub(super) fn open(home: &Home) -> Result<Option<TemplateStore>> {
    let root = home.data.join("templates");
    if !root.is_dir() {
        return Ok(None);
    }
    TemplateStore::open(&root).map(Some).or_infrastructure()
}

/// What makes a template current: the machine image and the heads it stands on are those that jobs use now.
struct Now {
    image: Option<Digest>,
    heads: HashSet<String>,
    /// What this kiln prepares templates as.
    preparations: Vec<String>,
}

impl Now {
    fn of(home: &Home) -> Result<Self> {
        let image = MachineImages::new(home.images()).current().ok();
        let preparations = image
            .as_ref()
            .map(|manifest| kiln_worker::templates::preparations(&manifest.buildkit_version));
        let heads = match home.heads().is_dir() {
            true => HeadStore::open(&home.heads())
                .and_then(|store| store.list())
                .or_infrastructure()?,
            false => Vec::new(),
        };
        // Only the top of each chain is forked.
        let below: HashSet<String> = heads
            .iter()
            .filter_map(|head| head.parent.clone())
            .collect();
        let shared = |head: &Head| head.scope == SHARED;
        let tops = heads
            .into_iter()
            .filter(|head| shared(head) || !below.contains(&head.id));
        Ok(Self {
            image: image.map(|manifest| manifest.content),
            heads: tops.map(|head| head.id).collect(),
            preparations: preparations.map(Vec::from).unwrap_or_default(),
        })
    }

    fn needs(&self, template: &Listed) -> bool {
        template.key.as_ref().is_some_and(|key| {
            key.format == TEMPLATE_FORMAT
                && Some(key.machine_image) == self.image
                && self.preparations.contains(&key.preparation)
                && key.heads.iter().all(|(_, head)| self.heads.contains(head))
        })
    }
}

/// Removes templates that no job would use again; with `all`, every one that is not in use.
pub(super) fn prune(home: &Home, store: &TemplateStore, all: bool) -> Result<PruneReport> {
    let bytes_max = if all { 0 } else { u64::MAX };
    let mut report = PruneReport::default();
    if !all {
        let now = Now::of(home)?;
        let listed = store.list().or_infrastructure()?;
        let stale: Vec<String> = listed
            .into_iter()
            .filter(|template| !now.needs(template))
            .map(|template| template.id)
            .collect();
        report = store.remove_unused(&stale).or_infrastructure()?;
    }
    let rest = store
        .prune(PrunePolicy {
            bytes_max,
            unused_max: UNUSED_MAX,
        })
        .or_infrastructure()?;
    report.bytes += rest.bytes;
    report.removed.extend(rest.removed);
    Ok(report)
}

fn list(home: &Home, screen: Screen) -> Result<()> {
    let all = match open(home)? {
        Some(store) => store.list().or_infrastructure()?,
        None => Vec::new(),
    };
    if all.is_empty() {
        screen.note(
            "no templates yet; `kiln template prepare` makes them, and so does the first job",
        );
        return Ok(());
    }
    let now = Now::of(home)?;
    if screen.json() {
        for one in &all {
            let value = json!({
                "id": one.id, "key": one.key, "bytes": one.bytes, "used_unix_ms": when::unix_ms(one.used),
                "in_use": one.in_use, "current": now.needs(one),
            });
            screen.data(&value, String::new);
        }
    } else {
        screen.text(&table(&all, |one| now.needs(one), now_unix_ms()));
        let stale = all.iter().filter(|one| !one.in_use && !now.needs(one));
        let (count, bytes) =
            stale.fold((0, 0), |(count, bytes), one| (count + 1, bytes + one.bytes));
        if count > 0 {
            screen.note(&format!(
                "{} no job would use again: `kiln template prune` frees {}",
                counted(count, "stale template"),
                ByteSize(bytes)
            ));
        }
    }
    Ok(())
}

fn table(all: &[Listed], current: impl Fn(&Listed) -> bool, now_unix_ms: u64) -> String {
    let columns = [
        left("ID"),
        left("FOR"),
        right("CPUS"),
        right("MEMORY"),
        right("DISK"),
        left("USED"),
        left("STATE"),
    ];
    let mut table = Table::new(&columns);
    for one in all {
        let (purpose, cpus, memory) = match &one.key {
            None => ("?".to_owned(), "?".to_owned(), "?".to_owned()),
            Some(key) => {
                let purpose = match (key.purpose, key.heads.first()) {
                    (Purpose::Run, _) => "run".to_owned(),
                    (Purpose::Build, None) => "build".to_owned(),
                    (Purpose::Build, Some((_, head))) => {
                        format!("build on {}", head.get(..8).unwrap_or(head))
                    }
                };
                (purpose, key.cpus.to_string(), key.memory.to_string())
            }
        };
        let state = match (one.in_use, current(one)) {
            (true, _) => "in use",
            (false, true) => "ready",
            (false, false) => "stale",
        };
        let used = when::ago(when::unix_ms(one.used), now_unix_ms);
        let id = one.id.get(..12).unwrap_or(&one.id).to_owned();
        table.row([
            id,
            purpose,
            cpus,
            memory,
            ByteSize(one.bytes).to_string(),
            used,
            state.to_owned(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::DiskRole;
    use kiln_machine::template::TemplateKey;
    use std::time::UNIX_EPOCH;

    fn listed(image: &[u8], heads: &[&str]) -> Listed {
        let key = TemplateKey {
            format: TEMPLATE_FORMAT,
            purpose: Purpose::Build,
            preparation: "run 1".to_owned(),
            machine_image: Digest::of(image),
            boot_args: Vec::new(),
            host: Vec::new(),
            cpus: 2,
            memory: ByteSize::gib(2),
            disks: Vec::new(),
            heads: heads
                .iter()
                .map(|head| (DiskRole::State, (*head).to_owned()))
                .collect(),
        };
        Listed {
            id: key.id(),
            key: Some(key),
            bytes: 300 << 20,
            used: UNIX_EPOCH + Duration::from_secs(100),
            in_use: false,
        }
    }

    #[test]
    fn templates_of_other_images_and_heads_are_stale() {
        let head = "a".repeat(32);
        let now = Now {
            image: Some(Digest::of(b"now")),
            heads: [head.clone()].into(),
            preparations: vec!["run 1".to_owned()],
        };
        assert!(now.needs(&listed(b"now", &[&head])));
        assert!(now.needs(&listed(b"now", &[])));
        assert!(!now.needs(&listed(b"old", &[])));
        assert!(!now.needs(&listed(b"now", &["gone"])));
        let mut other = listed(b"now", &[]);
        if let Some(key) = &mut other.key {
            key.preparation = "run 0".to_owned();
        }
        assert!(!now.needs(&other), "another kiln prepared it");
        assert!(!now.needs(&Listed {
            key: None,
            ..listed(b"now", &[])
        }));
    }

    #[test]
    fn the_table_fits() {
        let one = listed(b"now", &[&"a".repeat(32)]);
        let id = one.id.clone();
        let text = table(&[one], |_| true, 160_000);
        let line = text.lines().nth(1).expect("a row");
        let rest = "build on aaaaaaaa     2  2.0 GiB  300.0 MiB  1 min ago  ready";
        assert_eq!(line, format!("{}  {rest}", &id[..12]));
        assert!(
            text.lines()
                .all(|line| line.chars().count() <= super::super::table::WIDTH)
        );
    }

    #[test]
    fn looking_makes_nothing() {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(&dir.path().join("home"));
        assert!(open(&home).expect("no store").is_none());
        assert!(!home.data.exists());
    }
}
