//! The process that keeps one machine, and how a command starts it.
//!
//! A command that ends cannot become something else: its shell waits for it. So it lets go of its machine, starts this same program once more, and
//! hands over by its standard input; the keeper answers with one line when the machine is its own. It has no terminal, no session of the command's and
//! no file of it open but its log, and its memory is what one connection to a guest needs.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Stdio;
use std::time::Duration;

use kiln_core::FailureClass;
use kiln_network::OwnPlaces;
use kiln_network::gateway::CONTROLLER;
use kiln_worker::fleet::mask::Mask;
use kiln_worker::kept::keeper::keep;
use kiln_worker::kept::{Facts, Handover, LOG_FILE};
use rustix::process::{chdir, setsid};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::watch;
use crate::commands::home_queue;
use crate::commands::operator::Operator;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::Screen;

/// Longest wait for a keeper to adopt its machine.
const READY_TIMEOUT: Duration = Duration::from_secs(45);
/// Most bytes of a handover, and of the answer.
const HANDOVER_BYTES_MAX: u64 = 512 * 1024;
/// This very program, also when its file was replaced meanwhile.
pub(super) const PROGRAM: &str = "/proc/self/exe";

/// What the process of a keeper is given.
#[derive(Debug, Serialize, Deserialize)]
struct Given {
    #[serde(flatten)]
    handover: Handover,
    /// Where the installation is, as the controller told this process.
    #[serde(default)]
    own: Vec<String>,
}

impl Given {
    /// What this process hands over.
    fn of(handover: &Handover) -> Self {
        Self {
            handover: handover.clone(),
            own: OwnPlaces::of_process().told_by(CONTROLLER),
        }
    }

    /// Nobody tells a keeper anything later: what the controller said last holds until the machine's end.
    fn keeps_off(&self) {
        OwnPlaces::of_process().set(CONTROLLER, self.own.iter().map(String::as_str));
    }
}

/// Hands a machine without an owner over to a keeper.
///
/// # Errors
/// When there is none that takes it; then the machine is removed.
pub(in crate::commands) async fn hand_over(
    operator: &Operator,
    handover: &Handover,
) -> Result<Facts> {
    let started = start(operator, handover).or_infrastructure();
    let taken = async {
        let mut child = started?;
        let taken = tokio::time::timeout(READY_TIMEOUT, greet(&mut child, handover)).await;
        let why = match taken {
            Ok(Ok(facts)) => return Ok(facts),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("its keeper did not take it within {READY_TIMEOUT:?}"),
        };
        let _dead_already = child.kill().await;
        Err(CliError::new(
            FailureClass::Infrastructure,
            format!("the machine could not be kept: {why}"),
        ))
    };
    let taken = taken.await;
    if taken.is_err() {
        discard(operator, handover).await;
    }
    taken
}

