//! `kiln setup host`: what root prepares once so that kiln needs root no more.
//!
//! The steps are data: `plan` decides them from what was asked and what is there, this prints them as a script or has `apply` do
//! them. Nothing here starts kiln or bakes anything.

mod apply;
mod facts;
mod plan;

use crate::args::{HostArgs, HostMode};
use crate::error::{CliError, Result};
use crate::show::Screen;

use facts::Facts;
use plan::{Step, Wanted};

pub(super) async fn run(args: &HostArgs, screen: Screen) -> Result<u8> {
    let root = rustix::process::geteuid().is_root();
    if args.apply && !root {
        return Err(CliError::usage("only root may prepare a host")
            .hint("run it with sudo, or give root what `kiln setup host --print` prints"));
    }
    let wanted = Wanted::of(args, facts::asking_user().await)?;
    let facts = Facts::gather(&wanted).await?;
    let steps = plan::steps(&wanted, &facts)?;
    if args.apply {
        return apply_all(&steps, &wanted, screen).await;
    }
    if screen.json() {
        for step in &steps {
            screen.data(&step.told("planned"), String::new);
        }
    } else {
        screen.data(&(), || plan::script(&wanted, &steps));
    }
    screen.note(&after(&wanted));
    Ok(0)
}

async fn apply_all(steps: &[Step], wanted: &Wanted, screen: Screen) -> Result<u8> {
    for step in steps {
        let state = match apply::step(step).await? {
            apply::Done::Made => "made",
            apply::Done::Unchanged => "unchanged",
        };
        screen.data(&step.told(state), || format!("{state:<10}{}", step.what()));
    }
    screen.note(&after(wanted));
    Ok(0)
}

/// What is left for a person to do.
fn after(wanted: &Wanted) -> String {
    let state = wanted.state.display();
    match wanted.mode {
        HostMode::User => {
            "no sudoers entry is needed; a new group counts from the next login on".to_owned()
        }
        HostMode::Agent => format!(
            "no sudoers entry is needed; give the agent KILN_HOME={state} and restart it, then run `kiln setup` as {}",
            wanted.user
        ),
        HostMode::Service => format!(
            "then, as {}: KILN_HOME={state} kiln setup; as a member of {}: sudo systemctl start {}",
            wanted.user,
            wanted.operators,
            plan::UNIT
        ),
    }
}
