//! Machines that no lease answers for are found, destroyed and counted; all others are left alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_core::{AttemptId, ByteSize, MachineName};
use kiln_machine::driver::{Driver as _, Machine, MachineState, Start};
use kiln_machine::sim::{SimConfig, SimDriver};
use kiln_worker::attempt;
use kiln_worker::fleet::reconcile::{Found, Reconciler};

use crate::workshop::{Guest, Workshop};

async fn launch(shop: &Workshop, driver: &SimDriver, name: &str) -> Arc<dyn Machine> {
    let name: MachineName = name.parse().expect("a name");
    let spec = attempt::spec(&shop.host, name, 1, ByteSize::mib(512), Vec::new());
    driver.launch(&spec, Start::Cold).await.expect("starts")
}

#[tokio::test]
async fn machines_that_no_lease_answers_for_are_destroyed_and_counted() {
    let shop = Workshop::open(Guest::Honest).await;
    let config = SimConfig {
        stand_in: true,
        ..SimConfig::default()
    };
    let driver = SimDriver::new(&shop.host.home.data, config);
    let held = launch(&shop, &driver, "j1-1-run").await;
    let orphan = launch(&shop, &driver, "j2-1-run").await;
    let later = launch(&shop, &driver, "j1-2-build").await;
    let maker = launch(&shop, &driver, "template-1a").await;
    // Its process is gone.
    let dead = launch(&shop, &driver, "j3-1-build").await;
    driver.machine(dead.name()).expect("lives").abandon();

    let attempt = |job: &str, number| AttemptId {
        job: job.parse().expect("an id"),
        number,
    };
    let first = BTreeSet::from([attempt("j1", 1)]);
    let mut reconciler = Reconciler::default();
    let found = reconciler.look(&shop.host, &first).await;
    assert_eq!(found.reaped, ["j3-1-build"]);
    assert_eq!(
        (found.ended, found.leaks),
        (vec![], vec![]),
        "the first look only suspects"
    );
    // Its lease came in between the two looks.
    let second = BTreeSet::from([attempt("j1", 1), attempt("j1", 2)]);
    let found = reconciler.look(&shop.host, &second).await;
    assert_eq!(found.ended, [orphan.name().clone()]);
    assert_eq!((found.orphans(), found.leaks), (1, vec![]));
    assert!(matches!(orphan.stopped().await, MachineState::Stopped(_)));
    let found = reconciler.look(&shop.host, &second).await;
    assert_eq!(found, Found::default());
    for machine in [&held, &later, &maker] {
        assert_eq!(machine.state(), MachineState::Running, "{}", machine.name());
    }
    drop((held, later, maker, orphan, dead));
    shop.assert_left(&[], "orphans").await;
}