fn start(operator: &Operator, handover: &Handover) -> io::Result<Child> {
    let dir = operator
        .home
        .data
        .join("machines")
        .join(handover.machine.as_str());
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(dir.join(LOG_FILE))?;
    Command::new(PROGRAM)
        .arg0("kiln")
        .args(["--json", "keep-machine"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
}

async fn greet(child: &mut Child, handover: &Handover) -> io::Result<Facts> {
    let (Some(mut to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    to.write_all(&serde_json::to_vec(&Given::of(handover))?)
        .await?;
    drop(to);
    let mut line = String::new();
    BufReader::new(from.take(HANDOVER_BYTES_MAX))
        .read_line(&mut line)
        .await?;
    if line.is_empty() {
        return Err(io::Error::other("its keeper ended at once"));
    }
    if let Ok(facts) = serde_json::from_str(&line) {
        return Ok(facts);
    }
    let told: serde_json::Value = serde_json::from_str(&line)?;
    Err(io::Error::other(
        told["message"]
            .as_str()
            .unwrap_or("its keeper gave no reason")
            .to_owned(),
    ))
}

/// Nobody else will.
async fn discard(operator: &Operator, handover: &Handover) {
    let Ok(host) = operator.host().await else {
        return;
    };
    match host.driver.adopt(&handover.machine).await {
        Ok(machine) => {
            let _next_reaper = machine.destroy().await;
        }
        Err(error) => tracing::warn!(
            error = chain(&error),
            "the machine stays until its time is over"
        ),
    }
}

/// `kiln keep-machine`: keeps the machine that standard input names.
pub(in crate::commands) async fn run(screen: Screen, cancel: CancellationToken) -> Result<u8> {
    // Fails only where it leads a session already: then it has no terminal to lose.
    let _leader_already = setsid();
    let _stays_where_it_is = chdir("/");
    let mut text = Vec::new();
    tokio::io::stdin()
        .take(HANDOVER_BYTES_MAX)
        .read_to_end(&mut text)
        .await
        .or_infrastructure()?;
    let given: Given = serde_json::from_slice(&text).map_err(|error| {
        CliError::usage(format!("this is no machine to keep: {error}"))
            .hint("`kiln run --keep` starts this by itself")
    })?;
    let operator = Operator::load()?;
    let host = operator.host().await?;
    let site = operator.site()?;
    given.keeps_off();
    let handover = given.handover;
    // Before the machine is its own: from then on nobody else answers for it.
    let _watched = watch::begin(&handover).or_infrastructure()?;
    // The values of the command's secrets ended with it: what its machine asks for from now on is recorded as it is.
    let kept = keep(&host, &site, handover, Mask::default(), &cancel, |facts| {
        screen.data(facts, String::new);
        // The command that waited for it is about to go.
        if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
            let _stays_open = rustix::stdio::dup2_stdout(null);
        }
    });
    let kept = kept.await;
    // Where no controller of the home runs now, the next command that asks for the record hands it in.
    home_queue::hand_in_if_there(&operator.home).await;
    kept.map_err(CliError::from_failure)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use kiln_core::ByteSize;
    use kiln_core::network::SpecialRange;
    use kiln_network::gateway::HostFloor;
    use serde_json::json;

    use super::*;

    /// Longest wait for a resolver, which nobody asks here.
    const RESOLVES: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_keeper_keeps_off_where_the_controller_said_that_the_installation_is() {
        let handover = json!({
            "schema": 1, "machine": "r1m7zxmk0w0t3neew0-1-run", "job": "r1m7zxmk0w0t3neew0", "tenant": "local",
            "image": null, "command": ["true"], "ended": "", "exit_code": 0, "cpus": 1, "memory": ByteSize::mib(512),
            "network": kiln_core::NetworkPolicy::Open, "bytes_out_and_in_per_second": [null, null], "connections_max": null, "runc": null, "stays_ms": 1,
        });
        let handover: Handover = serde_json::from_value(handover).expect("a handover");
        let own = OwnPlaces::of_process();
        own.set(CONTROLLER, ["9.9.9.20"]);
        let handed = serde_json::to_vec(&Given::of(&handover)).expect("JSON");
        // Its keeper is another process.
        own.set(CONTROLLER, [""; 0]);
        let places = ["9.9.9.20", "9.9.9.21"];
        let places: [IpAddr; 2] = places.map(|place| place.parse().expect("an address"));
        let floor = HostFloor::new(Vec::new());
        let found = async || {
            let checked = floor.check("a.example.org", &places, RESOLVES).await;
            checked
                .into_iter()
                .map(|(_, verdict)| verdict)
                .collect::<Vec<_>>()
        };
        let fine: Result<(), SpecialRange> = Ok(());
        assert_eq!(found().await, [fine, fine]);
        let given: Given = serde_json::from_slice(&handed).expect("reads");
        given.keeps_off();
        assert_eq!(found().await, [Err(SpecialRange::Own), fine]);
        own.set(CONTROLLER, [""; 0]);
    }
}
