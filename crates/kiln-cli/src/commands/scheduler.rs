//! `kiln scheduler`: what holds for a whole installation.

use kiln_controller::api::SchedulerView;
use serde_json::{Map, Value, json};

use super::home_queue;
use super::table::{Facts, counted};
use crate::args::{FillingText, SchedulerCommand, ServerArgs};
use crate::error::{CliError, Result};
use crate::show::Screen;

/// Its route.
const AT: &str = "/v1/scheduler";

pub(super) async fn run(verb: SchedulerCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let change = change(&verb)?;
    let asked = home_queue::ask(said).await?;
    let answered: Result<SchedulerView> = match change {
        None => asked.server.get(AT).await,
        Some(change) => asked.server.post(AT, &change).await,
    };
    asked.done().await;
    let view = answered?;
    screen.data(&view, || show(&view));
    Ok(0)
}

fn change(verb: &SchedulerCommand) -> Result<Option<Map<String, Value>>> {
    let SchedulerCommand::Set { running, filling } = verb else {
        return Ok(None);
    };
    let filling = filling.map(|filling| match filling {
        FillingText::Spread => json!("spread"),
        FillingText::Pack => json!("pack"),
    });
    let fields = [
        ("running_max", running.map(|bound| json!(bound.0))),
        ("filling", filling),
    ];
    let given = fields
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let asked: Map<String, Value> = given.collect();
    if asked.is_empty() {
        return Err(CliError::usage("nothing is to be changed")
            .hint("give --running N, --running none or --filling pack"));
    }
    Ok(Some(asked))
}

fn show(view: &SchedulerView) -> String {
    let mut facts = Facts::default();
    let most = view
        .running_max
        .map_or_else(|| "any number".to_owned(), |most| format!("at most {most}"));
    facts.add("running", format!("{} of {most}", view.running));
    facts.add(
        "reserved",
        format!("{} for tenants", counted(view.reserved, "running job")),
    );
    facts.add(
        "hosts",
        match view.filling.as_str() {
            "pack" => "pack: the fullest first, so that hosts become empty",
            _ => "spread: the emptiest first",
        },
    );
    facts.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Bound;

    #[test]
    fn silence_changes_nothing_and_none_takes_a_bound_away() {
        let set = |running, filling| change(&SchedulerCommand::Set { running, filling });
        assert_eq!(set(None, None).expect_err("usage").exit_code(), 2);
        let asked = set(Some(Bound(None)), Some(FillingText::Pack)).expect("legal");
        let want = json!({ "running_max": null, "filling": "pack" });
        assert_eq!(asked.map(Value::Object), Some(want));
        assert_eq!(change(&SchedulerCommand::Show).expect("legal"), None);
    }
}
