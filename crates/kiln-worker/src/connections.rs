//! How many connections a machine may have at once: what its policy says, on both sides of the channel.

use kiln_network::Limits;
use kiln_proto::Session;
use kiln_proto::msg::{CONNECTIONS_MOST, OTHER_STREAMS, Order};

use crate::event::Events;
use crate::orders;

/// Bounds a gateway: fewer than usual, or more, where a policy says so.
pub(crate) fn bound(limits: &mut Limits, most: Option<u32>) {
    if let Some(most) = most {
        limits.connections_max = usize::try_from(most.min(CONNECTIONS_MOST))
            .unwrap_or(1)
            .max(1);
    }
}

/// Makes room for more connections than usual in the channel and in the guest. A guest of an older image has fewer: told, not fatal.
pub(crate) async fn allow(session: &Session, most: Option<u32>, events: &Events) {
    let usual = u32::try_from(Limits::default().connections_max).unwrap_or(u32::MAX);
    let Some(most) = most.filter(|most| *most > usual) else {
        return;
    };
    let most = most.min(CONNECTIONS_MOST);
    session.peer_may_open(usize::try_from(most).unwrap_or(0) + OTHER_STREAMS);
    let order = Order::SetConnections { most };
    let done = orders::call_done(
        session,
        "take more connections",
        &order,
        orders::ORDER_TIMEOUT,
    );
    if let Err(failure) = done.await {
        let why = orders::chain(&failure);
        events
            .warn(format!(
                "the machine has fewer connections than its policy allows: {why}"
            ))
            .await;
    }
}
